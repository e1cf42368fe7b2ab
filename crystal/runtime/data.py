"""Files become records, records become batches.

Reads what people already have: LLaVA `conversations` ({"from","value"}) or `messages` ({"role","content"}),
as a JSON list or as JSONL, with `image` or `images` below an image root and the optional fields `id`, `cot`,
`boxes`, `family` and `features` ({name: safetensors file below the image root}, what was computed for the
record beforehand). Whatever is wrong with a record is told with its file, line and field.

B pairs, L sequence length, I images of a batch, P patches of all of them, K latents, M answer
positions, N image tokens.
"""

import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypedDict

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset

from crystal.layout import IGNORE
from crystal.runtime.config import UserError
from crystal.runtime.images import rgb
from crystal.runtime.sampling import seed_of

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RecordError(UserError):
    """One record is broken; the message names file, line and field."""


@dataclass
class Record:
    """One question about images, checked; the head of this file says where it comes from."""

    where: str  # "train.jsonl:17", for messages
    id: str
    turns: list  # [(role, text)]; the last is the user's question
    answer: str
    images: list  # one for each <image> of the turns: path, PIL image, bytes, or a function that opens one
    cot: list = field(default_factory=list)
    boxes: list = field(default_factory=list)
    family: str = ""
    features: dict = field(default_factory=dict)  # {name: path of a safetensors file}


# --- files become records ---


def read(path, image_root="", turns="first"):
    """A JSON or JSONL file -> (list of Record or RecordError in file order, number of turns dropped).

    turns: "first" keeps the conversation up to the first answer after an image, "all" makes a record of
    every answer. A broken record stands in the list as its error, so that the caller decides; a file without
    any is a UserError.
    """
    path = Path(path)
    root = Path(image_root) if image_root else path.parent
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (--image_root)")
    found, dropped = [], 0
    for where, item in items(path, text):
        try:
            records, left = _records(where, item, root.resolve(), turns)
            found += records
            dropped += left
        except RecordError as error:
            found.append(error)
    if not found:
        raise UserError(f"{path}: no records in it")
    return found, dropped


def of_dictionaries(items, root=None):
    """Parsed objects -> list of Record.

    root: the folder below which their images lie. None: paths are the caller's own, from where he stands. An
    object is what a line of a JSONL file holds; its images may also be PIL images, or the bytes of a file.
    RecordError names the object by its number in the list, and the field.
    """
    records = []
    for i, item in enumerate(items):
        found, _ = _records(f"record {i}", item, None if root is None else Path(root).resolve(), "first")
        records += found
    return records


def check(where, item, root):
    """Whether `read` would take this parsed object: RecordError names the field if not.

    root: the folder of its images.
    """
    _records(where, item, Path(root).resolve(), "first")


def items(path, text):
    """(where, parsed object or RecordError) of each line of JSONL, or each element of a JSON list."""
    if path.suffix != ".jsonl" and text.lstrip().startswith("["):
        try:
            for i, item in enumerate(json.loads(text)):
                yield f"{path}[{i}]", item
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                yield (
                    f"{path}:{number}",
                    RecordError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}"),
                )


