"""bench.py at small sizes: every row measured or its reason told, the gate in front of it, the
line of a mistake.

Right values: times from a clock that is told what to say, bytes and products counted by hand.
"""

import json

import pytest
import torch

from crystal import bench, bench_cases
from crystal.runtime import machine, ops
from crystal.runtime.config import UserError

SMALL = [
    "--device", "cpu", "--rows", "3", "--vocab", "500", "--slice", "2,40,6,3,4,2,8", "--repeats", "3",
    "--no-compile",
]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """The probe's own gigabytes are not what is tested here."""
    monkeypatch.setattr(
        bench,
        "probe",
        lambda *_: {"name": "a test's", "threads": 1, "copy_gb_s": 10.0, "tflop_s": 0.1, "empty_us": 1.0},
    )


def test_rows(tmp_path, capsys):
    if not ops.choice()[1]:
        pytest.skip("no compiled operators here")
    bench.main(
        [
            *SMALL,
            "--dtype",
            "float32",
            "--only",
            ",".join(bench.CASES),
            "--out",
            str(tmp_path / "a" / "bench.json"),
        ]
    )
    rows = json.loads((tmp_path / "a" / "bench.json").read_text())["rows"]
    table = {(row["operator"], row["peer"]): row for row in rows}
    for operator in bench.CASES:
        for peer in ("compiled", "eager"):
            row = table[operator, peer]
            assert (
                row["forward_ms"] > 0
                and row["backward_ms"] > 0
                and row["repeats"] == 3
                and row["peak_bytes"] > 0
                and min(row["floor_ms"]) > 0
            )
            assert row["forward_quartiles"][0] <= row["forward_ms"] <= row["forward_quartiles"][1]
        assert table[operator, "compiled"]["times_ours"] == 1
        assert (
            operator == "layer" or table[operator, "torch.compile"]["cannot_run"] == "left out (--no-compile)"
        )
    assert (
        "cannot_run" in table["slice", "FlexAttention"]
        and table["slice", "one-hot values"]["times_ours"] > 0
        and table["layer", "the layer alone"]["times_ours"] > 0
    )
    # What is kept: of the logits' size in plain PyTorch, of the rows' in ours.
    assert (
        table["vocab", "eager"]["kept_bytes"] >= 2 * 3 * 500 * 4
        and table["vocab", "compiled"]["kept_bytes"] < 1000
    )
    assert table["vocab", "compiled"]["floor_ms"] == [2 * 3 * 500 * 4 / 10e6, 4 * 3 * 500 * 4 / 10e6]
    out = capsys.readouterr().out
    assert "FlexAttention            cannot run: has no backward pass on a CPU" in out and out.count(
        "largest error of values and gradients"
    ) == len(bench.CASES)


def test_slow_peers_run_less_often(monkeypatch, tmp_path):
    """A peer whose run takes two of what is slow takes part in rounds 0 and 2 of three; another in all."""
    if not ops.choice()[1]:
        pytest.skip("no compiled operators here")
    once = bench.once
    monkeypatch.setattr(
        bench,
        "once",
        lambda f, *rest: (*((1.5, 0.5) if f.__name__ == "textbook" else (0.1, 0.1)), *once(f, *rest)[2:]),
    )
    bench.main([*SMALL, "--only", "vocab", "--out", str(tmp_path / "bench.json")])
    runs = {
        row["peer"]: row.get("repeats") for row in json.loads((tmp_path / "bench.json").read_text())["rows"]
    }
    assert runs["eager"] == 2 and runs["compiled"] == runs["reference"] == 3


def test_gate(monkeypatch, tmp_path):
    """A wrong operator is not timed."""
    right = bench_cases.losses.vocab_kl_ce
    monkeypatch.setattr(bench.ops, "vocab_kl_ce", lambda *args: tuple(1.01 * x for x in right(*args)))
    with pytest.raises(UserError, match="vocab: the compiled operator's values are off by"):
        bench.main([*SMALL, "--only", "vocab", "--out", str(tmp_path / "bench.json")])
    assert not (tmp_path / "bench.json").exists()


