"""The compiled operators at the boundaries of the pieces in which their kernels work, against formulas that
know nothing of crystal.

The kernels cut their work: a row of logits into parts of 16,384 and tiles of 512 to 2,048 (more with wider
vectors), attention into tiles of 72 keys and 224 rows on a CPU, of 64 or 32 on a GPU, heads into slices of 32
and 64 numbers, everything into vectors, and the whole among threads. A fault at a cut shows only in a sample
that reaches it: these have sizes just below, at and just above each cut, and the real vocabulary, with a
label on either side of every cut.

The right values are written out here in NumPy and float64, by the formulas of the papers and their
derivatives: softmax, cross entropy (p - onehot), KL, squared distance. Gradients from above differ
from row to row.
"""

import math
import zlib
from typing import NamedTuple

import numpy as np
import pytest
import torch
from places import EMULATED, ON_CPU, PLACES, at_place, compiled, each_place, versions  # noqa: F401

from crystal.runtime import ops

f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16

# How far a number may be from the exact one, relative to what it is summed from.
CLOSE = {f64: 2e-12, f32: 2e-5, bf16: 2e-5}
# And what rounding to the type of q, k or the logits adds to a gradient.
STORED = {f64: 0.0, f32: 0.0, bf16: 2.0**-8}


def random(*shape, seed, scale=1.0):
    """Numbers that the name `seed` fixes."""
    return scale * np.random.default_rng(zlib.crc32(str(seed).encode())).standard_normal(shape)


def leaf(x, dtype, device):
    return torch.from_numpy(x).to(device, dtype).requires_grad_()


def values(x):
    return x.detach().double().cpu().numpy()


def each_case(cases, operator):
    """Names of the cases, in the types and places in which each runs here. The emulator is slow: there the
    last version, in float64 and bfloat16.
    """
    chosen = []
    for name in cases:
        for place in versions(operator)[-1:] if EMULATED else versions(operator):
            for dtype in (f64, bf16) if EMULATED else (f64, f32, bf16):
                chosen.append(pytest.param(name, dtype, place, id=f"{name}-{str(dtype)[6:]}-{place}"))
    return pytest.mark.parametrize("name, dtype, place", chosen)


# --- logits ---

VOCABULARY = 152064  # Qwen2.5-VL's
PART = 16384  # logits of a row that are summed together: csrc/vocab_kl_ce.cpp

VOCABULARIES = {  # pairs of vectors hold 4 to 32 logits; a tile 512, 1,024 or 2,048
    "pairs of vectors": [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33],
    "tiles": [511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049],
    "parts": [PART - 1, PART, PART + 1, 2 * PART - 1, 2 * PART, 2 * PART + 1],
    "real": [VOCABULARY],
}
CUTS = [8, 16, 32, 512, 1024, 2048]


def labels_of(V):
    """The first logit and the last one, and those on either side of every cut -> (where pieces
    begin, where they end).
    """
    cuts = [cut for cut in [*CUTS, *range(PART, V, PART)] if cut < V]
    if V > 3 * PART:
        cuts = [cut for cut in cuts if cut % PART == 0]  # the small ones have vocabularies of their own
    return [0, *cuts], [*(cut - 1 for cut in cuts), V - 1]


def log_softmax(z):
    top = z.max()
    return z - top - math.log(np.exp(z - top).sum())


class Terms(NamedTuple):
    """What the formulas say of one position: losses, gradients of both paths' logits [V], and what
    those are summed from.
    """

    ce_int: float
    ce_cor: float
    kl: float
    d_int: np.ndarray
    d_cor: np.ndarray
    size: np.ndarray


