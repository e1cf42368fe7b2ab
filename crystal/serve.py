"""Serve a model: an OpenAI-compatible chat endpoint, safe by default.

    python -m crystal.serve --model runs/crystal/merged --port 8000
    curl http://127.0.0.1:8000/v1/models

`/v1/models`, `/v1/models/ID`, `/v1/chat/completions` (streamed or not) and `/health`, over starlette,
uvicorn and pydantic. It takes what generate.py takes, a run, an exported directory or a hub name, and gives
generate.py's answers: greedy, so a request for anything else (a temperature, tools, several choices) is
refused and not quietly answered another way. Fields that clients send along and that change nothing are
taken.

What a request may say is chat.py's: images as data URLs alone, every size bounded, whatever is wrong with it
a line of JSON with a 4xx. Requests that wait together are answered by one call of `generate`.
"""

import asyncio
import hmac
import ipaddress
import json
import os
import signal
import socket
import sys
import time
import uuid
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    from crystal.serving.chat import Limits, Refusal, image_of, parse, turns_of
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(
        f"error: serve.py needs the extra `serve`: pip install starlette uvicorn pydantic ({error})",
        file=sys.stderr,
    )
    sys.exit(2)

from crystal.opening import model_flags, open_model
from crystal.runtime import config, distributed
from crystal.runtime.config import UserError
from crystal.serving.engine import Engine, Job

KEY = "CRYSTAL_API_KEY"  # of the environment: a flag would stand in the list of processes


# --- the server ---


class Server:
    """The endpoints of one model. `app` is an ASGI application; start the engine before it takes requests."""

    def __init__(self, model, fmt, name, limits, latents="keep", key=None, hosts=()):
        self.name, self.limits, self.key, self.hosts, self.places = name, limits, key, hosts, 0
        self.engine = Engine(model, fmt, latents, limits.batch)
        # Pictures become large when they are decoded: of the rest only the bodies wait.
        self.decoded = asyncio.Semaphore(2 * limits.batch)
        self.context = model.hf.config.get_text_config().max_position_embeddings
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
            host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
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
        if self.places >= self.limits.queue:
            await self.body(request, keep=False)
            raise Refusal(503, f"all {self.limits.queue} places are taken; try again")
        self.places += 1
        job = response = None
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                await self.body(request, keep=False)
                # A web page may send others to any address unasked.
                raise Refusal(415, "content-type must be application/json")
            asked = parse(await self.body(request))
            self.named(asked.model)
            job = Job(bool(asked.stream), asyncio.get_running_loop(), stop=tuple(asked.stop or ()))
            await self.decoded.acquire()
            job.holds = True
            if await request.is_disconnected():
                raise Refusal(499, "the client hung up")
            # Decoding a picture must not stop the others.
            job.prompt, job.limit = await asyncio.to_thread(self.prepare, asked)
            self.engine.submit(job)
            head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
            if job.stream:
                usage = bool(asked.stream_options and asked.stream_options.include_usage)
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

    def leave(self, job):
        """Gives a request's place back, however it ended."""
        self.places -= 1
        if job is not None:
            job.gone = True
            if job.holds:
                self.decoded.release()

    async def body(self, request, keep=True):
        """A request's body, bounded in bytes and time. What is too much is read and dropped, so that the
        client gets to read why.
        """
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
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

    def prepare(self, asked):
        """A parsed request -> (prompt for generate, limit of new tokens); runs in a thread of its own."""
        turns, urls = turns_of(asked.messages, self.limits)
        limit = asked.max_completion_tokens or asked.max_tokens or self.limits.default_tokens
        if limit > self.limits.tokens:
            raise Refusal(400, f"max_tokens: {limit}, at most {self.limits.tokens} are allowed", "max_tokens")
        images = [image_of(url, where, self.limits) for url, where in urls]
        try:
            prompt = self.engine.prepare(turns, images)
        except ValueError as error:  # an image whose sides differ two hundredfold, for one
            raise Refusal(400, f"messages: {error}", "messages") from None
        if len(prompt[0]) + limit > self.context:
            raise Refusal(
                400,
                f"messages: {len(prompt[0])} tokens and {limit} new ones, the model's context is "
                f"{self.context}",
                "messages",
            )
        return prompt, limit

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


# --- the command ---


def listen(host, port):
    """A listening socket (port 0: any free one). UserError if it cannot be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: from 0 to 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
        return sock
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from None


def is_loopback(address):
    """True for an address that only this machine reaches."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def main(argv=None):
    parser = config.OneLineParser(
        prog="serve.py", description="Serve a model at an OpenAI-compatible chat endpoint."
    )
    parser.add_argument(
        "--model", default="tiny", help="a run directory, an exported directory, tiny, or a hub name"
    )
    model_flags(parser)
    parser.add_argument("--name", default="", help="the model's name for clients; empty: the directory's")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"address to listen on; one that others reach needs a key in the environment variable {KEY}",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument(
        "--latents", default="keep", choices=("keep", "drop"), help="leave the latents out of the sequence"
    )
    for name, help in (
        ("body", "largest request in bytes"),
        ("images", "most images of a request"),
        ("pixels", "largest image in pixels"),
        ("tokens", "most new tokens that a request may ask for"),
        ("default_tokens", "new tokens of a request that names no number"),
        ("queue", "most requests that wait or are being answered; beyond it 503"),
        ("batch", "most requests answered by one call"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(Limits, name), help=help)
    args = parser.parse_args(argv)
    limits = Limits(
        **{
            name: getattr(args, name)
            for name in ("body", "images", "pixels", "tokens", "default_tokens", "queue", "batch")
        }
    )
    if low := [name for name, value in vars(limits).items() if value < 1 and name != "images"]:
        raise UserError(f"--{low[0]} {getattr(limits, low[0])}: must be at least 1")
    if limits.images < 0:
        raise UserError(f"--images {limits.images}: must not be negative")
    limits.default_tokens = min(limits.default_tokens, limits.tokens)
    key = os.environ.get(KEY)
    sock = listen(args.host, args.port)  # before the model: a taken port should not cost its loading
    address, port = sock.getsockname()[:2]
    local = is_loopback(address)
    if not local and not key:
        raise UserError(
            f"--host {args.host}: others can reach this address; set a key in the environment variable "
            f"{KEY} first"
        )
    model, fmt, _ = open_model(
        args.model,
        args.checkpoint,
        distributed.start(args.device).device,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        method=args.method,
        trust_method=args.trust_method,
    )
    name = args.name or Path(args.model).resolve().name
    server = Server(
        model,
        fmt,
        name,
        limits,
        args.latents,
        key,
        ("127.0.0.1", "localhost", "[::1]", args.host) if local else (),
    )
    server.engine.start()
    runner = uvicorn.Server(
        uvicorn.Config(server.app, log_level="warning", timeout_graceful_shutdown=30, lifespan="off")
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn ends on them, then sends them again
    print(
        f"serving {name} at http://{f'[{address}]' if ':' in address else address}:{port}/v1 (stop with "
        "Ctrl-C)",
        flush=True,
    )
    runner.run(sockets=[sock])
    server.engine.stop()
    server.engine.join()  # Python must not end under a thread that is inside torch
    print("stopped", flush=True)


if __name__ == "__main__":
    config.run_cli(main)
