"""CrystaL: crystallised latents from two paths, one intact and one corrupted (the paper's section 3).

B pairs, L sequence length, D hidden size, H heads, M answer positions, K columns, N labelled rows, V vocabulary.

    intact     I_int  Q  <think> .. latents .. </think>  <answer> R        CE_int, teacher of KL and attention
                                       |  copied at every layer
    corrupted  I_cor  Q  <think> .. latents .. </think>  <answer> R        CE_cor, student
"""
from dataclasses import dataclass
from functools import partial

import torch

from crystal.attention import AttentionRecorder
from crystal.latent_copy import dual_forward
from crystal.layout import IGNORE, Format, new_tokens
from crystal.losses import mean_per_pair
from crystal.methods.sft import Method as SFT
from crystal.methods.sft import latent_mass
from crystal.runtime import config
from crystal.runtime.config import UserError, setting
from crystal.runtime.ops import attn_align, vocab_kl_ce


@dataclass
class Settings(config.Settings):
    """The paper's defaults. Where the authors' released code differs, released.py says how."""

    # the thought
    thought: str = setting("fixed", "words before the latents: one fixed phrase, or the record's cot", ("fixed", "cot"))
    labels: str = setting("all", "labels of CE: all that the assistant says, or the answer alone (the thought stands in the prompt anyway)", ("all", "answer"))
    # the corruption (eq. 3; table 5)
    corruption: str = setting("blur", "mode S", ("blur", "mask", "crop", "jigsaw", "color", "noise", "impulse"))
    strength_low: float = setting(None, "lower end of the uniform strength eta; default: the mode's own range")
    strength_high: float = setting(None, "upper end of the uniform strength eta; default: the mode's own range")
    # the dual path (section 3.3)
    latent_copy: str = setting("kv", "how latents are shared: rows of hidden states, or of keys and values, or one packed sequence", ("hidden", "kv", "packed"))
    copied: str = setting("latents", "rows that the corrupted path takes from the intact one", ("latents", "thought"))
    # the losses (eq. 4 to 6; table 4)
    ce: str = setting("per_path", "a token mean per path and their sum, or one mean over both paths' tokens", ("per_path", "pooled"))
    kl_share: float = setting(1.0, "KL is the mean over this share of a pair's answer positions, the largest ones")
    answer_positions: str = setting("predicting", "rows of KL and attention: those that predict the answer, or its own positions", ("predicting", "span"))
    attn_loss: str = setting("kl", "kind of eq. 5", ("kl", "frobenius", "mse"))
    attn_heads: str = setting("keep", "compare heads one by one, or their mean", ("keep", "mean"))
    attn_columns: str = setting("latents", "columns of eq. 5; all: image and latents", ("latents", "thought", "all"))
    attn_layers: str = setting("last", "last, all, or indices as in 12,18,24")
    teacher_grad: bool = setting(False, "let KL and attention loss move the intact path too")
    w_ce_int: float = setting(1.0, "weight of CE_int (and of the pooled CE)")
    w_ce_cor: float = setting(1.0, "weight of CE_cor")
    w_kl: float = setting(1.0, "weight of L_kl")
    w_attn: float = setting(1.0, "weight of L_attn")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.kl_share <= 1:
            raise UserError(f"--kl_share {self.kl_share}: must be above 0 and at most 1")
        if (self.strength_low is None) != (self.strength_high is None):
            raise UserError("--strength_low and --strength_high go together")
        if self.strength_low is not None and not 0 <= self.strength_low <= self.strength_high:
            raise UserError(f"--strength_low {self.strength_low} --strength_high {self.strength_high}: need 0 <= low <= high")
        if self.attn_heads == "mean" and self.attn_loss != "kl":
            raise UserError(f"--attn_heads mean goes with --attn_loss kl, not {self.attn_loss}")
        if self.attn_layers != "all":
            config.layers_of(self.attn_layers, 10**9)  # what is no number is told now; whether the model has the layer, later

    @property
    def weights(self):
        """Weight of each loss term by its name (eq. 6; 1 each in paper and released code)."""
        return {"ce": self.w_ce_int, "ce_int": self.w_ce_int, "ce_cor": self.w_ce_cor, "kl": self.w_kl, "attn": self.w_attn}


