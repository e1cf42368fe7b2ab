"""LIVR: latents after the question, and a visual bottleneck that makes them carry the image (section 3.2).

B sequences, L length, K latents, M answer positions. Ours for its l_1..l_K: the latents. All that supervises
them is the answer.

    stage 1  image .. question  latents  answer    latents see all; no other token after the image sees it
    stage 2  the same tokens, plain causal attention

Its controls are settings: --masked 0 (latents only), --latents 0 --mask answer (mask only), --mask answer,
--latents_see image, --place before, --latent_kind identical, --latents 4..32; --latents 0 --masked 0
--image_copies 2 (image twice), and --tune tokens --masked 0 (prompt tuning).
"""
from dataclasses import dataclass

import torch

from crystal import layout
from crystal.attention_bias import AttentionBias
from crystal.backbone.model import Model
from crystal.methods.sft import Method as SFT
from crystal.methods.sft import cross_entropy, mass_recorder, mass_term
from crystal.runtime import config
from crystal.runtime.config import Progress, Stage, UserError, setting
from crystal.runtime.data import Batch


@dataclass(frozen=True)
class Settings(config.Settings):
    """The paper's values, and its controls (table 3)."""

    least_latents = 0

    latents: int = setting(
        16,
        "K, latent tokens after the question; 0: the mask alone (with --mask answer)",
    )
    place: str = setting(
        "after",
        "latents after the question, or before it, behind the last image",
        ("after", "before"),
    )
    masked: float = setting(
        0.4,
        "share of the updates that is stage 1, under the bottleneck; the rest is stage 2 (4 and 6"
        " epochs)",
    )
    mask: str = setting(
        "prompt",
        "who cannot see the image in stage 1: prompt and answer, or the answer alone",
        ("prompt", "answer"),
    )
    latents_see: str = setting(
        "all",
        "what latents see in stage 1: image and question, or the image alone",
        ("all", "image"),
    )
    image_copies: int = setting(1, "how often each image stands in the sequence")

    # Appendix B
    lora_dropout: float = setting(0.05, "dropout before the adapters")
    batch_size: int = setting(8, "sequences per process and forward")
    lr: float = setting(1e-4, "peak learning rate of either stage")
    weight_decay: float = setting(0.01, "AdamW decay; never on the vocabulary's rows")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.masked <= 1:
            raise UserError(f"--masked {self.masked}: a share of the updates, from 0 to 1")
        if self.masked and not self.latents and self.mask == "prompt":
            raise UserError(
                "--latents 0 --mask prompt: nobody would see the image; take --mask answer, or --masked 0"
            )
        if self.image_copies < 1:
            raise UserError(f"--image_copies {self.image_copies}: must be at least 1")

    @property
    def stages(self):
        return [Stage("masked", self.masked, self.lr), Stage("open", 1 - self.masked, self.lr)]


class Format(layout.Format):
    """Prompts with K latents at the end of the user's last turn, or behind its last image."""

    def __init__(self, tokenizer, settings):
        super().__init__(tokenizer)
        self.count = settings.latents
        self.place = settings.place
        self.copies = settings.image_copies
        names = layout.latent_tokens(settings.latents, settings.latent_kind)
        self.latents = tokenizer.convert_tokens_to_ids(names)

    def question(self, turns, image_tokens, latents="keep"):
        """What the model is asked -> Prompt. latents: "keep", or "drop" to leave them out."""
        ids, image = self.prompt(turns, image_tokens)
        if latents != "keep":
            return layout.Prompt(ids, image, [])

        # Where the user's last turn ends, or behind the last image's <|vision_end|>.
        at = len(ids) - 1 - ids[::-1].index(self.end)
        if self.place == "before" and image:
            at = image[-1] + 1 + (len(self.marks) > 1)
        where = range(at, at + self.count)
        return layout.Prompt(ids[:at] + self.latents + ids[at:], image, list(where))

    def chat_template(self):
        if self.copies > 1:
            raise UserError(
                "--image_copies 2 is a control: a stock directory has no place for images that stand twice"
            )
        template = self.tokenizer.chat_template
        if not self.count:
            return template
        latents = "".join(self.tokenizer.convert_ids_to_tokens(self.latents))

        # The whole prompt is rendered first; then the latents go behind its last image, or
        # before its last <|im_end|>.
        whole = "{%- set prompt -%}" + template + "{%- endset -%}"
        whole += "{%- if not add_generation_prompt -%}{{- prompt -}}"
        behind_image = ""
        if self.place == "before":
            mark = self.marks[-1]
            behind_image = "{%- elif '" + mark + "' in prompt -%}" + replace_last(mark, mark + latents)
        at_the_end = "{%- else -%}" + replace_last(layout.END, latents + layout.END) + "{%- endif -%}"
        return whole + behind_image + at_the_end


def replace_last(text, by):
    """A piece of a Jinja template that prints `prompt` with the last `text` in it replaced."""
    return "{%- set parts = prompt.rsplit('" + text + "', 1) -%}{{- parts[0] ~ '" + by + "' ~ parts[1] -}}"


class Method(SFT):
    """Cross-entropy under the bottleneck, then without it."""

    Settings = Settings
    monitored = ("mass",)

    @property
    def tokens(self):
        names = layout.latent_tokens(self.settings.latents, self.settings.latent_kind)
        return list(dict.fromkeys(names))

    def format(self, tokenizer):
        return Format(tokenizer, self.settings)

    def biases(self, model, batch):
        """Stage 1's mask: [AttentionBias].

        batch: input_ids [B,L], left- or right-padded, and answer_positions [B,M].
        """
        ids = batch["input_ids"]

        def is_one_of(tokens):
            wanted = model.tokenizer.convert_tokens_to_ids(list(tokens))
            return torch.isin(ids, torch.tensor(wanted, dtype=torch.long, device=ids.device))

        # The tokens around an image have seen images too. Blind is what else follows the first image.
        image = is_one_of(model.family.marks)                        # [B,L]
        latents = is_one_of(self.tokens)
        blind = (image.cumsum(1) > 0) & ~image & ~latents

        # From the position that predicts the answer's first token on: else an answer of one token
        # would see the image.
        if self.settings.mask == "answer":
            place = torch.arange(ids.shape[1], device=ids.device)
            blind &= place >= batch["answer_positions"][:, :1]

        blocked = [AttentionBias(blind, image)]
        if self.settings.latents_see == "image":
            blocked.append(AttentionBias(latents, ~image & ~latents))
        return blocked

    def losses(self, model: Model, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
        """{"ce": token mean over the answer, averaged over sequences}, and "mass"; stage 1 is masked."""
        biases = self.biases(model, batch) if progress.stage == 0 else []
        mass = mass_recorder(model, batch, biases)
        h = model.hidden(batch, recorder=mass, biases=biases)        # [B,L,D]
        return {"ce": cross_entropy(model, batch, h=h)} | mass_term(mass)
