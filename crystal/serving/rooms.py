"""Where requests are made ready: a large one waits for large ones alone, and memory for pictures is counted.

A small request must not stand behind a long text or a large picture, so those are read by one thread of their
own, one after the other, while small ones have several.
"""

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor

SMALL = 32  # a request is small below this part of what is allowed


class Rooms:
    """Two pools of threads: one thread for what is large, several for the rest."""

    def __init__(self, threads=4):
        self.large = ThreadPoolExecutor(1, "large requests")
        self.small = ThreadPoolExecutor(threads, "small requests")

    async def run(self, large, work, *args):
        """The result of work(*args), from a thread of the room that it belongs to."""
        room = self.large if large else self.small
        return await asyncio.get_running_loop().run_in_executor(room, work, *args)


class Share:
    """So many of something may be held at once (bytes, pixels); who wants more than is left waits in line."""

    def __init__(self, total):
        self.total, self.held, self.line = total, 0, deque()

    async def take(self, amount):
        """Waits until there is room for `amount`, at most the total, and takes it."""
        if not self.line and self.held + amount <= self.total:
            self.held += amount
            return

        turn = asyncio.get_running_loop().create_future()
        self.line.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(amount)
            raise

    def give(self, amount):
        """Gives back what was taken, or a part of it, and lets in those who wait, oldest first."""
        self.held -= amount
        while self.line and (self.line[0][1].done() or self.held + self.line[0][0] <= self.total):
            wanted, turn = self.line.popleft()
            if not turn.done():
                self.held += wanted
                turn.set_result(None)
