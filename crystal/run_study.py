"""Makes the runs of a study, each once, and writes what came out: python -m crystal.compare --study NAME.

    python -m crystal.compare --study crystal_figure5              all of it, seed by seed
    python -m crystal.compare --study crystal_figure5 --seeds 1    its first seed; later the rest
    python -m crystal.compare --study crystal_figure5 --page       the page of what is there, no run

Seeds are the outer loop, so that a table of all rows is there as early as can be. A run has a directory below
--output, named by its method and a digest of everything that makes it: studies share runs, one that is
finished is not repeated, and one that was killed goes on from its last checkpoint. After each run NAME.json
and NAME.md are written to --output. A second process started with the same command takes other runs. What the
JSON files of --output say came out of a run is not run again, so a study goes on from results of elsewhere:

    cp tutorials/studies/*.json runs/studies/                      take what is shipped as done
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


def plans_of(chosen, args, more):
    """{row's name: Plan}. UserError for flags that train.py refuses."""
    return {row.name: Plan(chosen, row, args, more) for row in chosen.rows}


def make(chosen, args, more, records, procs):
    """Every run of a study that is not there yet, then its page. records: the questions."""
    plans = plans_of(chosen, args, more)
    where = {}  # a method's data, found once: LaViT's teacher looks at all of it

    # What is asked as it is has no seed.
    trains = [row for row in chosen.rows if row.method]
    runs = [(row, 0) for row in chosen.rows]
    runs += [(row, seed) for seed in range(1, args.seeds) for row in trains]
    for count, (row, seed) in enumerate(runs, 1):
        plan = plans[row.name]
        run = plan.run(seed)
        procs.print(f"[{count}/{len(runs)}] {row.name}, seed {seed}: {run}")
        with held(run, procs) as mine:
            if mine:
                finish(plan, seed, records, where, procs)
            else:
                procs.print("another process is making it")
        if procs.is_first:
            write_page(chosen, args, more)
    if procs.is_first:
        print(write_page(chosen, args, more))


def finish(plan, seed, records, where, procs):
    """Trains and asks a seed's run, as far as that is not done, and notes its outcome in its directory.

    where: {method: flags that name its data}, filled here.
    """
    run = plan.run(seed)
    found = [outcome_of(run), outcomes(plan.args.output).get((plan.whole, seed))]
    procs.barrier()  # all ranks have looked
    if any(outcome and plan.made(outcome) for outcome in found):
        return

    started = time.perf_counter()
    if plan.method:
        if plan.method not in where:
            where[plan.method] = plan.data(procs)
        trained(run, [*plan.flags(seed, procs.world), *where[plan.method]], plan.updates)
    outcome = {"key": plan.key, "asked": plan.asked, **ask(plan, run, records, procs)}
    outcome["minutes"] = round((time.perf_counter() - started) / 60, 1)
    if procs.is_first:
        write(run / NOTE, json.dumps(outcome) + "\n")


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
            self.check()
        self.key = self.digest()
        # What an outcome depends on beside its run.
        self.asked = {
            "test": args.test and evaluate.data_digest(args.test),
            "questions": args.questions,
            "max_new_tokens": args.max_new_tokens,
            "interventions": chosen.interventions,
            "corruption": chosen.corruption,
        }

    def check(self):
        """UserError, naming file and row, for flags that train.py refuses."""
        try:
            methods.parse(self.flags(0))
        except UserError as error:
            raise UserError(f"{self.chosen.file}: row {self.row.name!r}: {error}") from None

    def flags(self, seed, world=1):
        """train.py's flags of a seed's run, without its data. A row's own win over those for all.

        On the tiny base demo.py's come first; on another model all else is the paper's.
        """
        start = ["--method", self.method, "--model", self.args.model]
        recipe = demo.recipe(self.method, world) if self.args.model == "tiny" else []
        updates = ["--max_steps", str(self.updates)]
        for_all, own = shlex.split(self.chosen.flags), shlex.split(self.row.flags)
        return [*start, *recipe, *updates, *for_all, *self.more, *own, "--seed", str(seed)]

    def digest(self):
        """What makes a row's runs, as twelve hexadecimal digits.

        It is flags, the bytes of --data and of a method's file, those of the tiny base, which may come to be
        another, and LaViT's teacher. Neither the seed nor the number of processes, which share a batch; nor
        where a file lies.
        """
        flags = self.flags("") if self.method else []
        named = [Path(flag).name if flag == self.method else flag for flag in flags]
        data = self.args.data and evaluate.data_digest(self.args.data)
        what = [named, methods.fingerprint(self.method), self.args.model, data]
        if self.args.model == "tiny":
            weights = (TINY / "model.safetensors").read_bytes()
            what.append(hashlib.sha256(weights).hexdigest())
        if self.taught:
            what.append(self.teacher.key)
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]

    @property
    def whole(self):
        return whole(self.key, self.asked)

    def made(self, outcome):
        """Whether an outcome is of these settings."""
        return outcome.get("key") == self.key and outcome.get("asked") == self.asked

    def run(self, seed):
        """The directory of a seed's run."""
        stem = Path(self.method or self.args.model).stem
        name = re.sub("[^A-Za-z0-9]+", "_", stem)
        return Path(self.args.output) / f"{name}-{self.key}-{seed}"

    @property
    def taught(self):
        """Whether the row needs what a teacher saw in the scenes: LaViT."""
        on_scenes = self.method and not self.args.data
        return bool(on_scenes) and issubclass(methods.get(self.method), methods.get("lavit"))

    @property
    def teacher(self):
        """The plan of LaViT's teacher: the first row of `against`, which has to be run before."""
        first = self.chosen.against[0] if self.chosen.against else self.row.name
        if first == self.row.name:
            where = f"{self.chosen.file}: row {first!r}"
            raise UserError(f"{where}: another row, its teacher, has to be the first of 'against'")
        return Plan(self.chosen, self.chosen.row(first), self.args, self.more)

    def data(self, procs):
        """Flags that name the data: the scenes, or what LaViT's teacher, of seed 0, saw in them."""
        if self.args.data:
            return ["--data", self.args.data]
        teacher = self.teacher.run(0) if self.taught else None
        if teacher and not checkpoint.step_dir(teacher, self.teacher.updates).is_dir():
            # What came out of it is known from elsewhere, but it itself is not here.
            with held(teacher, procs) as mine:
                if not mine:
                    raise UserError(f"{teacher}: another process trains this teacher; start again after it")
                files = demo.data_of(self.teacher.method, Path(self.args.output) / "toy", None, procs)
                trained(teacher, [*self.teacher.flags(0, procs.world), *files], self.teacher.updates)
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
    """Trains a run to its end, from its newest checkpoint if there is one. UserError if it stopped."""
    going = "--resume" if checkpoint.newest(run) else "--overwrite"
    train.main([*flags, "--output", str(run), going])
    if not checkpoint.step_dir(run, updates).is_dir():
        raise UserError(f"{run}: stopped before its end; the same command goes on from there")


