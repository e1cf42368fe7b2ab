"""ops_gradients.py: gradients where the graph is used in an unusual way; test_ops.py holds their values."""

import pytest
import torch
import torch.utils.checkpoint
from places import compiled  # noqa: F401
from test_ops import f64, heads, normal, vocab_step

from crystal.runtime import ops


@pytest.mark.parametrize("in_place", [False, True])
def test_vocab_under_checkpointing(compiled, in_place):
    """Logits that are computed again in the backward pass."""
    h, W = normal(8, 5), normal(5, 30, seed=1).requires_grad_()
    (want,) = torch.autograd.grad(vocab_step(h @ W), W)
    loss = torch.utils.checkpoint.checkpoint(
        lambda W: vocab_step(h @ W, in_place=in_place), W, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(loss, W)[0], want)


def test_vocab_second_derivative_raises(compiled):
    z = normal(4, 9).requires_grad_()
    (grad,) = torch.autograd.grad(vocab_step(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="has none itself"):
        grad.sum().backward()


def test_slice_second_derivative_raises(compiled):
    q, k, rows, cols = heads([[3, 5]], [[0, 2]])(f64)
    (grad,) = torch.autograd.grad(
        ops.attn_slice(q.requires_grad_(), k, rows, cols).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="has none itself"):
        grad.sum().backward()
