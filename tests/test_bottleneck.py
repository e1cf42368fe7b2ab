"""Masks: causality, padding, blocked and dimmed cells; a blocked cell has exactly no influence in a whole model."""
import math

import pytest
import torch

from crystal.bottleneck import Bias, additive_mask


def spans(L, *positions):
    mask = torch.zeros(1, L, dtype=torch.bool)
    mask[0, list(positions)] = True
    return mask


def test_mask_is_causal_padded_and_biased():
    attention_mask = torch.tensor([[1, 1, 1, 1, 0]])
    mask = additive_mask([Bias(spans(5, 2, 3), spans(5, 0)), Bias(spans(5, 3), spans(5, 1), math.log(0.5))], attention_mask)[0, 0]
    inf = float("inf")
    half = math.log(0.5)
    assert torch.allclose(mask, torch.tensor([[0, -inf, -inf, -inf, -inf], [0, 0, -inf, -inf, -inf], [-inf, 0, 0, -inf, -inf],
                                              [-inf, half, 0, 0, -inf], [0, 0, 0, 0, -inf]]))


def test_a_row_that_would_see_nothing_sees_itself():
    mask = additive_mask([Bias(spans(3, 0, 1, 2), spans(3, 0, 1, 2))], torch.ones(1, 3))[0, 0]
    assert torch.equal(mask.isfinite(), torch.eye(3, dtype=torch.bool))
    assert torch.softmax(mask, -1).isfinite().all()


def test_biases_meet_by_adding_up():
    two = [Bias(spans(2, 1), spans(2, 0), math.log(0.5))] * 2
    assert additive_mask(two, torch.ones(1, 2))[0, 0, 1, 0].item() == pytest.approx(math.log(0.25))


def test_blocked_image_has_exactly_no_influence(setup):
    """Rows after the image that may not look at it: another image leaves them as they are, to the bit; without the mask it does not."""
    s = setup(which=[0])
    image = torch.zeros_like(s.batch["input_ids"], dtype=torch.bool)
    image[0, s.batch["image"][0]] = True
    after = torch.zeros_like(image)
    after[0, int(s.batch["image"][0].max()) + 1 :] = True
    blocked = [Bias(after, image)]
    other = dict(s.batch, pixel_values=s.batch["pixel_values"].flip(0))
    a, b = (s.model.hidden(x, biases=blocked)[after] for x in (s.batch, other))
    assert torch.equal(a, b)
    a, b = (s.model.hidden(x)[after] for x in (s.batch, other))
    assert not torch.equal(a, b)


def test_no_bias_equals_the_plain_model(setup):
    s = setup()
    zero = torch.zeros_like(s.batch["input_ids"], dtype=torch.bool)
    real = s.batch["attention_mask"].bool()
    plain, masked = s.model.hidden(s.batch), s.model.hidden(s.batch, biases=[Bias(zero, zero)])
    assert (plain[real] - masked[real]).abs().max() < 1e-9
