"""The training loop against twenty lines of plain PyTorch.

`plain_loop` below is the right value: torch's AdamW, a schedule, a clipping and a copy of the trainable
tokens written out here, over the same batches. Of crystal it takes what a record looks like in a batch
and what a method's terms are (both are held by tests of their own), and nothing of the loop: the order of
the records, the stages, the weights and the seeds of dropout stand here as numbers and formulas. train.py
must then log the same losses and leave the same weights, to the bit; on two processes, which sum in
another order, within TOLERANCE.

Run as a script, this file is one of those two processes.
"""

import json
import math
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import crystal.backbone.model
from crystal import methods, train
from crystal.corrupt import Corruption
from crystal.runtime import data, distributed
from crystal.runtime.config import Progress

ROOT = Path(__file__).resolve().parents[1]
UPDATES = 6
TOLERANCE = 1e-6  # between one process and two, in float64


# --- three files of records, unlike each other in length, pictures and number ---

TALK = {  # file: [(question, answer, sizes of its pictures, thoughts)]
    "train": [
        ("What colour is the star?", "red", [(112, 84)], ["I look.", "It is red."]),
        ("How many rings are there in the picture?", "3", [(56, 56)], ["I count."]),
        (
            "Which is nearer to the cross, the ring or the heart?",
            "the heart is nearer",
            [(84, 112), (56, 84)],
            [],
        ),
        ("Is it night?", "no", [(84, 56)], ["The sky is bright.", "So it is day."]),
        ("What stands left of the tree?", "a bench", [(56, 112)], ["I look left."]),
    ],
    "second": [
        ("Where is the cat?", "on the roof", [(56, 84)], ["I search."]),
        ("What is it made of?", "wood and some iron", [(112, 56)], ["I see grain."]),
        ("How far is the moon?", "far", [(84, 84)], []),
    ],
    "val": [
        ("What colour is the cross?", "dark green", [(84, 84)], ["I look."]),
        ("How many hearts?", "2", [(56, 112)], []),
        ("Is the ring above the star or below it?", "it is above", [(112, 112)], ["I compare."]),
        ("Is it raining?", "yes", [(56, 56)], ["It is wet."]),
        ("What is behind the fence?", "a dog", [(112, 56), (84, 56)], ["I look behind it."]),
    ],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: path} of the JSONL files of TALK, their pictures beside them."""
    root, random, paths = tmp_path_factory.mktemp("loop"), np.random.default_rng(5), {}
    for name, records in TALK.items():
        lines = []
        for i, (question, answer, sizes, cot) in enumerate(records):
            pictures = []
            for n, (width, height) in enumerate(sizes):
                pictures.append(f"{name}{i}_{n}.png")
                coarse = random.integers(0, 256, (height // 7, width // 7, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((width, height)).save(root / pictures[-1])
            asked = "<image>\n" * len(sizes) + question
            talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
            record = {"id": f"{name}{i}", "images": pictures, "conversations": talk, "cot": cot}
            lines.append(json.dumps(record))
        paths[name] = root / f"{name}.jsonl"
        paths[name].write_text("\n".join(lines) + "\n")
    return paths


# --- the twenty lines ---


@dataclass
class Part:
    """A stage: its updates (stop is not one), its peak rate, updates that warm up, the file that it reads."""

    start: int
    stop: int
    peak: float
    warm: int
    file: str = "train"


@dataclass
class Case:
    """What the flags of a run mean, as numbers that `plain_loop` reads."""

    flags: str
    stages: list
    weights: dict  # of every term that trains; a term that is not here is watched
    batch: int = 2
    accumulation: int = 1
    clip: float = 1.0
    decay: float = 0.1  # of matrices
    rows: float = 1.0  # rate of the trainable tokens, in multiples of the others'
    line: bool = False  # after the warm-up a line, not a cosine
    dtype: torch.dtype = torch.float32
    narrow: bool = False  # computed in bfloat16 on float32 weights
    corruption: Corruption = None
    seed: int = 4
    untied: bool = False
    validated: list = field(default_factory=list)  # after which updates
    world: int = 1


def mixed(*numbers):
    """Whole numbers -> one seed: a step of SplitMix64 for each, and the lowest bit left out."""
    state = 0
    for number in numbers:
        state = (state ^ (number + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 31
    return state // 2


def records_of(first, count, size, seed):
    """[(epoch, index)] of `count` records from place `first` on, in an endless row of shuffles of `size`."""
    found = []
    for place in range(first, first + count):
        epoch = place // size
        shuffle = torch.randperm(size, generator=torch.Generator().manual_seed(mixed(seed, epoch)))
        found.append((epoch, int(shuffle[place % size])))
    return found


def rate(step, stage, line):
    """Learning rate of an update: up in equal steps, then down to 0."""
    done = step - stage.start
    if done < stage.warm:
        return stage.peak * (done + 1) / stage.warm
    behind = (done - stage.warm) / (stage.stop - stage.start - stage.warm)
    return stage.peak * (1 - behind if line else 0.5 * (1 + math.cos(math.pi * behind)))


def plain_loop(case, argv, files):
    """The run of a case -> its log (a dict for each update), its trained weights by name, and its model."""
    settings = methods.parse(argv)  # for the method's terms; the loop reads the case
    model = crystal.backbone.model.load(settings.model, case.dtype)
    method, fmt = methods.attach(model, settings)
    whole = torch.nn.ModuleDict({"model": model, "heads": method.modules(model)}).train()
    trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    rows = [p for name, p in trained.items() if name.startswith("model.new_tokens.")]
    others = [p for name, p in trained.items() if not name.startswith("model.new_tokens.")]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": case.decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            {"params": rows, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    pad, log = model.tokenizer.pad_token_id, []

    def examples(name, number, seed):
        def layout(record, image_tokens):
            return method.layout(fmt, record, image_tokens, number)

        records = data.read(files[name])[0]
        more = {"copies": fmt.copies, "extras": method.extras}
        return data.RecordDataset(records, layout, model.image_processor, case.corruption, seed, **more)

    sets = [examples(stage.file, number, case.seed) for number, stage in enumerate(case.stages)]
    for step in range(UPDATES):
        number = next(i for i, stage in enumerate(case.stages) if stage.start <= step < stage.stop)
        stage, share = case.stages[number], case.batch * case.accumulation
        progress = Progress(step, number, (step - stage.start) / (stage.stop - stage.start), step / UPDATES)
        means, tokens, parts = {}, 0, case.world * case.accumulation
        for rank in range(case.world):
            for part in range(case.accumulation):
                first = (step * case.world + rank) * share + part * case.batch
                chosen = records_of(first, case.batch, len(sets[number]), case.seed)
                batch = data.collate([sets[number][at] for at in chosen], pad)
                tokens += int((batch["attention_mask"] == 1).sum()) * (2 if case.corruption else 1)
                batch = data.to_device(batch, torch.device("cpu"), case.dtype)
                torch.manual_seed(mixed(case.seed, step, part, rank))
                with torch.autocast("cpu", torch.bfloat16) if case.narrow else nullcontext():
                    terms = method.losses(model, batch, progress)
                    loss = sum(case.weights[name] * terms[name] for name in terms if name in case.weights)
                (loss / parts).backward()
                for name, value in {"loss": loss, **terms}.items():
                    means[name] = means.get(name, 0.0) + float(value.detach()) / parts

        # One length for the gradient of everything that trains, and one factor for all of it.
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
        for p in trained.values():
            p.grad.mul_((case.clip / (norm + 1e-6)).clamp(max=1.0))
        peak = rate(step, stage, case.line)
        for group, scale in zip(optimizer.param_groups, (1.0, 1.0, case.rows)):
            group["lr"] = peak * scale
        optimizer.step()
        optimizer.zero_grad()
        follow(model)
        counted = {"lr": peak, "grad_norm": float(norm), "tokens_per_s": float(tokens)}
        log.append({"step": step + 1, **means, **counted})
        if step + 1 in case.validated:
            held_out = examples("val", len(case.stages) - 1, case.seed + 1)
            log.append({"step": step + 1, **validation(case, whole, method, held_out, pad)})
    return log, trained, model


@torch.no_grad()
def follow(model):
    """The vocabulary's new rows become what was trained in their place; an untied head has its own."""
    if model.new_tokens is not None:
        model.hf.get_input_embeddings().weight[model.new_tokens.ids] = model.new_tokens.embedding.to(
            model.hf.dtype
        )
        if model.hf.lm_head.weight is not model.hf.get_input_embeddings().weight:
            model.hf.lm_head.weight[model.new_tokens.ids] = model.new_tokens.head.to(model.hf.dtype)


