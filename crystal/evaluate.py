"""Accuracy with intervals on one's own records or on a benchmark, and whether the latents are used.

    python -m crystal.evaluate --model runs/crystal --data runs/toy/test.jsonl
    torchrun --nproc_per_node=4 crystal/evaluate.py --model runs/crystal --benchmark CV-Bench-2D.tsv
    python -m crystal.evaluate --model runs/crystal --data runs/toy/test.jsonl --reliance

    python -m crystal.evaluate --model runs/livr --data runs/toy/test.jsonl --diagnose

Greedy answers. Records are compared exactly, case and a final full stop aside; a TSV of VLMEvalKit's by its
rules (benchmarks.py). Every rank answers its share and writes each prediction as it comes, so that a run that
was killed goes on where it stood. --reliance is the causal test (reliance.py). --diagnose is LIVR's section
4.4.1 for any method, quickly: without latents, under the method's own mask, and both.

B questions, M answer positions, K latents, H heads.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from crystal import methods
from crystal.corrupt import Corruption
from crystal.evaluation import benchmarks, reliance, scoring
from crystal.evaluation.asking import answers, diagnose
from crystal.evaluation.predictions import Predictions
from crystal.evaluation.scoring import percent, wilson
from crystal.generate import DECODING, thought_length
from crystal.methods.sft import Method as SFT
from crystal.opening import content_of, model_flags, open_model
from crystal.runtime import config, data, distributed, ops
from crystal.runtime.config import UserError

LISTED = 20  # odd rows of a benchmark that are printed one by one; all of them are in the JSON


# --- tables ---


def by_family(results):
    """Results of `answers` -> {family: (hits, n)}, families in order of appearance, then "all"."""
    table = {}
    for r in results:
        for family in dict.fromkeys((r["family"], "all")):
            hits, n = table.get(family, (0, 0))
            table[family] = (hits + r["correct"], n + 1)
    table["all"] = table.pop("all")
    return table


def table(columns):
    """{column: {family: (hits, n)}} -> text, a line per family: percent and its 95 % interval,
    see scoring.percent.
    """
    named = dict.fromkeys(family for column in columns.values() for family in column)
    families = [family for family in named if family != "all"] + ["all"]
    shares = {
        name: {family: percent(hits / n, *wilson(hits, n)) for family, (hits, n) in column.items()}
        for name, column in columns.items()
    }
    width = {name: max(12, len(name) + 2, *(len(x) + 2 for x in shares[name].values())) for name in columns}
    titles = "".join(name.rjust(width[name]) for name in columns)
    lines = ["family".ljust(12) + "questions".rjust(10) + titles]
    for family in families:
        cells, count = "", 0
        for name, column in columns.items():
            count = column[family][1]
            cells += shares[name][family].rjust(width[name])
        lines.append(family.ljust(12) + str(count).rjust(10) + cells)
    return "\n".join(lines)


def benchmark_text(name, records, results):
    """Scores of a benchmark as lines, what was read how, how many answers no rule could read, and which rows
    are odd -> (text, JSON object).
    """
    answered = any(r["answer"] for r in results)
    odd = {r.where: r.odd for r in records if r.odd and (answered or r.odd != "no answer")}
    lines = [f"odd rows, asked all the same: {len(odd)}"] if odd else []
    lines += [f"  {where}: {what}" for where, what in list(odd.items())[:LISTED]]
    if len(odd) > LISTED:
        lines.append(f"  and {len(odd) - LISTED} more")
    text = f"{name or 'a benchmark of its own'}: {len(results)} questions, none with an answer: no scores"
    kept = {"benchmark": name, "scores": {}}
    if answered:
        text, kept = scores_text(name, records, results)
    return "\n".join([text, *lines]), kept | {"odd": odd}


def scores_text(name, records, results):
    """`benchmark_text` without the odd rows."""
    rules = sorted({r.rule for r in records})
    lines = scoring.scores(name, [r | {"row": records[r["index"]].row} for r in results])
    unread = sum(r["extracted"] is None for r in results) / len(results)
    width = max(12, *(len(line) + 2 for line in lines))
    out = [
        f"{name or 'a benchmark of its own'}: {len(results)} questions",
        "".ljust(width) + "rows".rjust(8) + "score".rjust(9) + "95 % interval".rjust(18),
    ]
    for line, (value, n, interval) in lines.items():
        ends = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
        cells = str(n).rjust(8) + f"{100 * value:.2f}".rjust(9) + ends.rjust(18)
        out.append(line.ljust(width) + cells)
    out += [f"read by: {rule}: {scoring.EXTRACTION[rule]}" for rule in rules]
    out.append(f"answers that could not be read, counted as wrong: {100 * unread:.1f} %")
    return "\n".join(out), {
        "benchmark": name,
        "scores": {line: {"score": v, "rows": n, "interval": i} for line, (v, n, i) in lines.items()},
        "extraction": {rule: scoring.EXTRACTION[rule] for rule in rules},
        "unread": unread,
    }


def written_text(results, K):
    """Results of `--latents free` -> (a line: how many answers came after all K latents, after some,
    after none; the shares).
    """
    counts = [r["latents"] for r in results]
    shares = {
        "all": sum(n >= K for n in counts) / len(counts),
        "some": sum(0 < n < K for n in counts) / len(counts),
        "none": sum(n == 0 for n in counts) / len(counts),
    }
    every, some, none = (100 * share for share in shares.values())
    line = (
        f"latents that the model wrote itself: all {K} in {every:.1f} % of the answers, "
        f"some in {some:.1f} %, none in {none:.1f} %"
    )
    return line, shares


# --- the command ---


def make_parser():
    parser = config.OneLineParser(
        prog="evaluate.py",
        description="Accuracy on records or a benchmark, with intervals; --reliance: are the latents used?",
    )
    parser.add_argument(
        "--model", default="tiny", help="a run directory, an export, tiny, tiny-crystal, or a hub name"
    )
    model_flags(parser)
    parser.add_argument(
        "--data",
        "--benchmark",
        required=True,
        help="records: JSON, JSONL, Parquet, a set on the hub; or a benchmark's TSV in VLMEvalKit's format",
    )
    parser.add_argument(
        "--image_root", default="", help="folder that image paths start from; empty: the folder of the data"
    )
    parser.add_argument(
        "--reliance",
        action="store_true",
        help="intervene on the latents' states, and say whether they are used",
    )
    parser.add_argument(
        "--diagnose",
        action="store_true",
        help="four quick columns: as trained, without latents, under the method's mask, both; and the "
        "attention they get",
    )
    parser.add_argument(
        "--bottleneck",
        action="store_true",
        help="answer under the method's mask, as LIVR's: the image is seen through latents alone",
    )
    parser.add_argument(
        "--latents",
        default="keep",
        choices=("keep", "drop", "mask", "free"),
        help="keep the thought and its latents in the prompt, leave the latents out, let no other token "
        "see them, or let the model write them and report how often it does",
    )
    parser.add_argument(
        "--corruption",
        default="",
        help="answer from corrupted images, made as train.py's --corruption says: blur, blur=5, blur=2:8, "
        "or blur=3,noise=30",
    )
    parser.add_argument(
        "--blind",
        "--grey",
        dest="grey",
        action="store_true",
        help="answer from grey images: what the questions alone give away; a run that was trained so is "
        "asked so",
    )
    parser.add_argument(
        "--scores",
        default="",
        help="whose scores a TSV gets, if its name does not tell: " + ", ".join(scoring.SCORES),
    )
    parser.add_argument("--suffix", default="", help="text to put behind every prompt of a TSV")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of corruption, and of the pairs that swap latents",
    )
    parser.add_argument("--limit", type=int, default=0, help="first so many records; 0: all")
    parser.add_argument(
        "--out",
        default="",
        help="predictions, a line of JSON per question (with --reliance a folder, with --diagnose a line "
        "for each way of asking); a TSV's and --reliance's default to the model's folder",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew where --out holds predictions already"
    )
    return parser


def check(args, parser):
    """UserError for flags that exclude one another, mean nothing together, or are out of range."""
    idle: dict[str, tuple[str, ...]] = {}
    if args.reliance:
        idle["--reliance"] = ("diagnose", "latents", "grey", "scores")
    if args.diagnose:
        idle["--diagnose"] = ("latents", "bottleneck", "scores")
    if not is_tsv(args):
        idle["records that are no TSV"] = ("scores", "suffix")
    for mode, names in idle.items():
        given = [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]
        if given:
            raise UserError(f"{given[0]} changes nothing with {mode}; leave it out")

    if args.scores and args.scores not in scoring.SCORES:
        raise UserError(f"--scores {args.scores}: choose one of {', '.join(scoring.SCORES)}")
    if args.batch_size < 1 or args.max_new_tokens < 1 or args.limit < 0:
        raise UserError("--batch_size and --max_new_tokens must be at least 1, --limit must not be negative")

    # A mistake is told before a model is loaded; a method's file may have modes of its own.
    if args.corruption and not (args.method or args.trust_method):
        config.corruption_of(args.corruption)


def is_tsv(args):
    """Whether --data is a benchmark's."""
    return Path(args.data).suffix == ".tsv"


