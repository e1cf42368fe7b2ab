"""Parameters and AdamW's state by name: restored to the bit, and what does not fit is refused whole."""

import json

import pytest
import torch

from crystal.runtime.checkpoint import load, save, verify
from crystal.runtime.named_state import (
    CheckpointError,
    load_optimizer,
    load_parameters,
    optimizer_hyper,
    optimizer_tensors,
)


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
        )
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("bias"), "here: bias is not in the checkpoint"),
        (lambda t: t.update(other=torch.zeros(1)), "here: other is not trained here"),
        (
            lambda t: t.update(bias=torch.zeros(4)),
            r"here: bias has shape \(4,\), but the parameter has \(3,\)",
        ),
    ],
)
def test_parameters_are_copied_or_refused_whole(change, message):
    layer, wanted = torch.nn.Linear(2, 3), {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    before, changed = {name: param.detach().clone() for name, param in layer.named_parameters()}, dict(wanted)
    change(changed)
    with pytest.raises(CheckpointError, match=message):
        load_parameters(layer.named_parameters(), changed, "here")
    assert all(torch.equal(param, before[name]) for name, param in layer.named_parameters())
    load_parameters(layer.named_parameters(), wanted, "here")
    assert all(
        torch.equal(param, wanted[name]) and param.requires_grad for name, param in layer.named_parameters()
    )


# --- the optimizer ---


def build(dtype=torch.float32):
    """A model with a frozen and an unused parameter, and AdamW with two groups."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "a": torch.nn.Linear(4, 5),
            "b": torch.nn.Linear(5, 1),
            "frozen": torch.nn.Linear(2, 2),
            "unused": torch.nn.Linear(1, 1),
        }
    ).to(dtype)
    model["frozen"].requires_grad_(False)
    groups = [
        {"params": list(model["a"].parameters()), "weight_decay": 0.1},
        {"params": [*model["b"].parameters(), *model["unused"].parameters()], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.97))


def train(model, optimizer, steps):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(model["a"].weight.dtype)
        optimizer.zero_grad()
        model["b"](model["a"](x).tanh()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_goes_on_as_if_it_had_not_stopped(tmp_path, dtype):
    whole, optimizer = build(dtype)
    train(whole, optimizer, range(7))
    wanted = optimizer_tensors(optimizer, whole.named_parameters())

    model, optimizer = build(dtype)
    train(model, optimizer, range(4))
    directory = save(
        tmp_path,
        4,
        {
            "model.safetensors": dict(model.named_parameters()),
            "optimizer.safetensors": optimizer_tensors(optimizer, model.named_parameters()),
        },
        {"hyper": optimizer_hyper(optimizer)},
    )

    files, state = load(directory)
    model, optimizer = build(dtype)
    for group in optimizer.param_groups:
        group["betas"], group["weight_decay"] = (0.1, 0.1), 0.7  # the checkpoint's must come back
    model.load_state_dict(files["model.safetensors"])
    load_optimizer(optimizer, model.named_parameters(), files["optimizer.safetensors"], state["hyper"])
    assert [(group["betas"], group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [
        ((0.8, 0.97), 0.1, 1e-2 / 4), ((0.8, 0.97), 0.0, 1e-2 / 4),
    ]
    train(model, optimizer, range(4, 7))
    for name, param in whole.named_parameters():
        assert same_bits(model.get_parameter(name).detach(), param.detach()), name
    got = optimizer_tensors(optimizer, model.named_parameters())
    assert (
        got.keys() == wanted.keys()
        and "unused.weight.stateless" in got
        and not any(name.startswith("frozen") for name in got)
    )
    assert all(same_bits(got[name], wanted[name]) for name in wanted) and got["a.weight.step"].item() == 7
    assert verify(directory) == []  # going on does not write into the files that were mapped


def test_optimizer_state_keeps_its_dtype():
    """float32 moments of bf16 parameters, which torch's load_state_dict would round."""
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, range(1))
    stored = {
        name: tensor if name.endswith(("step", "stateless")) else tensor.float() / 3
        for name, tensor in optimizer_tensors(optimizer, model.named_parameters()).items()
    }
    load_optimizer(optimizer, model.named_parameters(), stored)
    got = optimizer_tensors(optimizer, model.named_parameters())
    assert (
        all(same_bits(got[name], stored[name]) for name in stored)
        and got["a.weight.exp_avg"].data_ptr() != stored["a.weight.exp_avg"].data_ptr()
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("unused.bias.stateless"), "unused.bias: is trained here"),
        (lambda t: t.update({"c.weight.exp_avg": torch.zeros(1)}), "c.weight.exp_avg: .* not trained here"),
        (
            lambda t: t.update({"frozen.weight.exp_avg": torch.zeros(2, 2)}),
            "frozen.weight.exp_avg: .* not trained here",
        ),
        (
            lambda t: t.update({"a.weight.exp_avg": torch.zeros(4, 5)}),
            r"a.weight.exp_avg: shape \(4, 5\) .* \(5, 4\)",
        ),
    ],
)
def test_a_different_model_is_refused_and_nothing_changes(change, message):
    model, optimizer = build()
    train(model, optimizer, range(2))
    stored = {
        name: tensor.clone()
        for name, tensor in optimizer_tensors(optimizer, model.named_parameters()).items()
    }
    changed = dict(stored)
    change(changed)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(optimizer, model.named_parameters(), changed, optimizer_hyper(optimizer))
    with pytest.raises(CheckpointError, match="groups"):
        load_optimizer(optimizer, model.named_parameters(), stored, optimizer_hyper(optimizer)[:1])
    with pytest.raises(CheckpointError, match="2 of the optimizer's 6 parameters have no name"):
        optimizer_tensors(optimizer, [pair for pair in model.named_parameters() if "unused" not in pair[0]])
    now = optimizer_tensors(optimizer, model.named_parameters())
    assert now.keys() == stored.keys() and all(same_bits(now[name], stored[name]) for name in stored)
    assert json.dumps(optimizer_hyper(optimizer))


