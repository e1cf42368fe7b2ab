"""What the commands that compute features share: which records, files that are whole or absent,
a copy with paths.

Also the one rule of what a conversion may leave out (broken.py). Right values are written
out beside each case.
"""

import json

import pytest
from PIL import Image

from crystal.runtime.config import UserError
from data_prep import broken, features


def line(id, image="a.png", **more):
    """A record as it stands in a file; id None leaves it out."""
    talk = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]
    return (
        ({} if id is None else {"id": id})
        | ({"image": image} if image else {})
        | {"conversations": talk}
        | more
    )


@pytest.fixture
def source(tmp_path):
    """source(records) -> a JSONL of them, its images in a folder of their own."""
    (tmp_path / "root").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "root" / "a.png")

    def write(records):
        (tmp_path / "set.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return tmp_path / "set.jsonl", tmp_path / "root"

    return write


def test_one_of_a_hundred_may_be_broken():
    """1 % of what is read, and one at least; without the flag none, and the line says which flag."""
    lines = []
    with pytest.raises(UserError, match="^x.jsonl:3: torn; --on_bad_record skip leaves such rows out$"):
        broken.leave_out("x.jsonl:3: torn", lines, False, 1000, "rows")
    assert lines == []
    for total, most in ((5, 1), (100, 1), (299, 2), (300, 3), (1000, 10)):
        lines = []
        for i in range(most):
            broken.leave_out(f"line {i}", lines, True, total, "rows")
        assert lines == [f"line {i}" for i in range(most)]
        with pytest.raises(
            UserError, match=f"^{most + 1} broken rows, more than 1 % of {total}; the last: one more$"
        ):
            broken.leave_out("one more", lines, True, total, "rows")


def test_usable_records_have_an_id_of_their_own_and_an_image(source):
    """The first of two with one id is taken; what is left out is named with its line and field, and the
    rest keeps its order.
    """
    good = [line(f"r{i}") for i in range(300)]
    file, root = source([*good[:2], line("r0"), *good[2:4], line("x", image=None), *good[4:], line(None)])
    records, bad, dropped = features.usable(file, root, True)
    assert [r.id for r in records] == [f"r{i}" for i in range(300)] and dropped == 0
    assert [text.split(": ")[0] for text in bad] == [f"{file}:{n}" for n in (3, 6, 303)]
    assert "field 'id'" in bad[0] and "field 'image'" in bad[1] and "field 'id'" in bad[2]
    with pytest.raises(UserError, match=f"^{file}:3: field 'id': missing, or that of another record"):
        features.usable(file, root, False)


def test_a_limit_counts_what_is_read(source):
    """The first three records of the file, the broken one among them; later turns are counted."""
    talk = [
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "so"},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "no"},
    ]
    file, root = source([line("r0"), line("r0"), line("r1", conversations=talk), line("r2")])
    records, bad, dropped = features.usable(file, root, True, 3)
    assert [r.id for r in records] == ["r0", "r1"] and len(bad) == 1 and dropped == 1
    records, _, _ = features.usable(file, root, True)
    assert [r.id for r in records] == ["r0", "r1", "r2"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def fail(part):
        with open(part, "wb") as file:
            file.write(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        features.replace_file(path, fail)
    assert path.read_bytes() == b"old"
    features.replace_file(path, lambda part: open(part, "wb").write(b"new") and None)
    assert path.read_bytes() == b"new" and sorted(p.name for p in tmp_path.iterdir()) == ["x.bin"]


def test_the_copy_names_files_beside_what_was_there(source, capsys):
    """Only records that have a file; their other features stay, one of the same name is replaced."""
    file, _ = source(
        [line("r0", features={"dino": "d.safetensors", "sig": "old"}), line("r1"), line("r2", features=None)]
    )
    made = features.write_records(
        file,
        "sig",
        {f"{file}:1": "sig/0.safetensors", f"{file}:3": "sig/1.safetensors"},
        ["set.jsonl:2: torn"],
    )
    assert (
        made == file.with_name("set.sig.jsonl") and capsys.readouterr().out == "left out: set.jsonl:2: torn\n"
    )
    copies = [json.loads(text) for text in made.read_text().splitlines()]
    assert [(r["id"], r["features"]) for r in copies] == [
        ("r0", {"dino": "d.safetensors", "sig": "sig/0.safetensors"}),
        ("r2", {"sig": "sig/1.safetensors"}),
    ]
    assert copies[0]["conversations"] == line("r0")["conversations"]
    with pytest.raises(UserError, match="no record is left"):
        features.write_records(file, "sig", {}, [])
