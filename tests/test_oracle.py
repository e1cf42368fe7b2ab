"""crystal's five methods against the oracle: every value of every setting that reaches a loss.

The right values come from `tests/oracle.py`, which imports nothing of crystal. Here flags are parsed, a file
is read, its records become a batch and the batch becomes loss terms, as in training: every wire from a flag
to a number is inside the comparison. Compared are each loss term, each monitored number, eq. 6's weighted
total, and the total's gradient at every parameter that trains. `python tests/test_oracle.py` prints the table
of settings with the largest difference of each.

A setting that a method gains needs a row here, or a line in ELSEWHERE that says which test holds it.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from conftest import write_model
from PIL import Image
from safetensors.torch import save_file

import crystal.backbone.model
from crystal import methods, train, training_data
from crystal.runtime import data, ops

TOLERANCE = 1e-10  # float64 from the pixels to the loss


class Row(NamedTuple):
    """One line of the table.

    flags: {setting: value}. base: those that all rows of a method share. parts: the micro-batches of
    an update, each a tuple of (epoch, record). step: the update. tied: whether the head is the
    embedding. split: whose records.
    """

    method: str
    flags: dict
    base: dict
    parts: tuple = (((1, 2), (1, 0), (1, 1)),)
    step: int = 0
    tied: bool = False
    split: str = "train"
    tolerance: float = TOLERANCE

    def __str__(self):
        said = [f"{name}={value}" for name, value in self.flags.items()]
        said += ["own defaults"] if not self.base and not self.flags else []
        said += [f"step={self.step}"] if self.step else []
        said += ["tied"] if self.tied else []
        said += [f"{len(self.parts)} micro-batches"] if len(self.parts) > 1 else []
        said += ["one pair"] if self.parts == ONE else []
        said += [self.split] if self.split != "train" else []
        return " ".join([self.method, *said])


ONE = (((0, 0),),)  # a one-token answer alone
TWO = (((0, 1), (0, 2)), ((3, 2), (3, 0)))  # two micro-batches of different epochs

# What the rows of a method share: small, weights that all differ, and no dropout, which is random.
SMALL = {
    "sft": {"lora_r": 2},
    "crystal": {
        "lora_r": 2,
        "latents": 3,
        "w_ce_int": 0.7,
        "w_ce_cor": 1.3,
        "w_kl": 0.9,
        "w_attn": 1.6,
        "lora_dropout": 0.0,
    },
    "released": {"lora_r": 2, "latents": 3, "w_ce_int": 0.7, "w_kl": 0.9, "w_attn": 1.6, "lora_dropout": 0.0},
    "livr": {"lora_r": 2, "latents": 3, "max_steps": 10, "masked": 0.3, "lora_dropout": 0.0},
    "lavit": {"lora_r": 2, "latents": 3, "max_steps": 10, "w_semantics": 0.2, "w_gaze": 0.45, "tune": "lora"},
    "valr": {
        "lora_r": 2,
        "latents": 3,
        "max_steps": 10,
        "w_repa": 0.8,
        "tune": "lora",
        "first_share": 0.4,
        "encoders": "own",
    },
}


def row(method, *how, step=0, tolerance=TOLERANCE, own=False, **flags):
    """A row of the table. how: "tied", "val", ONE or TWO. own: the method's own defaults instead of SMALL."""
    parts = [x for x in how if isinstance(x, tuple)] or [(((1, 2), (1, 0), (1, 1)),)]
    base = {} if own else {name: value for name, value in SMALL[method].items() if name not in flags}
    split = "val" if "val" in how else "train"
    return Row(method, flags, base, parts[0], step, "tied" in how, split, tolerance)


REALISATIONS = ("hidden", "kv", "packed")

FEATURES = 1e-6  # features of encoders are float32

# What is copied, the columns of eq. 5 and its layers; the layers, columns and rows of eq. 5.
SHARED = (("latents", "all", "all"), ("thought", "thought", "0,2"), ("thought", "latents", "-2"))
COMPARED = (("all", "latents", "predicting"), ("0,1", "all", "span"), ("1", "thought", "predicting"))

