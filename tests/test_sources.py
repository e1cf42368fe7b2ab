"""A file of any format becomes parsed objects, each with its place: what was written is what is read."""

import gzip
import json
import os
import pickle
import sys
from types import SimpleNamespace

import pytest

from crystal.runtime import sources
from crystal.runtime.config import UserError
from crystal.runtime.sources import RecordError, opened, printable

ITEMS = [{"id": 1, "a": "é\u2028x"}, {"id": 2}, {"id": 3, "b": [1, 2]}]
LINES = "\n".join(json.dumps(item, ensure_ascii=False) for item in ITEMS)
LIST = json.dumps(ITEMS, indent=1, ensure_ascii=False)
MARK = "\ufeff"


def written(path, text):
    """A file of this text, packed where its name says so."""
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def told(path):
    """[(place behind the path, object or message)] of a file."""
    source = opened(path)
    pairs = [source[i] for i in range(len(source))]
    assert all(where.startswith(str(path)) for where, _ in pairs)
    return [(w.removeprefix(str(path)), str(x) if isinstance(x, RecordError) else x) for w, x in pairs]


@pytest.mark.parametrize(
    "name, text",
    [
        ("x.jsonl", LINES),
        ("x.jsonl", MARK + LINES + "\n"),
        ("x.jsonl", LINES.replace("\n", "\r\n")),
        ("x.json", LINES),
        ("x.jsonl.gz", LINES),
        ("x.jsonl.gz", MARK + LINES),
        ("x.txt", LINES),
    ],
)
def test_lines(tmp_path, name, text):
    assert told(written(tmp_path / name, text)) == list(zip((":1", ":2", ":3"), ITEMS))


@pytest.mark.parametrize(
    "name, text",
    [
        ("x.json", LIST),
        ("x.json", MARK + "\n " + LIST),
        ("x.jsonl", LIST),
        ("x.jsonl", json.dumps(ITEMS) + "\n\n"),
        ("x.jsonl", MARK + LIST),
        ("x.json.gz", LIST),
        ("x.jsonl.gz", MARK + LIST),
    ],
)
def test_a_list_whatever_the_file_is_called(tmp_path, name, text):
    assert told(written(tmp_path / name, text)) == list(zip(("[0]", "[1]", "[2]"), ITEMS))


