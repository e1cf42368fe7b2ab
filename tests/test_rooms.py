"""Who waits for whom before the model; test_endpoint.py has it behind the endpoint."""

import asyncio
import threading

from crystal.serving.rooms import Rooms, Share


def test_a_share_is_taken_in_turn():
    async def talk():
        share, order = Share(10), []

        async def take(name, amount):
            await share.take(amount)
            order.append(name)

        await share.take(7)
        waiting = [asyncio.create_task(take(*one)) for one in (("a", 4), ("b", 10), ("c", 1))]
        await asyncio.sleep(0)
        assert order == [] and share.held == 7
        waiting[1].cancel()  # its client hung up
        share.give(3)
        await asyncio.gather(*waiting, return_exceptions=True)
        assert order == ["a", "c"] and share.held == 9
        share.give(9)
        assert share.held == 0 and not share.line

    asyncio.run(talk())


def test_who_was_let_in_and_hangs_up_gives_back():
    """Between its turn and its next step a task can be cancelled."""

    async def talk():
        share = Share(2)
        await share.take(2)
        waiting = asyncio.create_task(share.take(2))
        await asyncio.sleep(0)
        share.give(2)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert share.held == 0

    asyncio.run(talk())


def test_the_small_do_not_wait_for_the_large():
    """However many large ones stand in line, one of them is at work, and small ones pass."""
    rooms, go, at_work = Rooms(), threading.Event(), []

    def hold():
        at_work.append(threading.current_thread().name)
        assert go.wait(60)

    async def talk():
        large = [asyncio.ensure_future(rooms.run(True, hold)) for _ in range(5)]
        assert await rooms.run(False, lambda a, b: a + b, 3, 4) == 7
        assert len(at_work) <= 1
        go.set()
        await asyncio.gather(*large)
        assert len(at_work) == 5 and len(set(at_work)) == 1

    asyncio.run(talk())