TABLE = [
    # plain fine-tuning, and the settings that every method has
    row("sft"),
    row("sft", "tied", lora_r=3, lora_alpha=5.0),
    row("sft", tune="full"),
    row("sft", (((0, 2), (0, 3)),), turns="all"),
    row("sft", lora_on="language,vision,merger"),
    row("sft", lora_on="vision"),
    row("sft", min_pixels=9408, max_pixels=12544),
    row("sft", max_pixels=3136),
    row("sft", TWO, checkpointing=True),
    # CrystaL as in the paper: the defaults, then each value alone
    row("crystal", own=True),
    row("released", own=True, lora_dropout=0.0),
    row("crystal"),
    row("crystal", "tied"),
    row("crystal", TWO),
    row("crystal", ONE),
    row("crystal", latents=5, latent_kind="identical"),
    row("crystal", thought="cot"),
    row("crystal", labels="answer"),
    row("crystal", labels="answer", thought="cot"),
    row("crystal", (((0, 2), (0, 3)),), turns="all"),
    row("crystal", "val", seed=5),
    row("crystal", seed=7),
    row("crystal", corruption="blur=1:1.5"),
    row("crystal", corruption="blur=0.8,noise=9:20"),
    *[row("crystal", corruption=mode) for mode in ("mask", "crop", "jigsaw", "color", "noise", "impulse")],
    row("crystal", corruption="mask=0.35:0.4", latent_copy="packed"),
    row("crystal", kl_share=0.3),
    row("crystal", kl_share=0.3, answer_positions="span"),
    row("crystal", kl_share=0.01),
    row("crystal", teacher_grad=True),
    row("crystal", teacher_grad=True, latent_copy="packed", attn_loss="frobenius"),
    row("crystal", teacher_grad=True, latent_copy="hidden", attn_loss="mse"),
    row("crystal", teacher_grad=True, attn_heads="mean"),
    row("crystal", checkpointing=True),
    row("crystal", tune="full"),
    row("crystal", tune="tokens", latent_copy="packed"),
    row("crystal", lora_on="vision,merger"),
    # where they meet
    *[
        row("crystal", latent_copy=way, copied=what, attn_columns=columns, attn_layers=layers)
        for way in REALISATIONS
        for what, columns, layers in SHARED
    ],
    *[
        row("crystal", ce=ce, answer_positions=rows, labels=labels)
        for ce, rows in (("per_path", "span"), ("pooled", "predicting"), ("pooled", "span"))
        for labels in ("all", "answer")
    ],
    *[
        row("crystal", attn_loss=loss, attn_layers=layers, attn_columns=columns, answer_positions=rows)
        for loss in ("kl", "frobenius", "mse")
        for layers, columns, rows in COMPARED
    ],
    *[
        row("crystal", attn_heads="mean", attn_layers=layers, attn_columns=columns)
        for layers, columns in (("all", "latents"), ("last", "all"), ("0", "thought"))
    ],
    *[row("crystal", thought="cot", copied="thought", latent_copy=way, ce="pooled") for way in REALISATIONS],
    *[row("released", latent_copy=way) for way in REALISATIONS],
    row("released", "tied", thought="cot"),
    row("released", ONE),
    row("released", TWO, latent_copy="packed", kl_share=0.5),
    row("released", attn_heads="keep", teacher_grad=True, lora_on="language"),
    # LIVR: stage 1 and stage 2, and its controls
    *[row("livr", own=True, lora_dropout=0.0, step=step) for step in (1599, 1600)],
    row("livr", "tied", step=2),
    row("livr", step=3),
    row("livr", TWO),
    row("livr", ONE, mask="answer"),
    row("livr", masked=0.0),
    row("livr", step=9, masked=1.0),
    row("livr", latents=0, mask="answer"),
    row("livr", latents=0, masked=0.0, image_copies=2),
    row("livr", image_copies=2),
    row("livr", tune="tokens", masked=0.0),
    *[
        row("livr", mask=mask, latents_see=see, place=place)
        for mask in ("prompt", "answer")
        for see in ("all", "image")
        for place in ("after", "before")
    ],
    row("livr", latents=5, latent_kind="identical", place="before"),
    row("livr", image_copies=2, place="before", latents_see="image"),
    # LaViT: the gate's kinds along the run, and its terms
    row("lavit", own=True, step=100),
    *[row("lavit", gate=gate, step=step) for gate in ("cosine", "hard") for step in (0, 3, 4)],
    row("lavit", gate="open", step=1),
    row("lavit", gate_warmup=0.6, gate_start=0.03, step=5),
    row("lavit", gate_start=0.2),
    row("lavit", "tied", TWO, step=1),
    row("lavit", ONE, step=1),
    row("lavit", gaze_top=3, step=1),
    row("lavit", gaze_top=1, latents=2, latent_kind="identical", step=1),
    row("lavit", gaze_top=99, step=1),
    row("lavit", w_semantics=0.0, step=1),
    row("lavit", w_gaze=0.0, step=1),
    row("lavit", data="wide.jsonl", semantics_dim=20, step=1),
    row("lavit", tune="full", step=1),
    row("lavit", tune="tokens", step=1),
    # VaLR: both stages, layers, encoders, segments
    row("valr", ONE, own=True, step=2000, tolerance=FEATURES),
    row("valr", step=4),
    row("valr", step=3),
    row("valr", first_share=0.0),
    row("valr", "tied", TWO, align_layer=2, step=4),
    row("valr", align_layer=3, step=4),
    row("valr", encoders="tiny,own", step=4, tolerance=FEATURES),
    row("valr", encoders="features:x:7,own,features:wide:9", latents=2, step=4, tolerance=FEATURES),
    row("valr", encoders="none", step=4),
    row("valr", ONE, latents=1, step=4),
    row("valr", encoders="features:x:7", step=4, tolerance=FEATURES),
    row("valr", lora_on="language,vision", step=4),
    *[row("valr", updates=updates, step=4) for updates in (0, 1, 9)],
    row("valr", tune="full", step=4),
    row("valr", tune="tokens", step=4),
]

