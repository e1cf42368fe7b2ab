"""Plain supervised fine-tuning: cross-entropy on the answer. The baseline that every method has to beat.

B pairs, L sequence length, N labelled rows, D hidden size, V vocabulary.
"""
import torch.nn as nn

from crystal.layout import IGNORE
from crystal.losses import mean_per_pair
from crystal.ops import ce_rows


class Method:
    latents = False
    corrupts = False

    def __init__(self, settings):
        self.settings = settings

    def layout(self, fmt, record, image_tokens):
        return fmt.plain(record.turns, image_tokens, record.answer)

    def modules(self, model):
        return nn.ModuleDict()

    def losses(self, model, batch, progress):
        """{"ce": token mean per pair, averaged over the batch's pairs}."""
        B = len(batch["input_ids"])
        labelled = batch["targets"] != IGNORE                    # [B,L]
        pair = labelled.nonzero()[:, 0]                          # [N]
        h = model.hidden(batch)                                  # [B,L,D]
        logits = model.logits(h[labelled])                       # [N,V]
        return {"ce": mean_per_pair(ce_rows(logits, batch["targets"][labelled]), pair, B).mean()}
