"""What a run says while it trains: numbers of updates, read when they are there, logged and shown.

    metrics.jsonl    a line an update: terms of the loss, rate, gradient norm, tokens/s, peak memory
    the screen       a bar on a terminal, elsewhere a line every --log_every updates

Only the first rank writes and prints; all ranks read, so that all stop together.
"""

import sys
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

from crystal.run_directory import write
from crystal.runtime.config import UserError
from crystal.runtime.late import Numbers


class Update(NamedTuple):
    """What is to be told of an update: number from 0, rate, the places of its records, Numbers."""

    step: int
    rate: float
    where: list
    numbers: Numbers


class Teller:
    """Tells of one run's updates; begun at update `step`. monitored: terms that the screen leaves out.

    log, board: the open metrics.jsonl, and TensorBoard's writer or None, once there are any.
    """

    def __init__(self, settings, monitored, procs, step):
        self.settings = settings
        self.monitored = monitored
        self.procs = procs
        self.log = self.board = None
        self.clock = 0.0
        hidden = not (procs.is_first and sys.stderr.isatty())
        self.bar = tqdm(total=settings.max_steps, initial=step, unit="step", disable=hidden)

    def start_clock(self):
        """Time is counted from here."""
        self.clock = time.perf_counter()

    def read(self, update, good):
        """Waits for an update's numbers -> late.Told; UserError, on all ranks, where they are not finite.

        good: a function that returns the newest checkpoint's path, or None.
        """
        told = update.numbers.read()
        if not told.finite:
            found = f"loss {told.means['loss']} or gradient norm {told.norm}"
            raise UserError(
                f"update {update.step}: {found} is not finite; "
                f"stopped before the update, the last good checkpoint is {good() or 'none'}; "
                f"its records: {', '.join(self.procs.gather(update.where))}"
            )
        return told

    def tell(self, update, told):
        """Logs an update that is done, and prints it where one is due.

        Its speed is that since the last one was told, or the clock was started.
        """
        before = self.clock
        self.start_clock()
        if not self.procs.is_first:
            return

        done, means = update.step + 1, told.means
        speed = told.tokens / (self.clock - before)
        line = {"step": done, **means, "lr": update.rate, "grad_norm": told.norm, "tokens_per_s": speed}
        write(self.log, self.board, line | {"peak_memory_gb": peak_memory(self.procs.device)})

        shown = {n: f"{v:.3f}" for n, v in means.items() if n not in self.monitored}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        last = self.settings.max_steps
        if self.bar.disable and (done % self.settings.log_every == 0 or done == last):
            print(f"step {done}/{last}  {listed(means)}  {speed:.0f} tokens/s", flush=True)

    def tell_validation(self, step, numbers, is_best, news):
        """Logs and prints a validation's numbers after `step` updates. news: lines that follow them."""
        if not self.procs.is_first:
            return
        write(self.log, self.board, {"step": step, **{f"val_{n}": v for n, v in numbers.items()}})
        said = f"step {step}  validation  {listed(numbers)}{'  (best)' if is_best else ''}"
        self.bar.write("\n".join([said, *news]))


def listed(numbers):
    """{name: number} as it is printed."""
    return "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())


def peak_memory(device):
    """Peak memory of this process in GB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
