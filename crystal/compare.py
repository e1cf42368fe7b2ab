"""Methods side by side: the same data, updates and records seen, several seeds each, a table with intervals.

    python -m crystal.compare --methods sft,crystal,livr --seeds 3 --max_steps 200
    torchrun --nproc_per_node=2 crystal/compare.py --methods sft,crystal,livr --seeds 3 --max_steps 200
    python -m crystal.compare --methods "sft,livr,livr: --masked 0" --model M --data TRAIN --test TEST
    python -m crystal.compare --study crystal_table4

A method may carry flags of its own after a colon, as a control does. What compare does not know itself goes
to train.py, for every method alike. Each run has a directory below --output; one that is finished is not
repeated, one that was interrupted goes on. With the tiny base, flags that demo.py gives a method come first.
--study runs a table of a paper instead (run_study.py).
"""

import json
import re
import shlex
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from crystal import demo, evaluate, methods, opening, run_study
from crystal.evaluation.study import interval
from crystal.runtime import config, data, distributed
from crystal.runtime.config import UserError


def table(scores):
    """{method: [{family: percent} of each seed]} -> text: a line a family, mean and half width over seeds;
    then differences to the first method.

    A difference is taken seed by seed: both runs of a seed saw the same records in the same order.
    """
    names, families = list(scores), list(next(iter(scores.values()))[0])
    first = scores[names[0]]
    against = {
        f"{name} - {names[0]}": [{f: a[f] - b[f] for f in families} for a, b in zip(scores[name], first)]
        for name in names[1:]
    }
    lines = []
    for part in (scores, against):
        if part:
            width = {name: max(14, len(name) + 2) for name in part}
            lines.append("family".ljust(12) + "".join(name.rjust(width[name]) for name in part))
            for f in families:
                cells = {
                    name: ("{:.1f} ±{:.1f}" if len(seeds) > 1 else "{:.1f}").format(
                        *interval([seed[f] for seed in seeds])
                    )
                    for name, seeds in part.items()
                }
                lines.append(f.ljust(12) + "".join(cell.rjust(width[name]) for name, cell in cells.items()))
            lines.append("")
    return "\n".join(lines[:-1])


def finished(run, flags, asked):
    """Results of a run that `flags` made to its end, or None.

    asked: what the results depend on beside the flags, see `what_is_asked`. UserError where the directory
    holds another run's, or other questions' results.
    """
    note = run / "compare.json"
    if not note.is_file():
        return None
    saved = json.loads(note.read_text())
    if saved["flags"] != flags:
        raise UserError(
            f"{note}: made with {shlex.join(saved['flags'])}; another --output is needed for other settings"
        )
    before = saved.get("asked", {})
    if changed := [name for name in asked if before.get(name) != asked[name]]:
        raise UserError(
            f"{note}: its {', '.join(changed)} differed from what is asked now; another --output is needed"
        )
    return saved["percent"]


def what_is_asked(args, method, test):
    """What a run's results depend on beside its flags, as JSON: contents of files, and not their names."""
    return {
        "--data": args.data and evaluate.data_digest(args.data),
        "--test": evaluate.data_digest(test),
        "--questions": args.questions,
        "--max_new_tokens": args.max_new_tokens,
        "method's file": methods.fingerprint(method),
    }


