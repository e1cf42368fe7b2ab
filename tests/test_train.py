"""The command: schedule, logs, trainable tokens, what is saved when, resume,
overwriting, broken records, signals.

The updates themselves are compared with a plain loop in test_loop.py. Right values here are counted or
written out by hand: a validation that returns what the test says, a method whose loss is known, a checkpoint
made by hand, a rank that is pretended.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from crystal import evaluate, methods, run_directory, train
from crystal.runtime import checkpoint, config, data
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes


@pytest.fixture
def flags(model_dirs, records_file, tmp_path):
    def make(name, *more, tied=True):
        return [
            "--model", str(model_dirs[tied]), "--data", str(records_file), "--output", str(tmp_path / name),
            "--latents", "3", "--lora_r", "2", "--lr", "1e-2", "--batch_size", "2", "--log_every", "100",
            "--eval_every", "0", *more,
        ]

    return make


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, step):
    return load_file(checkpoint.step_dir(run, step) / "trainable.safetensors")


def test_learning_rate():
    s = config.parse(["--max_steps", "100", "--lr", "1", "--warmup", "0.1"])
    rates = [train.learning_rate(i, s) for i in range(100)]
    assert (
        rates[0] == 0.1
        and rates[9] == 1.0
        and rates[10] == 1.0
        and rates[55] == pytest.approx(0.5)
        and 0 < rates[99] < 1e-3
    )
    assert train.learning_rate(0, config.parse(["--warmup", "0", "--lr", "1"])) == 1.0
    s = config.parse(["--max_steps", "100", "--lr", "1", "--warmup", "0.1", "--decay", "linear"])
    assert [train.learning_rate(i, s) for i in (9, 10, 55, 99)] == pytest.approx([1, 1, 0.5, 1 / 90])


@dataclass(frozen=True)
class Staged(config.Settings):
    @property
    def stages(self):
        return [config.Stage("first", 0.3, self.lr), config.Stage("second", 0.7, self.lr / 2)]


def test_each_stage_has_a_warm_up_and_a_decay_of_its_own():
    s = Staged(max_steps=100, lr=1.0, warmup=0.1)
    assert s.span(0) == (0, 30) and s.span(1) == (30, 100)
    rates = [train.learning_rate(i, s) for i in range(100)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1]) and rates[29] < 0.01
    assert rates[30:38] == pytest.approx([i / 14 for i in range(1, 8)] + [0.5]) and rates[99] < 0.001
    assert s.progress(29) == config.Progress(29, 0, 29 / 30, 0.29) and s.progress(30) == config.Progress(
        30, 1, 0, 0.3
    )
    assert s.progress(100) == config.Progress(100, 1, 1, 1)  # what validation sees
    short = Staged(max_steps=1)  # a stage may be empty; no update falls between two
    assert (short.span(0), short.span(1)) == ((0, 0), (0, 1)) and short.progress(0).stage == 1


@pytest.mark.parametrize("method", ["sft", "crystal"])
def test_run_directory(flags, method, records_file, capsys):
    run = train.main(
        flags(
            method, "--method", method, "--max_steps", "3", "--val_data", str(records_file),
            "--eval_every", "2", "--save_every", "2",
        )
    )
    lines = metrics(run)
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3] and [
        x["step"] for x in lines if "val_loss" in x
    ] == [2, 3]
    terms = ("ce",) if method == "sft" else ("ce_int", "ce_cor", "kl", "attn", "mass_int", "mass_cor")
    for name in (*terms, "loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_gb"):
        assert name in lines[0], name
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][n] for n in terms if "mass" not in n))
    if method == "crystal":
        assert 0 < lines[0]["mass_int"] < 1 and lines[0]["mass_int"] != lines[0]["mass_cor"]
    saved = json.loads((run / "config.json").read_text())
    assert (
        saved["method"] == method
        and saved["dtype"] == "float32"
        and saved["versions"]["torch"] == torch.__version__
    )
    best = checkpoint.best(run)
    values = {x["step"]: x["val_ce" if method == "sft" else "val_ce_int"] for x in lines if "val_loss" in x}
    assert best["step"] == min(values, key=values.get) and checkpoint.step_dir(run, best["step"]).is_dir()
    out = capsys.readouterr().out
    assert "trainable" in out and "3 records" in out


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_no_other_vocabulary_row_moves(flags, tune, tied, model_dirs):
    """After updates with weight decay every row but the new tokens' is identical to the bit, and all
    of those have moved.
    """
    run = train.main(flags("rows", "--max_steps", "3", "--weight_decay", "0.5", "--tune", tune, tied=tied))
    from crystal import opening

    model, fmt, _ = opening.open_model(run, "last")
    base = load_file(model_dirs[tied] / "model.safetensors")
    new = model.new_tokens.ids if hasattr(model.new_tokens, "ids") else None
    ids = sorted({fmt.think_start_id, fmt.think_end_id, fmt.answer_start_id, fmt.answer_end_id, *fmt.latents})
    if new is not None:
        assert sorted(int(i) for i in new) == ids
    heads = [model.hf.get_input_embeddings().weight] + ([] if tied else [model.hf.lm_head.weight])
    for name, weight in zip(("model.language_model.embed_tokens.weight", "lm_head.weight"), heads):
        other = torch.ones(len(weight), dtype=torch.bool)
        other[ids] = False
        assert torch.equal(weight[other], base[name][other])
    before = train.main(flags("start", "--max_steps", "1", "--lr", "1e-30", "--tune", tune, tied=tied))
    a, b = weights(before, 1), weights(run, 3)
    moved = [n for n in a if ".new_tokens." in n]
    assert moved and all((a[n] != b[n]).any(1).all() for n in moved)


def test_resume_equals_not_having_stopped(flags, tmp_path):
    """Mid-epoch, with accumulation and dropout: the same next losses and weights as the unbroken run."""
    more = (
        "--max_steps", "5", "--accumulation", "2", "--batch_size", "1", "--save_every", "3",
        "--lora_dropout", "0.1", "--keep", "9",
    )
    whole = train.main(flags("whole", *more))
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(checkpoint.step_dir(broken, 5))
    # Killed after a step that the checkpoint does not know, in the middle of a line.
    (broken / "metrics.jsonl").write_text(
        "".join((whole / "metrics.jsonl").read_text().splitlines(True)[:4]) + '{"step": 5, "lo'
    )
    train.main(flags("broken", *more, "--resume"))
    a, b = metrics(whole), metrics(broken)
    assert [x["step"] for x in b] == [1, 2, 3, 4, 5]
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == y["loss"] and x["grad_norm"] == y["grad_norm"] and x["lr"] == y["lr"]
    assert all(torch.equal(t, weights(broken, 5)[n]) for n, t in weights(whole, 5).items())


def test_resume_passes_over_a_broken_checkpoint_and_refuses_other_settings(flags, capsys):
    run = train.main(flags("r", "--max_steps", "2", "--save_every", "1"))
    raw = bytearray((checkpoint.step_dir(run, 2) / "trainable.safetensors").read_bytes())
    raw[-1] ^= 1
    (checkpoint.step_dir(run, 2) / "trainable.safetensors").write_bytes(raw)
    train.main(flags("r", "--max_steps", "2", "--save_every", "1", "--resume"))
    assert "step-2 is broken and not used" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with --lora_r 2, not 4"):
        train.main(flags("r", "--max_steps", "2", "--resume", "--lora_r", "4"))
    with pytest.raises(UserError, match="nothing to resume"):
        train.main(flags("none", "--resume"))


def test_more_updates_go_on_along_the_longer_schedule(flags, capsys):
    """A line from the peak to 0: over two updates 1 and 1/2 of it, over four 1, 3/4, 1/2 and 1/4.

    Where the rate is next to nothing the weights stay, and the losses tell which records were seen.
    """
    more = ["--save_every", "1", "--decay", "linear", "--warmup", "0", "--lr", "1e-30"]
    whole = train.main(flags("whole", *more, "--max_steps", "4"))
    train.main(flags("longer", *more, "--max_steps", "2"))
    capsys.readouterr()
    longer = train.main(flags("longer", *more, "--max_steps", "4", "--resume"))
    assert "--max_steps was 2 and is 4: after update 2" in capsys.readouterr().out

    lines = metrics(longer)
    assert [x["step"] for x in lines] == [1, 2, 3, 4]
    assert [x["lr"] / 1e-30 for x in lines] == pytest.approx([1, 0.5, 0.5, 0.25])
    assert [x["loss"] for x in lines] == [x["loss"] for x in metrics(whole)]
    moments = load_file(checkpoint.step_dir(longer, 4) / "optimizer.safetensors")
    assert {float(t) for n, t in moments.items() if n.endswith(".step")} == {4}
    with pytest.raises(UserError, match="was made with --max_steps 4, not 3; a resume keeps it$"):
        train.main(flags("longer", *more, "--max_steps", "3", "--resume"))


@pytest.fixture
def started(flags):
    return train.main(flags("kept", "--max_steps", "2", "--save_every", "1"))


def test_a_resume_keeps_every_setting_but_those_of_the_machine_and_the_log(flags, started, records_file):
    other = records_file.parent / "others.jsonl"
    other.write_text(records_file.read_text())
    same = flags("kept", "--max_steps", "2", "--save_every", "1", "--resume")
    for name, value, told in (
        ("data", str(other), f"'{records_file}', not '{other}'"),
        ("lora_alpha", "64", "32.0, not 64.0"),
        ("dtype", "float64", "'float32', not 'float64'"),
        ("max_pixels", "12000", "None, not 12000"),
        ("kl_share", "0.5", "1.0, not 0.5"),
    ):
        with pytest.raises(
            UserError, match=re.escape(f"step-2: was made with --{name} {told}; a resume keeps it")
        ):
            train.main([*same, f"--{name}", value])
    shutil.rmtree(checkpoint.step_dir(started, 2))
    train.main(
        [
            *same, "--batch_size", "1", "--accumulation", "2", "--workers", "1", "--checkpointing",
            "--keep", "5", "--eval_every", "1", "--on_bad_record", "skip",
        ]
    )
    assert [x["step"] for x in metrics(started)] == [1, 2]
    kept = {f.name for f in fields(config.Settings)} - checkpoint.MAY_CHANGE
    assert kept > {
        "val_data", "image_root", "turns", "lora_dropout", "weight_decay", "warmup", "clip", "min_pixels",
    } and len(kept) + len(checkpoint.MAY_CHANGE) == len(fields(config.Settings))


def test_accumulation_equals_a_larger_batch(flags):
    a = train.main(flags("a", "--max_steps", "2", "--batch_size", "4", "--dtype", "float64"))
    b = train.main(
        flags("b", "--max_steps", "2", "--batch_size", "2", "--accumulation", "2", "--dtype", "float64")
    )
    assert len(metrics(a)) == 2
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert all(
            x[n] == pytest.approx(y[n], rel=1e-6)
            for n in ("loss", "ce_int", "ce_cor", "kl", "attn", "grad_norm")
        )
    assert all(torch.allclose(t, weights(b, 2)[n], rtol=0, atol=1e-6) for n, t in weights(a, 2).items())


DRAWS = """import torch
from crystal.corrupt import Corruption
from crystal.methods import sft

