"""The slice of attention folded into PyTorch's fused attention, which hands out its log sum exp.

B sequences, H query heads, G key heads, L length, d head size, M rows, K columns.
"""

import torch

from crystal import attention
from crystal.runtime.ops import attn_slice, scale_of, served, wants
from crystal.runtime.ops_gradients import wide


def attention_with_slice(q, k, v, rows, cols, *, scale=None, mask=None):
    """attention.attention_with_slice at almost the cost of the attention alone.

    Attention's log sum exp normalises the slice, so that forward reads M rows and K columns and nothing else.
    Backward, the gradient through the normaliser rides on attention's own: it takes the output O only to form
    delta = rowsum(dO O), and the slice wants delta' = delta - dLSE; so it is given O' = O - dLSE dO / |dO|^2
    in the chosen rows, and no pass over L is added. Rows with (almost) no dO, a last row that nothing reads
    for instance, cannot carry it: they go through attn_backward.

    So wherever PyTorch has a fused attention for such tensors that hands out its log sum exp (_fused).
    Elsewhere, for a mask on a GPU for instance: PyTorch's attention and attn_slice, one after the other. A
    mask that wants a gradient takes plain PyTorch.
    """
    if wants(mask) or not served("attn_slice", q):
        return attention.attention_with_slice(q, k, v, rows, cols, scale=scale, mask=mask)
    if mask is not None:
        mask = attention.additive(mask, q.dtype)
    attention.check(q, k, mask, None)
    q, k, v = map(_dense, (q, k, v))
    if fused := _fused(q, k, v, mask):
        return _AttentionWithSlice.apply(q, k, v, rows, cols, scale_of(q, scale), mask, fused)
    out = attention.attend(q, k, v, mask, scale=scale)
    return out, attn_slice(
        q, k, rows, cols, scale=scale, bias=None if mask is None else attention.row_bias(mask, rows)
    )


def _fused(q, k, v, mask):
    """PyTorch's fused attention for such tensors, where its log sum exp can be had: _OnCPU, _OnGPU or None.
    """
    if q.device.type == "cpu":
        return _OnCPU
    # F.scaled_dot_product_attention pads heads to a multiple of 8 first; here nothing does
    sdpa = torch.backends.cuda
    fits = (
        mask is None
        and q.shape[3] % 8 == 0
        and sdpa.can_use_flash_attention(sdpa.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1]))
    )
    return _OnGPU if fits else None


class _OnCPU:
    """forward -> output [B,H,L,d], log sum exp [B,H,L], and what else backward wants; backward -> dq, dk, dv.
    Any mask and dtype served here.
    """

    @staticmethod
    def forward(q, k, v, mask, scale):
        return *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
        ), ()

    @staticmethod
    def backward(d_out, q, k, v, mask, scale, out, lse, _):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=scale
        )


class _OnGPU:
    """The same by FlashAttention: bfloat16 and half, causal, no mask."""

    @staticmethod
    def forward(q, k, v, mask, scale):
        out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True, scale=scale
        )
        return out, lse, (seed, offset)

    @staticmethod
    def backward(d_out, q, k, v, mask, scale, out, lse, random):
        L = q.shape[2]
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, None, None, L, L, 0.0, True, *random, scale=scale
        )


class _AttentionWithSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rows, cols, scale, mask, fused):
        out, lse, more = fused.forward(q, k, v, mask, scale)
        bias = None if mask is None else attention.row_bias(mask, rows)
        lse_rows = lse.gather(2, _at(rows, q.shape[1])).to(wide(q.dtype)).contiguous()  # [B,H,M]
        A, _ = torch.ops.crystal.attn_slice(q, k, rows, cols, scale, lse_rows, bias, None)
        ctx.save_for_backward(q, k, v, rows, cols, mask, out, lse, lse_rows, A, *more)
        ctx.scale, ctx.fused = scale, fused
        ctx.set_materialize_grads(False)
        return out, A

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_A):
        q, k, v, rows, cols, mask, out, lse, lse_rows, A, *more = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else _dense(d_out)
        grad_direct = torch.zeros_like(A) if d_A is None else torch.where(A == 0, 0, d_A * A)  # [B,H,M,K]
        at = _at(rows, q.shape[1])  # [B,H,M]
        grad_through = grad_direct.sum(-1).masked_fill((rows < 0)[:, None], 0.0)  # [B,H,M]: -dLSE of each row
        # A position chosen twice: of both.
        here = grad_through.new_zeros(lse.shape).scatter_add_(2, at, grad_through).gather(2, at)
        across = at[..., None].expand(-1, -1, -1, q.shape[3])  # [B,H,M,d]
        up = d_out.gather(2, across).to(A.dtype)
        size = up.square().sum(-1)  # [B,H,M]
        shift = up * (here / size.clamp(min=1e-30))[..., None]
        # Half precision ends at 65504.
        carries = (size > 1e-30) & (shift.abs().amax(-1) < torch.finfo(out.dtype).max / 2)
        moved = out.gather(2, across).to(A.dtype) + shift.masked_fill(~carries[..., None], 0.0)
        shifted = out.scatter(2, across, moved.to(out.dtype))  # O'
        dq, dk, dv = ctx.fused.backward(d_out, q, k, v, mask, ctx.scale, shifted, lse, more)
        bias = None if mask is None else attention.row_bias(mask, rows)
        rest = grad_through.masked_fill(carries, 0.0)  # zeros, mostly: no pass over L then
        torch.ops.crystal.attn_backward_(
            dq if ctx.needs_input_grad[0] else None,
            dk if ctx.needs_input_grad[1] else None,
            q,
            k,
            rows,
            cols,
            ctx.scale,
            grad_direct,
            rest,
            lse_rows,
            bias,
            None,
        )
        return dq, dk, dv, None, None, None, None, None


def _dense(x):
    """The numbers of a head side by side in memory, as PyTorch's attention for the CPU reads them
    whatever x's strides are.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def _at(rows, H):
    """rows [B,M] -> [B,H,M], the padded ones at 0."""
    return rows.clamp(min=0)[:, None].expand(-1, H, -1)
