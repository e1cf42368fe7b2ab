"""Every setting of crystal.train does what it says: each flag of each method, at another value than its own.

Right values come from elsewhere than the code under test: typed out by hand from the papers' tables, from
arithmetic on paper (schedules, grids, shapes), from AdamW's formula on the gradient that was seen, from
plain loops over positions and heads, or from transformers' names of modules. A flag's way from the command
line to what it reaches is taken whole: argv is parsed, and what is looked at was built from it, by
`methods.attach`, `training_data.open_data` or `train.main`.

`@holds("lr")` notes that a test sets a flag; test_every_flag_has_an_entry keeps the table whole.
"""

import inspect
import json
import math
import os
import shutil
import sys
import types
from collections import Counter, defaultdict
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import crystal.backbone.model
import crystal.corrupt as corruptions
import crystal.latent_copy
import crystal.methods.crystal
from crystal import feedback, lora, methods, train, training_data
from crystal.backbone import attention_functions
from crystal.layout import IGNORE
from crystal.runtime import checkpoint, config, data
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes

METHODS = ("sft", "crystal", "livr", "lavit", "valr")
HELD = defaultdict(list)  # (method, flag): tests that set it


def holds(*flags, of=METHODS):
    """Notes in the table that a test sets these flags of these methods.

    Each must stand in its text as --flag.
    """

    def note(test):
        text = inspect.getsource(test)
        for flag in flags:
            assert f'"--{flag}"' in text or f'"--no-{flag}"' in text, f"{test.__name__} does not set --{flag}"
            for method in [of] if isinstance(of, str) else of:
                HELD[method, flag].append(test.__name__)
        return test

    return note


def test_every_flag_has_an_entry():
    """Both ways: no flag without a test, no entry for a flag that is none."""
    known = {(method, f.name) for method in METHODS for f in fields(methods.get(method).Settings)}
    assert sorted(known - HELD.keys()) == []
    assert sorted(HELD.keys() - known) == []


# --- records of our own, and what is built from a command line ---

ANSWERS = [
    "red", "3", "the heart is nearer", "blue star", "green", "a ring", "yes", "no", "two of them", "left",
    "right", "ten",
]
# Width, height.
SIZES = [
    (112, 84), (56, 56), (84, 112), (70, 56), (56, 84), (98, 56), (56, 112), (84, 84), (112, 56), (70, 70),
    (56, 70), (84, 56),
]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Twelve records of different answers and picture sizes, with a cot and a teacher's features.

    The file's path.
    """
    root, rng, tensors = tmp_path_factory.mktemp("twelve"), np.random.default_rng(3), {}
    with open(root / "train.jsonl", "w") as lines:
        for i, (answer, (width, height)) in enumerate(zip(ANSWERS, SIZES)):
            noise = rng.integers(0, 256, (height // 7, width // 7, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((width, height)).save(root / f"{i}.png")
            talk = [{"from": "human", "value": f"<image>\nQuestion {i}?"}, {"from": "gpt", "value": answer}]
            record = {
                "id": str(i),
                "image": f"{i}.png",
                "conversations": talk,
                "cot": ["I look.", "I see."],
                "features": {"lavit": "teacher.safetensors"},
            }
            lines.write(json.dumps(record) + "\n")
            tensors[f"{i}/gaze"] = torch.from_numpy(rng.random(12, dtype=np.float32))
            tensors[f"{i}/gaze_grid"] = torch.tensor([[3, 4]])
            tensors[f"{i}/v_sem"] = torch.from_numpy(rng.random(32, dtype=np.float32))
    save_file(tensors, root / "teacher.safetensors")
    return root / "train.jsonl"


@pytest.fixture
def built(model_dirs, twelve, tmp_path):
    """built(*flags) -> settings, model, method, fmt, objective, and `train_sets`, `val_set`
    as train.main opens them.
    """

    def make(*flags, tied=True, dtype=torch.float32):
        given = [
            "--model", str(model_dirs[tied]), "--data", str(twelve), "--output", str(tmp_path / "run"),
            "--latents", "3", "--lora_r", "2", *flags,
        ]
        settings = methods.parse(given)
        model = crystal.backbone.model.load(
            settings.model, dtype, "cpu", settings.min_pixels, settings.max_pixels
        )
        method, fmt = methods.attach(model, settings)
        objective = train.Objective(model, method).train()
        train_sets, val_set, broken = training_data.open_data(settings, method, model, fmt, Processes())
        return SimpleNamespace(
            settings=settings, model=model, method=method, fmt=fmt, objective=objective,
            records=train_sets[0].records, train_sets=train_sets, val_set=val_set, broken=broken,
        )

    return make


def batch_of(s, indices, stage=-1, epoch=0):
    """A batch of chosen records of a stage (-1: the last), as the loop would make it."""
    examples = [s.train_sets[stage][epoch, i] for i in indices]
    batch = data.collate(examples, s.model.tokenizer.pad_token_id)
    return data.to_device(batch, torch.device("cpu"), s.model.hf.dtype)


def text_of(s, batch, b=0):
    """One sequence of a batch as text, each run of image tokens shown once."""
    ids = batch["input_ids"][b][batch["attention_mask"][b].bool()]
    text = s.model.tokenizer.decode(ids)
    while "<|image_pad|><|image_pad|>" in text:
        text = text.replace("<|image_pad|><|image_pad|>", "<|image_pad|>")
    return text


def labels_of(s, batch, b=0):
    """What a sequence has as labels, as text."""
    targets = batch["targets"][b]
    return s.model.tokenizer.decode(targets[targets != IGNORE])


@pytest.fixture
def run(model_dirs, twelve, tmp_path, monkeypatch, capsys):
    """run(name, *flags) -> train.main's run directory, lines and output, and what passed on the way.

    batches: (batch, progress, torch's seed) of each forward in training. updates: {name: (value before,
    gradient, value after)} of each update. rates: the learning rates of its groups.
    """

    def go(name, *flags, tied=True):
        seen = SimpleNamespace(batches=[], updates=[], rates=[], objective=None)

        class Watched(train.Objective):
            def __init__(self, *args):
                super().__init__(*args)
                seen.objective = self

            def forward(self, batch, progress):
                if self.training:
                    seen.batches.append((batch, progress, torch.initial_seed()))
                return super().forward(batch, progress)

        class Optimizer(torch.optim.AdamW):
            def step(self, *args):
                names = {p: n for n, p in seen.objective.named_parameters()}
                held = [p for group in self.param_groups for p in group["params"]]
                before = {names[p]: (p.detach().clone(), p.grad.clone()) for p in held}
                super().step(*args)
                seen.updates.append({names[p]: (*before[names[p]], p.detach().clone()) for p in held})
                seen.rates.append([group["lr"] for group in self.param_groups])

        with monkeypatch.context() as patch:
            patch.setattr(train, "Objective", Watched)
            patch.setattr(torch.optim, "AdamW", Optimizer)
            # For process groups alone, of which there are none here.
            patch.setattr(train.gc, "collect", lambda *_: None)
            seen.run = train.main(
                [
                    "--model", str(model_dirs[tied]), "--data", str(twelve), "--output", str(tmp_path / name),
                    "--latents", "3", "--lora_r", "2", "--batch_size", "2", "--max_steps", "1",
                    "--eval_every", "0", "--log_every", "100", *flags,
                ]
            )
        log = seen.run / "metrics.jsonl"
        # The first process's alone.
        seen.lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        seen.out = capsys.readouterr().out
        return seen

    return go


# --- what each flag is without being given ---

# CrystaL, appendix A: LoRA with r 16 and alpha 32, learning rate 2e-4. As its released code has it: 4000
# steps, batches of one pair a process, weight decay 0.1, warm-up 5 %, cosine. Table 3: 8 latents, diverse.
SHARED = dict(
    model="tiny", init_from="", data="", val_data="", image_root="", output="", seed=0, latents=8,
    latent_kind="diverse", turns="first", blind=False, tune="lora", lora_r=16, lora_alpha=32.0,
    lora_dropout=0.0, lora_on="language", max_steps=4000, batch_size=1, accumulation=1, lr=2e-4,
    lr_tokens=1.0, weight_decay=0.1, warmup=0.05,
    decay="cosine", clip=1.0, device="auto", dtype="auto",
    checkpointing=False, compile=False, shard="none", workers=0, min_pixels=None,
    max_pixels=None, on_bad_record="stop", eval_every=250, eval_records=256, save_every=500, keep=2,
    log_every=10, resume=False, overwrite=False, tensorboard=False,
)
OWN = {
    "sft": {},
    # Eq. 3 to 6, table 4 (KL is the best row) and table 5 (blur is).
    "crystal": dict(
        thought="fixed", labels="all", corruption="blur", latent_copy="kv", copied="latents", ce="per_path",
        kl_share=1.0, answer_positions="predicting", attn_loss="kl", attn_heads="keep",
        attn_columns="latents", attn_layers="last", teacher_grad=False, w_ce_int=1.0, w_ce_cor=1.0, w_kl=1.0,
        w_attn=1.0,
    ),
    # LIVR, section 3.2 and appendix B: 16 latents, 4 epochs masked and 6 open, dropout 0.05, 1e-4, decay
    # 0.01, batches of 8.
    "livr": dict(
        latents=16, place="after", masked=0.4, mask="prompt", latents_see="all", image_copies=1,
        lora_dropout=0.05, batch_size=8, lr=1e-4, weight_decay=0.01,
    ),
    # LaViT, table A1: 5e-6 linear, warm-up 3 %, no decay, 1000 steps of 16, 4 latents, the language model
    # whole. Eq. 5: T_w 400 of 1000.
    "lavit": dict(
        latents=4, tune="full", max_steps=1000, batch_size=16, lr=5e-6, weight_decay=0.0, warmup=0.03,
        decay="linear", gate="cosine", gate_warmup=0.4, gate_start=1e-6, w_semantics=0.3, w_gaze=0.3,
        gaze_top=8, semantics_dim=None,
    ),
    # VaLR: 16 latents a step, lambda 0.5, the decoder whole, 1e-5 and then 2e-6.
    "valr": dict(
        latents=16, tune="full", lr=1e-5, lr_latents=2e-6, weight_decay=0.0, first_share=0.5, encoders="tiny",
        align_layer=0, w_repa=0.5, updates=None,
    ),
}
# The authors' released CrystaL where it is not the paper: the whole thought is shared, one token mean over
# thought and both answers, the largest tenth of the KL rows, the answer's own positions, heads averaged
# first over the thought's columns, and adapters with dropout 0.01 on every Linear of language model,
# vision tower and merger.
RELEASED = dict(
    copied="thought", ce="pooled", kl_share=0.1, answer_positions="span", attn_heads="mean",
    attn_columns="thought", lora_on="language,vision,merger", lora_dropout=0.01,
)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_the_papers(method):
    assert asdict(methods.parse(["--method", method])) == SHARED | OWN[method] | {"method": method}


def test_released_is_the_table_of_the_two_sources():
    """Typed out by hand; what it does not name stays the paper's, and what is given wins."""
    released = methods.parse(["--method", "released"])
    assert asdict(released) == SHARED | OWN["crystal"] | RELEASED | {"method": "released"}
    by_hand = methods.parse(
        ["--method", "released", "--ce", "per_path", "--lora_dropout", "0.0", "--lr", "3.0"]
    )
    assert (by_hand.ce, by_hand.lora_dropout, by_hand.lr, by_hand.copied) == ("per_path", 0.0, 3.0, "thought")


