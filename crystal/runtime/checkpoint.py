"""Save, verify, resume: a checkpoint is complete and unchanged, or it is not used.

`checkpoints/step-N/` holds safetensors files, `state.json`, whatever `extra` wrote, and `manifest.json`
with the SHA-256 and size of each file. It is written as `step-N.tmp`, flushed to the disk, and renamed: a
kill at any moment leaves the checkpoint before it. The manifest is there because safetensors loads a
flipped payload byte without a word. `checkpoints/best.json` names the best step. Only tensors and JSON are
read back; pickle never.

One process calls save, mark_best and prune; any number may read.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crystal.runtime import renamed
from crystal.runtime.config import UserError

MANIFEST, STATE = "manifest.json", "state.json"


class CheckpointError(UserError, ValueError):
    """One line that names the file and what is wrong with it."""


def step_dir(run_dir, step):
    """Where the checkpoint of `step` (updates done so far) lies, or would."""
    return Path(run_dir) / "checkpoints" / f"step-{int(step)}"


def save(run_dir, step, files, state, extra=None):
    """Write checkpoint `step`; returns its directory.

    files: {"name.safetensors": {tensor name: tensor of any shape, dtype and device}}. state: JSON
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
    temporary, old = final.with_name(final.name + ".tmp"), final.with_name(final.name + ".old")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _clean(final.parent)
        temporary.mkdir()
        for name, tensors in files.items():
            save_file(_separate(tensors), temporary / name)
        (temporary / STATE).write_text(state)
        if extra is not None:
            extra(temporary)
        listed = {
            path.relative_to(temporary).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
            for path in _files(temporary)
        }
        (temporary / MANIFEST).write_text(
            json.dumps({"step": int(step), "tensors": list(files), "files": listed}, indent=1)
        )
        # Contents before names: a rename must not reach the disk before what it names.
        for path in [
            *temporary.rglob("*"),
            temporary,
        ]:
            _sync(path)
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


def verify(directory):
    """Reads every byte of a checkpoint -> what is wrong with it, one string a problem, [] if nothing.

    It takes a second or so a gigabyte.
    """
    directory = Path(directory)
    try:
        listed = _manifest(directory)["files"]
        found = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
        found.pop(MANIFEST, None)
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
    files = {name: renamed.tensors(load_file(directory / name)) for name in _manifest(directory)["tensors"]}
    state = json.loads((directory / STATE).read_text())
    if isinstance(state, dict) and "settings" in state:
        state["settings"] = renamed.settings(state["settings"])
    return files, state


@torch.no_grad()
def load_parameters(named_params, tensors, source):
    """Copies tensors into (name, parameter) pairs.

    CheckpointError naming `source`, and nothing changed, if names or shapes differ.
    """
    named = dict(named_params)
    if apart := sorted(named.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{source}: {apart[0]} is "
            + ("not in the checkpoint" if apart[0] in named else "not trained here")
        )
    for name, param in named.items():
        if param.shape != tensors[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, but the parameter has "
                f"{tuple(param.shape)}"
            )
    for name, param in named.items():
        param.copy_(tensors[name])


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
    record, kept, deleted = best(run_dir), 0, []
    steps = _steps(run_dir)
    if len(steps) <= keep:
        return deleted
    for step, directory in sorted(steps, key=lambda item: (_written(item[1]), item[0]), reverse=True):
        if kept < keep:
            kept += not verify(directory)
        elif record is None or step != record["step"]:
            shutil.rmtree(directory)
            deleted.append(step)
    return deleted


# --- the optimizer ---


def optimizer_tensors(optimizer, named_params):
    """State of AdamW, or of any optimizer whose state is tensors, by parameter name.

    It is {"layer.weight.exp_avg": tensor, ..., "layer.weight.step": 0-dim}. named_params: (name, parameter)
    pairs that cover the optimizer's parameters; others are passed over. A parameter that never had a gradient
    has no state, recorded as an empty "name.stateless". Tensors are the optimizer's own, not copies.
    CheckpointError for a parameter without a name or a state not a tensor.
    """
    tensors = {}
    for name, param in _named(optimizer, named_params):
        for key, value in optimizer.state.get(param, {}).items() or [
            ("stateless", torch.empty(0, dtype=torch.uint8))
        ]:
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(
                    f"{name}.{key}: optimizer state of type {type(value).__name__} cannot be saved, only "
                    "tensors"
                )
            tensors[f"{name}.{key}"] = value
    return tensors


def optimizer_hyper(optimizer):
    """Learning rate, betas, weight decay and the like, one JSON dict for each parameter group.

    How the update is computed (`fused`, ...) is left to the machine.
    """
    implementation = {"params", "foreach", "fused", "capturable", "differentiable"}
    return [
        {
            key: float(value) if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key not in implementation
        }
        for group in optimizer.param_groups
    ]


def load_optimizer(optimizer, named_params, tensors, hyper=None):
    """Gives `optimizer` the state of `optimizer_tensors` and, if given, of `optimizer_hyper`.

    It is the same to the bit: values, dtypes and step counters. CheckpointError, and nothing changed, if
    names, shapes or parameter groups differ.
    """
    named = dict(_named(optimizer, named_params))
    states = {name: {} for name in named}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in named:
            raise CheckpointError(
                f"{full}: the checkpoint has optimizer state for a parameter that is not trained here"
            )
        if key not in ("step", "stateless") and value.shape != named[name].shape:
            raise CheckpointError(
                f"{full}: shape {tuple(value.shape)} in the checkpoint, but the parameter has "
                f"{tuple(named[name].shape)}"
            )
        states[name][key] = value
    for name, state in states.items():
        if not state:
            raise CheckpointError(
                f"{name}: is trained here, but the checkpoint has no optimizer state for it"
            )
    groups = optimizer.param_groups
    if hyper is not None and [set(group) for group in hyper] != [
        set(group) for group in optimizer_hyper(optimizer)
    ]:
        raise CheckpointError("the optimizer's parameter groups differ from the checkpoint's")

    names = {param: name for name, param in named.items()}
    optimizer.state.clear()
    for group in groups:
        # Then the step counter lies on its parameter's device.
        beside = group.get("fused") or group.get("capturable")
        for param in group["params"]:
            state = states[names[param]]
            if "stateless" not in state:  # not load_state_dict: it casts moments to the parameter's dtype
                optimizer.state[param] = {
                    key: value.to(param.device if beside or key != "step" else "cpu", copy=True)
                    for key, value in state.items()
                }
    for group, saved in zip(groups, hyper or []):
        group.update(
            {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
        )


# --- helpers ---


def _named(optimizer, named_params):
    """(name, parameter) of what the optimizer updates, in the order of the names."""
    trained = {param for group in optimizer.param_groups for param in group["params"]}
    named = [(name, param) for name, param in named_params if param in trained]
    if len(named) != len(trained):
        raise CheckpointError(
            f"{len(trained) - len(named)} of the optimizer's {len(trained)} parameters have no name"
        )
    return named


def _separate(tensors):
    """On the CPU, contiguous, and none sharing memory with another, which safetensors refuses."""
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return separate


def _manifest(directory):
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
        if not set(manifest["tensors"]) | {STATE} <= manifest["files"].keys():
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
