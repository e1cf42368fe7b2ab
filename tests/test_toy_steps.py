"""Questions of several steps: a solver of their own, which sees the things of a scene and the words alone.

Right values: things found by the shapes that a question names, distances and counts by arithmetic on their
centres, arrows followed from cell to cell; one scene and all its questions by hand.
"""

import hashlib
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from crystal.runtime import data, toy, toy_steps
from crystal.runtime.config import UserError
from data_prep import toy as command

STEPS = ("hops", "closest", "left_of", "pairs")


def cell(thing):
    """Column and row of the 28 pixel cell that a thing's centre is in, from 0."""
    return thing.x // 28, thing.y // 28


def place(thing):
    column, row = cell(thing)
    return f"row {row + 1}, column {column + 1}"


def alone(scene, shape):
    """The only thing of a shape."""
    (found,) = [thing for thing in scene.things if thing.shape == shape]
    return found


def distance(a, b):
    return math.hypot(a.x - b.x, a.y - b.y)


def solve(scene, text):
    """What a question asks, found from the scene's things -> (answer, things in order, the thought)."""
    if found := re.fullmatch(r"Follow (\d+) arrows? from the star: what colour is there\?", text):
        return solve_hops(scene, int(found[1]))
    if found := re.fullmatch(r"What colour is the thing nearest to the (\w+)\?", text):
        return solve_closest(scene, found[1])
    if text == "How many red things are to the left of the ring?":
        return solve_left_of(scene)
    words = r"Which are closer together, the (\w+) and the (\w+) or the (\w+) and the (\w+)\?"
    return solve_pairs(scene, re.fullmatch(words, text).groups())


def solve_hops(scene, hops):
    way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    things, arrows = {}, {}
    for thing in scene.things:
        kept = arrows if thing.shape.startswith("arrow") else things
        assert cell(thing) not in kept
        kept[cell(thing)] = thing
    here, path, said = cell(alone(scene, "star")), [alone(scene, "star")], []
    for number in range(1, hops + 1):
        step = way[arrows[here].shape.removeprefix("arrow_")]
        here = here[0] + step[0], here[1] + step[1]
        path.append(things[here])
        said.append(f"Arrow {number} leads to the {things[here].shape} in {place(things[here])}.")
    return things[here].colour, path, [*said, f"It is {things[here].colour}."]


def solve_closest(scene, shape):
    thing = alone(scene, shape)
    ranked = sorted((distance(thing, other), i) for i, other in enumerate(scene.things) if other is not thing)
    assert ranked[1][0] >= 1.5 * ranked[0][0]
    nearest = scene.things[ranked[0][1]]
    said = [
        f"The {shape} is in {place(thing)}.",
        f"The nearest to it is the {nearest.shape} in {place(nearest)}.",
        f"It is {nearest.colour}.",
    ]
    return nearest.colour, [thing, nearest], said


def solve_left_of(scene):
    ring = alone(scene, "ring")
    red = [thing for thing in scene.things if thing.colour == "red" and thing is not ring]
    assert all(cell(thing)[0] != cell(ring)[0] for thing in red)
    left = sorted((thing for thing in red if thing.x < ring.x), key=lambda thing: cell(thing)[::-1])
    where = " and ".join(map(place, left))
    found = f"Red things to its left: {where}." if left else "No red thing is to its left."
    said = [f"The ring is in {place(ring)}.", found, f"That makes {len(left)}."]
    return str(len(left)), [ring, *left], said


def solve_pairs(scene, shapes):
    a, b, c, d = (alone(scene, shape) for shape in shapes)
    one, two = distance(a, b), distance(c, d)
    assert max(one, two) >= 1.5 * min(one, two)
    said = [
        f"The {x.shape} in {place(x)} and the {y.shape} in {place(y)} are {round(far)} pixels apart."
        for x, y, far in ((a, b, one), (c, d, two))
    ]
    return "first" if one < two else "second", [a, b, c, d], said


@pytest.mark.parametrize("family", STEPS)
@pytest.mark.parametrize("stream", ["base", "demo"])
def test_answers_boxes_and_thoughts_are_the_scenes(stream, family):
    for i in range(128):
        scene, asked = toy_steps.draw_pair(stream, "solved", 1, i, (family,))
        answer, things, said = solve(scene, asked.text)
        assert (asked.answer, list(asked.cot)) == (answer, said)
        assert [list(box) for box in asked.boxes] == [thing.box for thing in things]
        assert asked.family.partition("-")[0] == family


