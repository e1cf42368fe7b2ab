"""The whole main job in minutes on a CPU: train, evaluate, draw, export, ask.

    make demo                    sft and crystal
    make demo METHOD=m           sft and m: livr, lavit, valr, or a file of your own

Both methods start from the shipped tiny model and see the same toy scenes the same number of times. Two cores
are two processes that share every batch, as four GPUs would. LaViT's teacher is the demo's own sft run, no
larger than its student; what its filters would leave out is printed, and trained on all the same.
"""

import os
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import load_file

import crystal.backbone.model
from crystal import claims, evaluate, export, generate, methods, opening, train, training_data, visualize
from crystal.layout import Format
from crystal.runtime import checkpoint, config, data, distributed, toy
from crystal.runtime.config import UserError

# Minutes each on two cores; the paper's own settings are train.py's defaults. A model this small forgets
# how to see while it learns to recite a thought: so the answer alone is a label, and the new tokens' rows
# learn faster than the rest. Where the corrupted image leaves no other way, what latents carry leaves its
# noise after a hundred updates and goes on growing: so with a blur of 8 to 10 pixels. One of 2 to 5 leaves
# these scenes too much, and latents then begin to carry the answer between 250 and 500 updates.
BATCH = 16
UPDATES = 500
UPDATES_OF = {"valr": 240}  # it reads its latents one after the other, and takes three times as long
ASKED = 1000  # questions under every intervention
# The learning rate has fallen to nothing by then; 64 records are too few to choose a checkpoint by.
LAST = "last"
ANSWERS = ["--batch_size", "100", "--max_new_tokens", "8", "--overwrite"]
# Run as a program: crystal imports nothing from data_prep.
TEACHER = Path(__file__).resolve().parents[1] / "data_prep" / "lavit_teacher.py"
TRAINING = ["--lr", "1e-3", "--lr_tokens", "10", "--eval_records", "64"]
OWN = {
    "crystal": ["--labels", "answer", "--corruption", "blur=8:10"],
    "livr": [],
    "lavit": ["--tune", "lora"],
    "valr": [
        "--lr_latents",
        "3e-4",
        "--lr_tokens",
        "5",
        "--first_share",
        "0.6",
        "--latents",
        "4",
        "--encoders",
        "tiny",
    ],
    "sft": [],
}


