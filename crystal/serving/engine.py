"""One model, many requests at once: those that wait together are answered by one call of generate, and
several calls take turns, a step each (lanes.py).

Any number of threads may `prepare` and `submit`; one at a time runs the model. Answers are generate.py's:
batches pad, padding changes nothing, and no call sees another's states.
"""

import asyncio
import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from crystal import generate
from crystal.serving.lanes import SHARE, Abandoned, Lane, Lanes, work_of
from crystal.serving.rooms import SMALL

log = logging.getLogger("crystal.serving.engine")


@dataclass(eq=False)
class Job:
    """A prompt on its way to the model, and where its events go: ("text", new text), ("done",
    Answer) or ("failed", line).
    """

    stream: bool
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    prompt: tuple = ()  # ids, pixel_values, image_grid_thw
    limit: int = 0  # new tokens
    stop: tuple = ()  # strings that end the answer, and are no part of it
    said: list = field(default_factory=list)  # ids as they come
    sent: str = ""  # text told so far
    ended: bool = False  # its answer is told
    placed: bool = False  # holds one of the server's places
    bytes: int = 0  # held of those that large bodies may take
    pixels: int = 0  # held of those that large pictures may take
    gone: bool = False  # the client hung up

    def tell(self, *event):
        """From the model's thread to the request's loop, unless the client is gone."""
        if not self.gone:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def say(self, text):
        """Tells what of its text so far is new; a text that took back what was told tells nothing."""
        if text.startswith(self.sent) and text != self.sent:
            self.tell("text", text[len(self.sent) :])
            self.sent = text

    def finish(self, text, tokens, why):
        """Tells the whole answer's rest, and that it ended."""
        self.say(text)
        self.ended = True
        self.tell("done", Answer(text, tokens, why))


@dataclass
class Answer:
    """What a request gets."""

    text: str
    tokens: int
    finish: str  # "stop" or "length"


