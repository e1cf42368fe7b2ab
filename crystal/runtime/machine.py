"""What this machine can do, and the clock that says so: the floors of benchmarks stand on it."""

import functools
import platform
import time

import torch

from crystal.runtime import ops
from crystal.runtime.config import UserError


def device_of(name):
    """The torch device of `auto` (a GPU where there is one), `cpu` or `cuda`; UserError for a missing GPU."""
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise UserError("--device cuda: torch sees no GPU here")
    if name == "auto":
        name = "cuda" if gpu else "cpu"
    return torch.device(name)


def clock(f, device):
    """Seconds that f takes -> (seconds, what f returned). On a GPU: from the first kernel to
    the last, caches cold.

    There the GPU is kept busy until f has been put into its queue: what Python takes for that
    would otherwise be counted.
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
