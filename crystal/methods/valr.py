"""VaLR: fed-back latents before every step of reasoning, aligned to what frozen vision encoders see.

B records, L sequence length, N steps of a record, K latents of a segment, P patches, D and E hidden sizes
of model and encoder.

    <prompt> <latent> l_1 .. l_K </latent> step 1 .. <latent> l_1 .. l_K </latent> step N
    <answer>R</answer><|im_end|>

    stage 1    the same without the segments: L_ce
    stage 2    L_ce + lambda L_repa: the latents' states after layer 12, up-sampled along K to the encoder's P
               patches, through an MLP, -mean cosine with its features; mean over encoders

A latent's input is the state before it (feedback.py); after K of them </latent> is forced. Neither is a
label: there is nothing to choose. The model writes everything else itself, <latent> too. At inference
no encoder is needed.
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn

from crystal import feedback
from crystal.backbone import encoders
from crystal.backbone.model import Model
from crystal.layout import IGNORE, Format, Layout, Prompt, next_tokens
from crystal.losses import patch_alignment, upsample_latents
from crystal.methods.crystal import position_mask
from crystal.methods.sft import Method as SFT
from crystal.methods.sft import cross_entropy
from crystal.runtime import config, data
from crystal.runtime.config import Progress, Stage, UserError, setting
from crystal.runtime.data import Batch

TOKENS = ("<latent>", "</latent>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Settings(config.Settings):
    """The paper's values where it gives any."""

    # section 3 and the paper's settings; what it does not give is as everywhere here
    latents: int = setting(
        16,
        "K, latents of a segment; there is one before every step of the record's cot",
    )
    tune: str = setting(
        "full",
        "every weight of the language model (the paper), low-rank adapters, or nothing but the "
        "new tokens' rows",
        ("lora", "full", "tokens"),
    )
    lr: float = setting(1e-5, "peak learning rate of the first stage, without latents")
    lr_latents: float = setting(2e-6, "peak learning rate of the second stage, with latents")
    weight_decay: float = setting(0.0, "AdamW decay; never on the vocabulary's rows")
    first_share: float = setting(
        0.5,
        "share of the updates that the first stage takes; 0 leaves it out",
    )
    encoders: str = setting(
        "tiny",
        "comma-separated: tiny (shipped, knows toy scenes alone), a directory or hub name of "
        "DINOv3, DINOv2 or SigLIP; features:NAME:SIZE for precomputed ones of the records' "
        "`features`; own for the model's own image tokens; none for no alignment",
    )
    align_layer: int = setting(
        0,
        "decoder layer, from 1, after which the latents are aligned; 0: at 12/28 of the depth, "
        "the paper's 12 of 28",
    )
    w_repa: float = setting(0.5, "lambda, weight of L_repa")
    updates: int = setting(
        None,
        "train on the parallel iteration with so many updates (feedback.py); default: the exact "
        "recurrence",
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.first_share < 1:
            raise UserError(
                f"--first_share {self.first_share}: a share of the updates, at least 0 and below 1"
            )
        if self.lr_latents <= 0 or self.w_repa < 0:
            raise UserError("--lr_latents must be positive and --w_repa not negative")
        if self.align_layer < 0 or (self.updates or 0) < 0:
            raise UserError("--align_layer and --updates must not be negative")
        for name in self.encoder_names:
            features, *rest = name.split(":")
            is_name = name not in ("", "none")
            has_size = len(rest) == 2 and rest[1].isdigit() and int(rest[1]) > 0
            if not is_name or (features == "features" and not has_size):
                raise UserError(
                    f"--encoders {self.encoders}: none alone, or comma-separated names; "
                    "precomputed features as features:NAME:SIZE, SIZE numbers a patch"
                )

    @property
    def encoder_names(self):
        return [] if self.encoders == "none" else self.encoders.split(",")

    @property
    def weights(self):
        return {"ce": 1.0, "repa": self.w_repa}

    @property
    def stages(self):
        return [
            Stage("CoT", self.first_share, self.lr),
            Stage("latents", 1 - self.first_share, self.lr_latents),
        ]


class Segments(Format):
    """Sequences with a segment of latents before every step, between <latent> and </latent>."""

    def __init__(self, tokenizer, count):
        super().__init__(tokenizer)
        self.count = count
        ids = tokenizer.convert_tokens_to_ids(list(TOKENS))
        self.latent_start_id, self.latent_end_id, self.answer_start_id, self.answer_end_id = ids

    def question(self, turns, image_tokens, latents="keep"):
        """What the model is asked -> Prompt, without latents.

        They come, or are dropped, as the model writes (generate.py).
        """
        ids, image = self.prompt(turns, image_tokens)
        return Prompt(ids, image, [])

    def chat_template(self):
        return self.tokenizer.chat_template

    def steps(self, turns, image_tokens, answer, steps, latents=True):
        """A record's steps, a segment of latents before each, then the answer -> Layout.

        A record without steps has one segment, before its answer. Labels: all that the model writes itself.
        """
        ids, image = self.prompt(turns, image_tokens)
        start = len(ids)
        places, forced = [], set()
        for step in steps or [""]:
            if latents:
                first = len(ids) + 1
                unread = [self.tokenizer.pad_token_id] * self.count  # no one reads a latent's id
                ids = ids + [self.latent_start_id] + unread + [self.latent_end_id]
                places += range(first, first + self.count)
                forced |= set(range(first, first + self.count + 1))
            if step:
                ids = ids + self.text(step + "\n")

        answer_start = len(ids)
        ids = ids + [self.answer_start_id] + self.text(answer) + [self.answer_end_id, self.end]

        # Latents and the </latent> behind them are no labels: they are forced.
        targets = next_tokens(ids, start)
        for t in forced:
            targets[t - 1] = IGNORE
        return Layout(
            ids, targets, image,
            thought=(start, answer_start),
            latents=places,
            answer=(answer_start, len(ids)),
            answer_positions=list(range(answer_start, len(ids) - 1)),
        )


class Method(SFT):
    """Cross-entropy over the steps, and alignment of the fed-back latents to encoders."""

    Settings = Settings
    repeats = True

    @property
    def tokens(self):
        return list(TOKENS)

    def format(self, tokenizer):
        return Segments(tokenizer, self.settings.latents)

    def layout(self, fmt, record, image_tokens, stage=-1):
        return fmt.steps(record.turns, image_tokens, record.answer, record.cot, latents=stage != 0)

    def modules(self, model):
        """Loads the encoders -> an MLP from the model's states to each encoder's features."""
        depth = len(model.layers)
        self.layer = self.settings.align_layer or max(1, round(12 / 28 * depth))
        if self.layer > depth:
            raise UserError(f"--align_layer {self.layer}: the model has {depth} layers")

        D = model.hf.config.text_config.hidden_size
        self.encoders, self.projections = [], nn.ModuleDict()
        for m, name in enumerate(self.settings.encoder_names):
            encoder, E = None, D
            if name.startswith("features:"):
                E = int(name.split(":")[2])
            elif name != "own":
                encoder = encoders.load(name, model.device)
                E = encoder.dim
            self.encoders.append(encoder)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(data.seed_of(self.settings.seed, m))
                self.projections[str(m)] = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, E))
        dtype = torch.promote_types(model.hf.dtype, torch.float32)
        return self.projections.to(model.device, dtype)

    def for_workers(self):
        """Of the encoders how they want their pictures, without their weights."""
        ways = [encoder and encoders.Preparation(encoder.rules) for encoder in self.encoders]
        return {"encoders": ways}

    def extras(self, record, images):
        """What the encoders want of a record: pixels_m [I,3,h,w] of its images, or features_m [P,E].

        count_m [1] says how many images or patches there are.
        """
        names = self.settings.encoder_names
        if names and not images:
            raise data.RecordError(
                f"{record.where}: field 'image': missing; there is nothing to align to (--encoders none)"
            )
        found = {}
        for m, (name, encoder) in enumerate(zip(names, self.encoders)):
            if encoder:
                found[f"pixels_{m}"] = torch.stack([encoder.pixels(image) for image in images])
                found[f"count_{m}"] = torch.tensor([len(images)])
            elif name != "own":
                features = stored(record, name, len(images))
                found[f"features_{m}"] = features
                found[f"count_{m}"] = torch.tensor([len(features)])
        return found

    def hidden(self, model, batch, recorder=None, biases=()):
        """The recurrence, then one pass over whole sequences that a recorder can watch."""
        fed = position_mask(batch["latents"], batch["input_ids"].shape[1])
        h, _ = feedback.recurrence(model, batch, fed)
        with feedback.filled(model, h, fed):
            return model.hidden(batch, recorder=recorder, biases=biases)

    def losses(self, model: Model, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        """{"ce"}, in the second stage also {"repa"}: token mean and alignment, averaged over records."""
        if progress.stage == 0:
            # The projections wait for the second stage; 0 of them keeps the processes' gradients in step.
            idle = 0 * sum(p.sum() for p in self.projections.parameters())
            return {"ce": cross_entropy(model, batch) + idle}

        # The forward with fed-back latents; on the way, the states after the layer to align.
        fed = position_mask(batch["latents"], batch["input_ids"].shape[1])                 # [B,L]
        with own_features(model, batch) as own:
            h, after = feedback.forward(model, batch, fed, self.settings.updates, (self.layer,))
        terms = {"ce": cross_entropy(model, batch, h=h)}
        if not self.projections:
            return terms

        # Each record's latents by segment, [N,K,D], against what each encoder saw of it.
        states = after[self.layer]                                                         # [B,L,D]
        segments = [x[at].unflatten(0, (-1, self.settings.latents)) for x, at in zip(states, fed)]
        aligned = []
        for m, projection in self.projections.items():
            seen = self.features(int(m), batch, own)                                       # [P,E] each
            pairs = [alignment(projection, f, seen[b]) for b, f in enumerate(segments)]
            aligned.append(torch.stack(pairs).mean())
        return terms | {"repa": torch.stack(aligned).mean()}

    def features(self, m, batch, own):
        """What encoder m sees of each record: B tensors [P,E], the patches of all its images in turn."""
        if self.settings.encoder_names[m] == "own":
            tokens = (batch["mm_token_type_ids"] == 1).sum(1)                              # [B]
            return own[0].split(tokens.tolist())

        counts = batch[f"count_{m}"][:, 0].tolist()
        if not self.encoders[m]:
            return [features[:n] for features, n in zip(batch[f"features_{m}"], counts)]

        pixels = torch.cat([x[:n] for x, n in zip(batch[f"pixels_{m}"], counts)])          # [I,3,h,w]
        features = self.encoders[m](pixels)                                                # [I,P,E]
        return [x.flatten(0, 1) for x in features.split(counts)]


def alignment(projection, f, features):
    """L_REPA of one record: its latents, drawn out to the patches and projected, against features [P,E].

    f [N,K,D]: the latents by segment.
    """
    drawn = upsample_latents(f, len(features))                                             # [N,P,D]
    projected = projection(drawn.to(projection[0].weight.dtype))                           # [N,P,E]
    return patch_alignment(projected, features)


def stored(record, name, images):
    """Precomputed features of a record's images -> [P,E].

    name: features:NAME:SIZE. RecordError where file and flag disagree.
    """
    _, kind, size = name.split(":")
    found = data.load_features(record, kind)
    features = [found.get(str(n)) for n in range(images)]
    if any(x is None or x.ndim != 2 or x.shape[1] != int(size) for x in features):
        has = ", ".join(f"{key} {list(x.shape)}" for key, x in found.items())
        raise data.RecordError(
            f"{record.where}: field 'features': {kind} should hold a [patches, {size}] tensor for each of "
            f"{images} images, has {has}"
        )
    return torch.cat(features).float()


@contextmanager
def own_features(model, batch):
    """While open, catches what the vision tower gives the decoder: [tensor [image tokens, D]], detached."""
    seen, image = [], batch["mm_token_type_ids"] == 1                                              # [B,L]

    def look(module, args, kwargs):
        if not seen:  # the first piece holds all images
            x = kwargs["inputs_embeds"]                                                    # [B,n,D]
            seen.append(x[image[:, : x.shape[1]]].detach())

    hook = model.hf.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
