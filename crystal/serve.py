"""Serve a model: an OpenAI-compatible chat endpoint, safe by default.

    python -m crystal.serve --model runs/crystal/merged --port 8000
    curl http://127.0.0.1:8000/v1/models

`/v1/models`, `/v1/models/ID`, `/v1/chat/completions` (streamed or not) and `/health`, over starlette,
uvicorn and pydantic. It takes what generate.py takes, a run, an exported directory or a hub name, and gives
generate.py's answers: greedy, so a request for anything else (a temperature, tools, several choices) is
refused and not quietly answered another way. Fields that clients send along and that change nothing are
taken.

What a request may say is chat.py's: images as data URLs alone, every size bounded, whatever is wrong with it
a line of JSON with a 4xx. Requests that wait together are answered by one call of `generate`: the server
itself is endpoint.py.
"""

import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from crystal.serving.chat import Limits
    from crystal.serving.door import Runner
    from crystal.serving.endpoint import Server
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

KEY = "CRYSTAL_API_KEY"  # of the environment: a flag would stand in the list of processes


def listen(host, port):
    """A listening socket (port 0: any free one). UserError if it cannot be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: from 0 to 65535")
    try:
        host = host.removeprefix("[").removesuffix("]")  # as an address of IPv6 stands in a URL
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
        "--model", default="tiny", help="a run directory, an export, tiny, tiny-crystal, or a hub name"
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
        ("characters", "most characters of a request's texts"),
        ("images", "most images of a request"),
        ("pixels", "most pixels of a request's images together"),
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
            for name in (
                "body", "characters", "images", "pixels", "tokens", "default_tokens", "queue", "batch",
            )
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
        ("127.0.0.1", "localhost", "[::1]", args.host.lower()) if local else (),
    )
    server.engine.start()
    runner = Runner(server.app, limits)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, runner.handle_exit)  # uvicorn takes them over, and sends them again at its end
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
