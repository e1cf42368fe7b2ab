"""crystal's five methods against the oracle: every value of every setting that reaches a loss, alone and where they meet.

The right values come from `tests/oracle.py`, which imports nothing of crystal. Here flags are parsed, a file is read, its
records become a batch and the batch becomes loss terms, as in training: every wire from a flag to a number is inside the
comparison. Compared are each loss term, each monitored number, eq. 6's weighted total, and the total's gradient at every
parameter that trains. `python tests/test_oracle.py` prints the table of settings with the largest difference of each.

A setting that a method gains needs a row here, or a line in ELSEWHERE that says which test holds it.
"""
import json
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from conftest import write_model
from PIL import Image
from safetensors.torch import save_file

import crystal.model
from crystal import data, methods, ops, train

TOLERANCE = 1e-10  # float64 from the pixels to the loss


class Row(NamedTuple):
    """One line of the table. flags: {setting: value}; the rest says what they are tried on.

    parts: micro-batches of an update, lists of (epoch, record). step: the update. tied: whether the head is the embedding.
    train_only: settings that the oracle need not know, since they may not change a number.
    """

    method: str
    flags: dict
    parts: tuple = (((1, 2), (1, 0), (1, 1)),)
    step: int = 0
    tied: bool = False
    split: str = "train"
    tolerance: float = TOLERANCE

    def __str__(self):
        said = [f"{name}={value}" for name, value in self.flags.items()]
        if self.step:
            said.append(f"step={self.step}")
        if self.tied:
            said.append("tied")
        if len(self.parts) > 1:
            said.append(f"{len(self.parts)} micro-batches")
        if self.split != "train":
            said.append(self.split)
        return " ".join([self.method, *said])


# Small and lopsided everywhere: K of 3, weights that all differ.
CRYSTAL = {"latents": 3, "w_ce_int": 0.7, "w_ce_cor": 1.3, "w_kl": 0.9, "w_attn": 1.6}
LIVR = {"latents": 3, "max_steps": 10, "masked": 0.3}
LAVIT = {"latents": 3, "max_steps": 10, "w_semantics": 0.2, "w_gaze": 0.45, "tune": "lora"}
VALR = {"latents": 3, "max_steps": 10, "w_repa": 0.8, "tune": "lora", "encoders": "features:x:7", "first_share": 0.4}

ONE = (((0, 0),),)                      # a one-token answer alone
TWO_PARTS = (((0, 1), (0, 2)), ((3, 2), (3, 0)))


def crystal_row(how=None, **flags):
    return Row("crystal", CRYSTAL | flags, **(how or {}))


def released_row(how=None, **flags):
    return Row("crystal", {"preset": "released", "lora_dropout": 0.0} | CRYSTAL | flags, **(how or {}))


def livr_row(how=None, **flags):
    return Row("livr", LIVR | flags, **(how or {}))


def lavit_row(how=None, **flags):
    return Row("lavit", LAVIT | flags, **({"step": 1} | (how or {})))


def valr_row(how=None, **flags):
    return Row("valr", VALR | flags, **({"step": 4} | (how or {})))


REALISATIONS = ("hidden", "kv", "packed")

