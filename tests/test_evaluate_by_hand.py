"""The evaluation command on a model made by hand (by_hand.py): what each way of asking feeds, answers, prints
and stores, by value.

Right answers follow from by_hand.py's rules; intervals are scipy's; attention is counted; every printed
table is written out.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import by_hand
import pytest
from hand import AS_TRAINED, BOTTLENECK, DROPPED, Masked, counted_mass, hand, ingredients, said  # noqa: F401  (fixtures)
from PIL import Image
from scipy.stats import binomtest

from crystal import evaluate, methods
from crystal.corrupt import Corruption
from crystal.evaluation import asking, reliance
from crystal.runtime.config import UserError


def test_written_text_by_number():
    line, shares = evaluate.written_text([{"latents": n} for n in (4, 4, 5, 1, 0, 3, 3, 0)], 4)
    assert (
        line
        == "latents that the model wrote itself: all 4 in 37.5 % of the answers, some in 37.5 %, none in 25.0 %"  # noqa: E501
    )
    assert shares == {"all": 0.375, "some": 0.375, "none": 0.25}


# --- what is printed ---


def ends(hits, n):
    """The share and Wilson's 95 % interval in percent, by scipy: of few questions its ends."""
    interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return f"{100 * hits / n:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def test_the_table_by_hand():
    """Of 3 of 4 Wilson's interval goes from 30.1 to 95.4; 500 of 1000 lies in the middle of its own."""
    assert ends(3, 4) == "75.0 (30.1 to 95.4)"
    assert evaluate.table({"x": {"all": (500, 1000)}}).splitlines() == [
        "family       questions           x",
        "all               1000   50.0 ±3.1",
    ]
    columns = {
        "base": {"count": (3, 4), "all": (4, 7), "depth": (1, 3)},
        "a longer name": {"count": (0, 4), "all": (3, 7), "depth": (3, 3)},
    }
    assert evaluate.table(columns).splitlines() == [
        "family       questions                 base          a longer name",
        f"count                4  {ends(3, 4)}      {ends(0, 4)}",
        f"depth                3   {ends(1, 3)}  {ends(3, 3)}",
        f"all                  7  {ends(4, 7)}    {ends(3, 7)}",
    ]


def test_families_in_order_of_appearance():
    results = [
        {"family": f, "correct": c}
        for f, c in (("z", True), ("all", False), ("a", True), ("z", False), ("all", True))
    ]
    found = evaluate.by_family(results)
    assert found == {"z": (1, 2), "a": (1, 1), "all": (3, 5)} and list(found) == ["z", "a", "all"]


def test_a_benchmarks_text_by_hand():
    rows = [
        ("A", True, "cats"), ("B", False, "cats"), (None, False, "dogs"), ("A", True, "dogs"),
        ("B", True, "dogs"),
    ]
    records = [
        SimpleNamespace(rule="exact" if i == 4 else "choice", row={"category": c}, odd="")
        for i, (_, _, c) in enumerate(rows)
    ]
    results = [
        {"index": i, "id": str(i), "answer": "A", "extracted": e, "correct": right}
        for i, (e, right, _) in enumerate(rows)
    ]
    text, told = evaluate.benchmark_text("BLINK", records, list(reversed(results)))
    interval = binomtest(3, 5).proportion_ci(0.95, method="wilson")
    assert text.splitlines()[:3] == [
        "BLINK: 5 questions",
        "                rows    score     95 % interval",
        "Overall            5    60.00" + f"{100 * interval.low:.1f} to {100 * interval.high:.1f}".rjust(18),
    ]
    assert [line.split()[:3] for line in text.splitlines()[3:5]] == [
        ["cats", "2", "50.00"], ["dogs", "3", "66.67"],
    ]
    assert text.splitlines()[5:] == [
        "read by: choice: option letter or text, VLMEvalKit e8e78f0 exact_matching",
        "read by: exact: exact match, case and a final full stop aside",
        "answers that could not be read, counted as wrong: 20.0 %",
    ]
    assert (
        told["unread"] == 0.2
        and told["benchmark"] == "BLINK"
        and list(told["extraction"]) == ["choice", "exact"]
    )
    assert told["scores"]["dogs"]["score"] == pytest.approx(2 / 3) and told["scores"]["cats"]["rows"] == 2
    assert told["scores"]["Overall"]["interval"] == pytest.approx((interval.low, interval.high), abs=1e-4)
    assert evaluate.benchmark_text("", records, results)[0].startswith("a benchmark of its own: 5 questions")