class Engine(threading.Thread):
    """The thread that says who runs the model: opens a lane for what may begin, and lets one go on by a step.

    A batch is of equal token limits, up to `batch` jobs.
    """

    def __init__(self, model, fmt, latents, batch, window=0.01):
        super().__init__(daemon=True)
        self.model, self.fmt, self.latents, self.batch, self.window = model, fmt, latents, batch, window
        self.jobs, self.ready, self.stopping = [], threading.Condition(), False
        self.context = model.hf.config.get_text_config().max_position_embeddings
        self.lanes, self.begun = Lanes(2 * batch * self.context), 0
        # A tokenizer keeps state while it encodes (are special tokens split?), so the one that reads prompts
        # is not the one that writes answers; and one for long prompts, which short ones do not wait for.
        self.readers = [(copy.deepcopy(fmt), threading.Lock()) for _ in range(2)]

    def prepare(self, turns, images, room=None, large=False):
        """Turns and PIL images -> generate.Query. ValueError where the images do not fit.

        images: any iterable, each taken when the one before is done with. room: the most tokens that they may
        take together. large: among long prompts.
        """
        pixels, grids = self.pixels(images, room)
        counts = self.model.image_tokens(grids) if grids is not None else []
        reader, reading = self.readers[large]
        with reading:
            prompt = reader.question(turns, counts, self.latents)
        return generate.Query(prompt.ids, pixels, grids)

    def pixels(self, images, room=None):
        """PIL images -> (pixel_values [P,..], image_grid_thw [I,3]) of all copies; two None without any."""
        processor = self.model.image_processor
        # A family that cuts images into tiles does so by how many there are; else each is made ready alone,
        # and what it was decoded to is dropped before the next.
        groups = ([image] for image in images) if processor.bounded else [list(images)]
        made, taken = [], 0
        for group in groups:
            if not group:
                break
            shown = [image for image in group for _ in range(self.fmt.copies)]
            made.append(processor(images=shown, return_tensors="pt"))
            taken += sum(self.model.image_tokens(made[-1]["image_grid_thw"]))
            if room is not None and taken > room:
                raise ValueError(f"the images take {taken} tokens and more, {room} fit the context")
        if not made:
            return None, None
        return tuple(torch.cat([one[name] for one in made]) for name in ("pixel_values", "image_grid_thw"))

    def submit(self, job):
        """Puts a prepared job in line."""
        with self.ready:
            self.jobs.append(job)
            self.ready.notify()

    def stop(self):
        """Ends the thread after the answers that were begun."""
        with self.ready:
            self.stopping = True
            self.ready.notify()

    def next_batch(self):
        """The next jobs to answer together, if any may begin now; None when asked to stop.

        Where nothing is being answered, it waits for a job.
        """
        with self.ready:
            if not self.lanes.open:
                self.ready.wait_for(lambda: self.jobs or self.stopping)
            if self.stopping:
                return None

            # Those that come together go together.
            if not self.lanes.open:
                self.ready.wait_for(lambda: len(self.jobs) >= self.batch, self.window)
            self.jobs = [job for job in self.jobs if not job.gone]
            first = self.next_job()
            if first is None:
                return []

            alike = [job for job in self.jobs if job is not first and self.kind(job) == self.kind(first)]
            batch = [first, *alike[: self.batch - 1]]
            self.jobs = [job for job in self.jobs if job not in batch]
            self.begun += 1
            return batch

    def next_job(self):
        """Of those in line the one that may begin now, if any: the least work, at times the oldest."""
        candidates = sorted(self.jobs, key=work_of)[:1]
        if self.begun % SHARE == SHARE - 1:
            candidates = self.jobs[:1] + candidates
        return next((job for job in candidates if self.lanes.takes(job)), None)

    def kind(self, job):
        """What jobs of one batch share: their limit, and whether their prompts are long ones."""
        return job.limit, len(job.prompt[0]) > self.context // SMALL

    def run(self):
        lanes, pool = self.lanes, ThreadPoolExecutor(4 * self.batch + 64, "answers")
        try:
            while (batch := self.next_batch()) is not None or lanes.open:
                if batch:
                    lanes.open.append(Lane(batch))
                    pool.submit(lanes.open[-1].run, self.answer)
                if lanes.open:
                    self.step(lanes.following())
        finally:
            # An error here is a fault of ours; who waits on a lane's thread should not wait for ever.
            for lane in lanes.open:
                lane.drop()
            pool.shutdown()

    def step(self, lane):
        """One step of a lane, with what the model keeps between two steps of it and of no other."""
        self.model.kept = lane.kept
        lane.step()
        lane.kept = self.model.kept
        if lane.ended:
            self.lanes.close(lane)

    def answer(self, batch, lane=None):
        """One call of generate, with a pause in its lane after each step; where it fails, each job by itself.
        """
        try:
            texts = generate.generate(
                self.model,
                [job.prompt for job in batch],
                self.fmt,
                batch[0].limit,
                latents=self.latents,
                streamer=Steps(self, batch, lane),
            )
        except Abandoned:
            return
        except Exception as error:
            if len(batch) == 1:
                log.exception("a request failed")
                batch[0].tell("failed", f"the model failed on this request: {type(error).__name__}")
            texts = None
        # Too little memory for the whole batch, say: one by one, so that each gets what it can.
        if texts is None:
            for job in batch if len(batch) > 1 else ():
                self.answer([job], lane)
            return
        for job, text in zip(batch, texts):
            if job.ended:
                continue

            # Beside a longer row one that feeds itself ends in padding, which is none of its tokens.
            while job.said and job.said[-1] == self.model.tokenizer.pad_token_id:
                job.said.pop()
            # A method that generates in its own way may not tell its steps.
            tokens = len(job.said) or len(self.fmt.text(text))
            before = before_stop(text, job.stop)
            cut = tokens >= job.limit and self.fmt.end not in job.said and before is None
            job.finish(text if before is None else before, tokens, "length" if cut else "stop")


def before_stop(text, stop):
    """The text up to the first of the strings that stands in it; None where none does."""
    places = [text.index(string) for string in stop if string in text]
    return text[: min(places)] if places else None


def certain(text, stop):
    """The text less what may become one of the strings, or is half a character."""
    if text.endswith("\ufffd"):
        return ""
    begun = [n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])]
    return text[: len(text) - max(begun, default=0)]


class Steps:
    """What generate tells after each token: counts them, passes on new text, and lets other lanes go on."""

    def __init__(self, engine, batch, lane=None):
        self.engine, self.batch, self.lane, self.begun = engine, batch, lane, False
        for job in batch:
            job.said = []

    def put(self, tokens):
        if not self.begun:  # the prompts come first
            self.begun = True
            return

        for job, token in zip(self.batch, tokens.tolist()):
            if not job.ended and self.engine.fmt.end not in job.said:  # else padding beside longer answers
                job.said.append(token)
                self.read(job)
        if all(job.gone or job.ended for job in self.batch):
            raise Abandoned
        if self.lane is not None:
            self.lane.pause()

    def read(self, job):
        """Tells what a job's new token adds to its text, and ends the job at a stop string."""
        model, fmt = self.engine.model, self.engine.fmt
        own_thought = (fmt.feeds_back or fmt.writes_own_latents) and fmt.answer_start_id not in job.said
        if own_thought or not (job.stream or job.stop):
            return  # a thought of its own is no answer yet

        text = generate.answer_text(model, fmt, job.said)
        before = before_stop(text, job.stop)
        if before is not None:
            job.finish(before, len(job.said), "stop")
        elif job.stream:
            job.say(certain(text, job.stop))

    def end(self):
        pass
