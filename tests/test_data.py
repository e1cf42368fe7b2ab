"""Files become records, records become batches; whatever is wrong names file, line and field."""
import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from crystal.runtime import data
from crystal.runtime.config import UserError
from crystal.runtime.data import BatchSampler, RecordError, read, seed_of


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 40), (200, 10, 10)).save(tmp_path / "b.jpg")
    return tmp_path


def line(**changes):
    return {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]} | changes


def write(folder, *lines, name="x.jsonl"):
    (folder / name).write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return folder / name


def only(folder, item, **how):
    records, dropped = read(write(folder, item), **how)
    assert len(records) == 1
    return records[0], dropped


def test_conversations_and_messages_are_the_same_record(folder):
    a, _ = only(folder, line())
    messages = {"id": "1", "images": ["a.png"], "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a cat"}]}
    parts = {"id": "1", "images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]}, {"role": "assistant", "content": "a cat"}]}
    for other in (messages, parts):
        b, _ = only(folder, other)
        assert (b.turns, b.answer, b.images) == (a.turns, a.answer, a.images)
    (folder / "x.json").write_text(json.dumps([line(), messages], indent=1))
    records, _ = read(folder / "x.json")
    assert [r.where for r in records] == [f"{folder}/x.json[0]", f"{folder}/x.json[1]"] and records[0].turns == a.turns


def test_markers_left_out_mean_images_first(folder):
    a, _ = only(folder, line(conversations=[{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a cat"}], image=None, images=["a.png", "b.jpg"]))
    assert a.turns[-1][1] == "<image>\n<image>\nWhat?" and len(a.images) == 2


def test_turns(folder):
    talk = [{"from": "system", "value": "s"}, {"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}, {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "a cat"}, {"from": "human", "value": "And its colour?"}, {"from": "gpt", "value": "red"}]
    record, dropped = only(folder, line(conversations=talk))
    assert (record.answer, dropped, [r for r, _ in record.turns]) == ("a cat", 1, ["system", "user", "assistant", "user"])
    records, dropped = read(write(folder, line(conversations=talk)), turns="all")
    assert ([r.answer for r in records], dropped) == (["a cat", "red"], 0) and records[1].turns[-2] == ("assistant", "a cat")


@pytest.mark.parametrize("item, message", [
    ("{not json", r"x.jsonl:1: not JSON"), ("[1]", "record is a JSON object"), ('"text"', "record is a JSON object"),
    (line(image="c.png"), r"x.jsonl:1: field 'image': no such file"), (line(image="../b.jpg"), "leaves the image root"), (line(image="/etc/passwd"), "leaves the image root"),
    (line(image=["a.png", "b.jpg"]), "2 images for 1 <image> markers"), (line(image=3), "field 'image'"), ({"id": "1", "image": "a.png"}, "field 'messages': missing"),
    (line(conversations=[{"from": "robot", "value": "x"}]), "unknown speaker 'robot'"), (line(conversations=[{"from": "human", "value": "<image>"}]), "no answer"),
    (line(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}]), "the answer is empty"),
    (line(conversations=[{"from": "human"}]), "its text is missing"), (line(conversations=[{"from": "gpt", "value": "x"}]), "no turn of the user's"),
    (line(cot=[1]), "field 'cot'"), (line(boxes=[[1, 2, 3]]), "field 'boxes'"), (line(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "<image>"}]), "outside the user's turns"), (line(image=None, images=[]), "0 images for 1 <image> markers"),
    (line(image="data:image/png;base64," + "QUJD" * 1999), r"x.jsonl:1: field 'image': .{1,250}\(8018 characters\)"),  # newer Pythons say that there is no such file
    (line(image="a\0.png"), "x.jsonl:1: field 'image': .*(not a path|no such file)"), (line(image="\ud800.png"), "x.jsonl:1: field 'image': .*(not a path|no such file)"),
    (line(features={"sig": "f" * 300}), "x.jsonl:1: field 'features': .*(not a path|no such file)"), (line(features={"sig": "\0"}), "field 'features': .*(not a path|no such file)"),
    (line(conversations=[{"from": ["human"], "value": "<image>"}]), r"x.jsonl:1: field 'conversations\[0\]': unknown speaker \['human'\]"),
    (line(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a \ud800"}]),
     r"x.jsonl:1: field 'conversations\[1\]': character 2 is '\\ud800', half of a surrogate pair"),
    (line(cot=["I look.", "\udfff"]), "x.jsonl:1: field 'cot': character 0 is .* half of a surrogate pair")])
def test_broken_records_name_file_line_and_field(folder, item, message):
    import re
    records, _ = read(write(folder, item, line()))
    assert isinstance(records[0], RecordError) and re.search(message, str(records[0])) and "\n" not in str(records[0])
    assert len(records) == 2 and not isinstance(records[1], RecordError)


def test_broken_files(folder):
    for path, message in ((folder / "none.jsonl", "cannot be read"), (write(folder, "", name="empty.jsonl"), "no records"), (write(folder, "[{]", name="l.json"), "l.json:1: not JSON")):
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
            data.load_image(folder / name, "here:3")


def test_oversized_image_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RecordError, match="here:1: .*exceeds limit"):
        data.load_image(folder / "a.png", "here:1")


# --- pictures of every mode ---------------------------------------------------------------------------------
# The right values come from numpy: a channel v under alpha a on white is v a / 255 + 255 (1 - a / 255).

RED, GREEN, BLUE = [200, 10, 20], [0, 150, 30], [7, 8, 250]
COLOURS = np.array([[RED, GREEN, BLUE], [BLUE, RED, GREEN]], np.uint8)  # 2 rows of 3, no two alike
ALPHA = np.array([[0, 255, 128], [51, 0, 204]], np.uint8)
GREY = np.array([[0, 90, 200], [250, 90, 33]], np.uint8)
DEEP = np.array([[0, 1000, 20000], [40000, 65535, 257]])


def on_white(values, alpha):
    """values [h,w,3] or [h,w], alpha [h,w], 0 to 255 -> what is seen on a white ground, [h,w,3] of floats."""
    values = values if values.ndim == 3 else np.stack([values] * 3, -1)
    share = alpha[..., None] / 255
    return values * share + 255 * (1 - share)


def greys(values):
    return np.stack([np.asarray(values, float)] * 3, -1)


def file_of(image, kind, **how):
    """A PIL image -> an open file of the kind that holds it."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    file.seek(0)
    return file


def palette_image(colours):
    """RED, GREEN and BLUE are the entries 0, 1 and 2 of a palette."""
    image = Image.fromarray(np.array([[0, 1, 2], [2, 0, 1]], np.uint8), "L")
    image = image.copy()
    image.putpalette([x for colour in colours for x in colour], "RGB")
    return image


def deep(values, kind):
    return Image.fromarray(np.asarray(values).astype(kind))


RGBA = Image.fromarray(np.dstack([COLOURS, ALPHA]))
PALETTE = palette_image([RED, GREEN, BLUE])
NO_GREEN = np.array([[255, 0, 255], [255, 255, 0]])
WITH_ALPHA = {
    "RGBA png": (RGBA, "PNG", {}, on_white(COLOURS, ALPHA)),
    "RGBA webp": (RGBA, "WEBP", {"lossless": True, "exact": True}, on_white(COLOURS, ALPHA)),
    "RGBA tiff": (RGBA, "TIFF", {}, on_white(COLOURS, ALPHA)),
    "LA png": (Image.fromarray(np.dstack([GREY, ALPHA])), "PNG", {}, on_white(GREY, ALPHA)),
    "P png": (PALETTE, "PNG", {"transparency": bytes([255, 100, 0])},
              on_white(COLOURS, np.array([[255, 100, 0], [0, 255, 100]]))),
    "P gif": (PALETTE, "GIF", {"transparency": 1}, on_white(COLOURS, NO_GREEN)),
    "L png": (Image.fromarray(GREY), "PNG", {"transparency": 90}, greys([[0, 255, 200], [250, 255, 33]])),
    "RGB png": (Image.fromarray(COLOURS), "PNG", {"transparency": tuple(GREEN)}, on_white(COLOURS, NO_GREEN)),
    "1 png": (Image.fromarray(GREY > 80), "PNG", {"transparency": 0}, greys(np.full((2, 3), 255))),
    "I;16 png": (deep(DEEP, np.uint16), "PNG", {"transparency": 20000}, greys([[0, 4, 255], [156, 255, 1]])),
}
METRES = np.array([[0.5, 2.5, 300.5], [-1.5, 80.5, 150.5]])
WITH_DEPTH = {
    "I;16 png": (deep(DEEP, np.uint16), "PNG", {}, greys(DEEP / 257)),
    "I;16 tiff": (deep(DEEP, np.uint16), "TIFF", {}, greys(DEEP / 257)),
    "I;16 png, dark": (deep(GREY, np.uint16), "PNG", {}, greys(GREY / 257)),  # its range is told
    "I;16B tiff": (deep(DEEP, ">u2"), "TIFF", {}, greys(DEEP / 257)),
    "I ppm": (deep(DEEP, np.int32), "PPM", {}, greys(DEEP / 257)),
    "I tiff": (deep(DEEP, np.int32), "TIFF", {}, greys(DEEP / 257)),
    "I tiff of bytes": (deep(GREY, np.int32), "TIFF", {}, greys(GREY)),
    "I tiff below zero": (deep(DEEP - 500, np.int32), "TIFF", {}, greys(DEEP / 257)),
    "I tiff of 32 bits": (deep(DEEP * 3 + 7, np.int32), "TIFF", {}, greys(DEEP / 257)),
    "F tiff of shares": (deep(GREY / 255, np.float32), "TIFF", {}, greys(GREY)),
    "F tiff of bytes": (deep(GREY, np.float32), "TIFF", {}, greys(GREY)),
    "F tiff of 16 bits": (deep(DEEP, np.float32), "TIFF", {}, greys(DEEP / 257)),
    "F tiff of metres": (deep(METRES, np.float32), "TIFF", {}, greys((METRES + 1.5) / 302 * 255)),
    "F tiff of one value": (deep(np.full((2, 3), -4), np.float32), "TIFF", {}, greys(np.zeros((2, 3)))),
    "F tiff with holes": (deep([[0.0, np.nan, 0.2], [np.inf, 1, -np.inf]], np.float32), "TIFF", {},
                          greys([[0, 0, 51], [255, 255, 0]])),
}


@pytest.mark.parametrize("case", [*WITH_ALPHA.values(), *WITH_DEPTH.values()],
                         ids=[*WITH_ALPHA, *(f"{name} deep" for name in WITH_DEPTH)])
def test_a_picture_of_any_mode_shows_what_is_drawn(case, tmp_path):
    image, kind, how, want = case
    (tmp_path / "picture").write_bytes(file_of(image, kind, **how).getvalue())
    # A file's path, and a function that opens it, as a benchmark's rows are.
    for place in (tmp_path / "picture", lambda: file_of(image, kind, **how)):
        found = data.load_image(place, "here:1")
        assert found.mode == "RGB" and found.size == (3, 2)
        assert np.abs(np.asarray(found, float) - want).max() <= 0.51


def test_modes_that_no_file_of_ours_has():
    """Palette with an alpha band, premultiplied alpha; a picture without transparency stays what it is."""
    palette = PALETTE.copy()
    palette.putalpha(Image.fromarray(ALPHA))
    want = on_white(COLOURS, ALPHA)
    assert palette.mode == "PA" and np.abs(np.asarray(data.rgb(palette), float) - want).max() <= 0.51
    premultiplied = np.asarray(data.rgb(RGBA.convert("RGBa")), float)
    assert np.abs(premultiplied - want).max() <= 1.5  # it was rounded twice
    assert (np.asarray(data.rgb(Image.fromarray(COLOURS))) == COLOURS).all()
    assert (np.asarray(data.rgb(PALETTE)) == COLOURS).all()
    assert (np.asarray(data.rgb(Image.fromarray(GREY))) == greys(GREY)).all()


def test_what_is_drawn_on_a_transparent_ground_is_seen():
    """Black text, a black disc and nothing on a transparent ground are three pictures, as on white."""
    def drawn(ground, what):
        image = Image.new(ground[0], (112, 84), ground[1])
        draw = ImageDraw.Draw(image)
        if what == "text":
            draw.text((20, 30), "STOP 42", fill=(0, 0, 0, 255)[: len(ground[0])])
        elif what == "disc":
            draw.ellipse([30, 10, 70, 50], fill=(0, 0, 0, 255)[: len(ground[0])])
        return image

    seen = {}
    for what in ("text", "disc", "nothing"):
        seen[what] = np.asarray(data.rgb(drawn(("RGBA", (0, 0, 0, 0)), what)), int)
        assert np.abs(seen[what] - np.asarray(drawn(("RGB", (255, 255, 255)), what), int)).max() <= 1
    assert (seen["nothing"] == 255).all()
    assert (seen["text"] < 50).sum() > 100 and (seen["disc"] < 50).sum() > 1000


def test_a_deep_picture_with_nothing_to_see_is_the_records_fault():
    with pytest.raises(RecordError, match="here:1: field 'image': .*no finite value in it"):
        data.load_image(lambda: file_of(deep(np.full((2, 3), np.nan), np.float32), "TIFF"), "here:1")


# EXIF 2.3, 4.6.4 A says where the stored picture's row 0 and column 0 lie when it is seen: 2 rows of 3.
UPRIGHT = {1: [[0, 1, 2], [3, 4, 5]], 2: [[2, 1, 0], [5, 4, 3]], 3: [[5, 4, 3], [2, 1, 0]],
           4: [[3, 4, 5], [0, 1, 2]], 5: [[0, 3], [1, 4], [2, 5]], 6: [[3, 0], [4, 1], [5, 2]],
           7: [[5, 2], [4, 1], [3, 0]], 8: [[2, 5], [1, 4], [0, 3]]}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_turned_as_its_exif_says(orientation):
    """Before anything else is done to it: transparent and deep ones too, in every format that has EXIF."""
    exif = Image.Exif()
    exif[274] = orientation
    turned = np.array(UPRIGHT[orientation])
    seen = on_white(COLOURS, ALPHA).reshape(6, 3)[turned]
    for kind, how in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        found = data.load_image(lambda: file_of(RGBA, kind, exif=exif, **how), "here:1")
        assert np.abs(np.asarray(found, float) - seen).max() <= 0.51, kind
    found = data.load_image(lambda: file_of(deep(DEEP, np.uint16), "PNG", exif=exif), "here:1")
    assert np.abs(np.asarray(found, float) - greys(DEEP.reshape(6)[turned] / 257)).max() <= 0.51
    large = np.kron(GREY, np.ones((16, 16), np.uint8))  # JPEG keeps the mean of a block of one value
    jpeg = file_of(Image.fromarray(large), "JPEG", exif=exif, quality=95)
    found = np.asarray(data.load_image(lambda: jpeg, "here:1"), float)
    rows, columns = turned.shape
    assert found.shape == (16 * rows, 16 * columns, 3)
    assert np.abs(found[8::16, 8::16] - greys(GREY.reshape(6)[turned])).max() <= 2


def test_the_server_sees_what_training_sees():
    """A picture in a request, of every kind that may be sent."""
    pytest.importorskip("pydantic", reason="needs the extra `serve`")
    from crystal.serving.chat import FORMATS, Limits, image_of

    exif = Image.Exif()
    exif[274] = 6
    cases = [case for case in (*WITH_ALPHA.values(), *WITH_DEPTH.values()) if case[1] in FORMATS]
    cases.append((RGBA, "PNG", {"exif": exif}, on_white(COLOURS, ALPHA).reshape(6, 3)[np.array(UPRIGHT[6])]))
    assert {kind for _, kind, _, _ in cases} == {"PNG", "WEBP", "GIF"} and len(cases) > 9
    for image, kind, how, want in cases:
        url = f"data:image/x;base64,{base64.b64encode(file_of(image, kind, **how).getvalue()).decode()}"
        found = image_of(url, "here", Limits())
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


# --- batches ------------------------------------------------------------------------------------------------

def test_batch_tensors(setup):
    s = setup()
    b = s.batch
    assert b["input_ids"].shape == b["targets"].shape == b["attention_mask"].shape and len(b["input_ids"]) == 3
    for i, record in enumerate(s.records):
        ids = b["input_ids"][i][b["attention_mask"][i].bool()]
        assert (b["mm_token_type_ids"][i] == (b["input_ids"][i] == s.fmt.image)).all()
        assert len(ids) < b["input_ids"].shape[1] or i == int(b["attention_mask"].sum(1).argmax())
        assert (b["input_ids"][i, b["latents"][i]] == torch.tensor(s.fmt.latents)).all()
    assert len(b["image_grid_thw"]) == 4 and b["pixel_values"].shape == b["pixel_values_cor"].shape
    assert not torch.equal(b["pixel_values"], b["pixel_values_cor"])


def test_corruption_depends_on_seed_epoch_and_record_alone(setup):
    """On each of the three, and on nothing else: asked again, in another order, by another object.

    Which corruption it is, test_data_by_hand.py says.
    """
    s = setup()
    records = [s.records[0]] * 2  # one picture, so that only the place differs

    def corrupted(seed, epoch, index):
        e = s.examples
        return data.RecordDataset(records, e.layout, e.image_processor, e.corruption, seed)[epoch, index]

    places = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)]
    first = [corrupted(*place) for place in places]
    again = [corrupted(*place) for place in reversed(places)][::-1]
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x["pixel_values_cor"], y["pixel_values_cor"])
        assert torch.equal(x["pixel_values"], first[0]["pixel_values"])
    for i, x in enumerate(first):
        others = [y["pixel_values_cor"] for y in first[i + 1 :]]
        assert not any(torch.equal(x["pixel_values_cor"], y) for y in others), places[i]


def test_grey_images_show_nothing_but_their_size(setup):
    s = setup()
    s.examples.grey = True
    x = s.examples[0, 0]["pixel_values"]
    assert torch.equal(x, x[:1].expand_as(x))


def test_crystal_needs_an_image(setup, folder):
    s = setup()
    s.examples.records = [only(folder, line(image=None, images=[], conversations=[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "so"}]))[0]]
    assert "field 'image': missing; the corrupted path needs an image" in s.examples[0, 0]["error"]
    for workers in (0, 1):
        (batch,) = data.loader(s.examples, [[(0, 0)]], 0, workers)
        assert batch["error"].endswith("x.jsonl:1: field 'image': missing; the corrupted path needs an image")


def test_skipped_records_are_replaced_and_told(setup):
    s = setup()
    good = s.examples.records[1]
    s.examples.records = [RecordError("x:1: broken"), good]
    assert s.examples[0, 0] == {"error": "x:1: broken"}
    s.examples.skip = True
    e = s.examples[0, 0]
    assert e["bad"] == ["x:1: broken"] and e["layout"].ids == s.examples[0, 1]["layout"].ids


def test_order_is_one_stream_however_it_is_shared():
    """Four updates of eight records are one stream, read rank by rank and micro-batch by micro-batch.

    Not only the same sets: for 1 rank x 8, 2 x 2 x 2 accumulated, 2 x 4, 4 x 1 x 2, and resumed at 2.
    """
    def stream(batch_size, accumulation, world, seed=5, start=0):
        ranks = [list(BatchSampler(10, batch_size, accumulation, rank, world, seed, start, 4))
                 for rank in range(world)]
        found = []
        for update in range(4 - start):
            for batches in ranks:
                for batch in batches[update * accumulation : (update + 1) * accumulation]:
                    assert len(batch) == batch_size
                    found += batch
        return found

    whole = stream(8, 1, 1)
    assert stream(2, 2, 2) == stream(4, 1, 2) == stream(1, 2, 4) == whole
    assert stream(8, 1, 1, start=2) == whole[16:]
    epochs = [whole[n : n + 10] for n in (0, 10, 20)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number} and sorted(i for _, i in epoch) == list(range(10))
    # Another one in every epoch, with every seed, and none is the file's.
    orders = [[i for _, i in epoch] for epoch in [*epochs, stream(8, 1, 1, seed=6)[:10]]] + [list(range(10))]
    assert len({tuple(order) for order in orders}) == 5


def test_seeds_differ():
    assert len({seed_of(a, b, c) for a in range(20) for b in range(20) for c in range(20)}) == 8000
    assert all(0 <= seed_of(a, 7) < 2**63 for a in range(100))
