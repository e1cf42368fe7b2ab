"""CoVT's parquet parts become records: streamed, sampled from a seed, resumed after a kill, and
nothing broken left unsaid.
"""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from crystal.runtime import data
from crystal.runtime.config import UserError
from data_prep import covt

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(seed, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def talk(question="What is it?", answer="a cat"):
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def row(i, relpath=None, raw=None, **more):
    relpath = relpath or f"{('tallyqa', 'clevr', 'vsr')[i % 3]}/{i}.png"
    return {
        "id": f"r{i}",
        "image": {"bytes": raw if raw is not None else picture(i), "path": relpath},
        "image_relpath": relpath,
        "conversations": talk(answer=f"answer {i}"),
    } | more


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("image_relpath", pa.string()),
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
    ]
)


def write(folder, rows, cuts=(7, 20), group=3):
    """Rows as parts: part1/.. part2/.. part10/.., cut at `cuts`."""
    edges = [0, *cuts, len(rows)]
    for n, (low, high) in zip((1, 2, 10), zip(edges, edges[1:])):
        path = folder / f"part{n}" / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows[low:high], SCHEMA), path, row_group_size=group)
    return folder


def records(out):
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("parts"), [row(i) for i in range(30)])


def test_every_row_is_a_record_that_training_takes(parts, tmp_path):
    assert covt.run(parts, tmp_path / "out", say=lambda _: None) == 30
    found = records(tmp_path / "out")
    assert [r["id"] for r in found] == [f"r{i}" for i in range(30)]  # part10 comes after part2
    read, dropped = data.read(tmp_path / "out" / "train.jsonl", tmp_path / "out" / "images")
    assert (
        [r.answer for r in read] == [f"answer {i}" for i in range(30)]
        and [r.family for r in read[:3]] == ["tallyqa", "clevr", "vsr"]
        and not dropped
    )
    assert all(
        (tmp_path / "out" / "images" / r["image"]).read_bytes() == picture(i) for i, r in enumerate(found)
    )


def test_subsets(parts, tmp_path, capsys):
    covt.main(["--parts", str(parts), "--list"])
    assert capsys.readouterr().out.split() == ["10", "tallyqa", "10", "clevr", "10", "vsr", "30", "in", "all"]
    covt.main(["--parts", str(parts), "--out", str(tmp_path / "out"), "--subsets", "vsr, clevr"])
    assert [r["id"] for r in records(tmp_path / "out")] == [f"r{i}" for i in range(30) if i % 3]
    with pytest.raises(UserError, match="--subsets tally: not in these parts; they have clevr, tallyqa, vsr"):
        covt.main(["--parts", str(parts), "--out", str(tmp_path / "no"), "--subsets", "tally"])
    assert [
        covt.subset_of(x) for x in ("a/b/c.png", "identity_177477.png", "000000033471.jpg", "sa_1.jpg")
    ] == ["a", "identity", "numbers", "sa"]


def test_a_sample_comes_from_its_seed_whatever_the_parts_cut(parts, tmp_path):
    def sample(name, folder, **how):
        covt.run(folder, tmp_path / name, say=lambda _: None, **how)
        return {r["id"] for r in records(tmp_path / name)}

    first = sample("a", parts, sample=12)
    again = write(tmp_path / "again", [row(i) for i in reversed(range(30))], cuts=(2, 3), group=8)
    assert len(first) == 12 and sample("b", again, sample=12) == first != sample(
        "c", parts, sample=12, seed=1
    )
    assert sample("d", parts, sample=11) < first  # the larger sample holds the smaller
    assert all(int(id[1:]) % 3 == 0 for id in sample("e", parts, sample=5, subsets={"tallyqa"}))
    with pytest.raises(UserError, match="--sample 31: there are only 30"):
        sample("f", parts, sample=31)


