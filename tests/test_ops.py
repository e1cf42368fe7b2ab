"""ops.py: every compiled operator against its plain reference, on one list of samples and with
four checks of each.

    values      float64: equal to round-off. Smaller types: the error against float64 is at most twice that of
                plain PyTorch in that type
    gradients   the same with random gradients from above, at most three times; every combination of wanted
                gradients, of unused outputs
    gradcheck   against finite differences in float64
    opcheck     torch.library's own: schema, fake kernel, autograd registration, tracing

A *place* is a device, on the CPU with the width of its vectors (places.py). tests/test_kernels.py
compares the operators with formulas that know nothing of crystal, at the boundaries of the pieces in
which the kernels work.
"""

import faulthandler
import fcntl
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from conftest import gradients
from places import (
    ABSENT,
    EMULATED,
    ON_CPU,
    ONE_WIDTH,
    PROBLEM,
    REFERENCE_ASKED,  # noqa: F401
    at_place,
    compiled,  # noqa: F401
    dtypes,
    each_cpu_place,
    each_device,
    each_place,
    forget_the_choice,
    skip_or_fail,
    versions,
)

from crystal import attention, losses
from crystal.runtime import ops
from crystal.runtime.config import UserError

INF = float("inf")
f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
REFERENCE = {}  # operator -> plain PyTorch
SAMPLES = []


@dataclass
class Sample:
    """name: the operator. make(dtype) -> its arguments; a list, floats among them of that dtype on the CPU.
    """

    name: str
    case: str
    make: callable
    keywords: dict = field(default_factory=dict)
    opcheck: bool = False  # slow: one or two of each operator
    gradcheck: bool = True  # False where something is detached: finite differences know nothing of that
    exact: tuple = ()  # numbers of outputs that are exactly 0, with exactly zero gradients

    def __str__(self):
        return f"{self.name}-{self.case}"


def normal(*shape, seed=0, scale=1.0, dtype=f64):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)).to(dtype)


# --- places ---


@pytest.mark.parametrize("place", ["cpu-128", "cpu-256", "cpu-512", "cuda"])
@pytest.mark.skipif(bool(EMULATED), reason="the place is the emulated one")
def test_place(compiled, place, request):
    """What this machine has not is a visible skip here, once; what it has can be chosen, and is what runs."""
    if ABSENT[place] and place == "cuda":
        skip_or_fail(request, ABSENT[place])
    if ABSENT[place]:
        pytest.skip(ABSENT[place])
    with at_place(place) as device:
        assert device.type == place.partition("-")[0]
        if place != "cuda":
            assert torch.ops.crystal.vector_bits(0) == int(place[4:])


def test_operators_are_built(compiled):
    """A build that is missing or does not load fails here by its own words; every other test of this file
    then has no place.
    """
    assert PROBLEM is None and ONE_WIDTH


def test_a_missing_build_fails(tmp_path):
    """Without the extension the tests fail, unless plain PyTorch was asked for: a suite of skips would look
    like one that passed.
    """
    (tmp_path / "test_some.py").write_text(
        "from pathlib import Path\nfrom crystal.runtime import ops\nops.HERE = Path(__file__).parent\nfrom "
        "places import PLACES, compiled\n"
        "def test_some(compiled):\n    pass\ndef test_no_place():\n    assert PLACES == []\n"
    )
    for mode, said in (("auto", "1 passed, 1 error"), ("reference", "1 passed, 1 skipped")):
        environment = os.environ | {"CRYSTAL_OPS": mode, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_some.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert said in done.stdout and ("_C.so is not built: make setup" in done.stdout) == (
            mode == "auto"
        ), done.stdout + done.stderr


@pytest.fixture
def device(compiled, request):
    """Of the parameter `place`: its device, with the CPU's vectors set to its width, or a version of
    the operator's CUDA kernels.
    """
    index = request.getfixturevalue("index") if "index" in request.fixturenames else None
    with at_place(request.getfixturevalue("place"), None if index is None else SAMPLES[index].name) as device:
        yield device


# --- the four checks ---


def run(f, args, sample, device="cpu", dtype=None, wanted=None, used=None):
    """f on a copy of args -> (outputs, gradients of the float arguments at random gradients from above), in
    float64 on the CPU.

    wanted, used: numbers of the float arguments that want a gradient, of the outputs that
    have one (None: all).
    """
    leaves, inputs = [], []
    for x in args:
        if isinstance(x, torch.Tensor):
            floating = x.is_floating_point()
            # moved with its strides: a sample may be a view
            x = (
                torch.empty_strided(
                    x.shape, x.stride(), dtype=dtype if floating and dtype else x.dtype, device=device
                ).copy_(x)
                if x.numel()
                else x.detach().to(device, dtype if floating and dtype else x.dtype)
            )
            if floating:
                x.requires_grad_(wanted is None or len(leaves) in wanted)
                leaves.append(x)
        inputs.append(x)
    out = f(
        *inputs, **{n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in sample.keywords.items()}
    )
    out = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(7)
    above = [torch.randn(o.shape, generator=g, dtype=f64).to(o) for o in out]
    used = [i for i in (range(len(out)) if used is None else used) if out[i].requires_grad]
    want = [x for x in leaves if x.requires_grad]
    grads = (
        torch.autograd.grad(
            [out[i] for i in used], want, [above[i] for i in used], allow_unused=True, materialize_grads=True
        )
        if used and want
        else []
    )
    assert all(grad.dtype == x.dtype for grad, x in zip(grads, want))
    return [o.detach().cpu().double() for o in out], [x.cpu().double() for x in grads]


def within(got, plain, exact, times, dtype, what):
    """|got - exact| <= times |plain - exact|, at their largest; below a few ulps of the largest
    value all is round-off.
    """
    for i, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        assert a.shape == c.shape, f"{what} {i}"
        if not c.numel():
            continue
        finite = c.isfinite()
        assert torch.equal(a.isfinite(), finite), f"{what} {i} is finite elsewhere"
        if not finite.any():
            continue
        error, plain_error = (float((x - c)[finite].abs().max()) for x in (a, b))
        floor = (100 if dtype == f64 else 4) * torch.finfo(dtype).eps * max(1.0, float(c[finite].abs().max()))
        assert error <= times * plain_error + floor, (
            f"{what} {i}: error {error:.2e}, plain PyTorch's {plain_error:.2e}"
        )


def wide(dtype):
    return f64 if dtype == f64 else f32


@functools.cache
def references(index, dtype):
    """Of SAMPLES[index]: (arguments in dtype, plain PyTorch in dtype, the same in float64)."""
    sample = SAMPLES[index]
    args = sample.make(dtype)
    return (
        args,
        run(REFERENCE[sample.name], args, sample),
        run(REFERENCE[sample.name], args, sample, dtype=f64),
    )


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def each_sample(keep=lambda sample: True):
    chosen = [i for i, sample in enumerate(SAMPLES) if keep(sample)]
    return pytest.mark.parametrize("index", chosen, ids=[str(SAMPLES[i]) for i in chosen])


def each_sample_dtype_and_version(keep=lambda sample: True):
    """Samples, in every type that is served and in every version of the kernels that this machine runs.

    Under the emulator, which is slow, float16 (bfloat16 with other roundings) and older versions take
    some of the samples.
    """
    chosen = []
    for i, sample in enumerate(SAMPLES):
        places = versions(sample.name) if keep(sample) else []
        for place in places:
            served = dtypes(sample.name, place)
            if EMULATED and not sample.opcheck:
                served = [dtype for dtype in served if dtype != f16 and (place == places[-1] or dtype == f64)]
            chosen += [
                pytest.param(i, dtype, place, id=f"{sample}-{name_of(dtype)}-{place}") for dtype in served
            ]
    return pytest.mark.parametrize("index, dtype, place", chosen)


def check_sample(index, dtype, device):
    sample = SAMPLES[index]
    args, plain, exact = references(index, dtype)
    got = run(getattr(ops, sample.name), args, sample, device)
    within(got[0], plain[0], exact[0], 2, wide(dtype), "output")
    within(got[1], plain[1], exact[1], 3, dtype, "gradient")
    for i in sample.exact:
        assert not got[0][i].any()
        _, grads = run(getattr(ops, sample.name), args, sample, device, used=[i])
        assert not any(grad.any() for grad in grads), f"gradient of output {i}"


def check_combinations(index, device):
    """Every combination of wanted gradients with all outputs, and every combination of used
    outputs with all gradients.
    """
    sample = SAMPLES[index]
    args = sample.make(f64)
    floats = sum(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args)
    outputs = len(run(getattr(ops, sample.name), args, sample, device)[0])
    subsets = lambda n: [c for k in range(n + 1) for c in itertools.combinations(range(n), k)]
    for keywords in [{"wanted": c} for c in subsets(floats)] + [{"used": c} for c in subsets(outputs)]:
        got = run(getattr(ops, sample.name), args, sample, device, **keywords)
        want = run(REFERENCE[sample.name], args, sample, **keywords)
        within(got[0], want[0], want[0], 0, f64, f"{keywords} output")
        within(got[1], want[1], want[1], 0, f64, f"{keywords} gradient")


def check_gradients(index, device):
    sample = SAMPLES[index]
    args = [
        x.to(device).requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
        for x in sample.make(f64)
    ]
    keywords = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in sample.keywords.items()}

    def finite(*args):  # -inf, where a cell is hidden, has no difference quotient
        out = getattr(ops, sample.name)(*args, **keywords)
        return tuple(x.clamp(min=-1e9) for x in out) if isinstance(out, tuple) else out.clamp(min=-1e9)

    torch.autograd.gradcheck(finite, args, fast_mode=True)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Records what is asked of torch.ops.crystal, with the arguments as they were."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "crystal":
            graph = "backward" not in function.__name__  # a backward has no gradient of its own
            self.made.append(
                (
                    function,
                    [
                        x.detach().clone().requires_grad_(x.requires_grad and graph)
                        if isinstance(x, torch.Tensor)
                        else x
                        for x in args
                    ],
                )
            )
        return function(*args, **kwargs or {})


