"""Measures the compiled operators against their floors and their peers: `python -m crystal.bench`. Prints a
table and writes JSON.

First the machine: bandwidth of a copy, the best matrix product, one empty call. A *floor* is the least time
that an operator can take there: the larger of the bytes it must move and the products it must form. Then, per
operator, a gate (errors against float64 at most two and three times those of plain PyTorch, or nothing is
timed), and times: median and quartiles of 30 runs, peers in turn, of slow peers fewer (the last column).

N rows, V vocabulary; B sequences, L length, M rows, K columns, H heads, G key heads, d head size.
"""

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from crystal import attention, losses
from crystal.runtime import ops
from crystal.runtime.config import OneLineParser, UserError, run_cli

SLOW = 1.0  # a peer whose run takes n times so many seconds takes part in every n-th round alone


def main(argv=None):
    parser = OneLineParser(
        prog="bench.py",
        description="Times of the compiled operators, their floors and peers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU where there is one"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of logits, queries and keys"
    )
    parser.add_argument(
        "--only", default="vocab,slice,align", help="what to measure: these, frobenius, attention, layer"
    )
    parser.add_argument("--rows", type=int, default=32, help="N, rows of each path's logits")
    parser.add_argument("--vocab", type=int, default=152064, help="V")
    parser.add_argument(
        "--slice", default="2,2048,64,8,28,4,128", help="B,L,M,K,H,G,d of the attention operators"
    )
    parser.add_argument("--repeats", type=int, default=30, help="runs of each, of slow peers fewer")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile among the peers: minutes, the first time",
    )
    parser.add_argument("--out", default="runs/bench.json", help="where the JSON goes")
    a = parser.parse_args(argv)
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(a.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    try:
        sizes = [int(x) for x in a.slice.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 7 or min(sizes, default=0) < 1 or min(a.rows, a.vocab, a.repeats) < 1:
        raise UserError(
            f"--slice {a.slice} --rows {a.rows} --vocab {a.vocab} --repeats {a.repeats}: seven sizes "
            "B,L,M,K,H,G,d, all of them at least 1"
        )
    wanted = a.only.split(",")
    if unknown := set(wanted) - set(CASES):
        raise UserError(
            f"--only {a.only}: no operator {', '.join(sorted(unknown))}; choose among {', '.join(CASES)}"
        )
    ops.announce(print)

    machine = probe(device, getattr(torch, a.dtype))
    print(
        f"machine: {machine['name']}, {machine['threads']} threads, torch {torch.__version__}: copy "
        f"{machine['copy_gb_s']:.1f} GB/s, "
        f"product {machine['tflop_s']:.3f} TFLOP/s, empty call {machine['empty_us']:.1f} us"
    )
    rows = []
    for name in wanted:
        size, leaves, peers, floors = CASES[name](a, sizes, device)
        rows += measure(name, size, leaves, peers, floors, machine, a.repeats, device)
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text(
            json.dumps({"machine": machine, "settings": vars(a), "rows": rows}, indent=1) + "\n"
        )
    print(f"wrote {a.out}")


# --- the machine ---


def clock(f, device):
    """Seconds that f takes -> (seconds, what f returned). On a GPU: from the first kernel to the last, caches
    cold.

    There the GPU is kept busy until f has been put into its queue: what Python takes for that would otherwise
    be counted.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        out = f()
        return time.perf_counter() - start, out
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.zeros(256 << 20, dtype=torch.int8, device=device)  # flushes the caches: more than any holds
    torch.cuda._sleep(4_000_000)  # cycles, 2 to 3 ms
    start.record()
    out = f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, out


def best(f, device, runs=10):
    """Seconds that f takes at best."""
    return min(clock(f, device)[0] for _ in range(runs))


def probe(device, dtype):
    """What this machine can do: bytes read and written by a copy, flops of the best product (of dtype and
    float32), an empty call.
    """
    big = device.type == "cuda"
    x = torch.ones((1 << 30 if big else 1 << 27) // 4, device=device)
    y, n, empty = torch.empty_like(x), 8192 if big else 1024, torch.zeros(1, device=device)
    copied = 2 * x.numel() * 4 / best(lambda: y.copy_(x), device)
    # A GPU multiplies ones faster: it draws less power.
    squares = [torch.randn(n, n, device=device).to(t) for t in {dtype, torch.float32}]
    product = max(2 * n**3 / best(functools.partial(torch.matmul, s, s), device) for s in squares)
    return {
        "name": torch.cuda.get_device_name() if big else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vector_bits": ops.choice()[1] and torch.ops.crystal.vector_bits(0),
        "copy_gb_s": copied / 1e9,
        "tflop_s": product / 1e12,
        "empty_us": best(lambda: empty.add_(0), device, 100) * 1e6,
    }


# --- one operator ---


def measure(name, title, leaves, peers, floor, machine, repeats, device):
    """Gate, then times of every peer in turn -> rows of the table, printed as they come.

    leaves: tensors that get gradients. peers: {name: function of leaves -> outputs, or why it cannot run};
    "compiled" is ours, "eager" plain PyTorch. floor: (bytes, flops) of the forward and of the backward pass.
    """
    print(f"\n{name}: {title}")
    able = {}
    for peer, f in peers.items():
        if isinstance(f, str):
            print(f"  {peer:24} cannot run: {f}")
            continue
        try:
            able[peer] = (f, *once(f, leaves, device)[2:])
        except Exception as error:  # a peer's own trouble is a line of the table, not the end of it
            if peer in ("compiled", "eager"):
                raise
            peers[peer] = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:120]}"
            print(f"  {peer:24} cannot run: {peers[peer]}")
    gate(name, able, [x.detach().double().requires_grad_() for x in leaves], peers["eager"], device)

    times = {peer: ([], []) for peer in able}
    every = {peer: max(1, round(sum(once(f, leaves, device)[:2]) / SLOW)) for peer, (f, *_) in able.items()}
    for n in tqdm(range(repeats), desc=name, disable=not sys.stderr.isatty(), leave=False):
        for peer, (f, *_) in able.items():
            if n % every[peer]:
                continue
            forward, backward, *_ = once(f, leaves, device)
            times[peer][0].append(forward * 1e3)
            times[peer][1].append(backward * 1e3)
    floors = [
        max(moved / machine["copy_gb_s"] / 1e6, flops / machine["tflop_s"] / 1e9) for moved, flops in floor
    ]  # ms
    ours, rows = sum(map(statistics.median, times["compiled"])), []
    print(
        f"  {'':24} {'forward ms':>22} {'backward ms':>22} {'of the floor':>13} {'x ours':>7} "
        f"{'kept MB':>8} {'peak MB':>8} {'runs':>5}"
    )
    for peer, f in peers.items():
        row = {"operator": name, "case": title, "peer": peer}
        if isinstance(f, str):
            rows.append(row | {"cannot_run": f})
            continue
        medians = [statistics.median(t) for t in times[peer]]
        quartiles = [statistics.quantiles(t, n=4)[::2] if len(t) > 1 else [t[0]] * 2 for t in times[peer]]
        kept, peak = kept_bytes(f, leaves), peak_bytes(f, leaves, device)
        row |= {
            "forward_ms": medians[0],
            "backward_ms": medians[1],
            "forward_quartiles": quartiles[0],
            "backward_quartiles": quartiles[1],
            "floor_ms": floors,
            "share_of_floor": sum(floors) / sum(medians),
            "times_ours": sum(medians) / ours,
            "kept_bytes": kept,
            "peak_bytes": peak,
            "repeats": len(times[peer][0]),
        }
        rows.append(row)
        spread = [f"{m:.3f} ({q[0]:.3f} to {q[1]:.3f})" for m, q in zip(medians, quartiles)]
        print(
            f"  {peer:24} {spread[0]:>22} {spread[1]:>22} {row['share_of_floor']:>12.0%} "
            f"{row['times_ours']:>7.2f} {kept / 1e6:>8.1f} {peak / 1e6:>8.1f} {row['repeats']:>5}"
        )
    print(f"  {'floor':24} {floors[0]:>22.3f} {floors[1]:>22.3f}")
    return rows


def once(f, leaves, device):
    """f forward and backward, the outputs' sums as the loss -> (seconds forward, seconds backward, outputs,
    gradients).
    """
    forward, outputs = clock(lambda: f(*leaves), device)
    ones = [torch.ones_like(o) for o in outputs]
    backward, grads = clock(lambda: torch.autograd.grad(outputs, leaves, ones), device)
    return forward, backward, [o.detach() for o in outputs], grads


def gate(name, able, exact_leaves, reference, device):
    """Raises unless every peer that says it computes the same does, in what is timed."""
    exact = once(reference, exact_leaves, device)[2:]
    errors = {
        peer: [
            max(float((x.double() - y).abs().max()) for x, y in zip(got, want))
            for got, want in zip(parts, exact)
        ]
        for peer, (_, *parts) in able.items()
    }
    for kind, times, own, plain, values in zip(
        ("values", "gradients"), (2, 3), errors["compiled"], errors["eager"], exact
    ):
        ulp = (
            4
            * torch.finfo(able["compiled"][1][0].dtype).eps
            * max(1.0, *(float(x.abs().max()) for x in values))
        )
        if not own <= times * plain + ulp:
            raise UserError(
                f"{name}: the compiled operator's {kind} are off by {own:.2e}, plain PyTorch's by "
                f"{plain:.2e}; nothing is timed"
            )
    print(
        "  largest error of values and gradients: "
        + "; ".join(f"{peer} {v:.1e} {g:.1e}" for peer, (v, g) in errors.items())
    )


def kept_bytes(f, leaves):
    """Bytes that f keeps for its backward pass, the leaves themselves left out."""
    own, kept = {x.untyped_storage().data_ptr() for x in leaves}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = f(*leaves)
    del out
    return sum(kept.values())


def peak_bytes(f, leaves, device):
    """Most memory that torch held at once for one forward and backward, beyond what it held before."""

    def both():
        outputs = f(*leaves)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        both()
    held = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


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
    """(B,L,M,K,H,G,d) -> ([q, k] with gradients, rows [B,M], cols [B,K]), laid out as a record is: latents,
    then the answer.
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
    """The slice by FlexAttention, whose log sum exp has a gradient: the M rows are its queries, and its
    output goes unused.
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
        "compiled": lambda q, k, v: ops.attention_with_slice(q, k, v, rows, cols),
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

if __name__ == "__main__":
    run_cli(main)
