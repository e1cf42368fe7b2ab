"""What differs between kinds of vision-language models: a row each, and how a kind prepares and takes images.

tutorials/10_backbones.md adds a row. I images, P rows of pixel_values, B sequences, L length.
"""

from dataclasses import dataclass
from itertools import groupby
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import LlavaOnevisionModel

from crystal import layout


class Grid(NamedTuple):
    """How the tokens of a view lie: rows of `columns` tokens of picture, and behind each `newlines` of none.

    A newline is a token that a family puts at a row's end; it has seen no place of the picture.
    """

    rows: int
    columns: int
    newlines: int = 0

    @property
    def tokens(self):
        return self.rows * (self.columns + self.newlines)


class Images:
    """How a family prepares images and takes them: Qwen's way.

    Another family's class says what it does otherwise. processor: transformers' image processor. config: the
    model's. A batch has pixel_values [P,..], the rows of all its images one after the other, and
    image_grid_thw [I,3], which says what each image is: frames, and rows and columns of patches.
    """

    bounded = True  # whether --min_pixels and --max_pixels mean anything

    def __init__(self, processor, config):
        self.processor, self.config = processor, config

    size = property(lambda self: self.processor.size)

    @property
    def context(self):
        """The model's own limit of a sequence, in tokens; None where its config names none."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def __call__(self, images, return_tensors="pt"):
        """PIL images of one record -> {"pixel_values", "image_grid_thw"}."""
        return dict(self.processor(images=images, return_tensors=return_tensors))

    def agreements(self):
        """[(preprocessor_config.json's field, its value, config.json's field, its value)], to be equal."""
        vision, own = self.config.vision_config, self.processor
        return [
            ("patch_size", own.patch_size, "vision_config.patch_size", vision.patch_size),
            ("merge_size", own.merge_size, "vision_config.spatial_merge_size", vision.spatial_merge_size),
            (
                "temporal_patch_size",
                own.temporal_patch_size,
                "vision_config.temporal_patch_size",
                vision.temporal_patch_size,
            ),
        ]

    def rows(self, image_grid_thw):
        """How many rows of pixel_values each image has (list of int)."""
        return image_grid_thw.prod(-1).tolist()

    def grids(self, image_grid_thw):
        """How each image's tokens lie, in the sequence's order: [Grid, ..], for Qwen one."""
        merge = self.processor.merge_size
        found = []
        for _, h, w in image_grid_thw.tolist():
            found.append([Grid(h // merge, w // merge)])
        return found

    def tokens(self, image_grid_thw):
        """How many tokens each image takes in the sequence (list of int)."""
        counts = []
        for grids in self.grids(image_grid_thw):
            counts.append(sum(grid.tokens for grid in grids))
        return counts

    def positions(self, model, batch):
        """Positions [3,B,L] of a batch; explicit, since those that the model caches go stale."""
        ids, kinds = batch["input_ids"], batch["mm_token_type_ids"]
        grids, mask = batch["image_grid_thw"], batch["attention_mask"]
        positions, _ = model.get_rope_index(ids, kinds, image_grid_thw=grids, attention_mask=mask)
        return positions

    def keywords(self, inputs):
        """Tensors of a batch -> keywords of the transformers model's forward and generate."""
        return inputs

    def save_pretrained(self, directory):
        self.processor.save_pretrained(directory)


