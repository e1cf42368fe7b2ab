"""The registered attention functions by value: causal, scaled, grouped, and the doors in their order."""

import sys
from types import SimpleNamespace

import pytest
import torch

from crystal.backbone import attention_functions


def test_no_row_is_blind_under_the_mask_of_a_padded_batch():
    """Rows of left padding see something: what attention makes of a row that sees nothing differs among
    its kernels, NaN included.
    """
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    mask = attention_functions.attention_mask(
        batch_size=2, q_length=5, kv_length=5, q_offset=0, kv_offset=0, attention_mask=padded,
        allow_is_causal_skip=False,
    )
    assert (
        mask[0, 0, 2:].tolist() == (torch.ones(5, 5, dtype=torch.bool).tril() & padded[0])[2:].tolist()
        and mask.any(-1).all()
    )
    assert torch.equal(mask[1, 0], torch.ones(5, 5, dtype=torch.bool).tril())


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_attention(q, k, v, scale, sees):
    """Attention of one head, q [n,d], k and v [m,d], row by row over the columns that
    `sees(row, column)` -> [n,d].
    """
    out = []
    for t in range(len(q)):
        columns = [column for column in range(len(k)) if sees(t, column)]
        weights = (scale * k[columns] @ q[t]).softmax(-1)
        out.append(weights @ v[columns])
    return torch.stack(out)


def test_the_decoders_attention_is_causal_scaled_and_grouped():
    """Four query heads share two key heads; the scale is another than 1 / sqrt(d).

    A lone query sees all keys.
    """
    layer = SimpleNamespace(layer_idx=1)
    q, k, v = drawn(2, 4, 5, 6), drawn(2, 2, 5, 6, seed=1), drawn(2, 2, 5, 6, seed=2)
    out, weights = attention_functions.attention(layer, q, k, v, None, scaling=0.7)
    assert weights is None and out.shape == (2, 5, 4, 6) and out.is_contiguous()
    for b in range(2):
        for head in range(4):
            expected = softmax_attention(
                q[b, head], k[b, head // 2], v[b, head // 2], 0.7, lambda t, c: c <= t
            )
            assert torch.allclose(out[b, :, head], expected, atol=1e-12)
    out, _ = attention_functions.attention(layer, q[:, :, :1], k, v, None, scaling=0.7)
    expected = softmax_attention(q[1, 3, :1], k[1, 1], v[1, 1], 0.7, lambda t, c: True)
    assert torch.allclose(out[1, :, 3], expected, atol=1e-12)


def test_the_decoders_attention_takes_both_kinds_of_masks():
    """A bool one says who sees whom; an additive one is added to the scores, in the queries' own dtype."""
    layer = SimpleNamespace(layer_idx=0)
    q, k, v = drawn(1, 2, 4, 6), drawn(1, 2, 4, 6, seed=1), drawn(1, 2, 4, 6, seed=2)
    sees = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    out, _ = attention_functions.attention(layer, q, k, v, sees[None, None], scaling=0.5)
    expected = softmax_attention(q[0, 1], k[0, 1], v[0, 1], 0.5, lambda t, c: bool(sees[t, c]))
    assert torch.allclose(out[0, :, 1], expected, atol=1e-12)

    added = torch.zeros(1, 1, 4, 4).masked_fill(~sees, float("-inf"))
    added[0, 0, 3, 0] = -2.5
    out, _ = attention_functions.attention(layer, q, k, v, added, scaling=0.5)
    weights = (0.5 * q[0, 1] @ k[0, 1].T + added[0, 0].double()).softmax(-1)
    assert torch.allclose(out[0, :, 1], weights @ v[0, 1], atol=1e-12)
    small = [x.bfloat16() for x in (q, k, v)]
    assert attention_functions.attention(layer, *small, added, scaling=0.5)[0].dtype == torch.bfloat16


def test_the_doors_of_attention_open_in_their_order():
    """The cache lengthens the keys, the copy replaces some of them, and the recorder sees those that
    attention
    then uses.
    """
    q, k, v, past = (
        drawn(2, 4, 3, 6), drawn(2, 2, 3, 6, seed=1), drawn(2, 2, 3, 6, seed=2), drawn(2, 2, 2, 6, seed=3),
    )
    asked = []

    def cache(layer, key, value):
        asked.append(("cache", layer, key is k and value is v))
        return torch.cat([past, key], 2), torch.cat([2 * past, value], 2)

    class Copy:
        def keys_values(self, key, value):
            asked.append(("copy", key.shape[2]))
            return key + 1, value - 1

    def recorder(layer, query, key, scale):
        asked.append(("recorder", layer, query is q, torch.equal(key, torch.cat([past, k], 2) + 1), scale))

    mask = torch.zeros(2, 1, 3, 5, dtype=torch.float64)
    doors = {"kv_cache": cache, "latent_copy": Copy(), "recorder": recorder}
    out, _ = attention_functions.attention(
        SimpleNamespace(layer_idx=7), q, k, v, mask, scaling=0.3, unknown=1, **doors
    )
    assert asked == [("cache", 7, True), ("copy", 5), ("recorder", 7, True, True, 0.3)]
    keys, values = torch.cat([past, k], 2) + 1, torch.cat([2 * past, v], 2) - 1
    expected = softmax_attention(q[1, 2], keys[1, 1], values[1, 1], 0.3, lambda t, c: True)
    assert torch.allclose(out[1, :, 2], expected, atol=1e-12)


@pytest.mark.parametrize("lengths", [[4, 9, 4, 1, 9], [6, 6, 6], [5]])
def test_the_vision_towers_attention_stays_inside_its_windows(lengths):
    """Windows of several lengths, in any order.

    Each patch sees its own window, and comes out where it went in.
    """
    total, ends = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q, k, v = drawn(1, 3, total, 4), drawn(1, 3, total, 4, seed=1), drawn(1, 3, total, 4, seed=2)
    bounds = torch.tensor(ends, dtype=torch.int32)
    out, weights = attention_functions.vision_attention(
        None, q, k, v, scaling=0.6, cu_seq_lens_q=bounds, is_causal=False
    )
    assert weights is None and out.shape == (1, total, 3, 4)
    for start, stop in zip(ends, ends[1:]):
        for head in range(3):
            inside = [x[0, head, start:stop] for x in (q, k, v)]
            expected = softmax_attention(*inside, 0.6, lambda t, c: True)
            assert torch.allclose(out[0, start:stop, head], expected, atol=1e-12)


def test_windows_are_planned_once_a_forward(setup, monkeypatch):
    """Reading the bounds makes the host wait for a GPU: once for each kind of block, of however many."""
    s = setup("--method", "sft", "--model", "tiny", dtype=torch.float32)
    blocks = s.model.hf.model.visual.blocks
    kinds = {i in s.model.hf.config.vision_config.fullatt_block_indexes for i in range(len(blocks))}
    read, original = [], torch.Tensor.tolist

    def counted(tensor):
        caller = sys._getframe(1).f_code.co_name
        read.append(caller) if caller == "windows_of" else None
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    s.model.hidden(s.batch)
    assert len(blocks) > len(kinds) and read == ["windows_of"] * len(kinds)