@torch.no_grad()
def validation(case, whole, method, examples, pad):
    """Means over the validation records, each alone in its batch, as at the run's end, without dropout."""
    whole.eval()
    means, end = {}, Progress(UPDATES, len(case.stages) - 1, 1.0, 1.0)
    for index in range(len(examples)):
        batch = data.to_device(data.collate([examples[0, index]], pad), torch.device("cpu"), case.dtype)
        for name, value in method.losses(whole["model"], batch, end).items():
            means[f"val_{name}"] = means.get(f"val_{name}", 0.0) + float(value) / len(examples)
    whole.train()
    means["val_loss"] = sum(weight * means[f"val_{name}"] for name, weight in case.weights.items())
    return means


# --- the runs ---

OWN = """from dataclasses import dataclass
from crystal.runtime import config
from crystal.runtime.config import Stage, setting
from crystal.methods import crystal

@dataclass(frozen=True)
class Settings(crystal.Settings):
    second: str = setting("", "records of the second stage")

    @property
    def weights(self):
        return super().weights | {"ce_int": 0.5, "attn": 3.0}

    @property
    def stages(self):
        return [Stage("first", 0.5, self.lr), Stage("second", 0.5, self.lr / 4, self.second)]

class Method(crystal.Method):
    Settings = Settings
    monitored = ("mass_int", "mass_cor", "kl")
"""
BLUR = Corruption("blur=2:5")
ONES = {"ce_int": 1.0, "ce_cor": 1.0, "kl": 1.0, "attn": 1.0}