def check_registration(index, device):
    sample = SAMPLES[index]
    with Calls() as calls:
        run(getattr(ops, sample.name), sample.make(f32), sample, device)
    assert calls.made
    for function, args in calls.made:
        torch.library.opcheck(function, args)


# --- vocab_kl_ce ---

REFERENCE["vocab_kl_ce"] = losses.vocab_kl_ce


def vocab(labels_int, labels_cor, answer, V, joint=False, scale=3.0, equal=False, view=None, slope=0.0):
    """make(dtype) of vocab_kl_ce's arguments. labels_*: a string with a letter for each n, `.` where it has
    no label; answer: `x` where KL is wanted.
    """

    def make(dtype):
        t, t2 = (
            torch.tensor(
                [(7 * i + 3) % V if letter != "." else -100 * (i % 2) - 1 for i, letter in enumerate(labels)],
                dtype=torch.int64,
            )
            for labels in (labels_int, labels_cor)
        )
        kl = torch.tensor([letter == "x" for letter in answer], dtype=torch.bool)
        R, R2 = (int(((x >= 0) | kl).sum()) for x in (t, t2))
        z = normal(R + R2, V, scale=scale) + slope * torch.linspace(-1, 1, V, dtype=f64) * (
            1 - 2 * torch.arange(R + R2)[:, None] % 4
        )
        z = z.to(dtype)
        if equal:
            z[R:] = z[:R2]
        if scale > 10:
            z = z.sign() * 30
        if view == "columns":  # logits of a row far apart
            z = z.t().contiguous().t()
        elif view == "rows":  # rows far apart
            z = torch.cat([z, z], 1)[:, :V]
        return [z, None, t, t2, kl] if joint else [z[:R], z[R:], t, t2, kl]

    return make


SAMPLES += [
    Sample("vocab_kl_ce", "paths apart", vocab("ab.c.", ".bc..", "x..x.", 11), opcheck=True),
    Sample("vocab_kl_ce", "one product", vocab("ab.cde", ".bc.ef", "xx.x.x", 37, joint=True), opcheck=True),
    Sample(
        "vocab_kl_ce", "teacher detached", vocab("ab.c", ".bca", "xxxx", 19), {"teacher_grad": False},
        gradcheck=False,
    ),
    Sample(
        "vocab_kl_ce",
        "one product, teacher detached",
        vocab("ab.c", ".bca", ".xx.", 64, joint=True),
        {"teacher_grad": False},
        gradcheck=False,
    ),
    Sample("vocab_kl_ce", "one row", vocab("a", "b", "x", 50)),
    Sample("vocab_kl_ce", "one token", vocab("a", "a", "x", 1), exact=(0, 1, 2)),
    Sample("vocab_kl_ce", "no row", vocab("", "", "", 7)),
    Sample("vocab_kl_ce", "nothing asked of three rows", vocab("...", "...", "...", 7)),
    Sample("vocab_kl_ce", "cross entropies alone", vocab("abc", ".bc", "...", 33)),
    Sample("vocab_kl_ce", "KL alone", vocab("...", "...", "xx.", 33, joint=True), exact=(0, 1)),
    Sample("vocab_kl_ce", "several parts", vocab("ab.", "a.c", "x.x", 40003, joint=True)),
    Sample("vocab_kl_ce", "exactly one part", vocab("a", "a", "x", 16384)),
    Sample("vocab_kl_ce", "rows apart in memory", vocab("ab.c", ".bca", "xxxx", 45, view="rows")),
    Sample("vocab_kl_ce", "columns apart in memory", vocab("ab.c", ".bca", "xxxx", 21, view="columns")),
    Sample("vocab_kl_ce", "logits of +-30", vocab("abcd", "abcd", "xxxx", 257, scale=30.0)),
    Sample("vocab_kl_ce", "rising and falling", vocab("abcd", "abcd", "xxxx", 5003, slope=40.0)),
    Sample("vocab_kl_ce", "equal paths", vocab("abcd", "abcd", "xxxx", 20011, equal=True), exact=(2,)),
    Sample(
        "vocab_kl_ce",
        "equal paths, large",
        vocab("abcd", "abcd", "xxxx", 100, scale=30.0, equal=True),
        exact=(2,),
    ),
]


