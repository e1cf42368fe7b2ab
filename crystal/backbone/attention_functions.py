"""The attention functions that transformers is given: the decoder's, the vision tower's, and their masks.

B sequences, L length, H query heads, G key/value heads, d head size. This is the first of the doors that
model.py names: transformers' forward calls these functions by the names under which they are registered, and
hands them what travels as keywords of the forward: the latent copy, a recorder, a cache.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from crystal.attention import attend


@torch.compiler.disable  # model.compile_layers compiles what stands around it
def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    latent_copy=None,
    recorder=None,
    kv_cache=None,
    **_,
):
    """The decoder's attention: torch's SDPA, with the corrupted path's copied columns and the slice of eq. 5.

    query [B,H,L,d], key and value [B,G,L,d] -> ([B,L,H,d], None). attention_mask: None (causal), a bool mask,
    or an additive one; scores are never written out. kv_cache: see feedback.py.
    """
    if kv_cache is not None:
        key, value = kv_cache(module.layer_idx, key, value)
    if latent_copy is not None:
        key, value = latent_copy.keys_values(key, value)
    if recorder is not None:
        recorder(module.layer_idx, query, key, scaling)

    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(query.dtype)

    # Without a mask transformers means causal: leaving that out would silently show the future.
    causal = query.shape[2] > 1
    out = attend(query, key, value, attention_mask, scale=scaling, dropout=dropout, causal=causal)
    return out.transpose(1, 2).contiguous(), None


def vision_attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, cu_seq_lens_q=None, **_
):
    """The vision tower's attention: every image (or window) in as few calls as there are lengths.

    query, key, value [1,H,P,d], P patches of all windows one after the other; cu_seq_lens_q [windows+1] their
    bounds. transformers calls window by window unless the name of the function says `flash`; this name does.
    """
    outs = []
    windows = windows_of(cu_seq_lens_q)
    for n, at in windows.groups:
        q, k, v = (x[0] if at is None else x[0][:, at] for x in (query, key, value))
        q, k, v = (x.unflatten(1, (-1, n)).transpose(0, 1) for x in (q, k, v))  # [windows,H,n,d]
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outs.append(out.transpose(1, 2).flatten(0, 1))  # [windows*n,H,d]

    if windows.back is None:
        return outs[0][None], None  # [1,P,H,d]
    return torch.cat(outs)[windows.back][None], None


class Windows(NamedTuple):
    """Windows by their length, for attention that takes those of one length in one call.

    groups: (length n, the patches [windows*n] of the windows of that length, None for all of them).
    back: where each patch stands after the groups are laid end to end, [P]; None for a single group.
    """

    groups: list
    back: torch.Tensor | None


def windows_of(bounds):
    """cu_seq_lens [windows+1] -> Windows.

    Every block of a kind is given the same tensor, which keeps the answer: to read it, the host waits for
    the GPU, once a forward instead of three times in every block.
    """
    if not hasattr(bounds, "windows"):
        starts = bounds.tolist()
        patches = {}
        for start, end in itertools.pairwise(starts):
            patches.setdefault(end - start, []).extend(range(start, end))

        if len(patches) == 1:
            bounds.windows = Windows([(n, None) for n in patches], None)
        else:
            groups = [(n, torch.tensor(at, device=bounds.device)) for n, at in sorted(patches.items())]
            order = torch.cat([at for _, at in groups])
            bounds.windows = Windows(groups, order.argsort())
    return bounds.windows


def attention_mask(*args, **kwargs):
    """transformers' mask, bool or None, in which every row sees a key.

    A row of left padding, which would see no key, sees the first: nothing reads it, and no attention
    makes NaN of it.
    """
    mask = sdpa_mask(*args, **kwargs)
    if mask is None:
        return None
    first = torch.arange(mask.shape[-1], device=mask.device) == 0
    return mask | (first & ~mask.any(-1, keepdim=True))


AttentionInterface.register("crystal", attention)
# A function without a mask of its own would get None always.
AttentionMaskInterface.register("crystal", attention_mask)
AttentionInterface.register("crystal_flash_vision", vision_attention)
# Under a mask the gradient of cuDNN's attention, torch's first choice on an H100, is NaN
# at some lengths (pytorch/pytorch#196678).
torch.backends.cuda.enable_cudnn_sdp(False)
