"""What on_gpu.sh does in Python: versions, the card, every method's training, their curves, reading results.

    python tests/on_gpu.py versions | card | train | curves | times | kernels | counted    (each with --help)

Lines that begin with ">> " are for the screen, the others for the log.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Every method on the shipped tiny model, much as the demo trains it. Dropout would draw other masks on
# another device. VaLR trains every weight (float32, with bfloat16 products), the others adapters.
SHARED = [
    "--batch_size", "8", "--lr", "1e-3", "--lr_tokens", "10", "--lora_dropout", "0", "--eval_every", "0",
    "--save_every", "1000",
]
METHODS = {
    "sft": [],
    "crystal": ["--labels", "answer"],
    "released": ["--labels", "answer"],
    "livr": [],
    "lavit": ["--tune", "lora"],
    "valr": ["--lr_latents", "3e-4", "--latents", "4", "--encoders", "tiny"],
}

# How far a loss may lie from the CPU's in float32, |difference| / (1 + the CPU's): at the first update, where
# the weights are the same, and on average over the updates, in which differences grow.
TOLERANCE = {"float32": (1e-3, 0.05), "bfloat16": (0.05, 0.3)}


def say(text):
    """Prints a line for the screen."""
    print(f">> {text}", flush=True)


# --- versions ---

NEEDED = ["torch", "numpy", "transformers", "tokenizers", "safetensors", "pillow", "tqdm", "pytest", "setuptools"]  # noqa: E501
HELPFUL = ["ninja", "pytest-xdist"]  # without them it takes longer


def version_of(package):
    """A package's version, or nothing where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def versions(options):
    """Prints the versions of what the other parts need; fails where something is missing or does not load."""
    found = {package: version_of(package) for package in NEEDED + HELPFUL}
    words = [f"{package} {version or 'missing'}" for package, version in found.items()]
    say(f"Python {sys.version.split()[0]}, {', '.join(words)}")
    missing = [package for package in NEEDED if not found[package]]
    if missing:
        sys.exit(f"missing: {', '.join(missing)}; the head of tests/on_gpu.sh says how wheels bring them")
    import torch
    import transformers

    print(f"transformers comes from {transformers.__file__}")
    say(f"torch is built for CUDA {torch.version.cuda} and sees {torch.cuda.device_count()} GPU(s)")


# --- the card ---

FIELDS = [
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "power.draw", "temperature.gpu",
]
CHANGING = {"clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"}  # with what the card does