CASES = {
    # Adapters with dropout; unlike weights; a clip that is always reached; rows at three times the rate.
    "lora": Case(
        "--lora_dropout 0.2 --lr 1e-2 --lr_tokens 3 --weight_decay 0.5 --warmup 0.5 --clip 0.05 "
        "--w_ce_int 0.75 --w_ce_cor 0.25 --w_kl 2 --w_attn 0.5 --eval_every 2",
        [Part(0, 6, 1e-2, 3)],
        {"ce_int": 0.75, "ce_cor": 0.25, "kl": 2.0, "attn": 0.5},
        clip=0.05,
        decay=0.5,
        rows=3.0,
        corruption=BLUR,
        validated=[2, 4, 6],
    ),
    # Every weight in float32, computed in bfloat16 and recomputed; three parts; a clip out of reach.
    "full": Case(
        "--tune full --dtype bfloat16 --checkpointing --accumulation 3 --lr 2e-3 --weight_decay 0.3 "
        "--decay linear --warmup 0.3 --clip 1000 --corruption noise",
        [Part(0, 6, 2e-3, 2)],
        ONES,
        accumulation=3,
        clip=1000.0,
        decay=0.3,
        line=True,
        narrow=True,
        corruption=Corruption("noise=15:50"),
    ),
    # Nothing but the rows, which have a head of their own; one record at a time.
    "rows": Case(
        "--tune tokens --batch_size 1 --lr 1e-2 --lr_tokens 0.5 --weight_decay 0.9 --warmup 0",
        [Part(0, 6, 1e-2, 0)],
        ONES,
        batch=1,
        rows=0.5,
        corruption=BLUR,
        untied=True,
    ),
    # Two stages that differ in who sees what; frozen weights in bfloat16, adapters in float32, in every part.
    "livr": Case(
        "--method livr --masked 0.6 --lora_dropout 0.1 --accumulation 3 --batch_size 1 --lr 1e-2 "
        "--weight_decay 0.2 --warmup 0.5 --dtype bfloat16 --lora_on language,vision,merger "
        "--eval_every 3",
        [Part(0, 4, 1e-2, 2), Part(4, 6, 1e-2, 1)],
        {"ce": 1.0},
        batch=1,
        accumulation=3,
        decay=0.2,
        dtype=torch.bfloat16,
        validated=[3, 6],
    ),
    # Two stages of unlike rates and layouts; heads beside the model; validation sees the last stage.
    "valr": Case(
        "--method valr --encoders own --first_share 0.34 --lr 1e-3 --lr_latents 4e-3 "
        "--weight_decay 0.4 --w_repa 0.25 --warmup 0.25 --clip 2 --eval_every 6",
        [Part(0, 2, 1e-3, 1), Part(2, 6, 4e-3, 1)],
        {"ce": 1.0, "repa": 0.25},
        clip=2.0,
        decay=0.4,
        validated=[6],
    ),
    # A gate that follows the whole run.
    "lavit": Case(
        "--method lavit --w_gaze 0 --w_semantics 0 --gate_warmup 0.9 --lr 1e-3 --tune full "
        "--warmup 0.2 --eval_every 4",
        [Part(0, 6, 1e-3, 2)],
        {"ce": 1.0},
        decay=0.0,
        line=True,
        validated=[4, 6],
    ),
    # A method of one's own: a file for each stage, a weight for some terms, one more that is monitored.
    "own": Case(
        "--method OWN --second SECOND --lr 1e-2 --batch_size 3 --lora_dropout 0.1",
        [Part(0, 3, 1e-2, 1), Part(3, 6, 2.5e-3, 1, "second")],
        {"ce_int": 0.5, "ce_cor": 1.0, "attn": 3.0},
        batch=3,
        corruption=BLUR,
    ),
}

