"""The rows' own pieces: what example they make, and peers that compute the loss of the row beside them."""

import pytest
import torch

from crystal.bench_rows import ROWS, Update
from crystal.runtime import plan

CPU = torch.device("cpu")


def gradients(update):
    update.loss().backward()
    return {name: p.grad for name, p in update.named}


def test_every_peer_is_a_row_of_another_kind():
    for row in ROWS.values():
        assert not row.peer or ROWS[row.peer].by != "crystal"
        assert not row.peer or ROWS[row.peer].batch == row.batch


def test_two_passes_learn_what_the_dual_path_learns():
    """Not the loss alone: every gradient of adapters and new tokens, through the copied latents."""
    sizes = ("tiny", 0, 0)
    made = [Update(ROWS[name], 0, sizes, CPU, torch.float32) for name in ("kv", "two_passes")]
    ours, theirs = map(gradients, made)
    ours = {name.removeprefix("model."): g for name, g in ours.items()}
    assert ours.keys() == theirs.keys()
    for name, g in ours.items():
        assert torch.allclose(g, theirs[name], atol=2e-5 + 1e-3 * float(g.abs().max())), name


@pytest.mark.parametrize("length", [0, 450])
def test_the_record_is_about_as_long_as_asked(length):
    update = Update(ROWS["kv"], length, ("tiny", 0, 0), CPU, torch.float32)
    L = update.batch["input_ids"].shape[1]
    assert 0 <= L - length <= 320 if not length else abs(L - length) <= 60
    assert update.work.length == L and update.work.patches == 2048 and update.paths == 2
    before = [p.detach().clone() for _, p in update.named]
    assert isinstance(update(), float)
    assert any(not torch.equal(a, p) for a, (_, p) in zip(before, update.named))


def test_four_pairs_are_four_times_the_work():
    one, four = (Update(ROWS[name], 0, ("tiny", 0, 0), CPU, torch.float32) for name in ("sft", "sft_x4"))
    assert plan.flops(four.work) == 4 * plan.flops(one.work) > 0
    assert len(four.batch["input_ids"]) == 4