class Method(sft.Method):
    corruption = Corruption()
    monitored = ("record", "corrupted", "drawn")
    Settings = __import__("crystal.methods.crystal", fromlist=["Settings"]).Settings
    tokens = ["<|new|>"]

    def losses(self, model, batch, progress):
        seen = {"record": batch["input_ids"].double().sum(), "drawn": torch.rand((), dtype=torch.float64),
                "corrupted": batch["pixel_values_cor"].double().sum()}
        return super().losses(model, batch, progress) | seen
"""


def test_seed_fixes_a_run_and_each_thing_that_is_drawn_follows_it(flags, records_file, tmp_path):
    """Order, corruption, dropout's stream, first adapters, first rows: each alone is the same for a seed,
    and another for another."""
    (tmp_path / "draws.py").write_text(DRAWS)
    one = records_file.parent / "one.jsonl"
    one.write_text(records_file.read_text().splitlines()[0] + "\n")
    found = []
    for i, seed in enumerate((1, 1, 2)):
        steps = f"--seed {seed} --max_steps 6 --batch_size 1 --lr 1e-30"
        more = ["--method", str(tmp_path / "draws.py"), *steps.split()]
        order = metrics(train.main(flags(f"order{i}", *more)))
        alone = train.main(flags(f"alone{i}", *more, "--data", str(one)))  # with one record there is no order
        first = weights(alone, 6)
        lines = metrics(alone)
        for name in ("corrupted", "drawn"):  # every update draws anew
            assert len({x[name] for x in lines}) == 6
        found.append(
            {
                "order": [x["record"] for x in order],
                "corruption": [x["corrupted"] for x in lines],
                "dropout": [x["drawn"] for x in lines],
                "tokens": first["model.new_tokens.embedding"].tolist(),
                "adapters": [w.tolist() for n, w in first.items() if "lora_A" in n],
            }
        )
    a, b, c = found
    for source in a:
        assert a[source] == b[source] != c[source], source
    assert not set(a["dropout"]) & set(c["dropout"]) and not set(a["corruption"]) & set(c["corruption"])


def test_a_non_finite_loss_stops_before_the_update(flags, monkeypatch):
    from crystal.methods import crystal as method

    losses, calls = method.Method.losses, []

    def broken(self, model, batch, progress):
        calls.append(1)
        terms = losses(self, model, batch, progress)
        return {**terms, "kl": terms["kl"] * (float("nan") if len(calls) == 3 else 1.0)}

    monkeypatch.setattr(method.Method, "losses", broken)
    with pytest.raises(
        UserError,
        match=r"update 2: loss nan .* stopped before the update, the last good checkpoint is .*step-2; "
        r"its records: \S+train\.jsonl:\d, \S+train\.jsonl:\d$",
    ):
        train.main(flags("nan", "--max_steps", "5", "--save_every", "1"))


def test_broken_records(flags, records_file, tmp_path):
    lines = records_file.read_text().splitlines()
    for n in range(3):
        for size in ("", "_1"):
            if (source := records_file.parent / f"{n}{size}.png").exists():
                shutil.copy(source, tmp_path)
    for source in records_file.parent.glob("*.png"):
        shutil.copy(source, tmp_path)
    (tmp_path / "bad.jsonl").write_text("\n".join(lines * 40 + ["{oops"]))
    more = ["--data", str(tmp_path / "bad.jsonl"), "--max_steps", "1"]
    with pytest.raises(UserError, match=r"bad.jsonl:121: not JSON.*--on_bad_record skip"):
        train.main(flags("stop", *more))
    run = train.main(flags("skip", *more, "--on_bad_record", "skip"))
    assert "bad.jsonl:121" in (run / "bad_records.jsonl").read_text()
    (tmp_path / "bad.jsonl").write_text("\n".join(lines * 10 + ["{oops"]))
    with pytest.raises(UserError, match="1 of 31 records are broken, more than 1 %"):
        train.main(flags("many", *more, "--on_bad_record", "skip"))


class LabelSum(torch.nn.Module):
    def forward(self, batch, progress):
        return {"ce": batch["targets"].clamp(min=0).sum(1).double().mean()}


def test_a_broken_validation_image_is_told_and_no_record_counts_twice(setup, records_file, tmp_path):
    s = setup(
        "--method", "sft", "--on_bad_record", "skip", "--batch_size", "32", "--output", str(tmp_path / "run")
    )
    (tmp_path / "cut.png").write_bytes((records_file.parent / "0_0.png").read_bytes()[:300])
    good = [s.records[0]] * 49 + [replace(s.records[0], answer="blue")] * 50
    cut = replace(s.records[0], images=[tmp_path / "cut.png"], where="val.jsonl:1")
    listed = lambda: (tmp_path / "run" / "bad_records.jsonl").read_text().count("val.jsonl:1: field 'image'")

    def validated(records):
        s.examples.records = records
        return train.validate(
            LabelSum(), s.examples, s.settings, s.method, s.model.tokenizer.pad_token_id, Processes(),
            torch.float64,
        )

    records, whole = [cut, *good], validated(list(good))
    for _ in range(2):  # every validation leaves it out, the first one lists it
        assert validated(records) == pytest.approx(whole, rel=1e-9) and listed() == 1
    with pytest.raises(
        UserError,
        match="2 of 101 validation records are broken, more than 1 %; they are listed in "
        ".*run/bad_records.jsonl",
    ):
        validated([cut, *good, cut])
    assert listed() == 3


def test_validation_images_are_under_on_bad_record_too(flags, records_file, tmp_path):
    shutil.copytree(records_file.parent, tmp_path / "val")
    (tmp_path / "val" / "0_0.png").write_text("not an image")
    more = ("--max_steps", "1", "--val_data", str(tmp_path / "val" / "train.jsonl"), "--eval_every", "1")
    with pytest.raises(
        UserError, match="val/train.jsonl:1: field 'image': .*; --on_bad_record skip leaves it out"
    ):
        train.main(flags("stop", *more))
    with pytest.raises(UserError, match="1 of 3 validation records are broken"):
        train.main(flags("skip", *more, "--on_bad_record", "skip"))


def test_a_signal_ends_the_run_with_a_checkpoint(flags, monkeypatch, capsys):
    import os
    import signal

    from crystal.methods import crystal as method

    losses, calls = method.Method.losses, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, *args)

    monkeypatch.setattr(method.Method, "losses", interrupted)
    run = train.main(flags("term", "--max_steps", "50"))
    assert (
        len(calls) == 2
        and checkpoint.newest(run).name == "step-2"
        and "stopped by SIGTERM after update 2" in capsys.readouterr().out
    )


def timeless(run):
    """Lines of a log without what no two runs have alike."""
    clock = ("tokens_per_s", "peak_memory_gb")
    return [{name: x for name, x in line.items() if name not in clock} for line in metrics(run)]


def validating(records_file, steps, *more):
    return (
        "--max_steps", str(steps), "--val_data", str(records_file), "--eval_every", "2", "--save_every", "2",
        "--keep", "9", *more,
    )  # fmt: skip


def test_a_stop_saves_and_what_was_due_is_made_up_for(flags, records_file, monkeypatch):
    """Stopped in update 2, after which a validation is due: saved without it. Going on makes up for it first:
    log, best and weights are then those of a run that went through.
    """
    import os
    import signal

    from crystal.methods import crystal as method

    whole = train.main(flags("whole", *validating(records_file, 4)))
    losses, calls = method.Method.losses, []

    def interrupted(self, *args):
        calls.append(torch.is_grad_enabled())
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(method.Method, "losses", interrupted)
        run = train.main(flags("part", *validating(records_file, 4)))
    assert calls == [True, True] and [line["step"] for line in metrics(run)] == [1, 2]
    assert checkpoint.newest(run).name == "step-2" and checkpoint.best(run) is None

    train.main(flags("part", *validating(records_file, 4), "--resume"))
    assert timeless(run) == timeless(whole) and [line["step"] for line in metrics(run)] == [1, 2, 2, 3, 4, 4]
    assert checkpoint.best(run) == checkpoint.best(whole)
    assert all(torch.equal(value, weights(run, 4)[name]) for name, value in weights(whole, 4).items())


def test_a_signal_within_a_validation_leaves_it(flags, records_file, monkeypatch, capsys):
    """At its first batch of two: the second is not computed, nothing is logged of it, and the run ends with
    128 + 15. The last validation is the one: going on makes it, and no update.
    """
    import os
    import signal

    from crystal.methods import crystal as method
    from crystal.runtime.distributed import StopSignal

    losses, seen = method.Method.losses, []

    def interrupted(self, *args):
        if not torch.is_grad_enabled():
            seen.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(method.Method, "losses", interrupted)
        run = train.main(flags("part", *validating(records_file, 2)))
    assert len(seen) == 1 and [line["step"] for line in metrics(run)] == [1, 2]
    assert StopSignal.code == 143 and "stopped by SIGTERM after update 2" in capsys.readouterr().out
    assert checkpoint.newest(run).name == "step-2"

    train.main(flags("part", *validating(records_file, 2), "--resume"))
    assert StopSignal.code == 0
    validations = [(line["step"], "val_loss" in line) for line in metrics(run)]
    assert validations == [(1, False), (2, False), (2, True)]
    assert checkpoint.best(run)["step"] == 2


def test_the_same_command_again_goes_on(flags, capsys, monkeypatch):
    """--resume auto: from the beginning where nothing is, from the newest checkpoint where one is."""
    run = train.main(flags("auto", "--max_steps", "2", "--save_every", "1", "--resume", "auto"))
    assert [line["step"] for line in metrics(run)] == [1, 2] and "resumed" not in capsys.readouterr().out
    shutil.rmtree(checkpoint.step_dir(run, 2))
    train.main(flags("auto", "--max_steps", "2", "--save_every", "1", "--resume", "auto"))
    assert "step-1 at update 1" in capsys.readouterr().out
    assert [line["step"] for line in metrics(run)] == [1, 2]

    # Killed before anything was saved: there is nothing to lose.
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "validate", crash)
        train.main(flags("killed", "--max_steps", "2", "--eval_every", "1", "--val_data", str(flags("x")[3])))
    killed = run.parent / "killed"
    assert [line["step"] for line in metrics(killed)] == [1] and not (killed / "checkpoints").exists()
    train.main(flags("killed", "--max_steps", "2"))
    assert [line["step"] for line in metrics(killed)] == [1, 2]

    # Its saves failed: there is a log to lose, and a restart that nobody watches begins anew.
    shutil.rmtree(killed / "checkpoints")
    with pytest.raises(UserError, match="holds a run already"):
        train.main(flags("killed", "--max_steps", "1"))
    train.main(flags("killed", "--max_steps", "1", "--resume", "auto"))
    assert [line["step"] for line in metrics(killed)] == [1]

    with pytest.raises(UserError, match="invalid choice: 'maybe'"):
        train.main(flags("auto", "--resume", "maybe"))


GAINS = """from dataclasses import dataclass
from crystal.methods import crystal


