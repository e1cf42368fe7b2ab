"""How soon is the parallel iteration of fed-back latents as good as the exact recurrence, and
what does it save?

    python data_prep/checks/feedback.py --run runs/valr --data runs/toy/val.jsonl
    python data_prep/checks/feedback.py                          # the shipped tiny model before any training

A line per number T of updates: relative error of the states of the latents, and of the text behind them
(feedback.parallel_error); how much the cross entropy is off; time of forward and backward, and the
recurrence's as a multiple of it (medians of interleaved runs).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import crystal.backbone.model
from crystal import feedback, methods, opening
from crystal.methods.crystal import position_mask
from crystal.methods.sft import cross_entropy
from crystal.runtime import config, data


def measure(model, batch, latents, updates, repeats):
    """-> {T or None for the recurrence: (error of latents, of the rest, cross entropy, seconds)}."""
    errors = feedback.parallel_error(model, batch, latents, updates)
    times, ce = {T: [] for T in [None, *updates]}, {}
    for _ in range(repeats):
        for T in times:
            started = time.perf_counter()
            h, _ = feedback.forward(model, batch, latents, T)
            loss = cross_entropy(model, batch, h=h)
            loss.backward()
            times[T].append(time.perf_counter() - started)
            ce[T] = float(loss.detach())
            model.zero_grad()
    return {T: (*errors.get(T, (0.0, 0.0)), ce[T], statistics.median(times[T])) for T in times}


def main(argv=None):
    parser = config.OneLineParser(
        prog="feedback_check.py",
        description="Error and time of the parallel iteration.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--run",
        default="",
        help="run directory of train.py --method valr; empty: the tiny model, untrained, with 16 latents a "
        "segment",
    )
    opening.method_flags(parser)
    parser.add_argument(
        "--data", default="", help="records, JSON or JSONL; empty: the toy scenes, made if they are not there"
    )
    parser.add_argument(
        "--image_root", default="", help="folder that image paths start from; empty: the folder of the data"
    )
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--updates", default="1,2,4,8,16", help="numbers T, comma-separated")
    args = parser.parse_args(argv)
    try:
        updates = [int(T) for T in args.updates.split(",")]
    except ValueError:
        updates = [-1]
    if min(updates) < 0 or min(args.records, args.repeats) < 1:
        raise config.UserError(
            f"--updates {args.updates} --records {args.records} --repeats {args.repeats}: numbers as in "
            "1,2,4 of at least 0, the others at least 1"
        )
    if args.run:
        model, fmt, settings = opening.open_model(
            args.run, "last", method=args.method, trust_method=args.trust_method
        )
        if not fmt.feeds_back:
            raise config.UserError(f"--run {args.run}: its method does not feed latents back")
        method = methods.get(settings.method)(settings)
        model.hf.model.language_model.requires_grad_(True)
    else:
        settings = methods.parse(["--method", "valr", "--encoders", "none"])
        model = crystal.backbone.model.load("tiny")
        method, fmt = methods.attach(model, settings)
    if not args.data:
        from crystal.runtime import toy

        toy.generate("runs/toy")
    records, _ = data.read(args.data or "runs/toy/val.jsonl", args.image_root)
    if broken := [r for r in records if isinstance(r, data.RecordError)]:
        raise broken[0]
    examples = data.RecordDataset(
        records[: args.records], lambda r, n: method.layout(fmt, r, n), model.image_processor
    )
    batch = data.collate(
        [examples.build(i, 0) | {"bad": []} for i in range(len(examples))], model.tokenizer.pad_token_id
    )
    latents = position_mask(batch["latents"], batch["input_ids"].shape[1])
    found = measure(model, batch, latents, updates, args.repeats)
    _, _, ce, seconds = found[None]
    print(
        f"{len(examples)} records, {fmt.count} latents a segment, up to {int(latents.sum(1).max())} a "
        f"record; recurrence: cross entropy {ce:.4f}, {seconds:.2f} s"
    )
    print("T   error of latents   of the text behind   cross entropy off by   seconds   recurrence takes")
    for T, (inside, behind, loss, time_T) in found.items():
        if T is not None:
            print(
                f"{T:<3} {inside:16.2e} {behind:20.2e} {loss - ce:22.4f} {time_T:9.2f} "
                f"{seconds / time_T:14.2f} x"
            )


if __name__ == "__main__":
    config.run_cli(main)