class Tiles(Images):
    """LLaVA-OneVision's way: the whole image in one tile, then the image in several.

    The tiles are put together, without their padding, a newline after each row. image_grid_thw [I,3]: tiles,
    and the image's height and width in pixels. pixel_values [P,3,h,w], P tiles. Of several images in a record
    each is one tile, padded to a square, as the family was trained. Positions are 1-D.
    """

    bounded = False

    def __call__(self, images, return_tensors="pt"):
        # Nested: the images of one record.
        out = self.processor(images=[list(images)], return_tensors=return_tensors)
        pixels, sizes = out["pixel_values"], out["image_sizes"]  # [I,tiles,3,h,w], [I,2]

        grids = F.pad(sizes, (1, 0), value=pixels.shape[1])
        return {"pixel_values": pixels.flatten(0, 1), "image_grid_thw": grids}

    def agreements(self):
        vision, size = self.config.vision_config, self.processor.size
        pinpoints = [list(pair) for pair in self.config.image_grid_pinpoints]
        own = [list(pair) for pair in self.processor.image_grid_pinpoints]
        return [
            ("size", size["height"], "vision_config.image_size", vision.image_size),
            ("image_grid_pinpoints", own, "image_grid_pinpoints", pinpoints),
        ]

    def rows(self, image_grid_thw):
        return image_grid_thw[:, 0].tolist()

    def grids(self, image_grid_thw):
        """The whole image's Grid, and that of its tiles put together, with a newline after each row.

        The tiles' is one newline without columns where that is all. ValueError for an image so long and thin
        that nothing of its tiles is left without their padding: the model itself cannot take it.
        """
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        model = SimpleNamespace(config=self.config)
        newline = torch.ones(1)
        ratio = self.config.vision_aspect_ratio

        found = []
        for tiles, *size in image_grid_thw.tolist():
            # transformers' own code packs empty tiles; where it puts newlines tells the shape.
            empty = torch.zeros(tiles, side * side, 1)
            packed, _ = LlavaOnevisionModel.pack_image_features(
                model, [empty], torch.tensor([size]), image_newline=newline, vision_aspect_ratio=ratio
            )
            _, in_tiles = packed[0][:, 0].tensor_split([side * side])
            lines = in_tiles.nonzero()
            if not len(lines):
                height, width = size
                raise ValueError(
                    f"{width} x {height} pixels: so long and thin that nothing is left of its tiles"
                )
            columns = int(lines[0])
            found.append([Grid(side, side), Grid(len(lines), columns, 1)])
        return found

    def positions(self, model, batch):
        """Positions [3,B,L] as Qwen has them, int64: each row 0..L-1, three times."""
        B, L = batch["input_ids"].shape
        return torch.arange(L, device=batch["input_ids"].device).expand(3, B, L)

    def keywords(self, inputs):
        """Tensors of a batch -> the same as this family names them, less what it does not know.

        mm_token_type_ids and image_grid_thw are left out; position_ids [3,B,L] become [B,L]. Of the
        grids come image_sizes [I,2] (height, width in pixels) and batch_num_images, a list of how
        many images belong together.
        """
        out = dict(inputs)
        out.pop("mm_token_type_ids", None)
        grids = out.pop("image_grid_thw", None)
        if out.get("position_ids") is not None:
            out["position_ids"] = out["position_ids"][0]
        if grids is None:
            return out

        # An image on its own has two tiles and more. transformers asks for images a record, and reads no
        # more from it than this.
        out["image_sizes"] = grids[:, 1:]
        together = []
        for one_tile, run in groupby(self.rows(grids), lambda tiles: tiles == 1):
            n = len(list(run))
            together += [n] if one_tile else [1] * n
        out["batch_num_images"] = together
        return out


@dataclass(frozen=True)
class Family:
    """What differs between kinds of models.

    language, vision, merger: regular expressions of Linear modules' names. marks: the image token, and those
    around an image that have seen nothing but images, the last one closing it. vision_attention: name of the
    vision tower's attention function. images: an Images.
    """

    language: str
    vision: str
    merger: str
    marks: tuple = layout.IMAGE
    vision_attention: str = "crystal_flash_vision"
    images: type[Images] = Images


DECODER = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"

FAMILIES = {
    "qwen2_5_vl": Family(
        language=DECODER,
        vision=r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
        merger=r"model\.visual\.merger\.mlp\.\d+",
    ),
    # DeepStack: mergers of its own bring features of early vision blocks to the outputs of
    # the first decoder layers.
    "qwen3_vl": Family(
        language=DECODER,
        vision=r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])",
        merger=r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]",
    ),
    "llava_onevision": Family(
        language=DECODER,
        vision=r"model\.vision_tower\.(vision_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
        merger=r"model\.multi_modal_projector\.linear_[12]",
        marks=("<image>",),
        vision_attention="sdpa",  # SigLIP: tiles of one size, a batch of them as it is
        images=Tiles,
    ),
}
