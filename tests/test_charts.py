"""Charts as SVG: places by hand, every term of the log, and text that stays text."""

import math
import re

import pytest
import torch

from crystal.evaluation import charts
from crystal.evaluation.charts import BOTTOM, LEFT, RIGHT, TOP, Chart
from crystal.evaluation.latent_space import States
from crystal.evaluation.scoring import wilson


def lines(svg, css):
    """Points of the polylines of a class: a list of [(x, y)]."""
    found = re.findall(rf'<polyline class="{css}" points="([^"]*)"', svg)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in found]


def circles(svg, css):
    """Centres of the circles of a class."""
    found = re.findall(rf'<circle class="{css}" cx="([^"]*)" cy="([^"]*)"', svg)
    return [tuple(map(float, centre)) for centre in found]


def test_data_becomes_pixels():
    """A plot of 100 by 100 pixels between the margins: the middle of a range, of a logarithm its root."""
    size = {"width": LEFT + RIGHT + 100, "height": TOP + BOTTOM + 100}
    chart = Chart((0, 10), (-1, 1), **size)
    assert chart.at(0, -1) == (f"{LEFT:.1f}", f"{TOP + 100:.1f}")
    assert chart.at(5, 0) == (f"{LEFT + 50:.1f}", f"{TOP + 50:.1f}")
    chart = Chart((0, 10), (0.01, 100), log=True, **size)
    assert chart.at(10, 1.0) == (f"{LEFT + 100:.1f}", f"{TOP + 50:.1f}")
    assert Chart((3, 3), (2, 2)).at(3, 2)  # a range of one value is no division by zero


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.5, 1]),
        (0, 500, [0, 200, 400]),
        (-0.1, 0.3, [-0.1, 0, 0.1, 0.2, 0.3]),
        (1, 1.1, [1, 1.05, 1.1]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_ticks_of_a_logarithm():
    assert charts.powers(0.02, 30) == pytest.approx([0.1, 1, 10])
    assert charts.powers(0.036, 0.48) == pytest.approx(
        [0.05, 0.1, 0.2]
    )  # a single power of ten would say little


def test_every_term_has_a_panel():
    """Two terms, the latents' share of both paths in one panel, and gain with its interval before all."""
    steps = range(1, 101)
    training = {
        "loss": [(n, 20.0 / n) for n in steps],
        "ce_int": [(n, 0.5) for n in steps],
        "mass_int": [(n, 0.1) for n in steps],
        "mass_cor": [(n, 0.2) for n in steps],
        "lr": [(n, 1e-3) for n in steps],
    }
    validation = {"loss": [(50, 1.0)], "gain": [(50, 0.2), (100, 0.3)], "gain_pm": [(50, 0.1), (100, 0.4)]}
    drawn = charts.curves(training, validation)
    titles = re.findall("<figcaption>(.*?)</figcaption>", drawn)
    assert titles == ["gain", "loss", "ce_int", "attention that latents get", "lr"]

    panels = dict(zip(titles, drawn.split("</figure>")))
    # From the lowest end of an interval, -0.1, to the highest, 0.7.
    height = 180 - TOP - BOTTOM
    centres = circles(panels["gain"], "intact")
    assert centres[1][1] == pytest.approx(TOP + height * (0.7 - 0.3) / 0.8, abs=0.06)
    zero = lines(panels["gain"], "zero")[0]
    assert zero[0][1] == zero[1][1] == pytest.approx(TOP + height * 0.7 / 0.8, abs=0.06)
    ends = re.findall(r'<line class="intact" x1="(.*?)" x2="\1" y1="(.*?)" y2="(.*?)"', panels["gain"])
    assert float(ends[1][1]) == pytest.approx(TOP + height, abs=0.06) and float(ends[1][2]) == pytest.approx(
        TOP, abs=0.06
    )

    assert len(lines(panels["loss"], "faint intact")[0]) == 100 and circles(panels["loss"], "held intact")
    # 20 to 0.2 is logarithmic: half way up stands 2, the tenth update.
    tenth = lines(panels["loss"], "faint intact")[0][9]
    assert tenth[1] == pytest.approx(TOP + height / 2, abs=0.06)
    assert lines(panels["attention that latents get"], "corrupted") and not lines(panels["lr"], "corrupted")


def test_a_long_curve_is_thinned_and_keeps_its_end():
    points = [(n, float(n)) for n in range(1001)]  # every third, 0 to 999, and 1000
    thin = charts.thinned(points)
    assert (
        len(thin) == 335 <= charts.DRAWN
        and thin[0] == (0, 0.0)
        and thin[-2:] == [(999, 999.0), (1000, 1000.0)]
    )
    assert charts.thinned(points[:400]) == points[:400]


def test_a_histogram_counts_questions():
    """Three questions at the lowest entropy, one near an even look over eight tokens: log 8."""
    path = [{"entropy": 1.0, "tokens": 8}] * 3 + [{"entropy": 2.05, "tokens": 8}]
    drawn = charts.entropies([path, [{"entropy": 1.5, "tokens": 8}] * 4], "answer")
    bars = re.findall(r'<rect class="bar (\w+)" x="(.*?)" y=".*?" width=".*?" height="(.*?)"', drawn)
    tall = {
        css: [float(height) for name, _, height in bars if name == css] for css in ("intact", "corrupted")
    }
    height = 180 - TOP - BOTTOM
    assert sorted(tall["intact"])[-2:] == pytest.approx([height / 4, height * 3 / 4], abs=0.1)
    assert sorted(tall["corrupted"])[-2:] == pytest.approx([0, height], abs=0.1)
    limit = lines(drawn, "limit")[0]
    low, high = 1.0 - 0.05 * (math.log(8) - 1) - 1e-3, math.log(8) + 1e-3
    across = LEFT + (math.log(8) - low) / (high - low) * (270 - LEFT - RIGHT)
    assert limit[0][0] == pytest.approx(across, abs=0.06)
    assert "mean: intact 1.262, corrupted 1.500" in drawn


def test_accuracy_has_wilsons_interval():
    numbers = [{"focus": i / 10, "right": i > 5} for i in range(11)]
    drawn = charts.accuracy(numbers, "text")
    height = 180 - TOP - BOTTOM
    (line,) = lines(drawn, "intact")
    assert line[0][1] == pytest.approx(TOP + height * (1 - 5 / 11), abs=0.06) and line[-1][1] == TOP
    (band,) = re.findall('<polygon class="interval" points="([^"]*)"', drawn)
    corners = [tuple(map(float, corner.split(","))) for corner in band.split()]
    low, high = wilson(5, 11)
    assert corners[0][1] == pytest.approx(TOP + height * (1 - high), abs=0.06)
    assert corners[-1][1] == pytest.approx(TOP + height * (1 - low), abs=0.06)
    assert "focus at least 0.90: 100 % of 2 questions right" in drawn and ">11</text>" in drawn


def test_states_keep_their_kinds_and_say_what_is_kept():
    points = {"image": torch.tensor([[0.0, 0.0], [1.0, 2.0]]), "latents": torch.tensor([[4.0, 1.0]])}
    drawn = charts.scatter(States(2, points, (0.5, 0.25), None), 5)
    assert len(circles(drawn, "point image")) == 2 and len(circles(drawn, "point latents")) == 1
    assert "before layer 2 of 0 to 4: 75 % of the variance kept" in drawn
    assert "first component, 50 % of the variance" in drawn and "second, 25 %" in drawn
    assert [charts.where(depth, 5) for depth in (0, 5)] == [
        "before the first layer",
        "after the last of 5 layers",
    ]


def test_names_stay_text():
    """A method's own term may be called anything."""
    drawn = charts.curves({"<img onerror=x>": [(1, 1.0), (2, 2.0)]}, {})
    assert "<img" not in drawn and "&lt;img onerror=x&gt;" in drawn