def recipe(method, world=1):
    """Flags of train.py with which a method, or what is built on it, trains on the tiny base in
    minutes, in `world` processes.
    """
    kind = methods.get(method)
    return [
        "--batch_size",
        str(BATCH // world),
        *TRAINING,
        *next(flags for name, flags in OWN.items() if issubclass(kind, methods.get(name))),
    ]


def updates(method):
    """How many updates the demo gives a method, and sft beside it, unless it is told otherwise."""
    kind = methods.get(method)
    own = [n for name, n in UPDATES_OF.items() if issubclass(kind, methods.get(name))]
    return own[0] if own else UPDATES


def data_of(method, scenes, teacher, procs):
    """Flags that name a method's data below `scenes`; LaViT's is what the run `teacher` saw in it, made here.
    """
    files = {"--data": scenes / "train.jsonl", "--val_data": scenes / "val.jsonl"}
    if issubclass(methods.get(method), methods.get("lavit")):
        if not (teacher / "checkpoints").is_dir():
            raise UserError(
                f"--method {method}: its teacher {teacher} is not there; sft has to be trained first"
            )
        for flag, limit in (("--data", 0), ("--val_data", 64)):
            with procs.main_process_first():
                if procs.is_first:
                    distributed.run_program(
                        procs.world,
                        TEACHER,
                        [
                            "--teacher",
                            teacher,
                            "--data",
                            files[flag],
                            "--limit",
                            limit,
                            "--keep",
                            "all",
                            "--batch_size",
                            64,
                            "--max_new_tokens",
                            8,
                            "--overwrite",
                        ],
                    )
            files[flag] = files[flag].with_suffix(".lavit.jsonl")
    return [str(word) for flag in files.items() for word in flag]


def main(argv=None):
    parser = config.OneLineParser(
        prog="demo.py", description="Train, evaluate, draw and export on the tiny model."
    )
    parser.add_argument("--method", default="crystal")
    parser.add_argument("--max_steps", type=int, help=f"updates of each; default {UPDATES}, valr's 240")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=1000, help="test questions for the table")
    parser.add_argument("--output", default="runs/demo")
    parser.add_argument(
        "--processes",
        type=int,
        choices=(1, 2, 4, 8),
        default=1 if 1 in (torch.cuda.device_count(), os.cpu_count()) else 2,
        help="that share the work",
    )
    args = parser.parse_args(argv)
    if args.questions < 1:
        raise UserError(f"--questions {args.questions}: must be at least 1")
    recipe(args.method)  # a wrong name is told before anything starts
    if issubclass(methods.get(args.method), methods.get("lavit")) and not TEACHER.is_file():
        raise UserError(f"--method {args.method}: needs {TEACHER.name}, which no wheel holds, of the sources")
    args.max_steps = args.max_steps or updates(args.method)
    distributed.launch(args.processes, "crystal.demo", sys.argv[1:] if argv is None else argv)
    procs, out, started = distributed.start(), Path(args.output), time.perf_counter()

    def say(text):
        procs.print(f"\n== {text}")

    say("1. Data: toy scenes, questions that need small details")
    scenes = Path(training_data.toy_folder(args.seed))
    with procs.main_process_first(), nullcontext() if procs.is_first else redirect_stdout(None):
        toy.generate(scenes, seed=args.seed)
    records, _ = data.read(scenes / "test.jsonl")
    records = records[: args.questions]

    chosen = list(dict.fromkeys(["sft", args.method]))
    runs = {}
    for n, method in enumerate(chosen):
        name = Path(method).stem
        say(f"{n + 2}. Training {name}: {args.max_steps} updates of {BATCH} from the same base")
        if "--encoders" in recipe(method):
            procs.print("its encoder is small, and was taught what the patches of such scenes show")
        flags = [
            *data_of(method, scenes, out / "sft", procs),
            "--max_steps",
            str(args.max_steps),
            "--seed",
            str(args.seed),
            "--save_every",
            "1000",
            "--eval_every",
            "100",
            "--log_every",
            "50",
            "--overwrite",
        ]
        runs[name] = train.main(
            ["--method", method, "--output", str(out / name), *recipe(method, procs.world), *flags]
        )
        if not checkpoint.step_dir(runs[name], args.max_steps).is_dir():
            raise UserError(f"{runs[name]}: stopped before its end")
    run = runs[Path(args.method).stem]

    say(
        f"{len(chosen) + 2}. Accuracy on {len(records)} held-out questions, percent with the half width of "
        "the 95 % interval"
    )
    how = dict(batch_size=100, max_new_tokens=8, procs=procs)
    base = crystal.backbone.model.load("tiny", device=procs.device)
    seeing = evaluate.answers(base, Format(base.tokenizer), records, progress="base", **how)
    # Under a hub's names, the tied head left out.
    twin = load_file(crystal.backbone.model.TINY.parent / "blind" / "model.safetensors")
    names = crystal.backbone.model.parameter_names(base.hf, twin)
    weights = {names[name]: tensor for name, tensor in twin.items()}
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    base.hf.load_state_dict(weights)
    found = {
        "blind": evaluate.answers(base, Format(base.tokenizer), records, grey=True, progress="blind", **how),
        "base": seeing,
    }
    masses, in_prompt = "", False
    for (name, directory), method in zip(runs.items(), chosen):
        model, fmt, settings = opening.open_model(
            directory, which=LAST, device=procs.device, method=method
        )
        asked, mass = evaluate.diagnose(model, fmt, methods.get(settings.method)(settings), records, **how)
        in_prompt = fmt.count > 0 and not (fmt.writes_own_latents or fmt.feeds_back)
        found |= {
            name if column == "as trained" else f"{name}, {column}": results
            for column, results in asked.items()
        }
        if mass is not None:
            masses += (
                f"{name}: mean attention from answers to latents, over layers, heads and rows: {mass:.4f}\n"
            )
    if procs.is_first:
        text = (
            evaluate.table({column: evaluate.by_family(results) for column, results in found.items()})
            + "\n"
            + masses.rstrip()
        )
        print(text)
        (out / "table.txt").write_text(text + "\n")

    n = len(chosen) + 3
    if in_prompt:
        say(f"{n}. Do the latents carry the answer? {ASKED} questions under interventions")
        evaluate.main(reliance_flags(run, args.method, scenes))
        n += 1

    # CrystaL's own claim is the table above; each relative's paper has another.
    claims_met = claims.told(args.method, run, asked) if procs.is_first else []
    if claims_met:
        say(f"{n}. What its paper says happens")
        procs.print("\n".join(claims_met))
        n += 1

    if procs.is_first:
        show(run, args.method, records[0], scenes, out, n, procs.device)

        say(f"Done in {time.perf_counter() - started:.0f} s. What next?")
        ask = "python -m crystal"
        own = f" --method {args.method}" if args.method.endswith(".py") else ""
        trained_with = " ".join(recipe(args.method))
        picture = records[0].images[0]
        print(f"""  tutorials/00_first_run.md                       read how it works, step by step
  .venv/bin/python crystal/train.py --help        every setting
  .venv/bin/{ask}.train --method {args.method} --max_steps 2000 {trained_with} --eval_every 200
  .venv/bin/{ask}.evaluate --model {run} --data {scenes}/test.jsonl{own}
  .venv/bin/{ask}.generate --model {run}/merged --image {picture} --question "What colour is the star?" """)
    procs.stop()


def reliance_flags(run, method, scenes):
    """Flags of evaluate.py that ask a run under every intervention."""
    own = ["--method", method] if method.endswith(".py") else []
    questions = ["--data", str(scenes / "test.jsonl"), "--limit", str(ASKED)]
    return ["--model", str(run), "--checkpoint", LAST, *own, *questions, "--reliance", *ANSWERS]


def show(run, method, record, scenes, out, n, device):
    """Pictures of a run of a method, its export, and the export's answer to one record's question; the
    headings count from `n`.
    """
    print(f"\n== {n}. Pictures", flush=True)
    for path in visualize.pictures(
        run, scenes / "test.jsonl", out / "pictures", which=LAST, device=device, method=method
    ):
        print(path)

    print(f"\n== {n + 1}. Export and one question", flush=True)
    export.main(["--run", str(run), "--checkpoint", LAST, "--method", method])
    question = record.turns[-1][1].removeprefix("<image>").strip()
    print(f"{record.images[0]}\n{question}")
    generate.main(["--model", str(run / "merged"), "--image", str(record.images[0]), "--question", question])
    print(f"(the answer is {record.answer})")


if __name__ == "__main__":
    config.run_cli(main)
