"""Masks: causality, padding, blocked and dimmed cells; a blocked cell has exactly no influence
in a whole model.
"""

import math

import pytest
import torch
from conftest import gradients

from crystal.attention import row_bias
from crystal.attention_bias import AttentionBias, additive_mask, row_biases


def spans(L, *positions):
    mask = torch.zeros(1, L, dtype=torch.bool)
    mask[0, list(positions)] = True
    return mask


def test_mask_is_causal_padded_and_biased():
    attention_mask = torch.tensor([[1, 1, 1, 1, 0]])
    mask = additive_mask(
        [AttentionBias(spans(5, 2, 3), spans(5, 0)), AttentionBias(spans(5, 3), spans(5, 1), math.log(0.5))],
        attention_mask,
    )[0, 0]
    inf = float("inf")
    half = math.log(0.5)
    assert torch.allclose(
        mask,
        torch.tensor(
            [
                [0, -inf, -inf, -inf, -inf], [0, 0, -inf, -inf, -inf], [-inf, 0, 0, -inf, -inf],
                [-inf, half, 0, 0, -inf], [0, 0, 0, 0, -inf],
            ]
        ),
    )


def test_a_row_that_would_see_nothing_sees_itself():
    mask = additive_mask([AttentionBias(spans(3, 0, 1, 2), spans(3, 0, 1, 2))], torch.ones(1, 3))[0, 0]
    assert torch.equal(mask.isfinite(), torch.eye(3, dtype=torch.bool))
    assert torch.softmax(mask, -1).isfinite().all()


def test_biases_meet_by_adding_up():
    two = [AttentionBias(spans(2, 1), spans(2, 0), math.log(0.5))] * 2
    assert additive_mask(two, torch.ones(1, 2))[0, 0, 1, 0].item() == pytest.approx(math.log(0.25))


def test_biases_of_chosen_rows_are_the_masks():
    """But for causality, which a recorder brings itself."""
    biases, rows = (
        [
            AttentionBias(spans(5, 2, 3), spans(5, 0)),
            AttentionBias(spans(5, 3, 4), spans(5, 1), math.log(0.5)),
        ],
        torch.tensor([[3, 2, 4, -1]]),
    )
    causal = row_bias(additive_mask([], torch.ones(1, 5)), rows)
    assert torch.equal(
        row_biases(biases, rows)[:, :, :3] + causal[:, :, :3],
        row_bias(additive_mask(biases, torch.ones(1, 5)), rows)[:, :, :3],
    )
    assert row_biases(biases, rows, torch.float64).dtype == torch.float64 and row_biases([], rows) is None


def test_blocked_image_has_exactly_no_influence(setup):
    """Rows after the image that may not look at it: another image leaves them as they are, to the bit;
    without the mask it does not.
    """
    s = setup(which=[0])
    image = torch.zeros_like(s.batch["input_ids"], dtype=torch.bool)
    image[0, s.batch["image"][0]] = True
    after = torch.zeros_like(image)
    after[0, int(s.batch["image"][0].max()) + 1 :] = True
    blocked = [AttentionBias(after, image)]
    other = dict(s.batch, pixel_values=s.batch["pixel_values"].flip(0))
    a, b = (s.model.hidden(x, biases=blocked)[after] for x in (s.batch, other))
    assert torch.equal(a, b)
    a, b = (s.model.hidden(x)[after] for x in (s.batch, other))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dimmed_image_by_hand(setup, checkpointing):
    """ln gamma from answer positions to the image, in a padded batch with two images and grouped heads:
    logits and gradients equal a plain softmax of our own.
    """
    s = setup(*["--checkpointing"] * checkpointing)
    queries, image = (
        torch.zeros_like(s.batch["input_ids"], dtype=torch.bool),
        s.batch["mm_token_type_ids"].bool(),
    )
    for b, (start, end) in enumerate(s.batch["answer"]):
        queries[b, start:end] = True
    real = s.batch["attention_mask"].bool()
    bias = AttentionBias(queries, image, math.log(0.3))
    cells = (queries[:, :, None] & image[:, None, :])[:, None]  # [B,1,L,L]

    def by_hand(module, query, key, value, attention_mask, scaling=None, **_):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling).exp() * torch.where(cells, 0.3, 1.0)
        weights = weights * torch.ones(weights.shape[-2:]).tril()
        return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2), None

    def step(biases):
        h = s.model.hidden(s.batch, biases=biases)[real]
        loss = s.model.logits(h).log_softmax(-1).square().mean()
        return h, gradients(loss, s.named)

    h, grads = step([bias])
    assert not torch.allclose(h, step([])[0])
    from transformers import AttentionInterface

    from crystal.backbone.attention_functions import attention

    AttentionInterface.register("crystal", by_hand)
    try:
        expected, theirs = step([])
    finally:
        AttentionInterface.register("crystal", attention)
    assert torch.allclose(h, expected, rtol=0, atol=1e-6) and grads.keys() == theirs.keys()
    assert all(torch.allclose(g, theirs[n], rtol=0, atol=1e-6) for n, g in grads.items()) and any(
        g.abs().max() > 1e-3 for g in grads.values()
    )