CHOICES = {
    "latent_kind": "diverse identical",
    "turns": "first all",
    "tune": "lora full tokens",
    "decay": "cosine linear",
    "dtype": "auto float32 bfloat16 float64",
    "on_bad_record": "stop skip",
    "shard": "none full",
    "thought": "fixed cot",
    "labels": "all answer",
    "latent_copy": "hidden kv packed",
    "copied": "latents thought",
    "ce": "per_path pooled",
    "answer_positions": "predicting span",
    "attn_loss": "kl frobenius mse",
    "attn_heads": "keep mean",
    "attn_columns": "latents thought all",
    "place": "after before",
    "mask": "prompt answer",
    "latents_see": "all image",
    "gate": "cosine hard open",
}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_flag_may_be(method):
    """Each choice is taken, and nothing else: also where a Settings is made without a command line."""
    kind = methods.get(method).Settings
    for f in fields(kind):
        if f.name not in CHOICES:
            assert f.metadata["choices"] is None, f.name
            continue
        # A teacher sees one turn.
        alone = ["--w_gaze", "0", "--w_semantics", "0"] if method == "lavit" else []
        for value in CHOICES[f.name].split():
            assert getattr(methods.parse(["--method", method, *alone, f"--{f.name}", value]), f.name) == value
        with pytest.raises(UserError, match=f"--{f.name}: invalid choice: 'other'"):
            methods.parse(["--method", method, f"--{f.name}", "other"])
        with pytest.raises(
            UserError, match=f"--{f.name} other: choose one of {CHOICES[f.name].replace(' ', ', ')}$"
        ):
            kind(method=method, **{f.name: "other"})


JUST = [  # method, flag, a value on the bound that is taken, one beyond it that is not
    ("sft", "max_steps", 1, 0),
    ("sft", "batch_size", 1, 0),
    ("sft", "accumulation", 1, 0),
    ("sft", "lora_r", 1, 0),
    ("sft", "keep", 1, 0),
    ("sft", "save_every", 1, 0),
    ("sft", "log_every", 1, 0),
    ("sft", "eval_every", 0, -1),
    ("sft", "eval_records", 0, -1),
    ("sft", "workers", 0, -1),
    ("sft", "weight_decay", 0.0, -0.1),
    ("sft", "seed", 2**63 - 1, 2**63),
    ("sft", "seed", 0, -1),
    ("sft", "lora_dropout", 0.0, -0.1),
    ("sft", "lora_dropout", 0.99, 1.0),
    ("sft", "warmup", 0.0, -0.1),
    ("sft", "warmup", 0.99, 1.0),
    ("sft", "lr", 1e-9, 0.0),
    ("sft", "lr_tokens", 1e-9, 0.0),
    ("sft", "clip", 1e-9, 0.0),
    ("sft", "latents", 1, 0),
    ("sft", "lora_on", "merger", "merger,"),
    ("sft", "lora_on", "vision,language", "head"),
    ("crystal", "kl_share", 1.0, 1.1),
    ("crystal", "kl_share", 0.01, 0.0),
    ("crystal", "attn_layers", "0,-3", "0;3"),
    ("livr", "masked", 0.0, -0.1),
    ("livr", "masked", 1.0, 1.1),
    ("livr", "image_copies", 1, 0),
    ("livr", "latents", 1, -1),
    ("lavit", "gate_warmup", 1.0, 1.1),
    ("lavit", "gate_warmup", 0.1, 0.0),
    ("lavit", "gate_start", 1.0, 1.1),
    ("lavit", "gate_start", 1e-9, 0.0),
    ("lavit", "w_semantics", 0.0, -0.1),
    ("lavit", "w_gaze", 0.0, -0.1),
    ("lavit", "gaze_top", 1, 0),
    ("lavit", "latents", 1, 0),
    ("valr", "first_share", 0.0, -0.1),
    ("valr", "first_share", 0.99, 1.0),
    ("valr", "lr_latents", 1e-9, 0.0),
    ("valr", "w_repa", 0.0, -0.1),
    ("valr", "align_layer", 0, -1),
    ("valr", "updates", 0, -1),
    ("valr", "encoders", "none", "none,tiny"),
    ("valr", "encoders", "features:dino:1", "features:dino:0"),
    ("valr", "encoders", "features:dino:12", "features:dino"),
    ("valr", "encoders", "own,tiny", "own,,tiny"),
    ("valr", "encoders", "own", "features:dino:x"),
]


@pytest.mark.parametrize("method, flag, last, beyond", JUST)
def test_each_bound_just_met_and_just_passed(method, flag, last, beyond):
    assert getattr(methods.parse(["--method", method, f"--{flag}", str(last)]), flag) == last
    with pytest.raises(UserError, match=f"--{flag}") as error:
        methods.parse(["--method", method, f"--{flag}", str(beyond)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--corruption", "blur=1:0.9"],
        ["--corruption", "blur=-1:2"],
        ["--corruption", "blur="],
        ["--corruption", "blur=2:"],
        ["--corruption", "blur,"],
        ["--corruption", "nothing=1"],
        ["--attn_heads", "mean", "--attn_loss", "frobenius"],
        ["--method", "livr", "--latents", "0"],
        ["--method", "lavit", "--turns", "all"],
        ["--method", "lavit", "--turns", "all", "--w_gaze", "0"],
        ["--method", "lavit", "--turns", "all", "--w_semantics", "0"],
    ],
)
def test_flags_that_exclude_one_another(flags):
    with pytest.raises(UserError):
        methods.parse(flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--corruption", "blur=1:1"],
        ["--corruption", "blur=0:2"],
        ["--corruption", "blur=0,noise"],
        ["--attn_heads", "mean"],
        ["--method", "livr", "--latents", "0", "--mask", "answer"],
        ["--method", "livr", "--latents", "0", "--masked", "0"],
        ["--method", "lavit", "--turns", "all", "--w_gaze", "0", "--w_semantics", "0"],
    ],
)
def test_and_those_that_do_not(flags):
    methods.parse(flags)


def test_a_strength_beyond_its_modes_limit_is_told():
    """mask takes a share: 1 at most."""
    assert steps("mask=0:1") == [("mask", 0.0, 1.0)]
    with pytest.raises(UserError, match="--corruption mask=0:1.5: mask goes from 0 to 1"):
        steps("mask=0:1.5")


def steps(text):
    """The (mode, low, high) that --corruption makes of a text."""
    return methods.get("crystal")(methods.parse(["--corruption", text])).corruption.steps


# --- what is trained on what ---


@holds("method")
def test_method_names_the_file_whose_method_runs(built, tmp_path, twelve, model_dirs):
    for name in METHODS:
        more = ["--encoders", "none"] if name == "valr" else []
        s = built("--method", name, *more)
        assert (
            type(s.method).__module__ == f"crystal.methods.{name}"
            and type(s.settings) is type(s.method).Settings
        )
        assert methods.parse(["--method", name]).run_dir.as_posix() == f"runs/{name}"
    (tmp_path / "mine.py").write_text(
        "from crystal.methods import sft\n\n\nclass Method(sft.Method):\n    word = 'mine'\n"
    )
    assert built("--method", str(tmp_path / "mine.py")).method.word == "mine"
    assert methods.parse([]).method == "crystal"


@holds("model")
def test_model_is_the_directory_whose_weights_are_loaded(run, model_dirs):
    """The untied one, whose head has weights of its own. Without new tokens nothing may have changed."""
    seen = run("untied", "--method", "sft", "--model", str(model_dirs[False]))
    stored = load_file(model_dirs[False] / "model.safetensors")
    held = seen.objective.model
    assert not held.tied and torch.equal(held.hf.lm_head.weight, stored["lm_head.weight"])
    q = held.hf.model.language_model.layers[1].self_attn.q_proj
    assert torch.equal(q.weight, stored["model.language_model.layers.1.self_attn.q_proj.weight"])
    assert f"sft on {model_dirs[False]}: " in seen.out
    assert json.loads((seen.run / "config.json").read_text())["model"] == str(model_dirs[False])


@holds("data", "val_data", "image_root", "eval_records")
def test_records_come_from_the_files_that_are_named(built, twelve, tmp_path):
    """Other files than the twelve, whose pictures lie in a folder of their own."""
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for n, size in enumerate([(70, 84), (84, 56), (56, 98)]):
        Image.new("RGB", size, (n, 90, 20)).save(tmp_path / "pictures" / "deep" / f"{n}.png")

    def record(n, answer):
        talk = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": answer}]
        return {"image": f"deep/{n}.png", "conversations": talk}

    (tmp_path / "a.json").write_text(json.dumps([record(0, "one"), record(1, "two")]))
    (tmp_path / "b.json").write_text(json.dumps([record(2, "three"), record(1, "four"), record(0, "five")]))
    flags = [
        "--data", str(tmp_path / "a.json"), "--val_data", str(tmp_path / "b.json"),
        "--image_root", str(tmp_path / "pictures"),
    ]
    s = built("--method", "sft", *flags, "--eval_records", "2")
    assert [r.answer for r in s.records] == ["one", "two"] and [r.answer for r in s.val_set.records] == [
        "three", "four",
    ]
    assert s.records[1].images == [tmp_path / "pictures" / "deep" / "1.png"]
    # 56 x 98 px: 7 rows of patches, rounded to an even number.
    assert s.val_set[0, 0]["image_grid_thw"].tolist() == [[1, 8, 4]]
    assert [r.answer for r in built("--method", "sft", *flags).val_set.records] == ["three", "four", "five"]
    assert built("--method", "sft").val_set is None
    with pytest.raises(UserError, match="a.json.*deep/0.png"):
        built("--method", "sft", *flags[:2])


