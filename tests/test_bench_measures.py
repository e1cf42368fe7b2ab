"""What is read off one update, on functions whose bytes, operations and waits are known by hand."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from crystal import bench_measures, feedback
from crystal.bench_measures import attention_flops, flops, host_waits, saved_bytes, spread


def test_storages_count_once():
    """x is given; exp keeps its output, whose view the product keeps too, beside its other side."""
    x = torch.randn(10, 20, requires_grad=True)
    W = torch.randn(20, 5, requires_grad=True)

    def forward():
        y = x.exp()
        return (y @ W).sum() + (y.view(20, 10) * 2).sum()

    kept, out = saved_bytes(forward, [x, W])
    assert kept == 10 * 20 * 4 and out.requires_grad
    assert saved_bytes(forward, [x])[0] == 10 * 20 * 4 + 20 * 5 * 4


def test_tenths():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == pytest.approx({"p10": 1.4, "p50": 3.0, "p90": 4.6})
    assert spread([7.0]) == {"p10": 7.0, "p50": 7.0, "p90": 7.0}


def test_attention_counts_the_cells_that_are_seen():
    """q [2,6,10,32] against k [2,3,10,32]: 2 products of L x L x d a head; half of the cells where causal."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k = (2, 6, 10, 32), (2, 3, 10, 32)
    whole = 2 * 2 * 6 * 10 * 10 * 32 * 2
    assert attention_flops(kernel, 2)(q, k, k, out_shape=None) == whole
    assert attention_flops(kernel, 2)(q, k, k, 0.0, True) == whole / 2
    assert attention_flops(kernel, 2)(q, k, k, 0.0, is_causal=True, attn_mask=None) == whole / 2
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    assert attention_flops(back, 5)(q, q, q, q, q, (2, 6, 10), 0.0, True) == 5 * 2 * 6 * 10 * 10 * 32


def test_operations_of_products_and_of_what_is_added_in_place():
    a, b = torch.randn(4, 6), torch.randn(6, 3)

    def step():
        y = a @ b
        y.addmm_(a, b)
        q = torch.randn(1, 2, 8, 16)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)

    assert flops(step) == 2 * 2 * 4 * 6 * 3 + 2 * 2 * 8 * 8 * 16


def test_waits_of_the_host():
    """Reading a number, a mask as an index, nonzero, tolist: one each; an index of integers is none."""
    x, mask = torch.arange(6.0), torch.tensor([True, False] * 3)

    def step():
        float(x.sum())
        x[mask]
        x[mask] = 0
        mask.nonzero()
        x.tolist()
        x[torch.tensor([1, 2])]
        x + 1

    plain = torch.Tensor.tolist
    found = host_waits(step)
    assert torch.Tensor.tolist is plain
    assert found["waits"] == 5 and sum(n for _, n in found["waits_at"]) == 5
    assert found["operations"] > 5


def test_where_the_host_waits():
    """The line of crystal's code, not the test's."""
    inputs = {"attention_mask": torch.ones(1, 6), "mm_token_type_ids": torch.zeros(1, 6)}
    latents = torch.tensor([[False, False, True, False, True, False]])
    found = host_waits(lambda: feedback.pieces(inputs, latents))
    assert found["waits_at"] and all(place.startswith("feedback.py:") for place, _ in found["waits_at"])


def test_clocks_are_none_without_a_gpu(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(bench_measures.subprocess, "run", missing)
    assert bench_measures.clocks() == {}
    said = type("Said", (), {"stdout": "1755, 2619, 310.5, 700.0\n"})
    monkeypatch.setattr(bench_measures.subprocess, "run", lambda *_, **__: said)
    assert bench_measures.clocks() == {
        "sm_mhz": 1755, "memory_mhz": 2619, "power_w": 310.5, "power_limit_w": 700,
    }  # fmt: skip


def test_parts_add_up():
    """The tower, the decoder and what else a forward does, then backward and update: nothing twice."""
    clock = iter([0.0, 1.0, 4.0, 4.5, 10.5, 12.0, 20.0, 21.0])
    order = []

    class Part(torch.nn.Module):
        def forward(self, x):
            return x * 2

    tower, decoder = Part(), Part()
    inner = SimpleNamespace(visual=tower, language_model=decoder)

    def loss():
        order.append("loss")
        return decoder(tower(torch.ones((), requires_grad=True)))

    update = SimpleNamespace(
        model=SimpleNamespace(hf=SimpleNamespace(model=inner)),
        loss=loss,
        update=lambda: order.append("update"),
    )
    real, bench_measures.time.perf_counter = bench_measures.time.perf_counter, lambda: next(clock)
    try:
        found = bench_measures.parts(update, torch.device("cpu"))
    finally:
        bench_measures.time.perf_counter = real
    assert found == {"tower": 3e3, "decoder": 6e3, "losses": 3e3, "backward": 8e3, "update": 1e3}
    assert order == ["loss", "update"] and not tower._forward_hooks and not decoder._forward_pre_hooks
