"""Plain supervised fine-tuning: cross-entropy on the answer. Every method builds on it and has to beat it.

B pairs, L sequence length, N labelled rows, D hidden size, V vocabulary, H heads, M
answer positions, K latents.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from crystal.attention import AttentionRecorder
from crystal.attention_bias import AttentionBias, row_biases
from crystal.backbone.model import Model
from crystal.layout import IGNORE, Format, Layout
from crystal.losses import mean_per_pair
from crystal.runtime import config
from crystal.runtime.config import Progress
from crystal.runtime.data import Batch, Record
from crystal.runtime.ops import attn_slice, ce_rows


class Method:
    """Every part that a method has; another method says where it differs. See methods/__init__.py."""

    Settings = config.Settings
    monitored: tuple[str, ...] = ()
    repeats = False

    def __init__(self, settings: Any):
        self.settings = settings

    @property
    def corruption(self) -> Callable | None:
        return None

    @property
    def metric(self) -> str:
        return "ce"

    @property
    def tokens(self) -> list[str]:
        return []

    def format(self, tokenizer: Any) -> Format:
        return Format(tokenizer)

    def layout(self, fmt: Any, record: Record, image_tokens: list[int], stage: int = -1) -> Layout:
        """The prompt that `fmt.question` generates from, then R and its end, which are labels."""
        return fmt.answered(fmt.question(record.turns, image_tokens), record.answer)

    def extras(self, record: Record, images: list) -> dict[str, torch.Tensor]:
        return {}

    def modules(self, model: Model) -> nn.ModuleDict:
        return nn.ModuleDict()

    def for_workers(self) -> dict[str, Any]:
        """What a loader's worker, which has no model, needs of `modules`: attributes for layout and extras.

        Here it is all that this method has beside its settings and is no module: weights stay where they are.
        """
        own = vars(self).items()
        return {name: x for name, x in own if name != "settings" and not isinstance(x, nn.Module)}

    def hidden(
        self, model: Model, batch: Batch, recorder: Callable | None = None, biases: tuple | list = ()
    ) -> torch.Tensor:
        """The last states [B,L,D] of a batch without losses, for those who look at what the model does.

        biases: what they want hidden, a list of attention_bias.AttentionBias; no mask of the method's own.
        """
        return model.hidden(batch, recorder=recorder, biases=biases)

    def biases(self, model: Model, batch: Batch) -> list[AttentionBias]:
        return []

    def losses(self, model: Model, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        """{"ce": token mean per pair, averaged over the batch's pairs}."""
        return {"ce": cross_entropy(model, batch)}


def cross_entropy(model, batch, biases=(), h=None):
    """Token mean per pair, averaged over the batch's pairs -> scalar.

    biases: a list of attention_bias.AttentionBias. h [B,L,D]: the last states, where the method
    has run the forward.
    """
    if h is None:
        h = model.hidden(batch, biases=biases)                   # [B,L,D]

    # The head runs on the N positions that have a label; `pair` says whose each is.
    labelled = batch["targets"] != IGNORE                        # [B,L]
    pair = labelled.nonzero()[:, 0]                              # [N]
    logits = model.logits(h[labelled])                           # [N,V]
    ce = ce_rows(logits, batch["targets"][labelled])             # [N]
    return mean_per_pair(ce, pair, len(labelled)).mean()


@torch.no_grad()
def latent_mass(q, k, rows, cols, **how):
    """The share of the rows' attention that the columns get, mean over heads and rows -> [B].

    Arguments as of attn_slice. It is what an AttentionRecorder reads to be monitored.
    """
    A = attn_slice(q, k, rows, cols, **how)                      # [B,H,M,K]
    M = (rows >= 0).sum(1).clamp(min=1)                          # [B]

    return A.sum(-1).mean(1).sum(1) / M


def mass_recorder(model, batch, biases=()):
    """A recorder of the attention that the latents get from the answer positions, in the last layer.

    None without latents. biases: those of the forward, a list of attention_bias.AttentionBias.
    """
    answer, latents = batch["answer_positions"], batch["latents"]
    if not latents.shape[1]:
        return None

    wide = torch.promote_types(model.hf.dtype, torch.float32)
    last = len(model.layers) - 1
    return AttentionRecorder({last}, answer, latents, latent_mass, bias=row_biases(biases, answer, wide))


def mass_term(recorder):
    """What a mass_recorder has read -> {"mass": mean over the batch's pairs}; {} of None."""
    return {"mass": recorder.mean().mean()} if recorder else {}