@dataclass(frozen=True)
class Settings(crystal.Settings):
    @property
    def weights(self):
        return super().weights | {"gain": 1.0}


class Method(crystal.Method):
    Settings = Settings

    def losses(self, *args):
        terms = super().losses(*args)
        return terms | {"gain": terms["ce_int"]}
"""


def test_a_term_may_not_take_the_name_of_what_latents_carry(flags, records_file, tmp_path):
    (tmp_path / "gains.py").write_text(GAINS)
    more = ("--method", str(tmp_path / "gains.py"))
    with pytest.raises(UserError, match="have a term 'gain', which is what the nats"):
        train.main(flags("gains", *validating(records_file, 2), *more))


MINE = """from crystal.corrupt import Mode
from crystal.methods import crystal


def black(x, strength, generator):
    return x * (1 - strength)


class Settings(crystal.Settings):
    corruptions = crystal.Settings.corruptions | {"black": Mode(black, 0.5, 1.0, 1.0)}

    @property
    def weights(self):
        return super().weights | {"mine": 0.5}


class Method(crystal.Method):
    Settings = Settings

    def losses(self, model, batch, progress):
        return super().losses(model, batch, progress) | {"mine": model.new_tokens.embedding.square().mean()}
"""


def test_tuning_a_file_of_ones_own(flags, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    run = train.main(flags("mine", "--method", str(tmp_path / "mine.py"), "--max_steps", "1"))
    line = metrics(run)[0]
    assert line["loss"] == pytest.approx(
        sum(line[n] for n in ("ce_int", "ce_cor", "kl", "attn")) + 0.5 * line["mine"]
    )
    with pytest.raises(UserError, match="known are crystal, .*sft"):
        train.main(flags("x", "--method", "nothing"))


def test_a_corruption_of_ones_own_is_trained_and_evaluated(flags, records_file, tmp_path):
    """Black pictures in the corrupted path; the same name asks the run with black ones, and the built-in
    ones chain with it.
    """
    (tmp_path / "mine.py").write_text(MINE)
    own = ("--method", str(tmp_path / "mine.py"))
    run = train.main(flags("mine", *own, "--max_steps", "1", "--corruption", "black=1"))
    settings = methods.parse([*own, "--corruption", "black=1"])
    picture = torch.full((3, 4, 4), 0.5)
    assert methods.get(own[1])(settings).corruption(picture).eq(0).all()
    with pytest.raises(UserError, match="--corruption 'black' is no corruption mode"):
        methods.parse(["--corruption", "black=1"])
    ask = ["--model", str(run), "--data", str(records_file), "--device", "cpu", *own, "--max_new_tokens", "1"]
    for text in ("black=1", "blur=3,black=0.5"):
        evaluate.main([*ask, "--corruption", text, "--out", str(tmp_path / f"{text}.jsonl")])
    with pytest.raises(UserError, match="--corruption black=2: black goes from 0 to 1"):
        evaluate.main([*ask, "--corruption", "black=2"])


STAGED = """from dataclasses import dataclass
from crystal.runtime import config
from crystal.runtime.config import Stage, setting
from crystal.methods import sft