def ask_driver():
    """What nvidia-smi says of the first GPU: {field: value with its unit}."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return {"nvidia-smi": f"gave no answer: {error}"}
    return dict(zip(FIELDS, done.stdout.splitlines()[0].split(", ")))


def median_seconds(f, cuda, runs=10):
    """Median time of f, after three runs that do not count."""
    import torch

    taken = []
    for _ in range(3 + runs):
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            f()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            f()
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[3:])


def card(options):
    """Prints name, driver, clocks, bandwidth of a copy, speed of random products; writes them as JSON."""
    import torch

    cuda = options.device == "cuda"
    found = {"torch": torch.__version__}
    if cuda:
        found["at_rest"] = ask_driver()
        say(", ".join(f"{name} {value}" for name, value in found["at_rest"].items()))
        if not torch.cuda.is_available():
            sys.exit("torch sees no GPU")
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": properties.total_memory / 1e9,
        }
        say(
            f"{found['gpu']}, compute capability {found['capability']}, "
            f"{found['multiprocessors']} multiprocessors, {found['memory_gb']:.1f} GB"
        )

    source = torch.ones((1 << 31 if cuda else 1 << 26) // 4, device=options.device)
    target = torch.empty_like(source)
    found["copy_gb_s"] = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), cuda) / 1e9
    say(f"copy {found['copy_gb_s']:.0f} GB/s, read and written")

    n = 8192 if cuda else 256
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        a, b = (torch.randn(n, n, device=options.device).to(dtype) for _ in range(2))
        found[f"{name}_tflop_s"] = 2 * n**3 / median_seconds(lambda: a @ b, cuda) / 1e12
        say(f"product of {n} x {n} {name}: {found[f'{name}_tflop_s']:.3g} TFLOP/s")
    if cuda:
        for _ in range(1500):  # some two seconds of work, in which the driver is asked
            a @ b
        found["at_work"] = ask_driver()
        torch.cuda.synchronize()
        changed = [f"{name} {value}" for name, value in found["at_work"].items() if name in CHANGING]
        say(f"at work: {', '.join(changed)}")
    Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


# --- training ---


def train_one(method, options):
    """Trains one method in a process of its own -> its exit code, its seconds."""
    records = Path(options.scenes) / ("train.lavit.jsonl" if method == "lavit" else "train.jsonl")
    command = [
        sys.executable, "-m", "crystal.train", "--method", method, "--data", str(records),
        "--output", f"{options.out}/{method}", "--max_steps", str(options.updates),
        "--device", options.device, "--dtype", options.dtype, *SHARED, *METHODS[method],
    ]
    cores = os.cpu_count() or 1
    threads = max(1, cores // len(METHODS)) if options.device == "cpu" else 1
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began = time.monotonic()
    with open(f"{options.out}/{method}.log", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment)
    return done.returncode, time.monotonic() - began


def train(options):
    """Trains every method, side by side; fails where one fails."""
    Path(options.out).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(METHODS)) as pool:
        ended = dict(zip(METHODS, pool.map(lambda method: train_one(method, options), METHODS)))
    words = []
    for method, (code, seconds) in ended.items():
        print(f"---- {method}: exit code {code}")
        print(Path(f"{options.out}/{method}.log").read_text())
        words.append(f"{method} {'FAILED' if code else f'{seconds:.0f} s'}")
    say(f"{options.updates} updates on {options.device} in {options.dtype}: {', '.join(words)}")
    sys.exit(any(code for code, _ in ended.values()))


# --- curves ---


def logged(folder, method):
    """The lines of a run's metrics.jsonl; none where there is no such file."""
    path = Path(folder) / method / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curves(options):
    """Compares each folder's losses with the CPU's; fails beyond TOLERANCE, or where a run is missing."""
    rows, wrong = [], []
    for folder in options.gpu:
        dtype = Path(folder).name
        first_limit, mean_limit = TOLERANCE[dtype]
        say(
            f"{dtype} against the CPU's float32, |difference| / (1 + loss): "
            f"at most {first_limit:g} at update 1, {mean_limit:g} on average"
        )
        say(
            f"{'':7}{'CPU: first':>11}{'middle':>9}{'last':>9}{'here: first':>13}{'middle':>9}{'last':>9}"
            f"{'off: first':>12}{'mean':>9}{'largest':>9}{'peak GB':>9}"
        )
        for method in METHODS:
            here, cpu = logged(folder, method), logged(options.cpu, method)
            if not here or len(here) != len(cpu):
                wrong.append(f"{method}, {dtype}: {len(here)} updates, and {len(cpu)} on the CPU")
                continue
            losses, wanted = [line["loss"] for line in here], [line["loss"] for line in cpu]
            off = [abs(a - b) / (1 + abs(b)) for a, b in zip(losses, wanted)]
            mean, peak = sum(off) / len(off), max(line["peak_memory_gb"] for line in here)
            middle = len(off) // 2
            say(
                f"{method:7}{wanted[0]:11.4f}{wanted[middle]:9.4f}{wanted[-1]:9.4f}"
                f"{losses[0]:13.4f}{losses[middle]:9.4f}{losses[-1]:9.4f}"
                f"{off[0]:12.1e}{mean:9.1e}{max(off):9.1e}{peak:9.3f}"
            )
            if not (off[0] <= first_limit and mean <= mean_limit):  # in this form no NaN is within a limit
                wrong.append(f"{method}, {dtype}: off by {off[0]:.1e} at update 1, by {mean:.1e} on average")
            speed = statistics.median(line["tokens_per_s"] for line in here)
            rows.append(
                {
                    "method": method,
                    "dtype": dtype,
                    "off_at_1": off[0],
                    "off_on_average": mean,
                    "largest_off": max(off),
                    "peak_memory_gb": peak,
                    "tokens_per_s": speed,
                    "lines": here,
                    "cpu_lines": cpu,
                }
            )
    Path(options.out).write_text(json.dumps({"tolerance": TOLERANCE, "rows": rows}) + "\n")
    sys.exit("\n".join(wrong) if wrong else 0)


# --- results of other programs ---


