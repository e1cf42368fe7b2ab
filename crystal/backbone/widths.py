"""Qwen2.5-VL's published widths with random weights: a model to time, without a download."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from crystal.backbone.model import TINY, Model, load
from crystal.runtime.plan import Blocks

SIDE = 448  # pixels: 1024 patches, 256 tokens

# The published configurations. Heads of 128 numbers; the tower is the same in both.
TEXT = {
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152064,
    },
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
        "num_key_value_heads": 2, "num_hidden_layers": 36, "vocab_size": 151936,
    },
}  # fmt: skip
VISION = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "depth": 32}
WHOLE_IMAGE = (7, 15, 23, 31)  # blocks of the tower that see the image and not a window
PUBLISHED = {"Qwen/Qwen2.5-VL-7B-Instruct": "7b", "Qwen/Qwen2.5-VL-3B-Instruct": "3b"}
AREA = (3136, 12845056)  # pixels of an image after resizing, as both models' own rules bound it


def build(name, layers, vision_layers, device, dtype):
    """A Model of published widths with random weights, made on the device, with the tiny one's tokens.

    name: "7b", "3b", or "tiny" for the tiny model's own sizes. layers, vision_layers: of the decoder and of
    the tower; 0 means all of them on a GPU and 2 on a CPU.
    """
    tiny = load("tiny", dtype, "cpu", SIDE * SIDE, SIDE * SIDE)
    config = AutoConfig.from_pretrained(str(TINY))
    if name != "tiny":
        few = 0 if device.type == "cuda" else 2
        text, vision = config.text_config, config.vision_config
        text.update(TEXT[name])
        text.num_hidden_layers = layers or few or TEXT[name]["num_hidden_layers"]
        text.layer_types = ["full_attention"] * text.num_hidden_layers
        text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        vision.update(VISION)
        vision.out_hidden_size = text.hidden_size
        vision.depth = vision_layers or few or VISION["depth"]
        vision.fullatt_block_indexes = [i for i in WHOLE_IMAGE if i < vision.depth]
        config.tie_word_embeddings = text.tie_word_embeddings = name == "3b"

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            hf = AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(before)
    hf = hf.to(device, dtype).eval().requires_grad_(False)
    hf.tie_weights()  # on the meta device nothing has
    with torch.no_grad():
        for key, parameter in hf.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(1.0 if key.endswith("weight") else 0.0)
    return Model(hf, tiny.tokenizer, tiny.image_processor, tiny.family, name)


def outline(name, dtype, min_pixels=None, max_pixels=None):
    """A Model without weights, on torch's meta device: of a directory, a hub name, or published widths.

    For names of PUBLISHED nothing is asked of a hub: the tokens are the tiny model's, the pixel rules Qwen's.
    """
    if name not in PUBLISHED:
        return load(name, dtype, min_pixels=min_pixels, max_pixels=max_pixels, weights=False)

    known = PUBLISHED[name]
    depth = TEXT[known]["num_hidden_layers"]
    model = build(known, depth, VISION["depth"], torch.device("meta"), dtype)
    images = load("tiny", dtype, "cpu", min_pixels or AREA[0], max_pixels or AREA[1]).image_processor
    model.image_processor = images
    return model


def blocks(model, patches):
    """A Model -> (plan.Blocks of its decoder, of its vision tower), as its configuration says.

    patches: of one image, which the tower's blocks see as a whole, or in windows.
    """
    text, vision = model.hf.config.get_text_config(), model.hf.config.vision_config
    heads = text.num_attention_heads
    d = getattr(text, "head_dim", None) or text.hidden_size // heads
    decoder = Blocks(
        text.num_hidden_layers, text.hidden_size, text.intermediate_size, heads, text.num_key_value_heads, d
    )

    # Towers have other names for the same numbers.
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
    width = vision.hidden_size

    # Qwen2.5's alone has windows.
    whole, side = range(depth), 0
    if model.hf.config.model_type == "qwen2_5_vl":
        whole, side = vision.fullatt_block_indexes, vision.window_size // vision.patch_size
    in_window = min(side * side, patches)
    seen = len(whole) * patches + (depth - len(whole)) * in_window
    return decoder, Blocks(depth, width, vision.intermediate_size, heads, heads, width // heads, seen)
