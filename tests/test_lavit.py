"""LaViT: every term alive, the gate's limits exact, controls that change what they say,
gaze as pure functions.
"""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import eager_mass, gradients
from safetensors.torch import load_file, save_file
from test_ddp import SCRIPT, run

from crystal import layout, losses, methods, train
from crystal.attention_bias import additive_mask
from crystal.evaluation import asking
from crystal.latent_copy import LatentCopy
from crystal.methods.crystal import position_mask
from crystal.methods.lavit import align, entropy, focus, inside, normalise, salient, top
from crystal.methods.sft import cross_entropy
from crystal.runtime import checkpoint, data
from crystal.runtime.config import Progress, UserError
from crystal.runtime.data import RecordError

TERMS = ("ce", "semantics", "gaze")
LORA = ("--method", "lavit", "--tune", "lora")
# The teacher's, of each record's images; the last record's are not the student's (4 x 3, 3 x 2).
GRIDS = ([[3, 4]], [[2, 2]], [[5, 3], [2, 3]])


def at(of_run):
    return Progress(0, 0, of_run, of_run)


@pytest.fixture(scope="session")
def records_file(records_file):
    """conftest's records with a made-up teacher's features."""
    g, tensors, lines = torch.Generator().manual_seed(5), {}, []
    for line, grids in zip(records_file.read_text().splitlines(), GRIDS):
        record = json.loads(line)
        tensors |= {
            f"{record['id']}/gaze": torch.rand(sum(h * w for h, w in grids), generator=g),
            f"{record['id']}/gaze_grid": torch.tensor(grids),
            f"{record['id']}/v_sem": torch.randn(32, generator=g),
        }
        lines.append(json.dumps(record | {"features": {"lavit": "teacher.safetensors"}}) + "\n")
    save_file(tensors, records_file.parent / "teacher.safetensors")
    path = records_file.parent / "lavit.jsonl"
    path.write_text("".join(lines))
    return path


# --- the sequence ---


def test_sequence_and_rows(setup):
    s = setup(*LORA, which=[0])
    text = s.model.tokenizer.decode(s.batch["input_ids"][0])
    assert text.endswith("<|im_start|>assistant\n<|latent_0|><|latent_1|><|latent_2|><answer>red<|im_end|>")
    rows = s.batch["answer_positions"][0].tolist()
    # What predicts red is no latent.
    assert [s.model.tokenizer.decode(s.batch["input_ids"][0, t]) for t in rows] == ["<answer>", "red"]
    assert not set(rows) & set(s.batch["latents"][0].tolist())


def test_export_asks_as_training_does(setup):
    s = setup(*LORA)
    ids, image, latents = s.fmt.question([("user", "<image>\nWhat is it?")], [4])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    rendered = s.model.tokenizer.apply_chat_template(
        messages, chat_template=s.fmt.chat_template(), tokenize=False, add_generation_prompt=True
    )
    assert s.model.tokenizer.decode(ids).replace("<|image_pad|>" * 4, "<|image_pad|>") == rendered
    assert [ids[t] for t in latents] == s.fmt.latents and len(image) == 4
    assert (
        s.fmt.question([("user", "hello")], [], "drop")[0][-1] == s.fmt.answer_start_id
        and not s.fmt.question([("user", "hello")], [], "drop")[2]
    )


# --- the terms ---


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_term_alone_moves_what_trains(setup, tune, checkpointing):
    s = setup("--method", "lavit", "--tune", tune, *(["--checkpointing"] if checkpointing else []))
    terms = s.objective(s.batch, at(0.1))
    assert set(terms) == {*TERMS, "mass"}
    for name in TERMS:
        grads = gradients(terms[name], s.named)
        assert next(g for n, g in grads.items() if n.endswith("new_tokens.embedding")).abs().max() > 1e-9, (
            f"{name} does not reach the latents' rows"
        )
        # in the last layer gaze ends at the scores
        deep = [n for n in grads if ".layers." in n and not (name == "gaze" and ".layers.2." in n)]
        deep += [n for n in grads if n.startswith("heads.") and name == "semantics"]
        dead = [n for n in deep if grads[n].abs().max() < 1e-12]
        assert deep and not dead, f"{name} does not reach {dead}"
        if name == "gaze":
            assert any(grads[n].abs().max() > 1e-9 for n in grads if ".layers.2.self_attn.k_proj" in n)


