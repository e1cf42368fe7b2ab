"""LaViT: latents that rebuild a teacher's view and gaze, while the answer's own view of the image is dimmed.

B pairs, L sequence length, D hidden size, E the teacher's, H heads, K latents, N image tokens, I
images. Equations are LaViT's.

    <prompt: I, question>  <latents 1..K>  <answer> R <|im_end|>
                               |     |        |
                               |     |        the answer positions see the image through a gate:
                               |     |        ln gamma(t) is added to their scores (eq. 4 and 5)
                               |     the last latent, through an MLP, meets the teacher's V_sem (eq. 6)
                               each latent's attention to the image meets the teacher's gaze (eq. 7)

The latents are tokens with learned embeddings in the prompt: forced in training, not generated after it.
`<answer>` opens the response, so that the position which predicts R's first token is the response's and
passes the gate; a latent's would go round it. data_prep/lavit_teacher.py makes the teacher's part of a
record, its field `features`. Of the vocabulary only the new tokens train.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from crystal.attention import AttentionRecorder, in_turn
from crystal.attention_bias import AttentionBias
from crystal.backbone.families import Grid
from crystal.backbone.model import Model
from crystal.layout import TAGS, Format, Prompt, generation_prompt, latent_tokens
from crystal.losses import gaze, semantics
from crystal.methods.crystal import position_mask
from crystal.methods.sft import Method as SFT
from crystal.methods.sft import cross_entropy, mass_recorder, mass_term
from crystal.runtime import config, data
from crystal.runtime.config import Progress, UserError, setting
from crystal.runtime.data import Batch
from crystal.runtime.ops import attn_slice


@dataclass(frozen=True)
class Settings(config.Settings):
    """The paper's values (appendix A.2)."""

    # appendix A.2; the language model trains whole, the vision tower is frozen
    latents: int = setting(4, "K, latent tokens before the answer")
    tune: str = setting(
        "full",
        "low-rank adapters, every weight of the language model, or nothing but the new tokens' "
        "rows",
        ("lora", "full", "tokens"),
    )
    max_steps: int = setting(1000, "optimiser updates")
    batch_size: int = setting(16, "pairs per process and forward")
    lr: float = setting(5e-6, "peak learning rate")
    weight_decay: float = setting(0.0, "AdamW decay; never on the vocabulary's rows")
    warmup: float = setting(0.03, "share of a stage's steps that warms up linearly")
    decay: str = setting("linear", "way from the peak to 0 after the warm-up", ("cosine", "linear"))

    # The gate (eq. 4 and 5; table 3)
    gate: str = setting(
        "cosine",
        "how the answer's view of the image opens: along a cosine, at once after the warm-up, or "
        "open from the start",
        ("cosine", "hard", "open"),
    )
    gate_warmup: float = setting(0.4, "T_w, share of the updates in which it opens")
    gate_start: float = setting(1e-6, "epsilon, gamma at update 0 (cosine)")

    # The teacher (eq. 6, 7 and 9); a weight of 0 leaves the term out, and what it needs of the record too
    w_semantics: float = setting(0.3, "lambda of eq. 6, the teacher's semantics")
    w_gaze: float = setting(0.3, "lambda of eq. 7, the teacher's gaze")
    gaze_top: int = setting(8, "image tokens of the teacher's gaze that are kept, the largest ones")
    semantics_dim: int = setting(
        None,
        "E, length of the teacher's V_sem; default: the model's own hidden size",
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.gate_warmup <= 1 or not 0 < self.gate_start <= 1:
            raise UserError(
                f"--gate_warmup {self.gate_warmup} --gate_start {self.gate_start}: "
                "each must be above 0 and at most 1"
            )
        if min(self.w_semantics, self.w_gaze) < 0 or self.gaze_top < 1:
            raise UserError("--w_semantics and --w_gaze must not be negative, --gaze_top must be at least 1")
        if self.turns == "all" and (self.w_semantics or self.w_gaze):
            raise UserError("--turns all: the teacher has looked at the first question of a record alone")

    @property
    def weights(self):
        return {"ce": 1.0, "semantics": self.w_semantics, "gaze": self.w_gaze}


class Latents(Format):
    """Prompts that end in the latents and `<answer>`."""

    def __init__(self, tokenizer, count, kind):
        super().__init__(tokenizer)
        self.count = count
        self.answer_start_id = tokenizer.convert_tokens_to_ids(TAGS[2])
        self.latents = tokenizer.convert_tokens_to_ids(latent_tokens(count, kind))

    def question(self, turns, image_tokens, latents="keep"):
        ids, image = self.prompt(turns, image_tokens)
        if latents == "none":
            return Prompt(ids, image, [])
        own = [] if latents == "drop" else self.latents
        where = range(len(ids), len(ids) + len(own))
        return Prompt(ids + own + [self.answer_start_id], image, list(where))

    def chat_template(self):
        prompt = "".join(self.tokenizer.convert_ids_to_tokens(self.latents + [self.answer_start_id]))
        return self.tokenizer.chat_template + generation_prompt(prompt)


class Method(SFT):
    """Gate, semantics and gaze beside cross-entropy."""

    Settings = Settings
    monitored = ("mass",)
    size = None  # D of the model that `modules` has seen

    @property
    def tokens(self):
        names = latent_tokens(self.settings.latents, self.settings.latent_kind)
        return [TAGS[2], *dict.fromkeys(names)]

    def format(self, tokenizer):
        return Latents(tokenizer, self.settings.latents, self.settings.latent_kind)

    def extras(self, record, images):
        """The teacher's part of a record: gaze [N_T] and its grids [I,3] (families.Grid), v_sem [E].

        What no term asks for is left out. RecordError for what is missing or does not fit together.
        """
        names = []
        if self.settings.w_gaze:
            names += ["gaze", "gaze_grid"]
        if self.settings.w_semantics:
            names.append("v_sem")
        if not names:
            return {}

        wrong = f"{record.where}: field 'features': "
        if "lavit" not in record.features:
            raise data.RecordError(
                wrong + "no 'lavit' in it; data_prep/lavit_teacher.py makes it, and "
                "--w_gaze 0 --w_semantics 0 trains without a teacher"
            )
        found = data.load_features(record, "lavit")
        missing = [name for name in names if name not in found]
        if missing:
            file = record.features["lavit"]
            raise data.RecordError(wrong + f"{file} holds no {missing[0]} for the id {record.id!r}")
        if problem := self.misfit(found, len(images)):
            raise data.RecordError(wrong + problem)

        # A file may say no newlines: the grids of most families have none.
        if "gaze_grid" in names:
            grids = found["gaze_grid"]
            found["gaze_grid"] = F.pad(grids, (0, 3 - grids.shape[1]))
        return {name: found[name] for name in names}

    def misfit(self, found, images):
        """What is wrong with a record's {name: tensor} of a teacher that saw so many images, or None."""
        if self.settings.w_semantics:
            v_sem, E = found["v_sem"], self.settings.semantics_dim or self.size
            if not is_row(v_sem):
                return f"v_sem has shape {list(v_sem.shape)} or holds no number; finite ones are wanted"
            if E and len(v_sem) != E:
                n = len(v_sem)
                return f"the teacher's V_sem has {n} numbers: --semantics_dim {n} is needed"
        if not self.settings.w_gaze:
            return None

        gaze, grids = found["gaze"], found["gaze_grid"]
        if not is_row(gaze) or gaze.min() < 0:
            return f"gaze has shape {list(gaze.shape)} or is no finite number from 0 up"
        if grids.ndim != 2 or grids.shape[1] not in (2, 3) or grids.is_floating_point():
            return f"gaze_grid has shape {list(grids.shape)}; rows, columns and newlines are wanted"

        rows = [Grid(*grid) for grid in grids.tolist()]
        tokens = sum(grid.tokens for grid in rows)
        views = len(rows) // max(images, 1) if grids.shape[1] == 3 else 1  # of an image
        if len(rows) != views * images:
            return f"the teacher saw {len(rows)} images, the record has {images}"
        if len(gaze) != tokens:
            return f"gaze has {len(gaze)} numbers for grids of {tokens} tokens"
        return None

    def modules(self, model):
        """phi of eq. 6: two layers from the student's latent to the teacher's semantics."""
        self.heads = nn.ModuleDict()
        if self.settings.w_semantics:
            D = self.size = model.hf.config.text_config.hidden_size
            E = self.settings.semantics_dim or D
            dtype = torch.promote_types(model.hf.dtype, torch.float32)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.settings.seed)
                phi = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, E))
            self.heads["semantics"] = phi.to(dtype)
        return self.heads

    def gamma(self, of_run):
        """Eq. 5: gamma at a fraction of the run; T_w is `gate_warmup` of it.

        `hard` is 0 until then (table 3).
        """
        settings = self.settings
        if settings.gate == "open" or of_run >= settings.gate_warmup:
            return 1.0
        if settings.gate == "hard":
            return 0.0
        start = settings.gate_start
        opened = 1 - math.cos(math.pi * of_run / settings.gate_warmup)
        return start + (1 - start) / 2 * opened

    def gated(self, model, batch, gamma):
        """Eq. 4: the answer positions see the image with ln gamma added to their scores.

        At gamma = 1 there is no bias at all.
        """
        if gamma == 1:
            return []
        image = batch["input_ids"] == model.hf.config.image_token_id                 # [B,L]
        answer = position_mask(batch["answer_positions"], image.shape[1])            # [B,L]
        value = math.log(gamma) if gamma else -math.inf
        return [AttentionBias(answer, image, value)]

    def biases(self, model, batch):
        """For `evaluate --bottleneck`: answers reach the image through latents and question alone."""
        return self.gated(model, batch, 0.0)

    def losses(self, model: Model, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        """Eq. 9's terms "ce", "semantics", "gaze", each the mean over the batch's pairs.

        Beside them "mass", to be monitored.
        """
        settings, latents = self.settings, batch["latents"]                          # [B,K]

        # One forward under the gate. On the way, what the latents see of the image is
        # recorded in every layer.
        biases = self.gated(model, batch, self.gamma(progress.of_run))
        mass = mass_recorder(model, batch, biases)
        looks = None
        if settings.w_gaze:
            looks = AttentionRecorder(range(len(model.layers)), latents, batch["image"], attn_slice)
        recorders = [recorder for recorder in (looks, mass) if recorder]
        h = model.hidden(batch, recorder=in_turn(*recorders), biases=biases)         # [B,L,D]

        terms = {"ce": cross_entropy(model, batch, h=h)} | mass_term(mass)
        if settings.w_semantics:
            last = h[torch.arange(len(h), device=h.device), latents[:, -1]]          # [B,D], the last latent
            terms["semantics"] = self.semantics(last, batch["v_sem"])
        if looks:
            A = torch.stack(list(looks.slices.values())).mean((0, 2))                # [B,K,N]
            terms["gaze"] = gaze(A, self.targets(model, batch), batch["image"]).mean()
        return terms

    def semantics(self, h_z, v_sem):
        """Eq. 6: the last latent h_z [B,D], through phi, against the teacher's v_sem [B,E] -> scalar."""
        phi = self.heads["semantics"]
        predicted = phi(h_z.to(phi[-1].weight.dtype))
        return semantics(predicted, v_sem).mean()

    def targets(self, model, batch):
        """The teacher's gaze on the student's grid -> [B,N], a distribution; 0 at padding.

        It is aligned, and its largest are kept.
        """
        # The token grids of every image, in the order of the batch.
        images = iter(model.image_processor.grids(batch["image_grid_thw"]))
        out = torch.zeros_like(batch["image"], dtype=batch["gaze"].dtype)
        for b, (seen, rows) in enumerate(zip(batch["gaze"], batch["gaze_grid"].tolist())):
            # The student's images of this record are the next ones, as many as its image tokens fill.
            n = int((batch["image"][b] >= 0).sum())
            own = []
            while sum(grid.tokens for image in own for grid in image) < n:
                own.append(next(images))
            flat = [grid for image in own for grid in image]

            # A record with fewer images than another one is padded with grids of 0 x 0.
            teacher = [Grid(*grid) for grid in rows if grid[0]]
            if len(teacher) == len(own) < len(flat):
                times = [len(image) for image in own]
                seen, teacher = repeated(seen, teacher, times)
            if len(teacher) != len(flat):
                raise UserError(
                    f"the teacher's gaze has {len(teacher)} grids for a record whose {len(own)} images the "
                    f"student sees in {len(flat)}"
                )
            out[b, :n] = top(align(seen, teacher, flat), self.settings.gaze_top)
        return out


# --- gaze: pure functions of one sample. N image tokens of I images, each a families.Grid ---

def is_row(x):
    """Whether a tensor is a row of finite floating-point numbers, one at least."""
    return x.ndim == 1 and len(x) > 0 and x.is_floating_point() and bool(x.isfinite().all())


def normalise(S, eps=1e-12):
    """Eq. 3: S [N], the image tokens' attention (eq. 2) -> A_traj [N] in [0, 1]; all 0 where S is flat."""
    return (S - S.min()) / (S.max() - S.min() + eps)


def top(A, k):
    """A [N] >= 0 -> its k largest as a distribution, 0 elsewhere (section 4.1); all 0 stays so.

    Of equal ones the first are kept.
    """
    kept = torch.zeros_like(A)
    order = A.argsort(descending=True, stable=True)[:k]
    kept[order] = A[order]
    return kept / kept.sum().clamp(min=torch.finfo(A.dtype).tiny)


def parts_of(A, grids):
    """A [n], of which the grids fill the first entries -> each grid's own part."""
    sizes = [Grid(*grid).tokens for grid in grids]
    return A[: sum(sizes)].split(sizes)


def repeated(A, grids, times):
    """A on a teacher's grids, one an image -> the same on a student's: (A, grids).

    The student sees image i in times[i] grids.
    """
    parts, places = [], []
    for part, grid, n in zip(parts_of(A, grids), grids, times):
        parts += [part] * n
        places += [grid] * n
    return torch.cat(parts), places


def align(A, grids, to):
    """A [N] on a teacher's grids -> [N'] on a student's, each image bilinearly (appendix C.2).

    Grids that agree change nothing, but that a newline, which is no place of the picture, has 0 always.
    """
    drawn = []
    for part, grid, new in zip(parts_of(A, grids), grids, to):
        grid, new = Grid(*grid), Grid(*new)
        picture = part.view(grid.rows, -1)[:, : grid.columns]                        # newlines cut off
        if new.columns and grid.columns and picture.shape != new[:2]:
            picture = picture[None, None]
            picture = F.interpolate(picture, new[:2], mode="bilinear", align_corners=False)[0, 0]
        elif not (new.columns and grid.columns):
            picture = part.new_zeros(new[:2])
        drawn.append(F.pad(picture, (0, new.newlines)).flatten())
    return torch.cat(drawn)


def focus(A, inside):
    """Eq. 1: share of A [N] on the target's tokens, bool [N] -> scalar in [0, 1]; 0 for an A of zeros."""
    return A[inside].sum() / A.sum().clamp(min=torch.finfo(A.dtype).tiny)


def entropy(A):
    """Eq. 10: -sum p log p of A [N] as a distribution, in nats -> scalar in [0, log N]."""
    p = A / A.sum().clamp(min=torch.finfo(A.dtype).tiny)
    return torch.special.entr(p).sum()


def salient(A, factor=1.5):
    """Table 2: how many tokens get more than `factor` times the mean of A [N] -> int."""
    return int((factor * A.mean() < A).sum())


def inside(boxes, size, grid):
    """Boxes [x0,y0,x1,y1] -> bool [N], the tokens of a Grid that one of them touches; a newline never.

    The boxes are in pixels of an image of size (width, height).
    """
    width, height = size
    rows, columns, newlines = Grid(*grid)

    def touched(low, high, length, cells):
        """The cells of an axis that low to high touches; the nearest one, outside the image."""
        first = math.floor(low / length * cells)
        last = math.ceil(high / length * cells)
        return slice(min(cells - 1, max(0, first)), min(cells, max(1, last)))

    found = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes if columns else ():
        found[touched(y0, y1, height, rows), touched(x0, x1, width, columns)] = True
    return F.pad(found, (0, newlines)).flatten()