# The rates of some of them, by hand, in multiples of the peak: an angle of 60 degrees has a cosine of a half.
RATES = {
    "lora": [1 / 3, 2 / 3, 1, 1, 3 / 4, 1 / 4],
    "full": [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4],
    "rows": [1, (1 + 3**0.5 / 2) / 2, 3 / 4, 1 / 2, 1 / 4, (1 - 3**0.5 / 2) / 2],
    "livr": [1 / 2, 1, 1, 1 / 2, 1, 1],
    "valr": [1, 1, 4, 4, 3, 1],
    "own": [1, 1, 1 / 2, 1 / 4, 1 / 4, 1 / 8],
}
CLIPPED = {"lora": True, "full": False}  # at every update, or at none

# For two processes: dropout, of which each must draw its own; shares of the validation that are unlike, since
# five records in batches of two are 1, 2 and 5 for the first process, 3 and 4 for the second.
TWO = {
    "two": Case(
        "--dtype float64 --batch_size 1 --accumulation 2 --lora_dropout 0.3 --lr 1e-2 --lr_tokens 2 "
        "--clip 0.1 --warmup 0.3",
        [Part(0, 6, 1e-2, 2)],
        ONES,
        batch=1,
        accumulation=2,
        clip=0.1,
        rows=2.0,
        dtype=torch.float64,
        corruption=BLUR,
        world=2,
    ),
    "stages": Case(
        "--method livr --dtype float64 --batch_size 2 --lora_dropout 0.2 --lr 1e-2 --masked 0.5 "
        "--eval_every 2 --weight_decay 0.3",
        [Part(0, 3, 1e-2, 1), Part(3, 6, 1e-2, 1)],
        {"ce": 1.0},
        decay=0.3,
        dtype=torch.float64,
        validated=[2, 4, 6],
        world=2,
    ),
}


@pytest.fixture
def arguments(model_dirs, files, tmp_path):
    """arguments(case) -> the argv of its run."""
    (tmp_path / "own.py").write_text(OWN)
    names = {"OWN": str(tmp_path / "own.py"), "SECOND": str(files["second"])}

    def make(case):
        fixed = (
            f"--max_steps {UPDATES} --batch_size 2 --eval_every 0 --log_every 100 --latents 3 "
            f"--lora_r 2 --seed {case.seed} --device cpu"
        )
        argv = [
            "--model", str(model_dirs[not case.untied]), "--data", str(files["train"]),
            "--val_data", str(files["val"]), "--output", str(tmp_path / "run"), *fixed.split(),
        ]
        return argv + [names.get(flag, flag) for flag in case.flags.split()]

    return make


def one_second_each():
    """A clock that is a second later each time it is asked: what is told per second is what was counted."""
    seconds = iter(range(10**6))
    return SimpleNamespace(perf_counter=lambda: float(next(seconds)))


