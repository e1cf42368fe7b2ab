"""Compiled twins of attention.py and losses.py, and the choice between them; callers import from here.

Every operator has the signature of its plain reference and is documented there. The compiled ones
(csrc/, built by `make setup`) are chosen once, at their first use or when training starts, and the
choice is printed once:

    CRYSTAL_OPS=auto       compiled where the extension is built and serves the tensors' device and dtype
                           (default)
    CRYSTAL_OPS=reference  plain PyTorch everywhere
    CRYSTAL_OPS=require    compiled, or an error that says why not

A compiled operator has no gradient of its gradient: asking for one raises RuntimeError (use the reference).
"""

import contextlib
import functools
import os
import sys
from pathlib import Path

import torch

from crystal import attention, losses
from crystal.runtime.config import UserError

HERE = Path(__file__).parents[1]  # where setup.py puts what it built
CPU = {torch.float64, torch.float32, torch.bfloat16}
CUDA = CPU | {torch.float16}
SERVED = {  # operator: {device: dtypes}
    "vocab_kl_ce": {"cpu": CPU, "cuda": CUDA},
    "attn_slice": {"cpu": CPU, "cuda": CUDA},
    "attn_scores": {"cpu": CPU, "cuda": CUDA},
    "attn_align": {"cpu": CPU, "cuda": CUDA},
}


# --- the choice ---


@functools.cache
def choice():
    """(CRYSTAL_OPS, devices that compiled operators serve, one line that says so). Loads the extension."""
    mode = os.environ.get("CRYSTAL_OPS", "auto")
    if mode not in ("auto", "reference", "require"):
        raise UserError(f"CRYSTAL_OPS={mode}: choose auto, reference or require")
    if mode == "reference":
        return mode, (), "operators: plain PyTorch (CRYSTAL_OPS=reference)"
    devices, problem = _load()
    if problem and mode == "require":
        raise UserError(f"CRYSTAL_OPS=require, but {problem}")
    if problem:
        return mode, (), f"operators: plain PyTorch ({problem})"
    return (
        mode,
        devices,
        f"operators: compiled for {' and '.join(devices)} ({torch.ops.crystal.vector_bits(0)}-bit vectors "
        "on the CPU)",
    )


@functools.cache
def _load():
    """Loads crystal/_C.so and, where torch knows CUDA, crystal/_C_cuda.so -> (devices served, what
    is wrong or None).
    """
    devices = []
    for device, file, wanted in (
        ("cpu", "_C.so", True),
        ("cuda", "_C_cuda.so", torch.version.cuda is not None and (HERE / "_C_cuda.so").exists()),
    ):
        if not wanted:
            continue
        if not (HERE / file).exists():
            return (), f"crystal/{file} is not built: make setup, or python setup.py build_ext --inplace"
        try:
            torch.ops.load_library(str(HERE / file))
        except OSError as error:
            return (), f"crystal/{file} cannot be loaded, build it again: {error}"
        devices.append(device)
    if missing := [name for name in SERVED if not hasattr(torch.ops.crystal, name)]:
        return (), f"crystal/_C.so is older than its sources ({', '.join(missing)} missing), build it again"
    _register()
    return tuple(devices), None


@contextlib.contextmanager
def chosen(mode):
    """While it lasts, CRYSTAL_OPS is `mode`, whatever was chosen before; None leaves it as it is."""
    before = os.environ.get("CRYSTAL_OPS")
    if mode is not None:
        os.environ["CRYSTAL_OPS"] = mode
        _forget()
    try:
        yield
    finally:
        if mode is not None:
            if before is None:
                os.environ.pop("CRYSTAL_OPS", None)
            else:
                os.environ["CRYSTAL_OPS"] = before
            _forget()


def _forget():
    """The next use of an operator chooses anew."""
    choice.cache_clear()
    _served.cache_clear()
    _misfit.cache_clear()


_said = []


def announce(write=None):
    """Says which operators were chosen, once: on stderr, or by `write` where a program calls this
    before it uses any.
    """
    if not _said:
        _said.append(choice()[2])
        (write or (lambda line: print(line, file=sys.stderr)))(_said[0])