def position_by_hand(z, z2, t, t2, answer, g, teacher_grad):
    """Cross entropies and KL(p || q), and their derivatives: g_int (p - y) + g_kl p (log p - log q - KL),
    g_cor (q - y') + g_kl (q - p).
    """
    log_p, log_q = log_softmax(z), log_softmax(z2)
    p, q = np.exp(log_p), np.exp(log_q)
    KL = float((p * (log_p - log_q)).sum())
    g_int, g_cor, g_kl = g[0] * (t >= 0), g[1] * (t2 >= 0), g[2] * answer

    d_int, d_cor = g_int * p, g_cor * q + g_kl * (q - p)
    if teacher_grad:
        d_int += g_kl * p * (log_p - log_q - KL)
    if t >= 0:
        d_int[t] -= g_int
    if t2 >= 0:
        d_cor[t2] -= g_cor
    size = (abs(g_int) + abs(g_cor) + abs(g_kl)) * (p + q)
    return Terms(-log_p[t] if t >= 0 else 0, -log_q[t2] if t2 >= 0 else 0, KL * answer, d_int, d_cor, size)


def check_vocabulary(V, dtype, device, joint, teacher_grad, most=None):
    first, last = labels_of(V)
    if most:  # few rows, for where they are slow
        first, last = first[-most:], last[-most:]
    N = len(first) + 3
    t = np.array([*first, -1, -100, last[0]])
    t2 = np.array([*last, first[-1], -1, -7])
    answer = np.arange(N) % 3 != 1
    answer[-2] = True  # it has no label at all

    # Rows that rise and rows that fall: the largest logit lies in the last piece, in the
    # first one, or anywhere.
    slope = np.linspace(-1, 1, V)[None] * (np.arange(N)[:, None] % 3 - 1) * 9
    z = leaf(random(N, V, seed=("z", V), scale=2) + slope, dtype, device)
    z2 = leaf(random(N, V, seed=("z2", V), scale=2) - slope / 2, dtype, device)
    g = [
        torch.from_numpy(random(N, seed=(name, V))).to(device, torch.promote_types(dtype, f32))
        for name in ("int", "cor", "kl")
    ]

    in_int, in_cor = (torch.from_numpy((x >= 0) | answer).to(device) for x in (t, t2))
    targets = [torch.from_numpy(x).to(device) for x in (t, t2, answer)]
    rows = [z[in_int], z2[in_cor]]
    logits = [torch.cat(rows), None] if joint else rows
    got = ops.vocab_kl_ce(*logits, *targets, teacher_grad=teacher_grad)
    torch.autograd.backward(got, g)

    losses, above = np.array([values(x) for x in got]), np.array([values(x) for x in g])
    for n in range(N):
        z_n, z2_n, d_n, d2_n = (values(x[n]) for x in (z, z2, z.grad, z2.grad))
        want = position_by_hand(z_n, z2_n, t[n], t2[n], answer[n], above[:, n], teacher_grad)
        where = f"V {V}, labels {t[n]} and {t2[n]}"
        np.testing.assert_allclose(
            losses[:, n], want[:3], rtol=CLOSE[dtype], atol=CLOSE[dtype], err_msg=where
        )
        for mine, right in ((d_n, want.d_int), (d2_n, want.d_cor)):
            error = abs(mine - right) - STORED[dtype] * abs(right)
            assert (error <= CLOSE[dtype] * (abs(right) + want.size)).all(), (
                f"{where}: a gradient is off by {error.max():.1e} at {error.argmax()}"
            )


@each_case(VOCABULARIES, "vocab_kl_ce")
def test_vocabulary(name, dtype, place, compiled):
    """Losses and both gradients, with a label at the first and at the last logit of every piece."""
    with at_place(place, "vocab_kl_ce") as device:
        for i, V in enumerate(VOCABULARIES[name]):
            check_vocabulary(
                V, dtype, device, joint=i % 2 == 0, teacher_grad=i % 3 != 1, most=3 if EMULATED else None
            )


