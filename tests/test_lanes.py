"""Whose step is next: orders worked out by hand; and answers that were taken in turns are those of a quiet
server, whatever the method.
"""

import asyncio
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from crystal import generate
from crystal.serving import engine, lanes
from crystal.serving.engine import Engine, Job
from crystal.serving.lanes import Abandoned, Lane, Lanes

WAIT = 120  # seconds that a test waits for anything at most


def job(length, limit):
    return SimpleNamespace(prompt=([1] * length,), limit=limit)


def opened(*jobs, room=10**6):
    made = Lanes(room)
    made.open = [Lane([one]) for one in jobs]
    return made


def test_work_by_hand():
    """A prompt of fewer than 32 tokens is a step like any other; a batch pads to its longest prompt."""
    assert lanes.work_of(job(5, 3)) == 32 + 3 * 32 and lanes.work_of(job(100, 1)) == 100 + 32
    lane = Lane([job(10, 4), job(50, 4), job(3, 4)])
    assert (lane.next, lane.left, lane.done, lane.held) == (150, 150 + 4 * 32, 0, 3 * 54)
    assert (Lane([job(2, 1)]).next, Lane([job(2, 1)]).held) == (32, 3)


def taken(made, steps):
    """The numbers of the lanes whose steps are the next ones, as if each step were run."""
    order = []
    for _ in range(steps):
        lane = made.following()
        order.append(made.open.index(lane))
        lane.done += lane.next
        lane.next = lanes.STEP
    return order


def test_who_had_least_goes_on_and_the_oldest_has_a_quarter():
    made = opened(job(5, 900), job(5, 900))
    assert taken(made, 4) == [0, 1, 0, 1]
    # A newcomer is at its first step where the others have had 50.
    made.owed = 0
    made.open[0].done = made.open[1].done = 1600
    made.open.append(Lane([job(5, 900)]))
    assert taken(made, 9) == [2, 2, 2, 0, 2, 2, 2, 0, 2]
    # A prompt of a thousand tokens waits until the other has had as much: 31 steps are 992.
    assert taken(opened(job(1000, 5), job(5, 900)), 40).index(0) == 31
    # Where newcomers have always had less, it waits for its share: 3000 of theirs are 94 steps.
    made = opened(job(1000, 5), *[job(5, 9)] * 50)
    assert taken(made, 96).index(0) == 94


def test_what_was_owed_goes_with_the_oldest():
    made = opened(job(5, 9), job(5, 9), job(5, 9))
    made.owed = 70
    made.close(made.open[1])
    assert made.owed == 70
    made.close(made.open[0])
    assert made.owed == 0 and len(made.open) == 1


def test_what_may_begin_beside_what_is_open():
    # Of 32 + 32 * 99 = 3200 a half is 1600: 49 steps and a prompt.
    assert opened(job(5, 99)).takes(job(5, 49)) and not opened(job(5, 99)).takes(job(5, 50))
    assert opened().takes(job(4000, 4000))
    # Each lane is asked.
    assert not opened(job(5, 99), job(5, 60)).takes(job(5, 49))
    # Who had 32 steps has shown that it is long.
    made = opened(job(5, 99))
    made.open[0].done = 32 * 32
    assert made.takes(job(5, 800))
    # But then memory counts, and the number of lanes: 104 tokens of the first, 805 of the second.
    made.room = 104 + 805
    assert made.takes(job(5, 800)) and not made.takes(job(5, 801))
    made.room = 10**6
    made.open = [made.open[0]] * 7
    assert made.takes(job(5, 800))
    made.open *= 2
    assert not made.takes(job(5, 800)) and made.takes(job(5, 49))


def test_a_lane_runs_a_step_at_a_time_and_can_be_dropped():
    said, made = [], [Lane([job(5, 9)]) for _ in range(3)]

    def answer(batch, lane):
        for n in range(3):
            said.append((made.index(lane), n))
            lane.pause()

    with ThreadPoolExecutor(3) as pool:
        ran = [pool.submit(lane.run, answer) for lane in made]
        for n in (0, 1, 1, 0):
            made[n].step()
        assert said == [(0, 0), (1, 0), (1, 1), (0, 1)] and not made[0].ended
        made[0].step()
        made[0].step()
        assert made[0].ended and said[4:] == [(0, 2)]
        made[1].drop()
        made[2].drop()  # before its first
        assert len(said) == 5 and all(lane.ended for lane in made)
    assert isinstance(ran[1].exception(), Abandoned) and ran[2].exception() is None


# --- behind the engine ---


def answers(model, fmt, jobs, batch=2, then=lambda worker: None):
    """Jobs answered by an engine's thread -> what each was told last: (kind, Answer)."""
    ends = {}
    done = threading.Event()

    def tell(one):
        def told(kind, value):
            if kind != "text":
                ends[id(one)] = kind, value
                if len(ends) == len(jobs):
                    done.set()

        return told

    worker = Engine(model, fmt, "keep", batch, window=0)
    for one in jobs:
        one.tell = tell(one)
    then(worker)
    worker.start()
    assert done.wait(WAIT)
    worker.stop()
    worker.join(WAIT)
    assert not worker.is_alive() and not worker.lanes.open
    return [ends[id(one)] for one in jobs]