def test_the_command_samples_by_hash(tmp_path, capsys):
    """The rows with the smallest SHA-256 of seed, id and path, in the parts' order, from row groups longer
    than what is read at a time.
    """
    folder = write(tmp_path / "parts", [row(i) for i in range(45)], cuts=(2, 4), group=50)
    for seed in (0, 3):

        def rank(i):
            return hashlib.sha256(
                f"{seed}\nr{i}\n{('tallyqa', 'clevr', 'vsr')[i % 3]}/{i}.png".encode()
            ).digest()

        covt.main(
            ["--parts", str(folder), "--out", str(tmp_path / str(seed)), "--sample", "7", "--seed", str(seed)]
        )
        assert [r["id"] for r in records(tmp_path / str(seed))] == [
            f"r{i}" for i in sorted(sorted(range(45), key=rank)[:7])
        ]
        assert all(
            (tmp_path / str(seed) / "images" / r["image"]).read_bytes() == picture(int(r["id"][1:]))
            for r in records(tmp_path / str(seed))
        )
        assert (
            f"7 rows of 3 parts\n7 records in {tmp_path / str(seed) / 'train.jsonl'}\n"
            in capsys.readouterr().out
        )
    assert records(tmp_path / "0") != records(tmp_path / "3")
    progress = json.loads((tmp_path / "3" / "progress.json").read_text())
    assert (progress["records"], progress["settings"]["sample"], progress["settings"]["seed"]) == (7, 7, 3)