def logged(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


CARRIED = ("val_gain", "val_swap", "val_drop")  # tests/test_carrying.py's


def same_log(lines, wanted, **tolerance):
    """Every number of every line of a log, to the bit or within a tolerance. Memory is the machine's."""
    assert len(lines) == len(wanted)
    for line, right in zip(lines, wanted):
        line.pop("peak_memory_gb", None)
        for name in [name for name in line if name.startswith(CARRIED)]:
            del line[name]
        assert line.keys() == right.keys()
        for name in right:
            if name.startswith("val_"):  # the records stood in other batches: sums in another order
                assert line[name] == pytest.approx(right[name], rel=1e-5, abs=1e-7), (line["step"], name)
            else:
                close = pytest.approx(right[name], **tolerance) if tolerance else right[name]
                assert line[name] == close, (line["step"], name, line[name], right[name])


@pytest.mark.parametrize("name", CASES)
def test_six_updates_equal_the_plain_loop_to_the_bit(name, arguments, files, tmp_path, monkeypatch):
    case, models, load = CASES[name], [], crystal.backbone.model.load

    def kept(*arguments, **named):
        models.append(load(*arguments, **named))
        return models[-1]

    monkeypatch.setattr(crystal.backbone.model, "load", kept)
    monkeypatch.setattr(train, "time", one_second_each())
    run = train.main(arguments(case))
    log, trained, model = plain_loop(case, arguments(case), files)

    same_log(logged(run), log)
    updates = [line for line in logged(run) if "lr" in line]
    if name in RATES:
        rates = [case.stages[0].peak * share for share in RATES[name]]
        assert [line["lr"] for line in updates] == pytest.approx(rates)
    if name in CLIPPED:
        assert all((line["grad_norm"] > case.clip) == CLIPPED[name] for line in updates)
    saved = load_file(run / "checkpoints" / f"step-{UPDATES}" / "trainable.safetensors")
    assert saved.keys() == trained.keys() and len(saved) > 0
    assert all(torch.equal(saved[key], trained[key].detach()) for key in saved)
    ours, plain = dict(models[0].hf.named_parameters()), dict(model.hf.named_parameters())
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) and ours[key].dtype == plain[key].dtype for key in ours)


def test_the_records_of_two_seeds_by_hand():
    """What `records_of` says, written out: each epoch is a shuffle of all five, and no two are alike."""
    streams = [records_of(0, 15, 5, seed) for seed in (4, 5)]
    assert [index for _, index in streams[0]] == [0, 4, 1, 2, 3, 0, 4, 2, 3, 1, 3, 0, 4, 1, 2]
    assert [index for _, index in streams[1]] == [3, 1, 0, 2, 4, 0, 4, 3, 2, 1, 3, 4, 2, 0, 1]
    for stream in streams:
        assert [epoch for epoch, _ in stream] == [0] * 5 + [1] * 5 + [2] * 5


# --- two processes ---


def test_two_processes_equal_the_plain_loop(arguments, files, tmp_path):
    """Ranks draw dropout of their own, share an update's records and the validation's, and average."""
    runs = {name: [*arguments(case), "--output", str(tmp_path / name)] for name, case in TWO.items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    named = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    ranks = []
    for rank in ("0", "1"):
        command = [sys.executable, __file__, json.dumps(list(runs.values()))]
        environment = os.environ | named | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors

    for name, case in TWO.items():
        log, trained, _ = plain_loop(case, runs[name], files)
        same_log(logged(tmp_path / name), log, rel=TOLERANCE, abs=1e-9)
        saved = load_file(tmp_path / name / "checkpoints" / f"step-{UPDATES}" / "trainable.safetensors")
        assert saved.keys() == trained.keys()
        assert all(torch.allclose(saved[key], trained[key].detach(), rtol=0, atol=TOLERANCE) for key in saved)
        assert json.loads((tmp_path / name / "config.json").read_text())["world"] == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = distributed.start("cpu", timeout=120)
    train.time = one_second_each()
    for flags in json.loads(sys.argv[1]):
        train.main(flags)  # a guest of the group above
    group.stop()
