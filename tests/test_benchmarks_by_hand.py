"""Benchmarks from the cell to the score, by hand: what each kind of row asks, how an answer is read,
what each score is.

The reading rules are VLMEvalKit's (commit e8e78f0, judge exact_matching), each boundary worked out from its
description; scores are small tables whose means, pairs and F1 are written out as fractions.
"""

import base64
import io
import json
from types import SimpleNamespace

import by_hand
import pytest
from PIL import Image
from test_benchmarks import pixels, write
from test_scoring import result

from crystal import evaluate
from crystal.evaluation import asking, benchmarks, scoring
from crystal.evaluation.benchmarks import read
from crystal.evaluation.scoring import known_as, option, scores, yes_no
from crystal.runtime import data
from crystal.runtime.config import UserError
from crystal.runtime.data import RecordError


def cell(shade):
    """A picture of one shade as base64."""
    out = io.BytesIO()
    Image.new("RGB", (28, 28), (shade, 0, 0)).save(out, "png")
    return base64.b64encode(out.getvalue()).decode()


def shades(question):
    return [int(pixels(image)[0, 0, 0]) for image in question.images]


# --- rows become questions ---


def test_a_prompt_in_full(tmp_path):
    """Hint, question, the options that are filled in, in the alphabet's order, VLMEvalKit's request with
    its blank, the suffix.
    """
    path = write(
        tmp_path / "x.tsv",
        [
            "index", "image", "Question", "Z", "C", "A", "answer", "hint", "l2-category", "Split", "source",
            "cycle_category", "other",
        ],
        [
            "a1", cell(9), "What?", "last", "mid", "first", "Z", "Look well.", "fine", "2D", "COCO", "7",
            "dropped",
        ],
    )
    (q,) = read(path, suffix=" Be short.")
    assert q.turns == [
        (
            "user",
            [
                "",
                "Hint: Look well.\nQuestion: What?\nOptions:\nA. first\nC. mid\nZ. last\n"
                "Please select the correct answer from the options above. \n Be short.",
            ],
        )
    ]
    assert (q.answer, q.rule, q.options, q.family, q.id) == (
        "Z",
        "choice",
        {"A": "first", "C": "mid", "Z": "last"},
        "",
        "a1",
    )
    assert q.row == {
        "question": "What?",
        "l2-category": "fine",
        "split": "2D",
        "source": "COCO",
        "cycle_category": "7",
    }
    assert q.where == f"{path}:2 (index a1)"


@pytest.mark.parametrize(
    "answer, rule, kept",
    [
        ("yes", "yes/no", "Yes"), ("NO", "yes/no", "No"), ("three", "exact", "three"),
        ("Nope", "exact", "Nope"), (" 4 ", "exact", "4"),
    ],
)
def test_a_row_without_options(tmp_path, answer, rule, kept):
    path = write(
        tmp_path / "x.tsv",
        ["index", "image", "question", "answer", "hint"],
        [0, cell(9), "Is it?", answer, "a hint"],
    )
    (q,) = read(path)
    # The hint belongs to options.
    assert (q.rule, q.answer) == (rule, kept) and q.turns == [("user", ["", "Is it?"])]


@pytest.mark.parametrize(
    "absent",
    [
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
        "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
    ],
)
def test_cells_that_pandas_takes_for_empty(tmp_path, absent):
    path = write(
        tmp_path / "x.tsv",
        ["index", "image", "question", "A", "B", "C", "answer", "hint", "prompt", "category"],
        [0, cell(9), "q", "yes", absent, "no", "C", absent, absent, absent],
    )
    (q,) = read(path)
    assert (
        q.options == {"A": "yes", "C": "no"}
        and q.family == ""
        and "category" not in q.row
        and q.turns[0][1][1].startswith("Question: q\nOptions:\nA. yes\nC. no\n")
    )


def test_a_cell_that_says_nothing_special_stays(tmp_path):
    path = write(
        tmp_path / "x.tsv",
        ["index", "image", "question", "A", "B", "answer"],
        [0, cell(9), "q", "none", "Null", "B"],
    )
    assert read(path)[0].options == {"A": "none", "B": "Null"}


