"""Files become records: what people already have, checked.

Reads LLaVA `conversations` ({"from","value"}) or `messages` ({"role","content"}), as a JSON list or as JSONL,
with `image` or `images` below an image root and the optional fields `id`, `cot`, `boxes`, `family` and
`features` ({name: safetensors file below the image root}, what was computed for the record beforehand).
Whatever is wrong with a record is told with its file, line and field.
"""

import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from PIL import Image
from safetensors import SafetensorError, safe_open

from crystal.runtime.config import UserError
from crystal.runtime.images import rgb

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
    root = None if root is None else Path(root).resolve()
    records = []
    for i, item in enumerate(items):
        found, _ = _records(f"record {i}", item, root, "first")
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
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            yield where, RecordError(f"{where}: not JSON: {error.msg} at column {error.colno}")


def _records(where, item, root, keep):
    """One parsed object -> ([Record], turns dropped); raises RecordError naming the field."""
    if isinstance(item, RecordError):
        raise item
    if not isinstance(item, dict):
        raise RecordError(f"{where}: a record is a JSON object, not {type(item).__name__}")

    fields = _Fields(where, item, root)
    name, turns = fields.turns()
    images, turns = fields.images(name, turns)
    cot, boxes, features = fields.cot(), fields.boxes(), fields.features()

    records, answers = [], 0
    for i, (role, said) in enumerate(turns):
        if role != "assistant":
            continue
        before = turns[:i]
        if not before or before[-1][0] != "user":
            fields.bad(f"{name}[{i}]", "an answer must follow a turn of the user's")
        seen = sum(text.count("<image>") for _, text in before)
        if images and not seen:
            continue  # the image comes later: this turn is context

        answers += 1
        if keep == "all" or answers == 1:
            if not said.strip():
                fields.bad(f"{name}[{i}]", "the answer is empty")
            identity, family = str(item.get("id", where)), str(item.get("family", ""))
            own = images[:seen]
            records.append(Record(where, identity, before, said.strip(), own, cot, boxes, family, features))

    if not records:
        fields.bad(name, "no answer of the assistant's to learn")
    return records, answers - len(records)


class _Fields:
    """The fields of one parsed object: each gives what it holds, or a RecordError that names it."""

    def __init__(self, where, item, root):
        self.where = where
        self.item = item
        self.root = root

    def bad(self, name, problem) -> NoReturn:
        raise RecordError(f"{self.where}: field {name!r}: {problem}")

    def turns(self):
        """The name of the field that holds the conversation, and its turns [(role, text)]."""
        name = "conversations" if "conversations" in self.item else "messages"
        talk = self.item.get(name)
        if not isinstance(talk, list) or not talk:
            self.bad(name, "missing or empty; a list of turns is needed")

        turns = []
        for i, turn in enumerate(talk):
            if not isinstance(turn, dict):
                turn = {}
            who = turn.get("from", turn.get("role"))
            what = turn.get("value", turn.get("content"))
            if not isinstance(who, str) or who not in ROLES:
                self.bad(f"{name}[{i}]", f"unknown speaker {who!r}; use {', '.join(ROLES)}")

            if isinstance(what, list):
                what = "".join(text_of_part(part) for part in what)
            if not isinstance(what, str):
                self.bad(f"{name}[{i}]", "its text is missing")
            if ROLES[who] != "user" and "<image>" in what:
                self.bad(f"{name}[{i}]", "an <image> marker outside the user's turns")
            turns.append((ROLES[who], self.text(f"{name}[{i}]", what)))
        return name, turns

    def images(self, name, turns):
        """The images, one for each <image> of the turns, and the turns, with markers where they had none."""
        paths = self.item.get("images", self.item.get("image")) or []
        paths = paths if isinstance(paths, (list, tuple)) else [paths]
        own_name = "images" if "images" in self.item else "image"
        if not all(isinstance(p, (str, bytes, Image.Image)) for p in paths):  # JSON holds the first alone
            self.bad(own_name, "a path or a list of paths is needed")

        asked = sum(text.count("<image>") for _, text in turns)
        first_user = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
        if first_user is None:
            self.bad(name, "no turn of the user's")
        if asked < len(paths) and asked == 0:  # some files leave the markers out: the images then come first
            turns[first_user] = ("user", "<image>\n" * len(paths) + turns[first_user][1])
        elif asked != len(paths):
            self.bad(own_name, f"{len(paths)} images for {asked} <image> markers")
        return [self.file(own_name, p) for p in paths], turns

    def cot(self):
        cot = self.item.get("cot") or []
        cot = [cot] if isinstance(cot, str) else cot
        if not isinstance(cot, list) or not all(isinstance(step, str) for step in cot):
            self.bad("cot", "a text or a list of texts is needed")
        return [self.text("cot", step) for step in cot]

    def boxes(self):
        boxes = self.item.get("boxes") or []
        if not isinstance(boxes, list) or not all(is_box(box) for box in boxes):
            self.bad("boxes", "a list of [x0, y0, x1, y1] in pixels is needed")
        return boxes

    def features(self):
        features = self.item.get("features") or {}
        if not isinstance(features, dict) or not all(isinstance(p, str) for p in features.values()):
            self.bad("features", "an object of name: path is needed")
        return {kind: self.file("features", p) for kind, p in features.items()}

    def text(self, name, value):
        """A text, unless half of a surrogate pair is in it, which tokenizers and files refuse."""
        if found := re.search("[\ud800-\udfff]", value):
            self.bad(name, f"character {found.start()} is {found[0]!a}, half of a surrogate pair")
        return value

    def file(self, name, p):
        """A path below the root -> where the file lies.

        Without a root it may lie anywhere; an image in memory stays what it is.
        """
        if not isinstance(p, str):
            return p
        root = self.root
        if root is None:
            if not Path(p).is_file():
                self.bad(name, f"no such file: {p}")
            return Path(p)

        told = p if len(p) < 200 else f"{p[:50]}... ({len(p)} characters)"
        try:
            full = (root / p).resolve()
            if not full.is_relative_to(root):
                self.bad(name, f"{told} leaves the image root")
            if not full.is_file():
                self.bad(name, f"no such file: {root / told}")
            return full
        except (OSError, ValueError) as error:  # what no path can be: a data URL is too long, a NUL ends it
            self.bad(name, f"{told!r} is not a path: {getattr(error, 'strerror', None) or error}")


def is_box(box):
    """Whether a value is a list of four numbers."""
    return isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)


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
        source = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(source) as image:
            image.load()  # verify() passes a truncated JPEG
            return rgb(image)
    except Exception as error:  # Pillow raises a dozen kinds for broken files, all of them the record's fault
        problem = " ".join(str(error).split()) or type(error).__name__
        raise RecordError(f"{where}: field 'image': {told}: {problem}") from error


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
