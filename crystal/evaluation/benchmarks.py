"""Benchmarks as VLMEvalKit's TSV files keep them, read directly.

    index  image (base64, or the index of the row that holds it)  question  A B C ..  answer  category  split

A file is read once for its text and remembered by byte offsets: an image is decoded when it is asked about,
so memory does not grow with the file. A row that asks nothing odd of a reader is a question as scoring.py
reads it; one without a picture or an answer, or whose answer is none of its options, is asked all the same,
and says what is odd about it.
"""

import ast
import base64
import csv
import io
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crystal.runtime.config import UserError
from crystal.runtime.data import Record, RecordError
from crystal.runtime.fields import below

# VLMEvalKit's line, blank included: scores depend on the prompt's bytes.
ASK = "Please select the correct answer from the options above. \n"
REFERENCE = 64  # an image cell of at most so many characters is the index of the row that holds the image
# Cells that pandas, hence VLMEvalKit, takes for empty; an option "None" is one of them.
ABSENT = {
    "",
    "#N/A",
    "#N/A N/A",
    "#NA",
    "-1.#IND",
    "-1.#QNAN",
    "-NaN",
    "-nan",
    "1.#IND",
    "1.#QNAN",
    "<NA>",
    "N/A",
    "NA",
    "NULL",
    "NaN",
    "None",
    "n/a",
    "nan",
    "null",
}
KEPT = ("category", "l2-category", "split", "source", "cycle_category", "question")


@dataclass
class Question(Record):
    """A row of a benchmark. rule: choice, yes/no or exact. options: letter -> text. row: the cells
    that scores group by. odd: what is strange about the row, "" for most.
    """

    rule: str = "exact"
    options: dict = field(default_factory=dict)
    row: dict = field(default_factory=dict)
    odd: str = ""


# --- files become questions ---


@dataclass(frozen=True)
class Cell:
    """Image n of the row that starts at byte `offset`; calling it gives its bytes as an open file."""

    path: str
    offset: int
    column: int
    n: int

    def __call__(self):
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            row = next(csv.reader((line.decode("utf-8") for line in file), delimiter="\t"))
        return io.BytesIO(base64.b64decode(listed(row[self.column])[self.n], validate=True))

    def __str__(self):
        return "base64"


def listed(cell):
    """A cell -> its entries: a Python or JSON list of texts is many, anything else one. ValueError
    for half a list.
    """
    if len(cell) > 1 and cell[0] == "[" and cell[-1] == "]":
        try:
            return [str(x) for x in ast.literal_eval(cell)]
        except (SyntaxError, ValueError, TypeError):
            raise ValueError("begins with [ and ends with ] but is no list") from None
    return [cell]


