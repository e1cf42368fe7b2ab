"""One update of a model of real size, with random weights: `python -m crystal.bench step`.

The operators' benchmark (bench.py) times parts; this one times what a user waits for: forward, backward,
clipping, AdamW and the new rows' way back into the vocabulary, through the same functions as train.py. What
is measured beside each other stands in bench_rows.py, how in bench_measures.py.

    python -m crystal.bench step                                     Qwen2.5-VL-7B; two layers of it on a CPU
    python -m crystal.bench step --model 3b --lengths 0,2048,8192    longer questions
    python -m crystal.bench step --only sft,peft,kv                  some rows

A row's columns: milliseconds of an update, median and tenths; its ratio to sft's, to its peer's and to the
floor, which is the least operations by formula (plan.py) at the speed of this machine's best product; what
torch counts of operations, and what share of the best product that makes; bytes that autograd keeps and the
peak; places where the host waits, or would, for a GPU. Everything, and every update's time, is in the JSON.
"""

import argparse
import gc
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import torch

from crystal import bench_measures
from crystal.bench_rows import ROWS, Update
from crystal.runtime import ops, plan
from crystal.runtime.config import OneLineParser, UserError
from crystal.runtime.machine import device_of, probe


def main(argv=None):
    parser = OneLineParser(
        prog="bench.py step",
        description="Times of one update of a model of real size, by method.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="7b", choices=("7b", "3b", "tiny"), help="Qwen2.5-VL's widths")
    parser.add_argument("--layers", type=int, default=0, help="of the decoder; 0: all on a GPU, 2 on a CPU")
    parser.add_argument("--vision_layers", type=int, default=0, help="of the tower, likewise")
    parser.add_argument("--lengths", default="0", help="tokens of a sequence; 0: as many as the record needs")
    parser.add_argument("--only", default=",".join(ROWS), help="rows")
    parser.add_argument("--repeats", type=int, default=5, help="updates that are timed")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU")
    parser.add_argument("--out", default="runs/bench_step.json", help="where the JSON goes")
    a = parser.parse_args(argv)
    device = device_of(a.device)
    if unknown := set(a.only.split(",")) - set(ROWS):
        names = ", ".join(sorted(unknown))
        raise UserError(f"--only {a.only}: no row {names}; choose among {', '.join(ROWS)}")
    try:
        lengths = [int(length) for length in a.lengths.split(",")]
    except ValueError:
        raise UserError(f"--lengths {a.lengths}: numbers of tokens, as in 0,2048") from None
    if min(*lengths, a.layers, a.vision_layers, 0) < 0 or a.repeats < 1:
        raise UserError("--lengths, --layers and --vision_layers are at least 0, --repeats at least 1")

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    versions = {"transformers": version("transformers"), "peft": version("peft")}
    machine = probe(device, dtype) | versions | {"commit": commit(), "command": " ".join(sys.argv)}
    best = f"best product {machine['tflop_s']:.3f} TFLOP/s"
    print(f"machine: {machine['name']}, torch {machine['torch']}, {best}")
    print(f"{'':14} {'B':>2} {'L':>5} {COLUMNS}")

    rows = []
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    for length in lengths:
        for name in a.only.split(","):
            try:
                found = measure(ROWS[name], length, a, device, dtype)
            except Exception as error:  # a row's own trouble, such as too little memory, is a line
                said = (str(error).splitlines() or ["?"])[0][:150]
                found = {"cannot_run": f"{type(error).__name__}: {said}"}
            rows.append({"row": name, "length": length, **found})
            compare(rows, machine)
            tell(rows[-1])
            written = {"machine": machine, "settings": vars(a), "rows": rows}
            Path(a.out).write_text(json.dumps(written) + "\n")
            gc.collect()
    print(f"wrote {a.out}")


COLUMNS = (
    f"{'ms an update':>26} {'/ sft':>5} {'/ peer':>6} {'/ floor':>7} {'TFLOP':>7} {'of best':>7} "
    f"{'kept GB':>8} {'peak GB':>8} {'waits':>5}  loss"
)


def compare(rows, machine):
    """Adds a new row's ratios: to sft of one pair, to its peer, to the floor, to the best product.

    A row before its sft or its peer is compared when that is there.
    """
    last = rows[-1]
    if "ms" not in last:
        return
    here = {row["row"]: row for row in rows if row["length"] == last["length"] and "ms" in row}
    best = machine["tflop_s"] * 1e12
    last["times_floor"] = last["p50"] / 1e3 / (last["floor_flops"] / best)
    last["of_best"] = last["flops"] / (last["p50"] / 1e3) / best
    for row in here.values():
        if "sft" in here and row["B"] == 1:
            row["times_sft"] = row["p50"] / here["sft"]["p50"]
        if ROWS[row["row"]].peer in here:
            row["times_peer"] = row["p50"] / here[ROWS[row["row"]].peer]["p50"]


def tell(row):
    """Prints a row, and under it where its time goes."""
    if "cannot_run" in row:
        print(f"{row['row']:14} cannot run: {row['cannot_run']}", flush=True)
        return
    span = f"{row['p50']:10.1f} ({row['p10']:.1f} to {row['p90']:.1f})"
    ratios = [f"{row[name]:.2f}" if name in row else "" for name in ("times_sft", "times_peer")]
    speed = f"{row['times_floor']:7.2f} {row['flops'] / 1e12:7.2f} {row['of_best']:7.1%}"
    memory = f"{row['kept_bytes'] / 1e9:8.2f} {row['peak_bytes'] / 1e9:8.1f}"
    first = f"{row['row']:14} {row['B']:2} {row['L']:5} {span:>26}"
    times = f"{ratios[0]:>5} {ratios[1]:>6}"
    print(f"{first} {times} {speed} {memory} {row['waits']:5}  {row['loss']:.3f}", flush=True)

    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in row["parts_ms"].items())
    print(f"{'':14} {parts} ms; {row['patches']} patches, {row['loss_rows']} rows of logits", flush=True)
    if "busy_ms" in row:
        busy = f"busy {row['busy_ms']:.1f} ms in {row['kernels']} kernels"
        print(f"{'':14} {busy}; the host waited {row['waited']} times; {row['clocks']}", flush=True)


