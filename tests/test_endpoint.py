"""The endpoint field by field: each limit just met and just passed, each field's values, each
answer's JSON written out.

Requests are given to the ASGI application itself, without sockets; the model is a real tiny one
whose `generate` is replaced, so that its tokens are known. test_serve.py runs the whole over
HTTP, with many clients.
"""

import asyncio
import base64
import contextlib
import io
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageFile

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from crystal import generate, opening, serve
from crystal.layout import Format
from crystal.runtime.config import UserError
from crystal.serving import chat, endpoint, engine
from crystal.serving.chat import Limits, Refusal, image_of, parse, pixels_of, turns_of

JSON = {"content-type": "application/json", "host": "127.0.0.1:8000"}


@pytest.fixture(scope="module")
def opened(model_dirs):
    model, fmt, _ = opening.open_model(str(model_dirs[True]))
    return model, fmt


@pytest.fixture
def answered(monkeypatch):
    """What generate is asked, and says: `tokens` one after the other, then `text`."""
    kept = SimpleNamespace(calls=[], tokens=[5, 6, 7], text="fine")

    def fake(model, prompts, fmt, limit, latents, streamer):
        kept.calls.append((prompts, limit, latents))
        streamer.put(torch.tensor([[1, 2]] * len(prompts)))
        for token in kept.tokens:
            streamer.put(torch.tensor([token] * len(prompts)))
        return [kept.text] * len(prompts)

    monkeypatch.setattr(generate, "generate", fake)
    return kept


def server(opened, latents="keep", key=None, hosts=("127.0.0.1",), **limits):
    """A server whose engine answers at once, without its thread."""
    made = serve.Server(*opened, "small", Limits(**limits), latents, key, hosts)
    made.engine.submit = lambda job: made.engine.answer([job])
    return made


def call(made, body, path="/v1/chat/completions", method="POST", headers=JSON, parts=None):
    """One request -> (status, JSON or text, headers). parts: the body in pieces; a list that shrinks
    as they are read.
    """
    pieces = [json.dumps(body).encode() if not isinstance(body, bytes) else body] if parts is None else parts
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
        "scheme": "http",
        "root_path": "",
    }
    sent = []

    async def talk():
        async def receive():
            if pieces:
                piece = pieces.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        await asyncio.wait_for(made.app(scope, receive, send), 60)

    asyncio.run(talk())
    text = b"".join(m.get("body", b"") for m in sent[1:]).decode()
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return (
        sent[0]["status"],
        json.loads(text) if headers["content-type"] == "application/json" else text,
        headers,
    )


def ask(content="Hello?", **more):
    return {"model": "small", "messages": [{"role": "user", "content": content}]} | more


def link(width, height, colour=(255, 0, 0)):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(*links):
    return [{"type": "image_url", "image_url": {"url": url}} for url in links] + [
        {"type": "text", "text": "What?"}
    ]


def refused(made, body, status, message, param):
    got, reply, _ = call(made, body)
    assert got == status
    assert reply == {
        "error": {"message": message, "type": "invalid_request_error", "param": param, "code": status}
    }
    assert made.places == 0


# --- limits, met and passed ---


def test_what_the_limits_are():
    assert vars(Limits()) == {
        "body": 33_554_432,
        "body_seconds": 60.0,
        "head_seconds": 10.0,
        "read_seconds": 30.0,
        "connections": 256,
        "characters": 200_000,
        "images": 16,
        "pixels": 50_000_000,
        "tokens": 4096,
        "default_tokens": 512,
        "queue": 64,
        "batch": 8,
    }
    assert chat.FORMATS == ("PNG", "JPEG", "WEBP", "GIF", "BMP") and serve.KEY == "CRYSTAL_API_KEY"


def test_bytes(opened, answered):
    body = json.dumps(ask()).encode()
    assert call(server(opened, body=len(body)), body)[0] == 200
    refused(
        server(opened, body=len(body) - 1), body, 413, f"the body is larger than {len(body) - 1} bytes", None
    )


def test_bytes_in_pieces_add_up(opened, answered):
    body = json.dumps(ask()).encode()
    pieces = [body[:10], body[10:30], body[30:]]
    assert call(server(opened, body=len(body)), b"", parts=list(pieces))[0] == 200
    assert call(server(opened, body=len(body) - 1), b"", parts=list(pieces))[0] == 413


@pytest.mark.parametrize("count, left", [(8, 0), (9, 0), (12, 3)])
def test_four_times_the_bytes_are_read_and_dropped_and_no_more(opened, count, left):
    """Of pieces of 50 bytes under a limit of 100: 8 are 400 and the end is awaited; the ninth is too much,
    what comes then is left.
    """
    parts = [b" " * 50] * count
    assert call(server(opened, body=100), b"", parts=parts)[0] == 413
    assert len(parts) == left


def test_seconds(opened, answered, monkeypatch):
    kept, real = [], asyncio.timeout
    monkeypatch.setattr(endpoint.asyncio, "timeout", lambda seconds: kept.append(seconds) or real(seconds))
    call(server(opened), ask())
    call(server(opened, body_seconds=7.5), ask())
    assert 60.0 in kept and 7.5 in kept


