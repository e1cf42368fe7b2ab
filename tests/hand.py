"""The model made by hand (by_hand.py) in the place of whatever --model names, and what it
says under every condition.
"""

import copy
from types import SimpleNamespace

import by_hand
import pytest
import torch

from crystal import evaluate
from crystal.attention_bias import AttentionBias
from crystal.corrupt import Corruption
from crystal.evaluation import asking
from crystal.methods.sft import Method as SFT
from crystal.runtime import data

BLACK = Corruption("mask=1")  # corruption: every pixel becomes 0

AS_TRAINED = ["black", "white", "dark", "light", "light", "white.", "white", "grey"]
DROPPED = ["nothing", "nothing", "dark", "light", "light", "pale", "nothing", "nothing"]
BLIND = ["nothing"] * 8
CORRUPTED = ["black", "black", "black", "black", "black", "white.", "black", "black"]
# 128 of 255 is nearest to grey's 120.
GREY = ["grey", "grey", "grey", "grey", "grey", "white.", "grey", "grey"]
BOTTLENECK = ["black", "white", "nothing", "nothing", "nothing", "white.", "nothing", "grey"]
RIGHT = [True, True, True, True, True, False, True, True]  # of the first


class Masked(SFT):
    """A method with LIVR's kind of mask: rows that are neither image nor latent do not see the image.
    Its sequences are CrystaL's.
    """

    def biases(self, model, batch):
        latents = torch.isin(batch["input_ids"], torch.tensor(self.latents))
        picture = batch["input_ids"] == self.image
        return [AttentionBias(~latents & ~picture, picture)]


@pytest.fixture(scope="module")
def ingredients(model_dirs):
    return by_hand.ingredients(model_dirs[True])


@pytest.fixture
def hand(ingredients, tmp_path, monkeypatch):
    """The model by hand in the place of whatever --model names, CrystaL's format with three
    latents, the eight records.
    """
    s, file = ingredients, by_hand.write_records(tmp_path)
    hand = SimpleNamespace(
        model=by_hand.model_by_hand(s.real),
        fmt=s.fmt,
        file=file,
        records=data.read(file)[0],
        settings=copy.copy(s.settings),
        opened=[],
        fed=[],
    )
    monkeypatch.setattr(Masked, "latents", s.fmt.latents, raising=False)
    monkeypatch.setattr(Masked, "image", s.fmt.image, raising=False)

    def generate(model, prompts, fmt, n, biases=None, latents="keep"):
        hand.fed.append((len(prompts), n, latents))
        return by_hand.generate(model, prompts, fmt, n, biases)

    def open_model(name, which, device, **how):
        hand.opened.append((name, which, str(device), how))
        return hand.model, hand.fmt, hand.settings

    monkeypatch.setattr(asking, "generate", generate)
    monkeypatch.setattr(evaluate.ops, "announce", lambda write=None: None)  # said once a process
    monkeypatch.setattr(evaluate, "open_model", open_model)
    monkeypatch.chdir(tmp_path)
    return hand


def said(results):
    return [r["prediction"] for r in results]


def counted_mass(hand):
    """Attention of the rows from <answer> to the one before the end: see by_hand.weigh."""
    total = 0.0
    for record in hand.records:
        grid = data.RecordDataset([record], None, hand.model.image_processor).pixels(
            [data.load_image(record.images[0], "")]
        )["image_grid_thw"]
        ids, image, _ = hand.fmt.question(record.turns, hand.model.image_processor.tokens(grid))
        R, K, N = len(hand.fmt.text(record.answer)), 3, len(image)
        rows = range(len(ids) - 1, len(ids) + R + 1)  # <answer>, R's tokens, </answer>
        plain = sum(K / (t + 1) for t in rows) / len(rows)
        heavy = sum(2 * K / (t + 1 + K + 2 * N) for t in rows) / len(rows)
        total += (plain + (plain + heavy) / 2) / 2
    return total / len(hand.records)
