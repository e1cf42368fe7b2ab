"""Families and tables; blind, corrupted and latent-free answers differ where they must; benchmarks, and
runs that were killed.
"""

import csv
import json

import pytest
from test_benchmarks import picture

import crystal.backbone.model
from crystal import evaluate
from crystal.corrupt import Corruption
from crystal.evaluate import by_family, table
from crystal.evaluation import asking, scoring
from crystal.layout import Format
from crystal.runtime import data
from crystal.runtime.config import UserError


def test_table_by_family():
    results = [{"family": f, "correct": c} for f, c in (("a", True), ("a", False), ("b", True))]
    assert by_family(results) == {"a": (1, 2), "b": (1, 1), "all": (2, 3)}
    lines = table({"base": by_family(results), "tuned": by_family(results)}).splitlines()
    assert [x.split()[0] for x in lines] == ["family", "a", "b", "all"] and lines[1].split()[1:3] == [
        "2", "50.0",
    ]


def test_answers_from_what_is_shown(records_file):
    """Each way of asking feeds the model what it says."""
    model = crystal.backbone.model.load("tiny")
    records, _ = data.read(records_file)
    fed, fmt = [], Format(model.tokenizer)

    def record(model, prompts, fmt, n, biases, latents):
        fed.append(prompts)
        return ["red"] * len(prompts)

    old, asking.generate = asking.generate, record
    try:
        for how in ({}, {"grey": True}, {"corruption": Corruption("blur=5")}):
            results = asking.answers(model, fmt, records, batch_size=2, **how)
            assert [r["id"] for r in results] == ["0", "1", "2"] and [r["correct"] for r in results] == [
                True, False, False,
            ]
    finally:
        asking.generate = old
    assert len(fed) == 6 and len(fed[0]) == 2
    assert fed[0][0][0] == fed[2][0][0] == fed[4][0][0]  # one prompt
    x, g, c = (fed[i][0][1] for i in (0, 2, 4))
    assert (g == g[:1]).all() and not (x == g).all() and not (x == c).all() and x.std() > c.std() > g.std()


def test_command_line(records_file, tmp_path, capsys):
    out = tmp_path / "p" / "predictions.jsonl"
    evaluate.main(
        [
            "--data", str(records_file), "--out", str(out), "--max_new_tokens", "3", "--device", "cpu",
            "--limit", "2",
        ]
    )
    lines = [json.loads(x) for x in out.read_text().splitlines()]
    assert [x["id"] for x in lines] == ["0", "1"] and {
        "prediction", "answer", "correct", "question", "family",
    } <= lines[0].keys()
    assert "all" in capsys.readouterr().out
    with pytest.raises(UserError, match="--corruption 'fog' is no corruption mode"):
        evaluate.main(["--data", str(records_file), "--corruption", "fog"])
    with pytest.raises(UserError, match="cannot be read"):
        evaluate.main(["--data", str(tmp_path / "none.jsonl")])


def test_free_latents_are_counted(setup, monkeypatch):
    """Of three answers one comes after all latents, one after some, one after none."""
    s = setup()
    end = [s.fmt.answer_start_id] + s.fmt.text("red") + [s.fmt.answer_end_id, s.fmt.end]
    monkeypatch.setattr(
        asking,
        "write",
        lambda model, prompts, fmt, n, *_: [
            s.fmt.thinking()[0] + end, s.fmt.latents[:2] + end, s.fmt.text("red"),
        ][: len(prompts)],
    )
    results = asking.answers(s.model, s.fmt, s.records, latents="free")
    assert [r["latents"] for r in results] == [3, 2, 0] and [r["prediction"] for r in results] == ["red"] * 3
    with pytest.raises(UserError, match="--latents mask: the prompt holds no latents .the model makes them"):
        asking.hide_latents(setup("--thought", "cot").fmt)
    line, shares = evaluate.written_text(results, 3)
    assert shares == {"all": 1 / 3, "some": 1 / 3, "none": 1 / 3} and "all 3 in 33.3 %" in line


# --- benchmarks ---


