"""Save, verify, resume: a checkpoint is complete and unchanged, or it is not used.

`checkpoints/step-N/` holds safetensors files, `state.json`, whatever `extra` wrote, and `manifest.json` with
the SHA-256 and size of each file. It is written as `step-N.tmp`, flushed to the disk, and renamed: a kill at
any moment leaves the checkpoint before it. The manifest is there because safetensors loads a flipped payload
byte without a word. `checkpoints/best.json` names the best step. Only tensors and JSON are read back; pickle
never. One process calls save, mark_best and prune; any number may read.

A resume is exact: a run that was killed and resumed ends as if it had not stopped, to the bit on the
same processes and machine.
    what is saved     what trains, AdamW's moments and step counters, the settings, the update's number, and
                      how many pairs an update has (`contents`)
    what is not       everything that follows from seed and update: the order of the records and what is drawn
                      for each (sampling.py), dropout's seed and the learning rate (train.py). The loader
                      begins in the middle of an epoch, and no random state is kept
    what may change   the settings in MAY_CHANGE, and how an update's pairs are split over forwards and
                      processes; their number stays (`check_same_run`). More updates are another run, which
                      is exact from its own first update on (`is_longer`)
    what is logged    lines after the checkpoint happen again, and are dropped (run_directory.begin)
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crystal.runtime import renamed
from crystal.runtime.config import UserError
from crystal.runtime.named_state import CheckpointError, load_optimizer, load_parameters, optimizer_tensors

MANIFEST, STATE = "manifest.json", "state.json"


def step_dir(run_dir, step):
    """Where the checkpoint of `step` (updates done so far) lies, or would."""
    return Path(run_dir) / "checkpoints" / f"step-{int(step)}"


def save(run_dir, step, files, state, extra=None):
    """Write checkpoint `step`; returns its directory.

    files: {"name.safetensors": {tensor name: tensor of any shape, dtype and device}}, or in a dict's place
    a function that writes that file to the path that it is given (shard.py). state: JSON
    values (lists for tuples, strings for keys). extra: called with the directory to write more into,
    such as an adapter and a tokenizer. An older directory of the same step is replaced. CheckpointError
    before anything is written, for a bad name or a state that is not JSON. OSError with the path when a
    write fails; what was there before stays.
    """
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{name!r}: tensors go into files named *.safetensors, without a folder")
    try:
        state = json.dumps(state, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{STATE} of step {step}: {error}") from None

    final = step_dir(run_dir, step)
    temporary = final.with_name(final.name + ".tmp")
    old = final.with_name(final.name + ".old")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _clean(final.parent)
        temporary.mkdir()
        for name, tensors in files.items():
            if callable(tensors):
                tensors(temporary / name)
            else:
                save_file(_separate(tensors), temporary / name)
        (temporary / STATE).write_text(state)
        if extra is not None:
            extra(temporary)

        seal(temporary, {"step": int(step), "tensors": list(files)})

        # A full directory cannot be renamed over. Until the second line `.old` is the checkpoint.
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{final}: not written, what was saved before is kept: {error}") from error
    finally:
        # After a success there is none; after a failure it may be what fills the disk.
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def seal(directory, about):
    """Lists every file of a directory in its manifest, beside `about` (dict), and flushes all to the disk."""
    listed = {}
    for path in _files(directory):
        name = path.relative_to(directory).as_posix()
        listed[name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    (directory / MANIFEST).write_text(json.dumps(about | {"files": listed}, indent=1))

    # Contents before names: a rename must not reach the disk before what it names.
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def verify(directory, needed=(STATE,)):
    """Reads every byte of a directory that was sealed -> what is wrong with it, a string each, [] if nothing.

    needed: files that it must list; a checkpoint's by default. It takes a second or so a gigabyte.
    """
    directory = Path(directory)
    try:
        listed = _manifest(directory, needed)["files"]
        found = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
        found.pop(MANIFEST, None)

        # Files that desktops and network file systems leave (.DS_Store, .nfs0001) are nobody's damage.
        found = {name: path for name, path in found.items() if not path.name.startswith(".")}
        problems = [f"{name} is missing" for name in sorted(listed.keys() - found.keys())]
        problems += [f"{name} is not in the manifest" for name in sorted(found.keys() - listed.keys())]

        for name in sorted(listed.keys() & found.keys()):
            size = found[name].stat().st_size
            if size != listed[name]["bytes"]:
                problems.append(f"{name} has {size} bytes instead of {listed[name]['bytes']}")
            elif _sha256(found[name]) != listed[name]["sha256"]:
                problems.append(f"{name} was changed after it was written (SHA-256 differs)")
        return problems
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"cannot be read: {error}"]


def newest(run_dir, say=print):
    """The directory of the largest step that verifies, or None.

    `say` gets one line for each broken one that is passed over; smaller steps are not read.
    """
    for _, directory in reversed(_steps(run_dir)):
        problems = verify(directory)
        if not problems:
            return directory
        say(f"{directory} is broken and not used: {'; '.join(problems)}")
    return None


def load(directory):
    """Verifies, then reads what `save` was given -> ({file: {tensor name: tensor on the CPU}}, state).

    CheckpointError if anything is wrong.
    """
    directory = Path(directory)
    problems = verify(directory)
    if problems:
        raise CheckpointError(f"{directory}: {'; '.join(problems)}")

    names = _manifest(directory)["tensors"]
    files = {name: renamed.tensors(load_file(directory / name)) for name in names}
    state = json.loads((directory / STATE).read_text())
    if isinstance(state, dict) and "settings" in state:
        state["settings"] = renamed.settings(state["settings"])
    return files, state


def mark_best(run_dir, step, value, metric):
    """Records in checkpoints/best.json that the saved `step` has the best `value` of `metric` so far.

    `prune` keeps that checkpoint. CheckpointError if it is not saved.
    """
    if not step_dir(run_dir, step).is_dir():
        raise CheckpointError(f"{step_dir(run_dir, step)}: does not exist, so it cannot be the best")

    path = Path(run_dir) / "checkpoints" / "best.json"
    temporary = path.with_name("best.json.tmp")
    temporary.write_text(json.dumps({"step": int(step), "value": value, "metric": metric}))
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)


def best(run_dir):
    """The record {"step", "value", "metric"} that `mark_best` wrote, or None if there is none.

    CheckpointError if it is damaged.
    """
    path = Path(run_dir) / "checkpoints" / "best.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        return {"step": int(record["step"]), "value": record["value"], "metric": record["metric"]}
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path}: not a record of step, value and metric; delete it to go on without a best checkpoint"
        ) from None


def prune(run_dir, keep):
    """Delete all but the `keep` (1 or more) checkpoints written last and the best; returns the steps deleted.

    Only checkpoints that verify count towards `keep`, and broken ones among them stay to be looked at:
    nothing good is deleted in favour of something broken. By time of writing, not by step, so that a run that
    went back to an earlier step keeps what it saves then.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least 1 checkpoint is kept")
    record = best(run_dir)
    steps = _steps(run_dir)
    if len(steps) <= keep:
        return []

    kept, deleted = 0, []
    for step, directory in sorted(steps, key=lambda item: (_written(item[1]), item[0]), reverse=True):
        if kept < keep:
            kept += not verify(directory)
        elif record is None or step != record["step"]:
            shutil.rmtree(directory)
            deleted.append(step)
    return deleted


