"""A method file for `--method`: reliance_open.py with LIVR's bottleneck (its first stage) in every update.

Every token after the image that is neither image nor latent is blind to it, so what the answer knows of the image went through the latents.
"""
from crystal.bottleneck import Bias
from crystal.methods.crystal import mask_of
from data_prep.reliance_open import Method as Open


class Method(Open):
    def biases(self, model, batch):
        L = batch["input_ids"].shape[1]
        image, latents = mask_of(batch["image"], L), mask_of(batch["latents"], L)      # [B,L] each
        return [Bias(~image & ~latents, image)]