@functools.cache
def _served(name, device, dtype):
    """Whether the compiled operator takes such tensors; says why not, once (require: raises)."""
    announce()
    mode, devices, _ = choice()
    if not devices:
        return False

    if device in devices and dtype in SERVED[name].get(device, ()):
        problem = _misfit(device)
    else:
        problem = f"{name} is not compiled for {str(dtype).removeprefix('torch.')} on {device}"
    if problem and mode == "require":
        raise UserError(f"CRYSTAL_OPS=require, but {problem}")
    if problem:
        print(f"operators: {problem}: plain PyTorch", file=sys.stderr)
    return not problem


@functools.cache
def _misfit(device):
    """Why the compiled operators do not run on this machine's GPU, as one small launch shows; else "".

    A GPU older than those that csrc was compiled for, or a driver older than the toolkit, shows at the first
    launch and not before.
    """
    if device != "cuda":
        return ""
    try:
        _launch(device)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        return f"the compiled operators do not run on this GPU ({said})"
    return ""


def _launch(device):
    """One call of a compiled operator on `device`, and its end."""
    logits = torch.zeros(1, 8, device=device)
    target = torch.zeros(1, dtype=torch.long, device=device)
    answer = torch.zeros(1, dtype=torch.bool, device=device)
    values = torch.ops.crystal.vocab_kl_ce(logits, None, target, target - 1, answer, True, False)
    values[0].tolist()


def served(name, x):
    """Whether operator `name` runs compiled for tensors like x."""
    return _decided(name, x.device.type, x.dtype)


@torch.compiler.assume_constant_result
def _decided(name, device, dtype):
    """_served, which torch.compile asks once and takes for a constant: to choose reads files, and prints."""
    return _served(name, device, dtype)


# --- registration, once the library is loaded ---


def _register():
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


# --- vocab_kl_ce: cross entropies and KL of two paths' logits ---


def vocab_kl_ce(
    logits_int, logits_cor, targets_int, targets_cor, answer, *, teacher_grad=True, in_place=False
):
    """losses.vocab_kl_ce in one pass forward and one backward: three times the bytes of the logits, and no
    tensor of their size
    but the gradients (none at all with in_place)."""
    if not served("vocab_kl_ce", logits_int):
        return losses.vocab_kl_ce(
            logits_int, logits_cor, targets_int, targets_cor, answer, teacher_grad=teacher_grad
        )
    logits = [_rows_together(x) for x in (logits_int, logits_cor)]
    if in_place and any(x is not None and x.requires_grad and x.is_leaf for x in logits):
        raise ValueError("vocab_kl_ce in place: a leaf's values are not to be overwritten by its gradient")
    return torch.ops.crystal.vocab_kl_ce(
        *logits,
        targets_int.contiguous(),
        targets_cor.contiguous(),
        answer.contiguous(),
        teacher_grad,
        in_place,
    )[:3]


def ce_rows(logits, targets):
    """losses.ce_rows, as the intact half of vocab_kl_ce."""
    if not served("vocab_kl_ce", logits):
        return losses.ce_rows(logits, targets)
    return vocab_kl_ce(
        logits, None, targets, torch.full_like(targets, -1), torch.zeros_like(targets, dtype=torch.bool)
    )[0]


def _rows_together(x):
    """The logits of a row side by side in memory, as the kernels want them; rows may lie anywhere."""
    return x if x is None or x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def _vocab_fake(logits_int, logits_cor, targets_int, targets_cor, answer, teacher_grad, in_place):
    N = answer.shape[0]
    values = [logits_int.new_empty(N, dtype=_wide(logits_int.dtype)) for _ in range(3)]
    return *values, logits_int.new_empty(N, 5, dtype=torch.float64), targets_int.new_empty(2, N)