def test_which_image_a_row_gets(tmp_path):
    """Its own, another row's by index, before or after it; lists keep their order."""
    path = write(
        tmp_path / "x.tsv",
        ["index", "image", "question", "answer"],
        [1, "3", "q", "a"],
        [2, cell(50), "q", "a"],
        [3, f'["{cell(60)}", "{cell(70)}"]', "q", "a"],
        ["four", " 2 ", "q", "a"],
        [5, "['" + cell(80) + "']", "q", "a"],
    )
    found = read(path)
    assert [shades(q) for q in found] == [[60, 70], [50], [60, 70], [50], [80]]
    # A text between each two pictures, the prompt behind them.
    assert [len(q.turns[0][1]) for q in found] == [3, 2, 3, 2, 2]


def test_an_index_is_no_image_up_to_64_characters(tmp_path):
    """A cell of 64 characters is an index; one of 65 is taken for a picture."""
    long = "i" * 64
    path = write(
        tmp_path / "x.tsv",
        ["index", "image", "question", "answer"],
        [long, cell(50), "q", "a"],
        [1, long, "q", "a"],
    )
    assert [shades(q) for q in read(path)] == [[50], [50]]
    longer = "i" * 65
    path = write(
        tmp_path / "y.tsv",
        ["index", "image", "question", "answer"],
        [longer, cell(50), "q", "a"],
        [1, longer, "q", "a"],
    )
    with pytest.raises(RecordError, match="field 'image': base64"):
        shades(read(path)[1])


def test_a_reference_to_a_reference_is_told(tmp_path):
    path = write(
        tmp_path / "x.tsv",
        ["index", "image", "question", "answer"],
        [0, cell(1), "q", "a"],
        [1, "0", "q", "a"],
        [2, "1", "q", "a"],
    )
    with pytest.raises(RecordError, match=r"x\.tsv:4 \(index 2\): field 'image': '1' is neither"):
        read(path)


def test_paths_and_pictures_in_one_file(tmp_path):
    """A row without a picture of its own names a file: below the root, else below images/ and the TSV's name.
    """
    root = tmp_path / "elsewhere"
    (root / "images" / "x").mkdir(parents=True)
    for name, shade in (("a.png", 11), ("images/x/a.png", 22), ("images/x/b.png", 33)):
        Image.new("RGB", (28, 28), (shade, 0, 0)).save(root / name)
    path = write(
        tmp_path / "x.tsv",
        ["index", "image", "image_path", "question", "answer"],
        [0, "", "a.png", "q", "a"],
        [1, cell(44), "a.png", "q", "a"],
        [2, "", "['b.png', 'a.png']", "q", "a"],
    )
    assert [shades(q) for q in read(path, str(root))] == [[11], [44], [33, 11]]
    with pytest.raises(RecordError, match="no such file"):
        read(path)  # the TSV's own folder has none
    # It is there, outside.
    write(tmp_path / "x.tsv", ["index", "image_path", "question", "answer"], [0, "../../../x.tsv", "q", "a"])
    with pytest.raises(RecordError, match="leaves"):
        read(path, str(root))


def test_rows_by_line_and_byte(tmp_path):
    """A byte order mark, carriage returns, empty lines and cells of several lines: each picture is read
    where its row starts.
    """
    text = (
        "\ufeffindex\timage\tquestion\tanswer\r\n\r\n0\t"
        + cell(5)
        + '\t"two\nlines é"\ta\r\n1\t'
        + cell(6)
        + "\tq\ta\r\n"
    )
    (tmp_path / "x.tsv").write_bytes(text.encode())
    found = read(tmp_path / "x.tsv")
    assert [shades(q) for q in found] == [[5], [6]] and [q.where.split(":")[-1] for q in found] == [
        "3 (index 0)", "5 (index 1)",
    ]
    assert found[0].turns[0][1][1] == "two\nlines é"


# --- answers are read ---

