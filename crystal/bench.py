"""Measures the compiled operators against their floors and their peers: `python -m crystal.bench`.

Prints a table and writes JSON. `python -m crystal.bench step` measures a whole update: bench_step.py.

First the machine: bandwidth of a copy, the best matrix product, one empty call. A *floor* is the least time
that an operator can take there: the larger of the bytes it must move and the products it must form. Then, per
operator, a gate (errors against float64 at most two and three times those of plain PyTorch, or nothing is
timed), and times: median and quartiles of 30 runs, peers in turn, of slow peers fewer (the last column).

N rows, V vocabulary; B sequences, L length, M rows, K columns, H heads, G key heads, d head size.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from crystal.bench_cases import CASES
from crystal.runtime import ops
from crystal.runtime.config import OneLineParser, UserError, run_cli
from crystal.runtime.machine import clock, device_of, probe

SLOW = 1.0  # a peer whose run takes n times so many seconds takes part in every n-th round alone


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["step"]:
        from crystal import bench_step  # which measures by this file's functions

        return bench_step.main(argv[1:])
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
    device = device_of(a.device)
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
    """f forward and backward, the outputs' sums as the loss -> (seconds forward,
    seconds backward, outputs, gradients).
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


if __name__ == "__main__":
    run_cli(main)
