"""The numbers of an update, summed over all ranks and read by the host when they have long been there.

To print a loss is to wait for the GPU: whoever reads it at once leaves the GPU without work while the next
forward is being prepared. So what is logged of an update goes off in one piece, by one reduction, and is read
while the next update runs. What must not wait for that is decided on the device: a fused AdamW leaves out an
update whose loss or gradient is not finite, as it does for a GradScaler, and the weights stay as they were
until the host has read why.
"""

from typing import NamedTuple

import torch

from crystal.runtime.ahead import sent


class Told(NamedTuple):
    """What the host knows of an update: means over all ranks, tokens of all, whether one wants to stop."""

    means: dict
    tokens: int
    stop: bool
    norm: float

    @property
    def finite(self):
        """Whether the update was one."""
        return is_finite(torch.tensor(self.means["loss"]), torch.tensor(self.norm)).item()


class Numbers:
    """Scalars of an update on their way to the host; all ranks make one, in the same order.

    means: {name: this rank's 0-dim tensor}, `loss` among them. tokens: int, this rank's. stop: whether this
    rank wants to end. norm: 0-dim tensor, the same on all ranks.
    """

    def __init__(self, means, tokens, stop, norm, procs):
        self.names = list(means)
        self.world = procs.world
        device = norm.device
        own = sent(torch.tensor([tokens, bool(stop)], dtype=torch.float64), device)
        norm = norm.detach().double().reshape(1)
        terms = torch.stack([value.detach().double() for value in means.values()])

        total = procs.sum(torch.cat([terms, own]))
        loss = total[self.names.index("loss")]
        self.broken = (~is_finite(loss, norm[0])).float()  # on the device
        total = torch.cat([total, norm])
        self.there = None
        if device.type != "cuda":
            self.values = total
            return

        # The copy is made behind what the GPU has to do; whoever reads waits for that and no more.
        self.values = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
        self.values.copy_(total, non_blocking=True)
        self.there = torch.cuda.Event()
        self.there.record()

    def read(self):
        """Waits until the numbers are there -> Told."""
        if self.there:
            self.there.synchronize()
        *terms, tokens, stop, norm = self.values.tolist()
        means = {name: value / self.world for name, value in zip(self.names, terms)}
        return Told(means, int(tokens), stop > 0, norm)


def is_finite(loss, norm):
    """Whether a loss and a gradient's norm are numbers, as a tensor."""
    return loss.isfinite() & norm.isfinite()


def holds_back(optimizer):
    """Whether an optimiser leaves out an update that `hold_back` says is none: AdamW, if it is fused."""
    return all(group.get("fused") for group in optimizer.param_groups)


def hold_back(optimizer, broken):
    """Says of the update to come, by a tensor of 1 or 0 on the device, whether it is left out.

    It is how torch.amp's GradScaler says it to a fused optimiser.
    """
    optimizer.found_inf = broken
