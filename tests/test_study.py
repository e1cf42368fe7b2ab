"""Studies: what a file may say, and what is said of what came out. Right values are worked out by hand."""

import math

import pytest

from crystal import compare
from crystal.evaluation import study
from crystal.runtime.config import UserError

FILE = """
title = "A table"
about = "Why."
seeds = 2
max_steps = 7
questions = 9
interventions = 0
corruption = "mask=0.5"
flags = "--lr 1"
against = ["plain"]

[[rows]]
name = "plain"
method = "sft"
times = 2

[[rows]]
name = "ours"
method = "mine.py"
flags = "--latents 3"

[[claims]]
paper = "table 1"
says = "ours is better"
more = "ours"
less = "plain"

[[claims]]
paper = "table 2"
says = "ours counts"
more = "ours"
measure = "swap"
"""


def written(folder, text=FILE):
    (folder / "mine.toml").write_text(text)
    return study.read("mine", folder)


def test_a_file_is_read_whole(tmp_path):
    rows = [study.Row("plain", "sft", "", 2), study.Row("ours", "mine.py", "--latents 3", 1)]
    claims = [
        study.Claim("table 1", "ours is better", "ours", "plain", "accuracy"),
        study.Claim("table 2", "ours counts", "ours", "", "swap"),
    ]
    read = written(tmp_path)
    assert read == study.Study(
        tmp_path / "mine.toml", "A table", "Why.", rows, claims, ["plain"], "--lr 1", "mask=0.5", 2, 7, 9, 0
    )
    assert read == study.read(str(tmp_path / "mine.toml"), "elsewhere") and read.name == "mine"
    assert [claim.ordering for claim in claims] == ["ours > plain", "ours > 0"]
    least = study.read(str(tmp_path / "mine.toml"), "").file
    least.write_text('title = "t"\nabout = "a"\n[[rows]]\nname = "r"\nmethod = ""\n')
    bare = study.read(str(least), "")
    assert (bare.seeds, bare.max_steps, bare.claims, bare.against) == (5, 500, [], [])


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        ('title = "A table"', "title = A table", "is not TOML: .*line 2"),
        ('title = "A table"\n', "", "field 'title' is missing"),
        ("seeds = 2", "seed = 2", "field 'seed' is none of .*seeds"),
        ("seeds = 2", 'seeds = "2"', "field 'seeds': int is needed, not '2'"),
        ("seeds = 2", "seeds = true", "field 'seeds': int is needed, not True"),
        ("seeds = 2", "seeds = 0", "field 'seeds': 0 is below 1"),
        ("questions = 9", "questions = 0", "field 'questions': 0 is below 1"),
        ("interventions = 0", "interventions = -1", "field 'interventions': -1 is below 0"),
        ("mask=0.5", "mist=0.5", "field 'corruption': .*mist"),
        ('["plain"]', '["plane"]', "field 'against': no row is named 'plane'"),
        ('["plain"]', '"plain"', "field 'against': list is needed"),
        ('"--lr 1"', "\"--lr '1\"", "field 'flags'.*quotation"),
        ('"--latents 3"', "\"--latents '3\"", "field 'flags'.*quotation"),
        ('method = "mine.py"\n', "", "row 2: field 'method' is missing"),
        ("times = 2", "times = 0", "row 1: field 'times': 0 is below 1"),
        ("times = 2", "max_steps = 2", "row 1: field 'max_steps' is none of name, method, flags, times"),
        ('name = "ours"', 'name = "plain"', "two rows are named 'plain'"),
        ('less = "plain"', 'less = "plane"', "claim 1: no row is named 'plane'"),
        ('more = "ours"\nmeasure', 'more = "us"\nmeasure', "claim 2: no row is named 'us'"),
        ('paper = "table 2"\n', "", "claim 2: field 'paper' is missing"),
        ('title = "A', 'file = "x"\ntitle = "A', "field 'file' is none of title, about, rows"),
    ],
)
def test_a_mistake_names_file_and_field(tmp_path, right, wrong, message):
    assert FILE.count(right) == 1
    with pytest.raises(UserError, match=message) as error:
        written(tmp_path, FILE.replace(right, wrong))
    assert "mine.toml" in str(error.value) and "\n" not in str(error.value)


def test_tables_are_tables_and_there_are_rows(tmp_path):
    for text, message in (
        ('title = "t"\nabout = "a"\n[rows]\nname = "r"\n', r"field 'rows': .*\[\[rows\]\]"),
        ('title = "t"\nabout = "a"\nrows = ["r"]\n', r"field 'rows': .*\[\[rows\]\]"),
        ('title = "t"\nabout = "a"\n', r"has no \[\[rows\]\]"),
    ):
        with pytest.raises(UserError, match=message):
            written(tmp_path, text)
    with pytest.raises(UserError, match="--study mine.: there is no .*mine..toml; in .* there are mine"):
        study.read("mine2", tmp_path)
    with pytest.raises(UserError, match="the sources hold studies, a wheel does not; or give the path of"):
        study.read("mine2", tmp_path / "nowhere")


