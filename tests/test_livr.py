"""LIVR: the bottleneck blocks what it says and nothing else, both stages train, and every control
changes its own thing.
"""

import json

import pytest
import torch
from conftest import eager_mass, gradients
from PIL import Image

from crystal import evaluate, generate, methods, opening, train
from crystal.attention_bias import additive_mask
from crystal.evaluation import asking
from crystal.latent_copy import LatentCopy
from crystal.layout import IGNORE
from crystal.methods.sft import cross_entropy
from crystal.runtime import data
from crystal.runtime.config import UserError

MASKED, OPEN = (methods.parse(["--method", "livr"]).progress(step) for step in (0, 4000))
LIVR = ("--method", "livr", "--lora_dropout", "0")


def positions(s):
    """bool [B,L] of the batch: image (with the two tokens around it), latents, real tokens."""
    ids = s.batch["input_ids"]
    known = lambda names: torch.isin(
        ids, torch.tensor(s.model.tokenizer.convert_tokens_to_ids(names), dtype=torch.long)
    )
    return (
        known(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]),
        known(s.method.tokens),
        s.batch["attention_mask"].bool(),
    )


def test_latents_stand_after_the_question_and_are_no_labels(setup):
    s = setup(*LIVR)
    for b, r in enumerate(s.records):
        ids, latents = s.batch["input_ids"][b].tolist(), s.batch["latents"][b].tolist()
        assert [ids[i] for i in latents] == s.fmt.latents and ids[latents[-1] + 1] == s.fmt.end
        said = [t for t in s.batch["targets"][b].tolist() if t != IGNORE]
        assert said == s.fmt.text(r.answer) + [s.fmt.end]
        plain, image = s.fmt.prompt(
            r.turns,
            [int((s.batch["mm_token_type_ids"][b]).sum())]
            if len(r.images) == 1
            else s.model.image_tokens(s.batch["image_grid_thw"][-2:]),
        )
        prompt, where, at = s.fmt.question(
            r.turns,
            s.model.image_tokens(
                s.batch["image_grid_thw"][b : b + 1] if len(r.images) == 1 else s.batch["image_grid_thw"][-2:]
            ),
        )
        # Nothing else moved.
        assert [t for i, t in enumerate(prompt) if i not in at] == plain and where == image and at == latents
        assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("mask", ["prompt", "answer"])
@pytest.mark.parametrize("see", ["all", "image"])
def test_mask_cell_by_cell(setup, mask, see):
    """Against a loop over cells, for a padded batch of one and two images."""
    s = setup(*LIVR, "--mask", mask, "--latents_see", see)
    got = additive_mask(s.method.biases(s.model, s.batch), s.batch["attention_mask"])[:, 0]
    image, latents, real = (x.tolist() for x in positions(s))
    for b in range(len(got)):
        first, answer = image[b].index(True), int(s.batch["answer_positions"][b, 0])
        for q in range(sum(real[b])):
            for k in range(got.shape[1]):
                free = k <= q
                if (
                    image[b][k]
                    and q > first
                    and not image[b][q]
                    and not latents[b][q]
                    and (mask == "prompt" or q >= answer)
                ):
                    free = False
                if see == "image" and latents[b][q] and not image[b][k] and not latents[b][k]:
                    free = False
                assert (got[b, q, k] == 0) == free, (b, q, k)


@pytest.mark.parametrize("realisation", ["hidden", "kv"])
def test_with_frozen_latents_the_image_has_exactly_no_influence(setup, realisation):
    """The claim of the bottleneck. Latents' states held at every layer, another image: stage 1's answer
    logits are equal to the bit.
    """
    s = setup(*LIVR)
    image, latents, real = positions(s)
    other = dict(s.batch, pixel_values=s.batch["pixel_values"].flip(0))

    def both(b, masked=True, held=True):
        """A batch of 2B: the batch, and `b` with the first half's latents."""
        twice = {
            n: torch.cat([s.batch[n], b[n]])
            for n in (
                "input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids",
                "answer_positions",
            )
        }
        biases = s.method.biases(s.model, twice) if masked else []
        h = s.model.hidden(
            twice, latent_copy=LatentCopy(latents, realisation) if held else None, biases=biases
        ).chunk(2)[1]
        return s.model.logits(h[s.batch["targets"] != IGNORE])

    assert torch.equal(both(s.batch), both(other))
    # It is the latents that carry the image.
    assert not torch.equal(both(s.batch, held=False), both(other, held=False))
    # And the mask that closes the other way.
    assert not torch.equal(both(s.batch, masked=False), both(other, masked=False))