def _vocab_context(ctx, inputs, output):
    *tensors, ctx.teacher_grad, ctx.in_place = inputs
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _vocab_backward(ctx, g_int, g_cor, g_kl, *_):
    logits_int, logits_cor, targets_int, targets_cor, answer, sums, at = ctx.saved_tensors
    above = [
        torch.zeros(len(answer), dtype=_wide(logits_int.dtype), device=answer.device)
        if g is None
        else g.contiguous()
        for g in (g_int, g_cor, g_kl)
    ]
    want_int, want_cor = ctx.needs_input_grad[:2]
    args = (
        *above,
        logits_int,
        logits_cor,
        targets_int,
        targets_cor,
        answer,
        sums,
        at,
        ctx.teacher_grad,
        want_int,
        want_cor,
    )
    if ctx.in_place and not _graph_is_kept():  # a kept graph may be gone through again: it keeps its logits
        torch.ops.crystal.vocab_kl_ce_backward_(*args)
        for x, wanted in ((logits_int, want_int), (logits_cor, want_cor)):
            if wanted:
                # Whoever else still needs the logits is told so by an error.
                torch.autograd.graph.increment_version(x)
        grads = logits_int.detach(), None if logits_cor is None else logits_cor.detach()
    else:
        grads = torch.ops.crystal.vocab_kl_ce_backward(*args)
    return grads[0] if want_int else None, grads[1] if want_cor else None, None, None, None, None, None


def _graph_is_kept():
    """Whether the backward pass that runs was asked to retain its graph; a torch that cannot say so is
    taken to retain it.
    """
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def _vocab_backward_fake(
    g_int,
    g_cor,
    g_kl,
    logits_int,
    logits_cor,
    targets_int,
    targets_cor,
    answer,
    sums,
    at,
    teacher_grad,
    want_int,
    want_cor,
):
    V, separate = logits_int.shape[1], logits_cor is not None
    return (
        logits_int.new_empty(logits_int.shape[0] if want_int or not separate else 0, V),
        logits_int.new_empty(logits_cor.shape[0] if want_cor and separate else 0, V),
    )


# --- attn_slice, attn_scores: weights and scores of chosen rows and columns ---
#
# B sequences, H query heads, G key heads, L length, d head size, M rows, K columns. Forward and backward
# keep [B,H,M,K] and [B,H,M].


def attn_slice(q, k, rows, cols, *, scale=None, lse=None, bias=None, key_padding=None):
    """attention.attn_slice without its M x L scores: tiles of them are computed where they are used,
    and again in backward.

    A given lse spares the forward's pass over the L keys; backward, too, takes its softmax from it, so it
    must be the rows' own. A bias that wants a gradient takes plain PyTorch.
    """
    if _wants(bias) or not served("attn_slice", q):
        return attention.attn_slice(
            q, k, rows, cols, scale=scale, lse=lse, bias=bias, key_padding=key_padding
        )
    attention.check(q, k, bias, key_padding, rows, cols)
    if lse is not None:
        lse = lse.detach().to(_wide(q.dtype)).contiguous()
    return torch.ops.crystal.attn_slice(q, k, rows, cols, _scale(q, scale), lse, bias, key_padding)[0]


def attn_scores(q, k, rows, cols, *, scale=None, bias=None, key_padding=None):
    """attention.attn_scores, reading the chosen rows and columns alone. A bias that wants a
    gradient takes plain PyTorch.
    """
    if _wants(bias) or not served("attn_scores", q):
        return attention.attn_scores(q, k, rows, cols, scale=scale, bias=bias, key_padding=key_padding)
    attention.check(q, k, bias, key_padding, rows, cols)
    return torch.ops.crystal.attn_scores(q, k, rows, cols, _scale(q, scale), bias, key_padding)


def _wants(x):
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


def _cells(q, rows, cols):
    return q.new_empty(*q.shape[:2], rows.shape[1], cols.shape[1], dtype=_wide(q.dtype))


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
    grads = torch.ops.crystal.attn_backward(
        q,
        k,
        rows,
        cols,
        ctx.scale,
        torch.where(S.isneginf(), 0, g),
        None,
        None,
        None,
        None,
        *ctx.needs_input_grad[:2],
    )
    return *_wanted(ctx, grads), *[None] * 5


def _attn_backward_fake(
    q, k, rows, cols, scale, grad_direct, grad_through, lse, bias, key_padding, want_q, want_k
):
    return q.new_empty(q.shape if want_q else (0,)), k.new_empty(k.shape if want_k else (0,))


def _wanted(ctx, grads):
    """An operator's gradients, None for those that nobody asked for."""
    return [grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad)]


