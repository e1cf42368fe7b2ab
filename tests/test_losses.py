"""losses.py against loops in float64, and at the edges: no rows, hidden cells, equal paths,
large logits, half inputs.
"""

import math
from fractions import Fraction

import pytest
import torch

from crystal.losses import (
    attn_frobenius,
    attn_kl,
    attn_kl_heads_mean,
    attn_loss,
    attn_mse,
    ce_rows,
    kl_rows,
    mean_per_pair,
    patch_alignment,
    slice_kind,
    total,
    upsample_latents,
)

INF = float("inf")
f64 = torch.float64


def normal(*shape, seed=0, scale=1.0, dtype=f64):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)).to(dtype)


def gradients(f, *inputs, seed=1):
    """Gradients of <f(inputs), random> at inputs: a loss whose upstream gradient is random. Zeros where
    f has no graph.
    """
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = f(*leaves)
    out = out if out.requires_grad else out.requires_grad_()
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(out.dtype)
    return torch.autograd.grad(out, leaves, up, materialize_grads=True)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- rows of logits ---


def naive_ce(logits, targets):
    rows = zip(logits.tolist(), targets.tolist())
    return torch.tensor([math.log(math.fsum(map(math.exp, row))) - row[t] for row, t in rows], dtype=f64)


def naive_kl(z_int, z_cor):
    """sum p (log p - log q) of each row, in Python's floats."""

    def log_softmax(row):
        lse = max(row) + math.log(math.fsum(math.exp(z - max(row)) for z in row))
        return [z - lse for z in row]

    pairs = zip(map(log_softmax, z_int.tolist()), map(log_softmax, z_cor.tolist()))
    return torch.tensor([math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q)) for p, q in pairs], dtype=f64)


@pytest.mark.parametrize("N, V", [(5, 11), (1, 1), (1, 7), (0, 7), (3, 1000)])
def test_rows(N, V):
    z_int, z_cor, targets = normal(N, V), normal(N, V, seed=1), torch.arange(N) % V
    close(ce_rows(z_int, targets), naive_ce(z_int, targets))
    close(kl_rows(z_int, z_cor), naive_kl(z_int, z_cor))
    apart = normal(V, N).t(), normal(2 * V, N, seed=1)[::2].t()  # not contiguous
    close(kl_rows(*apart), kl_rows(*(z.contiguous() for z in apart)))
    close(ce_rows(apart[1], targets), ce_rows(apart[1].contiguous(), targets))


def test_row_gradients():
    """Those of the closed forms: P - y for CE; P_cor - P_int and p (log p - log q - KL) for KL."""
    z_int, z_cor, targets, up = (
        normal(5, 11), normal(5, 11, seed=1), torch.arange(5), normal(5, seed=1)[:, None],
    )
    p, q = z_int.softmax(1), z_cor.softmax(1)
    close(gradients(lambda z: ce_rows(z, targets), z_int)[0], up * (p - torch.eye(11, dtype=f64)[:5]))
    d_int, d_cor = gradients(kl_rows, z_int, z_cor)
    close(d_cor, up * (q - p))
    close(d_int, up * p * (p.log() - q.log() - naive_kl(z_int, z_cor)[:, None]))


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16])
def test_large_logits(dtype):
    """+-30, and one path certain of what the other excludes: finite values and gradients, the values right.
    """
    signs = normal(6, 50).sign(), normal(6, 50, seed=1).sign()
    z_int, z_cor = (30 * s.to(dtype) for s in signs)
    z_int[0], z_cor[0] = -30, -30
    z_int[0, 3] = z_cor[0, 8] = 30
    close(kl_rows(z_int, z_cor).to(f64), naive_kl(z_int, z_cor), 1e-12 if dtype == f64 else 1e-5)
    for gradient in (
        gradients(kl_rows, z_int, z_cor)
        + gradients(kl_rows, 1e4 * z_int, z_cor)
        + gradients(kl_rows, z_int, 1e4 * z_cor)
    ):
        assert gradient.isfinite().all()
    targets = torch.full((6,), 8)
    close(ce_rows(z_int, targets).to(f64), naive_ce(z_int.to(f64), targets), 1e-12 if dtype == f64 else 1e-5)


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16])
def test_equal_paths(dtype):
    """p = q: every loss exactly 0, every gradient exactly zero."""
    z, rows, cols = (
        normal(4, 300, scale=10, dtype=dtype),
        torch.tensor([[2, 9, -1]]),
        torch.tensor([[3, 0, 1, -1]]),
    )
    S = hide(normal(1, 4, 3, 4, scale=3, dtype=dtype), rows, cols)
    A = S.exp() / 50
    for f, x in (
        (kl_rows, z),
        (lambda a, b: attn_kl(a, b, rows, cols), S),
        (lambda a, b: attn_kl_heads_mean(a, b, rows, cols), A),
        (lambda a, b: attn_mse(a, b, rows, cols), A),
        (attn_frobenius, A),
    ):
        assert not f(x, x).any()
        assert not any(g.any() for g in gradients(f, x, x))


