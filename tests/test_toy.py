"""The toy scenes: same bytes from the same seed, no shared scenes, balance, and answers recomputed without toy.py's own logic."""
import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from crystal.config import UserError
from data_prep import toy

SIZES = {"train": 400, "val": 80, "test": 80}


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
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


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
    layouts = [{tuple((t.shape, t.x, t.y) for t in toy.draw_pair(stream, "train", 0, i)[0].things) for i in range(50)}
               for stream in ("base", "demo")]
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
    first, ahead, n = 0, 0, 2000
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
        assert [t.level for t in scene.things] == sorted(t.level for t in scene.things)  # the nearer hide the farther
        for thing in scene.named:
            assert shapes[thing.shape] == 1


def test_shapes_look_different_and_blur_makes_them_alike():
    """Two silhouettes of one size differ far less after a blur of 5 pixels: the detail is what tells shapes apart."""
    def canvas(shape, blur):
        image = Image.new("L", (48, 48))
        image.paste(255, (18, 18), toy.mask(shape, 12))
        return np.asarray(image.filter(ImageFilter.GaussianBlur(5)) if blur else image, float)

    for i, a in enumerate(toy.SHAPES):
        for b in toy.SHAPES[:i]:
            sharp, soft = (np.abs(canvas(a, blur) - canvas(b, blur)).max() for blur in (False, True))
            assert sharp > 150 and soft < 0.25 * sharp, (a, b)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path), "--train", "5", "--val", "5", "--test", "5"])
    toy.main()
    assert "train 5/5" in capsys.readouterr().out
    assert all(Path(tmp_path, record["image"]).exists() for record in read(tmp_path, "test"))


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
        toy.main()
    assert not (tmp_path / "new").exists()
