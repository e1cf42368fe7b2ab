"""The loop: schedule, logs, vocabulary rows, resume, bad records, signals and non-finite losses."""
import json
import re
import shutil
from dataclasses import dataclass, fields, replace

import pytest
import torch
from safetensors.torch import load_file

from crystal import checkpoint, config, train
from crystal.config import UserError
from crystal.processes import Processes


@pytest.fixture
def flags(model_dirs, records_file, tmp_path):
    def make(name, *more, tied=True):
        return ["--model", str(model_dirs[tied]), "--data", str(records_file), "--output", str(tmp_path / name), "--latents", "3", "--lora_r", "2", "--lr", "1e-2",
                "--batch_size", "2", "--log_every", "100", "--eval_every", "0", *more]
    return make


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, step):
    return load_file(checkpoint.step_dir(run, step) / "trainable.safetensors")


def test_learning_rate():
    s = config.parse(["--max_steps", "100", "--lr", "1", "--warmup", "0.1"])
    rates = [train.learning_rate(i, s) for i in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert train.learning_rate(0, config.parse(["--warmup", "0", "--lr", "1"])) == 1.0
    s = config.parse(["--max_steps", "100", "--lr", "1", "--warmup", "0.1", "--decay", "linear"])
    assert [train.learning_rate(i, s) for i in (9, 10, 55, 99)] == pytest.approx([1, 1, 0.5, 1 / 90])


@dataclass
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
    assert s.progress(29) == config.Progress(29, 0, 29 / 30, 0.29) and s.progress(30) == config.Progress(30, 1, 0, 0.3)
    assert s.progress(100) == config.Progress(100, 1, 1, 1)  # what validation sees
    short = Staged(max_steps=1)  # a stage may be empty; no update falls between two
    assert (short.span(0), short.span(1)) == ((0, 0), (0, 1)) and short.progress(0).stage == 1


@pytest.mark.parametrize("method", ["sft", "crystal"])
def test_run_directory(flags, method, records_file, capsys):
    run = train.main(flags(method, "--method", method, "--max_steps", "3", "--val_data", str(records_file), "--eval_every", "2", "--save_every", "2"))
    lines = metrics(run)
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3] and [x["step"] for x in lines if "val_loss" in x] == [2, 3]
    terms = ("ce",) if method == "sft" else ("ce_int", "ce_cor", "kl", "attn", "mass_int", "mass_cor")
    for name in (*terms, "loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_gb"):
        assert name in lines[0], name
    assert lines[0]["loss"] == pytest.approx(sum(lines[0][n] for n in terms if "mass" not in n))
    if method == "crystal":
        assert 0 < lines[0]["mass_int"] < 1 and lines[0]["mass_int"] != lines[0]["mass_cor"]
    saved = json.loads((run / "config.json").read_text())
    assert saved["method"] == method and saved["dtype"] == "float32" and saved["versions"]["torch"] == torch.__version__
    best = checkpoint.best(run)
    values = {x["step"]: x["val_ce" if method == "sft" else "val_ce_int"] for x in lines if "val_loss" in x}
    assert best["step"] == min(values, key=values.get) and checkpoint.step_dir(run, best["step"]).is_dir()
    out = capsys.readouterr().out
    assert "trainable" in out and "3 records" in out


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_no_other_vocabulary_row_moves(flags, tune, tied, model_dirs):
    """After updates with weight decay every row but the new tokens' is identical to the bit, and all of those have moved."""
    run = train.main(flags("rows", "--max_steps", "3", "--weight_decay", "0.5", "--tune", tune, tied=tied))
    from crystal import export
    model, fmt, _ = export.open_model(run, "last")
    base = load_file(model_dirs[tied] / "model.safetensors")
    new = model.rows.ids if hasattr(model.rows, "ids") else None
    ids = sorted({fmt.think, fmt.unthink, fmt.open, fmt.close, *fmt.latents})
    if new is not None:
        assert sorted(int(i) for i in new) == ids
    heads = [model.hf.get_input_embeddings().weight] + ([] if tied else [model.hf.lm_head.weight])
    for name, weight in zip(("model.language_model.embed_tokens.weight", "lm_head.weight"), heads):
        other = torch.ones(len(weight), dtype=torch.bool)
        other[ids] = False
        assert torch.equal(weight[other], base[name][other])
    before = train.main(flags("start", "--max_steps", "1", "--lr", "1e-30", "--tune", tune, tied=tied))
    a, b = weights(before, 1), weights(run, 3)
    moved = [n for n in a if ".rows." in n]
    assert moved and all((a[n] != b[n]).any(1).all() for n in moved)