TABLE = [
    # plain fine-tuning, and the settings that every method has
    Row("sft", {}),
    Row("sft", {"lora_r": 3, "lora_alpha": 5.0}, tied=True),
    Row("sft", {"tune": "full"}),
    Row("sft", {"turns": "all"}, parts=(((0, 2), (0, 3)),)),
    Row("sft", {"lora_on": "language,vision,merger"}),
    Row("sft", {"lora_on": "vision"}),
    Row("sft", {"min_pixels": 9408, "max_pixels": 12544}),
    Row("sft", {"max_pixels": 3136}),
    Row("sft", {"checkpointing": True}, parts=TWO_PARTS),

    # CrystaL as in the paper: its defaults, each value alone
    Row("crystal", {}),
    Row("crystal", {"preset": "released", "lora_dropout": 0.0}),
    crystal_row(),
    crystal_row({"tied": True}),
    crystal_row({"parts": TWO_PARTS}),
    crystal_row({"parts": ONE}),
    crystal_row(latents=5, latent_kind="identical"),
    crystal_row(thought="cot"),
    crystal_row(labels="answer"),
    crystal_row(labels="answer", thought="cot"),
    crystal_row(turns="all", how={"parts": (((0, 2), (0, 3)),)}),
    crystal_row({"split": "val"}, seed=5),
    crystal_row(seed=7),
    crystal_row(strength_low=1.0, strength_high=1.5),
    *[crystal_row(corruption=mode) for mode in ("mask", "crop", "jigsaw", "color", "noise", "impulse")],
    crystal_row(corruption="mask", strength_low=0.35, strength_high=0.4, realisation="packed"),
    crystal_row(kl_share=0.3),
    crystal_row(kl_share=0.3, answer_rows="span"),
    crystal_row(kl_share=0.01),
    crystal_row(teacher_grad=True),
    crystal_row(teacher_grad=True, realisation="packed", attn_loss="frobenius"),
    crystal_row(teacher_grad=True, realisation="hidden", attn_loss="mse"),
    crystal_row(teacher_grad=True, attn_heads="mean"),
    crystal_row(checkpointing=True),
    crystal_row(tune="full"),
    crystal_row(tune="rows", realisation="packed"),
    crystal_row(lora_on="vision,merger"),

    # where they meet
    *[crystal_row(realisation=way, copied=what, attn_columns=columns, attn_layers=layers)
      for way in REALISATIONS
      for what, columns, layers in (("latents", "all", "all"), ("thought", "thought", "0,2"), ("thought", "latents", "-2"))],
    *[crystal_row(ce=ce, answer_rows=rows, labels=labels)
      for ce in ("per_path", "pooled") for rows in ("predicting", "span") for labels in ("all", "answer")
      if (ce, rows) != ("per_path", "predicting")],
    *[crystal_row(attn_loss=loss, attn_layers=layers, attn_columns=columns, answer_rows=rows)
      for loss in ("kl", "frobenius", "mse")
      for layers, columns, rows in (("all", "latents", "predicting"), ("0,1", "all", "span"), ("1", "thought", "predicting"))],
    *[crystal_row(attn_heads="mean", attn_layers=layers, attn_columns=columns)
      for layers, columns in (("all", "latents"), ("last", "all"), ("0", "thought"))],
    *[crystal_row(thought="cot", copied="thought", realisation=way, ce="pooled") for way in REALISATIONS],
    *[released_row(realisation=way) for way in REALISATIONS],
    released_row({"tied": True}, thought="cot"),
    released_row({"parts": ONE}),
    released_row({"parts": TWO_PARTS}, realisation="packed", kl_share=0.5),
    released_row(attn_heads="keep", teacher_grad=True, lora_on="language"),

    # LIVR: stage 1 and stage 2, and its controls
    Row("livr", {"lora_dropout": 0.0}),
    livr_row(),
    livr_row({"tied": True, "step": 2}),
    livr_row({"step": 3}),
    livr_row({"parts": TWO_PARTS}),
    livr_row({"parts": ONE}, mask="answer"),
    livr_row(masked=0.0),
    livr_row({"step": 9}, masked=1.0),
    livr_row(latents=0, mask="answer"),
    livr_row(latents=0, masked=0.0, image_copies=2),
    livr_row(image_copies=2),
    livr_row(tune="rows", masked=0.0),
    *[livr_row(mask=mask, latents_see=see, place=place)
      for mask in ("prompt", "answer") for see in ("all", "image") for place in ("after", "before")],
    livr_row(latents=5, latent_kind="identical", place="before"),
    livr_row(image_copies=2, place="before", latents_see="image"),

    # LaViT: the gate's kinds along the run, and its terms
    Row("lavit", {}, step=100),
    lavit_row(),
    *[lavit_row({"step": step}, gate=gate) for gate in ("cosine", "hard", "open") for step in (0, 3, 4)],
    lavit_row({"step": 5}, gate_warmup=0.6, gate_start=0.03),
    lavit_row({"step": 0}, gate_start=0.2),
    lavit_row({"tied": True, "parts": TWO_PARTS}),
    lavit_row({"parts": ONE}),
    lavit_row(gaze_top=3),
    lavit_row(gaze_top=1, latents=2, latent_kind="identical"),
    lavit_row(gaze_top=99),
    lavit_row(w_semantics=0.0),
    lavit_row(w_gaze=0.0, semantics_dim=32),
    lavit_row(tune="full"),
    lavit_row(tune="rows"),

    # VaLR: both stages, layers, encoders, segments
    Row("valr", {}, parts=ONE, step=2000, tolerance=1e-6),
    valr_row(),
    valr_row({"step": 3}),
    valr_row({"step": 0}, first_share=0.0),
    valr_row({"tied": True, "parts": TWO_PARTS}, align_layer=2),
    valr_row(align_layer=3, encoders="own"),
    valr_row({"tolerance": 1e-6}, encoders="tiny,own"),
    valr_row(encoders="features:x:7,own,features:wide:9", latents=2),
    valr_row(encoders="none"),
    valr_row({"parts": ONE}, latents=1),
    valr_row({"tolerance": 1e-6}, encoders="tiny", lora_on="language,vision"),
    *[valr_row(updates=updates) for updates in (0, 1, 9)],
    valr_row(tune="full"),
    valr_row(tune="rows"),
]

