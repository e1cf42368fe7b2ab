"""Shapes and gradients of the compiled operators, told to torch as they are loaded.

csrc/ has what runs forward and backward; which of the two belong together stands here.
Each operator has a fake, which makes its results' shapes for torch.compile, a context, which keeps what
backward reads, and a backward, which calls the compiled one. A backward has no gradient itself.

B sequences, H query heads, G key heads, L length, d head size, M rows, K columns, N labelled rows, V
vocabulary.
"""

import torch


def register():
    """Fake kernels and gradients of every operator."""
    torch.library.register_fake("crystal::vocab_kl_ce", _vocab_fake)
    torch.library.register_fake("crystal::vocab_kl_ce_backward", _vocab_backward_fake)
    torch.library.register_fake("crystal::vocab_kl_ce_backward_", lambda *_: None)
    torch.library.register_autograd("crystal::vocab_kl_ce", _vocab_backward, setup_context=_vocab_context)
    _not_twice("vocab_kl_ce_backward")
    torch.library.register_fake("crystal::attn_slice", _slice_fake)
    torch.library.register_fake("crystal::attn_scores", _scores_fake)
    torch.library.register_fake("crystal::attn_backward", _attn_backward_fake)
    torch.library.register_fake("crystal::attn_backward_", lambda *_: None)
    torch.library.register_autograd("crystal::attn_slice", _slice_backward, setup_context=_slice_context)
    torch.library.register_autograd("crystal::attn_scores", _scores_backward, setup_context=_scores_context)
    _not_twice("attn_backward")
    torch.library.register_fake("crystal::attn_align", _align_fake)
    torch.library.register_fake("crystal::attn_align_backward", _align_backward_fake)
    torch.library.register_autograd("crystal::attn_align", _align_backward, setup_context=_align_context)
    _not_twice("attn_align_backward")


def _not_twice(name):
    """Registers that a backward operator has no gradient itself: silence would be a wrong second derivative.
    """

    def backward(ctx, *grads):
        raise RuntimeError(
            f"crystal::{name} is a gradient and has none itself; CRYSTAL_OPS=reference can be "
            "differentiated twice"
        )

    torch.library.register_autograd(f"crystal::{name}", backward)


def wide(dtype):
    """The type in which values of `dtype` are added up and returned: float32, or float64 of float64."""
    return torch.promote_types(dtype, torch.float32)


def _wanted(ctx, grads):
    """An operator's gradients, None for those that nobody asked for."""
    return [grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad)]


# --- vocab_kl_ce: cross entropies and KL of two paths' logits ---


def _vocab_fake(logits_int, logits_cor, targets_int, targets_cor, answer, teacher_grad, in_place):
    N = answer.shape[0]
    values = [logits_int.new_empty(N, dtype=wide(logits_int.dtype)) for _ in range(3)]
    return *values, logits_int.new_empty(N, 5, dtype=torch.float64), targets_int.new_empty(2, N)


def _vocab_context(ctx, inputs, output):
    *tensors, ctx.teacher_grad, ctx.in_place = inputs
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _vocab_backward(ctx, g_int, g_cor, g_kl, *_):
    saved = ctx.saved_tensors  # under checkpointing they can be unpacked once
    logits_int, logits_cor, _, _, answer, _, _ = saved
    nothing = torch.zeros(len(answer), dtype=wide(logits_int.dtype), device=answer.device)
    above = [nothing if g is None else g.contiguous() for g in (g_int, g_cor, g_kl)]
    want_int, want_cor = ctx.needs_input_grad[:2]
    args = (*above, *saved, ctx.teacher_grad, want_int, want_cor)

    if ctx.in_place and not _graph_is_kept():  # a kept graph may be gone through again: it keeps its logits
        torch.ops.crystal.vocab_kl_ce_backward_(*args)
        for x, wanted in ((logits_int, want_int), (logits_cor, want_cor)):
            if wanted:
                # Whoever else still needs the logits is told so by an error.
                torch.autograd.graph.increment_version(x)
        grads = logits_int.detach(), None if logits_cor is None else logits_cor.detach()
    else:
        grads = torch.ops.crystal.vocab_kl_ce_backward(*args)
    return *_wanted(ctx, grads), *[None] * 5