def test_odd_rows_are_listed_up_to_twenty():
    records = [SimpleNamespace(rule="exact", row={}, odd="odd", where=f"x:{i}") for i in range(23)]
    results = [{"index": i, "id": str(i), "answer": "A", "extracted": "a", "correct": 1} for i in range(23)]
    text, told = evaluate.benchmark_text("", records, results)
    lines = text.splitlines()
    assert "odd rows, asked all the same: 23" in lines and lines[-1] == "  and 3 more"
    assert lines[-2] == "  x:19: odd" and told["odd"] == {f"x:{i}": "odd" for i in range(23)}


def test_progress_in_lines(monkeypatch, capsys):
    """Without a terminal a line each half minute: after 40 of 200 s with 10 of 50 questions done, 160 s or
    3 minutes are left.
    """
    now = [1000.0]
    monkeypatch.setattr(asking.time, "perf_counter", lambda: now[0])
    bar = asking.Bar(50, "asked", SimpleNamespace(is_first=True))
    for second, n in ((20, 4), (40, 6), (60, 5), (71, 5)):
        now[0] = 1000.0 + second
        bar.update(n)
    assert capsys.readouterr().out.splitlines() == [
        "asked: 10 of 50 questions, about 3 min left",
        "asked: 20 of 50 questions, about 2 min left",
    ]
    bar = asking.Bar(50, "taught", SimpleNamespace(is_first=True), "look")
    now[0] += 100
    bar.update(25)
    assert capsys.readouterr().out == "taught: 25 of 50 looks, about 2 min left\n"
    for procs, name in ((SimpleNamespace(is_first=False), "asked"), (SimpleNamespace(is_first=True), "")):
        bar = asking.Bar(50, name, procs)
        now[0] += 100
        bar.update(10)
    assert capsys.readouterr().out == ""


# --- the command ---


def run(hand, *flags):
    evaluate.main(["--data", str(hand.file), "--device", "cpu", *flags])


def told(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_from_records_to_intervals(hand, tmp_path, capsys):
    hand.file.write_text(hand.file.read_text().replace('"family": "c"', '"family": ""'))
    run(hand, "--model", "here/mine", "--out", "p/x.jsonl")
    printed = capsys.readouterr().out
    assert printed.splitlines()[:5] == [
        "family       questions                   mine",
        f"a                    5  {ends(5, 5)}",
        "b                    2             50.0 ±40.5",
        f"all                  8    {ends(7, 8)}",
        next(line for line in printed.splitlines() if line.startswith("8 questions in ")),
    ]
    assert "wrote p/x.jsonl and x.json" in printed
    assert said(told(tmp_path / "p" / "x.jsonl")) == AS_TRAINED
    about = json.loads((tmp_path / "p" / "x.json").read_text())
    assert about["families"]["all"]["right"] == 7 / 8 and about["families"]["b"]["rows"] == 2
    assert about["families"]["a"]["interval"] == pytest.approx(
        [binomtest(5, 5).proportion_ci(0.95, method="wilson").low, 1.0], abs=1e-4
    )
    # The first prompt, as the model gets it (its picture cut to one token).
    prompt = about["settings"]["prompt"]
    assert (
        prompt.count("<|image_pad|>") == 1
        and "see one" in prompt
        and prompt.endswith("<|latent_0|><|latent_1|><|latent_2|>. </think><answer>")
    )


def test_nothing_is_stored_of_records_unless_asked(hand, tmp_path):
    before = {p.name for p in tmp_path.rglob("*")}
    run(hand)
    assert {p.name for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "flags, expected",
    [
        ((), {}),
        (("--batch_size", "5"), {"batch_size": 5}),
        (("--max_new_tokens", "9"), {"max_new_tokens": 9}),
        (("--seed", "4"), {"seed": 4}),
        (("--grey",), {"grey": True}),
        (("--latents", "drop"), {"latents": "drop"}),
        (("--latents", "mask"), {"latents": "mask"}),
        (("--corruption", "blur=7"), {"corruption": Corruption("blur=7")}),
        (("--corruption", "blur"), {"corruption": Corruption("blur=2:5")}),
        (("--corruption", "mask=0"), {"corruption": Corruption("mask=0")}),
        (("--corruption", "mask=1"), {"corruption": Corruption("mask=1")}),
        (("--limit", "3"), {"count": 3}),
        (("--limit", "9"), {"count": 8}),
    ],
)
def test_each_flag_reaches_the_questions(hand, monkeypatch, flags, expected):
    kept, real = {}, evaluate.answers

    def spy(model, fmt, records, batch_size, latents, corruption, grey, seed, max_new_tokens, **more):
        kept.update(
            count=len(records), batch_size=batch_size, latents=latents, corruption=corruption, grey=grey,
            seed=seed, max_new_tokens=max_new_tokens, biases=more["biases"],
        )
        return real(model, fmt, records[:1], 1, procs=more["procs"])

    monkeypatch.setattr(evaluate, "answers", spy)
    run(hand, *flags)
    assert (
        kept
        == {
            "count": 8,
            "batch_size": 32,
            "latents": "keep",
            "corruption": None,
            "grey": False,
            "seed": 0,
            "max_new_tokens": 32,
            "biases": None,
        }
        | expected
    )


def test_each_flag_reaches_the_model(hand):
    run(hand, "--limit", "1")
    run(
        hand, "--limit", "1", "--model", "x/y", "--checkpoint", "12", "--min_pixels", "4000",
        "--max_pixels", "5000", "--method", "m.py", "--trust_method",
    )
    nothing = {"min_pixels": None, "max_pixels": None, "method": "", "trust_method": False}
    assert hand.opened == [
        ("tiny", "best", "cpu", nothing),
        (
            "x/y",
            "12",
            "cpu",
            {"min_pixels": 4000, "max_pixels": 5000, "method": "m.py", "trust_method": True},
        ),
    ]


def test_bottleneck_is_the_methods_mask(hand, monkeypatch, capsys):
    with pytest.raises(UserError, match="--bottleneck: crystal has no mask"):
        run(hand, "--bottleneck")
    monkeypatch.setattr(evaluate.methods, "get", lambda name: Masked)
    run(hand, "--bottleneck", "--out", "p.jsonl")
    assert said(told(hand.file.parent / "p.jsonl")) == BOTTLENECK


def test_an_image_root_of_its_own(hand, tmp_path):
    """The same names, other pictures: all are light there."""
    (tmp_path / "root").mkdir()
    for i in range(8):
        Image.new("RGB", (56, 56), (180, 180, 180)).save(tmp_path / "root" / f"{i}.png")
    run(hand, "--image_root", str(tmp_path / "root"), "--out", "p.jsonl")
    assert said(told(tmp_path / "p.jsonl")) == ["light"] * 5 + ["white."] + ["light"] * 2


def test_later_turns_are_told(hand, capsys):
    record = json.loads(hand.file.read_text().splitlines()[0])
    record["conversations"] += [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "more"}]
    hand.file.write_text(json.dumps(record) + "\n")
    run(hand)
    assert capsys.readouterr().out.startswith("1 later turns are not asked\n")


