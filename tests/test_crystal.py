"""CrystaL's step: every term alive and equal to finite differences; pairs independent of padding
and batch; nothing leaks.
"""

import pytest
import torch
from conftest import gradients

from crystal import methods
from crystal.layout import IGNORE
from crystal.methods.crystal import position_mask, positions

NAMED = {"paper": "crystal", "released": "released"}  # whose choices, and the method that makes them
TERMS = {"paper": ("ce_int", "ce_cor", "kl", "attn"), "released": ("ce", "kl", "attn")}


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", TERMS)
def test_every_term_alone_moves_what_trains(setup, preset, tune, checkpointing):
    s = setup("--method", NAMED[preset], "--tune", tune, *(["--checkpointing"] if checkpointing else []))
    terms = s.objective(s.batch, 0.0)
    assert set(terms) == {*TERMS[preset], *s.method.monitored}
    for name in TERMS[preset]:
        grads = gradients(terms[name], s.named)
        rows = next(n for n in grads if n.endswith("new_tokens.embedding"))
        weights = [n for n in grads if ".layers." in n]
        # in the last layer nothing after the scores can matter to the attention loss;
        # before it everything does
        deep = [n for n in weights if not (name == "attn" and ".layers.2." in n)]
        assert grads[rows].abs().max() > 1e-9, f"{name} does not reach the latents' rows"
        dead = [n for n in deep if grads[n].abs().max() < 1e-12]
        assert not dead, f"{name} does not reach {dead}"


@pytest.mark.parametrize("preset", TERMS)
def test_checkpointing_changes_no_gradient(setup, preset):
    step = lambda *flags: (
        lambda s: gradients(sum(s.objective(s.batch, 0.0)[n] for n in TERMS[preset]), s.named)
    )(setup("--method", NAMED[preset], "--lora_dropout", "0", *flags))
    plain, again = step(), step("--checkpointing")
    assert all(torch.equal(plain[n], again[n]) for n in plain)


@pytest.mark.gradcheck
@pytest.mark.parametrize(
    "preset, which, extra",
    [
        ("paper", None, ()),
        ("paper", [0], ()),
        ("released", None, ()),
        ("released", [0], ()),
        ("paper", [0], ("--attn_loss", "frobenius", "--attn_layers", "all")),
        ("paper", [0], ("--attn_loss", "mse", "--attn_columns", "all")),
    ],
)
def test_gradient_of_each_term_equals_central_differences(setup, float64_modules, preset, which, extra):
    """Of the whole float64 step, teacher included, at five adapter entries and three of one latent's row.

    which: a ragged batch of three (None), or one pair with a one-token answer.
    """
    s = setup("--method", NAMED[preset], "--teacher_grad", "--lora_dropout", "0", *extra, which=which)
    names = TERMS[preset]
    terms = s.objective(s.batch, 0.0)
    grads = {name: gradients(terms[name], s.named) for name in names}
    parameters = dict(s.named)
    g = torch.Generator().manual_seed(3)
    adapters = [n for n in parameters if "lora_" in n and ".layers.2.mlp" not in n]
    chosen = [
        (n, int(torch.randint(parameters[n].numel(), (1,), generator=g)))
        for n in (adapters[i] for i in torch.randperm(len(adapters), generator=g)[:5])
    ]
    rows = next(n for n in parameters if n.endswith("new_tokens.embedding"))
    # The first latent's row, after four tags.
    chosen += [(rows, 4 * parameters[rows].shape[1] + i) for i in (0, 13, 29)]
    h = 1e-5
    for name, i in chosen:
        flat = parameters[name].data.view(-1)
        ends = []
        for sign in (1, -1):
            flat[i] += sign * h
            s.model.after_update()  # the rows' values live in the vocabulary
            with torch.no_grad():
                ends.append(s.objective(s.batch, 0.0))
            flat[i] -= sign * h
        s.model.after_update()
        for term in names:
            numeric = float(ends[0][term] - ends[1][term]) / (2 * h)
            exact = float(grads[term][name].view(-1)[i])
            assert abs(numeric - exact) < 1e-7 + 1e-5 * abs(exact), (
                f"{term} at {name}[{i}]: {numeric} instead of {exact}"
            )


def test_one_token_answer_has_something_to_lose(setup):
    s = setup(which=[0])
    assert len(s.fmt.text("red")) == 1
    terms = s.objective(s.batch, 0.0)
    assert terms["kl"] > 1e-9 and terms["attn"] > 1e-9


def test_the_teacher_is_detached_unless_asked(setup):
    """With the corrupted path's inputs cut off from the intact one, KL and attention loss must not
    move the intact image.
    """
    for flag, moved in (("--no-teacher_grad", False), ("--teacher_grad", True)):
        s = setup(flag)
        s.method.copied = lambda batch: torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        pixels = s.batch["pixel_values"].requires_grad_()
        terms = s.objective(s.batch, 0.0)
        for name in ("kl", "attn"):
            (grad,) = torch.autograd.grad(terms[name], pixels, allow_unused=True, retain_graph=True)
            assert (grad is not None and bool(grad.abs().max() > 0)) == moved, name


