"""A study: a paper's table asked again on small models, with a verdict for each ordering that it claims.

A study is a TOML file beside the pages, tutorials/studies/NAME.toml:

    title = "CrystaL, figure 5: direct fine-tuning against CrystaL"
    about = "A paragraph for the page."
    seeds = 5                      runs of each row
    max_steps = 500                updates of each run
    questions = 2000               first so many of the test set
    interventions = 300            of them asked under reliance.py's interventions too; 0: none
    corruption = "blur=8:10"       of the pictures that these corrupt, the same for every row
    flags = "--eval_every 100"     train.py's, for every row
    against = ["sft"]              rows that the latents have to beat; the first is every row's difference

    [[rows]]
    name = "crystal"
    method = "crystal"             a name, or a file beside the study; "" asks the model as it is
    flags = "--latents 4"          this row's own
    times = 2                      its updates, in multiples of the study's

    [[claims]]
    paper = "figure 5"
    says = "CrystaL is above direct fine-tuning"
    more = "crystal"
    less = "sft"                   without it the ordering is against 0
    measure = "accuracy"           or a family of questions, or another of MEASURES

THE RULE: an ordering holds if the 95 % interval of its difference, taken seed by seed, lies above 0; it is
reversed if the interval lies below 0, and else not resolved. One seed resolves nothing.

This file reads a study and says what came out; run_study.py makes the runs.
"""

import math
import shlex
import tomllib
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from statistics import mean, stdev

from crystal.runtime import config
from crystal.runtime.config import UserError

# 97.5 % quantiles of Student's t for 1, 2, .. degrees of freedom.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip

# What a claim may be about beside accuracy and families: points between two of reliance.py's conditions.
CONDITIONS = {
    "swap": ("as trained", "latents: swapped"),
    "drop": ("as trained", "latents dropped"),
    "hidden": ("image hidden, latents kept", "image hidden, latents dropped"),
    "intact": ("image corrupted, latents intact", "image corrupted, latents corrupted"),
}
MEASURES = {
    "accuracy": "right answers, percent",
    "swap": "what another image's latents cost",
    "drop": "what leaving the latents out costs",
    "hidden": "what latents give where the image is hidden",
    "intact": "what the intact image's latents give on a corrupted one",
    "attention": "attention of the answer on the latents, percent",
}


def interval(values):
    """Numbers, one a seed -> (mean, half width of the 95 % interval of their mean, by Student's t; infinite
    for a single one).
    """
    n = len(values)
    return mean(values), (T[min(n - 2, len(T) - 1)] * stdev(values) / math.sqrt(n) if n > 1 else math.inf)


# --- the file ---


@dataclass(frozen=True)
class Row:
    """One line of a study's table: a method with flags of its own."""

    name: str
    method: str
    flags: str = ""
    times: int = 1


@dataclass(frozen=True)
class Claim:
    """An ordering that a paper, or a control, is about: row `more` above row `less`, or 0, in a measure."""

    paper: str
    says: str
    more: str
    less: str = ""
    measure: str = "accuracy"

    @property
    def ordering(self):
        return f"{self.more} > {self.less or 0}"


@dataclass(frozen=True)
class Study:
    """What a study's file says."""

    file: Path
    title: str
    about: str
    rows: list
    claims: list = field(default_factory=list)
    against: list = field(default_factory=list)
    flags: str = ""
    corruption: str = "blur=8:10"
    seeds: int = 5
    max_steps: int = 500
    questions: int = 2000
    interventions: int = 300

    @property
    def name(self):
        return self.file.stem

    def row(self, name):
        return next(row for row in self.rows if row.name == name)


def read(name, folder):
    """A study's name in `folder`, or the path of a TOML file -> Study. UserError naming file and field."""
    file = Path(name) if name.endswith(".toml") else Path(folder) / f"{name}.toml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in Path(folder).glob("*.toml")))
        there = f"in {folder} there are {known}" if known else "the sources hold studies, a wheel does not"
        raise UserError(f"--study {name}: there is no {file}; {there}; or give the path of a TOML file")
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is not TOML: {error}") from None

    rows = [made(Row, row, f"{file}: row {n}") for n, row in tables(said, "rows", file)]
    claims = [made(Claim, claim, f"{file}: claim {n}") for n, claim in tables(said, "claims", file)]
    study = made(Study, said | {"rows": rows, "claims": claims}, f"{file}", file=file)
    check(study)
    return study


def tables(said, name, file):
    """The [[tables]] of a name in a file's contents -> [(number from 1, table)]."""
    found = said.get(name, [])
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise UserError(f"{file}: field {name!r}: write each as a table of its own, [[{name}]]")
    return list(enumerate(found, 1))


def made(kind, said, where, **own):
    """A table of a file -> one of `kind`. UserError for a field that it lacks, does not know, or misreads.

    own: fields that no file says.
    """
    known = {f.name: f for f in fields(kind) if f.name not in own}
    if unknown := sorted(said.keys() - known.keys()):
        raise UserError(f"{where}: field {unknown[0]!r} is none of {', '.join(known)}")
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in said]:
        raise UserError(f"{where}: field {missing[0]!r} is missing")

    types = typing.get_type_hints(kind)
    for name, value in said.items():
        wanted = types[name]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"{where}: field {name!r}: {wanted.__name__} is needed, not {value!r}")
        least = 0 if name == "interventions" else 1
        if wanted is int and value < least:
            raise UserError(f"{where}: field {name!r}: {value} is below {least}")
    return kind(**said, **own)