def test_checkpointing_changes_no_gradient(setup):
    def step(*flags):
        s = setup(*LORA, *flags)
        terms = s.objective(s.batch, at(0.1))
        return gradients(sum(terms[name] for name in TERMS), s.named)

    plain, again = step(), step("--checkpointing")
    assert all(torch.equal(plain[n], again[n]) for n in plain)


@pytest.mark.gradcheck
def test_gradient_of_each_term_equals_central_differences(setup, float64_modules):
    s = setup(*LORA, "--lora_dropout", "0")
    terms = s.objective(s.batch, at(0.2))
    grads = {name: gradients(terms[name], s.named) for name in TERMS}
    parameters, h = dict(s.named), 1e-5
    rows = next(n for n in parameters if n.endswith("new_tokens.embedding"))
    D = parameters[rows].shape[1]
    chosen = [
        (next(n for n in parameters if ".layers.1.self_attn.q_proj.lora_A" in n), 3),
        (next(n for n in parameters if ".layers.0.mlp.up_proj.lora_B" in n), 5),
        (rows, 1 * D + 2),
        (rows, 3 * D + 7),
        ("heads.semantics.0.weight", 11),
    ]
    for name, i in chosen:
        flat, ends = parameters[name].data.view(-1), []
        for sign in (1, -1):
            flat[i] += sign * h
            s.model.after_update()
            with torch.no_grad():
                ends.append(s.objective(s.batch, at(0.2)))
            flat[i] -= sign * h
        s.model.after_update()
        for term in TERMS:
            numeric, exact = (
                float(ends[0][term] - ends[1][term]) / (2 * h),
                float(grads[term][name].view(-1)[i]),
            )
            assert abs(numeric - exact) < 1e-7 + 1e-5 * abs(exact), (
                f"{term} at {name}[{i}]: {numeric} instead of {exact}"
            )


def test_a_pair_counts_the_same_alone_and_in_a_padded_batch(setup):
    s = setup(*LORA)
    together = s.objective(s.batch, at(0.1))
    alone = [t.objective(t.batch, at(0.1)) for t in (setup(*LORA, which=[i]) for i in range(3))]
    for name in TERMS:
        assert abs(together[name] - sum(x[name] for x in alone) / 3) < 1e-6, name


def test_the_latents_share_of_attention_is_watched_through_the_gate(setup):
    s = setup(*LORA)
    shut, opened = (s.objective(s.batch, at(of_run))["mass"] for of_run in (0.1, 1.0))
    assert shut.item() == pytest.approx(
        eager_mass(s, s.method.gated(s.model, s.batch, s.method.gamma(0.1))), rel=1e-6
    )
    assert opened.item() == pytest.approx(eager_mass(s, []), rel=1e-6) and shut != opened and opened > 0
    assert "mass" in s.method.monitored and not shut.requires_grad


def test_gaze_is_the_mean_over_layers_and_heads_of_what_eager_attention_computes(setup, float64_modules):
    s = setup(*LORA, which=[0])
    terms, weights = s.objective(s.batch, at(1.0)), []

    def eager(layer, q, k, scale):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(
            torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -math.inf
        )
        weights.append(scores.softmax(-1))

    s.model.hidden(s.batch, recorder=eager)
    A = torch.stack(weights).mean((0, 2))[0][s.batch["latents"][0]][:, s.batch["image"][0]]  # [K,N]
    A = A / A.sum(1, keepdim=True)
    p = top(s.batch["gaze"][0].double(), 8)
    p = p / p.sum()
    kl = sum((p[j] * (p[j] / A[k, j]).log()) for k in range(3) for j in range(12) if p[j] > 0)
    assert abs(kl - terms["gaze"]) < 1e-6