def test_one_tensor_serves_all_heads_and_layers(setup):
    s, seen = setup(), []
    for layer in s.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    zero = torch.zeros_like(s.batch["input_ids"], dtype=torch.bool)
    s.model.hidden(s.batch, biases=[AttentionBias(zero, zero)])
    B, L = zero.shape
    assert len(seen) == 3 and all(
        m.shape == (B, 1, L, L) and m.data_ptr() == seen[0].data_ptr() for m in seen
    )


def test_a_mask_holds_in_a_cached_forward(setup):
    """Model.seeing: a left-padded prompt and three rows after it, one and two at a time, equal one
    forward without a cache.
    """
    s = setup(which=[0])
    ids, pad = s.batch["input_ids"], 2
    L = ids.shape[1]
    images = {n: s.batch[n] for n in ("pixel_values", "image_grid_thw")}
    more = torch.tensor([[5, 6, 7]])
    whole = torch.cat([ids, more], 1)
    image = whole == s.fmt.image
    late = torch.arange(L + 3)[None] >= L - 4
    batch = {
        "input_ids": whole,
        "attention_mask": torch.ones_like(whole),
        "mm_token_type_ids": image.long(),
        **images,
    }
    expected = s.model.hidden(batch, biases=[AttentionBias(late, image)])[0, L - 1 :]
    left = lambda x, fill: torch.cat([torch.full((1, pad), fill, dtype=x.dtype), x], 1)
    mask = additive_mask(
        [AttentionBias(left(late, False)[:, : L + pad], left(image, False)[:, : L + pad])],
        left(torch.ones_like(ids), 0),
    )
    positions = torch.cat([torch.zeros(3, 1, pad, dtype=torch.long), s.model.positions(batch)], 2)

    def forward(a, b, cache=None, **more):
        out = s.model.hf.model(
            input_ids=left(whole, 0)[:, a:b],
            position_ids=positions[:, :, a:b],
            attention_mask=left(torch.ones_like(whole), 0)[:, :b],
            past_key_values=cache,
            use_cache=True,
            **more,
        )
        return out.last_hidden_state[0], out.past_key_values

    with s.model.seeing(mask):
        at = L + pad
        first, cache = forward(0, at, **images)
        second, cache = forward(at, at + 1, cache)
        third, _ = forward(at + 1, at + 3, cache)
    got = torch.cat([first[-1:], second, third])
    assert torch.allclose(got, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(s.model.hidden(batch)[0, L - 1 :], expected, atol=1e-3)
    assert not s.model.hf.model.language_model._forward_pre_hooks  # nothing stays behind


def test_no_bias_equals_the_plain_model(setup):
    s = setup()
    zero = torch.zeros_like(s.batch["input_ids"], dtype=torch.bool)
    real = s.batch["attention_mask"].bool()
    plain, masked = s.model.hidden(s.batch), s.model.hidden(s.batch, biases=[AttentionBias(zero, zero)])
    assert (plain[real] - masked[real]).abs().max() < 1e-9
