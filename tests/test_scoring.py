"""VLMEvalKit's rules: its verdicts for a table of answers, and its scores."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from crystal.evaluation import scoring
from crystal.evaluation.benchmarks import Question
from crystal.evaluation.scoring import (
    known_as,
    option,
    paired_interval,
    percent,
    score,
    scores,
    sign_test,
    tidy,
    wilson,
    yes_no,
)
from crystal.runtime import data
from crystal.runtime.config import UserError

ANIMALS = {"A": "cat", "B": "dog", "C": "car", "D": "tree"}
# What VLMEvalKit e8e78f0 reads out of an answer with the judge exact_matching: run on these
# strings, not reasoned about.
CHOICES = [
    ("The answer is B", "B"),
    ("dog", "B"),
    ("b", None),
    ("**B**", "B"),
    ("I think B because A is wrong", None),
    ("<think>..</think><answer>B</answer>", None),
    ("(A)", "A"),
    ("A. cat", "A"),
    ("It is a dog.", "B"),
    ("A dog and a cat", None),
    ("The correct answer is **C**. Here is why: D is a tree.", "C"),
    ("the answer is black", "B"),
    ("A B", None),
    ("Z", None),
    ("Sorry, I can't help with images of people yet. B", None),
    ("B is what I would say here", None),
    ("B, since the others are wrong", None),
    ("Dogs are animals, so are cats", None),
    ("Answer: D", "D"),
    ("answer is d", "D"),
    ("C\n", "C"),
    ("option E", None),
    ("", None),
    ("I see a tree and nothing else in this picture, which was taken at night from a car", None),
]
YES_NO = [
    ("Yes", "Yes"), ("yes.", "Yes"), ("Yes, no doubt", None), ("No.", "No"), ("no, it is not", "No"),
    ("There is none", None), ("yes-no", None), ("Unknown", None), ("It costs 1,000, yes!", "Yes"),
    ("not", None), ("YES", "Yes"), ("yes/no", None), ("No yes", None), ('"no"', "No"), ("yes.no", None),
]


@pytest.mark.parametrize("answer, read", CHOICES)
def test_options_are_read_as_the_kit_reads_them(answer, read):
    assert option(answer, ANIMALS) == read


@pytest.mark.parametrize("answer, read", YES_NO)
def test_yes_and_no_are_read_as_the_kit_reads_them(answer, read):
    assert yes_no(answer) == read


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("Red", "red", True), (" red. ", "red", True), ("red.", "Red", True), ("reddish", "red", False),
        ("", "red", False), ("a red one", "red", False), ("3", "3", True),
    ],
)
def test_exact_match(prediction, answer, right):
    record = data.Record("x:1", "1", [("user", "?")], answer, [])
    assert score(record, prediction) == (tidy(prediction), right)


def test_score_follows_the_rule():
    q = Question("x:1", "1", [], "B", [], rule="choice", options=ANIMALS)
    assert score(q, "dog") == ("B", True) and score(q, "A") == ("A", False) and score(q, "?") == (None, False)
    q = Question("x:1", "1", [], "No", [], rule="yes/no")
    assert (
        score(q, "no.") == ("No", True)
        and score(q, "yes") == ("Yes", False)
        and score(q, "maybe") == (None, False)
    )


def test_wilson_against_scipy():
    for hits, n in ((0, 10), (3, 10), (10, 10), (617, 1000)):
        ci = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert wilson(hits, n) == pytest.approx((ci.low, ci.high), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


# --- scores ---


def result(i, correct, answer="A", extracted=None, **row):
    return {"id": str(i), "correct": correct, "answer": answer, "extracted": extracted, "row": row}


@pytest.mark.parametrize(
    "path, name",
    [
        ("x/CV-Bench-2D.tsv", "CV-Bench-2D"),
        ("cv_bench_3d.tsv", "CV-Bench-3D"),
        ("hr_bench_4k.tsv", "HRBench4K"),
        ("HRBench8K_local.tsv", "HRBench8K"),
        ("VStarBench.tsv", "VStarBench"),
        ("POPE.tsv", "POPE"),
        ("MMVP.tsv", "MMVP"),
        ("mine.tsv", ""),
        ("livr.tsv", "LIVR"),
    ],
)
def test_names(path, name):
    assert known_as(Path(path)) == name


def test_plain_scores_by_category_and_split():
    results = [
        result(0, True, category="a"),
        result(1, False, category="a"),
        result(2, True, category="b", **{"l2-category": "l"}),
    ]
    found = scores("BLINK", results)
    assert {k: v[:2] for k, v in found.items()} == {
        "Overall": (2 / 3, 3),
        "l": (1.0, 1),
        "a": (0.5, 2),
        "b": (1.0, 1),
    } and found["a"][2] == wilson(1, 2)
    assert set(scores("", [result(0, True, split="dev"), result(1, False, split="test")])) == {
        "Overall, dev", "Overall, test",
    }


def test_means_of_means():
    results = [
        result(0, True, source="COCO", split="2D"),
        result(1, True, source="COCO", split="2D"),
        result(2, True, source="COCO", split="2D"),
        result(3, False, source="ADE20K", split="2D"),
    ]
    assert scores("CV-Bench-2D", results)["Overall"][0] == 0.5  # not 0.75
    assert scores("CV-Bench-3D", [r | {"row": {"split": "3D"}} for r in results])["Overall"][0] == 0.75
    cycles = [result(i, i < 3, cycle_category=str(i // 3), category="x") for i in range(4)]
    assert scores("HRBench4K", cycles)["Overall"][0] == 0.5
    tasks = [result(i, i < 3, category="Counting" if i < 3 else "Jigsaw") for i in range(4)]
    assert scores("LIVR", tasks) == {
        "Overall": (0.5, 4, None),
        "Counting": (1.0, 3, wilson(3, 3)),
        "Jigsaw": (0.0, 1, wilson(0, 1)),
    }
    with pytest.raises(UserError, match="cycle_category"):
        scores("HRBench4K", [result(0, True)])


def test_pope_against_its_definition():
    """F1, precision and recall of Yes; a row of two categories counts twice, an unread answer as not Yes."""
    answers = [
        ("Yes", "Yes", "random,popular"), ("Yes", "No", "popular"), ("No", "Yes", "random"),
        ("No", "No", "random"), ("Yes", None, "random"), ("No", None, "random"),
    ]
    results = [result(i, a == e, a, e, category=c) for i, (a, e, c) in enumerate(answers)]
    # 7 rows once the first counts twice: two hits, one false alarm, two misses
    found = scores("POPE", results)
    assert [found[n][0] for n in ("Overall", "precision", "recall")] == pytest.approx([4 / 7, 2 / 3, 1 / 2])
    assert found["accuracy"][:2] == (3 / 7, 7) and found["Overall"][1] == 7
    assert found["random"][:2] == (pytest.approx(1 / 2), 5) and found["popular"][:2] == (
        pytest.approx(2 / 3), 2,
    )
    assert scores("POPE", [result(0, False, "Yes", "No")])["Overall"][0] == 0.0


def test_mmvp_counts_pairs():
    rows = [
        result(i, c, question=q)
        for i, c, q in ((11, True, "b"), (1, True, "a"), (2, True, "a"), (12, False, "b"))
    ]
    assert scores("MMVP", rows) == {"Overall": (0.5, 2, wilson(1, 2)), "Average": (0.75, 4, wilson(3, 4))}
    for broken in (rows[:3], [rows[0], rows[1]]):
        with pytest.raises(UserError, match="rows 2i and 2i"):
            scores("MMVP", broken)


def test_every_rule_of_extraction_is_named():
    assert set(scoring.EXTRACTION) == {"choice", "yes/no", "exact"} and all(
        "VLMEvalKit" in scoring.EXTRACTION[r] for r in ("choice", "yes/no")
    )


def test_rows_that_no_answer_can_be_right_on():
    """The kit compares letters as they stand: `(A)` and an option that is not there are never read, and what
    names no option is read as Z.
    """
    pets = {"A": "cat", "B": "dog"}
    for answer, said, right in (
        ("(A)", "A", False), ("(A)", "(A)", False), ("C", "C", False), ("", "A", False), ("A", "A", True),
        ("Z", "a horse", True), ("Z", "A", False),
    ):
        q = Question("x:1", "1", [], answer, [], rule="choice", options=pets)
        assert score(q, said)[1] is right, (answer, said)
    assert score(Question("x:1", "1", [], "", []), "")[1] is False  # nothing is not an answer


def test_a_share_is_printed_with_its_own_interval():
    """0 of 7 is 0 to 35.4 percent by scipy, and not within 17.7 of 0."""
    ends = binomtest(0, 7).proportion_ci(0.95, method="wilson")
    assert (round(100 * ends.low, 1), round(100 * ends.high, 1)) == (0.0, 35.4)
    assert percent(0, *wilson(0, 7)) == "0.0 (0.0 to 35.4)"
    assert percent(1, *wilson(7, 7)) == "100.0 (64.6 to 100.0)"
    assert percent(0.5, *wilson(500, 1000)) == "50.0 ±3.1" and percent(0.25, *wilson(50, 200)) == "25.0 ±6.0"


@pytest.mark.parametrize("wins, losses", [(0, 0), (1, 0), (2, 0), (6, 0), (4, 9), (9, 4), (30, 30), (1, 12)])
def test_the_sign_test_is_scipys(wins, losses):
    a, b = [1] * wins + [0] * losses + [1, 0, 1], [0] * wins + [1] * losses + [1, 0, 1]
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(a, b) == pytest.approx(expected)


def test_a_paired_interval_of_many_is_the_normal_one():
    rng = np.random.default_rng(0)
    a = rng.random(4000) < 0.7
    b = a ^ (rng.random(4000) < 0.2)
    d = a.astype(int) - b.astype(int)
    half = 1.96 * d.std() / math.sqrt(len(d))
    mean, low, high = paired_interval(a.tolist(), b.tolist())
    assert mean == pytest.approx(d.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)
    assert paired_interval(b.tolist(), a.tolist()) == pytest.approx((-mean, -high, -low))


def test_a_paired_interval_of_nothing_is_not_a_point():
    ends = binomtest(0, 7).proportion_ci(0.95, method="wilson")
    assert paired_interval([0] * 7, [0] * 7) == pytest.approx((0, -ends.high, ends.high), abs=1e-4)


@pytest.mark.parametrize("p", [(0.1, 0.2, 0.05), (0.5, 0.2, 0.2), (0.0, 0.1, 0.0), (0.6, 0.0, 0.1)])
def test_a_paired_interval_of_few_covers_what_it_says(p):
    """Ten questions: over all tables of (both, first alone, second alone), how often the truth is inside."""
    n, both, first, second = 10, *p
    inside = 0.0
    for i, j, k in itertools.product(range(n + 1), repeat=3):
        rest = n - i - j - k
        if rest < 0:
            continue
        ways = math.factorial(n) // math.prod(map(math.factorial, (i, j, k, rest)))
        chance = ways * both**i * first**j * second**k * (1 - both - first - second) ** rest
        a = [1] * (i + j) + [0] * (k + rest)
        _, low, high = paired_interval(a, [1] * i + [0] * j + [1] * k + [0] * rest)
        inside += chance * (low <= first - second <= high)
    assert 0.93 < inside <= 1