def test_diagnosis_is_printed_and_stored(hand, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        methods.get("crystal"),
        "hidden",
        lambda self, model, batch, recorder=None: by_hand.weigh(batch, recorder),
    )
    run(hand, "--diagnose", "--out", "d/x.jsonl", "--batch_size", "5", "--max_new_tokens", "4")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["family", "questions", "as", "trained", "latents", "dropped"]
    assert lines[4] == f"all                  8    {ends(7, 8)}  {ends(3, 8)}"
    assert (
        lines[5]
        == f"mean attention from answers to latents, over layers, heads and rows: {counted_mass(hand):.4f}"
    )
    stored = told(tmp_path / "d" / "x.jsonl")
    assert [(r["asked"], r["prediction"]) for r in stored] == [("as trained", x) for x in AS_TRAINED] + [
        ("latents dropped", x) for x in DROPPED
    ]
    assert hand.fed == [(5, 4, "keep"), (3, 4, "keep"), (5, 4, "drop"), (3, 4, "drop")]


def test_diagnosis_takes_grey_and_corruption(hand, monkeypatch):
    kept = []
    monkeypatch.setattr(
        evaluate,
        "diagnose",
        lambda *args, **how: kept.append(how) or ({"as trained": [{"family": "a", "correct": True}]}, None),
    )
    run(hand, "--diagnose", "--grey", "--seed", "3")
    run(hand, "--diagnose", "--corruption", "mask=1", "--batch_size", "2", "--max_new_tokens", "7")
    for how in kept:
        how.pop("procs")
    assert kept == [
        {"batch_size": 32, "corruption": None, "grey": True, "seed": 3, "max_new_tokens": 32},
        {"batch_size": 2, "corruption": Corruption("mask=1"), "grey": False, "seed": 0, "max_new_tokens": 7},
    ]