# --- resume ---

# What a resume may set anew: where and how the run computes, what it writes, and how an update's pairs are
# split. A run that stopped at a broken image goes on with --on_bad_record skip: which records there are, and
# their order, is the same.
MAY_CHANGE = {
    "output", "batch_size", "accumulation", "device", "checkpointing", "compile", "shard",
    "workers", "on_bad_record", "eval_every", "eval_records", "save_every", "keep",
    "log_every", "resume", "overwrite", "tensorboard",
}


def contents(step, settings, optimizer, named, procs):
    """What a resume needs of a run after `step` updates -> (files, state), as `save` takes them."""
    files = {
        "trainable.safetensors": {n: p.detach() for n, p in named},
        "optimizer.safetensors": optimizer_tensors(optimizer, named),
    }
    state = {"step": step, "settings": asdict(settings), "pairs": pairs(settings, procs)}
    return files, state


def pairs(settings, procs):
    """Pairs in one update, of all ranks and micro-batches."""
    return settings.batch_size * settings.accumulation * procs.world


def check_same_run(directory, state, saved, settings, procs):
    """UserError if a resume with these settings would be another run than the saved one.

    state: of the checkpoint; saved: the Settings in it.
    """
    now = pairs(settings, procs)
    if state["pairs"] != now:
        raise UserError(
            f"{directory}: an update had {state['pairs']} pairs, not {now}; "
            "keep batch_size x accumulation x processes"
        )

    for field in fields(settings):
        before, now = getattr(saved, field.name), getattr(settings, field.name)
        if field.name == "max_steps" and is_longer(saved, settings, state["step"]):
            continue
        if before != now and field.name not in MAY_CHANGE:
            raise UserError(made_with(directory, field.name, before, now))


