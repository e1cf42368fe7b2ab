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
    """Context around a forward of transformers' model, whose values stay what they are.

    model: backbone.model.Model. inputs: what the forward is given. Where pictures might have stood in it,
    none does, and a gradient is asked for, the vision part takes part.
    """
    might_see = "pixel_values" in inputs  # not in the pieces that follow a first one (feedback.py)
    sees = inputs.get("pixel_values") is not None
    if might_see and not sees and torch.is_grad_enabled() and trains_vision(model.hf):
        return with_zero(model)
    return nullcontext()


@contextmanager
def with_zero(model):
    """Adds 0 times what the vision part makes of a grey picture to what the decoder is given.

    It is done in front of the decoder, where other processes see their pictures: shards are gathered in the
    forward's order.
    """

    def add(module, args, kwargs):
        given = kwargs["inputs_embeds"]                                        # [B,n,D]
        total = sum(features.sum() for features in look(model))
        return args, {**kwargs, "inputs_embeds": given + 0 * total.to(given.dtype)}

    hook = model.hf.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def look(model):
    """Features of a grey picture as the decoder would get them, a list of [N,D], one for each depth."""
    picture = Image.new("RGB", (SIDE, SIDE), "grey")
    pixels = model.image_processor(images=[picture], return_tensors="pt")
    pixels = {name: value.to(model.device) for name, value in pixels.items()}

    seen = model.hf.model.get_image_features(**model.keywords(pixels), return_dict=True)
    deep = [part for depth in seen.get("deepstack_features") or () for part in depth]
    return [*seen.pooler_output, *deep]