def test_the_list_is_sorted_by_size(tmp_path, capsys):
    rows = [row(i, f"{'aaab'[i % 4]}/{i}.png") for i in range(8)] + [
        row(8, "000.png"), row(9, "identity_1.png"), row(10, "identity_2.png"), row(11, "identity_3.png"),
    ]
    covt.main(["--parts", str(write(tmp_path, rows, (2, 4))), "--list"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["6", "a"], ["3", "identity"], ["2", "b"], ["1", "numbers"], ["12", "in", "all"],
    ]
    assert not list(tmp_path.rglob("*.jsonl"))


def test_the_command_leaves_out_a_broken_row(tmp_path, capsys):
    folder = write(tmp_path / "parts", [row(i, raw=b"text") if i == 3 else row(i) for i in range(12)])
    with pytest.raises(UserError, match="--on_bad_record skip leaves such rows out"):
        covt.main(["--parts", str(folder), "--out", str(tmp_path / "stop")])
    covt.main(["--parts", str(folder), "--out", str(tmp_path / "skip"), "--on_bad_record", "skip"])
    assert [r["id"] for r in records(tmp_path / "skip")] == [f"r{i}" for i in range(12) if i != 3]
    assert "1 broken rows left out" in capsys.readouterr().out


def test_an_image_is_written_once_and_another_of_its_name_is_kept_apart(tmp_path):
    rows = [
        row(0, "a/x.png", picture(1)), row(1, "a/x.png", picture(1)), row(2, "a/x.png", picture(2)),
        row(3, "a/x.png", picture(2)),
    ]
    covt.run(write(tmp_path / "parts", rows, (1, 2)), tmp_path / "out", say=lambda _: None)
    names = [r["image"] for r in records(tmp_path / "out")]
    assert (
        names[0] == names[1] == "a/x.png" != names[2] == names[3]
        and len(list((tmp_path / "out" / "images").rglob("*.*"))) == 2
    )
    assert (tmp_path / "out" / "images" / names[2]).read_bytes() == picture(2)


@pytest.mark.parametrize("how", [{}, {"sample": 20}])
@pytest.mark.parametrize("after", [0, 4, 9, 19])
def test_a_killed_conversion_goes_on(parts, tmp_path, monkeypatch, how, after):
    covt.run(parts, tmp_path / "whole", say=lambda _: None, **how)
    count, real = 0, covt.convert

    def killed(*args):
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        return real(*args)

    monkeypatch.setattr(covt, "convert", killed)
    with pytest.raises(KeyboardInterrupt):
        covt.run(parts, tmp_path / "out", say=lambda _: None, **how)
    monkeypatch.setattr(covt, "convert", real)
    with open(tmp_path / "out" / "train.jsonl", "a") as file:
        file.write('{"id": "half a li')
    said = []
    covt.run(parts, tmp_path / "out", say=said.append, **how)
    assert (
        said[0].startswith("going on after")
        and (tmp_path / "out" / "train.jsonl").read_bytes()
        == (tmp_path / "whole" / "train.jsonl").read_bytes()
    )
    with pytest.raises(UserError, match="other parts or flags"):
        covt.run(parts, tmp_path / "out", seed=9, say=said.append, **how)
    (tmp_path / "out" / "progress.json").unlink()
    with pytest.raises(UserError, match="train.jsonl: exists, and no progress.json"):
        covt.run(parts, tmp_path / "out", say=said.append, **how)


BAD = {
    "leaves": (row(5, "../x.png"), "column 'image_relpath': '../x.png' is not a relative path"),
    "absolute": (row(5, "/etc/x.png"), "is not a relative path"),
    "hidden turn": (row(5, "a/../../x.png"), "is not a relative path"),
    "other slash": (row(5, "a\\x.png"), "is not a relative path"),
    "drive": (row(5, "C:x.png"), "is not a relative path"),
    "no image": (row(5, raw=b""), "column 'image': no bytes"),
    "null image": (row(5, image=None), "column 'image': no bytes"),
    "not an image": (row(5, raw=b"text"), "column 'image': cannot identify image file"),
    "truncated": (row(5, raw=picture(5)[:-30]), "column 'image': "),
    "no talk": (row(5, conversations=None), "column 'conversations': missing or empty"),
    "unknown speaker": (row(5, conversations=[{"from": "cat", "value": "miaow"}]), "unknown speaker 'cat'"),
    "two markers": (row(5, conversations=talk("<image> Why?")), "1 images for 2 <image> markers"),
    "empty answer": (row(5, conversations=talk(answer=" ")), "the answer is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_row_is_one_line(tmp_path, name):
    broken, words = BAD[name]
    folder = write(
        tmp_path / "parts", [row(i) for i in range(5)] + [broken] + [row(i) for i in range(6, 9)], (4, 8)
    )
    with pytest.raises(UserError) as error:
        covt.run(folder, tmp_path / "out", say=lambda _: None)
    line = str(error.value)
    assert (
        words in line
        and "part2/train-00000-of-00001.parquet, row group 0, row 1: column" in line
        and "\n" not in line
        and line.count("row group") == 1
    )
    said = []
    assert covt.run(folder, tmp_path / "skipped", skip=True, say=said.append) == 8
    assert words in json.loads((tmp_path / "skipped" / "bad_records.jsonl").read_text())["problem"] and any(
        "1 broken rows left out" in s for s in said
    )
    outside = [p for p in tmp_path.rglob("x.png") if not p.is_relative_to(tmp_path / "out" / "images")]
    assert not outside


def test_a_broken_row_far_down_is_told_at_its_place(tmp_path):
    """The thirty-first of its row group, which is read sixteen rows at a time."""
    folder = write(
        tmp_path / "parts", [row(i, raw=b"text") if i == 34 else row(i) for i in range(40)], (2, 4), group=50
    )
    with pytest.raises(
        UserError, match=r"part10/train-00000-of-00001.parquet, row group 0, row 30: column 'image'"
    ):
        covt.run(folder, tmp_path / "out", say=lambda _: None)


def test_more_than_one_in_a_hundred_broken_stops(tmp_path):
    folder = write(tmp_path / "parts", [row(i, raw=b"text") if i in (3, 8) else row(i) for i in range(12)])
    with pytest.raises(UserError, match="2 broken rows, more than 1 % of 12"):
        covt.run(folder, tmp_path / "out", skip=True, say=lambda _: None)


def test_other_schemas_are_named(tmp_path):
    def one(table):
        pq.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(UserError) as error:
            covt.main(["--parts", str(tmp_path), "--out", str(tmp_path / "out")])
        return str(error.value)

    table = pa.Table.from_pylist([row(0)], SCHEMA)
    assert "no column 'image_relpath'; it has id, image, path, conversations" in one(
        table.rename_columns(["id", "image", "path", "conversations"])
    )
    assert "column 'image' is binary, not a struct" in one(table.set_column(1, "image", pa.array([b"x"])))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 or not")
    for flags, words in (
        (["--parts", str(tmp_path)], "not a readable parquet file"),
        (["--parts", str(tmp_path / "none")], "no .parquet files"),
        (["--parts", str(tmp_path), "--sample", "-1"], "--sample -1"),
    ):
        with pytest.raises(UserError, match=words):
            covt.main([*flags, "--out", str(tmp_path / "out")])
