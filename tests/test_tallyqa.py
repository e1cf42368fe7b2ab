"""TallyQA's raw questions become records that training takes; whatever is wrong with one is a line."""

import hashlib
import json

import pytest
from PIL import Image

from crystal.runtime import data
from crystal.runtime.config import UserError
from data_prep import tallyqa


def question(i, **more):
    return {
        "image": f"VG_100K/{i % 3}.jpg",
        "question": f"How many cats are on mat {i}?",
        "answer": i,
        "issimple": i % 2 == 0,
        "data_source": "imported_genome",
        "image_id": i,
        "question_id": 100 + i,
    } | more


@pytest.fixture
def raw(tmp_path):
    (tmp_path / "images" / "VG_100K").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / "VG_100K" / f"{i}.jpg")

    def write(items):
        (tmp_path / "train.json").write_text(items if isinstance(items, str) else json.dumps(items))
        return [
            "--questions",
            str(tmp_path / "train.json"),
            "--images",
            str(tmp_path / "images"),
            "--out",
            str(tmp_path / "out" / "tallyqa.jsonl"),
        ]

    return write


def test_records_that_training_takes(raw, tmp_path, capsys):
    tallyqa.main(raw([question(i) for i in range(10)]) + ["--prompt", "Answer with a number."])
    read, _ = data.read(tmp_path / "out" / "tallyqa.jsonl", tmp_path / "images")
    assert [r.answer for r in read] == [str(i) for i in range(10)] and [r.family for r in read[:2]] == [
        "simple", "complex",
    ]
    assert (
        read[4].turns == [("user", "<image>\nHow many cats are on mat 4?\nAnswer with a number.")]
        and read[4].images[0].name == "1.jpg"
    )
    assert "10 records" in capsys.readouterr().out


def test_kinds_and_samples(raw, tmp_path):
    def ids(*flags):
        tallyqa.main(raw([question(i) for i in range(20)]) + list(flags))
        return [
            json.loads(line)["id"] for line in (tmp_path / "out" / "tallyqa.jsonl").read_text().splitlines()
        ]

    assert ids("--kind", "complex") == [f"tallyqa-{100 + i}" for i in range(1, 20, 2)]
    assert (
        len(ids("--sample", "6")) == 6
        and ids("--sample", "6") == ids("--sample", "6") != ids("--sample", "6", "--seed", "1")
        and set(ids("--sample", "5")) < set(ids("--sample", "6"))
    )
    with pytest.raises(UserError, match="--sample 11: there are only 10"):
        ids("--kind", "simple", "--sample", "11")


def test_the_smallest_hashes_are_the_sample(raw, tmp_path, capsys):
    """Those with the smallest SHA-256 of seed and id, in the file's order; images from the folder that was
    named, and the file where it was asked for.
    """
    raw([question(i) for i in range(20)])
    for seed in (0, 4):
        out = tmp_path / "to" / f"{seed}.jsonl"
        tallyqa.main(
            [
                "--questions", str(tmp_path / "train.json"), "--images", str(tmp_path / "images"),
                "--out", str(out), "--kind", "simple", "--sample", "4", "--seed", str(seed),
            ]
        )
        simple = list(range(0, 20, 2))
        chosen = sorted(simple, key=lambda i: hashlib.sha256(f"{seed}\ntallyqa-{100 + i}".encode()).digest())[
            :4
        ]
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["id"] for r in found] == [f"tallyqa-{100 + i}" for i in simple if i in chosen]
        assert [r["image"] for r in found] == [f"VG_100K/{i % 3}.jpg" for i in simple if i in chosen]
        assert f"4 records in {out} (4 simple, 0 complex), 0 broken ones left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        ({"answer": "3"}, "field 'answer': '3' is not a count"),
        ({"answer": -1}, "is not a count"),
        ({"answer": True}, "is not a count"),
        ({"issimple": "yes"}, "field 'issimple'"),
        ({"question": " "}, "field 'question': empty"),
        ({"image": "VG_100K/9.jpg"}, "field 'image': no such file"),
        ({"image": "../../secret.jpg"}, "leaves the image root"),
        ({"image": 7}, "field 'image': a path"),
        (None, "a question is a JSON object, not str"),
    ],
)
def test_a_broken_question_is_one_line(raw, change, words, capsys):
    items = [question(i) if i != 2 else "x" if change is None else question(i, **change) for i in range(5)]
    with pytest.raises(UserError, match=words) as error:
        tallyqa.main(raw(items))
    assert "train.json[2]: " in str(error.value) and "\n" not in str(error.value)
    tallyqa.main(raw(items) + ["--on_bad_record", "skip"])
    out = capsys.readouterr().out
    assert "left out: " in out and "4 records" in out
    with pytest.raises(UserError, match="2 broken questions"):
        tallyqa.main(raw([*items, items[2]]) + ["--on_bad_record", "skip"])


def test_other_files_are_named(raw, tmp_path):
    missing = {k: v for k, v in question(1).items() if k != "issimple"}
    for items, words in (
        ([missing], "no field 'issimple'; it has image, question"),
        ("{", "not JSON"),
        ({"questions": []}, "a JSON list"),
        ([], "a JSON list"),
    ):
        with pytest.raises(UserError, match=words):
            tallyqa.main(raw(items))
    flags = raw([question(1)])
    for at, value, words in (
        (1, tmp_path / "none.json", "cannot be read"),
        (3, tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            tallyqa.main([*flags[:at], str(value), *flags[at + 1 :]])
