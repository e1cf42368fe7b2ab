"""Ranks, reductions, printing on one rank, and the signals that end a run.

Beside shard.py this is the only file that knows torch.distributed's calls. One process and many take the
same path. Without torchrun no process group is made and every method is the identity; under torchrun (RANK,
WORLD_SIZE, LOCAL_RANK) the group is nccl on CUDA and gloo on a CPU. A model that fits one device is
replicated, and gradients are averaged by DistributedDataParallel; shard.py cuts one that does not.
"""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from crystal.runtime.config import UserError


class RankFailed(UserError):
    """Another rank failed inside `main_process_first()`; its own error says why, so one line is enough."""


@dataclass(frozen=True)
class Processes:
    """This process among `world` many. Every rank must call a method that communicates, in the same order."""

    rank: int = 0  # among all processes
    world: int = 1  # how many there are
    local_rank: int = 0  # among the processes of this machine
    device: torch.device = torch.device("cpu")
    guest: bool = False  # the group is the caller's, as where one program calls another's main; it ends it

    @property
    def is_first(self):
        """True on rank 0: the one that prints and writes."""
        return self.rank == 0

    def print(self, *values):
        """Prints on rank 0 only, flushed, so that a line is in the log before the run ends."""
        if self.is_first:
            print(*values, flush=True)

    @torch.no_grad()
    def sum(self, value):
        """Sum over ranks, the same on each.

        A float is summed in float64, an int in int64; a tensor keeps shape, dtype and device, and is
        not changed in place.
        """
        if not isinstance(value, torch.Tensor):
            if self.world == 1:
                return value
            dtype = torch.float64 if isinstance(value, float) else torch.int64
            return self.sum(torch.tensor(value, dtype=dtype, device=self.device)).item()

        if self.world == 1:
            return value.detach().clone()
        total = value.to(self.device, copy=True)  # nccl reduces tensors on its own device only
        dist.all_reduce(total)
        return total.to(value.device)

    def any(self, flag):
        """True on every rank if `flag` is true on any: how ranks agree to stop.

        Returns only when all ranks have called it.
        """
        return self.sum(int(bool(flag))) > 0

    def barrier(self):
        """Wait for all ranks: nobody can read the sum before everybody has given to it."""
        self.any(False)

    def gather(self, items):
        """Concatenates every rank's list, in rank order, on every rank.

        Items are JSON values, because the general gather of objects unpickles what another process
        sent; tuples come back as lists and keys as strings, with one process as with many.
        TypeError for anything else.
        """
        text = json.dumps(list(items)).encode()
        if self.world == 1:
            return json.loads(text)

        size = torch.tensor([len(text)], device=self.device)
        sizes = [torch.empty_like(size) for _ in range(self.world)]
        dist.all_gather(sizes, size)
        sizes = [int(n) for n in sizes]

        # All_gather wants equal sizes.
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)

        found = []
        for n, part in zip(sizes, parts):
            found += json.loads(bytes(part[:n].tolist()))
        return found

    @contextmanager
    def main_process_first(self):
        """The first process of each machine runs the body alone; then the others do, and find its files.

        If it fails, the others raise RankFailed instead of repeating the mistake side by side. The body must
        finish within a day and must not communicate.
        """
        if self.world == 1:
            yield
            return

        # A download of many gigabytes takes longer than start()'s `timeout`, which is short so that a
        # hang of the run ends soon. So this wait has a group of its own; gloo's, which notices at once
        # when a process dies.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))

        def any_failed(failed):
            flag = torch.tensor(int(failed))
            dist.all_reduce(flag, group=group)
            return bool(flag)

        leads, done = self.local_rank == 0, False
        try:
            if not leads and any_failed(False):
                raise RankFailed("the first process failed; its error is the one to read")
            try:
                yield
                done = True
            finally:
                failed = leads and any_failed(not done)
            if failed:
                raise RankFailed("the first process of another machine failed; its error is the one to read")
        finally:
            dist.destroy_process_group(group)

    def wrap(self, module):
        """`module`, with many processes as DistributedDataParallel.

        Rank 0's weights are sent to all, and backward averages gradients over ranks. Buffers are not sent at
        each forward, and no search is made for unused parameters: all that require a gradient must receive
        one in every step (no_pictures.py sees to it where a batch has no picture).
        """
        if self.world == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None

        # In torch 2.13.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
        send_buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, **send_buffers)

    def no_sync(self, module, on=True):
        """Context around forward and backward of a wrapped module; with `on`, gradients stay on their rank.

        For all but the last part of an accumulated batch.
        """
        return module.no_sync() if on and self.world > 1 else nullcontext()

    def stop(self):
        """Leaves the group, unless it is the caller's.

        The last call of a run; harmless without a group and when called twice.
        """
        if self.world > 1 and not self.guest and dist.is_initialized():
            dist.destroy_process_group()


