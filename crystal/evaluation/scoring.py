"""The rules that turn a model's answers into verdicts, and verdicts into a benchmark's scores.

Extraction and scores follow VLMEvalKit at commit e8e78f0 with its judge `exact_matching` (no language model
reads the answers). Answers that no rule can read count as wrong, and their share is reported.
"""

import math
import re
from pathlib import Path

from crystal.runtime.config import UserError

EXTRACTION = {
    "choice": "option letter or text, VLMEvalKit e8e78f0 exact_matching",
    "yes/no": "the word yes or no alone, VLMEvalKit e8e78f0",
    "exact": "exact match, case and a final full stop aside",
}
NONE = "Z"  # what VLMEvalKit reads where an answer names no option


# --- answers become verdicts ---


def tidy(text):
    """Trimmed, lower case, one final full stop dropped: what exact match compares."""
    return text.strip().lower().removesuffix(".").strip()


def score(record, prediction):
    """A record and the model's answer -> (what was read out of the answer, or None; whether it is right)."""
    rule = getattr(record, "rule", "exact")
    if rule == "exact":
        read = tidy(prediction)
        return read, bool(record.answer) and read == tidy(record.answer)
    if rule == "yes/no":
        read = yes_no(prediction)
        return read, read == record.answer

    # The kit compares letters as they stand: a row whose answer is none of its options cannot be right,
    # but where the answer is the letter of none.
    read = option(prediction, record.options)
    return read, (read or NONE) == record.answer


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


def wilson(hits, n, z=1.959964):
    """Wilson's score interval of a proportion: (low, high) of hits / n at 95 %; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return max(low, 0.0), min(high, 1.0)  # but for rounding, within 0 and 1


def percent(share, low, high):
    """A share and its interval as percent: share ±half, or the ends where half would say another interval.

    Of few questions, and near 0 and 1, the interval does not lie around the share.
    """
    if abs((low + high) / 2 - share) < 0.01:
        return f"{100 * share:.1f} ±{50 * (high - low):.1f}"
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def paired_interval(a, b):
    """Right or wrong [n] under two conditions -> (share a - share b, low, high), the 95 % interval.

    Newcombe's for paired proportions (1998, method 10): Wilson's intervals of both, joined by their
    correlation. Unlike a bootstrap it holds for few questions, and where all answers are alike.
    """
    n, right_a, right_b = len(a), sum(map(bool, a)), sum(map(bool, b))
    both = sum(bool(x and y) for x, y in zip(a, b))
    neither = n - right_a - right_b + both

    # The correlation of the two, with Newcombe's correction for few questions.
    cross: float = both * neither - (right_a - both) * (right_b - both)
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    spread = right_a * (n - right_a) * right_b * (n - right_b)
    phi = cross / math.sqrt(spread) if spread else 0.0

    (low_a, high_a), (low_b, high_b) = wilson(right_a, n), wilson(right_b, n)
    difference = (right_a - right_b) / n

    def joined(x, y):
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0))

    low = difference - joined(right_a / n - low_a, high_b - right_b / n)
    high = difference + joined(high_a - right_a / n, right_b / n - low_b)
    return difference, low, high


def sign_test(a, b):
    """Right or wrong [n] under two conditions -> p of the exact two-sided sign test (McNemar's)."""
    wins = [sum(bool(x) > bool(y) for x, y in zip(*pair)) for pair in ((a, b), (b, a))]
    n, fewer = sum(wins), min(wins)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


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
