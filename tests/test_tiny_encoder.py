"""The script behind VaLR's default encoder: it teaches what the scenes show, and writes what opens.

Right values: patches and boxes by hand; the shipped log.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from crystal.backbone import encoders
from crystal.runtime import toy
from data_prep.tiny import encoder

LOG = Path(encoder.__file__).with_suffix(".log")


def scene(*things):
    return toy.Scene(tuple(things), "star", 0.0, 1)


def test_a_patch_is_told_what_covers_an_eighth_of_it():
    """A star of 12 px around (20, 34): its box is [14, 28, 26, 40], all in the patch of row 2, column 1.

    A ring of 8 px around (42, 70) lies on two columns, [38, 66, 46, 74], and two rows: in the patch of row 4,
    column 2 are 4 x 4 = 16 of its pixels, in that of column 3 also 4 x 4; an eighth of 196 is 24.5.
    """
    star = toy.Thing("star", "blue", 20, 34, 2, 12)
    ring = toy.Thing("ring", "red", 42, 70, 1, 8)
    found = encoder.lesson(scene(ring, star)).reshape(8, 8, 3)
    assert found[2, 1].tolist() == [toy.SHAPES.index("star"), list(toy.COLOURS).index("blue"), 2]
    empty = [[8, -100, -100]]
    others = np.delete(found.reshape(64, 3), 2 * 8 + 1, axis=0)
    assert others.tolist() == empty * 63


def test_the_nearer_of_two_wins():
    """Things are far to near: the last one that covers a patch is what it shows."""
    far = toy.Thing("heart", "green", 21, 21, 0, 12)
    near = toy.Thing("cross", "white", 22, 22, 3, 12)
    assert encoder.lesson(scene(far, near))[9].tolist()[0] == toy.SHAPES.index("cross")
    assert encoder.lesson(scene(near, far))[9].tolist()[0] == toy.SHAPES.index("heart")


def test_half_of_the_scenes_are_hard_and_all_are_the_streams_own():
    pixels, lessons = encoder.Scenes("lessons", 0, 4)[7]
    again, _ = encoder.Scenes("lessons", 0, 4)[7]
    other, _ = encoder.Scenes("held out", 0, 4)[7]
    assert pixels.shape == (4, 3, 112, 112) and lessons.shape == (4, 64, 3)
    assert torch.equal(pixels, again) and not torch.equal(pixels, other)
    easy = toy.draw_for("base", toy.rng_for("encoder", "lessons", 0, 7, 0))
    hard = toy.draw_for("demo", toy.rng_for("encoder", "lessons", 0, 7, 1))
    rules = encoder.RULES
    for seen, drawn in zip(pixels, (easy, hard)):
        plain = seen * torch.tensor(rules["image_std"])[:, None, None]
        plain = (plain + torch.tensor(rules["image_mean"])[:, None, None]) * 255
        assert np.abs(plain.permute(1, 2, 0).numpy() - toy.render(drawn)).max() < 0.01


def test_the_loss_is_a_mean_over_patches_of_each_part():
    heads = torch.nn.Linear(1, 21, bias=False)
    lessons = torch.full((1, 2, 3), -100)
    lessons[0, 0] = torch.tensor([3, 1, 2])
    lessons[0, 1, 0] = 8  # an empty patch has no colour and no size
    torch.nn.init.zeros_(heads.weight)
    expected = np.log(9) + np.log(8) + np.log(4)
    assert float(encoder.losses(heads, torch.ones(1, 2, 1), lessons)) == pytest.approx(expected)


@pytest.mark.parametrize("probe", [False, True])
def test_it_trains_and_writes_what_opens(tmp_path, capsys, probe):
    """The heads alone with --probe, which writes nothing."""
    flags = ["--out", str(tmp_path / "e"), "--steps", "2", "--images", "2", "--seed", "3"]
    encoder.main([*flags, *(["--probe"] if probe else [])])
    said = capsys.readouterr().out
    assert "step 2 " in said
    if probe:
        assert not (tmp_path / "e").exists()
        return
    ours = encoders.load(str(tmp_path / "e"))
    torch.manual_seed(3)
    begun = encoder.DINOv3ViTModel(encoder.DINOv3ViTConfig(**encoder.SIZES)).state_dict()
    learned = ours.hf.state_dict()
    assert any((learned[n] - begun[n]).abs().max() > 1e-4 for n in begun if begun[n].numel())
    assert ours.rules["size"] == {"height": 112, "width": 112} and "as written:" in said


def test_each_flag_does_what_it_says(tmp_path):
    """After one update: the two learning rates move what is theirs, Muon the matrices; seed and number of
    scenes move all.
    """

    def learned(*flags):
        encoder.main(["--out", str(tmp_path / "e"), "--steps", "1", "--images", "2", *flags])
        return encoders.load(str(tmp_path / "e")).hf.state_dict()

    def moved(*flags):
        now = learned(*flags)
        differ = {n for n in usual if usual[n].numel() and not torch.equal(usual[n], now[n])}
        return {usual[n].ndim == 2 for n in differ}

    usual = learned()
    assert moved() == set()
    assert moved("--lr", "0.3") == {False} and moved("--muon_lr", "2.0") == {True}
    assert moved("--seed", "4") == moved("--images", "6") == {True, False}


def test_the_log_is_of_what_is_shipped():
    """What it says of the weights as they were written stands in their README, and is far above chance.

    A patch shows one of eight shapes, in one of eight colours. The heads that read them are not kept.
    """
    (written,) = [line for line in LOG.read_text().splitlines() if line.startswith("as written:")]
    rights = re.findall(r"\d+\.\d", written)
    assert len(rights) == 3 and all(float(right) > 50 for right in rights)
    told = (Path(encoders.__file__).parents[1] / "assets" / "encoder" / "README.md").read_text()
    assert all(f"{right} %" in told for right in rights)
