"""A checkpoint is complete and unchanged, or it is not used."""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crystal.runtime import checkpoint
from crystal.runtime.checkpoint import (
    CheckpointError,
    best,
    load,
    mark_best,
    newest,
    prune,
    save,
    step_dir,
    verify,
)

MANIFEST = "manifest.json"
STATE = {
    "step": 7,
    "seed": 3,
    "lr": 1e-4 / 3,
    "best": float("inf"),
    "epoch": [1, 2],
    "name": "é",
    "none": None,
}


def tensors():
    torch.manual_seed(0)
    shared = torch.randn(4, 6)
    return {
        "model.safetensors": {
            "bf16": torch.randn(3, 5).bfloat16(),
            "f64": torch.randn(2, dtype=torch.float64) / 3,
            "step": torch.tensor(7.0),
            "turned": shared.T,
            "tied": shared,
            "tied.too": shared,
            "rng": torch.get_rng_state(),
            "empty": torch.empty(0, 3),
            "nan": torch.tensor([float("nan"), -0.0]),
        },
        "optimizer.safetensors": {"count": torch.tensor([2**62 + 1])},
    }


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
        )
    )


def names(run_dir):
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def flip(path, at=-1):
    """Change one bit of the byte at `at`."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_round_trip_to_the_bit(tmp_path):
    def extra(directory):
        (directory / "adapter").mkdir()
        (directory / "adapter" / "adapter_model.safetensors").write_bytes(b"not ours to read")

    directory = save(tmp_path, 7, tensors(), STATE, extra)
    assert directory == step_dir(tmp_path, 7) and names(tmp_path) == ["step-7"] and verify(directory) == []
    files, state = load(directory)
    assert state == STATE and (directory / "adapter" / "adapter_model.safetensors").exists()
    assert files.keys() == tensors().keys()
    for name, wanted in tensors().items():
        assert files[name].keys() == wanted.keys()
        assert all(same_bits(files[name][key], wanted[key]) for key in wanted)


def test_what_lies_on_the_disk(tmp_path):
    """Safetensors and JSON that anybody can read, and a manifest with each other file's hash and size."""

    def extra(directory):
        (directory / "more").write_text("abc")

    tensors = {"w.safetensors": {"x": torch.tensor([1.0, 2.0])}}
    directory = save(tmp_path, 12, tensors, {"step": 12, "name": "é"}, extra)
    assert directory == tmp_path / "checkpoints" / "step-12"
    assert {path.name for path in directory.iterdir()} == {"w.safetensors", "state.json", "more", MANIFEST}
    assert json.loads((directory / "state.json").read_text()) == {"step": 12, "name": "é"}
    assert load_file(directory / "w.safetensors")["x"].tolist() == [1.0, 2.0]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["step"] == 12 and manifest["tensors"] == ["w.safetensors"]
    assert manifest["files"].keys() == {"w.safetensors", "state.json", "more"}
    for name, entry in manifest["files"].items():
        content = (directory / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180's example
    assert manifest["files"]["more"]["sha256"] == of_abc


def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_chosen(tmp_path):
    for step in (5, 90, 100):  # 90 and 100: by number, not by name
        save(tmp_path, step, tensors(), STATE)
    lines = []
    assert newest(tmp_path, lines.append) == step_dir(tmp_path, 100) and not lines
    flip(step_dir(tmp_path, 100) / "model.safetensors")
    assert newest(tmp_path, lines.append) == step_dir(tmp_path, 90)
    assert (
        len(lines) == 1
        and "step-100" in lines[0]
        and "model.safetensors was changed" in lines[0]
        and "\n" not in lines[0]
    )
    with pytest.raises(CheckpointError, match="step-100: model.safetensors was changed"):
        load(step_dir(tmp_path, 100))
    flip(step_dir(tmp_path, 90) / "state.json", 3)
    (step_dir(tmp_path, 5) / "manifest.json").unlink()
    assert (
        newest(tmp_path, lines.append) is None and len(lines) == 4 and "manifest.json is missing" in lines[3]
    )
    assert newest(tmp_path / "no such run") is None


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (
            lambda d: (d / "manifest.json").write_text('{"files": {"state.json": 3}, "tensors": []}'),
            "manifest.json is damaged",
        ),
        (
            lambda d: (d / "manifest.json").write_text('{"files": {}, "tensors": ["../x.safetensors"]}'),
            "manifest.json is damaged",
        ),
        (lambda d: (d / "state.json").unlink(), "state.json is missing"),
        (lambda d: (d / "stray.txt").write_text("x"), "stray.txt is not in the manifest"),
        (lambda d: os.truncate(d / "model.safetensors", 9), "model.safetensors has 9 bytes instead of"),
        (lambda d: flip(d / "optimizer.safetensors"), "optimizer.safetensors was changed"),
    ],
)
def test_every_damage_is_one_problem_that_names_the_file(tmp_path, damage, problem):
    directory = save(tmp_path, 1, tensors(), STATE)
    damage(directory)
    problems = verify(directory)
    assert len(problems) == 1 and problems[0].startswith(problem)
    with pytest.raises(CheckpointError, match="step-1: " + re.escape(problem)):
        load(directory)


