"""A method file for `--method`: reliance_open.py with a bottleneck in every update, so that the answer can
know the image through the latents alone.

From the row that predicts the answer's first token on, all between the image's begin and that row but the
latents is hidden: question and thought saw the image too. LIVR's mask (its section 3.2) closes question and
thought to the image instead; a base this small, which reads images in its question's rows, does not relearn
that in minutes. `evaluate --bottleneck` and `--reliance --bottleneck` ask such a model under its own mask.
"""

import torch

from crystal.attention_bias import AttentionBias
from crystal.layout import latent_tokens
from data_prep.checks.reliance_open import Method as Open


class Method(Open):
    """The same with the direct path closed."""

    def biases(self, model, batch):
        """batch: input_ids [B,L], left- or right-padded, and rows [B,M], the answer positions."""
        ids, s = batch["input_ids"], self.settings
        names = latent_tokens(s.latents, s.latent_kind)
        latents = torch.isin(
            ids, torch.tensor(model.tokenizer.convert_tokens_to_ids(names), device=ids.device)
        )  # [B,L]
        answer = torch.arange(ids.shape[1], device=ids.device) >= batch["answer_positions"][:, :1]  # [B,L]
        image = (ids == model.hf.config.image_token_id).cumsum(1) > 0  # [B,L], from the first image on
        return [AttentionBias(answer, image & ~latents & ~answer)]