def main(argv=None):
    parser = config.OneLineParser(
        prog="compare.py",
        description="Train and evaluate several methods over several seeds; other flags are train.py's.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods",
        default="sft,crystal,livr",
        help="comma-separated names or files, each with flags of its own after a colon if need be",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, with seeds 0, 1, ..")
    parser.add_argument(
        "--max_steps",
        type=int,
        default=200,
        help="updates of each run; with --batch_size, the same for all, the budget",
    )
    parser.add_argument("--model", default="tiny", help="what all start from")
    parser.add_argument(
        "--data",
        default="",
        help="training records; empty: toy scenes, with val and test records of their own",
    )
    parser.add_argument("--test", default="", help="records to ask")
    parser.add_argument("--questions", type=int, default=1000, help="first so many of them")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--output", default="runs/compare")
    parser.add_argument(
        "--study",
        default="",
        help="instead of --methods: a study of tutorials/studies/, or a TOML file of your own",
    )
    parser.add_argument(
        "--page", action="store_true", help="with --study: its page of the runs that are there, and no run"
    )

    args, more = parser.parse_known_args(argv)
    study = run_study.read(args.study) if args.study else None
    if study:
        # What a study says is the default, and the command line wins.
        if args.methods != parser.get_default("methods"):
            raise UserError("--methods changes nothing with --study, whose file names them; leave it out")
        parser.set_defaults(**run_study.defaults(study))
        args, more = parser.parse_known_args(argv)
    elif args.page:
        raise UserError("--page goes with --study")

    if min(args.seeds, args.questions, args.max_new_tokens) < 1 or bool(args.data) != bool(args.test):
        raise UserError(
            "--seeds, --questions and --max_new_tokens must be at least 1, and --data goes with --test"
        )
    if study:
        run_study.plans_of(study, args, more)  # a row's wrong flag is told before anything starts

    if study and args.page:
        print(run_study.write_page(study, args, more))
        return

    procs, out = distributed.start(), Path(args.output)
    if not args.data:
        from crystal.runtime import toy

        with procs.main_process_first(), nullcontext() if procs.is_first else redirect_stdout(None):
            toy.generate(out / "toy")
    test = args.test or out / "toy" / "test.jsonl"
    records, _ = data.read(test)
    if broken := [r for r in records if isinstance(r, data.RecordError)]:
        raise broken[0]
    records = records[: args.questions]
    if study:
        run_study.make(study, args, more, records, procs)
        procs.stop()
        return

    scores, count, where = {}, 0, {}
    specs = [(spec.strip(), *spec.strip().partition(":")[::2]) for spec in args.methods.split(",")]
    for seed in range(args.seeds):  # seed by seed: a table of all methods as early as can be
        for spec, method, own in specs:
            count += 1
            run = out / f"{re.sub(r'[^A-Za-z0-9.]+', '_', spec.removesuffix('.py'))}-{seed}"
            flags = [
                "--method",
                method,
                "--model",
                args.model,
                *(demo.recipe(method, procs.world) if args.model == "tiny" else []),
                "--max_steps",
                str(args.max_steps),
                *more,
                *shlex.split(own),
                "--seed",
                str(seed),
            ]
            procs.print(f"[{count}/{len(specs) * args.seeds}] {spec}, seed {seed}: {run}")

            asked = what_is_asked(args, method, test)
            percent = finished(run, flags, asked)
            procs.barrier()  # all ranks have looked

            if percent is None:
                if method not in where:  # LaViT's teacher looks once
                    where[method] = (
                        ["--data", args.data]
                        if args.data
                        else demo.data_of(method, out / "toy", out / "sft-0", procs)
                    )

                run_study.trained(run, [*flags, *where[method]], args.max_steps)
                model, fmt, _ = opening.open_model(run, device=procs.device, method=method)
                results = evaluate.answers(
                    model, fmt, records, max_new_tokens=args.max_new_tokens, progress=spec, procs=procs
                )
                percent = {f: 100 * hits / n for f, (hits, n) in evaluate.by_family(results).items()}
                if procs.is_first:
                    note = {"flags": flags, "asked": asked, "percent": percent}
                    (run / "compare.json").write_text(json.dumps(note) + "\n")

            scores.setdefault(spec, []).append(percent)

        text = table(scores)
        procs.print(
            f"\nafter {seed + 1} of {args.seeds} seeds: percent of {len(records)} questions, mean and half "
            f"width of its 95 % interval over seeds\n{text}\n"
        )
    if procs.is_first:
        (out / "table.txt").write_text(text + "\n")
    procs.stop()


if __name__ == "__main__":
    config.run_cli(main)