def hide(S, rows, cols):
    """Scores as attn_scores returns them: -inf where the column lies after the row or either is padding."""
    hidden = (cols[:, None, :] > rows[:, :, None]) | (cols < 0)[:, None, :] | (rows < 0)[:, :, None]
    return S.masked_fill(hidden[:, None], -INF)


# --- means of a pair ---


@pytest.mark.parametrize("share", [1.0, 0.1, 0.29, 0.5, 0.7])
@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_mean_per_pair(share, order):
    """n = 1..25 rows, pair 3 without any, 100 in the last: the largest max(1, floor(share n)) of
    each, and no others.
    """
    counts = [n if n != 3 else 0 for n in range(1, 26)] + [100]
    pair = torch.cat([torch.full((n,), b) for b, n in enumerate(counts)])
    pair = (
        pair
        if order == "sorted"
        else pair[torch.randperm(len(pair), generator=torch.Generator().manual_seed(0))]
    )
    values = normal(len(pair)).requires_grad_()
    means, expected, slopes = (
        mean_per_pair(values, pair, len(counts), share),
        [],
        torch.zeros(len(pair), dtype=f64),
    )
    for b, n in enumerate(counts):
        own = sorted(((values[i].item(), i) for i in range(len(pair)) if pair[i] == b), reverse=True)
        own = own[: max(1, math.floor(Fraction(str(share)) * n))]
        expected.append(math.fsum(v for v, _ in own) / len(own) if own else 0.0)
        for _, i in own:
            slopes[i] = (b + 1) / len(own)
    close(means, torch.tensor(expected, dtype=f64))
    means.backward(torch.arange(1.0, len(counts) + 1, dtype=f64))
    close(values.grad, slopes)


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_pair_without_rows(share):
    values = torch.zeros(0, dtype=f64, requires_grad=True)
    empty = mean_per_pair(values, torch.zeros(0, dtype=torch.int64), 2, share)
    assert torch.equal(empty, torch.zeros(2, dtype=f64)) and empty.requires_grad
    empty.sum().backward()
    assert values.grad.shape == (0,)


def test_pooled_mean_is_a_concatenation():
    a, b = normal(3), normal(4, seed=1)
    got = mean_per_pair(torch.cat([a, b]), torch.tensor([0, 1, 1, 0, 0, 1, 0]), 2)
    close(got, torch.stack([(a[0] + b[0] + b[1] + b[3]) / 4, (a[1] + a[2] + b[2]) / 3]))


def test_what_is_refused():
    with pytest.raises(ValueError, match="1 of 3 rows belong to no pair in 0..1"):
        mean_per_pair(torch.ones(3), torch.tensor([0, 1, 2]), 2)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            mean_per_pair(torch.ones(3), torch.tensor([0, 1, 1]), 2, share)
    for kind, heads in (("l1", "keep"), ("mse", "mean"), ("frobenius", "mean"), ("kl", "sum")):
        with pytest.raises(ValueError, match="attention loss"):
            attn_loss(kind, heads, None, None, None, None)
    with pytest.raises(KeyError, match="kl"):
        total({"kl": torch.tensor(1.0)}, {"attn": 1.0})