@pytest.mark.parametrize("name", [".DS_Store", ".nfs000000000012", "deep/.gitkeep"])
def test_a_hidden_file_is_no_damage(tmp_path, name):
    """Desktops and network file systems leave such files wherever they have been."""
    directory = save(tmp_path, 1, tensors(), STATE)
    (directory / "deep").mkdir()
    (directory / name).write_text("x")
    assert verify(directory) == []
    assert newest(tmp_path) == directory
    assert load(directory)[1].items() >= STATE.items()


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="step-4: there is no such directory"):
        load(step_dir(tmp_path, 4))


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    def extra(directory):
        raise RuntimeError("adapter")

    save(tmp_path, 1, tensors(), STATE)
    for step in (1, 2):  # the same step again, and the next
        with pytest.raises(RuntimeError, match="adapter"):
            save(tmp_path, step, tensors(), STATE, extra)
        assert names(tmp_path) == ["step-1"] and newest(tmp_path) == step_dir(tmp_path, 1)


KILL = """
import os, sys, torch
from pathlib import Path
from crystal.runtime import checkpoint
for owner, name in ((checkpoint, "_sha256"), (checkpoint, "_sync"), (Path, "rename")):
    run_dir, real = Path(sys.argv[1]) / name, getattr(owner, name)
    checkpoint.save(run_dir, 1, {"w.safetensors": {"w": torch.ones(3)}}, {"step": 1})
    for step in (1, 2):
        for at in range(1, 12):
            pid = os.fork()
            if not pid:
                def deadly(*a, calls=[]):
                    calls.append(1)
                    return os._exit(9) if len(calls) == at else real(*a)
                setattr(owner, name, deadly)
                checkpoint.save(run_dir, step, {"w.safetensors": {"w": torch.full((3,), 2.0)}}, {"step": step})
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            broken = []
            good = checkpoint.newest(run_dir, broken.append)
            print(name, code, good and checkpoint.load(good)[1]["step"], len(broken))
            if code == 0:
                break
"""  # noqa: E501


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path):
    """Killed at the n-th hash, flush or rename, n = 1, 2, ... until it survives, while step 1 is replaced and
    while step 2 is new; the next save clears up.
    """
    run = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert run.returncode == 0, run.stderr
    # One rename more, which puts .old back.
    for name, kills in {"_sha256": 2 + 2, "_sync": 5 + 5, "rename": 3 + 1}.items():
        seen = [line.split()[1:] for line in run.stdout.splitlines() if line.split()[0] == name]
        assert [code for code, _, _ in seen].count("9") == kills and [code for code, _, _ in seen].count(
            "0"
        ) == 2
        assert all(step in ("1", "2") and broken == "0" for _, step, broken in seen)
        assert names(tmp_path / name) == ["step-1", "step-2"] and load(newest(tmp_path / name))[1] == {
            "step": 2
        }