def test_images(opened, answered):
    made = server(opened, images=2)
    assert call(made, ask(picture(link(56, 56), link(56, 28))))[0] == 200
    refused(
        made, ask(picture(*[link(28, 28)] * 3)), 400, "messages: 3 images, at most 2 are allowed", "messages"
    )
    assert call(server(opened, images=0), ask())[0] == 200
    # Of all messages together.
    talk = [
        {"role": "user", "content": picture(link(28, 28), link(28, 28))},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": picture(link(28, 28))},
    ]
    refused(made, ask() | {"messages": talk}, 400, "messages: 3 images, at most 2 are allowed", "messages")


def test_pixels(opened, answered):
    made = server(opened, pixels=56 * 84)
    assert call(made, ask(picture(link(56, 84))))[0] == 200
    refused(
        made,
        ask(picture(link(56, 84), link(5, 941))),
        400,
        "messages.0.content.1.image_url.url: 5 x 941 pixels, 9409 with those before it, at most 4704 are "
        "allowed",
        "messages.0.content.1.image_url.url",
    )
    refused(
        made,
        ask(picture(link(5, 941))),
        400,
        "messages.0.content.0.image_url.url: 5 x 941 pixels, at most 4704 are allowed",
        "messages.0.content.0.image_url.url",
    )
    assert call(made, ask(picture(link(28, 84), link(28, 84))))[0] == 200


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_tokens(opened, answered, field):
    made = server(opened, tokens=9)
    assert call(made, ask(**{field: 9}))[0] == 200 and call(made, ask(**{field: 1}))[0] == 200
    assert [limit for _, limit, _ in answered.calls] == [9, 1]
    refused(made, ask(**{field: 10}), 400, "max_tokens: 10, at most 9 are allowed", "max_tokens")
    refused(made, ask(**{field: 0}), 400, f"{field}: Input should be greater than or equal to 1", field)


def test_tokens_of_a_request_that_names_none(opened, answered):
    made = server(opened, tokens=40, default_tokens=11)
    for more in (
        {},
        {"max_tokens": None, "max_completion_tokens": None},
        {"max_tokens": 3},
        {"max_tokens": 3, "max_completion_tokens": 4},
    ):
        assert call(made, ask(**more))[0] == 200
    assert [limit for _, limit, _ in answered.calls] == [11, 11, 3, 4]


def test_context(opened, answered):
    made = server(opened)
    assert made.context == opened[0].hf.config.text_config.max_position_embeddings
    call(made, ask(max_tokens=1))
    length = len(answered.calls[0][0][0][0])
    made.context = length + 20
    assert call(made, ask(max_tokens=20))[0] == 200
    refused(
        made,
        ask(max_tokens=21),
        400,
        f"messages: {length} tokens and 21 new ones, the model's context is {length + 20}",
        "messages",
    )


def test_a_body_takes_no_place_before_it_is_here(opened, answered):
    made, seen = server(opened), []
    real = made.body

    async def body(request, job, keep=True):
        seen.append(made.places)
        return await real(request, job, keep)

    made.body = body
    assert call(made, ask())[0] == 200 and seen == [0] and made.places == 0


def test_places(opened, answered):
    made = server(opened, queue=3)
    made.places = 2
    assert call(made, ask())[0] == 200 and made.places == 2
    made.places = 3
    status, reply, headers = call(made, ask())
    assert status == 503 and headers["retry-after"] == "1" and made.places == 3
    assert reply["error"] == {
        "message": "all 3 places are taken; try again",
        "type": "server_error",
        "param": None,
        "code": 503,
    }


def test_what_large_pictures_take_is_held_until_they_are_answered(opened, answered):
    """A large one waits for its share of twice --pixels; a small one, below a 32nd, takes none."""
    made, held = server(opened, pixels=32 * 56 * 56), []
    made.engine.submit = lambda job: (held.append((job.pixels, made.decoded.held)), made.engine.answer([job]))
    for stream in (False, True):
        call(made, ask(picture(link(56, 56)), stream=stream))
        call(made, ask(picture(link(56, 57)), stream=stream))
        call(made, ask(picture(link(56, 57)), n=2))
        assert made.decoded.held == 0 and made.places == 0
    assert held == [(0, 0), (3192, 3192)] * 2 and made.decoded.total == 2 * 32 * 3136
    # What the model's own bound on pixels scales away is given back before.
    made.limits.pixels = 10**6
    call(made, ask(picture(link(400, 400))))
    assert 0 < held[-1][0] < 160_000 and held[-1][0] == held[-1][1]


def test_characters(opened, answered, monkeypatch):
    """Of all texts together, asked for before the tokenizer sees any of them."""
    talk = [
        {"role": "system", "content": "x" * 30},
        {"role": "user", "content": [{"type": "text", "text": "é" * 20}] * 2},
    ]
    assert call(server(opened, characters=70), ask() | {"messages": talk})[0] == 200
    made = server(opened, characters=69)
    monkeypatch.setattr(made.engine, "prepare", None)
    line = "messages: 70 characters, at most 69 are allowed"
    refused(made, ask() | {"messages": talk}, 400, line, "messages")