# --- attention ---

CASES = {  # rows, cols
    "plain": ([[5, 6], [4, 7]], [[0, 1, 2], [1, 2, 3]]),
    "one row, one column": ([[5]], [[2]]),
    "no rows": ([[], []], [[0, 1], [1, 2]]),
    "no columns": ([[1], [2]], [[], []]),
    "hidden": ([[1, 3], [0, 7]], [[0, 2, 3], [1, 2, 9]]),
    "ragged": ([[5, 6, -1], [-1, -1, -1], [7, -1, 4]], [[0, 1, -1], [0, 1, 2], [-1, -1, -1]]),
}
each_case = pytest.mark.parametrize("name", CASES)
KINDS = [("kl", "keep"), ("kl", "mean"), ("frobenius", "keep"), ("mse", "keep")]
each_kind = pytest.mark.parametrize("kind, heads", KINDS)


def case(name, kind, heads, H=3, seed=0):
    """X_int, X_cor, rows, cols: scores, or weights as if the columns got part of a row's attention."""
    rows, cols = (torch.tensor(x, dtype=torch.int64) for x in CASES[name])
    X = [hide(normal(len(rows), H, rows.shape[1], cols.shape[1], seed=seed + i), rows, cols) for i in (0, 1)]
    if slice_kind(kind, heads) == "weights":
        X = [x.exp() / 50 for x in X]
    return *X, rows, cols


def naive_loss(kind, heads, X_int, X_cor, rows, cols):
    """The same in loops, cell by cell."""
    out = []
    for a, b, r, c in zip(X_int, X_cor, rows.tolist(), cols.tolist()):  # a, b [H,M,K]
        r, c = [m for m, i in enumerate(r) if i >= 0], [n for n, j in enumerate(c) if j >= 0]
        if heads == "mean":
            a, b = a.mean(0, keepdim=True), b.mean(0, keepdim=True)
        terms = []
        for h in range(len(a)):
            for m in r:
                if kind != "kl":
                    terms += [(a[h, m, n] - b[h, m, n]) ** 2 for n in c]
                    continue
                seen = [n for n in c if a[h, m, n] != (-INF if heads == "keep" else 0)]
                p, q = ((x.exp() if heads == "keep" else x) for x in (a[h, m, seen], b[h, m, seen]))
                p, q = p / p.sum(), q / q.sum()
                terms.append(
                    sum([p[n] * (p[n] / q[n]).log() for n in range(len(seen))], torch.zeros((), dtype=f64))
                )
        out.append(
            sum(terms, torch.zeros((), dtype=f64)) / (1 if kind == "frobenius" else max(1, len(terms)))
        )
    return torch.stack(out)


@each_case
@each_kind
def test_attention_losses(name, kind, heads):
    X_int, X_cor, rows, cols = case(name, kind, heads)
    f, g = (lambda a, b, f=f: f(kind, heads, a, b, rows, cols) for f in (attn_loss, naive_loss))
    close(f(X_int, X_cor), g(X_int, X_cor))
    close(f(*(X.transpose(1, 2).contiguous().transpose(1, 2) for X in (X_int, X_cor))), f(X_int, X_cor))
    assert f(X_int.clone().requires_grad_(), X_cor).requires_grad  # even without rows
    hidden = X_int.isneginf() | (X_int == 0)
    for got, expected in zip(gradients(f, X_int, X_cor), gradients(g, X_int, X_cor)):
        close(got[~hidden], expected[~hidden])
        assert not got[hidden].any()


@pytest.mark.gradcheck
@each_case
@each_kind
def test_gradcheck_attention(name, kind, heads):
    X_int, X_cor, rows, cols = case(name, kind, heads)
    free = X_int.isfinite() & (X_int != 0)  # what no mask fixes
    fill = lambda X, x: X.masked_scatter(free, x)
    inputs = [X[free].requires_grad_() for X in (X_int, X_cor)]
    assert torch.autograd.gradcheck(
        lambda a, b: attn_loss(kind, heads, fill(X_int, a), fill(X_cor, b), rows, cols), inputs, eps=1e-7
    )