# Settings by which no number may change, or that say what trains: rows try them, the oracle
# does not know them.
FREE = {"latent_copy", "checkpointing", "tune", "lora_on", "lora_dropout", "semantics_dim", "data"}

# Settings that no row can compare, and the tests that hold them.
ELSEWHERE = {
    "method, model, data, val_data, image_root, output": "every row names them",
    "init_from": "what an update begins with: test_settings.py tries it",
    "max_steps, batch_size, accumulation": "the loop: test_train.py",
    "lr, lr_tokens, weight_decay, warmup, decay, clip, lr_latents": "the loop: test_train.py",
    "lora_dropout": "random: test_lora.py, test_train.py",
    "device, dtype, workers, on_bad_record": "how it runs: test_train.py, test_data.py",
    "compile": "how it runs: test_settings.py",
    "shard": "how it runs: test_shard.py",
    "blind": "what it sees: test_settings.py",
    "eval_every, eval_records, save_every, keep, log_every": "what it writes: test_train.py",
    "resume, overwrite, tensorboard": "what it writes: test_train.py",
}


# --- what all rows share ---

# Two pictures in one record, few of them square; one-token and long answers; steps as a list,
# a text and none.
RECORDS = [
    {
        "id": "a",
        "images": ["a.png"],
        "cot": ["I look.", "I see a star."],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is the star?"},
            {"from": "gpt", "value": "red"},
        ],
    },
    {
        "id": "b",
        "images": ["b.png", "c.png"],
        "cot": "They differ.",
        "conversations": [
            {"from": "human", "value": "Compare <image>\nwith <image>: which heart is nearer?"},
            {"from": "gpt", "value": "the heart in the second picture is nearer"},
        ],
    },
    {
        "id": "c",
        "image": "d.png",
        "messages": [
            {"role": "user", "content": "How many rings?"},
            {"role": "assistant", "content": "three of them"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "yes, quite"},
        ],
    },
]
SIZES = {"a.png": (84, 56), "b.png": (56, 112), "c.png": (84, 84), "d.png": (56, 84)}
TEACHER = {"a": [[2, 3]], "b": [[3, 2], [5, 4]], "c": [[2, 2]]}  # its grids; not all are the student's


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with records, pictures, precomputed features, and two models, tied and untied."""
    folder, rng = tmp_path_factory.mktemp("oracle"), np.random.default_rng(11)
    for name, (w, h) in SIZES.items():
        coarse = Image.fromarray(rng.integers(0, 256, (h // 7, w // 7, 3), dtype=np.uint8))
        coarse.resize((w, h)).save(folder / name)

    # What a teacher and encoders left of the records; `wide` has other sizes.
    g, files = torch.Generator().manual_seed(5), {"teacher": {}, "wide_teacher": {}, "x": {}, "wide": {}}
    for record in RECORDS:
        grids = TEACHER[record["id"]]
        for name, size in (("teacher", 32), ("wide_teacher", 20)):
            seen = {
                "gaze": torch.rand(sum(h * w for h, w in grids), generator=g, dtype=torch.float64),
                "gaze_grid": torch.tensor(grids),
                "v_sem": torch.randn(size, generator=g, dtype=torch.float64),
            }
            files[name] |= {f"{record['id']}/{key}": tensor for key, tensor in seen.items()}
        for name, size in (("x", 7), ("wide", 9)):
            for n in range(len(grids)):
                patches = 3 * n + 4 + grids[0][0]
                files[name][f"{record['id']}/{n}"] = torch.randn(patches, size, generator=g)
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")

    records = {}
    for name, teacher in (("train", "teacher"), ("wide", "wide_teacher")):
        features = {"lavit": f"{teacher}.safetensors", "x": "x.safetensors", "wide": "wide.safetensors"}
        records[f"{name}.jsonl"] = [record | {"features": features} for record in RECORDS]
        lines = [json.dumps(record) for record in records[f"{name}.jsonl"]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    models = {tied: write_model(folder / ("tied" if tied else "untied"), tied) for tied in (True, False)}
    return SimpleNamespace(folder=folder, models=models, records=records)


# With --turns all the last record is two.
ANSWERS = {"first": [(0, 0), (1, 0), (2, 0)], "all": [(0, 0), (1, 0), (2, 0), (2, 1)]}


def flags_of(row, world):
    """A row as a command line."""
    argv = ["--method", row.method, "--model", str(world.models[row.tied])]
    records = str(world.folder / row.flags.get("data", "train.jsonl"))
    argv += ["--data", records, "--val_data", records]
    for name, value in {**row.base, **row.flags}.items():
        if name == "data":
            continue
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", str(value)]
    return argv


def built(row, world):
    """A row's run as `train.main` builds it, less the loop."""
    settings = methods.parse(flags_of(row, world))
    model = crystal.backbone.model.load(
        settings.model, torch.float64, "cpu", settings.min_pixels, settings.max_pixels
    )
    method, fmt = methods.attach(model, settings)
    objective = train.Objective(model, method).train()

    # A fresh adapter does nothing, and fresh rows are almost alike: everything that trains is moved.
    g = torch.Generator().manual_seed(1)
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in named:
            if "lora_B" in name or ".new_tokens." in name:
                p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.1)
    model.after_update()

    one_process = SimpleNamespace(first=nullcontext, is_first=True, print=lambda *_: None)
    train_sets, val_set, _ = training_data.open_data(settings, method, model, fmt, one_process)
    examples = val_set if row.split == "val" else train_sets[settings.progress(row.step).stage]
    return SimpleNamespace(
        settings=settings, model=model, method=method, objective=objective, named=named, examples=examples
    )