@dataclass(frozen=True)
class Settings(config.Settings):
    second: str = setting("", "records of the second stage")

    @property
    def stages(self):
        return [Stage("first", 0.5, self.lr), Stage("second", 0.5, self.lr / 2, self.second)]

class Method(sft.Method):
    Settings = Settings
    seen = []

    def layout(self, fmt, record, image_tokens, stage=-1):
        self.seen.append((stage, record.where.rpartition("/")[2].partition(":")[0]))
        return super().layout(fmt, record, image_tokens)

    def losses(self, model, batch, progress):
        self.seen.append((progress.step, progress.stage, progress.of_stage))
        return super().losses(model, batch, progress)
"""


def test_a_stage_has_its_own_data_and_layout(flags, records_file, tmp_path):
    from crystal import methods

    (tmp_path / "staged.py").write_text(STAGED)
    other = records_file.parent / "other.jsonl"
    other.write_text(records_file.read_text())
    more = [
        "--method", str(tmp_path / "staged.py"), "--second", str(other), "--max_steps", "4",
        "--batch_size", "1", "--val_data", str(records_file), "--eval_every", "2",
    ]
    train.main(flags("staged", *more))
    seen = methods.get(str(tmp_path / "staged.py")).seen
    steps = [x for x in seen if len(x) == 3 and x[0] < 4]
    assert steps == [(0, 0, 0.0), (1, 0, 0.5), (2, 1, 0.0), (3, 1, 0.5)]
    layouts = [x for x in seen if len(x) == 2]
    assert (
        layouts[:2] == [(0, "train.jsonl")] * 2
        and layouts.count((1, "other.jsonl")) == 2
        and layouts.count((1, "train.jsonl")) == 6
        and len(layouts) == 10
    )
    assert seen.count((4, 1, 1.0)) == 6
    with pytest.raises(UserError, match="nowhere.jsonl: cannot be read"):
        train.main(flags("x", *more, "--second", "nowhere.jsonl"))


# --- --overwrite, and what fails before anything is written ---


def contents(run):
    """{file: bytes} of a run, but for the lock that an error leaves behind, which holds nothing any more."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(run): path.read_bytes() for path in files}


