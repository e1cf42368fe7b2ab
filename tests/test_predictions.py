"""A run's predictions survive a kill, whatever the number of ranks before and after it; test_evaluate.py
kills a whole evaluation.
"""

import json

import pytest

from crystal.evaluation.predictions import Predictions
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes


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
    with pytest.raises(
        UserError, match=r"p.jsonl: holds predictions that were made otherwise \(a, b\); --overwrite"
    ):
        Predictions(out, {"a": 2, "b": 3}, False, Processes())
    assert (
        Predictions(out, {"a": 2, "b": 3}, True, Processes()).done == {}
        and not (tmp_path / "p.jsonl.0").exists()
    )


# --- what lies on the disk, step by step ---


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_on_the_disk_at_each_step(tmp_path):
    """The settings at once, each result as it comes, in a part of its rank; at the end one file in the
    order of the results.
    """
    out = tmp_path / "p.jsonl"
    (tmp_path / "p.jsonl.bak").write_text("not a part\n")
    run = Predictions(out, {"a": 1}, False, Processes(rank=0))
    assert (
        json.loads((tmp_path / "p.json").read_text()) == {"settings": {"a": 1}}
        and not out.exists()
        and not (tmp_path / "p.jsonl.0").exists()
    )
    run.tell({"index": 4, "x": "é"})
    run.tell({"index": 1})
    # Before anything is closed.
    assert lines(tmp_path / "p.jsonl.0") == [{"index": 4, "x": "é"}, {"index": 1}]
    (tmp_path / "p.jsonl.1").write_text('{"index": 2}\n')
    run.close([{"index": 1}, {"index": 2}, {"index": 4}], {"score": 0.5})
    assert [x["index"] for x in lines(out)] == [1, 2, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.jsonl", "p.jsonl.bak"]
    assert json.loads((tmp_path / "p.json").read_text()) == {"settings": {"a": 1}, "score": 0.5}


def test_a_finished_run_and_parts_of_a_later_one_are_both_read(tmp_path):
    """A part's result is the newer one."""
    out = tmp_path / "p.jsonl"
    Predictions(out, {"a": 1}, False, Processes()).close([{"index": 0, "n": "old"}, {"index": 1}], {})
    part(out, 1, {"index": 0, "n": "new"}, {"index": 2})
    assert Predictions(out, {"a": 1}, False, Processes()).done == {
        0: {"index": 0, "n": "new"},
        1: {"index": 1},
        2: {"index": 2},
    }


def test_two_pieces_of_lines_do_not_become_one(tmp_path):
    """After a kill inside a line the next result begins a line of its own; what is whole needs no blank line.
    """
    out = tmp_path / "p.jsonl"
    part(out, 0, {"index": 0}, cut='{"index": 1')
    Predictions(out, {"a": 1}, False, Processes()).tell({"index": 7})
    assert (tmp_path / "p.jsonl.0").read_text() == '{"index": 0}\n{"index": 1\n{"index": 7}\n'
    part(out, 2, {"index": 5})
    again = Predictions(out, {"a": 1}, False, Processes())
    again.procs = Processes(rank=2)
    again.tell({"index": 6})
    assert (tmp_path / "p.jsonl.2").read_text() == '{"index": 5}\n{"index": 6}\n'


@pytest.mark.parametrize(
    "now, changed",
    [
        ({"a": 1, "b": 2}, None),
        ({"b": 2, "a": 1}, None),
        ({"a": 2, "b": 2}, "a"),
        ({"a": 1, "b": 2, "c": None, "d": 0}, "d"),
        ({"a": 1}, ""),
    ],
)
def test_which_settings_are_others(tmp_path, now, changed):
    out = tmp_path / "p.jsonl"
    Predictions(out, {"a": 1, "b": 2}, False, Processes()).close([{"index": 0}], {})
    if changed is None:
        assert Predictions(out, now, False, Processes()).done == {0: {"index": 0}}
        return
    with pytest.raises(UserError, match=rf"made otherwise \({changed}\)"):
        Predictions(out, now, False, Processes())
    assert lines(out) == [{"index": 0}] and json.loads((tmp_path / "p.json").read_text())["settings"] == {
        "a": 1,
        "b": 2,
    }


def test_answers_without_their_settings_are_not_taken(tmp_path):
    out = tmp_path / "p.jsonl"
    out.write_text('{"index": 0}\n')
    with pytest.raises(UserError, match=r"made otherwise \(a, b\)"):
        Predictions(out, {"b": 1, "a": 1}, False, Processes())


def test_overwriting_removes_parts_and_whole(tmp_path):
    out = tmp_path / "p.jsonl"
    Predictions(out, {"a": 1}, False, Processes()).close([{"index": 0}], {"score": 1})
    part(out, 3, {"index": 1})
    again = Predictions(out, {"a": 2}, True, Processes())
    assert again.done == {} and not out.exists() and not (tmp_path / "p.jsonl.3").exists()
    assert json.loads((tmp_path / "p.json").read_text()) == {"settings": {"a": 2}}


def test_ranks_but_the_first_write_nothing_but_their_part(tmp_path):
    other = Predictions(tmp_path / "p.jsonl", {"a": 1}, False, Processes(rank=1))
    assert list(tmp_path.iterdir()) == []
    other.tell({"index": 3})
    other.close([{"index": 3}], {"score": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl.1"] and lines(tmp_path / "p.jsonl.1") == [
        {"index": 3}
    ]
