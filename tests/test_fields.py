"""One object is checked, field by field: what people have is read, what would be lost is refused by name.

The formats are the public ones: LLaVA, LLaMA-Factory, ms-swift, TRL, OpenAI, Anthropic, Qwen, `datasets`.
"""

import base64
import io
import json
import os

import pytest
from PIL import Image

from crystal.runtime import fields, records
from crystal.runtime.records import RecordError, check, of_dictionaries, read


def picture(colour=(9, 80, 200), kind="PNG"):
    """The bytes of a picture's file, 5 x 3."""
    file = io.BytesIO()
    Image.new("RGB", (5, 3), colour).save(file, kind)
    return file.getvalue()


PNG, JPEG = picture(), picture((200, 1, 1), "JPEG")


def b64(raw):
    return base64.b64encode(raw).decode()


def url(raw, kind="png"):
    return f"data:image/{kind};base64,{b64(raw)}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.jpg").write_bytes(JPEG)
    (tmp_path / "with space.png").write_bytes(PNG)
    return tmp_path


def asked(question="<image>\nWhat?", answer="a cat"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def parts(*content, answer="a cat", **more):
    return {
        "messages": [{"role": "user", "content": [*content]}, {"role": "assistant", "content": answer}]
    } | more


def one(folder, item):
    (found,) = read_all(folder, item)
    return found


def read_all(folder, *items):
    (folder / "x.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    return read(folder / "x.jsonl")[0]


TEXT = {"type": "text", "text": "What?"}


def test_a_null_is_a_field_that_is_not_there(folder):
    nothing = dict.fromkeys(
        (
            "id",
            "image",
            "images",
            "conversations",
            "cot",
            "boxes",
            "features",
            "family",
            "system",
            "tools",
            "video",
        )
    )
    right = one(folder, {"image": "a.png", "conversations": asked()})
    assert (right.id, right.family, right.images) == (f"{folder}/x.jsonl:1", "", [folder / "a.png"])
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a cat"}]
    empty = {"from": None, "value": None, "tool_calls": None, "weight": None}
    for item in (
        nothing | {"image": "a.png", "conversations": asked()},
        nothing | {"images": ["a.png"], "messages": turns},
        nothing | {"images": [], "image": "a.png", "conversations": [], "messages": turns},
        {"image": "a.png", "messages": [empty | turn for turn in turns], "features": {"sig": None}},
        parts(
            {"type": "image", "text": None}, {"type": "text", "text": "\nWhat?", "image": None}, image="a.png"
        ),
    ):
        found = one(folder, item)
        assert found == right, item
    assert "field 'conversations': missing or empty" in str(
        one(folder, {"conversations": None, "image": "a.png"})
    )


@pytest.mark.parametrize(
    "part, right",
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "b.jpg"}, "b.jpg"),
        ({"image": "a.png"}, "a.png"),
        ({"type": "image", "image": "file://{}/with%20space.png"}, "with space.png"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "a.png"),
        ({"type": "image_url", "image_url": "b.jpg"}, "b.jpg"),
        ({"type": "image_url", "image_url": {"url": url(PNG)}}, PNG),
        ({"type": "input_image", "image_url": url(JPEG, "jpeg")}, JPEG),
        ({"type": "image", "image": "DATA:image/png;x=y;BASE64,\n" + b64(PNG)}, PNG),
        ({"type": "image", "base64": b64(PNG)}, PNG),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": b64(JPEG)}},
            JPEG,
        ),
    ],
)
def test_a_part_may_hold_its_picture(folder, part, right):
    part = json.loads(json.dumps(part).replace("{}", str(folder)))
    found = one(folder, parts(part, TEXT))
    assert found.turns == [("user", "<image>What?")] and found.answer == "a cat"
    assert found.images == [right if isinstance(right, bytes) else folder / right]
    assert records.load_image(found.images[0], "here").size == (5, 3)