def test_characters_are_no_more_than_the_context_holds(opened, answered):
    """Fewer tokens than one for each length of the longest token there cannot be."""
    longest = max(len(token) for token in opened[0].tokenizer.get_vocab())
    made = server(opened)
    assert made.bounds.characters == longest * made.context < 200_000
    assert server(opened, characters=50).bounds.characters == 50
    most = longest * made.context
    line = f"messages: {most + 1} characters, at most {most} are allowed"
    refused(made, ask("x" * (most + 1)), 400, line, "messages")


def test_messages_and_images_are_no_more_than_the_context_holds(opened, answered):
    made = server(opened)
    made.context = 40
    talk = lambda n: ask() | {"messages": [{"role": "user", "content": ""}] * n}
    assert call(made, talk(40))[1]["error"]["message"].startswith("messages: ") and not answered.calls
    refused(made, talk(41), 400, "messages: 41 messages and images, the model's context is 40", "messages")


def test_brackets_and_commas_are_counted_before_the_json_is_read(opened, monkeypatch):
    """Each empty object would be a dozen errors; what stands in a text counts too."""
    body = json.dumps(ask("{," * 3000)).encode()
    assert sum(body.count(sign) for sign in (b"{", b"[", b",")) == 6005
    parse(body, Limits(characters=6005 - 10_000))
    monkeypatch.setattr(chat.ChatRequest, "model_validate_json", None)
    with pytest.raises(Refusal, match="^6005 brackets and commas, at most 6004 are allowed$"):
        parse(body, Limits(characters=6004 - 10_000))
    with pytest.raises(Refusal, match="^50000 brackets and commas, at most 10001 are allowed$"):
        parse(b"{}" * 50_000, Limits(characters=1))


def test_no_image_is_decoded_where_their_sum_is_too_large(opened, monkeypatch):
    """Sixteen of 49 million pixels in a few bytes: their heads alone are read."""
    file = io.BytesIO()
    Image.new("1", (700, 70)).save(file, "PNG")
    for kind in (Image.Image, ImageFile.ImageFile):
        monkeypatch.setattr(kind, "load", None)
    monkeypatch.setattr(chat, "rgb", None)
    files = [(file.getvalue(), f"at {n}") for n in range(16)]
    assert pixels_of(files[:10], Limits(pixels=490_000)) == 490_000
    with pytest.raises(Refusal, match="^at 10: 700 x 70 pixels, 539000 with those before it, at most 490000"):
        pixels_of(files, Limits(pixels=490_000))


def test_an_image_is_decoded_when_the_one_before_is_done_with(opened):
    """The same tensors as from all at once; and where their tokens do not fit, the rest is not decoded."""
    model, fmt = opened
    made, order, sizes = engine.Engine(model, fmt, "keep", 1), [], [(56, 56), (84, 56), (56, 140)]
    real = model.image_processor.processor
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]

    def decoded():
        for n, image in enumerate(pictures):
            order.append(f"decoded {n}")
            yield image

    counted = lambda images, **how: order.append(f"made {len(images)}") or real(images=images, **how)
    model.image_processor.processor = counted
    counted.merge_size, counted.size = real.merge_size, real.size
    try:
        asked = made.prepare([("user", ["", "", "", "?"])], decoded())
        assert order == ["decoded 0", "made 1", "decoded 1", "made 1", "decoded 2", "made 1"]
        together = real(images=pictures, return_tensors="pt")
        assert torch.equal(asked.pixel_values, together["pixel_values"])
        assert torch.equal(asked.image_grid_thw, together["image_grid_thw"])
        order.clear()
        with pytest.raises(ValueError, match="the images take 10 tokens and more, 9 fit the context"):
            made.prepare([("user", ["", "", "", "?"])], decoded(), 9)
        assert order == ["decoded 0", "made 1", "decoded 1", "made 1"]
    finally:
        model.image_processor.processor = real


def test_what_is_large_is_made_ready_by_a_thread_of_its_own(opened, answered):
    """Long texts, large pictures and large bodies, each above a 32nd of what is allowed."""
    made, rooms = server(opened, characters=3200, pixels=32 * 56 * 56, body=320_000), []
    real = made.rooms.run

    async def run(large, work, *args):
        rooms.append((work.__name__, large))
        return await real(large, work, *args)

    made.rooms.run = run
    for content in ("x" * 100, "x" * 101, picture(link(56, 56)), picture(link(56, 57))):
        assert call(made, ask(content))[0] == 200
    assert call(made, json.dumps(ask()).encode() + b" " * 10_000)[0] == 200
    assert [large for work, large in rooms if work == "prepare"] == [False, True, False, True, False]
    assert [large for work, large in rooms if work == "read"] == [False] * 4 + [True]
    assert made.bodies.held == 0 and made.bodies.total == 4 * 320_000


def test_long_prompts_have_a_reader_of_their_own(opened):
    """A short one does not wait for its lock."""
    made = engine.Engine(*opened, "keep", 1)
    with made.readers[True][1]:
        made.prepare([("user", ["?"])], [])
    with made.readers[False][1]:
        made.prepare([("user", ["?"])], [], large=True)


def jobs_of(*limits):
    return [engine.Job(False, None, prompt=([1],), limit=limit) for limit in limits]


def waiting(opened, jobs, batch=3):
    made = engine.Engine(*opened, "keep", batch)
    made.jobs = list(jobs)
    return made