@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=name_of)
@each_cpu_place
def test_tokens_that_cannot_be(place, device, dtype):
    """Logits of -inf, the first of a row, a whole tile, the label's own, and a NaN: as in plain PyTorch."""
    z = normal(5, 3000, scale=3.0, dtype=dtype)
    z[0, 0] = z[1, ::2] = z[2, :2048] = z[3, 70] = -INF
    z[4, 2500] = float("nan")
    t = torch.tensor([5, 71, 2999, 70, 3])
    plain, exact, got = (
        run(f, [x, t], Sample("", "", None))
        for f, x in ((losses.ce_rows, z), (losses.ce_rows, z.double()), (ops.ce_rows, z))
    )
    assert got[0][0][4].isnan() and got[1][0][4].isnan().all() and got[0][0][3] == INF
    within(
        [x[:4] for x in got[0]], [x[:4] for x in plain[0]], [x[:4] for x in exact[0]], 2, wide(dtype),
        "output",
    )
    within(
        [x[:4] for x in got[1]], [x[:4] for x in plain[1]], [x[:4] for x in exact[1]], 3, dtype, "gradient"
    )
    assert not got[1][0][:3][z[:3].isneginf()].any()


def vocab_step(z, **keywords):
    """A use of one product's logits z [2N,V] -> the loss."""
    N = len(z) // 2
    labels = torch.arange(N)
    ce_int, ce_cor, kl = ops.vocab_kl_ce(z, None, labels, labels, torch.ones(N, dtype=torch.bool), **keywords)
    return (ce_int + 2 * ce_cor + 3 * kl).sum()


def test_vocab_in_place(compiled):
    """The gradient takes the logits' memory and is the same; whoever needs them after that is told."""
    h, W = normal(8, 5), normal(5, 30, seed=1).requires_grad_()
    (want,) = torch.autograd.grad(vocab_step(h @ W), W)
    z = h @ W
    loss = vocab_step(z, in_place=True)
    z.register_hook(lambda grad: memory.append(grad.data_ptr()))
    memory = []
    (got,) = torch.autograd.grad(loss, W, retain_graph=True)  # the logits stay
    assert torch.equal(got, want) and z.data_ptr() not in memory
    (got,) = torch.autograd.grad(loss, W)  # and go
    assert torch.equal(got, want) and memory[1] == z.data_ptr()
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, W)
    z = h @ W
    # Another reader of the logits, whose backward comes after vocab_kl_ce's: it raises.
    square = z.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(vocab_step(z, in_place=True) + square, W)
    z = h @ W
    loss = vocab_step(z, in_place=True)
    (both,) = torch.autograd.grad(loss + z.square().sum(), W)  # before: it is right
    (square,) = torch.autograd.grad((h @ W).square().sum(), W)
    torch.testing.assert_close(both, want + square)
    with pytest.raises(ValueError, match="a leaf's values"):
        vocab_step((h @ W).detach().requires_grad_(), in_place=True)


def test_vocab_what_is_refused(compiled):
    z, t, kl = normal(4, 9), torch.tensor([0, 1]), torch.tensor([True, True])
    for f, error in ((ops.vocab_kl_ce, RuntimeError), (losses.vocab_kl_ce, ValueError)):
        for args in (
            (z, None, t[:1], t[:1], kl[:1]), (z[:3], None, t, t, kl), (z[:2], z[:3], t, t, kl),
            (z[:1], z[:2], t, t, kl),
        ):
            with pytest.raises(error, match="speak of"):
                f(*args)
    with pytest.raises(RuntimeError, match="below the vocabulary"):
        ops.vocab_kl_ce(z, None, t + 8, t, kl)


def test_vocab_not_a_number(compiled):
    """NaN and infinite logits reach the loss, which stops the training; a path without KL does not
    hear of the other's.
    """
    t, kl = torch.tensor([0, 1]), torch.tensor([True, False])
    for bad in (float("nan"), float("inf")):
        for row in range(4):
            z = normal(4, 9000)
            z[row, 5000] = bad
            ce_int, ce_cor, value = ops.vocab_kl_ce(z, None, t, t, kl)
            broken = torch.cat([ce_int, ce_cor, value]).isfinite().logical_not().tolist()
            assert broken == [row == 0, row == 1, row == 2, row == 3, row in (0, 2), False]


# --- attn_slice, attn_scores ---

REFERENCE["attn_slice"], REFERENCE["attn_scores"] = attention.attn_slice, attention.attn_scores


def heads(rows, cols, H=4, G=2, L=9, d=5, contiguous=True, scale=1.0):
    """make(dtype) of q [B,H,L,d], k [B,G,L,d], rows [B,M], cols [B,K]."""

    def make(dtype):
        B = len(rows)
        q, k = (
            normal(B, n, L, d, seed=n, scale=scale, dtype=dtype)
            if contiguous
            else normal(B, L, d, n, seed=n, scale=scale, dtype=dtype).permute(0, 3, 1, 2)
            for n in (H, G + 10)
        )
        return [
            q,
            k[:, :G],
            torch.tensor(rows, dtype=torch.int64).view(B, -1),
            torch.tensor(cols, dtype=torch.int64).view(B, -1),
        ]

    return make