def test_semantics_read_the_last_latent_through_the_head(setup):
    s = setup(*LORA)
    h, phi = s.model.hidden(s.batch), s.method.heads["semantics"]
    cosines = [
        torch.cosine_similarity(phi(h[b, s.batch["latents"][b, -1]]), s.batch["v_sem"][b].double(), 0)
        for b in range(3)
    ]
    assert abs(s.objective(s.batch, at(1.0))["semantics"] - (1 - sum(cosines) / 3)) < 1e-6


def test_first_head_is_a_function_of_the_seed(setup):
    """Torch's own first values of two layers with GELU between them, drawn after the seed;
    the global generator stays.
    """
    for seed in (0, 3):
        torch.manual_seed(8)
        s = setup(*LORA, "--seed", str(seed))
        after = torch.rand(())
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)]
        head = s.method.heads["semantics"]
        assert torch.equal(head[0].weight, layers[0].weight.double()) and torch.equal(
            head[2].weight, layers[1].weight.double()
        )
        torch.manual_seed(8)
        assert torch.equal(after, torch.rand(()))


def test_defaults_are_the_papers():
    """Appendix A.2 and section 4: a fully trained language model, lambda 0.3, K 4, the gate open after
    400 of 1000 steps.
    """
    expected = {
        "latents": 4,
        "tune": "full",
        "max_steps": 1000,
        "batch_size": 16,
        "lr": 5e-6,
        "weight_decay": 0.0,
        "warmup": 0.03,
        "decay": "linear",
        "gate": "cosine",
        "gate_warmup": 0.4,
        "gate_start": 1e-6,
        "w_semantics": 0.3,
        "w_gaze": 0.3,
        "gaze_top": 8,
    }
    settings = methods.parse(["--method", "lavit"])
    assert {name: getattr(settings, name) for name in expected} == expected