def _records(where, item, root, keep):
    """One parsed object -> ([Record], turns dropped); raises RecordError naming the field."""

    def bad(name, problem) -> NoReturn:
        raise RecordError(f"{where}: field {name!r}: {problem}")

    def file(name, p):
        """A path below the root -> where the file lies.

        Without a root it may lie anywhere; an image in memory stays what it is.
        """
        if not isinstance(p, str):
            return p
        if root is None:
            if not Path(p).is_file():
                bad(name, f"no such file: {p}")
            return Path(p)
        told = p if len(p) < 200 else f"{p[:50]}... ({len(p)} characters)"
        try:
            full = (root / p).resolve()
            if not full.is_relative_to(root):
                bad(name, f"{told} leaves the image root")
            if not full.is_file():
                bad(name, f"no such file: {root / told}")
            return full
        except (OSError, ValueError) as error:  # what no path can be: a data URL is too long, a NUL ends it
            bad(name, f"{told!r} is not a path: {getattr(error, 'strerror', None) or error}")

    def text(name, value):
        """A text, unless half of a surrogate pair is in it, which tokenizers and files refuse."""
        if found := re.search("[\ud800-\udfff]", value):
            bad(name, f"character {found.start()} is {found[0]!a}, half of a surrogate pair")
        return value

    if isinstance(item, RecordError):
        raise item
    if not isinstance(item, dict):
        raise RecordError(f"{where}: a record is a JSON object, not {type(item).__name__}")
    name = "conversations" if "conversations" in item else "messages"
    talk = item.get(name)
    if not isinstance(talk, list) or not talk:
        bad(name, "missing or empty; a list of turns is needed")
    turns = []
    for i, turn in enumerate(talk):
        if not isinstance(turn, dict):
            turn = {}
        who = turn.get("from", turn.get("role"))
        what = turn.get("value", turn.get("content"))
        if not isinstance(who, str) or who not in ROLES:
            bad(f"{name}[{i}]", f"unknown speaker {who!r}; use {', '.join(ROLES)}")
        if isinstance(what, list):
            what = "".join(text_of_part(part) for part in what)
        if not isinstance(what, str):
            bad(f"{name}[{i}]", "its text is missing")
        if ROLES[who] != "user" and "<image>" in what:
            bad(f"{name}[{i}]", "an <image> marker outside the user's turns")
        turns.append((ROLES[who], text(f"{name}[{i}]", what)))
    paths = item.get("images", item.get("image")) or []
    paths = paths if isinstance(paths, (list, tuple)) else [paths]
    field_name = "images" if "images" in item else "image"
    if not all(isinstance(p, (str, bytes, Image.Image)) for p in paths):  # JSON holds the first alone
        bad(field_name, "a path or a list of paths is needed")
    asked = sum(t.count("<image>") for _, t in turns)
    first_user = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
    if first_user is None:
        bad(name, "no turn of the user's")
    if asked < len(paths) and asked == 0:  # some files leave the markers out: the images then come first
        turns[first_user] = ("user", "<image>\n" * len(paths) + turns[first_user][1])
    elif asked != len(paths):
        bad(field_name, f"{len(paths)} images for {asked} <image> markers")
    images = [file(field_name, p) for p in paths]
    cot = item.get("cot") or []
    cot = [cot] if isinstance(cot, str) else cot
    if not isinstance(cot, list) or not all(isinstance(step, str) for step in cot):
        bad("cot", "a text or a list of texts is needed")
    cot = [text("cot", step) for step in cot]
    boxes = item.get("boxes") or []
    if not isinstance(boxes, list) or not all(
        isinstance(b, list) and len(b) == 4 and all(isinstance(x, (int, float)) for x in b) for b in boxes
    ):
        bad("boxes", "a list of [x0, y0, x1, y1] in pixels is needed")
    features = item.get("features") or {}
    if not isinstance(features, dict) or not all(isinstance(p, str) for p in features.values()):
        bad("features", "an object of name: path is needed")
    features = {kind: file("features", p) for kind, p in features.items()}
    records, answers = [], 0
    for i, (role, said) in enumerate(turns):
        if role != "assistant":
            continue
        before = turns[:i]
        if not before or before[-1][0] != "user":
            bad(f"{name}[{i}]", "an answer must follow a turn of the user's")
        seen = sum(t.count("<image>") for _, t in before)
        if images and not seen:
            continue  # the image comes later: this turn is context
        answers += 1
        if keep == "all" or answers == 1:
            if not said.strip():
                bad(f"{name}[{i}]", "the answer is empty")
            records.append(
                Record(
                    where,
                    str(item.get("id", where)),
                    before,
                    said.strip(),
                    images[:seen],
                    cot,
                    boxes,
                    str(item.get("family", "")),
                    features,
                )
            )
    if not records:
        bad(name, "no answer of the assistant's to learn")
    return records, answers - len(records)


def text_of_part(part):
    """One of OpenAI's content parts -> its text, or the mark of an image."""
    if not isinstance(part, dict):
        return str(part)
    if str(part.get("type", "")).startswith("image"):
        return "<image>"
    return str(part.get("text", ""))