def check(study):
    """UserError for rows of one name, flags that no shell would read, or a row that is not there."""
    names = [row.name for row in study.rows]
    if not names:
        raise UserError(f"{study.file}: has no [[rows]]")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{study.file}: two rows are named {twice[0]!r}")

    for flags in (study.flags, *(row.flags for row in study.rows)):
        try:
            shlex.split(flags)
        except ValueError as error:
            raise UserError(f"{study.file}: field 'flags': {flags!r}: {error}") from None
    try:
        config.corruption_of(study.corruption)
    except UserError as error:
        raise UserError(f"{study.file}: field 'corruption': {error}") from None

    meant = [("field 'against'", name) for name in study.against]
    for n, claim in enumerate(study.claims, 1):
        meant += [(f"claim {n}", name) for name in (claim.more, claim.less or claim.more)]
    for where, name in meant:
        if name not in names:
            raise UserError(f"{study.file}: {where}: no row is named {name!r}")


def check_measures(study, results):
    """UserError for a claim about what no run's outcome has."""
    outcomes = [outcome for runs in results.values() for outcome in runs.values()]
    families = {family for outcome in outcomes for family in outcome["families"]}
    for n, claim in enumerate(study.claims, 1):
        if families and claim.measure not in families | MEASURES.keys():
            known = ", ".join([*MEASURES, *sorted(families - {"all"})])
            raise UserError(f"{study.file}: claim {n}: field 'measure': {claim.measure!r} is none of {known}")


# --- what came out ---


def value(outcome, measure):
    """A run's outcome -> a number in percent, or None where it has none.

    outcome: {"families": {family: [right, asked]}, "right": a digit a question}; where latents stand in its
    prompt also "conditions", {reliance.py's name: percent right}, and "attention".
    """
    if measure == "accuracy":
        measure = "all"
    if measure in outcome["families"]:
        right, asked = outcome["families"][measure]
        return 100 * right / asked
    if measure in CONDITIONS and "conditions" in outcome:
        with_it, without = CONDITIONS[measure]
        return outcome["conditions"][with_it] - outcome["conditions"][without]
    return outcome.get(measure)


def values(results, row, measure):
    """{row: {seed: outcome}} -> {seed: number} of a row, without seeds that have none."""
    found = {seed: value(outcome, measure) for seed, outcome in results.get(row, {}).items()}
    return {seed: number for seed, number in found.items() if number is not None}


def differences(results, more, less, measure="accuracy"):
    """Row `more` minus row `less`, seed by seed -> list of numbers, over the seeds that both have.

    Without a `less` it is the measure of row `more` itself.
    """
    a = values(results, more, measure)
    if not less:
        return list(a.values())
    b = values(results, less, measure)
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def verdict(numbers):
    """Differences, one a seed -> holds, reversed, not resolved, or not run. See the rule at the top."""
    if not numbers:
        return "not run"
    center, half = interval(numbers)
    if center - half > 0:
        return "holds"
    return "reversed" if center + half < 0 else "not resolved"


def over_questions(results, more, less):
    """Half width of the 95 % interval of row `more` - row `less` that the questions leave, the runs given.

    It is of the mean over the seeds that both have, paired by question; None where they have none. It says
    what one seed can: how much of a difference is the luck of the questions, not what another seed would do.
    """
    a, b = results.get(more, {}), results.get(less, {})
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None

    # d [n]: a question's difference, mean over the seeds.
    pairs = [zip(a[seed]["right"], b[seed]["right"]) for seed in seeds]
    each = [[int(x) - int(y) for x, y in pair] for pair in pairs]
    d = [mean(column) for column in zip(*each)]
    return 100 * 1.96 * stdev(d) / math.sqrt(len(d)) if len(d) > 1 else math.inf


def latent_rows(study, results):
    """Names of the rows with latents and the study's own updates that have been run."""
    found = []
    for row in study.rows:
        outcomes = results.get(row.name, {}).values()
        if row.times == 1 and any(outcome["latents"] for outcome in outcomes):
            found.append(row.name)
    return found


def wins(study, results, less):
    """Where a row of latent_rows is above row `less` -> (list of words, count).

    count: how many comparisons were made; a row needs two seeds in common with `less`.
    """
    found, count = [], 0
    for row in latent_rows(study, results):
        for family in next(iter(results[row].values()))["families"]:
            numbers = differences(results, row, less, family)
            if len(numbers) < 2:
                continue
            count += 1
            center, half = interval(numbers)
            if center - half > 0:
                found.append(f"`{row}` in {family} ({signed(center)} ±{half:.1f})")
    return found, count


# --- the page ---