# Settings that no row can compare, and the tests that hold them. What trains on what, how fast and where is the loop's.
ELSEWHERE = {
    "method, model, data, val_data, image_root, output": "every row names them",
    "max_steps, batch_size, accumulation, lr, lr_rows, weight_decay, warmup, decay, clip, lr_latents": "the loop: test_train.py",
    "lora_dropout": "random: test_lora.py, test_train.py",
    "device, dtype, workers, on_bad_record": "how it runs: test_train.py, test_data.py",
    "eval_every, eval_records, save_every, keep, log_every, resume, overwrite, tensorboard": "what it writes: test_train.py",
}


# ---- what all rows share ---------------------------------------------------------------------------------------------------

# Two pictures in one record, none square, no two sizes alike; one-token and long answers; with steps and without.
RECORDS = [
    {"id": "a", "images": ["a.png"], "cot": ["I look.", "I see a star."],
     "conversations": [{"from": "human", "value": "<image>\nWhat colour is the star?"}, {"from": "gpt", "value": "red"}]},
    {"id": "b", "images": ["b.png", "c.png"], "cot": "They differ.",
     "conversations": [{"from": "human", "value": "Compare <image>\nwith <image>: which heart is nearer?"},
                       {"from": "gpt", "value": "the heart in the second picture is nearer"}]},
    {"id": "c", "image": "d.png",
     "messages": [{"role": "user", "content": "How many rings?"}, {"role": "assistant", "content": "three of them"},
                  {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "yes, quite"}]},
]
SIZES = {"a.png": (84, 56), "b.png": (56, 112), "c.png": (84, 84), "d.png": (56, 84)}
TEACHER = {"a": [[2, 3]], "b": [[3, 2], [5, 4]], "c": [[2, 2]]}     # its grids; not all are the student's


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with records, pictures, precomputed features, and two models, tied and untied."""
    folder, rng = tmp_path_factory.mktemp("oracle"), np.random.default_rng(11)
    for name, (w, h) in SIZES.items():
        coarse = Image.fromarray(rng.integers(0, 256, (h // 7, w // 7, 3), dtype=np.uint8))
        coarse.resize((w, h)).save(folder / name)

    g, tensors = torch.Generator().manual_seed(5), {}
    for record in RECORDS:
        record["features"] = dict.fromkeys(("lavit", "x", "wide"), "features.safetensors")
        grids = TEACHER[record["id"]]
        own = {"gaze": torch.rand(sum(h * w for h, w in grids), generator=g, dtype=torch.float64),
               "gaze_grid": torch.tensor(grids), "v_sem": torch.randn(32, generator=g, dtype=torch.float64)}
        tensors |= {f"{record['id']}/{name}": tensor for name, tensor in own.items()}
    save_file(tensors, folder / "features.safetensors")
    for kind, size in (("x", 7), ("wide", 9)):
        patches = {f"{record['id']}/{n}": torch.randn(4 + 3 * n, size, generator=g) for record in RECORDS for n in range(2)}
        patches = {name: x for name, x in patches.items() if name in ("a/0", "b/0", "b/1", "c/0")}
        save_file(patches, folder / f"{kind}.safetensors")
        for record in RECORDS:
            record["features"][kind] = f"{kind}.safetensors"

    lines = [json.dumps(record) for record in RECORDS]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    models = {tied: write_model(folder / ("tied" if tied else "untied"), tied) for tied in (True, False)}
    return SimpleNamespace(folder=folder, models=models)


# With --turns all the last record is two.
ANSWERS = {"first": [(0, 0), (1, 0), (2, 0)], "all": [(0, 0), (1, 0), (2, 0), (2, 1)]}


def flags_of(row, world):
    """A row as a command line."""
    argv = ["--method", row.method, "--model", str(world.models[row.tied]), "--data", str(world.folder / "train.jsonl"),
            "--val_data", str(world.folder / "train.jsonl")]
    flags = dict(row.flags)
    flags.setdefault("lora_r", 2)
    if row.method == "livr":
        flags.setdefault("lora_dropout", 0.0)
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", str(value)]
    return argv


def built(row, world):
    """A row's run as `train.main` builds it, less the loop -> settings, model, method, objective and the data of its stage."""
    settings = methods.parse(flags_of(row, world))
    model = crystal.model.load(settings.model, torch.float64, "cpu", settings.min_pixels, settings.max_pixels)
    method, fmt = methods.attach(model, settings)
    objective = train.Objective(model, method).train()

    # A fresh adapter does nothing, and fresh rows are almost alike: everything that trains is moved.
    g = torch.Generator().manual_seed(1)
    named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in named:
            if "lora_B" in name or ".rows." in name:
                p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.1)
    model.after_update()

    one_process = SimpleNamespace(first=nullcontext, is_first=True, print=lambda *_: None)
    train_sets, val_set = train.open_data(settings, method, model, fmt, one_process)
    examples = val_set if row.split == "val" else train_sets[settings.progress(row.step).stage]
    return SimpleNamespace(settings=settings, model=model, method=method, objective=objective, named=named, examples=examples)