def tsv(path, n=5):
    """n questions whose answers alternate, each with a picture of its own."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerow(["index", "image", "question", "A", "B", "answer", "category"])
        rows.writerows([i, picture(i), "Which?", "cat", "dog", "AB"[i % 2], "xy"[i // 3]] for i in range(n))
    return path


def told(out):
    return [json.loads(x) for x in out.read_text().splitlines()]


def test_a_benchmark_from_file_to_scores(tmp_path, monkeypatch, capsys):
    path, out = tsv(tmp_path / "BLINK.tsv"), tmp_path / "p.jsonl"
    monkeypatch.setattr(
        asking, "generate", lambda model, prompts, fmt, n, *_: ["A", "the dog", "cat or dog"][: len(prompts)]
    )
    flags = [
        "--benchmark", str(path), "--device", "cpu", "--batch_size", "3", "--out", str(out),
        "--min_pixels", "3136", "--max_pixels", "6272",
    ]
    evaluate.main(flags)
    printed = capsys.readouterr().out
    assert [(r["extracted"], r["correct"]) for r in told(out)] == [
        ("A", True), ("B", True), (None, False), ("A", False), ("B", False),
    ]
    about = json.loads(out.with_suffix(".json").read_text())
    assert (
        about["scores"]["Overall"]["score"] == 0.4
        and about["scores"]["x"]["rows"] == 3
        and about["benchmark"] == "BLINK"
        and about["unread"] == 0.2
    )
    assert (
        about["settings"]["pixels"] == {"shortest_edge": 3136, "longest_edge": 6272}
        and "Question: Which?\nOptions:\nA. cat" in about["settings"]["prompt"]
    )
    for line in (
        "BLINK: 5 questions",
        "read by: choice: " + scoring.EXTRACTION["choice"],
        "counted as wrong: 20.0 %",
        "longest_edge",
    ):
        assert line in printed
    assert not list(tmp_path.glob("p.jsonl.*"))


def test_a_killed_run_goes_on(tmp_path, monkeypatch, capsys):
    """The second batch dies; what the first said stays, is not asked again, and the outcome is that of a
    run in one piece.
    """
    path, out, calls = tsv(tmp_path / "x.tsv"), tmp_path / "p.jsonl", []

    def answer(model, prompts, fmt, n, *_):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ["A"] * len(prompts)

    monkeypatch.setattr(asking, "generate", answer)
    flags = ["--data", str(path), "--device", "cpu", "--batch_size", "2", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(flags)
    part = tmp_path / "p.jsonl.0"
    assert [r["id"] for r in told(part)] == ["0", "1"] and not out.exists()
    with open(part, "a") as file:
        file.write('{"index": 2, "id"')  # the kill fell into a line
    with pytest.raises(
        UserError,
        match=r"p\.jsonl: holds predictions that were made otherwise \(max_new_tokens\); --overwrite",
    ):
        evaluate.main([*flags, "--max_new_tokens", "5"])
    evaluate.main(flags)
    assert calls == [2, 2, 2, 1] and "2 questions are answered already" in capsys.readouterr().out
    assert [r["id"] for r in told(out)] == ["0", "1", "2", "3", "4"] and not part.exists()
    evaluate.main(flags)  # nothing is left to ask
    assert (
        len(calls) == 4
        and json.loads(out.with_suffix(".json").read_text())["scores"]["Overall"]["score"] == 0.6
    )
    evaluate.main([*flags, "--overwrite"])
    assert calls[4:] == [2, 2, 1]


def test_bad_flags_are_one_line(tmp_path, records_file):
    path = tsv(tmp_path / "x.tsv", 1)
    for flags, says in (
        (["--scores", "MMVQ"], "--scores MMVQ: choose one of"),
        (["--batch_size", "0"], "at least 1"),
        (["--corruption", "blur=x"], "blur=x: a strength is a number"),
        (["--corruption", "blur=-1"], "--corruption blur=-1: blur goes from 0 to 256"),
        (["--corruption", "mask=1.5"], "from 0 to 1"),
        (["--limit", "-2400"], "--limit"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--reliance", "--latents", "drop"], "--latents changes nothing with --reliance"),
        (["--reliance", "--grey"], "--grey changes"),
        (["--reliance", "--diagnose"], "--diagnose changes"),
        (["--diagnose", "--latents", "drop"], "--latents changes nothing with --diagnose"),
        (["--diagnose", "--bottleneck"], "--bottleneck changes"),
        (["--diagnose", "--scores", "MMVP"], "--scores changes"),
        (["--latents", "free", "--device", "cpu"], "tiny has no latents"),
    ):
        with pytest.raises(UserError, match=says):
            evaluate.main(["--data", str(path), *flags])
    with pytest.raises(UserError, match="--suffix changes nothing with records that are no TSV"):
        evaluate.main(["--data", str(records_file), "--suffix", "x"])


def test_diagnose_asks_with_the_seed_and_keeps_what_a_tsv_was_answered(tmp_path, monkeypatch, capsys):
    path, fed = tsv(tmp_path / "x.tsv", 2), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        asking,
        "generate",
        lambda model, prompts, fmt, n, *_: fed.append(prompts[0][1]) or ["A"] * len(prompts),
    )
    for seed in "001":
        evaluate.main(
            ["--data", str(path), "--diagnose", "--corruption", "noise=50", "--seed", seed, "--device", "cpu"]
        )
    assert (fed[0] == fed[1]).all() and not (fed[0] == fed[2]).all()
    out = tmp_path / "runs" / "tiny" / "evaluation" / "x.diagnose.jsonl"
    assert (
        "wrote runs/tiny/evaluation/x.diagnose.jsonl" in capsys.readouterr().out
        and [(r["asked"], r["prediction"]) for r in told(out)] == [("as trained", "A")] * 2
    )


def test_answers_to_a_file_that_changed_are_not_reused(tmp_path, monkeypatch):
    """A row behind the first one is another question now: what was said to the old one is no answer."""
    path, out = tsv(tmp_path / "x.tsv"), tmp_path / "p.jsonl"
    monkeypatch.setattr(asking, "generate", lambda model, prompts, *_: ["A"] * len(prompts))
    flags = ["--data", str(path), "--device", "cpu", "--out", str(out)]
    evaluate.main(flags)
    before = out.read_text()

    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3].replace("?", " now?"), *lines[4:]]) + "\n")
    assert path.read_text().splitlines() != lines
    with pytest.raises(UserError, match=r"were made otherwise \(data_sha256\); --overwrite"):
        evaluate.main(flags)
    assert out.read_text() == before


# --- odd rows ---


@pytest.fixture
def odd_tsv(tmp_path):
    """Six rows, of which one is whole. Odd of the others: the answer twice, no picture, no answer, both."""
    path = tmp_path / "x.tsv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerow(["index", "image", "question", "A", "B", "answer"])
        for i, (image, other, answer) in enumerate(
            [(1, "None", "B"), (1, "dog", "(A)"), (0, "dog", "A")]
            + [(1, "dog", ""), (0, "", ""), (1, "dog", "A")]
        ):
            rows.writerow([i, picture(i) if image else "", "Which?", "cat" if other else "", other, answer])
    return path


@pytest.mark.parametrize("more", [[], ["--corruption", "noise=50"], ["--grey"]], ids=str)
def test_odd_rows_do_not_stop_a_file(odd_tsv, tmp_path, capsys, monkeypatch, more):
    """All six are asked; the text-only row whose answer is A and the whole row are right; five are listed."""
    monkeypatch.setattr(asking, "generate", lambda model, prompts, *_: ["A"] * len(prompts))
    out = tmp_path / "p.jsonl"
    evaluate.main(["--data", str(odd_tsv), "--device", "cpu", "--out", str(out), *more])
    assert [r["correct"] for r in told(out)] == [False, False, True, False, False, True]
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["scores"]["Overall"]["score"] == pytest.approx(2 / 6) and len(about["odd"]) == 5
    printed = capsys.readouterr().out
    assert "odd rows, asked all the same: 5\n" in printed
    assert f"  {odd_tsv}:3 (index 1): answer '(A)' is none of its options A, B\n" in printed
    assert f"  {odd_tsv}:6 (index 4): no picture; no answer\n" in printed


def test_predictions_of_a_file_without_answers_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(asking, "generate", lambda model, prompts, *_: ["red"] * len(prompts))
    path, out = tmp_path / "x.tsv", tmp_path / "p.jsonl"
    path.write_text("index\timage\tquestion\n" + "".join(f"{i}\t{picture(i)}\tq\n" for i in range(25)))
    evaluate.main(["--data", str(path), "--device", "cpu", "--out", str(out)])
    assert [(r["prediction"], r["correct"]) for r in told(out)] == [("red", False)] * 25
    printed = capsys.readouterr().out
    assert "25 questions, none with an answer: no scores\n" in printed and "odd rows" not in printed
    assert json.loads(out.with_suffix(".json").read_text())["scores"] == {}