def test_blank_lines_count_and_files_put_together_keep_their_marks(tmp_path):
    text = f'\n{MARK}{{"a": 1}}\n \t \n\n{MARK}{{"a": 2}}\n   '
    assert told(written(tmp_path / "x.jsonl", text)) == [(":2", {"a": 1}), (":5", {"a": 2})]
    assert told(written(tmp_path / "empty.jsonl", "")) == []


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON: .* at column [12]"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON that can be read: Exceeds the limit .*"),
        ("[" * 100_000, "not JSON.*"),
        ('{"a":' * 100_000, "not JSON that can be read: its brackets are nested too deep"),
        ('{"a": 1} {"a": 2}', "not JSON: Extra data at column 10"),
    ],
    ids=["cut", "digits", "brackets", "braces", "two"],
)
def test_a_line_that_no_reader_takes_is_that_lines_error(tmp_path, line, message):
    import re

    found = told(written(tmp_path / "x.jsonl", f'{{"a": 0}}\n{line}\n{{"a": 3}}'))
    assert [found[0], found[2]] == [(":1", {"a": 0}), (":3", {"a": 3})]
    assert re.fullmatch(f"{tmp_path}/x.jsonl:2: {message}", found[1][1])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("l.json", '[\n{"a": 1},\n{]', "l.json:3: not JSON"),
        ("l.jsonl", '[\n{"a": 1},\n{]', "l.jsonl:3: not JSON"),
        ("l.json", "[" + "1" * 5000 + "]", "l.json: not JSON that can be read: Exceeds"),
        ("l.json", "[" * 100_000, "l.json: not JSON that can be read: its brackets"),
        ("l.json", b"[1, \xff]", r"l.json: not UTF-8 text \(byte 4\)"),
        ("u.jsonl", '{"a": 1}\n'.encode("utf-16"), r"u.jsonl: not UTF-8 text \(byte 0\)"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        told(written(tmp_path / name, text))
    assert "\n" not in str(error.value)


def test_half_a_packed_file(tmp_path):
    whole = gzip.compress(LINES.encode() * 50)
    for raw in (whole[: len(whole) // 2], b"no gzip at all", whole[:20] + b"\0\0\0" + whole[23:]):
        (tmp_path / "x.jsonl.gz").write_bytes(raw)
        with pytest.raises(UserError, match="x.jsonl.gz: cannot be unpacked: "):
            opened(tmp_path / "x.jsonl.gz")


def test_places_are_told_with_each_read(tmp_path):
    """Two processes with one open file do not move each other's place."""
    path = written(tmp_path / "x.jsonl", LINES)
    source = opened(path)
    source.file.seek(5)
    assert source[2][1] == ITEMS[2] and source[0][1] == ITEMS[0] and source.file.tell() == 5
    assert source.size == len(LINES.encode())


def test_a_file_that_was_written_to_since_is_told(tmp_path):
    source = opened(written(tmp_path / "x.jsonl", LINES))
    with open(tmp_path / "x.jsonl", "r+b") as file:
        file.write(b'{"id": 9')
    os.utime(tmp_path / "x.jsonl", ns=(1, 1))
    where, error = source[0]
    assert isinstance(error, RecordError) and str(error).endswith(
        "x.jsonl:1: the file was changed while it was being read"
    )


def test_a_line_too_long_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LINE", 20)
    long = json.dumps({"a": "b" * 50})
    found = told(written(tmp_path / "x.jsonl", f'{{"a": 1}}\n{long}\n{{"a": 2}}\n'))
    assert [found[0], found[2]] == [(":1", {"a": 1}), (":3", {"a": 2})]
    assert found[1][1].endswith("x.jsonl:2: a line of 60 bytes, at most 20 are allowed")


def test_what_a_message_may_hold():
    assert printable("a\x1b[2Jé\n\u202e\ud800b") == r"a\x1b[2Jé\n\u202e\ud800b"
    assert str(RecordError("x:1: \x07")) == r"x:1: \x07"


# --- Parquet and the hub ---


def table(folder, rows, name="x.parquet", size=2):
    """A Parquet file of these rows, `size` of them a group."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.Table.from_pylist(rows), folder / name, row_group_size=size)
    return folder / name


ROWS = [{"id": i, "image": {"bytes": bytes([i]), "path": None}, "n": None if i else [1]} for i in range(5)]


def test_parquet_in_any_order(tmp_path):
    source = opened(table(tmp_path, ROWS))
    assert len(source) == 5
    for i in (4, 0, 3, 3, 1, 2):
        assert source[i] == (f"{tmp_path}/x.parquet[{i}]", ROWS[i])
    with pytest.raises(IndexError):
        source[5]


def test_a_folder_of_parquet_files_is_read_by_name(tmp_path):
    table(tmp_path, ROWS[3:], "b.parquet")
    table(tmp_path, ROWS[:3], "a.parquet")
    source = opened(tmp_path)
    places = ["a.parquet[0]", "a.parquet[1]", "a.parquet[2]", "b.parquet[0]", "b.parquet[1]"]
    assert [source[i] for i in range(5)] == [(f"{tmp_path}/{p}", row) for p, row in zip(places, ROWS)]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: a folder without a .parquet file"):
        opened(tmp_path / "none")


def test_a_broken_parquet_file(tmp_path, monkeypatch):
    path = table(tmp_path, [{"a": "text" * 50 * (i + 1)} for i in range(6)])
    raw = bytearray(path.read_bytes())
    raw[4:60] = b"\xff" * 56  # the first group's page
    path.write_bytes(raw)
    source = opened(path)
    where, error = source[0]
    assert isinstance(error, RecordError) and str(error).startswith(f"{path}[0]: cannot be read: ")
    assert source[5][1] == {"a": "text" * 300}
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match="x.parquet: cannot be read as Parquet: ") as told:
        opened(path)
    assert "\n" not in str(told.value)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="x.parquet: to read Parquet, pyarrow is needed .the extra `data`."):
        opened(path)


class Hub:
    """Stands for the package `datasets`: one set, of one split."""

    def __init__(self):
        self.asked = []

    def load_dataset(self, name, config, split):
        self.asked.append((name, config, split))
        if name != "me/set":
            raise ConnectionError("Couldn't reach the Hub\n(offline mode)")
        return self

    dataset_size = 77

    def with_format(self, kind):
        assert kind == "arrow"  # else pictures are decoded
        return self

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return SimpleNamespace(to_pylist=lambda: [ROWS[i]])


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", hub := Hub())
    source = opened("me/set")
    assert [source[i] for i in range(5)] == [(f"me/set[{i}]", row) for i, row in enumerate(ROWS)]
    assert source.size == 77
    opened("me/set/part.one:validation[:10%]")
    opened("me/set:test")
    assert hub.asked == [
        ("me/set", None, "train"),
        ("me/set", "part.one", "validation[:10%]"),
        ("me/set", None, "test"),
    ]
    with pytest.raises(
        UserError, match="you/set: no such file, and no data set of the hub .*offline"
    ) as told:
        opened("you/set")
    assert "\n" not in str(told.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match="me/set: no such file; .* needs the package `datasets` .the extra `hub`"
    ):
        opened("me/set")
    for name in ("me/set.jsonl", "set.parquet", "deep/er/and/deeper"):  # a wrong path is that alone
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            opened(name)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.parquet"])
def test_another_process_reads_the_same(tmp_path, name):
    """Pickled, as a worker gets it, a source has its file by the path: none is open, and nothing is lost."""
    path = tmp_path / name
    if name == "x.parquet":
        table(tmp_path, ROWS)
    else:
        written(path, LIST if name == "x.json" else LINES)
    source = opened(path)
    there = pickle.loads(pickle.dumps(source))
    assert len(there) == len(source) and there.size == source.size
    assert [there[i] for i in range(len(there))] == [source[i] for i in range(len(source))]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_file_that_was_written_to_before_another_process_opened_it_is_told(tmp_path, name):
    sent = pickle.dumps(opened(written(tmp_path / name, LINES)))
    written(tmp_path / name, LINES + "\n")
    _, told = pickle.loads(sent)[0]
    assert isinstance(told, RecordError) and "changed while it was being read" in str(told)
