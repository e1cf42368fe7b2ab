"""Files become records: what people already have, checked.

Reads LLaVA `conversations` ({"from","value"}) or `messages` ({"role","content"}) from whatever sources.py
opens, with `image` or `images` below an image root and the optional fields `id`, `system`, `cot`, `boxes`,
`family` and `features` ({name: safetensors file below the image root}, what was computed for the record
beforehand). Whatever is wrong with a record is told with its file, line and field.
"""

import io
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open

from crystal.runtime.config import UserError
from crystal.runtime.fields import Fields
from crystal.runtime.images import FORMATS, PIXELS, rgb
from crystal.runtime.sources import RecordError, opened

HELD = 2**24  # bytes of a file whose records are kept; of a larger one each is read when its turn comes
FIRST = 1000  # records of a large file that are checked before the work begins


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
    """A file, or a data set of the hub -> (Records or RecordErrors in its order, number of turns dropped).

    turns: "first" keeps the conversation up to the first answer after an image, "all" makes a record of
    every answer. A broken record stands in its place as its error, so that the caller decides; a file without
    any is a UserError.

    A small file's records are a list, all checked. A large one's (HELD) are read when they are asked for: its
    first ones are checked and their turns counted now, the others then; with "all" every one is counted now.
    """
    source = opened(path)
    beside = Path(path).parent if Path(path).exists() else Path()
    root = Path(image_root) if image_root else beside
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (--image_root)")
    root = root.resolve()

    # Every record is checked now, before hours of work on those before it, but of a file so large that
    # to look for its pictures alone would be hours.
    small = source.size <= HELD
    checked = len(source) if small or turns == "all" else min(FIRST, len(source))
    found, kept, dropped = Records(source, root, turns), [], 0
    for row in range(checked):
        where, item = source[row]
        try:
            records, left = _records(where, item, root, turns)
        except RecordError as error:
            records, left = [error], 0
        found.add(row, records)
        dropped += left
        if small:
            kept += records

    found.add_unread(range(checked, len(source)))
    if not len(found):
        raise UserError(f"{path}: no records in it")
    return kept if small else found, dropped


class Records(Sequence):
    """The records of a large file: of each is known where it stands, and it is read when it is asked for.

    What is broken stands in its place as its RecordError.
    """

    def __init__(self, source, root, turns):
        self.source = source
        self.root = root
        self.turns = turns
        self.rows = array("q")  # of each record: its row in the source
        self.nth = array("q")  # and which of that row's it is
        self.broken = {}  # number of a record: its RecordError

    def add(self, row, records):
        """Notes the records of a row of the source."""
        for nth, record in enumerate(records):
            if isinstance(record, RecordError):
                self.broken[len(self.rows)] = record
            self.rows.append(row)
            self.nth.append(nth)

    def add_unread(self, rows):
        """Notes rows of the source that hold a record each, whatever it is."""
        self.rows.extend(rows)
        self.nth.extend(bytes(len(rows)))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            numbers = range(len(self))[i]
            return self if len(numbers) == len(self) else [self[n] for n in numbers]
        i = range(len(self))[i]
        if i in self.broken:
            return self.broken[i]

        # A file that was moved since it was checked is the record's error, not a traceback.
        try:
            where, item = self.source[self.rows[i]]
            records, _ = _records(where, item, self.root, self.turns)
        except RecordError as error:
            return error
        return records[self.nth[i]]

    def __setitem__(self, i, error):
        """Takes a record out: its error stands in its place."""
        self.broken[range(len(self))[i]] = error

    def whole(self):
        """Records without those that are known to be broken."""
        found = Records(self.source, self.root, self.turns)
        numbers = [i for i in range(len(self)) if i not in self.broken]
        found.rows.extend(self.rows[i] for i in numbers)
        found.nth.extend(self.nth[i] for i in numbers)
        return found


def broken(records):
    """The errors among records, of a list or of Records, which need not be read for it."""
    if isinstance(records, Records):
        return [records.broken[i] for i in sorted(records.broken)]
    return [record for record in records if isinstance(record, RecordError)]


def whole(records):
    """Records without the errors among them, a list of a list and Records of Records."""
    if isinstance(records, Records):
        return records.whole()
    return [record for record in records if not isinstance(record, RecordError)]


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


def items(path):
    """(where, parsed object or RecordError) of each object of a file."""
    source = opened(path)
    return (source[row] for row in range(len(source)))


def _records(where, item, root, keep):
    """One parsed object -> ([Record], turns dropped); raises RecordError naming the field."""
    if isinstance(item, RecordError):
        raise item
    if not isinstance(item, dict):
        raise RecordError(f"{where}: a record is a JSON object, not {type(item).__name__}")

    fields = Fields(where, item, root)
    name, turns = fields.turns()
    images, turns = fields.images(name, turns)
    identity, family = fields.id(), fields.family()
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
            own = images[:seen]
            records.append(Record(where, identity, before, said.strip(), own, cot, boxes, family, features))

    if not records:
        fields.bad(name, "no answer of the assistant's to learn")
    return records, answers - len(records)


def load_images(record):
    """The pictures of a record -> RGB PIL images, as `load_image` makes each.

    RecordError, before it is decoded, for one with which they would have more pixels than PIXELS.
    """
    images, room = [], PIXELS
    for path in record.images:
        image = load_image(path, record.where, room)
        room -= image.width * image.height
        images.append(image)
    return images


def load_image(path, where, room=PIXELS):
    """A path, a function that opens an image, bytes, or a PIL image -> PIL image as `rgb` makes it.

    room: pixels that it may have. RecordError for a broken or oversized one.
    """
    told = "its bytes" if isinstance(path, bytes) else path
    try:
        if isinstance(path, Image.Image):
            return rgb(within(path, room))
        source = path() if callable(path) else path
        source = io.BytesIO(source) if isinstance(source, bytes) else source

        # Formats by name: others would start programs, as PostScript does, whatever the file is called.
        with Image.open(source, formats=FORMATS) as image:
            within(image, room).load()  # verify() passes a truncated JPEG
            return rgb(image)
    except Exception as error:  # Pillow raises a dozen kinds for broken files, all of them the record's fault
        problem = " ".join(str(error).split()) or type(error).__name__
        raise RecordError(f"{where}: field 'image': {told}: {problem}") from error


def within(image, room):
    """The image; ValueError if it has more pixels than there is room for."""
    pixels = image.width * image.height
    if pixels > room:
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{size}, with the record's others more than the {PIXELS} that are allowed")
    return image


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