def test_reliance_is_handed_what_was_asked(hand, monkeypatch, tmp_path):
    """The corruption is the flag's, else what the run trained with; the folder is the model's,
    by the data's name.
    """
    kept = []
    monkeypatch.setattr(
        reliance,
        "run",
        lambda model, fmt, records, out, about, **how: kept.append((len(records), str(out), about, how)),
    )
    hand.settings = replace(hand.settings, corruption="noise=11:13")
    run(hand, "--reliance", "--seed", "5", "--batch_size", "4", "--max_new_tokens", "6", "--limit", "7")
    run(hand, "--reliance", "--corruption", "blur=9", "--out", "elsewhere", "--checkpoint", "last")
    (tmp_path / "a_run").mkdir()
    monkeypatch.setattr(evaluate.methods, "get", lambda name: Masked)
    run(hand, "--reliance", "--model", "a_run", "--bottleneck")
    for count, out, about, how in kept:
        how.pop("procs")
        mask = how.pop("biases")
        assert (mask is not None) == about["bottleneck"]
    name = str(hand.file)
    assert kept[0] == (
        7,
        "runs/tiny/reliance/hand",
        {"model": "tiny", "checkpoint": "best", "data": name, "bottleneck": False},
        {"corruption": Corruption("noise=11:13"), "batch_size": 4, "max_new_tokens": 6, "seed": 5},
    )
    assert kept[1] == (
        8,
        "elsewhere",
        {"model": "tiny", "checkpoint": "last", "data": name, "bottleneck": False},
        {"corruption": Corruption("blur=9"), "batch_size": 32, "max_new_tokens": 32, "seed": 0},
    )
    assert kept[2][1:3] == (
        "a_run/reliance/hand",
        {"model": "a_run", "checkpoint": "best", "data": name, "bottleneck": True},
    )
    hand.settings = None  # no run: the paper's blur
    run(hand, "--reliance")
    assert kept[3][3]["corruption"] == Corruption("blur=2:5")


# --- stored predictions ---


@pytest.mark.parametrize(
    "name, flags",
    [
        ("checkpoint", ("--checkpoint", "last")),
        ("corruption", ("--corruption", "blur")),
        ("grey", ("--grey",)),
        ("latents", ("--latents", "mask")),
        ("limit", ("--limit", "8")),
        ("max_new_tokens", ("--max_new_tokens", "31")),
        ("model, model_sha256", ("--model", "other")),
        ("seed", ("--seed", "1")),
    ],
)
def test_answers_to_another_question_are_not_taken(hand, name, flags):
    """Each flag that may change an answer makes the stored ones another's; the batch's size does not."""
    run(hand, "--out", "p.jsonl")
    asked = len(hand.fed)
    run(hand, "--out", "p.jsonl", "--batch_size", "2")
    assert len(hand.fed) == asked  # all are known
    with pytest.raises(UserError, match=rf"made otherwise \({name}\)"):
        run(hand, "--out", "p.jsonl", *flags)


def test_pixels_data_and_mask_make_answers_others(hand, monkeypatch, tmp_path):
    run(hand, "--out", "p.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text(hand.file.read_text())
    with pytest.raises(UserError, match=r"made otherwise \(data\)"):
        evaluate.main(["--data", str(other), "--device", "cpu", "--out", "p.jsonl"])
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.methods, "get", lambda name: Masked)
        with pytest.raises(UserError, match=r"made otherwise \(bottleneck\)"):
            run(hand, "--out", "p.jsonl", "--bottleneck")
    edges = {"shortest_edge": 1, "longest_edge": 99999, "height": None}
    monkeypatch.setattr(type(hand.model.image_processor), "size", edges, raising=False)
    with pytest.raises(UserError, match=r"made otherwise \(pixels\)"):
        run(hand, "--out", "p.jsonl")
    hand.file.write_text(hand.file.read_text().replace("see one", "see won", 1))
    with pytest.raises(UserError, match=r"made otherwise \(data_sha256, pixels, prompt\)"):
        run(hand, "--out", "p.jsonl")


def test_predictions_by_another_file_of_a_method_are_others(hand, tmp_path):
    """A method of one's own counts by what its file says."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from crystal.methods.crystal import Method as Crystal\n\n\nclass Method(Crystal):\n    pass\n"
    )
    hand.settings = replace(hand.settings, method=str(file))
    run(hand, "--out", "p.jsonl")
    stored = json.loads((tmp_path / "p.json").read_text())
    assert len(stored["settings"]["method"]) == 64
    stored["settings"]["method"] = "0" * 64
    (tmp_path / "p.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"made otherwise \(method\)"):
        run(hand, "--out", "p.jsonl")