def test_loss_functions():
    cols = torch.tensor([[0, 1, 2, -1], [4, 5, 6, 7]])
    A = torch.tensor(
        [[[0.1, 0.2, 0.1, 0.0]] * 2, [[0.1, 0.1, 0.1, 0.1], [0.4, 0.1, 0.1, 0.2]]],
        dtype=torch.float64,
        requires_grad=True,
    )  # [B,K,N]
    p = torch.tensor([[0.25, 0.5, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    found = losses.gaze(A, p, cols)
    assert found[0].abs() < 1e-12  # renormalised, the same
    # Summed over latents.
    assert found[1].item() == pytest.approx(
        math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.125)
    )
    assert torch.autograd.gradcheck(
        lambda a: losses.gaze(a.abs(), p, cols), [A.detach()[1:].repeat(2, 1, 1).requires_grad_()]
    )
    nothing = losses.gaze(A, torch.zeros_like(p), cols)
    assert torch.equal(nothing, torch.zeros(2)) and not torch.autograd.grad(nothing.sum(), A)[0].any()
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert torch.allclose(
        losses.semantics(x, torch.tensor([[6.0, 8.0], [0.0, 2.0]])), torch.tensor([0.0, 1.0]), atol=1e-6
    )


# --- the gate ---


def test_gamma():
    of = lambda *flags: methods.get("lavit")(methods.parse(["--method", "lavit", *flags])).gamma
    gamma = of()
    assert gamma(0) == 1e-6 and gamma(0.2) == pytest.approx(0.5, abs=1e-6) and gamma(0.4) == gamma(1) == 1
    assert all(gamma(a / 100) < gamma((a + 1) / 100) for a in range(39))
    assert gamma(0.1) == pytest.approx(1e-6 + (1 - 1e-6) / 2 * (1 - math.cos(math.pi / 4)))
    hard = of("--gate", "hard")
    assert hard(0) == hard(0.399) == 0 and hard(0.4) == 1
    assert of("--gate", "open")(0) == 1 and of("--gate_warmup", "0.5", "--gate_start", "0.01")(0) == 0.01
    settings = methods.parse(["--method", "lavit"])
    # T_w = 400 of 1000.
    assert settings.progress(400).of_run == settings.gate_warmup and settings.max_steps == 1000


def test_open_gate_is_the_plain_model_to_the_bit(setup):
    s = setup(*LORA)
    assert torch.equal(s.objective(s.batch, at(0.4))["ce"], cross_entropy(s.model, s.batch))
    assert not torch.equal(s.objective(s.batch, at(0.39))["ce"], cross_entropy(s.model, s.batch))


def test_almost_closed_gate_is_close_to_the_mask(setup):
    s = setup(*LORA)
    rows = position_mask(s.batch["answer_positions"], s.batch["input_ids"].shape[1])
    shut, almost, half, plain = (
        s.model.hidden(s.batch, biases=s.method.gated(s.model, s.batch, g))[rows]
        for g in (0.0, 1e-6, 0.5, 1.0)
    )
    assert 0 < (shut - almost).abs().max() < 1e-4 * (shut - plain).abs().max()
    assert (half - plain).abs().max() < (shut - plain).abs().max()


def test_gate_blocks_the_answers_view_and_nothing_else(setup):
    s = setup(*LORA)
    mask = additive_mask(s.method.gated(s.model, s.batch, 0.0), s.batch["attention_mask"])[:, 0]
    plain = additive_mask([], s.batch["attention_mask"])[:, 0]
    for b in range(3):
        changed = {tuple(x) for x in (mask[b] != plain[b]).nonzero().tolist()}
        assert changed == {
            (m, n)
            for m in s.batch["answer_positions"][b].tolist()
            for n in s.batch["image"][b].tolist()
            if m >= 0 and n >= 0
        }
    half = additive_mask(s.method.gated(s.model, s.batch, 0.5), s.batch["attention_mask"])[:, 0]
    assert torch.allclose(half[mask != plain], torch.tensor(math.log(0.5)))


def test_closed_gate_with_all_else_frozen_hides_the_image_exactly(setup):
    """Two images, one batch; all rows but the answer's are lent: a closed gate leaves nothing to tell the
    images apart, an almost closed one does.
    """
    s = setup(*LORA, which=[0])
    L = s.batch["input_ids"].shape[1]
    image, rows = s.batch["input_ids"] == s.fmt.image, position_mask(s.batch["answer_positions"], L)
    twice = {
        n: s.batch[n].repeat(2, 1)
        for n in ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids", "answer_positions")
    }
    twice["pixel_values"] = torch.cat([s.batch["pixel_values"], s.batch["pixel_values"].flip(0)])
    copy = LatentCopy(~image & ~rows & s.batch["attention_mask"].bool(), "kv")
    for gamma, same in ((0.0, True), (1e-6, False), (1.0, False)):
        a, b = s.model.hidden(twice, latent_copy=copy, biases=s.method.gated(s.model, twice, gamma)).chunk(2)
        assert torch.equal(a[rows], b[rows]) == same, gamma


def test_no_future_leaks_through_the_gate(setup):
    s = setup(*LORA, which=[2])
    other = dict(s.batch, input_ids=s.batch["input_ids"].clone())
    last = int(s.batch["answer_positions"].max())
    other["input_ids"][0, last] = s.fmt.end
    assert not torch.equal(other["input_ids"], s.batch["input_ids"])
    for gamma in (0.0, 0.5):
        a, b = (
            s.model.hidden(x, biases=s.method.gated(s.model, s.batch, gamma))[0] for x in (s.batch, other)
        )
        assert torch.equal(a[:last], b[:last]) and not torch.equal(a[last], b[last])


def test_latents_masked_at_inference(setup):
    """Table 3's last control: other latents change no row but theirs, to the bit; seen, they do. It adds to
    a method's own mask.
    """
    s = setup(*LORA, which=[0])
    other = dict(s.batch, input_ids=s.batch["input_ids"].clone())
    at_latents = s.batch["latents"][0]
    other["input_ids"][0, at_latents] = other["input_ids"][0, at_latents.flip(0)]
    rest = torch.ones_like(s.batch["input_ids"], dtype=torch.bool)
    rest[0, at_latents] = False
    for how, same in ((asking.hide_latents(s.fmt), True), (lambda batch: [], False)):
        a, b = (s.model.hidden(x, biases=how(x))[rest] for x in (s.batch, other))
        assert torch.equal(a, b) == same
    both = asking.hide_latents(s.fmt, lambda batch: s.method.biases(s.model, batch))(s.batch)
    assert len(both) == 2 and torch.equal(both[0].keys, s.batch["input_ids"] == s.fmt.image)
    with pytest.raises(UserError, match="--latents mask"):
        asking.hide_latents(layout.Format(s.model.tokenizer))


def test_bottleneck_at_test_time_is_the_closed_gate(setup):
    """`evaluate --bottleneck` asks for the mask of a prompt whose only row is `<answer>`."""
    s = setup(*LORA, which=[0])
    ids, image, _ = s.fmt.question(s.records[0].turns, [len(s.batch["image"][0])])
    batch = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids)),
        "answer_positions": torch.tensor([[len(ids) - 1]]),
    }
    bias = s.method.biases(s.model, batch)[0]
    assert (
        bias.value == -math.inf
        and bias.queries.nonzero().tolist() == [[0, len(ids) - 1]]
        and bias.keys[0].nonzero()[:, 0].tolist() == image
    )


