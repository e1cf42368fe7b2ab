"""Two or four processes that share a batch give the one-process losses and weights; the three ways to start are one path."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = [str(ROOT / "crystal" / "train.py")]


def run(launcher, flags, **env):
    done = subprocess.run([sys.executable, *launcher, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("method, world", [("crystal", 4), ("sft", 2), ("livr", 2), ("valr", 2)])
def test_several_processes_equal_one(model_dirs, records_file, tmp_path, method, world):
    flags = ["--method", method, "--model", str(model_dirs[True]), "--data", str(records_file), "--val_data", str(records_file), "--latents", "3", "--lora_r", "2",
             "--lora_dropout", "0", "--max_steps", "3", "--lr", "1e-2", "--dtype", "float64", "--device", "cpu", "--eval_every", "3"]
    one = ["-m", "crystal.train"] if method == "sft" else SCRIPT
    run(one, flags + ["--batch_size", "4", "--output", str(tmp_path / "one")])
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", *SCRIPT]
    out = run(many, flags + ["--batch_size", "1", "--accumulation", str(4 // world), "--output", str(tmp_path / "many")])
    assert out.count("trainable of") == 1 and f"{world} process(es)" in out  # one rank prints
    a, b = ([json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "many"))
    assert len(a) == len(b) == 4
    for x, y in zip(a, b):
        for name in x.keys() - {"tokens_per_s", "peak_memory_gb"}:
            assert x[name] == pytest.approx(y[name], rel=1e-6, abs=1e-9), name
    one, many = (load_file(tmp_path / n / "checkpoints" / "step-3" / "trainable.safetensors") for n in ("one", "many"))
    assert all(torch.allclose(one[n], many[n], rtol=0, atol=1e-6) for n in one)


def test_evaluation_is_shared_by_ranks(records_file, tmp_path):
    flags = ["--model", "tiny", "--data", str(records_file), "--max_new_tokens", "3", "--device", "cpu", "--out"]
    run([str(ROOT / "crystal" / "evaluate.py")], flags + [str(tmp_path / "one.jsonl")])
    run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "crystal" / "evaluate.py")], flags + [str(tmp_path / "two.jsonl")])
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()


@pytest.mark.parametrize("flags, message", [
    (["--methd", "sft"], "--methd"), (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"), (["--model", "./nowhere"], "nowhere: no such directory"), (["--model", "runs/nowhere"], "runs/nowhere: no such directory"),
    (["--device", "cuda:7"], "--device cuda:7"), (["--min_pixels", "x"], "--min_pixels")])
def test_a_users_mistake_is_one_line_and_exit_code_2(flags, message, tmp_path):
    done = subprocess.run([sys.executable, *SCRIPT, "--output", str(tmp_path), *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and message in done.stderr, done.stderr
