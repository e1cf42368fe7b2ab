"""One process without a group, and two gloo processes: this file, run as a script with the
environment that torchrun gives.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from crystal.runtime import distributed
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes, RankFailed, StopSignal, cpu_threads, start

ROOT = Path(__file__).resolve().parents[1]


# --- what each of two processes does; returns JSON ---


def communicate(procs, folder):
    mine = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    scaled = mine * (procs.rank + 1)
    total = procs.sum(scaled)
    procs.print("only once")
    procs.barrier()
    # 1 item and 4: unequal lengths.
    return {
        "float": procs.sum(1.0 if procs.is_first else 2.0**-40),  # float32 would lose the second
        "int": procs.sum(2**53 if procs.is_first else 1),  # float64 would lose the second
        "tensor": [
            total.tolist(),
            str(total.dtype),
            total.requires_grad,
            torch.equal(scaled, mine * (procs.rank + 1)),
        ],
        "any": [procs.any(procs.rank == 1), procs.any(False), procs.any(True)],
        "gather": procs.gather([{"rank": procs.rank, "text": "é" * i} for i in range(3 * procs.rank + 1)]),
        "empty": procs.gather([]),
    }


ROWS = torch.arange(24.0, dtype=torch.float64).reshape(8, 3).sin()


def gradients(procs, folder):
    """Of the mean of squares over all ranks' rows, accumulated over two halves of this rank's rows."""
    torch.manual_seed(procs.rank)  # on purpose different: wrap() must send rank 0's weights
    layer = torch.nn.Linear(3, 1).double()
    model, mine = procs.wrap(layer), ROWS.chunk(procs.world)[procs.rank]
    for i, part in enumerate(mine.chunk(2)):
        with procs.no_sync(model, i == 0):
            (model(part).square().mean() / 2).backward()
        if i == 0:
            unsynced = layer.weight.grad.clone()
    return layer.weight.tolist(), layer.weight.grad.tolist(), unsynced.tolist()


def first(procs, folder):
    made, seen = folder / "made", []
    with procs.main_process_first():
        seen.append(made.exists())
        if not made.exists():
            time.sleep(0.3)
            made.write_text("once")
    try:
        with procs.main_process_first():
            seen.append("ran")
            if procs.is_first:
                raise ValueError
    except (ValueError, RankFailed) as error:
        seen.append(type(error).__name__)
    return seen


def patient(procs, folder):
    """The first process takes longer than the group's timeout; then the group is as it was."""
    default = torch.distributed.distributed_c10d._get_default_group()
    set_timeout = lambda seconds: torch.distributed.distributed_c10d._set_pg_timeout(
        timedelta(seconds=seconds), default
    )
    set_timeout(1)
    began = time.monotonic()
    with procs.main_process_first():
        if procs.is_first:
            time.sleep(3)
    set_timeout(60)
    return time.monotonic() - began > 2.5, procs.sum(1)


def guest(procs, folder):
    """A program that calls another's main: the group is joined, and lives on after the other's end."""
    inner = start("cpu")
    inner.stop()
    return [inner.guest, procs.guest, inner.rank == procs.rank, procs.sum(1)]


def agree(procs, folder):
    """One rank is signalled, as by a scheduler that knows one process."""
    stop = StopSignal()
    for step in range(1, 200):
        if step == 3 and procs.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if procs.any(stop.asked):
            break
    stop.restore()
    return step, stop.asked


def dead(procs, folder):
    """Rank 1 dies; seconds until rank 0 notices."""
    if procs.rank == 1:
        sys.stdout.flush()
        os._exit(3)
    began = time.monotonic()
    try:
        procs.barrier()
    except RuntimeError:
        return time.monotonic() - began


if __name__ == "__main__":
    folder, *acts = sys.argv[1:]
    procs = start("cpu", timeout=60)
    for act in acts:
        print(f"RESULT {act} {json.dumps(globals()[act](procs, Path(folder)))}", flush=True)
    os._exit(0)  # not stop(): at the end of these acts there may be nobody to leave with


