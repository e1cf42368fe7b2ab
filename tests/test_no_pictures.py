"""A batch without pictures where the vision part trains: gradients of zero, the same values, on any family.

Right values: the model's own forward of the words alone. Two processes, one of which has pictures, are held
to one process in test_ddp.py.
"""

import pytest
import torch

import crystal.backbone.model
from crystal import methods
from crystal.backbone import no_pictures

FAMILIES = [None, "qwen3_vl", "llava_onevision"]


@pytest.fixture
def words(model_dirs, family_dirs):
    """words(family, parts) -> a model in float64 whose parts have adapters, and a batch [2,5] of words."""

    def make(family, parts):
        directory = family_dirs(family, True) if family else model_dirs[True]
        model = crystal.backbone.model.load(str(directory), torch.float64)
        model.add_adapters(methods.parse(["--method", "sft", "--lora_r", "2", "--lora_on", parts]))
        ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
        batch = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": None,
            "image_grid_thw": None, "mm_token_type_ids": torch.zeros_like(ids),
        }
        return model.train(), batch

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_what_trains_in_front_of_the_decoder_has_a_gradient_of_zero(words, family):
    model, batch = words(family, "language,vision,merger")
    ids = batch["input_ids"]
    plain = model.hf.model(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
    hidden = model.hidden(batch)
    assert torch.allclose(hidden, plain, rtol=0, atol=1e-12)
    hidden.square().sum().backward()

    front = [(n, p) for n, p in model.trainable() if "language_model" not in n]
    decoder = [p for n, p in model.trainable() if "language_model" in n]
    assert len({"merger" in n or "projector" in n for n, _ in front}) == 2  # both parts are there
    assert all(p.grad is not None and not p.grad.any() for _, p in front), front
    assert any(p.grad.any() for p in decoder)


def test_nothing_is_looked_at_where_nothing_is_asked(words, monkeypatch):
    """Without a gradient, or with a vision part that does not train, there is no picture to pay for."""
    looked, look = [], no_pictures.look
    monkeypatch.setattr(no_pictures, "look", lambda model: looked.append(1) or look(model))
    model, batch = words(None, "language,vision,merger")
    with torch.no_grad():
        model.hidden(batch)
    frozen, _ = words(None, "language")
    frozen.hidden(batch)
    assert looked == []
    model.hidden(batch)
    assert looked == [1]
    seeing = words(None, "merger")[0]
    seeing.hidden(batch)
    assert looked == [1, 1]
