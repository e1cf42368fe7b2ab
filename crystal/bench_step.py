"""One update of a model of real size, with random weights: `python -m crystal.bench step`.

The operators' benchmark (bench.py) times parts; this one times what a user waits for: forward, backward,
clipping, AdamW and the new rows' way back into the vocabulary, through the same functions as train.py. Its
rows are the methods, the ways of sharing latents, and as a peer plain fine-tuning by transformers and PEFT on
the same record, whose loss is sft's.

    python -m crystal.bench step                                     Qwen2.5-VL-7B; two layers of it on a CPU
    python -m crystal.bench step --model 3b --lengths 0,2048,8192    longer questions
    python -m crystal.bench step --only sft,peft,kv                  some rows

Nothing is downloaded: the weights are random numbers of the published shapes, made where they are used, and
the tokens are the shipped tiny model's. B pairs, L sequence length.
"""

import argparse
import gc
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from crystal import methods, train
from crystal.backbone.widths import SIDE, build
from crystal.bench_measures import flops, on_the_gpu, seconds
from crystal.layout import IGNORE
from crystal.runtime import data, ops
from crystal.runtime.config import OneLineParser, UserError
from crystal.runtime.machine import device_of, probe


class Row(NamedTuple):
    """What a row runs: its method's flags, the batch, whether in plain PyTorch, whether by PEFT."""

    flags: tuple
    batch: int = 1
    reference: bool = False
    peft: bool = False


CRYSTAL = ("--method", "crystal", "--corruption", "blur=3")
ROWS = {
    "sft": Row(("--method", "sft")),
    "peft": Row(("--method", "sft"), peft=True),
    "kv": Row(CRYSTAL),
    "hidden": Row((*CRYSTAL, "--latent_copy", "hidden")),
    "packed": Row((*CRYSTAL, "--latent_copy", "packed")),
    "all_layers": Row((*CRYSTAL, "--attn_layers", "all")),
    "frobenius": Row((*CRYSTAL, "--attn_layers", "all", "--attn_loss", "frobenius")),
    "plain": Row(CRYSTAL, reference=True),
    "released": Row(("--method", "released", "--corruption", "blur=3")),
    "checkpointing": Row((*CRYSTAL, "--checkpointing")),
    "sft_compile": Row(("--method", "sft", "--compile")),
    "kv_compile": Row((*CRYSTAL, "--compile")),
    "sft_x4": Row(("--method", "sft"), batch=4),
    "kv_x4": Row(CRYSTAL, batch=4),
}


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
    columns = f"{'ms a step':>24} {'/ sft':>5} {'TFLOP':>7} {'of best':>8} {'peak GB':>8}  loss"
    print(f"{'':14} {'B':>2} {'L':>5} {columns}")

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
            tell(rows[-1], rows, machine)
            written = {"machine": machine, "settings": vars(a), "rows": rows}
            Path(a.out).write_text(json.dumps(written) + "\n")
            gc.collect()
    print(f"wrote {a.out}")


def tell(row, rows, machine):
    """Prints a row: the step's time with its range, its ratio to sft's, how near it comes to the machine."""
    if "cannot_run" in row:
        print(f"{row['row']:14} cannot run: {row['cannot_run']}", flush=True)
        return
    ms = row["ms"]
    middle = statistics.median(ms)
    here = [other for other in rows if other["length"] == row["length"] and "ms" in other]
    sft = [statistics.median(other["ms"]) for other in here if other["row"] == "sft"]
    ratio = f"{middle / sft[0]:.2f}" if sft and row["B"] == 1 else ""
    share = row["flops"] / (middle / 1e3) / (machine["tflop_s"] * 1e12)
    span = f"{middle:8.1f} ({min(ms):.1f} to {max(ms):.1f})"
    print(
        f"{row['row']:14} {row['B']:2} {row['L']:5} {span:>24} {ratio:>5} {row['flops'] / 1e12:7.2f} "
        f"{share:8.1%} {row['peak_bytes'] / 1e9:8.1f}  {row['loss']:.3f}",
        flush=True,
    )
    if "busy_ms" in row:
        busy = f"busy {row['busy_ms']:.1f} ms in {row['kernels']} kernels"
        print(f"{'':14} {busy}; host waits {row['waited']}", flush=True)