def test_a_batch_is_of_so_many_of_equal_limits_oldest_first(opened):
    """Those of the lower limit begin; of them the oldest."""
    jobs = jobs_of(4, 5, 4, 4, 5, 4)
    made = waiting(opened, jobs)
    assert made.next_batch() == [jobs[0], jobs[2], jobs[3]] and made.jobs == [jobs[1], jobs[4], jobs[5]]
    assert made.next_batch() == [jobs[5]] and made.next_batch() == [jobs[1], jobs[4]] and made.jobs == []
    jobs = jobs_of(4, 4, 4)
    jobs[0].gone = True  # nobody waits for it
    made = waiting(opened, jobs, 1)
    assert made.next_batch() == [jobs[1]] and made.jobs == [jobs[2]]
    made.stop()
    assert made.next_batch() is None


def test_a_batch_waits_a_moment_for_others(opened, monkeypatch):
    """Not for long, and not at all once it is full."""
    made, kept = waiting(opened, jobs_of(4, 4), 3), []
    real = made.ready.wait_for
    monkeypatch.setattr(
        made.ready,
        "wait_for",
        lambda ready, *seconds: kept.append((bool(ready()), *seconds)) or real(ready, *seconds),
    )
    made.next_batch()
    assert kept == [(True,), (False, 0.01)]
    made.jobs = jobs_of(4, 4, 4)
    made.next_batch()
    assert kept[2:] == [(True,), (True, 0.01)]


# --- fields ---


@pytest.mark.parametrize(
    "field, good, bad",
    [
        ("temperature", [0, 0.0, None], [1e-6, -1e-6, 1]),
        ("n", [1, None], [0, 2]),
        ("presence_penalty", [0, None], [0.1, -0.1]),
        ("frequency_penalty", [0, None], [0.1, -0.1]),
        ("repetition_penalty", [1, 1.0, None], [1.05, 0.95]),
        ("top_p", [0.2, 1, None], ["x"]),
        ("top_k", [1, 40, None], [1.5]),
        ("seed", [7, None], ["x"]),
        ("user", ["me", None], [3]),
        ("stream", [False, None], ["x"]),
        (
            "stream_options",
            [None, {}, {"include_usage": True}, {"include_usage": None}, {"include_obfuscation": False}],
            [{"include": True}, {"include_obfuscation": True}],
        ),
        ("stop", [None, [], ["\n", "END"], ["x" * 200], ["x"] * 16], [["x" * 201], [""], ["x"] * 17, [1], 1]),
        ("max_tokens", [1, None], [0, -1, 1.5]),
    ],
)
def test_values_of_a_field(field, good, bad):
    for value in good:
        taken = parse(json.dumps(ask(**{field: value})).encode()).model_dump()[field]
        filled = {"include_usage": False, "include_obfuscation": None}
        assert taken == (filled | value if isinstance(value, dict) else value)
    for value in bad:
        with pytest.raises(Refusal) as error:
            parse(json.dumps(ask(**{field: value})).encode())
        assert error.value.status == 400 and error.value.param.startswith(field)
        greedy = field in ("temperature", "n") or field.endswith("_penalty")
        assert error.value.message.endswith("; this server answers greedily") == greedy


@pytest.mark.parametrize(
    "field, harmless, others",
    [
        ("audio", [], [{"voice": "x", "format": "mp3"}]),
        ("function_call", ["none", "auto"], [{"name": "f"}]),
        ("functions", [[]], [[{"name": "f"}]]),
        ("logit_bias", [{}], [{"7": 100}, []]),
        ("logprobs", [False], [True, 0]),
        ("modalities", [["text"]], [["text", "audio"], []]),
        ("moderation", [], [{"model": "m"}]),
        ("prediction", [], [{"type": "content", "content": "x"}]),
        ("reasoning_effort", [], ["high"]),
        ("response_format", [{"type": "text"}], [{"type": "json_object"}, "text"]),
        ("store", [False], [True]),
        ("tool_choice", ["none", "auto"], ["required"]),
        ("tools", [[]], [[{"type": "function", "function": {"name": "f"}}]]),
        ("top_logprobs", [0], [3, False]),
        ("verbosity", ["medium"], ["low"]),
        ("web_search_options", [], [{}]),
    ],
)
def test_a_field_that_would_change_the_answer_is_taken_only_where_it_does_not(field, harmless, others):
    for value in (None, *harmless):
        parse(json.dumps(ask(**{field: value})).encode())
    for value in others:
        with pytest.raises(Refusal, match=f"^{field}: not supported by this server, which takes nu") as error:
            parse(json.dumps(ask(**{field: value})).encode())
        assert error.value.param == field and error.value.status == 400


@pytest.mark.parametrize(
    "field, value",
    [
        ("metadata", {"a": "b"}), ("parallel_tool_calls", True), ("prompt_cache_key", "k"),
        ("prompt_cache_options", {"a": 1}), ("prompt_cache_retention", "24h"), ("safety_identifier", "s"),
        ("service_tier", "auto"),
    ],
)
def test_a_field_that_changes_no_answer_is_taken(field, value):
    for given in (value, None):
        parse(json.dumps(ask(**{field: given})).encode())


