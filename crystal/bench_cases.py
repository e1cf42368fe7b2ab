"""The operators that bench.py measures: inputs, peers, and the floor of the bytes and products of each.

A case is a function of the command's settings, the seven sizes and the device -> (its title, the tensors that
get gradients, {peer: function of them, or why it cannot run}, the floors (bytes, flops) of both passes).

N rows, V vocabulary; B sequences, L length, M rows, K columns, H heads, G key heads, d head size.
"""

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from crystal import attention, losses
from crystal.runtime import ops, sliced_attention
from crystal.runtime.config import UserError


def compiled_by_torch(f, wanted):
    """A peer: f by torch.compile, or why it is left out."""
    return torch.compile(f, dynamic=False) if wanted else "left out (--no-compile)"


# --- the operators and their peers ---


def vocab_case(a, sizes, device):
    """Both cross entropies and the KL of N labelled rows, gradients to both paths."""
    N, V, dtype = a.rows, a.vocab, getattr(torch, a.dtype)
    g = torch.Generator().manual_seed(0)
    leaves = [(3 * torch.randn(N, V, generator=g)).to(device, dtype).requires_grad_() for _ in range(2)]
    labels, answer = (
        torch.randint(0, V, (N,), generator=g).to(device),
        torch.ones(N, dtype=torch.bool, device=device),
    )

    def textbook(z, z2):
        log_p, log_q = z.to(wide(z)).log_softmax(-1), z2.to(wide(z)).log_softmax(-1)
        ce, ce2 = (F.nll_loss(x, labels, reduction="none") for x in (log_p, log_q))
        return ce, ce2, (log_p.exp() * (log_p - log_q)).sum(-1)

    def by_liger(z, z2):
        from liger_kernel.transformers.functional import liger_cross_entropy, liger_kl_div

        # It overwrites what it is given.
        ce, ce2 = (liger_cross_entropy(x.clone(), labels, reduction="none") for x in (z, z2))
        return (
            ce,
            ce2,
            liger_kl_div(z2.log_softmax(-1), z.log_softmax(-1), reduction="none", log_target=True).sum(-1),
        )

    liger: Any = by_liger
    if device.type == "cpu":
        liger = "Triton kernels: no CPU"
    elif not importlib.util.find_spec("liger_kernel"):
        liger = "liger_kernel is not installed"
    peers = {
        "compiled": lambda z, z2: ops.vocab_kl_ce(z, z2, labels, labels, answer),
        "eager": textbook,
        "reference": lambda z, z2: losses.vocab_kl_ce(z, z2, labels, labels, answer),
        "torch.compile": compiled_by_torch(textbook, a.compile),
        "Liger, teacher detached": liger,
    }
    moved = 2 * N * V * dtype.itemsize
    return f"KL + CE, both gradients, 2 x {N} x {V} {a.dtype}", leaves, peers, ((moved, 0), (2 * moved, 0))


def heads(a, sizes, device):
    """(B,L,M,K,H,G,d) -> ([q, k] with gradients, rows [B,M], cols [B,K]), laid out as a record is:
    latents, then the answer.
    """
    B, L, M, K, H, G, d = sizes
    g = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(B, n, L, d, generator=g).to(device, getattr(torch, a.dtype)).requires_grad_()
        for n in (H, G)
    ]
    rows = torch.arange(max(0, L - M), L, device=device).expand(B, -1).contiguous()  # the answer comes last
    # The latents just before it.
    cols = torch.arange(max(0, L - M - K), max(1, L - M), device=device).expand(B, -1).contiguous()
    return leaves, rows, cols