# --- controls change what they say and nothing else ---


def test_controls(setup):
    terms = lambda *flags, of_run=0.1: (lambda s: s.objective(s.batch, at(of_run)))(setup(*LORA, *flags))
    full = terms()
    without = terms("--w_gaze", "0")
    assert set(without) == {"ce", "semantics", "mass"} and all(
        abs(without[n] - full[n]) < 1e-12 for n in without
    )
    without = terms("--w_semantics", "0")
    assert set(without) == {"ce", "gaze", "mass"} and all(torch.equal(without[n], full[n]) for n in without)
    hard, open_ = terms("--gate", "hard"), terms("--gate", "open")
    assert all(abs(x["ce"] - full["ce"]) > 1e-6 for x in (hard, open_))
    for name in ("semantics", "gaze"):  # the latents stand before the gated rows
        assert torch.equal(hard[name], full[name]) and abs(open_[name] - full[name]) < 1e-12
    assert torch.equal(open_["ce"], terms(of_run=1.0)["ce"]) and torch.equal(
        hard["ce"], terms("--gate", "hard", of_run=0.0)["ce"]
    )
    fewer = terms("--gaze_top", "2")
    assert abs(fewer["gaze"] - full["gaze"]) > 1e-6 and all(
        torch.equal(fewer[n], full[n]) for n in ("ce", "semantics")
    )


def test_without_both_terms_no_teacher_is_needed(setup):
    s = setup(*LORA, "--w_gaze", "0", "--w_semantics", "0")
    assert not {"gaze", "v_sem"} & s.batch.keys() and not any(n.startswith("heads.") for n, _ in s.named)
    assert set(s.objective(s.batch, at(0.0))) == {"ce", "mass"}
    s.records[0].features = {}
    s.examples.build(0, 0)


