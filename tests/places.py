"""Where the compiled operators are tested: a *place* is a device, on the CPU with the width of its vectors.

    cpu-128, cpu-256, cpu-512   the CPU, with vectors of so many bits
    cuda, cuda-1, cuda-2 ..     a GPU; with a number, that version of an operator's kernels
    emulated, emulated-1 ..     the GPU's kernels, run thread by thread on the CPU (tests/cuda_on_cpu.h)

PLACES holds those that this machine has: every test runs in each of them, and what is absent is one
visible skip each (test_ops.py::test_place), not one for every sample. `pytest --require-cuda` makes the
GPU's absence a failure.

Operators that are not built are a failure. Only who asks for plain
PyTorch, CRYSTAL_OPS=reference, gets skips.
"""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from crystal.runtime import ops

# Set by test_cuda_kernels_on_the_cpu: a library in which the CPU's operators are the CUDA kernels.
EMULATED = os.environ.get("CRYSTAL_CUDA_ON_CPU")
# Set by test_wide_vectors_on_a_narrow_cpu: the folder of a _C.so with 512-bit vectors for any machine.
WIDE = os.environ.get("CRYSTAL_WIDE")
REFERENCE_ASKED = os.environ.get("CRYSTAL_OPS") == "reference"
BITS = (128, 256, 512)

# How many versions of its kernels an operator has on a GPU, and which operator chooses among them.
VERSIONS = {
    "vocab_kl_ce": ("vocab_kl_ce_version", 3),
    "attn_slice": ("attn_slice_version", 3),
    "attn_scores": ("attn_slice_version", 3),  # its gradient has three versions
    "attn_align": (None, 1),
}


def what_is_here():
    """-> ({CPU place or "cuda": why it is absent, or None}, what is wrong with the build or None)."""
    if WIDE:
        ops.HERE = Path(WIDE)
    devices, problem = ops._load()
    if problem:
        return {}, problem

    absent = {}
    before = torch.ops.crystal.vector_bits(0)
    for bits in BITS:
        try:
            torch.ops.crystal.vector_bits(bits)
            absent[f"cpu-{bits}"] = None
        except RuntimeError:
            absent[f"cpu-{bits}"] = f"this CPU has no {bits}-bit vectors"
    torch.ops.crystal.vector_bits(before)

    absent["cuda"] = None
    if not torch.cuda.is_available():
        absent["cuda"] = "no GPU here"
    elif "cuda" not in devices:
        absent["cuda"] = "crystal/_C_cuda.so is not built"
    return absent, None


ABSENT, PROBLEM = what_is_here()


def places_to_test():
    """Names of the places in which every sample runs."""
    if PROBLEM or REFERENCE_ASKED:
        return []
    if EMULATED:
        return ["emulated"]
    if WIDE:
        return ["cpu-512"]
    return [place for place, why in ABSENT.items() if why is None]


PLACES = places_to_test()
ON_CPU = [place for place in PLACES if place.startswith("cpu")]
# Where what does not depend on the width of vectors is tested: the widest ones, and the GPU.
ONE_WIDTH = ON_CPU[-1:] + [place for place in PLACES if not place.startswith("cpu")]

each_place = pytest.mark.parametrize("place", PLACES)
each_cpu_place = pytest.mark.parametrize("place", ON_CPU)
each_device = pytest.mark.parametrize("place", ONE_WIDTH)


def versions(operator):
    """The places, with each version of a GPU's kernels for the operator."""
    count = VERSIONS[operator][1]
    found = []
    for place in PLACES:
        found += (
            [place] if place.startswith("cpu") else [f"{place}-{version}" for version in range(1, count + 1)]
        )
    return found


@contextlib.contextmanager
def at_place(place, operator=None):
    """Sets the CPU's vectors, or the version of the operator's CUDA kernels, while it lasts -> the device."""
    kind, _, number = place.partition("-")
    choose = torch.ops.crystal.vector_bits if kind == "cpu" else None
    if kind != "cpu" and number and VERSIONS[operator][0]:
        choose = getattr(torch.ops.crystal, VERSIONS[operator][0])

    before = choose(0) if choose else None
    if choose:
        choose(int(number))
    try:
        yield torch.device("cuda" if kind == "cuda" else "cpu")
    finally:
        if choose:
            choose(before)


def forget_the_choice():
    for cached in (ops.choice, ops._served):
        cached.cache_clear()


def skip_or_fail(request, why):
    """A failure where a GPU is required, else a skip."""
    if request.config.getoption("--require-cuda"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture
def compiled(monkeypatch):
    """The compiled operators; a failure where they are not built, a skip for who asked for plain PyTorch."""
    if REFERENCE_ASKED:
        pytest.skip("CRYSTAL_OPS=reference: the compiled operators are not asked for")
    if PROBLEM:
        pytest.fail(f"{PROBLEM} (or test plain PyTorch alone: CRYSTAL_OPS=reference)")
    monkeypatch.setenv("CRYSTAL_OPS", "require")
    forget_the_choice()
    ops.choice()
    if EMULATED:
        torch.ops.load_library(EMULATED)
        monkeypatch.setattr(
            ops, "SERVED", {name: {"cpu": served.get("cuda", ())} for name, served in ops.SERVED.items()}
        )
    yield
    forget_the_choice()


def dtypes(operator, place):
    """Types that the operator serves in a place, the exact one first."""
    kind = "cpu" if place.startswith("cpu") else "cuda"
    order = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    return [dtype for dtype in order if dtype in ops.SERVED[operator][kind]]