@holds("blind")
def test_a_blind_run_sees_grey_pictures_in_training_and_validation(built, twelve, tmp_path, monkeypatch):
    """128 of 255 in every pixel of both paths; the prompt, with its number of image tokens, stays."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[None, :, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[None, :, None]
    for method, names in (("sft", ["pixel_values"]), ("crystal", ["pixel_values", "pixel_values_cor"])):
        flags = ["--method", method, "--val_data", str(twelve)]
        seeing, blind = built(*flags, "--no-blind"), built(*flags, "--blind")
        for split in ("train_sets", "val_set"):
            plain, grey = (getattr(s, split) for s in (seeing, blind))
            plain, grey = (x[0][0, 3] if split == "train_sets" else x[0, 3] for x in (plain, grey))
            for name in names:
                colours = grey[name].view(-1, 3, 2 * 14 * 14) * std + mean
                assert (colours - 128 / 255).abs().max() < 1e-5 and not torch.equal(grey[name], plain[name])
            assert grey["layout"].ids == plain["layout"].ids

    assert methods.parse(["--blind"]).run_dir.as_posix() == "runs/crystal-blind"
    assert methods.parse(["--blind", "--output", "there"]).run_dir.as_posix() == "there"


def test_without_data_the_toy_scenes_of_the_seed_are_made(built, twelve, tmp_path, monkeypatch):
    from crystal.runtime import toy

    asked = []

    def generate(out, seed=0):
        asked.append((out, seed))
        shutil.copytree(twelve.parent, out)
        lines = twelve.read_text().splitlines(True)
        (tmp_path / out / "val.jsonl").write_text("".join(lines[:5]))

    monkeypatch.setattr(toy, "generate", generate)
    monkeypatch.chdir(tmp_path)
    s = built("--method", "sft", "--data", "", "--seed", "5")
    assert asked == [("runs/toy-5", 5)] and len(s.records) == 12 and len(s.val_set.records) == 5


@holds("turns")
def test_turns_are_the_first_answer_or_a_record_each(built, tmp_path, twelve):
    shutil.copy(twelve.parent / "0.png", tmp_path)
    talk = [("human", "<image>\nA?"), ("gpt", "first"), ("human", "B?"), ("gpt", "second")]
    line = {"image": "0.png", "conversations": [{"from": who, "value": what} for who, what in talk]}
    (tmp_path / "two.jsonl").write_text(json.dumps(line))
    flags = [
        "--method", "sft", "--data", str(tmp_path / "two.jsonl"), "--val_data", str(tmp_path / "two.jsonl"),
    ]
    s = built(*flags)
    assert [r.answer for r in s.records] == [r.answer for r in s.val_set.records] == ["first"]
    s = built(*flags, "--turns", "all")
    assert [r.answer for r in s.records] == [r.answer for r in s.val_set.records] == ["first", "second"]
    assert "A?<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\nB?<|im_end|>" in text_of(
        s, batch_of(s, [1])
    )


@holds("on_bad_record")
def test_a_bad_record_stops_or_is_skipped_and_listed(built, tmp_path, twelve):
    """One line of 101 is broken: under 1 %. In validation too."""
    for i in range(12):
        shutil.copy(twelve.parent / f"{i}.png", tmp_path)
    shutil.copy(twelve.parent / "teacher.safetensors", tmp_path)
    line = twelve.read_text().splitlines()[0]
    (tmp_path / "bad.jsonl").write_text("\n".join([line] * 50 + ["{oops"] + [line] * 50))
    for name in ("--data", "--val_data"):
        with pytest.raises(UserError, match="bad.jsonl:51: not JSON"):
            built("--method", "sft", name, str(tmp_path / "bad.jsonl"))
    s = built("--method", "sft", "--data", str(tmp_path / "bad.jsonl"), "--on_bad_record", "skip")
    assert len(s.records) == 100 and all(r.answer == "red" for r in s.records) and s.train_sets[0].skip
    assert len(s.broken) == 1 and "bad.jsonl:51" in s.broken[0]
    assert not built("--method", "sft").train_sets[0].skip


@holds("output", "overwrite", "resume")
def test_output_is_where_all_is_written_and_nothing_is_lost_unasked(run, tmp_path):
    seen = run(
        "here/deep", "--method", "sft", "--output", str(tmp_path / "here" / "deep"), "--max_steps", "2"
    )
    assert seen.run == tmp_path / "here" / "deep"
    assert sorted(p.name for p in seen.run.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl"]
    trained = load_file(checkpoint.step_dir(seen.run, 2) / "trainable.safetensors")
    (seen.run / "mine.txt").write_text("kept")
    (seen.run / "merged").mkdir()
    with pytest.raises(
        UserError, match="holds a run already; --resume goes on from it, --overwrite starts anew"
    ):
        run("here/deep", "--method", "sft", "--max_steps", "2")
    again = run("here/deep", "--method", "sft", "--max_steps", "2", "--resume")
    assert (
        again.batches == []
        and "resumed" in again.out
        and "at update 2" in again.out
        and (seen.run / "mine.txt").exists()
    )
    assert all(torch.equal(x, dict(again.objective.named_parameters())[n]) for n, x in trained.items())
    anew = run("here/deep", "--method", "sft", "--max_steps", "2", "--overwrite")
    assert (
        [x["step"] for x in anew.lines] == [1, 2]
        and len(anew.batches) == 2
        and not (seen.run / "merged").exists()
        and (seen.run / "mine.txt").exists()
    )


@holds("init_from")
def test_a_run_begins_with_the_weights_of_another(run, tmp_path):
    """With a rate of next to nothing they are what the first stage ended with, and the optimiser is new."""
    first = run("first", "--lr", "1e-2", "--max_steps", "2")
    ended = load_file(checkpoint.step_dir(first.run, 2) / "trainable.safetensors")
    begins = ["--init_from", str(first.run), "--w_kl", "0.5"]
    second = run("second", *begins, "--lr", "1e-30")
    assert "begins with the weights of" in second.out and "2 updates of crystal" in second.out
    before = second.updates[0]
    assert all(torch.equal(before[n][0], t) for n, t in ended.items()) and before.keys() == ended.keys()
    fresh = run("fresh", "--lr", "1e-30").updates[0]
    assert any(not torch.equal(fresh[n][0], t) for n, t in ended.items())
    moments = load_file(checkpoint.step_dir(second.run, 1) / "optimizer.safetensors")
    assert {float(t) for n, t in moments.items() if n.endswith(".step")} == {1}

    # A resume goes on from the run's own checkpoint.
    more = ["third", *begins, "--lr", "1e-2", "--max_steps", "2", "--save_every", "1"]
    whole = run(*more)
    shutil.rmtree(checkpoint.step_dir(whole.run, 2))
    again = run(*more, "--resume")
    for name, (_, _, after) in whole.updates[1].items():
        assert torch.equal(again.updates[0][name][2], after)

    # One line for what the weights do not fit.
    for flags, said in (
        (["--lora_r", "3"], "was trained with --lora_r 2, not 3"),
        (["--lora_alpha", "64"], "was trained with --lora_alpha 32.0, not 64.0"),
        (["--lora_on", "language,merger"], "was trained with --lora_on language, not language,merger"),
        (["--tune", "tokens"], "was trained with --tune lora, not tokens"),
        (["--latents", "4"], "was trained with --latents 3, not 4"),
        (["--latent_kind", "identical"], "was trained with --latent_kind diverse, not identical"),
        (["--model", "tiny"], "was trained with --model .*, not tiny"),
    ):
        with pytest.raises(UserError, match=f"--init_from .*first: {said}"):
            run("refused", "--init_from", str(first.run), *flags)
    with pytest.raises(UserError, match="--init_from .*nothing: has no whole checkpoint to begin with"):
        run("refused", "--init_from", str(tmp_path / "nothing"))


# --- the sequence ---

USER = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Question 0?"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
SEGMENT = "<latent><|endoftext|><|endoftext|></latent>"  # nobody reads the ids of latents that are fed back
THOUGHT = "<think> Because the feature of the image is<|latent_{}|><|latent_{}|>. </think>"
FIXED = THOUGHT + "<answer>red</answer><|im_end|>"
SAID = {  # what follows the question with K = 2, of either kind; the answer is "red"
    "sft": (TURN + "red<|im_end|>",) * 2,
    "crystal": (TURN + FIXED.format(0, 1), TURN + FIXED.format(0, 0)),
    "livr": (
        "<|latent_0|><|latent_1|>" + TURN + "red<|im_end|>",
        "<|latent_0|><|latent_0|>" + TURN + "red<|im_end|>",
    ),
    "lavit": (
        TURN + "<|latent_0|><|latent_1|><answer>red<|im_end|>",
        TURN + "<|latent_0|><|latent_0|><answer>red<|im_end|>",
    ),
    "valr": (TURN + f"{SEGMENT}I look.\n{SEGMENT}I see.\n<answer>red</answer><|im_end|>",) * 2,
}
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
NEW = {  # the tokens that get rows
    "sft": ([], []),
    "crystal": (TAGS + ["<|latent_0|>", "<|latent_1|>"], TAGS + ["<|latent_0|>"]),
    "livr": (["<|latent_0|>", "<|latent_1|>"], ["<|latent_0|>"]),
    "lavit": (["<answer>", "<|latent_0|>", "<|latent_1|>"], ["<answer>", "<|latent_0|>"]),
    "valr": (["<latent>", "</latent>", "<answer>", "</answer>"],) * 2,
}


@holds("latents", "latent_kind")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["diverse", "identical"])
def test_k_latents_of_their_kind_stand_where_the_method_has_them(built, method, kind):
    """Plain fine-tuning has none, and VaLR's have no tokens: there is nothing of a kind in them."""
    more = ["--encoders", "none"] if method == "valr" else []
    s = built("--method", method, *more, "--latents", "2", "--latent_kind", kind)
    batch, which = batch_of(s, [0]), ["diverse", "identical"].index(kind)
    text = text_of(s, batch)
    assert text[text.index("<|im_start|>user") :] == USER + SAID[method][which]
    tokens = s.model.tokenizer.convert_tokens_to_ids(NEW[method][which])
    assert (s.model.new_tokens.ids if s.model.new_tokens else []) == tokens
    at = batch["latents"][0].tolist()
    names = s.model.tokenizer.convert_ids_to_tokens(batch["input_ids"][0, at].tolist())
    first, second = "<|latent_0|>", "<|latent_1|>" if which == 0 else "<|latent_0|>"
    assert names == {"sft": [], "valr": ["<|endoftext|>"] * 4}.get(method, [first, second])


@holds("labels", "thought", of="crystal")
def test_labels_are_all_that_is_said_or_the_answer_alone(built):
    """Read off the batch that the loop would get.

    `--thought cot` puts the record's own steps before the latents.
    """
    latents = "<|latent_0|><|latent_1|><|latent_2|>"
    fixed = f"<think> Because the feature of the image is{latents}. </think><answer>"
    cot = f"<think> I look. I see.{latents}. </think><answer>"
    for flags, labels, text in (
        ([], fixed + "red</answer><|im_end|>", fixed),
        (["--labels", "answer"], "red</answer><|im_end|>", fixed),
        (["--thought", "cot"], cot + "red</answer><|im_end|>", cot),
        (["--thought", "cot", "--labels", "answer"], "red</answer><|im_end|>", cot),
    ):
        s = built(*flags)
        batch = batch_of(s, [2, 0])
        assert labels_of(s, batch, 1) == labels and text_of(s, batch, 1).endswith(
            TURN + text + "red</answer><|im_end|>"
        )
        assert labels_of(s, batch, 0) == labels.replace("red", "the heart is nearer")
        # Every label stands one position after the row that predicts it.
        rows = (batch["targets"] != IGNORE).nonzero().tolist()
        assert all(batch["targets"][b, t] == batch["input_ids"][b, t + 1] for b, t in rows)


