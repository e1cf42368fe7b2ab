"""Runs whose model lies in shards are the runs of one process: losses, norms, weights, moments, validation.

In float64 numbers agree to 1e-6, as with DDP (norms and angles of transformers are float32's), whatever the
method, the way of sharing latents, what trains and whether activations are recomputed. What a sharded run
leaves on the disk is what any other run leaves: it resumes on another number of processes, is evaluated and
exported.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crystal import evaluate, export, train
from crystal.runtime import checkpoint, shard
from crystal.runtime.config import UserError

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "kv": ["--method", "crystal"],
    "hidden": ["--method", "crystal", "--latent_copy", "hidden", "--tune", "full", "--checkpointing"],
    "packed": ["--method", "crystal", "--latent_copy", "packed", "--checkpointing"],
    "released": ["--method", "released"],
    "livr": ["--method", "livr"],
    "lavit": ["--method", "lavit", "--w_gaze", "0", "--w_semantics", "0"],
    "valr": ["--method", "valr", "--encoders", "tiny"],
}
STEPS = 4


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Eight records with thoughts of one to three steps: VaLR cuts them into different numbers of pieces."""
    folder, g = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    lines = []
    for i in range(8):
        size = (84, 112, 3) if i % 2 else (56, 56, 3)
        Image.fromarray(g.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        talk = [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": ("red", "blue star", "3")[i % 3]},
        ]
        record = {"id": str(i), "image": f"{i}.png", "cot": ["one red"] * (1 + i % 3), "conversations": talk}
        lines.append(json.dumps(record))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def runs(model_dirs, records, tmp_path_factory):
    """Every case by one process and by two with shards, and what goes on from another's checkpoint."""
    root = tmp_path_factory.mktemp("runs")

    def flags(case, run, *more):
        return [
            *case, "--model", str(model_dirs[False]), "--data", str(records), "--val_data", str(records),
            "--latents", "3", "--lora_dropout", "0", "--max_steps", str(STEPS), "--lr", "1e-2", "--device",
            "cpu", "--dtype", "float64", "--eval_every", "3", "--save_every", "2", "--keep", "9", "--output",
            str(root / run), *more,
        ]  # fmt: skip

    one, cut = ["--batch_size", "6"], ["--batch_size", "1", "--shard", "full"]
    two, three = [*cut, "--accumulation", "3"], [*cut, "--accumulation", "2", "--resume"]
    for name, case in CASES.items():
        train.main(flags(case, f"{name}-1", *one))
    commands = [flags(case, f"{name}-2", *two) for name, case in CASES.items()]

    # One process's second update, gone on with by two.
    halved(root / "hidden-1", root / "one-to-two")
    commands.append(flags(CASES["hidden"], "one-to-two", *two, "--resume"))

    # bfloat16, with updates that its eight bits would lose.
    low = ["--method", "sft", "--tune", "full"]
    small = ["--dtype", "bfloat16", "--lr", "1e-6", "--weight_decay", "0", "--eval_every", "0"]
    low_flags = [flag for flag in flags(low, "bfloat16-2", *two, *small)]
    at = low_flags.index("--latents")
    del low_flags[at : at + 2]
    commands.append(low_flags)
    several(2, commands, root)

    # What two have saved, gone on with by one and by three, among whom no matrix is cut evenly.
    halved(root / "hidden-2", root / "two-to-one")
    train.main(flags(CASES["hidden"], "two-to-one", *one, "--resume"))
    halved(root / "kv-2", root / "two-to-three")
    several(3, [flags(CASES["kv"], "two-to-three", *three)], root)
    return root


def several(processes, commands, root):
    """Runs of train.py one after the other in so many processes.

    Two are two machines: two agents of torchrun, which meet at an address. More are one machine's.
    """
    (root / "flags.json").write_text(json.dumps(commands))
    where, agents = ["--standalone", f"--nproc_per_node={processes}"], 1
    if processes == 2:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = f"127.0.0.1:{free.getsockname()[1]}"
        where = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={meeting}"]
        agents = 2

    launcher = [sys.executable, "-m", "torch.distributed.run", *where]
    program = [*launcher, str(ROOT / "tests" / "sharded.py"), str(root / "flags.json")]
    how = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(program, stdout=subprocess.DEVNULL, **how) for _ in range(agents)]
    try:
        told = [agent.communicate(timeout=400)[1] for agent in started]
    finally:
        for agent in started:
            agent.kill()
    assert [agent.returncode for agent in started] == [0] * agents, told[0][-3000:]


def halved(run, copy):
    """A copy of a run that was ended after its second update."""
    shutil.copytree(run, copy)
    for step in ("step-3", "step-4"):
        shutil.rmtree(copy / "checkpoints" / step, ignore_errors=True)
    (copy / "checkpoints" / "best.json").unlink(missing_ok=True)


def same(runs, a, b):
    """Asserts that two runs are one: every line that they logged, and all that they saved at the end."""
    logs = []
    for run in (a, b):
        lines = [json.loads(line) for line in (runs / run / "metrics.jsonl").read_text().splitlines()]
        unequal = ("tokens_per_s", "peak_memory_gb")
        logs.append([{k: x for k, x in line.items() if k not in unequal} for line in lines])
    assert len(logs[0]) == len(logs[1]) > STEPS
    for ours, theirs in zip(*logs):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)

    for file in ("trainable", "optimizer"):
        path = f"checkpoints/step-{STEPS}/{file}.safetensors"
        ours, theirs = (load_file(runs / run / path) for run in (a, b))
        assert ours.keys() == theirs.keys() and len(ours) > 5
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
            assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_shards_are_one(runs, case):
    same(runs, f"{case}-1", f"{case}-2")