def _graph_is_kept():
    """Whether the backward pass that runs was asked to retain its graph.

    A torch that cannot say so is taken to retain it.
    """
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def _vocab_backward_fake(g_int, g_cor, g_kl, logits_int, logits_cor, *rest):
    *_, want_int, want_cor = rest
    separate = logits_cor is not None
    V = logits_int.shape[1]
    return (
        logits_int.new_empty(logits_int.shape[0] if want_int or not separate else 0, V),
        logits_int.new_empty(logits_cor.shape[0] if want_cor and separate else 0, V),
    )


# --- attn_slice, attn_scores: weights and scores of chosen rows and columns ---
#
# Forward and backward keep [B,H,M,K] and [B,H,M].


def _cells(q, rows, cols):
    return q.new_empty(*q.shape[:2], rows.shape[1], cols.shape[1], dtype=wide(q.dtype))


def _slice_fake(q, k, rows, cols, scale, lse, bias, key_padding):
    A = _cells(q, rows, cols)
    return A, A.new_empty(A.shape[:3])


def _slice_context(ctx, inputs, output):
    q, k, rows, cols, ctx.scale, _, bias, key_padding = inputs
    A, lse = output
    ctx.save_for_backward(q, k, rows, cols, A, lse, bias, key_padding)
    ctx.mark_non_differentiable(lse)


def _slice_backward(ctx, g, _):
    q, k, rows, cols, A, lse, bias, key_padding = ctx.saved_tensors
    # dLoss/dS of these cells, were the normaliser a constant, and what flows through the normaliser.
    grad_direct = torch.where(A == 0, 0, g * A)  # [B,H,M,K]
    grad_through = grad_direct.sum(-1)  # [B,H,M]
    wanted = ctx.needs_input_grad[:2]
    grads = torch.ops.crystal.attn_backward(
        q, k, rows, cols, ctx.scale, grad_direct, grad_through, lse, bias, key_padding, *wanted
    )
    return *_wanted(ctx, grads), *[None] * 6


def _scores_fake(q, k, rows, cols, scale, bias, key_padding):
    return _cells(q, rows, cols)


def _scores_context(ctx, inputs, output):
    q, k, rows, cols, ctx.scale, bias, key_padding = inputs
    ctx.save_for_backward(q, k, rows, cols, output)


def _scores_backward(ctx, g):
    q, k, rows, cols, S = ctx.saved_tensors
    grad_direct = torch.where(S.isneginf(), 0, g)  # [B,H,M,K]
    wanted = ctx.needs_input_grad[:2]
    grads = torch.ops.crystal.attn_backward(
        q, k, rows, cols, ctx.scale, grad_direct, None, None, None, None, *wanted
    )
    return *_wanted(ctx, grads), *[None] * 5


def _attn_backward_fake(
    q, k, rows, cols, scale, grad_direct, grad_through, lse, bias, key_padding, want_q, want_k
):
    return q.new_empty(q.shape if want_q else (0,)), k.new_empty(k.shape if want_k else (0,))


# --- attn_align: eq. 5 from both paths' queries and keys ---


def _align_fake(q, k, rows, cols, kl, scale, lse, bias, key_padding, teacher_grad):
    norm = q.new_empty(*q.shape[:2], rows.shape[1], dtype=wide(q.dtype))  # [2B,H,M]
    return norm[: len(q) // 2].clone(), norm, norm[: 0 if kl else len(q)].clone()


def _align_context(ctx, inputs, output):
    q, k, rows, cols, ctx.kl, ctx.scale, _, bias, key_padding, ctx.teacher_grad = inputs
    ctx.save_for_backward(q, k, rows, cols, *output, bias, key_padding)
    ctx.mark_non_differentiable(*output[1:])


def _align_backward(ctx, g, *_):
    q, k, rows, cols, value, norm, grad_through, bias, key_padding = ctx.saved_tensors
    inputs = g.contiguous(), q, k, rows, cols, ctx.kl, ctx.scale
    grads = torch.ops.crystal.attn_align_backward(
        *inputs, value, norm, grad_through, bias, key_padding, ctx.teacher_grad, *ctx.needs_input_grad[:2]
    )
    return *_wanted(ctx, grads), *[None] * 8


def _align_backward_fake(
    g, q, k, rows, cols, kl, scale, value, norm, grad_through, bias, key_padding, teacher_grad, want_q, want_k
):
    return q.new_empty(q.shape if want_q else (0,)), k.new_empty(k.shape if want_k else (0,))