PETS = {"A": "cat", "B": "dog", "C": "car", "D": "tree", "E": "house"}


@pytest.mark.parametrize(
    "answer, read",
    [
        ("B x y z", "B"),
        ("B x y z w", None),
        ("x y B", "B"),
        ("B B", "B"),
        ("e E", "E"),
        ("A (B)", None),  # among the last four words, alone
        ("[B]", "B"),
        ("B:", "B"),
        ("#B#", "B"),
        ("{B}!", "B"),
        ("B;", "B"),
        ("*B*", "B"),
        ("B,", "B"),
        ("B?", None),
        ("'B'", None),  # marks that are dropped
        ("Z", None),
        ("Z dog", None),
        ("A Z", "A"),  # none of them
        ("we saw A and B, so the answer is **C** I think so", "C"),
        ("A B correct answer is D", "D"),
        ("A and B: answer is E", None),  # a phrase, A to D
        ("dog", "B"),
        ("DOG here", "B"),
        ("a hotdog", "B"),
        ("cat dog", None),  # texts
        ("a dog " + "x" * 30, "B"),
        ("a dog " + "x" * 31, None),  # 36 = twice the 18 letters of all texts
        ("Cannot determine the answer B", None),
        ("I can't process this file. B", None),
        ("I'm sorry, but without the image provided B", None),
    ],
)
def test_options_at_each_boundary(answer, read):
    assert option(answer, PETS) == read


@pytest.mark.parametrize(
    "answer, read",
    [
        ("yes", "Yes"), ("Yes, it is", "Yes"), ("no; never", "No"), ("it is yes. really", "Yes"),
        ("y.e.s", "Yes"), ("1.5 no", "No"), ("(no)", "No"), ("'no'", None), ("yes,no", None),
        ("no,way", "No"), ("yes - no", None), ("know", None), ("yesterday", None), ("no 1,000", "No"),
        ("1,000 no,", "No"),
    ],
)
def test_yes_and_no_at_each_boundary(answer, read):
    assert yes_no(answer) == read


# --- verdicts become scores ---


def shares(name, rows):
    """{line: share} of a benchmark for [(right, {column: value})]."""
    return {
        line: value
        for line, (value, _, _) in scores(
            name, [result(i, right, **row) for i, (right, row) in enumerate(rows)]
        ).items()
    }


def test_cv_bench_by_hand():
    """2D: COCO 3 of 4 and ADE20K 1 of 3 make (3/4 + 1/3) / 2, not 4 of 7. 3D is 4 of 7, whatever its sources.
    One 3D row makes it plain.
    """
    rows = [
        (right, {"source": source, "split": "2D"})
        for right, source in (
            (1, "COCO"), (1, "COCO"), (1, "COCO"), (0, "COCO"), (1, "ADE20K"), (0, "ADE20K"), (0, "ADE20K"),
        )
    ]
    assert shares("CV-Bench-2D", rows) == pytest.approx(
        {"Overall": (3 / 4 + 1 / 3) / 2, "COCO": 3 / 4, "ADE20K": 1 / 3}
    )
    deep = [(right, row | {"split": "3D"}) for right, row in rows]
    assert shares("CV-Bench-3D", deep) == pytest.approx({"Overall": 4 / 7})
    assert shares("CV-Bench-2D", [*rows[:6], deep[6]]) == pytest.approx(
        {"Overall, 2D": 4 / 6, "Overall, 3D": 0.0}
    )
    assert list(shares("CV-Bench-2D", rows)) == ["Overall", "ADE20K", "COCO"]


@pytest.mark.parametrize("name", ["HRBench4K", "HRBench8K"])
def test_hr_bench_by_hand(name):
    rows = [
        (1, {"cycle_category": "1", "category": "x"}),
        (0, {"cycle_category": "0", "category": "x"}),
        (1, {"cycle_category": "0", "category": "y"}),
        (1, {"cycle_category": "0"}),
    ]
    assert shares(name, rows) == pytest.approx({"Overall": (2 / 3 + 1) / 2, "0": 2 / 3, "1": 1.0})


