"""The endpoints of one model in OpenAI's format, as an ASGI application.

What a request may say is chat.py's; a request is made ready in a thread (rooms.py), answered by the engine
(engine.py), and gives back what it held however it ends.
"""

import asyncio
import hmac
import json
import re
import time
import uuid
from dataclasses import replace

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from crystal.serving.chat import Refusal, file_of, image_of, parse, pixels_of, turns_of
from crystal.serving.engine import Engine, Job
from crystal.serving.rooms import SMALL, Rooms, Share


class Server:
    """The endpoints of one model. `app` is an ASGI application; start the engine before it takes requests."""

    def __init__(self, model, fmt, name, limits, latents="keep", key=None, hosts=()):
        self.name, self.limits, self.key, self.hosts, self.places = name, limits, key, hosts, 0
        self.engine = Engine(model, fmt, latents, limits.batch)
        self.context = model.hf.config.get_text_config().max_position_embeddings
        # No text has fewer tokens than it has pieces of the longest token's length.
        longest = max(map(len, model.tokenizer.get_vocab()))
        self.bounds = replace(limits, characters=min(limits.characters, longest * self.context))
        # Bodies and pictures are what is large: of each so much is held at once. Small ones, which the number
        # of places bounds, wait for none.
        self.rooms = Rooms()
        self.bodies, self.decoded = Share(4 * limits.body), Share(2 * limits.pixels)
        self.created = int(time.time())
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.guarded(self.models)),
            Route("/v1/models/{model:path}", self.guarded(self.one_model)),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
        ]
        self.app = Starlette(
            routes=routes,
            exception_handlers={
                Refusal: lambda request, error: error.response(),
                HTTPException: lambda request, error: Refusal(
                    error.status_code, f"{request.method} {request.url.path}: {error.detail}"
                ).response(),
                Exception: lambda request, error: Refusal(
                    500, f"internal error: {type(error).__name__}"
                ).response(),
            },
        )

    async def health(self, request):
        alive = self.engine.is_alive()
        return JSONResponse(
            {
                "status": "ok" if alive else "the model's thread has ended",
                "model": self.name,
                "places_taken": self.places,
                "places": self.limits.queue,
            },
            200 if alive else 500,
        )

    def guarded(self, endpoint):
        """The endpoint, for those who may ask: the right host name and, where there is a key, the key."""

        async def guard(request):
            host = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
            # A web page whose name was pointed at this machine must not ask.
            if self.hosts and host not in self.hosts:
                raise Refusal(403, f"host {host!r}: this server answers to {', '.join(self.hosts)}")
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
                raise Refusal(401, "wrong or missing API key (Authorization: Bearer ...)")
            return await endpoint(request)

        return guard

    def described(self):
        """The model as OpenAI's format describes one."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "crystal"}

    def named(self, model):
        """Refusal unless the model that a client names is this server's."""
        if model != self.name:
            raise Refusal(404, f"model: no {model!r} here, this server has {self.name!r}", "model")

    async def models(self, request):
        return JSONResponse({"object": "list", "data": [self.described()]})

    async def one_model(self, request):
        self.named(request.path_params["model"])
        return JSONResponse(self.described())

    async def chat(self, request):
        job = Job(False, asyncio.get_running_loop())
        response = None
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                await self.body(request, job, keep=False)
                # A web page may send others to any address unasked.
                raise Refusal(415, "content-type must be application/json")
            # Who has sent nothing yet takes no place from those who have.
            body = await self.body(request, job)
            if self.places >= self.limits.queue:
                raise Refusal(503, f"all {self.limits.queue} places are taken; try again")
            self.places += 1
            job.placed = True

            turns, files, pixels, usage = await self.rooms.run(job.bytes > 0, self.read, body, job)
            if pixels > self.limits.pixels // SMALL:
                await self.decoded.take(pixels)
                job.pixels = pixels
            if await request.is_disconnected():
                raise Refusal(499, "the client hung up")

            # Decoding a picture must not stop the others.
            written = sum(len(text) for _, texts in turns for text in texts)
            large = bool(job.pixels) or written > self.bounds.characters // SMALL
            job.prompt = await self.rooms.run(large, self.prepare, turns, files, job.limit, large)
            del body, files
            self.keep(job)
            self.engine.submit(job)
            head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
            if job.stream:
                response = Stream(self.chunks(job, head, usage), lambda: self.leave(job))
                return response
            async for kind, value in self.events(job, request):
                if kind == "failed":
                    raise Refusal(500, value)
                if kind == "done":
                    choice = {
                        "index": 0,
                        "message": {"role": "assistant", "content": value.text},
                        "logprobs": None,
                        "finish_reason": value.finish,
                    }
                    return JSONResponse(
                        {
                            **head,
                            "object": "chat.completion",
                            "choices": [choice],
                            "usage": usage_of(job, value),
                        }
                    )
            raise Refusal(499, "the client hung up")
        finally:
            if response is None:  # a stream leaves when it ends
                self.leave(job)

    def keep(self, job):
        """Gives back what a request that is made ready needs no more: its body, and pixels scaled away."""
        self.bodies.give(job.bytes)
        needed = 0 if job.prompt[1] is None else min(job.pixels, job.prompt[1].numel() // 3)
        self.decoded.give(job.pixels - needed)
        job.bytes, job.pixels = 0, needed

    def leave(self, job):
        """Gives back all that a request holds, however it ended."""
        if job.placed:
            self.places -= 1
        job.gone = True
        self.bodies.give(job.bytes)
        self.decoded.give(job.pixels)

    async def body(self, request, job, keep=True):
        """A request's body, bounded in bytes and time. What is too much is read and dropped, so that the
        client gets to read why.
        """
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    # A body that is becoming large waits until there is room for all of it.
                    if keep and not job.bytes and self.limits.body // SMALL < size <= self.limits.body:
                        await self.bodies.take(self.limits.body)
                        job.bytes = self.limits.body
                    if keep and size <= self.limits.body:
                        parts.append(part)
                    else:
                        parts.clear()
                    if size > 4 * self.limits.body:
                        break
        except ClientDisconnect:
            raise Refusal(499, "the client hung up") from None
        except TimeoutError:
            raise Refusal(408, f"the body took more than {self.limits.body_seconds:g} s to arrive") from None
        if size > self.limits.body:
            raise Refusal(413, f"the body is larger than {self.limits.body} bytes")
        return b"".join(parts)

    def read(self, body, job):
        """A body -> (turns, [(image file, its place)], pixels of all, whether usage is streamed).

        What it says of the answer is the job's afterwards. Nothing large is made of it yet.
        """
        asked = parse(body, self.limits)
        self.named(asked.model)
        job.stream, job.stop = bool(asked.stream), tuple(asked.stop or ())

        turns, urls = turns_of(asked.messages, self.bounds)
        job.limit = self.limit_of(asked)
        # Each message and each image is a token at least.
        least = len(turns) + len(urls)
        if least > self.context:
            raise Refusal(
                400,
                f"messages: {least} messages and images, the model's context is {self.context}",
                "messages",
            )
        files = [(file_of(url, where), where) for url, where in urls]
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return turns, files, pixels_of(files, self.limits), usage

    def limit_of(self, asked):
        """The limit of new tokens of a request."""
        limit = asked.max_completion_tokens or asked.max_tokens or self.limits.default_tokens
        if limit > self.limits.tokens:
            raise Refusal(400, f"max_tokens: {limit}, at most {self.limits.tokens} are allowed", "max_tokens")
        return limit

    def prepare(self, turns, files, limit, large):
        """What was read of a request -> prompt for generate. Each image is decoded when the one before is
        done with.
        """
        images = (image_of(raw, where) for raw, where in files)
        try:
            prompt = self.engine.prepare(turns, images, self.context - limit, large)
        except ValueError as error:  # an image whose sides differ two hundredfold, for one
            raise Refusal(400, f"messages: {error}", "messages") from None
        if len(prompt[0]) + limit > self.context:
            raise Refusal(
                400,
                f"messages: {len(prompt[0])} tokens and {limit} new ones, the model's context is "
                f"{self.context}",
                "messages",
            )
        return prompt

    async def events(self, job, request=None):
        """A job's events up to its last; ends early when the client hangs up."""
        while True:
            try:
                event = await asyncio.wait_for(job.events.get(), 1.0)
            except TimeoutError:
                if request is not None and await request.is_disconnected():
                    return
                continue
            yield event
            if event[0] != "text":
                return

    async def chunks(self, job, head, usage):
        """Server-sent events: the role, the text as it comes, why it ended, the tokens if asked for, [DONE].
        """

        def chunk(delta=None, finish=None, **more):
            choices = []
            if delta is not None:
                choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
                choices.append(choice)
            said = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
            return f"data: {json.dumps(said)}\n\n"

        yield chunk({"role": "assistant", "content": ""})
        async for kind, value in self.events(job):
            if kind == "text":
                yield chunk({"content": value})
            elif kind == "failed":
                error = {"message": value, "type": "server_error", "param": None, "code": 500}
                yield f"data: {json.dumps({'error': error})}\n\n"
                return
            else:
                yield chunk({}, value.finish)
                if usage:
                    yield chunk(usage=usage_of(job, value))
        yield "data: [DONE]\n\n"


class Stream(StreamingResponse):
    """Server-sent events that call `after` when they end, also when the client hangs up before the first."""

    def __init__(self, content, after):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.after = after

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.after()


def usage_of(job, answer):
    """The `usage` object of an answer: tokens of prompt and answer."""
    prompt = len(job.prompt[0])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer.tokens,
        "total_tokens": prompt + answer.tokens,
    }