def test_state_and_settings_of_the_optimizer_by_value():
    """Two updates by hand: moments, step and settings come out, and go into a fresh optimizer."""

    def made():
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        group = {"params": [p], "weight_decay": 0.25, "lr_scale": 3.0}
        return p, torch.optim.AdamW([group], lr=0.125, betas=(0.5, 0.75))

    p, optimizer = made()
    for gradient in ([2.0, 0.0], [4.0, -8.0]):
        p.grad = torch.tensor(gradient)
        optimizer.step()
    tensors = optimizer_tensors(optimizer, [("w", p), ("frozen", torch.zeros(1))])
    right = {
        "step": 2.0,
        "exp_avg": [0.5 * 1.0 + 0.5 * 4.0, 0.5 * -8.0],
        "exp_avg_sq": [0.75 * 1.0 + 0.25 * 16.0, 0.25 * 64.0],
    }
    assert {name.removeprefix("w."): value.tolist() for name, value in tensors.items()} == right
    hyper = optimizer_hyper(optimizer)
    assert len(hyper) == 1 and not {"params", "fused", "foreach", "capturable"} & hyper[0].keys()
    assert {name: hyper[0][name] for name in ("lr", "weight_decay", "lr_scale", "betas", "eps")} == {
        "lr": 0.125,
        "weight_decay": 0.25,
        "lr_scale": 3.0,
        "betas": (0.5, 0.75),
        "eps": 1e-8,
    }

    q, other = made()
    q.grad = torch.tensor([9.0, 9.0])
    other.step()
    other.param_groups[0]["lr"] = 7.0
    load_optimizer(other, [("w", q)], tensors)
    assert other.param_groups[0]["lr"] == 7.0  # without settings the group keeps its own
    assert {key: value.tolist() for key, value in other.state[q].items()} == right
    load_optimizer(other, [("w", q)], tensors, json.loads(json.dumps(hyper)))
    assert other.param_groups[0]["lr"] == 0.125 and other.param_groups[0]["betas"] == (0.5, 0.75)


def test_what_had_no_gradient_has_no_state_again():
    """An optimizer that has gone on is set back whole: state that the checkpoint lacks is forgotten."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p])
    tensors = optimizer_tensors(optimizer, [("w", p)])
    assert list(tensors) == ["w.stateless"] and tensors["w.stateless"].numel() == 0
    p.grad = torch.ones(2)
    optimizer.step()
    load_optimizer(optimizer, [("w", p)], tensors)
    assert p not in optimizer.state