def read_records(args, procs):
    """The records to ask, the first --limit of them. RecordError for a broken one; turns that are
    left out are told.
    """
    if is_tsv(args):
        records, dropped = benchmarks.read(args.data, args.image_root, args.suffix), 0
    else:
        records, dropped = data.read(args.data, args.image_root)
    for record in records:
        if isinstance(record, data.RecordError):
            raise record
    if dropped:
        procs.print(f"{dropped} later turns are not asked")
    return records[: args.limit or None]


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    check(args, parser)
    procs = distributed.start(args.device, timeout=86400.0)  # ranks wait for the slowest one's last answer
    ops.announce(procs.print)
    records = read_records(args, procs)

    # The model, and the method whose mask, corruption and settings it is asked with.
    model, fmt, settings = open_model(
        args.model, args.checkpoint, procs.device, min_pixels=args.min_pixels, max_pixels=args.max_pixels,
        method=args.method, trust_method=args.trust_method,
    )
    method = methods.get(settings.method)(settings) if settings else SFT(config.Settings(method="sft"))
    if settings and settings.blind:
        if args.reliance:
            raise UserError(f"--reliance: {args.model} was trained blind, and there is nothing to take away")
        args.grey = True
    corruption = None
    if args.corruption:
        corruption = config.corruption_of(args.corruption, method.settings.corruptions)
    if args.bottleneck and type(method).biases is SFT.biases:
        raise UserError(f"--bottleneck: {method.settings.method} has no mask")
    if args.latents == "free":
        thought_length(fmt, args.model)  # refuses a model without latents before anything is asked

    folder = Path(args.model) if Path(args.model).is_dir() else Path("runs") / Path(args.model).name
    how = {
        "corruption": corruption,
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "procs": procs,
    }
    if args.reliance:
        run_reliance(args, model, fmt, method, records, folder, how)
    elif args.diagnose:
        run_diagnosis(args, model, fmt, method, records, folder, how)
    else:
        run_questions(args, model, fmt, method, records, folder, how)
    procs.stop()


