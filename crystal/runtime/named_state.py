"""Parameters and an optimizer's state as named tensors, and back to the bit; what does not fit is refused.

A name is a parameter's in the model, so that neither the order of an optimizer's parameters nor its groups
matter to what is on the disk. torch's own load_state_dict would cast moments to the parameter's dtype.
"""

import torch

from crystal.runtime import shard
from crystal.runtime.config import UserError


class CheckpointError(UserError, ValueError):
    """One line that names the file or the tensor, and what is wrong with it."""


@torch.no_grad()
def load_parameters(named_params, tensors, source):
    """Copies tensors into (name, parameter) pairs.

    CheckpointError naming `source`, and nothing changed, if names or shapes differ.
    """
    named = dict(named_params)
    if apart := sorted(named.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{source}: {apart[0]} is "
            + ("not in the checkpoint" if apart[0] in named else "not trained here")
        )
    for name, param in named.items():
        if param.shape != tensors[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, but the parameter has "
                f"{tuple(param.shape)}"
            )
    for name, param in named.items():
        param.copy_(shard.like(param, tensors[name]))


def optimizer_tensors(optimizer, named_params):
    """State of AdamW, or of any optimizer whose state is tensors, by parameter name.

    It is {"layer.weight.exp_avg": tensor, ..., "layer.weight.step": 0-dim}. named_params: (name, parameter)
    pairs that cover the optimizer's parameters; others are passed over. A parameter that never had a gradient
    has no state, recorded as an empty "name.stateless". Tensors are the optimizer's own, not copies.
    CheckpointError for a parameter without a name or a state not a tensor.
    """
    tensors = {}
    for name, param in _named(optimizer, named_params):
        state = optimizer.state.get(param)
        if not state:
            state = {"stateless": torch.empty(0, dtype=torch.uint8)}

        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                kind = type(value).__name__
                raise CheckpointError(
                    f"{name}.{key}: optimizer state of type {kind} cannot be saved, only tensors"
                )
            tensors[f"{name}.{key}"] = value
    return tensors


def optimizer_hyper(optimizer):
    """Learning rate, betas, weight decay and the like, one JSON dict for each parameter group.

    How the update is computed (`fused`, ...) is left to the machine.
    """
    implementation = {"params", "foreach", "fused", "capturable", "differentiable"}
    return [
        {
            key: float(value) if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key not in implementation
        }
        for group in optimizer.param_groups
    ]


def load_optimizer(optimizer, named_params, tensors, hyper=None):
    """Gives `optimizer` the state of `optimizer_tensors` and, if given, of `optimizer_hyper`.

    It is the same to the bit: values, dtypes and step counters. CheckpointError, and nothing changed, if
    names, shapes or parameter groups differ.
    """
    named = dict(_named(optimizer, named_params))

    # What the checkpoint has, by parameter.
    states = {name: {} for name in named}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in named:
            raise CheckpointError(
                f"{full}: the checkpoint has optimizer state for a parameter that is not trained here"
            )
        shape = named[name].shape
        if key not in ("step", "stateless") and value.shape != shape:
            raise CheckpointError(
                f"{full}: shape {tuple(value.shape)} in the checkpoint, but the parameter has {tuple(shape)}"
            )
        states[name][key] = value

    for name, state in states.items():
        if not state:
            raise CheckpointError(
                f"{name}: is trained here, but the checkpoint has no optimizer state for it"
            )
    groups = optimizer.param_groups
    if hyper is not None:
        now = optimizer_hyper(optimizer)
        if [set(group) for group in hyper] != [set(group) for group in now]:
            raise CheckpointError("the optimizer's parameter groups differ from the checkpoint's")

    # Nothing is changed before here. Not load_state_dict: it casts moments to the parameter's dtype.
    names = {param: name for name, param in named.items()}
    optimizer.state.clear()
    for group in groups:
        # Then the step counter lies on its parameter's device.
        beside = group.get("fused") or group.get("capturable")
        for param in group["params"]:
            state = states[names[param]]
            if "stateless" in state:
                continue
            own = {}
            for key, value in state.items():
                if key == "step":
                    own[key] = value.to(param.device if beside else "cpu", copy=True)
                else:
                    own[key] = shard.like(param, value).clone()
            optimizer.state[param] = own

    for group, saved in zip(groups, hyper or []):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(value, list) else value


def _named(optimizer, named_params):
    """(name, parameter) of what the optimizer updates, in the order of the names."""
    trained = {param for group in optimizer.param_groups for param in group["params"]}
    named = [(name, param) for name, param in named_params if param in trained]
    if len(named) != len(trained):
        raise CheckpointError(
            f"{len(trained) - len(named)} of the optimizer's {len(trained)} parameters have no name"
        )
    return named
