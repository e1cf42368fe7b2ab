"""Faults throughout a training, again and again: at its end it is the run that nothing happened to.

    python data_prep/checks/soak.py --minutes 60

A round trains twice on the same records, a broken one among them: undisturbed, and with faults. A run is
killed (SIGKILL), stopped (SIGTERM), its disk is full after some bytes, or slow; then the same command goes
on. What is compared: the last weights to the bit, the log line by line but for times and memory, the list of
broken records, every exit code, and that no error is more than a line. A line a round, and at the end how
often what failed; exit code 1 if anything did.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from safetensors.torch import load_file

from crystal import train
from crystal.runtime import checkpoint, config, toy

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["crystal.train", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"])

FAULTS = ("kill", "stop", "full", "slow")
# What a process may end with: whoever is killed, who is told to stop, whose disk is full.
ENDS = {"kill": (0, -9), "stop": (0, 130, 143), "full": (0, 2), "slow": (0, -9), "none": (0,)}
TIMES = ("tokens_per_s", "peak_memory_gb")


class Ended(NamedTuple):
    """How one process ended: its exit code, what it said on stderr, its largest memory in MB."""

    code: int
    err: str
    memory: float


def child(flags, fault, room, err):
    """In a process of its own: trains under a fault."""
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if fault == "full":  # every file ends after so many bytes, as on a disk that is full
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    if fault == "slow":
        fsync = os.fsync
        os.fsync = lambda file: (time.sleep(0.3), fsync(file))[1]
    config.run_cli(lambda: train.main(flags))


def written(run):
    """How many lines a run's log has."""
    log = Path(run) / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def attempt(flags, fault, run, updates, delay, room, err):
    """Trains in a process of its own, with a fault so many updates and seconds later -> Ended."""
    process = PROCESSES.Process(target=child, args=(flags, fault, room, str(err)))
    before, memory, told, due = written(run), 0, False, None
    process.start()
    status = Path(f"/proc/{process.pid}/status")
    while process.exitcode is None:
        process.join(0.02)
        # A resume takes back what was logged after its checkpoint.
        before = min(before, written(run))
        if due is None and written(run) >= before + updates:
            due = time.monotonic() + delay
        with contextlib.suppress(OSError, IndexError, ValueError):
            memory = max(memory, int(status.read_text().split("VmHWM:")[1].split()[0]) / 1000)
        if due is not None and time.monotonic() > due and not told and fault in ("kill", "stop", "slow"):
            os.kill(process.pid, signal.SIGTERM if fault == "stop" else signal.SIGKILL)
            told = True
    return Ended(process.exitcode, Path(err).read_text(errors="replace"), memory)