def test_a_short_one_waits_for_no_more_than_a_step_of_a_long_one(setup, monkeypatch):
    """While an answer of 400 tokens is written, one of 5 comes in: it is at its end a quarter of its steps
    later than alone.
    """
    s, order = setup(), []
    long, short = (Job(False, None, prompt=([1] * 9, None, None), limit=limit) for limit in (400, 5))

    def fake(model, prompts, fmt, limit, latents, streamer):
        streamer.put(torch.tensor([[1]]))
        for n in range(limit):
            order.append(limit)
            if (limit, n) == (400, 6):
                worker[0].submit(short)
            streamer.put(torch.tensor([7]))
        return ["fine"]

    worker = []
    monkeypatch.setattr(engine.generate, "generate", fake)

    def begin(made):
        worker.append(made)
        made.submit(long)

    ends = answers(s.model, s.fmt, [long, short], then=begin)
    assert order[:7] == [400] * 7 and order[7:13] == [5, 5, 5, 400, 5, 5] and order[13:] == [400] * 392
    assert [kind for kind, _ in ends] == ["done", "done"]


@pytest.mark.parametrize("method", ["sft", "crystal", "released", "livr", "lavit", "valr"])
def test_answers_in_turns_are_those_of_a_quiet_server(setup, method, monkeypatch):
    """Long and short, with pictures of several sizes and without, streamed or not: each gets what it gets
    alone, though their steps were taken in turns.
    """
    more = ("--encoders", "none") if method == "valr" else ()
    s = setup("--method", method, *more, dtype=torch.float32)
    model, fmt = s.model.eval(), s.fmt
    if method == "valr":  # one that opens latents now and then, and thinks for 14 tokens at most
        plain = model.logits

        def logits(h):
            z = plain(h)
            z[:, fmt.latent_start_id] += 3 * z.std(-1)
            return z

        monkeypatch.setattr(model, "logits", logits)
        short = functools.partial(generate.decode_feedback, max_thought=14)
        monkeypatch.setattr(generate, "decode_feedback", short)
    maker, jobs = Engine(model, fmt, "keep", 2), []
    g = torch.Generator().manual_seed(3)
    for n, (limit, size) in enumerate([(40, (84, 56)), (3, None), (9, (56, 140)), (3, (28, 56)), (4, None)]):
        pictures = []
        if size:
            noise = torch.randint(256, (size[1], size[0], 3), generator=g, dtype=torch.uint8)
            pictures = [Image.fromarray(noise.numpy())]
        prompt = maker.prepare([("user", ["", f"What {n}?"] if pictures else [f"Why {n}?"])], pictures)
        jobs.append(Job(n % 2 == 0, None, prompt=prompt, limit=limit))
    alone = [generate.write(model, [one.prompt], fmt, one.limit)[0] for one in jobs]

    # The others come while the first is at its second step; who runs is told by each step's end.
    order, real, came = [], engine.Steps.put, []

    def put(self, tokens):
        order.append(self.batch[0].limit)
        if len(order) == 3:
            for one in jobs[1:]:
                came[0].submit(one)
        real(self, tokens)

    monkeypatch.setattr(engine.Steps, "put", put)

    def begin(made):
        came.append(made)
        made.submit(jobs[0])

    ends = answers(model, fmt, jobs, then=begin)
    assert [kind for kind, _ in ends] == ["done"] * len(jobs)
    assert [answer.text for _, answer in ends] == [generate.answer_text(model, fmt, ids) for ids in alone]
    # The tokens themselves, up to an end; what pads a row behind it is none of its own.
    for one, ids in zip(jobs, alone):
        own = ids[: ids.index(fmt.end) + 1] if fmt.end in ids else ids
        assert one.said == own
    assert len(set(order[3:])) > 1 and (order[-1] == 40 or method == "valr")
    if method == "valr":
        opened = [one.said.count(fmt.latent_start_id) for one in jobs]
        assert any(opened) and len(set(opened)) > 1
    switches = sum(a != b for a, b in zip(order, order[1:]))
    assert switches > 6


def test_what_the_model_keeps_between_steps_is_each_lanes_own(setup, monkeypatch):
    """As a transformers that reads its rope_deltas at every step would."""
    s = setup()
    jobs = [Job(False, None, prompt=([1] * 9, None, None), limit=limit) for limit in (90, 5)]
    wrong = []

    def fake(model, prompts, fmt, limit, latents, streamer):
        model.hf.model.rope_deltas = torch.tensor([limit])
        streamer.put(torch.tensor([[1]]))
        for n in range(limit):
            wrong.append(int(model.hf.model.rope_deltas) != limit)
            if (limit, n) == (90, 3):
                worker[0].submit(jobs[1])
            streamer.put(torch.tensor([7]))
        return ["fine"]

    monkeypatch.setattr(engine.generate, "generate", fake)
    worker = []

    def begin(made):
        worker.append(made)
        made.submit(jobs[0])

    answers(s.model, s.fmt, jobs, 1, begin)
    assert len(wrong) == 95 and not any(wrong)


def test_an_engine_that_fails_leaves_no_thread_behind(setup, monkeypatch):
    """A fault of ours in choosing lanes ends them; Python would wait for their threads otherwise."""
    s = setup()
    one = Job(False, asyncio.new_event_loop(), prompt=([1] * 9, None, None), limit=50)
    worker = Engine(s.model, s.fmt, "keep", 1, window=0)
    worker.submit(one)
    calls = []

    def following(self):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a fault")
        return self.open[0]

    monkeypatch.setattr(Lanes, "following", following)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    worker.start()
    worker.join(WAIT)
    assert not worker.is_alive() and worker.lanes.open[0].ended
