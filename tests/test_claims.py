"""What the relatives' papers say happens, from answers and validations made here, counted by hand."""

import json

import pytest

from crystal import claims


def results(*correct):
    return [{"correct": bool(hit)} for hit in correct]


def log(run, *validations):
    """A run's metrics: training lines, which have no part in it, between the validations."""
    lines = []
    for i, numbers in enumerate(validations, 1):
        lines.append({"step": 100 * i, "ce": 9.0, "gaze": 9.0, "repa": 9.0})
        lines.append({"step": 100 * i, **{f"val_{name}": value for name, value in numbers.items()}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_livr_is_asked_under_its_mask(tmp_path):
    """Of 40 questions 30 are right with latents and 10 without, all of those among the 30: 50 points.

    By Newcombe's method 10: Wilson's intervals are 0.598 to 0.858 and 0.142 to 0.402, the corrected
    correlation (10 * 10 - 0 * 20 - 40 / 2) / sqrt(30 * 10 * 10 * 30) = 0.267. So the half widths are
    sqrt(2 * 0.152^2 * (1 - 0.267)) = 0.184 below and sqrt(2 * 0.108^2 * (1 - 0.267)) = 0.131 above. The other
    columns say nothing about it.
    """
    found = {
        "as trained": results(*[1] * 40),
        "bottleneck": results(*[1] * 30, *[0] * 10),
        "bottleneck, dropped": results(*[1] * 10, *[0] * 30),
    }
    (line,) = claims.told("livr", tmp_path, found)
    assert line.startswith("it happened: with the image seen through latents alone they carry the answer. ")
    assert "75.0 % right with them, 25.0 % without: +50.0 points" in line
    low, high = (float(word) for word in line.split("interval ")[1].split(" to "))
    assert low == pytest.approx(31.6, abs=0.15) and high == pytest.approx(63.1, abs=0.15)

    # One answer of forty more may be chance; and what is lost is not gained.
    (line,) = claims.told("livr", tmp_path, found | {"bottleneck": results(*[1] * 11, *[0] * 29)})
    assert line.startswith("it did not happen: ") and "+2.5 points" in line
    exchanged = {"bottleneck": found["bottleneck, dropped"], "bottleneck, dropped": found["bottleneck"]}
    (line,) = claims.told("livr", tmp_path, exchanged)
    assert line.startswith("it did not happen: ") and "-50.0 points" in line
    assert claims.told("livr", tmp_path, {"as trained": results(1)}) == []


def test_lavit_is_read_off_its_validations(tmp_path):
    """The first and the last count, not what lies between; each claim for itself."""
    between = {"gaze": 0.1, "semantics": 0.9}
    log(tmp_path, {"gaze": 2.5, "semantics": 0.8}, between, {"gaze": 2.0, "semantics": 0.85})
    assert claims.told("lavit", tmp_path, {}) == [
        "it happened: its latents' gaze moves towards the teacher's (KL, eq. 7). "
        "2.500 after 100 updates, 2.000 after 300",
        "it did not happen: its last latent moves towards the teacher's semantics (1 - cosine, eq. 6). "
        "0.800 after 100 updates, 0.850 after 300",
    ]


def test_valr_is_read_off_its_validations_and_so_is_what_is_built_on_it(tmp_path):
    (tmp_path / "mine.py").write_text("from crystal.methods.valr import Method\n")
    log(tmp_path, {"ce": 1.5}, {"ce": 1.0, "repa": -0.25}, {"ce": 0.5, "repa": -0.5})
    for method in ("valr", str(tmp_path / "mine.py")):
        assert claims.told(method, tmp_path, {}) == [
            "it happened: its latents align with what the encoders see (-cosine). "
            "-0.250 after 200 updates, -0.500 after 300",
            "it happened: its words and its answer become likelier (cross-entropy). "
            "1.500 after 100 updates, 0.500 after 300",
        ]


def test_nothing_is_claimed_without_two_measurements(tmp_path):
    assert claims.told("valr", tmp_path, {}) == []  # a run without a log
    log(tmp_path, {"ce": 1.0, "gaze": 1.0})
    for method in ("sft", "crystal", "lavit", "valr"):
        assert claims.told(method, tmp_path, {"bottleneck": results(1)}) == []
