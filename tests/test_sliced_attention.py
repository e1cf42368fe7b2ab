"""sliced_attention.py against its plain reference: values, gradients, and that no pass over L is added."""

import functools

import pytest
import torch
from places import EMULATED, ONE_WIDTH, compiled, dtypes, each_device  # noqa: F401
from test_ops import (
    ATTENTION,
    INF,
    Calls,
    Sample,
    bf16,
    device,  # noqa: F401
    f32,
    f64,
    heads,
    name_of,
    normal,
    run,
    wide,
    within,
)

from crystal import attention
from crystal.runtime import sliced_attention

ON_GPU = sliced_attention._OnGPU


def with_value(make, pad=1):
    """make(dtype) with v after q and k; pad: heads are padded to a multiple of it."""

    def made(dtype):
        q, k, rows, cols = make(dtype)
        if q.shape[3] % pad:
            q, k = (torch.nn.functional.pad(x, (0, -q.shape[3] % pad)) for x in (q, k))
        return [q, k, normal(*k.shape, seed=9, dtype=dtype), rows, cols]

    return made


def square_mask(B, L, kind):
    """Causal [B,1,L,L] with blocked cells, one row of the first sequence blocked wholly: bool, or
    float with values between.
    """
    b = normal(B, 1, L, L, seed=5)
    blocked = (b > 1.2) | torch.ones(L, L, dtype=torch.bool).triu(1)
    blocked[0, 0, 4] = True
    return ~blocked if kind == "bool" else b.masked_fill(blocked, -INF)


WITH_SLICE = (
    [
        (f"{case}{', eights' * (pad > 1)}", with_value(make, pad), {})
        for pad in (1, 8)
        for case, make, keywords, _ in ATTENTION
        if not keywords
    ]
    + [
        (
            f"{kind} mask",
            with_value(heads([[3, 4, 8, -1], [8, 7, 4, 0]], [[0, 2, 3], [0, 7, 8]])),
            {"mask": square_mask(2, 9, kind)},
        )
        for kind in ("bool", "float")
    ]
    + [
        ("own scale given", with_value(heads([[3, 5]], [[0, 2]], d=8)), {"scale": 0.3}),
        (
            "eights, not contiguous",
            with_value(heads([[3, 5], [4, 6]], [[0, 2, 3], [1, 2, 4]], d=8, contiguous=False)),
            {},
        ),
    ]
)


def flash(q, k, v, dropout, causal, *_, scale):
    """aten._scaled_dot_product_flash_attention by its formulas, for a CPU."""
    assert causal and not dropout and q.shape[3] % 8 == 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    S = (scale * q.to(wide(q.dtype)) @ k.to(wide(q.dtype)).mT).masked_fill(
        torch.ones(2 * q.shape[2:3], dtype=torch.bool).triu(1), -INF
    )
    lse, L, nothing = S.logsumexp(-1), q.shape[2], torch.zeros((), dtype=torch.uint64)
    return (S - lse[..., None]).exp().to(q.dtype) @ v, lse, None, None, L, L, nothing, nothing, q.new_empty(0)


