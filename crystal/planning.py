"""What a run would need, before it runs: `python -m crystal.train --plan` and the flags of the run.

    python -m crystal.train --plan --model Qwen/Qwen2.5-VL-7B-Instruct --method livr --gpus 4 --gpu a40
    python -m crystal.train --plan --method lavit --batch_size 2 --shard full --gpus 8 --gpu h100

Prints memory of a GPU by part, whether it fits, the first setting to lower if not, and steps and hours. Of
the model its configuration alone is read. runtime/plan.py does the sums; this file finds what they are of: a
record of one image and as many words of question as --length asks for, laid out by the method itself.
"""

import argparse
import re
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image

from crystal import methods
from crystal.backbone import widths
from crystal.layout import IGNORE
from crystal.runtime import plan
from crystal.runtime.config import OneLineParser, UserError
from crystal.runtime.data import Record


class Card(NamedTuple):
    """A GPU: memory in GB (10^9 bytes), and the specification's dense bfloat16 TFLOP/s."""

    memory: float
    peak: float


CARDS = {"rtx4090": Card(24, 165), "a40": Card(48, 149.7), "l40s": Card(48, 362)}
CARDS |= {"a100-40": Card(40, 312), "a100": Card(80, 312)}
CARDS |= {"h100": Card(80, 989), "h200": Card(141, 989)}
SHARE = 0.2  # of the peak: what a step is taken to reach until `bench step` has said it


def main(argv=None):
    """The flags of a run and those of a plan -> prints the plan."""
    parser = OneLineParser(
        prog="train.py --plan",
        description="What a run would need. Takes all flags of train.py too.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs, one process on each")
    parser.add_argument("--gpu", default="a40", choices=sorted(CARDS), help="kind of GPU")
    parser.add_argument("--memory", type=float, default=0.0, help="GB of one GPU; 0: the kind's")
    parser.add_argument(
        "--tflop_s", type=float, default=0.0, help="TFLOP/s that a GPU reaches; 0: a fifth of its peak"
    )
    parser.add_argument("--image", default="448x448", help="width x height of a record's image in pixels")
    parser.add_argument(
        "--length", type=int, default=0, help="tokens of a sequence; 0: a question of one word"
    )
    own, rest = parser.parse_known_args(argv)
    settings = methods.parse(rest)
    if min(own.gpus - 1, own.memory, own.tflop_s, own.length) < 0:
        raise UserError("--gpus must be at least 1, --memory, --tflop_s and --length at least 0")

    run = of_settings(settings, own.gpus, size_of(own.image), own.length)
    card = CARDS[own.gpu]
    name = f"{own.memory:g} GB" if own.memory else own.gpu
    speed = own.tflop_s or SHARE * card.peak
    print("\n".join(report(settings, run, name, own.memory or card.memory, speed)))


