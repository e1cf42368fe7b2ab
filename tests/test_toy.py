"""The toy scenes: same bytes from one seed, no shared scenes, balance, answers recomputed
without toy.py's own logic.

Right values: areas of the silhouettes and colours of pixels by geometry and arithmetic, places from where a
thing was put, answers from a search of the scene for the shapes that the question names.
"""

import hashlib
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from crystal.runtime import toy
from crystal.runtime.config import UserError
from data_prep import toy as command

SIZES = {"train": 200, "val": 40, "test": 40}


def read(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def question(record):
    return record["conversations"][0]["value"].removeprefix("<image>\n")


def answer(record):
    return record["conversations"][1]["value"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy.generate(folder, 0, *SIZES.values())
    return folder


@pytest.fixture(scope="module")
def records(made):
    return [record for split in SIZES for record in read(made, split)]


def digests(folder):
    return {
        p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_same_seed_same_bytes(made, tmp_path):
    toy.generate(tmp_path, 0, *SIZES.values())
    assert digests(tmp_path) == digests(made)


def test_other_seed_and_other_stream_have_other_scenes(made, tmp_path):
    images = {p: d for p, d in digests(made).items() if p.suffix == ".png"}
    for name, seed, stream in (("seed", 1, "demo"), ("stream", 0, "base")):
        toy.generate(tmp_path / name, seed, 60, 0, 0, stream)
        others = [d for p, d in digests(tmp_path / name).items() if p.suffix == ".png"]
        assert len(others) == 60 and not set(others) & set(images.values())


def test_base_and_demo_draw_their_scenes_apart():
    layouts = [
        {
            tuple((t.shape, t.x, t.y) for t in toy.draw_pair(stream, "train", 0, i)[0].things)
            for i in range(50)
        }
        for stream in ("base", "demo")
    ]
    assert not layouts[0] & layouts[1]


def test_complete_directory_is_left_alone_and_unfinished_one_is_not(tmp_path):
    toy.generate(tmp_path, 0, 5, 0, 0)
    lines = tmp_path / "train.jsonl"
    lines.write_text("touched")
    toy.generate(tmp_path, 0, 5, 0, 0)
    assert lines.read_text() == "touched"
    (tmp_path / "manifest.json").unlink()
    toy.generate(tmp_path, 0, 5, 0, 0)
    assert lines.read_text() != "touched"


@pytest.mark.parametrize("change", [{"seed": 1}, {"train": 6}, {"val": 1}, {"test": 1}, {"stream": "base"}])
def test_other_sizes_are_drawn_anew(tmp_path, change):
    """A directory is complete only for the very arguments that made it."""
    toy.generate(tmp_path, 0, 5, 0, 0)
    (tmp_path / "train.jsonl").write_text("touched")
    toy.generate(tmp_path, **({"seed": 0, "train": 5, "val": 0, "test": 0} | change))
    assert len(read(tmp_path, "train")) == change.get("train", 5)
    assert (
        json.loads((tmp_path / "manifest.json").read_text())
        == {"seed": 0, "train": 5, "val": 0, "test": 0, "stream": "demo", "version": 2} | change
    )


def test_splits_share_no_scene(made):
    pixels = [Image.open(p).tobytes() for p in (made / "images").rglob("*.png")]
    assert len(set(pixels)) == len(pixels) == sum(SIZES.values())


def test_shared_scene_is_refused(tmp_path, monkeypatch):
    same = toy.draw_pair("demo", "train", 0, 0)
    monkeypatch.setattr(toy, "draw_pair", lambda *names: same)
    with pytest.raises(RuntimeError, match="share a scene"):
        toy.generate(tmp_path, 0, 1, 1, 0)


def test_format(made, records):
    for record in records:
        assert set(record) == {"id", "image", "conversations", "family", "boxes", "cot"}
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
        assert record["conversations"][0]["value"].startswith("<image>\n") and question(record).endswith("?")
        assert answer(record) in toy.ANSWERS[record["family"]]
        assert len(record["cot"]) == 2 and all(re.fullmatch(r"[A-Z].+\.", step) for step in record["cot"])
        image = Image.open(made / record["image"])
        assert (image.size, image.mode, image.format) == ((toy.SIDE, toy.SIDE), "RGB", "PNG")
    assert len({record["id"] for record in records}) == len(records)


def test_answers_are_balanced(made):
    for split, size in SIZES.items():
        split = read(made, split)
        assert set(Counter(r["family"] for r in split).values()) == {size // len(toy.FAMILIES)}
        for family, allowed in toy.ANSWERS.items():
            counts = Counter(answer(r) for r in split if r["family"] == family)
            assert set(counts) == set(allowed) and max(counts.values()) - min(counts.values()) <= 1


def test_blind_guess_from_the_words_gets_chance():
    """The place of a shape in the question, or which shapes are asked about, must not tell the answer."""
    first, ahead, n = 0, 0, 1000
    for i in range(n):
        _, nearer = toy.draw_pair("demo", "balance", 0, 5 * i + toy.FAMILIES.index("nearer"))
        first += nearer.text.split("the ")[2].startswith(nearer.answer)
        _, relation = toy.draw_pair("demo", "balance", 0, 5 * i + toy.FAMILIES.index("relation"))
        shapes = re.findall("|".join(toy.SHAPES), relation.text)
        ahead += (shapes[0] < shapes[1]) == (relation.answer in ("left", "above"))
    bound = 4 * 0.5 / math.sqrt(n)
    assert abs(first / n - 0.5) < bound and abs(ahead / n - 0.5) < bound


def centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def test_boxes_lie_inside_and_hold_what_is_asked(made, records):
    """Recompute every answer from the boxes or the pixels alone."""
    for record in records:
        boxes, said, family = record["boxes"], answer(record), record["family"]
        assert all(0 <= x0 < x1 <= toy.SIDE and 0 <= y0 < y1 <= toy.SIDE for x0, y0, x1, y1 in boxes)
        asked = re.findall("|".join(toy.SHAPES), question(record))
        if family == "count":
            assert len(boxes) == int(said) and len(set(map(tuple, boxes))) == len(boxes)
        elif family == "relation":
            (ax, ay), (bx, by) = map(centre, boxes)
            assert {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}[said]
            assert said in question(record)
        elif family == "depth":
            a, b = (box[2] - box[0] for box in boxes)
            assert {"front": a > b, "behind": a < b}[said]
        elif family == "nearer":
            to_b, to_c = (math.dist(centre(boxes[0]), centre(box)) for box in boxes[1:])
            assert said == (asked[1] if to_b < to_c else asked[2])
        elif family == "attribute":
            x0, y0, x1, y1 = boxes[0]
            patch = np.asarray(Image.open(made / record["image"]), float)[y0:y1, x0:x1].reshape(-1, 3)
            near = [np.linalg.norm(patch - rgb, axis=1).min() for rgb in toy.COLOURS.values()]
            assert near[list(toy.COLOURS).index(said)] < 60


def test_scene_keeps_its_promises():
    for i in range(300):
        scene = toy.draw_for(("base", "demo")[i % 2], toy.rng_for("promises", i))
        cells = [(thing.row, thing.column) for thing in scene.things]
        assert len(set(cells)) == len(cells) and all(1 <= v <= toy.CELLS for cell in cells for v in cell)
        shapes = Counter(thing.shape for thing in scene.things)
        assert all(count == 1 or shape == scene.counted for shape, count in shapes.items())
        # The nearer hide the farther.
        assert [t.level for t in scene.things] == sorted(t.level for t in scene.things)
        for thing in scene.named:
            assert shapes[thing.shape] == 1


def test_shapes_look_different_and_blur_makes_them_alike():
    """Two silhouettes of one size differ far less after a blur of 5 pixels: the detail is
    what tells shapes apart.
    """

    def canvas(shape, blur):
        image = Image.new("L", (48, 48))
        image.paste(255, (18, 18), toy.mask(shape, 12))
        return np.asarray(image.filter(ImageFilter.GaussianBlur(5)) if blur else image, float)

    for i, a in enumerate(toy.SHAPES):
        for b in toy.SHAPES[:i]:
            sharp, soft = (np.abs(canvas(a, blur) - canvas(b, blur)).max() for blur in (False, True))
            assert sharp > 150 and soft < 0.25 * sharp, (a, b)


def test_the_command_draws_what_was_asked(tmp_path, monkeypatch, capsys):
    """So many of each split, the scenes of the seed that was given, the questions in order."""
    sizes, taken = {"train": 7, "val": 3, "test": 2}, set()
    for seed in (5, 6):
        flags = [
            "--out", str(tmp_path / str(seed)), "--seed", str(seed), "--train", "7", "--val", "3",
            "--test", "2",
        ]
        monkeypatch.setattr("sys.argv", ["toy.py", *flags])
        command.main()
        assert "train 7/7" in capsys.readouterr().out
        for split, size in sizes.items():
            records = read(tmp_path / str(seed), split)
            assert [r["id"] for r in records] == [f"{split}-{i:06d}" for i in range(1, size + 1)]
            assert [r["family"] for r in records] == [toy.FAMILIES[i % 5] for i in range(size)]
            for i, record in enumerate(records):
                scene, asked = toy.draw_pair("demo", split, seed, i)
                picture = np.asarray(Image.open(tmp_path / str(seed) / record["image"]))
                assert (question(record), answer(record)) == (asked.text, asked.answer) and (
                    picture == toy.render(scene)
                ).all()
                taken.add(picture.tobytes())
    assert len(taken) == 2 * 12
    assert json.loads((tmp_path / "6" / "manifest.json").read_text()) == sizes | {
        "seed": 6,
        "stream": "demo",
        "version": 2,
    }


def test_answers_take_turns_within_their_family():
    """Question i is of family i mod 5, and of the answers of that family the one whose turn it is."""
    for i in range(45):
        _, asked = toy.draw_pair("demo", "turns", 2, i)
        answers = {
            "count": ["1", "2", "3", "4"],
            "relation": ["left", "right", "above", "below"],
            "depth": ["front", "behind"],
            "nearer": ["circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart"],
            "attribute": ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"],
        }
        family = ["count", "relation", "depth", "nearer", "attribute"][i % 5]
        assert (asked.family, asked.answer) == (family, answers[family][i // 5 % len(answers[family])])


def named_in(text, scene):
    """The things of a scene in the order in which a text names their shapes, for shapes that occur once."""
    shapes = re.findall("|".join(toy.SHAPES), text)
    found = [[thing for thing in scene.things if thing.shape == shape] for shape in shapes]
    assert all(len(things) == 1 for things in found), text
    return [things[0] for things in found]


def cell(thing):
    """Row and column of the 28 pixel cell of a thing's centre, from 1."""
    return 1 + thing.y // 28, 1 + thing.x // 28


def place(thing):
    return f"The {thing.shape} is in row {cell(thing)[0]}, column {cell(thing)[1]}."


def box(thing):
    left, top = thing.x - thing.width // 2, thing.y - thing.width // 2
    return [left, top, left + thing.width, top + thing.width]


def test_answers_boxes_and_thoughts_are_the_scenes():
    """From the scene itself: the things that a question names, by shape; their places,
    sizes, colours and distances.
    """
    size = ("tiny", "small", "large", "huge")
    for i in range(400):
        scene, asked = toy.draw_pair("demo", "answers", 1, i)
        said = asked.answer
        if asked.family == "count":
            name = re.search(r"How many (\w+?)(?:e?s) (?:are there|can you see)\?", asked.text)[1]
            things = [thing for thing in scene.things if thing.shape.startswith(name)]
            things.sort(key=cell)
            shape = things[0].shape + ("es" if things[0].shape == "cross" else "s")
            assert shape in asked.text and said == str(len(things))
            where = " and ".join("row {}, column {}".format(*cell(thing)) for thing in things)
            assert asked.cot == (f"I look for {shape}: {where}.", f"That makes {said}.")
        else:
            things = named_in(asked.text, scene)
            a, b, c = [*things, None, None][:3]
            if asked.family == "relation":
                assert (
                    said == {True: "left", False: "right"}[a.x < b.x]
                    if said in ("left", "right")
                    else {True: "above", False: "below"}[a.y < b.y]
                )
                assert (cell(a)[1] != cell(b)[1]) if said in ("left", "right") else (cell(a)[0] != cell(b)[0])
                assert asked.cot == (place(a), place(b))
            elif asked.family == "depth":
                assert a.level != b.level and said == {True: "front", False: "behind"}[a.level > b.level]
                assert asked.cot == (
                    f"The {a.shape} is {size[a.level]}.",
                    f"The {b.shape} is {size[b.level]}.",
                )
            elif asked.family == "nearer":
                to_b, to_c = math.hypot(a.x - b.x, a.y - b.y), math.hypot(a.x - c.x, a.y - c.y)
                assert said == (b if to_b < to_c else c).shape and max(to_b, to_c) >= 1.5 * min(to_b, to_c)
                rest = "The {} is in row {}, column {}, the {} in row {}, column {}.".format(
                    b.shape, *cell(b), c.shape, *cell(c)
                )
                assert asked.cot == (place(a), rest)
            else:
                assert said == a.colour and asked.cot == (place(a), f"It is {said}.")
        assert list(asked.boxes) == [box(thing) for thing in things]


def test_every_question_of_a_scene_can_be_drawn():
    """By hand: a red star above and left of a blue ring that is nearer to the eye, a heart three
    cells off, two crosses.
    """
    star, ring = toy.Thing("star", "red", 14, 14, 0, 9), toy.Thing("ring", "blue", 42, 44, 3, 18)
    heart = toy.Thing("heart", "white", 98, 20, 1, 12)
    crosses = toy.Thing("cross", "black", 70, 98, 2, 15), toy.Thing("cross", "green", 14, 98, 2, 15)
    scene = toy.Scene((star, heart, *crosses, ring), "cross", 0.0, 0)
    assert (
        scene.named == [star, heart, ring]
        and star.place == "row 1, column 1"
        and heart.place == "row 1, column 4"
    )
    assert list(toy.count_choices(scene)) == [("2", [crosses[1], crosses[0]])]
    relations = {(a.shape, b.shape, said) for said, (a, b) in toy.relation_choices(scene)}
    assert relations == {
        ("star", "ring", "left"), ("ring", "star", "right"), ("star", "ring", "above"),
        ("ring", "star", "below"), ("star", "heart", "left"), ("heart", "star", "right"),
        ("ring", "heart", "left"), ("heart", "ring", "right"), ("heart", "ring", "above"),
        ("ring", "heart", "below"),
    }
    depths = {(a.shape, b.shape, said) for said, (a, b) in toy.depth_choices(scene)}
    assert depths == {
        ("star", "ring", "behind"), ("ring", "star", "front"), ("star", "heart", "behind"),
        ("heart", "star", "front"), ("heart", "ring", "behind"), ("ring", "heart", "front"),
    }
    # Distances: star to ring 41.0, star to heart 84.2, ring to heart 60.9; 60.9 is not one and
    # a half times 41.0.
    nearer = {(a.shape, b.shape, c.shape, said) for said, (a, b, c) in toy.nearer_choices(scene)}
    assert nearer == {("star", "ring", "heart", "ring"), ("star", "heart", "ring", "ring")}
    assert [(said, thing.shape) for said, (thing,) in toy.attribute_choices(scene)] == [
        ("red", "star"), ("white", "heart"), ("blue", "ring"),
    ]
    alone = toy.Scene((star, ring), "ring", 0.0, 0)
    assert alone.named == [star, ring]  # counted, but one: its shape identifies it
    assert (
        toy.ask(alone, "nearer", np.random.default_rng(0)) is None
        and toy.ask(scene, "count", np.random.default_rng(0), "3") is None
    )


def test_a_picture_is_drawn_by_hand(monkeypatch):
    """Background, colours and who hides whom at single pixels; the noise's spread; another seed, other noise.
    """
    far, near = toy.Thing("square", "green", 30, 40, 0, 20), toy.Thing("square", "blue", 38, 40, 3, 20)
    # At this hardness the noise's spread is 3 - 12 / 4 = 0.
    quiet = toy.render(toy.Scene((far, near), "star", -0.25, 1))
    for x, y in ((0, 0), (111, 0), (5, 100), (60, 111)):
        light, warmth = 118 - 60 * (y / 112 - 0.5), -50 * (x / 112 - 0.5)
        assert quiet[y, x].tolist() == [int(light + warmth), int(light), int(light - warmth)]
    # The squares cover 20 to 39 and 28 to 47: where they meet the nearer one is seen. A shade of its own, a
    # few levels, is in each.
    assert np.abs(quiet[40, 24].astype(int) - toy.COLOURS["green"]).max() < 12
    assert (
        np.abs(quiet[40, 34].astype(int) - toy.COLOURS["blue"]).max() < 12
        and np.abs(quiet[40, 45].astype(int) - toy.COLOURS["blue"]).max() < 12
    )
    assert (quiet[40, 24] != toy.COLOURS["green"]).any()

    for hardness, spread in ((0.0, 3.0), (1.0, 15.0)):
        empty = [toy.render(toy.Scene((), "star", hardness, seed)).astype(float) for seed in (1, 2)]
        noise = empty[0] - toy.render(toy.Scene((), "star", -0.25, 1)).astype(float)
        assert noise.std() == pytest.approx(spread, rel=0.05) and abs(noise.mean()) < 0.5 + spread / 50
        assert (empty[0] != empty[1]).mean() > 0.5
        assert np.abs(noise[..., 0] - noise[..., 1]).max() <= 1  # one number for the three colours of a pixel


def test_sizes_follow_depth_hardness_and_zoom():
    """Width in pixels: 9, 12, 15, 18 by depth, times the zoom, a little less where it is hard; the streams'
    own ranges of hardness.
    """
    for stream, zoom, (low, high) in (("base", 1.0, (0.0, 0.6)), ("demo", 0.72, (0.8, 1.2))):
        drawn, pushed = [], 0
        for i in range(200):
            scene = toy.draw_for(stream, toy.rng_for("sizes", stream, i), i % 4 + 1)
            drawn.append(scene.hardness)
            assert (
                len(scene.things) == i % 4 + 1 + 4
                and sum(thing.shape == scene.counted for thing in scene.things) == i % 4 + 1
            )
            for thing in scene.things:
                assert thing.width == round(
                    zoom * (1.05 - 0.25 * scene.hardness) * (9, 12, 15, 18)[thing.level]
                )
            # A pair that was pushed together lies 6 pixels, times the zoom, on either side of the
            # border between its cells.
            gap = round(6 * zoom)
            ends = [(thing.x % 28, thing.y % 28) for thing in scene.things]
            pushed += any(x in (gap, 28 - gap) or y in (gap, 28 - gap) for x, y in ends)
        assert low <= min(drawn) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(drawn) <= high
        assert 60 < pushed <= 200
    counts = Counter(
        sum(t.shape == s.counted for t in s.things)
        for s in (toy.draw_scene(toy.rng_for("counts", i)) for i in range(400))
    )
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 60


def test_neighbours_are_pushed_together_by_hand():
    """The first two cells that are neighbours, in columns or in rows, six pixels from their border, and
    level with one another.
    """
    centres = [[98, 98], [14, 12], [42, 17]]
    toy.push_together(centres, [(3, 3), (0, 0), (1, 0)], 6)
    assert centres == [[98, 98], [22, 12], [34, 12]]
    centres = [[97, 97], [99, 70]]
    toy.push_together(centres, [(3, 3), (3, 2)], 6)
    assert centres == [[99, 90], [99, 78]]
    centres = [[14, 14], [70, 70]]
    toy.push_together(centres, [(0, 0), (2, 2)], 6)
    assert centres == [[14, 14], [70, 70]]


def test_interrupted_run_is_not_taken_as_complete(tmp_path, monkeypatch):
    toy.generate(tmp_path, 0, 5, 0, 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy, "render", lambda scene: (_ for _ in ()).throw(KeyboardInterrupt))
        toy.generate(tmp_path, 1, 5, 0, 0)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_no_split_has_a_negative_size(tmp_path, monkeypatch, split):
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path / "new"), f"--{split}", "-1"])
    with pytest.raises(UserError, match=f"--{split} -1"):
        command.main()
    assert not (tmp_path / "new").exists()