def flash_backward(d_out, q, k, v, out, lse, cum_q, cum_k, L_q, L_k, dropout, causal, seed, offset, *, scale):
    """aten._scaled_dot_product_flash_attention_backward likewise: of `out` it takes rowsum(dO
    O) and nothing else.
    """
    assert causal and not dropout and cum_q is cum_k is None and L_q == L_k == q.shape[2]
    G, C = k.shape[1], wide(q.dtype)
    keys, values = (x.repeat_interleave(q.shape[1] // G, 1).to(C) for x in (k, v))
    S = (scale * q.to(C) @ keys.mT).masked_fill(torch.ones(L_q, L_q, dtype=torch.bool).triu(1), -INF)
    P = (S - lse[..., None]).exp()
    dS = P * (d_out.to(C) @ values.mT - (d_out.to(C) * out.to(C)).sum(-1, keepdim=True))
    shared = lambda x: x.unflatten(1, (G, -1)).sum(2)
    return (
        (scale * dS @ keys).to(q.dtype),
        shared(scale * dS.mT @ q.to(C)).to(k.dtype),
        shared(P.mT @ d_out.to(C)).to(v.dtype),
    )


@pytest.fixture
def at(request, monkeypatch):
    """The device of `place`. Where the GPU's kernels are emulated, its attention is too: flash attention for
    half precision and no mask, and,
    which no GPU has, for float64, in which the identity is exact."""
    device = request.getfixturevalue("device")
    if not EMULATED:
        yield device
        return
    aten = torch.library.Library("aten", "IMPL")
    aten.impl("_scaled_dot_product_flash_attention", flash, "CPU")
    aten.impl("_scaled_dot_product_flash_attention_backward", flash_backward, "CPU")
    monkeypatch.setattr(
        sliced_attention,
        "_fused",
        lambda q, k, v, mask: ON_GPU if mask is None and q.shape[3] % 8 == 0 and q.dtype != f32 else None,
    )
    yield device
    aten._destroy()


def with_slice_cases(gpu_alone=("eights",)):
    """(case, place) of each case that says something there: heads padded to a multiple of 8 are
    for a GPU's attention.
    """
    return [
        (case, place)
        for case in WITH_SLICE
        for place in ONE_WIDTH
        if not (place.startswith("cpu") and any(word in case[0] for word in gpu_alone))
    ]


def each_with_slice_and_dtype():
    chosen = []
    for case, place in with_slice_cases():
        chosen += [
            pytest.param(case, place, dtype, id=f"{case[0]}-{place}-{name_of(dtype)}")
            for dtype in dtypes("attn_slice", place)
        ]
    return pytest.mark.parametrize("case, place, dtype", chosen)


def each_dtype_and_device():
    chosen = [
        pytest.param(place, dtype, id=f"{place}-{name_of(dtype)}")
        for place in ONE_WIDTH
        for dtype in dtypes("attn_slice", place)
    ]
    return pytest.mark.parametrize("place, dtype", chosen)


@each_with_slice_and_dtype()
def test_attention_with_slice(case, place, at, dtype):
    """Values and gradients, of both outputs and of each alone; in float64 every
    combination of wanted gradients.
    """
    _, make, keywords = case
    sample, args = Sample("", "", None, keywords), make(dtype)
    for used in (None, [0], [1]):
        for wanted in [None, (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)] if dtype == f64 else [None]:
            if (used, wanted) == ([1], (2,)):
                continue  # the slice does not hang on the values
            got = run(sliced_attention.attention_with_slice, args, sample, at, wanted=wanted, used=used)
            plain = run(attention.attention_with_slice, args, sample, wanted=wanted, used=used)
            exact = (
                plain
                if dtype == f64
                else run(attention.attention_with_slice, args, sample, dtype=f64, wanted=wanted, used=used)
            )
            within(got[0], plain[0], exact[0], 2, dtype, f"used {used} wanted {wanted} output")
            within(got[1], plain[1], exact[1], 3, dtype, f"used {used} wanted {wanted} gradient")


GRADCHECKED = ("plain", "ragged", "float mask", "plain, eights")  # values and gradients hold the others


@pytest.mark.gradcheck
@pytest.mark.parametrize(
    "case, place",
    [
        pytest.param(case, place, id=f"{case[0]}-{place}")
        for case, place in with_slice_cases()
        if case[0] in GRADCHECKED
    ],
)
def test_attention_with_slice_gradcheck(case, place, at):
    _, make, keywords = case
    args = [x.to(at).requires_grad_(x.is_floating_point()) for x in make(f64)]
    torch.autograd.gradcheck(
        functools.partial(
            sliced_attention.attention_with_slice,
            **{n: x.to(at) if isinstance(x, torch.Tensor) else x for n, x in keywords.items()},
        ),
        args,
        fast_mode=True,
    )


@each_dtype_and_device()
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-17, 1e-12, 1e-6, 1e-3], ids=str)
def test_attention_with_slice_where_nothing_reads_the_output(size, place, at, dtype):
    """Rows whose output has no gradient, or next to none, still get the slice's through the normaliser."""
    args = with_value(heads([[3, 5, 8, 8], [4, 6, -1, 0]], [[0, 2, 3], [1, 2, 4]], d=8))(dtype)
    factor = torch.ones(2, 1, 9, 1, dtype=dtype)
    factor[:, :, [3, 8, 0]] = size

    def gradients_of(f, args, device="cpu"):
        leaves = [x.to(device, copy=True).requires_grad_(x.is_floating_point()) for x in args]
        out, A = f(*leaves)
        above = [normal(*x.shape, seed=i).to(x.dtype) for i, x in enumerate((out, A))]
        above = [x.to(device) for x in (above[0] * factor.to(out.dtype), above[1])]
        return [x.cpu().double() for x in torch.autograd.grad([out, A], leaves[:3], above)]

    got, plain, exact = (
        gradients_of(sliced_attention.attention_with_slice, args, at),
        gradients_of(attention.attention_with_slice, args),
        gradients_of(
            attention.attention_with_slice, [x.double() if x.is_floating_point() else x for x in args]
        ),
    )
    within(got, plain, exact, 3, dtype, "gradient")


@each_device
@pytest.mark.parametrize("dtype", [f32, bf16], ids=name_of)
def test_attention_with_slice_is_folded(place, at, dtype):
    """Where every chosen row's output is read, backward asks attn_backward_ for the chosen cells alone."""
    args = [
        x.to(at).requires_grad_(x.is_floating_point())
        for x in with_value(heads([[3, 5]], [[0, 2]], d=8))(dtype)
    ]
    with Calls() as calls:
        out, A = sliced_attention.attention_with_slice(*args)
        (out.square().sum() + A.square().sum()).backward()
        out, A = sliced_attention.attention_with_slice(*args)
        (out[:, :, :5].square().sum() + A.square().sum()).backward()
    made = [made[8].cpu() for function, made in calls.made if "attn_backward_" in function.name()]
    # No attention that hands out its log sum exp serves it there.
    if dtype == f32 and (EMULATED or at.type == "cuda"):
        assert not made
        return
    assert not made[0].any() and made[1][:, :, 1].all() and not made[1][:, :, 0].any()


def test_attention_with_slice_of_a_gpu_fits_its_schema(compiled):
    """Shapes, types and one device, forward and backward, on tensors without numbers."""
    q, k, v = (torch.empty(2, h, 9, 8, device="meta", dtype=bf16, requires_grad=True) for h in (4, 2, 2))
    rows, cols = (torch.zeros(2, n, dtype=torch.int64, device="meta") for n in (3, 2))
    out, A = sliced_attention._AttentionWithSlice.apply(q, k, v, rows, cols, 0.3, None, ON_GPU)
    assert (out.shape, out.dtype, A.shape, A.dtype) == (q.shape, bf16, (2, 4, 3, 2), f32)
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum() + A.sum(), (q, k, v)), strict=True):
        assert (grad.shape, grad.dtype, grad.device.type) == (x.shape, bf16, "meta")
