"""What a machine can do, by hand and at all."""

import pytest
import torch

from crystal.runtime import machine


def test_probe():
    found = machine.probe(torch.device("cpu"), torch.float32)
    assert found["copy_gb_s"] > 0.1 and found["tflop_s"] > 0.001 and found["empty_us"] > 0


def test_the_machine_by_hand(monkeypatch):
    """A copy of 2^27 bytes reads and writes them in half a second; 1024^3 products of two in a quarter, of
    the faster dtype; a call in a microsecond.
    """
    asked, seconds = [], iter([0.5, 0.5, 0.25, 1e-6])

    def best(f, device, runs=10):
        asked.append(runs)
        return next(seconds)

    monkeypatch.setattr(machine, "best", best)
    found = machine.probe(torch.device("cpu"), torch.bfloat16)
    assert found["copy_gb_s"] == pytest.approx(2 * 2**27 / 0.5 / 1e9) and found[
        "tflop_s"
    ] == pytest.approx(2 * 1024**3 / 0.25 / 1e12)
    assert (
        found["empty_us"] == pytest.approx(1.0)
        and asked == [10, 10, 10, 100]
        and found["threads"] == torch.get_num_threads()
    )


def test_the_best_of_ten_counts(monkeypatch):
    times = iter([3.0, 2.0, 5.0])
    monkeypatch.setattr(machine, "clock", lambda f, device: (next(times), f()))
    assert machine.best(lambda: None, torch.device("cpu"), 3) == 2.0
