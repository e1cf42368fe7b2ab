"""LIVR: latents after the question, and a visual bottleneck that makes them carry the image (its section 3.2).

B sequences, L length, K latents, M answer positions. Ours for its l_1..l_K: the latents. All that supervises them is the answer.

    stage 1  image .. question  latents  answer      latents see all; no other token after the image sees the image
    stage 2  the same tokens, plain causal attention

Its controls are settings: --masked 0 (latents only), --latents 0 --mask answer (mask only), --mask answer, --latents_see
image, --place before, --latent_kind identical, --latents 4..32; --latents 0 --masked 0 --image_copies 2 (image twice), and
--tune tokens --masked 0 (prompt tuning).
"""
from dataclasses import dataclass

import torch

from crystal import layout
from crystal.attention_bias import AttentionBias
from crystal.methods.sft import Method as SFT
from crystal.methods.sft import cross_entropy, mass_recorder, mass_term
from crystal.runtime import config
from crystal.runtime.config import Stage, UserError, setting


@dataclass(frozen=True)
class Settings(config.Settings):
    """The paper's values, and its controls (table 3)."""

    least_latents = 0

    latents: int = setting(16, "K, latent tokens after the question; 0: the mask alone (with --mask answer)")
    place: str = setting("after", "latents after the question, or before it, behind the last image", ("after", "before"))
    masked: float = setting(0.4, "share of the updates that is stage 1, under the bottleneck; the rest is stage 2 (4 and 6 epochs)")
    mask: str = setting("prompt", "who cannot see the image in stage 1: prompt and answer, or the answer alone", ("prompt", "answer"))
    latents_see: str = setting("all", "what latents see in stage 1: image and question, or the image alone", ("all", "image"))
    image_copies: int = setting(1, "how often each image stands in the sequence")
    # appendix B
    lora_dropout: float = setting(0.05, "dropout before the adapters")
    batch_size: int = setting(8, "sequences per process and forward")
    lr: float = setting(1e-4, "peak learning rate of either stage")
    weight_decay: float = setting(0.01, "AdamW decay; never on the vocabulary's rows")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.masked <= 1:
            raise UserError(f"--masked {self.masked}: a share of the updates, from 0 to 1")
        if self.masked and not self.latents and self.mask == "prompt":
            raise UserError("--latents 0 --mask prompt: nobody would see the image; take --mask answer, or --masked 0")
        if self.image_copies < 1:
            raise UserError(f"--image_copies {self.image_copies}: must be at least 1")

    @property
    def stages(self):
        return [Stage("masked", self.masked, self.lr), Stage("open", 1 - self.masked, self.lr)]


class Format(layout.Format):
    """Prompts with K latents at the end of the user's last turn, or behind its last image."""

    def __init__(self, tokenizer, settings):
        super().__init__(tokenizer)
        self.count, self.place, self.copies = settings.latents, settings.place, settings.image_copies
        self.latents = tokenizer.convert_tokens_to_ids(layout.latent_tokens(settings.latents, settings.latent_kind))

    def question(self, turns, image_tokens, latents="keep"):
        """The prompt to generate from: (ids, image positions, latent positions). latents: "keep", or "drop" to leave them out."""
        ids, image = self.prompt(turns, image_tokens)
        if latents != "keep":
            return ids, image, []
        at = len(ids) - 1 - ids[::-1].index(self.end)  # where the user's last turn ends
        if self.place == "before" and image:
            at = image[-1] + 1 + (len(self.marks) > 1)  # after <|vision_end|>
        return ids[:at] + self.latents + ids[at:], image, list(range(at, at + self.count))

    def chat_template(self):
        if self.copies > 1:
            raise UserError("--image_copies 2 is a control: a stock directory has no place for images that stand twice")
        template = self.tokenizer.chat_template
        if not self.count:
            return template
        latents = "".join(self.tokenizer.convert_ids_to_tokens(self.latents))
        # The whole prompt is rendered first; then the latents go behind its last image, or before its last <|im_end|>.
        split = lambda at, joined: "{%- set parts = prompt.rsplit('" + at + "', 1) -%}{{- parts[0] ~ '" + joined + "' ~ parts[1] -}}"
        behind_image = "{%- elif '" + self.marks[-1] + "' in prompt -%}" + split(self.marks[-1], self.marks[-1] + latents)
        return ("{%- set prompt -%}" + template + "{%- endset -%}{%- if not add_generation_prompt -%}{{- prompt -}}"
                + behind_image * (self.place == "before") + "{%- else -%}" + split(layout.END, latents + layout.END) + "{%- endif -%}")


class Method(SFT):
    """Cross-entropy under the bottleneck, then without it."""

    Settings = Settings
    monitored = ("mass",)

    @property
    def tokens(self):
        return list(dict.fromkeys(layout.latent_tokens(self.settings.latents, self.settings.latent_kind)))

    def format(self, tokenizer):
        return Format(tokenizer, self.settings)

    def biases(self, model, batch):
        """Stage 1's mask: [AttentionBias]. batch: input_ids [B,L], left- or right-padded, and answer_positions [B,M]."""
        ids = batch["input_ids"]
        is_one = lambda tokens: torch.isin(ids, torch.tensor(model.tokenizer.convert_tokens_to_ids(list(tokens)), dtype=torch.long, device=ids.device))
        # The tokens around an image have seen images too.
        image, latents = is_one(model.family.marks), is_one(self.tokens)                           # [B,L] each
        blind = (image.cumsum(1) > 0) & ~image & ~latents                              # the rest of what follows the first image
        if self.settings.mask == "answer":
            # From the row that predicts the answer's first token on: else an answer of one token would see the image.
            blind &= torch.arange(ids.shape[1], device=ids.device) >= batch["answer_positions"][:, :1]
        blocked = [AttentionBias(blind, image)]
        if self.settings.latents_see == "image":
            blocked.append(AttentionBias(latents, ~image & ~latents))
        return blocked

    def losses(self, model, batch, progress):
        """{"ce": token mean over the answer, per sequence, averaged}, and "mass"; in stage 1 under the mask."""
        biases = self.biases(model, batch) if progress.stage == 0 else []
        mass = mass_recorder(model, batch, biases)
        return {"ce": cross_entropy(model, batch, h=model.hidden(batch, recorder=mass, biases=biases))} | mass_term(mass)