def test_resume_equals_not_having_stopped(flags, tmp_path):
    """Mid-epoch, with accumulation and dropout: the same next losses and weights as the unbroken run."""
    more = ("--max_steps", "5", "--accumulation", "2", "--batch_size", "1", "--save_every", "3", "--lora_dropout", "0.1", "--keep", "9")
    whole = train.main(flags("whole", *more))
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(checkpoint.step_dir(broken, 5))
    (broken / "metrics.jsonl").write_text("".join((whole / "metrics.jsonl").read_text().splitlines(True)[:4]) + '{"step": 5, "lo')  # killed after a step that the checkpoint does not know, in the middle of a line
    train.main(flags("broken", *more, "--resume"))
    a, b = metrics(whole), metrics(broken)
    assert [x["step"] for x in b] == [1, 2, 3, 4, 5]
    for x, y in zip(a, b):
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


@pytest.fixture
def started(flags):
    return train.main(flags("kept", "--max_steps", "2", "--save_every", "1"))


def test_a_resume_keeps_every_setting_but_those_of_the_machine_and_the_log(flags, started, records_file):
    other = records_file.parent / "others.jsonl"
    other.write_text(records_file.read_text())
    same = flags("kept", "--max_steps", "2", "--save_every", "1", "--resume")
    for name, value, told in (("data", str(other), f"'{records_file}', not '{other}'"), ("lora_alpha", "64", "32.0, not 64.0"), ("dtype", "float64", "'float32', not 'float64'"),
                              ("max_pixels", "12000", "None, not 12000"), ("kl_share", "0.5", "1.0, not 0.5")):
        with pytest.raises(UserError, match=re.escape(f"step-2: was made with --{name} {told}; a resume keeps it")):
            train.main([*same, f"--{name}", value])
    shutil.rmtree(checkpoint.step_dir(started, 2))
    train.main([*same, "--batch_size", "1", "--accumulation", "2", "--workers", "1", "--checkpointing", "--keep", "5", "--eval_every", "1", "--on_bad_record", "skip"])
    assert [x["step"] for x in metrics(started)] == [1, 2]
    kept = {f.name for f in fields(config.Settings)} - train.MAY_CHANGE
    assert kept > {"val_data", "image_root", "turns", "lora_dropout", "weight_decay", "warmup", "clip", "min_pixels"} and len(kept) + len(train.MAY_CHANGE) == len(fields(config.Settings))


def test_accumulation_equals_a_larger_batch(flags):
    a = train.main(flags("a", "--max_steps", "2", "--batch_size", "4", "--dtype", "float64"))
    b = train.main(flags("b", "--max_steps", "2", "--batch_size", "2", "--accumulation", "2", "--dtype", "float64"))
    for x, y in zip(metrics(a), metrics(b)):
        assert all(x[n] == pytest.approx(y[n], rel=1e-6) for n in ("loss", "ce_int", "ce_cor", "kl", "attn", "grad_norm"))
    assert all(torch.allclose(t, weights(b, 2)[n], rtol=0, atol=1e-6) for n, t in weights(a, 2).items())


def test_seed_fixes_a_run(flags):
    runs = [metrics(train.main(flags(n, "--max_steps", "2", "--seed", s)))[1]["loss"] for n, s in (("a", "1"), ("b", "1"), ("c", "2"))]
    assert runs[0] == runs[1] != runs[2]