def test_answers_take_turns_and_every_number_of_hops_meets_every_colour():
    colours = ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
    met = Counter()
    for i in range(64):
        _, asked = toy_steps.draw_pair("demo", "turns", 2, i, ("hops",))
        assert (asked.family, asked.answer) == (f"hops-{i % 8 + 1}", colours[i // 8])
        met[len(asked.cot) - 1, asked.answer] += 1
    assert len(met) == 64 and set(met.values()) == {1}

    for i in range(48):
        _, asked = toy_steps.draw_pair("demo", "turns", 2, i, ("pairs", "closest", "left_of"))
        answers = (["first", "second"], colours, ["0", "1", "2", "3"])[i % 3]
        assert asked.family == ("pairs", "closest", "left_of")[i % 3]
        assert asked.answer == answers[i // 3 % len(answers)]


def test_a_path_visits_no_thing_twice_and_goes_on_behind_what_is_asked():
    """Ten things with nine arrows between them: the last one is never the answer."""
    for i in range(60):
        scene, _ = toy_steps.draw_pair("demo", "paths", 0, i, ("hops",))
        assert sum(thing.shape == "star" for thing in scene.things) == 1
        assert not any(thing.shape == "triangle" for thing in scene.things)
        assert len([thing for thing in scene.things if not thing.shape.startswith("arrow")]) == 13
        _, path, _ = solve_hops(scene, 9)
        assert len({cell(thing) for thing in path}) == 10
        solve_hops(scene, 10)  # the end of the path points somewhere, too

        # Every arrow lies inside its cell, on the side of its tip.
        side = {"left": (-10, 0), "right": (10, 0), "up": (0, -10), "down": (0, 10)}
        for thing in scene.things:
            x, y = thing.x % 28 - 14, thing.y % 28 - 14
            if thing.shape.startswith("arrow"):
                assert (thing.colour, thing.width) == ("white", 7) and (x, y) == side[thing.shape[6:]]
            else:
                assert (x, y) == (0, 0) and thing.width <= 11


def test_every_question_of_a_scene_by_hand():
    """A ring with a red star and a red heart to its left, a red cross to its right, two blue circles."""
    ring, star = toy.Thing("ring", "red", 70, 14, 0, 9), toy.Thing("star", "red", 14, 14, 1, 12)
    heart, cross = toy.Thing("heart", "red", 14, 42, 1, 12), toy.Thing("cross", "red", 98, 98, 2, 15)
    circles = toy.Thing("circle", "blue", 70, 98, 3, 18), toy.Thing("circle", "blue", 42, 98, 3, 18)
    scene = toy.Scene((ring, star, heart, cross, *circles), "circle", 0.0, 0)

    (left,) = toy_steps.left_of_questions(scene)
    assert left.answer == "2" and left.cot == (
        "The ring is in row 1, column 3.",
        "Red things to its left: row 1, column 1 and row 2, column 1.",
        "That makes 2.",
    )
    assert left.boxes == (ring.box, star.box, heart.box)

    # From the ring star 56.0 and heart 62.6 are too much alike; star to heart 28, next 56; from the cross
    # a circle 28, the next 56.
    closest = {(q.text.split()[-1], q.answer, q.cot[1]) for q in toy_steps.closest_questions(scene)}
    assert closest == {
        ("star?", "red", "The nearest to it is the heart in row 2, column 1."),
        ("heart?", "red", "The nearest to it is the star in row 1, column 1."),
        ("cross?", "blue", "The nearest to it is the circle in row 4, column 3."),
    }

    # Distances: ring-star 56, heart-cross 101; ring-heart 62.6, star-cross 118.8; ring-cross 88.5 and
    # star-heart 28.
    pairs = list(toy_steps.pairs_questions(scene))
    found = {(q.text.removeprefix("Which are closer together, "), q.answer) for q in pairs}
    assert len(found) == 3 * 2 * 2 * 2
    assert ("the ring and the star or the heart and the cross?", "first") in found
    assert ("the cross and the ring or the heart and the star?", "second") in found
    assert ("the heart and the ring or the star and the cross?", "first") in found


def test_following_arrows_by_hand():
    star, ring = toy.Thing("star", "red", 14, 14, 2, 9), toy.Thing("ring", "blue", 42, 14, 2, 9)
    heart = toy.Thing("heart", "black", 42, 42, 2, 9)
    arrows = (
        toy.Thing("arrow_right", "white", 24, 14, 3, 7),
        toy.Thing("arrow_down", "white", 42, 24, 3, 7),
        toy.Thing("arrow_up", "white", 42, 32, 3, 7),
    )
    scene = toy.Scene((star, ring, heart, *arrows), "star", 0.0, 0)
    for hops, colour in ((1, "blue"), (2, "black"), (3, "blue")):
        (asked,) = toy_steps.questions(scene, f"hops-{hops}")
        assert asked.answer == colour and asked.family == f"hops-{hops}"
        assert f"Follow {hops} arrow{'' if hops == 1 else 's'} from" in asked.text
    assert asked.cot == (
        "Arrow 1 leads to the ring in row 1, column 2.",
        "Arrow 2 leads to the heart in row 2, column 2.",
        "Arrow 3 leads to the ring in row 1, column 2.",
        "It is blue.",
    )


def test_an_arrow_is_drawn_where_it_points():
    """White to the right of the thing's middle, and the background to its left."""
    thing, arrow = toy.Thing("square", "blue", 42, 42, 2, 9), toy.Thing("arrow_right", "white", 52, 42, 3, 7)
    pixels = toy.render(toy.Scene((thing, arrow), "star", -0.25, 1)).astype(int)
    assert np.abs(pixels[42, 51] - toy.COLOURS["white"]).max() < 12
    assert np.abs(pixels[42, 32] - toy.COLOURS["white"]).max() > 60


def read(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_the_command_asks_the_families_that_were_named(tmp_path, monkeypatch):
    """They take turns in the order given, one of toy.py's among them; the records are what training takes."""
    flags = ["--seed", "4", "--train", "6", "--val", "3", "--test", "3"]
    monkeypatch.setattr(
        "sys.argv", ["toy.py", "--out", str(tmp_path), *flags, "--families", "pairs,attribute,hops"]
    )
    command.main()
    records, _ = data.read(tmp_path / "train.jsonl", tmp_path)
    first, second = ["pairs", "attribute", "hops-1"], ["pairs", "attribute", "hops-2"]
    assert [record.family for record in records] == first + second
    assert [len(record.cot) for record in records] == [2, 2, 2, 2, 2, 3]
    for i, line in enumerate(read(tmp_path, "test")):
        scene, asked = toy_steps.draw_pair("demo", "test", 4, i, ("pairs", "attribute", "hops"))
        assert line["conversations"][1]["value"] == asked.answer and line["cot"] == list(asked.cot)
        assert (np.asarray(Image.open(tmp_path / line["image"])) == toy.render(scene)).all()
    about = json.loads((tmp_path / "manifest.json").read_text())
    assert about["families"] == ["pairs", "attribute", "hops"] and about["seed"] == 4

    # Other families are other files, though their number is the same.
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path), *flags, "--families", "closest"])
    command.main()
    assert {line["family"] for line in read(tmp_path, "train")} == {"closest"}


def test_without_families_the_scenes_are_what_they_always_were(tmp_path, monkeypatch):
    """The digests are those of the files before there were other families."""
    flags = ["--seed", "3", "--train", "30", "--val", "10", "--test", "10"]
    for name, more in (("plain", []), ("named", ["--families", "count,relation,depth,nearer,attribute"])):
        monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path / name), *flags, *more])
        command.main()
        files = [tmp_path / name / f"{split}.jsonl" for split in ("train", "val", "test")]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        assert digest == "4677ac79d61aa27b6ec7f7f54edc854f2fa84385ac6908830aa4c3cfcf5839a2"
        about = json.loads((tmp_path / name / "manifest.json").read_text())
        assert about == {"seed": 3, "train": 30, "val": 10, "test": 10, "stream": "demo", "version": 2}


@pytest.mark.parametrize(
    "families, words", [("hops,hop", "'hop' is none"), ("", "'' is none"), ("hops,hops", "names one twice")]
)
def test_a_family_that_is_none_is_told(tmp_path, monkeypatch, families, words):
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path / "new"), "--families", families])
    with pytest.raises(UserError, match=f"--families {families}: .*{words}"):
        command.main()
    assert not (tmp_path / "new").exists()