def masks(B, M, L, bias=True, padding=True):
    """Keywords bias [B,1,M,L] with blocked cells and one row blocked wholly, key_padding [B,L] at both ends.
    """
    b = normal(B, 1, M, L, seed=5)
    b[b > 1.2] = -INF
    b[0, 0, M // 2] = -INF
    p = torch.zeros(B, L, dtype=torch.bool)
    p[0, :2] = p[-1, -2:] = True
    return ({"bias": b} if bias else {}) | ({"key_padding": p} if padding else {})


ATTENTION = [  # case, make, keywords, opcheck
    ("plain", heads([[3, 5], [4, 6]], [[0, 2, 3], [1, 2, 4]]), {}, True),
    ("one row, one column", heads([[4]], [[2]], H=1, G=1), {}, False),
    ("no rows", heads([[], []], [[1], [2]]), {}, False),
    ("no columns", heads([[1], [2]], [[], []]), {}, False),
    ("both ends", heads([[0, 8]], [[0, 8]]), {}, False),
    ("hidden by causality", heads([[1, 2, 3]], [[3, 4, 5]]), {}, False),
    ("ragged", heads([[3, 5, -1], [-1, -1, -1], [8, 2, 7]], [[0, -1], [2, 3], [7, 1]], H=6, G=2), {}, False),
    ("twice and unsorted", heads([[5, 3, 5]], [[2, 0, 2]]), {}, False),
    ("not contiguous", heads([[3, 5], [4, 6]], [[0, 2, 3], [1, 2, 4]], contiguous=False), {}, False),
    ("own scale", heads([[3, 5]], [[0, 2]]), {"scale": 0.3}, False),
    ("bias", heads([[3, 4, 5, 8, -1]], [[0, 2, 4]]), masks(1, 5, 9, padding=False), False),
    (
        "padding",
        heads([[1, 4, 8], [6, 7, 8]], [[0, 2, 3], [0, 7, 8]], G=4),
        masks(2, 3, 9, bias=False),
        False,
    ),
    ("bias and padding", heads([[1, 4, 8], [6, 7, 8]], [[0, 2, 3], [0, 7, 8]], G=1), masks(2, 3, 9), True),
    (
        "several tiles",
        heads([[200, 71, 72, 144, 3, 150, 201, 99]], [[70, 71, 72, 143, 144, 199]], H=6, G=2, L=203, d=17),
        {},
        False,
    ),
    (
        "several chunks of rows",
        heads([list(range(90, 170))], [[5, 80]], H=3, G=1, L=170, d=8),
        masks(1, 80, 170),
        False,
    ),
    (
        "more columns than a tile",
        heads([[99, 98, 60]], [list(range(95)) + [-1, 99, 3]], H=2, G=1, L=100, d=6),
        {},
        False,
    ),
    ("scores of +-30", heads([[40, 39, 38, 20]], [[30, 31, 5, 39]], L=41, d=16, scale=3.3), {}, False),
]
for name in ("attn_slice", "attn_scores"):
    SAMPLES += [Sample(name, case, make, keywords, opcheck) for case, make, keywords, opcheck in ATTENTION]


@each_place
@pytest.mark.parametrize("case", ATTENTION, ids=[case[0] for case in ATTENTION])
def test_slice_with_lse_given(case, place, device):
    """Given the rows' log sum exp, values and gradients are the same; a row that sees nothing
    may hold anything there.
    """
    _, make, keywords, _ = case
    q, k, rows, cols = args = make(f64)
    lse = attention.attn_lse(q, k, rows, **keywords)
    for filler in (-INF, 0.0):
        sample = Sample("attn_slice", "", None, keywords | {"lse": lse.masked_fill(lse.isneginf(), filler)})
        got, want = (
            run(ops.attn_slice, args, sample, device),
            run(attention.attn_slice, args, Sample("", "", None, keywords)),
        )
        within(got[0], want[0], want[0], 0, f64, "weights")
        within(got[1], want[1], want[1], 0, f64, "gradient")


def test_slice_saves_nothing_of_rows_by_length(compiled):
    """What backward keeps beyond q and k is of size M x K: not M x L, nor d x L."""
    q, k, rows, cols = heads([list(range(100, 140))], [[1, 2]], L=140, d=8)(f32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.attn_slice(q.requires_grad_(), k.requires_grad_(), rows, cols)
    own = [x for x in saved if x.data_ptr() not in (q.data_ptr(), k.data_ptr())]
    assert own and sum(x.numel() for x in own) <= 4 * 40 * (2 + 1) + 40 + 2


def test_slice_not_a_number(compiled):
    """NaN in a query, or in a key that a row sees, reaches that row and no other."""
    for which, at, broken in (
        (0, 5, [False, True]), (1, 4, [False, True]), (1, 2, [True, True]), (1, 8, [False, False]),
    ):
        args = heads([[3, 5]], [[0, 1]])(f32)
        args[which][:, :, at] = float("nan")
        assert ops.attn_slice(*args).isnan().any(-1)[0, 0].tolist() == broken


def test_attention_what_is_refused(compiled):
    q, k, rows, cols = heads([[3, 5]], [[0, 2]])(f32)
    for f in (ops.attn_slice, ops.attn_scores):
        with pytest.raises(ValueError, match="cannot share"):
            f(q, k[:, [0, 1, 1]], rows, cols)
        with pytest.raises(TypeError, match="must be bool"):
            f(q, k, rows, cols, key_padding=torch.zeros(1, 9))
        with pytest.raises(TypeError, match="must be float"):
            f(q, k, rows, cols, bias=torch.zeros(1, 1, 2, 9, dtype=torch.bool))
        with pytest.raises(RuntimeError, match="agree in batch"):
            f(q, k[:, :, :8], rows, cols)


OUT_OF_RANGE = [
    (operator, which, bad)
    for operator in ("attn_slice", "attn_scores", "kl", "frobenius")
    for which in ("rows", "cols")
    for bad in (9, -2)
]
OUT_OF_RANGE += [("attn_backward", "rows", 9), ("attn_backward", "rows", -2)]


def call_out_of_range(operator, which, bad, device):
    """Calls an operator with one row or column that lies outside the 9 positions, and waits for it."""
    q, k, rows, cols = (x.to(device) for x in heads([[3, 5], [3, 5]], [[0, 2], [0, 2]])(f32))
    (rows if which == "rows" else cols)[:, 1] = bad
    if operator == "attn_backward":
        torch.ops.crystal.attn_backward(
            q, k, rows, cols, 0.3, torch.ones(2, 4, 2, 2, device=device), None, None, None, None, True, True
        )
    elif operator in ("kl", "frobenius"):
        ops.attn_align(operator, "keep", q, k, rows[:1], cols[:1])
    else:
        getattr(ops, operator)(q, k, rows, cols)
    if device == "cuda":
        torch.cuda.synchronize()


def said_by_a_child(operator, which, bad):
    """The same where a kernel stops the program -> (whether it ended well, what it said)."""
    if not EMULATED:
        code = f"import sys; sys.path.insert(0, 'tests'); import test_ops; test_ops.call_out_of_range({operator!r}, {which!r}, {bad}, 'cuda')"  # noqa: E501
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"CRYSTAL_OPS": "require"},
            capture_output=True,
            text=True,
        )
        return done.returncode == 0, done.stdout + done.stderr
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            os.dup2(said.fileno(), 2)
            call_out_of_range(operator, which, bad, "cpu")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return status == 0, said.read().decode()


@pytest.mark.parametrize("operator, which, bad", OUT_OF_RANGE)
@each_device
def test_positions_outside_the_sequence(operator, which, bad, place, compiled):
    """Row L of a head is row 0 of the next one, or lies behind the tensor: refused on a CPU, and a trap
    in a GPU's kernels.
    """
    if place.startswith("cpu"):
        with pytest.raises(RuntimeError, match=f"{which[:3]}.* {bad} is not in -1..8"):
            call_out_of_range(operator, which, bad, "cpu")
        return
    if not EMULATED and bad == -2:
        pytest.skip("a process each: 9 will do on a real GPU")
    fine, said = said_by_a_child(operator, which, bad)
    assert not fine and "a row or column is not in -1..L-1" in said


