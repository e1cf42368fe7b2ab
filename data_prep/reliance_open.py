"""A method file for `--method`: fine-tuning with latents that nothing asks the model to use.

CrystaL's sequence, and cross-entropy as the only loss: the image stays in sight, so the answer may read it and pass the latents by.
LIVR's control "latents only" (table 3). reliance_bottleneck.py is the same with the direct path closed.
"""
import torch.nn as nn

from crystal.layout import IGNORE
from crystal.losses import ce_rows, mean_per_pair


class Method:
    latents = True
    corrupts = False

    def __init__(self, settings):
        self.settings = settings

    def layout(self, fmt, record, image_tokens):
        return fmt.latent(record.turns, image_tokens, record.answer, record.cot, self.settings.labels)

    def modules(self, model):
        return nn.ModuleDict()

    def biases(self, batch):
        return []

    def losses(self, model, batch, progress):
        """{"ce": token mean per pair, averaged over the batch's pairs}."""
        labelled = batch["targets"] != IGNORE                                          # [B,L]
        logits = model.logits(model.hidden(batch, biases=self.biases(batch))[labelled])  # [N,V]
        ce = ce_rows(logits, batch["targets"][labelled])
        return {"ce": mean_per_pair(ce, labelled.nonzero()[:, 0], len(labelled)).mean()}
