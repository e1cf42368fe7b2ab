"""Makes the runs of a study, each once, and writes what came out: python -m crystal.compare --study NAME.

    python -m crystal.compare --study crystal_figure5              all of it, seed by seed
    python -m crystal.compare --study crystal_figure5 --seeds 1    its first seed; later the rest
    python -m crystal.compare --study crystal_figure5 --page       the page of what is there, no run

Seeds are the outer loop, so that a table of all rows is there as early as can be. A run has a directory below
--output, named by its method and a digest of everything that makes it: studies share runs, one that is
finished is not repeated, and one that was killed goes on from its last checkpoint. After each run NAME.json
and NAME.md are written to --output. A second process started with the same command takes other runs.
"""

import fcntl
import hashlib
import json
import re
import shlex
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

from crystal import demo, evaluate, methods, opening, train
from crystal.backbone.model import TINY
from crystal.evaluation import reliance, study
from crystal.run_directory import logged_lines
from crystal.runtime import checkpoint, config
from crystal.runtime.config import UserError

FOLDER = Path(__file__).resolve().parents[1] / "tutorials" / "studies"
NOTE = "study.json"  # in a run's directory: its outcome
BATCH = 100  # questions asked together


def read(name):
    """--study -> study.Study, every row's flags checked."""
    return study.read(name, FOLDER)


def defaults(chosen):
    """The command line's defaults where a study says what is run."""
    numbers = {name: getattr(chosen, name) for name in ("seeds", "max_steps", "questions")}
    return numbers | {"max_new_tokens": 8, "output": "runs/studies"}


def make(chosen, args, more, records, procs):
    """Every run of a study that is not there yet, then its page. records: the questions, all that are asked."""
    runs = [(row, seed) for seed in range(args.seeds) for row in chosen.rows if row.method or not seed]
    rows = {row.name: Plan(chosen, row, args, more) for row in chosen.rows}
    for count, (row, seed) in enumerate(runs, 1):
        plan = rows[row.name]
        run = plan.run(seed)
        procs.print(f"[{count}/{len(runs)}] {row.name}, seed {seed}: {run}")
        with held(run, procs) as mine:
            if not mine:
                procs.print("another process is making it")
                continue
            found = outcome_of(run)
            procs.barrier()  # all ranks have looked
            if found is None or found["asked"] != asked_of(chosen, args):
                started = time.perf_counter()
                if row.method:
                    trained(run, [*plan.flags(seed, procs.world), *plan.data(procs)], plan.updates)
                found = ask(plan, run, records, procs) | {"key": plan.key, "asked": asked_of(chosen, args)}
                found["minutes"] = round((time.perf_counter() - started) / 60, 1)
                if procs.is_first:
                    write(run / NOTE, json.dumps(found) + "\n")
        if procs.is_first:
            write_page(chosen, args, more)
    if procs.is_first:
        print(write_page(chosen, args, more))


class Plan:
    """How a row of a study is trained: its flags, its data, and the directory of each seed's run."""

    def __init__(self, chosen, row, args, more):
        """more: train.py's flags of the command line, for every row. UserError for flags that it refuses."""
        self.chosen = chosen
        self.row = row
        self.args = args
        self.more = more
        self.updates = args.max_steps * row.times

        # A method's file is named from the study's own folder.
        self.method = row.method
        if row.method.endswith(".py"):
            self.method = str(chosen.file.parent / row.method)
        if self.method:
            methods.parse(self.flags(0))
        self.key = self.digest()

    def flags(self, seed, world=1):
        """train.py's flags of a seed's run, without its data. A row's own win over those for all.

        On the tiny base demo.py's come first; on another model all else is the paper's.
        """
        start = ["--method", self.method, "--model", self.args.model]
        recipe = demo.recipe(self.method, world) if self.args.model == "tiny" else []
        updates = ["--max_steps", str(self.updates)]
        own = [*shlex.split(self.chosen.flags), *self.more, *shlex.split(self.row.flags)]
        return [*start, *recipe, *updates, *own, "--seed", str(seed)]

    def digest(self):
        """What makes a row's runs, as twelve hexadecimal digits.

        It is flags, data, the bytes of a method's file, and those of the tiny base, which may come to be another.
        Neither the seed nor the number of processes, which share a batch; nor where a method's file lies.
        """
        flags = self.flags("") if self.method else []
        named = [Path(flag).name if flag == self.method else flag for flag in flags]
        what = [named, methods.fingerprint(self.method), self.args.model, self.args.data]
        if self.args.model == "tiny":
            weights = (TINY / "model.safetensors").read_bytes()
            what.append(hashlib.sha256(weights).hexdigest())
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]

    def run(self, seed):
        """The directory of a seed's run."""
        name = Path(self.method or self.args.model).stem
        return Path(self.args.output) / f"{re.sub('[^A-Za-z0-9]+', '_', name)}-{self.key}-{seed}"

    def data(self, procs):
        """Flags that name the data. On the scenes, LaViT's teacher is the first row to beat, of seed 0."""
        if self.args.data:
            return ["--data", self.args.data]
        first = self.chosen.row(self.chosen.against[0]) if self.chosen.against else self.row
        teacher = Plan(self.chosen, first, self.args, self.more).run(0)
        return demo.data_of(self.method, Path(self.args.output) / "toy", teacher, procs)