def test_what_is_refused(tmp_path):
    for flags, message in (
        (["--only", "vocab,heads"], "no operator heads"),
        (["--slice", "1,2"], "seven sizes"),
        (["--slice", "1,2,3,4,5,6,x"], "seven sizes"),
        (["--slice", "3,40,6,3,4,2,8", "--only", "align"], "B must be even"),
        (["--rows", "0"], "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            bench.main([*SMALL, "--out", str(tmp_path / "x.json"), *flags])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU here"):
            bench.main([*SMALL, "--device", "cuda"])


MACHINE = {"copy_gb_s": 2.0, "tflop_s": 0.5}


def test_a_row_by_hand(monkeypatch, capsys):
    """Medians and quartiles of five runs, the floor as the larger bound of each pass, shares
    and ratios from them.
    """
    x = torch.ones(4, requires_grad=True)
    peers = {
        "compiled": lambda x: (2 * x,),
        "eager": lambda x: (x + x,),
        "other": "not installed",
        "broken": lambda x: 1 / 0,
    }
    ours, plain, once = peers["compiled"], peers["eager"], bench.once
    ticks = {
        ours: iter([(0.002, 0.004)] * 2 + [(t, 0.004) for t in (0.001, 0.004, 0.002, 0.003, 0.1)]),
        plain: iter([(0.006, 0.006)] * 99),
    }

    def timed(f, leaves, device):
        out = once(f, leaves, device)
        return out if leaves[0].dtype == torch.float64 else (*next(ticks[f]), *out[2:])

    monkeypatch.setattr(bench, "once", timed)
    # 4 MB at 2 GB/s are 2 ms, 5e8 products at 0.5 TFLOP/s 1 ms; backward 1 ms and 3 ms.
    rows = bench.measure(
        "mine", "a title", [x], peers, ((4e6, 5e8), (2e6, 1.5e9)), MACHINE, 5, torch.device("cpu")
    )
    assert [row["peer"] for row in rows] == ["compiled", "eager", "other", "broken"]
    assert (
        rows[2] == {"operator": "mine", "case": "a title", "peer": "other", "cannot_run": "not installed"}
        and rows[3]["cannot_run"] == "ZeroDivisionError: division by zero"
    )
    first, second = rows[:2]
    assert (first["forward_ms"], first["backward_ms"], first["repeats"]) == (
        pytest.approx(3.0), pytest.approx(4.0), 5,
    )
    assert first["forward_quartiles"] == pytest.approx([1.5, 52.0]) and first[
        "backward_quartiles"
    ] == pytest.approx([4.0, 4.0])
    assert first["floor_ms"] == second["floor_ms"] == pytest.approx([2.0, 3.0])
    assert (first["share_of_floor"], first["times_ours"]) == (pytest.approx(5 / 7), 1.0)
    assert (second["forward_ms"], second["share_of_floor"], second["times_ours"]) == (
        pytest.approx(6.0), pytest.approx(5 / 12), pytest.approx(12 / 7),
    )
    out = capsys.readouterr().out
    assert "3.000 (1.500 to 52.000)" in out and "71%    1.00" in out and "42%    1.71" in out
    assert (
        "  other                    cannot run: not installed" in out
        and "broken                   cannot run: ZeroDivisionError: division by zero" in out
    )


@pytest.mark.parametrize("values, gradients, fine", [(2.0, 3.0, True), (2.2, 1.0, False), (1.0, 3.2, False)])
def test_the_gate_is_at_two_and_three_times(values, gradients, fine):
    """Errors of ours in multiples of plain PyTorch's own, far above what rounding alone makes."""
    x = [torch.ones(3, requires_grad=True)]

    def off(by, slope):
        return ([torch.full((3,), 2.0 + 0.01 * by)], [torch.full((3,), 2.0 + 0.01 * slope)])

    able = {"compiled": (None, *off(values, gradients)), "eager": (None, *off(1.0, 1.0))}
    exact = [x[0].detach().double().requires_grad_()]
    if fine:
        bench.gate("mine", able, exact, lambda x: (2 * x,), torch.device("cpu"))
        return
    what = "values" if values > 2 else "gradients"
    with pytest.raises(
        UserError, match=f"mine: the compiled operator's {what} are off by .*; nothing is timed"
    ):
        bench.gate("mine", able, exact, lambda x: (2 * x,), torch.device("cpu"))


def test_bytes_kept_and_held_at_once():
    """exp keeps its result and no input; x * x keeps x alone, which is the leaf's own. At the peak an
    operator holds result, gradient and its ones.
    """
    x = [torch.ones(1 << 18, requires_grad=True)]
    size = 4 << 18
    assert bench.kept_bytes(lambda x: (x.exp(),), x) == size and bench.kept_bytes(lambda x: (x * x,), x) == 0
    assert bench.kept_bytes(lambda x: (x.exp().exp(),), x) == 2 * size
    # exp of exp: two results, the ones, and the gradient of each exp, the first still held while
    # the second is formed.
    simple, deeper = (
        bench.peak_bytes(lambda x: (x.exp(),), x, torch.device("cpu")),
        bench.peak_bytes(lambda x: (x.exp().exp(),), x, torch.device("cpu")),
    )
    assert simple == pytest.approx(3 * size, rel=0.02) and deeper == pytest.approx(5 * size, rel=0.02)


def test_an_operator_runs_forward_and_backward(monkeypatch):
    """The clock's two times, the outputs, and the gradients of the outputs' sums."""
    now = iter([1.0, 1.25, 2.0, 2.5])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(now))
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 5.0], requires_grad=True)
    forward, backward, outputs, grads = bench.once(lambda x, y: (x * y, x.sum()), [x, y], torch.device("cpu"))
    assert (
        (forward, backward) == (0.25, 0.5)
        and [o.tolist() for o in outputs] == [[3.0, 10.0], 3.0]
        and not outputs[0].requires_grad
    )
    assert [g.tolist() for g in grads] == [[4.0, 6.0], [1.0, 2.0]]
