"""A run's directory: what a resume may change, what is restored, what versions are told, where it may lie.

How it begins, is overwritten and goes on in a whole run, test_train.py says.
"""

import copy
import re
import resource
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crystal import run_directory, train
from crystal.methods.crystal import Settings as CrystalSettings
from crystal.methods.livr import Settings as LivrSettings
from crystal.runtime import checkpoint
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes


@pytest.mark.parametrize("name", ["file", "file/below/it"])
def test_output_must_be_a_directory(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        UserError, match=f"--output .*{name}: .*/file is not a directory that can be written to"
    ):
        train.main(["--output", str(tmp_path / name), "--max_steps", "1"])
    run_directory.check_writable(tmp_path / "not" / "yet" / "there")


def test_versions_and_memory_are_those_of_this_process():
    root = Path(train.__file__).parents[1]
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert run_directory.versions()["git"] == (git.stdout.strip() if git.returncode == 0 else None)
    before, told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, train.peak_memory(torch.device("cpu"))
    unit = 1 if sys.platform == "darwin" else 1024
    assert before * unit / 1e9 <= told <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# A resume may set these anew, and nothing else.
MAY_CHANGE = {
    "output", "batch_size", "accumulation", "device", "checkpointing", "compile", "shard", "workers",
    "on_bad_record",
    "eval_every", "eval_records", "save_every", "keep", "log_every", "resume", "overwrite", "tensorboard",
}


def another(value, choices):
    """A value that differs from this one."""
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else (value or 0) + 1


@pytest.fixture
def stored(tmp_path):
    """A checkpoint of two parameters by hand, after three updates -> what `restore` is given."""
    settings = CrystalSettings(batch_size=2, accumulation=3, output=str(tmp_path))
    saved = {"a": torch.full((2, 3), 0.5), "b": torch.full((4,), -2.0)}
    moments = {
        f"{name}.{key}": torch.full_like(value, number)
        for name, value in saved.items()
        for key, number in (("exp_avg", 0.25), ("exp_avg_sq", 4.0))
    }
    moments |= {f"{name}.step": torch.tensor(3.0) for name in saved}
    directory = checkpoint.save(
        tmp_path,
        3,
        {"trainable.safetensors": saved, "optimizer.safetensors": moments},
        {"step": 3, "settings": asdict(settings), "pairs": 12},
    )

    def restore(settings, world=2):
        named = [(name, torch.nn.Parameter(torch.zeros_like(value))) for name, value in saved.items()]
        optimizer, updates = torch.optim.AdamW([p for _, p in named]), []
        objective = SimpleNamespace(
            model=SimpleNamespace(after_update=lambda: updates.append(named[0][1].tolist()[0][0]))
        )
        step = run_directory.restore(directory, settings, objective, optimizer, named, Processes(world=world))
        return SimpleNamespace(step=step, named=dict(named), optimizer=optimizer, updates=updates)

    return SimpleNamespace(settings=settings, restore=restore)


def test_restored_by_value(stored):
    found = stored.restore(stored.settings)
    assert found.step == 3 and found.updates == [0.5]  # the vocabulary follows, once the rows are back
    assert torch.equal(found.named["a"], torch.full((2, 3), 0.5)) and torch.equal(
        found.named["b"], torch.full((4,), -2.0)
    )
    for p in found.named.values():
        state = found.optimizer.state[p]
        assert (
            float(state["step"]) == 3
            and bool((state["exp_avg"] == 0.25).all())
            and bool((state["exp_avg_sq"] == 4.0).all())
        )


@pytest.mark.parametrize("name", [f.name for f in fields(CrystalSettings)])
def test_each_setting_is_kept_by_a_resume_or_may_change(stored, name):
    field = next(f for f in fields(CrystalSettings) if f.name == name)
    now = copy.copy(stored.settings)
    # Also what no command line gives.
    object.__setattr__(now, name, another(getattr(now, name), field.metadata["choices"]))
    if name == "max_steps":  # more of them go on, fewer do not
        now = replace(now, max_steps=4)
    if name in ("batch_size", "accumulation"):  # the pairs of an update stay
        now = replace(now, batch_size=3, accumulation=2)
    if name in MAY_CHANGE:
        assert stored.restore(now).step == 3
    else:
        with pytest.raises(UserError, match=f"was made with --{name} .*; a resume keeps it"):
            stored.restore(now)


