"""Depth questions: the answer is the nearest circle's letter, the same from the same seed, and what cannot be used is told."""
import json
import re

import numpy as np
import pytest
from PIL import Image

from crystal import data
from crystal.config import UserError
from data_prep import ade20k_depth

W, H = 160, 120


@pytest.fixture
def sources(tmp_path):
    """Eight photographs in two folders; depth rises to the right in the even ones, to the left in the odd ones."""
    ramp = np.tile(np.linspace(1, 255, W), (H, 1)).astype(np.uint8)
    for i in range(8):
        for folder in ("images/a", "images/b", "depth/a", "depth/b"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        where = "ab"[i % 2]
        Image.new("RGB", (W, H), (90, 120, 90)).save(tmp_path / "images" / where / f"{i}.jpg")
        Image.fromarray(ramp if i % 2 == 0 else ramp[:, ::-1].copy()).save(tmp_path / "depth" / where / f"{i}_depth.png")
    return ["--images", str(tmp_path / "images"), "--depth", str(tmp_path / "depth"), "--out", str(tmp_path / "out")], tmp_path


def test_the_answer_is_the_nearest_letter(sources, capsys):
    flags, root = sources
    ade20k_depth.main(flags)
    assert "8 records" in capsys.readouterr().out
    lines = [json.loads(line) for line in (root / "out" / "train.jsonl").read_text().splitlines()]
    assert len({len(r["boxes"]) for r in lines}) > 1 and {r["conversations"][1]["value"] for r in lines} > {"A"}
    for r in lines:
        x = [(b[0] + b[2]) / 2 for b in r["boxes"]]  # in the order of the letters
        rising = int(re.search(r"(\d+)\.png", r["image"])[1]) % 2 == 0
        assert r["conversations"][1]["value"] == "ABCDE"[int(np.argmax(x) if rising else np.argmin(x))]
        picture = np.asarray(Image.open(root / "out" / "images" / r["image"]))
        for x0, y0, x1, y1 in r["boxes"]:
            ring = picture[y0:y1, x0:x1].reshape(-1, 3).astype(int)
            assert ((ring[:, 0] > 200) & (ring[:, 1] < 60)).sum() > 10
        assert abs(np.subtract.outer(x, x))[~np.eye(len(x), dtype=bool)].min() * 254 / (W - 1) > 18  # the gap of 20 in depth
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
    assert made() == whole != made("--seed", "1") and whole.startswith(made("--count", "3")) and len(made("--count", "3").splitlines()) == 3


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
    assert "6 records" in out and "1 photographs without a depth map (the first: a/0.jpg), 1 with too flat a one" in out and "fewer than --count 8" in out
    Image.new("L", (W, H + 1), 100).save(root / "depth" / "b" / "1_depth.png")
    with pytest.raises(UserError, match="1_depth.png: is 160 x 121, the photograph 160 x 120; --on_bad_record"):
        ade20k_depth.main(flags)
    ade20k_depth.main([*flags, "--on_bad_record", "skip"])
    assert "left out: " in capsys.readouterr().out
    (root / "images" / "b" / "3.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match="2 broken photographs, more than 1 % of 8"):
        ade20k_depth.main([*flags, "--on_bad_record", "skip"])


def test_wrong_folders_and_flags_are_named(sources, tmp_path):
    flags, root = sources
    (root / "empty").mkdir()
    for change, words in (({1: "none"}, r"--images"), ({3: "none"}, r"--depth"), ({1: "empty"}, "no photographs in it"), ({3: "empty"}, "8 of 8 photographs have no NAME_depth.png")):
        with pytest.raises(UserError, match=words):
            ade20k_depth.main([str(root / change[i]) if i in change else flag for i, flag in enumerate(flags)])
    with pytest.raises(UserError, match="--gap lies from 1 to 127"):
        ade20k_depth.main([*flags, "--gap", "0"])
