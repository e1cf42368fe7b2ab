"""Silhouettes: their areas as geometry gives them, the tips of arrows where their names say."""

import math

import numpy as np
import pytest

from crystal.runtime import silhouettes


def test_silhouettes_have_the_areas_of_their_shapes():
    """Shares of the square that geometry gives; the star has outer radius 0.55 and inner 0.22, cut off
    nowhere but at the border.
    """
    areas = {
        "circle": math.pi * 0.47**2,
        "square": 0.84**2,
        "triangle": 0.5 * 1.0 * 0.93,
        "star": 5 * 0.55 * 0.22 * math.sin(math.pi / 5),
        "cross": 2 * 0.32 - 0.32**2,
        "diamond": 0.5 * 0.84,
        "ring": math.pi * (0.5**2 - 0.23**2),
    }
    for shape, area in areas.items():
        for width in (9, 18):
            silhouette = np.asarray(silhouettes.mask(shape, width), float) / 255
            assert silhouette.shape == (width, width) and silhouette.mean() == pytest.approx(
                area, abs=0.04
            ), shape
    heart = np.asarray(silhouettes.mask("heart", 18), float) / 255
    assert (
        np.abs(heart - heart[:, ::-1]).max() < 0.3
        and heart[-1].sum() < heart[8].sum() / 5
        and heart[1, 8] < heart[1, 4]
    )
    ring, triangle = (np.asarray(silhouettes.mask(shape, 18)) for shape in ("ring", "triangle"))
    assert ring[9, 9] == 0 and triangle[1].sum() < triangle[16].sum() / 5  # the tip is up


def test_an_arrow_points_where_its_name_says():
    """A triangle that fills half of its square: a pixel at the tip, a whole side at the other end."""
    left, right, top, bottom = np.s_[:, 0], np.s_[:, -1], np.s_[0], np.s_[-1]
    ends = {
        "arrow_left": (left, right), "arrow_right": (right, left), "arrow_up": (top, bottom),
        "arrow_down": (bottom, top),
    }
    assert set(ends) == set(silhouettes.ARROWS)
    for name, (tip, base) in ends.items():
        arrow = np.asarray(silhouettes.mask(name, 15), float) / 255
        assert arrow.mean() == pytest.approx(0.5, abs=0.04), name
        assert arrow[tip].sum() < 1.5 and arrow[base].sum() > 13, name
        # Symmetric about its own axis, so that it points nowhere else.
        other = arrow[::-1] if name in ("arrow_left", "arrow_right") else arrow[:, ::-1]
        assert np.abs(arrow - other).max() < 0.3, name