def test_every_field_of_the_official_client_is_known():
    """As null and in its type hints; what it lacks (top_k, repetition_penalty) is what other servers take."""
    params = pytest.importorskip("openai").types.chat.completion_create_params
    fields = [*params.CompletionCreateParamsBase.__annotations__, "stream"]
    assert len(fields) > 30 and not set(fields) - set(chat.ChatRequest.model_fields)
    parse(json.dumps(dict.fromkeys(fields) | ask()).encode())


def test_a_field_that_nobody_knows_is_refused():
    for field in ("best_of", "min_p"):
        with pytest.raises(Refusal, match=f"^{field}: not known to this server$") as error:
            parse(json.dumps(ask(**{field: None})).encode())
        assert error.value.param == field


def test_an_answer_may_be_sent_back_as_it_came():
    """With the empty fields that the client's own objects have; one that holds something is named."""
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    talk = lambda **more: [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", **empty, **more},
        {"role": "user", "content": "c"},
    ]
    turns, _ = turns_of(parse(json.dumps(ask() | {"messages": talk()}).encode()).messages, Limits())
    assert turns == [("system", ["be brief"]), ("user", ["a"]), ("assistant", ["b"]), ("user", ["c"])]
    for field, value in (("refusal", "no"), ("tool_calls", [{"id": "1"}]), ("audio", {"id": "1"})):
        with pytest.raises(Refusal, match=f"^messages.2.{field}: not supported by this server"):
            parse(json.dumps(ask() | {"messages": talk(**{field: value})}).encode())


def test_fields_of_a_message():
    talk = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "name": "me",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": picture("L1", "L2")},
    ]
    turns, urls = turns_of(parse(json.dumps(ask() | {"messages": talk}).encode()).messages, Limits())
    assert turns == [
        ("system", ["be brief"]), ("user", ["ab"]), ("assistant", ["c"]), ("user", ["", "", "What?"]),
    ]
    assert urls == [
        ("L1", "messages.3.content.0.image_url.url"),
        ("L2", "messages.3.content.1.image_url.url"),
    ]
    detailed = [{"type": "image_url", "image_url": {"url": "L", "detail": "high"}}]
    assert turns_of(parse(json.dumps(ask(detailed)).encode()).messages, Limits())[1] == [
        ("L", "messages.0.content.0.image_url.url")
    ]


def test_the_model_gets_the_whole_conversation(opened, answered):
    """Roles, texts and pictures in their order; which picture is which is seen in the pixels."""
    model, fmt = opened
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": picture(link(56, 56, (255, 255, 255)), link(56, 84, (0, 0, 0)))},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
    ]
    assert call(server(opened), ask() | {"messages": talk})[0] == 200
    ((ids, pixels, grid),) = answered.calls[0][0]
    text = model.tokenizer.decode(ids)
    places = [
        text.index(x)
        for x in ("system", "Be brief.", "user", "<|image_pad|>", "What?", "assistant", "Two.", "Sure?")
    ]
    assert places == sorted(places) and text.rstrip().endswith("assistant")
    white, black = pixels[: int(grid[0].prod())], pixels[int(grid[0].prod()) :]
    assert grid.prod(1).tolist() == [16, 24] and white.min() > 1 and black.max() < -1
    assert ids.count(fmt.image) == (16 + 24) // 4


@pytest.mark.parametrize("latents", ["keep", "drop"])
def test_latents_are_in_the_prompt_or_left_out(setup, answered, latents):
    s = setup(dtype=torch.float32)
    made = server((s.model, s.fmt), latents)
    assert call(made, ask())[0] == 200
    ((prompts, _, told),) = answered.calls
    assert [token for token in prompts[0][0] if token in s.fmt.latents] == (
        s.fmt.latents if latents == "keep" else []
    )
    assert told == latents


def test_each_copy_of_an_image_is_prepared(opened):
    class Twice(Format):
        copies = 2

    model, _ = opened
    made = engine.Engine(model, Twice(model.tokenizer), "keep", 1)
    ids, _, grid = made.prepare(
        [("user", ["", "", "?"])], [Image.new("RGB", (56, 56)), Image.new("RGB", (56, 84))]
    )
    assert grid.prod(1).tolist() == [16, 16, 24, 24] and ids.count(made.fmt.image) == 20


# --- answers ---


def test_an_answer_in_full(opened, answered, monkeypatch):
    monkeypatch.setattr(endpoint.time, "time", lambda: 1234.5)
    status, reply, _ = call(server(opened), ask(max_tokens=3))
    prompt = len(answered.calls[0][0][0][0])
    assert reply.pop("id").startswith("chatcmpl-") and status == 200
    assert reply == {
        "created": 1234,
        "model": "small",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "fine"},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": 3, "total_tokens": prompt + 3},
    }


@pytest.mark.parametrize(
    "said, limit, tokens, finish",
    [
        ([5, 6, 7], 4, 3, "stop"), ([5, 6, 7], 3, 3, "length"), ([5, 6, "end"], 3, 3, "stop"),
        ([5, "end", 0, 0], 9, 2, "stop"),
    ],
)
def test_why_an_answer_ended(opened, answered, said, limit, tokens, finish):
    """At its limit without its end it is cut; what pads it beside longer ones is no token of its own."""
    answered.tokens = [opened[1].end if token == "end" else token for token in said]
    reply = call(server(opened), ask(max_tokens=limit))[1]
    assert reply["choices"][0]["finish_reason"] == finish and reply["usage"]["completion_tokens"] == tokens