def mask_of(args, model, method):
    """--bottleneck as `answers` takes it: function (batch) -> [AttentionBias], or None."""
    if not args.bottleneck:
        return None
    return lambda batch: method.biases(model, batch)


def run_reliance(args, model, fmt, method, records, folder, how):
    """--reliance: reliance.py's files, in --out or the model's folder."""
    out = args.out or folder / "reliance" / Path(args.data).stem
    whole = [r for r in records if r.images and r.answer]
    if len(whole) < len(records):
        how["procs"].print(f"{len(records) - len(whole)} rows without a picture or an answer are left out")
    records = whole
    about = {name: getattr(args, name) for name in ("model", "checkpoint", "data", "bottleneck")}
    how = how | {"corruption": how["corruption"] or method.corruption or Corruption()}
    reliance.run(model, fmt, records, out, about, biases=mask_of(args, model, method), **how)


def run_diagnosis(args, model, fmt, method, records, folder, how):
    """--diagnose: a table, and with --out or for a TSV the answers of each way of asking."""
    procs = how["procs"]
    found, mass = diagnose(model, fmt, method, records, grey=args.grey, **how)
    procs.print(table({name: by_family(part) for name, part in found.items()}))
    if mass is not None:
        procs.print(f"mean attention from answers to latents, over layers, heads and rows: {mass:.4f}")

    out = args.out
    if is_tsv(args) and not out:
        out = folder / "evaluation" / f"{Path(args.data).stem}.diagnose.jsonl"
    if out and procs.is_first:
        lines = [json.dumps(r | {"asked": name}) for name, part in found.items() for r in part]
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text("".join(line + "\n" for line in lines))
        print(f"wrote {out}")