LATE = [  # flags, what is told; each fails later than the settings are read, some in the first update alone
    (["--tensorboard"], "--tensorboard: needs the extra"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    (["--val_data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    (["--image_root", "nowhere"], "nowhere: no such folder"),
    (["--corruption", "blur=1:9999"], "--corruption blur=1:9999: blur goes from 0 to 256"),
    (["--attn_layers", "7"], "--attn_layers 7: the model has 3 layers"),
    (["--method", "valr", "--align_layer", "9"], "--align_layer 9: the model has 3 layers"),
    (["--method", "valr", "--encoders", "./nowhere"], "nowhere"),
    (["--model", "./nowhere"], "nowhere: no such directory"),
    (["--max_pixels", "0"], "--max_pixels 0: areas in pixels"),
    (["--method", "sft", "--tune", "tokens"], "nothing is left to train"),
    (["--device", "cuda:7"], "--device cuda:7"),
    (["--data", "NOT_JSON"], "--on_bad_record skip leaves them out"),
    (["--data", "NOT_JSON", "--on_bad_record", "skip"], "1 of 4 records are broken"),
    (["--data", "NO_PICTURE"], "field 'image'"),
    (["--data", "NO_PICTURE", "--on_bad_record", "skip"], "field 'image'"),
    (["--method", "lavit"], "no 'lavit' in it"),
    (["--method", "NAN"], "update 0: loss nan .* the last good checkpoint is none"),
    (["--data", "INSIDE"], "--overwrite would delete --data .*inside.jsonl, which lies in .*kept"),
    (["--val_data", "INSIDE"], "--overwrite would delete --val_data"),
]


@pytest.fixture
def spoilt(started, records_file, tmp_path):
    """{name: path} of inputs that cannot be trained on."""
    folder = shutil.copytree(records_file.parent, tmp_path / "spoilt")
    lines = records_file.read_text().splitlines()
    (folder / "not_json.jsonl").write_text("\n".join([*lines, "{oops"]))
    for picture in folder.glob("*.png"):
        picture.write_text("not a picture")
    (tmp_path / "nan.py").write_text(
        "from crystal.methods import sft\n\n\nclass Method(sft.Method):\n"
        "    def losses(self, model, batch, progress):\n"
        "        return {'ce': super().losses(model, batch, progress)['ce'] * float('nan')}\n"
    )
    (started / "inside.jsonl").write_text("\n".join(lines))
    return {
        "NOT_JSON": str(folder / "not_json.jsonl"),
        "NO_PICTURE": str(folder / "train.jsonl"),
        "NAN": str(tmp_path / "nan.py"),
        "INSIDE": str(started / "inside.jsonl"),
    }


def test_overwrite_deletes_nothing_for_a_run_that_fails_before_its_first_update(
    flags, started, spoilt, records_file, monkeypatch
):
    """Whatever fails, in flags, in files or in the first batch itself, fails while the old run is whole."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where the package is missing
    before = contents(started)
    assert {"metrics.jsonl", "config.json"} <= {str(path) for path in before}
    for more, told in LATE:
        more = [spoilt.get(flag, flag) for flag in more]
        root = ["--image_root", str(records_file.parent)] if str(started / "inside.jsonl") in more else []
        with pytest.raises(UserError, match=told):
            train.main(flags("kept", "--max_steps", "1", "--overwrite", *root, *more))
        assert contents(started) == before, more


def test_a_crash_in_the_first_update_leaves_the_old_run_whole(flags, started, monkeypatch):
    """Not a user's mistake: a method that breaks, or too little memory."""

    def crash(*_):
        raise torch.OutOfMemoryError("no memory")

    before = contents(started)
    monkeypatch.setattr(methods.get("crystal"), "losses", crash)
    for way in ("--overwrite", "--resume"):
        shutil.rmtree(checkpoint.step_dir(started, 2), ignore_errors=True)
        before = contents(started)
        with pytest.raises(torch.OutOfMemoryError):
            train.main(flags("kept", "--max_steps", "2", "--save_every", "1", way))
        assert contents(started) == before


def test_overwrite_starts_anew(flags, started, records_file, tmp_path):
    """Of the old run nothing stays, of a stranger's files all; the new one's broken records are listed."""
    with pytest.raises(UserError, match="kept: holds a run already"):
        train.main(flags("kept", "--max_steps", "1"))
    (started / "notes.txt").write_text("a stranger's")
    for made_later in ("merged/model.safetensors", "evaluation/test.jsonl", "pictures/losses.png"):
        (started / made_later).parent.mkdir()
        (started / made_later).write_text("of the old run")
    lines = records_file.read_text().splitlines()
    bad = records_file.parent / "one_bad.jsonl"
    bad.write_text("\n".join(lines * 40 + ["{oops"]))
    run = train.main(
        flags("kept", "--max_steps", "1", "--overwrite", "--data", str(bad), "--on_bad_record", "skip")
    )
    assert run == started
    names = {path.name for path in run.iterdir()}
    assert names == {"metrics.jsonl", "config.json", "checkpoints", "bad_records.jsonl", "notes.txt"}
    assert (run / "notes.txt").read_text() == "a stranger's"
    assert [x["step"] for x in metrics(run)] == [1]
    assert [directory.name for directory in (run / "checkpoints").iterdir()] == ["step-1"]
    assert json.loads((run / "config.json").read_text())["data"] == str(bad)
    listed = [json.loads(line)["problem"] for line in (run / "bad_records.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "one_bad.jsonl:121" in listed[0]
    shutil.rmtree(run / "checkpoints")  # a log alone is a run too, and so are checkpoints alone
    with pytest.raises(UserError, match="holds a run already"):
        train.main(flags("kept", "--max_steps", "1"))
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints" / "step-3").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run already"):
        train.main(flags("kept", "--max_steps", "1"))


# --- what is validated, saved, kept and printed when ---


def scripted(monkeypatch, *measured):
    """From now on every validation returns the next of these."""
    turns = iter(measured)
    monkeypatch.setattr(train, "validate", lambda *_: next(turns))


def test_the_best_checkpoint_is_that_of_the_least_cross_entropy_and_a_resume_remembers_it(
    flags, records_file, monkeypatch, capsys
):
    steps = "--max_steps 5 --save_every 4 --keep 9 --eval_every 1"
    more = ("--val_data", str(records_file), *steps.split())
    values = (0.5, 0.2, 0.2, 0.9, 0.4)  # the second is the best; its equal comes later
    scripted(monkeypatch, *({"loss": -value, "ce": -1.0, "ce_int": value} for value in values))
    run = train.main(flags("best", *more))
    assert checkpoint.best(run) == {"step": 2, "value": 0.2, "metric": "val_ce_int"}
    saved = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert saved == {"step-1", "step-2", "step-4", "step-5"}  # each best one so far, every fourth, the last
    lines = [x for x in metrics(run) if "val_loss" in x]
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5] and [x["val_ce_int"] for x in lines] == list(values)
    assert lines[0] == {"step": 1, "val_loss": -0.5, "val_ce": -1.0, "val_ce_int": 0.5}
    out = capsys.readouterr().out
    assert re.findall(r"step (\d)  validation  .*  \(best\)", out) == ["1", "2"]

    # It was killed after the second update: what is no better than 0.2 is not the best.
    for step in (4, 5):
        shutil.rmtree(checkpoint.step_dir(run, step))
    scripted(monkeypatch, *({"loss": 0.0, "ce_int": value} for value in (0.3, 0.25, 0.21)))
    train.main(flags("best", *more, "--resume"))
    assert checkpoint.best(run) == {"step": 2, "value": 0.2, "metric": "val_ce_int"}
    assert [x["step"] for x in metrics(run) if "val_loss" in x] == [1, 2, 3, 4, 5]


METRIC = """from crystal.methods import sft

class Method(sft.Method):
    metric = "loss"
"""


@pytest.mark.parametrize(
    "which, best", [("sft", "ce"), ("released", "ce"), ("livr", "ce"), ("crystal", "ce_int"), ("OWN", "loss")]
)
def test_a_method_names_the_metric_of_its_best_checkpoint(
    flags, records_file, tmp_path, monkeypatch, which, best
):
    """Each of three numbers is least at another update; the fourth validation lacks what the method named."""
    (tmp_path / "own.py").write_text(METRIC)
    numbers = [
        {"ce": 1.0, "ce_int": 3.0, "loss": 2.0},
        {"ce": 2.0, "ce_int": 1.0, "loss": 3.0},
        {"ce": 3.0, "ce_int": 2.0, "loss": 1.0},
    ]
    scripted(monkeypatch, *numbers, {"other": 0.0})
    more = (
        "--method",
        str(tmp_path / "own.py") if which == "OWN" else which,
        "--max_steps",
        "4",
        "--eval_every",
        "1",
    )
    with pytest.raises(UserError, match=f"its metric '{best}' is none of what it measures, other"):
        train.main(flags("b", "--val_data", str(records_file), *more))
    step = {"ce": 1, "ce_int": 2, "loss": 3}[best]
    assert checkpoint.best(tmp_path / "b") == {"step": step, "value": 1.0, "metric": f"val_{best}"}


def test_what_is_saved_validated_and_printed_when(flags, records_file, monkeypatch, capsys):
    """Every so many updates, and at the end."""
    scripted(monkeypatch, *({"loss": 0.0, "ce": float(i)} for i in range(3)))
    steps = "--max_steps 7 --eval_every 3 --save_every 2 --log_every 4 --keep 2"
    run = train.main(flags("when", "--method", "sft", "--val_data", str(records_file), *steps.split()))
    assert [x["step"] for x in metrics(run) if "val_loss" in x] == [3, 6, 7]
    # The best, the last two.
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-3", "step-6", "step-7"}
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d)/7  loss", out, re.M) == ["4", "7"]
    assert re.findall(r"^step (\d)  validation", out, re.M) == ["3", "6", "7"]
    more = "--method sft --max_steps 1 --eval_every 0"
    never = train.main(flags("never", "--val_data", str(records_file), *more.split()))
    assert [list(x)[:2] for x in metrics(never)] == [["step", "loss"]]


def test_a_checkpoint_holds_what_trains_its_moments_and_the_settings(flags):
    """After one update from zero, AdamW's moments are shares of the clipped gradient, and the step is 1."""
    run = train.main(flags("one", *["--max_steps", "1", "--tune", "tokens", "--lr", "1e-3", "--warmup", "0", "--clip", "1e-3"]))  # noqa: E501
    files, state = checkpoint.load(checkpoint.step_dir(run, 1))
    assert files.keys() == {"trainable.safetensors", "optimizer.safetensors"} and state.keys() == {
        "step", "settings", "pairs",
    }
    assert files["trainable.safetensors"].keys() == {"model.new_tokens.embedding"}
    moments = {
        name.removeprefix("model.new_tokens.embedding."): value
        for name, value in files["optimizer.safetensors"].items()
    }
    assert moments.keys() == {"exp_avg", "exp_avg_sq", "step"} and float(moments["step"]) == 1
    gradient = moments["exp_avg"] / 0.1
    assert float(gradient.norm()) == pytest.approx(1e-3, rel=1e-4)  # clipped
    assert torch.allclose(moments["exp_avg_sq"], 0.001 * gradient**2, rtol=1e-4, atol=1e-20)
    assert state["step"] == 1 and state["pairs"] == 2
    written = json.loads((run / "config.json").read_text())
    assert written["world"] == 1 and set(written) - set(state["settings"]) == {"versions", "world"}
    assert {name: written[name] for name in state["settings"]} == state["settings"]
    assert (
        state["settings"]["lr"] == 1e-3
        and state["settings"]["tune"] == "tokens"
        and state["settings"]["dtype"] == "float32"
    )
    assert (
        written["versions"]["python"] == sys.version.split()[0]
        and written["versions"]["transformers"] == transformers.__version__
    )


@pytest.mark.parametrize(
    "more, trained", [(("--tune", "tokens"), 7 * 32), (("--tune", "tokens", "--latents", "5"), 9 * 32)]
)
def test_how_much_trains_is_told(flags, more, trained, capsys):
    """Four tags and K latents, of 32 numbers each."""
    run = train.main(flags("count", "--max_steps", "1", *more))
    told = re.search(
        r"([\d,]+) trainable of ([\d,]+) parameters, 1 process\(es\) on cpu, float32", capsys.readouterr().out
    )
    base = sum(
        t.numel()
        for t in load_file(
            Path(json.loads((run / "config.json").read_text())["model"]) / "model.safetensors"
        ).values()
    )
    assert [int(number.replace(",", "")) for number in told.groups()] == [trained, base + trained]


# --- resume ---


def test_a_resume_in_the_middle_of_a_stage_and_an_epoch_may_split_its_updates_anew(flags, tmp_path):
    """Killed after two of five updates of four records; then one record at a time, all else as before."""
    more = "--method livr --masked 0.6 --lora_dropout 0 --dtype float64 --max_steps 5 --save_every 2 --keep 9"
    more = more.split()
    whole = train.main(flags("whole", *more, "--batch_size", "2", "--accumulation", "2"))
    shutil.copytree(whole, tmp_path / "split")
    for step in (4, 5):
        shutil.rmtree(checkpoint.step_dir(tmp_path / "split", step))
    split = train.main(flags("split", *more, "--batch_size", "1", "--accumulation", "4", "--resume"))
    a, b = metrics(whole), metrics(split)
    assert [x["step"] for x in a] == [x["step"] for x in b] == [1, 2, 3, 4, 5]
    for x, y in zip(a, b, strict=True):
        assert all(
            x[name] == pytest.approx(y[name], rel=1e-6) for name in ("loss", "ce", "mass", "lr", "grad_norm")
        )
    assert a[2]["loss"] != b[2]["loss"]  # it was computed anew
    ours = weights(split, 5)
    assert ours.keys() == weights(whole, 5).keys()
    assert all(
        torch.allclose(value, ours[name], rtol=0, atol=1e-6) for name, value in weights(whole, 5).items()
    )


# --- data, validation, broken records ---


@pytest.mark.parametrize("how", ["fork", "forkserver"])
def test_workers_make_the_same_batches(flags, start_by, how):
    """However this Python starts them: from 3.14 on by forkserver."""
    start_by(how)
    a, b = (metrics(train.main(flags(f"w{n}", "--max_steps", "2", "--workers", n))) for n in ("0", "2"))
    assert [x["loss"] for x in a] == [x["loss"] for x in b] and len(a) == 2


class Pretended(Processes):
    """One of several ranks whose reductions are its own values: what a rank does by itself."""

    def sum(self, value):
        return value

    def gather(self, items):
        return list(items)


def test_validation_is_shared_by_batches_and_counts_every_record_once(setup):
    """Seven records in batches of two: of two ranks, 0 has the first and the third batch, 1 the others."""
    s = setup("--method", "sft", "--batch_size", "2", "--max_steps", "9")
    s.examples.records = [
        replace(s.records[0], answer=answer) for answer in ("a", "bb", "ccc", "dd", "e", "ff", "ggg ggg")
    ]
    sums = [float(data.collate([s.examples[0, i]], 0)["targets"].clamp(min=0).sum()) for i in range(7)]
    asked = []

    class Told(LabelSum):
        def forward(self, batch, progress):
            assert not self.training and not torch.is_grad_enabled()
            asked.append((len(batch["input_ids"]), progress))
            return super().forward(batch, progress)

    def validated(procs):
        asked.clear()
        objective = Told()
        found = train.validate(
            objective, s.examples, s.settings, s.method, s.model.tokenizer.pad_token_id, procs, torch.float64
        )
        assert objective.training  # again
        return found

    whole = validated(Processes())
    assert whole == {"loss": pytest.approx(sum(sums) / 7), "ce": pytest.approx(sum(sums) / 7)}
    assert [size for size, _ in asked] == [2, 2, 2, 1] and {progress for _, progress in asked} == {
        config.Progress(9, 0, 1.0, 1.0)
    }
    for rank, mine in ((0, (0, 1, 4, 5)), (1, (2, 3, 6))):
        assert validated(Pretended(rank=rank, world=2))["ce"] == pytest.approx(
            sum(sums[i] for i in mine) / len(mine)
        )


def test_the_loss_is_the_weighted_sum_of_what_trains():
    """One of weight 0 counts nothing, nor does a monitored one; one without a weight is an error of one line.
    """
    terms = {"a": 2.0, "b": 3.0, "seen": 100.0, "off": 7.0}
    method = SimpleNamespace(monitored=("seen",))
    weights = {"a": 0.5, "b": 4.0, "off": 0.0, "absent": 9.0, "seen": 8.0}
    settings = SimpleNamespace(method="mine.py", weights=weights)
    assert train.weighted(terms, method, settings) == 0.5 * 2 + 4 * 3
    with pytest.raises(
        UserError, match="--method mine.py: its losses have a term 'c' without a weight"
    ) as refused:
        train.weighted(terms | {"c": 5.0}, method, settings)
    assert "\n" not in str(refused.value)


def test_broken_records_in_a_batch(tmp_path):
    """One is let pass, more up to 1 % of what all ranks have seen; one that was not skipped ends the run."""
    settings = config.Settings(batch_size=4, accumulation=5, output=str(tmp_path / "run"))

    def report(bad, count, step, world=10, **more):
        return train.report_bad({"bad": bad, **more}, count, step, settings, Pretended(world=world))

    assert report([], 7, 0) == [] and report(["x"], 0, 0) == ["x"]
    assert report(["x"], 1, 0) == ["x"]  # 2 of 200
    with pytest.raises(UserError, match="3 of 200 records were broken, more than 1 %; the last: z"):
        report(["y", "z"], 1, 0)
    assert report(["y", "z"], 1, 1) == ["y", "z"]  # 3 of 400
    with pytest.raises(UserError, match="2 of 20 records"):
        report(["y"], 1, 0, world=1)
    with pytest.raises(UserError, match="^it is cut$"):
        report([], 0, 0, error="it is cut")
    assert not (tmp_path / "run").exists()
    run_directory.list_bad([], tmp_path / "run", Processes())
    run_directory.list_bad(["other"], tmp_path / "run", Processes(rank=1, world=2))
    assert not (tmp_path / "run").exists()
    for line in ("one", "two"):
        run_directory.list_bad([line], tmp_path / "run", Processes())
    assert (tmp_path / "run" / "bad_records.jsonl").read_text() == '{"problem": "one"}\n{"problem": "two"}\n'


def test_a_record_that_breaks_while_loading_is_listed_and_told_once(flags, records_file, tmp_path):
    """One of three pictures cannot be opened: met once in three updates it passes, met twice it does not."""
    folder = shutil.copytree(records_file.parent, tmp_path / "cut")
    (folder / "1_0.png").write_text("not a picture")
    more = ("--method", "sft", "--data", str(folder / "train.jsonl"), "--on_bad_record", "skip")
    run = train.main(flags("cut", *more, "--batch_size", "1", "--max_steps", "3"))
    listed = [json.loads(line)["problem"] for line in (run / "bad_records.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and "train.jsonl:2: field 'image'" in listed[0]
    with pytest.raises(UserError, match="2 of 6 records were broken"):
        train.main(flags("more", *more, "--batch_size", "3", "--max_steps", "2"))


# --- logs ---


def test_tensorboard_gets_every_number_of_every_line(flags, records_file, monkeypatch):
    written, folders = [], []

    class SummaryWriter:
        def __init__(self, folder):
            folders.append(folder)

        def add_scalar(self, name, value, step):
            written.append((step, name, value))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    more = "--method sft --max_steps 2 --tensorboard --eval_every 2"
    run = train.main(flags("board", "--val_data", str(records_file), *more.split()))
    lines = metrics(run)
    assert folders == [run / "tensorboard"] and len(lines) == 3
    assert written == [
        (line["step"], name, value) for line in lines for name, value in line.items() if name != "step"
    ]


def test_a_gradient_without_an_end_stops_before_the_update(flags, tmp_path):
    """The loss is finite, its gradient is not; nothing was written."""
    (tmp_path / "steep.py").write_text(
        "from crystal.methods.crystal import Method as Crystal\n\n\nclass Method(Crystal):\n"
        "    def losses(self, model, batch, progress):\n"
        "        rows = model.new_tokens.embedding\n"
        "        return {'ce': (rows - rows.detach()).abs().sum().sqrt()}\n"
    )
    told = "update 0: loss 0.0 or gradient norm (nan|inf) is not finite; .* the last good checkpoint is none"
    with pytest.raises(UserError, match=told):
        train.main(
            flags("steep", "--method", str(tmp_path / "steep.py"), "--tune", "tokens", "--max_steps", "1")
        )
    assert not (tmp_path / "steep").exists()
