"""Does `--reliance` tell used latents from unused ones? Models of both kinds, trained alike, and what
it says of each.

`open` may read the image and pass its latents by (reliance_open.py); `bottleneck` may not
(reliance_bottleneck.py). Both start from the tiny base with the same tokens, data, order, updates and rates;
the mask is the only difference, and each is asked under its own. Exit code 1 if a verdict is not the expected
one. What a run said stands in reliance_check.log.

    python data_prep/checks/reliance.py                  # three seeds each; about 12 minutes on two cores
"""

import json
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from crystal import methods, opening, train
from crystal.evaluation import reliance
from crystal.runtime import config, data, distributed, toy

HERE = Path(__file__).resolve().parent
TRAINING = [
    "--batch_size",
    "16",
    "--lr",
    "1e-3",
    "--lr_tokens",
    "4",
    "--labels",
    "answer",
    "--eval_every",
    "40",
    "--eval_records",
    "96",
    "--log_every",
    "40",
    "--save_every",
    "1000",
    "--overwrite",
]
EXPECTED = {"open": False, "bottleneck": True}


def main(argv=None):
    parser = config.OneLineParser(
        prog="reliance_check.py",
        description="Train models that use their latents and models that do not, and test --reliance on "
        "them.",
    )
    parser.add_argument("--methods", default="open,bottleneck", help="comma-separated: open, bottleneck")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="of the data's order, the adapters and the new tokens",
    )
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument(
        "--family", default="count", help="family of toy questions: " + ", ".join(toy.FAMILIES)
    )
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--output", default="runs/reliance_check")
    args = parser.parse_args(argv)
    out = Path(args.output)
    toy.generate("runs/toy", seed=0)
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        lines = [
            x
            for x in Path(f"runs/toy/{split}.jsonl").read_text().splitlines()
            if json.loads(x)["family"] == args.family
        ]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    records, _ = data.read(out / "test.jsonl", "runs/toy")
    wrong = 0
    for seed in args.seeds:
        for name in args.methods.split(","):
            file = str(HERE / f"reliance_{name}.py")
            run = train.main(
                [
                    "--method",
                    file,
                    "--data",
                    str(out / "train.jsonl"),
                    "--val_data",
                    str(out / "val.jsonl"),
                    "--image_root",
                    "runs/toy",
                    "--output",
                    str(out / f"{name}-{seed}"),
                    "--seed",
                    str(seed),
                    "--max_steps",
                    str(args.max_steps),
                    *TRAINING,
                ]
            )
            model, fmt, settings = opening.open_model(run, device=distributed.start().device, method=file)
            # Each is asked under the mask that it learned under.
            method = methods.get(settings.method)(settings)
            result = reliance.measure(
                model,
                fmt,
                records[: args.questions],
                batch_size=50,
                max_new_tokens=4,
                seed=seed,
                biases=lambda batch: method.biases(model, batch),
            )
            (run / "reliance.json").write_text(json.dumps(result, indent=1) + "\n")
            expected = bool(result["used"]) == EXPECTED[name]
            wrong += not expected
            print(
                f"\n{name}, seed {seed}: "
                f"{'as expected' if expected else 'NOT AS EXPECTED'}\n{reliance.text(result)}\n",
                flush=True,
            )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    config.run_cli(main)