def test_bad_input(setup):
    s = setup(*LORA)
    s.records[0].features = {}
    with pytest.raises(
        RecordError,
        match="lavit.jsonl:1: field 'features': no 'lavit' in it; data_prep/lavit_teacher.py makes it",
    ):
        s.examples.build(0, 0)
    with pytest.raises(
        RecordError, match="lavit.jsonl:3: field 'features': the teacher saw 2 images, the record has 1"
    ):
        s.method.extras(s.records[2], [None])
    s = setup(*LORA, "--semantics_dim", "7")
    with pytest.raises(RecordError, match="lavit.jsonl:1: field 'features': .*--semantics_dim 32 is needed"):
        s.examples.build(0, 0)
    for flags in (["--gate_warmup", "0"], ["--w_gaze", "-1"], ["--gate", "ajar"], ["--turns", "all"]):
        with pytest.raises(UserError, match=flags[0]):
            methods.parse(["--method", "lavit", *flags])


# --- runs ---


@pytest.fixture
def flags(model_dirs, records_file, tmp_path):
    return lambda name, *more: [
        "--method", "lavit", "--model", str(model_dirs[True]), "--data", str(records_file),
        "--output", str(tmp_path / name), "--latents", "3", "--lr", "1e-3", "--dtype", "float64",
        "--device", "cpu", "--eval_every", "0", "--log_every", "100", *more,
    ]


