"""What a run says of its updates: whose numbers, at which speed, when, and by whom."""

import json
from types import SimpleNamespace

import pytest

from crystal import telling
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes
from crystal.runtime.late import Told
from crystal.telling import Teller, Update

SETTINGS = SimpleNamespace(max_steps=5, log_every=2)


@pytest.fixture
def teller(tmp_path, monkeypatch):
    """A Teller whose clock goes on by half a second at every look."""
    seconds = iter(range(100))
    clock = SimpleNamespace(perf_counter=lambda: next(seconds) / 2)
    monkeypatch.setattr(telling, "time", clock)
    made = Teller(SETTINGS, ("mass",), Processes(), 0)
    made.log = open(tmp_path / "metrics.jsonl", "w")
    yield made
    made.log.close()


def update(step, **means):
    told = Told({"loss": 1.5, **means}, tokens=30, stop=False, norm=0.25)
    return Update(step, 0.125, [f"records.jsonl:{step}"], SimpleNamespace(read=lambda: told)), told


def lines(teller):
    teller.log.flush()
    with open(teller.log.name) as file:
        return [json.loads(line) for line in file]


def test_a_line_an_update_and_a_printed_one_where_it_is_due(teller, capsys):
    teller.start_clock()
    for step in range(5):
        one, told = update(step, mass=0.5)
        assert teller.read(one, None) is told
        teller.tell(one, told)
    found = lines(teller)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    peak = found[0].pop("peak_memory_gb")
    assert peak > 0.01 and found[0] == {
        "step": 1, "loss": 1.5, "mass": 0.5, "lr": 0.125, "grad_norm": 0.25, "tokens_per_s": 60.0,
    }  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert said == [f"step {n}/5  loss 1.5000  mass 0.5000  60 tokens/s" for n in (2, 4, 5)]


def test_no_number_is_told_with_its_records_and_the_last_checkpoint(teller):
    bad = Told({"loss": float("nan")}, 30, False, 0.5)
    one = Update(3, 0.1, ["a.jsonl:3", "a.jsonl:7"], SimpleNamespace(read=lambda: bad))
    for good, said in ((lambda: None, "none"), (lambda: "run/checkpoints/step-2", "run/checkpoints/step-2")):
        with pytest.raises(UserError) as stopped:
            teller.read(one, good)
        assert str(stopped.value) == (
            "update 3: loss nan or gradient norm 0.5 is not finite; stopped before the update, the last good "
            f"checkpoint is {said}; its records: a.jsonl:3, a.jsonl:7"
        )


def test_a_validation_is_marked_where_it_is_the_best(teller, capsys):
    teller.tell_validation(4, {"loss": 2.0, "ce": 1.0}, True, ["and what follows"])
    teller.tell_validation(5, {"loss": 3.0}, False, [])
    assert lines(teller) == [{"step": 4, "val_loss": 2.0, "val_ce": 1.0}, {"step": 5, "val_loss": 3.0}]
    out = capsys.readouterr().out
    assert "step 4  validation  loss 2.0000  ce 1.0000  (best)\nand what follows\n" in out
    assert "step 5  validation  loss 3.0000\n" in out


def test_other_ranks_say_nothing(tmp_path, capsys):
    other = Teller(SETTINGS, (), Processes(rank=1, world=2), 0)
    other.tell(*update(1))
    other.tell_validation(1, {"loss": 1.0}, True, [])
    assert other.log is None and capsys.readouterr().out == ""