@pytest.mark.parametrize("preset", TERMS)
def test_a_pair_does_not_see_its_batch(setup, preset):
    """Batch of three ragged pairs = mean of the three alone."""
    flags = ("--method", NAMED[preset], "--lora_dropout", "0")
    s = setup(*flags)
    together, alone = s.objective(s.batch, 0.0), []
    for i in range(3):
        t, e = setup(*flags, which=[i]), s.examples[0, i]
        # strengths are drawn by place in the file: the lone pair gets the corrupted image of the batch
        alone.append(t.objective(dict(t.batch, pixel_values_cor=e["pixel_values_cor"].double()), 0.0))
    for name in TERMS[preset]:
        assert abs(together[name] - sum(a[name] for a in alone) / 3) < 1e-6, name


def test_more_padding_changes_nothing(setup):
    s = setup()
    before = s.objective(s.batch, 0.0)
    wider = dict(s.batch)
    for name, fill in (
        ("input_ids", s.model.tokenizer.pad_token_id),
        ("targets", IGNORE),
        ("attention_mask", 0),
        ("mm_token_type_ids", 0),
    ):
        wider[name] = torch.nn.functional.pad(s.batch[name], (0, 7), value=fill)
    for name in ("answer_positions", "latents", "image"):
        wider[name] = torch.nn.functional.pad(s.batch[name], (0, 2), value=-1)
    after = s.objective(wider, 0.0)
    assert all(abs(before[n] - after[n]) < 1e-6 for n in before)


def test_no_row_sees_the_future(setup):
    s = setup(which=[0])
    h = s.model.hidden(s.batch)
    t = int(s.batch["answer"][0, 0])
    changed = dict(s.batch, input_ids=s.batch["input_ids"].clone())
    changed["input_ids"][0, t + 1 :] = 7
    other = s.model.hidden(changed)
    assert torch.equal(h[0, : t + 1], other[0, : t + 1]) and not torch.equal(h[0, t + 1 :], other[0, t + 1 :])


def test_labels_rows_and_columns(setup):
    s = setup(which=[0])
    ids, targets = s.batch["input_ids"][0].tolist(), s.batch["targets"][0].tolist()
    rows = s.method.answer_positions(s.batch)[0].tolist()
    assert ids[rows[0]] == s.fmt.answer_start_id and [targets[r] for r in rows] == s.fmt.text("red") + [
        s.fmt.answer_end_id, s.fmt.end,
    ]
    latents = s.method.columns(s.batch)[0].tolist()
    assert [ids[c] for c in latents] == s.fmt.latents and max(latents) < rows[0]
    released = setup("--method", "released", which=[0])
    rows = released.method.answer_positions(released.batch)[0].tolist()
    assert [ids[r] for r in rows] == [
        s.fmt.answer_start_id, *s.fmt.text("red"), s.fmt.answer_end_id, s.fmt.end,
    ]
    copied = released.method.copied(released.batch)[0].nonzero()[:, 0].tolist()
    assert (
        ids[copied[0]] == s.fmt.think_start_id
        and ids[copied[-1]] == s.fmt.think_end_id
        and copied == released.method.columns(released.batch)[0].tolist()
    )


def test_no_loss_reads_a_copied_row_of_the_corrupted_path(setup):
    """Noise on those rows' final states changes no term; noise on the others' does."""
    s = setup()
    copied = s.method.copied(s.batch)
    plain = s.objective(s.batch, 0.0)
    hidden, where = s.model.hidden, copied

    def noisy(*args, **kwargs):
        h = hidden(*args, **kwargs)
        return h + torch.cat([torch.zeros_like(h[:3]), 9.0 * where[:, :, None].expand_as(h[:3])])

    s.model.hidden = noisy
    again = s.objective(s.batch, 0.0)
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    where = ~copied
    assert not torch.equal(plain["ce_cor"], s.objective(s.batch, 0.0)["ce_cor"])


@pytest.mark.parametrize("realisation, sequences", [("hidden", 6), ("kv", 6), ("packed", 3)])
def test_the_realisation_that_runs_is_the_one_asked_for(setup, monkeypatch, realisation, sequences):
    """All three give the same numbers, so only the forward itself tells which one ran: 2B sequences and what
    is copied, or B.
    """
    s = setup("--latent_copy", realisation)
    seen, hidden = [], s.model.hidden

    def look(inputs, latent_copy=None, recorder=None, biases=()):
        seen.append((len(inputs["input_ids"]), latent_copy and latent_copy.realisation, len(biases)))
        return hidden(inputs, latent_copy=latent_copy, recorder=recorder, biases=biases)

    monkeypatch.setattr(s.model, "hidden", look)
    s.objective(s.batch, 0.0)
    copies = None if realisation == "packed" else realisation
    assert seen == [(sequences, copies, 2 if realisation == "packed" else 0)]
    assert methods.parse([]).latent_copy == "kv"


def test_positions_and_masks():
    spans = torch.tensor([[2, 5], [1, 2]])
    assert positions(spans).tolist() == [[2, 3, 4], [1, -1, -1]]
    assert position_mask(positions(spans), 6).int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