def test_pictures_stand_where_their_parts_and_marks_are(folder):
    """Some parts hold theirs, the others take the next of the list; a list may name what parts hold."""
    content = (
        "A ",
        {"type": "image", "image": "b.jpg"},
        {"type": "image"},
        {"type": "text", "text": " or <image>?"},
    )
    found = one(folder, parts(*content, images=["a.png", "with space.png"]))
    assert found.turns == [("user", "A <image><image> or <image>?")]
    assert found.images == [folder / "b.jpg", folder / "a.png", folder / "with space.png"]
    held = {"type": "image", "image": "a.png"}
    assert one(folder, parts(held, TEXT, images=["a.png"])).images == [folder / "a.png"]
    for images in (["b.jpg"], ["a.png", "a.png"]):
        said = str(one(folder, parts(held, TEXT, images=images)))
        assert said.endswith(f"field 'images': {len(images)} images for 0 <image> markers")


def test_pictures_of_the_list_in_every_form(folder):
    given = ["a.png", url(PNG), b64(JPEG), {"url": "b.jpg"}, {"bytes": b64(PNG), "path": "x.png"}]
    given.append({"bytes": None, "path": str(folder / "a.png")})
    found = one(folder, {"images": given, "conversations": asked("<image>" * 6)})
    assert found.images == [folder / "a.png", PNG, JPEG, folder / "b.jpg", PNG, folder / "a.png"]
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        raw = picture(kind=kind)
        assert one(folder, {"image": b64(raw), "conversations": asked()}).images == [raw]
    image = Image.new("RGB", (4, 4))
    (found,) = of_dictionaries([parts({"type": "image", "image": image}, {"type": "image", "image": PNG})])
    assert found.images == [image, PNG]


SYSTEM = "You count.\nNothing else."


@pytest.mark.parametrize(
    "item",
    [
        {"system": SYSTEM, "conversations": asked()},
        {"conversations": [{"from": "system", "value": SYSTEM}, *asked()]},
        {"conversations": [{"role": "developer", "content": [{"type": "text", "text": SYSTEM}]}, *asked()]},
        {"system": SYSTEM, "conversations": [{"from": "system", "value": SYSTEM}, *asked()]},
    ],
)
def test_a_system_text_is_the_first_turn(folder, item):
    found = one(folder, item | {"image": "a.png"})
    assert found.turns == [("system", SYSTEM), ("user", "<image>\nWhat?")]


def test_a_system_text_is_seen_in_training_prompt_and_export(folder):
    """The template that an export keeps renders the same; without the text it is the template's own."""
    from transformers import AutoTokenizer

    import crystal.backbone.model
    from crystal.layout import Format, new_tokens

    tokenizer = AutoTokenizer.from_pretrained(crystal.backbone.model.TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": new_tokens(2, "diverse")})
    fmt = Format(tokenizer, 2)
    found = one(folder, {"system": "Be brief.", "image": "a.png", "conversations": asked()})
    training = tokenizer.decode(fmt.latent(found.turns, [1], found.answer).ids)
    prompt = tokenizer.decode(fmt.question(found.turns, [1]).ids)
    asked_of_it = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    ]
    exported = tokenizer.apply_chat_template(
        asked_of_it, chat_template=fmt.chat_template(), tokenize=False, add_generation_prompt=True
    )
    assert prompt == exported and training.startswith(exported)
    assert exported.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


