"""Files become records; whatever is wrong names file, line and field."""

import json

import numpy as np
import pytest
from PIL import Image
from test_images import ALPHA, COLOURS, RGBA, UPRIGHT, WITH_ALPHA, WITH_DEPTH, file_of, on_white

from crystal.runtime import data, records, sampling
from crystal.runtime.config import UserError
from crystal.runtime.records import Record, RecordError, Records, load_image, load_images, read


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
        "assistant",
        "a cat",
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


# --- pictures ---


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX"])
def test_a_picture_opens_by_its_format_and_not_by_its_name(folder, kind, monkeypatch):
    """PostScript would start a program: no file reaches it, whatever it is called."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("ghostscript was started")
    )
    Image.new("RGB", (16, 16)).save(folder / "x.png", kind)
    with pytest.raises(RecordError, match="here:1: field 'image': .*x.png: cannot identify image file"):
        load_image(folder / "x.png", "here:1")


@pytest.mark.parametrize(
    "kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "MPO"]
)
def test_every_format_that_people_have_is_read(folder, kind):
    from PIL import features

    needs = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000", "JPEG": "jpg", "MPO": "jpg"}
    if kind in needs and not features.check(needs[kind]):
        pytest.skip(f"this Pillow has no {kind}")
    first, second = Image.new("RGB", (16, 12), (200, 10, 10)), Image.new("RGB", (16, 12))
    first.save(
        folder / "x.dat", kind, **{"save_all": True, "append_images": [second]} if kind == "MPO" else {}
    )
    found = load_image(folder / "x.dat", "here")
    assert found.size == (16, 12) and np.abs(np.asarray(found, float) - [200, 10, 10]).max() < 9


def test_a_records_pixels_are_bounded_before_they_are_decoded(folder, monkeypatch):
    """6,000 of 6,100 pixels are taken; the third picture's file is cut, and nobody comes to see that."""
    monkeypatch.setattr(records, "PIXELS", 6100)
    half = (folder / "b.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(half[:-30])
    record = Record("here:3", "1", [], "a", [folder / "a.png", folder / "b.jpg"])
    assert [image.size for image in load_images(record)] == [(80, 60), (30, 40)]
    record.images.append(folder / "half.jpg")
    told = (
        r"here:3: field 'image': .*half.jpg: 30 x 40 pixels, with the record's others more than the 6100 that"
    )
    with pytest.raises(RecordError, match=told):
        load_images(record)
    for picture in (Image.new("L", (80, 90)), lambda: folder / "a.png"):
        record.images = [folder / "b.jpg"] * 2 + [picture]
        with pytest.raises(RecordError, match="here:3: field 'image': .* pixels, with the record's others"):
            load_images(record)


def test_a_message_about_a_picture_is_one_printable_line(folder):
    (folder / "a\x1b[2J\n.png").write_text("no picture")
    with pytest.raises(RecordError) as error:
        load_image(folder / "a\x1b[2J\n.png", "here")
    assert str(error.value).isprintable() and r"a\x1b[2J" in str(error.value)


# --- Parquet ---


def test_parquet_rows_are_records_with_their_pictures(folder):
    """As the hub's converted sets have them: pictures as bytes, absent fields as nulls."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    raw = (folder / "a.png").read_bytes()
    rows = [line(id=str(i), image={"bytes": raw, "path": "x/a.png"}) for i in range(3)]
    rows[1]["image"] = None
    rows[1]["conversations"] = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]
    rows[2]["image"] = {"bytes": b"no picture", "path": None}
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "x.parquet")
    found, dropped = read(folder / "x.parquet")
    assert [(r.id, r.answer, len(r.images)) for r in found] == [
        ("0", "a cat", 1),
        ("1", "so", 0),
        ("2", "a cat", 1),
    ]
    assert (np.asarray(load_images(found[0])[0]) == np.asarray(Image.open(folder / "a.png"))).all()
    with pytest.raises(RecordError, match=r"x.parquet\[2\]: field 'image': its bytes: cannot identify"):
        load_images(found[2])


# --- files that stay on the disk ---


def many(folder, count=40):
    """`count` lines of which the 8th is broken and every fifth has two answers, a blank one among them."""
    more = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "more"}]
    lines = [line(id=str(i)) for i in range(count)]
    for i in range(0, count, 5):
        lines[i]["conversations"] = lines[i]["conversations"] + more
    lines[7]["image"] = "none.png"
    lines.insert(3, "")
    return write(folder, *lines)


@pytest.mark.parametrize("turns, first", [("first", 5), ("first", 1000), ("all", 5)])
def test_a_large_file_is_read_when_its_records_are_asked_for(folder, monkeypatch, turns, first):
    """The same records as a small one's, in the same order, errors in their place."""
    path = many(folder)
    small, dropped = read(path, turns=turns)
    monkeypatch.setattr(records, "HELD", 100)
    monkeypatch.setattr(records, "FIRST", first)
    large, counted = read(path, turns=turns)
    assert isinstance(small, list) and isinstance(large, Records)
    assert (dropped, counted) == {("first", 5): (8, 1), ("first", 1000): (8, 8), ("all", 5): (0, 0)}[
        turns, first
    ]

    def told(found):
        return [str(r) if isinstance(r, RecordError) else r for r in found]

    assert len(large) == len(small) == (48 if turns == "all" else 40)
    assert told(large) == told(small) and told(large[i] for i in range(-48, 0) if i >= -len(large)) == told(
        small
    )
    assert told(large[3:9]) == told(small[3:9]) and isinstance(large[:4], list) and large[:] is large
    with pytest.raises(IndexError):
        large[len(large)]

    # Without those known to be broken; another one that is found out later stands in its place.
    known = "no such file" in str(data.broken(large))
    assert known == (first == 1000 or turns == "all") and len(data.broken(small)) == 1
    whole = data.whole(large)
    assert isinstance(whole, Records) and told(data.whole(small)) == [
        x for x in told(small) if "none.png" not in str(x)
    ]
    assert told(whole) == (told(data.whole(small)) if known else told(small))
    whole[2] = RecordError("x:9: found out")
    assert str(whole[2]) == "x:9: found out" and str(data.whole(whole)[2]) != "x:9: found out"


def test_the_order_of_a_large_file_over_ranks_workers_and_resumes(folder, monkeypatch):
    """Each of two ranks sees, in its process or in two workers, what the list of a small file gives."""
    path = many(folder)
    small = data.whole(read(path)[0])
    monkeypatch.setattr(records, "HELD", 100)
    large = data.whole(read(path)[0])

    def seen(found, rank, workers, start=0):
        examples = data.RecordDataset(found, lambda r, n: r.id, Pixels(), skip=True)
        order = sampling.BatchSampler(len(found), 3, 1, rank, 2, 5, start, 9)
        monkeypatch.setattr(data, "collate", lambda e, pad: [x["layout"] for x in e])
        return list(data.loader(examples, order, 0, workers))

    for rank in (0, 1):
        right = seen(small, rank, 0)
        assert len(right) == 9 and seen(large, rank, 0) == right and seen(large, rank, 2) == right
        assert seen(large, rank, 2, start=4) == right[4:]


class Pixels:
    """Stands for an image processor."""

    def __call__(self, images, return_tensors):
        return {"pixel_values": None, "image_grid_thw": [1]}

    def tokens(self, grid):
        return [1]


def test_a_large_file_takes_three_numbers_a_record(folder, monkeypatch):
    """Ten times as many lines take ten times 32 bytes more, not ten times the lines."""
    import tracemalloc

    monkeypatch.setattr(records, "HELD", 100)
    monkeypatch.setattr(records, "FIRST", 10)
    one = json.dumps(line(id="x" * 2000))
    (folder / "x.jsonl").write_text((one + "\n") * 4000)
    tracemalloc.start()
    found, _ = read(folder / "x.jsonl")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 4000 and held < 4000 * 40 + 50_000 and peak < 1_000_000


def test_a_picture_over_which_a_processor_falls_is_the_records_fault(folder):
    """LLaVA-OneVision's unpadding of a 300 x 1 picture ends in an IndexError, for one."""

    class Falls(Pixels):
        def tokens(self, grid):
            raise IndexError("index 1 is out of bounds\nfor dimension 0")

    record = Record("here:4", "1", [("user", "<image>")], "a", [folder / "a.png"])
    error = data.RecordDataset([record], lambda r, n: None, Falls())[0, 0]["error"]
    assert (
        error.startswith("here:4: field 'image': index 1 is out of bounds for dim")
        and error.isprintable()
    )