# --- what trains ---

DECODER = "model.hf.model.language_model."
# (out, in) of the test model's.
LINEARS = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
ADAPTERS = {f"{DECODER}layers.{i}.{name}.lora_{x}" for i in range(3) for name in LINEARS for x in "AB"}
WHOLE = (
    {f"{DECODER}layers.{i}.{name}.weight" for i in range(3) for name in LINEARS}
    | {f"{DECODER}layers.{i}.self_attn.{x}_proj.bias" for i in range(3) for x in "qkv"}
    | {f"{DECODER}layers.{i}.{x}_layernorm.weight" for i in range(3) for x in ("input", "post_attention")}
    | {DECODER + "norm.weight"}
)


@holds("tune")
@pytest.mark.parametrize("method", METHODS)
def test_tune_names_exactly_what_trains(built, method):
    more = {"valr": ["--encoders", "own"]}.get(method, [])
    heads = {
        "lavit": {f"heads.semantics.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")},
        "valr": {f"heads.0.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")},
    }.get(method, set())
    for tied in (True, False):
        rows = (
            set()
            if method == "sft"
            else {"model.new_tokens.embedding"} | (set() if tied else {"model.new_tokens.head"})
        )
        for tune, weights in (("lora", ADAPTERS), ("full", WHOLE), ("tokens", set())):
            s = built("--method", method, *more, "--tune", tune, tied=tied)
            assert {
                n for n, p in s.objective.named_parameters() if p.requires_grad
            } == weights | rows | heads, (tied, tune)


def test_nothing_left_to_train_is_told(run):
    with pytest.raises(UserError, match="--tune tokens: with --method sft nothing is left to train"):
        run("none", "--method", "sft", "--tune", "tokens")


@holds("lora_r", "lora_alpha")
def test_an_adapter_has_rank_r_and_counts_alpha_over_r(built):
    """r 4 and alpha 6: W' = W + 1.5 B A, by hand from the module's own tensors."""
    s = built("--method", "sft", "--lora_r", "4", "--lora_alpha", "6")
    found = dict(s.objective.named_parameters())
    for name, (out, into) in LINEARS.items():
        assert found[f"{DECODER}layers.2.{name}.lora_A"].shape == (4, into) and found[
            f"{DECODER}layers.2.{name}.lora_B"
        ].shape == (out, 4)
    layer = s.model.hf.model.language_model.layers[2].mlp.down_proj
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 48)
    by_hand = x @ layer.weight.T + 1.5 * (x @ layer.lora_A.T) @ layer.lora_B.T
    assert torch.allclose(layer(x), by_hand, atol=1e-5)


@holds("lora_dropout")
def test_adapters_drop_their_share_in_training_alone(built):
    """An adapter made to hand on its first input: 0 for the dropped share, 1 / (1 - p) for the rest.

    The base drops nothing.
    """
    s = built("--method", "livr", "--lora_dropout", "0.3", "--lora_r", "1", "--lora_alpha", "1")
    drawn = []
    for layer in (s.model.layers[0].self_attn.q_proj, s.model.layers[2].mlp.down_proj):
        assert layer.training  # train.Objective(..).train() reaches what was wrapped
        with torch.no_grad():
            layer.lora_A.zero_()[0, 0] = 1
            layer.lora_B.zero_()[0, 0] = 1
            x = torch.ones(20000, layer.in_features)
            base = layer.base(x[:1])[0, 0]
            out = layer(x)[:, 0] - base
            dropped = (out.abs() < 1e-4).float().mean()
            assert abs(dropped - 0.3) < 0.02 and torch.allclose(
                out[out.abs() > 1e-4], torch.tensor(1 / 0.7), atol=1e-4
            )
            drawn.append(out.abs() < 1e-4)
            assert torch.allclose(layer.eval()(x)[:, 0] - base, torch.ones(20000), atol=1e-4)
    assert not torch.equal(*drawn)


VISION = {
    f"model.visual.blocks.{i}.{name}"
    for i in range(2)
    for name in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
}
MERGER = {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
LANGUAGE = {f"model.language_model.layers.{i}.{name}" for i in range(3) for name in LINEARS}


@holds("lora_on")
@pytest.mark.parametrize(
    "parts, wrapped",
    [("vision", VISION), ("merger", MERGER), ("language", LANGUAGE), ("merger,vision", VISION | MERGER)],
)
def test_adapters_are_on_the_parts_that_are_named(built, parts, wrapped):
    s = built("--method", "sft", "--lora_on", parts)
    assert {n for n, m in s.model.hf.named_modules() if hasattr(m, "lora_A")} == wrapped


# --- the optimiser ---


def adamw(p, grads, lrs, decay):
    """AdamW's formula on the gradients of one parameter, betas 0.9 and 0.999, epsilon 1e-8, in float64."""
    p, m, v = p.double(), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(grads, lrs), start=1):
        m = 0.9 * m + 0.1 * g.double()
        v = 0.999 * v + 0.001 * g.double() ** 2
        p = p - lr * decay * p
        p = p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


@holds("lr", "lr_tokens", "weight_decay", "warmup")
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_each_group_moves_by_its_rate_and_its_decay(run, tune):
    """Two updates of a warm-up over four: lr / 4, then lr / 2; three times that for rows.

    Matrices decay, rows and vectors never.
    """
    seen = run(
        "groups", "--tune", tune, "--lr", "0.02", "--lr_tokens", "3", "--weight_decay", "0.4",
        "--warmup", "0.5", "--max_steps", "8", "--eval_every", "0", tied=False,
    )
    lr, kinds = (0.005, 0.01), Counter()
    for name, (before, first, _) in seen.updates[0].items():
        _, second, after = seen.updates[1][name]
        is_row, is_vector = "new_tokens.embedding" in name or "new_tokens.head" in name, before.ndim < 2
        times, decay = 3 if is_row else 1, 0.4 if not (is_row or is_vector) else 0.0
        kinds["tokens" if is_row else "vectors" if is_vector else "matrices"] += 1
        expected = adamw(before, (first, second), [times * x for x in lr], decay)
        assert (after - expected).abs().max() < 2e-6, name
        assert (after - before).abs().max() > 1e-3 or not first.any(), name
    assert kinds == (
        {"matrices": 21, "vectors": 16, "tokens": 2} if tune == "full" else {"matrices": 42, "tokens": 2}
    )
    assert sorted(seen.rates[1]) == pytest.approx([0.01, 0.03] if tune == "lora" else [0.01, 0.01, 0.03])
    assert [x["lr"] for x in seen.lines[:4]] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    # The vocabulary holds what was trained, as of the last update, and the trained copies alone.
    rows = seen.objective.model.new_tokens
    for module, P in rows.pairs():
        assert torch.equal(module.weight[rows.ids], P)


@holds("clip")
def test_the_gradients_norm_is_at_most_clip(run):
    """Through the loop.

    What the optimiser gets has norm `clip` where it was larger, and is untouched to the bit where it was not.
    """

    def gradients(name, clip):
        seen = run(name, "--tune", "full", "--clip", clip)
        grads = {n: g for n, (_, g, _) in seen.updates[0].items()}
        return (
            grads,
            float(torch.cat([g.flatten() for g in grads.values()]).double().norm()),
            seen.lines[0]["grad_norm"],
        )

    free, norm, told = gradients("free", "1e9")
    assert norm > 0.5 and told == pytest.approx(norm, rel=1e-5)
    small = norm / 7
    clipped, now, told = gradients("clipped", str(small))
    # The log tells the norm before clipping.
    assert now == pytest.approx(small, rel=1e-4) and told == pytest.approx(norm, rel=1e-5)
    assert all(torch.allclose(clipped[n], free[n] / 7, rtol=1e-4, atol=1e-9) for n in free)
    above, _, _ = gradients("above", str(norm * 1.01))
    assert all(torch.equal(above[n], free[n]) for n in free)


def rates(*flags):
    settings = methods.parse(list(flags))
    return [train.learning_rate(step, settings) for step in range(settings.max_steps)]


@holds("warmup", "decay", "max_steps", "lr")
@pytest.mark.parametrize("method", METHODS)
def test_the_rate_warms_up_and_falls_as_told(method):
    """Ten updates of one stage, three of them (a quarter, rounded up) on the way up; seven down.

    By hand at each.
    """
    flags = ["--method", method, "--max_steps", "10", "--lr", "2", "--warmup", "0.25"]
    flags += {"livr": ["--masked", "0"], "valr": ["--first_share", "0", "--lr_latents", "2"]}.get(method, [])
    up = [2 / 3, 4 / 3, 2.0]
    cosine = [
        2.0, 1 + math.cos(math.pi / 7), 1 + math.cos(2 * math.pi / 7), 1 + math.cos(3 * math.pi / 7),
        1 + math.cos(4 * math.pi / 7), 1 + math.cos(5 * math.pi / 7), 1 + math.cos(6 * math.pi / 7),
    ]
    line = [2.0, 12 / 7, 10 / 7, 8 / 7, 6 / 7, 4 / 7, 2 / 7]
    assert rates(*flags, "--decay", "cosine") == pytest.approx(up + cosine)
    assert rates(*flags, "--decay", "linear") == pytest.approx(up + line)


@holds("masked", of="livr")
@holds("first_share", "lr_latents", of="valr")
def test_each_stage_warms_up_and_falls_on_its_own():
    """LIVR: a tenth of 20 updates open, 18 masked, warm-up of half. VaLR.

    A quarter of 16 at lr, the rest at lr_latents.
    """
    livr = rates(
        "--method", "livr", "--max_steps", "20", "--masked", "0.9", "--lr", "1", "--warmup", "0.5",
        "--decay", "linear",
    )
    assert livr == pytest.approx([n / 9 for n in range(1, 10)] + [1 - n / 9 for n in range(9)] + [1.0, 1.0])
    valr = rates(
        "--method", "valr", "--max_steps", "16", "--first_share", "0.25", "--lr", "8", "--lr_latents", "3",
        "--warmup", "0.5", "--decay", "linear",
    )
    assert valr == pytest.approx(
        [4, 8, 8, 4] + [3 * n / 6 for n in range(1, 7)] + [3 * (1 - n / 6) for n in range(6)]
    )
    livr, valr = (
        methods.parse(["--method", m, "--max_steps", "40", *more])
        for m, more in (("livr", ["--masked", "0.7"]), ("valr", ["--first_share", "0.7"]))
    )
    assert [livr.span(0), livr.span(1), valr.span(0), valr.span(1)] == [(0, 28), (28, 40)] * 2
    for settings in (livr, valr):
        assert settings.progress(27) == config.Progress(27, 0, 27 / 28, 0.675) and settings.progress(
            34
        ) == config.Progress(34, 1, 0.5, 0.85)