def ask(plan, run, records, procs):
    """A finished run's outcome: see study.value; with what its last validation says that latents carry."""
    source = run if plan.method else plan.args.model
    model, fmt, _ = opening.open_model(source, device=procs.device, method=plan.method)
    how = dict(batch_size=BATCH, max_new_tokens=plan.args.max_new_tokens, procs=procs)
    results = evaluate.answers(model, fmt, records, progress=plan.row.name, **how)
    families = evaluate.by_family(results)
    right = [str(int(result["correct"])) for result in results]
    outcome = {"latents": fmt.count, "carried": carried(run), "right": "".join(right)}
    outcome["families"] = {family: list(counts) for family, counts in families.items()}

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
    return load(run / NOTE) or None


def whole(key, asked):
    """All that an outcome depends on but the seed, as one text."""
    return json.dumps([key, asked], sort_keys=True)


def outcomes(folder):
    """{(Plan.whole, seed): outcome} of all studies whose results stand in a folder."""
    known = {}
    for file in sorted(Path(folder).glob("*.json")):
        for runs in load(file).values():
            for seed, outcome in runs.items() if isinstance(runs, dict) else ():
                if isinstance(outcome, dict) and seed.isdecimal():
                    known[whole(outcome.get("key"), outcome.get("asked")), int(seed)] = outcome
    return known


