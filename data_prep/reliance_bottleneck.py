"""A method file for `--method`: reliance_open.py with a bottleneck in every update, so that the answer can know the image through the latents alone.

What comes after the latents is blind to the image and to all that saw it before them: question and thought. LIVR's mask (its section 3.2) closes
question and thought to the image instead; a base this small, which reads images in its question's rows, does not relearn that in minutes.
"""
import torch

from crystal.bottleneck import Bias
from data_prep.reliance_open import Method as Open


class Method(Open):
    def mask(self, batch):
        at = torch.arange(batch["input_ids"].shape[1])[None].to(batch["latents"].device)  # [1,L]
        first, last = batch["latents"][:, :1], batch["latents"][:, -1:]                # [B,1] each
        return [Bias(at > last, (at >= batch["image"][:, :1]) & (at < first))]         # [B,L] each
