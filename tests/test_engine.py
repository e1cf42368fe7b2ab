"""The thread that runs the model; test_serve.py has it behind the endpoint, with many clients."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
import torch

from crystal import generate, opening, train
from crystal.runtime import data
from crystal.serving import engine
from crystal.serving.engine import Engine, Job, Steps


@pytest.fixture(scope="module")
def opened(model_dirs, records_file, tmp_path_factory):
    """A run with latents."""
    run = train.main(
        [
            "--model",
            str(model_dirs[True]),
            "--data",
            str(records_file),
            "--latents",
            "3",
            "--lora_r",
            "2",
            "--lr",
            "1e-2",
            "--max_steps",
            "1",
            "--eval_every",
            "0",
            "--output",
            str(tmp_path_factory.mktemp("engine") / "run"),
        ]
    )
    return opening.open_model(run)


def test_jobs_that_wait_together_are_one_call(opened, records_file, monkeypatch):
    """Equal limits go together, oldest first; every job gets what generate says to it alone."""
    model, fmt, _ = opened
    records, calls, one_call = data.read(records_file)[0], [], generate.generate
    monkeypatch.setattr(
        engine.generate,
        "generate",
        lambda model, prompts, *rest, **how: (
            calls.append(len(prompts)),
            one_call(model, prompts, *rest, **how),
        )[1],
    )

    async def ask():
        loop, worker = asyncio.get_running_loop(), Engine(model, fmt, "keep", 2)
        jobs = []
        for record, limit in zip([*records, records[0]], (4, 3, 4, 4)):
            images = [data.load_image(path, record.where) for path in record.images]
            turns = [(role, text.split("<image>")) for role, text in record.turns]
            jobs.append(Job(False, loop, prompt=worker.prepare(turns, images), limit=limit))
            worker.submit(jobs[-1])
        worker.start()
        told = [await asyncio.wait_for(job.events.get(), 120) for job in jobs for _ in range(2)]
        worker.stop()
        worker.join(120)
        return jobs, told

    jobs, told = asyncio.run(ask())
    assert calls == [1, 2, 1]  # the shortest; the first and third; what is left of limit 4
    for i, job in enumerate(jobs):
        (kind, text), (end, answer) = told[2 * i : 2 * i + 2]
        assert (
            (kind, end) == ("text", "done")
            and answer.text == text == one_call(model, [job.prompt], fmt, job.limit)[0]
            and answer.finish == "length"
        )


def test_a_thought_of_its_own_is_not_streamed(opened):
    model, fmt, _ = opened
    fmt.thought, jobs = "cot", []
    try:
        job = Job(True, None)
        job.tell = lambda *event: jobs.append(event)
        steps = Steps(Engine(model, fmt, "keep", 1), [job])
        said = [*fmt.text("I look."), fmt.answer_start_id, *fmt.text("red"), fmt.answer_end_id, fmt.end]
        steps.put(torch.tensor([[1, 2]]))
        for token in said:
            steps.put(torch.tensor([token]))
        assert "".join(x for _, x in jobs) == "red" and job.said == said
    finally:
        fmt.thought = "fixed"


def test_half_a_character_waits_for_its_other_half(opened):
    """A character of several tokens is told whole."""
    model, fmt, _ = opened
    tokens = fmt.text("né 東")
    assert len(tokens) > len("né 東")
    told = []
    job = Job(True, None)
    job.tell = lambda kind, text: told.append(text)
    steps = Steps(Engine(model, fmt, "keep", 1), [job])
    steps.put(torch.tensor([[1, 2]]))
    for token in tokens:
        steps.put(torch.tensor([token]))
    assert "".join(told) == "né 東" and not any("\ufffd" in text for text in told)


@pytest.mark.parametrize(
    "stop, told, ended",
    [
        ((), "red and blue", False),
        (("and",), "red ", True),
        (("blue and", "d b"), "red an", True),  # one that began and went on otherwise is told late
        (("blue!",), "red and", False),  # what may become one is not told yet
        (("e", "r"), "", True),
    ],
)
def test_no_part_of_a_stop_string_is_told(opened, stop, told, ended):
    model, fmt, _ = opened
    said, job = [], Job(True, None, stop=stop, limit=50)
    job.tell = lambda kind, value: said.append((kind, value))
    steps = Steps(Engine(model, fmt, "keep", 1), [job])
    steps.put(torch.tensor([[1, 2]]))
    tokens = [token for letter in "red and blue" for token in fmt.text(letter)]
    with contextlib.suppress(engine.Abandoned):
        for token in tokens:
            steps.put(torch.tensor([token]))
    assert "".join(value for kind, value in said if kind == "text").rstrip() == told.rstrip()
    assert job.ended == ended and [kind for kind, _ in said].count("done") == ended
    if ended:
        assert said[-1][1].text == told and said[-1][1].finish == "stop"


def test_a_batch_whose_jobs_are_all_at_their_stop_strings_ends(opened):
    """The others of it go on until they end."""
    model, fmt, _ = opened
    jobs = [Job(False, None, stop=(word,), limit=50) for word in ("red", "blue")]
    for job in jobs:
        job.tell = lambda *event: None
    steps = Steps(Engine(model, fmt, "keep", 2), jobs)
    steps.put(torch.tensor([[1, 2], [1, 2]]))
    tokens = fmt.text("red and blue")
    with pytest.raises(engine.Abandoned):
        for n, token in enumerate(tokens):
            assert not jobs[1].ended
            steps.put(torch.tensor([token, token]))
    assert n == len(tokens) - 1 and len(jobs[0].said) < len(jobs[1].said) == len(tokens)


def test_a_batch_that_nobody_waits_for_is_dropped(opened):
    model, fmt, _ = opened
    engine = Engine(model, fmt, "keep", 8)
    jobs = [
        Job(False, None, prompt=engine.prepare([("user", ["Hello"])], []), limit=4, gone=True)
        for _ in range(2)
    ]
    told = []
    for job in jobs:
        job.tell = lambda *event: told.append(event)
    engine.answer(jobs)
    assert [len(job.said) for job in jobs] == [1, 1] and not told


def test_the_shortest_are_answered_first_and_every_fourth_batch_is_the_oldests():
    """Nothing is open, so each may begin: only the line's order counts. A long prompt makes no short one its
    companion; who hung up is passed over.
    """
    config = SimpleNamespace(max_position_embeddings=320)
    model = SimpleNamespace(hf=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)))
    engine = Engine(model, SimpleNamespace(copies=1), "keep", 2, window=0)
    for name, limit, length, gone in (
        ("gone", 5, 1, True),
        ("a", 9, 1, False),
        ("b", 7, 1, False),
        ("c", 5, 1, False),
        ("d", 5, 11, False),
        ("e", 7, 10, False),
        ("f", 5, 10, False),
        ("g", 8, 1, False),
    ):
        job = SimpleNamespace(name=name, limit=limit, gone=gone, prompt=([1] * length,))
        engine.submit(job)
    batches = [[job.name for job in engine.next_batch()] for _ in range(5)]
    assert batches == [["c", "f"], ["d"], ["b", "e"], ["a"], ["g"]] and engine.jobs == []
    engine.stop()
    assert engine.next_batch() is None
