"""Several answers side by side, one step of one of them at a time: a long one does not hold up a short one.

Each batch is answered in a lane, a thread that stands still after each step until it is told to go on. Whose
step is next, and what may begin, is told from work, counted in tokens and not in time: a step of a prompt is
as much as it has tokens, a step of an answer as much as STEP of them.
"""

import threading

STEP = 32  # about so many tokens of a prompt take as long as an answer's next one: the weights are read once
LONG = 32 * STEP  # work after which an answer has shown itself to be a long one
OPEN = 8  # lanes beside which no more are opened for what may be long itself
SHARE = 4  # of all work the oldest lane gets at least one part in so many


class Abandoned(Exception):
    """Nobody waits for this batch any more: all have their answers, or are gone."""


def work_of(job):
    """The most work that a job may be by itself."""
    return max(STEP, len(job.prompt[0])) + STEP * job.limit


class Lane:
    """A batch on its way: a thread that runs answer(batch, lane) a step at a time.

    held: tokens that it may come to keep. done, left, next: work so far, until its end at most, and of the
    next step. kept: what the model kept after the last step.
    """

    def __init__(self, batch):
        longest = max(len(job.prompt[0]) for job in batch)
        limit = batch[0].limit
        self.batch, self.held = batch, len(batch) * (longest + limit)
        self.next = max(STEP, len(batch) * longest)
        self.done, self.left = 0, self.next + STEP * limit
        self.kept, self.ended, self.dropped = None, False, False
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self, answer):
        """In the lane's thread: answers the batch, once `step` says so."""
        self.go.acquire()
        try:
            if not self.dropped:
                answer(self.batch, self)
        finally:
            self.ended = True
            self.back.release()

    def pause(self):
        """In the lane's thread, between two steps: stands still until the next `step`."""
        self.next = STEP
        self.back.release()
        self.go.acquire()
        if self.dropped:
            raise Abandoned

    def step(self):
        """Lets the lane run to the end of its next step."""
        self.done += self.next
        self.left -= self.next
        self.go.release()
        self.back.acquire()

    def drop(self):
        """Ends a lane whose answers nobody will get."""
        self.dropped = True
        self.step()

    def gives_way(self, work):
        """Whether what is so much work at most should not wait for this lane."""
        return work <= self.left / 2 or self.done >= LONG


class Lanes:
    """The open lanes, oldest first.

    room: tokens that may be kept in all of them together. owed: work of others since the oldest's last share.
    """

    def __init__(self, room):
        self.room, self.open, self.owed = room, [], 0

    def takes(self, job):
        """Whether a job may begin now, beside what is open.

        One that is at most half of what is left of each lane always may; that halves again and again, so
        there are never many. Else it waits for those that have not shown themselves to be long.
        """
        work = work_of(job)
        if all(work <= lane.left / 2 for lane in self.open):
            return True
        held = sum(lane.held for lane in self.open) + len(job.prompt[0]) + job.limit
        if len(self.open) >= OPEN or held > self.room:
            return False
        return all(lane.gives_way(work) for lane in self.open)

    def following(self):
        """The lane whose step is next: the one that has had least, and for a share of the work the oldest."""
        oldest = self.open[0]
        least = min(self.open, key=lambda lane: lane.done + lane.next)
        if least is oldest:
            return oldest

        if self.owed >= (SHARE - 1) * oldest.next:
            self.owed -= (SHARE - 1) * oldest.next
            return oldest
        self.owed += least.next
        return least

    def close(self, lane):
        """Takes out a lane that has ended; what was owed was the oldest's alone."""
        if lane is self.open[0]:
            self.owed = 0
        self.open.remove(lane)
