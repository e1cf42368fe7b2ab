"""A picture of every mode and depth becomes what a person sees; the right values are numpy's."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from crystal.runtime import data, images
from crystal.runtime.data import RecordError

# --- pictures of every mode ---
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
    "P png": (
        PALETTE,
        "PNG",
        {"transparency": bytes([255, 100, 0])},
        on_white(COLOURS, np.array([[255, 100, 0], [0, 255, 100]])),
    ),
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
    "F tiff with holes": (
        deep([[0.0, np.nan, 0.2], [np.inf, 1, -np.inf]], np.float32),
        "TIFF",
        {},
        greys([[0, 0, 51], [255, 255, 0]]),
    ),
}


@pytest.mark.parametrize(
    "case",
    [*WITH_ALPHA.values(), *WITH_DEPTH.values()],
    ids=[*WITH_ALPHA, *(f"{name} deep" for name in WITH_DEPTH)],
)
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
    assert palette.mode == "PA" and np.abs(np.asarray(images.rgb(palette), float) - want).max() <= 0.51
    premultiplied = np.asarray(images.rgb(RGBA.convert("RGBa")), float)
    assert np.abs(premultiplied - want).max() <= 1.5  # it was rounded twice
    assert (np.asarray(images.rgb(Image.fromarray(COLOURS))) == COLOURS).all()
    assert (np.asarray(images.rgb(PALETTE)) == COLOURS).all()
    assert (np.asarray(images.rgb(Image.fromarray(GREY))) == greys(GREY)).all()


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
        seen[what] = np.asarray(images.rgb(drawn(("RGBA", (0, 0, 0, 0)), what)), int)
        assert np.abs(seen[what] - np.asarray(drawn(("RGB", (255, 255, 255)), what), int)).max() <= 1
    assert (seen["nothing"] == 255).all()
    assert (seen["text"] < 50).sum() > 100 and (seen["disc"] < 50).sum() > 1000


def test_a_deep_picture_with_nothing_to_see_is_the_records_fault():
    with pytest.raises(RecordError, match="here:1: field 'image': .*no finite value in it"):
        data.load_image(lambda: file_of(deep(np.full((2, 3), np.nan), np.float32), "TIFF"), "here:1")


# EXIF 2.3, 4.6.4 A says where the stored picture's row 0 and column 0 lie when it is seen: 2 rows of 3.
UPRIGHT = {
    1: [[0, 1, 2], [3, 4, 5]],
    2: [[2, 1, 0], [5, 4, 3]],
    3: [[5, 4, 3], [2, 1, 0]],
    4: [[3, 4, 5], [0, 1, 2]],
    5: [[0, 3], [1, 4], [2, 5]],
    6: [[3, 0], [4, 1], [5, 2]],
    7: [[5, 2], [4, 1], [3, 0]],
    8: [[2, 5], [1, 4], [0, 3]],
}


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