def test_leftovers_are_ignored_and_cleaned(tmp_path):
    save(tmp_path, 1, tensors(), STATE)
    step_dir(tmp_path, 1).rename(tmp_path / "checkpoints" / "step-1.old")  # killed between the two renames
    (tmp_path / "checkpoints" / "step-9.tmp").mkdir()
    assert newest(tmp_path).name == "step-1.old"
    save(tmp_path, 2, tensors(), STATE)
    assert names(tmp_path) == ["step-1", "step-2"] and verify(step_dir(tmp_path, 1)) == []


def test_an_existing_step_is_replaced(tmp_path):
    save(tmp_path, 1, {"a.safetensors": {"x": torch.zeros(2)}}, {"try": 1})
    flip(step_dir(tmp_path, 1) / "a.safetensors")
    save(tmp_path, 1, {"b.safetensors": {"x": torch.ones(2)}}, {"try": 2})
    files, state = load(newest(tmp_path))
    assert state == {"try": 2} and list(files) == ["b.safetensors"] and names(tmp_path) == ["step-1"]


@pytest.mark.parametrize("limit", [100, 3000])  # bytes a file may grow to: state.json fails, the tensors fail
def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path, limit):
    save(tmp_path, 1, tensors(), STATE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError) as caught:
            save(tmp_path, 2, {"m.safetensors": {"x": torch.zeros(1000 if limit > 1000 else 1)}}, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (
        str(step_dir(tmp_path, 2)) in str(caught.value)
        and "File too large" in str(caught.value)
        and "\n" not in str(caught.value)
    )
    assert names(tmp_path) == ["step-1"] and newest(tmp_path) == step_dir(tmp_path, 1)


@pytest.mark.parametrize("state", [{"x": torch.ones(1)}, {"x": {1, 2}}, {"x": b"1"}, {("a", 1): 2}])
def test_state_is_json_only(tmp_path, state):
    with pytest.raises(CheckpointError, match="state.json of step 1"):
        save(tmp_path, 1, {}, state)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["model.bin", "../model.safetensors", "a/b.safetensors"])
def test_tensor_files_have_plain_names(tmp_path, name):
    with pytest.raises(CheckpointError, match="safetensors"):
        save(tmp_path, 1, {name: {}}, {})
    assert list(tmp_path.iterdir()) == []


def test_pickle_is_never_loaded():
    source = Path(checkpoint.__file__).read_text()
    assert "torch.load" not in source and "import pickle" not in source and "torch.save" not in source


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 10, 30, 9, 40):  # 9 after 30: the run went back
        save(tmp_path, step, {}, {"step": step})
        os.utime(step_dir(tmp_path, step) / "manifest.json", ns=(0, 1000 * len(names(tmp_path))))
    assert best(tmp_path) is None
    mark_best(tmp_path, 2, 0.5, "val/accuracy")
    mark_best(tmp_path, 10, 0.75, "val/accuracy")
    assert best(tmp_path) == {"step": 10, "value": 0.75, "metric": "val/accuracy"}
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, 0)
    assert prune(tmp_path, 5) == []
    assert sorted(prune(tmp_path, 2)) == [2, 30]
    assert names(tmp_path) == ["best.json", "step-10", "step-40", "step-9"]
    with pytest.raises(CheckpointError, match="step-2: does not exist"):
        mark_best(tmp_path, 2, 1, "val/accuracy")
    (tmp_path / "checkpoints" / "best.json").write_text("[]")
    with pytest.raises(CheckpointError, match="best.json"):
        prune(tmp_path, 1)
    assert len(names(tmp_path)) == 4


def test_prune_deletes_nothing_good_in_favour_of_something_broken(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, {}, {"step": step})
    flip(step_dir(tmp_path, 3) / "state.json")
    assert prune(tmp_path, 1) == [1]
    assert names(tmp_path) == ["step-2", "step-3"]