@each_place
def test_many_positions(place, compiled):
    """More positions than a GPU's block has threads, in which rows are given their places."""
    N, V = 1031, 12
    t = np.arange(N) * 7 % (V + 3) - 3
    t2 = np.arange(N) * 5 % (V + 2) - 2
    answer = np.arange(N) % 5 == 0
    in_int, in_cor = (t >= 0) | answer, (t2 >= 0) | answer
    z, z2 = random(N, V, seed="many", scale=2), random(N, V, seed="many, corrupted", scale=2)
    with at_place(place, "vocab_kl_ce") as device:
        logits = torch.from_numpy(np.concatenate([z[in_int], z2[in_cor]])).to(device)
        got = ops.vocab_kl_ce(logits, None, *(torch.from_numpy(x).to(device) for x in (t, t2, answer)))
    for n, mine in enumerate(zip(*map(values, got), strict=True)):
        want = position_by_hand(z[n], z2[n], t[n], t2[n], answer[n], np.ones(3), True)
        np.testing.assert_allclose(mine, want[:3], rtol=1e-12, atol=1e-12)


# --- attention ---


class Shape(NamedTuple):
    """B sequences, H query heads on G key heads of d numbers, L positions, M rows, K columns."""

    L: int
    M: int
    K: int
    d: int = 8
    H: int = 2
    G: int = 1
    B: int = 1


KEYS, ROWS = 72, 224  # a tile on a CPU: csrc/attn_tile.h
SHAPES = {
    "keys": [Shape(L, 4, 5) for L in (KEYS - 1, KEYS, KEYS + 1, 2 * KEYS, 2 * KEYS + 1, 63, 64, 65, 32, 33)],
    "rows": [
        Shape(231, M, 3, H=H)
        for M, H in ((5, 1), (6, 1), (7, 1), (12, 1), (13, 1), (32, 7), (33, 7), (223, 1), (225, 1), (225, 2))
    ],
    "columns": [Shape(150, 3, K) for K in (KEYS - 1, KEYS, KEYS + 1, 2 * KEYS + 1)],
    "head sizes": [Shape(75, 4, 4, d, H=14, G=2) for d in (64, 80, 96, 128, 256)],
    "odd head sizes": [Shape(75, 3, 3, d, H=3, B=2) for d in (1, 3, 15, 16, 17, 31, 33, 63, 65, 129)],
    "masked": [Shape(KEYS + 1, 6, 4, 8, H=4, G=2, B=2), Shape(2 * KEYS + 1, 33, 7, 8, H=7)],
}


if EMULATED:  # slow, and its tiles are of 64 and 32 rows
    SHAPES["rows"] = [shape for shape in SHAPES["rows"] if shape.M < 200]


class Inputs(NamedTuple):
    q: np.ndarray  # [B,H,L,d]
    k: np.ndarray  # [B,G,L,d]
    rows: np.ndarray  # [B,M]; the last position and the ends of tiles among them, -1 pads
    cols: np.ndarray  # [B,K]
    bias: np.ndarray | None  # [B,1,M,L]
    padding: np.ndarray | None  # [B,L]


def inputs(shape, masked, paths=1):
    B, seed = shape.B * paths, str(shape)
    q = random(B, shape.H, shape.L, shape.d, seed=("q", seed), scale=1.5)
    k = random(B, shape.G, shape.L, shape.d, seed=("k", seed), scale=1.5)

    choose = np.random.default_rng(zlib.crc32(seed.encode()))
    rows = positions(choose, shape.B, shape.M, shape.L, [shape.L - 1])  # a row that sees everything
    # And a column that every row sees.
    cols = positions(choose, shape.B, shape.K, shape.L, [0, min(KEYS, shape.L - 1)])
    if shape.B > 1:
        rows[0, 1] = cols[1, -1] = -1

    bias = padding = None
    if masked:
        bias = random(B, 1, shape.M, shape.L, seed=("bias", seed))
        bias[bias > 1.5] = -np.inf
        bias[0, 0, 2] = -np.inf  # a row that sees nothing
        padding = choose.random((B, shape.L)) < 0.2
    return Inputs(q, k, np.tile(rows, (paths, 1)), np.tile(cols, (paths, 1)), bias, padding)


def positions(choose, B, n, L, first):
    """[B,n], `first` at the front, the others drawn: all different, in no order."""
    drawn = []
    for _ in range(B):
        others = [place for place in choose.permutation(L) if place not in first]
        drawn.append([*first, *others][:n])
    return np.array(drawn)