def rows(path):
    """(line number, byte offset, cells) of every row of a TSV, its header first. UserError for what is not
    a TSV in UTF-8.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 kB is less than a photograph
    place = {"offset": 0, "line": 0}

    def lines(file):
        for line in file:
            place["offset"] += len(line)
            place["line"] += 1
            yield line.decode("utf-8-sig" if place["line"] == 1 else "utf-8")

    try:
        with open(path, "rb") as file:
            reader = csv.reader(lines(file), delimiter="\t", strict=True)
            while True:
                start, line = place["offset"], place["line"] + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                if cells:
                    yield line, start, cells
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{place['line']}: not UTF-8 text: {error.reason}") from None
    except csv.Error as error:
        raise UserError(f"{path}:{place['line']}: not a row of a TSV: {error}") from None


def read(path, image_root="", suffix=""):
    """A TSV -> [Question] in the file's order. suffix: text put behind every prompt.

    image_path cells are files below image_root (default: the TSV's folder). A file may have no answers: it
    is asked for its predictions. A broken row is a RecordError naming file, line and index.
    """
    path = Path(path)
    root = (Path(image_root) if image_root else path.parent).resolve()
    found, borrowed = [], []
    images: dict[str, Any] = {}  # of each index: its images, or None while it borrows another row's
    table = rows(path)
    header = [c if c in string.ascii_uppercase else c.lower() for c in next(table, (0, 0, []))[2]]
    if missing := [c for c in ("index", "question") if c not in header]:
        raise UserError(
            f"{path}:1: no column {', '.join(missing)}; the header has {', '.join(header) or 'nothing'} "
            "(VLMEvalKit's TSV is wanted)"
        )
    if not {"image", "image_path"} & set(header):
        raise UserError(f"{path}:1: no column image or image_path")
    column = header.index("image") if "image" in header else -1
    for line, offset, cells in table:
        where = f"{path}:{line}"
        if len(cells) != len(header):
            raise RecordError(
                f"{where}: {len(cells)} cells under {len(header)} columns"
                + ("; the file may be cut off" if len(cells) < len(header) else "")
            )
        row = {name: "" if cell in ABSENT else cell for name, cell in zip(header, cells)}
        index = row["index"].strip()
        where = f"{where} (index {index or 'missing'})"
        if not index or index in images:
            raise RecordError(f"{where}: field 'index': {'given twice' if index else 'missing'}")
        try:
            if row.get("image"):
                if len(row["image"]) <= REFERENCE:
                    borrowed.append((len(found), row["image"].strip()))
                    images[index] = None
                else:
                    images[index] = [
                        Cell(str(path), offset, column, n) for n in range(len(listed(row["image"])))
                    ]
            elif row.get("image_path"):
                images[index] = files(listed(row["image_path"]), root, path.stem, where)
            else:
                images[index] = []
        except ValueError as error:
            raise RecordError(f"{where}: field 'image': {error}") from None
        found.append(question(row, index, where, images[index], suffix))
    for at, index in borrowed:
        where = found[at].where
        if not images.get(index):
            raise RecordError(
                f"{where}: field 'image': {index!r} is neither an image nor the index of a row that holds one"
            )
        found[at].images = images[index]
    if not found:
        raise UserError(f"{path}: no rows in it")
    # A text between each two images, the last one the prompt: whatever a question says stays text.
    for q in found:
        q.turns = [("user", [""] * len(q.images) + [q.turns[0][1]])]
    return found


def files(names, root, stem, where):
    """Paths of image files below root, or below VLMEvalKit's root/images/STEM."""
    found = []
    for name in names:
        places = [below(root, name), below(root, root / "images" / stem / name)]
        options = [Path(place) for place in places if place is not None]
        if not options:
            raise RecordError(f"{where}: field 'image_path': {name} leaves {root} (--image_root)")
        if not any(p.is_file() for p in options):
            raise RecordError(f"{where}: field 'image_path': no such file: {options[0]} (--image_root)")
        found.append(next(p for p in options if p.is_file()))
    return found


def question(row, index, where, images, suffix):
    """One row -> Question; its turns hold the bare prompt. The prompt is the data set's own: its column
    `prompt`, else VLMEvalKit's words.
    """
    options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}
    answer, asked = row.get("answer", "").strip(), row["question"]
    if not asked:
        raise RecordError(f"{where}: field 'question': missing")

    odd = [] if images is None or images else ["no picture"]
    if not answer:
        odd.append("no answer")
    elif options and answer not in options:
        odd.append(f"answer {answer!r} is none of its options {', '.join(options)}")

    rule = "exact"
    if options:
        rule = "choice"
    elif answer.lower() in ("yes", "no"):
        rule = "yes/no"
    prompt = row.get("prompt") or asked
    if rule == "choice" and not row.get("prompt"):
        hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
        prompt = (
            f"{hint}Question: {asked}\nOptions:\n"
            + "".join(f"{letter}. {text}\n" for letter, text in options.items())
            + ASK
        )
    return Question(
        where,
        index,
        [("user", prompt + suffix)],
        answer.capitalize() if rule == "yes/no" else answer,
        images,
        family=row.get("category", ""),
        rule=rule,
        options=options,
        row={c: row[c] for c in KEPT if row.get(c)},
        odd="; ".join(odd),
    )
