"""Inside a run: weights against a full softmax, what is left out by hand, every method, what a run left."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_figures import eager
from test_opening import run  # noqa: F401  a fixture

from crystal import methods
from crystal.backbone import model as backbone
from crystal.corrupt import Corruption
from crystal.evaluation import inside, reliance
from crystal.runtime import data
from crystal.runtime.config import UserError

SMALL = ("--latents", "3", "--lora_r", "2")
METHODS = {
    "crystal": ("--corruption", "blur=8"),
    "released": (),
    "sft": (),
    "livr": (),
    "lavit": ("--tune", "lora"),
    "valr": ("--encoders", "none"),
}


def opened(directory, method="crystal", *flags):
    """A model with a method that nobody trained, in float32 -> what `measure` takes first."""
    flags = ["--method", method, *METHODS[method], *flags, "--model", str(directory)]
    settings = methods.parse([*SMALL, *flags])
    model = backbone.load(settings.model)
    kind, fmt = methods.attach(model, settings)
    return model.eval(), fmt, kind, settings


@pytest.fixture(scope="module")
def records(records_file):
    found, _ = data.read(records_file)
    found[0].boxes = [[0, 0, 28, 28]]
    return found


# --- attention ---


@pytest.mark.parametrize("which", [0, 2])  # a one-token answer; two images
@pytest.mark.parametrize(
    "flags", [(), ("--method", "released"), ("--latent_copy", "hidden"), ("--method", "sft")]
)
def test_what_is_seen_is_the_full_softmax(setup, flags, which):
    """Every weight of both paths comes from transformers' eager attention; the means from all rows of it."""
    s = setup(*flags, which=[which])
    s.model.eval()
    two = s.settings.method != "sft"
    seen, means, logits = inside.look(s.model, s.method, s.settings, s.batch, [0, 2])
    copied = s.method.copied(s.batch) if two else None
    batch = s.batch if two else s.batch | {"pixel_values_cor": s.batch["pixel_values"]}
    with torch.no_grad():
        weights, states = eager(s, batch, copied)  # [layers,2,H,L,L]

    image, latents = s.batch["image"][0], s.batch["latents"][0]
    answer = s.batch["answer_positions"][0]
    tokens = torch.cat([answer[:4], latents])
    assert inside.looking(s.batch).tolist() == tokens.tolist()
    columns = torch.cat([image, latents])
    for p in range(2 if two else 1):
        own = weights[[0, 2], p][:, :, tokens][..., columns].permute(2, 0, 1, 3)  # [T,layers,H,N+K]
        if p == 1:
            own[copied[0, tokens]] = 0
        assert (seen[p] - own).abs().max() < 1e-6
        assert (logits[p] - s.model.logits(states[p, answer[0]])).abs().max() < 1e-4
        rows = [t for t in range(int(image.max()) + 1, weights.shape[-1]) if t not in latents.tolist()]
        rows = [t for t in rows if p == 0 or not copied[0, t]]
        expected = weights[:, p][:, :, rows][..., image].mean((0, 1, 2))
        assert (means["text"][p] - expected).abs().max() < 1e-6
    assert len(seen) == (2 if two else 1) and set(means) == (
        {"text", "answer", "latents"} if two else {"text", "answer"}
    )
    if two:
        assert len(means["latents"]) == 1  # the corrupted path's are the intact one's
        expected = weights[:, 0][:, :, latents][..., image].mean((0, 1, 2))
        assert (means["latents"][0] - expected).abs().max() < 1e-6


def test_no_layers_no_maps(setup):
    s = setup(which=[0])
    seen, means, _ = inside.look(s.model, s.method, s.settings, s.batch, [])
    assert seen is None and means["text"].shape == (2, s.batch["image"].shape[1])


def test_many_answers_and_latents_are_bounded(setup):
    """The answer's first four positions; of forty latents eight, the first and the last among them."""
    s = setup("--latents", "40", which=[2])
    tokens = inside.looking(s.batch).tolist()
    answer, latents = s.batch["answer_positions"][0].tolist(), s.batch["latents"][0].tolist()
    assert len(answer) > 4 and tokens[:4] == answer[:4]
    assert len(tokens) == 12 and tokens[4] == latents[0] and tokens[-1] == latents[-1]
    names = inside.names_of(s.model, s.batch)
    assert len(names) == 12 and names[4] == "latent 1 of 40" and names[-1] == "latent 40 of 40"
    first = s.model.tokenizer.decode([int(s.batch["input_ids"][0, answer[0] + 1])]).strip()
    assert names[0] == f"answer 1: “{first}”" and first and "the heart is nearer".startswith(first)