def crystals_terms(row, s):
    """crystal's numbers of a row -> (terms, total, the total's gradients, corrupted pixels by record)."""
    terms, total, pixels = {}, 0.0, {}
    for part in row.parts:
        examples = [s.examples[at] for at in part]
        for at, example in zip(part, examples):
            pixels[at] = example.get("pixel_values_cor")
        batch = data.collate(examples, s.model.tokenizer.pad_token_id)
        batch = data.to_device(batch, torch.device("cpu"), torch.float64)
        found = s.objective(batch, s.settings.progress(row.step))
        loss = train.weighted(found, s.method, s.settings) / len(row.parts)
        loss.backward()
        total += loss.item()
        for name, value in found.items():
            terms[name] = terms.get(name, 0.0) + value.item() / len(row.parts)
    return terms, total, {name: p.grad for name, p in s.named}, pixels


def new_tokens(method, given):
    """The special tokens of a method, in the order of their ids."""
    tags = {"crystal": oracle.CRYSTAL_TAGS, "lavit": ["<answer>"], "valr": oracle.VALR_TAGS}.get(method, [])
    latents = [] if method in ("sft", "valr") else oracle.latent_names(given)
    return tags + list(dict.fromkeys(latents))


def oracles_net(row, world, s, given):
    """The oracle's model with crystal's trained parameters put in as whole tensors -> (Net, its leaves)."""
    directory = str(world.models[row.tied])
    _, frozen = oracle.stock(directory)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in s.named}
    weights, heads = {}, {}
    for name, leaf in leaves.items():
        # Adapters become one weight; a whole weight that trains is taken as it is.
        if name.endswith(".lora_A"):
            key = name.removesuffix(".lora_A").removeprefix("model.hf.")
            W, B = frozen[f"{key}.weight"], leaves[f"model.hf.{key}.lora_B"]
            weights[f"{key}.weight"] = oracle.adapted(W, leaf, B, given.lora_alpha, given.lora_r)
        elif name.startswith("heads."):
            heads[name.removeprefix("heads.")] = leaf
        elif name.startswith("model.hf.") and not name.endswith(".lora_B"):
            weights[name.removeprefix("model.hf.")] = leaf

    # New tokens take the first free rows of the vocabulary; an untied head has rows of its own.
    tokens = new_tokens(PAPER.get(row.method, row.method), given)
    tokenizer = oracle.tokenizer(directory, tuple(tokens))
    if tokens:
        ids = tokenizer.convert_tokens_to_ids(tokens)
        embedding, head = "model.language_model.embed_tokens.weight", "lm_head.weight"
        weights[embedding] = oracle.with_rows(frozen[embedding], ids, leaves["model.new_tokens.embedding"])
        weights[head] = weights[embedding]
        if not row.tied:
            weights[head] = oracle.with_rows(frozen[head], ids, leaves["model.new_tokens.head"])
    processor = oracle.image_processor(directory, given.min_pixels, given.max_pixels)
    return oracle.Net(directory, tokenizer, processor, weights, heads), leaves