def crystals_terms(row, s):
    """crystal's numbers of a row -> (terms averaged over micro-batches, total, its gradients, corrupted pixels by record)."""
    terms, total, pixels = {}, 0.0, {}
    for part in row.parts:
        examples = [s.examples[at] for at in part]
        for at, example in zip(part, examples):
            pixels[at] = example.get("pixel_values_cor")
        batch = data.to_device(data.collate(examples, s.model.tokenizer.pad_token_id), torch.device("cpu"), torch.float64)
        found = s.objective(batch, s.settings.progress(row.step))
        loss = train.weighted(found, s.method, s.settings) / len(row.parts)
        loss.backward()
        total += float(loss)
        for name, value in found.items():
            terms[name] = terms.get(name, 0.0) + float(value) / len(row.parts)
    return terms, total, {name: p.grad for name, p in s.named}, pixels


def oracles_net(row, world, s, given):
    """The oracle's model with crystal's trained parameters in their places, as whole tensors -> (Net, its leaves)."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in s.named}
    tokens = {"sft": [], "crystal": oracle.CRYSTAL_TAGS, "livr": [], "lavit": ["<answer>"], "valr": oracle.VALR_TAGS}[row.method]
    if row.method in ("crystal", "livr", "lavit"):
        new = oracle.latent_names(given)
        tokens = tokens + (new if given.latent_kind == "diverse" else new[:1])

    # Adapters become one weight; a whole weight that trains is taken as it is.
    directory = world.models[row.tied]
    frozen = oracle.stock(str(directory)).state_dict()
    weights, heads = {}, {}
    for name, leaf in leaves.items():
        if name.endswith(".lora_A"):
            key = name.removesuffix(".lora_A").removeprefix("model.hf.")
            B = leaves[f"model.hf.{key}.lora_B"]
            weights[f"{key}.weight"] = oracle.adapted(frozen[f"{key}.weight"], leaf, B, given.lora_alpha, given.lora_r)
        elif name.startswith("heads."):
            heads[name.removeprefix("heads.")] = leaf
        elif name.startswith("model.hf.") and not name.endswith(".lora_B"):
            weights[name.removeprefix("model.hf.")] = leaf

    # New tokens take the first free rows of the vocabulary, in order; an untied head has rows of its own.
    net = oracle.Net(directory, weights, heads, tokens, given.min_pixels, given.max_pixels)
    embedding, head = "model.language_model.embed_tokens.weight", "lm_head.weight"
    if tokens:
        ids = [net.id(token) for token in tokens]
        weights[embedding] = oracle.with_rows(frozen[embedding], ids, leaves["model.rows.rows"])
        weights[head] = weights[embedding]
        if not row.tied:
            weights[head] = oracle.with_rows(frozen[head], ids, leaves["model.rows.head_rows"])
        net = oracle.Net(directory, weights, heads, tokens, given.min_pixels, given.max_pixels)
    return net, leaves


WEIGHTS = {  # eq. 6, eq. 9 of LaViT, and VaLR's sum
    "sft": {"ce": None}, "livr": {"ce": None},
    "crystal": {"ce": "w_ce_int", "ce_int": "w_ce_int", "ce_cor": "w_ce_cor", "kl": "w_kl", "attn": "w_attn"},
    "lavit": {"ce": None, "semantics": "w_semantics", "gaze": "w_gaze"},
    "valr": {"ce": None, "repa": "w_repa"},
}


def oracles_terms(row, world, s, pixels):
    """The oracle's numbers of a row, as `crystals_terms` gives them: the mean over all pairs of all micro-batches."""
    given = {"lora_r": 2} | row.flags
    given = oracle.settings(row.method, **{name: value for name, value in given.items() if name not in FREE})
    net, leaves = oracles_net(row, world, s, given)
    pairs = []
    for epoch, index in (at for part in row.parts for at in part):
        which, number = ANSWERS[given.turns][index]
        record, more = RECORDS[which], {}
        if row.method == "crystal":
            seed = given.seed + (row.split == "val")
            more = {"place": (seed, epoch, index),
                    "pixels_cor": checked_pixels(net, record, number, given, (seed, epoch, index), pixels[epoch, index], world)}
        elif row.method != "sft":
            more = {"step": row.step}
        pairs.append(getattr(oracle, row.method)(net, record, world.folder, given, number=number, **more))
    terms = {name: oracle.mean([pair[name] for pair in pairs]) for name in pairs[0]}

    total = 0.0
    for name, term in terms.items():
        if name in WEIGHTS[row.method]:
            weight = WEIGHTS[row.method][name]
            total = total + (getattr(given, weight) if weight else 1.0) * term
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    grads = {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), grads)}
    return {name: float(term) for name, term in terms.items()}, float(total), grads