@pytest.mark.parametrize("name", ["BLINK", "VStarBench", "RealWorldQA", "MMStar", ""])
def test_plain_ones_by_hand(name):
    rows = [
        (1, {"category": "b", "l2-category": "z"}),
        (0, {"category": "a", "l2-category": "z"}),
        (0, {"category": "a"}),
        (1, {"category": "a", "source": "s", "cycle_category": "9"}),
        (0, {}),
    ]
    assert shares(name, rows) == pytest.approx({"Overall": 2 / 5, "z": 1 / 2, "a": 1 / 3, "b": 1.0})
    counts = {
        line: n
        for line, (_, n, _) in scores(
            name, [result(i, right, **row) for i, (right, row) in enumerate(rows)]
        ).items()
    }
    assert counts == {"Overall": 5, "z": 2, "a": 3, "b": 1}
    assert list(counts) == ["Overall", "z", "a", "b"]


def test_livr_by_hand():
    rows = [
        (1, {"category": "Counting"}), (0, {"category": "Counting"}), (0, {"category": "Counting"}),
        (1, {"category": "Jigsaw"}),
    ]
    assert shares("LIVR", rows) == pytest.approx(
        {"Overall": (1 / 3 + 1) / 2, "Counting": 1 / 3, "Jigsaw": 1.0}
    )


def test_pope_by_hand():
    """Said yes: 3 of which 2 are; there are 4: precision 2/3, recall 2/4, F1 4/7. Of ten rows 7 are right."""
    told = [("Yes", "Yes"), ("Yes", "Yes"), ("Yes", "No"), ("Yes", None), ("No", "Yes"), *[("No", "No")] * 5]
    rows = [
        result(i, answer == said, answer, said, category="random" if i < 5 else "popular")
        for i, (answer, said) in enumerate(told)
    ]
    found = scores("POPE", rows)
    assert {line: value for line, (value, _, _) in found.items()} == pytest.approx(
        {
            "Overall": 4 / 7,
            "accuracy": 7 / 10,
            "precision": 2 / 3,
            "recall": 1 / 2,
            "popular": 0.0,
            "random": 4 / 7,
        }
    )
    assert {line: n for line, (_, n, _) in found.items()} == {
        "Overall": 10,
        "accuracy": 10,
        "precision": 10,
        "recall": 10,
        "popular": 5,
        "random": 5,
    }
    assert found["accuracy"][2] == pytest.approx(scoring.wilson(7, 10)) and found["Overall"][2] is None


def test_mmvp_by_hand():
    """Pairs by index, ten after nine: of three pairs one has both right; of six rows four are."""
    rows = [
        result(i, right, question=q)
        for i, right, q in ((10, 1, "e"), (9, 1, "e"), (2, 0, "b"), (1, 1, "b"), (4, 0, "c"), (3, 1, "c"))
    ]
    found = scores("MMVP", rows)
    assert [found[line][:2] for line in ("Overall", "Average")] == [(1 / 3, 3), (4 / 6, 6)]
    with pytest.raises(UserError, match="takes an even number"):
        scores("MMVP", rows[:5])


def test_every_name_is_known():
    for file, name in (
        ("cvbench2d", "CV-Bench-2D"),
        ("CV-Bench-3D_local", "CV-Bench-3D"),
        ("blink", "BLINK"),
        ("pope_local", "POPE"),
        ("V-Star", "VStarBench"),
        ("vstar_bench", "VStarBench"),
        ("realworldqa", "RealWorldQA"),
        ("MM-Star", "MMStar"),
        ("hrbench8k", "HRBench8K"),
        ("HRBench-4K", "HRBench4K"),
        ("mmvp", "MMVP"),
        ("LIVR", "LIVR"),
        ("POPE2", ""),
    ):
        assert known_as(f"somewhere/{file}.tsv") == name


# --- the command ---


