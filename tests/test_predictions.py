"""A run's predictions survive a kill, whatever the number of ranks before and after it; test_evaluate.py kills a whole evaluation."""
import json

import pytest

from crystal.config import UserError
from crystal.predictions import Predictions
from crystal.processes import Processes


def part(out, rank, *results, cut=""):
    """What a killed rank leaves behind."""
    killed = Predictions(out, {"a": 1}, False, Processes())
    killed.procs = Processes(rank=rank)
    for result in results:
        killed.tell(result)
    killed.file.close()
    with open(f"{out}.{rank}", "a") as file:
        file.write(cut)


def test_two_parts_of_a_killed_run_are_read_by_one_process(tmp_path):
    out = tmp_path / "deep" / "p.jsonl"
    part(out, 0, {"index": 0})
    part(out, 1, {"index": 3})
    again = Predictions(out, {"a": 1}, False, Processes())
    assert again.done == {0: {"index": 0}, 3: {"index": 3}}
    again.tell({"index": 1})
    again.close([{"index": i} for i in (0, 1, 3)], {"score": 2})
    assert [json.loads(x)["index"] for x in out.read_text().splitlines()] == [0, 1, 3]
    assert json.loads(out.with_suffix(".json").read_text()) == {"settings": {"a": 1}, "score": 2}
    assert sorted(p.name for p in out.parent.iterdir()) == ["p.json", "p.jsonl"]


def test_a_line_cut_short_is_asked_again(tmp_path, capsys):
    out = tmp_path / "p.jsonl"
    part(out, 0, {"index": 0}, cut='{"index": 1, "predic')
    again = Predictions(out, {"a": 1}, False, Processes())
    assert again.done == {0: {"index": 0}} and "1 questions are answered already" in capsys.readouterr().out
    again.tell({"index": 1})
    assert Predictions(out, {"a": 1}, False, Processes()).done == {0: {"index": 0}, 1: {"index": 1}}


def test_predictions_made_otherwise_are_kept(tmp_path):
    out = tmp_path / "p.jsonl"
    part(out, 0, {"index": 0})
    with pytest.raises(UserError, match=r"p.jsonl: holds predictions that were made otherwise \(a, b\); --overwrite"):
        Predictions(out, {"a": 2, "b": 3}, False, Processes())
    assert Predictions(out, {"a": 2, "b": 3}, True, Processes()).done == {} and not (tmp_path / "p.jsonl.0").exists()
