"""The whole main job in minutes on a CPU: train, evaluate, draw, export, ask.

    make demo                    sft and crystal
    make demo METHOD=m           sft and m

Both methods start from the shipped tiny model and see the same toy scenes the same number of times.
"""
import argparse
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

import crystal.model
from crystal import config, data, evaluate, export, generate, train, visualize
from crystal.layout import Format
from data_prep import toy

# Two minutes at most each on two cores; the paper's own settings are train.py's defaults. A model this small forgets how to see
# while it learns to recite a thought: so the answer alone is a label, and the new tokens' rows learn faster than the rest.
TRAINING = ["--batch_size", "16", "--lr", "5e-4", "--lr_rows", "20", "--labels", "answer", "--save_every", "1000", "--eval_every", "60",
            "--eval_records", "64", "--log_every", "30", "--overwrite"]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="demo.py", description="Train, evaluate, draw and export on the tiny model.")
    parser.add_argument("--method", default="crystal")
    parser.add_argument("--max_steps", type=int, default=360)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=1000, help="test questions for the table")
    parser.add_argument("--output", default="runs/demo")
    args = parser.parse_args(argv)
    out, started = Path(args.output), time.perf_counter()

    say("1. Data: toy scenes, questions that need small details")
    scenes = Path("runs/toy")
    toy.generate(scenes, seed=args.seed)
    records, _ = data.read(scenes / "test.jsonl")
    records = records[: args.questions]

    methods = list(dict.fromkeys(["sft", args.method]))
    runs = {}
    for n, method in enumerate(methods):
        name = Path(method).stem
        say(f"{n + 2}. Training {name}: {args.max_steps} updates of 16 from the same base on the same data")
        flags = ["--data", f"{scenes}/train.jsonl", "--val_data", f"{scenes}/val.jsonl", "--max_steps", str(args.max_steps), "--seed", str(args.seed)]
        runs[name] = train.main(["--method", method, "--output", str(out / name), *TRAINING, *flags])

    say(f"{len(methods) + 2}. Accuracy on {len(records)} held-out questions, percent with the half width of the 95 % interval")
    columns = {}

    def measure(column, model, fmt, **how):
        columns[column] = evaluate.by_family(evaluate.answers(model, fmt, records, 100, progress=column, max_new_tokens=8, **how))

    base = crystal.model.load("tiny")
    measure("base", base, Format(base.tokenizer))
    base.hf.load_state_dict(load_file(crystal.model.TINY.parent / "blind" / "model.safetensors"), strict=False)
    measure("blind", base, Format(base.tokenizer), grey=True)
    for name, run in runs.items():
        model, fmt, settings = export.open_model(run)
        measure(name, model, fmt)
        if fmt.count:
            measure(f"{name}, latents dropped", model, fmt, latents="drop")
    order = ["blind", "base"] + [c for c in columns if c not in ("blind", "base")]
    text = evaluate.table({c: columns[c] for c in order})
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.txt").write_text(text + "\n")

    say(f"{len(methods) + 3}. Pictures")
    for path in visualize.pictures(runs[Path(args.method).stem], scenes / "test.jsonl", out / "pictures"):
        print(path)

    run = runs[Path(args.method).stem]
    say(f"{len(methods) + 4}. Export and one question")
    export.main(["--run", str(run)])
    record = records[0]
    print(f"{record.images[0]}\n{record.turns[-1][1].removeprefix('<image>').strip()}")
    generate.main(["--model", str(run / "merged"), "--image", str(record.images[0]), "--question", record.turns[-1][1].removeprefix("<image>").strip()])
    print(f"(the answer is {record.answer})")

    say(f"Done in {time.perf_counter() - started:.0f} s. What next?")
    print(f"""  tutorials/00_first_run.md                       read how it works, step by step
  .venv/bin/python crystal/train.py --help        every setting
  .venv/bin/python -m crystal.train --method {args.method} --max_steps 2000 --batch_size 16 --lr 5e-4 --lr_rows 20 --labels answer --eval_every 200
  .venv/bin/python -m crystal.evaluate --model {run} --data {scenes}/test.jsonl
  .venv/bin/python -m crystal.generate --model {run}/merged --image {record.images[0]} --question "What colour is the star?" """)


def say(text):
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    config.run_cli(main)
