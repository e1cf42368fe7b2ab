"""bench.py at small sizes: every row measured or its reason told, the gate in front of it, and what it says in a mistake's case."""
import json

import pytest
import torch

from crystal import bench, ops
from crystal.config import UserError

SMALL = ["--device", "cpu", "--rows", "3", "--vocab", "500", "--slice", "2,40,6,3,4,2,8", "--repeats", "3", "--no-compile"]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """The probe's own gigabytes are not what is tested here."""
    monkeypatch.setattr(bench, "probe", lambda *_: {"name": "a test's", "threads": 1, "copy_gb_s": 10.0, "tflop_s": 0.1, "empty_us": 1.0})


def test_rows(tmp_path, capsys):
    if not ops.choice()[1]:
        pytest.skip("no compiled operators here")
    bench.main([*SMALL, "--dtype", "float32", "--only", ",".join(bench.CASES), "--out", str(tmp_path / "a" / "bench.json")])
    rows = json.loads((tmp_path / "a" / "bench.json").read_text())["rows"]
    table = {(row["operator"], row["peer"]): row for row in rows}
    for operator in bench.CASES:
        for peer in ("compiled", "eager"):
            row = table[operator, peer]
            assert row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["repeats"] == 3 and row["peak_bytes"] > 0 and min(row["floor_ms"]) > 0
            assert row["forward_quartiles"][0] <= row["forward_ms"] <= row["forward_quartiles"][1]
        assert table[operator, "compiled"]["times_ours"] == 1
        assert operator == "layer" or table[operator, "torch.compile"]["cannot_run"] == "left out (--no-compile)"
    assert "cannot_run" in table["slice", "FlexAttention"] and table["slice", "one-hot values"]["times_ours"] > 0 and table["layer", "the layer alone"]["times_ours"] > 0
    # What is kept: of the logits' size in plain PyTorch, of the rows' in ours.
    assert table["vocab", "eager"]["kept_bytes"] >= 2 * 3 * 500 * 4 and table["vocab", "compiled"]["kept_bytes"] < 1000
    assert table["vocab", "compiled"]["floor_ms"] == [2 * 3 * 500 * 4 / 10e6, 4 * 3 * 500 * 4 / 10e6]
    out = capsys.readouterr().out
    assert "FlexAttention            cannot run: has no backward pass on a CPU" in out and out.count("largest error of values and gradients") == len(bench.CASES)


def test_slow_peers_run_less_often(monkeypatch, tmp_path):
    """A peer whose run takes two of what is slow takes part in rounds 0 and 2 of three; another in all."""
    if not ops.choice()[1]:
        pytest.skip("no compiled operators here")
    once = bench.once
    monkeypatch.setattr(bench, "once", lambda f, *rest: (*((1.5, 0.5) if f.__name__ == "textbook" else (0.1, 0.1)), *once(f, *rest)[2:]))
    bench.main([*SMALL, "--only", "vocab", "--out", str(tmp_path / "bench.json")])
    runs = {row["peer"]: row.get("repeats") for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert runs["eager"] == 2 and runs["compiled"] == runs["reference"] == 3


def test_gate(monkeypatch, tmp_path):
    """A wrong operator is not timed."""
    right = bench.losses.vocab_kl_ce
    monkeypatch.setattr(bench.ops, "vocab_kl_ce", lambda *args: tuple(1.01 * x for x in right(*args)))
    with pytest.raises(UserError, match="vocab: the compiled operator's values are off by"):
        bench.main([*SMALL, "--only", "vocab", "--out", str(tmp_path / "bench.json")])
    assert not (tmp_path / "bench.json").exists()


def test_what_is_refused(tmp_path):
    for flags, message in ((["--only", "vocab,heads"], "no operator heads"), (["--slice", "1,2"], "seven sizes"), (["--slice", "1,2,3,4,5,6,x"], "seven sizes"),
                           (["--slice", "3,40,6,3,4,2,8", "--only", "align"], "B must be even"), (["--rows", "0"], "at least 1")):
        with pytest.raises(UserError, match=message):
            bench.main([*SMALL, "--out", str(tmp_path / "x.json"), *flags])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU here"):
            bench.main([*SMALL, "--device", "cuda"])


def test_probe(monkeypatch):
    monkeypatch.undo()
    machine = bench.probe(torch.device("cpu"), torch.float32)
    assert machine["copy_gb_s"] > 0.1 and machine["tflop_s"] > 0.001 and machine["empty_us"] > 0