@holds("max_steps", "batch_size", "accumulation", "log_every")
def test_updates_forwards_and_pairs_are_as_many_as_told(run):
    """Three updates of two forwards of four pairs each: each a mean over its eight pairs.

    A line is printed every two updates and last.
    """
    seen = run(
        "counts", "--method", "sft", "--max_steps", "3", "--batch_size", "4", "--accumulation", "2",
        "--log_every", "2", "--lora_r", "1",
    )
    assert [x["step"] for x in seen.lines] == [1, 2, 3] and len(seen.updates) == 3
    assert [(len(batch["input_ids"]), progress.step) for batch, progress, _ in seen.batches] == [
        (4, 0), (4, 0), (4, 1), (4, 1), (4, 2), (4, 2),
    ]
    answers = [
        labels_of(SimpleNamespace(model=seen.objective.model), batch, b)
        for batch, _, _ in seen.batches
        for b in range(4)
    ]
    # 24 pairs: two epochs of twelve.
    assert sorted(answers[:12]) == sorted(answers[12:]) == sorted(f"{a}<|im_end|>" for a in ANSWERS)
    printed = [line for line in seen.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in printed] == ["2/3", "3/3"]
    assert f"ce {seen.lines[1]['ce']:.4f}" in printed[0]


# --- seeds ---


@holds("seed")
def test_order_depends_on_the_seed(built):
    def order(seed):
        s = built("--method", "sft", "--seed", seed, "--batch_size", "4", "--max_steps", "6")
        pad = s.model.tokenizer.pad_token_id
        batches = list(training_data.stage_batches(0, s.train_sets[0], 0, s.settings, pad, Processes()))
        return [labels_of(s, batch, b) for batch in batches for b in range(4)]

    first, again, other = order("7"), order("7"), order("8")
    assert first == again and first[:12] != other[:12] and sorted(first[:12]) == sorted(other[:12])
    # Epochs differ, and none is the file's order.
    assert first[:12] != first[12:] and first[:12] != [f"{a}<|im_end|>" for a in ANSWERS]


@holds("seed")
def test_first_rows_depend_on_the_seed(built, model_dirs):
    """By hand.

    The mean of the vocabulary's own rows, and half their standard deviation times normal numbers of the seed.
    """

    def rows(seed, tied):
        return dict(built("--seed", seed, "--tune", "tokens", tied=tied).model.new_tokens.named_parameters())

    for tied in (True, False):
        stored, g = load_file(model_dirs[tied] / "model.safetensors"), torch.Generator().manual_seed(6)
        found, other = rows("6", tied), rows("9", tied)
        names = [("embedding", "model.language_model.embed_tokens.weight")] + (
            [] if tied else [("head", "lm_head.weight")]
        )
        assert list(found) == [n for n, _ in names]
        for name, key in names:
            used = stored[key][: len(stored[key]) - 64]  # the shipped tokenizer leaves 64 rows spare
            expected = used.mean(0) + 0.5 * used.std(0) * torch.randn(7, 32, generator=g)
            assert torch.allclose(found[name], expected, atol=1e-6), name
            assert not torch.equal(found[name], other[name])


@holds("seed")
def test_first_adapters_depend_on_the_seed(built):
    """By hand.

    Uniform numbers of the seed between -in^-1/2 and in^-1/2, drawn module after module, so that
    no two begin alike.
    """
    s, other = (built("--method", "sft", "--seed", seed) for seed in ("6", "9"))
    found = {n: p for n, p in s.objective.named_parameters() if n.endswith("lora_A")}
    others = dict(other.objective.named_parameters())
    g = torch.Generator().manual_seed(6)
    for name, p in found.items():
        expected = (2 * torch.rand(p.shape, generator=g) - 1) * p.shape[1] ** -0.5
        assert torch.allclose(p, expected, atol=1e-6) and not torch.equal(p, others[name]), name
    assert not any(p.any() for n, p in s.objective.named_parameters() if n.endswith("lora_B"))


@holds("seed", of=("lavit", "valr"))
@pytest.mark.parametrize("method, flags", [("lavit", []), ("valr", ["--encoders", "own,own"])])
def test_first_heads_depend_on_the_seed(built, method, flags):
    """Same seed, same heads; other seed, others.

    Two encoders' projections do not begin alike, and no other draw moves.
    """

    def heads(seed):
        torch.manual_seed(99)
        found = {
            n: p.detach()
            for n, p in built("--method", method, *flags, "--seed", seed).objective.heads.named_parameters()
        }
        assert torch.initial_seed() == 99
        return found

    first, again, other = heads("6"), heads("6"), heads("9")
    assert len(first) == (4 if method == "lavit" else 8)
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)
    if method == "valr":
        assert not torch.equal(first["0.0.weight"], first["1.0.weight"])
    weights = torch.cat([p.flatten() for n, p in first.items() if n.endswith("weight")])
    # Nn.Linear's own start.
    assert weights.abs().max() < 32**-0.5 and weights.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.05)


@holds("seed")
def test_dropout_is_drawn_anew_for_each_update_part_and_rank_and_from_the_seed(run, monkeypatch):
    """The seeds under which forwards run.

    All different, the same in a second run, others with another seed or on another rank.
    """

    def drawn(name, seed, rank=0):
        with monkeypatch.context() as patch:
            patch.setattr(train.distributed, "start", lambda device: Processes(rank=rank))
            seen = run(
                name, "--method", "sft", "--seed", seed, "--max_steps", "2", "--accumulation", "2",
                "--lora_r", "1",
            )
        return [x for _, _, x in seen.batches]

    first, again = drawn("a", "4"), drawn("b", "4")
    assert (
        first == again
        and len({*first, *drawn("c", "5"), *drawn("d", "4", rank=1), *drawn("e", "4", rank=2)}) == 16
    )


def test_dropouts_seed_reaches_the_masks(run, monkeypatch):
    """The masks themselves.

    Of one update's two parts and of the next update's, on the same inputs' shape, no two are alike.
    """
    masks, dropout = [], torch.nn.functional.dropout

    def watched(x, p, training):
        out = dropout(torch.ones_like(x), p, training)
        masks.append(out[:40] == 0)  # the first adapter's of each forward are compared
        return x * out

    monkeypatch.setattr(lora.F, "dropout", watched)
    run("masks", "--method", "sft", "--lora_dropout", "0.5", "--max_steps", "2", "--accumulation", "2")
    first = masks[::21]  # three layers of seven Linears
    assert (
        len(masks) == 4 * 21
        and len(first) == 4
        and not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    )


@holds("seed", "corruption", of="crystal")
def test_corruption_has_the_mode_and_strength_that_are_told_and_the_seeds_own(built, monkeypatch):
    """What the operator is asked for.

    The mode, and a strength uniform between the two ends, drawn anew for epoch and record.
    """
    asked, corrupt = [], corruptions.corrupt
    monkeypatch.setattr(
        corruptions,
        "corrupt",
        lambda x, mode, strength, *more: asked.append((mode, strength)) or corrupt(x, mode, strength, *more),
    )
    flags = ["--corruption", "noise=40:44"]
    pixels = {}
    for seed in ("1", "1", "2"):
        s = built(*flags, "--seed", seed)
        asked.clear()
        made = [s.train_sets[0][epoch, i]["pixel_values_cor"] for epoch in range(4) for i in range(12)]
        assert {mode for mode, _ in asked} == {"noise"} and len(set(asked)) == 48
        strengths = torch.tensor([strength for _, strength in asked])
        assert (
            40 <= strengths.min() < 40.5 and 43.5 < strengths.max() <= 44 and abs(strengths.mean() - 42) < 0.6
        )
        if seed in pixels:
            assert all(torch.equal(a, b) for a, b in zip(made, pixels[seed], strict=True))
        pixels[seed] = made
    assert not any(torch.equal(a, b) for a, b in zip(pixels["1"], pixels["2"], strict=True))
    intact = [s.train_sets[0][0, i]["pixel_values"] for i in range(12)]
    # Noise of 42 of 255, divided by the processor's own deviations (about 0.27), less what is clipped.
    deviation = torch.cat([(a - b).flatten() for a, b in zip(intact, pixels["2"][:12])]).std()
    assert 0.75 * 42 / 255 / 0.27 < deviation < 1.0 * 42 / 255 / 0.27


@pytest.mark.parametrize(
    "mode, low, high",
    [
        ("blur", 2, 5), ("mask", 0.2, 0.8), ("crop", 0.2, 0.8), ("jigsaw", 0.2, 0.8), ("color", 0.5, 2),
        ("noise", 15, 50), ("impulse", 0.01, 0.12),
    ],
)
def test_each_mode_has_its_own_range(mode, low, high):
    """Blur as released, the others between their weakest and strongest level (appendix A.3.

    Crop's and impulse's are ours).
    """
    assert steps(mode) == [(mode, low, high)]


def test_validation_is_corrupted_from_a_seed_of_its_own(built, twelve):
    s = built("--seed", "3", "--val_data", str(twelve))
    assert torch.equal(s.train_sets[0][0, 0]["pixel_values"], s.val_set[0, 0]["pixel_values"])
    assert not torch.equal(s.train_sets[0][0, 0]["pixel_values_cor"], s.val_set[0, 0]["pixel_values_cor"])


# --- how it runs ---