# --- a row ---


def measure(row, length, a, device, dtype):
    """What a row of the table holds: sizes, first loss, times, FLOPs, memory; and what a GPU did."""
    gpu = device.type == "cuda"
    torch._dynamo.reset()  # torch.compile gives up for good on what it has met under FlopCounterMode
    torch._dynamo.utils.counters.clear()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ops.chosen("reference" if row.reference else None):
        step, batch, paths = ingredients(row, length, a, device, dtype)
        loss = step()
        step()
        times = [seconds(step, device) * 1e3 for _ in range(a.repeats)]
        found = {
            "B": row.batch,
            "L": batch["input_ids"].shape[1],
            "tokens": int(batch["attention_mask"].sum()) * paths,
            "loss": loss,
            "ms": times,
            "tokens_per_s": int(batch["attention_mask"].sum()) * paths / (statistics.median(times) / 1e3),
            "peak_bytes": torch.cuda.max_memory_allocated() if gpu else 0,
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        }
        if gpu:
            found |= on_the_gpu(step)
        return found | {"flops": flops(step)}


def ingredients(row, length, a, device, dtype):
    """-> (a function that makes one update and returns its loss, the batch, how many paths it has)."""
    torch.manual_seed(0)
    model = build(a.model, a.layers, a.vision_layers, device, dtype)
    settings = methods.parse([*row.flags, "--lora_dropout", "0"])
    if row.peft:
        method = methods.get("sft")(settings)
        fmt = method.format(model.tokenizer)
        forward, named, after = by_peft(model, settings)
    else:
        method, fmt = methods.attach(model, settings)
        forward, named, after = by_crystal(model, method, settings, device)
    optimizer = train.optimizer_of(named, model, settings)

    with tempfile.TemporaryDirectory() as folder:
        records, _ = data.read(write_record(Path(folder), length))
        examples = data.RecordDataset(
            records, lambda r, n: method.layout(fmt, r, n), model.image_processor, method.corruption,
            copies=fmt.copies,
        )  # fmt: skip
        example = examples[0, 0]
        if "error" in example:
            raise UserError(example["error"])
    batch = data.collate([example] * row.batch, model.tokenizer.pad_token_id)
    batch = data.to_device(batch, device, dtype)

    def step():
        loss = forward(batch)
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after()
        return float(loss.detach())

    return step, batch, 2 if method.corruption else 1


def by_crystal(model, method, settings, device):
    """train.py's objective -> (batch -> loss, the parameters that train, what follows an update)."""
    objective = train.Objective(model, method).to(device).train()

    def forward(batch):
        return train.weighted(objective(batch, settings.progress(0)), method, settings)

    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    return forward, named, model.after_update


def by_peft(model, settings):
    """The same adapters by PEFT on transformers' own forward, attention and loss."""
    from peft import LoraConfig, get_peft_model

    hf = model.hf
    hf.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    parts = "|".join(f"(?:{getattr(model.family, part)})" for part in settings.lora_on.split(","))
    linears = [name for name, module in hf.named_modules() if isinstance(module, nn.Linear)]
    adapted = [name for name in linears if re.fullmatch(parts, name)]
    lora = LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules=adapted)
    peft = get_peft_model(hf, lora).train()

    def forward(batch):
        # transformers' labels stand at their own token, crystal's at the one that predicts it.
        labels = batch["targets"].roll(1, 1)
        labels[:, 0] = IGNORE
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
        return peft(**{name: batch[name] for name in names}, labels=labels, use_cache=False).loss

    return forward, [(name, p) for name, p in peft.named_parameters() if p.requires_grad], lambda: None


def write_record(folder, length):
    """One record, a picture of noise and a question that make about `length` tokens -> its path."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    question = " ".join(["red"] * max(1, length - 330))
    talk = [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": "red blue green red blue green red blue"},
    ]
    path = folder / "record.json"
    path.write_text(json.dumps([{"id": "0", "image": "noise.png", "conversations": talk}]))
    return path


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