def log_of(run):
    """A run's log without times and memory, line by line; a line that is none is kept as it is."""
    lines = []
    for line in (Path(run) / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append({name: x for name, x in json.loads(line).items() if name not in TIMES})
        except ValueError:
            lines.append(line)
    return lines


def differences(run, clean, steps):
    """What of a disturbed run is not the clean one's: list of lines."""
    found = []
    ours, theirs = (load_file(checkpoint.step_dir(x, steps) / "trainable.safetensors") for x in (run, clean))
    unequal = [name for name in theirs if name not in ours or not ours[name].equal(theirs[name])]
    if unequal or len(ours) != len(theirs):
        found.append(f"weights: {len(unequal)} of {len(theirs)} differ")

    ours, theirs = log_of(run), log_of(clean)
    if ours != theirs:
        extra = [line for line in ours if line not in theirs]
        missing = [line for line in theirs if line not in ours]
        found.append(f"log: {len(missing)} lines missing, {len(extra)} of its own: {(extra + missing)[:1]}")

    ours, theirs = (Path(x) / "bad_records.jsonl" for x in (run, clean))
    listed = [sorted(set(x.read_text().splitlines())) if x.exists() else [] for x in (ours, theirs)]
    if listed[0] != listed[1]:
        found.append(f"bad_records.jsonl: {len(listed[0])} records, {len(listed[1])} in the clean run")
    return found


def records(work, seed):
    """Toy scenes, one of them with half a picture -> the records' file."""
    out = Path(work) / "scenes"
    toy.generate(out, seed, train=150, val=8, test=1)
    file = out / "train.jsonl"
    line = json.loads(file.read_text().splitlines()[40])
    picture = out / line["image"]
    picture.write_bytes(picture.read_bytes()[:60])
    return file


def soak(work, seed, steps, faults, more=(), kinds=FAULTS):
    """One round -> (what differs or went wrong as lines, memory of each process in MB)."""
    work, rng = Path(work), random.Random(seed)
    work.mkdir(parents=True, exist_ok=True)
    data = records(work, seed)
    flags = ["--data", str(data), "--val_data", str(data.with_name("val.jsonl")), "--seed", str(seed)]
    flags += ["--max_steps", str(steps), "--on_bad_record", "skip", "--device", "cpu", *more]

    clean, began = work / "clean", time.monotonic()
    whole = attempt([*flags, "--output", str(clean)], "none", clean, 0, 0, 0, work / "err")
    if whole.code:
        return [f"the clean run ended with {whole.code}: {whole.err.strip()}"], []
    step = (time.monotonic() - began) / steps
    largest = max(file.stat().st_size for file in checkpoint.step_dir(clean, steps).iterdir())

    wrong, memory, run, done = [], [whole.memory], work / "run", 0
    while not checkpoint.step_dir(run, steps).is_dir() or done == 0:
        fault = rng.choice(kinds) if done < faults else "none"
        # Before the first save the same command begins again; afterwards it goes on.
        again = "--resume" if checkpoint.newest(run) else "--overwrite"
        updates, delay, room = rng.randint(1, steps // 3), rng.uniform(0, step), rng.randrange(200, largest)
        here = [*flags, "--output", str(run), again]
        ended = attempt(here, fault, run, updates, delay, room, work / "err")
        memory.append(ended.memory)
        done += 1

        lines = [line for line in ended.err.splitlines() if not line.startswith(("warning", "note"))]
        if ended.code not in ENDS[fault]:
            wrong.append(f"{fault}: exit code {ended.code}: {ended.err.strip()[-300:]}")
        elif "Traceback" in ended.err or (ended.code == 2 and len(lines) > 1):
            wrong.append(f"{fault}: more than a line: {ended.err.strip()[-300:]}")
        if fault == "none" and ended.code:
            break
    if checkpoint.step_dir(run, steps).is_dir():
        wrong += differences(run, clean, steps)
    return wrong, memory


def main(argv=None):
    parser = config.OneLineParser(prog="soak.py", description="Train with faults; compare with a clean run.")
    parser.add_argument("--minutes", type=float, default=5, help="rounds begin for so long")
    parser.add_argument("--steps", type=int, default=60, help="updates of a run")
    parser.add_argument("--faults", type=int, default=6, help="of a round")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--output", default="runs/soak", help="folder that is written to, a folder a round")
    args = parser.parse_args(argv)

    stop, seed, failed, peaks = time.monotonic() + 60 * args.minutes, args.seed, 0, []
    # Four pairs an update: within a run's 60 the broken record is met.
    more = ["--batch_size", "4", "--latents", "4", "--save_every", "10"]
    more += ["--eval_every", "15", "--eval_records", "8"]
    while time.monotonic() < stop or not peaks:
        wrong, memory = soak(Path(args.output) / f"round-{seed}", seed, args.steps, args.faults, more)
        failed += bool(wrong)
        peaks.append(max(memory, default=0))
        spread = f"memory {min(memory, default=0):.0f} to {peaks[-1]:.0f} MB"
        said = "; ".join(wrong) or "equal"
        print(f"round {seed}: {len(memory) - 1} processes, {spread}: {said}", flush=True)
        seed += 1
    print(f"{failed} of {len(peaks)} rounds failed; memory {peaks[0]:.0f} MB first, {peaks[-1]:.0f} last")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    config.run_cli(main)
