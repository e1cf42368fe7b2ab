"""Reads chosen queries on chosen keys of any transformers model's attention, with gradient, never L x L.

B sequences, L sequence length, H query heads, G key/value heads, d head size, M queries, K keys.

    with record_attention(model, layers=[20, 27], queries=[[31, 32]], keys=[[5, 6, 7]]) as recorder:
        model(**inputs)
    recorder.slices[27]          # [B,H,M,K], what softmax attention gives to those keys, in the graph

The model computes what it computed before: for the time of the `with` its decoder runs PyTorch's fused
attention, and the slice is computed beside it from the queries and keys that attention was given. Two kinds
of attention are refused, because their weights are not the softmax of scaled dot products: those with a soft
cap, and those with sinks.
"""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from crystal.attention import AttentionRecorder, additive, attn_slice, row_bias

NAME = "crystal_recorded"
_under_way = []  # recorders of the `with` blocks that are open, the innermost last


def recorded_attention(module, query, key, value, attention_mask, scaling=None, **more):
    """transformers' SDPA attention, which tells open recorders its queries [B,H,L,d] and keys [B,G,L,d]."""
    # A vision tower's attention has no place among the decoder's layers.
    layer = getattr(module, "layer_idx", None)
    for recorder in _under_way:
        if layer in recorder.layers:
            tell(recorder, layer, query, key, attention_mask, scaling, more)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)


def tell(recorder, layer, query, key, mask, scaling, more):
    """Gives one layer's queries and keys to a recorder, under the mask that attention has.

    ValueError for what no slice describes.
    """
    strange = [name for name in ("softcap", "s_aux") if more.get(name) is not None]
    if strange:
        raise ValueError(
            f"record_attention: layer {layer} has {strange[0]}, "
            "so its weights are not the softmax of its scores"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"record_attention: {query.shape[2]} queries for {key.shape[2]} keys; a forward with a cache "
            "is not recorded"
        )
    if mask is not None:
        recorder.bias = row_bias(additive(mask, query.dtype), recorder.rows)
    recorder(layer, query, key, scaling)


AttentionInterface.register(NAME, recorded_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def record_attention(model, layers, queries, keys, read=attn_slice):
    """While it lasts, one forward of `model` fills the yielded recorder's slices, {layer: [B,H,M,K]}.

    model    a transformers model with a causal decoder (or crystal's Model), in training or evaluation
    layers   the decoder layers to read, counted from 0
    queries  [B,M] positions in the sequence, -1 for none; keys [B,K], as well. Lists or tensors
    read     attn_slice, or another function that attention.AttentionRecorder takes

    Left and right padding, windows and blocks are those of the attention's own mask. ValueError for
    layers that the model has not, positions that are no table, attention that is no plain softmax, and a
    forward over a cache.
    """
    hf = getattr(model, "hf", model)
    config = hf.config.get_text_config()
    layers = set(layers)
    missing = sorted(layers - set(range(config.num_hidden_layers)))
    if missing:
        raise ValueError(
            f"record_attention: layer {missing[0]} of a model with {config.num_hidden_layers} layers"
        )

    device = next(hf.parameters()).device
    queries, keys = (torch.as_tensor(x, device=device) for x in (queries, keys))
    if queries.ndim != 2 or keys.ndim != 2 or len(queries) != len(keys):
        raise ValueError(
            f"record_attention: queries [B,M] and keys [B,K] are needed, not {list(queries.shape)} and "
            f"{list(keys.shape)}"
        )

    recorder = AttentionRecorder(layers, queries, keys, read)
    before = config._attn_implementation
    config._attn_implementation = NAME
    _under_way.append(recorder)
    try:
        yield recorder
    finally:
        _under_way.remove(recorder)
        config._attn_implementation = before
