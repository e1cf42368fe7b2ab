"""A model in shards: every process keeps a part of every layer, and gathers a layer while it works on it.

torch's FSDP2 (`fully_shard`) does the gathering; this file says what is gathered together, in which numbers,
and how a sharded run's state becomes whole again. With n processes each keeps 1/n of what does not train, of
what trains, of its gradients and of AdamW's moments.

    a layer              one group: gathered before its forward and its backward, let go after each; its
                         gradients are averaged over the processes as soon as its backward is done
    the model around     the last norm and what the vision tower has outside its blocks: one group
    heads, new tokens    the outermost group, gathered for the whole update: methods and hooks read them
                         wherever they like
    the vocabulary       whole in every process: TrainableTokens writes rows into it

What trains is kept and reduced in float32 and computed with in the type of the run (bfloat16 on a GPU).
The copy's hooks, recorders and caches travel as keywords through FSDP's own hooks, which cast nothing here.

Fed-back latents run the decoder once a piece, and a process does not know how many pieces another one has.
Such a method `repeats`: its layers are gathered once an update and let go after the backward pass, and
gradients add up where they are until then.
"""

import json
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from crystal.runtime.config import UserError


class Sharded(nn.Module):
    """An objective whose model is in shards: called as the objective is; see `cut`."""

    def __init__(self, objective, repeats):
        super().__init__()
        self.objective = objective
        self.repeats = repeats
        self.rounds = 0  # how often the decoder ran in this forward
        self.anchor: torch.Tensor | None = None

    def forward(self, *args):
        self.rounds = 0
        terms = dict(self.objective(*args))
        if self.rounds > 1 and not self.repeats:
            raise UserError(
                "--shard full: this method runs the decoder several times in one forward; its class needs "
                "`repeats = True`"
            )
        device = next(iter(terms.values())).device
        return terms | {"anchor": torch.zeros((), device=device, requires_grad=True) * 1}


def cut(objective, procs, dtype, repeats=False):
    """Cuts a train.Objective into shards, in place -> Sharded, to be called in its stead.

    dtype: what is computed in. procs: distributed.Processes, at least two. The model's weights are in dtype;
    of those that train a float32 copy is made layer by layer. To be called before the optimiser is made: what
    trains are other parameters afterwards, of the same names.
    """
    model = objective.model
    mesh = init_device_mesh(procs.device.type, (procs.world,))
    vocabulary = {model.hf.get_input_embeddings().weight, model.hf.lm_head.weight}
    low = dtype in (torch.bfloat16, torch.float16)
    computing = MixedPrecisionPolicy(
        param_dtype=dtype if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,
    )

    # One layer after the other, so that at no time two of them are whole in float32.
    for layer in stacked(model.hf):
        widen(layer)
        fully_shard(layer, mesh=mesh, mp_policy=computing, reshard_after_forward=not repeats)
    widen(model.hf.model)
    around = {"mesh": mesh, "ignored_params": vocabulary, "reshard_after_forward": False}
    fully_shard(model.hf.model, mp_policy=computing, **around)

    # New tokens and heads compute in the type that they are kept in.
    whole = Sharded(objective, repeats)
    widen(whole)
    fully_shard(whole, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **around)
    if repeats:
        whole.set_reshard_after_backward(False)
        whole.set_requires_gradient_sync(False)

    # After FSDP's own hook, which makes the anchor a place from which a backward pass may start.
    whole.register_forward_hook(take_anchor)
    model.layers[0].register_forward_pre_hook(lambda *_: count(whole))
    return whole


def stacked(hf):
    """The layers of decoder and vision tower: what stands in a transformers model's outermost lists."""
    found, inside = [], set()
    for module in hf.modules():
        if not isinstance(module, nn.ModuleList) or module in inside:
            continue
        for entry in module:
            inside.update(entry.modules())
            if next(entry.parameters(), None) is not None:
                found.append(entry)
    return found


def widen(module):
    """Keeps what trains in float32 at least, and alike in all processes: as the first one has it."""
    for p in module.parameters():
        if p.requires_grad and not isinstance(p, DTensor):
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
            dist.broadcast(p.data, 0)


def count(whole):
    whole.rounds += 1


def take_anchor(whole, args, terms):
    """Takes the anchor out of what the objective returned."""
    whole.anchor = terms.pop("anchor")
    return terms


@contextmanager
def in_step(whole, last):
    """Around forward and backward of one part of an update; only the `last` part's gradients are shared."""
    if not whole.repeats:
        whole.set_requires_gradient_sync(last)
        yield
        return

    yield
    if last:
        # A second backward pass, through nothing: at its end every group shares what has added up.
        whole.set_requires_gradient_sync(True)
        whole.set_reshard_after_backward(True)
        whole.anchor.backward()
        whole.set_requires_gradient_sync(False)
        whole.set_reshard_after_backward(False)


@contextmanager
def gathered(whole):
    """While it lasts, every process has the whole model and calls it as it likes: no call waits for another.

    For validation, where processes have different numbers of batches. It takes the memory of the weights in
    the type of computing; gradients and kept activations are gone by then. No gradient flows.
    """
    groups = [module for module in whole.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.unshard()
        group.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(group in resharding(whole), recurse=False)
            group.reshard()


def resharding(whole):
    """The groups that are let go after their forward: layers, of a method that runs them once."""
    return set() if whole.repeats else set(stacked(whole.objective.model.hf))


def clip(parameters, most):
    """Clips the norm of all gradients to `most` -> the norm before, a tensor, the same in every process."""
    return full(nn.utils.clip_grad_norm_(parameters, most))


# --- whole again ---


def full(tensor):
    """A tensor, or the whole of one that is in shards; then every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter, tensor):
    """A whole tensor as the parameter is kept: in shards where that is, on its device."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


class Collected:
    """Tensors of several files that are in shards, made whole one at a time, in one order in all processes.

    files: {file: {tensor name: tensor}}. The first process writes them (`writer`); the others only take part.
    """

    def __init__(self, files):
        self.files = files
        self.left = iter([tensor for tensors in files.values() for tensor in tensors.values()])

    def writer(self, file):
        """A function that writes this file's tensors to a path, as safetensors does."""
        return lambda path: write(path, self.files[file], self.left)

    def finish(self):
        """Takes part in what is left: all of it, or what a full disk has left unwritten."""
        for tensor in self.left:
            full(tensor.detach())


@contextmanager
def collected(files, procs):
    """checkpoint.contents' files -> what the first process gives to checkpoint.save; all processes enter.

    Files without shards stay what they are.
    """
    if not any(isinstance(x, DTensor) for tensors in files.values() for x in tensors.values()):
        yield files
        return

    parts = Collected(files)
    try:
        yield {file: parts.writer(file) for file in files}
    finally:
        parts.finish()


KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write(path, tensors, left):
    """Writes a safetensors file tensor by tensor, so that one alone is whole at any time.

    left: the tensors once more, as an iterator. The format is eight bytes of a length, a header of JSON with
    the place of every tensor, and their bytes one after the other.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = kind | {"data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in tensors:
            whole = full(next(left).detach()).cpu().contiguous()
            file.write(whole.reshape(-1).view(torch.uint8).numpy().data)