def scores_by_hand(x, scale):
    """[B,H,M,L], -inf where a row does not see a key."""
    (B, H, L, d), G = x.q.shape, x.k.shape[1]
    S = np.full((B, H, x.rows.shape[1], L), -np.inf)
    for b in range(B):
        for h in range(H):
            for m, row in enumerate(x.rows[b]):
                seen = np.arange(L) <= row
                if x.padding is not None:
                    seen &= ~x.padding[b]
                products = scale * (x.k[b, h // (H // G)] @ x.q[b, h, row])
                if x.bias is not None:
                    products = products + x.bias[b, 0, m]
                S[b, h, m, seen] = products[seen]
    return S


def normalised(S):
    """softmax over the last axis, all zeros where there is nothing but -inf."""
    top = S.max(-1, keepdims=True)
    e = np.exp(S - np.where(np.isinf(top), 0, top))
    total = e.sum(-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def at_columns(S, cols, hidden):
    """The cells [B,H,M,K] of [B,H,M,L]; `hidden` at padded columns."""
    out = np.full((*S.shape[:3], cols.shape[1]), float(hidden))
    for b in range(len(S)):
        for c, column in enumerate(cols[b]):
            if column >= 0:
                out[b, :, :, c] = S[b, :, :, column]
    return out


def to_keys(cells, cols, L):
    """Cells [B,H,M,K] added up at their keys [B,H,M,L]."""
    out = np.zeros((*cells.shape[:3], L))
    for b in range(len(cells)):
        for c, column in enumerate(cols[b]):
            if column >= 0:
                out[b, :, :, column] += cells[b, :, :, c]
    return out


def gradients_by_hand(x, dS, scale):
    """dq, dk of the scores' gradient dS [B,H,M,L], and what each number of them is summed from."""
    dq, dk, size_q, size_k = (np.zeros_like(y) for y in (x.q, x.k, x.q, x.k))
    group = x.q.shape[1] // x.k.shape[1]
    for b in range(len(x.q)):
        for h in range(x.q.shape[1]):
            for m, row in enumerate(x.rows[b]):
                if row < 0:
                    continue
                dq[b, h, row] += scale * dS[b, h, m] @ x.k[b, h // group]
                size_q[b, h, row] += scale * abs(dS[b, h, m]) @ abs(x.k[b, h // group])
                dk[b, h // group] += scale * np.outer(dS[b, h, m], x.q[b, h, row])
                size_k[b, h // group] += scale * np.outer(abs(dS[b, h, m]), abs(x.q[b, h, row]))
    return dq, dk, size_q, size_k


def through_softmax(P, cells, cols):
    """The scores' gradient of weights P [B,H,M,L] whose cells [B,H,M,K] have the gradient `cells`."""
    direct = to_keys(cells, cols, P.shape[-1]) * P
    return direct - P * direct.sum(-1, keepdims=True)


def rounded_to(x, dtype):
    """The inputs as a tensor of that type holds them."""
    cut = lambda y: values(torch.from_numpy(y).to(dtype))
    return x._replace(q=cut(x.q), k=cut(x.k))


def compare(what, got, right, dtype, size):
    error = abs(values(got) - right) - STORED[dtype] * abs(right)
    allowed = CLOSE[dtype] * (size + 1)
    assert (error <= allowed).all(), f"{what}: off by {error.max():.1e} where {allowed.min():.1e} is allowed"


def on(device, dtype, x):
    """q, k, rows, cols as tensors, and the keywords bias and key_padding where there are any."""
    keywords = {}
    if x.bias is not None:
        keywords = {
            "bias": torch.from_numpy(x.bias).to(device),
            "key_padding": torch.from_numpy(x.padding).to(device),
        }
    return [
        leaf(x.q, dtype, device),
        leaf(x.k, dtype, device),
        *(torch.from_numpy(y).to(device) for y in (x.rows, x.cols)),
    ], keywords


def above_like(x, dtype, device, seed):
    """A gradient from above, different everywhere -> (as a tensor, as numbers)."""
    g = torch.from_numpy(random(*x.shape, seed=seed)).to(device, torch.promote_types(dtype, f32))
    return g, values(g)


def check_slice(shape, dtype, device, masked, scale):
    """attn_slice: weights over all keys that a row sees."""
    x = rounded_to(inputs(shape, masked), dtype)
    args, keywords = on(device, dtype, x)
    A = ops.attn_slice(*args, scale=scale, **keywords)
    g, above = above_like(A, dtype, device, ("slice", shape))
    A.backward(g)

    P = normalised(scores_by_hand(x, scale))
    compare(f"weights, {shape}", A, at_columns(P, x.cols, 0), dtype, 0)
    dq, dk, size_q, size_k = gradients_by_hand(x, through_softmax(P, above, x.cols), scale)
    compare(f"dq, {shape}", args[0].grad, dq, dtype, size_q)
    compare(f"dk, {shape}", args[1].grad, dk, dtype, size_k)


def check_scores(shape, dtype, device, masked, scale):
    """attn_scores: products alone."""
    x = rounded_to(inputs(shape, masked), dtype)
    args, keywords = on(device, dtype, x)
    S = ops.attn_scores(*args, scale=scale, **keywords)
    g, above = above_like(S, dtype, device, ("scores", shape))
    S.backward(g)

    right = at_columns(scores_by_hand(x, scale), x.cols, -np.inf)
    assert np.array_equal(np.isinf(values(S)), np.isinf(right))
    compare(
        f"scores, {shape}",
        S.detach().nan_to_num(neginf=0.0),
        np.where(np.isinf(right), 0, right),
        dtype,
        abs(np.where(np.isinf(right), 0, right)) + shape.d,
    )
    dS = to_keys(np.where(np.isinf(right), 0, above), x.cols, shape.L)
    dq, dk, size_q, size_k = gradients_by_hand(x, dS, scale)
    compare(f"dq, {shape}", args[0].grad, dq, dtype, size_q)
    compare(f"dk, {shape}", args[1].grad, dk, dtype, size_k)


def kl_by_hand(S, S2, rows):
    """Mean over heads and rows of KL(p || q) over the columns that both paths see ->
    (losses [B], dLoss/dS, dLoss/dS2).
    """
    hidden = np.isinf(S) | np.isinf(S2)
    p, q = (normalised(np.where(hidden, -np.inf, x)) for x in (S, S2))
    log_ratio = np.where(hidden, 0, np.log(np.where(hidden, 1, p)) - np.log(np.where(hidden, 1, q)))
    KL = (p * log_ratio).sum(-1)  # [B,H,M]
    counted = (rows >= 0)[:, None, :]
    share = counted / np.maximum(1, S.shape[1] * (rows >= 0).sum(1))[:, None, None]
    return (
        (KL * share).sum((1, 2)),
        share[..., None] * p * (log_ratio - KL[..., None]),
        share[..., None] * (q - p),
    )


def check_align(kind, shape, dtype, device, masked, scale, teacher_grad):
    """attn_align: the KL, the squared distance, or its mean over the cells, of two paths."""
    x = rounded_to(inputs(shape, masked, paths=2), dtype)
    args, keywords = on(device, dtype, x)
    B, rows, cols = shape.B, x.rows[: shape.B], x.cols[: shape.B]
    loss = ops.attn_align(
        kind, "keep", *args[:2], args[2][:B], args[3][:B], scale=scale, teacher_grad=teacher_grad, **keywords
    )
    g, above = above_like(loss, dtype, device, (kind, shape))
    loss.backward(g)

    S = scores_by_hand(x, scale)
    if kind == "kl":
        cells = at_columns(S, x.cols, -np.inf)
        right, d_int, d_cor = kl_by_hand(cells[:B], cells[B:], rows)
        size = 1 + abs(np.where(np.isinf(cells), 0, cells)).max()
        dS = to_keys(np.concatenate([d_int, d_cor]) * np.tile(above, 2)[:, None, None, None], x.cols, shape.L)
    else:
        P = normalised(S)
        A = at_columns(P, x.cols, 0)
        apart = A[:B] - A[B:]
        share = np.ones(B)
        if kind == "mse":
            share = 1 / np.maximum(1, shape.H * (rows >= 0).sum(1) * (cols >= 0).sum(1))
        right, size = share * (apart**2).sum((1, 2, 3)), share * (apart**2).sum((1, 2, 3))
        up = (2 * apart) * (share * above)[:, None, None, None]
        dS = through_softmax(P, np.concatenate([up, -up]), x.cols)
    compare(f"{kind}, {shape}", loss, right, dtype, size)

    if not teacher_grad:
        dS[:B] = 0
    dq, dk, size_q, size_k = gradients_by_hand(x, dS, scale)
    compare(f"{kind} dq, {shape}", args[0].grad, dq, dtype, size_q)
    compare(f"{kind} dk, {shape}", args[1].grad, dk, dtype, size_k)


@each_case(SHAPES, "attn_slice")
def test_slice(name, dtype, place, compiled):
    with at_place(place, "attn_slice") as device:
        for shape in SHAPES[name]:
            check_slice(shape, dtype, device, name == "masked", scale=0.31)


@each_case(SHAPES, "attn_scores")
def test_scores(name, dtype, place, compiled):
    with at_place(place, "attn_scores") as device:
        for shape in SHAPES[name]:
            check_scores(shape, dtype, device, name == "masked", scale=0.31)


@pytest.mark.parametrize(
    "kind", ["kl", "frobenius"] if EMULATED else ["kl", "frobenius", "mse"]
)  # mse is frobenius, divided in Python
@each_case(SHAPES, "attn_align")
def test_align(name, dtype, place, kind, compiled):
    with at_place(place, "attn_align") as device:
        for i, shape in enumerate(SHAPES[name]):
            check_align(kind, shape, dtype, device, name == "masked", 0.31, teacher_grad=i % 3 != 1)


def test_default_scale(compiled):
    """Without a scale it is one over the root of the head size."""
    x = inputs(Shape(9, 3, 2, d=16), False)
    right = at_columns(scores_by_hand(x, 0.25), x.cols, -np.inf)
    args, _ = on("cpu", f64, x)
    np.testing.assert_allclose(values(ops.attn_scores(*args)), right, atol=1e-12)
    np.testing.assert_allclose(
        values(ops.attn_slice(*args)), at_columns(normalised(scores_by_hand(x, 0.25)), x.cols, 0), atol=1e-12
    )


# --- threads ---


@pytest.fixture
def threads():
    """threads(n) sets how many PyTorch has, for as long as the test lasts."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not ON_CPU, reason="a CPU's kernels are not tested here")
@pytest.mark.parametrize("count", [2, 3, 5])
def test_threads(count, threads, compiled):
    """Few sequences and many threads: the keys of one are shared among them, and the parts of
    a row of logits.
    """
    threads(count)
    shape = Shape(4 * KEYS + 5, 9, 6, H=2)
    with at_place(ON_CPU[-1]) as device:
        check_slice(shape, f64, device, True, 0.3)
        check_slice(shape._replace(B=2), f64, device, False, 0.3)
        check_scores(shape, f64, device, True, 0.3)
        for kind in ("kl", "frobenius"):
            check_align(kind, shape, f64, device, True, 0.3, True)
            check_align(kind, shape, f64, device, False, 0.3, False)
        check_vocabulary(2 * PART + 1, f64, device, True, True)


@pytest.mark.skipif(not ON_CPU, reason="a CPU's kernels are not tested here")
def test_results_do_not_depend_on_threads(threads, compiled):
    """Logits: to the bit, whatever the number of threads (csrc/vocab_kl_ce.cpp cuts rows
    without asking for it).
    """
    z = torch.from_numpy(random(4, 3 * PART + 5, seed="threads", scale=3)).float().requires_grad_()
    t, answer = torch.tensor([0, PART]), torch.tensor([True, True])
    found = []
    for count in (1, 4):
        threads(count)
        terms = ops.vocab_kl_ce(z, None, t, t + 7, answer)
        found.append([*terms, *torch.autograd.grad(sum(x.sum() for x in terms), z)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