@pytest.mark.parametrize(
    "flags", [(), ("--mask", "answer"), ("--latents_see", "image"), ("--place", "before")]
)
def test_no_row_sees_the_future(setup, flags):
    s = setup(*LIVR, *flags, which=[0])
    L = s.batch["input_ids"].shape[1]
    biases = s.method.biases(s.model, s.batch)
    for t in (L - 2, int(s.batch["latents"][0, -1])):
        ids = s.batch["input_ids"].clone()
        ids[0, t] = 17
        a, b = (
            s.model.hidden(dict(s.batch, input_ids=x), biases=biases)[0] for x in (s.batch["input_ids"], ids)
        )
        assert torch.equal(a[:t], b[:t]) and not torch.equal(a[t:], b[t:])


@pytest.mark.parametrize("tune", ["lora", "full", "tokens"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("progress", [MASKED, OPEN], ids=["masked", "open"])
def test_the_loss_is_alive(setup, tune, checkpointing, progress):
    """It moves every latent's row, and whatever else trains; checkpointing changes no gradient."""
    s = setup(*LIVR, "--tune", tune, *["--checkpointing"] * checkpointing)
    grads = gradients(s.objective(s.batch, progress)["ce"], s.named)
    rows = grads.pop("model.new_tokens.embedding")
    assert (rows.abs().amax(1) > 0).all() and len(rows) == 3
    assert bool(grads) == (tune != "tokens")
    if tune == "lora":
        assert all(g.abs().max() > 0 for g in grads.values())
    elif tune == "full":
        assert all(
            grads[f"model.hf.model.language_model.layers.{i}.self_attn.v_proj.weight"].abs().max() > 0
            for i in range(3)
        )
    if checkpointing:
        plain = setup(*LIVR, "--tune", tune)
        assert all(
            torch.allclose(g, grads.get(n, rows), rtol=0, atol=1e-12)
            for n, g in gradients(plain.objective(plain.batch, progress)["ce"], plain.named).items()
        )


def test_the_stages_differ_by_the_mask_alone(setup):
    s = setup(*LIVR)
    masked, opened = (s.objective(s.batch, p)["ce"] for p in (MASKED, OPEN))
    assert torch.equal(
        masked, cross_entropy(s.model, s.batch, s.method.biases(s.model, s.batch))
    ) and torch.equal(opened, cross_entropy(s.model, s.batch))
    # Stage 2 from its first update on.
    plain = setup("--method", "livr", "--lora_dropout", "0", "--masked", "0")
    assert masked != opened and torch.equal(
        opened, plain.objective(plain.batch, plain.settings.progress(0))["ce"]
    )


def test_the_latents_share_of_attention_is_watched(setup):
    """Under the mask of the stage, and without a gradient; a model without latents has none."""
    s = setup(*LIVR)
    masked, opened = (s.objective(s.batch, p)["mass"] for p in (MASKED, OPEN))
    assert masked.item() == pytest.approx(eager_mass(s, s.method.biases(s.model, s.batch)), rel=1e-6)
    assert opened.item() == pytest.approx(eager_mass(s, []), rel=1e-6) and masked != opened and opened > 0
    assert "mass" in s.method.monitored and not masked.requires_grad
    none = setup("--method", "livr", "--latents", "0", "--masked", "0")
    assert set(none.objective(none.batch, OPEN)) == {"ce"}


def test_a_pair_does_not_depend_on_its_batch(setup):
    together = setup(*LIVR)
    for progress in (MASKED, OPEN):
        alone = [setup(*LIVR, which=[i]) for i in range(3)]
        mean = sum(s.objective(s.batch, progress)["ce"] for s in alone) / 3
        assert together.objective(together.batch, progress)["ce"].item() == pytest.approx(
            mean.item(), rel=1e-9
        )


# --- controls: each changes what it says, and nothing else ---


def without(s, b=0):
    """The ids of record b less the latents, and the latents."""
    ids, latents = s.batch["input_ids"][b].tolist(), set(s.batch["latents"][b].tolist())
    ids = ids[: int(s.batch["attention_mask"][b].sum())]
    return [t for i, t in enumerate(ids) if i not in latents], [ids[i] for i in sorted(latents)]


def test_controls_of_the_sequence(setup):
    s, sft = setup(*LIVR), setup("--method", "sft")
    for b in range(3):
        rest, latents = without(s, b)
        assert rest == without(sft, b)[0] and len(set(latents)) == 3
        before = setup(*LIVR, "--place", "before")
        assert without(before, b) == (rest, latents)
        last = int(before.batch["image"][b].max())  # behind <|vision_end|>
        assert before.batch["latents"][b].tolist() == [last + 2, last + 3, last + 4]
        shared = setup(*LIVR, "--latent_kind", "identical")
        assert without(shared, b) == (rest, [latents[0]] * 3) and len(shared.method.tokens) == 1
        assert shared.batch["latents"].tolist() == s.batch["latents"].tolist()
    for k in (4, 8, 32):
        many = setup("--method", "livr", "--latents", str(k))
        assert many.batch["latents"].shape[1] == len(many.method.tokens) == k
    assert methods.parse(["--method", "livr"]).latents == 16


def test_mask_only_and_no_mask_and_neither(setup):
    """--latents 0 --masked 0 is plain fine-tuning to the bit, and the mask alone closes the image to the
    answer, not to the prompt.
    """
    sft, none = setup("--method", "sft"), setup(*LIVR, "--latents", "0", "--masked", "0")
    assert torch.equal(
        sft.objective(sft.batch, OPEN)["ce"], none.objective(none.batch, none.settings.progress(0))["ce"]
    )
    only = setup(*LIVR, "--latents", "0", "--mask", "answer")
    assert only.model.new_tokens is None and not torch.equal(
        only.objective(only.batch, MASKED)["ce"], none.objective(none.batch, OPEN)["ce"]
    )
    got = additive_mask(only.method.biases(only.model, only.batch), only.batch["attention_mask"])[:, 0]
    image, _, _ = positions(only)
    for b in range(3):
        first = int(only.batch["answer_positions"][b, 0])
        assert got[b, first:, image[b]].isneginf().all() and (got[b, first - 1, image[b]] == 0).all()


def test_defaults_and_stages_are_the_papers():
    """Appendix B: K 16, 4 of 10 epochs masked, rank 16, alpha 32, dropout 0.05, 1e-4, decay 0.01, batches of
    8, warm-up 5 %.
    """
    expected = {
        "latents": 16,
        "place": "after",
        "masked": 0.4,
        "mask": "prompt",
        "latents_see": "all",
        "image_copies": 1,
        "lora_r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
        "batch_size": 8,
        "lr": 1e-4,
        "weight_decay": 0.01,
        "warmup": 0.05,
    }
    settings = methods.parse(["--method", "livr"])
    assert {name: getattr(settings, name) for name in expected} == expected
    settings = methods.parse(["--method", "livr", "--masked", "0.3", "--lr", "3e-4"])
    assert [(stage.share, stage.lr) for stage in settings.stages] == [(0.3, 3e-4), (0.7, 3e-4)]


def test_image_twice(setup):
    one, two = (
        setup(*LIVR, "--latents", "0", "--masked", "0"),
        setup(*LIVR, "--latents", "0", "--masked", "0", "--image_copies", "2"),
    )
    counts = lambda s: (s.batch["input_ids"] == s.fmt.image).sum(1)
    assert torch.equal(2 * counts(one), counts(two)) and len(two.batch["pixel_values"]) == 2 * len(
        one.batch["pixel_values"]
    )
    first = one.batch["image_grid_thw"][0].prod()
    assert torch.equal(two.batch["pixel_values"][:first], two.batch["pixel_values"][first : 2 * first])
    no_image = lambda s: [
        t
        for t in without(s)[0]
        if t
        not in s.model.tokenizer.convert_tokens_to_ids(
            ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
        )
    ]
    assert no_image(one) == no_image(two)
    assert not torch.equal(one.objective(one.batch, OPEN)["ce"], two.objective(two.batch, OPEN)["ce"])
    with pytest.raises(UserError, match="stand twice"):
        two.fmt.chat_template()


def test_prompt_tuning_trains_k_rows_alone(setup):
    s = setup(*LIVR, "--tune", "tokens", "--masked", "0")
    assert [(n, tuple(p.shape)) for n, p in s.named] == [("model.new_tokens.embedding", (3, 32))]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--masked", "1.5"), "--masked 1.5"),
        (("--latents", "0"), "nobody would see the image"),
        (("--latents", "-1"), "must be at least 0"),
        (("--image_copies", "0"), "--image_copies 0"),
        (("--mask", "all"), "--mask"),
    ],
)
def test_wrong_settings_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        methods.parse(["--method", "livr", *flags])


