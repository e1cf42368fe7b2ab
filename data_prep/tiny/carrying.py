"""Train the small adapter whose latents carry, and write crystal/assets/tiny-crystal.

    make demo
    python data_prep/tiny/carrying.py           # seconds: takes the demo's CrystaL run

It is what `--model tiny-crystal` and `crystal.open("tiny-crystal")` open: the tiny base with what the demo's
500 updates of CrystaL added to it, so that a test or a page has latents to look into at once. carrying.log
beside this file holds what its training and its questions said; the directory's README.md is not touched.
"""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

if not __package__:  # run as a script
    import sys

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import load_file, save_file

from crystal import card
from crystal.lora import WEIGHTS, save_adapter
from crystal.opening import MARK, SHIPPED, open_run
from crystal.run_directory import logged_lines
from crystal.runtime import config

TARGET = SHIPPED["tiny-crystal"]
# Where a run lay, and how it was watched, is no part of what it learned.
LEFT_OUT = {*card.INCIDENTAL, "data", "val_data", "eval_every", "save_every", "keep"}


def settings_of(settings):
    """What crystal.json says: the settings that are not their defaults."""
    usual = {field.name: field.default for field in fields(settings)}
    own = {name: value for name, value in asdict(settings).items() if value != usual[name]}
    return {"method": settings.method} | {k: v for k, v in own.items() if k not in LEFT_OUT}


def in_half_precision(folder):
    """The same tensors in bfloat16, half as large; they are merged in the base's precision all the same."""
    tensors = load_file(folder / WEIGHTS)
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halves, folder / WEIGHTS, {"format": "pt"})
    os.chmod(folder / WEIGHTS, 0o644)


def told(run):
    """What the run's validations said of its latents, a line each."""
    lines = []
    for line in logged_lines(run / "metrics.jsonl"):
        if "val_gain" in line:
            numbers = {name: line[f"val_{name}"] for name in ("gain", "gain_pm", "swap", "swap_pm")}
            lines.append(f"step {line['step']}  " + "  ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
    return lines


def main(argv=None):
    parser = config.OneLineParser(description="Ship a CrystaL run of the demo as an adapter.")
    parser.add_argument("--run", type=Path, default=Path("runs/demo/crystal"))
    parser.add_argument("--out", type=Path, default=TARGET)
    args = parser.parse_args(argv)

    model, _, settings = open_run(args.run, "last")
    args.out.mkdir(parents=True, exist_ok=True)
    save_adapter(args.out, model.hf, model.new_tokens, "tiny")
    in_half_precision(args.out)
    model.tokenizer.save_pretrained(args.out)  # with the base's template: crystal adds the thought itself
    (args.out / MARK).write_text(json.dumps(settings_of(settings), indent=2) + "\n")
    for line in told(args.run):
        print(line)
    for file in sorted(args.out.iterdir()):
        print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    config.run_cli(main)