def test_a_longer_run_goes_on_and_says_so(stored, capsys):
    """CrystaL has one stage, so what was done is the beginning of any longer run."""
    assert stored.restore(stored.settings).step == 3 and capsys.readouterr().out == ""
    assert stored.restore(replace(stored.settings, max_steps=6000)).step == 3
    assert "--max_steps was 4000 and is 6000: after update 3 learning rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "updates, step, longer",
    [
        (200, 20, True), (200, 40, True), (200, 41, False), (200, 100, False),
        (90, 20, False), (100, 20, False),
    ],
)
def test_a_stage_that_has_begun_begins_where_it_did(updates, step, longer):
    """LIVR's first stage is 40 % of its run: updates 0 to 39 of a hundred, 0 to 79 of two hundred."""
    now = LivrSettings(max_steps=updates)
    assert checkpoint.is_longer(LivrSettings(max_steps=100), now, step) == longer
    if updates > 100 and not longer:
        said = checkpoint.made_with("d", "max_steps", 100, updates)
        assert said.endswith("a resume keeps it, because a stage that has begun would begin elsewhere")


@pytest.mark.parametrize(
    "batch, accumulation, world, pairs",
    [(2, 3, 2, 12), (1, 3, 4, 12), (12, 1, 1, 12), (2, 3, 1, 6), (2, 2, 2, 8), (1, 3, 2, 6)],
)
def test_a_resume_keeps_the_pairs_of_an_update(stored, batch, accumulation, world, pairs):
    now = replace(stored.settings, batch_size=batch, accumulation=accumulation)
    assert checkpoint.pairs(now, Processes(world=world)) == pairs
    if pairs == 12:
        assert stored.restore(now, world).step == 3
    else:
        with pytest.raises(UserError, match=f"an update had 12 pairs, not {pairs}"):
            stored.restore(now, world)


def test_a_log_without_its_last_line(tmp_path):
    (tmp_path / "log").write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3')
    assert run_directory.logged_lines(tmp_path / "log") == [{"step": 1}, {"step": 2}]


def test_a_run_has_one_owner(tmp_path):
    """Another process holds the lock: one line. When it is gone, the next has it, and leaves no file."""
    assert run_directory.lock(tmp_path / "none", Processes()) is None
    other = subprocess.Popen(
        [
            sys.executable, "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX);"
            "print('held', flush=True); sys.stdin.read()",
            str(tmp_path / ".lock"),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: another process trains here"):
        run_directory.lock(tmp_path, Processes())
    other.communicate("")
    run_directory.unlock(tmp_path, run_directory.lock(tmp_path, Processes()))
    run_directory.unlock(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["{oops", "[1]", '{"loss": 1.0}', '{"step": "one"}'])
def test_a_damaged_line_of_the_log_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 2}\n{"ste')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: no line of a log"):
        run_directory.logged_lines(tmp_path / "metrics.jsonl")


def test_what_counts_as_a_run(tmp_path):
    """A checkpoint, also one that is being replaced, and a log that outlived its checkpoints; neither the log
    of a run that was killed before its first save nor a save that was cut off.
    """
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n')
    assert run_directory.holds_a_run(tmp_path)  # whose it is cannot be told
    (tmp_path / "config.json").write_text('{"save_every": 3, "max_steps": 9}')
    assert not run_directory.holds_a_run(tmp_path)
    (tmp_path / "config.json").write_text('{"save_every": 3, "max_steps": 2}')
    assert run_directory.holds_a_run(tmp_path)
    log.unlink()
    assert not run_directory.holds_a_run(tmp_path)
    (tmp_path / "checkpoints" / "step-5.tmp").mkdir(parents=True)
    assert not run_directory.holds_a_run(tmp_path)
    (tmp_path / "checkpoints" / "step-5.old").mkdir()
    assert run_directory.holds_a_run(tmp_path)
