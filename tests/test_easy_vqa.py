"""The package easy-vqa becomes records that training takes; whatever is wrong with it is a line.

A package of six pictures made here stands for it, laid out as the real one is.
"""

import hashlib
import json
import sys

import pytest
from PIL import Image

from crystal.runtime import data
from crystal.runtime.config import UserError
from data_prep import easy_vqa

TRAIN = [
    ["is there a circle?", "yes", 0], ["what color is the shape?", "teal", 0],
    ["is there a circle?", "no", 1], ["is there a circle?", "yes", 2],
    ["what shape is there?", "triangle", 3], ["is there a circle?", "yes", 4],
]
TEST = [
    ["is there a circle?", "yes", 0], ["is there a circle?", "no", 0], ["what shape is there?", "circle", 1],
    ["what color is the shape?", "teal", 1], ["is no circle there?", "yes", 1],
]


@pytest.fixture
def package(tmp_path):
    """package(train, test) -> the folder of a package that holds them; its pictures are of a colour each."""

    def make(train=TRAIN, test=TEST):
        folder = tmp_path / "site" / "easy_vqa"
        for split, questions, count in (("train", train, 5), ("test", test, 2)):
            images = folder / "data" / split / "images"
            images.mkdir(parents=True, exist_ok=True)
            text = questions if isinstance(questions, str) else json.dumps(questions)
            (images.parent / "questions.json").write_text(text)
            for i in range(count):
                Image.new("RGB", (64, 64), (i, len(split), 0)).save(images / f"{i}.png")
        return folder

    return make


def pixel(record):
    """The colour of a record's picture."""
    return Image.open(record.images[0]).getpixel((0, 0))


def test_the_command_writes_what_training_takes(package, tmp_path, capsys):
    out = tmp_path / "out"
    easy_vqa.main(["--out", str(out), "--package", str(package()), "--val", "2"])
    train, _ = data.read(out / "train.jsonl")
    val, _ = data.read(out / "val.jsonl")
    test, _ = data.read(out / "test.jsonl")

    # Pictures, not questions, are held out, and nothing of the test is touched.
    colours = [{pixel(record)[0] for record in part} for part in (train, val)]
    assert len(colours[1]) == 2 and not colours[0] & colours[1] and len(train) + len(val) == 6
    assert [(r.turns[0][1], r.answer, pixel(r)) for r in test] == [
        (f"<image>\n{text}", answer, (picture, 4, 0)) for text, answer, picture in TEST
    ]
    assert [r.family for r in test] == ["yes_no", "yes_no", "shape", "colour", "yes_no"]
    assert {pixel(record)[1] for record in train + val} == {5}
    assert [r.id for r in test] == [f"test-{i:06d}" for i in range(1, 6)]
    assert f"test: 5 questions about 2 pictures in {out}" in capsys.readouterr().out


def test_the_seed_holds_pictures_out(package, tmp_path):
    """Those with the smallest SHA-256 of seed and number."""
    for seed in (0, 7):
        out = tmp_path / str(seed)
        easy_vqa.main(["--out", str(out), "--package", str(package()), "--val", "2", "--seed", str(seed)])
        ranked = sorted(range(5), key=lambda i: hashlib.sha256(f"{seed}\n{i}".encode()).digest())
        val, _ = data.read(out / "val.jsonl")
        assert {pixel(record)[0] for record in val} == set(ranked[:2])


def test_guessing_is_counted_by_hand(package, tmp_path, capsys):
    """Of the circles the likelier answer is yes (3 of 4), the colour was asked once, the shape too (it was a
    triangle), and the last question never: of yes_no 1 of 3, of shapes none, of colours one, in all 2 of 5.
    """
    out = tmp_path / "out"
    (tmp_path / "out").mkdir()
    (out / "val.jsonl").write_text("of an older call")
    easy_vqa.main(["--out", str(out), "--package", str(package()), "--val", "0"])
    said = capsys.readouterr().out
    assert "percent of the test: yes_no 33.3, shape 0.0, colour 100.0, all 40.0" in said
    assert len(data.read(out / "train.jsonl")[0]) == 6 and not (out / "val.jsonl").exists()


def test_the_package_is_found_where_python_finds_it(package, tmp_path, monkeypatch):
    folder = package()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    easy_vqa.main(["--out", str(tmp_path / "out"), "--val", "1"])
    assert (tmp_path / "out" / "test.jsonl").is_file()

    monkeypatch.setattr(easy_vqa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="easy-vqa is not installed: pip install easy-vqa"):
        easy_vqa.main(["--out", str(tmp_path / "other")])
    with pytest.raises(UserError, match="holds no data/train"):
        easy_vqa.main(["--package", str(tmp_path)])


@pytest.mark.parametrize(
    "train, words",
    [
        ("{", r"train/questions.json: not JSON"),
        ([], r"train/questions.json: a JSON list"),
        ([*TRAIN[:2], ["is it?", "yes"]], r"train/questions.json\[2\]: a list of question, answer"),
        ([["is it?", "yes", "0"]], r"train/questions.json\[0\]: a list of question, answer"),
        ([["is it?", "yes", True]], r"train/questions.json\[0\]: a list of question, answer"),
        ([[" ", "yes", 0]], r"train/questions.json\[0\]: a list of question, answer"),
        (["is it?"], r"train/questions.json\[0\]: a list of question, answer"),
        ([*TRAIN, ["is it?", "yes", 9]], r"no picture 9.png"),
    ],
)
def test_what_is_wrong_is_one_line(package, tmp_path, train, words):
    with pytest.raises(UserError, match=words) as error:
        easy_vqa.main(["--out", str(tmp_path / "out"), "--package", str(package(train)), "--val", "0"])
    assert "\n" not in str(error.value)


def test_numbers_of_pictures_that_cannot_be(package, tmp_path):
    flags = ["--out", str(tmp_path / "out"), "--package", str(package())]
    with pytest.raises(UserError, match="--val 5: there are only 5 pictures"):
        easy_vqa.main([*flags, "--val", "5"])
    with pytest.raises(UserError, match="--val -1"):
        easy_vqa.main([*flags, "--val", "-1"])
    (package() / "data" / "test" / "questions.json").unlink()
    with pytest.raises(UserError, match="test/questions.json: cannot be read"):
        easy_vqa.main(flags)
    assert not (tmp_path / "out").exists()
