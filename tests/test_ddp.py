"""Two or four processes that share a batch give the one-process losses and weights; the three ways to
start are one path.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_evaluate import tsv

from crystal import evaluate, train
from crystal.runtime import config

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = [str(ROOT / "crystal" / "train.py")]


def run(launcher, flags, **env):
    done = subprocess.run(
        [sys.executable, *launcher, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("method, world", [("crystal", 4), ("sft", 2), ("livr", 2), ("valr", 2)])
def test_several_processes_equal_one(model_dirs, records_file, tmp_path, method, world):
    flags = [
        "--method", method, "--model", str(model_dirs[True]), "--data", str(records_file),
        "--val_data", str(records_file), "--latents", "3", "--lora_r", "2", "--lora_dropout", "0",
        "--max_steps", "3", "--lr", "1e-2", "--dtype", "float64", "--device", "cpu", "--eval_every", "3",
    ]
    alone = flags + ["--batch_size", "4", "--output", str(tmp_path / "one")]
    if method == "sft":
        run(["-m", "crystal.train"], alone)
    else:
        train.main(alone)  # the same in a second, since nothing has to be imported
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", *SCRIPT]
    out = run(
        many,
        flags + ["--batch_size", "1", "--accumulation", str(4 // world), "--output", str(tmp_path / "many")],
    )
    assert out.count("trainable of") == 1 and f"{world} process(es)" in out  # one rank prints
    a, b = (
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("one", "many")
    )
    assert len(a) == len(b) == 4
    for x, y in zip(a, b):
        for name in x.keys() - {"tokens_per_s", "peak_memory_gb"}:
            assert x[name] == pytest.approx(y[name], rel=1e-6, abs=1e-9), name
    one, many = (
        load_file(tmp_path / n / "checkpoints" / "step-3" / "trainable.safetensors") for n in ("one", "many")
    )
    assert all(torch.allclose(one[n], many[n], rtol=0, atol=1e-6) for n in one)


FED_BACK = [
    "--method", "valr", "--encoders", "none", "--first_share", "0", "--latents", "2", "--tune", "lora",
]


@pytest.mark.parametrize(
    "method, how",
    [
        (["--method", "sft"], ["--shard", "none"]),
        (["--method", "sft", "--checkpointing"], ["--shard", "full"]),
        (FED_BACK, ["--shard", "none"]),
        (FED_BACK, ["--shard", "full"]),
    ],
)
def test_a_rank_without_pictures_takes_part_where_the_vision_part_trains(
    model_dirs, records_file, tmp_path, method, how
):
    """Two pictures among twelve records: at least one update of three has words alone on both ranks."""
    records = [json.loads(line) for line in records_file.read_text().splitlines()]
    asked = [f"Say {i}." for i in range(10)]
    words = [
        {"conversations": [{"from": "human", "value": x}, {"from": "gpt", "value": "red"}]} for x in asked
    ]
    data = records_file.with_name("mixed.jsonl")
    data.write_text("".join(json.dumps(r) + "\n" for r in [*records[:2], *words]))

    flags = [
        *method, "--model", str(model_dirs[True]), "--data", str(data), "--lora_r", "2",
        "--lora_on", "language,vision,merger", "--max_steps", "3", "--lr", "1e-2", "--dtype", "float64",
        "--device", "cpu", "--eval_every", "0",
    ]
    train.main([*flags, "--batch_size", "4", "--output", str(tmp_path / "one")])
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *SCRIPT]
    parts = ["--batch_size", "1", "--accumulation", "2", *how]
    run(many, [*flags, *parts, "--output", str(tmp_path / "two")])

    one, two = (
        load_file(tmp_path / n / "checkpoints" / "step-3" / "trainable.safetensors") for n in ("one", "two")
    )
    assert any("visual" in n for n in one)
    assert all(torch.allclose(one[n], two[n], rtol=0, atol=1e-6) for n in one)


def test_evaluation_is_shared_by_ranks(records_file, tmp_path):
    flags = [
        "--model", "tiny", "--data", str(records_file), "--max_new_tokens", "3", "--device", "cpu", "--out",
    ]
    evaluate.main(flags + [str(tmp_path / "one.jsonl")])
    run(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(ROOT / "crystal" / "evaluate.py"),
        ],
        flags + [str(tmp_path / "two.jsonl")],
    )
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()


def test_interventions_and_a_benchmark_are_shared_by_ranks(model_dirs, records_file, tmp_path):
    """--reliance: the same report of a run, picture aside; a TSV: the same predictions and scores."""
    flags = ["--device", "cpu", "--max_new_tokens", "3"]
    trained = tmp_path / "run"
    train.main(
        [
            "--model", str(model_dirs[True]), "--data", str(records_file), "--latents", "3", "--lora_r", "2",
            "--max_steps", "1", "--eval_every", "0", "--device", "cpu", "--dtype", "float64",
            "--output", str(trained),
        ]
    )
    many = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "crystal" / "evaluate.py"),
    ]
    for name, command in (("one", evaluate.main), ("two", lambda flags: run(many, flags))):
        command(
            [
                *flags, "--model", str(trained), "--data", str(records_file), "--reliance",
                "--out", str(tmp_path / name),
            ]
        )
        command(
            [
                *flags, "--model", "tiny", "--benchmark", str(tsv(tmp_path / "cats.tsv")),
                "--out", str(tmp_path / f"{name}.jsonl"),
            ]
        )
    one, two = (json.loads((tmp_path / name / "reliance.json").read_text()) for name in ("one", "two"))
    assert one["conditions"] == two["conditions"] and len(one["conditions"]) > 5
    assert (tmp_path / "one" / "reliance.txt").read_text() == (tmp_path / "two" / "reliance.txt").read_text()
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert (
        json.loads((tmp_path / "one.json").read_text())["scores"]
        == json.loads((tmp_path / "two.json").read_text())["scores"]
    )


MISTAKES = [
    (["--methd", "sft"], "--methd"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    (["--model", "./nowhere"], "nowhere: no such directory"),
    (["--model", "runs/nowhere"], "runs/nowhere: no such directory"),
    (["--device", "cuda:7"], "--device cuda:7"),
    (["--min_pixels", "x"], "--min_pixels"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_a_users_mistake_is_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--output", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as ended:
        config.run_cli(train.main)
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and len(told.splitlines()) == 1 and message in told


@pytest.mark.parametrize("flags, message", MISTAKES[1:2])
def test_a_users_mistake_ends_the_command_so_too(flags, message, tmp_path):
    done = subprocess.run(
        [sys.executable, *SCRIPT, "--output", str(tmp_path), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and message in done.stderr, (
        done.stderr
    )


@pytest.mark.parametrize(
    "flags, first, other",
    [
        (
            ["--model", "./nowhere"],
            "nowhere: no such directory",
            "the first process failed; its error is the one to read",
        ),
        (
            ["--model", "MODEL", "--data", "BROKEN", "--latents", "3"],
            "1.png: cannot identify",
            "1.png: cannot identify",
        ),
    ],
)
def test_a_users_mistake_is_one_line_on_every_rank(flags, first, other, model_dirs, records_file, tmp_path):
    """Two processes with the names torchrun sets, since torchrun has lines of its own to say."""
    shutil.copytree(records_file.parent, tmp_path / "broken")
    (tmp_path / "broken" / "1.png").write_text("no image")
    record = records_file.read_text().splitlines()[1]
    (tmp_path / "broken" / "train.jsonl").write_text(record + "\n" + record.replace("1_0.png", "1.png"))
    flags = [
        {"MODEL": str(model_dirs[True]), "BROKEN": str(tmp_path / "broken" / "train.jsonl")}.get(flag, flag)
        for flag in flags
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *SCRIPT, "--device", "cpu", "--output", str(tmp_path / "run"), *flags],
            cwd=ROOT,
            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        told = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, line, message in zip(ranks, told, (first, other)):
        assert rank.returncode == 2 and len(line.strip().splitlines()) == 1 and message in line, told