def test_two_processes_equal_one(flags, tmp_path):
    more = ["--max_steps", "3"]
    run(SCRIPT, flags("one", *more, "--batch_size", "4"))
    run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *SCRIPT],
        flags("two", *more, "--batch_size", "1", "--accumulation", "2"),
    )
    a, b = (
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    assert len(a) == len(b) == 3
    for x, y in zip(a, b):
        for name in (*TERMS, "loss", "grad_norm"):
            assert x[name] == pytest.approx(y[name], rel=1e-6, abs=1e-9), name
        assert x["loss"] == pytest.approx(x["ce"] + 0.3 * (x["semantics"] + x["gaze"]))  # eq. 9
    one, two = (
        load_file(tmp_path / n / "checkpoints" / "step-3" / "trainable.safetensors") for n in ("one", "two")
    )
    assert any("heads.semantics" in n for n in one) and all(
        torch.allclose(one[n], two[n], rtol=0, atol=1e-6) for n in one
    )


def test_a_resumed_run_is_the_unbroken_one(flags, tmp_path):
    more = ["--max_steps", "4", "--batch_size", "2", "--save_every", "2"]
    whole = train.main(flags("whole", *more))
    part = train.main(flags("part", *more))
    shutil.rmtree(checkpoint.step_dir(part, 4))
    train.main(flags("part", *more, "--resume"))
    a, b = (load_file(checkpoint.step_dir(r, 4) / "trainable.safetensors") for r in (whole, part))
    assert all(torch.equal(a[n], b[n]) for n in a)
    lines = [[json.loads(x) for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (whole, part)]
    assert [[x[n] for n in TERMS] for x in lines[0]] == [[x[n] for n in TERMS] for x in lines[1]]


# --- gaze: pure functions ---


def test_normalise_and_top():
    A = normalise(torch.tensor([2.0, 6.0, 4.0]))
    assert torch.allclose(A, torch.tensor([0.0, 1.0, 0.5])) and not normalise(torch.full((3,), 0.2)).any()
    assert torch.allclose(top(A, 2), torch.tensor([0.0, 2 / 3, 1 / 3])) and torch.allclose(
        top(A, 8), torch.tensor([0.0, 2 / 3, 1 / 3])
    )
    assert top(torch.ones(5), 2).tolist() == [0.5, 0.5, 0, 0, 0] and not top(torch.zeros(4), 2).any()


def test_align():
    A = torch.arange(10.0)
    assert torch.equal(align(A, [[2, 3], [2, 2]], [[2, 3], [2, 2]]), A)
    # bilinear, pixel centres: 1 x 2 to 1 x 4 sits at -1/4, 1/4, 3/4, 5/4 and takes the border's beyond it
    assert align(torch.tensor([0.0, 1.0]), [[1, 2]], [[1, 4]]).tolist() == [0, 0.25, 0.75, 1]
    # What follows is padding.
    both = align(
        torch.cat([A[:6], torch.tensor([0.0, 1.0]), torch.zeros(3)]), [[2, 3], [1, 2]], [[2, 3], [1, 4]]
    )
    assert torch.equal(both, torch.tensor([0, 1, 2, 3, 4, 5, 0, 0.25, 0.75, 1.0]))
    assert align(torch.ones(6), [[2, 3]], [[5, 7]]).allclose(torch.ones(35))


def test_statistics():
    A = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert (
        focus(A, torch.tensor([True, False, False, True])).item() == pytest.approx(0.5)
        and focus(torch.zeros(4), A > 0) == 0
    )
    assert (
        entropy(torch.ones(16)).item() == pytest.approx(math.log(16))
        and entropy(torch.tensor([0.0, 3.0, 0.0])) == 0
    )
    assert entropy(A).item() == pytest.approx(-sum(p * math.log(p) for p in A.tolist()))
    assert salient(A) == 1 and salient(torch.ones(9)) == 0  # 0.4 > 1.5 x 0.25


def test_inside():
    # Cells of 28 pixels; x1 and y1 are exclusive.
    grid = inside([[30, 0, 56, 28]], (112, 84), (3, 4)).view(3, 4)
    assert grid.nonzero().tolist() == [[0, 1]]
    assert inside([[20, 20, 40, 40]], (112, 84), (3, 4)).view(3, 4).nonzero().tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1],
    ]
    assert inside([[0, 0, 1, 1], [111, 83, 112, 84]], (112, 84), (3, 4)).nonzero()[:, 0].tolist() == [0, 11]
    assert inside([[-5, -5, 500, 500]], (112, 84), (3, 4)).all() and not inside([], (10, 10), (2, 2)).any()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"v_sem": torch.ones(3)}, "the teacher's V_sem has 3 numbers: --semantics_dim 3 is needed"),
        ({"v_sem": torch.tensor(1.0)}, "v_sem has shape [] or holds no number"),
        ({"v_sem": torch.full((32,), float("nan"))}, "v_sem has shape [32] or holds no number"),
        ({"gaze": torch.ones(11)}, "gaze has 11 numbers for grids of 12 tokens"),
        ({"gaze": torch.ones(13)}, "gaze has 13 numbers for grids of 12 tokens"),
        ({"gaze": torch.ones(12, dtype=torch.long)}, "gaze has shape [12] or is no finite number from 0 up"),
        ({"gaze": -torch.ones(12)}, "gaze has shape [12] or is no finite number from 0 up"),
        ({"gaze": torch.tensor(1.0)}, "gaze has shape [] or is no finite number from 0 up"),
        ({"gaze_grid": torch.tensor([3, 4])}, "gaze_grid has shape [2]"),
        ({"gaze_grid": torch.tensor([[3.0, 4.0]])}, "gaze_grid has shape [1, 2]"),
        ({"gaze_grid": torch.tensor([[1, 3, 4, 1]])}, "gaze_grid has shape [1, 4]"),
    ],
)
def test_features_that_do_not_fit_are_the_records_error(setup, monkeypatch, change, says):
    """Record 0 has 3 x 4 tokens, and the model states of 32 numbers."""
    s = setup("--method", "lavit", "--tune", "lora", which=[0])
    right = {"gaze": torch.ones(12), "gaze_grid": torch.tensor([[3, 4]]), "v_sem": torch.ones(32)}
    s.records[0].features["lavit"] = "any"
    monkeypatch.setattr(data, "load_features", lambda record, name: right | change)
    with pytest.raises(RecordError, match=f"^{s.records[0].where}: field 'features': .*{re.escape(says)}"):
        s.method.extras(s.records[0], [None])
    monkeypatch.setattr(data, "load_features", lambda record, name: dict(right))
    assert s.method.extras(s.records[0], [None])["gaze_grid"].tolist() == [[3, 4, 0]]