# --- generation, evaluation, export ---


@pytest.mark.parametrize("latents", ["keep", "drop"])
@pytest.mark.parametrize("mask", ["prompt", "answer"])
def test_masked_generation_equals_masked_forwards_without_a_cache(setup, mask, latents):
    """Left padding, images of several sizes and a KV cache: each token is the argmax of one masked forward
    of that prompt alone.
    """
    s = setup(*LIVR, "--mask", mask)
    s.model.eval()
    biases = lambda batch: s.method.biases(s.model, batch)
    asked = []
    for r in s.records:
        images = s.model.image_processor(images=[Image.open(p) for p in r.images], return_tensors="pt")
        ids, _, _ = s.fmt.question(r.turns, s.model.image_tokens(images["image_grid_thw"]), latents)
        asked.append((ids, images["pixel_values"].double(), images["image_grid_thw"]))
    open_answers, answers = (generate.generate(s.model, asked, s.fmt, 4, b) for b in (None, biases))
    assert open_answers != answers
    for (prompt, pixels, grid), answer in zip(asked, answers):
        ids = list(prompt)
        for _ in range(4):
            x = torch.tensor([ids])
            batch = {
                "input_ids": x,
                "attention_mask": torch.ones_like(x),
                "mm_token_type_ids": (x == s.fmt.image).long(),
                "pixel_values": pixels,
                "image_grid_thw": grid,
                "answer_positions": torch.tensor([[len(prompt) - 1]]),
            }
            with torch.no_grad():
                token = int(s.model.logits(s.model.hidden(batch, biases=biases(batch))[:, -1]).argmax())
            if token == s.fmt.end:
                break
            ids.append(token)
        assert answer == s.model.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def run(model_dirs, records_file, tmp_path_factory):
    """A run that stands in the middle of both stages: 3 of 5 updates in the first, a checkpoint after each.
    """
    out = tmp_path_factory.mktemp("livr")
    return train.main(flags_of(model_dirs, records_file, out / "run"))