@pytest.mark.parametrize("place", versions("attn_slice"))
@each_sample(lambda sample: str(sample) == "attn_slice-several tiles")
def test_backward_through_zeros_reads_no_lse(index, place, device):
    """Where no row has a gradient through its normaliser there is no pass over L: an lse of NaN does no harm.
    """
    q, k, rows, cols = (x.to(device) for x in SAMPLES[index].make(f32))
    direct, none = (
        normal(*q.shape[:2], rows.shape[1], cols.shape[1], dtype=f32).to(device),
        torch.zeros(*q.shape[:2], rows.shape[1], device=device),
    )
    backward = functools.partial(torch.ops.crystal.attn_backward, q, k, rows, cols, 0.3, direct)
    for got, want in zip(
        backward(none, none / 0, None, None, True, True), backward(None, None, None, None, True, True)
    ):
        torch.testing.assert_close(got, want)
    one = none.index_fill(2, torch.tensor(3, device=device), 1.0)
    assert all(x.isnan().any() for x in backward(one, none / 0, None, None, True, True))


# --- attn_align ---

REFERENCE["attn_align"] = losses.attn_align


def aligned(kind, rows, cols, heads_kept="keep", equal=False, **options):
    """make(dtype) of attn_align's arguments: both paths' q, k, the rows and columns that they share."""

    def make(dtype):
        q, k, at, columns = heads(rows * 2, cols * 2, **options)(dtype)
        if equal:
            q, k = (torch.cat([x[: len(rows)]] * 2) for x in (q, k))
        return [kind, heads_kept, q, k, at[: len(rows)], columns[: len(rows)]]

    return make


for kind in ("kl", "frobenius", "mse"):
    SAMPLES += [
        Sample(
            "attn_align",
            f"{kind}, plain",
            aligned(kind, [[3, 5], [4, 6]], [[0, 2, 3], [1, 2, 4]]),
            opcheck=kind != "mse",
        ),
        Sample(
            "attn_align",
            f"{kind}, teacher detached",
            aligned(kind, [[3, 5], [4, 6]], [[0, 2, 3], [1, 2, 4]]),
            {"teacher_grad": False},
            gradcheck=False,
        ),
        Sample("attn_align", f"{kind}, one row, one column", aligned(kind, [[4]], [[2]], H=1, G=1)),
        Sample("attn_align", f"{kind}, no rows", aligned(kind, [[], []], [[1], [2]])),
        Sample("attn_align", f"{kind}, no columns", aligned(kind, [[1], [2]], [[], []])),
        Sample("attn_align", f"{kind}, hidden by causality", aligned(kind, [[1, 3, 8]], [[2, 4, 5]])),
        Sample(
            "attn_align",
            f"{kind}, ragged",
            aligned(kind, [[3, 5, -1], [-1, -1, -1], [8, 2, 7]], [[0, -1], [2, 3], [7, 1]], H=6, G=2),
        ),
        Sample("attn_align", f"{kind}, twice and unsorted", aligned(kind, [[5, 3, 5]], [[2, 0, 2]])),
        Sample(
            "attn_align",
            f"{kind}, not contiguous",
            aligned(kind, [[3, 5], [4, 6]], [[0, 2, 3], [1, 2, 4]], contiguous=False),
        ),
        Sample(
            "attn_align",
            f"{kind}, masks that differ",
            aligned(kind, [[3, 5, 8]], [[0, 2, 3, 5]]),
            masks(2, 3, 9),
        ),
        Sample(
            "attn_align",
            f"{kind}, several tiles",
            aligned(
                kind,
                [[200, 71, 72, 144, 3, 150, 201, 99]],
                [[70, 71, 72, 143, 144, 199]],
                H=6,
                G=2,
                L=203,
                d=17,
            ),
        ),
        Sample(
            "attn_align",
            f"{kind}, several chunks of rows",
            aligned(kind, [list(range(90, 170))], [[5, 80, 100]], H=3, G=1, L=170, d=8),
            {"scale": 0.2},
        ),
        Sample(
            "attn_align",
            f"{kind}, more columns than a tile",
            aligned(kind, [[99, 98, 60]], [list(range(95)) + [-1, 99, 3]], H=2, G=1, L=100, d=6),
        ),
        Sample(
            "attn_align",
            f"{kind}, scores of +-30",
            aligned(kind, [[40, 39, 38, 20]], [[30, 31, 5, 39]], L=41, d=16, scale=3.3),
        ),
        Sample(
            "attn_align",
            f"{kind}, equal paths",
            aligned(kind, [[3, 5, 80]], [[0, 2, 3]], equal=True, L=90),
            exact=(0,),
        ),
    ]
SAMPLES += [
    Sample(
        "attn_align", "kl, heads averaged", aligned("kl", [[3, 5], [4, -1]], [[0, 2, 3], [1, 2, -1]], "mean")
    ),
    Sample(
        "attn_align",
        "kl, heads averaged, teacher detached",
        aligned("kl", [[3, 5], [4, -1]], [[0, 2, 3], [1, 2, -1]], "mean"),
        {"teacher_grad": False},
        gradcheck=False,
    ),
]


def test_align_teacher_gets_nothing(compiled):
    for kind in ("kl", "frobenius", "mse"):
        args = aligned(kind, [[3, 5]], [[0, 2]])(f64)
        for grad in run(ops.attn_align, args, Sample("", "", None, {"teacher_grad": False}))[1]:
            assert not grad[0].any() and grad[1].any()


@pytest.mark.parametrize("kind", ["kl", "frobenius", "mse"])
def test_align_keeps_sums_alone(compiled, kind):
    """What backward keeps beyond q and k is of size M, however many columns there are."""
    args = aligned(kind, [list(range(100, 140))], [list(range(60))], L=140, d=8)(f32)
    q, k = args[2].requires_grad_(), args[3].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ops.attn_align(*args)
    own = [x for x in saved if x.data_ptr() not in (q.data_ptr(), k.data_ptr())]
    assert own and max(x.numel() for x in own) <= 2 * 4 * 40


@pytest.mark.parametrize("kind", ["frobenius", "mse"])
def test_align_with_lse_given(compiled, kind):
    kind, kept, q, k, rows, cols = args = aligned(kind, [[3, 5, -1]], [[0, 2, 3]])(f64)
    lse = attention.attn_lse(q, k, rows.repeat(2, 1))
    got, want = (run(ops.attn_align, args, Sample("", "", None, keywords)) for keywords in ({"lse": lse}, {}))
    within(got[0], want[0], want[0], 0, f64, "loss")
    within(got[1], want[1], want[1], 0, f64, "gradient")