@holds("device")
def test_device_is_where_it_runs(run, monkeypatch):
    """On a machine that says it has a GPU: cpu means the CPU. A name that is none is told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen = run("cpu", "--method", "sft", "--device", "cpu")
    assert "1 process(es) on cpu, float32" in seen.out and seen.lines[0]["loss"] > 0
    with pytest.raises(UserError, match="--device nowhere: there is none of this name"):
        run("nowhere", "--method", "sft", "--device", "nowhere")
    with pytest.raises(UserError, match="--device cuda:5: this machine has 1 CUDA device"):
        run("far", "--method", "sft", "--device", "cuda:5")


@holds("dtype")
@pytest.mark.parametrize(
    "tune, dtype, frozen, trained, computed",
    [
        ("lora", "bfloat16", torch.bfloat16, torch.float32, torch.bfloat16),
        ("full", "bfloat16", torch.float32, torch.float32, torch.bfloat16),
        ("lora", "float64", torch.float64, torch.float64, torch.float64),
        ("full", "float64", torch.float64, torch.float64, torch.float64),
        ("full", "float32", torch.float32, torch.float32, torch.float32),
    ],
)
def test_dtype_is_that_of_weights_and_products(run, monkeypatch, tune, dtype, frozen, trained, computed):
    """Adapters stay wide on small weights; whole training keeps its weights wide and computes small."""
    logits, heads = [], crystal.backbone.model.Model.logits
    monkeypatch.setattr(
        crystal.backbone.model.Model, "logits", lambda self, h: logits.append(heads(self, h)) or logits[-1]
    )
    seen = run("kinds", "--method", "lavit", "--tune", tune, "--dtype", dtype)
    parameters = dict(seen.objective.named_parameters())
    assert {p.dtype for p in parameters.values() if not p.requires_grad} == {frozen}
    assert {p.dtype for p in parameters.values() if p.requires_grad} == {trained}
    assert [x.dtype for x in logits] == [computed]
    batch = seen.batches[0][0]
    assert batch["pixel_values"].dtype == frozen and batch["v_sem"].dtype == torch.float32
    assert (
        json.loads((seen.run / "config.json").read_text())["dtype"] == dtype
        and f"on cpu, {str(frozen).removeprefix('torch.')}" in seen.out
    )


def test_dtype_auto_is_float32_on_a_cpu(run):
    seen = run("auto", "--method", "sft")
    assert json.loads((seen.run / "config.json").read_text())["dtype"] == "float32"
    assert {p.dtype for p in seen.objective.parameters()} == {torch.float32}


@holds("checkpointing")
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_recomputes_and_changes_nothing(run, monkeypatch, method):
    """Each decoder layer's own attention runs a second time in the backward pass, and losses and gradients
    are equal to the bit.
    """
    calls, attention = Counter(), attention_functions.attention

    def counted(module, *args, **kwargs):
        calls["decoder"] += 1
        return attention(module, *args, **kwargs)

    monkeypatch.setitem(attention_functions.AttentionInterface._global_mapping, "crystal", counted)
    more = [
        "--method",
        method,
        "--tune",
        "full",
        "--lora_dropout",
        "0",
        *{"valr": ["--encoders", "own", "--first_share", "0"]}.get(method, []),
    ]
    found = []
    for name, flags in (("plain", []), ("again", ["--checkpointing"])):
        calls.clear()
        found.append((run(name, *more, *flags), calls["decoder"]))
    (plain, once), (again, twice) = found
    assert twice == 2 * once and once % 3 == 0
    layers = again.objective.model.layers
    assert all(
        layer.gradient_checkpointing and layer._gradient_checkpointing_func.keywords["use_reentrant"] is False
        for layer in layers
    )
    assert not any(layer.gradient_checkpointing for layer in plain.objective.model.layers)
    assert plain.lines[0]["loss"] == again.lines[0]["loss"]
    tolerance = 1e-6 if method == "valr" else 0.0  # its cache sums a key's gradients in another order
    for name, (_, g, _) in plain.updates[0].items():
        assert (g - again.updates[0][name][1]).abs().max() <= tolerance, name


@holds("compile")
@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers_change_nothing(run, monkeypatch, method):
    """Every decoder layer's pieces run as torch.compile traced them, and losses and gradients are equal.

    Nothing is traced a second time for another layer, batch or recorder. The back end that runs the traced
    operations as they are stands for torch's own, which takes half a minute.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=backend, **how))
    torch._dynamo.reset()
    more = [
        "--method", method, "--lora_dropout", "0", "--max_steps", "3",
        *{"valr": ["--encoders", "own", "--first_share", "0"]}.get(method, []),
        *{"crystal": ["--latent_copy", "hidden"]}.get(method, []),
    ]  # fmt: skip
    plain = run("plain", *more)
    assert not graphs
    traced = run("compiled", *more, "--compile")
    assert len(traced.objective.model.layers) == 3 and 2 <= len(graphs) <= 24
    losses = [line["loss"] for line in plain.lines]
    assert [line["loss"] for line in traced.lines] == pytest.approx(losses, rel=1e-6)
    for name, (_, g, _) in plain.updates[-1].items():
        torch.testing.assert_close(traced.updates[-1][name][1], g, atol=1e-5, rtol=1e-4)


