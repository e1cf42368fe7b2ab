"""Connections: how many, and how long one may take for what it has to say.

A connection is idle until its request is here to the last byte, and again once it is answered. Idle ones have
little time, and where all connections are taken the one that is idle longest makes room for the next; one
whose request is being answered stays. A client that does not read what it is sent has little time too.
"""

import asyncio
import json
import logging
import resource
import sys
import time

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from crystal.runtime.config import UserError
from crystal.serving.chat import Limits

BACKLOG = 64  # connections that the system may hold for us, and that are taken at one go
SPARE = 4 * BACKLOG  # file descriptors for those, the model's files and the rest


class Connection(H11Protocol):
    """uvicorn's connection, with time limits and a place in the line of idle ones.

    limits: chat.Limits. idle: {Connection: None} of all that are, longest idle first. Both are the Runner's.
    """

    limits: Limits
    idle: dict

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.head_timer: asyncio.TimerHandle | None = None
        self.read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
        super().connection_made(transport)
        # Who speaks least for longest goes; where everybody is being answered, the newcomer does.
        if len(self.connections) > self.limits.connections:
            oldest = next(iter(self.idle), None)
            if oldest is None:
                self.refuse(503, f"all {self.limits.connections} connections are taken; try again")
                return
            oldest.end()
        self.wait()

    def connection_lost(self, exc):
        self.hurry_no_more()
        super().connection_lost(exc)

    def wait(self):
        """Begins the time in which the next request's head must be here."""
        self.hurry_no_more()
        self.head_timer = self.loop.call_later(self.limits.head_seconds, self.late)
        self.idle[self] = None

    def late(self):
        """The head did not come: a client that began one is told so."""
        if self.conn.trailing_data[0] and self.cycle is None:
            self.refuse(408, f"the head took more than {self.limits.head_seconds:g} s to arrive")
        self.end()

    def refuse(self, status, message):
        """Answers without uvicorn, as Refusal would, and closes."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": status}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status} {'Request Timeout' if status == 408 else 'Service Unavailable'}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def hurry_no_more(self):
        """Takes it out of the line of the idle, and its time limits back."""
        self.idle.pop(self, None)
        for timer in (self.head_timer, self.read_timer):
            if timer is not None:
                timer.cancel()

    def end(self):
        """Closes at once, whatever is still to be sent or read."""
        self.hurry_no_more()
        if not self.transport.is_closing():
            self.transport.abort()

    def handle_events(self):
        super().handle_events()
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self.head_timer is not None:
            self.head_timer.cancel()
        if answering and not self.cycle.more_body:
            self.idle.pop(self, None)

    def on_response_complete(self):
        if not self.transport.is_closing():
            self.wait()
        super().on_response_complete()

    def pause_writing(self):
        self.read_timer = self.loop.call_later(self.limits.read_seconds, self.end)
        super().pause_writing()

    def resume_writing(self):
        if self.read_timer is not None:
            self.read_timer.cancel()
        super().resume_writing()

    def shutdown(self):
        """The server stops: who has not said what it wants is not waited for."""
        if self in self.idle:
            self.end()
        else:
            super().shutdown()


class Runner(uvicorn.Server):
    """uvicorn with such connections, that ends without a traceback however often it is told to."""

    def __init__(self, app, limits):
        limits.connections = connections_for(limits.connections)
        own = type("Connection", (Connection,), {"limits": limits, "idle": {}})
        config = uvicorn.Config(
            app,
            http=own,
            ws="none",
            lifespan="off",
            log_level="warning",
            backlog=BACKLOG,
            timeout_graceful_shutdown=30,
        )
        super().__init__(config)
        self.told = 0.0

    async def startup(self, sockets=None):
        asyncio.get_running_loop().set_exception_handler(self.trouble)
        await super().startup(sockets)

    def trouble(self, loop, context):
        """What goes wrong outside requests, as one line: file descriptors that run out, for one."""
        # The loop tries again every second.
        if time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            reason = context.get("exception") or ""
            print(f"warning: {context['message']}: {reason}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets=None):
        # Requests that are cut off now, since one waited long enough, would be a traceback each.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
        if self.server_state.tasks:
            print(f"warning: requests that were cut off: {len(self.server_state.tasks)}", file=sys.stderr)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.end()


def connections_for(wanted):
    """How many of so many connections there are file descriptors for; raises the soft limit where it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + SPARE:
        most = wanted + SPARE if hard == resource.RLIM_INFINITY else min(hard, wanted + SPARE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        soft = max(soft, most)
    if soft != resource.RLIM_INFINITY and soft <= SPARE:
        raise UserError(f"ulimit -n {soft}: a server needs more than {SPARE} open files")
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, soft - SPARE)
