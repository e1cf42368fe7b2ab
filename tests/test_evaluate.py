"""Scores: Wilson's interval, exact match, families, tables; blind, corrupted and latent-free answers differ where they must."""
import json

import pytest

import crystal.model
from crystal import data, evaluate
from crystal.config import UserError
from crystal.evaluate import by_family, table
from crystal.layout import Format


def test_table_by_family():
    results = [{"family": f, "correct": c} for f, c in (("a", True), ("a", False), ("b", True))]
    assert by_family(results) == {"a": (1, 2), "b": (1, 1), "all": (2, 3)}
    lines = table({"base": by_family(results), "tuned": by_family(results)}).splitlines()
    assert [x.split()[0] for x in lines] == ["family", "a", "b", "all"] and lines[1].split()[1:3] == ["2", "50.0"]


def test_answers_from_what_is_shown(records_file):
    """Each way of asking feeds the model what it says."""
    model = crystal.model.load("tiny")
    records, _ = data.read(records_file)
    fed, fmt = [], Format(model.tokenizer)

    def record(model, prompts, fmt, n):
        fed.append(prompts)
        return ["red"] * len(prompts)

    old, evaluate.generate = evaluate.generate, record
    try:
        for how in ({}, {"grey": True}, {"corruption": ("blur", 5.0, 5.0)}):
            results = evaluate.answers(model, fmt, records, batch_size=2, **how)
            assert [r["id"] for r in results] == ["0", "1", "2"] and [r["correct"] for r in results] == [True, False, False]
    finally:
        evaluate.generate = old
    intact, grey, blurred = fed[0::2], fed[2], fed[4]
    assert len(fed) == 6 and len(fed[0]) == 2
    assert fed[0][0][0] == fed[2][0][0] == fed[4][0][0]  # one prompt
    x, g, c = (fed[i][0][1] for i in (0, 2, 4))
    assert (g == g[:1]).all() and not (x == g).all() and not (x == c).all() and x.std() > c.std() > g.std()


def test_command_line(records_file, tmp_path, capsys):
    out = tmp_path / "p" / "predictions.jsonl"
    evaluate.main(["--data", str(records_file), "--out", str(out), "--max_new_tokens", "3", "--device", "cpu", "--limit", "2"])
    lines = [json.loads(x) for x in out.read_text().splitlines()]
    assert [x["id"] for x in lines] == ["0", "1"] and {"prediction", "answer", "correct", "question", "family"} <= lines[0].keys()
    assert "all" in capsys.readouterr().out
    with pytest.raises(UserError, match="--corruption fog"):
        evaluate.main(["--data", str(records_file), "--corruption", "fog"])
    with pytest.raises(UserError, match="cannot be read"):
        evaluate.main(["--data", str(tmp_path / "none.jsonl")])