@pytest.fixture
def hand(model_dirs, tmp_path, monkeypatch):
    """A command whose model says what the test tells it, in the order of the rows."""
    s = by_hand.ingredients(model_dirs[True], "--method", "sft")
    kept = SimpleNamespace(answers=[], prompts=[])

    def generate(model, prompts, fmt, n, biases=None, latents="keep"):
        kept.prompts += [model.tokenizer.decode(ids) for ids, _, _ in prompts]
        return [kept.answers.pop(0) for _ in prompts]

    monkeypatch.setattr(evaluate, "open_model", lambda *args, **how: (s.real, s.fmt, None))
    monkeypatch.setattr(asking, "generate", generate)
    monkeypatch.chdir(tmp_path)
    return kept


MMVP = [
    [1, cell(1), "open?", "yes", "no", "A"],
    [2, cell(2), "open?", "yes", "no", "B"],
    [3, cell(3), "left?", "up", "down", "A"],
    [4, cell(4), "left?", "up", "down", "B"],
]


def test_whose_scores_a_file_gets(hand, tmp_path, capsys):
    """By its name, or by --scores; predictions lie in the model's folder by the file's name."""
    for file, flags, lines in (
        ("MMVP", [], {"Overall": 0.5, "Average": 0.75}),
        ("mine", ["--scores", "MMVP"], {"Overall": 0.5, "Average": 0.75}),
        ("plain", [], {"Overall": 0.75}),
    ):
        path = write(tmp_path / f"{file}.tsv", ["index", "image", "question", "A", "B", "answer"], *MMVP)
        hand.answers = ["A", "B", "up", "up"]
        evaluate.main(["--benchmark", str(path), "--device", "cpu", "--batch_size", "3", *flags])
        about = json.loads((tmp_path / "runs" / "tiny" / "evaluation" / f"{file}.json").read_text())
        assert {line: x["score"] for line, x in about["scores"].items()} == lines
        assert about["benchmark"] == ("" if file == "plain" else "MMVP")


def test_suffix_root_and_limit_of_a_file(hand, tmp_path):
    (tmp_path / "there").mkdir()
    for i in range(3):
        Image.new("RGB", (28, 28), (i, 0, 0)).save(tmp_path / "there" / f"{i}.png")
    path = write(
        tmp_path / "x.tsv",
        ["index", "image_path", "question", "answer"],
        *[[i, f"{i}.png", f"number {i}?", str(i)] for i in range(3)],
    )
    hand.answers = ["0", "2."]
    evaluate.main(
        [
            "--data", str(path), "--image_root", str(tmp_path / "there"), "--suffix", " A number.",
            "--limit", "2", "--device", "cpu", "--out", "p.jsonl",
        ]
    )
    assert [
        "number 0? A number." in hand.prompts[0],
        "number 1? A number." in hand.prompts[1],
        len(hand.prompts),
    ] == [True, True, 2]
    stored = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [(r["question"], r["extracted"], r["correct"]) for r in stored] == [
        ("number 0? A number.", "0", True),
        ("number 1? A number.", "2", False),
    ]
    with pytest.raises(UserError, match=r"made otherwise \(prompt, suffix\)"):
        evaluate.main(
            [
                "--data", str(path), "--image_root", str(tmp_path / "there"), "--limit", "2",
                "--device", "cpu", "--out", "p.jsonl",
            ]
        )


def test_records_and_questions_are_scored_by_their_own_rules():
    exact = data.Record("x:1", "1", [], "B", [])
    choice = benchmarks.Question("x:1", "1", [], "B", [], rule="choice", options=PETS)
    yes = benchmarks.Question("x:1", "1", [], "Yes", [], rule="yes/no", options=PETS)
    assert scoring.score(exact, " b. ") == ("b", True) and scoring.score(exact, "dog") == ("dog", False)
    assert scoring.score(choice, "dog") == ("B", True) and scoring.score(choice, "b") == (None, False)
    assert scoring.score(yes, "yes") == ("Yes", True) and scoring.score(yes, "B") == (None, False)
    assert [scoring.tidy(x) for x in ("A.", "a..", " A . ", ".", "a!")] == ["a", "a.", "a", "", "a!"]
