"""Connections: who is idle goes, who is being answered stays. A small application behind real sockets."""

import asyncio
import contextlib
import json
import logging
import resource
import socket
import threading
import time

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from crystal import serve
from crystal.runtime.config import UserError
from crystal.serving import door
from crystal.serving.chat import Limits
from crystal.serving.door import SPARE, Runner, connections_for

WAIT = 60  # seconds that a test waits for anything at most
GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n"


class App:
    """Answers once the body is here and `go` is set; `much`: with so many bytes."""

    def __init__(self):
        self.go, self.begun, self.much = threading.Event(), threading.Semaphore(0), 4
        self.go.set()

    async def __call__(self, scope, receive, send):
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        self.begun.release()
        while not self.go.is_set() and message["type"] != "http.disconnect":
            await asyncio.sleep(0.01)
        headers = [(b"content-length", str(self.much).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, self.much, 10**6):
            body = b"x" * min(10**6, self.much - start)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def running(**limits):
    """-> (App, Runner, a function that connects)."""
    app, sock = App(), serve.listen("127.0.0.1", 0)
    level = logging.getLogger("uvicorn.error").level
    runner = Runner(app, Limits(**limits))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    port, clients = sock.getsockname()[1], []

    def connect(said=b""):
        clients.append(socket.create_connection(("127.0.0.1", port), timeout=WAIT))
        clients[-1].sendall(said)
        return clients[-1]

    try:
        yield app, runner, connect
    finally:
        app.go.set()
        runner.should_exit = True
        for client in clients:
            client.close()
        thread.join(WAIT)
        logging.getLogger("uvicorn.error").setLevel(level)
    assert not thread.is_alive()


def heard(client):
    """All that a client is told until its connection ends."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def answer(client):
    """What a client is told up to the end of one answer."""
    told = b""
    while not told.endswith(b"xxxx"):
        told += client.recv(999) or pytest.fail(f"closed after {told!r}")
    return told


def until(condition):
    stop = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.01)


def test_heads_that_do_not_come():
    """Silent connections are closed; half a head is told so, however slowly the rest drips."""
    with running(head_seconds=0.3) as (_, runner, connect):
        silent, half = connect(), connect(GET[:20])
        for _ in range(3):
            time.sleep(0.05)
            half.sendall(b"a")
        head, _, body = heard(half).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ") and json.loads(body)["error"] == {
            "message": "the head took more than 0.3 s to arrive",
            "type": "invalid_request_error",
            "param": None,
            "code": 408,
        }
        assert heard(silent) == b""
        until(lambda: not runner.server_state.connections)


def test_the_next_head_has_its_time_too():
    """After an answer: half a head, and a body that was not waited for."""
    with running(head_seconds=0.3) as (_, runner, connect):
        client = connect(GET)
        answer(client)
        client.sendall(GET[:9])
        assert heard(client) == b""
        # The second of two that came together is answered, then the time begins.
        both = connect(GET + GET)
        assert heard(both).count(b"xxxx") == 2
        until(lambda: not runner.server_state.connections)


def test_who_is_answered_is_not_hurried():
    with running(head_seconds=0.1) as (app, runner, connect):
        app.go.clear()
        client = connect(GET)
        assert app.begun.acquire(timeout=WAIT)
        idle = connect()
        assert heard(idle) == b""  # so that its time has passed
        app.go.set()
        assert heard(client).endswith(b"xxxx")


def test_the_longest_idle_makes_room():
    """Of three that are taken the one with half a body goes, then the silent one, never the one that is
    being answered; where all are, the newcomer is told so.
    """
    with running(connections=3) as (app, runner, connect):
        app.go.clear()
        answered = connect(GET)
        assert app.begun.acquire(timeout=WAIT)
        body = connect(POST + b"12")
        until(lambda: any(c.cycle and c.cycle.more_body for c in runner.server_state.connections))
        silent = connect()
        until(lambda: len(runner.server_state.connections) == 3)

        second = connect(GET)
        assert heard(body) == b"" and app.begun.acquire(timeout=WAIT)
        third = connect(GET)
        assert heard(silent) == b""
        until(lambda: sum(c.cycle is not None for c in runner.server_state.connections) >= 3)

        head, _, told = heard(connect(GET)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(told)["error"]["message"] == "all 3 connections are taken; try again"
        app.go.set()
        for client in (answered, second, third):
            answer(client)


def test_who_does_not_read_is_not_waited_for():
    with running(read_seconds=0.3) as (app, runner, connect):
        app.much = 50 * 10**6
        client = connect(GET)
        assert app.begun.acquire(timeout=WAIT)
        until(lambda: not runner.server_state.connections)
        assert len(heard(client)) < app.much


def test_a_reader_that_is_slow_gets_all():
    with running(read_seconds=20.0) as (app, _, connect):
        app.much = 9 * 10**6
        client, size = connect(GET + GET.replace(b"host", b"connection: close\r\nhost")), 0
        while part := client.recv(10**6):
            size += len(part)
        assert size > 2 * app.much


def test_at_its_end_it_waits_for_answers_and_for_nobody_else():
    with running(head_seconds=WAIT) as (app, runner, connect):
        app.go.clear()
        answered, silent, body = connect(GET), connect(), connect(POST + b"12")
        assert app.begun.acquire(timeout=WAIT)
        until(lambda: len(runner.server_state.connections) == 3)
        until(lambda: sum(c.cycle is not None for c in runner.server_state.connections) == 2)
        runner.should_exit = True
        assert heard(silent) == heard(body) == b""
        app.go.set()
        assert heard(answered).endswith(b"xxxx")


def test_told_twice_it_waits_for_nobody(capfd):
    """The second SIGINT: what is being answered is cut off, and one line says how much that was."""
    with running() as (app, runner, connect):
        app.go.clear()
        answered = connect(GET)
        assert app.begun.acquire(timeout=WAIT)
        runner.handle_exit(2, None)
        time.sleep(0.05)
        runner.handle_exit(2, None)
        assert b"xxxx" not in heard(answered)
    err = capfd.readouterr().err
    assert err == "warning: requests that were cut off: 1\n"


def test_how_many_connections_the_system_allows(monkeypatch):
    assert SPARE == 256
    for soft, hard, wanted, expected, now in (
        (1024, 4096, 256, 256, 1024),
        (300, 4096, 256, 256, 512),
        (300, 400, 256, 144, 400),
        (300, resource.RLIM_INFINITY, 256, 256, 512),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 9, 9, resource.RLIM_INFINITY),
        (257, 257, 256, 1, 257),
    ):
        held = [soft, hard]
        monkeypatch.setattr(door.resource, "getrlimit", lambda _, held=held: tuple(held))
        kept = lambda _, both, held=held: held.__setitem__(0, both[0])
        monkeypatch.setattr(door.resource, "setrlimit", kept)
        assert connections_for(wanted) == expected and held[0] == now
    monkeypatch.setattr(door.resource, "getrlimit", lambda _: (256, 256))
    with pytest.raises(UserError, match="^ulimit -n 256: a server needs more than 256 open files$"):
        connections_for(9)


def test_trouble_of_the_loop_is_one_line_a_minute(capsys, monkeypatch):
    runner, now = Runner(App(), Limits()), [1000.0]
    monkeypatch.setattr(door.time, "monotonic", lambda: now[0])
    error = OSError(24, "Too many open files")
    full = {"message": "socket.accept() out of system resource", "exception": error}
    for moment in (1000.0, 1030.0, 1059.0, 1061.0):
        now[0] = moment
        runner.trouble(None, full)
    line = "warning: socket.accept() out of system resource: [Errno 24] Too many open files\n"
    assert capsys.readouterr().err == 2 * line
