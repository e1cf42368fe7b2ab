"""Plain supervised fine-tuning: cross-entropy on the answer. The baseline that every method has to beat, and builds on.

B pairs, L sequence length, N labelled rows, D hidden size, V vocabulary.
"""
import torch.nn as nn

from crystal import config
from crystal.layout import IGNORE, Format
from crystal.losses import mean_per_pair
from crystal.ops import ce_rows


class Method:
    """Every part that a method has; another method says where it differs. See methods/__init__.py."""
    Settings = config.Settings
    corrupts = False
    watched = ()

    def __init__(self, settings):
        self.settings = settings

    @property
    def tokens(self):
        return []

    def format(self, tokenizer):
        return Format(tokenizer)

    def layout(self, fmt, record, image_tokens, stage=-1):
        """The sequence of a record: the prompt that `fmt.question` generates from, then R and its end, which are labels."""
        return fmt.answered(*fmt.question(record.turns, image_tokens), record.answer)

    def extras(self, record, images):
        return {}

    def modules(self, model):
        return nn.ModuleDict()

    def hidden(self, model, batch, tap=None):
        """The last states [B,L,D] of a batch without losses or mask, for those who look at attention."""
        return model.hidden(batch, tap=tap)

    def biases(self, model, batch):
        return []

    def losses(self, model, batch, progress):
        """{"ce": token mean per pair, averaged over the batch's pairs}."""
        return {"ce": cross_entropy(model, batch)}


def cross_entropy(model, batch, biases=(), h=None):
    """Token mean per pair, averaged over the batch's pairs -> scalar. biases: a list of bottleneck.Bias.

    h [B,L,D]: the last states, where the method has run the forward itself.
    """
    B = len(batch["input_ids"])
    labelled = batch["targets"] != IGNORE                        # [B,L]
    pair = labelled.nonzero()[:, 0]                              # [N]
    if h is None:
        h = model.hidden(batch, biases=biases)                   # [B,L,D]
    logits = model.logits(h[labelled])                           # [N,V]
    return mean_per_pair(ce_rows(logits, batch["targets"][labelled]), pair, B).mean()