def test_a_non_finite_loss_stops_before_the_update(flags, monkeypatch):
    from crystal.methods import crystal as method
    losses, calls = method.Method.losses, []

    def broken(self, model, batch, progress):
        calls.append(1)
        terms = losses(self, model, batch, progress)
        return {**terms, "kl": terms["kl"] * (float("nan") if len(calls) == 3 else 1.0)}

    monkeypatch.setattr(method.Method, "losses", broken)
    with pytest.raises(UserError, match=r"update 2: loss nan .* stopped before the update, the last good checkpoint is .*step-2"):
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
    s = setup("--method", "sft", "--on_bad_record", "skip", "--batch_size", "32", "--output", str(tmp_path / "run"))
    (tmp_path / "cut.png").write_bytes((records_file.parent / "0_0.png").read_bytes()[:300])
    good = [s.records[0]] * 49 + [replace(s.records[0], answer="blue")] * 50
    cut = replace(s.records[0], images=[tmp_path / "cut.png"], where="val.jsonl:1")
    listed = lambda: (tmp_path / "run" / "bad_records.jsonl").read_text().count("val.jsonl:1: field 'image'")

    def validated(records):
        s.examples.records = records
        return train.validate(LabelSum(), s.examples, s.settings, s.method, s.model.tokenizer.pad_token_id, Processes(), torch.float64)

    records, whole = [cut, *good], validated(list(good))
    for _ in range(2):  # every validation leaves it out, the first one lists it
        assert validated(records) == pytest.approx(whole, rel=1e-9) and listed() == 1
    with pytest.raises(UserError, match="2 of 101 validation records are broken, more than 1 %; they are listed in .*run/bad_records.jsonl"):
        validated([cut, *good, cut])
    assert listed() == 3


def test_validation_images_are_under_on_bad_record_too(flags, records_file, tmp_path):
    shutil.copytree(records_file.parent, tmp_path / "val")
    (tmp_path / "val" / "0_0.png").write_text("not an image")
    more = ("--max_steps", "1", "--val_data", str(tmp_path / "val" / "train.jsonl"), "--eval_every", "1")
    with pytest.raises(UserError, match="val/train.jsonl:1: field 'image': .*; --on_bad_record skip leaves it out"):
        train.main(flags("stop", *more))
    with pytest.raises(UserError, match="1 of 3 validation records are broken"):
        train.main(flags("skip", *more, "--on_bad_record", "skip"))


@pytest.mark.parametrize("name", ["file", "file/below/it"])
def test_output_must_be_a_directory(flags, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"--output .*{name}: .*/file is not a directory that can be written to"):
        train.main(flags(name, "--max_steps", "1"))


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
    assert len(calls) == 2 and checkpoint.newest(run).name == "step-2" and "stopped by SIGTERM after update 2" in capsys.readouterr().out


def test_tuning_a_file_of_ones_own(flags, tmp_path):
    (tmp_path / "mine.py").write_text("from crystal.methods.crystal import Method as Crystal\n\n\nclass Method(Crystal):\n    def losses(self, model, batch, progress):\n"
                                      "        return super().losses(model, batch, progress) | {'mine': model.rows.rows.square().mean()}\n")
    run = train.main(flags("mine", "--method", str(tmp_path / "mine.py"), "--max_steps", "1"))
    line = metrics(run)[0]
    assert line["loss"] == pytest.approx(sum(line[n] for n in ("ce_int", "ce_cor", "kl", "attn", "mine")))
    with pytest.raises(UserError, match="known are crystal, .*sft"):
        train.main(flags("x", "--method", "nothing"))


STAGED = """from dataclasses import dataclass
from crystal import config
from crystal.config import Stage, setting
from crystal.methods import sft

@dataclass
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
    more = ["--method", str(tmp_path / "staged.py"), "--second", str(other), "--max_steps", "4", "--batch_size", "1", "--val_data", str(records_file), "--eval_every", "2"]
    train.main(flags("staged", *more))
    seen = methods.get(str(tmp_path / "staged.py")).seen
    steps = [x for x in seen if len(x) == 3 and x[0] < 4]
    assert steps == [(0, 0, 0.0), (1, 0, 0.5), (2, 1, 0.0), (3, 1, 0.5)]
    layouts = [x for x in seen if len(x) == 2]
    assert layouts[:2] == [(0, "train.jsonl")] * 2 and layouts.count((1, "other.jsonl")) == 2 and layouts.count((1, "train.jsonl")) == 6 and len(layouts) == 10
    assert seen.count((4, 1, 1.0)) == 6
    with pytest.raises(UserError, match="nowhere.jsonl: cannot be read"):
        train.main(flags("x", *more, "--second", "nowhere.jsonl"))