def launch(folder, *acts):
    """Two processes that do `acts`, with the names torchrun sets; returns {act: [result of rank 0, of rank
    1]}, their output, their exit codes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(2):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONIOENCODING": "utf-8",
        }
        runs.append(
            subprocess.Popen(
                [sys.executable, __file__, str(folder), *acts],
                env=env,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        )
    try:
        outputs = [run.communicate(timeout=90)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    results = {act: [] for act in acts}
    for line in "".join(outputs).splitlines():
        if line.startswith("RESULT"):
            _, act, value = line.split(" ", 2)
            results[act].append(json.loads(value))
    return results, outputs, [run.returncode for run in runs]


# --- two processes ---


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """All acts in one launch, since starting two processes is what takes the time."""
    return launch(
        tmp_path_factory.mktemp("two"), "communicate", "gradients", "first", "patient", "guest", "agree",
        "dead",
    )


def test_two_processes_communicate(two):
    results, outputs, _ = two
    one, other = results["communicate"]
    assert one == other
    assert one["float"] == 1 + 2.0**-40 and one["int"] == 2**53 + 1
    assert one["tensor"] == [[[3.0, 6.0]], "torch.float64", False, True]
    assert one["any"] == [True, False, True] and one["empty"] == []
    assert one["gather"] == [{"rank": 0, "text": ""}] + [{"rank": 1, "text": "é" * i} for i in range(4)]
    assert [output.count("only once") for output in outputs] == [1, 0]


def test_wrapped_gradients_equal_one_process(two):
    """Half the rows each: rank 0's weights, the whole batch's gradient; before the last part of an
    accumulated batch nothing is exchanged.
    """
    weight, gradient, _ = gradients(Processes(), None)
    for result in two[0]["gradients"]:
        assert result[0] == weight
        torch.testing.assert_close(
            torch.tensor(result[1], dtype=torch.float64),
            torch.tensor(gradient, dtype=torch.float64),
            rtol=1e-12,
            atol=1e-12,
        )
    one, other = two[0]["gradients"]
    assert one[1] == other[1] and one[2] != other[2]


def test_first_runs_first_and_its_failure_reaches_the_others(two):
    assert two[0]["first"] == [[False, "ran", "ValueError"], [True, "RankFailed"]]


def test_others_wait_for_the_first_longer_than_for_each_other(two):
    assert two[0]["patient"] == [[True, 2], [True, 2]]


def test_a_group_that_is_there_is_shared_and_left_alone(two):
    assert two[0]["guest"] == [[True, False, True, 2]] * 2


def test_ranks_agree_to_stop(two):
    """All leave the loop after the same step."""
    assert two[0]["agree"] == [[3, None], [3, "SIGTERM"]]


def test_a_dead_rank_does_not_hang_the_others(two):
    results, _, codes = two
    assert results["dead"][0] < 30 and codes == [0, 3]


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "nccl")])
def test_the_group_is_made_for_the_device_and_waits_for_the_timeout(monkeypatch, device, backend):
    """Without a GPU: what torch is asked for."""
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(current=device))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **named: asked.update(named, backend=backend)
    )
    for name, value in {
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    procs = start("auto", timeout=7)
    here = torch.device("cuda", 1) if device == "cuda" else torch.device("cpu")
    assert (
        procs == Processes(3, 4, 1, here)
        and asked["backend"] == backend
        and asked["timeout"].total_seconds() == 7
    )
    assert asked["device_id"] == asked.get("current") == (here if device == "cuda" else None)


# --- one process ---


def test_one_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    procs = start("cpu")
    torch.set_num_threads(threads)
    assert (
        not torch.distributed.is_initialized()
        and procs == Processes(0, 1, 0, torch.device("cpu"))
        and procs.is_first
    )
    assert procs.sum(0.5) == 0.5 and procs.sum(3) == 3 and procs.any(True) and not procs.any(False)
    tensor = torch.ones(2, requires_grad=True)
    total = procs.sum(tensor)
    assert torch.equal(total, tensor) and not total.requires_grad and total.data_ptr() != tensor.data_ptr()
    assert procs.gather([(1, 2), {"a": None}]) == [[1, 2], {"a": None}]
    with pytest.raises(TypeError):
        procs.gather([tensor])
    module = torch.nn.Linear(1, 1)
    assert procs.wrap(module) is module
    with procs.no_sync(module), procs.main_process_first():
        procs.barrier()
    with pytest.raises(ZeroDivisionError), procs.main_process_first():
        1 / 0
    procs.stop()


def test_one_clear_line_for_a_wrong_start(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="RANK.*torchrun"):
        start("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="--device gpu: there is none"):
        start("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device cuda: 2 process.*1 CUDA"):
        start("cuda")


def test_threads_are_cores_over_processes_unless_the_user_chose():
    assert cpu_threads(8, 1, {}) == 8 and cpu_threads(8, 3, {}) == 2 and cpu_threads(2, 4, {}) == 1
    assert cpu_threads(8, 2, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}) == 4  # torchrun's own 1
    for chosen in ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}):
        assert cpu_threads(8, 2, chosen) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_restore_forgets(number):
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = StopSignal()
    try:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == signal.Signals(number).name
        try:
            os.kill(os.getpid(), number)  # at once: the same Ctrl-C seen twice
        except KeyboardInterrupt:
            pytest.fail("one Ctrl-C was taken for two")
        stop.at -= 1  # and later: the user means it
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        else:
            os.kill(os.getpid(), number)
    finally:
        stop.restore()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former


def test_a_forked_child_can_still_be_ended():
    stop = StopSignal()
    try:
        ready, started = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(started, b"x")
            time.sleep(5)
            os._exit(0)
        os.read(ready, 1)  # Python drops a signal that arrives while it forks
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGTERM)
        assert (
            os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM and stop.asked is None
        )
    finally:
        stop.restore()


def test_launch_is_torchrun_once(monkeypatch):
    """In the place of this process; a process that torchrun started, or one alone, goes on."""
    told = []
    monkeypatch.setattr(os, "execv", lambda program, argv: told.append([program, *argv]))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own choice stays
    distributed.launch(1, "crystal.demo", [])
    distributed.launch(2, "crystal.demo", ["--seed", "5"])
    assert told == [
        [
            sys.executable, sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node=2", "-m", "crystal.demo", "--seed", "5",
        ]
    ]
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.launch(2, "crystal.demo", [])
    assert len(told) == 1


def test_a_program_is_run_beside_with_ranks_of_its_own(monkeypatch, tmp_path, capfd):
    """One of two ranks starts it: it gets its flags, in two processes that know nothing of the first two."""
    script = tmp_path / "told.py"
    script.write_text(
        "import os, sys\n"
        "told = [sys.argv[1:], *map(os.environ.get, ['RANK', 'WORLD_SIZE', 'OWN'])]\n"
        "os.write(1, (' '.join(map(str, told)) + chr(10)).encode())  # in one piece, since two write\n"
        "sys.exit(sys.argv[1] == 'fail')\n"
    )
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "1",
        "OWN": "stays",
    }.items():
        monkeypatch.setenv(name, value)
    distributed.run_program(1, script, ["--limit", 3])
    assert capfd.readouterr().out == "['--limit', '3'] None None stays\n"
    distributed.run_program(2, script, ["--limit", 3])
    assert sorted(capfd.readouterr().out.splitlines()) == [
        f"['--limit', '3'] {rank} 2 stays" for rank in (0, 1)
    ]
    with pytest.raises(UserError, match="told.py ended with exit code 1; its own lines above say why"):
        distributed.run_program(1, script, ["fail"])


def test_a_launch_from_a_shell_takes_one_thread_each(monkeypatch):
    """As torchrun would say itself, with three lines of warning."""
    monkeypatch.setattr(os, "execv", lambda program, argv: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "x")
    monkeypatch.delenv("OMP_NUM_THREADS")
    distributed.launch(2, "crystal.demo", [])
    assert os.environ["OMP_NUM_THREADS"] == "1"


def described(monkeypatch, **names):
    """The environment of a process of a run; what torch is asked for is recorded, not done."""
    asked = {}
    for name in (*RUN, "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: asked.update(threads=n))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _, **named: asked.update(named))
    return asked


RUN = {"WORLD_SIZE": "6", "RANK": "5", "LOCAL_RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


BY_TORCHRUN = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}
HERE = {"LOCAL_WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    "more, threads", [({}, 4), (HERE, 8), ({"OMP_NUM_THREADS": "5"}, None), (BY_TORCHRUN, 12)]
)
def test_a_process_takes_its_share_of_this_machines_cores(monkeypatch, more, threads):
    """24 cores over the processes here; where the launcher does not say how many those are, all of them."""
    asked = described(monkeypatch, **RUN, **more)
    procs = start("cpu", timeout=9)
    assert asked.get("threads") == threads and asked["timeout"].total_seconds() == 9
    assert (procs.rank, procs.world, procs.local_rank, procs.guest, procs.is_first) == (5, 6, 2, False, False)


def test_one_process_takes_all_cores_and_reads_no_rank(monkeypatch):
    asked = described(monkeypatch, RANK="5", LOCAL_RANK="2")  # left over from something else
    assert start("cpu") == Processes() and asked == {"threads": 24}


@pytest.mark.parametrize(
    "device, names, index",
    [("cuda", RUN | HERE, 2), ("cuda:1", RUN | HERE, 2), ("auto", {}, 0), ("cuda", {}, 0), ("cuda:1", {}, 1)],
)
def test_which_gpu_is_whose(monkeypatch, device, names, index):
    """Of several processes each has the one of its number on this machine; one alone may choose."""
    described(monkeypatch, **names)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert start(device).device == torch.device("cuda", index) and chosen == [torch.device("cuda", index)]


@pytest.mark.parametrize(
    "device, names, told",
    [
        ("cuda:3", {}, "--device cuda:3: this machine has 3 CUDA"),
        ("meta", RUN, "--device meta: several processes run on cuda or cpu"),
        ("cuda", RUN, r"6 process\(es\) on this machine but 3"),
        ("cpu", {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR or MASTER_PORT"),
    ],
)
def test_devices_that_there_are_not(monkeypatch, device, names, told):
    described(monkeypatch, **names)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(UserError, match=told):
        start(device)


def test_a_module_is_wrapped_for_its_device_without_sending_buffers(monkeypatch):
    told = []

    class Wrapped:
        def __init__(self, module, device_ids=None, gradient_as_bucket_view=False, broadcast_buffers=True):
            told.append((module, device_ids, gradient_as_bucket_view, broadcast_buffers))

        def no_sync(self):
            return "unsynced"

    monkeypatch.setattr(distributed, "DistributedDataParallel", Wrapped)
    many = Processes(1, 2, 1, torch.device("cuda", 1))
    wrapped = many.wrap("module")
    Processes(1, 2, 1).wrap("other")
    assert told == [("module", [1], True, False), ("other", None, True, False)]
    assert many.no_sync(wrapped) == many.no_sync(wrapped, True) == "unsynced"
    for context in (many.no_sync(wrapped, False), Processes().no_sync(wrapped, True)):
        with context as nothing:
            assert nothing is None


def test_the_first_prints_at_once(monkeypatch, capsys):
    flushed = []
    monkeypatch.setattr("builtins.print", lambda *values, flush=False: flushed.append((values, flush)))
    Processes(rank=0, world=2, local_rank=1).print("a", 1)
    Processes(rank=1, world=2, local_rank=0).print("b")
    monkeypatch.undo()
    assert flushed == [(("a", 1), True)]


def test_a_worker_ignores_what_ends_a_run():
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        distributed.ignore_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in former)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
