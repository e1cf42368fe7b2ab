"""soak.py: what it calls a difference, by hand; what its flags choose; and a soak of seconds."""

import json

import pytest
import torch
from safetensors.torch import save_file

from data_prep.checks import soak as soak_check


def run_at(path, weight=1.0, lines=(), bad=()):
    """A run directory of what is compared: the checkpoint of update 4, the log, the broken records."""
    (path / "checkpoints" / "step-4").mkdir(parents=True)
    tensors = {"a": torch.ones(3), "b": torch.full((2,), weight)}
    save_file(tensors, path / "checkpoints" / "step-4" / "trainable.safetensors")
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if bad:
        (path / "bad_records.jsonl").write_text("".join(f"{line}\n" for line in bad))
    return path


def line(step, loss=2.5, speed=1.0):
    return json.dumps({"step": step, "loss": loss, "tokens_per_s": speed, "peak_memory_gb": speed})


def test_what_is_a_difference(tmp_path):
    clean = run_at(tmp_path / "clean", lines=[line(1), line(2)], bad=["x"])
    compared = lambda name, **how: soak_check.differences(run_at(tmp_path / name, **how), clean, 4)
    whole = {"lines": [line(1), line(2)], "bad": ["x"]}
    # Times, and a record that was met again after a kill, are none.
    assert compared("same", lines=[line(1, speed=9.0), line(2)], bad=["x", "x"]) == []
    # The smallest change of a weight is.
    assert compared("weight", weight=1.0 + 2**-23, **whole) == ["weights: 1 of 2 differ"]
    for name, lines, words in (
        ("lost", [line(1)], "log: 1 lines missing, 0 of its own"),
        ("other", [line(1), line(2, loss=2.6)], "log: 1 lines missing, 1 of its own"),
        ("cut", [line(1), line(2)[:9]], "log: 1 lines missing, 1 of its own"),
        ("twice", [line(1), line(2), line(2)], "log: 0 lines missing, 0 of its own"),
        ("order", [line(2), line(1)], "log: 0 lines missing, 0 of its own"),
    ):
        (found,) = compared(name, lines=lines, bad=["x"])
        assert found.startswith(words)
    assert compared("bad", lines=whole["lines"]) == ["bad_records.jsonl: 0 records, 1 in the clean run"]


def test_the_flags_choose_rounds(tmp_path, monkeypatch, capsys):
    told, now = [], [0.0]

    def soak(work, seed, steps, faults, more):
        told.append((work, seed, steps, faults))
        now[0] += 50.0
        return (["log: 1 lines missing"] if seed == 8 else []), [300.0 + seed, 200.0]

    monkeypatch.setattr(soak_check, "soak", soak)
    monkeypatch.setattr(soak_check.time, "monotonic", lambda: now[0])
    flags = ["--minutes", "2", "--steps", "33", "--faults", "5", "--seed", "7", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        soak_check.main(flags)
    assert ended.value.code == 1
    assert told == [(tmp_path / f"round-{seed}", seed, 33, 5) for seed in (7, 8, 9)]
    out = capsys.readouterr().out
    assert "round 7: 1 processes, memory 200 to 307 MB: equal" in out
    assert out.endswith("1 of 3 rounds failed; memory 307 MB first, 309 last\n")


def test_a_soak_of_seconds(model_dirs, tmp_path):
    """Killed once: the end is the undisturbed run's."""
    more = (
        "--model", str(model_dirs[True]), "--eval_every", "0", "--save_every", "2", "--latents", "2",
        "--lora_r", "2",
    )
    wrong, memory = soak_check.soak(tmp_path, 1, 6, 1, more, kinds=("kill",))
    assert wrong == [] and min(memory) > 10  # MB, sampled while it ran
