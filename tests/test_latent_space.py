"""Where latents lie: states as transformers gives them, components as numpy finds them, variance by hand."""

import numpy as np
import pytest
import torch

from crystal.evaluation import latent_space
from crystal.evaluation.latent_space import between_questions, drawn, evenly, plane, states_of


@pytest.mark.parametrize(
    "n, most, expected",
    [(3, 5, [0, 1, 2]), (10, 3, [0, 4, 9]), (10, 2, [0, 9]), (10, 1, [9]), (0, 4, [])],
)
def test_evenly(n, most, expected):
    assert evenly(n, most) == expected


def test_components_are_those_of_the_covariance():
    """Of rows scaled to a root mean square of 1, whatever their length; numpy's eigenvectors say where."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=g) * torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 1.0])
    lengths = torch.rand(40, 1, generator=g) * 100 + 1
    flat, kept = plane(x * lengths)

    scaled = (x / x.square().mean(1, keepdim=True).sqrt()).numpy().astype(float)
    values, vectors = np.linalg.eigh(np.cov(scaled.T))
    for i in range(2):
        expected = (scaled - scaled.mean(0)) @ vectors[:, -1 - i]
        expected *= np.sign(expected[np.abs(expected).argmax()])
        assert np.allclose(flat[:, i].numpy(), expected, atol=1e-4)
        assert kept[i] == pytest.approx(values[-1 - i] / values.sum(), abs=1e-5)


def test_variance_between_questions_by_hand():
    """0, 4 and 2, 6: around 3 it is 9 + 1 + 1 + 9, around each latent's own mean (1 and 5) it is 4."""
    one, two = torch.tensor([[0.0], [4.0]]), torch.tensor([[2.0], [6.0]])
    assert between_questions([one, two]) == pytest.approx(4 / 20)
    assert between_questions([one, one]) == 0.0
    assert between_questions([one]) is None
    assert between_questions([one, two[:1]]) is None
    assert between_questions([one[:0], two[:0]]) is None


@pytest.mark.parametrize("flags", [(), ("--method", "sft")])
def test_states_are_the_models_own(setup, flags, monkeypatch):
    """Before the first and the second layer, and after the final norm; three tokens of image and text."""
    monkeypatch.setattr(latent_space, "POINTS", 3)
    s = setup(*flags, which=[0])
    s.model.eval()
    found = states_of(s.model, s.method, s.batch)
    with torch.no_grad():
        out = s.model.hf.model(
            input_ids=s.batch["input_ids"],
            attention_mask=s.batch["attention_mask"],
            position_ids=s.model.positions(s.batch),
            image_grid_thw=s.batch["image_grid_thw"],
            pixel_values=s.batch["pixel_values"],
            output_hidden_states=True,
            use_cache=False,
        )
    assert list(found) == [0, 1, 3]
    image = s.batch["image"][0]
    for depth, kinds in found.items():
        h = out.hidden_states[depth][0].float()
        assert torch.equal(kinds["image"], h[image[[0, round((len(image) - 1) / 2), -1]]])
        assert torch.equal(kinds["latents"], h[s.batch["latents"][0]])
        assert len(kinds["text"]) == 3 and torch.equal(kinds["text"][-1], h[-1])


def test_fed_back_latents_are_those_of_the_whole_sequence(setup):
    """VaLR's recurrence runs shorter pieces first, one of which has a single position."""
    s = setup("--method", "valr", "--encoders", "none", which=[0])
    s.model.eval()
    found = states_of(s.model, s.method, s.batch)
    with torch.no_grad():
        h = s.method.hidden(s.model, s.batch)[0].float()
    latents = s.batch["latents"][0]
    assert torch.equal(found[3]["latents"], h[latents])
    assert found[0]["latents"].shape == found[3]["latents"].shape
    # What is fed to a latent is the state before it.
    assert torch.allclose(found[0]["latents"], h[latents - 1], atol=1e-5)


def test_kinds_stay_apart():
    g = torch.Generator().manual_seed(0)
    one = {
        0: {
            "image": torch.randn(4, 3, generator=g),
            "text": torch.randn(2, 3, generator=g),
            "latents": torch.zeros(0, 3),
        }
    }
    two = {
        0: {
            "image": torch.randn(4, 3, generator=g),
            "text": torch.randn(1, 3, generator=g),
            "latents": torch.zeros(0, 3),
        }
    }
    (found,) = drawn([one, two])
    assert {kind: len(points) for kind, points in found.points.items()} == {"image": 8, "text": 3}
    assert found.depth == 0 and found.between is None
    every, kept = plane(torch.cat([one[0]["image"], two[0]["image"], one[0]["text"], two[0]["text"]]))
    assert torch.equal(torch.cat(list(found.points.values())), every) and found.kept == kept
    assert drawn([]) == []