def load_image(path, where):
    """A path, a function that opens an image, bytes, or a PIL image -> PIL image as `rgb` makes it.

    RecordError for a broken or oversized one.
    """
    told = "its bytes" if isinstance(path, bytes) else path
    try:
        if isinstance(path, Image.Image):
            return rgb(path)
        source = path() if callable(path) else path
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()  # verify() passes a truncated JPEG
            return rgb(image)
    except Exception as error:  # Pillow raises a dozen kinds for broken files, all of them the record's fault
        raise RecordError(
            f"{where}: field 'image': {told}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def load_features(record, name):
    """What was computed for a record beforehand, by a name of its `features` -> {key: tensor}, on the CPU.

    One file serves many records: its tensors are named ID/KEY. RecordError if the record, the file or the id
    has nothing of that name.
    """
    if name not in record.features:
        raise RecordError(f"{record.where}: field 'features': no {name!r} in it")
    path, start = record.features[name], f"{record.id}/"
    try:
        with safe_open(path, "pt") as file:
            own = [key for key in file.keys() if key.startswith(start)]  # noqa: SIM118 (it is no dictionary)
            found = {key.removeprefix(start): file.get_tensor(key) for key in own}
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{record.where}: field 'features': {path}: {error}") from error
    if not found:
        raise RecordError(f"{record.where}: field 'features': {path} holds nothing for the id {record.id!r}")
    return found


# --- records become batches ---


class RecordDataset(Dataset):
    """(epoch, index) -> one example: a Layout and the pixels of its images, intact and corrupted.

    image_processor: a families.Images. layout: function (record, image token counts) -> Layout. corruption: a
    corrupt.Corruption, or a function (image [3,h,w] in [0,1], generator) -> image; None: no corrupted images.
    Its generator is seeded by (seed, epoch, index, image), so that what it draws depends neither on ranks nor
    on workers nor on a resume. grey: feed uniformly grey images, what a blind model sees. copies: how often
    each image stands in the sequence. extras: function (record, its RGB PIL images) -> {name: tensor [n,..]},
    what else a method wants in the batch.
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
    ):
        self.records, self.layout, self.image_processor = records, layout, image_processor
        self.corruption, self.seed, self.skip, self.grey = corruption, seed, skip, grey
        self.copies, self.extras = copies, extras

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
        `pixels`. RecordError for a record that is broken, or lacks what corruption or extras need.
        """
        record = self.records[index]
        if isinstance(record, RecordError):
            raise record
        images = [load_image(p, record.where) for p in record.images]
        if self.grey:
            images = [Image.new("RGB", image.size, (128, 128, 128)) for image in images]
        try:
            example = self.pixels(images)
        except ValueError as error:
            raise RecordError(f"{record.where}: field 'image': {error}") from error
        counts = self.image_processor.tokens(example["image_grid_thw"]) if images else []
        if self.corruption and not images:
            raise RecordError(f"{record.where}: field 'image': missing; the corrupted path needs an image")
        example["layout"] = self.layout(record, counts)
        example["extras"] = self.extras(record, images) if self.extras else {}
        if self.corruption:
            corrupted = []
            for n, image in enumerate(images):
                g = torch.Generator().manual_seed(seed_of(self.seed, epoch, index, n))
                x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # [3,h,w]
                try:
                    x = self.corruption(x, g)
                except ValueError as error:  # of a function of the user's own
                    raise RecordError(f"{record.where}: --corruption {self.corruption}: {error}") from error
                corrupted.append(Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()))
            example["pixel_values_cor"] = self.pixels(corrupted)["pixel_values"]
        return example

    def pixels(self, images):
        """RGB PIL images of one record -> {"pixel_values" [P,..], "image_grid_thw" [I,3]} of all copies.

        See families.Images; both are None without images. ValueError where the processor refuses an image,
        one far too narrow, say.
        """
        if not images:
            return {"pixel_values": None, "image_grid_thw": None}
        out = self.image_processor(
            images=[image for image in images for _ in range(self.copies)], return_tensors="pt"
        )
        return {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}


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
    for name in examples[0].get("extras", {}):
        batch[name] = torch.nn.utils.rnn.pad_sequence([e["extras"][name] for e in examples], batch_first=True)
    batch["bad"] = [line for e in examples for line in e["bad"]]
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

    order: any iterable of lists of (epoch, index).
    """
    return DataLoader(
        examples,
        batch_sampler=order,
        collate_fn=lambda e: collate(e, pad),
        num_workers=workers,
        worker_init_fn=worker_init,
    )
