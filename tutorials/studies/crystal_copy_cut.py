"""A method file: CrystaL with the copy cut. Every loss is there, and each path has latents of its own.

A control: what is left of CrystaL where no latent of the intact path reaches the corrupted one?
"""

import torch

from crystal.methods import crystal


class Method(crystal.Method):
    """The corrupted path takes nothing from the intact one."""

    def copied(self, batch):
        """No position of either path, bool [B,L]."""
        return torch.zeros_like(batch["input_ids"], dtype=torch.bool)
