"""Sketch: LIVR whose latents must also say what the picture looks like. Tutorial 06 trains it.

B pairs, K latents, N image tokens of a picture, D hidden size. Latent k says the mean colour of image token
k, so K is N: 16 on the toy scenes.
"""
from dataclasses import dataclass

import torch
from torch import nn

from crystal.methods import livr
from crystal.methods.sft import cross_entropy
from crystal.runtime.config import setting


@dataclass(frozen=True)
class Settings(livr.Settings):
    w_sketch: float = setting(1.0, "weight of the colours' squared error")

    @property
    def weights(self):
        return super().weights | {"sketch": self.w_sketch}


class Method(livr.Method):
    Settings = Settings
    monitored = ()

    def modules(self, model):
        """A linear map from a latent's last state to a colour, which trains from the run's own seed."""
        torch.manual_seed(self.settings.seed)
        self.heads = nn.ModuleDict({"colour": nn.Linear(model.hf.config.text_config.hidden_size, 3)})
        return self.heads

    def losses(self, model, batch, progress):
        """{"ce", "sketch"}: the answer, and the mean squared error of the K colours."""
        biases = self.biases(model, batch) if progress.stage == 0 else []
        h = model.hidden(batch, biases=biases)                                  # [B,L,D]
        said = self.heads["colour"](latent_states(h, batch["latents"]))         # [B,K,3]
        error = (said - colours(batch["pixel_values"], len(h))).square()
        return {"ce": cross_entropy(model, batch, h=h), "sketch": error.mean()}


def latent_states(h, latents):
    """h [B,L,D], latents [B,K] positions -> [B,K,D]."""
    return h.gather(1, latents[:, :, None].expand(-1, -1, h.shape[2]))


def colours(pixel_values, B):
    """pixel_values of B pictures of one size -> the mean colour of each image token, [B,N,3].

    Colours are as the model sees them. A token is four patches; a patch is its three colours, one by one.
    """
    return pixel_values.view(B, -1, 4, 3, pixel_values.shape[1] // 3).mean((2, 4))