# Settings by which no number may change: the oracle does not know them.
FREE = {"realisation", "checkpointing", "tune", "lora_on", "lora_dropout", "semantics_dim", "preset"} - {"preset"}


def checked_pixels(net, record, number, given, place, found, world):
    """crystal's corrupted pixels, once they are the oracle's: a grey level may have been rounded the other way."""
    _, _, seen = oracle.conversation(record, number)
    pictures = oracle.open_pictures(record, world.folder, seen)
    expected, _ = oracle.pixels_of(net, [oracle.corrupted(picture, given, place, n) for n, picture in enumerate(pictures)])
    off = (found - expected).abs()
    assert off.max() < 0.04 and off.mean() < 1e-4, f"{given.corruption}: the pictures differ by {off.max()}, {off.mean()} on average"
    return found.double()


# ---- the comparison --------------------------------------------------------------------------------------------------------

DIFFERENCES = {}  # {row: (largest of a term, largest of a gradient, how many terms, how many parameters)}


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

    wrong = {name: (terms.get(name, total), right.get(name, right_total)) for name, x in off.items() if not x < row.tolerance}
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
        print(f"{max(x[0] for x in DIFFERENCES.values()):20.1e}      {max(x[1] for x in DIFFERENCES.values()):15.1e}         all")


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_row_of_the_table(row, world, float64_modules):
    compare(row, world)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-s", *sys.argv[1:]]))