@contextmanager
def held(run, procs):
    """Whether this process (all ranks of it) has a run for itself, and keeps others away while it lasts."""
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.with_suffix(".lock"), "w") as file:
        taken = False
        if procs.is_first:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = True
        yield not procs.any(taken)


def trained(run, flags, updates):
    """Trains a run to its end, from its newest checkpoint if there is one. UserError where it stopped before."""
    going = "--resume" if checkpoint.newest(run) else "--overwrite"
    train.main([*flags, "--output", str(run), going])
    if not checkpoint.step_dir(run, updates).is_dir():
        raise UserError(f"{run}: stopped before its end; the same command goes on from there")


def asked_of(chosen, args):
    """What a row's outcome depends on beside its run."""
    return {
        "test": args.test,
        "questions": args.questions,
        "max_new_tokens": args.max_new_tokens,
        "interventions": chosen.interventions,
        "corruption": chosen.corruption,
    }


def ask(plan, run, records, procs):
    """A finished run's outcome: see study.value; with what its last validation says that latents carry."""
    source = run if plan.method else plan.args.model
    model, fmt, _ = opening.open_model(source, device=procs.device, method=plan.method)
    how = dict(batch_size=BATCH, max_new_tokens=plan.args.max_new_tokens, procs=procs)
    results = evaluate.answers(model, fmt, records, progress=plan.row.name, **how)
    outcome = {
        "families": {family: list(counts) for family, counts in evaluate.by_family(results).items()},
        "right": "".join(str(int(result["correct"])) for result in results),
        "latents": fmt.count,
        "carried": carried(run),
    }

    # The interventions replace states of latents that stand in the prompt.
    in_prompt = fmt.count > 0 and not (fmt.writes_own_latents or fmt.feeds_back)
    some = records[: plan.chosen.interventions]
    if in_prompt and some:
        corruption = config.corruption_of(plan.chosen.corruption)
        told = reliance.measure(model, fmt, some, corruption, **how)
        outcome["conditions"] = {c["condition"]: round(100 * c["right"], 3) for c in told["conditions"]}
        outcome["attention"] = round(100 * mean(told["attention"]["latents"]), 3)
    return outcome


def carried(run):
    """Gain, swap and drop of a run's last validation, in nats, each with half of its interval."""
    log = run / "metrics.jsonl"
    names = [name + half for name in ("gain", "swap", "drop") for half in ("", "_pm")]
    found = {}
    for line in logged_lines(log) if log.is_file() else []:
        found |= {name: line[f"val_{name}"] for name in names if f"val_{name}" in line}
    return found


def outcome_of(run):
    """What a run's directory says came out, or None."""
    note = run / NOTE
    return json.loads(note.read_text()) if note.is_file() else None


def write(path, text):
    """A file that is whole or not there."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text)
    part.replace(path)


def write_page(chosen, args, more):
    """NAME.json and NAME.md in --output, of the runs there and of those that NAME.json holds -> the page.

    A result that other settings made stays in NAME.json, is left out of the page, and is told.
    """
    out = Path(args.output)
    file = out / f"{chosen.name}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    results, kept, stale = {}, {}, 0
    for row in chosen.rows:
        plan = Plan(chosen, row, args, more)
        known = {int(seed): outcome for seed, outcome in before.get(row.name, {}).items()}
        for seed in range(max([args.seeds, *(seed + 1 for seed in known)])):
            found = [outcome for outcome in (outcome_of(plan.run(seed)), known.get(seed)) if outcome]
            fit = [o for o in found if (o["key"], o["asked"]) == (plan.key, asked_of(chosen, args))]
            if found:
                kept.setdefault(row.name, {})[seed] = [*fit, *found][0]
            if fit:
                results.setdefault(row.name, {})[seed] = fit[0]
            stale += bool(found) and not fit
    if stale:
        print(f"{file}: {stale} result(s) of other settings are kept there, and left out of the page")
    write(file, json.dumps(kept, indent=1) + "\n")

    # What is asked as it is has no seed: it stands beside each.
    seeds = max([args.seeds, *(seed + 1 for runs in results.values() for seed in runs)])
    said = budget(chosen, args, results, seeds)
    for row in chosen.rows:
        if not row.method and row.name in results:
            results[row.name] = dict.fromkeys(range(seeds), results[row.name][0])

    command = ["python", "-m", "crystal.compare", "--study", chosen.name, "--seeds", str(args.seeds), *more]
    text = study.page(chosen, results, seeds, said, shlex.join(command))
    write(out / f"{chosen.name}.md", text)
    return text


def budget(chosen, args, results, seeds):
    """What was run, in a sentence or two."""
    runs = [outcome for row in results.values() for outcome in row.values()]
    minutes = sum(outcome["minutes"] for outcome in runs)
    asked = f"{args.questions} questions"
    if chosen.interventions:
        asked += f", {chosen.interventions} of them under interventions on the latents (pictures {chosen.corruption})"
    return (
        f"Budget: {args.max_steps} updates a run from `{args.model}`, {seeds} seeds a row; {asked}. "
        f"{len(runs)} runs are there, {minutes:.0f} minutes of this machine in all; what is missing is marked."
    )
