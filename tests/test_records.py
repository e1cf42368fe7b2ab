"""Files become records; whatever is wrong names file, line and field."""

import json

import numpy as np
import pytest
from PIL import Image
from test_images import ALPHA, COLOURS, RGBA, UPRIGHT, WITH_ALPHA, WITH_DEPTH, file_of, on_white

from crystal.runtime.config import UserError
from crystal.runtime.records import RecordError, load_image, read


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    Image.new("RGB", (30, 40), (200, 10, 10)).save(tmp_path / "b.jpg")
    return tmp_path


def line(**changes):
    return {
        "id": "1",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}],
    } | changes


def write(folder, *lines, name="x.jsonl"):
    (folder / name).write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return folder / name


def only(folder, item, **how):
    records, dropped = read(write(folder, item), **how)
    assert len(records) == 1
    return records[0], dropped


def test_conversations_and_messages_are_the_same_record(folder):
    a, _ = only(folder, line())
    messages = {
        "id": "1",
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "a cat"},
        ],
    }
    parts = {
        "id": "1",
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "a cat"},
        ],
    }
    for other in (messages, parts):
        b, _ = only(folder, other)
        assert (b.turns, b.answer, b.images) == (a.turns, a.answer, a.images)
    (folder / "x.json").write_text(json.dumps([line(), messages], indent=1))
    records, _ = read(folder / "x.json")
    assert [r.where for r in records] == [f"{folder}/x.json[0]", f"{folder}/x.json[1]"] and records[
        0
    ].turns == a.turns


def test_markers_left_out_mean_images_first(folder):
    a, _ = only(
        folder,
        line(
            conversations=[{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a cat"}],
            image=None,
            images=["a.png", "b.jpg"],
        ),
    )
    assert a.turns[-1][1] == "<image>\n<image>\nWhat?" and len(a.images) == 2


def test_turns(folder):
    talk = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "hi"},
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "And its colour?"},
        {"from": "gpt", "value": "red"},
    ]
    record, dropped = only(folder, line(conversations=talk))
    assert (record.answer, dropped, [r for r, _ in record.turns]) == (
        "a cat",
        1,
        ["system", "user", "assistant", "user"],
    )
    records, dropped = read(write(folder, line(conversations=talk)), turns="all")
    assert ([r.answer for r in records], dropped) == (["a cat", "red"], 0) and records[1].turns[-2] == (
        "assistant", "a cat",
    )


@pytest.mark.parametrize(
    "item, message",
    [
        ("{not json", r"x.jsonl:1: not JSON"),
        ("[1]", "record is a JSON object"),
        ('"text"', "record is a JSON object"),
        (line(image="c.png"), r"x.jsonl:1: field 'image': no such file"),
        (line(image="../b.jpg"), "leaves the image root"),
        (line(image="/etc/passwd"), "leaves the image root"),
        (line(image=["a.png", "b.jpg"]), "2 images for 1 <image> markers"),
        (line(image=3), "field 'image'"),
        ({"id": "1", "image": "a.png"}, "field 'messages': missing"),
        (line(conversations=[{"from": "robot", "value": "x"}]), "unknown speaker 'robot'"),
        (line(conversations=[{"from": "human", "value": "<image>"}]), "no answer"),
        (
            line(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]),
            "the answer is empty",
        ),
        (line(conversations=[{"from": "human"}]), "its text is missing"),
        (line(conversations=[{"from": "gpt", "value": "x"}]), "no turn of the user's"),
        (line(cot=[1]), "field 'cot'"),
        (line(boxes=[[1, 2, 3]]), "field 'boxes'"),
        (
            line(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "<image>"}]),
            "outside the user's turns",
        ),
        (line(image=None, images=[]), "0 images for 1 <image> markers"),
        (
            line(image="data:image/png;base64," + "QUJ*" * 1999),
            r"x.jsonl:1: field 'image': .{1,250}\(7996 characters\): bad base64",
        ),
        (line(image="a" * 8018), r"x.jsonl:1: field 'image': .{1,250}\(8018 characters\)"),
        (line(image="a\0.png"), "x.jsonl:1: field 'image': .*(not a path|no such file)"),
        (line(image="\ud800.png"), "x.jsonl:1: field 'image': .*(not a path|no such file)"),
        (line(features={"sig": "f" * 300}), "x.jsonl:1: field 'features': .*(not a path|no such file)"),
        (line(features={"sig": "\0"}), "field 'features': .*(not a path|no such file)"),
        (
            line(conversations=[{"from": ["human"], "value": "<image>"}]),
            r"x.jsonl:1: field 'conversations\[0\]': unknown speaker \['human'\]",
        ),
        (
            line(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a \ud800"}]),
            r"x.jsonl:1: field 'conversations\[1\]': character 2 is '\\ud800', half of a surrogate pair",
        ),
        (
            line(cot=["I look.", "\udfff"]),
            "x.jsonl:1: field 'cot': character 0 is .* half of a surrogate pair",
        ),
    ],
)
def test_broken_records_name_file_line_and_field(folder, item, message):
    import re

    records, _ = read(write(folder, item, line()))
    assert (
        isinstance(records[0], RecordError)
        and re.search(message, str(records[0]))
        and "\n" not in str(records[0])
    )
    assert len(records) == 2 and not isinstance(records[1], RecordError)