def load(file):
    """A JSON object of a file, {} where there is none. UserError for what is not one."""
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); delete it, and the same command goes on") from None
    if not isinstance(said, dict):
        raise UserError(f"{file}: is no JSON object; delete it, and the same command goes on")
    return said


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
    file = Path(args.output) / f"{chosen.name}.json"
    kept, results = gathered(chosen, args, more, load(file))
    study.check_measures(chosen, results)
    write(file, json.dumps(kept, indent=1) + "\n")
    stale = count(kept) - count(results)
    if stale:
        print(f"{file}: {stale} result(s) of other settings are kept there, and left out of the page")

    # What is asked as it is has no seed: it stands beside each.
    seeds = seeds_of(args, {seed for runs in results.values() for seed in runs})
    said = budget(chosen, args, results, seeds)
    for row in chosen.rows:
        if not row.method and row.name in results:
            results[row.name] = dict.fromkeys(range(seeds), results[row.name][0])

    text = study.page(chosen, results, seeds, said, command(chosen, args, more))
    write(file.with_suffix(".md"), text)
    return text


def gathered(chosen, args, more, before):
    """Outcomes of runs, of an earlier NAME.json and of other studies' -> all, and those of these settings.

    Both are {row: {seed: outcome}}.
    """
    kept, results = {}, {}
    elsewhere = outcomes(args.output)
    for row in chosen.rows:
        plan = Plan(chosen, row, args, more)
        known = {int(seed): outcome for seed, outcome in before.get(row.name, {}).items()}
        for seed in range(seeds_of(args, known)):
            places = [outcome_of(plan.run(seed)), known.get(seed), elsewhere.get((plan.whole, seed))]
            found = [outcome for outcome in places if outcome]
            fit = [outcome for outcome in found if plan.made(outcome)]
            if found:
                kept.setdefault(row.name, {})[seed] = [*fit, *found][0]
            if fit:
                results.setdefault(row.name, {})[seed] = fit[0]
    return kept, results


def count(results):
    """How many outcomes there are in {row: {seed: outcome}}."""
    return sum(len(seeds) for seeds in results.values())


def seeds_of(args, known):
    """How many seeds a table has: those that are asked for, and those beyond that are known."""
    return max([args.seeds, *(seed + 1 for seed in known)])


def command(chosen, args, more):
    """What to type for the page's runs: of the flags that are not train.py's, those that differ."""
    usual = defaults(chosen) | {"model": "tiny", "data": "", "test": "", "output": args.output}
    words = ["python", "-m", "crystal.compare", "--study", chosen.name]
    for name, value in usual.items():
        if name == "seeds" or getattr(args, name) != value:
            words += [f"--{name}", str(getattr(args, name))]
    return shlex.join([*words, *more])


def budget(chosen, args, results, seeds):
    """What was run, in a sentence or two."""
    runs = [outcome for row in results.values() for outcome in row.values()]
    minutes = sum(outcome["minutes"] for outcome in runs)
    said = f"Budget: {args.max_steps} updates a run from `{args.model}`; seeds planned: {seeds}; "
    said += f"{args.questions} questions"
    interventions = min(chosen.interventions, args.questions)
    if interventions:
        said += f", {interventions} of them under interventions on the latents"
        said += f" (corrupted pictures: {chosen.corruption})"
    return f"{said}. {len(runs)} runs are there, of {minutes:.0f} minutes in all; what is missing is marked."