def test_tokens_that_were_not_told_are_counted_by_the_text(opened, answered):
    answered.tokens, answered.text = [], "fine words"
    reply = call(server(opened), ask(max_tokens=50))[1]
    assert reply["usage"]["completion_tokens"] == len(opened[1].text("fine words")) > 1


@pytest.mark.parametrize("usage", [True, False, None])
def test_a_stream_in_full(opened, answered, monkeypatch, usage):
    model, fmt = opened
    words = fmt.text("red and blue")
    answered.tokens, answered.text = [*words, fmt.end], "red and blue"
    monkeypatch.setattr(endpoint.time, "time", lambda: 99.9)
    options = {} if usage is None else {"stream_options": {"include_usage": usage}}
    status, text, headers = call(server(opened), ask(stream=True, max_tokens=50, **options))
    assert (
        status == 200
        and headers["content-type"].startswith("text/event-stream")
        and headers["cache-control"] == "no-store"
    )
    events = [line.removeprefix("data: ") for line in text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""] and all(
        line.startswith("data: ") for line in text.split("\n\n")[:-1]
    )
    chunks = [json.loads(event) for event in events[:-2]]
    prompt = len(answered.calls[0][0][0][0])
    expected = {
        "prompt_tokens": prompt,
        "completion_tokens": len(words) + 1,
        "total_tokens": prompt + len(words) + 1,
    }
    for chunk in chunks:
        assert (
            chunk["object"] == "chat.completion.chunk"
            and chunk["created"] == 99
            and chunk["model"] == "small"
            and chunk["id"] == chunks[0]["id"]
        )
    if usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"] == expected
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"] for chunk in chunks]
    assert choices[0] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert choices[-1] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert (
        "".join(choice[0]["delta"]["content"] for choice in choices[1:-1]) == "red and blue"
        and len(choices) > 3
    )


def test_a_stream_holds_back_half_a_character(opened, answered):
    """A letter of several tokens is sent when it is whole."""
    model, fmt = opened
    pieces = fmt.text("é☃")
    assert len(pieces) > 2
    answered.tokens, answered.text = pieces, "é☃"
    _, text, _ = call(server(opened), ask(stream=True, max_tokens=50))
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    told = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-1]]
    assert "".join(told) == "é☃" and "\ufffd" not in "".join(told)


def test_models_and_health_in_full(opened, monkeypatch):
    monkeypatch.setattr(endpoint.time, "time", lambda: 77.7)
    made = server(opened, queue=5)
    made.places = 2
    assert call(made, b"", "/v1/models", "GET")[:2] == (
        200,
        {
            "object": "list",
            "data": [{"id": "small", "object": "model", "created": 77, "owned_by": "crystal"}],
        },
    )
    status, reply, _ = call(made, b"", "/health", "GET")
    assert (status, reply) == (
        500,
        {"status": "the model's thread has ended", "model": "small", "places_taken": 2, "places": 5},
    )
    monkeypatch.setattr(made.engine, "is_alive", lambda: True)
    assert call(made, b"", "/health", "GET")[:2] == (
        200,
        {"status": "ok", "model": "small", "places_taken": 2, "places": 5},
    )


# --- who may ask ---


@pytest.mark.parametrize(
    "host, fine",
    [
        ("127.0.0.1:8000", True), ("127.0.0.1", True), ("localhost:1", True), ("[::1]:8000", True),
        ("evil.example:8000", False), ("127.0.0.1.evil.example", False), ("", False),
    ],
)
def test_hosts(opened, answered, host, fine):
    made = server(opened, hosts=("127.0.0.1", "localhost", "[::1]"))
    status, reply, _ = call(made, ask(), headers=JSON | {"host": host})
    assert status == (200 if fine else 403)
    if not fine:
        assert reply["error"]["message"].endswith(": this server answers to 127.0.0.1, localhost, [::1]")
    # Where all may come.
    assert call(server(opened, hosts=()), ask(), headers=JSON | {"host": host})[0] == 200


@pytest.mark.parametrize(
    "given, fine",
    [
        ("Bearer secret", True), ("Bearer secret ", False), ("Bearer secre", False),
        ("Bearer secrets", False), ("", False), ("Basic secret", False),
    ],
)
def test_keys(opened, answered, given, fine):
    made = server(opened, key="secret")
    for path, method, body in (("/v1/chat/completions", "POST", ask()), ("/v1/models", "GET", b"")):
        status, reply, headers = call(
            made, body, path, method, JSON | ({"authorization": given} if given else {})
        )
        assert status == (200 if fine else 401)
        if not fine:
            assert (
                headers["www-authenticate"] == "Bearer"
                and reply["error"]["message"] == "wrong or missing API key (Authorization: Bearer ...)"
            )


@pytest.mark.parametrize(
    "kind, fine",
    [
        ("application/json", True),
        ("application/json; charset=utf-8", True),
        ("text/plain", False),
        ("application/jsonp", False),
        ("", False),
    ],
)
def test_content_types(opened, answered, kind, fine):
    status, reply, _ = call(server(opened), ask(), headers=JSON | {"content-type": kind})
    assert status == (200 if fine else 415)
    assert fine or reply["error"]["message"] == "content-type must be application/json"


