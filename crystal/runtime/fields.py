"""One parsed object is checked, field by field: what people have is read, what would be lost is refused.

Every field gives what it holds, or a RecordError that names it. A null is a field that is not there, as
Parquet and many a writer of JSON mean it.
"""

import base64
import os
import re
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

from PIL import Image

from crystal.runtime.sources import RecordError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
CHARACTERS = 1_000_000  # of all texts of a record
PICTURES = 256  # of one record

# What a record, a turn or a part may say that no method here learns from: refused by name, never passed over.
MEDIA = ("video", "videos", "video_url", "audio", "audios", "audio_url", "input_audio")
TOOLS = ("tools", "functions", "tool_calls", "tool_call_id", "function_call")
ELSEWHERE = ("imgs", "img", "img_path", "image_path", "image_paths", "image_file", "image_url", "image_urls")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
MARKS = re.compile(r"<(?:video|audio|bbox|ref-object)>|<img>.*?</img>", re.DOTALL)

REFUSED = {*MEDIA, *TOOLS, *ELSEWHERE, *THOUGHTS, "image", "images"}

# Kinds of content parts, and where a part of a picture may hold it.
TEXTS = ("text", "input_text", "output_text")
PICTURE_KINDS = ("image", "image_url", "input_image")
HOLDERS = ("image", "image_url", "url", "path", "source", "base64", "bytes", "data")

