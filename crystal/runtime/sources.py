"""A file becomes parsed objects, each with its place, one at a time.

JSONL is known by the offsets of its lines and a Parquet file by its groups of rows, so a file of any size
takes no memory; a JSON list is held. What the objects mean, fields.py and records.py say.
"""

import gzip
import json
import os
import re
import shutil
import tempfile
import zlib
from array import array
from bisect import bisect
from itertools import accumulate
from pathlib import Path

from crystal.runtime.config import UserError

LINE = 2**28  # bytes of one line, far above any record with its pictures in it
MARK = b"\xef\xbb\xbf"  # the byte order mark that some editors put first
FILES = (".json", ".jsonl", ".gz", ".parquet", ".tsv", ".csv", ".txt")
HUB = re.compile(r"([\w.-]+/[\w.-]+?)(?:/([\w.-]+))?(?::([\w.+%:\[\]-]+))?")


class RecordError(UserError):
    """One record is broken; the message names file, line and field."""

    def __init__(self, message):
        super().__init__(printable(message))


def printable(text):
    """A text with whatever moves a cursor, hides or is no character written as its escape: one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def opened(path):
    """A path, or the name of a data set on the hub -> a sequence of (where, parsed object or RecordError).

    JSONL, a JSON list, either of them with .gz, Parquet, a folder of Parquet files, or of the hub
    OWNER/NAME[/CONFIG][:SPLIT].
    Its `size` is the bytes that it would hold in memory. UserError for what cannot be opened.
    """
    path = Path(path)
    if not path.exists():
        name = HUB.fullmatch(str(path))
        if name is None or path.suffix in FILES:
            raise UserError(f"{path}: cannot be read: no such file or folder")
        return HubRows(str(path), *name.groups())

    if path.suffix == ".parquet" or path.is_dir():
        return ParquetRows(path)

    try:
        file = unpacked(path) if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115 (its reader keeps it)
        return List(path, file) if is_list(file) else Lines(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def unpacked(path):
    """A .gz file -> a temporary file of what it holds, which has no name and ends with the process."""
    out = tempfile.TemporaryFile()  # noqa: SIM115 (its reader keeps it)
    try:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, out)
        out.flush()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from None
    return out


def is_list(file):
    """Whether a file holds one JSON list: it begins with [, and its first line alone is not all of it.

    Lines may begin with [ too, broken ones; then the first is JSON by itself and others follow.
    """
    file.seek(0)
    begin = file.read(2**16).removeprefix(MARK).lstrip()
    if not begin.startswith(b"["):
        return False

    first, _, rest = begin.partition(b"\n")
    if not rest.strip():
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def parse(text, where):
    """A text of JSON -> what it says, or the RecordError of what cannot be read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return RecordError(f"{where}: not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return RecordError(f"{where}: not JSON that can be read: its brackets are nested too deep")
    except ValueError as error:  # a number of thousands of digits
        told = str(error).split(";")[0]
        return RecordError(f"{where}: not JSON that can be read: {told}")


def decoded(raw, path, start=0):
    """Bytes -> their text; UserError names the byte of the file, whose offset `start` they stand at."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {start + error.start})") from None


class Lines:
    """JSONL, an object a line. Two numbers a line are kept: where it starts in the file, and its own."""

    def __init__(self, path, file):
        self.path = path
        self.file = file
        self.starts = array("q")  # of each line, and the end of the last
        self.rows = array("q")  # numbers of the lines that are not blank
        self.stamp = self.changed_at()

        # A line may be too long for memory: it is gone through in pieces.
        file.seek(0)
        at, begins = 0, True
        while piece := file.readline(LINE):
            if begins:
                self.starts.append(at)
            begins = piece.endswith(b"\n")
            if not piece.isspace() and self.rows[-1:] != array("q", [len(self.starts) - 1]):
                self.rows.append(len(self.starts) - 1)
            at += len(piece)
        self.starts.append(at)
        self.size = at

    def __getstate__(self):
        return vars(self) | {"file": None}  # another process opens it for itself

    def __setstate__(self, state):
        vars(self).update(state)
        packed = self.path.suffix == ".gz"
        self.file = unpacked(self.path) if packed else open(self.path, "rb")  # noqa: SIM115 (it keeps it)
        if packed and self.changed_at()[0] == self.size:
            self.stamp = self.changed_at()  # of this process's own copy

    def changed_at(self):
        """What changes when somebody writes into the file."""
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        number = self.rows[i]
        where = f"{self.path}:{number + 1}"
        start = self.starts[number]
        length = self.starts[number + 1] - start
        if length > LINE:
            return where, RecordError(f"{where}: a line of {length} bytes, at most {LINE} are allowed")
        if self.changed_at() != self.stamp:
            return where, RecordError(f"{where}: the file was changed while it was being read")

        # A place is named with each read, so that workers who share the file do not move it for each other.
        raw = os.pread(self.file.fileno(), length, start)
        text = decoded(raw.removeprefix(MARK), self.path, start)
        return where, parse(text, where)


class List:
    """A JSON list, held in memory."""

    def __init__(self, path, file):
        self.path = path
        file.seek(0)
        raw = file.read()
        self.size = len(raw)

        text = decoded(raw.removeprefix(MARK), path)
        try:
            self.items = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError):
            raise UserError(str(parse(text, path))) from None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return f"{self.path}[{i}]", self.items[i]


class ParquetRows:
    """The rows of Parquet files, pictures as {"bytes", "path"}; a group of rows is in memory at a time."""

    def __init__(self, path):
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(f"{path}: to read Parquet, pyarrow is needed (the extra `data`)") from None

        self.path = path
        paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not paths:
            raise UserError(f"{path}: a folder without a .parquet file in it")
        self.groups = []
        self.size = 0
        counts = []
        for one in paths:
            try:
                file = parquet.ParquetFile(one)
            except Exception as error:  # Arrow has a dozen kinds for broken files
                raise UserError(f"{one}: cannot be read as Parquet: {printable(error)}") from None
            self.size += one.stat().st_size
            for group in range(file.metadata.num_row_groups):
                before = sum(file.metadata.row_group(g).num_rows for g in range(group))
                self.groups.append((file, one, group, before))
                counts.append(file.metadata.row_group(group).num_rows)

        self.ends = list(accumulate(counts))
        self.held = None

    def __reduce__(self):
        return ParquetRows, (self.path,)  # another process opens the files for itself

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        group = bisect(self.ends, i)
        within = i - (self.ends[group - 1] if group else 0)
        file, path, number, before = self.groups[group]
        where = f"{path}[{before + within}]"

        try:
            if self.held is None or self.held[0] != group:
                self.held = group, file.read_row_group(number, use_threads=False)
            return where, self.held[1].slice(within, 1).to_pylist()[0]
        except Exception as error:  # a flipped byte, half a file, a type that Python has not
            return where, RecordError(f"{where}: cannot be read: {error}")


class HubRows:
    """The rows of a data set of the hub, by the package `datasets`, which downloads it and maps its files."""

    def __init__(self, told, name, config, split):
        self.told = told
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{told}: no such file; as the name of a data set on the hub it needs the package `datasets` "
                "(the extra `hub`)"
            ) from None
        try:
            rows = datasets.load_dataset(name, config, split=split or "train")
        except Exception as error:  # no network, no such set, no such split: a kind for each cause
            reason = printable(error)[:300]
            raise UserError(
                f"{told}: no such file, and no data set of the hub that can be had "
                f"(OWNER/NAME[/CONFIG][:SPLIT]): {type(error).__name__}: {reason}"
            ) from None
        self.rows = rows.with_format("arrow")  # pictures stay the bytes of their files
        self.size = rows.dataset_size or 2**62

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        where = f"{self.told}[{i}]"
        try:
            return where, self.rows[i].to_pylist()[0]
        except Exception as error:  # as ParquetRows
            return where, RecordError(f"{where}: cannot be read: {error}")