def test_one_model_by_its_name(opened, monkeypatch):
    monkeypatch.setattr(endpoint.time, "time", lambda: 77.7)
    made = serve.Server(*opened, "a/b", Limits())
    described = {"id": "a/b", "object": "model", "created": 77, "owned_by": "crystal"}
    assert call(made, b"", "/v1/models/a/b", "GET")[:2] == (200, described)
    status, reply, _ = call(made, b"", "/v1/models/b", "GET")
    assert status == 404 and reply["error"]["message"] == "model: no 'b' here, this server has 'a/b'"
    guarded = serve.Server(*opened, "small", Limits(), key="secret")
    assert call(guarded, b"", "/v1/models/small", "GET")[0] == 401


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer(opened, answered, stream):
    """Given alone or in a list; what stands before it is the answer, and its tokens are counted to it."""
    words = opened[1].text("red and blue")
    answered.tokens, answered.text = words, "red and blue"
    upto = next(n for n in range(len(words)) if " and" in opened[0].tokenizer.decode(words[:n]))
    for stop in (" and", ["zebra", " and", "blue"]):
        options = {"stream": stream, "stream_options": {"include_usage": True}} if stream else {}
        _, reply, _ = call(server(opened), ask(stop=stop, max_tokens=50, **options))
        if stream:
            chunks = [json.loads(line.removeprefix("data: ")) for line in reply.split("\n\n")[:-2]]
            deltas = [choice["delta"].get("content", "") for c in chunks for choice in c["choices"]]
            assert "".join(deltas) == "red"
            assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
            assert chunks[-1]["usage"]["completion_tokens"] == upto
        else:
            choice = reply["choices"][0]
            assert choice["message"]["content"] == "red" and choice["finish_reason"] == "stop"
            assert reply["usage"]["completion_tokens"] == upto
    whole = call(server(opened), ask(stop=["zebra"], max_tokens=50))[1]
    assert whole["choices"][0]["message"]["content"] == "red and blue"


def test_another_model_is_not_here(opened, answered):
    refused(
        server(opened),
        ask() | {"model": "large"},
        404,
        "model: no 'large' here, this server has 'small'",
        "model",
    )


@pytest.mark.parametrize(
    "status, kind, headers",
    [
        (400, "invalid_request_error", {}),
        (404, "invalid_request_error", {}),
        (499, "invalid_request_error", {}),
        (500, "server_error", {}),
        (503, "server_error", {"retry-after": "1"}),
        (401, "invalid_request_error", {"www-authenticate": "Bearer"}),
    ],
)
def test_a_refusal_on_the_wire(status, kind, headers):
    response = Refusal(status, "two\n lines", "field").response()
    assert response.status_code == status and json.loads(response.body) == {
        "error": {"message": "two lines", "type": kind, "param": "field", "code": status}
    }
    assert {n: v for n, v in response.headers.items() if n in ("retry-after", "www-authenticate")} == headers


# --- pictures ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats_that_are_taken(kind):
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 40, 90)).save(file, kind)
    image = image_of(file.getvalue(), "here")
    assert image.size == (6, 4) and image.mode == "RGB"
    assert max(abs(a - b) for a, b in zip(image.getpixel((3, 2)), (200, 40, 90))) < 12


def written():
    """{format: a file of it} of all that Pillow can write here."""
    Image.init()
    files = {}
    for kind in sorted(set(Image.SAVE) - {"IM"}):  # which Pillow says it will drop
        file = io.BytesIO()
        with contextlib.suppress(OSError, ValueError, KeyError, ImportError, NotImplementedError):
            Image.new("RGB", (16, 12), (200, 40, 90)).save(file, kind)
            files[kind] = file.getvalue()
    return files


