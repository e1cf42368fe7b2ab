"""VLMEvalKit's TSVs: images by byte offset, one line for a broken row, odd rows asked all the same."""

import base64
import csv
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

import crystal.backbone.model
from crystal.evaluation.benchmarks import read
from crystal.layout import Format
from crystal.runtime import data
from crystal.runtime.config import UserError

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
        ([[0, "x" * 99, "", "1", "2", "A"]], 2, "field 'question': missing"),
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
        ("empty.tsv", b"", ":1: no column index, question"),
        ("few.tsv", b"index\timage\n", ":1: no column question"),
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


def test_odd_rows_are_asked_and_say_what_is_odd(tmp_path):
    """By the kit's rules a cell that reads None is empty, so its letter is none of the options."""
    path = write(
        tmp_path / "x.tsv",
        HEADER,
        [0, picture(0), "q", "1", "None", "B"],
        [1, picture(1), "q", "1", "2", "(A)"],
        [2, "", "q", "1", "2", "A"],
        [3, picture(3), "q", "1", "2", ""],
        [4, "", "q", "", "", ""],
        [5, picture(5), "q", "1", "2", "A"],
    )
    found = read(path)
    assert [q.odd for q in found] == [
        "answer 'B' is none of its options A",
        "answer '(A)' is none of its options A, B",
        "no picture",
        "no answer",
        "no picture; no answer",
        "",
    ]
    assert [len(q.images) for q in found] == [1, 1, 0, 1, 0, 1]
    assert [len(q.turns[0][1]) for q in found] == [2, 2, 1, 2, 1, 2]
    assert [q.answer for q in found] == ["B", "(A)", "A", "", "", "A"]


def test_a_file_without_answers_is_read(tmp_path):
    path = write(tmp_path / "x.tsv", ["index", "image", "question"], [0, picture(0), "What?"])
    (q,) = read(path)
    assert (q.answer, q.odd, q.rule) == ("", "no answer", "exact")


def test_pictures_behind_links_are_read(tmp_path):
    """`images/coco -> /other/disk`: a link below the root leads where it leads, a path may not."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "disk" / "0.png")
    (tmp_path / "set" / "coco").symlink_to(tmp_path / "disk")
    header = ["index", "image_path", "question", "answer"]
    write(tmp_path / "set" / "x.tsv", header, [0, "coco/0.png", "q", "1"])
    assert read(tmp_path / "set" / "x.tsv")[0].images == [tmp_path / "set" / "coco" / "0.png"]
    write(tmp_path / "set" / "x.tsv", header, [0, "../../../disk/0.png", "q", "1"])
    with pytest.raises(data.RecordError, match="field 'image_path': .*/disk/0.png leaves"):
        read(tmp_path / "set" / "x.tsv")
