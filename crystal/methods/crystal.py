"""CrystaL: crystallised latents from two paths, one intact and one corrupted (the paper's section 3).

B pairs, L sequence length, D hidden size, H heads, M answer positions, K columns, N positions
that a loss reads.

    intact     I_int  Q  <think> .. latents .. </think>  <answer> R        CE_int, teacher of KL and attention
                                       |  copied at every layer
    corrupted  I_cor  Q  <think> .. latents .. </think>  <answer> R        CE_cor, student
"""
from dataclasses import dataclass
from functools import partial

import torch

from crystal.attention import AttentionRecorder, in_turn
from crystal.backbone.model import Model
from crystal.latent_copy import dual_forward
from crystal.layout import IGNORE, Format, new_tokens
from crystal.losses import mean_per_pair
from crystal.methods.sft import Method as SFT
from crystal.methods.sft import latent_mass
from crystal.runtime import config
from crystal.runtime.config import Progress, UserError, setting
from crystal.runtime.data import Batch
from crystal.runtime.ops import attn_align, vocab_kl_ce


@dataclass(frozen=True)
class ThoughtSettings(config.Settings):
    """What a method with latents in its thought is asked."""

    thought: str = setting(
        "fixed",
        "words before the latents: one fixed phrase, or the record's cot",
        ("fixed", "cot"),
    )
    labels: str = setting(
        "all",
        "labels of CE: all that the assistant says, or the answer alone (the thought stands in "
        "the prompt anyway)",
        ("all", "answer"),
    )


class LatentThought(SFT):
    """CrystaL's sequence with one path and cross-entropy alone, for methods with latents in the thought."""

    Settings = ThoughtSettings

    @property
    def tokens(self):
        return new_tokens(self.settings.latents, self.settings.latent_kind)

    def format(self, tokenizer):
        return Format(tokenizer, self.settings.latents, self.settings.latent_kind, self.settings.thought)

    def layout(self, fmt, record, image_tokens, stage=-1):
        return fmt.latent(record.turns, image_tokens, record.answer, record.cot, self.settings.labels)


@dataclass(frozen=True)
class Settings(ThoughtSettings):
    """The paper's defaults. Where the authors' released code differs, released.py says how."""

    # the corruption (eq. 3; table 5)
    corruption: str = setting(
        "blur",
        "mode S, its strength and chains: blur, blur=5, blur=2:8, or blur=3,noise=15:30",
    )

    # The dual path (section 3.3)
    latent_copy: str = setting(
        "kv",
        "how latents are shared: hidden states, keys and values, or one packed sequence",
        ("hidden", "kv", "packed"),
    )
    copied: str = setting(
        "latents",
        "positions that the corrupted path takes from the intact one",
        ("latents", "thought"),
    )

    # The losses (eq. 4 to 6; table 4)
    ce: str = setting(
        "per_path",
        "a token mean per path and their sum, or one mean over both paths' tokens",
        ("per_path", "pooled"),
    )
    kl_share: float = setting(
        1.0,
        "KL is the mean over this share of a pair's answer positions, the largest ones",
    )
    answer_positions: str = setting(
        "predicting",
        "positions of KL and attention: those that predict the answer, or its own",
        ("predicting", "span"),
    )
    attn_loss: str = setting("kl", "kind of eq. 5", ("kl", "frobenius", "mse"))
    attn_heads: str = setting("keep", "compare heads one by one, or their mean", ("keep", "mean"))
    attn_columns: str = setting(
        "latents",
        "columns of eq. 5; all: image and latents",
        ("latents", "thought", "all"),
    )
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
        config.corruption_of(self.corruption, self.corruptions)
        if self.attn_heads == "mean" and self.attn_loss != "kl":
            raise UserError(f"--attn_heads mean goes with --attn_loss kl, not {self.attn_loss}")
        if self.attn_layers != "all":
            # What is no number is told now; whether the model has the layer, later.
            config.layers_of(self.attn_layers, 10**9)

    @property
    def weights(self):
        """Weight of each loss term by its name (eq. 6; 1 each in paper and released code)."""
        return {
            "ce": self.w_ce_int,
            "ce_int": self.w_ce_int,
            "ce_cor": self.w_ce_cor,
            "kl": self.w_kl,
            "attn": self.w_attn,
        }