def test_a_run_goes_on_with_another_number_of_processes(runs):
    """Saved by one, two, two; gone on with by two, one, three."""
    same(runs, "hidden-1", "one-to-two")
    same(runs, "hidden-1", "two-to-one")
    same(runs, "kv-1", "two-to-three")


def test_updates_are_made_in_float32(runs, model_dirs):
    """Four updates of 1e-6 and less move the saved weights, most of them, which bfloat16 would not hold."""
    saved = load_file(runs / "bfloat16-2" / "checkpoints" / f"step-{STEPS}" / "trainable.safetensors")
    base = load_file(model_dirs[False] / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    ours = saved[f"model.hf.{name}"]
    moved = (ours - base[name].bfloat16().float()).abs()
    assert ours.dtype == torch.float32 and 0 < float(moved.max()) < 4e-6
    assert (moved > 1e-7).float().mean() > 0.5 and not torch.equal(ours, ours.bfloat16().float())


def test_what_a_sharded_run_leaves_opens_as_any(runs, records, tmp_path, capsys):
    """Verified, asked, looked into, exported; with the answers of the run of one process."""
    for run in ("kv-1", "kv-2"):
        assert checkpoint.verify(runs / run / "checkpoints" / f"step-{STEPS}") == []
        asked = ["--model", str(runs / run), "--data", str(records), "--device", "cpu"]
        asked += ["--max_new_tokens", "3"]
        evaluate.main([*asked, "--limit", "3", "--out", str(tmp_path / f"{run}.jsonl")])
        evaluate.main([*asked, "--limit", "2", "--reliance", "--out", str(tmp_path / run)])
        export.main(["--run", str(runs / run), "--out", str(tmp_path / run)])
    one, two = ((tmp_path / f"kv-{n}.jsonl").read_text() for n in (1, 2))
    assert one == two and one.count("\n") == 3
    one, two = (json.loads((tmp_path / f"kv-{n}" / "reliance.json").read_text()) for n in (1, 2))
    assert one["conditions"] == two["conditions"]
    one, two = (load_file(tmp_path / f"kv-{n}" / "merged" / "model.safetensors") for n in (1, 2))
    assert all(torch.allclose(x, two[name], atol=1e-6) for name, x in one.items())


# --- the pieces ---


def test_a_method_that_repeats_has_to_say_so():
    """Its pieces would be gathered out of step, and the run would hang."""

    class Twice(torch.nn.Module):
        def forward(self):
            whole.rounds += 2
            return {"ce": torch.zeros((), requires_grad=True)}

    whole = shard.Sharded(Twice(), repeats=False)
    with pytest.raises(UserError, match="repeats = True"):
        whole()
    whole.repeats = True
    assert set(whole()) == {"ce", "anchor"}


def test_files_are_written_tensor_by_tensor(tmp_path):
    """As safetensors reads them: every type, a number, nothing at all; padded to eight bytes."""
    g = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(3, 5, generator=g).T, "step": torch.tensor(7.0), "none": torch.empty(0, 4)}
    for i, kind in enumerate(shard.KINDS):
        tensors[f"kind {i} é"] = torch.tensor([0, 1, 1]).to(kind)
    shard.write(tmp_path / "x.safetensors", tensors, iter(tensors.values()))
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], x) and read[name].dtype == x.dtype for name, x in tensors.items())
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_a_full_disk_leaves_no_process_waiting(monkeypatch, tmp_path):
    """What the first process could not write is gathered all the same, as the others do."""
    files = {"a.safetensors": {"x": torch.ones(2), "y": torch.ones(3)}, "b.safetensors": {"z": torch.ones(4)}}
    taken = []
    monkeypatch.setattr(shard, "full", lambda tensor: taken.append(len(tensor)) or tensor)
    monkeypatch.setattr(shard, "DTensor", torch.Tensor)
    first = SimpleNamespace(is_first=True)
    with pytest.raises(OSError, match="nowhere"), shard.collected(files, first) as whole:
        whole["a.safetensors"](tmp_path / "nowhere" / "a.safetensors")
    assert taken == [2, 3, 4]

    taken.clear()
    with shard.collected(files, first) as whole:
        for name, write in whole.items():
            write(tmp_path / name)
    assert taken == [2, 3, 4] and load_file(tmp_path / "b.safetensors")["z"].tolist() == [1] * 4


def test_what_is_whole_stays_as_it_is():
    files = {"a.safetensors": {"x": torch.ones(2)}}
    with shard.collected(files, None) as whole:
        assert whole is files
    x = torch.ones(3, dtype=torch.float64)
    assert shard.full(x) is x and torch.equal(shard.like(torch.zeros(3), x), x)
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([3.0, 4.0])
    assert float(shard.clip([p], 1.0)) == 5 and torch.allclose(p.grad, torch.tensor([0.6, 0.8]))


def test_layers_of_every_family_are_found(model_dirs, family_dirs):
    """Decoder and tower, each layer once; what stands in a list inside a layer belongs to it."""
    import crystal.backbone.model

    for directory in (model_dirs[True], family_dirs("qwen3_vl", True), family_dirs("llava_onevision", True)):
        model = crystal.backbone.model.load(str(directory), weights=False)
        found = shard.stacked(model.hf)
        assert set(model.layers) <= set(found) and len(found) == len(set(found))
        inside = [p for layer in found for p in layer.parameters()]
        assert len(inside) == len(set(inside)) and len(found) > len(model.layers)
