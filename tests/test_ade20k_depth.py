"""Depth questions: the answer is the nearest circle's letter, the same from the same seed, and what cannot
be used is told.
"""

import hashlib
import itertools
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from crystal.runtime import data
from crystal.runtime.config import UserError
from data_prep import ade20k_depth

W, H = 160, 120


@pytest.fixture
def sources(tmp_path):
    """Eight photographs in two folders; depth rises to the right in the even ones, to the left
    in the odd ones.
    """
    ramp = np.tile(np.linspace(1, 255, W), (H, 1)).astype(np.uint8)
    for i in range(8):
        for folder in ("images/a", "images/b", "depth/a", "depth/b"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        where = "ab"[i % 2]
        Image.new("RGB", (W, H), (90, 120, 90)).save(tmp_path / "images" / where / f"{i}.jpg")
        Image.fromarray(ramp if i % 2 == 0 else ramp[:, ::-1].copy()).save(
            tmp_path / "depth" / where / f"{i}_depth.png"
        )
    return [
        "--images", str(tmp_path / "images"), "--depth", str(tmp_path / "depth"),
        "--out", str(tmp_path / "out"),
    ], tmp_path


def test_the_answer_is_the_nearest_letter(sources, capsys):
    flags, root = sources
    ade20k_depth.main(flags)
    assert "8 records" in capsys.readouterr().out
    lines = [json.loads(line) for line in (root / "out" / "train.jsonl").read_text().splitlines()]
    assert len({len(r["boxes"]) for r in lines}) > 1 and {r["conversations"][1]["value"] for r in lines} > {
        "A"
    }
    for r in lines:
        x = [(b[0] + b[2]) / 2 for b in r["boxes"]]  # in the order of the letters
        rising = int(re.search(r"(\d+)\.png", r["image"])[1]) % 2 == 0
        assert r["conversations"][1]["value"] == "ABCDE"[int(np.argmax(x) if rising else np.argmin(x))]
        picture = np.asarray(Image.open(root / "out" / "images" / r["image"]))
        for x0, y0, x1, y1 in r["boxes"]:
            ring = picture[y0:y1, x0:x1].reshape(-1, 3).astype(int)
            assert ((ring[:, 0] > 200) & (ring[:, 1] < 60)).sum() > 10
        # The gap of 20 in depth.
        assert abs(np.subtract.outer(x, x))[~np.eye(len(x), dtype=bool)].min() * 254 / (W - 1) > 18
    read, _ = data.read(root / "out" / "train.jsonl", root / "out" / "images")
    assert len(read) == 8 and len(read[0].boxes) == len(lines[0]["boxes"])


def test_a_depth_map_may_have_16_bits(sources):
    """257 times each value of 8 bits is the same depth, in PNG, and in TIFF whatever the file is called."""
    flags, root = sources
    ade20k_depth.main(flags)
    want = (root / "out" / "train.jsonl").read_text()
    for path in (root / "depth").rglob("*.png"):
        values = np.asarray(Image.open(path)).astype(np.uint16) * 257
        Image.fromarray(values).save(path, "TIFF" if "2" in path.stem else "PNG")
    ade20k_depth.main(flags)
    assert (root / "out" / "train.jsonl").read_text() == want


def test_the_same_seed_gives_the_same_bytes_and_count_a_sample(sources):
    flags, root = sources

    def made(*more):
        ade20k_depth.main([*flags, *more])
        return (root / "out" / "train.jsonl").read_text()

    whole = made()
    assert (
        made() == whole != made("--seed", "1")
        and whole.startswith(made("--count", "3"))
        and len(made("--count", "3").splitlines()) == 3
    )


def test_the_seed_draws_order_and_points(sources):
    """Which photographs come first is the smallest SHA-256 of seed and name; another seed asks about other
    points of the same photograph.
    """
    flags, root = sources
    made = {}
    for seed in (0, 2):
        ade20k_depth.main([*flags, "--seed", str(seed), "--count", "5"])
        lines = [json.loads(line) for line in (root / "out" / "train.jsonl").read_text().splitlines()]
        names = [f"{'ab'[i % 2]}/{i}" for i in range(8)]
        order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\norder\n{name}.jpg".encode()).digest())
        assert [r["image"] for r in lines] == [f"{name}.png" for name in order[:5]] and [
            r["id"] for r in lines
        ] == [f"ade20k-{name}" for name in order[:5]]
        made[seed] = {r["id"]: r["boxes"] for r in lines}
    both = made[0].keys() & made[2].keys()
    assert both and all(made[0][name] != made[2][name] for name in both)


def test_a_wider_gap_is_kept(sources):
    """Depth rises by 254 / 159 a pixel: points 60 apart in depth are 37 pixels apart."""
    flags, root = sources
    ade20k_depth.main([*flags, "--gap", "60"])
    lines = [json.loads(line) for line in (root / "out" / "train.jsonl").read_text().splitlines()]
    apart = [
        abs(a - b)
        for r in lines
        for a, b in itertools.combinations([(box[0] + box[2]) / 2 for box in r["boxes"]], 2)
    ]
    assert min(apart) * 254 / 159 > 58 and len(lines) < 8  # five points 60 apart do not fit


def test_points_keep_apart_and_off_the_border():
    """An eighth of the shorter side apart, within the middle 80 %, not where nothing was estimated, each with
    the depth that the map has there.
    """
    noise = np.random.default_rng(5).integers(1, 256, (4, 20)).astype(np.uint8)
    blocks = noise.repeat(40, 0).repeat(20, 1)  # [160,400], flat in blocks of 40 x 20
    blocks[:, :100] = 0
    nearest = 1000.0
    for seed in range(60):
        found = ade20k_depth.points(blocks, 4, 10, np.random.default_rng(seed))
        assert all(100 <= x < 360 and 16 <= y < 144 and d == blocks[y, x] > 0 for x, y, d in found)
        for (x, y, d), (a, b, e) in itertools.combinations(found, 2):
            nearest = min(nearest, math.hypot(x - a, y - b))
            assert abs(d - e) >= 10
    assert 20 <= nearest < 30  # 160 / 8
    # Flat enough is a spread of half the gap, five here, within the 5 x 5 pixels around it; not more.
    for spread, fine in ((5, True), (6, False)):
        checkers = np.full((100, 100), 100, np.uint8)
        checkers[::5, ::5] += spread  # one in every patch of 5 x 5
        assert (ade20k_depth.points(checkers, 1, 10, np.random.default_rng(0)) is not None) == fine


def test_marks_are_drawn_where_their_boxes_say():
    """Radius: a sixtieth of the shorter side, at least 4; a red ring around each place, its letter white
    on black above it.
    """
    for size, r in (((160, 120), 4), ((600, 480), 8)):
        image = Image.new("RGB", size, (90, 120, 90))
        boxes = ade20k_depth.mark(image, [(60, 70), (120, 50)], "BA")
        assert boxes == [[60 - r, 70 - r, 61 + r, 71 + r], [120 - r, 50 - r, 121 + r, 51 + r]]
        picture = np.asarray(image).astype(int)
        for x, y in ((60, 70), (120, 50)):
            assert (
                picture[y, x].tolist() == [90, 120, 90]
                and picture[y, x + r].tolist() == [255, 0, 0]
                and picture[y + r, x].tolist() == [255, 0, 0]
            )
            above = picture[y - 4 * r : y - r, x - r : x + r].reshape(-1, 3)
            assert (
                (above.min(1) > 200).sum() > 3
                and (above.max(1) < 50).sum() > 10
                and (picture[y + r + 2 :, x].max(1) > 50).all()
            )


def test_maps_may_lie_in_one_folder_and_names_end_in_capitals(sources):
    _, root = sources
    for path in list((root / "depth").rglob("*_depth.png")):
        path.rename(root / "depth" / path.name)
    (root / "images" / "a" / "0.jpg").rename(root / "images" / "a" / "0.JPG")
    (root / "images" / "notes.txt").write_text("no photograph")
    ade20k_depth.main(
        ["--images", str(root / "images"), "--depth", str(root / "depth"), "--out", str(root / "elsewhere")]
    )
    lines = [json.loads(line) for line in (root / "elsewhere" / "train.jsonl").read_text().splitlines()]
    assert len(list((root / "elsewhere" / "images").rglob("*.png"))) == 8
    assert len(lines) == 8 and all(
        r["family"] == "ade20k_depth" and r["conversations"][0]["value"].startswith("<image>\nPoints")
        for r in lines
    )


def test_points_keep_off_depth_edges():
    step = np.full((100, 100), 50, np.uint8)
    step[:, 50:] = 200
    for seed in range(200):
        found = ade20k_depth.points(step, 2, 20, np.random.default_rng(seed))
        assert sorted(d for *_, d in found) == [50, 200] and all(not 48 <= x <= 51 for x, *_ in found)
    assert ade20k_depth.points(step, 3, 20, np.random.default_rng(0)) is None  # only two depths there
    assert ade20k_depth.points(np.zeros((100, 100), np.uint8), 2, 20, np.random.default_rng(0)) is None


def test_what_cannot_be_used_is_told(sources, capsys):
    flags, root = sources
    (root / "depth" / "a" / "0_depth.png").unlink()
    Image.new("L", (W, H), 100).save(root / "depth" / "a" / "2_depth.png")
    ade20k_depth.main([*flags, "--count", "8"])
    out = capsys.readouterr().out
    assert (
        "6 records" in out
        and "1 photographs without a depth map (the first: a/0.jpg), 1 with too flat a one" in out
        and "fewer than --count 8" in out
    )
    Image.new("L", (W, H + 1), 100).save(root / "depth" / "b" / "1_depth.png")
    with pytest.raises(
        UserError, match="1_depth.png: is 160 x 121, the photograph 160 x 120; --on_bad_record"
    ):
        ade20k_depth.main(flags)
    ade20k_depth.main([*flags, "--on_bad_record", "skip"])
    assert "left out: " in capsys.readouterr().out
    (root / "images" / "b" / "3.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match="2 broken photographs, more than 1 % of 8"):
        ade20k_depth.main([*flags, "--on_bad_record", "skip"])


def test_wrong_folders_and_flags_are_named(sources, tmp_path):
    flags, root = sources
    (root / "empty").mkdir()
    for change, words in (
        ({1: "none"}, r"--images"),
        ({3: "none"}, r"--depth"),
        ({1: "empty"}, "no photographs in it"),
        ({3: "empty"}, "8 of 8 photographs have no NAME_depth.png"),
    ):
        with pytest.raises(UserError, match=words):
            ade20k_depth.main(
                [str(root / change[i]) if i in change else flag for i, flag in enumerate(flags)]
            )
    with pytest.raises(UserError, match="--gap lies from 1 to 127"):
        ade20k_depth.main([*flags, "--gap", "0"])