PAPER = {"released": "crystal"}  # a method that is another one's with defaults of its own
WEIGHTS = {  # eq. 6, eq. 9 of LaViT, and VaLR's sum
    "sft": {"ce": None},
    "livr": {"ce": None},
    "crystal": {"ce": "w_ce_int", "ce_int": "w_ce_int", "ce_cor": "w_ce_cor", "kl": "w_kl", "attn": "w_attn"},
    "lavit": {"ce": None, "semantics": "w_semantics", "gaze": "w_gaze"},
    "valr": {"ce": None, "repa": "w_repa"},
}


def oracles_terms(row, world, s, pixels):
    """The oracle's numbers of a row, means over all pairs -> (terms, total, the total's gradients)."""
    given = {name: value for name, value in {**row.base, **row.flags}.items() if name not in FREE}
    given = oracle.settings(row.method, **given)
    paper = PAPER.get(row.method, row.method)  # whose formulas
    net, leaves = oracles_net(row, world, s, given)
    pairs = []
    for epoch, index in (at for part in row.parts for at in part):
        which, number = ANSWERS[given.turns][index]
        record, more = world.records[row.flags.get("data", "train.jsonl")][which], {}
        if paper == "crystal":
            place = (given.seed + (row.split == "val"), epoch, index)
            checked = checked_pixels(net, record, number, given, place, pixels[epoch, index], world)
            more = {"place": place, "pixels_cor": checked}
        elif paper != "sft":
            more = {"step": row.step}
        pairs.append(getattr(oracle, paper)(net, record, world.folder, given, number=number, **more))
    terms = {name: oracle.mean([pair[name] for pair in pairs]) for name in pairs[0]}

    total = 0.0
    for name, term in terms.items():
        if name in WEIGHTS[paper]:
            weight = WEIGHTS[paper][name]
            total = total + (getattr(given, weight) if weight else 1.0) * term
    grads = {}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for (name, leaf), g in zip(leaves.items(), found):
        grads[name] = torch.zeros_like(leaf) if g is None else g
    return {name: float(term.detach()) for name, term in terms.items()}, float(total.detach()), grads


def checked_pixels(net, record, number, given, place, found, world):
    """crystal's corrupted pixels, checked: a grey level may have been rounded the other way."""
    _, _, seen = oracle.conversation(record, number)
    pictures = oracle.open_pictures(record, world.folder, seen)
    spoiled = [oracle.corrupted(picture, given, place, n) for n, picture in enumerate(pictures)]
    expected, _ = oracle.pixels_of(net, spoiled)
    off = (found - expected).abs()
    assert off.max() < 0.04 and off.mean() < 1e-4, f"{given.corruption}: {off.max()}, on average {off.mean()}"
    return found.double()


# --- the comparison ---

DIFFERENCES = {}  # {row: (largest of a term, largest of a gradient, how many terms, how many parameters)}


def settings_of(method):
    """{name: field} of a method's settings."""
    return {field.name: field for field in fields(methods.get(method).Settings)}