# --- attention_with_slice ---


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
    if _wants(mask) or not served("attn_slice", q):
        return attention.attention_with_slice(q, k, v, rows, cols, scale=scale, mask=mask)
    if mask is not None:
        mask = attention.additive(mask, q.dtype)
    attention.check(q, k, mask, None)
    q, k, v = map(_dense, (q, k, v))
    if fused := _fused(q, k, v, mask):
        return _AttentionWithSlice.apply(q, k, v, rows, cols, _scale(q, scale), mask, fused)
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
        lse_rows = lse.gather(2, _at(rows, q.shape[1])).to(_wide(q.dtype)).contiguous()  # [B,H,M]
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


# --- attn_align: eq. 5 from both paths' queries and keys ---


def attn_align(
    kind, heads, q, k, rows, cols, *, scale=None, lse=None, bias=None, key_padding=None, teacher_grad=True
):
    """losses.attn_align without its slices: sums over a row are all that is kept.

    "kl" with heads "keep" reads the chosen rows and columns alone. "frobenius" and "mse" go over the L keys
    as attn_slice does, and a given lse must be the rows' own. With heads "mean", whose rows meet across the
    heads, losses.attn_loss compares compiled slices.
    """
    if heads == "mean":
        at, rest = (
            (rows.repeat(2, 1), cols.repeat(2, 1)),
            {"scale": scale, "bias": bias, "key_padding": key_padding},
        )
        X = (
            attn_scores(q, k, *at, **rest)
            if losses.slice_kind(kind, heads) == "scores"
            else attn_slice(q, k, *at, lse=lse, **rest)
        )
        X_int, X_cor = X.chunk(2)
        return losses.attn_loss(kind, heads, X_int if teacher_grad else X_int.detach(), X_cor, rows, cols)
    if (
        (kind, heads) not in (("kl", "keep"), ("frobenius", "keep"), ("mse", "keep"))
        or _wants(bias)
        or not served("attn_align", q)
    ):
        return losses.attn_align(
            kind,
            heads,
            q,
            k,
            rows,
            cols,
            scale=scale,
            lse=lse,
            bias=bias,
            key_padding=key_padding,
            teacher_grad=teacher_grad,
        )
    attention.check(q, k, bias, key_padding)
    if lse is not None:
        lse = lse.detach().to(_wide(q.dtype)).contiguous()
    values = torch.ops.crystal.attn_align(
        q,
        k,
        rows.repeat(2, 1),
        cols.repeat(2, 1),
        kind == "kl",
        _scale(q, scale),
        lse,
        bias,
        key_padding,
        teacher_grad,
    )[0]  # [B,H,M]
    if kind == "kl":
        return losses.mean_rows(values, rows)
    total = values.sum((1, 2))
    return total if kind == "frobenius" else total / losses.cells(q.shape[1], rows, cols)


def _align_fake(q, k, rows, cols, kl, scale, lse, bias, key_padding, teacher_grad):
    norm = q.new_empty(*q.shape[:2], rows.shape[1], dtype=_wide(q.dtype))  # [2B,H,M]
    return norm[: len(q) // 2].clone(), norm, norm[: 0 if kl else len(q)].clone()


def _align_context(ctx, inputs, output):
    q, k, rows, cols, ctx.kl, ctx.scale, _, bias, key_padding, ctx.teacher_grad = inputs
    ctx.save_for_backward(q, k, rows, cols, *output, bias, key_padding)
    ctx.mark_non_differentiable(*output[1:])


def _align_backward(ctx, g, *_):
    q, k, rows, cols, value, norm, grad_through, bias, key_padding = ctx.saved_tensors
    grads = torch.ops.crystal.attn_align_backward(
        g.contiguous(),
        q,
        k,
        rows,
        cols,
        ctx.kl,
        ctx.scale,
        value,
        norm,
        grad_through,
        bias,
        key_padding,
        ctx.teacher_grad,
        *ctx.needs_input_grad[:2],
    )
    return *_wanted(ctx, grads), *[None] * 8


def _align_backward_fake(
    g, q, k, rows, cols, kl, scale, value, norm, grad_through, bias, key_padding, teacher_grad, want_q, want_k
):
    return q.new_empty(q.shape if want_q else (0,)), k.new_empty(k.shape if want_k else (0,))
