"""Frozen vision encoders, to which VaLR's latents are aligned while they learn; inference needs none.

I images, h and w their size in pixels as the encoder wants it, P patches, E feature size.

Any checkpoint of a kind in KINDS, a directory or a hub name: DINOv3, DINOv2, and SigLIP and SigLIP 2 with a
fixed resolution. `tiny` is a DINOv3 of four small layers that was taught what each patch of a toy scene
shows: a shape, a colour, a size. Of other pictures it knows nothing. Images are prepared here, from the
checkpoint's own preprocessor_config.json: transformers' DINOv3 processor needs torchvision.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    Dinov2Model,
    DINOv3ViTModel,
    ImageProcessingMixin,
    SiglipVisionModel,
)

from crystal.backbone.files import refuse_quantised, why
from crystal.backbone.model import load_weights
from crystal.runtime.config import UserError

KINDS = {
    "dinov3_vit": DINOv3ViTModel,
    "dinov2": Dinov2Model,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
TINY = Path(__file__).parents[1] / "assets" / "encoder"  # made by data_prep/tiny/encoder.py
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, in which processors are configured


class Preparation(NamedTuple):
    """How an encoder wants its pictures; it has no weights. rules: its preprocessor_config.json."""

    rules: dict

    def pixels(self, image):
        """PIL image, RGB -> [3,h,w], resized, cropped where the checkpoint says so, normalised."""
        rules = self.rules
        H, W = image.height, image.width
        x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        x = x.view(H, W, 3).permute(2, 0, 1).float() / 255  # [3,H,W]

        # To the size that the checkpoint wants.
        size = rules["size"]
        if "shortest_edge" in size:
            scale = size["shortest_edge"] / min(H, W)
            size = {"height": round(H * scale), "width": round(W * scale)}
        h, w = size["height"], size["width"]
        mode = RESAMPLE[rules.get("resample", 2)]
        x = F.interpolate(x[None], (h, w), mode=mode, antialias=True)[0]
        x = x.clamp(0, 1)

        # Its middle.
        if rules.get("do_center_crop"):
            h, w = rules["crop_size"]["height"], rules["crop_size"]["width"]
            top = (x.shape[1] - h) // 2
            left = (x.shape[2] - w) // 2
            x = x[:, top : top + h, left : left + w]

        mean = torch.tensor(rules["image_mean"])[:, None, None]
        std = torch.tensor(rules["image_std"])[:, None, None]
        return (x - mean) / std


class Encoder(nn.Module):
    """A frozen encoder in evaluation mode, float32. dim: E."""

    def __init__(self, name, hf, rules):
        super().__init__()
        self.name = name
        self.hf = hf.eval().requires_grad_(False)
        self.rules = rules
        self.dim = hf.config.hidden_size

        # DINO puts its class token and registers in front of the patches, SigLIP has none.
        self.prefix = 0
        if not isinstance(hf, SiglipVisionModel):
            self.prefix = 1 + getattr(hf.config, "num_register_tokens", 0)

    def pixels(self, image):
        """PIL image, RGB -> [3,h,w], as the encoder wants it."""
        return Preparation(self.rules).pixels(image)

    @torch.no_grad()
    def forward(self, pixels):
        """[I,3,h,w] -> patch features [I,P,E] of the last layer, row by row over the image, float32."""
        # Features computed in training equal those computed before it.
        with torch.autocast(pixels.device.type, enabled=False):
            return self.hf(pixel_values=pixels.float()).last_hidden_state[:, self.prefix :]

    def train(self, mode=True):
        return super().train(False)  # frozen: dropout never


def load(name, device="cpu"):
    """`tiny`, a directory or a hub name -> Encoder.

    UserError if it cannot be loaded or is of an unknown kind.
    """
    path = str(TINY) if name == "tiny" else name
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type not in KINDS:
            raise UserError(
                f"--encoders {name}: model type {config.model_type!r} is none of {', '.join(KINDS)}; "
                "features of another can be precomputed: features:NAME:SIZE"
            )
        refuse_quantised(f"--encoders {name}", path, config)
        rules, _ = ImageProcessingMixin.get_image_processor_dict(path)

        # SigLIP's text tower has no place here.
        hf = load_weights(KINDS[config.model_type], path, torch.float32, part=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"--encoders {name}: cannot be loaded: {why(error)}") from error

    missing = sorted({"size", "image_mean", "image_std"} - rules.keys())
    if missing:
        raise UserError(f"--encoders {name}: its preprocessor_config.json lacks {', '.join(missing)}")
    return Encoder(name, hf, rules).to(device)
