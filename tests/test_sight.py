"""What training tells before it begins: tokens of its pictures, and how far both paths' pixels are apart.

Right values from arithmetic on a picture of two halves and the processor's means and spreads.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import crystal.backbone.model
from crystal import methods, train
from crystal.runtime import data, sight

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)


def halves(width, height, left=40, right=200):
    """A picture whose left half is dark and whose right half is light."""
    pixels = np.full((height, width, 3), left, dtype=np.uint8)
    pixels[:, width // 2 :] = right
    return Image.fromarray(pixels)


def records(*pictures):
    return [
        data.Record(f"x:{i}", str(i), [("user", "<image>\nq?")], "a", list(images))
        for i, images in enumerate(pictures)
    ]


@pytest.fixture(scope="module")
def processor():
    return crystal.backbone.model.load("tiny").image_processor


def examples(processor, pictures, corruption=None, **how):
    """A set whose method must not be asked for a layout, nor for what it computes of a record."""

    def fail(*_):
        raise AssertionError("asked for more than pictures")

    return data.RecordDataset(records(*pictures), fail, processor, corruption, extras=fail, **how)


def test_tokens_and_contrast_by_hand(processor):
    """112 x 56 pixels are 4 x 2 tokens of 28; two pictures of a record count one by one."""
    shades = dict(left=10, right=90)
    pictures = [[halves(112, 56, **shades)], [halves(56, 56, **shades), halves(112, 112, **shades)]]
    seen = sight.look(examples(processor, pictures))
    assert seen.tokens == [8, 4, 16] and seen.moved is None

    # Half of the numbers are (10 / 255 - mean) / std of their channel, half (90 / 255 - mean) / std.
    values = torch.cat([(x / 255 - MEAN) / STD for x in (10, 90)])
    assert seen.contrast == pytest.approx(float((values - values.mean()).abs().mean()), rel=1e-3)


def test_what_a_corruption_moves_by_hand(processor):
    """It makes the left half 51 levels lighter, of a third of the channels: a fifth of their range."""

    def lighter(x, generator):
        x = x.clone()
        x[1, :, : x.shape[2] // 2] += 51 / 255
        return x

    seen = sight.look(examples(processor, [[halves(112, 56)]], lighter))
    assert seen.moved == pytest.approx(0.2 / float(STD[1]) / 3 / 2, rel=1e-3)
    assert seen.share == pytest.approx(seen.moved / seen.contrast)


def test_lines_and_warnings(processor):
    few = [[halves(56, 56)]] * 3

    def nothing(x, generator):
        return x

    lines = sight.told(examples(processor, few, nothing))
    assert lines[0] == "pictures become 4 tokens each (4 to 4)"
    assert lines[1].startswith("warning: 4 tokens a picture are few") and "--min_pixels" in lines[1]
    assert lines[2].startswith("both paths' pixels differ by 0.000 as the model sees them, 0.0 % of")
    assert lines[3].startswith("warning: the corrupted path sees next to the same picture")

    # Enough tokens and a corruption that takes something away: no warning.
    enough = sight.told(
        examples(processor, [[halves(112, 112)], [halves(112, 84)]], lambda x, generator: 1 - x)
    )
    assert enough[0] == "pictures become 12 tokens each (12 to 16)" and len(enough) == 2
    grey = sight.told(examples(processor, few[:1], nothing, grey=True))
    assert grey[2:] == ["blind: every picture is replaced by a grey one"]

    # A photograph's fine grain is gone when it has been scaled to what the model sees.
    rng = np.random.default_rng(0)
    grain = Image.fromarray(rng.integers(0, 256, (896, 896, 3), dtype=np.uint8))
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((896, 896), 0)
    photograph = Image.blend(grain, coarse, 0.7)
    blur = methods.parse(["--corruption", "blur=2"])
    corruption = methods.get("crystal")(blur).corruption
    small = crystal.backbone.model.load("tiny", max_pixels=12544).image_processor
    lines = sight.told(examples(small, [[photograph]], corruption))
    assert "(blur=2)" in lines[1] and lines[2].startswith("warning: the corrupted path sees next to the same")


def test_records_without_a_picture_and_broken_ones_are_passed_over(processor):
    asked = examples(processor, [[], [halves(56, 56)], []])
    asked.records[2] = data.RecordError("x:2: broken")
    assert sight.look(asked).tokens == [4]
    asked.records[1] = asked.records[0]
    assert sight.look(asked) is None and sight.told(asked) == []


def test_a_large_set_is_looked_at_here_and_there(processor):
    """Eight of forty: every fifth, the first of them among them."""
    opened = []

    def corruption(x, generator):
        opened.append(x.shape[2])
        return x

    sight.look(examples(processor, [[halves(56 + i, 56)] for i in range(40)], corruption))
    assert opened == [56 + i for i in range(0, 40, 5)]


def test_training_tells(model_dirs, records_file, tmp_path, capsys):
    train.main(
        [
            "--model", str(model_dirs[True]), "--data", str(records_file), "--output", str(tmp_path / "run"),
            "--max_steps", "1", "--eval_every", "0", "--corruption", "noise=80",
        ]
    )
    said = capsys.readouterr().out
    # 112 x 84, 56 x 56, 84 x 112 and 56 x 84 pixels: 12, 4, 12 and 6 tokens.
    assert "pictures become 6 tokens each (4 to 12)\nwarning: 6 tokens a picture are few" in said
    assert "of a picture's contrast (noise=80)\n" in said