def slice_case(a, sizes, device):
    """attn_slice with its normaliser over all L keys."""
    (B, L, M, K, H, G, d), (leaves, rows, cols) = sizes, heads(a, sizes, device)
    at, keys = rows[0], cols[0]

    def whole(q, k):  # what output_attentions makes: all L x L weights
        S = q @ k.repeat_interleave(H // G, 1).transpose(2, 3) * d**-0.5
        S = S.masked_fill(torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        return (S.softmax(-1, dtype=wide(q))[:, :, at][..., keys],)

    hot = F.one_hot(keys, L).T.contiguous()  # [L,K]

    def one_hot(q, k):  # attention itself, with a value column for each key that is asked for
        seen = torch.arange(L, device=q.device)[None] <= at[:, None]  # [M,L]
        v = hot.to(q.dtype).expand(B, G, L, -1)
        return (attention.attend(q[:, :, at], k, v, seen).to(wide(q)),)


    def eager(q, k):
        return (attention.attn_slice(q, k, rows, cols),)

    if device.type == "cpu":
        flex = "has no backward pass on a CPU"
    elif not a.compile:
        flex = "left out (--no-compile)"
    else:
        flex = flex_slice(rows, cols, L, H != G)
    peers = {
        "compiled": lambda q, k: (ops.attn_slice(q, k, rows, cols),),
        "eager": eager,
        "torch.compile": compiled_by_torch(eager, a.compile),
        "one-hot values": one_hot,
        "whole weights": whole if B * H * L * L * 16 < 16e9 else "16 bytes a weight are more than 16 GB",
        "FlexAttention": flex,
    }
    flops, moved = 2 * H * d * int((rows + 1).sum()), B * G * L * d * leaves[1].element_size()
    return (
        f"B {B}, L {L}, M {M}, K {K}, H {H}, G {G}, d {d}, {a.dtype}",
        leaves,
        peers,
        ((moved, flops), (2 * moved, 3 * flops)),
    )


def flex_slice(rows, cols, L, grouped):
    """The slice by FlexAttention, whose log sum exp has a gradient: the M rows are its queries, and
    its output goes unused.
    """
    at, first = rows[0], int(rows[0, 0])

    @functools.cache
    def compiled():  # what fails here is this peer's own trouble
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        seen = create_block_mask(
            lambda b, h, m, j: j <= m + first, None, None, len(at), L, device=rows.device
        )
        # without the option short queries take a kernel for decoding, whose tiles may not fit
        return functools.partial(
            torch.compile(flex_attention, dynamic=False),
            block_mask=seen,
            enable_gqa=grouped,
            return_aux=AuxRequest(lse=True),
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )

    def slice_of(q, k):
        _, aux = compiled()(q[:, :, at], k, k)
        return ((attention.attn_scores(q, k, rows, cols) - aux.lse[..., None]).exp(),)

    return slice_of


def align_case(a, sizes, device):
    """Eq. 5 in its default kind, from both paths' queries and keys: the scores alone, no normaliser over L.
    """
    (B, L, M, K, H, G, d), (leaves, rows, cols) = sizes, heads(a, sizes, device)
    if B % 2:
        raise UserError("--slice: B sequences are both paths of B/2 pairs, so B must be even")
    rows, cols = rows[: B // 2], cols[: B // 2]

    def eager(q, k):
        return (losses.attn_align("kl", "keep", q, k, rows, cols),)

    peers = {
        "compiled": lambda q, k: (ops.attn_align("kl", "keep", q, k, rows, cols),),
        "eager": eager,
        "torch.compile": compiled_by_torch(eager, a.compile),
    }
    read, written = (
        B * (H * M + G * K) * d * leaves[0].element_size(),
        sum(x.numel() * x.element_size() for x in leaves),
    )
    flops = 2 * B * H * M * K * d
    return (
        f"kl, B {B}, L {L}, M {M}, K {K}, H {H}, G {G}, d {d}, {a.dtype}",
        leaves,
        peers,
        ((read, flops), (read + written, 3 * flops)),
    )


def frobenius_case(a, sizes, device):
    """Eq. 5 as written, over image and latents: a pass over all keys, and no slice written out."""
    (B, L, M, _, H, G, d), (leaves, rows, _) = sizes, heads(a, sizes, device)
    if B % 2:
        raise UserError("--slice: B sequences are both paths of B/2 pairs, so B must be even")
    rows, cols = rows[: B // 2], torch.arange(L // 2, device=device).expand(B // 2, -1).contiguous()

    def eager(q, k):
        return (losses.attn_align("frobenius", "keep", q, k, rows, cols),)

    peers = {
        "compiled": lambda q, k: (ops.attn_align("frobenius", "keep", q, k, rows, cols),),
        "eager": eager,
        "torch.compile": compiled_by_torch(eager, a.compile),
    }
    flops, moved = 2 * H * d * int((rows.repeat(2, 1) + 1).sum()), B * G * L * d * leaves[1].element_size()
    return (
        f"frobenius, B {B}, L {L}, M {M}, K {L // 2}, H {H}, G {G}, d {d}, {a.dtype}",
        leaves,
        peers,
        ((moved, flops), (2 * moved, 3 * flops)),
    )


def attention_case(a, sizes, device):
    """Attention together with its slice: what supervising adds to the attention alone."""
    (B, L, M, K, H, G, d), (leaves, rows, cols) = sizes, heads(a, sizes, device)
    v = torch.randn(B, G, L, d, generator=torch.Generator().manual_seed(1)).to(leaves[0]).requires_grad_()

    def eager(q, k, v):
        return attention.attention_with_slice(q, k, v, rows, cols)

    peers = {
        "compiled": lambda q, k, v: sliced_attention.attention_with_slice(q, k, v, rows, cols),
        "eager": eager,
        "torch.compile": compiled_by_torch(eager, a.compile),
        "attention alone": lambda *x: (attention.attend(*x),),
    }
    # Two products over half of L x L.
    flops, moved = (
        2 * B * H * L * (L + 1) * d,
        sum(x.numel() * x.element_size() for x in (*leaves, v)),
    )
    return (
        f"attention and slice, B {B}, L {L}, M {M}, K {K}, H {H}, G {G}, d {d}, {a.dtype}",
        [*leaves, v],
        peers,
        ((moved, flops), (2 * moved, 5 * flops // 2)),
    )


def layer_case(a, sizes, device):
    """A decoder layer of both paths, its weights frozen, and eq. 5 of its attention: what supervising adds to
    a step. No rotary embedding.
    """
    (B, L, M, K, H, G, d), (_, rows, cols) = sizes, heads(a, sizes, device)
    if B % 2:
        raise UserError("--slice: B sequences are both paths of B/2 pairs, so B must be even")
    rows, cols = rows[: B // 2], cols[: B // 2]
    D, g = H * d, torch.Generator().manual_seed(2)
    inner = 37 * D // 7  # as Qwen2.5-7B's
    shapes = (D, D), (G * d, D), (G * d, D), (D, D), (inner, D), (inner, D), (D, inner)
    weights = [
        (torch.randn(shape, generator=g) / shape[1] ** 0.5).to(device, getattr(torch, a.dtype))
        for shape in shapes
    ]
    x = torch.randn(B, L, D, generator=g).to(weights[0]).requires_grad_()

    def layer(align, x):
        query, key, value, out, gate, up, down = (w.to(x.dtype) for w in weights)
        n = F.rms_norm(x, (D,))
        q, k, v = (F.linear(n, w).unflatten(-1, (-1, d)).transpose(1, 2) for w in (query, key, value))
        x = x + F.linear(attention.attend(q, k, v).transpose(1, 2).flatten(2), out)
        n = F.rms_norm(x, (D,))
        return x + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down), *(
            [align("kl", "keep", q, k, rows, cols)] if align else []
        )

    peers = {
        "compiled": functools.partial(layer, ops.attn_align),
        "eager": functools.partial(layer, losses.attn_align),
        "the layer alone": functools.partial(layer, None),
    }
    products, pairs, moved = (
        2 * B * L * sum(w.numel() for w in weights),
        2 * B * H * L * (L + 1) * d,
        sum(w.numel() * w.element_size() for w in (*weights, x)),
    )
    return (
        f"a layer and eq. 5, B {B}, L {L}, M {M}, K {K}, H {H}, G {G}, d {d}, {a.dtype}",
        [x],
        peers,
        ((moved, products + pairs), (moved, products + 5 * pairs // 2)),
    )


def wide(x):
    """The dtype that results have: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


CASES = {
    "vocab": vocab_case,
    "slice": slice_case,
    "align": align_case,
    "frobenius": frobenius_case,
    "attention": attention_case,
    "layer": layer_case,
}