def test_broken_files(folder):
    for path, message in (
        (folder / "none.jsonl", "cannot be read"),
        (write(folder, "", name="empty.jsonl"), "no records"),
        (write(folder, "[{]", name="l.json"), "l.json:1: not JSON"),
    ):
        with pytest.raises(UserError, match=message):
            read(path)
    (folder / "latin.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not UTF-8"):
        read(folder / "latin.jsonl")
    with pytest.raises(UserError, match="no such folder"):
        read(write(folder, line()), image_root=folder / "nowhere")


def test_truncated_image_is_the_records_fault(folder):
    raw = (folder / "b.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(raw[: len(raw) // 2])
    (folder / "text.png").write_text("not an image")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(RecordError, match=rf"here:3: field 'image': .*{name}"):
            load_image(folder / name, "here:3")


def test_oversized_image_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RecordError, match="here:1: .*exceeds limit"):
        load_image(folder / "a.png", "here:1")


def test_the_server_sees_what_training_sees():
    """A picture in a request, of every kind that may be sent."""
    pytest.importorskip("pydantic", reason="needs the extra `serve`")
    from crystal.serving.chat import FORMATS, image_of

    exif = Image.Exif()
    exif[274] = 6
    cases = [case for case in (*WITH_ALPHA.values(), *WITH_DEPTH.values()) if case[1] in FORMATS]
    cases.append((RGBA, "PNG", {"exif": exif}, on_white(COLOURS, ALPHA).reshape(6, 3)[np.array(UPRIGHT[6])]))
    assert {kind for _, kind, _, _ in cases} == {"PNG", "WEBP", "GIF"} and len(cases) > 9
    for image, kind, how, want in cases:
        found = image_of(file_of(image, kind, **how).getvalue(), "here")
        assert found.mode == "RGB" and np.abs(np.asarray(found, float) - want).max() <= 0.51


def test_the_corruptions_pictures_begin_with_what_training_sees(tmp_path, monkeypatch):
    figures = pytest.importorskip("crystal.evaluation.figures", reason="needs matplotlib")
    shown = []
    monkeypatch.setattr(figures, "show", lambda ax, image: shown.append(np.asarray(image, float)))
    monkeypatch.setattr(figures, "save", lambda fig, path: path)  # the file would cost seconds
    large = RGBA.resize((60, 40), Image.Resampling.NEAREST)
    figures.corruption_grid(large, tmp_path / "grid.png")
    want = np.kron(on_white(COLOURS, ALPHA), np.ones((20, 20, 1)))
    assert len(shown) == 28 and all(np.abs(x - want).max() <= 0.51 for x in shown[::4])