# --- a row ---


def measure(row, length, a, device, dtype):
    """What a row of the table holds: sizes, first loss, times, operations, memory, waits, time by part."""
    gpu = device.type == "cuda"
    torch._dynamo.reset()  # torch.compile gives up for good on what it has met under FlopCounterMode
    torch._dynamo.utils.counters.clear()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ops.chosen("reference" if row.reference else None):
        update = Update(row, length, (a.model, a.layers, a.vision_layers), device, dtype)
        loss = update()
        update()
        times = [bench_measures.seconds(update, device) * 1e3 for _ in range(a.repeats)]
        peak = torch.cuda.max_memory_allocated() if gpu else 0
        clocks = bench_measures.clocks() if gpu else {}

        # Each of these is an update of its own, so that no clock runs while something is counted; what counts
        # operations comes last.
        there = [p for _, p in update.model.named_parameters()] + list(update.model.buffers())
        there += [x for x in update.batch.values() if isinstance(x, torch.Tensor)]
        kept, _ = bench_measures.saved_bytes(update.loss, there)
        parts = bench_measures.parts(update, device)
        counted = {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}
        counted |= bench_measures.on_the_gpu(update) if gpu else {}
        counted |= bench_measures.host_waits(update)
        counted["flops"] = bench_measures.flops(update)

    tokens = int(update.batch["attention_mask"].sum()) * update.paths
    sizes = {
        "B": row.batch,
        "L": update.batch["input_ids"].shape[1],
        "tokens": tokens,
        "patches": update.work.patches * row.batch,
        "loss_rows": update.work.rows * row.batch,
    }
    time = {"ms": times, **bench_measures.spread(times), "parts_ms": parts}
    speed = {"tokens_per_s": tokens / (time["p50"] / 1e3), "floor_flops": plan.flops(update.work)}
    memory = {"peak_bytes": peak, "kept_bytes": kept}
    return sizes | {"loss": loss, "clocks": clocks} | time | speed | memory | counted


# --- where it ran ---


def version(package):
    """The version of a package, or nothing where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit():
    """The repository's commit, with a + where files differ from it; nothing where there is no git or none."""
    root = Path(__file__).resolve().parents[1]
    said = []
    for question in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *question], cwd=root, capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        said.append(done.stdout.strip())
    return said[0] + "+" * bool(said[1])
