"""attention.py against a full softmax, cell by cell in float64, and the recorder against
a forward without checkpointing.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from crystal.attention import AttentionRecorder, attend, attn_lse, attn_scores, attn_slice
from crystal.runtime import ops

INF = float("inf")
f64 = torch.float64


def sample(rows, cols, H=4, G=2, L=7, d=3, padding=None, bias=None, contiguous=True, scale=None, dtype=f64):
    """q, k, rows, cols and the keywords of attn_slice; `bias` fills a [B,1,L,L] tensor, of which
    the rows are cut.
    """
    rows, cols = torch.tensor(rows, dtype=torch.int64), torch.tensor(cols, dtype=torch.int64)
    B, generator = len(rows), torch.Generator().manual_seed(0)
    shape = (lambda n: (B, n, L, d)) if contiguous else (lambda n: (B, L, n, d))
    q, k = (torch.randn(shape(n), generator=generator, dtype=f64).to(dtype) for n in (H, G))
    if not contiguous:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    kw = {"scale": scale}
    if padding:
        kw["key_padding"] = torch.tensor([[c == "x" for c in line] for line in padding])
    if bias:
        full = torch.randn(B, 1, L, L, generator=generator, dtype=f64)
        bias(full)
        kw["bias"] = full.gather(2, rows.clamp(min=0)[:, None, :, None].expand(-1, -1, -1, L))  # [B,1,M,L]
    return q, k, rows, cols, kw


def block(full):
    full[:, :, 4, 1:3] = -INF  # two columns of one row
    full[:, :, 5, :] = -INF  # all of another


SAMPLES = {
    "plain": dict(rows=[[3, 5], [4, 6]], cols=[[0, 2, 3], [1, 2, 4]]),
    "one head group": dict(rows=[[3, 5]], cols=[[0, 2]], G=1),
    "a key head each": dict(rows=[[3, 5]], cols=[[0, 2]], G=4),
    "one row, one column": dict(rows=[[4]], cols=[[2]]),
    "no rows": dict(rows=[[], []], cols=[[1], [2]]),
    "no columns": dict(rows=[[1], [2]], cols=[[], []]),
    "both ends": dict(rows=[[0, 6]], cols=[[0, 6]]),
    "hidden by causality": dict(rows=[[1, 2, 3]], cols=[[3, 4, 5]]),
    "padded rows and columns": dict(rows=[[3, 5, -1], [-1, -1, -1]], cols=[[0, -1], [2, 3]]),
    "ragged": dict(rows=[[2, 3, -1], [4, 6, 5]], cols=[[0, 1], [2, 3]], padding=["....xxx", "......."]),
    "left padding": dict(rows=[[1, 4, 6]], cols=[[0, 2, 3]], padding=["xx....."]),
    "bias": dict(rows=[[3, 4, 5, 6, -1]], cols=[[0, 2, 4]], bias=block),
    "bias and padding": dict(rows=[[4, 5, 6]], cols=[[0, 1, 2, 3]], bias=block, padding=["x..x..."]),
    "not contiguous": dict(rows=[[3, 5], [4, 6]], cols=[[0, 2, 3], [1, 2, 4]], contiguous=False),
    "own scale": dict(rows=[[3, 5]], cols=[[0, 2]], scale=0.3),
    "columns twice and unsorted": dict(rows=[[5, 3, 5]], cols=[[2, 0, 2]]),
}
each_sample = pytest.mark.parametrize("name", SAMPLES)


def naive(q, k, rows, cols, scale=None, bias=None, key_padding=None):
    """(scores [B,H,M,K], lse [B,H,M], weights [B,H,M,K]), every cell by itself from one row
    of the full softmax.
    """
    (B, H, L, d), G = q.shape, k.shape[1]
    shape = (B, H, rows.shape[1], cols.shape[1])
    S, lse, A = (
        torch.full(shape, -INF, dtype=f64),
        torch.full(shape[:3], -INF, dtype=f64),
        torch.zeros(shape, dtype=f64),
    )
    key = k.repeat_interleave(H // G, dim=1)
    for b, h, m in torch.cartesian_prod(*map(torch.arange, shape[:3])).tolist():
        i = rows[b, m].item()
        if i < 0:
            continue
        row = {}
        for j in range(i + 1):
            added = 0.0 if bias is None else bias[b, 0, m, j]
            if added > -INF and not (key_padding is not None and key_padding[b, j]):
                row[j] = q[b, h, i] @ key[b, h, j] * (scale or d**-0.5) + added
        if not row:
            continue
        softmax = torch.stack(list(row.values())).softmax(0)
        lse[b, h, m] = torch.stack(list(row.values())).logsumexp(0)
        for c, j in enumerate(cols[b].tolist()):
            if j in row:
                S[b, h, m, c], A[b, h, m, c] = row[j], softmax[list(row).index(j)]
    return S, lse, A


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


@each_sample
def test_values(name):
    q, k, rows, cols, kw = sample(**SAMPLES[name])
    S, lse, A = naive(q, k, rows, cols, **kw)
    close(attn_scores(q, k, rows, cols, **kw), S)
    close(attn_lse(q, k, rows, **kw), lse)
    got = attn_slice(q, k, rows, cols, **kw)
    close(got, A)
    assert torch.equal(got == 0, S == -INF)  # hidden is exactly 0, and nothing else is


@each_sample
def test_gradients(name):
    q, k, rows, cols, kw = sample(**SAMPLES[name])
    finite = attn_scores(q, k, rows, cols, **kw) > -INF
    with torch.autograd.set_detect_anomaly(True):  # no NaN, not even one that a mask would clear later
        weights = gradients(lambda q, k: attn_slice(q, k, rows, cols, **kw), q, k)
        scores = gradients(lambda q, k: attn_scores(q, k, rows, cols, **kw)[finite], q, k)
    for got, expected in zip(weights, gradients(lambda q, k: naive(q, k, rows, cols, **kw)[2], q, k)):
        close(got, expected)
    for got, expected in zip(scores, gradients(lambda q, k: naive(q, k, rows, cols, **kw)[0][finite], q, k)):
        close(got, expected)


@pytest.mark.gradcheck
@each_sample
def test_gradcheck(name):
    q, k, rows, cols, kw = sample(**SAMPLES[name])
    q, k = q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: attn_slice(q, k, rows, cols, **kw), (q, k))
    assert torch.autograd.gradcheck(lambda q, k: attn_scores(q, k, rows, cols, **kw).clamp(min=-100), (q, k))
    assert torch.autograd.gradcheck(lambda q, k: attn_lse(q, k, rows, **kw).clamp(min=-100), (q, k))


@each_sample
def test_lse_given(name):
    """A given lse changes no value and no gradient, although it carries none; a padded or blind
    row may hold anything.
    """
    q, k, rows, cols, kw = sample(**SAMPLES[name])
    lse = attn_lse(q, k, rows, **kw)
    for filler in (-INF, 0.0):
        lse = lse.masked_fill(lse.isneginf(), filler)
        close(attn_slice(q, k, rows, cols, lse=lse, **kw), attn_slice(q, k, rows, cols, **kw))
        for got, expected in zip(
            gradients(lambda q, k: attn_slice(q, k, rows, cols, lse=lse, **kw), q, k),
            gradients(lambda q, k: attn_slice(q, k, rows, cols, **kw), q, k),
        ):
            close(got, expected)
    carries = lse.clone().requires_grad_()
    given = attn_slice(q.requires_grad_(), k, rows, cols, lse=carries + 1.0, **kw)
    close(given, attn_slice(q, k, rows, cols, **kw) / torch.e)  # the given value is what normalises
    given.sum().backward()
    assert carries.grad is None


def test_hidden_cells_do_not_reach_back():
    """Padding, padded indices and a later token change nothing and get gradients of exactly zero."""
    q, k, rows, cols, kw = sample(rows=[[3, -1]], cols=[[1, 4, -1]], padding=["x......"])
    before = attn_slice(q, k, rows, cols, **kw)
    assert torch.equal(before[..., 1:], torch.zeros(1, 4, 2, 2, dtype=f64))
    dq, dk = gradients(lambda q, k: attn_slice(q, k, rows, cols, **kw), q, k)
    unseen = [0, 4, 5, 6]
    assert not dk[:, :, unseen].any() and dk[:, :, 1:4].all()
    assert not dq[:, :, [0, 1, 2, 4, 5, 6]].any() and dq[:, :, 3].all()
    k[:, :, unseen] += 9.0
    assert torch.equal(attn_slice(q, k, rows, cols, **kw), before)


def test_scores_of_blocked_keys_have_no_gradient():
    """Even where whoever reads the scores passes one back."""
    q, k, rows, cols, kw = sample(rows=[[4]], cols=[[1, 2]])
    kw["bias"] = torch.zeros(1, 1, 1, 7, dtype=f64)
    kw["bias"][..., 2] = -INF
    q, k = q.requires_grad_(), k.requires_grad_()
    S = attn_scores(q, k, rows, cols, **kw)
    assert S[..., 0].isfinite().all() and (S[..., 1] == -INF).all()
    dq, dk = torch.autograd.grad(S, (q, k), torch.ones_like(S))
    assert dk[:, :, 1].all() and not dk[:, :, 2].any()
    assert torch.allclose(dq[0, :, 4], k[0, :, 1].repeat_interleave(2, 0) * 3**-0.5)


def test_random_shapes():
    """Ragged batches of every size at once: rows and columns anywhere, some padded, left
    or right padding, biases.
    """
    generator = torch.Generator().manual_seed(3)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))
    for _ in range(12):
        B, L, G = draw(1, 4), draw(1, 12), draw(1, 3)
        rows, cols = ([[draw(-1, L) for _ in range(n)] for _ in range(B)] for n in (draw(0, 5), draw(1, 5)))
        padding = [
            ("x" * n + "." * (L - n))[:: 1 if draw(0, 2) else -1] for n in (draw(0, L) for _ in range(B))
        ]
        q, k, rows, cols, kw = sample(
            rows,
            cols,
            H=G * draw(1, 4),
            G=G,
            L=L,
            d=draw(1, 6),
            padding=padding,
            bias=lambda full: full[full > 1].fill_(-INF) if draw(0, 2) else None,
        )
        close(attn_slice(q, k, rows, cols, **kw), naive(q, k, rows, cols, **kw)[2])


def test_fused_attention_agrees():
    """The weights are those of the attention that the model runs: against one-hot
    values through PyTorch's own.
    """
    q, k, rows, cols, _ = sample(rows=[[3, 6]], cols=[[0, 2, 3]])
    key, values = k.repeat_interleave(2, dim=1), torch.eye(7, dtype=f64).expand(1, 4, 7, 7)
    weights = F.scaled_dot_product_attention(q, key, values, is_causal=True)  # [1,H,L,L]
    close(attn_slice(q, k, rows, cols), weights[:, :, rows[0]][..., cols[0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_inputs(dtype, autocast):
    """Error against float64 at most 2x (values) and 3x (gradients) that of the plain
    computation in that dtype.
    """
    q, k, rows, cols, _ = sample(
        rows=[list(range(8, 40))], cols=[list(range(6))], H=8, G=2, L=40, d=32, dtype=dtype
    )
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)

    def plain(q, k):
        S = (q @ k.repeat_interleave(4, dim=1).transpose(2, 3) * 32**-0.5).masked_fill(hidden, -INF)
        return S.softmax(-1)[:, :, rows[0]][..., cols[0]]

    def ours(q, k):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            return attn_slice(q, k, rows, cols)

    error = lambda a, b: (a.to(f64) - b).abs().max().item()
    exact = attn_slice(q.to(f64), k.to(f64), rows, cols)
    assert ours(q, k).dtype == torch.float32 and exact.dtype == f64
    # Products in float32, not in half.
    assert error(ours(q, k), exact) <= 1e-6 < error(plain(q, k), exact) / 2
    for got, low, true in zip(
        gradients(ours, q, k), gradients(plain, q, k), gradients(ours, q.to(f64), k.to(f64))
    ):
        assert got.dtype == dtype and error(got, true) <= 3 * error(low, true)


def test_what_is_refused():
    q, k, rows, cols, _ = sample(rows=[[3]], cols=[[1]])
    for read, positions in ((attn_slice, (rows, cols)), (attn_scores, (rows, cols)), (attn_lse, (rows,))):
        with pytest.raises(TypeError, match="key_padding"):
            read(q, k, *positions, key_padding=torch.ones(1, 7))
        with pytest.raises(TypeError, match="bias"):
            read(q, k, *positions, bias=torch.ones(1, 1, 1, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attn_slice(q, k[:, [0, 1, 1]], rows, cols)


# --- the recorder ---


class Layer(torch.nn.Module):
    """A decoder layer as the recorder sees one: attention with a residual, the recorder a
    keyword of its forward.
    """

    def __init__(self, index):
        super().__init__()
        self.index, self.qk, self.v = index, torch.nn.Linear(8, 12), torch.nn.Linear(8, 8)

    def forward(self, x, recorder):
        q, k = (
            self.qk(x).view(*x.shape[:2], 6, 2).transpose(1, 2).split([4, 2], dim=1)
        )  # [B,4,L,2], [B,2,L,2]
        recorder(self.index, q, k, 0.7)
        v = self.v(x).view(*x.shape[:2], 4, 2).transpose(1, 2)
        return x + F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.7, enable_gqa=True
        ).transpose(1, 2).flatten(2)


def tapped(read, layers, checkpointed, run=3):
    """Slices before and after backward, and the gradients of an attention loss plus the output's, of
    a stack of layers.
    """
    torch.manual_seed(0)
    stack, x = torch.nn.ModuleList(map(Layer, range(run))), torch.randn(2, 6, 8)
    recorder = AttentionRecorder(
        layers, torch.tensor([[3, 5], [4, -1]]), torch.tensor([[1, 2], [0, 3]]), read
    )
    for layer in stack:
        x = checkpoint(layer, x, recorder, use_reentrant=False) if checkpointed else layer(x, recorder)
    before = recorder.slices
    (x.square().mean() + sum(A[A > -INF].square().sum() for A in before.values())).backward()
    return before, recorder.slices, [p.grad for p in stack.parameters()]


@pytest.mark.parametrize("read", [attn_slice, attn_scores])
@pytest.mark.parametrize("layers", [{2}, {0, 1, 2}])
def test_tap_under_checkpointing(read, layers):
    plain, _, gradients = tapped(read, layers, checkpointed=False)
    before, after, gradients_again = tapped(read, layers, checkpointed=True)
    assert list(plain) == list(before) == sorted(layers)
    for layer in layers:
        assert before[layer].shape == (2, 4, 2, 2) and torch.equal(plain[layer], before[layer])
        assert after[layer] is before[layer]  # the recompute's slice was dropped
    used = [g for g in gradients if g is not None]
    assert len(used) == 12 and all(map(torch.equal, used, gradients_again))


def test_tap_reads_what_it_was_told():
    q, k, rows, cols, kw = sample(**SAMPLES["bias and padding"])
    for read in (attn_slice, attn_scores):
        recorder = AttentionRecorder([1], rows, cols, read, bias=kw["bias"], key_padding=kw["key_padding"])
        recorder(0, q, k, 0.5)
        recorder(1, q, k, 0.3)
        recorder(1, q, k, 0.9)  # a later write is dropped
        assert list(recorder.slices) == [1]
        assert torch.equal(recorder.slices[1], read(q, k, rows, cols, **{**kw, "scale": 0.3}))


def test_tap_names_the_missing_layer():
    with pytest.raises(RuntimeError, match=r"layers \[3, 7\] wrote no slice; wrote: \[2\]"):
        tapped(attn_slice, {2, 7, 3}, checkpointed=False)


# --- attend ---


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [True, False])
def test_attend(mask, causal):
    """Against a softmax over written scores, heads grouped."""
    q, k, v = (
        torch.randn(2, h, 5, 4, generator=torch.Generator().manual_seed(h), dtype=f64) for h in (4, 2, 3)
    )
    v = v[:, :2]
    free = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(1)
    bias = {
        "none": torch.zeros(2, 1, 5, 5, dtype=f64).masked_fill(
            ~torch.ones(5, 5, dtype=torch.bool).tril(), -INF
        )
        if causal
        else torch.zeros(2, 1, 5, 5, dtype=f64),
        "bool": torch.zeros(2, 1, 5, 5, dtype=f64).masked_fill(~free, -INF),
        "float": free * 1.5,
    }[mask]
    want = (0.3 * q @ k.repeat_interleave(2, 1).mT + bias).softmax(-1) @ v.repeat_interleave(2, 1)
    got = attend(q, k, v, {"none": None, "bool": free, "float": bias}[mask], scale=0.3, causal=causal)
    torch.testing.assert_close(got, want)


def test_attend_repeats_heads_under_a_mask_on_a_gpu(monkeypatch):
    """Else PyTorch takes its plain attention there, which writes L x L."""
    asked = []
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: asked.append((k.shape[1], v.shape[1], options["enable_gqa"])),
    )
    for device in ("cpu", "cuda"):
        with torch._subclasses.FakeTensorMode():
            q, k = (torch.empty(2, h, 5, 4, device=device) for h in (4, 2))
            for mask in (None, torch.empty(2, 1, 5, 5, device=device, dtype=torch.bool)):
                attend(q, k, k, mask)
    assert asked == [(2, 2, True), (2, 2, True), (2, 2, True), (4, 4, False)]


@pytest.mark.parametrize("read", [attn_slice, attn_scores, ops.attn_slice, ops.attn_scores])
@pytest.mark.parametrize("name", ["rows", "cols"])
def test_positions_of_one_path_alone_are_told(read, name):
    """Both paths are one batch of six; positions of three were given."""
    q, k = torch.randn(6, 2, 5, 4), torch.randn(6, 1, 5, 4)
    at = {"rows": torch.tensor([[3], [4], [2]] * 2), "cols": torch.tensor([[1, 2]] * 6)}
    AttentionRecorder({0}, at["rows"], at["cols"], read)(0, q, k)
    at[name] = at[name][:3]
    with pytest.raises(ValueError, match=f"^{name} holds positions of 3 sequences, the batch 6; .*for both"):
        AttentionRecorder({0}, at["rows"], at["cols"], read)(0, q, k)