def times(options):
    """Prints a line for each operator of bench's JSON; fails where one was not measured."""
    path = Path(options.json)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    missing = []
    for operator in options.operators.split(","):
        peers = {row["peer"]: row for row in rows if row["operator"] == operator}
        ours = peers.pop("compiled", {})
        if "forward_ms" not in ours:
            missing.append(operator)
            continue
        words = [f"{peer} {row['times_ours']:.2f}" for peer, row in peers.items() if "times_ours" in row]
        words += [f"{peer} did not run" for peer, row in peers.items() if "cannot_run" in row]
        say(
            f"{operator:9} {ours['forward_ms']:.3f} + {ours['backward_ms']:.3f} ms, "
            f"{ours['share_of_floor']:.0%} of the floor, peak {ours['peak_bytes'] / 1e6:.1f} MB; "
            f"times ours: {', '.join(words)}"
        )
    sys.exit(f"not measured: {', '.join(missing)}" if missing else 0)


def kernels(options):
    """Times each version of the kernels, forward and backward in one, at the sizes of crystal.bench."""
    import torch

    from crystal.runtime import ops

    ops.choice()
    bfloat16 = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    positions = torch.arange(32, device="cuda")
    logits = torch.randn(64, 152064, **bfloat16)
    q, k = torch.randn(2, 28, 2048, 128, **bfloat16), torch.randn(2, 4, 2048, 128, **bfloat16)
    rows = torch.arange(1984, 2048, device="cuda").repeat(2, 1)
    cols = torch.arange(100, 108, device="cuda").repeat(2, 1)

    def vocab():
        values = ops.vocab_kl_ce(logits, None, positions, positions, positions >= 0)
        torch.autograd.grad(sum(value.sum() for value in values), logits)

    def attn_slice():
        torch.autograd.grad(ops.attn_slice(q, k, rows, cols).sum(), (q, k))

    found = []
    for name, run, choose in (
        ("vocab_kl_ce", vocab, torch.ops.crystal.vocab_kl_ce_version),
        ("attn_slice", attn_slice, torch.ops.crystal.attn_slice_version),
    ):
        before = choose(0)
        for version in range(1, before + 1):
            choose(version)
            low, middle, high = statistics.quantiles(timed(run), n=4)
            found.append({"operator": name, "version": version, "ms": middle, "quartiles": [low, high]})
            say(f"{name} version {version}: {middle:.3f} ms ({low:.3f} to {high:.3f})")
    Path(options.out).write_text(json.dumps(found) + "\n")


def timed(run, repeats=30):
    """Milliseconds of each of `repeats` calls on the GPU, after three that are not counted."""
    import torch

    found = []
    for repeat in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)  # the GPU waits until all is asked of it: what is timed is its work
        begin.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 3:
            found.append(begin.elapsed_time(end))
    return found


def counted(options):
    """Prints what became of the tests in a JUnit file; fails where none passed."""
    if not Path(options.xml).exists():
        sys.exit("pytest left no report")
    names = {"passed": [], "failed": [], "skipped": []}
    for case in xml.etree.ElementTree.parse(options.xml).iter("testcase"):
        ends = {child.tag for child in case}
        if ends & {"failure", "error"}:
            names["failed"].append(case.get("name"))
        elif "skipped" in ends:
            names["skipped"].append(case.get("name"))
        else:
            names["passed"].append(case.get("name"))
    say(", ".join(f"{len(cases)} {kind}" for kind, cases in names.items()))
    for name in names["failed"][:10]:
        say(f"failed: {name}")
    if not names["passed"]:
        sys.exit("no test passed: a selection that selects nothing shows nothing")


# --- command line ---


def main(argv=None):
    parser = argparse.ArgumentParser(description="The parts of on_gpu.sh that are written in Python.")
    commands = parser.add_subparsers(required=True)
    arguments = {}
    for command in (versions, card, train, curves, times, kernels, counted):
        arguments[command] = commands.add_parser(command.__name__, help=command.__doc__.splitlines()[0])
        arguments[command].set_defaults(run=command)
    for command in (card, train):
        arguments[command].add_argument("--device", choices=("cuda", "cpu"), required=True)
    for command in (card, train, curves, kernels):
        arguments[command].add_argument("--out", required=True, help="where the result goes")
    arguments[train].add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    arguments[train].add_argument("--updates", type=int, required=True)
    arguments[train].add_argument("--scenes", required=True, help="folder of what the part scenes made")
    arguments[curves].add_argument("--cpu", required=True, help="folder of the CPU's runs")
    arguments[curves].add_argument("--gpu", nargs="+", required=True, help="folders named float32, bfloat16")
    arguments[times].add_argument("json", help="what crystal.bench wrote")
    arguments[times].add_argument("operators", help="comma-separated")
    arguments[counted].add_argument("xml", help="what pytest --junitxml wrote")
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