RULE = """The rule: an ordering *holds* if the 95 % interval over seeds (Student's t) of its difference, taken
seed by seed, lies above 0, is *reversed* if it lies below 0, and is else *not resolved*. One seed resolves
nothing. *Questions alone* is the half width that the choice of questions leaves, with these runs given."""


def page(study, results, seeds, budget, command):
    """A study and {row: {seed: outcome}} -> its page, Markdown. budget, command: what was run, in words."""
    parts = [f"# {study.title}", study.about.strip(), budget, f"```bash\n{command}\n```"]
    if study.against:
        parts += ["## Plainly", plainly(study, results)]

    mean_of = "Mean over seeds, and half width of its 95 % interval; without one, a single seed."
    parts += ["## Rows", mean_of, rows_table(study, results, seeds)]
    if study.claims:
        parts += ["## Orderings", claims_table(study, results), RULE]
    parts += ["## By family, percent", families_table(study, results)]
    return "\n\n".join(parts) + "\n"


def plainly(study, results):
    """Whether any row with latents is above those of `against`: a sentence each."""
    sentences = []
    for name in study.against:
        times = study.row(name).times
        at = "at equal updates" if times == 1 else f"which has {times} times their updates"
        found, count = wins(study, results, name)
        chance = f"That is {len(found)} of {count} comparisons; one in forty would come out so by chance."
        if not count:
            said = f"Nothing can be said yet about `{name}`: no row with latents has two seeds beside it."
        elif found:
            said = f"Above `{name}`, {at}: {'; '.join(found)}. {chance}"
        else:
            said = (
                f"**No row with latents is shown to beat `{name}`, {at}**: in none of {count} comparisons, "
                "over all questions and family by family, does the interval lie above 0."
            )
        sentences.append(f"- {said}{overall(study, results, name)}")
    return "\n".join(sentences)


def overall(study, results, less):
    """Each of latent_rows minus row `less`, over all questions, as words; "" where none has a seed."""
    told = []
    for row in latent_rows(study, results):
        numbers = differences(results, row, less)
        if numbers:
            seeds = f"{len(numbers)} seed" + "s" * (len(numbers) > 1)
            told.append(f"`{row}` {cell(numbers, sign=True)} ({seeds})")
    return f" Over all questions: {'; '.join(told)}." if told else ""


def rows_table(study, results, seeds):
    """A line a row: how many of its runs are there, accuracy, and what the interventions say.

    Beside them its difference to the first row of `against`.
    """
    first = study.against[0] if study.against else ""
    others = [name for name in MEASURES if name != "accuracy"]
    told = [name for name in others if any(values(results, row.name, name) for row in study.rows)]
    lines = []
    for row in study.rows:
        line = [row.name, there(row, results, seeds), cell(of_row(results, row.name, "accuracy"))]
        if first:
            numbers = differences(results, row.name, first) if row.name != first else []
            line.append(cell(numbers, sign=True))
        line += [cell(of_row(results, row.name, name)) for name in told]
        lines.append(line)

    titles = ["row", "runs", "accuracy, %", *([f"minus {first}"] if first else []), *told]
    text = markdown(titles, lines)
    if told:
        text += "\n\n" + "; ".join(f"*{name}*: {MEASURES[name]}" for name in told) + "."
    return text


def there(row, results, seeds):
    """How many of a row's runs are there, in words."""
    count = len(results.get(row.name, {}))
    if not count:
        return "**not run**"
    return f"{count} of {seeds}" if row.method else "as it is"


def claims_table(study, results):
    """A line a claim: the difference, its intervals over seeds and over questions, and the verdict."""
    lines = []
    for claim in study.claims:
        numbers = differences(results, claim.more, claim.less, claim.measure)
        luck = None
        if claim.measure == "accuracy" and claim.less:
            luck = over_questions(results, claim.more, claim.less)
        line = [claim.paper, claim.says, claim.ordering, claim.measure, str(len(numbers))]
        line += [cell(numbers, sign=True), "" if luck is None else f"±{luck:.1f}"]
        lines.append([*line, f"**{verdict(numbers)}**"])

    titles = ["source", "claim", "ordering", "measure", "seeds", "difference", "questions alone", "verdict"]
    return markdown(titles, lines)


def families_table(study, results):
    """Accuracy of each row by family of questions."""
    families = {}
    for row in study.rows:
        for outcome in results.get(row.name, {}).values():
            families |= dict.fromkeys(outcome["families"])

    lines = []
    for row in study.rows:
        cells = [cell(of_row(results, row.name, family)) for family in families]
        lines.append([row.name, *cells])
    return markdown(["row", *families], lines)


def of_row(results, row, measure):
    """A row's numbers, one a seed, as a list."""
    return list(values(results, row, measure).values())


def cell(numbers, sign=False):
    """Numbers, one a seed -> their mean and half width as they stand in a table; "" for none."""
    if not numbers:
        return ""
    center, half = interval(numbers)
    said = signed(center) if sign else f"{center:.1f}"
    return said if half == math.inf else f"{said} ±{half:.1f}"


def signed(number):
    """A difference with its sign; what rounds to 0 is +0.0."""
    return f"{round(number, 1) + 0.0:+.1f}"


def markdown(titles, lines):
    """Titles and lines of cells -> a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *lines])
