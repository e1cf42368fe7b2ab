"""Makes the table of gpus.md anew: python tutorials/gpus.py. A test holds the page to what this prints."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)

from crystal import methods, planning
from crystal.runtime import plan

PAGE = HERE / "gpus.md"
MARKS = "<!-- made by gpus.py -->\n", "<!-- to here -->\n"
SEVEN, THREE = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"
VALR = "--encoders features:dinov3:1024,features:siglip2:1152"
CARDS = ("rtx4090", "a40", "h100", "h200")

# What is trained, model, flags, tokens of a sequence (0: a short question on 448x448 pixels), GPUs, shards.
ROWS = [
    ("CrystaL", SEVEN, "--method crystal", 0, 4, "none"),
    ("CrystaL", SEVEN, "--method crystal", 2048, 4, "none"),
    ("CrystaL", SEVEN, "--method crystal --checkpointing", 2048, 4, "none"),
    ("CrystaL as released", SEVEN, "--method released", 0, 4, "none"),
    ("LIVR", SEVEN, "--method livr", 0, 1, "none"),
    ("LIVR", SEVEN, "--method livr", 2048, 1, "none"),
    ("LaViT", THREE, "--method lavit", 0, 1, "none"),
    ("LaViT", THREE, "--method lavit --batch_size 2 --accumulation 2", 0, 4, "full"),
    ("LaViT", THREE, "--method lavit --batch_size 2", 0, 8, "full"),
    ("VaLR", SEVEN, f"--method valr {VALR}", 0, 1, "none"),
    ("VaLR", SEVEN, f"--method valr {VALR}", 0, 4, "full"),
    ("VaLR", SEVEN, f"--method valr {VALR}", 0, 8, "full"),
    ("fine-tuning", SEVEN, "--method sft", 0, 1, "none"),
    ("fine-tuning, all weights", SEVEN, "--method sft --tune full", 0, 8, "full"),
    ("fine-tuning", THREE, "--method sft", 0, 1, "none"),
    ("CrystaL", THREE, "--method crystal", 0, 1, "none"),
]


def table():
    """The lines of the table."""
    lines = [
        "| run | GPUs | tokens | weights, gradients, AdamW | copies | kept | together | "
        f"{' | '.join(CARDS)} |",
        "| --- " * (7 + len(CARDS)) + "|",
    ]
    return lines + [line(*row) for row in ROWS]


def line(name, model, flags, length, gpus, shard):
    """One run's line: GB of a GPU by part, and where it fits."""
    settings = methods.parse(["--model", model, "--shard", shard, *flags.split()])
    run = planning.of_settings(settings, gpus, length=length)
    parts = {part: size / 1e9 for part, size in plan.memory(run).items()}
    needed = sum(parts.values())
    static = parts["weights"] + parts["gradients"] + parts["optimiser"]

    size = "7B" if model == SEVEN else "3B"
    shown = flags.replace(f" {VALR}", "")
    how = f", `--shard {shard}`" if shard == "full" else ""
    cells = [
        f"{name} {size}, `{shown}`{how}", str(gpus), f"{run.batch} x {run.paths} x {run.length}",
        f"{static:.1f}", f"{parts['copies']:.1f}", f"{parts['activations']:.1f}", f"{needed:.1f}",
    ]  # fmt: skip
    for card in CARDS:
        spare = planning.CARDS[card].memory - needed
        cells.append(f"{spare:.0f} to spare" if spare >= 0 else advised(run, card))
    return f"| {' | '.join(cells)} |"


def advised(run, card):
    """What to lower where a run does not fit."""
    words, _ = plan.advice(run, planning.CARDS[card].memory * 1e9)
    if words is None:
        return "no"
    flags, _, where = words.partition(" on ")
    found = f"no: `{flags}`"
    return f"{found} on {where}" if where and not where.startswith(f"{run.gpus} ") else found


def main():
    before, after = (PAGE.read_text().split(mark) for mark in MARKS)
    PAGE.write_text(before[0] + MARKS[0] + "\n".join(table()) + "\n" + MARKS[1] + after[1])


if __name__ == "__main__":
    main()
