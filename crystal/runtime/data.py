"""Records become batches.

B pairs, L sequence length, I images of a batch, P patches of all of them, K latents, M answer positions, N
image tokens. Where records come from, records.py says; whoever reads them has its names here too.
"""

from functools import partial
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from crystal.layout import IGNORE
from crystal.runtime.records import (  # noqa: F401 (data.read, data.Record and the like are what callers say)
    Record,
    RecordError,
    Records,
    broken,
    check,
    items,
    load_features,
    load_image,
    load_images,
    of_dictionaries,
    read,
    whole,
)
from crystal.runtime.sampling import seed_of


class RecordDataset(Dataset):
    """(epoch, index) -> one example: a Layout and the pixels of its images, intact and corrupted.

    image_processor: a families.Images. layout: function (record, image token counts) -> Layout. corruption: a
    corrupt.Corruption, or a function (image [3,h,w] in [0,1], generator) -> image; None: no corrupted images.
    Its generator is seeded by (seed, epoch, index, image), so that what it draws depends neither on ranks nor
    on workers nor on a resume. grey: feed uniformly grey images, what a blind model sees. copies: how often
    each image stands in the sequence. extras: function (record, its RGB PIL images) -> {name: tensor [n,..]},
    what else a method wants in the batch. recipe: function without arguments that gives layout, corruption
    and extras, {name: function}: pickled, a set has it in their place, and they are made anew by it.
    """

    def __init__(
        self,
        records,
        layout,
        image_processor,
        corruption=None,
        seed=0,
        skip=False,
        grey=False,
        copies=1,
        extras=None,
        recipe=None,
    ):
        self.records = records
        self.layout = layout
        self.image_processor = image_processor
        self.corruption = corruption
        self.seed = seed
        self.skip = skip
        self.grey = grey
        self.copies = copies
        self.extras = extras
        self.recipe = recipe

    def __getstate__(self):
        made = ("layout", "corruption", "extras") if self.recipe else ()
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.recipe:
            self.__dict__.update(self.recipe())

    def __len__(self):
        return len(self.records)

    def __getitem__(self, at):
        epoch, index = at
        bad = []

        # A skipped record is replaced by the next one, so that every batch stays full on every rank.
        for i in range(len(self.records)):
            try:
                example = self.build((index + i) % len(self.records), epoch)
                return example | {"bad": bad}
            except RecordError as error:
                bad.append(str(error))
                if not self.skip:
                    break

        return {"error": bad[0]}  # told, not raised: a worker's exception would arrive as a page of traceback

    def build(self, index, epoch):
        """One record -> {"layout": Layout, "extras": {name: tensor [n,..]}} and its pixels.

        The pixels are "pixel_values", "image_grid_thw" and with a corruption "pixel_values_cor". Pixels as in
        `pixels`. RecordError for a record that is broken, too long for the model, or lacks what corruption or
        extras need.
        """
        record = self.records[index]
        if isinstance(record, RecordError):
            raise record

        images = load_images(record)
        if self.grey:
            images = [Image.new("RGB", image.size, (128, 128, 128)) for image in images]
        try:
            example = self.pixels(images)
            counts = self.image_processor.tokens(example["image_grid_thw"]) if images else []
        except Exception as error:  # processors raise many kinds for a picture that they cannot take
            problem = " ".join(str(error).split()) or type(error).__name__
            raise RecordError(f"{record.where}: field 'image': {problem}") from error

        if self.corruption and not images:
            raise RecordError(f"{record.where}: field 'image': missing; the corrupted path needs an image")
        example["where"] = record.where
        example["layout"] = self.layout(record, counts)
        self.check_length(record, example["layout"], sum(counts))
        example["extras"] = self.extras(record, images) if self.extras else {}
        check_extras(record, example["extras"])
        if not self.corruption:
            return example

        corrupted = []
        for n, image in enumerate(images):
            g = torch.Generator().manual_seed(seed_of(self.seed, epoch, index, n))
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # [3,h,w]
            try:
                x = self.corruption(x, g)
            except ValueError as error:  # of a function of the user's own
                raise RecordError(f"{record.where}: --corruption {self.corruption}: {error}") from error
            x = (x * 255).round().byte().permute(1, 2, 0)  # [h,w,3]
            corrupted.append(Image.fromarray(x.numpy()))
        example["pixel_values_cor"] = self.pixels(corrupted)["pixel_values"]
        return example

    def check_length(self, record, layout, of_images):
        """RecordError for a sequence longer than the model's own limit: none is cut, images least of all."""
        limit = getattr(self.image_processor, "context", None)
        if limit and len(layout.ids) > limit:
            length = len(layout.ids)
            raise RecordError(
                f"{record.where}: {length} tokens, {of_images} of them of images; the model's own limit is "
                f"{limit} (max_position_embeddings), and nothing is cut: use fewer or smaller images "
                "(--max_pixels) or a shorter text"
            )

    def pixels(self, images):
        """RGB PIL images of one record -> {"pixel_values" [P,..], "image_grid_thw" [I,3]} of all copies.

        See families.Images; both are None without images. ValueError where the processor refuses an image,
        one far too narrow, say.
        """
        if not images:
            return {"pixel_values": None, "image_grid_thw": None}
        images = [image for image in images for _ in range(self.copies)]
        out = self.image_processor(images=images, return_tensors="pt")
        return {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}