REFUSED = [
    ({"video": "a.mp4"}, "field 'video': not something that is trained on here"),
    ({"videos": ["a.mp4"]}, "field 'videos'"),
    ({"audio": "a.wav"}, "field 'audio'"),
    ({"audios": [{"path": "a.wav"}]}, "field 'audios'"),
    ({"tools": [{"name": "x"}]}, "field 'tools'"),
    ({"image": None, "imgs": ["a.png"]}, "field 'imgs': .*pictures belong in image or images"),
    ({"image": None, "image_path": "a.png"}, "field 'image_path'"),
    ({"image": None, "image_url": "http://x/a.png"}, "field 'image_url'"),
    ({"image": "http://x.org/a.png"}, "field 'image': http://x.org/a.png: no address is opened"),
    ({"image": "data:image/png,abc"}, "field 'image': .*must be base64"),
    ({"image": {"height": 3}}, "field 'image': an object without bytes, data, url or path"),
    ({"conversations": asked("<video>\nWhat?")}, r"field 'conversations\[0\]': <video> in its text"),
    ({"conversations": asked("<image><audio>?")}, r"field 'conversations\[0\]': <audio> in its text"),
    ({"conversations": asked("<img>a.png</img>?")}, r"\[0\]': <img>a.png</img> in its text: pictures alone"),
    ({"conversations": asked("<image><bbox>?")}, r"\[0\]': <bbox> in its text"),
    ({"system": ["a"]}, "field 'system': a text is needed"),
    ({"system": "See <image>"}, "field 'system': a marker outside the user's turns"),
    (
        {"system": "a", "conversations": [{"from": "system", "value": "b"}, *asked()]},
        "field 'system': another text than the turn of the system's",
    ),
    ({"system": "half \ud800"}, "field 'system': character 5 is .* half of a surrogate pair"),
    ({"id": "\udfff"}, "field 'id': character 0 is .* half of a surrogate pair"),
    ({"family": "\udfff"}, "field 'family': character 0 is .* half of a surrogate pair"),
    ({"boxes": [[0, 0, float("nan"), 1]]}, "field 'boxes'"),
    ({"boxes": [[0, 0, 10**400, 1]]}, "field 'boxes'"),
    ({"cot": 3, "id": "\x1b]0;x\x07"}, "field 'cot'"),
    ({"image": "\x1b[2Jno\n.png"}, r"field 'image': no such file: .*\\x1b\[2Jno\\n.png"),
    ({"conversations": [{"from": "\x1b[2J", "value": "x"}]}, r"unknown speaker '\\x1b\[2J'"),
    ({"conversations": [{"from": "x" * 5000, "value": "x"}]}, r"unknown speaker .{,60}\(5002 characters\)"),
]
TURNS = [
    ({"tool_calls": [{"id": "1"}]}, r"field 'messages\[1\].tool_calls'"),
    (
        {"reasoning_content": "I think."},
        r"field 'messages\[1\].reasoning_content': .*belongs in the record's cot",
    ),
    ({"images": ["a.png"]}, r"field 'messages\[1\].images'"),
    ({"audio": {"id": "x"}}, r"field 'messages\[1\].audio'"),
    ({"weight": 0}, r"field 'messages\[1\]': a turn that is not to be learned"),
    ({"loss": False}, r"field 'messages\[1\]': a turn that is not to be learned"),
]
PARTS = [
    ({"type": "text", "text": None}, "its text is missing"),
    ({"type": "text", "text": 3}, "its text is missing"),
    ({"type": "text", "text": "x", "image": "a.png"}, "a part of text that holds image too"),
    ({"type": "image", "text": "What?"}, "a part of a picture that holds a text too"),
    ({"type": "video", "video": "a.mp4"}, "video': not something"),
    ({"type": "video"}, "a part of type 'video'; text and image are read"),
    ({"type": "input_audio", "input_audio": {"data": "x"}}, "input_audio': not something"),
    ({"type": "file", "file": {}}, "a part of type 'file'"),
    ({}, "a part of type None"),
    (None, "a part is an object or a text, not NoneType"),
    (["x"], "a part is an object or a text, not list"),
    ({"type": "image", "image": "../x.png"}, "leaves the image root"),
    ({"type": "image", "image": 7}, "a path or a list of paths is needed"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_what_would_be_lost_is_refused_by_name(folder, change, message):
    refused(folder, {"image": "a.png", "conversations": asked()} | change, message)


@pytest.mark.parametrize("change, message", TURNS)
def test_what_a_turn_would_lose_is_refused_by_name(folder, change, message):
    item = parts(TEXT)
    item["messages"][1] |= change
    refused(folder, item, message)


@pytest.mark.parametrize("part, message", PARTS)
def test_a_part_that_is_not_read_is_refused_by_name(folder, part, message):
    refused(folder, parts(TEXT, part), rf"x.jsonl:1: field 'messages\[0\].content\[1\].*{message}")


def refused(folder, item, message):
    """One printable line that says file, line and field; the record behind it is read."""
    import re

    error, right = read_all(folder, item, {"image": "a.png", "conversations": asked()})
    assert isinstance(error, RecordError) and right.answer == "a cat"
    assert re.search(message, str(error)) and str(error).startswith(f"{folder}/x.jsonl:1: field ")
    assert str(error).isprintable() and len(str(error)) < 400


def test_what_an_answer_says_of_markup_stays_text(folder):
    """Only where something is asked do marks stand for media; an empty field is none."""
    item = {
        "image": "a.png",
        "tools": "[]",
        "videos": [],
        "image_path": "coco/a.png",
        "conversations": asked(),
    }
    item["conversations"][1]["value"] = "The tag is <video>."
    assert one(folder, item).answer == "The tag is <video>."


def test_a_record_is_bounded(folder, monkeypatch):
    monkeypatch.setattr(fields, "CHARACTERS", 20)
    refused(
        folder, {"image": "a.png", "conversations": asked("<image>" + "x" * 14)}, "26 characters, at most 20"
    )
    refused(
        folder, {"image": "a.png", "conversations": asked(), "cot": ["x" * 11] * 2}, "'cot': 22 characters"
    )
    monkeypatch.setattr(fields, "PICTURES", 2)
    refused(folder, {"images": ["a.png"] * 3, "conversations": asked("What?")}, "3 pictures, at most 2")


def test_links_below_the_root_lead_where_they_lead(tmp_path):
    """A hub cache's snapshot, whose pictures are links to blobs, and a folder that is a link to a disk."""
    disk, blobs, root = tmp_path / "disk", tmp_path / "blobs", tmp_path / "snapshots" / "1"
    for folder in (disk, blobs, root):
        folder.mkdir(parents=True)
    (disk / "1.png").write_bytes(PNG)
    (blobs / "5f3c").write_bytes(JPEG)
    (tmp_path / "x.png").write_bytes(PNG)
    (root / "a.jpg").symlink_to("../../blobs/5f3c")
    (root / "coco").symlink_to(disk)
    (root / "loop").symlink_to("loop")
    talk = {"conversations": asked()}
    for name in ("a.jpg", "coco/1.png", "coco/../a.jpg", "./coco//1.png", f"{root}/a.jpg", "../1/a.jpg"):
        check("here:1", talk | {"image": name}, root)
    (found,) = of_dictionaries([talk | {"image": "coco/1.png"}], root)
    assert found.images == [root / "coco/1.png"]
    for name in (
        "../../x.png",
        "coco/../../../x.png",
        f"{tmp_path}/x.png",
        str(disk / "1.png"),
        f"{root}/../../x.png",
    ):
        with pytest.raises(RecordError, match="here:1: field 'image': .* leaves the image root"):
            check("here:1", talk | {"image": name}, root)
    for name in ("loop", "loop/a.png", "coco"):
        with pytest.raises(RecordError, match="here:1: field 'image': no such file"):
            check("here:1", talk | {"image": name}, root)

    # A root that is a link itself may be named by either of its names.
    (tmp_path / "root").symlink_to(root)
    for name in (f"{root}/a.jpg", f"{tmp_path}/root/a.jpg", "a.jpg"):
        if name != f"{tmp_path}/root/a.jpg":
            check("here:1", talk | {"image": name}, tmp_path / "root")
    os.symlink(root / "a.jpg", tmp_path / "in.jpg")
