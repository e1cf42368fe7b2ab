"""What `bench step` reads off one update: seconds, bytes kept, operations, kernels, waits, time by part.

Each takes a function and runs it; bench_step.py says what runs.
"""

import collections
import math
import statistics
import subprocess
import time
import traceback
import warnings
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# --- time ---


def seconds(f, device):
    """What f takes, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def spread(times):
    """Numbers -> {"p10", "p50", "p90"} by linear interpolation between the sorted ones."""
    if len(times) == 1:
        return dict.fromkeys(("p10", "p50", "p90"), times[0])
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"p10": tenths[0], "p50": statistics.median(times), "p90": tenths[8]}


def clocks():
    """What a GPU ran at -> {"sm_mhz", "memory_mhz", "power_w", "power_limit_w"}; {} where nobody tells."""
    fields = "clocks.sm,clocks.mem,power.draw,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30)
        numbers = [float(number) for number in said.stdout.splitlines()[0].split(",")]
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(("sm_mhz", "memory_mhz", "power_w", "power_limit_w"), numbers))


def parts(update, device):
    """One bench_rows.Update -> its milliseconds by part, the device waited for at each part's end.

    The tower and the decoder are transformers' modules; what else the forward does is embeddings, head and
    losses. Waiting makes the sum larger than an update's time.
    """

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    spent, begun = collections.Counter(), {}
    inner = update.model.hf.model
    tower = getattr(inner, "visual", None) or inner.vision_tower
    hooks = []
    for name, module in (("tower", tower), ("decoder", inner.language_model)):

        def begin(*_, name=name):
            begun[name] = now()

        def end(*_, name=name):
            spent[name] += now() - begun[name]

        hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    # An update, part by part.
    start = now()
    loss = update.loss()
    forward = now()
    loss.backward()
    backward = now()
    update.update()
    over = now()
    for hook in hooks:
        hook.remove()

    spent["losses"] = forward - start - spent["tower"] - spent["decoder"]
    spent["backward"], spent["update"] = backward - forward, over - backward
    return {name: took * 1e3 for name, took in spent.items()}


# --- memory ---


def saved_bytes(forward, given=()):
    """Bytes of storages that autograd keeps for the backward pass of forward() -> (bytes, what it returned).

    given: tensors that are there anyway, such as parameters and the batch: their storages do not count. A
    storage counts once, however many operations keep a view of it.
    """
    own = {x.untyped_storage()._cdata for x in given}
    kept, held = {}, []

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            held.append(x)  # or its address would be used again, by another tensor that is kept
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    return sum(kept.values()), out


# --- operations ---


def attention_flops(kernel, products):
    """A formula for FlopCounterMode, which fails on grouped heads: so many products of L x L x d.

    kernel: torch's operator. Of causal attention half of the cells count.
    """
    names = [argument.name for argument in kernel.default._schema.arguments]

    def count(*given, **named):
        said = dict(zip(names, given)) | named
        q, k = said["query"], said["key"]
        cells = math.prod(q) * k[2]
        return products * 2 * cells // (2 if said.get("is_causal") else 1)

    return count


def addmm_flops(self_shape, a_shape, b_shape, **_):
    """x + a b: a [n,m] times b [m,k]."""
    return 2 * math.prod(a_shape) * b_shape[-1]


def flops(step):
    """Operations of one update, products of matrices and convolutions alone."""
    kinds = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    # Adapters add in place, which torch's own table leaves out.
    formulas = {torch.ops.aten.addmm_: addmm_flops}
    for kind in kinds:
        forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}")
        backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_backward")
        formulas[forward] = attention_flops(forward, 2)
        formulas[backward] = attention_flops(backward, 5)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()


# --- waits ---


# Operations whose result the host reads, or whose size it has to know: on a GPU it waits there.
READS = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique", "equal", "is_nonzero",
    "repeat_interleave.Tensor",
)  # fmt: skip


class WaitCounter(TorchDispatchMode):
    """Counts, on any device, the operations that would make the host wait for a GPU, by line of code."""

    def __init__(self):
        super().__init__()
        self.sites = collections.Counter()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        if waits(func.name().removeprefix("aten::"), args):
            self.sites[site()] += 1
        return func(*args, **(kwargs or {}))


def waits(name, args):
    """Whether an operation of ATen makes the host wait: it is read, or indexes by a mask of bools."""
    if name.startswith(READS):
        return True
    if not name.startswith(("index.Tensor", "index_put", "_index_put")):
        return False
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1])


def site():
    """The innermost line of crystal or transformers that is being run, as file.py:7."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        inside = {"crystal", "transformers"} & set(path.parts)
        if inside and path != Path(__file__):
            return f"{path.name}:{frame.lineno}"
    return "?"


def host_waits(step):
    """One update on any device -> {"waits", "waits_at": [[line, times]], "operations"}: by operation.

    `tolist` is one wait, as of a whole tensor; it reaches the dispatcher as no operation of its own.
    """
    counter = WaitCounter()
    plain = torch.Tensor.tolist

    def tolist(tensor):
        counter.sites[site()] += 1
        return plain(tensor)

    torch.Tensor.tolist = tolist
    try:
        with counter:
            step()
    finally:
        torch.Tensor.tolist = plain
    return {
        "waits": sum(counter.sites.values()),
        "waits_at": [list(item) for item in counter.sites.most_common()],
        "operations": counter.operations,
    }


# --- what a GPU did ---


def on_the_gpu(step):
    """How long the GPU worked in one update, in how many kernels, and where the host did wait for it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waited = [w for w in caught if "synchroniz" in str(w.message)]
    sites = collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waited)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0]
    events.sort(key=lambda event: -event.device_time_total)
    longest = [(event.key[:120], event.count, event.device_time_total / 1e3) for event in events[:30]]
    return {
        "waited": len(waited),
        "waited_at": sites.most_common(),
        "busy_ms": sum(event.device_time_total for event in events) / 1e3,
        "kernels": sum(event.count for event in events),
        "longest": longest,
    }
