"""Which realisation of the copy is fastest here? One training step of each, in turns, so that a busy
machine slows all alike.

    python tutorials/02_times.py                          the shipped model on its own images of 16 tokens
    python tutorials/02_times.py --min_pixels 200704      the same scenes at 448 x 448: 256 tokens an image
    python tutorials/02_times.py --copied thought         the whole thought copied, as released

Prints the median step and the quartiles of each realisation's time over that of `kv` in the same round.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import crystal.backbone.model
from crystal import methods
from crystal.losses import total
from crystal.runtime import data, toy

REALISATIONS = ("hidden", "kv", "packed")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="what --model of train.py takes")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min_pixels", type=int, default=None)
    parser.add_argument("--copied", default="latents", choices=("latents", "thought"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    pixels = (
        ["--min_pixels", str(args.min_pixels), "--max_pixels", str(args.min_pixels)]
        if args.min_pixels
        else []
    )
    settings = methods.parse(["--model", args.model, "--copied", args.copied, *pixels])
    model = crystal.backbone.model.load(
        settings.model, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
    )
    method, fmt = methods.attach(model, settings)
    with tempfile.TemporaryDirectory() as scenes:
        toy.generate(scenes, train=args.batch_size, val=1, test=1)
        records, _ = data.read(f"{scenes}/train.jsonl")
        examples = data.RecordDataset(
            records, lambda r, n: method.layout(fmt, r, n), model.image_processor, method.corruption
        )
        batch = data.collate([examples[0, i] for i in range(len(records))], model.tokenizer.pad_token_id)
    trains = [p for _, p in model.trainable()]

    def step(realisation):
        method.settings = replace(settings, latent_copy=realisation)
        started = time.perf_counter()
        terms = method.losses(model, batch, None)
        torch.autograd.grad(
            total({n: t for n, t in terms.items() if n not in method.monitored}, settings.weights),
            trains,
            allow_unused=True,
        )
        return time.perf_counter() - started

    times = {r: [] for r in REALISATIONS}
    for n in range(args.rounds + 1):
        for r in REALISATIONS:
            seconds = step(r)
            if n:  # the first round warms up
                times[r].append(seconds)
    B, L = batch["input_ids"].shape
    print(
        f"{args.model}, {B} pairs, L {L}, image tokens {batch['image'].shape[1]}, {args.copied} copied, "
        f"{args.threads} thread(s), {args.rounds} rounds, "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for r in REALISATIONS:
        ratios = [a / b for a, b in zip(times[r], times["kv"])]
        low, middle, high = statistics.quantiles(ratios, n=4) if r != "kv" else (1, 1, 1)
        print(
            f"{r:8s} {1000 * statistics.median(times[r]):7.0f} ms   {middle:.2f} of kv ({low:.2f} to "
            f"{high:.2f})"
        )


if __name__ == "__main__":
    main()