def check_extras(record, extras):
    """RecordError unless a method's extras are {name: tensor [n,..]}, which a batch can be made of."""
    wrong = f"{record.where}: the method's extras: "
    if not isinstance(extras, dict):
        raise RecordError(wrong + f"{type(extras).__name__}, where {{name: tensor [n,..]}} is wanted")
    for name, value in extras.items():
        if not isinstance(value, torch.Tensor):
            raise RecordError(wrong + f"{name!r} is a {type(value).__name__}; a tensor [n,..] is wanted")
        if not value.ndim:
            raise RecordError(wrong + f"{name!r} is a tensor without dimensions; one [n,..] is wanted")


class Batch(TypedDict, total=False):
    """What `collate` makes of B examples; a method's extras stand beside these, [B,n,..] each."""

    input_ids: torch.Tensor  # [B,L]
    targets: torch.Tensor  # [B,L], IGNORE where there is no label
    attention_mask: torch.Tensor  # [B,L], 0 at padding
    mm_token_type_ids: torch.Tensor  # [B,L], 1 at image tokens
    image: torch.Tensor  # [B,N] positions, -1 pads
    thought: torch.Tensor  # [B,2] spans
    latents: torch.Tensor  # [B,K] positions, -1 pads
    answer: torch.Tensor  # [B,2] spans
    answer_positions: torch.Tensor  # [B,M] positions, -1 pads
    pixel_values: torch.Tensor  # [P,..] of all images
    pixel_values_cor: torch.Tensor  # the same, corrupted
    image_grid_thw: torch.Tensor  # [I,3]
    gaze: torch.Tensor  # LaViT's extras, see methods/lavit.py
    gaze_grid: torch.Tensor
    v_sem: torch.Tensor
    bad: list  # messages of records that were skipped
    where: list  # each record's file and line, for messages
    error: str  # instead of all the others: what broke


def collate(examples, pad):
    """Examples -> a batch of tensors, right-padded:

    input_ids, targets, attention_mask, mm_token_type_ids [B,L]; thought, answer [B,2] spans;
    latents [B,K], answer_positions [B,M], image [B,N] positions with -1 for padding;
    pixel_values (and pixel_values_cor) [P,..] and image_grid_thw [I,3], see families.Images; and
    a method's extras [B,n,..], padded with zeros. Beside the tensors bad, the messages of the
    records that were skipped. Where an example is an error, {"error": the first one, "bad": []}:
    told, since one rank that raised alone would leave the others waiting.
    """
    if errors := [e["error"] for e in examples if "error" in e]:
        return {"error": errors[0], "bad": []}

    layouts = [e["layout"] for e in examples]
    B, L = len(layouts), max(len(x.ids) for x in layouts)

    def table(lists, fill, width=None):
        width = max([len(x) for x in lists] + [0]) if width is None else width
        out = torch.full((len(lists), width), fill, dtype=torch.long)
        for i, x in enumerate(lists):
            out[i, : len(x)] = torch.as_tensor(list(x), dtype=torch.long)
        return out

    batch = {
        "input_ids": table([x.ids for x in layouts], pad, L),
        "targets": table([x.targets for x in layouts], IGNORE, L),
        "attention_mask": table([[1] * len(x.ids) for x in layouts], 0, L),
        "latents": table([x.latents for x in layouts], -1),
        "answer_positions": table([x.answer_positions for x in layouts], -1),
        "image": table([x.image for x in layouts], -1),
        "thought": torch.tensor([x.thought for x in layouts]),
        "answer": torch.tensor([x.answer for x in layouts]),
    }

    batch["mm_token_type_ids"] = torch.zeros(B, L, dtype=torch.long)
    for i, x in enumerate(layouts):
        batch["mm_token_type_ids"][i, x.image] = 1

    for name in ("pixel_values", "pixel_values_cor", "image_grid_thw"):
        parts = [e[name] for e in examples if e.get(name) is not None]
        batch[name] = torch.cat(parts) if parts else None
    extras = [e.get("extras", {}) for e in examples]
    for name in dict.fromkeys(name for each in extras for name in each):
        parts = [each[name] for each in extras if name in each]
        if len(parts) < len(examples):
            return {"error": f"the method's extras: {name!r} is missing of some records", "bad": []}
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            said = f"the method's extras: {name!r} has shapes {shapes}; only the first number may differ"
            return {"error": said, "bad": []}
        batch[name] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    batch["bad"] = [line for e in examples for line in e["bad"]]
    if "where" in examples[0]:
        batch["where"] = [e["where"] for e in examples]
    return batch


def to_device(batch, device, dtype):
    """Tensors to the device; pixels to the weights' dtype too."""
    moved = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device, dtype) if name.startswith("pixel_values") else value.to(device)
        moved[name] = value
    return moved


def loader(examples, order, pad, workers=0, worker_init=None):
    """Batches in the given order -> a torch DataLoader of what `collate` returns.

    order: any iterable of lists of (epoch, index). Workers start as processes of this Python do: by fork, or
    (from 3.14 on, or where a caller says so) by forkserver or spawn, which get `examples` pickled.
    """
    return DataLoader(
        examples,
        batch_sampler=order,
        collate_fn=partial(collate, pad=pad),
        num_workers=workers,
        worker_init_fn=worker_init,
    )