def flags_of(model_dirs, records_file, out):
    return [
        "--method", "livr", "--model", str(model_dirs[True]), "--data", str(records_file),
        "--val_data", str(records_file), "--output", str(out), "--latents", "3", "--lora_r", "2",
        "--lr", "1e-3", "--batch_size", "2", "--masked", "0.6", "--max_steps", "5", "--save_every", "1",
        "--keep", "9", "--eval_every", "3",
    ]


def test_a_run_has_two_stages_and_validates_the_open_model(run, records_file):
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    # Warm up 1, decay; again.
    assert [x["lr"] for x in lines if "loss" in x] == pytest.approx([1e-3, 1e-3, 0.5e-3, 1e-3, 1e-3])
    model, fmt, settings = opening.open_model(run, "3")
    method = methods.get("livr")(settings)
    records, _ = data.read(records_file)
    examples = data.RecordDataset(records, lambda r, n: method.layout(fmt, r, n), model.image_processor)
    batch = data.collate([examples[0, i] for i in range(3)], model.tokenizer.pad_token_id)
    with torch.no_grad():
        expected = method.losses(model, batch, OPEN)["ce"].item()
    assert [x["val_ce"] for x in lines if "val_ce" in x and x["step"] == 3] == [
        pytest.approx(expected, rel=1e-5)
    ]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_resume_before_on_and_after_the_boundary_equals_not_having_stopped(
    run, at, model_dirs, records_file, tmp_path
):
    import shutil

    from safetensors.torch import load_file

    from crystal.runtime import checkpoint

    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    for step in range(at + 1, 6):
        shutil.rmtree(checkpoint.step_dir(broken, step))
    (broken / "checkpoints" / "best.json").unlink(missing_ok=True)
    train.main([*flags_of(model_dirs, records_file, broken), "--resume"])
    a, b = (
        [x for x in map(json.loads, (r / "metrics.jsonl").read_text().splitlines()) if "loss" in x]
        for r in (run, broken)
    )
    assert [(x["step"], x["loss"], x["lr"], x["grad_norm"]) for x in a] == [
        (x["step"], x["loss"], x["lr"], x["grad_norm"]) for x in b
    ]
    a, b = (load_file(checkpoint.step_dir(r, 5) / "trainable.safetensors") for r in (run, broken))
    assert all(torch.equal(a[n], b[n]) for n in a)
    with pytest.raises(UserError, match="made with --masked 0.6, not 0.2"):
        train.main([*flags_of(model_dirs, records_file, broken), "--resume", "--masked", "0.2"])