def test_interval_is_students():
    from scipy import stats

    assert compare.interval is study.interval
    for values in ([50.0, 60.0], [50.0, 60.0, 55.0], list(range(10))):
        center, half = study.interval(values)
        low, high = stats.t.interval(
            0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values)
        )
        assert (center - half, center + half) == pytest.approx((low, high), rel=1e-3)
    assert study.interval([50.0]) == (50.0, math.inf)  # one seed says nothing about the next


def test_the_verdict_follows_the_rule():
    """Three seeds: t is 4.303. 1, 2, 3 have mean 2 and half width 4.303 / sqrt(3) = 2.48; a spread of a tenth
    has a tenth of it.
    """
    assert study.verdict([1.0, 2.0, 3.0]) == "not resolved"
    assert study.verdict([0.4, 0.5, 0.6]) == "holds"
    assert study.verdict([-0.4, -0.5, -0.6]) == "reversed"
    assert study.verdict([99.0]) == "not resolved"  # one seed
    assert study.verdict([]) == "not run"
    assert study.verdict([0.0, 0.0, 0.0]) == "not resolved"


def outcome(right, latents=0, **more):
    """Of a digit a question, the first half of family a."""
    half = len(right) // 2
    parts = {"a": right[:half], "b": right[half:], "all": right}
    families = {name: [part.count("1"), len(part)] for name, part in parts.items()}
    return {"families": families, "right": right, "latents": latents, **more}


def test_values_are_shares_and_differences_of_conditions():
    conditions = {
        "as trained": 70.0, "latents: swapped": 64.0, "latents dropped": 59.0,
        "image hidden, latents kept": 41.0, "image hidden, latents dropped": 38.0,
        "image corrupted, latents intact": 60.0, "image corrupted, latents corrupted": 35.0,
    }  # fmt: skip
    one = outcome("1101", conditions=conditions, attention=4.5)
    wanted = {"accuracy": 75.0, "a": 100.0, "b": 50.0, "swap": 6.0, "drop": 11.0, "hidden": 3.0}
    wanted |= {"intact": 25.0, "attention": 4.5}
    assert {name: study.value(one, name) for name in wanted} == wanted
    assert study.value(outcome("1101"), "swap") is None and study.value(outcome("1101"), "attention") is None


def test_differences_are_taken_seed_by_seed():
    """Seeds 0 and 2 have both; 75 - 50 and 25 - 100 percent. Against nothing, the measure itself."""
    results = {
        "x": {0: outcome("1110"), 1: outcome("1111"), 2: outcome("1000")},
        "y": {2: outcome("1111"), 0: outcome("1100")},
    }
    assert study.differences(results, "x", "y") == [25.0, -75.0]
    assert study.differences(results, "x", "y", "a") == [0.0, -50.0]
    assert study.differences(results, "x", "") == [75.0, 100.0, 25.0]
    assert study.differences(results, "x", "z") == [] == study.differences(results, "x", "y", "swap")


def test_questions_alone_are_paired():
    """One seed: d = 1, 0, 0, -1, whose deviation is sqrt(2 / 3): 1.96 sqrt(2 / 3) / 2 of a right answer.

    With a second seed of d = 1, 0, 0, 1 its means are 1, 0, 0, 0, of deviation 1/2.
    """
    results = {"x": {0: outcome("1100")}, "y": {0: outcome("0101"), 3: outcome("0000")}}
    assert study.over_questions(results, "x", "y") == pytest.approx(100 * 1.96 * math.sqrt(2 / 3) / 2)
    results["x"][3] = outcome("1001")
    assert study.over_questions(results, "x", "y") == pytest.approx(100 * 1.96 * 0.5 / 2)
    assert study.over_questions(results, "x", "z") is None
    assert study.over_questions({"x": {0: outcome("1")}, "y": {0: outcome("0")}}, "x", "y") == math.inf


ROWS = [
    study.Row("plain", "sft"),
    study.Row("plain twice", "sft", times=2),
    study.Row("ours", "crystal"),
    study.Row("ours twice", "crystal", times=2),
    study.Row("pictures", "mine.py"),
]


def test_whether_latents_win_is_said_plainly(tmp_path):
    """Of `ours` alone: rows without latents, and those with more updates, are no latents at equal updates.

    Family a: 2 and 2 of 2 against 1 and 1 in both seeds, +50 without a spread; family b: 1 against 1.
    """
    mine = study.Study(tmp_path / "m.toml", "t", "a", ROWS, against=["plain", "plain twice"])
    better, worse = outcome("1110", latents=8), outcome("1010")
    results = {"plain": {0: worse, 1: worse}, "plain twice": {0: outcome("1111"), 1: outcome("1111")}}
    results["ours twice"] = {0: outcome("1111", latents=8), 1: outcome("1111", latents=8)}
    results["pictures"] = {0: outcome("1111"), 1: outcome("1111")}
    assert study.plainly(mine, results).splitlines() == [
        "- Nothing can be said yet about `plain`: no row with latents has two seeds beside it.",
        "- Nothing can be said yet about `plain twice`: no row with latents has two seeds beside it.",
    ]

    results["ours"] = {0: better}
    first, second = study.plainly(mine, results).splitlines()
    overall = "Over all questions: `ours` +25.0 (1 seed)."
    assert first.endswith(f"no row with latents has two seeds beside it. {overall}")
    assert second.endswith("beside it. Over all questions: `ours` -25.0 (1 seed).")
    results["ours"][1] = better
    assert study.plainly(mine, results).splitlines() == [
        "- Above `plain`, at equal updates: `ours` in a (+50.0 ±0.0); `ours` in all (+25.0 ±0.0). That is 2 "
        "of 3 comparisons; one in forty would come out so by chance. "
        "Over all questions: `ours` +25.0 ±0.0 (2 seeds).",
        "- **No row with latents is shown to beat `plain twice`, which has 2 times their updates**: in none "
        "of 3 comparisons, over all questions and family by family, does the interval lie above 0. "
        "Over all questions: `ours` -25.0 ±0.0 (2 seeds).",
    ]


