"""VLMEvalKit's TSVs and rules: its verdicts for a table of answers, its scores, images by byte offset, one
line for a broken row.
"""

import base64
import csv
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import crystal.backbone.model
from crystal.evaluation import benchmarks
from crystal.evaluation.benchmarks import (
    Question,
    known_as,
    option,
    read,
    score,
    scores,
    tidy,
    wilson,
    yes_no,
)
from crystal.layout import Format
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
    from scipy.stats import binomtest

    for hits, n in ((0, 10), (3, 10), (10, 10), (617, 1000)):
        ci = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert wilson(hits, n) == pytest.approx((ci.low, ci.high), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


# --- files ---


def picture(seed, size=(56, 56)):
    """A picture as base64, long enough to be no index."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(out, "png")
    return base64.b64encode(out.getvalue()).decode()


def write(path, header, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    return path


def pixels(image):
    return np.asarray(data.load_image(image, "x"))


def test_rows_become_questions(tmp_path):
    one, two = picture(1), picture(2)
    path = write(
        tmp_path / "mine.tsv",
        ["index", "image", "question", "hint", "A", "B", "C", "answer", "Category"],
        [7, one, 'What is "this"?\nLook\tclosely.', "", "cat", "dog", "None", "B", "animals"],
        [8, "7", "Is there a dog?", "", "", "", "", "Yes", ""],
        [9, f"['{one}', '{two}']", "How many <image> are there?", "count", "", "", "", "2", ""],
        [10, two, "Which?", "Look.", "x", "y", "", "A", ""],
    )
    a, b, c, d = read(path)
    assert [q.id for q in (a, b, c, d)] == ["7", "8", "9", "10"] and [q.rule for q in (a, b, c, d)] == [
        "choice", "yes/no", "exact", "choice",
    ]
    assert a.options == {"A": "cat", "B": "dog"}  # pandas, and so the kit, takes the cell None for empty
    assert a.turns == [
        (
            "user",
            [
                "",
                'Question: What is "this"?\nLook\tclosely.\nOptions:\nA. cat\nB. dog\nPlease select the correct answer from the options above. \n',  # noqa: E501
            ],
        )
    ]
    assert d.turns[0][1][1].startswith("Hint: Look.\nQuestion: Which?\nOptions:\nA. x\nB. y\nPlease")
    assert b.turns == [("user", ["", "Is there a dog?"])] and c.turns == [
        ("user", ["", "", "How many <image> are there?"])
    ]
    assert a.family == "animals" and a.row == {"category": "animals", "question": a.row["question"]}
    wanted = {
        name: np.asarray(Image.open(io.BytesIO(base64.b64decode(x))))
        for name, x in (("one", one), ("two", two))
    }
    assert (pixels(a.images[0]) == wanted["one"]).all() and b.images == a.images  # borrowed by index
    assert [
        (pixels(x) == wanted[n]).all() for x, n in zip([*c.images, *d.images], ("one", "two", "two"))
    ] == [True] * 3
    assert read(path, suffix=" Yes or no?")[1].turns[0][1][1] == "Is there a dog? Yes or no?"


def test_a_question_reaches_the_prompt_with_its_images(tmp_path):
    path = write(
        tmp_path / "x.tsv",
        ["index", "image", "question", "answer"],
        [0, f'["{picture(1)}", "{picture(2)}"]', "How many <image> <|image_pad|>?", "2"],
    )
    model = crystal.backbone.model.load("tiny")
    fmt = Format(model.tokenizer)
    examples = data.RecordDataset(read(path), lambda r, n: fmt.question(r.turns, n), model.image_processor)
    ids, image, _ = examples.build(0, 0)["layout"]
    assert len(image) == 2 * 4 == ids.count(
        fmt.image
    ) and "How many <image> <|image_pad|>?" in model.tokenizer.decode(ids)


def test_prompt_column_and_image_paths(tmp_path):
    (tmp_path / "images" / "CV-Bench-2D").mkdir(parents=True)
    for name in ("a.png", "images/CV-Bench-2D/b.png"):
        Image.new("RGB", (28, 28), (9, 9, 9)).save(tmp_path / name)
    path = write(
        tmp_path / "CV-Bench-2D.tsv",
        ["index", "image_path", "question", "A", "B", "answer", "prompt", "source", "split"],
        [0, "a.png", "q", "1", "2", "A", "the prompt\n(A) 1\n(B) 2", "COCO", "2D"],
        [1, "['b.png']", "q", "1", "2", "A", "p", "ADE20K", "2D"],
    )
    a, b = read(path)
    assert (
        a.turns[0][1][1] == "the prompt\n(A) 1\n(B) 2"
        and a.images == [tmp_path / "a.png"]
        and b.images == [tmp_path / "images" / "CV-Bench-2D" / "b.png"]
    )


HEADER = ["index", "image", "question", "A", "B", "answer"]


@pytest.mark.parametrize(
    "rows, line, says",
    [
        (
            [[0, "x" * 99, "q", "1", "2", "A"], [1, "0", "q", "1", "2"]],
            3,
            "5 cells under 6 columns; the file may be cut off",
        ),
        ([[0, "x" * 99, "q", "1", "2", "C"]], 2, "index 0): field 'answer': 'C' is none of the options A, B"),
        ([[0, "x" * 99, "", "1", "2", "A"]], 2, "field 'question': missing"),
        ([[0, "x" * 99, "q", "1", "2", ""]], 2, "field 'answer': missing"),
        ([[0, "", "q", "1", "2", "A"]], 2, "field 'image': missing"),
        ([["", "x" * 99, "q", "1", "2", "A"]], 2, "field 'index': missing"),
        (
            [[0, "x" * 99, "q", "1", "2", "A"], [0, "x" * 99, "q", "1", "2", "A"]],
            3,
            "field 'index': given twice",
        ),
        (
            [[0, "x" * 99, "q\nq", "1", "2", "A"], [1, "5", "q", "1", "2", "A"]],
            4,
            "'5' is neither an image nor the index",
        ),
        (
            [[0, "x" * 99, "q", "1", "2", "A"], [1, "2", "q", "1", "2", "A"], [2, "0", "q", "1", "2", "A"]],
            3,
            "'2' is neither an image nor the index",
        ),
        ([[0, "[" + "x" * 99 + "]", "q", "1", "2", "A"]], 2, "field 'image': begins with ["),
    ],
)
def test_a_broken_row_is_one_line(tmp_path, rows, line, says):
    path = write(tmp_path / "x.tsv", HEADER, *rows)
    with pytest.raises(data.RecordError) as error:
        read(path)
    assert (
        says in str(error.value)
        and str(error.value).startswith(f"{path}:{line}")
        and "\n" not in str(error.value)
    )


def test_a_broken_image_or_file_is_one_line(tmp_path):
    path = write(tmp_path / "x.tsv", HEADER, [0, "!" * 99, "q", "1", "2", "A"])
    with pytest.raises(data.RecordError, match=r"x\.tsv:2 \(index 0\): field 'image': base64"):
        data.load_image(read(path)[0].images[0], read(path)[0].where)
    for name, content, says in (
        ("none.tsv", None, "cannot be read"),
        ("empty.tsv", b"", ":1: no column index, question, answer"),
        ("few.tsv", b"index\tquestion\n", ":1: no column answer"),
        ("blind.tsv", b"index\tquestion\tanswer\n", "no column image"),
        ("bare.tsv", "\t".join(HEADER).encode() + b"\n", "no rows"),
        ("latin.tsv", "\t".join(HEADER).encode() + b"\n0\t\xe9\n", ":2: not UTF-8"),
        ("quote.tsv", "\t".join(HEADER).encode() + b'\n0\t"x\n', ":2: not a row"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=says):
            read(tmp_path / name)
    for where, says in (("/etc/x.png", "leaves"), ("x.png", "no such file")):
        write(tmp_path / "p.tsv", ["index", "image_path", "question", "answer"], [0, where, "q", "1"])
        with pytest.raises(data.RecordError, match=f"field 'image_path': .*{says}"):
            read(tmp_path / "p.tsv")


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Forty images of 400 kB: reading never holds more than a few of them."""
    cell = base64.b64encode(bytes(400_000)).decode()
    path = write(tmp_path / "x.tsv", HEADER, *([i, cell, "q", "1", "2", "A"] for i in range(40)))
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    try:
        assert len(read(path)) == 40 and tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


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
    assert set(benchmarks.EXTRACTION) == {"choice", "yes/no", "exact"} and all(
        "VLMEvalKit" in benchmarks.EXTRACTION[r] for r in ("choice", "yes/no")
    )
