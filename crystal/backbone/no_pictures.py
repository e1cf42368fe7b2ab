"""A batch without pictures: where the vision part trains, its weights get a gradient of zero and not none.

Processes exchange gradients parameter by parameter, and shards layer by layer, all in the same order. So a
process whose records have no picture must take part with zeros: without them the others wait for it, or read
its next message as the answer. One process does the same, so that an update does not depend on how many there
are: AdamW lets the moments of these weights decay where it would have passed them over.
"""

from contextlib import contextmanager, nullcontext

import torch
from PIL import Image

SIDE = 56  # pixels of the picture that is looked at instead: a few patches of any family


def trains_vision(hf):
    """Whether anything of a transformers model in front of its decoder trains."""
    decoder = {id(p) for p in hf.model.language_model.parameters()}
    return any(p.requires_grad and id(p) not in decoder for p in hf.model.parameters())


def taking_part(model, inputs):
    """Context around a forward of transformers' model: with a gradient asked for and no picture, see above.

    model: backbone.model.Model. inputs: tensors of a batch. The forward's values stay what they are.
    """
    if inputs["pixel_values"] is not None or not torch.is_grad_enabled() or not trains_vision(model.hf):
        return nullcontext()
    return with_zero(model)


@contextmanager
def with_zero(model):
    """Adds 0 times what the vision part makes of a grey picture to what the decoder is given.

    It is done in front of the decoder, where other processes see their pictures: shards are gathered in the
    forward's order.
    """

    def add(module, args, kwargs):
        features = look(model)
        zero = 0 * sum(part.sum() for part in features).to(kwargs["inputs_embeds"].dtype)
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + zero}

    hook = model.hf.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def look(model):
    """Features of a grey picture as the decoder would get them, a list of [N,D], one for each depth."""
    pixels = model.image_processor(images=[Image.new("RGB", (SIDE, SIDE), "grey")], return_tensors="pt")
    pixels = {name: value.to(model.device) for name, value in pixels.items()}
    seen = model.hf.model.get_image_features(**model.keywords(pixels), return_dict=True)
    deep = [part for depth in seen.get("deepstack_features") or () for part in depth]
    return [*seen.pooler_output, *deep]
