"""Where rows look, in LaViT's numbers: by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from crystal.backbone.families import Grid
from crystal.evaluation import gaze


def test_the_mean_is_over_heads_and_rows_that_are_there():
    """A softmax written out: two records of which one has a row less, two query heads on one key head."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 5, 4, generator=g), torch.randn(2, 1, 5, 4, generator=g)
    rows, cols = torch.tensor([[4, 2], [3, -1]]), torch.tensor([[0, 2], [1, 0]])
    found = gaze.mean_of_rows(q, k, rows, cols, scale=0.7)
    for b, own in enumerate(([4, 2], [3])):
        expected = torch.zeros(2)
        for row in own:
            for head in range(2):
                weights = (0.7 * q[b, head, row] @ k[b, 0, : row + 1].T).softmax(0)
                expected += torch.stack(
                    [weights[c] if c <= row else torch.tensor(0.0) for c in cols[b].tolist()]
                )
        assert torch.allclose(found[b], expected / (2 * len(own)), atol=1e-6)


def batch(**changes):
    """Two tokens of text, two of an image, text, two latents, text that predicts the answer, padding."""
    made = {
        "input_ids": torch.arange(10)[None],
        "attention_mask": torch.tensor([[1] * 9 + [0]]),
        "image": torch.tensor([[2, 3]]),
        "latents": torch.tensor([[5, 6]]),
        "answer_positions": torch.tensor([[7, 8]]),
    }
    return made | changes


def test_rows_are_of_three_kinds():
    rows = {looker: at.tolist() for looker, at in gaze.rows_of(batch()).items()}
    assert rows == {"text": [4, 7, 8], "answer": [7, 8], "latents": [5, 6]}
    none = torch.zeros(1, 0, dtype=torch.long)
    assert list(gaze.rows_of(batch(latents=none))) == ["text", "answer"]


def test_the_corrupted_path_does_not_look_from_what_it_copies():
    copied = torch.zeros(1, 10, dtype=torch.bool)
    copied[0, [5, 6]] = True
    rows = torch.tensor([4, 5, 7])
    assert gaze.of_paths(rows, copied).tolist() == [[4, 5, 7], [4, -1, 7]]
    assert gaze.of_paths(rows).tolist() == [[4, 5, 7]]


def test_a_record_is_judged_by_the_papers_definitions():
    """A = (S - 0.1) / 0.2 = 0, 1, 0.5, 0: two thirds, one third; one is above 1.5 times the mean, 0.375."""
    means = {
        "text": torch.tensor([[0.1, 0.3, 0.2, 0.1, 9.0]]),
        "answer": torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]),
    }
    record = SimpleNamespace(boxes=[[5, 0, 7, 3]])  # of 8 x 8 pixels: the upper right of 2 x 2 tokens
    found = gaze.judge(record, (8, 8), [Grid(2, 2)], means)
    (text,), (answer,) = found["text"], found["answer"]
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert text == pytest.approx(
        {"entropy": entropy, "salient": 1, "tokens": 4, "focus": 2 / 3, "chance": 0.25}
    )
    assert answer == pytest.approx({"entropy": 0, "salient": 1, "tokens": 4, "focus": 0, "chance": 0.25})
    assert set(gaze.judge(SimpleNamespace(boxes=[]), (8, 8), [Grid(2, 2)], means)["text"][0]) == {
        "entropy",
        "salient",
        "tokens",
    }


def test_all_views_of_the_first_image_count():
    """The whole image and its tiles, a newline behind each row, as LLaVA has them: a newline is in no box."""
    means = {"text": torch.tensor([[0.0, 1.0, 1.0, 0.0, 5.0, 7.0]])}
    record = SimpleNamespace(boxes=[[0, 0, 1, 8]])  # the left column
    views = [Grid(1, 2), Grid(1, 2, 1)]
    ((numbers,),) = gaze.judge(record, (8, 8), views, means).values()
    assert numbers["tokens"] == 5 and numbers["chance"] == pytest.approx(2 / 5)
    assert numbers["focus"] == pytest.approx(1 / 7)  # of 0, 1, 1, 0, 5 the first and the third


def test_numbers_over_questions():
    found = gaze.over_questions([1, 3, 5])
    assert found == pytest.approx({"mean": 3, "std": 2, "low": 1, "high": 5, "cv": 2 / 3})
    assert gaze.over_questions([2])["std"] == 0.0 and gaze.over_questions([0, 0])["cv"] == 0.0


def test_accuracy_is_of_the_questions_at_or_above_a_threshold():
    """Eleven scores, 0 to 1: the thresholds go to the tenth, 0.9, which holds two questions, one right."""
    numbers = [{"focus": i / 10, "right": i in (0, 9)} for i in range(11)]
    found = gaze.by_threshold(numbers, steps=4)
    assert [at for at, _, _ in found] == pytest.approx([0, 0.3, 0.6, 0.9])
    assert [n for _, _, n in found] == [11, 8, 5, 2]
    assert [share for _, share, _ in found] == pytest.approx([2 / 11, 1 / 8, 1 / 5, 1 / 2])
