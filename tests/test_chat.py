"""What a request may say, without a server: each refusal is one line with a status and the field's name."""

import base64
import io
import json

import pytest
from PIL import Image

pytest.importorskip("pydantic", reason="needs the extra `serve`")

from crystal.serving.chat import Limits, Refusal, file_of, image_of, parse, pixels_of, turns_of


def url(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


STAR = url(Image.new("RGB", (4, 3), (1, 2, 3)))


def request(content="A star?", **more):
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]} | more).encode()


def refused(call, status, message):
    with pytest.raises(Refusal, match=message) as found:
        call()
    assert found.value.status == status and "\n" not in found.value.message
    told = json.loads(found.value.response().body)["error"]
    assert (
        told["message"] == found.value.message
        and told["type"] == "invalid_request_error"
        and told["code"] == status
    )


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "JSON"),
        (b"[]", "dictionary|object"),
        (request(messages=[]), "^messages: "),
        (request(colour=1), "^colour: not known"),
        (request(temperature=0.5), "^temperature: .*greedily"),
        (request(n=2), "^n: .*greedily"),
        (request(max_tokens=0), "^max_tokens: "),
        (request([{"type": "image_url", "image_url": {"url": STAR, "size": 3}}]), "size: not known"),
        (request([{"type": "video_url"}]), r"^messages\.0\.content\.0"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(body, message):
    refused(lambda: parse(body), 400, message)


def test_turns_keep_texts_around_their_images():
    asked = parse(
        request(
            [
                {"type": "text", "text": "Left "},
                {"type": "image_url", "image_url": {"url": STAR}},
                {"type": "text", "text": "a"},
                {"type": "text", "text": "b"},
            ],
            temperature=0,
            top_p=0.3,
        )
    )
    turns, urls = turns_of(asked.messages, Limits())
    assert turns == [("user", ["Left ", "ab"])] and urls == [(STAR, "messages.0.content.1.image_url.url")]
    refused(lambda: turns_of(asked.messages, Limits(images=0)), 400, "1 images, at most 0")
    last = parse(request(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    refused(lambda: turns_of(last.messages, Limits()), 400, "last one must be the user's")
    told = parse(
        request(
            messages=[
                {"role": "system", "content": [{"type": "image_url", "image_url": {"url": STAR}}]},
                {"role": "user", "content": "a"},
            ]
        )
    )
    refused(lambda: turns_of(told.messages, Limits()), 400, "user's message alone")


@pytest.mark.parametrize(
    "text, message",
    [
        ("http://127.0.0.1/x.png", "opens no address and no file"),
        ("file:///etc/passwd", "opens no address and no file"),
        ("data:image/png,abc", "must be base64"),
        ("data:image/png;base64,@@@", "bad base64"),
        ("data:image/png;base64,", "not a readable image"),
        (STAR[:-40], "not a readable image"),
        (url(Image.new("RGB", (9, 9))), "9 x 9 pixels, at most 80"),
        (url(Image.new("RGB", (4, 4)), "TIFF"), "not a readable image"),
    ],
)
def test_an_image_that_is_not_taken(text, message):
    def taken():
        raw = file_of(text, "messages.0")
        pixels_of([(raw, "messages.0")], Limits(pixels=80))
        image_of(raw, "messages.0")

    refused(taken, 400, f"^messages.0: .*{message}")


def test_an_image_is_rgb_and_upright():
    assert image_of(file_of(STAR, "here"), "here").getpixel((0, 0)) == (1, 2, 3)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    file = io.BytesIO()
    Image.new("L", (4, 2)).save(file, "JPEG", exif=exif)
    image = image_of(file.getvalue(), "here")
    assert image.mode == "RGB" and image.size == (2, 4)