def test_align_what_is_refused(compiled):
    args = aligned("kl", [[3, 5]], [[0, 2]])(f32)
    for kind, kept in (("mse", "mean"), ("l1", "keep")):
        with pytest.raises(ValueError, match="choose kl, frobenius or mse"):
            ops.attn_align(kind, kept, *args[2:])


# --- a training step ---


@pytest.mark.parametrize("checkpointing", [(), ("--checkpointing",)], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--attn_loss", "frobenius", "--attn_layers", "all"),
        ("--attn_loss", "mse", "--attn_columns", "all"),
        ("--attn_heads", "mean", "--teacher_grad"),
        ("--latent_copy", "hidden"),
    ],
    ids=lambda flags: "-".join(flags).replace("--", "") or "kl",
)
def test_training_step(compiled, setup, monkeypatch, flags, checkpointing):
    """A whole step of crystal with compiled operators equals the plain one: every term,
    every gradient, in float64.
    """

    def step(mode):
        monkeypatch.setenv("CRYSTAL_OPS", mode)
        forget_the_choice()
        s = setup("--lora_dropout", "0", *flags, *checkpointing)
        terms = s.objective(s.batch, 0.0)
        return terms, gradients(
            sum(value for name, value in terms.items() if name not in s.method.monitored), s.named
        )

    try:
        (got, got_grads), (want, want_grads) = step("require"), step("reference")
    finally:
        forget_the_choice()
    for a, b in ((got, want), (got_grads, want_grads)):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}"
            )


REACHED = [  # flags of a method -> what its forward and backward ask of the compiled operators, without the layers' repetition  # noqa: E501
    ((), {"vocab_kl_ce", "vocab_kl_ce_backward_", "attn_align", "attn_align_backward"}),
    (
        ("--attn_loss", "frobenius"),
        {"vocab_kl_ce", "vocab_kl_ce_backward_", "attn_align", "attn_align_backward"},
    ),
    (("--attn_heads", "mean"), {"vocab_kl_ce", "vocab_kl_ce_backward_", "attn_slice", "attn_backward"}),
    (("--method", "sft"), {"vocab_kl_ce", "vocab_kl_ce_backward"}),
]


@pytest.mark.parametrize(
    "flags, wanted",
    REACHED,
    ids=lambda x: "-".join(x).replace("--", "") or "crystal" if isinstance(x, tuple) else "",
)
def test_training_reaches_the_operators(compiled, setup, monkeypatch, flags, wanted):
    """A step asks the compiled operators for its losses, with CRYSTAL_OPS unset or at auto; with
    CRYSTAL_OPS=reference it asks for none.
    """
    s = setup(*flags, dtype=f32)
    for mode, expected in ((None, wanted), ("auto", wanted), ("reference", set())):
        monkeypatch.delenv("CRYSTAL_OPS") if mode is None else monkeypatch.setenv("CRYSTAL_OPS", mode)
        forget_the_choice()
        with Calls() as calls:
            terms = s.objective(s.batch, 0.0)
            torch.autograd.grad(
                sum(value for name, value in terms.items() if value.requires_grad),
                [p for _, p in s.named],
                allow_unused=True,
            )
        asked = {function.name().removeprefix("crystal::") for function, _ in calls.made}
        assert wanted <= asked if expected else not asked, mode
        monkeypatch.setenv("CRYSTAL_OPS", "auto")


# --- the checks of every sample (below the samples of all operators) ---


@each_sample_dtype_and_version()
def test_values_and_gradients(index, dtype, place, device):
    check_sample(index, dtype, device)


# What is asked for is settled before any vector is loaded, and float64 is compared with the
# reference to round-off: one width of vectors will do for combinations, and some samples of each
# operator for finite differences.


@each_device
@each_sample()
def test_combinations(index, place, device):
    check_combinations(index, device)


@pytest.mark.gradcheck
@each_device
@each_sample(lambda sample: sample.gradcheck and (sample.opcheck or "ragged" in sample.case))
def test_gradcheck(index, place, device):
    check_gradients(index, device)


@each_device
@each_sample(lambda sample: sample.opcheck)
def test_opcheck(index, place, device):
    check_registration(index, device)


# --- the choice ---


@pytest.fixture
def fresh(monkeypatch, capsys):
    """fresh(mode): the module as at its first import under CRYSTAL_OPS=mode."""

    def forget():
        forget_the_choice()
        ops._said.clear()

    def make(mode):
        monkeypatch.setenv("CRYSTAL_OPS", mode)
        forget()
        capsys.readouterr()

    yield make
    forget()


def test_choice_is_said_once(compiled, fresh, capsys):
    for mode, line in (
        ("auto", "operators: compiled for cpu"),
        ("require", "operators: compiled for cpu"),
        ("reference", "operators: plain PyTorch (CRYSTAL_OPS=reference)"),
    ):
        fresh(mode)
        z = normal(2, 5)
        for _ in range(2):
            ops.ce_rows(z, torch.tensor([0, 1]))
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(line) and said.err.count("\n") == 1
        assert ops.served("vocab_kl_ce", z) == (mode != "reference")
    fresh("auto")
    lines = []
    ops.announce(lines.append)  # a program that says it elsewhere
    ops.ce_rows(z, torch.tensor([0, 1]))
    assert len(lines) == 1 and capsys.readouterr().err == ""


def test_choice_without_the_extension(fresh, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "HERE", tmp_path)
    monkeypatch.setattr(ops, "_load", ops._load.__wrapped__)
    fresh("auto")
    torch.testing.assert_close(
        ops.ce_rows(normal(2, 5), torch.tensor([0, 1])), losses.ce_rows(normal(2, 5), torch.tensor([0, 1]))
    )
    assert "operators: plain PyTorch (crystal/_C.so is not built: make setup" in capsys.readouterr().err
    fresh("require")
    with pytest.raises(UserError, match="CRYSTAL_OPS=require, but crystal/_C.so is not built"):
        ops.ce_rows(normal(2, 5), torch.tensor([0, 1]))
    (tmp_path / "_C.so").write_bytes(b"not a library")
    fresh("auto")
    assert "cannot be loaded" in ops.choice()[2]
    fresh("best")
    with pytest.raises(UserError, match="CRYSTAL_OPS=best: choose auto, reference or require"):
        ops.choice()


def test_what_is_not_served(compiled, fresh, capsys):
    """Half precision on a CPU: plain PyTorch, said once; or an error where compiled operators are required.
    """
    z, t = normal(2, 5, dtype=f16), torch.tensor([0, 1])
    fresh("auto")
    for _ in range(2):
        assert torch.equal(ops.ce_rows(z, t), losses.ce_rows(z, t))
    assert capsys.readouterr().err.count("vocab_kl_ce is not compiled for float16 on cpu: plain PyTorch") == 1
    fresh("require")
    with pytest.raises(UserError, match="vocab_kl_ce is not compiled for float16 on cpu"):
        ops.ce_rows(z, t)