def test_no_other_format_is_opened_whatever_a_client_calls_it(opened, answered, monkeypatch):
    """Of all that Pillow knows (an EPS would start ghostscript): refused by the head, under any name."""
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **how: ran.append(args))
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)
    files = written()
    encoded = lambda kind: base64.b64encode(files[kind]).decode()
    others = set(files) - {"PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "MPO"}  # the last two are BMP and JPEG
    assert {"EPS", "TIFF", "PPM", "TGA", "ICO", "PCX"} <= others
    made = server(opened)
    for kind in others:
        for name in ("png", "jpeg", kind.lower(), "svg+xml"):
            status, reply, _ = call(made, ask(picture(f"data:image/{name};base64,{encoded(kind)}")))
            assert status == 400 and "not a readable image" in reply["error"]["message"], kind
    assert not ran and not answered.calls


def test_of_an_animation_the_first_picture_counts():
    file = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert image_of(file.getvalue(), "here").getpixel((1, 1)) == (255, 0, 0)


# --- the command ---


@pytest.fixture
def started(opened, monkeypatch):
    """serve.main without a network: what it opens, makes and runs, by name."""
    kept = {}

    class Served(serve.Server):
        def __init__(self, *args):
            kept["server"] = args[2:]
            super().__init__(*args)
            self.engine.start, self.engine.join = lambda: None, lambda: None

    class Runner(serve.Runner):
        def __init__(self, app, limits):
            super().__init__(app, limits)
            kept["config"] = {
                "log_level": self.config.log_level,
                "graceful": self.config.timeout_graceful_shutdown,
                "lifespan": self.config.lifespan,
                "ws": self.config.ws,
                "backlog": self.config.backlog,
            }

        def run(self, sockets):
            kept["sockets"] = [s.getsockname()[:2] for s in sockets]
            for sock in sockets:
                sock.close()

    def open_model(name, which, device, **how):
        kept["opened"] = (name, which, str(device), how)
        return *opened, None

    monkeypatch.setattr(serve, "Server", Served)
    monkeypatch.setattr(serve, "Runner", Runner)
    monkeypatch.setattr(serve, "open_model", open_model)
    monkeypatch.setattr(serve.signal, "signal", lambda *args: None)
    monkeypatch.delenv(serve.KEY, raising=False)
    return kept


def test_the_command_at_its_defaults(started, capsys):
    serve.main(["--port", "0", "--device", "cpu"])
    name, limits, latents, key, hosts = started["server"]
    assert (
        (name, latents, key) == ("tiny", "keep", None)
        and limits == Limits()
        and set(hosts) == {"127.0.0.1", "localhost", "[::1]"}
    )
    assert started["opened"] == (
        "tiny",
        "best",
        "cpu",
        {"min_pixels": None, "max_pixels": None, "method": "", "trust_method": False},
    )
    assert started["config"] == {
        "log_level": "warning",
        "graceful": 30,
        "lifespan": "off",
        "ws": "none",
        "backlog": 64,
    }
    ((host, port),) = started["sockets"]
    assert (
        host == "127.0.0.1"
        and port > 0
        and capsys.readouterr().out
        == f"serving tiny at http://127.0.0.1:{port}/v1 (stop with Ctrl-C)\nstopped\n"
    )


def test_each_flag_of_the_command(started, monkeypatch, capsys):
    monkeypatch.setenv(serve.KEY, "secret")
    serve.main(
        [
            "--model", "some/where", "--checkpoint", "3", "--device", "cpu", "--min_pixels", "11",
            "--max_pixels", "12", "--method", "m.py", "--trust_method", "--host", "0.0.0.0", "--port", "0",
            "--latents", "drop", "--body", "101", "--characters", "102", "--images", "0", "--pixels", "103",
            "--tokens", "104", "--default_tokens", "105", "--queue", "106", "--batch", "107",
        ]
    )
    name, limits, latents, key, hosts = started["server"]
    # A key keeps others out, whatever the name they come by.
    assert (name, latents, key, hosts) == ("where", "drop", "secret", ())
    # What a request gets that names no number is no more than it may name.
    assert limits == Limits(
        body=101, characters=102, images=0, pixels=103, tokens=104, default_tokens=104, queue=106, batch=107
    )
    assert started["opened"] == (
        "some/where",
        "3",
        "cpu",
        {"min_pixels": 11, "max_pixels": 12, "method": "m.py", "trust_method": True},
    )
    serve.main(["--port", "0", "--device", "cpu", "--name", "mine", "--default_tokens", "7"])
    assert started["server"][0] == "mine" and started["server"][1] == Limits(default_tokens=7)
    assert "serving mine at" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["body", "characters", "pixels", "tokens", "default_tokens", "queue", "batch", "images"]
)
def test_limits_of_the_command_begin_at_one(started, name):
    """A server without pictures is one of limit 0; every other limit of 0 would refuse all."""
    if name == "images":
        serve.main(["--port", "0", "--device", "cpu", "--images", "0"])
        assert started["server"][1].images == 0
        with pytest.raises(UserError, match="^--images -1: must not be negative$"):
            serve.main(["--port", "0", "--device", "cpu", "--images", "-1"])
        return
    serve.main(["--port", "0", "--device", "cpu", f"--{name}", "1"])
    assert getattr(started["server"][1], name) == 1
    with pytest.raises(UserError, match=f"^--{name} 0: must be at least 1$"):
        serve.main(["--port", "0", "--device", "cpu", f"--{name}", "0"])


@pytest.mark.parametrize(
    "host, status",
    [
        ("[::1]", 200), ("[::1]:8000", 200), ("127.0.0.1", 200), ("localhost:1", 200), ("LocalHost", 200),
        ("[::1", 403), ("[::1]x", 403), ("evil.example:8000", 403), ("::1", 403), ("localhost:x", 403),
        ("", 403), ("127.0.0.1.evil.example", 403),
    ],
)
def test_host_names_with_and_without_a_port(opened, answered, host, status):
    made = server(opened, hosts=("127.0.0.1", "localhost", "[::1]"))
    assert call(made, ask(), headers=JSON | {"host": host})[0] == status


def test_an_address_in_the_brackets_of_a_url():
    for host in ("::1", "[::1]"):
        try:
            sock = serve.listen(host, 0)
        except UserError:
            pytest.skip("no IPv6 here")
        assert sock.getsockname()[0] == "::1"
        sock.close()


@pytest.mark.parametrize(
    "address, local",
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::1%lo", True), ("0.0.0.0", False),
        ("::", False), ("192.168.1.4", False), ("fe80::1%eth0", False),
    ],
)
def test_which_addresses_are_this_machines(address, local):
    assert serve.is_loopback(address) == local


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports(port):
    with pytest.raises(UserError, match=f"--port {port}: from 0 to 65535"):
        serve.listen("127.0.0.1", port)
