"""A run's directory: how it begins, and what is written into it while it runs.

    config.json           the settings, the versions of what computes, the number of processes
    method.py             the method's file, where it is not built in, as it was run
    metrics.jsonl         a line an update, and one a validation
    bad_records.jsonl     records that were left out, and why
    checkpoints/step-N/   what trains, the optimiser's state, the settings (runtime/checkpoint.py)
    tensorboard/          with --tensorboard

It becomes a run's own at its first update that works, so that a mistake in a flag leaves an older run whole.
"""
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from crystal import methods
from crystal.runtime import checkpoint, shard
from crystal.runtime.config import UserError

# What crystal writes into a run: training, and the commands that open it later. --overwrite deletes these,
# whose answers and exports would otherwise be an older run's, and nothing else.
OWN = (
    "config.json", methods.COPY, "metrics.jsonl", "metrics.part", "bad_records.jsonl", "checkpoints",
    "tensorboard", "pictures", "evaluation", "reliance", "merged", "adapter",
    *(f"{name}.{half}" for name in ("merged", "adapter") for half in ("part", "old")),  # a killed export's
)

# --- before the first update ---

def check_writable(run):
    """UserError if a run directory could not be made, or written to, where it is asked for."""
    nearest = next(p for p in (run, *run.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--output {run}: {nearest} is not a directory that can be written to")


def has_checkpoints(run):
    """Whether a run has saved something to go on from, whole or not."""
    steps = (run / "checkpoints").glob("step-*")
    return any(path.is_dir() and path.suffix != ".tmp" for path in steps)


def holds_a_run(run):
    """Whether there is a run in a directory that a new one would spoil: one that has saved something.

    A log alone is one too, unless its run was killed before its first save.
    """
    if has_checkpoints(run):
        return True

    log = run / "metrics.jsonl"
    if not log.exists():
        return False
    try:
        settings = json.loads((run / "config.json").read_text())
        first_save = min(settings["save_every"], settings["max_steps"])
        return any(line["step"] >= first_save for line in logged_lines(log))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return True  # what it is cannot be told, so it is kept


def lock(run, procs):
    """Makes this process, rank 0's, the run's only owner -> what `unlock` ends; None without a directory.

    It ends with the process too, however that ends. UserError, on all ranks, where another process trains
    here.
    """
    held, problem = None, []
    if procs.is_first and run.is_dir():
        held = os.open(run / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(run / ".lock")  # an owner who went in this moment took the file along
        except OSError:
            problem = [f"{run}: another process trains here; --output names another directory"]
    if problem := procs.gather(problem):
        raise UserError(problem[0])
    return held


def check_overwrite(run, settings):
    """UserError where --overwrite would delete what the new run reads."""
    names = ("method", "model", "data", "val_data", "image_root")
    read = [(name, getattr(settings, name)) for name in names]
    read += [("data", stage.data) for stage in settings.stages]
    for name, path in read:
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"--overwrite would delete --{name} {path}, which lies in {run}; "
                "move it, or name another --output"
            )


def unlock(run, held):
    """Ends what `lock` began; held may be None."""
    if held is not None:
        (run / ".lock").unlink(missing_ok=True)
        os.close(held)


def begin(run, step, settings, procs):
    """On rank 0, makes the directory this run's, from update `step` on -> (open log, SummaryWriter or None).

    With --overwrite an older run in it is deleted here, and nowhere else.
    """
    # What was logged after the checkpoint that a resume goes on from happens again.
    path = run / "metrics.jsonl"
    if settings.resume and path.exists():
        kept = [line for line in logged_lines(path) if line["step"] <= step]
        whole = path.with_suffix(".part")
        whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
        whole.replace(path)  # a kill leaves the old log or the new one
    elif not settings.resume and (path.exists() or holds_a_run(run)):
        delete_run(run)

    run.mkdir(parents=True, exist_ok=True)
    made_by = methods.fingerprint(settings.method) | {"versions": versions(), "world": procs.world}
    (run / "config.json").write_text(json.dumps(asdict(settings) | made_by, indent=1) + "\n")
    methods.keep_copy(settings.method, run)

    board = summary_writer()(run / "tensorboard") if settings.tensorboard else None
    return open(path, "a"), board


def delete_run(run):
    """Deletes what crystal wrote into a run directory; what somebody else put there stays."""
    for path in (run / name for name in OWN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# --- while it runs ---

def list_bad(lines, run, procs):
    """Appends lines to the run's bad_records.jsonl, on rank 0."""
    if lines and procs.is_first:
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "bad_records.jsonl", "a") as file:
            file.writelines(json.dumps({"problem": line}) + "\n" for line in lines)


def write(log, board, line):
    """One line of metrics to the log, and to TensorBoard if there is one."""
    log.write(json.dumps(line) + "\n")
    log.flush()
    if board:
        for name, value in line.items():
            if name != "step":
                board.add_scalar(name, value, line["step"])


def logged_lines(path):
    """Lines of a metrics.jsonl; a last one that a killed process left unfinished is not one.

    UserError for a damaged line before it.
    """
    found = []
    for number, line in enumerate(path.read_text(errors="replace").split("\n")[:-1], 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            entry["step"] + 0
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: no line of a log; mend it, or delete the line") from None
        found.append(entry)
    return found


def validated(run, step, procs):
    """Whether the log holds a validation after update `step`, as the first process reads it."""
    path = run / "metrics.jsonl"
    lines = logged_lines(path) if procs.is_first and path.exists() else []
    here = [line for line in lines if line["step"] == step]
    return procs.any(any(name.startswith("val_") for line in here for name in line))


def summary_writer():
    """TensorBoard's SummaryWriter, a class; UserError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: needs the extra `track`: pip install tensorboard") from None
    return SummaryWriter


def versions():
    """Versions of what computes, and the code's own commit where there is one."""
    root = Path(__file__).resolve().parents[1]
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git": git.stdout.strip() if git.returncode == 0 else None,
    }


# --- checkpoints: what is in one, and what makes a resume exact, runtime/checkpoint.py tells ---

def store(run, step, settings, optimizer, named, procs, best):
    """Writes checkpoints/step-N, which a resume goes on from; the older ones beyond --keep go.

    The first process writes; all call it, because each may have a shard of what is written.
    """
    files, state = checkpoint.contents(step, settings, optimizer, named, procs)
    with shard.collected(files, procs) as files:
        if not procs.is_first:
            return
        checkpoint.save(run, step, files, state | methods.fingerprint(settings.method))
    if best:
        checkpoint.mark_best(run, **best)
    checkpoint.prune(run, settings.keep)


def restore(directory, settings, objective, optimizer, named, procs):
    """Puts what `store` wrote back into model and optimiser -> the update to go on from."""
    files, state = checkpoint.load(directory)

    # The method comes before anything is done with it: what a run names is not run.
    before = state["settings"]["method"]
    if not methods.same_method(state, settings.method):
        raise UserError(checkpoint.made_with(directory, "method", before, settings.method))
    methods.of_run(state, directory, settings.method)  # tells where the file was edited since

    saved = methods.saved_settings(state["settings"] | {"method": settings.method}, directory)
    checkpoint.check_same_run(directory, state, saved, settings, procs)
    if settings.max_steps > saved.max_steps:
        procs.print(
            f"--max_steps was {saved.max_steps} and is {settings.max_steps}: after update {state['step']} "
            "learning rate and stages are those of the longer run, so the rate may rise again"
        )
    return checkpoint.restore(directory, files, state, objective.model, optimizer, named)


# What trained weights mean nothing without: their base, what they are added to, and by how much.
WEIGHTS_NEED = ("model", "tune", "lora_r", "lora_alpha", "lora_on", "latents", "latent_kind")


def begin_with(run, settings, model, named, procs):
    """Gives parameters what a run's newest checkpoint has trained; the optimiser begins anew.

    run: directory of the run that was trained before. named: (name, parameter) pairs, of any shape, of what
    trains now. UserError where there is no checkpoint, where a setting that the weights depend on is another,
    or where the methods train different parameters. The method itself and all else may differ.
    """
    directory = checkpoint.newest(run, procs.print)
    if directory is None:
        raise UserError(f"--init_from {run}: has no whole checkpoint to begin with")
    files, state = checkpoint.load(directory)

    before = state["settings"]
    for name in WEIGHTS_NEED:
        now = getattr(settings, name)
        if name in before and before[name] != now:
            raise UserError(f"--init_from {run}: was trained with --{name} {before[name]}, not {now}")
    checkpoint.load_parameters(named, files["trainable.safetensors"], directory)
    model.after_update()  # the vocabulary's own rows follow the new tokens
    procs.print(f"begins with the weights of {directory}, {state['step']} updates of {before['method']}")
