"""CrystaL: crystallised latents from two paths, one intact and one corrupted (the paper's section 3).

B pairs, L sequence length, D hidden size, H heads, M answer rows, K columns, N labelled rows, V vocabulary.

    intact     I_int  Q  <think> .. latents .. </think>  <answer> R        CE_int, teacher of KL and attention
                                       |  copied at every layer
    corrupted  I_cor  Q  <think> .. latents .. </think>  <answer> R        CE_cor, student
"""
from functools import partial

import torch
import torch.nn as nn

from crystal.attention import AttentionTap
from crystal.latent_copy import dual_forward
from crystal.layout import IGNORE
from crystal.losses import mean_per_pair
from crystal.ops import attn_align, attn_slice, vocab_kl_ce


class Method:
    latents = True
    corrupts = True
    watched = ("mass_int", "mass_cor")  # logged, not trained

    def __init__(self, settings):
        self.settings = settings

    def layout(self, fmt, record, image_tokens):
        return fmt.latent(record.turns, image_tokens, record.answer, record.cot, self.settings.labels)

    def modules(self, model):
        return nn.ModuleDict()  # nothing but the task supervises the latents

    def losses(self, model, batch, progress):
        """Eq. 6's terms, each the mean over the batch's pairs: ce_int, ce_cor (or their pooled mean ce), kl, attn.

        Beside them, to be watched: mass_int and mass_cor, the share of the answer rows' attention that the latents get.
        """
        s, targets = self.settings, batch["targets"]
        B, L = targets.shape
        rows = self.answer_rows(batch)                                                 # [B,M]
        cols = self.columns(batch)                                                     # [B,K]
        copied = self.copied(batch)                                                    # [B,L]
        layers, rows2 = s.layers(len(model.layers)), rows.repeat(2, 1)
        align = partial(attn_align, s.attn_loss, s.attn_heads, teacher_grad=s.teacher_grad)
        tap = AttentionTap(layers, rows, cols, align)                                  # eq. 5 of each layer, [B]
        mass = AttentionTap(layers, rows2, batch["latents"].repeat(2, 1), attn_slice)

        def taps(layer, q, k, scale):
            tap(layer, q, k, scale)
            with torch.no_grad():
                mass(layer, q, k, scale)

        h_int, h_cor = dual_forward(model, batch, copied, s.realisation, taps)         # [B,L,D] each

        # No loss reads a copied row of the corrupted path: there it is the intact path's own.
        label_int = targets != IGNORE
        label_cor = label_int & (mask_of(rows, L) if s.ce == "pooled" else ~copied)
        answer = mask_of(rows, L)                                                      # [B,L]
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

        terms["attn"] = torch.stack(list(tap.slices.values())).mean(0)                 # eq. 5
        masses = torch.stack([x.sum(-1).mean(1) for x in mass.slices.values()]).mean(0)  # [2B,M]
        masses = masses.sum(1) / (rows2 >= 0).sum(1).clamp(min=1)                      # [2B]
        terms["mass_int"], terms["mass_cor"] = masses.chunk(2)
        return {name: term.mean() for name, term in terms.items()}

    def answer_rows(self, batch):
        """Rows of KL and attention [B,M], -1 padded: those that predict the answer, or (released) its own positions."""
        return batch["rows"] if self.settings.answer_rows == "predicting" else positions(batch["answer"])

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
        return mask_of(batch["latents"] if self.settings.copied == "latents" else positions(batch["thought"]), L)


def positions(spans):
    """Spans [B,2] (start, end) -> positions [B,n], -1 padded."""
    start, end = spans[:, :1], spans[:, 1:]
    at = start + torch.arange(int((end - start).max()), device=spans.device)
    return torch.where(at < end, at, -1)


def mask_of(positions, L):
    """Positions [B,n], -1 padded -> bool [B,L]."""
    mask = torch.zeros(len(positions), L + 1, dtype=torch.bool, device=positions.device)
    return mask.scatter(1, positions % (L + 1), True)[:, :L]  # -1 lands in the extra column