class Method(SFT):
    """Two paths, a copy, and eq. 6."""

    Settings = Settings
    corrupts = True
    monitored = ("mass_int", "mass_cor")  # logged, not trained

    @property
    def tokens(self):
        return new_tokens(self.settings.latents, self.settings.latent_kind)

    def format(self, tokenizer):
        return Format(tokenizer, self.settings.latents, self.settings.latent_kind, self.settings.thought)

    def layout(self, fmt, record, image_tokens, stage=-1):
        return fmt.latent(record.turns, image_tokens, record.answer, record.cot, self.settings.labels)

    def losses(self, model, batch, progress):
        """Eq. 6's terms, each the mean over the batch's pairs: ce_int, ce_cor (or their pooled mean ce), kl, attn.

        Beside them, to be monitored: mass_int and mass_cor, the share of the answer positions' attention that the latents get.
        """
        s, targets = self.settings, batch["targets"]
        B, L = targets.shape
        rows = self.answer_positions(batch)                                                 # [B,M]
        cols = self.columns(batch)                                                     # [B,K]
        copied = self.copied(batch)                                                    # [B,L]
        layers, rows2 = config.layers_of(s.attn_layers, len(model.layers)), rows.repeat(2, 1)
        align = partial(attn_align, s.attn_loss, s.attn_heads, teacher_grad=s.teacher_grad)
        recorder = AttentionRecorder(layers, rows, cols, align)                                  # eq. 5 of each layer, [B]
        mass = AttentionRecorder(layers, rows2, batch["latents"].repeat(2, 1), latent_mass)
        recorders = lambda *at: [t(*at) for t in (recorder, mass)]
        h_int, h_cor = dual_forward(model, batch, copied, s.latent_copy, recorders)         # [B,L,D] each

        # No loss reads a copied row of the corrupted path: there it is the intact path's own.
        label_int = targets != IGNORE
        label_cor = label_int & (position_mask(rows, L) if s.ce == "pooled" else ~copied)
        answer = position_mask(rows, L)                                                      # [B,L]
        # One product with the head for both paths; only the rows that a loss reads, which their gradients may overwrite.
        logits = model.logits(torch.cat([h_int[label_int | answer], h_cor[label_cor | answer]]))
        need = label_int | label_cor | answer
        pair = need.nonzero()[:, 0]                                                    # [N]
        label_int, label_cor, answer, labels = (x[need] for x in (label_int, label_cor, answer, targets))
        ce_int, ce_cor, kl = vocab_kl_ce(logits, None, labels.where(label_int, IGNORE), labels.where(label_cor, IGNORE), answer,
                                         teacher_grad=s.teacher_grad, in_place=True)   # [N] each
        if s.ce == "pooled":
            terms = {"ce": mean_per_pair(torch.cat([ce_int[label_int], ce_cor[label_cor]]), torch.cat([pair[label_int], pair[label_cor]]), B)}
        else:
            terms = {"ce_int": mean_per_pair(ce_int[label_int], pair[label_int], B), "ce_cor": mean_per_pair(ce_cor[label_cor], pair[label_cor], B)}
        terms["kl"] = mean_per_pair(kl[answer], pair[answer], B, s.kl_share)           # eq. 4

        terms["attn"] = torch.stack(list(recorder.slices.values())).mean(0)                 # eq. 5
        terms["mass_int"], terms["mass_cor"] = torch.stack(list(mass.slices.values())).mean(0).chunk(2)  # [2B]
        return {name: term.mean() for name, term in terms.items()}

    def answer_positions(self, batch):
        """Rows of KL and attention [B,M], -1 padded: those that predict the answer, or (released) its own positions."""
        return batch["answer_positions"] if self.settings.answer_positions == "predicting" else positions(batch["answer"])

    def columns(self, batch):
        """Columns of eq. 5 [B,K], -1 padded: the latents, the thought (released), or image and latents (table 4)."""
        if self.settings.attn_columns == "thought":
            return positions(batch["thought"])
        if self.settings.attn_columns == "all":
            return torch.cat([batch["image"], batch["latents"]], 1)
        return batch["latents"]

    def copied(self, batch):
        """Rows that the corrupted path takes from the intact one, bool [B,L]."""
        L = batch["input_ids"].shape[1]
        return position_mask(batch["latents"] if self.settings.copied == "latents" else positions(batch["thought"]), L)


def positions(spans):
    """Spans [B,2] (start, end) -> positions [B,n], -1 padded."""
    start, end = spans[:, :1], spans[:, 1:]
    at = start + torch.arange(int((end - start).max()), device=spans.device)
    return torch.where(at < end, at, -1)


def position_mask(positions, L):
    """Positions [B,n], -1 padded -> bool [B,L]."""
    mask = torch.zeros(len(positions), L + 1, dtype=torch.bool, device=positions.device)
    return mask.scatter(1, positions % (L + 1), True)[:, :L]  # -1 lands in the extra column