@pytest.mark.parametrize(
    "layers, heads, cells, budget, expected",
    [
        (3, 4, 10, 200, (3, 4)),  # 4 * 5 * 10
        (3, 4, 10, 199, (3, 2)),  # 4 heads are halved first: 4 * 3 * 10
        (28, 28, 1000, 10**5, (7, 7)),  # 29 * 29, 29 * 15, 15 * 15 are too many; 15 * 8 is 120, 8 * 8 fits
        (5, 4, 10, 1, (1, 1)),
    ],
)
def test_layers_and_heads_are_halved_until_they_fit(layers, heads, cells, budget, expected):
    assert inside.fitting(layers, heads, cells, budget) == expected


def test_means_are_over_what_is_left_out_too():
    """Two paths, one token, three layers of four heads, two by two places and one latent."""
    seen = torch.rand(2, 1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    batch = {"image": torch.arange(4)[None], "latents": torch.tensor([[9]])}
    view = SimpleNamespace(rows=2, columns=2)
    found = inside.bounded(batch, seen, view, [4, 6, 8], 45)
    assert (found["grid"], found["layers"], found["heads"]) == ((2, 2), [4, 8], [0, 3])  # 3 * 3 * 5
    image, latents, share = found["image"], found["latents"], found["share"]
    assert torch.allclose(image[:, :, 0, 0], seen[..., :4].mean((2, 3)))
    assert torch.allclose(image[:, :, 0, 2], seen[:, :, :, 3, :4].mean(2))
    assert torch.allclose(image[:, :, 2, 1], seen[:, :, 2, 0, :4])
    assert torch.allclose(latents[:, :, 1, 2], seen[:, :, 0, 3, 4:])
    assert torch.allclose(share[:, :, 2, 2, 0], seen[:, :, 2, 3, :4].sum(-1))
    assert torch.allclose(share[:, :, 2, 2, 1], seen[:, :, 2, 3, 4])


def test_a_large_grid_is_merged_by_its_means():
    maps = torch.tensor([[1.0, 3, 5, 7, 1, 1, 9, 9]])  # two rows of four
    assert inside.merged(maps, (2, 4), (1, 2)).tolist() == [[1.5, 7.5]]
    assert inside.merged(maps, (2, 4), (2, 4)) is maps


# --- the whole ---


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_looked_into(model_dirs, records, method):
    """Three questions, two of them drawn: what there is of each method; what there is not is told."""
    model, fmt, kind, settings = opened(model_dirs[True], method)
    found = inside.measure(model, fmt, kind, settings, records, 2)
    two, latents = method in ("crystal", "released"), method != "sft"
    assert [sample.record.id for sample in found.samples] == ["0", "1"] and len(found.right) == 3
    assert (found.two_paths, found.layers, found.heads, found.shown) == (two, 3, 4, 3)
    assert found.count == (3 if latents else 0)
    assert all(len(paths[0]) == 3 for paths in found.looks.values()) and ("latents" in found.looks) == latents
    assert [len(paths) for paths in found.looks.values()] == ([2, 2, 1] if two else [1] * len(found.looks))

    # Boxes are the first record's alone.
    assert ["focus" in n for n in found.looks["text"][0]] == [True, False, False]
    sample = found.samples[0]
    assert len(sample.images) == (2 if two else 1) and sample.images[0].size == (112, 84)
    assert sample.grid == (3, 4) and sample.image.shape[1:] == (len(sample.tokens), 4, 5, 12)
    assert [each.depth for each in found.states] == [0, 1, 3] and set(found.states[0].points) >= {
        "image",
        "text",
    }
    assert sum(found.states[-1].kept) < 1
    if two:
        assert sum(sample.copied) >= 3 and sample.images[0] != sample.images[1]
    if method in ("sft", "valr"):
        assert found.reliance is None and found.why
        names = (
            ["as trained", "image corrupted"]
            if method == "sft"
            else ["as trained", "latents dropped", "image corrupted"]
        )
        assert list(sample.answers) == names and sample.other == ""
    else:
        assert list(sample.answers) == [condition.name for condition in reliance.CONDITIONS]
        assert found.reliance["questions"] == 3 and sample.other in {r.answer for r in records[1:]}
        assert found.right == [r is True for r in found.right]
        trained = sum(found.right) / 3
        assert found.reliance["conditions"][0]["right"] == pytest.approx(trained)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_every_family_is_looked_into(family_dirs, records, family):
    model, fmt, kind, settings = opened(family_dirs(family, True))
    found = inside.measure(model, fmt, kind, settings, records[:2], 1)
    (sample,) = found.samples
    rows, columns = sample.grid
    assert sample.image.shape[-1] == rows * columns and len(found.looks["text"][1]) == 2
    if family == "llava_onevision":  # the whole image, in one tile of two by two patches; then its tiles
        assert sample.grid == (2, 2) and found.looks["text"][0][0]["tokens"] > 4
    assert float(sample.share.max()) <= 1 + 1e-5


def test_the_pictures_are_those_that_were_asked(model_dirs, records):
    """The corrupted picture of a question is drawn with the strength that its answer was given to."""
    model, fmt, kind, settings = opened(
        model_dirs[True], "crystal", "--corruption", "noise=5:200", "--seed", "3"
    )
    found = inside.measure(model, fmt, kind, settings, records, 2)
    asked = reliance.questions(model, fmt, records, "keep", Corruption("noise=5:200"), 3)
    for i, sample in enumerate(found.samples):
        pixels = model.image_processor(images=[sample.images[1]])["pixel_values"]
        assert (asked.build(i, 0)["pixel_values_cor"][: len(pixels)] - pixels).abs().max() < 1e-5


def test_chosen_layers_alone_are_kept(model_dirs, records):
    model, fmt, kind, settings = opened(model_dirs[True])
    whole = inside.measure(model, fmt, kind, settings, records[:2], 1).samples[0]
    some = inside.measure(model, fmt, kind, settings, records[:2], 1, layers={2, 0}).samples[0]
    assert some.layers == [0, 2] and torch.allclose(some.image[:, :, [1, 2]], whole.image[:, :, [1, 3]])
    assert torch.allclose(some.image[:, :, 0], whole.image[:, :, [1, 3]].mean(2), atol=1e-6)


def test_a_blind_run_is_looked_into_blindly(model_dirs, records):
    """Grey pictures, and no interventions: there is nothing to take away."""
    model, fmt, kind, settings = opened(model_dirs[True], "sft", "--blind")
    found = inside.measure(model, fmt, kind, settings, records, 1)
    assert "blind" in found.why and list(found.samples[0].answers) == ["as trained"]
    assert found.samples[0].images[0].getextrema() == ((128, 128),) * 3
    assert Image.open(records[0].images[0]).getextrema() != ((128, 128),) * 3


@pytest.mark.parametrize("alike", [True, False])
def test_questions_that_cannot_be_swapped_are_told(model_dirs, records, alike):
    """One question, or answers that are all alike: no table, the reason instead, and answers all the same."""
    model, fmt, kind, settings = opened(model_dirs[True])
    twins = [data.Record(**(vars(r) | {"answer": "red"})) for r in records[:2]] if alike else records[:1]
    found = inside.measure(model, fmt, kind, settings, twins, 1)
    assert found.reliance is None and (
        "another answer" in found.why if alike else "one question" in found.why
    )
    assert list(found.samples[0].answers) == ["as trained", "latents dropped", "image corrupted"]


# --- what a run's evaluation left ---


def left(run, name, **changes):
    """A result of --reliance in a run directory."""
    line = {"condition": "as trained", "right": 1.0, "low": 0.5, "high": 1.0}
    result = {
        "checkpoint": "2", "data": "some.jsonl", "questions": 7, "corruption": "blur=5", "conditions": [line],
        "rule": "a rule", "verdict": "a verdict",
    }  # fmt: skip
    file = run / "reliance" / name / "reliance.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | changes))
    return file


def test_the_newest_result_is_read_if_it_is_of_the_checkpoint(run, tmp_path):
    assert inside.evaluated(run, "step-2") == (None, "")
    old, new = left(run, "z", questions=5), left(run, "a")
    os.utime(old, (1, 1))
    result, source = inside.evaluated(run, "step-2")
    assert (
        result["questions"] == 7
        and source == f"Read from {new}: 7 questions of some.jsonl, corruption blur=5."
    )
    result, source = inside.evaluated(run, "step-1")
    assert result is None and "checkpoint step-2 (--checkpoint 2) and not shown" in source
    new.unlink(), old.unlink()


@pytest.mark.parametrize("text", ["{", "[]", '{"conditions": [{}], "rule": "", "verdict": ""}', "{}"])
def test_a_broken_result_is_one_line(run, text):
    file = left(run, "broken")
    file.write_text(text)
    with pytest.raises(UserError, match="not a result of crystal.evaluate --reliance") as refused:
        inside.evaluated(run, "step-2")
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
    file.unlink()