@pytest.mark.gradcheck
@pytest.mark.parametrize("N, V", [(5, 11), (1, 1), (0, 7)])
def test_gradcheck_rows(N, V):
    z_int, z_cor = normal(N, V).requires_grad_(), normal(N, V, seed=1).requires_grad_()
    targets, pair = torch.arange(N) % V, torch.arange(N) % 2
    assert torch.autograd.gradcheck(lambda z: ce_rows(z, targets), z_int)
    assert torch.autograd.gradcheck(kl_rows, (z_int, z_cor))
    for share in (1.0, 0.7):
        assert torch.autograd.gradcheck(
            lambda a, b: mean_per_pair(kl_rows(a, b), pair, 3, share), (z_int, z_cor)
        )


def test_hidden_in_one_path_only():
    """A cell that one path cannot see is left out of both."""
    S_int, S_cor, rows, cols = case("plain", "kl", "keep")
    S_cor[0, :, 0, 1] = -INF
    expected = attn_kl(S_int.masked_fill(S_cor.isneginf(), -INF), S_cor, rows, cols)
    assert expected.isfinite().all() and torch.equal(attn_kl(S_int, S_cor, rows, cols), expected)
    assert attn_kl(S_cor, S_int, rows, cols).isfinite().all()
    close(expected, naive_loss("kl", "keep", S_int.masked_fill(S_cor.isneginf(), -INF), S_cor, rows, cols))


@pytest.mark.parametrize("heads", ["keep", "mean"])
def test_padding_may_hold_anything(heads):
    X_int, X_cor, rows, cols = case("ragged", "kl", heads)
    padded = ((rows < 0)[:, :, None] | (cols < 0)[:, None, :])[:, None].expand_as(X_int)
    filled = [torch.where(padded, normal(*X.shape, seed=i).exp(), X) for i, X in enumerate((X_int, X_cor))]
    f = lambda a, b: attn_loss("kl", heads, a, b, rows, cols)
    close(f(*filled), f(X_int, X_cor))
    assert not any(g[padded].any() for g in gradients(f, *filled))