def test_a_gpu_that_the_build_does_not_fit(fresh, capsys, monkeypatch):
    """A first launch that fails, as on a GPU older than the build: plain PyTorch, said once; or an error."""
    launched = []

    def launch(device):
        launched.append(device)
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand more")

    monkeypatch.setattr(ops, "_launch", launch)
    monkeypatch.setattr(ops, "choice", cached(("auto", ("cpu", "cuda"), "operators: compiled")))
    fresh("auto")
    assert not ops._served("vocab_kl_ce", "cuda", f32) and not ops._served("attn_slice", "cuda", bf16)
    assert launched == ["cuda"]
    said = capsys.readouterr().err
    assert said.count("do not run on this GPU (CUDA error: no kernel image is available") == 2
    assert "and more" not in said and said.count(": plain PyTorch") == 2

    monkeypatch.setattr(ops, "choice", cached(("require", ("cpu", "cuda"), "operators: compiled")))
    fresh("require")
    with pytest.raises(UserError, match="CRYSTAL_OPS=require, but the compiled operators do not run on"):
        ops._served("vocab_kl_ce", "cuda", f32)


def cached(value):
    """A function of no arguments that returns `value`, with functools.cache's own methods."""
    return functools.cache(lambda: value)


def test_torch_compile_breaks_no_graph(compiled):
    """Each operator within one graph, with the values that it has outside."""
    t = torch.tensor([0, 1, 2])
    rows, cols = torch.tensor([[4, 6]]), torch.tensor([[1, 2, 3]])
    z, z2, q, q2 = normal(3, 7), normal(3, 7), normal(1, 4, 7, 8), normal(2, 4, 7, 8)
    k, k2 = normal(1, 2, 7, 8), normal(2, 2, 7, 8)
    calls = (
        lambda: sum(x.sum() for x in ops.vocab_kl_ce(z, z2, t, t, t >= 1)),
        lambda: ops.attn_slice(q, k, rows, cols).sum(),
        lambda: ops.attn_scores(q, k, rows, cols).sum(),
        lambda: ops.attn_align("kl", "keep", q2, k2, rows, cols).sum(),
    )
    for call in calls:
        torch._dynamo.reset()
        inside = torch.compile(call, backend="eager", fullgraph=True)()
        torch.testing.assert_close(inside, call())


def test_served_types(compiled):
    """On a CPU everything but half precision, on a GPU that too; on other devices nothing."""
    for name in ("vocab_kl_ce", "attn_slice", "attn_scores", "attn_align"):
        for device, types in (("cpu", {f64, f32, bf16}), ("cuda", {f64, f32, bf16, f16})):
            assert EMULATED or ops.SERVED[name][device] == types
        assert set(ops.SERVED[name]) == {"cpu", "cuda"}
    assert len(ops.SERVED) == 4


# --- the build ---

ROOT = Path(__file__).resolve().parents[1]


def build(tmp_path, **environment):
    """Builds into tmp_path from the objects that are there, as `python setup.py build_ext` -> the finished
    process. One at a time: they share build/csrc.
    """
    with open(Path(tempfile.gettempdir()) / f"crystal-build-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=900,
        )


def test_build_says_what_it_builds(tmp_path):
    for environment, code, line in (
        ({"CRYSTAL_CUDA": "yes"}, 1, "CRYSTAL_CUDA=yes: choose auto, 1 or 0"),
        ({"CRYSTAL_CUDA": "1", "NVCC": "no-such-nvcc"}, 1, "CRYSTAL_CUDA=1, but there is no nvcc"),
        ({"CRYSTAL_CUDA": "1", "CXX": "no-such-compiler"}, 1, "CRYSTAL_CUDA=1, but there is no"),
        (
            {"CRYSTAL_CUDA": "auto", "CXX": "no-such-compiler"},
            0,
            "no C++ compiler (g++, or CXX) found, compiled operators not built; plain PyTorch serves instead",
        ),
    ):
        done = build(tmp_path, **environment)
        assert (
            done.returncode == code
            and line in done.stdout + done.stderr
            and not (tmp_path / "crystal").exists()
        ), done.stdout + done.stderr
    if not shutil.which("g++"):
        pytest.skip("no compiler here")
    for environment, why in (
        ({"CRYSTAL_CUDA": "0"}, "CRYSTAL_CUDA=0"),
        ({"CRYSTAL_CUDA": "auto", "NVCC": "no-such-nvcc"}, "no nvcc found"),
    ):
        done = build(tmp_path, **environment)
        assert done.stdout == f"crystal: compiled operators ready for CPU; not for CUDA ({why})\n", (
            done.stdout + done.stderr
        )
        assert [p.name for p in (tmp_path / "crystal").iterdir()] == ["_C.so"]


