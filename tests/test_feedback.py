"""Feedback latents: the recurrence equals a loop without cache, the parallel iteration becomes
exact, checkpointing changes nothing.
"""

import pytest
import torch
from conftest import gradients

from crystal import feedback
from crystal.losses import ce_rows

# Latents of each row, counted from the end of its prompt: two segments, one, none.
PLACES = [(4, 5, 6, 13, 14, 15), (2, 3, 4), ()]


@pytest.fixture
def ragged(setup):
    """ragged(*flags) -> setup whose batch has room for latents behind each prompt; `latents` marks them,
    `text` all else there.
    """

    def make(*flags, which=None, **how):
        s = setup("--method", "sft", "--lora_dropout", "0", *flags, which=which, **how)
        g = torch.Generator().manual_seed(5)
        B, L = s.batch["input_ids"].shape
        ends = s.batch["attention_mask"].sum(1)
        room = 20 + torch.arange(B)  # every row grows by another length
        wide = int((ends + room).max())
        new = {
            n: torch.zeros(B, wide, dtype=torch.long)
            for n in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        s.latents, s.text = torch.zeros(B, wide, dtype=torch.bool), torch.zeros(B, wide, dtype=torch.bool)
        for b in range(B):
            end = int(ends[b])
            for n in new:
                new[n][b, :end] = s.batch[n][b, :end]
            stop = end + int(room[b])
            new["input_ids"][b, end:stop] = torch.randint(5, 300, (int(room[b]),), generator=g)
            new["attention_mask"][b, end:stop] = 1
            places = PLACES[(which or range(B))[b]]
            s.latents[b, [end + p for p in places]] = True
            s.text[b, end:stop] = True
        s.text &= ~s.latents
        s.batch = dict(s.batch, **new)
        return s

    return make


def by_the_letter(model, inputs, latents, layer=None):
    """One sequence, one whole forward per latent, no cache: each latent's embedding is the state before it.
    """
    (B, L), hf = latents.shape, model.hf
    assert B == 1
    x = hf.get_input_embeddings()(inputs["input_ids"])
    image = torch.cat(
        hf.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    )
    x = x.masked_scatter((inputs["mm_token_type_ids"] == 1)[:, :, None], image)
    positions, seen = model.positions(inputs), []
    run = lambda x: (
        hf.model.language_model(
            inputs_embeds=x, position_ids=positions[:, :, : x.shape[1]], use_cache=False
        ).last_hidden_state
    )
    for t in latents[0].nonzero()[:, 0].tolist():
        before = run(x[:, :t])[:, -1:]
        x = torch.cat([x[:, :t], before, x[:, t + 1 :]], 1)
    hook = (
        model.layers[layer - 1].register_forward_hook(lambda _, __, out: seen.append(out)) if layer else None
    )
    h = run(x)
    if hook:
        hook.remove()
    return h, seen[0] if seen else None


def alone(s, b):
    """Row b of a batch without its padding."""
    n, first = int(s.batch["attention_mask"][b].sum()), sum(len(r.images) for r in s.records[:b])
    images = slice(first, first + len(s.records[b].images))
    sizes = s.batch["image_grid_thw"].prod(-1).tolist()
    pixels = slice(sum(sizes[: images.start]), sum(sizes[: images.stop]))
    return (
        {k: s.batch[k][b : b + 1, :n] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        | {
            "pixel_values": s.batch["pixel_values"][pixels],
            "image_grid_thw": s.batch["image_grid_thw"][images],
        },
        s.latents[b : b + 1, :n],
    )


def loss_of(s, h, layer, ids, latents, text):
    """Cross entropy of the text, and a loss of the latents' middle states, as VaLR has both."""
    rows = text[:, 1:]
    ce = ce_rows(s.model.logits(h[:, :-1][rows]), ids[:, 1:][rows])
    return ce.sum() + layer[latents].square().sum()


@pytest.mark.parametrize("flags", [(), ("--tune", "full")])
def test_recurrence_equals_a_loop_without_cache(ragged, float64_modules, flags):
    """Ragged batch of two segments, one, and none, two images in one row: logits, loss and every gradient."""
    s = ragged(*flags)
    h, layers = feedback.recurrence(s.model, s.batch, s.latents, (2,))
    loss = loss_of(s, h, layers[2], s.batch["input_ids"], s.latents, s.text)
    expected = 0.0
    for b in range(3):
        inputs, latents = alone(s, b)
        h_b, middle = by_the_letter(s.model, inputs, latents, 2)
        n = h_b.shape[1]
        assert (s.model.logits(h[b, :n]) - s.model.logits(h_b[0])).abs().max() < 1e-10
        assert (layers[2][b, :n] - middle[0]).abs().max() < 1e-10
        expected = expected + loss_of(s, h_b, middle, inputs["input_ids"], latents, s.text[b : b + 1, :n])
    assert abs(loss - expected) < 1e-10 * abs(expected)
    a, b = gradients(loss, s.named), gradients(expected, s.named)
    for n in a:
        assert (a[n] - b[n]).abs().max() < 1e-10 * (1 + b[n].abs().max()), n
    assert all(a[n].abs().max() > 0 for n in a)


@pytest.mark.parametrize("updates", [None, 6])
def test_checkpointing_changes_nothing(ragged, updates):
    def step(*flags):
        s = ragged(*flags)
        s.model.train()
        h, layers = feedback.forward(s.model, s.batch, s.latents, updates, (2,))
        return h, gradients(loss_of(s, h, layers[2], s.batch["input_ids"], s.latents, s.text), s.named)

    (h, plain), (h_again, again) = step(), step("--checkpointing")
    assert torch.equal(h, h_again)
    assert all((plain[n] - again[n]).abs().max() <= 1e-12 * plain[n].abs().max() for n in plain)


def test_checkpointing_is_really_on(ragged, monkeypatch):
    """The test above would pass if checkpointing were off: count the decoder layer's runs."""
    s = ragged("--checkpointing", which=[0])
    s.model.train()
    calls, q = [], s.model.layers[0].self_attn.q_proj
    q.register_forward_hook(lambda *_: calls.append(1))
    h, _ = feedback.recurrence(s.model, s.batch, s.latents)
    forward = len(calls)
    h[s.text].sum().backward()
    assert forward == 7 and len(calls) == 14


def test_parallel_becomes_exact_update_by_update(ragged, float64_modules):
    """Row 0 has six latents: exact after five updates and not before; row 1, three, after two."""
    s = ragged()
    exact, middle = feedback.recurrence(s.model, s.batch, s.latents, (2,))
    real = s.batch["attention_mask"].bool()
    grads = gradients(loss_of(s, exact, middle[2], s.batch["input_ids"], s.latents, s.text), s.named)
    for T in range(7):
        h, layers = feedback.parallel(s.model, s.batch, s.latents, T, (2,))
        off = [float((h[b] - exact[b])[real[b]].detach().abs().max()) for b in range(3)]
        assert [x < 1e-10 for x in off] == [T >= 5, T >= 2, True], (T, off)
        if T >= 5:
            assert (layers[2] - middle[2])[real].abs().max() < 1e-10
            found = gradients(loss_of(s, h, layers[2], s.batch["input_ids"], s.latents, s.text), s.named)
            assert all((found[n] - grads[n]).abs().max() < 1e-10 * (1 + grads[n].abs().max()) for n in grads)
    errors = feedback.parallel_error(s.model, s.batch, s.latents, (0, 1, 5))
    assert errors[0][0] > 1e-3 and errors[1][0] > 1e-3 and max(errors[5]) < 1e-10


def test_without_latents_it_is_the_plain_forward(ragged):
    s = ragged()
    none = torch.zeros_like(s.latents)
    real = s.batch["attention_mask"].bool()
    plain = s.model.hidden(s.batch)[real]
    assert torch.equal(feedback.recurrence(s.model, s.batch, none)[0][real], plain)
    assert torch.equal(feedback.parallel(s.model, s.batch, none, 3)[0][real], plain)


def test_no_row_sees_the_future_and_no_latent_its_token(ragged):
    s = ragged()
    h, _ = feedback.recurrence(s.model, s.batch, s.latents)
    ids = torch.where(s.latents, torch.full_like(s.batch["input_ids"], 9), s.batch["input_ids"])
    real = s.batch["attention_mask"].bool()
    assert torch.equal(
        feedback.recurrence(s.model, dict(s.batch, input_ids=ids), s.latents)[0][real], h[real]
    )
    t = int(s.latents[0].nonzero()[-1]) + 1
    ids[0, t:] = 11
    other, _ = feedback.recurrence(s.model, dict(s.batch, input_ids=ids), s.latents)
    assert torch.equal(other[0, :t], h[0, :t]) and not torch.equal(other[0, t:], h[0, t:])


def test_one_pass_over_filled_inputs_leaves_the_same_states(ragged, float64_modules):
    s = ragged()
    h, _ = feedback.recurrence(s.model, s.batch, s.latents)
    real = s.batch["attention_mask"].bool()
    with feedback.filled(s.model, h, s.latents):
        assert (s.model.hidden(s.batch) - h)[real].abs().max() < 1e-10
    assert (s.model.hidden(s.batch) - h)[real].abs().max() > 1e-3  # closed again: latents are tokens


def test_misplaced_latents_are_refused(ragged):
    s = ragged()
    for b, t in ((0, 0), (0, s.latents.shape[1] - 1)):
        wrong = s.latents.clone()
        wrong[b, t] = True
        with pytest.raises(ValueError, match="needs a token before it"):
            feedback.recurrence(s.model, s.batch, wrong)
    wrong = s.latents.clone()
    wrong[0, 1] = True
    with pytest.raises(ValueError, match="images must stand before"):
        feedback.recurrence(s.model, s.batch, wrong)
    with pytest.raises(ValueError, match="layers 1 to 3"):
        feedback.recurrence(s.model, s.batch, s.latents, (4,))
    with pytest.raises(ValueError, match="at least 0"):
        feedback.parallel(s.model, s.batch, s.latents, -1)


def test_the_command_prints_error_and_time(records_file, capsys):
    """On the shipped model the errors fall with T."""
    from crystal.runtime.config import UserError
    from data_prep.checks import feedback as feedback_check

    feedback_check.main(["--data", str(records_file), "--records", "1", "--updates", "0,3", "--repeats", "1"])
    head, _, *table = capsys.readouterr().out.splitlines()
    assert "16 latents a segment, up to 32 a record" in head
    rows = [line.split() for line in table]
    assert [row[0] for row in rows] == ["0", "3"] and all(
        float(rows[0][i]) > 1.2 * float(rows[1][i]) > 0 for i in (1, 2)
    )
    with pytest.raises(UserError, match="no-run: no such directory"):
        feedback_check.main(["--run", "./no-run"])
    for flags in (["--updates", "x"], ["--updates", "-1"], ["--records", "0"], ["--repeats", "0"]):
        with pytest.raises(UserError, match=" ".join(flags)):
            feedback_check.main(flags)


def test_without_gradients_no_piece_keeps_those_before_it(ragged):
    """Each holds all keys so far: kept in a chain they would be the square of the length. With gradients they
    are what the later ones hang on.
    """
    s = ragged()
    ids = s.batch["input_ids"][:1, :4]
    at = torch.arange(4).expand(3, 1, 4)
    for wanted in (False, True):
        stream = feedback.Stream(s.model)
        with torch.set_grad_enabled(wanted):
            for t in range(4):
                valid = torch.ones(1, 1, dtype=torch.bool)
                _, _, piece = stream.run(at[:, :, t : t + 1], valid, input_ids=ids[:, t : t + 1])
                stream.keep(piece)
        held = [k.shape[2] for k, _ in stream.cache.held.values()]
        assert held == [4] * len(s.model.layers) and (stream.cache.past is not None) == wanted