def test_head_or_path_without_weight():
    A = torch.tensor([[[[0.2, 0.1, 0.0]], [[0.0, 0.0, 0.0]]]])  # the second head gives the columns nothing
    nothing = torch.zeros_like(A)
    one = torch.tensor([[5]]), torch.tensor([[0, 1, 2]])
    for pair in ((A, nothing), (nothing, A), (A, A.flip(3))):
        assert attn_kl_heads_mean(*pair, *one).isfinite().all()
        assert all(g.isfinite().all() for g in gradients(lambda a, b: attn_kl_heads_mean(a, b, *one), *pair))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    """Error against float64 at most 2x (values) and 3x (gradients) that of the plain
    computation in that dtype.
    """
    z = [normal(16, 500, seed=i, scale=3, dtype=dtype) for i in (0, 1)]
    S = [normal(2, 4, 8, 8, seed=i, dtype=dtype) for i in (0, 1)]
    A = [x.exp() / 100 for x in S]
    rows, cols, targets = torch.arange(8, 16).expand(2, -1), torch.arange(8).expand(2, -1), torch.arange(16)
    kl = lambda a, b: (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    plain_and_ours = [
        (
            z,
            lambda a, b: (a.logsumexp(-1) - a[targets, targets]) + 0 * b.sum(),
            lambda a, b: ce_rows(a, targets) + 0 * b.sum(),
        ),
        (z, kl, kl_rows),
        (S, lambda a, b: kl(a, b).mean((1, 2)), lambda a, b: attn_kl(a, b, rows, cols)),
        (
            A,
            lambda a, b: kl(a.mean(1).log(), b.mean(1).log()).mean(1),
            lambda a, b: attn_kl_heads_mean(a, b, rows, cols),
        ),
        (A, lambda a, b: ((a - b) ** 2).mean((1, 2, 3)), lambda a, b: attn_mse(a, b, rows, cols)),
        (A, lambda a, b: ((a - b) ** 2).sum((1, 2, 3)), attn_frobenius),
    ]
    error = lambda a, b: (a.to(f64) - b).abs().max().item()
    for inputs, plain, ours in plain_and_ours:
        wide = [x.to(f64) for x in inputs]
        assert ours(*inputs).dtype == torch.float32 and ours(*wide).dtype == f64
        assert error(ours(*inputs), ours(*wide)) <= min(1e-5, 2 * error(plain(*inputs), ours(*wide)))
        for got, low, true in zip(
            gradients(ours, *inputs), gradients(plain, *inputs), gradients(ours, *wide)
        ):
            assert error(got, true) <= 3 * error(low, true)


def test_dispatch_and_total():
    assert [slice_kind(*k) for k in KINDS] == ["scores", "weights", "weights", "weights"]
    X_int, X_cor, rows, cols = case("ragged", "mse", "keep")
    for (kind, heads), f in zip(
        KINDS, (attn_kl, attn_kl_heads_mean, lambda a, b, *_: attn_frobenius(a, b), attn_mse)
    ):
        assert torch.equal(attn_loss(kind, heads, X_int, X_cor, rows, cols), f(X_int, X_cor, rows, cols))
    terms = {"ce": torch.tensor(2.0, requires_grad=True), "kl": torch.tensor(3.0, requires_grad=True)}
    loss = total(terms, {"ce": 1.0, "kl": 0.5, "attn": 9.0})
    loss.backward()
    assert loss == 3.5 and terms["ce"].grad == 1.0 and terms["kl"].grad == 0.5


# --- VaLR: alignment to patches ---


def test_a_term_without_a_weight_is_an_error():
    """None drops out of eq. 6 unseen; the others are weighted each by its own."""
    assert total({"kl": 2.0, "attn": 0.5}, {"kl": 3.0, "attn": 10.0, "ce": 7.0}) == 11.0
    with pytest.raises(KeyError, match="new"):
        total({"kl": 2.0, "new": 0.5}, {"kl": 3.0})


@pytest.mark.parametrize("K, P", [(4, 4), (3, 7), (16, 64), (16, 5), (1, 6)])
def test_upsampling_is_linear_along_the_latents(K, P):
    f = normal(2, K, 5)
    expected = torch.empty(2, P, 5, dtype=f64)
    for p in range(P):
        place = min(max((p + 0.5) * K / P - 0.5, 0.0), K - 1.0)
        low = int(place)
        expected[:, p] = f[:, low] + (place - low) * (f[:, min(low + 1, K - 1)] - f[:, low])
    close(upsample_latents(f, P), expected)
    close(upsample_latents(f[0], P), expected[0])
    assert K != P or torch.equal(upsample_latents(f, P), f)


def test_patch_alignment_is_minus_the_mean_cosine():
    F_hat, F = normal(2, 6, 4), normal(6, 4, seed=1, scale=30.0)
    cosine = lambda a, b: (
        math.fsum(x * y for x, y in zip(a, b))
        / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    )
    naive = lambda target: (
        -math.fsum(cosine(F_hat[n, p].tolist(), target[n, p].tolist()) for n in range(2) for p in range(6))
        / 12
    )
    close(patch_alignment(F_hat, F), torch.tensor(naive(F.expand(2, 6, 4)), dtype=f64))
    own = normal(2, 6, 4, seed=2)
    close(patch_alignment(F_hat, own), torch.tensor(naive(own), dtype=f64))
    close(patch_alignment(3 * F, F), torch.tensor(-1.0, dtype=f64))
    assert patch_alignment(F_hat.bfloat16(), F.float()).dtype == torch.float32
    assert torch.autograd.gradcheck(
        lambda x: patch_alignment(upsample_latents(x, 6), F), normal(2, 4, 4).requires_grad_()
    )
