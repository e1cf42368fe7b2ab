"""Compiled twins of attention.py and losses.py, and the choice between them; callers import from here.

Every operator has the signature of its plain reference and is documented there. Their gradients stand in
ops_gradients.py, attention that hands out its slice in sliced_attention.py. The compiled ones (csrc/, built
by `make setup`) are chosen once, at their first use or when training starts, and the choice is printed once:

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
from crystal.runtime import ops_gradients
from crystal.runtime.config import UserError
from crystal.runtime.ops_gradients import wide

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
    ops_gradients.register()
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


# --- the operators ---


def vocab_kl_ce(
    logits_int, logits_cor, targets_int, targets_cor, answer, *, teacher_grad=True, in_place=False
):
    """losses.vocab_kl_ce in one pass forward and one backward: three times the bytes of the logits.

    No tensor of their size is made but the gradients, and with in_place none at all.
    """
    if not served("vocab_kl_ce", logits_int):
        return losses.vocab_kl_ce(
            logits_int, logits_cor, targets_int, targets_cor, answer, teacher_grad=teacher_grad
        )

    logits = [_rows_together(x) for x in (logits_int, logits_cor)]
    if in_place and any(x is not None and x.requires_grad and x.is_leaf for x in logits):
        raise ValueError("vocab_kl_ce in place: a leaf's values are not to be overwritten by its gradient")

    where = [x.contiguous() for x in (targets_int, targets_cor, answer)]
    return torch.ops.crystal.vocab_kl_ce(*logits, *where, teacher_grad, in_place)[:3]


def ce_rows(logits, targets):
    """losses.ce_rows, as the intact half of vocab_kl_ce."""
    if not served("vocab_kl_ce", logits):
        return losses.ce_rows(logits, targets)
    nowhere = torch.full_like(targets, -1)
    no_answer = torch.zeros_like(targets, dtype=torch.bool)
    return vocab_kl_ce(logits, None, targets, nowhere, no_answer)[0]


def _rows_together(x):
    """The logits of a row side by side in memory, as the kernels want them; rows may lie anywhere."""
    if x is None or x.shape[1] < 2 or x.stride(1) == 1:
        return x
    return x.contiguous()


def attn_slice(q, k, rows, cols, *, scale=None, lse=None, bias=None, key_padding=None):
    """attention.attn_slice without its M x L scores.

    Tiles of them are computed where they are used, and again in backward. A given lse spares the forward's
    pass over the L keys; backward, too, takes its softmax from it, so it must be the rows' own. A bias that
    wants a gradient takes plain PyTorch.
    """
    if wants(bias) or not served("attn_slice", q):
        return attention.attn_slice(
            q, k, rows, cols, scale=scale, lse=lse, bias=bias, key_padding=key_padding
        )
    attention.check(q, k, bias, key_padding, rows, cols)
    factor, lse = scale_of(q, scale), _given(lse, q)
    return torch.ops.crystal.attn_slice(q, k, rows, cols, factor, lse, bias, key_padding)[0]


def attn_scores(q, k, rows, cols, *, scale=None, bias=None, key_padding=None):
    """attention.attn_scores, reading the chosen rows and columns alone.

    A bias that wants a gradient takes plain PyTorch.
    """
    if wants(bias) or not served("attn_scores", q):
        return attention.attn_scores(q, k, rows, cols, scale=scale, bias=bias, key_padding=key_padding)
    attention.check(q, k, bias, key_padding, rows, cols)
    return torch.ops.crystal.attn_scores(q, k, rows, cols, scale_of(q, scale), bias, key_padding)


def attn_align(
    kind, heads, q, k, rows, cols, *, scale=None, lse=None, bias=None, key_padding=None, teacher_grad=True
):
    """losses.attn_align without its slices: sums over a row are all that is kept.

    "kl" with heads "keep" reads the chosen rows and columns alone. "frobenius" and "mse" go over the L keys
    as attn_slice does, and a given lse must be the rows' own. With heads "mean", whose rows meet across the
    heads, losses.attn_loss compares compiled slices.
    """
    how = {"scale": scale, "bias": bias, "key_padding": key_padding}
    if heads == "mean":
        return _align_of_slices(kind, q, k, rows, cols, lse, how, teacher_grad)
    known = heads == "keep" and kind in ("kl", "frobenius", "mse")
    if not known or wants(bias) or not served("attn_align", q):
        return losses.attn_align(
            kind, heads, q, k, rows, cols, lse=lse, teacher_grad=teacher_grad, **how
        )

    attention.check(q, k, bias, key_padding)
    places = rows.repeat(2, 1), cols.repeat(2, 1)
    is_kl, factor, lse = kind == "kl", scale_of(q, scale), _given(lse, q)
    values = torch.ops.crystal.attn_align(
        q, k, *places, is_kl, factor, lse, bias, key_padding, teacher_grad
    )[0]  # [B,H,M]
    if is_kl:
        return losses.mean_rows(values, rows)
    total = values.sum((1, 2))
    return total if kind == "frobenius" else total / losses.cells(q.shape[1], rows, cols)


def _align_of_slices(kind, q, k, rows, cols, lse, how, teacher_grad):
    """losses.attn_align with heads "mean", of both paths' compiled slices."""
    places = rows.repeat(2, 1), cols.repeat(2, 1)
    if losses.slice_kind(kind, "mean") == "scores":
        X = attn_scores(q, k, *places, **how)
    else:
        X = attn_slice(q, k, *places, lse=lse, **how)
    X_int, X_cor = X.chunk(2)
    return losses.attn_loss(kind, "mean", X_int if teacher_grad else X_int.detach(), X_cor, rows, cols)


def wants(x):
    """Whether a gradient of x, a tensor or None, will be asked for."""
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def scale_of(q, scale):
    """The factor of the scores: the one that is given, or 1 / sqrt(d)."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def _given(lse, q):
    """A log sum exp as the kernels take it, a constant in the wide type; None stays None."""
    return None if lse is None else lse.detach().to(wide(q.dtype)).contiguous()