def test_diagnostics(run, records_file, capsys, tmp_path):
    out = tmp_path / "lines.jsonl"
    evaluate.main(
        [
            "--model", str(run), "--data", str(records_file), "--diagnose", "--max_new_tokens", "3",
            "--device", "cpu", "--out", str(out),
        ]
    )
    printed = capsys.readouterr().out
    assert all(
        name in printed
        for name in (
            "as trained",
            "latents dropped",
            "bottleneck, dropped",
            "mean attention from answers to latents",
        )
    )
    lines = [json.loads(x) for x in out.read_text().splitlines()]
    said = {
        name: [x["prediction"] for x in lines if x["asked"] == name]
        for name in ("as trained", "latents dropped", "bottleneck", "bottleneck, dropped")
    }
    assert len({tuple(x) for x in said.values()}) == 4  # four different ways of asking a random model
    for flags, name in (
        ((), "as trained"),
        (("--bottleneck",), "bottleneck"),
        (("--bottleneck", "--latents", "drop"), "bottleneck, dropped"),
    ):
        evaluate.main(
            [
                "--model", str(run), "--data", str(records_file), *flags, "--max_new_tokens", "3",
                "--device", "cpu", "--out", str(out), "--overwrite",
            ]
        )
        assert [json.loads(x)["prediction"] for x in out.read_text().splitlines()] == said[name]
    with pytest.raises(UserError, match="sft has no mask"):
        evaluate.main(["--model", "tiny", "--data", str(records_file), "--bottleneck"])


def test_attention_on_latents_is_that_of_a_full_softmax(setup):
    s = setup(*LIVR)
    s.model.eval()
    got = asking.attention_on_latents(s.model, s.fmt, s.method, s.records, batch_size=2)
    seen = []

    def recorder(layer, q, k, scale):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(
            torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), float("-inf")
        )
        seen.append(scores.softmax(-1).mean(1))  # [B,L,L]

    with torch.no_grad():
        s.model.hidden(s.batch, recorder=recorder)
    weights, expected = torch.stack(seen).mean(0), 0
    for b in range(3):
        rows, cols = (
            s.batch["answer_positions"][b][s.batch["answer_positions"][b] >= 0],
            s.batch["latents"][b],
        )
        expected += weights[b][rows][:, cols].sum(1).mean().item() / 3
    assert got == pytest.approx(expected, rel=1e-6) and 0 < got < 1


@pytest.mark.parametrize("place", ["after", "before"])
def test_the_exported_prompt_is_the_trained_one(setup, place):
    """A stock chat template renders what training had, with an image, without one, and for a
    finished conversation as before.
    """
    s = setup(*LIVR, "--place", place)
    stock, s.model.tokenizer.chat_template = s.model.tokenizer.chat_template, s.fmt.chat_template()
    render = lambda messages, **how: s.model.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, **how
    )
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}
    talk = [image, {"role": "assistant", "content": "red"}, {"role": "user", "content": "Sure?"}]
    exported = [render(m, add_generation_prompt=True) for m in ([image], talk, [talk[-1]])]
    finished = render(talk[:2])
    s.model.tokenizer.chat_template = stock
    turns = [("user", "<image>What colour?"), ("assistant", "red"), ("user", "Sure?")]
    assert exported == [
        s.fmt.question(t, [1] * n)[0] for t, n in ((turns[:1], 1), (turns, 1), (turns[-1:], 0))
    ]
    assert finished == render(talk[:2]) and not set(finished) & set(s.fmt.latents)