def test_the_page_says_what_ran_and_what_did_not(tmp_path):
    """Accuracies 50 and 100 against 75 and 75: means 75 and 75; difference +0 with a half width of 12.706
    times the deviation of -25 and 25, 50 / sqrt(2), over sqrt(2).
    """
    conditions = {"as trained": 70.0, "latents: swapped": 64.0}
    others = ("latents dropped", "image hidden, latents kept", "image hidden, latents dropped")
    corrupted = ("image corrupted, latents intact", "image corrupted, latents corrupted")
    conditions |= dict.fromkeys([*others, *corrupted], 50.0)
    rows = [study.Row("base", ""), *ROWS[:1], *ROWS[2:4]]
    claims = [
        study.Claim("table 9", "better", "ours", "plain"),
        study.Claim("table 9", "counts", "ours", measure="swap"),
        study.Claim("table 9", "longer is better", "ours twice", "ours"),
    ]
    mine = study.Study(tmp_path / "m.toml", "My table", "About it.\n", rows, claims, ["plain"])
    results = {
        "base": dict.fromkeys((0, 1), outcome("1000")),
        "plain": {0: outcome("1110"), 1: outcome("1101")},
        "ours": {
            0: outcome("1100", 8, conditions=conditions, attention=2.0),
            1: outcome("1111", 8, conditions=conditions, attention=3.0),
        },
    }
    page = study.page(mine, results, 3, "Budget: small.", "python -m crystal.compare --study m")
    lines = page.splitlines()
    assert lines[:9] == [
        "# My table", "", "About it.", "", "Budget: small.", "", "```bash",
        "python -m crystal.compare --study m", "```",
    ]  # fmt: skip
    assert "| base | as it is | 25.0 ±0.0 | -50.0 ±0.0 |  |  |  |  |  |" in lines
    assert "| plain | 2 of 3 | 75.0 ±0.0 |  |  |  |  |  |  |" in lines
    half = 12.706 * (50 / math.sqrt(2)) / math.sqrt(2)
    own = f"75.0 ±{half:.1f} | +0.0 ±{half:.1f}"
    assert f"| ours | 2 of 3 | {own} | 6.0 ±0.0 | 20.0 ±0.0 | 0.0 ±0.0 | 0.0 ±0.0 | 2.5 ±6.4 |" in lines
    assert "| ours twice | **not run** |  |  |  |  |  |  |  |" in lines

    # By question: 0, 0, -1, 0 in seed 0 and 0, 0, 1, 0 in seed 1 have the means 0.
    told = f"accuracy | 2 | +0.0 ±{half:.1f} | ±0.0 | **not resolved** |"
    assert f"| table 9 | better | ours > plain | {told}" in lines
    assert "| table 9 | counts | ours > 0 | swap | 2 | +6.0 ±0.0 |  | **holds** |" in lines
    assert "| table 9 | longer is better | ours twice > ours | accuracy | 0 |  |  | **not run** |" in lines
    assert f"| ours | 100.0 ±0.0 | 50.0 ±635.3 | 75.0 ±{half:.1f} |" in lines
    assert "| ours twice |  |  |  |" in lines
    headings = [line for line in lines if line.startswith("#")]
    assert headings == ["# My table", "## Plainly", "## Rows", "## Orderings", "## By family, percent"]

    bare = study.Study(tmp_path / "m.toml", "My table", "About it.", rows)
    headings = [line for line in study.page(bare, {}, 3, "b", "c").splitlines() if line.startswith("#")]
    assert headings == ["# My table", "## Rows", "## By family, percent"]


def test_a_claim_about_what_nobody_measures_is_told(tmp_path):
    claims = [study.Claim("t", "s", "ours", measure="a"), study.Claim("t", "s", "ours", measure="swop")]
    mine = study.Study(tmp_path / "m.toml", "t", "a", ROWS, claims)
    study.check_measures(mine, {})  # nothing has been asked yet
    message = "claim 2: field 'measure': 'swop' is none of accuracy, swap, .*, a, b"
    with pytest.raises(UserError, match=message):
        study.check_measures(mine, {"plain": {0: outcome("1100")}})