# How base64 of a JPEG, PNG, GIF, WebP, TIFF or BMP begins; a path of so many such letters there is none.
BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkq|TU0A|Qk)[A-Za-z0-9+/\s]{40,}=*\s*")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Fields:
    """The fields of one parsed object: each gives what it holds, or a RecordError that names it.

    root: the folder below which its files lie, absolute; None where paths are the caller's own.
    """

    def __init__(self, where, item, root):
        self.where = where
        self.given = item
        self.item = present(item)
        self.root = root
        self.held = []  # of each <image> marker: the picture that its part holds, or None

    def bad(self, name, problem) -> NoReturn:
        raise RecordError(f"{self.where}: field {name!r}: {problem}")

    def id(self):
        return self.text("id", str(self.item.get("id", self.where)))

    def family(self):
        return self.text("family", str(self.item.get("family", "")))

    # --- the conversation ---

    def turns(self):
        """The name of the field that holds the conversation, and its turns [(role, text)]."""
        if not REFUSED.isdisjoint(self.item):
            self.refuse(self.item, "", MEDIA + TOOLS)
        names = ("conversations", "messages")
        found = [name for name in names if self.item.get(name)] or [n for n in names if n in self.given]
        name = (found or ["messages"])[0]
        talk = self.item.get(name)
        if not isinstance(talk, list) or not talk:
            self.bad(name, "missing or empty; a list of turns is needed")

        turns = [self.turn(f"{name}[{i}]", turn) for i, turn in enumerate(talk)]
        turns = self.system(turns)
        written = sum(len(text) for _, text in turns)
        if written > CHARACTERS:
            self.bad(name, f"{written} characters, at most {CHARACTERS} are allowed")
        return name, turns

    def turn(self, name, turn):
        """One turn as files have it -> (role, text)."""
        turn = present(turn) if isinstance(turn, dict) else {}
        who = turn.get("from", turn.get("role"))
        what = turn.get("value", turn.get("content"))
        if not isinstance(who, str) or who not in ROLES:
            self.bad(name, f"unknown speaker {short(repr(who))}; use {', '.join(ROLES)}")
        if not REFUSED.isdisjoint(turn):
            self.refuse(turn, name, (*MEDIA, *TOOLS, *ELSEWHERE, "image", "images"))
            self.refuse(turn, name, THOUGHTS, "; a thought belongs in the record's cot")
        if turn.get("weight", 1) == 0 or turn.get("loss", 1) == 0:
            self.bad(name, "a turn that is not to be learned (weight or loss); leave it out of the file")

        # A list of parts becomes a text with a mark where each picture stands.
        if isinstance(what, list):
            what = "".join(self.part(f"{name}.content[{i}]", part) for i, part in enumerate(what))
        elif isinstance(what, str):
            self.held += [None] * what.count("<image>")
        if not isinstance(what, str):
            self.bad(name, "its text is missing")

        if ROLES[who] != "user" and "<image>" in what:
            self.bad(name, "an <image> marker outside the user's turns")
        if ROLES[who] != "assistant" and (mark := MARKS.search(what)):
            self.bad(name, f"{short(mark[0])} in its text: pictures alone are read, each marked <image>")
        return ROLES[who], self.text(name, what)

    def part(self, name, part):
        """One content part -> its text, or the mark of a picture, which is held where the part holds it."""
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            self.bad(name, f"a part is an object or a text, not {type(part).__name__}")
        part = present(part)
        self.refuse(part, name, MEDIA)

        holders = [key for key in HOLDERS if part.get(key)]
        kind = part.get("type")
        if kind is None and ("text" in part or holders):  # Qwen's parts say what they are by their key
            kind = "text" if "text" in part else "image"
        if kind in TEXTS:
            if holders:
                self.bad(name, f"a part of text that holds {holders[0]} too; make two parts of it")
            text = part.get("text")
            if not isinstance(text, str):
                self.bad(name, "its text is missing")
            self.held += [None] * text.count("<image>")
            return text

        if kind not in PICTURE_KINDS:
            self.bad(name, f"a part of type {short(repr(kind))}; text and image are read")
        if part.get("text"):
            self.bad(name, "a part of a picture that holds a text too; make two parts of it")
        self.held.append(self.picture(name, part[holders[0]]) if holders else None)
        return "<image>"

    def system(self, turns):
        """The turns, behind the text of the field `system` where the record has one."""
        said = self.item.get("system", "")
        if not isinstance(said, str):
            self.bad("system", "a text is needed")
        if not said or ("system", said) in turns:
            return turns
        if any(role == "system" for role, _ in turns):
            self.bad("system", "another text than the turn of the system's; keep one of the two")
        if "<image>" in said or MARKS.search(said):
            self.bad("system", "a marker outside the user's turns")
        return [("system", self.text("system", said)), *turns]

    def refuse(self, item, name, keys, hint="; text and image are read"):
        """RecordError for the first of these keys that holds something."""
        for key in keys:
            if item.get(key) not in (None, "", "[]", [], {}, False):
                self.bad(f"{name}.{key}" if name else key, f"not something that is trained on here{hint}")

    # --- pictures ---

    def images(self, name, turns):
        """The pictures, one for each <image> of the turns, and the turns, marked where they were not."""
        own_name = "images" if self.item.get("images") or "image" not in self.item else "image"
        paths = self.item.get(own_name) or []
        paths = list(paths) if isinstance(paths, (list, tuple)) else [paths]
        if not paths:
            self.refuse(self.item, "", ELSEWHERE, "; pictures belong in image or images")
        if max(len(paths), len(self.held)) > PICTURES:
            self.bad(own_name, f"{max(len(paths), len(self.held))} pictures, at most {PICTURES} are allowed")

        first_user = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
        if first_user is None:
            self.bad(name, "no turn of the user's")
        given = [self.picture(own_name, p) for p in paths]
        if given and not self.held:  # some files leave the markers out: the images then come first
            turns[first_user] = ("user", "<image>\n" * len(paths) + turns[first_user][1])
            return given, turns

        # What the parts do not hold comes from the list; a list may also name again what they hold.
        asked = self.held.count(None)
        if not asked and given == self.held:
            given = []
        if asked != len(given):
            self.bad(own_name, f"{len(given)} images for {asked} <image> markers")
        rest = iter(given)
        return [next(rest) if picture is None else picture for picture in self.held], turns

    def picture(self, name, value):
        """A picture as a record gives it -> a path, or the bytes of its file, or a PIL image."""
        # {"bytes", "path"} of Parquet, {"url"} of OpenAI's parts, {"data"} of Anthropic's.
        if isinstance(value, dict):
            given = [value[key] for key in ("bytes", "data", "url", "path") if value.get(key)]
            if not given:
                self.bad(name, "an object without bytes, data, url or path")
            value = given[0]

        if isinstance(value, Image.Image):
            return value
        if isinstance(value, (bytes, bytearray)):
            return bytes(value)
        if not isinstance(value, str):
            self.bad(name, "a path or a list of paths is needed")

        if value[:5].lower() == "data:":
            head, comma, written = value.partition(",")
            if not comma or not head.lower().endswith(";base64"):
                self.bad(name, f"{short(value)}: a data URL must be base64 (data:image/png;base64,...)")
            return self.decoded(name, written)
        if BASE64.fullmatch(value):
            return self.decoded(name, value)
        if value.lower().startswith("file://"):
            return self.file(name, unquote(value[7:]))
        if ADDRESS.match(value):
            self.bad(name, f"{short(value)}: no address is opened; download it, and name the file")
        return self.file(name, value)

    def decoded(self, name, written):
        """Base64 -> the bytes of a picture's file."""
        try:
            return base64.b64decode("".join(written.split()), validate=True)
        except ValueError as error:
            self.bad(name, f"{short(written)}: bad base64: {error}")

    def file(self, name, p):
        """A path below the root -> where the file lies; a link below the root leads where it leads.

        Without a root it may lie anywhere.
        """
        told = short(p)
        try:
            if self.root is None:
                if not Path(p).is_file():
                    self.bad(name, f"no such file: {told}")
                return Path(p)

            full = below(self.root, p)
            if full is None:
                self.bad(name, f"{told} leaves the image root")
            if not os.path.isfile(full):
                self.bad(name, f"no such file: {self.root / told}")
            return Path(full)
        except (OSError, ValueError) as error:  # what no path can be: too long a name, a NUL in it
            self.bad(name, f"{told!r} is not a path: {getattr(error, 'strerror', None) or error}")

    # --- what stands beside them ---

    def cot(self):
        cot = self.item.get("cot") or []
        cot = [cot] if isinstance(cot, str) else cot
        if not isinstance(cot, list) or not all(isinstance(step, str) for step in cot):
            self.bad("cot", "a text or a list of texts is needed")
        written = sum(len(step) for step in cot)
        if written > CHARACTERS:
            self.bad("cot", f"{written} characters, at most {CHARACTERS} are allowed")
        return [self.text("cot", step) for step in cot]

    def boxes(self):
        boxes = self.item.get("boxes") or []
        if not isinstance(boxes, list) or not all(is_box(box) for box in boxes):
            self.bad("boxes", "a list of [x0, y0, x1, y1] in pixels is needed")
        return boxes

    def features(self):
        features = self.item.get("features") or {}
        features = present(features) if isinstance(features, dict) else None
        if features is None or not all(isinstance(p, str) for p in features.values()):
            self.bad("features", "an object of name: path is needed")
        return {kind: self.file("features", p) for kind, p in features.items()}

    def text(self, name, value):
        """A text, unless half of a surrogate pair is in it, which tokenizers and files refuse."""
        if found := re.search("[\ud800-\udfff]", value):
            self.bad(name, f"character {found.start()} is {found[0]!a}, half of a surrogate pair")
        return value


def below(root, p):
    """Where a path that starts from the folder `root` lies, as a text; None for one that names its way out.

    A link below the root leads where it leads: it is whoever put it there who says so, not the path.
    """
    # Texts, since a path's own methods would take most of the time that a record takes.
    start = str(root).rstrip("/") + "/"
    full = os.path.normpath(os.path.join(start, p))
    is_below = full.startswith(start) or os.path.realpath(full).startswith(start)
    return full if is_below else None


def present(item):
    """An object without its nulls."""
    return {name: value for name, value in item.items() if value is not None}


def is_box(box):
    """Whether a value is a list of four numbers that a picture's pixels can be."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(x, (int, float)) and -1e9 < x < 1e9 for x in box)
    )


def short(text):
    """A text as a message quotes it."""
    return text if len(text) < 200 else f"{text[:50]}... ({len(text)} characters)"
