"""The tiny base: its training forward is the stock model's, batches say what the scenes show,
lessons and schedule hold.

Right values: losses by loops over cells and tokens, patches and marks by index, the schedule and the check's
table by arithmetic, the shipped files.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

import crystal.backbone.model
from crystal import evaluate
from crystal.layout import Format
from crystal.runtime import data, toy
from crystal.runtime.config import UserError
from data_prep.tiny import base as tiny_base
from data_prep.tiny import batches as tiny_batches
from data_prep.tiny import check as tiny_check
from data_prep.tiny import files as tiny_files

TINY = Path(__file__).resolve().parent.parent / "crystal" / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def layout(tokenizer):
    return tiny_batches.Layout(tokenizer)


@pytest.fixture(scope="module")
def batch(layout):
    rngs = [toy.rng_for("test", i) for i in range(3)]
    return tiny_batches.make_batch(
        layout, rngs, "demo", dict.fromkeys(tiny_batches.KINDS, 1 / len(tiny_batches.KINDS))
    )


def test_training_forward_is_the_stock_forward(tokenizer, layout, batch):
    """Every slot's logits equal those of the stock model, which gets the same question alone, through
    its own image processor.
    """
    torch.manual_seed(0)
    pupil = tiny_base.Pupil(AutoConfig.from_pretrained(TINY), layout)
    stock = tiny_check.load(TINY)
    stock.load_state_dict(pupil.model.state_dict())
    processor = AutoImageProcessor.from_pretrained(TINY)
    with torch.no_grad():
        ours = pupil.model.lm_head(pupil.read(pupil.see(tiny_batches.pixels(batch.patches)), batch.tokens)[0])
        for b in range(3):
            rng = toy.rng_for("test", b)
            image = Image.fromarray(toy.render(toy.draw_for("demo", rng)))
            seen = processor(images=[image], return_tensors="pt")
            for s in range(tiny_batches.SLOTS):
                ids = torch.cat([torch.tensor(layout.opening), batch.tokens[b, s]])[None]
                theirs = stock(
                    input_ids=ids, mm_token_type_ids=(ids == stock.config.image_token_id).int(), **seen
                ).logits
                torch.testing.assert_close(ours[b, s], theirs[0, layout.P :], atol=1e-4, rtol=1e-4)


def test_opening_and_slot_are_the_chat_template(tokenizer, layout):
    content = [{"type": "image"}, {"type": "text", "text": "What colour is the star?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).replace(
        "<|image_pad|>", "<|image_pad|>" * tiny_batches.N
    )
    tokens, labels = layout.encode("What colour is the star?", "red")
    kept = [token for token in tokens if token != tokenizer.pad_token_id]
    assert tokenizer.decode(layout.opening + kept) + "\n" == text
    assert tokenizer.decode([label for label in labels if label != tiny_batches.IGNORE]) == "red<|im_end|>"


def test_marks_tell_what_is_named_and_never_the_answer(tokenizer, layout):
    for i in range(200):
        rng = toy.rng_for("marks", i)
        scene = toy.draw_scene(rng)
        for family in toy.FAMILIES:
            question = toy.ask(scene, family, rng)
            if question is None:
                continue
            tokens, labels = layout.encode(question.text, question.answer)
            for mark, token, label in zip(
                tiny_batches.marks_of(layout, scene, family, tokens, labels), tokens, labels
            ):
                word = tokenizer.decode([token]).strip()
                if label != tiny_batches.IGNORE:
                    assert set(mark) == {tiny_batches.IGNORE}
                for thing in scene.named:
                    if thing.shape == word and label == tiny_batches.IGNORE:
                        assert mark[:4] == [
                            list(toy.COLOURS).index(thing.colour),
                            thing.level,
                            thing.row - 1,
                            thing.column - 1,
                        ]
                if family == "count" and mark[4] >= 0:
                    assert word == toy.plural(scene.counted) and str(mark[4] + 1) == question.answer


def test_tokenizer_is_made_again_to_the_byte(tmp_path):
    """The configuration too is made by the script, but names the version of transformers that wrote it."""
    tiny_files.make_directory(tmp_path)
    for name in (
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
    ):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


@pytest.mark.parametrize("flags", [["--base", "nowhere"], ["--blind", "nowhere"], ["--per_family", "0"]])
def test_wrong_flags_of_the_check_are_one_line(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["tiny_check.py", *flags])
    with pytest.raises(UserError, match=" ".join(flags)):
        tiny_check.main()


# --- batches ---


def test_patches_lie_token_by_token():
    """Four patches of 14 x 14 for each of 4 x 4 tokens, colours one after the other: every
    number from its index.
    """
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    patches = tiny_batches.patches_of(image)
    assert patches.shape == (64, 588)
    for n in range(64):
        token, part = divmod(n, 4)
        top, left = 28 * (token // 4) + 14 * (part // 2), 28 * (token % 4) + 14 * (part % 2)
        piece = image[top : top + 14, left : left + 14]
        assert (patches[n] == np.concatenate([piece[..., colour].ravel() for colour in range(3)])).all()


def test_pixels_are_normalised_and_a_blind_model_sees_grey():
    patches = torch.randint(0, 256, (2, 588), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    seen, grey = tiny_batches.pixels(patches), tiny_batches.pixels(patches, blind=True)
    for at in (0, 195, 196, 391, 392, 587):
        colour = at // 196
        assert float(seen[1, at]) == pytest.approx(
            (int(patches[1, at]) / 255 - mean[colour]) / std[colour], abs=1e-5
        )
        assert float(grey[1, at]) == pytest.approx((128 / 255 - mean[colour]) / std[colour], rel=1e-5)


@pytest.fixture(scope="module")
def scene():
    """A red star in the first cell, a blue ring two cells to the right, a heart at the
    far corner, two crosses.
    """
    return toy.Scene(
        (
            toy.Thing("star", "red", 14, 14, 0, 9),
            toy.Thing("ring", "blue", 70, 14, 1, 12),
            toy.Thing("cross", "black", 14, 98, 2, 15),
            toy.Thing("cross", "green", 42, 98, 2, 15),
            toy.Thing("heart", "white", 98, 98, 3, 18),
        ),
        "cross",
        0.0,
        0,
    )


def test_cells_by_hand(scene):
    cells = tiny_batches.cells_of(scene)
    # Shapes: circle square triangle star cross diamond ring heart; colours: red orange yellow green blue
    # purple white black; depth 0 to 3.
    filled = {0: [3, 0, 0], 2: [6, 4, 1], 12: [4, 7, 2], 13: [4, 3, 2], 15: [7, 6, 3]}
    assert cells.tolist() == [filled.get(n, [-100] * 3) for n in range(16)]


def test_marks_by_hand(layout, scene, tokenizer):
    """Distances beyond the first cell: star to ring 56 pixels are two cells, one beyond; star to heart 118.8
    are 4.2, three at most.
    """

    def marked(kind, question, answer):
        tokens, labels = layout.encode(question, answer)
        marks = tiny_batches.marks_of(layout, scene, kind, tokens, labels)
        return [
            (tokenizer.decode([token]).strip(), mark)
            for token, mark in zip(tokens, marks)
            if mark != [-100] * 6
        ]

    star, ring, heart = [0, 0, 0, 0], [4, 1, 0, 2], [6, 3, 3, 3]
    none = [-100, -100]
    assert marked("nearer", "Which is nearer to the star, the ring or the heart?", "ring") == [
        ("star", star + none), ("ring", ring + [-100, 1]), ("heart", heart + [-100, 3]),
    ]
    assert marked("relation", "Is the ring left or right of the heart?", "left") == [
        ("ring", ring + none), ("heart", heart + none),
    ]
    assert marked("count", "How many crosses are there?", "2") == [("crosses", [-100] * 4 + [1, -100])]
    assert marked("depth", "Is the star in front of or behind the heart?", "behind") == [
        ("star", star + none), ("heart", heart + none),
    ]


def test_lessons_name_place_and_size(scene):
    for i in range(20):
        question, answer = tiny_batches.lesson(scene, "place", toy.rng_for("lesson", i))
        assert (question, answer) in {
            ("Where is the star?", "row 1, column 1"),
            ("Where is the ring?", "row 1, column 3"),
            ("Where is the heart?", "row 4, column 4"),
        }
        question, answer = tiny_batches.lesson(scene, "size", toy.rng_for("lesson", i))
        assert (question, answer) in {
            ("How large is the star?", "tiny"),
            ("How large is the ring?", "small"),
            ("How large is the heart?", "huge"),
        }


def test_words_before_an_answer(layout):
    """Nothing in half of the cases, else 1 to 26 words; in half of these the beginning of a sentence first,
    its words but the first being labels.
    """
    start = layout.tokenizer(" Because the feature of the image is").input_ids
    counts, begun = [], 0
    for i in range(400):
        tokens, labels = layout.words(toy.rng_for("words", i))
        counts.append(len(tokens))
        assert len(tokens) == len(labels)
        if labels and any(label != -100 for label in labels):
            n = min(len(start), len(tokens))
            begun += 1
            assert tokens[:n] == start[:n] and labels == [-100] + start[1:n] + [-100] * (len(tokens) - n)
    assert (
        160 < counts.count(0) < 240
        and set(counts) <= set(range(27))
        and {1, 26} <= set(counts)
        and 60 < begun < 140
    )
    assert len(layout.words(toy.rng_for("words", 0), 9)[0]) == 9 and layout.words(
        toy.rng_for("words", 0), 0
    ) == ([], [])

    wordy = tiny_batches.Layout(layout.tokenizer, 4, 47)
    tokens, labels = wordy.encode("What colour is the star?", "red", ([7, 8, 9], [-100, 8, -100]))
    asked, said = (
        layout.tokenizer("What colour is the star?<|im_end|>\n<|im_start|>assistant\n").input_ids,
        layout.tokenizer("red<|im_end|>").input_ids,
    )
    empty = 47 - len(asked) - 3 - len(said)
    assert tokens == asked + [7, 8, 9] + said + [layout.tokenizer.pad_token_id] * empty
    assert labels == [-100] * len(asked) + [-100, 8, -100] + said + [-100] * empty
    with pytest.raises(ValueError, match="does not fit 21 tokens"):
        layout.encode("What colour is the star?" * 4, "red")


def test_the_stream_changes_what_it_asks(layout, monkeypatch):
    """Shares of the kinds go from START to END in two thirds of stage one; scenes of (seed, step, number)
    alone; words in stage two.
    """
    made, wordy = [], object()
    monkeypatch.setattr(tiny_batches, "make_batch", lambda *args: made.append(args))
    stream = tiny_batches.Stream(layout, wordy, 7, 300, 5, 1, 2)
    for step in (0, 100, 200, 299, 300):
        stream[step]
    start = {
        "place": 0.1,
        "size": 0.1,
        "attribute": 0.2,
        "count": 0.15,
        "relation": 0.15,
        "depth": 0.15,
        "nearer": 0.15,
    }
    end = {
        "place": 0.02,
        "size": 0.03,
        "attribute": 0.1,
        "count": 0.2,
        "relation": 0.2,
        "depth": 0.2,
        "nearer": 0.25,
    }
    for (of, rngs, name, share, *words), step, t in zip(made, (0, 100, 200, 299, 300), (0, 0.5, 1, 1, 1)):
        assert (
            of is (layout if step < 300 else wordy)
            and name == "base"
            and words == ([] if step < 300 else [None])
        )
        assert share == pytest.approx({kind: (1 - t) * start[kind] + t * end[kind] for kind in start})
        # Of five, rank 1 of 2.
        assert [rng.integers(10**9) for rng in rngs] == [
            toy.rng_for("base", "scenes", 7, step, i).integers(10**9) for i in (1, 3)
        ]


def test_a_batch_asks_what_it_is_told_to(layout):
    """One kind alone; a line break before half of the questions; each slot answers from its own scene."""
    rngs = [toy.rng_for("kinds", i) for i in range(6)]
    made = tiny_batches.make_batch(layout, rngs, "base", {"attribute": 1.0, "count": 0.0})
    assert set(made.kinds.flatten().tolist()) == {
        tiny_batches.KINDS.index("attribute")
    } and made.tokens.shape == (6, 8, 21)
    text = [[layout.tokenizer.decode(slot) for slot in row] for row in made.tokens]
    breaks = sum(slot.startswith("\n") for row in text for slot in row)
    assert 10 < breaks < 38
    for i in range(6):
        drawn = toy.draw_for("base", toy.rng_for("kinds", i))
        assert (
            made.patches[64 * i : 64 * i + 64].numpy() == tiny_batches.patches_of(toy.render(drawn))
        ).all()
        colours = {thing.shape: thing.colour for thing in drawn.named}
        for slot in text[i]:
            shape = next(shape for shape in toy.SHAPES if shape in slot.split("?")[0])
            assert slot.split("assistant\n")[1].startswith(colours[shape] + "<|im_end|>")
        assert (made.cells[i].numpy() == tiny_batches.cells_of(drawn)).all()


# --- lessons ---


@pytest.fixture(scope="module")
def pupil(layout):
    torch.manual_seed(0)
    return tiny_base.Pupil(AutoConfig.from_pretrained(TINY), layout)


def loss_at(logits, target):
    """Cross entropy of one row of logits."""
    return -float(logits.detach().double().log_softmax(-1)[target])


def mean(values):
    return sum(values) / len(values)


def test_the_dense_lesson_by_loops(pupil, layout, batch):
    """Shape and colour by the words' own embeddings, an empty cell by the head's first number, then size (4),
    row (4) and column (4), rows and columns at 0.3.
    """
    g = torch.Generator().manual_seed(1)
    seen = torch.randn(3, 16, 192, generator=g)
    words = [layout.tokenizer(" " + word).input_ids[0] for word in (*toy.SHAPES, *toy.COLOURS)]
    shapes, colours, sizes, rows, columns = [], [], [], [], []
    for b in range(3):
        for n in range(16):
            named, other = pupil.embed.weight[words] @ seen[b, n], pupil.dense(seen[b, n])
            shape, colour, size = batch.cells[b, n].tolist()
            shapes.append(loss_at(torch.cat([named[:8], other[:1]]), 8 if shape == -100 else shape))
            rows.append(loss_at(other[5:9], n // 4))
            columns.append(loss_at(other[9:13], n % 4))
            if shape != -100:
                colours.append(loss_at(named[8:], colour))
                sizes.append(loss_at(other[1:5], size))
    expected = mean(shapes) + mean(colours) + mean(sizes) + 0.3 * mean(rows) + 0.3 * mean(columns)
    assert float(pupil.dense_loss(seen, batch.cells).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_look_lesson_by_loops(pupil, batch):
    """What is named, after the second layer: colour (8), size, row, column; number and distance after
    the fourth; states normalised.
    """
    g = torch.Generator().manual_seed(2)
    second, fourth = torch.randn(2, 3, 8, 21, 192, generator=g)
    parts = {name: [] for name in ("colour", "size", "row", "column", "number", "distance")}
    for at in np.ndindex(3, 8, 21):
        colour, size, row, column, number, distance = batch.marks[at].tolist()
        norm = lambda x: x / (x.square().mean() + torch.finfo(torch.float32).eps).sqrt()
        if colour != -100:
            z = pupil.look(norm(second[at]))
            for name, logits, target in (
                ("colour", z[:8], colour), ("size", z[8:12], size), ("row", z[12:16], row),
                ("column", z[16:], column),
            ):
                parts[name].append(loss_at(logits, target))
        if number != -100:
            parts["number"].append(loss_at(pupil.number(norm(fourth[at])), number))
        if distance != -100:
            parts["distance"].append(loss_at(pupil.distance(norm(fourth[at])), distance))
    assert all(parts.values())
    assert float(pupil.look_loss(second, fourth, batch.marks).detach()) == pytest.approx(
        sum(map(mean, parts.values())), rel=1e-4
    )


def test_the_answer_lesson_by_loops(pupil, batch):
    final = torch.randn(3, 8, 21, 192, generator=torch.Generator().manual_seed(3))
    terms = []
    for b, s, t in np.ndindex(3, 8, 20):
        if batch.labels[b, s, t + 1] != -100:  # the token before a label predicts it
            terms.append(loss_at(pupil.model.lm_head(final[b, s, t]), batch.labels[b, s, t + 1]))
    assert float(pupil.answer_loss(final, batch.labels).detach()) == pytest.approx(mean(terms), rel=1e-4)


def test_accuracy_counts_whole_answers(batch, monkeypatch):
    """A pupil that says the labels, but for one token of one answer; blind or seeing, it is shown what it
    is to be shown.
    """
    V, shown = 2000, []
    final = torch.nn.functional.one_hot(batch.labels[..., 1:].clamp(min=0), V).float()
    final = torch.cat([final, torch.zeros(3, 8, 1, V)], 2)
    at = (batch.labels[1, 2] != -100).nonzero()[-1, 0]  # the end of an answer
    final[1, 2, at - 1] = 0
    final[1, 2, at - 1, 5] = 1
    fake = SimpleNamespace(
        see=lambda pixels: shown.append(pixels),
        read=lambda seen, tokens: (final,),
        model=SimpleNamespace(lm_head=lambda x: x),
    )
    found = tiny_base.accuracy(fake, batch, True)
    wrong, total = int(batch.kinds[1, 2]), batch.kinds.flatten().tolist()
    for i, kind in enumerate(tiny_batches.KINDS):
        if total.count(i):
            assert found[kind] == pytest.approx(1 - (i == wrong) / total.count(i))
    tiny_base.accuracy(fake, batch, False)
    assert torch.equal(shown[0], tiny_batches.pixels(batch.patches, True)) and torch.equal(
        shown[1], tiny_batches.pixels(batch.patches)
    )


# --- the loop ---


def test_the_schedule_by_hand():
    """50 steps up, then constant, the last 40 % down to 0; in stage two 25 steps up to a half, the
    last 70 % down.
    """
    args = SimpleNamespace(steps=200, wordy_steps=100)
    expected = {
        0: 1 / 50,
        24: 0.5,
        49: 1,
        119: 1,
        160: 0.5,
        199: 1 / 80,
        200: 0.02,
        212: 0.26,
        224: 0.5,
        229: 0.5,
        265: 0.25,
        299: 0.5 / 70,
    }
    assert {step: tiny_base.schedule(step, args) for step in expected} == pytest.approx(expected)


def test_muon_gets_the_matrices_and_adam_the_rest(pupil):
    muon, adam = tiny_base.make_optimisers(pupil, SimpleNamespace(muon_lr=0.5, adam_lr=0.25))
    names = {id(p): name for name, p in pupil.named_parameters()}
    matrices = {names[id(p)] for p in muon.param_groups[0]["params"]}
    others = {names[id(p)] for p in adam.param_groups[0]["params"]}
    assert matrices | others == set(names.values()) and not matrices & others
    assert all(
        ".weight" in name and ("layers" in name or "blocks" in name or "merger" in name) for name in matrices
    )
    assert (
        len(matrices) == 5 * 7 + 3 * 5 + 2
        and {"model.model.language_model.embed_tokens.weight", "dense.weight", "look.weight", "number.weight"}
        <= others
    )
    assert (muon.param_groups[0]["lr"], adam.param_groups[0]["lr"], adam.param_groups[0]["betas"]) == (
        0.5, 0.25, (0.9, 0.95),
    )
    assert muon.param_groups[0]["weight_decay"] == adam.param_groups[0]["weight_decay"] == 0.01


def test_gradients_are_averaged_over_processes(monkeypatch):
    """Another process whose gradients are twice ours: the mean of both is one and a half of ours."""
    one, two, none = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,)))
    one.grad, two.grad = torch.arange(6.0).view(2, 3), torch.arange(4.0) - 7
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(3))
    tiny_base.average([one, none, two], 2)
    assert (
        torch.equal(one.grad, 1.5 * torch.arange(6.0).view(2, 3))
        and torch.equal(two.grad, 1.5 * (torch.arange(4.0) - 7))
        and none.grad is None
    )


@pytest.fixture
def quick(monkeypatch):
    """Muon's directions without its iteration, and no bfloat16: on a CPU without instructions for
    it both take minutes.
    """
    monkeypatch.setattr(
        torch.optim._muon, "_zeropower_via_newtonschulz", lambda grad, *_: grad / (grad.norm() + 1e-7)
    )
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    # The same, made once.
    monkeypatch.setattr(
        tiny_files, "make_directory", lambda out: shutil.copytree(TINY, out, dirs_exist_ok=True)
    )


class Recorded(torch.utils.data.DataLoader):
    """Batches made in this process, where the test can watch."""

    def __init__(self, *args, num_workers=0, prefetch_factor=None, **kwargs):
        super().__init__(*args, **kwargs)


def test_the_command_trains_what_was_asked(quick, tmp_path, monkeypatch, capsys):
    """Three steps and two with words, the first with the dense lesson alone; rates by hand; the twin sees
    grey; a second call goes on from --work.
    """
    streams, rates, lessons, batches_made, compiled, shown = [], [], [], [], [], []
    stream, make_batch, look_loss, see = (
        tiny_batches.Stream, tiny_batches.make_batch, tiny_base.Pupil.look_loss, tiny_base.Pupil.see,
    )
    monkeypatch.setattr(tiny_batches, "Stream", lambda *args: streams.append(args[2:]) or stream(*args))
    # Of 100 watched, too.
    monkeypatch.setattr(
        tiny_batches,
        "make_batch",
        lambda layout, rngs, *rest: batches_made.append(len(rngs)) or make_batch(layout, rngs[:2], *rest),
    )
    monkeypatch.setattr(torch.utils.data, "DataLoader", Recorded)
    monkeypatch.setattr(
        tiny_base.Pupil, "look_loss", lambda self, *args: lessons.append(1) or look_loss(self, *args)
    )
    monkeypatch.setattr(
        tiny_base.Pupil, "see", lambda self, pixels: shown.append(pixels) or see(self, pixels)
    )
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(f) or f)
    for kind in (torch.optim.Muon, torch.optim.AdamW):
        step = kind.step
        monkeypatch.setattr(
            kind,
            "step",
            lambda self, *args, step=step, kind=kind: (
                rates.append((kind.__name__, self.param_groups[0]["lr"])) or step(self, *args)
            ),
        )

    flags = [
        "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--only", "blind", "--steps", "3",
        "--wordy_steps", "2", "--dense_steps", "1", "--images", "2", "--muon_lr", "0.5", "--adam_lr", "0.25",
        "--seed", "6", "--no-compile",
    ]
    monkeypatch.setattr("sys.argv", ["tiny_base.py", *flags])
    tiny_base.main()
    assert streams == [(6, 3, 2, 0, 1)] and len(lessons) == 4 and not compiled
    assert sorted(batches_made) == [2] * 5 + [100] * 4
    # Up over 50 steps, down over the last 40 % (1.2 steps); stage two: up over 25, to a half.
    factors = [1 / 50, 2 / 50, 3 / 50, 0.5 / 25, 0.5 * 2 / 25]
    assert [rate for name, rate in rates if name == "Muon"] == pytest.approx([0.5 * f for f in factors])
    assert [rate for name, rate in rates if name == "AdamW"] == pytest.approx([0.25 * f for f in factors])
    grey = tiny_batches.pixels(torch.zeros(64, 588, dtype=torch.uint8), blind=True)
    assert all(
        torch.equal(
            pixels,
            grey.expand(len(pixels) // 64 * 64, -1)
            if len(pixels) == 64
            else grey.repeat(len(pixels) // 64, 1),
        )
        for pixels in shown
    )
    assert (
        sorted(p.name for p in (tmp_path / "out").iterdir()) == ["blind"]
        and (tmp_path / "work" / "blind" / "state.safetensors").is_file()
    )
    trained = load_file(tmp_path / "out" / "blind" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in trained.values()) and set(trained) == set(
        load_file(TINY / "model.safetensors")
    )
    said = capsys.readouterr().out
    assert (
        "blind: 2.9" in said
        and "3 + 2 steps of 2 images" in said
        and "from step 0" in said
        and "blind step 3 " in said
        and "blind step 5 " in said
    )

    # Again with one more step: from the last checkpoint, and compiled as by default.
    monkeypatch.setattr("sys.argv", ["tiny_base.py", *flags[:-1], "--wordy_steps", "3"])
    tiny_base.main()
    assert "from step 5" in capsys.readouterr().out and len(rates) == 2 * 6 and len(compiled) == 1


def test_a_checkpoint_is_all_that_a_resumed_run_needs(quick, layout, tmp_path, batch):
    """Weights, both optimisers' states and the step: one more update from the file is the update that would
    have come, to the bit.
    """
    args = SimpleNamespace(muon_lr=0.02, adam_lr=3e-3)

    def update(of, optimisers):
        loss = of.dense_loss(of.see(tiny_batches.pixels(batch.patches)), batch.cells)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()

    torch.manual_seed(1)
    first = tiny_base.Pupil(AutoConfig.from_pretrained(TINY), layout)
    optimisers = tiny_base.make_optimisers(first, args)
    update(first, optimisers)
    tiny_base.save(tmp_path / "state.safetensors", first, optimisers, 41)
    torch.manual_seed(2)
    second = tiny_base.Pupil(AutoConfig.from_pretrained(TINY), layout)
    others = tiny_base.make_optimisers(second, args)
    assert tiny_base.load(tmp_path / "state.safetensors", second, others) == 41
    update(first, optimisers)
    update(second, others)
    before, after = first.state_dict(), second.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and [
        p.name for p in tmp_path.iterdir()
    ] == ["state.safetensors"]


def test_only_the_base_brings_its_files(tmp_path):
    """Weights replace what was there; for the twin nothing else."""
    model = tiny_check.load(TINY)
    args = SimpleNamespace(work=tmp_path / "work", out=tmp_path / "out")
    tiny_base.install(model, True, args)
    assert [p.relative_to(args.out).as_posix() for p in args.out.rglob("*") if p.is_file()] == [
        "blind/model.safetensors"
    ]
    tiny_base.install(model, False, args)
    shipped = {p.name for p in TINY.iterdir()} - {"README.md"}  # whose numbers are this base's alone
    assert {p.name for p in (args.out / "tiny").iterdir()} == shipped


# --- the files and the check ---


def test_the_configuration_is_the_shipped_one(tokenizer, tmp_path):
    """All but the version of transformers that wrote it, and what newer versions add."""
    tiny_files.make_directory(tmp_path)
    for name in ("config.json", "generation_config.json"):
        made, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path, TINY))
        for settings in (made, shipped):
            settings.pop("transformers_version", None)
        assert made == shipped
    assert made["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_the_twins_weights_are_the_twins():
    twin, base = (
        load_file(tiny_check.ASSETS / "blind" / "model.safetensors"),
        load_file(TINY / "model.safetensors"),
    )
    model, seeing = (
        tiny_check.load(TINY, tiny_check.ASSETS / "blind" / "model.safetensors"),
        tiny_check.load(TINY),
    )
    for of, file in ((model, twin), (seeing, base)):
        names = crystal.backbone.model.parameter_names(of, file)
        parameters = dict(of.named_parameters())
        assert (
            all(torch.equal(parameters[names[name]], tensor.float()) for name, tensor in file.items())
            and of.dtype == torch.float32
        )
    assert not torch.equal(twin["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_right_is_what_greedy_decoding_answers(tmp_path, tokenizer):
    """Of fifteen questions those that crystal.generate answers exactly."""
    toy.generate(tmp_path, 3, 15, 0, 0)
    records, _ = data.read(tmp_path / "train.jsonl")
    ours = crystal.backbone.model.load("tiny")
    expected = [
        r["correct"] for r in evaluate.answers(ours, Format(ours.tokenizer), records, max_new_tokens=8)
    ]
    drawn = [toy.draw_pair("demo", "train", 3, i) for i in range(15)]
    processor = AutoImageProcessor.from_pretrained(TINY)
    images = [Image.fromarray(toy.render(scene)) for scene, _ in drawn]
    hits = tiny_check.right(
        tiny_check.load(TINY), tokenizer, processor, images, [question for _, question in drawn]
    )
    assert hits.tolist() == expected and 0 < sum(expected) < 15


def test_an_answer_is_right_with_every_token_and_its_end(tokenizer):
    """A model that predicts what it is given, but for the last token of one row, the first
    of another, and padding.
    """
    answers = ("4", "4", "4 stars and a ring", "red")
    asked = [toy.Question("count", "How many stars are there?", answer, (), ()) for answer in answers]
    wrong = {1: -1, 2: 0}  # row: which of its answer's tokens is missed
    lengths = [len(tokenizer(question.answer + "<|im_end|>").input_ids) for question in asked]

    class Model:
        config = SimpleNamespace(image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"))

        def __call__(self, input_ids, **_):
            guess = torch.cat([input_ids[:, 1:], torch.zeros(4, 1, dtype=torch.long)], 1)
            for row, at in wrong.items():
                end = int((input_ids[row] != tokenizer.pad_token_id).nonzero()[-1, 0]) + 1
                token = end - 1 if at < 0 else end - lengths[row]
                guess[row, token - 1] = 5  # where it would be predicted
            return SimpleNamespace(logits=torch.nn.functional.one_hot(guess, 2000).float())

    images = [tiny_check.GREY] * 4
    assert lengths[0] == 2 and lengths[2] > 3
    found = tiny_check.right(Model(), tokenizer, AutoImageProcessor.from_pretrained(TINY), images, asked)
    assert found.tolist() == [True, False, False, True]


def test_the_check_measures_what_was_asked(tmp_path, monkeypatch, capsys):
    """Ten questions of each family from the seed's scenes, three answers to each: the twin grey, the base
    sharp and blurred; the table by hand.
    """
    loaded, asked = [], []

    def right(model, tokenizer, processor, images, questions):
        asked.append((model, [np.asarray(image) for image in images], questions))
        hits = (
            {"base": lambda i: i % 10 < 8, "blind": lambda i: i % 10 < 2}[model]
            if len(asked) % 3
            else lambda i: i % 10 < 4
        )
        return torch.tensor([hits(i // 5) for i in range(len(questions))])

    monkeypatch.setattr(tiny_check, "right", right)
    monkeypatch.setattr(
        tiny_check, "load", lambda *args: loaded.append(args) or ("blind" if len(args) > 1 else "base")
    )
    (tmp_path / "twin.safetensors").write_bytes(b"")
    base = tmp_path / "base"
    base.symlink_to(TINY)
    flags = [
        "--base",
        str(base),
        "--blind",
        str(tmp_path / "twin.safetensors"),
        "--per_family",
        "10",
        "--seed",
        "4",
    ]
    monkeypatch.setattr("sys.argv", ["tiny_check.py", *flags])
    with pytest.raises(SystemExit) as ended:
        tiny_check.main()
    assert loaded == [(base,), (base, tmp_path / "twin.safetensors")] and [model for model, *_ in asked] == [
        "blind", "base", "base",
    ]
    scenes = [toy.draw_pair("demo", "check", 4, i) for i in range(50)]
    for _, images, questions in asked:
        assert len(images) == 50 and questions == [question for _, question in scenes]
    assert all((image == 128).all() for image in asked[0][1])
    sharp = [toy.render(scene) for scene, _ in scenes]
    assert all((a == b).all() for a, b in zip(asked[1][1], sharp))
    assert all(blurred.std() < image.std() for blurred, image in zip(asked[2][1], sharp))

    # Of ten: 2, 8 and 4 right. The gains are six ones and four zeros: 0.6, with a deviation of sqrt(10
    # / 9 x 0.24).
    spread = 100 * 1.96 * math.sqrt(10 / 9 * 0.24) / math.sqrt(10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:7] == [
        f"| {family} | 10 | 20.0 | 80.0 | 60.0 +- {spread:.1f} | 40.0 | 67 % | yes |"
        for family in toy.FAMILIES
    ]
    assert lines[7] == "the bar is met" and ended.value.code == 0


def test_the_bar_by_hand():
    row = lambda family, **how: tiny_check.Row(
        **(
            {
                "family": family,
                "n": 100,
                "blind": 0.2,
                "base": 0.5,
                "blurred": 0.3,
                "margin": 0.3,
                "spread": 0.1,
            }
            | how
        )
    )
    assert (
        row("a").sees
        and not row("a", spread=0.16).sees
        and not row("a", base=0.86, margin=0.6).sees
        and row("a", base=0.85, margin=0.6).sees
    )
    assert (
        row("a").removed == pytest.approx(0.2 / 0.3)
        and row("a", margin=0.0).removed == 0 == row("a", margin=-0.1).removed
    )
    four = [row(name) for name in ("count", "relation", "depth", "nearer")]
    assert (
        tiny_check.met(four)
        and not tiny_check.met(four[1:])
        and not tiny_check.met([row(name) for name in ("count", "attribute", "depth", "nearer")])
    )
    kept = [row(name, blurred=0.4) for name in ("count", "relation")]
    # Three must lose half of their margin.
    assert not tiny_check.met([*kept, *four[2:]]) and tiny_check.met([kept[0], *four[1:]])
    assert "| a | 100 | 20.0 | 50.0 | 30.0 +- 16.0 | 30.0 | 67 % | no |" in tiny_check.table(
        [row("a", spread=0.16)]
    )
