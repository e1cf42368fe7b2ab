"""Benchmarks as VLMEvalKit's TSV files keep them, read directly, and the rules that turn answers into scores.

    index  image (base64, or the index of the row that holds it)  question  A B C ..  answer  category  split

A file is read once for its text and remembered by byte offsets: an image is decoded when it is asked about,
so memory does not grow with the file. Extraction and scores follow VLMEvalKit at commit e8e78f0 with its
judge `exact_matching` (no language model reads the answers); what it gives for a table of answers is in
tests/test_benchmarks.py. Answers that no rule can read count as wrong, and their share is reported.
"""

import ast
import base64
import csv
import io
import math
import re
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crystal.runtime.config import UserError
from crystal.runtime.data import Record, RecordError

EXTRACTION = {
    "choice": "option letter or text, VLMEvalKit e8e78f0 exact_matching",
    "yes/no": "the word yes or no alone, VLMEvalKit e8e78f0",
    "exact": "exact match, case and a final full stop aside",
}
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
    that scores group by.
    """

    rule: str = "exact"
    options: dict = field(default_factory=dict)
    row: dict = field(default_factory=dict)


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

    image_path cells are files below image_root (default: the TSV's folder). A broken row is a RecordError
    naming file, line and index.
    """
    path = Path(path)
    root = (Path(image_root) if image_root else path.parent).resolve()
    found, borrowed = [], []
    images: dict[str, Any] = {}  # of each index: its images, or None while it borrows another row's
    table = rows(path)
    header = [c if c in string.ascii_uppercase else c.lower() for c in next(table, (0, 0, []))[2]]
    if missing := [c for c in ("index", "question", "answer") if c not in header]:
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
            else:
                images[index] = files(listed(row.get("image_path", "")), root, path.stem, where)
        except ValueError as error:
            raise RecordError(f"{where}: field 'image': {error}") from None
        found.append(question(row, index, where, images[index], suffix))
    for at, index in borrowed:
        where = found[at].where
        if images.get(index) is None:
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
        if not name:
            raise RecordError(f"{where}: field 'image': missing, and there is no image_path")
        options = [
            p
            for p in ((root / name).resolve(), (root / "images" / stem / name).resolve())
            if p.is_relative_to(root)
        ]
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
    answer, asked = row["answer"].strip(), row["question"]
    if not asked or not answer:
        raise RecordError(f"{where}: field '{'answer' if asked else 'question'}': missing")
    if options and answer not in options:
        raise RecordError(f"{where}: field 'answer': {answer!r} is none of the options {', '.join(options)}")
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
    )


# --- answers become verdicts ---


def tidy(text):
    """Trimmed, lower case, one final full stop dropped: what exact match compares."""
    return text.strip().lower().removesuffix(".").strip()


def score(record, prediction):
    """A record and the model's answer -> (what was read out of the answer, or None; whether it is right)."""
    rule = getattr(record, "rule", "exact")
    if rule == "exact":
        return tidy(prediction), tidy(prediction) == tidy(record.answer)
    read = option(prediction, record.options) if rule == "choice" else yes_no(prediction)
    return read, read == record.answer