def compare(row, world):
    """Asserts that crystal's numbers of a row are the oracle's, and keeps the largest differences."""
    s = built(row, world)
    terms, total, grads, pixels = crystals_terms(row, s)
    right, right_total, right_grads = oracles_terms(row, world, s, pixels)
    assert set(terms) == set(right)
    off = {name: abs(terms[name] - right[name]) / max(1.0, abs(right[name])) for name in right}
    off["total"] = abs(total - right_total) / max(1.0, abs(right_total))

    assert all(g is not None for g in grads.values()), "a parameter without a gradient"
    largest = max(float(g.abs().max()) for g in right_grads.values())
    assert largest > 0
    off_grads = {}
    for name, g in right_grads.items():
        off_grads[name] = float((grads[name] - g).abs().max()) / max(1.0, largest)
    DIFFERENCES[str(row)] = (max(off.values()), max(off_grads.values()), len(off), len(off_grads))

    numbers = {name: (terms[name], right[name]) for name in right} | {"total": (total, right_total)}
    wrong = {name: numbers[name] for name, x in off.items() if not x < row.tolerance}
    assert not wrong, f"crystal and the oracle differ: {wrong}"
    wrong = {name: x for name, x in off_grads.items() if not x < row.tolerance}
    assert not wrong, f"gradients differ: {wrong}"


@pytest.fixture(scope="module", autouse=True)
def table():
    """Prints what was compared, once all rows are done (`pytest -s`)."""
    yield
    if DIFFERENCES:
        print(f"\n{'largest difference of a term':>30} {'of a gradient':>15}  settings")
        for name, (term, gradient, terms, parameters) in DIFFERENCES.items():
            print(f"{term:20.1e} of {terms} {gradient:15.1e} of {parameters:3}  {name}")
        largest = [max(found[i] for found in DIFFERENCES.values()) for i in (0, 1)]
        print(f"{largest[0]:20.1e}      {largest[1]:15.1e}         all {len(DIFFERENCES)}")


def identifier(row):
    """A row's name in pytest."""
    return str(row).replace(" ", "-")


@pytest.mark.parametrize("row", TABLE, ids=identifier)
def test_a_row_of_the_table(row, world, float64_modules):
    compare(row, world)


@pytest.mark.parametrize("method", SMALL)
def test_every_setting_has_its_row(method):
    """A setting that may reach a loss is tried beside its default, a choice at each of its values."""
    elsewhere = {name for names in ELSEWHERE for name in names.split(", ")}
    own = set(settings_of(method)) - (set(settings_of("sft")) if method != "sft" else set())
    tried = {}
    for row in TABLE:
        # What a method takes from another one may be tried with either: what all have, with any of them.
        if row.method == method or row.method == PAPER.get(method) or method == "sft":
            for name, value in {**row.base, **row.flags}.items():
                tried.setdefault(name, set()).add(value)
    for name in own - elsewhere:
        field = settings_of(method)[name]
        values = tried.get(name, set())
        assert values - {field.default}, f"{method}: no row tries --{name} at another value than its default"
        missing = set(field.metadata["choices"] or ()) - values - {field.default}
        assert not missing, f"{method}: no row tries --{name} {', '.join(sorted(missing))}"


def test_rows_have_names_of_their_own():
    assert len({str(row) for row in TABLE}) == len(TABLE)


def test_nothing_is_left_out_twice():
    """What stands in ELSEWHERE exists, so that a renamed setting does not hide there."""
    known = {name for method in SMALL for name in settings_of(method)}
    assert {name for names in ELSEWHERE for name in names.split(", ")} <= known


REFERENCE = [
    row
    for row in TABLE
    if str(row)
    in {
        "sft",
        "crystal",
        "crystal one pair",
        "crystal 2 micro-batches",
        "crystal kl_share=0.3",
        "released latent_copy=kv",
        "crystal teacher_grad=True",
        "crystal teacher_grad=True attn_heads=mean",
        "crystal attn_loss=frobenius attn_layers=0,1 attn_columns=all answer_positions=span",
        "crystal attn_loss=mse attn_layers=all attn_columns=latents answer_positions=predicting",
        "lavit gate=cosine step=3",
        "livr mask=prompt latents_see=all place=after",
    }
]


@pytest.mark.parametrize("row", REFERENCE, ids=identifier)
def test_plain_operators(row, world, float64_modules, monkeypatch):
    """Some rows again without the compiled operators."""
    assert len(REFERENCE) == 12
    monkeypatch.setattr(ops, "served", lambda name, x: False)
    compare(row, world)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-s", *sys.argv[1:]]))