def test_compiled_by_torch(run):
    """The whole way, with the compiler that users get."""
    torch._dynamo.reset()
    more = ["--method", "crystal", "--lora_dropout", "0", "--max_steps", "2", "--attn_layers", "all"]
    plain, compiled = run("plain", *more), run("compiled", *more, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    losses = [line["loss"] for line in plain.lines]
    assert [line["loss"] for line in compiled.lines] == pytest.approx(losses, rel=1e-5)


@holds("shard")
def test_shards_lie_in_several_processes(tmp_path):
    """tests/test_shard.py has them; one process says what is needed, and begins no run."""
    with pytest.raises(UserError, match="--shard full: shards lie in several processes"):
        train.main(["--shard", "full", "--output", str(tmp_path / "run"), "--device", "cpu"])
    assert not (tmp_path / "run").exists()


@holds("workers")
def test_workers_prepare_the_same_batches_in_their_processes(built, monkeypatch):
    found, collate = {}, data.collate
    monkeypatch.setattr(
        data, "collate", lambda examples, pad: collate(examples, pad) | {"process": os.getpid()}
    )
    for workers in ("0", "2"):
        s = built("--method", "sft", "--batch_size", "3", "--max_steps", "4", "--workers", workers)
        found[workers] = list(
            training_data.stage_batches(
                0, s.train_sets[0], 0, s.settings, s.model.tokenizer.pad_token_id, Processes()
            )
        )
    assert {batch["process"] for batch in found["0"]} == {os.getpid()}
    assert len({batch["process"] for batch in found["2"]} - {os.getpid()}) == 2
    for a, b in zip(found["0"], found["2"], strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(
            a["pixel_values"], b["pixel_values"]
        )


@holds("min_pixels", "max_pixels")
@pytest.mark.parametrize(
    "flags, grids",
    [
        # Sides are rounded to 28 px. 84 high, 112 wide, then 56 x 56, then 112 high, 84 wide: rows and
        # columns of patches of 14 px.
        ([], [[1, 6, 8], [1, 4, 4], [1, 8, 6]]),
        # At most 50 x 100: 112 x 84 shrinks by sqrt(9408 / 5000) = 1.372: 61.2 x 81.6, rounded down
        # to 56 x 56.
        (["--max_pixels", "5000"], [[1, 4, 4], [1, 4, 4], [1, 4, 4]]),
        # At least 12000: 9408 grows by sqrt(12000 / 9408) = 1.129: 94.9 x 126.5, rounded up to 112 x 140; 56
        # x 56 by 1.956 to 109.5 -> 112.
        (["--min_pixels", "12000", "--max_pixels", "40000"], [[1, 8, 10], [1, 8, 8], [1, 10, 8]]),
    ],
)
def test_pixel_bounds_are_seen_in_the_grid(built, flags, grids):
    s = built("--method", "sft", *flags)
    batch = batch_of(s, [0, 1, 2])
    assert batch["image_grid_thw"].tolist() == grids
    tokens = [rows * columns // 4 for _, rows, columns in grids]
    assert (batch["image"] >= 0).sum(1).tolist() == tokens
    assert len(batch["pixel_values"]) == sum(4 * n for n in tokens)


@holds("min_pixels", "max_pixels")
def test_pixel_bounds_reach_the_loop(run):
    """Three pictures of the twelve, whose grids are those above, in whatever order the loop takes them."""
    found = []
    bounds = {
        "at_most": ["--max_pixels", "5000"],
        "at_least": ["--min_pixels", "12000", "--max_pixels", "40000"],
    }
    for name, flags in bounds.items():
        seen = run(name, "--method", "sft", *flags, "--batch_size", "12", "--lora_r", "1")
        found.append(Counter(tuple(grid) for grid in seen.batches[0][0]["image_grid_thw"].tolist()))
    assert found[0][1, 4, 4] >= 5 and max(rows * columns * 196 for _, rows, columns in found[0]) <= 5000
    assert found[1][1, 8, 10] >= 1 and min(rows * columns * 196 for _, rows, columns in found[1]) >= 12000


# --- what it writes ---


@holds("eval_every", "save_every", "keep", "val_data", "eval_records")
def test_validations_and_checkpoints_come_when_told(run, twelve):
    """Seven updates: validated after 3, 6 and 7.

    Saved after each second and the last, of which two are kept beside the best.
    """
    seen = run(
        "when", "--method", "sft", "--max_steps", "7", "--eval_every", "3", "--save_every", "2",
        "--keep", "2", "--val_data", str(twelve), "--eval_records", "3", "--lora_r", "1", "--lr", "1e-9",
    )
    values = {x["step"]: x["val_ce"] for x in seen.lines if "val_ce" in x}
    assert sorted(values) == [3, 6, 7] and "val: 3 records" in seen.out
    saved = sorted(int(p.name.removeprefix("step-")) for p in (seen.run / "checkpoints").glob("step-*"))
    best = checkpoint.best(seen.run)["step"]
    assert best == min(values, key=values.get) and saved == sorted({6, 7, best})
    never = run(
        "never", "--method", "sft", "--max_steps", "5", "--eval_every", "0", "--save_every", "1",
        "--keep", "3", "--val_data", str(twelve),
    )
    assert not any("val_ce" in x for x in never.lines)
    assert sorted(p.name for p in (never.run / "checkpoints").glob("step-*")) == [
        "step-3", "step-4", "step-5",
    ]
    rare = run("rare", "--method", "sft", "--max_steps", "3", "--save_every", "9")
    assert [p.name for p in (rare.run / "checkpoints").glob("step-*")] == ["step-3"]


@holds("tensorboard")
def test_tensorboard_gets_every_number(run, monkeypatch):
    """A stand-in for the package takes down what is written; without the flag it is not touched."""
    written, package = [], types.ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, directory):
            written.append(directory)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    package.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    assert run("off", "--method", "sft", "--no-tensorboard") and written == []
    seen = run("on", "--method", "sft", "--tensorboard", "--max_steps", "2")
    assert written[0] == seen.run / "tensorboard"
    assert written[1:] == [
        (name, value, x["step"]) for x in seen.lines for name, value in x.items() if name != "step"
    ]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard: needs the extra `track`"):
        run("absent", "--method", "sft", "--tensorboard")


# --- CrystaL: eq. 3 to 6 by plain loops over states, queries and keys that are drawn here ---


def planted(s, batch, monkeypatch):
    """Gives the two paths of the next forward states, queries and keys drawn here, and says
    what was asked for.
    """
    g, (B, L), layers = torch.Generator().manual_seed(3), batch["input_ids"].shape, len(s.model.layers)
    h = torch.randn(2 * B, L, 32, generator=g, dtype=torch.float64, requires_grad=True)
    q = [
        torch.randn(2 * B, 4, L, 8, generator=g, dtype=torch.float64, requires_grad=True)
        for _ in range(layers)
    ]
    k = [torch.randn(2 * B, 2, L, 8, generator=g, dtype=torch.float64) for _ in range(layers)]
    seen = SimpleNamespace(h=h, q=q, k=k)

    def dual_forward(model, batch, copied, realisation, recorder):
        seen.copied, seen.realisation = copied, realisation
        for layer in range(layers):
            recorder(layer, q[layer], k[layer], 0.25)
        return h.chunk(2)

    monkeypatch.setattr(crystal.methods.crystal, "dual_forward", dual_forward)
    return seen


def places(s, batch, b):
    """Where things stand in sequence b, by its tokens: thought, latents, image, <answer> and <|im_end|>."""
    end = int(batch["attention_mask"][b].sum()) - 1
    names = s.model.tokenizer.convert_ids_to_tokens(batch["input_ids"][b, : end + 1].tolist())
    latents = [t for t, name in enumerate(names) if name.startswith("<|latent_")]
    image = [t for t, name in enumerate(names) if name == "<|image_pad|>"]
    thought = list(range(names.index("<think>"), names.index("</think>") + 1))
    opened = len(names) - 1 - names[::-1].index("<answer>")
    return SimpleNamespace(
        thought=thought,
        latents=latents,
        image=image,
        opened=opened,
        end=end,
        ids=batch["input_ids"][b].tolist(),
    )


def cross_entropies(x, log_p, labels, copied, ce):
    """{"ce_int", "ce_cor"} or {"ce"} of one pair; log_p: {path: [L,V]}."""
    answer = range(x.opened, x.end)
    labelled = answer if labels == "answer" else range(x.thought[0] - 1, x.end)
    shared = x.latents if copied == "latents" else x.thought
    of_int = [-log_p["int"][t, x.ids[t + 1]] for t in labelled]
    if ce == "pooled":
        of_cor = [-log_p["cor"][t, x.ids[t + 1]] for t in labelled if t in answer]
        return {"ce": torch.stack(of_int + of_cor).mean()}
    of_cor = [-log_p["cor"][t, x.ids[t + 1]] for t in labelled if t not in shared]
    return {"ce_int": torch.stack(of_int).mean(), "ce_cor": torch.stack(of_cor).mean()}


def divergence(log_p, rows, kl_share, teacher_grad):
    """Eq. 4 of one pair: the mean of the largest share of its rows' KL."""
    teacher = log_p["int"] if teacher_grad else log_p["int"].detach()
    found = [(teacher[t].exp() * (teacher[t] - log_p["cor"][t])).sum() for t in rows]
    kept = max(1, math.floor(kl_share * len(rows) + 1e-9))
    return torch.stack(found).sort(descending=True).values[:kept].mean()


def attention_rows(q, k, rows):
    """Causal softmax weights of a path at a layer: [head][row] -> [t + 1]. Two heads share a key head."""
    return [[(0.25 * k[head // 2, : t + 1] @ q[head, t]).softmax(-1) for t in rows] for head in range(4)]


def attention_difference(A_int, A_cor, columns, attn_loss, attn_heads):
    """Eq. 5 of one pair at one layer, cell by cell."""
    cells = []
    for heads in [[0, 1, 2, 3]] if attn_heads == "mean" else [[0], [1], [2], [3]]:
        for i in range(len(A_int[0])):
            means = [torch.stack([A[head][i] for head in heads]).mean(0)[columns] for A in (A_int, A_cor)]
            cells.append(means)
    if attn_loss == "kl":
        shares = [(p / p.sum(), o / o.sum()) for p, o in cells]
        return torch.stack([(p * (p / o).log()).sum() for p, o in shares]).mean()
    squares = torch.stack([((p - o) ** 2).sum() for p, o in cells]).sum()
    return squares if attn_loss == "frobenius" else squares / (len(cells) * len(columns))


PAPER = dict(
    labels="all", copied="latents", ce="per_path", kl_share=1.0, answer_positions="predicting",
    attn_loss="kl", attn_heads="keep", attn_columns="latents", attn_layers=(2,), teacher_grad=False,
)


def eq_6(s, batch, seen, **choice):
    """Every term of CrystaL's objective and what is monitored: the mean over pairs of the functions above."""
    choice, found, B = SimpleNamespace(**PAPER | choice), defaultdict(list), len(batch["input_ids"])
    W = s.model.hf.lm_head.weight.detach()
    for b in range(B):
        x = places(s, batch, b)
        log_p = {"int": (seen.h[b] @ W.T).log_softmax(-1), "cor": (seen.h[b + B] @ W.T).log_softmax(-1)}
        rows = range(x.opened, x.end if choice.answer_positions == "predicting" else x.end + 1)
        columns = {"latents": x.latents, "thought": x.thought, "all": x.image + x.latents}[
            choice.attn_columns
        ]

        terms = cross_entropies(x, log_p, choice.labels, choice.copied, choice.ce)
        terms["kl"] = divergence(log_p, rows, choice.kl_share, choice.teacher_grad)
        of_layers, masses = [], {"mass_int": [], "mass_cor": []}
        for layer in choice.attn_layers:
            q, k = seen.q[layer], seen.k[layer]
            A_int = attention_rows(q[b] if choice.teacher_grad else q[b].detach(), k[b], rows)
            A_cor = attention_rows(q[b + B], k[b + B], rows)
            of_layers.append(attention_difference(A_int, A_cor, columns, choice.attn_loss, choice.attn_heads))
            for name, A in (("mass_int", A_int), ("mass_cor", A_cor)):
                masses[name] += [weights[x.latents].sum() for of_rows in A for weights in of_rows]
        terms["attn"] = torch.stack(of_layers).mean()
        for name, values in (terms | {name: torch.stack(m).mean() for name, m in masses.items()}).items():
            found[name].append(values)
    return {name: torch.stack(values).mean() for name, values in found.items()}


@holds(
    "labels", "copied", "ce", "kl_share", "answer_positions", "attn_loss", "attn_heads", "attn_columns",
    "attn_layers", "teacher_grad", of="crystal",
)
@pytest.mark.parametrize(
    "flags, choice",
    [
        ([], {}),
        (["--labels", "answer"], dict(labels="answer")),
        (["--copied", "thought"], dict(copied="thought")),
        (["--ce", "pooled"], dict(ce="pooled")),
        (["--ce", "pooled", "--labels", "answer"], dict(ce="pooled", labels="answer")),
        (["--kl_share", "0.4"], dict(kl_share=0.4)),
        (["--answer_positions", "span"], dict(answer_positions="span")),
        (["--attn_loss", "frobenius"], dict(attn_loss="frobenius")),
        (["--attn_loss", "mse"], dict(attn_loss="mse")),
        (["--attn_heads", "mean"], dict(attn_heads="mean")),
        (["--attn_columns", "thought"], dict(attn_columns="thought")),
        (["--attn_columns", "all"], dict(attn_columns="all")),
        (["--attn_layers", "0,-2"], dict(attn_layers=(0, 1))),
        (["--attn_layers", "all"], dict(attn_layers=(0, 1, 2))),
        (["--teacher_grad"], dict(teacher_grad=True)),
        (
            ["--method", "released"],
            dict(
                copied="thought", ce="pooled", kl_share=0.1, answer_positions="span", attn_heads="mean",
                attn_columns="thought",
            ),
        ),
    ],
    ids=lambda x: "_".join(x).replace("--", "") or "paper" if isinstance(x, list) else "",
)
def test_eq_6_is_the_mean_over_what_the_flags_name(built, monkeypatch, flags, choice):
    """Two pairs, answers of five tokens and one.

    Every term, and KL's and attention's gradient to either path.
    """
    s = built(*flags, dtype=torch.float64)
    batch = batch_of(s, [2, 0])
    seen = planted(s, batch, monkeypatch)
    terms, by_hand = s.objective(batch, s.settings.progress(0)), eq_6(s, batch, seen, **choice)
    assert terms.keys() == by_hand.keys()
    for name in terms:
        assert terms[name].item() == pytest.approx(by_hand[name].item(), rel=1e-9), name
    for name, leaves in (("kl", [seen.h]), ("attn", seen.q)):
        both = [
            torch.autograd.grad(found[name], leaves, allow_unused=True, retain_graph=True)
            for found in (terms, by_hand)
        ]
        for ours, theirs in zip(*both, strict=True):
            assert (
                (ours is None or not ours.any())
                if theirs is None
                else torch.allclose(ours, theirs, atol=1e-12)
            )
    for b in range(2):
        x = places(s, batch, b)
        shared = x.thought if choice.get("copied") == "thought" else x.latents
        assert seen.copied[b].nonzero()[:, 0].tolist() == shared


@holds("latent_copy", of="crystal")
def test_realisation_is_how_the_two_paths_run(built, monkeypatch):
    """hidden copies states before each of three layers, kv keys and values in each, packed runs one sequence
    a pair and copies nothing.
    """
    done = []
    share, run_model = crystal.latent_copy._share, crystal.backbone.model.Model.hidden
    monkeypatch.setattr(
        crystal.latent_copy, "_share", lambda x, mask: done.append((x.ndim, mask.ndim)) or share(x, mask)
    )
    monkeypatch.setattr(
        crystal.backbone.model.Model,
        "hidden",
        lambda self, inputs, *a, **k: (
            done.append(len(inputs["input_ids"])) or run_model(self, inputs, *a, **k)
        ),
    )
    for how, expected in (("hidden", [6] + [(3, 3)] * 3), ("kv", [6] + [(4, 4)] * 6), ("packed", [3])):
        s = built("--latent_copy", how)
        done.clear()
        s.objective(batch_of(s, [0, 1, 2]), s.settings.progress(0))
        assert done == expected


@holds("w_ce_int", "w_ce_cor", "w_kl", "w_attn", of="crystal")
def test_crystals_weights_belong_to_their_terms(built, run):
    """2, 3, 5 and 7 on the four terms; what is monitored counts nothing; the pooled CE has CE_int's weight.

    Also as the loop logs it.
    """
    weights = ["--w_ce_int", "2", "--w_ce_cor", "3", "--w_kl", "5", "--w_attn", "7"]
    s = built(*weights)
    terms = {"ce_int": 1.0, "ce_cor": 0.1, "kl": 0.01, "attn": 0.001, "mass_int": 900.0, "mass_cor": 800.0}
    assert train.weighted(terms, s.method, s.settings) == pytest.approx(2 + 0.3 + 0.05 + 0.007)
    assert train.weighted({"ce": 1.0, "kl": 0.1, "attn": 0.01}, s.method, s.settings) == pytest.approx(
        2 + 0.5 + 0.07
    )
    line = run("weights", *weights).lines[0]
    assert line["loss"] == pytest.approx(
        2 * line["ce_int"] + 3 * line["ce_cor"] + 5 * line["kl"] + 7 * line["attn"]
    )


# --- LIVR ---


@holds("place", of="livr")
def test_livrs_latents_stand_before_the_question_if_told(built):
    s = built("--method", "livr", "--place", "before")
    text = text_of(s, batch_of(s, [0]))
    assert text.endswith(
        "<|vision_end|><|latent_0|><|latent_1|><|latent_2|>Question 0?" + TURN + "red<|im_end|>"
    )


@holds("image_copies", of="livr")
def test_each_image_stands_as_often_as_told(built):
    """Twice: two grids, twice the tokens, and the same pixels again; the question once."""
    s, plain = (built("--method", "livr", "--image_copies", copies) for copies in ("2", "1"))
    twice, once = batch_of(s, [0]), batch_of(plain, [0])
    assert twice["image_grid_thw"].tolist() == [[1, 6, 8]] * 2 and once["image_grid_thw"].tolist() == [
        [1, 6, 8]
    ]
    assert torch.equal(twice["pixel_values"], once["pixel_values"].repeat(2, 1)) and twice["image"].shape == (
        1, 24,
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text_of(s, twice) == text_of(plain, once).replace(image, image * 2)


@holds("mask", "latents_see", "masked", of="livr")
@pytest.mark.parametrize("mask", ["prompt", "answer"])
@pytest.mark.parametrize("see", ["all", "image"])
def test_who_is_blind_in_livrs_first_stage(built, monkeypatch, mask, see):
    """Which (row, column) the model's forward blocks, cell by cell.

    None in the second stage, which begins where --masked ends.
    """
    s = built(
        "--method", "livr", "--mask", mask, "--latents_see", see, "--masked", "0.3", "--max_steps", "10"
    )
    batch = batch_of(s, [2, 0])
    names = [s.model.tokenizer.convert_ids_to_tokens(row.tolist()) for row in batch["input_ids"]]
    given, forward = [], type(s.model.hf.model.language_model).forward
    monkeypatch.setattr(
        type(s.model.hf.model.language_model),
        "forward",
        lambda self, *a, **k: given.append(k["attention_mask"]) or forward(self, *a, **k),
    )
    for step in (2, 3):
        s.objective(batch, s.settings.progress(step))
    blocked, none = given[0], given[1]
    assert none is None
    for b, row in enumerate(names):
        length = int(batch["attention_mask"][b].sum())
        image = [name in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>") for name in row]
        latent = [name.startswith("<|latent_") for name in row]
        # The newline after "assistant" predicts the answer's first token.
        answer = len(row) - row[::-1].index("<|im_start|>") + 1
        for t in range(length):
            for column in range(length):
                sees = column <= t
                if image[column] and t > image.index(True) and not image[t] and not latent[t]:
                    sees &= mask == "answer" and t < answer
                if see == "image" and latent[t] and not image[column] and not latent[column]:
                    sees = False
                assert (blocked[b, 0, t, column] == 0) == sees, (row[t], row[column])


# --- LaViT ---


@holds("gate", "gate_warmup", "gate_start", of="lavit")
@pytest.mark.parametrize(
    "flags, gammas",
    [
        # Eq. 5 with T_w = 0.5 of eight updates and epsilon 0.2: 0.2 + 0.8 (1 - cos(pi t / T_w)) / 2 at 0,
        # 1/4, 1/2, 3/4 of it; then open.
        (
            ["--gate_warmup", "0.5", "--gate_start", "0.2"],
            [0.2, 0.2 + 0.4 * (1 - 0.5**0.5), 0.6, 0.2 + 0.4 * (1 + 0.5**0.5), 1, 1, 1, 1],
        ),
        (["--gate", "hard", "--gate_warmup", "0.25"], [0, 0, 1, 1, 1, 1, 1, 1]),
        (["--gate", "open"], [1] * 8),
    ],
)
def test_the_gate_opens_as_told(built, monkeypatch, flags, gammas):
    """What is added to the answer positions' scores of the image in the model's forward.

    Ln gamma, and no mask at all where it is open.
    """
    s = built("--method", "lavit", *flags, "--max_steps", "8", "--w_gaze", "0", "--w_semantics", "0")
    batch, given, forward = batch_of(s, [2, 0]), [], type(s.model.hf.model.language_model).forward
    monkeypatch.setattr(
        type(s.model.hf.model.language_model),
        "forward",
        lambda self, *a, **k: given.append(k["attention_mask"]) or forward(self, *a, **k),
    )
    for step, gamma in enumerate(gammas):
        s.objective(batch, s.settings.progress(step))
        if gamma == 1:
            assert given[-1] is None
            continue
        for b in range(2):
            names = s.model.tokenizer.convert_ids_to_tokens(batch["input_ids"][b].tolist())
            end = int(batch["attention_mask"][b].sum()) - 1
            image = [t for t, name in enumerate(names) if name == "<|image_pad|>"]
            rows = list(range(names.index("<answer>"), end))
            mask, other = given[-1][b, 0], given[-1][b, 0].clone()
            assert torch.allclose(
                mask[rows][:, image], torch.tensor(math.log(gamma) if gamma else -math.inf), atol=1e-6
            )
            other[rows[0] : end, image[0] : image[-1] + 1] = 0  # nothing else is changed: causality alone
            real = int(batch["attention_mask"][b].sum())
            assert torch.equal(other[:real, :real] == 0, torch.ones(real, real, dtype=torch.bool).tril())


@holds("w_semantics", "w_gaze", of="lavit")
def test_lavits_weights_belong_to_their_terms(built, run):
    weights = ["--method", "lavit", "--w_semantics", "3", "--w_gaze", "5"]
    s = built(*weights)
    terms = {"ce": 1.0, "semantics": 0.1, "gaze": 0.01, "mass": 900.0}
    assert train.weighted(terms, s.method, s.settings) == pytest.approx(1.35)
    line = run("weights", *weights).lines[0]
    assert (
        line["loss"] == pytest.approx(line["ce"] + 3 * line["semantics"] + 5 * line["gaze"])
        and 0 < line["mass"] < 1
    )
    # A weight of 0 leaves the term out, and the record's part and the head with it.
    s = built("--method", "lavit", "--w_semantics", "0")
    batch = batch_of(s, [0])
    assert "v_sem" not in batch and "gaze" in batch and not len(s.objective.heads)
    assert set(s.objective(batch, s.settings.progress(0))) == {"ce", "gaze", "mass"}
    s = built("--method", "lavit", "--w_gaze", "0")
    batch = batch_of(s, [0])
    assert (
        "gaze" not in batch
        and "gaze_grid" not in batch
        and set(s.objective(batch, s.settings.progress(0))) == {"ce", "semantics", "mass"}
    )


@holds("gaze_top", of="lavit")
def test_the_largest_of_the_teachers_gaze_are_kept(built, twelve):
    """Record 0's grid is the teacher's own, 3 x 4.

    Its five largest numbers, divided by their sum, and nothing else.
    """
    s = built("--method", "lavit", "--gaze_top", "5")
    batch = batch_of(s, [0])
    seen = load_file(twelve.parent / "teacher.safetensors")["0/gaze"].tolist()
    largest = sorted(seen)[-5:]
    expected = [x / sum(largest) if x in largest else 0.0 for x in seen]
    assert s.method.targets(s.model, batch)[0].tolist() == pytest.approx(expected)


@holds("semantics_dim", of="lavit")
def test_semantics_dim_is_the_teachers_size(built):
    s = built("--method", "lavit", "--semantics_dim", "20")
    assert [
        tuple(layer.weight.shape) for layer in s.objective.heads["semantics"] if hasattr(layer, "weight")
    ] == [(32, 32), (20, 32)]
    told = batch_of(s, [0])["error"]
    assert told.endswith("the teacher's V_sem has 32 numbers: --semantics_dim 32 is needed")


# --- VaLR ---


@holds("encoders", of="valr")
def test_encoders_are_those_that_are_named(built):
    """tiny: 8 x 8 patches of 96 numbers; own: the model's image tokens, of 32; none.

    No projection at all, and cross-entropy alone.
    """
    s = built("--method", "valr", "--encoders", "tiny,own")
    assert [p[-1].out_features for p in s.objective.heads.values()] == [96, 32]
    batch = batch_of(s, [0, 1])
    assert (
        batch["pixels_0"].shape == (2, 1, 3, 112, 112)
        and batch["count_0"].tolist() == [[1], [1]]
        and "pixels_1" not in batch
    )
    assert [tuple(f.shape) for f in s.method.features(0, batch, None)] == [(64, 96)] * 2
    assert {"ce", "repa"} == s.objective(batch, s.settings.progress(4000)).keys()
    s = built("--method", "valr", "--encoders", "none")
    batch = batch_of(s, [0, 1])
    assert (
        not len(s.objective.heads)
        and "pixels_0" not in batch
        and s.objective(batch, s.settings.progress(4000)).keys() == {"ce"}
    )
    assert [
        p[-1].out_features
        for p in built("--method", "valr", "--encoders", "features:dino:12").objective.heads.values()
    ] == [12]


@holds("align_layer", "updates", of="valr")
@pytest.mark.parametrize(
    "flags, layer, updates",
    [([], 1, None), (["--align_layer", "3"], 3, None), (["--align_layer", "2", "--updates", "4"], 2, 4)],
)
def test_latents_are_aligned_after_the_layer_that_is_named(built, monkeypatch, flags, layer, updates):
    """12 of 28 is layer 1 of 3 (12 / 28 * 3 = 1.29). Two segments of three latents.

    Seven pieces, or the start and 1 + T whole runs.
    """
    s = built("--method", "valr", "--encoders", "own", *flags)
    asked, runs, forward, once = [], [], feedback.forward, feedback.Stream.run
    monkeypatch.setattr(feedback, "forward", lambda *a: asked.append(a[3:]) or forward(*a))
    monkeypatch.setattr(feedback.Stream, "run", lambda self, *a, **k: runs.append(1) or once(self, *a, **k))
    s.objective(batch_of(s, [0, 1]), s.settings.progress(4000))
    assert asked == [(updates, (layer,))] and len(runs) == (7 if updates is None else 1 + 1 + updates)


def test_a_layer_to_align_that_is_not_there_is_told(built):
    with pytest.raises(UserError, match="--align_layer 4: the model has 3 layers"):
        built("--method", "valr", "--encoders", "own", "--align_layer", "4")


@holds("w_repa", "first_share", "lr_latents", of="valr")
def test_valrs_weights_and_stages_as_the_loop_logs_them(run):
    """Half of four updates without latents at lr, half with them at lr_latents.

    The alignment counts four times.
    """
    seen = run(
        "stages", "--method", "valr", "--encoders", "own", "--w_repa", "4", "--first_share", "0.5",
        "--lr", "0.01", "--lr_latents", "0.03", "--warmup", "0", "--decay", "linear", "--max_steps", "4",
    )
    assert ["repa" in x for x in seen.lines] == [False, False, True, True]
    assert [x["loss"] for x in seen.lines] == pytest.approx(
        [x["ce"] + 4 * x.get("repa", 0.0) for x in seen.lines]
    )
    assert [x["lr"] for x in seen.lines] == pytest.approx([0.01, 0.005, 0.03, 0.015])
    assert [batch["latents"].shape[1] for batch, _, _ in seen.batches] == [0, 0, 6, 6]
    projection = {n: g for n, (_, g, _) in seen.updates[0].items() if n.startswith("heads.")}
    assert projection and not any(g.any() for g in projection.values())
