"""What a chat request may say: OpenAI's wire format, checked, and bounded before it costs anything.

Images arrive as data URLs and in no other way: no file and no address that a client names is opened. A field
that cannot be honoured is refused, and every refusal is one line that names the field.
"""

import base64
import io
import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.responses import JSONResponse

from crystal.runtime.images import rgb

# What Pillow may open; of an animation the first picture counts.
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
)


@dataclass
class Limits:
    """What a request may cost, and the server hold; main has a flag for most."""

    body: int = 32 * 2**20  # bytes of a request
    body_seconds: float = 60.0  # for a request's body to arrive
    head_seconds: float = 10.0  # for the next request's head to arrive
    read_seconds: float = 30.0  # for a client to read what is sent to it
    connections: int = 256  # at once; fewer where the system allows fewer open files
    characters: int = 200_000  # of a request's texts; the model's context may allow fewer
    images: int = 16  # of one request
    pixels: int = 50_000_000  # of all its images as sent; the model's own bounds come after it
    tokens: int = 4096  # new tokens that a request may ask for
    default_tokens: int = 512  # new tokens of a request that names no number
    queue: int = 64  # requests that wait or are being answered
    batch: int = 8  # requests answered by one call


class Refusal(Exception):
    """What is wrong with a request: an HTTP status and one line."""

    def __init__(self, status, message, param=None):
        super().__init__(message)
        self.status, self.message, self.param = status, " ".join(message.split()), param

    def response(self):
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse(
            {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}},
            self.status,
            headers,
        )


# --- the wire format ---


class Strict(BaseModel):
    """A field that nobody knows is refused, not passed over."""

    model_config = ConfigDict(extra="forbid")


def only(*values):
    """Of a field that clients send along though it does nothing: null and `values` are taken, no other."""

    def check(value):
        if any(type(value) is type(taken) and value == taken for taken in (None, *values)):
            return value
        taken = ", ".join(json.dumps(value) for value in (None, *values))
        raise ValueError(f"not supported by this server, which takes {taken}")

    return AfterValidator(check)


class TextPart(Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None  # where a cache may begin: no answer changes with it


class ImageURL(Strict):
    url: str
    detail: str | None = None  # the model's own bounds on pixels hold


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL
    prompt_cache_breakpoint: Any = None


class Message(Strict):
    """One turn; plain text counts as one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None
    # What the official client's answers hold beside their text, when they are sent back.
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None

    @field_validator("content", mode="before")
    @classmethod
    def parts(cls, content):
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(Strict):
    include_usage: bool | None = False
    include_obfuscation: Annotated[Any, only(False)] = None


class ChatRequest(Strict):
    """The body of /v1/chat/completions: the fields that can be honoured, with the values that can."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(None, max_length=16)
    # Only these values leave an answer greedy.
    temperature: float | None = Field(None, ge=0, le=0)
    n: int | None = Field(None, ge=1, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    repetition_penalty: float | None = Field(None, ge=1, le=1)
    # Without effect on a greedy answer.
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    # Would change the answer, or promise what is not done: only the values that do neither.
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    functions: Annotated[Any, only([])] = None
    logit_bias: Annotated[Any, only({})] = None
    logprobs: Annotated[Any, only(False)] = None
    modalities: Annotated[Any, only(["text"])] = None
    moderation: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only()] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    store: Annotated[Any, only(False)] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    tools: Annotated[Any, only([])] = None
    top_logprobs: Annotated[Any, only(0)] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None

    @field_validator("stop", mode="before")
    @classmethod
    def strings(cls, stop):
        return [stop] if isinstance(stop, str) else stop


def parse(body, limits=Limits()):
    """bytes -> ChatRequest; Refusal names the field."""
    # Each part of the JSON becomes an object, or an error, of many times its size. Pictures hold none.
    parts = sum(body.count(sign) for sign in (b"{", b"[", b","))
    most = limits.characters + 10_000
    if parts > most:
        raise Refusal(400, f"{parts} brackets and commas, at most {most} are allowed")
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(x) for x in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = "not known to this server"
        hint = (
            "; this server answers greedily"
            if where in ("temperature", "n") or where.endswith("_penalty")
            else ""
        )
        raise Refusal(400, f"{where}: {what}{hint}" if where else what, where or None) from None


def turns_of(messages, limits):
    """Messages -> (turns for layout.Format with texts between images as a list, the images' data
    URLs with their place).
    """
    written = sum(len(part.text) for m in messages for part in m.content if isinstance(part, TextPart))
    if written > limits.characters:
        raise Refusal(
            400, f"messages: {written} characters, at most {limits.characters} are allowed", "messages"
        )

    turns, urls = [], []
    for i, message in enumerate(messages):
        texts = [""]
        for j, part in enumerate(message.content):
            if isinstance(part, TextPart):
                texts[-1] += part.text
                continue
            if message.role != "user":
                raise Refusal(400, f"messages.{i}.content.{j}: an image may stand in a user's message alone")
            urls.append((part.image_url.url, f"messages.{i}.content.{j}.image_url.url"))
            texts.append("")
        # The client's newer name for the same role.
        turns.append(("system" if message.role == "developer" else message.role, texts))
    if messages[-1].role != "user":
        raise Refusal(400, "messages: the last one must be the user's", "messages")
    if len(urls) > limits.images:
        raise Refusal(400, f"messages: {len(urls)} images, at most {limits.images} are allowed", "messages")
    return turns, urls


def file_of(url, where):
    """A data URL -> the bytes of an image's file."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:"):
        raise Refusal(
            400,
            f"{where}: must be a data URL (data:image/png;base64,...); this server opens no address and no "
            "file",
            where,
        )
    if not comma or not head.endswith(";base64"):
        raise Refusal(400, f"{where}: a data URL must be base64 (data:image/png;base64,...)", where)
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise Refusal(400, f"{where}: bad base64: {error}", where) from None


@contextmanager
def readable(where):
    """Whatever Pillow raises at a broken file (a dozen kinds) is a fault of the request's."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).split(" <_io")[0] or type(error).__name__
        raise Refusal(400, f"{where}: not a readable image ({', '.join(FORMATS)}): {reason}", where) from None


def pixels_of(files, limits):
    """[(bytes of a file, its place)] -> pixels of all images together; Refusal where they are too many.

    Of each file the head alone is read: nothing is decoded before the size of all is known.
    """
    total = 0
    for raw, where in files:
        with readable(where), Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            width, height = image.size

        before, total = total, total + width * height
        if total > limits.pixels:
            together = f", {total} with those before it" if before else ""
            size = f"{width} x {height} pixels{together}"
            raise Refusal(400, f"{where}: {size}, at most {limits.pixels} are allowed", where)
    return total


def image_of(raw, where):
    """The bytes of an image's file -> RGB PIL image. What it may cost was asked before: `pixels_of`."""
    with readable(where), Image.open(io.BytesIO(raw), formats=FORMATS) as image:
        image.load()
        return rgb(image)