FAKE_COMPILER = """#!{python}
import pathlib, sys
with open("{log}", "a") as log:
    log.write(" ".join(sys.argv) + "\\n")
out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
out.write_text("")
for at, argument in enumerate(sys.argv):
    if argument == "-MF":
        pathlib.Path(sys.argv[at + 1]).write_text(out.name + ":\\n")
"""


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "without ninja"])
@pytest.mark.parametrize("cuda", ["1", "0"])
def test_commands_of_the_build(tmp_path, cuda, ninja):
    """What is compiled, with which flags: by compilers that only write down what they are asked for."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    programs = {}
    for name in ("CXX", "NVCC"):
        programs[name] = str(tmp_path / name)
        Path(programs[name]).write_text(FAKE_COMPILER.format(python=sys.executable, log=tmp_path / "log"))
        Path(programs[name]).chmod(0o755)
    environment = (
        os.environ | programs | {"CRYSTAL_CUDA": cuda} | ({} if ninja else {"NINJA": "no-such-ninja"})
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    asked = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    compiled_ones = {words[words.index("-o") + 1]: words for words in asked if "-c" in words}
    widths = {
        "portable": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    }
    outputs = {f"build/csrc/{stem}.o": None for stem in ("attn_align", "attn_slice", "ops", "vocab_kl_ce")}
    outputs |= {
        f"build/csrc/{stem}_simd.{width}.o": width
        for stem in ("attn_align", "attn_slice", "vocab_kl_ce")
        for width in widths
    }
    gpu = {
        f"build/csrc/{stem}.o"
        for stem in (
            "attn_align.cu", "attn_frobenius.cu", "attn_slice.cu", "vocab_kl_ce.cu", "attn_align_cuda",
            "attn_slice_cuda", "vocab_kl_ce_cuda",
        )
    }
    assert set(compiled_ones) == set(outputs) | (gpu if cuda == "1" else set())
    for output, words in compiled_ones.items():
        assert {"-std=c++17", "-O3", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000"} <= set(words)
        if output in gpu:
            assert Path(words[1]).name == "NVCC" or Path(words[0]).name == "NVCC"
            codes = [word.removeprefix("arch=") for word in words if word.startswith("arch=")]
            assert codes == [
                "compute_80,code=sm_80", "compute_86,code=sm_86", "compute_90,code=sm_90",
                "compute_90,code=compute_90",
            ]
        else:
            assert {"-fPIC", "-fvisibility=hidden"} <= set(words)
            assert [word for word in words if word.startswith("-m")] == widths.get(outputs[output], [])
            assert [word for word in words if word.startswith("-DWIDTH")] == (
                [f"-DWIDTH={outputs[output]}"] if outputs[output] else []
            )

    linked = {
        words[words.index("-o") + 1]: {word for word in words if word.endswith(".o")}
        for words in asked
        if "-c" not in words
    }
    assert linked == {"out/crystal/_C.so": set(outputs)} | (
        {"out/crystal/_C_cuda.so": gpu} if cuda == "1" else {}
    )


def test_every_width_runs_its_own_kernels(compiled):
    """Vectors of another width add in another order, which the last bits of a row's sum show: as
    many sums as widths.
    """
    z, t = normal(16, 5000, scale=3.0, dtype=f32), torch.arange(16)
    found = []
    for place in ON_CPU:
        with at_place(place):
            sums = torch.ops.crystal.vocab_kl_ce(
                z, z[:0], t, torch.full_like(t, -1), torch.zeros(16, dtype=torch.bool), True, False
            )[3]  # [16,5]
        torch.testing.assert_close(
            sums[:, 1].log() + sums[:, 0], z.double().logsumexp(1), rtol=1e-6, atol=1e-6
        )
        found.append(sums[:, 1])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_cuda_kernels_compile_and_nothing_spills(tmp_path, request):
    """nvcc's report on every kernel and every GPU, from the build that is there (brought up to date
    where it is not).
    """
    if not any(
        map(
            shutil.which,
            [os.environ["NVCC"]] if "NVCC" in os.environ else ["nvcc", "/usr/local/cuda/bin/nvcc"],
        )
    ):
        skip_or_fail(request, "no nvcc here")
    # Whatever GPUs this machine is told to build for: every GPU's report is wanted.
    done = build(tmp_path, CRYSTAL_CUDA="1", TORCH_CUDA_ARCH_LIST="")
    assert done.returncode == 0 and "and CUDA (sm_80, sm_86, sm_90 and PTX)" in done.stdout, (
        done.stdout + done.stderr
    )
    sources = sorted(p.stem for p in (ROOT / "csrc").glob("*.cu"))
    assert sources
    for source in sources:
        report = (ROOT / "build" / "csrc" / f"{source}.cu.o.log").read_text()
        kernels = re.findall(
            r"Compiling entry function '(\w+)' for '(sm_\d+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",  # noqa: E501
            report,
        )
        assert {gpu for _, gpu, *_ in kernels} == {"sm_80", "sm_86", "sm_90"}, f"{source}.cu"
        assert len(kernels) == report.count("Compiling entry function"), (
            f"{source}.cu: a report that this test does not read"
        )
        for kernel, gpu, _, stores, loads in kernels:
            assert stores == loads == "0", f"{source}.cu: {kernel} spills {stores} + {loads} bytes on {gpu}"
    # The library needs nothing that a torch without CUDA lacks: it loads beside it too.
    assert (
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, torch; [torch.ops.load_library(p) for p in sys.argv[1:]]",
                *(str(tmp_path / "crystal" / f) for f in ("_C.so", "_C_cuda.so")),
            ],
            capture_output=True,
        ).returncode
        == 0
    )


ON_A_GPU = "test_values_and_gradients or attention_with_slice or reads_no_lse or outside_the_sequence or test_kernels"  # noqa: E501


def test_cuda_kernels_on_the_cpu(compiled, tmp_path):
    """The CUDA kernels' own source, compiled for the CPU and run there thread by thread: values and gradients
    of every sample, the boundaries of the pieces, what is trapped;
    and with PyTorch's attention for GPUs, by its formulas, beneath them."""
    if not shutil.which("g++"):
        pytest.skip("no g++ here")
    torch_at, sources = (
        Path(torch.__file__).parent,
        sorted([*(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc").glob("*_cuda.cpp")]),
    )
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-w",
        "-DCRYSTAL_ON_CPU",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-Icsrc",
        "-Itests",
        f"-I{torch_at}/include",
    ]
    objects = [str(tmp_path / f"{source.name}.o") for source in sources]
    compilers = [
        subprocess.Popen(["g++", *flags, "-c", "-x", "c++", str(source), "-o", output], cwd=ROOT)
        for source, output in zip(sources, objects)
    ]
    assert [c.wait() for c in compilers] == [0] * len(sources)
    library = tmp_path / "emulated.so"
    subprocess.run(
        ["g++", "-shared", *objects, "-o", library, f"-L{torch_at}/lib", "-ltorch_cpu"], check=True
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_ops.py",
            "tests/test_sliced_attention.py", "tests/test_kernels.py", "-k", ON_A_GPU,
        ],
        cwd=ROOT,
        env=os.environ | {"CRYSTAL_CUDA_ON_CPU": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_wide_vectors_on_a_narrow_cpu(compiled, tmp_path):
    """The AVX-512 copy of the CPU kernels, its vectors taken apart by the compiler, on every
    sample: values and gradients.
    """
    if torch.ops.crystal.vector_bits(0) == 512:
        pytest.skip("this CPU has 512-bit vectors: cpu-512 ran")
    if not shutil.which("g++"):
        pytest.skip("no g++ here")
    assert build(tmp_path, CRYSTAL_CUDA="0").returncode == 0
    torch_at, work = Path(torch.__file__).parent, ROOT / "build" / "csrc"
    sources = [*(ROOT / "csrc").glob("*_simd.cpp"), ROOT / "csrc" / "ops.cpp"]
    flags = [
        "-std=c++17",
        "-O1",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-fPIC",
        "-w",
        "-DWIDTH=avx512",
        "-DCRYSTAL_BYTES=64",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{torch_at}/include",
    ]
    compilers = [
        subprocess.Popen(
            ["g++", *flags, "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")], cwd=ROOT
        )
        for source in sources
    ]
    assert [c.wait() for c in compilers] == [0] * len(sources)
    replaced = {"ops.o"} | {f"{source.stem}.avx512.o" for source in sources}
    others = [
        str(x)
        for x in work.glob("*.o")
        if x.name not in replaced and ".cu." not in x.name and not x.name.endswith("_cuda.o")
    ]
    subprocess.run(
        [
            "g++",
            "-shared",
            *(str(tmp_path / f"{source.stem}.o") for source in sources),
            *others,
            "-o",
            tmp_path / "_C.so",
            f"-L{torch_at}/lib",
            "-ltorch_cpu",
        ],
        check=True,
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "tests/test_ops.py",
            "tests/test_kernels.py",
            "-k",
            "test_values_and_gradients or test_kernels",
        ],
        cwd=ROOT,
        env=os.environ | {"CRYSTAL_WIDE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