def is_longer(saved, settings, step):
    """Whether --max_steps grew, and the `step` updates done are in the same stages as before.

    Stages are shares of a run. Where one that has begun would begin at another update, what was done is not
    the beginning of the longer run. Where none would, the learning rate goes on along the longer schedule,
    and therefore rises at once where the shorter one had come to its end.
    """
    if settings.max_steps <= saved.max_steps:
        return False

    last = max(0, step - 1)  # the last update that was done
    stage = saved.progress(last).stage
    if settings.progress(last).stage != stage:
        return False
    return all(saved.span(i)[0] == settings.span(i)[0] for i in range(stage + 1))


def made_with(directory, name, before, now):
    """What is said of a setting that a resume would change."""
    said = f"{directory}: was made with --{name} {before!r}, not {now!r}; a resume keeps it"
    if name == "max_steps" and now > before:
        said += ", because a stage that has begun would begin elsewhere"
    return said


def restore(directory, files, state, model, optimizer, named):
    """Puts what `load` read into parameters and optimiser -> the update to go on from.

    The ranks may be others than before.
    """
    load_parameters(named, files["trainable.safetensors"], directory)
    load_optimizer(optimizer, named, files["optimizer.safetensors"])
    model.after_update()  # the vocabulary's own rows follow the new tokens
    return state["step"]


# --- helpers ---


def _separate(tensors):
    """On the CPU, contiguous, and none sharing memory with another, which safetensors refuses."""
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate


def _manifest(directory, needed=(STATE,)):
    """The checked manifest; CheckpointError, without the directory's name, if it is missing or not one."""
    path = directory / MANIFEST
    if not path.exists():
        raise CheckpointError(
            f"{MANIFEST} is missing" if directory.is_dir() else "there is no such directory"
        )
    try:
        manifest = json.loads(path.read_bytes())
        for entry in manifest["files"].values():
            entry["sha256"], entry["bytes"]
        if not {*manifest["tensors"], *needed} <= manifest["files"].keys():
            raise KeyError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None
    return manifest


def _steps(run_dir):
    """[(step, directory)] in rising order.

    `step-N.old` counts where a kill came between the two renames of a replacement.
    """
    found = {}
    for path in sorted((Path(run_dir) / "checkpoints").glob("step-*")):  # "step-7" sorts before "step-7.old"
        match = re.fullmatch(r"step-(\d+)(\.old)?", path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)
    return sorted(found.items())


def _clean(root):
    """Remove what killed saves left behind."""
    for path in root.glob("step-*.tmp"):
        shutil.rmtree(path)
    for path in root.glob("step-*.old"):
        if path.with_suffix("").exists():
            shutil.rmtree(path)
        else:
            path.rename(path.with_suffix(""))


def _written(directory):
    """Time of writing in nanoseconds; 0 where the manifest is missing."""
    path = directory / MANIFEST
    return path.stat().st_mtime_ns if path.exists() else 0


def _files(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path):
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
