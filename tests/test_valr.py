"""VaLR: sequences of two stages, terms alive, encoders frozen and out of the way,
controls, stages and resume.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as nnF
from conftest import gradients
from safetensors.torch import load_file

from crystal import methods, opening, train
from crystal.corrupt import Corruption
from crystal.layout import IGNORE
from crystal.methods import valr
from crystal.runtime import checkpoint, data
from crystal.runtime.config import UserError

TERMS = ("ce", "repa")


def step(s, stage=1):
    return s.objective(s.batch, s.settings.progress(0 if stage == 0 else s.settings.max_steps))


@pytest.fixture
def made(setup):
    return lambda *flags, **how: setup("--method", "valr", *flags, **how)


def test_sequence_of_each_stage(made):
    s = made(which=[0])
    fmt, K = s.fmt, 3
    for stage in (0, 1, -1):
        x = s.method.layout(fmt, s.records[0], [12], stage)
        prompt, image, none = fmt.question(s.records[0].turns, [12])
        said, targets = x.ids[len(prompt) :], x.targets[len(prompt) - 1 :]
        segment = (
            []
            if stage == 0
            else [fmt.latent_start_id] + [s.model.tokenizer.pad_token_id] * K + [fmt.latent_end_id]
        )
        steps = [segment + fmt.text("I look.\n"), segment + fmt.text("I see.\n")]
        assert x.ids[: len(prompt)] == prompt and x.image == image and none == []
        assert said == sum(steps, []) + [fmt.answer_start_id] + fmt.text("red") + [fmt.answer_end_id, fmt.end]
        assert [x.ids[r] for r in x.answer_positions] == [fmt.answer_start_id] + fmt.text("red") + [
            fmt.answer_end_id
        ] and x.answer[1] == len(x.ids)
        assert len(x.latents) == (0 if stage == 0 else 2 * K) and all(
            x.ids[p] == s.model.tokenizer.pad_token_id for p in x.latents
        )
        # labels: everything but the latents and the tag that is forced after them
        free = [t for t in said if t not in (s.model.tokenizer.pad_token_id, fmt.latent_end_id)]
        assert [t for t in targets if t != IGNORE] == free and x.targets[: len(prompt) - 1] == [IGNORE] * (
            len(prompt) - 1
        )
        assert all(x.targets[t] in (IGNORE, x.ids[t + 1]) for t in range(len(x.ids) - 1))
    bare = s.records[0].__class__(**{**vars(s.records[0]), "cot": []})
    assert len(s.method.layout(fmt, bare, [12]).latents) == K


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_term_alone_moves_what_trains(made, tune, checkpointing):
    """Through feedback the alignment at layer 1 moves the last layer too; with checkpointing the same,
    to the last digits.
    """
    grads = {}
    for flags in ([], ["--checkpointing"])[: 1 + checkpointing]:
        s = made("--tune", tune, *flags)
        terms = step(s)
        assert set(terms) == set(TERMS) and s.method.layer == 1
        grads[len(flags)] = {name: gradients(terms[name], s.named) for name in TERMS}
    found = grads[int(checkpointing)]
    for name in TERMS:
        dead = [
            n
            for n, g in found[name].items()
            if g.abs().max() < 1e-12 and not (name == "ce" and "heads." in n)
        ]
        assert not dead, f"{name} does not reach {dead}"
        for n in found[name]:
            assert (found[name][n] - grads[0][name][n]).abs().max() <= 1e-10 * (
                1 + grads[0][name][n].abs().max()
            ), n
    assert all(g.abs().max() == 0 for n, g in found["ce"].items() if "heads." in n)


def test_first_stage_is_fine_tuning_and_the_projections_wait(made):
    """No term but ce, of a sequence without latents; every projection has a gradient, which is 0."""
    s = made(which=[0])
    batch = data.collate(
        [
            {
                "layout": s.method.layout(s.fmt, s.records[0], [12], 0),
                **s.examples.pixels([data.load_image(p, "") for p in s.records[0].images]),
                "bad": [],
            }
        ],
        0,
    )
    batch = data.to_device(batch, torch.device("cpu"), torch.float64)
    terms = s.objective(batch, s.settings.progress(0))
    assert set(terms) == {"ce"} and batch["latents"].numel() == 0
    labelled = batch["targets"] != IGNORE
    logits = s.model.logits(s.model.hidden(batch)[labelled])
    assert torch.allclose(terms["ce"], nnF.cross_entropy(logits, batch["targets"][labelled]), rtol=1e-12)
    terms["ce"].backward()
    assert all(p.grad is not None for _, p in s.named)
    assert all((p.grad.abs().max() == 0) == ("heads." in n) for n, p in s.named)


def test_alignment_equals_a_loop(made):
    """Each record alone, position by position, with up-sampling written out; two images stand
    one after the other.
    """
    s = made("--encoders", "tiny,own", "--align_layer", "2")
    terms = step(s)
    K, L = s.settings.latents, s.batch["input_ids"].shape[1]
    fed = torch.zeros(3, L, dtype=torch.bool)
    for b in range(3):
        fed[b, s.batch["latents"][b][s.batch["latents"][b] >= 0]] = True
    _, after = valr.feedback.recurrence(s.model, s.batch, fed, (2,))
    e, expected, at = s.method.encoders[0], [], 0
    own = torch.cat(
        s.model.hf.model.get_image_features(s.batch["pixel_values"], s.batch["image_grid_thw"]).pooler_output
    )
    s.batch["pixel_values"].requires_grad_()
    with valr.own_features(s.model, s.batch) as seen:
        s.model.hidden(s.batch)
    assert torch.equal(seen[0], own) and not seen[0].requires_grad  # a target, even where the tower trains
    s.batch["pixel_values"].requires_grad_(False)
    for b, r in enumerate(s.records):
        n = len(s.examples[0, b]["layout"].image)
        sees = [
            torch.cat([e(e.pixels(data.load_image(p, ""))[None])[0] for p in r.images]).double(),
            own[at : at + n],
        ]
        at += n
        for F, project in zip(sees, s.method.projections.values()):
            cosines = []
            for segment in after[2][b, fed[b]].split(K):
                for p in range(len(F)):
                    place = min(max((p + 0.5) * K / len(F) - 0.5, 0), K - 1)
                    low = int(place)
                    f = segment[low] + (place - low) * (segment[min(low + 1, K - 1)] - segment[low])
                    cosines.append(nnF.cosine_similarity(project(f), F[p], dim=0))
            expected.append(-torch.stack(cosines).mean())
    assert abs(terms["repa"] - torch.stack(expected).mean()) < 1e-8


def test_controls_change_what_they_say_and_nothing_else(made):
    """No alignment, other encoders, other layers, another weight: the same cross entropy to the bit; the
    alignment differs where it should.
    """
    plain = step(made())
    none = made("--encoders", "none")
    assert (
        set(step(none)) == {"ce"}
        and not none.method.projections
        and torch.equal(step(none)["ce"], plain["ce"])
    )
    assert not any("heads." in n for n, _ in none.named)
    seen = {float(plain["repa"].detach())}
    for flags in (
        ["--encoders", "own"], ["--encoders", "tiny,own"], ["--align_layer", "2"], ["--align_layer", "3"],
    ):
        s = made(*flags)
        terms = step(s)
        assert torch.equal(terms["ce"], plain["ce"]) and float(terms["repa"].detach()) not in seen, flags
        seen.add(float(terms["repa"].detach()))
    s = made("--w_repa", "0.25")
    assert s.settings.weights == {"ce": 1.0, "repa": 0.25} and torch.equal(step(s)["repa"], plain["repa"])


def test_the_papers_layers():
    """12 of 28 by default, in proportion elsewhere; 4, 12 and 27 by flag; a layer that is
    not there is refused.
    """

    class Deep:
        def __init__(self, n):
            self.layers = [None] * n
            self.hf = type(
                "hf",
                (),
                {
                    "dtype": torch.float32,
                    "config": type("c", (), {"text_config": type("t", (), {"hidden_size": 8})}),
                },
            )
            self.device = "cpu"

    for flag, count, layer in ((0, 28, 12), (0, 5, 2), (0, 1, 1), (4, 28, 4), (27, 28, 27)):
        method = valr.Method(valr.Settings(method="valr", encoders="none", align_layer=flag))
        method.modules(Deep(count))
        assert method.layer == layer
    with pytest.raises(UserError, match="--align_layer 27: the model has 5 layers"):
        valr.Method(valr.Settings(method="valr", encoders="none", align_layer=27)).modules(Deep(5))


def test_first_projections_are_a_function_of_the_seed_and_of_their_place(made):
    """Torch's own first values; two encoders of one size begin with different ones, another seed with others.
    """
    first = made("--encoders", "own,own").method.projections
    again = made("--encoders", "own,own").method.projections
    other = made("--encoders", "own,own", "--seed", "1").method.projections
    assert torch.equal(first["0"][0].weight, again["0"][0].weight) and torch.equal(
        first["1"][2].bias, again["1"][2].bias
    )
    assert not torch.equal(first["0"][0].weight, first["1"][0].weight)
    assert not torch.equal(first["0"][0].weight, other["0"][0].weight) and not torch.equal(
        first["1"][0].weight, other["1"][0].weight
    )


def test_defaults_and_stages_are_the_papers():
    """K 16, lambda 0.5, the decoder trained whole, 1e-5 for the text and then 2e-6 with latents."""
    expected = {
        "latents": 16,
        "tune": "full",
        "lr": 1e-5,
        "lr_latents": 2e-6,
        "weight_decay": 0.0,
        "first_share": 0.5,
        "encoders": "tiny",
        "w_repa": 0.5,
        "updates": None,
    }
    settings = methods.parse(["--method", "valr"])
    assert {name: getattr(settings, name) for name in expected} == expected
    settings = methods.parse(
        ["--method", "valr", "--first_share", "0.3", "--lr", "3e-4", "--lr_latents", "7e-5"]
    )
    assert [(stage.share, stage.lr) for stage in settings.stages] == [(0.3, 3e-4), (0.7, 7e-5)]


def test_parallel_updates(made):
    """As many updates as latents give the exact terms; fewer do not."""
    exact = step(made())
    for T, equal in ((5, True), (1, False)):
        terms = step(made("--updates", str(T)))
        assert all((abs(terms[n] - exact[n]) < 1e-6) == equal for n in TERMS), T


def test_a_record_does_not_see_its_batch(made):
    together = step(made())
    alone = [step(made(which=[i])) for i in range(3)]
    for name in TERMS:
        assert abs(together[name] - sum(a[name] for a in alone) / 3) < 1e-6, name


def test_wrong_settings_are_told(made, setup, records_file):
    for flags, message in (
        (["--encoders", "none,tiny"], "none alone"),
        (["--encoders", "features:x"], "features:NAME:SIZE"),
        (["--first_share", "1"], "--first_share"),
        (["--lr_latents", "0"], "--lr_latents"),
        (["--encoders", "tiny,"], "none alone"),
        (["--updates", "-1"], "--updates"),
    ):
        with pytest.raises(UserError, match=message):
            made(*flags)
    s = made()
    s.records[0].images.clear()
    with pytest.raises(data.RecordError, match="nothing to align to"):
        s.method.extras(s.records[0], [])


def test_what_looks_at_attention_sees_the_recurrence(made):
    from crystal.attention import AttentionRecorder

    s = made()
    fed = valr.position_mask(s.batch["latents"], s.batch["input_ids"].shape[1])
    h, _ = valr.feedback.recurrence(s.model, s.batch, fed)
    recorder = AttentionRecorder({0, 2}, s.batch["answer_positions"], s.batch["latents"])
    real = s.batch["attention_mask"].bool()
    # Stock norms compute in float32.
    assert (s.method.hidden(s.model, s.batch, recorder) - h)[real].abs().max() < 1e-5
    assert all(0 < x.sum(-1)[0, :, 0].mean() < 1 for x in recorder.slices.values())


def test_attention_is_drawn_of_fed_back_latents(made, tmp_path):
    """Both paths' last states are the recurrence's; a bar for each latent of each segment;
    the picture is drawn.
    """
    from crystal.evaluation import figures

    s = made(dtype=torch.float32, which=[0])
    s.model.eval()
    examples = data.RecordDataset(
        s.records, lambda r, n: s.method.layout(s.fmt, r, n), s.model.image_processor, Corruption("blur=8"), 0
    )
    batch = data.to_device(data.collate([examples[0, 0]], 0), torch.device("cpu"), torch.float32)
    fed = valr.position_mask(batch["latents"], batch["input_ids"].shape[1])
    found = figures.answer_attention(s.model, batch, s.settings, {0, 2}, None, fed)
    assert found.latents.shape == (2, 6) and torch.allclose(
        found.image.sum((1, 2)) + found.latents.sum(1) + found.rest, torch.ones(2), atol=1e-5
    )
    for path, pixels in enumerate(("pixel_values", "pixel_values_cor")):
        with torch.no_grad():
            h, _ = valr.feedback.recurrence(s.model, batch | {"pixel_values": batch[pixels]}, fed)
        assert torch.allclose(
            found.logits[path], s.model.logits(h[0, batch["answer_positions"][0, 0]]), atol=1e-3
        )
    plain = figures.answer_attention(s.model, batch, s.settings, {0, 2})
    assert (plain.latents - found.latents).abs().max() > 1e-4
    assert (
        figures.attention_maps(s.model, s.fmt, s.settings, s.records, tmp_path / "a.png").stat().st_size
        > 10000
    )


# --- whole runs ---


@pytest.fixture
def run(model_dirs, records_file, tmp_path):
    def make(name, *flags):
        return train.main(
            [
                "--method", "valr", "--model", str(model_dirs[True]), "--data", str(records_file),
                "--output", str(tmp_path / name), "--latents", "3", "--lr", "1e-2", "--lr_latents", "5e-3",
                "--batch_size", "2", "--log_every", "100", "--eval_every", "0", *flags,
            ]
        )

    return make


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def weights(path, n):
    return load_file(checkpoint.step_dir(path, n) / "trainable.safetensors")


def test_resume_across_the_stages_is_exact(run, tmp_path):
    """Stopped in the first stage, at its end, and in the second: the same losses and weights
    as the unbroken run.
    """
    more = ("--max_steps", "4", "--save_every", "1", "--keep", "9")
    whole = run("whole", *more)
    assert [("repa" in x, x["lr"]) for x in lines(whole)] == [
        (False, 1e-2), (False, 1e-2), (True, 5e-3), (True, 5e-3),
    ]
    for at in (1, 2, 3):
        broken = tmp_path / f"broken{at}"
        shutil.copytree(whole, broken)
        for later in range(at + 1, 5):
            shutil.rmtree(checkpoint.step_dir(broken, later))
        run(broken.name, *more, "--resume")
        timed = ("tokens_per_s", "peak_memory_gb")
        assert [{k: v for k, v in x.items() if k not in timed} for x in lines(broken)] == [
            {k: v for k, v in x.items() if k not in timed} for x in lines(whole)
        ]
        a, b = weights(whole, 4), weights(broken, 4)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_encoders_are_frozen_and_stay_outside(run, monkeypatch):
    """Nothing of an encoder in the checkpoint; its weights after training are those before; opening
    the run loads none.
    """
    kept, load = [], valr.encoders.load
    monkeypatch.setattr(valr.encoders, "load", lambda *a: kept.append(load(*a)) or kept[-1])
    path = run("frozen", "--max_steps", "2", "--first_share", "0")
    fresh = load("tiny").state_dict()
    assert len(kept) == 1 and all(torch.equal(fresh[n], t) for n, t in kept[0].state_dict().items())
    assert {n.split(".")[0] for n in weights(path, 2)} == {"model", "heads"} and len(
        [n for n in weights(path, 2) if n.startswith("heads.")]
    ) == 4
    monkeypatch.setattr(valr.encoders, "load", lambda *a: pytest.fail("an encoder was loaded"))
    from crystal import opening

    model, fmt, _ = opening.open_model(path, "last")
    assert fmt.feeds_back and not any("heads" in n for n, _ in model.named_parameters())


def test_precomputed_features_train_like_the_encoder(run, records_file, tmp_path):
    from data_prep import encoder_features

    shutil.copytree(records_file.parent, tmp_path / "d")
    encoder_features.main(["--encoder", "tiny", "--data", str(tmp_path / "d" / "train.jsonl"), "--name", "t"])
    more = ("--max_steps", "2", "--first_share", "0")
    online = run("online", *more)
    stored = run(
        "stored", *more, "--data", str(tmp_path / "d" / "train.t.jsonl"), "--encoders", "features:t:96"
    )
    for a, b in zip(lines(online), lines(stored)):
        assert a["ce"] == pytest.approx(b["ce"], rel=1e-5) and a["repa"] == pytest.approx(b["repa"], rel=1e-4)
    with pytest.raises(UserError, match=r"should hold a \[patches, 32\] tensor"):
        run("wrong", *more, "--data", str(tmp_path / "d" / "train.t.jsonl"), "--encoders", "features:t:32")


def test_export_drops_the_encoders_and_stock_tools_answer_without_latents(run, records_file, capsys):
    """Stock transformers loads the merged directory and says what we say with latents dropped; we
    decode it with latents.
    """
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    from crystal import evaluate, export, generate

    path = run("exported", "--max_steps", "2", "--first_share", "0", "--tune", "lora", "--lora_r", "2")
    export.main(["--run", str(path), "--checkpoint", "last"])
    assert "crystal.generate and crystal.evaluate decode them" in capsys.readouterr().out
    names = set(load_file(path / "merged" / "model.safetensors"))
    assert not any("heads" in n or "encoder" in n for n in names)
    model, fmt, settings = opening.open_model(path / "merged")
    assert (
        settings is None
        and fmt.count == 3
        and fmt.latent_start_id == model.tokenizer.convert_tokens_to_ids("<latent>")
    )
    stock = AutoModelForImageTextToText.from_pretrained(path / "merged").eval()
    assert stock.generation_config.suppress_tokens == [fmt.latent_start_id]
    records, _ = data.read(records_file)
    images = model.image_processor(images=[Image.open(p) for p in records[0].images], return_tensors="pt")
    ids, _, _ = fmt.question(records[0].turns, model.image_tokens(images["image_grid_thw"]))
    x = torch.tensor([ids])
    batch = dict(
        input_ids=x, attention_mask=torch.ones_like(x), mm_token_type_ids=(x == fmt.image).int(), **images
    )
    theirs = stock.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=fmt.end)[
        0, len(ids) :
    ].tolist()
    ours = generate.decode_feedback(model, batch, fmt, 8, "drop", max_thought=8)[0]
    assert theirs == ours
    run_model, run_fmt, _ = opening.open_model(path, "last")
    for how in ("keep", "drop"):
        said = [
            evaluate.answers(m, f, records, latents=how, max_new_tokens=4)
            for m, f in ((model, fmt), (run_model, run_fmt))
        ]
        assert said[0] == said[1]
    (path / "merged" / "crystal.json").write_text("{}")
    with pytest.raises(UserError, match="crystal.json: not what crystal.export wrote"):
        opening.open_model(path / "merged")
