"""Interventions on a model that answers: its latents' states recorded or replaced, its image
hidden from later positions.

They reach every decoder layer by its pre-hook, in generation too, and leave the model as it was.

B questions, L prompt length, K latents, D hidden size.
"""

import functools
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from crystal.attention_bias import AttentionBias
from crystal.generate import Query
from crystal.runtime import data


@contextmanager
def before_layers(model, change):
    """While it lasts, change(n, h [B,L,D], kwargs) -> (h, kwargs) runs before decoder layer n in
    every forward, generation's too.
    """

    def hook(n):
        def run(layer, args, kwargs):
            h, kwargs = change(n, args[0] if args else kwargs["hidden_states"], kwargs)
            return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

        return run

    handles = [
        layer.register_forward_pre_hook(hook(n), with_kwargs=True) for n, layer in enumerate(model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def images_seen_once(model):
    """While it lasts, images that the tower has seen are not encoded again: yields what it keeps, a dict.

    The conditions of a question differ behind its image. Known by their pixels and grids to the bit, features
    are what they were; `clear` the dict where other images come.
    """
    inner, kept = getattr(model.hf, "model", None), {}
    if inner is None:
        yield kept
        return
    encode = inner.get_image_features

    @functools.wraps(encode)  # generation looks at its arguments' names
    def once(*args, **how):
        digest = hashlib.blake2b()
        for value in (*args, *how.values()):
            if isinstance(value, torch.Tensor):
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
            else:
                digest.update(repr(value).encode())
        key = digest.digest()
        if key not in kept:
            kept[key] = encode(*args, **how)
        return kept[key]

    inner.get_image_features = once
    try:
        yield kept
    finally:
        del inner.get_image_features  # the class's own is behind it


@contextmanager
def recorded(model, where, length=None):
    """Records the latents' states: a list that fills with [B,K,D] for each layer.

    where: positions [B,K], -1 for none, whose states mean nothing. length: only forwards of so many positions
    count; by default those of more than one, which are prompts. A token being decoded reads the latents from
    the cache.
    """
    states = []

    def change(n, h, kwargs):
        if holds_latents(h, length):
            states.append(h.gather(1, places(where, h)))
        return h, kwargs

    with before_layers(model, change):
        yield states


@contextmanager
def replaced(model, where, states, length=None):
    """The latents at positions where [B,K] have the given states, [B,K,D] for each layer; length as above."""

    def change(n, h, kwargs):
        if holds_latents(h, length):
            # Where there is none, the first position gets its own state.
            own = h.gather(1, places(where, h))
            given = torch.where(where[:, :, None] >= 0, states[n].to(h.dtype), own)
            h = h.scatter(1, places(where, h), given)
        return h, kwargs

    with before_layers(model, change):
        yield


def places(where, h):
    """Positions [B,K] as an index of states h [B,L,D]; -1, for none, is the first."""
    return where.clamp(min=0)[:, :, None].expand(-1, -1, h.shape[2])


def holds_latents(h, length):
    """Whether a forward with states h [B,L,D] is one whose latents are meant."""
    return h.shape[1] > 1 if length is None else h.shape[1] == length


def hidden_image(ask):
    """The bottleneck of `generate`: rows that are neither image nor latent see no image column, in the
    prompt and while decoding.
    """
    return lambda batch: [AttentionBias(~ask.image & ~ask.latents, ask.image)]


@dataclass
class Asked:
    """A batch of prompts as `generate` pads them, to the left. ids: lists; where: latents [B,K];
    image, latents, mask: [B,L].
    """

    prompts: list
    where: torch.Tensor
    image: torch.Tensor
    latents: torch.Tensor
    mask: torch.Tensor


def asked(model, examples, pixels="pixel_values"):
    """Examples of `questions` -> Asked. pixels: or "pixel_values_cor" for the corrupted images."""
    prompts = [Query(e["layout"].ids, e[pixels], e["image_grid_thw"]) for e in examples]
    B, L = len(prompts), max(len(prompt.ids) for prompt in prompts)
    where = torch.tensor(
        [[L - len(e["layout"].ids) + i for i in e["layout"].latents] for e in examples], dtype=torch.long
    )
    image, mask = torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, L, dtype=torch.long)
    # Those around an image may repeat it: they count as image.
    marks = set(model.tokenizer.convert_tokens_to_ids(list(model.family.marks)))
    for b, prompt in enumerate(prompts):
        ids = prompt.ids
        left = L - len(ids)
        mask[b, left:] = 1
        image[b, [left + i for i, token in enumerate(ids) if token in marks]] = True
    latents = torch.zeros(B, L, dtype=torch.bool).scatter(1, where, True)
    return Asked(prompts, *(x.to(model.device) for x in (where, image, latents, mask)))


def questions(model, fmt, records, latents="keep", corruption=None, seed=0):
    """Records -> Examples whose layout is a layout.Prompt.

    A merged directory's chat template writes the latents itself: there they are found by their tokens' name.
    """
    named = {i for token, i in model.tokenizer.get_added_vocab().items() if token.startswith("<|latent_")}

    def layout(record, image_tokens):
        prompt = fmt.question(record.turns, image_tokens, latents)
        if fmt.count or not named:
            return prompt
        if latents == "drop":  # latents stand after the image: its positions stay
            return prompt._replace(ids=[token for token in prompt.ids if token not in named])
        return prompt._replace(latents=[i for i, token in enumerate(prompt.ids) if token in named])

    return data.RecordDataset(records, layout, model.image_processor, corruption, seed, copies=fmt.copies)
