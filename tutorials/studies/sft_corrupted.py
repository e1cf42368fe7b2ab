"""A method file: fine-tuning that sees every picture twice, intact and corrupted.

A control: CrystaL's pictures as augmentation, without its latents and with as much compute.
"""

from dataclasses import dataclass

from crystal.methods.sft import Method as SFT
from crystal.methods.sft import cross_entropy
from crystal.runtime import config
from crystal.runtime.config import setting


@dataclass(frozen=True)
class Settings(config.Settings):
    """CrystaL's corruption, and nothing else of it."""

    corruption: str = setting("blur=8:10", "of the second picture: mode and strength, as crystal's")

    def __post_init__(self):
        super().__post_init__()
        config.corruption_of(self.corruption)

    @property
    def weights(self):
        return {"ce": 1.0, "ce_cor": 1.0}


class Method(SFT):
    """Cross-entropy on both pictures, as CrystaL's two paths have it."""

    Settings = Settings

    @property
    def corruption(self):
        return config.corruption_of(self.settings.corruption)

    def losses(self, model, batch, progress):
        """{"ce", "ce_cor"}: token means per pair, averaged over the batch's pairs."""
        corrupted = {**batch, "pixel_values": batch["pixel_values_cor"]}
        return {"ce": cross_entropy(model, batch), "ce_cor": cross_entropy(model, corrupted)}
