"""What a step wants to know of its batch on the host, computed while the batch is still there.

Whoever reads a number off a GPU waits until all that was asked of the GPU before is done; so does whoever
indexes by a mask, since the host has to know how many rows come out. Such a wait in the middle of a forward
leaves the GPU without work until the host has sent more. All that a forward asks so depends on tokens and
grids alone: it is computed on the CPU, and before the batch goes to the device.

    known(batch, f, "targets")    f(targets) by the CPU, where the batch is
    batch = Ahead()(batch)        brings what `known` was asked of the batch before, so that nobody waits

So the first update waits, and no further one does until another stage asks for something else. What a batch
brings counts only while it holds the very tensors from which that was computed.
"""

from contextlib import suppress
from dataclasses import fields, is_dataclass, replace

import torch

PIXELS = "pixel"  # how the names of what is too large to go back to the host begin


class Ahead:
    """Batches of `collate`, still on the CPU -> the same with what the batch before was asked for."""

    def __init__(self):
        self.last = None

    @torch.no_grad()
    def __call__(self, batch):
        """A batch that tells an error stays what it is."""
        if "error" in batch:
            return batch
        wanted = self.last.asked if self.last else {}
        self.last = plan = Plan(batch)
        batch = batch | {"ahead": plan}

        # What is wrong with a batch is told by whoever asks, where it is asked.
        for f, names, by in wanted:
            with suppress(Exception):
                known(batch, f, *names, by=by)
        plan.asked.clear()
        return batch


class Plan:
    """What is known of one batch.

    given: the batch from which it was computed. values: {(f, names, by): f's value}. asked: the keys that
    were asked for, whoever computed them.
    """

    def __init__(self, given):
        self.given = given
        self.values = {}
        self.asked = {}

    def to(self, device, moved):
        """The same beside the batch `moved`, the one from which it was computed on another device."""
        plan = Plan(moved)
        plan.values = {key: sent(value, device) for key, value in self.values.items()}
        plan.asked = self.asked  # the list that Ahead reads
        return plan


@torch.no_grad()
def known(batch, f, *names, by=()):
    """f(*the batch's entries of these names, *by), computed on the CPU, its tensors on the batch's device.

    Without names f is given the batch as a dictionary, less its pixels. f and by: hashable, the same objects
    for every batch. Tensors in lists, tuples, dictionaries and dataclasses are found; numbers stay numbers.
    """
    plan = batch.get("ahead")
    seen = names or [name for name in batch if name != "ahead" and not name.startswith(PIXELS)]
    fits = plan is not None and all(batch.get(name) is plan.given.get(name) for name in seen)
    key = f, names, by
    if fits:
        plan.asked[key] = None
        if key in plan.values:
            return plan.values[key]

    device = next((x.device for x in batch.values() if isinstance(x, torch.Tensor)), torch.device("cpu"))
    host = {name: sent(batch.get(name), torch.device("cpu")) for name in seen}
    value = sent(f(*host.values(), *by) if names else f(host, *by), device)
    if fits:
        plan.values[key] = value
    return value


def sent(value, device):
    """A value with its tensors on the device; from pinned memory, so that the host does not wait."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu" and device.type == "cuda":
            return value.pin_memory().to(device, non_blocking=True)
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: sent(getattr(value, f.name), device) for f in fields(value)})
    if isinstance(value, dict):
        return {name: sent(x, device) for name, x in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[sent(x, device) for x in value])
    if isinstance(value, list | tuple):
        return type(value)(sent(x, device) for x in value)
    return value