def start(device="auto", timeout=600.0):
    """Joins the run that torchrun described, or is its only process -> Processes.

    Where this process is in the run's group already, that one is used. device: "auto" (CUDA where there is
    any), "cpu", "cuda", or for one process any torch device name. timeout: seconds that a rank waits for
    the others in one call; it bounds how long they hang if one dies without torchrun noticing, and must
    exceed the slowest thing one rank does alone outside first(). UserError: half a torchrun environment, or
    fewer GPUs than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"WORLD_SIZE is {world}, but RANK, LOCAL_RANK, MASTER_ADDR or MASTER_PORT is not set; start "
            "several processes with torchrun"
        )
    rank, local_rank = (int(os.environ[name]) if world > 1 else 0 for name in ("RANK", "LOCAL_RANK"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if world > 1 else 1

    # The device.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        if device == "auto":
            device = "cuda" if gpus else "cpu"
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: there is none of this name; use auto, cpu or cuda") from None
    if device.type == "cuda":
        if local_world > gpus:
            raise UserError(
                f"--device {device}: {local_world} process(es) on this machine but {gpus} CUDA device(s); "
                "use the device cpu, or no more processes than devices"
            )
        device = torch.device("cuda", local_rank if world > 1 or device.index is None else device.index)
        if device.index >= gpus:
            raise UserError(f"--device {device}: this machine has {gpus} CUDA device(s)")
        torch.cuda.set_device(device)
    elif world > 1 and device.type != "cpu":
        raise UserError(f"--device {device}: several processes run on cuda or cpu")

    # Threads, and the group.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cpu_threads(cores, local_world, os.environ)
    if threads:
        torch.set_num_threads(threads)

    guest = world > 1 and dist.is_initialized()
    if world > 1 and not guest:
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=device if on_cuda else None,
        )
    return Processes(rank, world, local_rank, device, guest)


def launch(count, module, argv):
    """`torchrun --nproc_per_node=count -m module argv` in the place of this process.

    One process, or one that torchrun started, just goes on.
    """
    if count > 1 and "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, without a warning to read
        sys.stdout.flush()
        os.execv(
            sys.executable,
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={count}",
                "-m",
                module,
                *argv,
            ],
        )


def run_program(count, script, argv):
    """`torchrun --nproc_per_node=count script argv`, or plain python for one process; waits for its end.

    For a program that another one needs the files of, and that shall not be imported for that. UserError if
    it fails, after its own lines. Ranks that are under way start it on one of them.
    """
    # What torchrun told this process of its rank is not true of the new program's processes.
    mine = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in mine and not name.startswith(prefixes)
    }
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    )
    sys.stdout.flush()
    ended = subprocess.run([sys.executable, *torchrun, str(script), *map(str, argv)], env=environment)
    if ended.returncode:
        raise UserError(f"{script} ended with exit code {ended.returncode}; its own lines above say why")


def cpu_threads(cores, local_world, environ):
    """Threads for this process: cores / processes, or None where OMP_NUM_THREADS is the user's choice.

    torchrun sets it to 1 for several processes if it was not set, which leaves most of a CPU idle, so under
    torchrun a 1 counts as torchrun's; whoever wants one thread there starts with taskset.
    """
    chosen = environ.get("OMP_NUM_THREADS")
    by_torchrun = chosen == "1" and local_world > 1 and "TORCHELASTIC_RUN_ID" in environ
    return None if chosen and not by_torchrun else max(1, cores // local_world)


class StopSignal:
    """SIGTERM and SIGINT set `asked` instead of ending the process, so that the loop can save.

    `asked` is the signal's name, None before one came; the loop first finishes its step. The loop asks
    `procs.any(stop.asked)` after each step; torchrun kills 30 s after its signal. A second SIGINT, half a
    second or more after the first, raises KeyboardInterrupt. Main thread only (ValueError from `signal`
    elsewhere). `restore()` puts the former handlers back. `code` is the exit code of a process whose run was
    ended so, 143 or 130, as shells and launchers expect it; 0 where none was.
    """

    code = 0

    def __init__(self):
        self.asked, self.at, self.owner = None, 0.0, os.getpid()
        StopSignal.code = 0
        self.former = {
            number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def handle(self, number, frame):
        # A forked child inherits this handler; its parent must still be able to end it.
        if os.getpid() != self.owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return

        # Ctrl-C may come twice, from the terminal and from a launcher.
        again = time.monotonic() - self.at > 0.5
        if number == signal.SIGINT and self.asked == "SIGINT" and again:
            raise KeyboardInterrupt
        self.asked, self.at = signal.Signals(number).name, time.monotonic()

    def ended(self):
        """Notes that a run was stopped: by this process's signal, or by that of another rank."""
        StopSignal.code = 128 + signal.Signals[self.asked or "SIGTERM"]

    def restore(self):
        for number, handler in self.former.items():
            signal.signal(number, handler)


def ignore_signals(worker=0):
    """`worker_init_fn` of a DataLoader: workers outlive a signal to the whole process group.

    torchrun signals the group, and a worker that dies of it would break the step that is to be finished.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