def size_of(text):
    """--image as (width, height); UserError for what is none."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or not all(map(int, found.groups())):
        raise UserError(f"--image {text}: width x height in pixels, as in 448x448")
    return int(found[1]), int(found[2])


def report(settings, run, card, memory, speed):
    """The lines that tell a plan. memory: GB of a GPU; speed: TFLOP/s of one."""
    trained, everything = run.counts.trained, run.counts.all
    pairs = run.batch * run.accumulation * run.gpus
    what = f"{settings.method} on {settings.model}: {trained:,} of {everything:,} parameters train"
    split = f"{run.batch} pair(s) at once on each of {run.gpus} GPU(s), {pairs} an update"
    lines = [what, f"{run.paths} sequence(s) of {run.length} tokens a pair, {split}"]

    # Memory, part by part, and what would help.
    parts = plan.memory(run)
    needed = sum(parts.values()) / 1e9
    lines.append(f"memory of a GPU, --shard {run.shard}")
    lines += [f"  {name:12} {size / 1e9:7.1f} GB" for name, size in parts.items()]
    fits = needed <= memory
    verdict = f"fits, {memory - needed:.1f} GB to spare" if fits else "does not fit"
    lines.append(f"  {'together':12} {needed:7.1f} GB of {memory:g} ({card}): {verdict}")
    if not fits:
        lines.append(f"  the first to lower: {lower(run, memory)}")

    # Time.
    tflop = run.accumulation * plan.flops(run) / 1e12
    total = plan.hours(run, settings.max_steps, speed)
    took = f"an update: {tflop:.1f} TFLOP a GPU, {tflop / speed:.2g} s at {speed:g} TFLOP/s"
    return [*lines, f"{took}; {settings.max_steps} updates: {total:.2g} hours"]


def lower(run, memory):
    """What to set where a run needs more than `memory` GB, in words."""
    words, changed = plan.advice(run, memory * 1e9)
    if words is None:
        return "nothing here is enough"
    return f"{words}: {sum(plan.memory(changed).values()) / 1e9:.1f} GB"


# --- what the sums are of ---


def of_settings(settings, gpus=1, image=(448, 448), length=0):
    """A run's settings on so many GPUs -> plan.Run. image: (width, height). UserError as train.py's own.

    length: tokens of a sequence, 0 for as many as a question of one word makes.
    """
    if settings.shard == "full" and gpus == 1:
        raise UserError("--shard full: shards lie on several GPUs; --gpus says how many")
    dtype = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    model = widths.outline(settings.model, dtype, settings.min_pixels, settings.max_pixels)
    method, fmt = methods.attach(model, settings)
    heads = method.modules(model)

    # The picture, as the model sees it, and the sequence around it.
    grid = model.image_processor([Image.new("RGB", image)])["image_grid_thw"]
    patches = sum(model.image_processor.rows(grid)) * fmt.copies
    layout = laid_out(method, fmt, model.image_tokens(grid) * fmt.copies, length)
    run = of_model(model, method, settings, layout, patches, heads)
    return replace(run, gpus=gpus, shard=settings.shard, bytes=dtype.itemsize)


def of_model(model, method, settings, layout, patches, heads):
    """What one GPU computes of a Model that its method has made trainable -> plan.Run.

    layout: of a record; patches: of its images. heads: the method's own, an nn.ModuleDict.
    """
    text, vision = widths.blocks(model, patches)
    paths = 2 if method.corruption else 1
    run = plan.Run(text, vision, len(model.hf.lm_head.weight), counts_of(model, heads), settings.tune)

    # How it is asked to run, and what its method makes of a record.
    how = {
        "batch": settings.batch_size,
        "accumulation": settings.accumulation,
        "checkpointing": settings.checkpointing,
        "rank": settings.lora_r,
        "dropout": settings.lora_dropout,
        "on_vision": "vision" in settings.lora_on,
    }
    sequence = {"paths": paths, "length": len(layout.ids), "rows": rows_of(layout, paths)}
    sequence |= {"patches": patches * paths, "new_tokens": len(dict.fromkeys(method.tokens))}
    attention = {"masked": is_masked(settings), "pieces": pieces_of(settings, layout)}
    return replace(run, **how, **sequence, **attention, repeats=method.repeats)


def laid_out(method, fmt, image_tokens, length):
    """The layout of a record with one image, an answer of three words and, where the method takes them, three
    steps; its question makes it as long as asked. UserError for a length that is too short.
    """

    def of(words):
        question = " ".join(["red"] * words)
        turns = [("user", "<image>\n" * fmt.copies + question)]
        record = Record("--plan", "0", turns, "red blue green", [], cot=["red red red"] * 3)
        return method.layout(fmt, record, image_tokens)

    layout = of(1)
    if length and length < len(layout.ids):
        raise UserError(f"--length {length}: with its image a sequence has {len(layout.ids)} tokens at least")
    return of(1 + length - len(layout.ids)) if length else layout


def rows_of(layout, paths=1):
    """Positions of a pair's sequences whose logits a loss reads; of a second path none that is copied."""
    read = {at for at, target in enumerate(layout.targets) if target != IGNORE}
    read |= set(layout.answer_positions)
    return len(read) + (paths - 1) * len(read - set(layout.latents))


def pieces_of(settings, layout):
    """Keys that each forward after the first sees, where latents are fed back one by one."""
    fed = hasattr(settings, "updates") and settings.updates is None
    return (*layout.latents[1:], len(layout.ids)) if fed and layout.latents else ()


def is_masked(settings):
    """Whether some of a run's updates have a mask other than causal: LIVR's first stage, LaViT's gate."""
    return bool(getattr(settings, "masked", 0)) or getattr(settings, "gate", "open") != "open"


def counts_of(model, heads):
    """A Model without weights, and a method's heads -> plan.Counts."""
    vocabulary = {model.hf.get_input_embeddings().weight, model.hf.lm_head.weight}
    layers = set(model.layers.parameters())
    numbers = dict.fromkeys(("trained_layers", "trained_rest", "frozen_layers", "frozen_rest"), 0)
    for p in {*model.parameters(), *heads.parameters()} - vocabulary:
        kind = "trained" if p.requires_grad else "frozen"
        where = "layers" if p in layers else "rest"
        numbers[f"{kind}_{where}"] += p.numel()
    return plan.Counts(**numbers, vocabulary=sum(p.numel() for p in vocabulary))