class Method(LatentThought):
    """Two paths, a copy, and eq. 6."""

    Settings = Settings
    monitored = ("mass_int", "mass_cor")

    @property
    def metric(self):
        return "ce" if self.settings.ce == "pooled" else "ce_int"

    @property
    def corruption(self):
        return config.corruption_of(self.settings.corruption, self.settings.corruptions)

    def losses(self, model: Model, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        """Eq. 6's terms, each the mean over the batch's pairs: ce_int, ce_cor, kl, attn.

        Where --ce is pooled, ce stands for ce_int and ce_cor. Beside them, to be monitored: mass_int and
        mass_cor, the share of the answer positions' attention that the latents get.
        """
        # [B,L], where the corrupted path takes the intact one's states, and [B,M], where eq. 4 and 5 look.
        copied = self.copied(batch)
        answer = self.answer_positions(batch)

        # Section 3.3: both paths, the latents copied before every layer. Eq. 5 is recorded on the way.
        align = self.alignment(model, batch, answer)
        both = answer.repeat(2, 1), batch["latents"].repeat(2, 1)
        mass = AttentionRecorder(align.layers, *both, latent_mass)
        recorder = in_turn(align, mass)
        h_int, h_cor = dual_forward(model, batch, copied, self.settings.latent_copy, recorder)  # [B,L,D] each

        # ce_int, ce_cor and kl, then eq. 5: a number for each pair.
        terms = self.answer_terms(model, h_int, h_cor, batch["targets"], copied, answer)
        terms["attn"] = align.mean()
        terms["mass_int"], terms["mass_cor"] = mass.mean().chunk(2)
        return {name: term.mean() for name, term in terms.items()}

    def alignment(self, model, batch, answer):
        """A recorder of eq. 5: in each chosen layer, the distance [B] of both paths' answer attention."""
        settings = self.settings
        layers = config.layers_of(settings.attn_layers, len(model.layers))
        distance = partial(
            attn_align, settings.attn_loss, settings.attn_heads, teacher_grad=settings.teacher_grad
        )
        return AttentionRecorder(layers, answer, self.columns(batch), distance)

    def answer_terms(self, model, h_int, h_cor, targets, copied, answer):
        """CE_int and CE_cor (or their pooled mean), and eq. 4 -> {name: [B]}.

        h_int, h_cor [B,L,D]: the last states of both paths.
        """
        B, L = targets.shape
        answer = position_mask(answer, L)                                            # [B,L]

        # No loss reads a copied position of the corrupted path: there it is the intact path's own.
        pooled = self.settings.ce == "pooled"
        labels_int = targets != IGNORE
        labels_cor = labels_int & (answer if pooled else ~copied)

        # One product with the head for both paths, of the positions alone that a loss reads. Their
        # gradients may overwrite it.
        logits = model.logits(torch.cat([h_int[labels_int | answer], h_cor[labels_cor | answer]]))

        # N positions are read by any loss; `pair` says whose each is.
        read = labels_int | labels_cor | answer
        pair = read.nonzero()[:, 0]                                                  # [N]
        labels_int, labels_cor, answer, targets = (x[read] for x in (labels_int, labels_cor, answer, targets))
        ce_int, ce_cor, kl = vocab_kl_ce(
            logits, None, targets.where(labels_int, IGNORE), targets.where(labels_cor, IGNORE), answer,
            teacher_grad=self.settings.teacher_grad, in_place=True,
        )                                                                            # [N] each

        if pooled:
            both = torch.cat([ce_int[labels_int], ce_cor[labels_cor]])
            terms = {"ce": mean_per_pair(both, torch.cat([pair[labels_int], pair[labels_cor]]), B)}
        else:
            terms = {
                "ce_int": mean_per_pair(ce_int[labels_int], pair[labels_int], B),
                "ce_cor": mean_per_pair(ce_cor[labels_cor], pair[labels_cor], B),
            }
        terms["kl"] = mean_per_pair(kl[answer], pair[answer], B, self.settings.kl_share)  # eq. 4
        return terms

    def answer_positions(self, batch):
        """Positions of eq. 4 and 5 [B,M], -1 padded.

        They are those that predict the answer, or (released) its own positions.
        """
        if self.settings.answer_positions == "predicting":
            return batch["answer_positions"]
        return positions(batch["answer"])

    def columns(self, batch):
        """Columns of eq. 5 [B,K], -1 padded.

        They are the latents, the thought (released), or image and latents (table 4).
        """
        if self.settings.attn_columns == "thought":
            return positions(batch["thought"])
        if self.settings.attn_columns == "all":
            return torch.cat([batch["image"], batch["latents"]], 1)
        return batch["latents"]

    def copied(self, batch):
        """Positions that the corrupted path takes from the intact one, bool [B,L].

        They are the latents, or (released) the whole thought.
        """
        taken = batch["latents"] if self.settings.copied == "latents" else positions(batch["thought"])
        return position_mask(taken, batch["input_ids"].shape[1])


def positions(spans):
    """Spans [B,2] (start, end) -> positions [B,n], -1 padded."""
    start, end = spans[:, :1], spans[:, 1:]
    at = start + torch.arange(int((end - start).max()), device=spans.device)
    return torch.where(at < end, at, -1)


def position_mask(positions, L):
    """Positions [B,n], -1 padded -> bool [B,L]."""
    mask = torch.zeros(len(positions), L + 1, dtype=torch.bool, device=positions.device)
    return mask.scatter(1, positions % (L + 1), True)[:, :L]  # -1 lands in the extra column