# Read as no option, whatever letters stand in them.
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def option(answer, options):
    """An answer and {letter: text} -> the one option it names, or None.

    First the letters: exactly one stands as a word of its own, among the last four. Then a phrase such
    as "answer is B". Then the texts: exactly one occurs in an answer that is at most twice as long as
    all of them together.
    """
    if any(refusal in answer for refusal in REFUSALS):
        return None
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:  # "none of them", as some prompts ask to say
        return None
    # The kit's pattern has no word boundary: "the answer is black" names B. Kept, for the verdicts are
    # to be the same.
    said = re.search(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", answer, re.IGNORECASE)
    if said and said[1].upper() in options:
        return said[1].upper()
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    inside = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return inside[0] if len(inside) == 1 else None


def yes_no(answer):
    """An answer -> "Yes" or "No", whichever of the two words stands in it alone; else None."""
    text = answer.lower()
    cleaned, thousands = text, re.search(r"\d,\d", text)
    for mark in ';/[]"{}()=+\\_-><@`,?!':  # beside a blank it is dropped, between two words it parts them
        cleaned = cleaned.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    # 32: the kit passes a flag where the count stands.
    words = re.sub(r"(?<!\d)\.(?!\d)", "", cleaned, count=32).split()
    return {(True, False): "Yes", (False, True): "No"}.get(("yes" in words, "no" in words))


# --- verdicts become scores ---


def wilson(hits, n, z=1.96):
    """Wilson's score interval of a proportion: (low, high) of hits / n at 95 %; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def share(results):
    """Results -> (share right, number, (low, high))."""
    hits = sum(r["correct"] for r in results)
    return hits / len(results), len(results), wilson(hits, len(results))


def groups(results, column):
    """{value of the column: results}, sorted; rows without a value left out."""
    found = {}
    for r in results:
        if r["row"].get(column):
            found.setdefault(r["row"][column], []).append(r)
    return dict(sorted(found.items()))


def mean_over(column):
    """Overall is the mean over the column's groups of their shares; each group has a line."""

    def scores(results):
        parts = {name: share(part) for name, part in groups(results, column).items()}
        if not parts:
            raise UserError(f"this benchmark's score is a mean over the column {column}, which is empty")
        return {"Overall": (sum(p for p, _, _ in parts.values()) / len(parts), len(results), None)} | parts

    return scores


def plain(results):
    """Overall is the share right (of each split, if there are several); a line for
    each l2-category and category.
    """
    splits = groups(results, "split")
    lines = (
        {f"Overall, {s}": share(part) for s, part in splits.items()}
        if len(splits) > 1
        else {"Overall": share(results)}
    )
    for column in ("l2-category", "category"):
        lines |= {name: share(part) for name, part in groups(results, column).items()}
    return lines


def cv_bench(results):
    """2D: the mean over sources (ADE20K, COCO). 3D: plain."""
    return (
        mean_over("source")(results)
        if all(r["row"].get("split") == "2D" for r in results)
        else plain(results)
    )


def pope(results):
    """Overall is F1 of "Yes"; then accuracy, precision, recall, and F1 of each category. A row of several
    categories counts in each.
    """
    rows = [(category, r) for r in results for category in (r["row"].get("category") or "").split(",")]

    def f1(rows):
        hit = sum(r["correct"] for _, r in rows if r["answer"] == "Yes")
        yes, said = sum(r["answer"] == "Yes" for _, r in rows), sum(r["extracted"] == "Yes" for _, r in rows)
        precision, recall = hit / said if said else 0.0, hit / yes if yes else 0.0
        return 2 * precision * recall / (precision + recall) if hit else 0.0, precision, recall

    overall, precision, recall = f1(rows)
    n = len(rows)
    lines = {
        "Overall": (overall, n, None),
        "accuracy": share([r for _, r in rows]),
        "precision": (precision, n, None),
        "recall": (recall, n, None),
    }
    for category in sorted({c for c, _ in rows} - {""}):
        part = [(c, r) for c, r in rows if c == category]
        lines[category] = (f1(part)[0], len(part), None)
    return lines


def mmvp(results):
    """Overall is the share of pairs with both right, rows 2i and 2i + 1 by index being a pair; Average
    that of the rows.
    """
    rows = sorted(results, key=lambda r: int(r["id"]) if r["id"].isdigit() else math.inf)
    pairs = list(zip(rows[::2], rows[1::2]))
    if len(rows) % 2 or any(a["row"].get("question") != b["row"].get("question") for a, b in pairs):
        raise UserError(
            "MMVP: rows 2i and 2i + 1 must be the two images of one question; is a row missing? (--limit "
            "takes an even number)"
        )
    return {
        "Overall": share([{"correct": a["correct"] and b["correct"]} for a, b in pairs]),
        "Average": share(rows),
    }


# What a benchmark's score is. LIVR: its nine tasks in one file, the task as category; Counting has no options
# and is exact match.
SCORES = {
    "CV-Bench-2D": cv_bench,
    "CV-Bench-3D": cv_bench,
    "BLINK": plain,
    "POPE": pope,
    "MMVP": mmvp,
    "VStarBench": plain,
    "HRBench4K": mean_over("cycle_category"),
    "HRBench8K": mean_over("cycle_category"),
    "RealWorldQA": plain,
    "MMStar": plain,
    "LIVR": mean_over("category"),
}
ALIASES = {"vstar": "VStarBench", "vstarbench": "VStarBench"}


def known_as(path):
    """A TSV's name -> the benchmark whose scores it gets, or "" for a file of the user's own (plain scores).
    """

    def squeeze(text):
        return re.sub(r"[^a-z0-9]", "", text.lower())

    names = (
        {squeeze(name): name for name in SCORES}
        | ALIASES
        | {f"{squeeze(name)}local": name for name in SCORES}
    )
    return names.get(squeeze(Path(path).stem), "")


def scores(name, results):
    """Results of a whole benchmark -> {line: (share, n, (low, high) or None)}; "Overall" is
    what VLMEvalKit calls so.
    """
    return SCORES.get(name, plain)(results)