def run_questions(args, model, fmt, method, records, folder, how):
    """One way of asking: a table or a benchmark's scores, and with --out or for a TSV the
    predictions as they come.
    """
    procs, started = how["procs"], time.perf_counter()
    asked = what_is_asked(args, model, fmt, method, records, how["corruption"])
    out = args.out
    if is_tsv(args) and not out:
        out = folder / "evaluation" / f"{Path(args.data).stem}.jsonl"
    predictions = Predictions(out, asked, args.overwrite, procs) if out else None
    kept = {"done": predictions.done, "tell": predictions.tell} if predictions else {}
    results = answers(
        model, fmt, records,
        latents=args.latents,
        grey=args.grey,
        progress="evaluate",
        biases=mask_of(args, model, method),
        **how,
        **kept,
    )

    if is_tsv(args):
        name = args.scores or scoring.known_as(args.data)
        text, outcome = benchmark_text(name, records, results)
    else:
        families = by_family(results)
        text = table({Path(args.model).name: families})
        outcome = {"families": {}}
        for family, (hits, n) in families.items():
            outcome["families"][family] = {"right": hits / n, "rows": n, "interval": wilson(hits, n)}
    if args.latents == "free":
        line, shares = written_text(results, fmt.count)
        text, outcome = f"{text}\n{line}", outcome | {"written": shares}

    procs.print(text)
    took = time.perf_counter() - started
    procs.print(
        f"{len(results)} questions in {took:.0f} s; pixels {asked['pixels']}; "
        f"first prompt:\n{asked['prompt']!r}"
    )
    if predictions:
        predictions.close(results, outcome)
        procs.print(f"wrote {predictions.path} and {predictions.about.name}")


def what_is_asked(args, model, fmt, method, records, corruption):
    """Everything that an answer depends on, as JSON: predictions of another question are not gone on with.

    A model and a file are known by what is in them: "best" may be another checkpoint tomorrow.
    """
    first = records[0]
    latents = "none" if args.latents == "free" else args.latents
    prompt = fmt.question(first.turns, [1] * len(first.images), latents)
    asked = {
        "model": args.model,
        "checkpoint": args.checkpoint,
        "model_sha256": content_of(args.model, args.checkpoint),
        "data": args.data,
        "data_sha256": data_digest(args.data),
        "decoding": DECODING,
        "latents": args.latents,
        "bottleneck": args.bottleneck,
        "corruption": str(corruption or ""),
        "grey": args.grey,
        "pixels": {edge: n for edge, n in dict(model.image_processor.size).items() if n},
        "max_new_tokens": args.max_new_tokens,
        "suffix": args.suffix,
        "limit": args.limit,
        "seed": args.seed,
        "prompt": fmt.tokenizer.decode(prompt.ids),
    }
    if method.settings.method.endswith(".py"):
        asked["method"] = methods.fingerprint(method.settings.method)["method_sha256"]
    return asked


def data_digest(path):
    """SHA-256 of a file's bytes, of a folder's files' digests, or of the name of a data set on the hub."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if path.is_dir():
        whole = "".join(data_digest(one) for one in sorted(path.glob("*.parquet")))
    else:
        whole = str(path)
    return hashlib.sha256(whole.encode()).hexdigest()


if __name__ == "__main__":
    config.run_cli(main)
