"""What a run trains on: which files, sets, seeds and stages; the reader's flags; the loader's arguments.

What is read is written here, and what the readers and the loader are given is compared with what the flags
say.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from crystal import training_data
from crystal.runtime import data, distributed
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes


def test_what_a_run_reads(setup, records_file, capsys):
    """Files, seeds, stages, shares: what each set of examples was made with."""
    other = records_file.parent / "twice.jsonl"
    other.write_text(records_file.read_text() * 2)
    more = "--method livr --image_copies 2 --seed 7 --eval_records 4 --on_bad_record skip"
    s = setup("--data", str(records_file), "--val_data", str(other), *more.split())
    asked = []
    s.method.layout = lambda fmt, record, tokens, stage: asked.append(
        (fmt is s.fmt, record.id, tokens, stage)
    )
    sets, val, broken = training_data.open_data(s.settings, s.method, s.model, s.fmt, Processes())
    assert [len(x) for x in sets] == [3, 3] and len(val) == 4 and broken == []
    assert [(x.seed, x.skip, x.copies, x.corruption) for x in (*sets, val)] == [(7, True, 2, None)] * 2 + [
        (8, False, 2, None)
    ]
    for examples in (*sets, val):
        examples.layout(examples.records[1], [5, 6])
    assert asked == [(True, "1", [5, 6], 0), (True, "1", [5, 6], 1), (True, "1", [5, 6], 1)]
    assert f"train: 3 records of {records_file}\nval: 4 records of {other}\n" in capsys.readouterr().out

    s = setup("--data", str(records_file), "--corruption", "noise=1:2")
    (only,), val, _ = training_data.open_data(s.settings, s.method, s.model, s.fmt, Processes())
    assert (
        val is None
        and str(only.corruption) == "noise=1:2"
        and not only.skip
        and only.extras == s.method.extras
    )
    assert only.image_processor is s.model.image_processor


def test_turns_and_image_root_reach_the_reader(setup, records_file, tmp_path, capsys):
    talk = [("human", "<image>\nWhat is it?"), ("gpt", "a cat"), ("human", "Where?"), ("gpt", "there")]
    record = {"image": "0_0.png", "conversations": [{"from": who, "value": what} for who, what in talk]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(record))
    where = ["--data", str(tmp_path / "talk.jsonl"), "--image_root", str(records_file.parent)]
    for turns, answers, told in (
        ("first", ["a cat"], "; 1 later turns left out"),
        ("all", ["a cat", "there"], ""),
    ):
        s = setup("--method", "sft", *where, "--turns", turns)
        (only,), _, _ = training_data.open_data(s.settings, s.method, s.model, s.fmt, Processes())
        assert [r.answer for r in only.records] == answers
        assert f"train: {len(answers)} records of {tmp_path / 'talk.jsonl'}{told}" in capsys.readouterr().out


def test_without_data_the_toy_scenes_are_made_with_the_seed(setup, records_file, tmp_path, monkeypatch):
    from crystal.runtime import toy

    made = []

    def generate(root, seed):
        made.append((root, seed))
        for name, times in (("train", 2), ("val", 1)):
            (tmp_path / root).mkdir(parents=True, exist_ok=True)
            (tmp_path / root / f"{name}.jsonl").write_text(records_file.read_text() * times)

    monkeypatch.setattr(toy, "generate", generate)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(records_file.parent, tmp_path / "runs" / "toy-9")
    s = setup("--method", "sft", "--seed", "9")
    (only,), val, _ = training_data.open_data(s.settings, s.method, s.model, s.fmt, Processes())
    assert made == [("runs/toy-9", 9)] and len(only) == 6 and len(val) == 3


def test_the_loader_is_told_how_to_make_batches(setup, monkeypatch):
    """Which records (a run may begin in the middle of a stage), padding, and workers that ignore signals."""
    more = "--method livr --max_steps 10 --masked 0.4 --batch_size 2 --accumulation 3 --workers 5 --seed 7"
    s = setup(*more.split())
    told = []
    monkeypatch.setattr(data, "loader", lambda *arguments: told.append(arguments) or iter(["batch"]))
    for stage, step in ((0, 0), (0, 3), (0, 4), (1, 0), (1, 6), (1, 10)):
        told.append((stage, step))
        list(training_data.stage_batches(stage, s.examples, step, s.settings, 11, Processes(rank=1, world=4)))
    made = [x if len(x) == 2 else (x[1].start, x[1].stop) for x in told]
    assert made == [(0, 0), (0, 4), (0, 3), (3, 4), (0, 4), (1, 0), (4, 10), (1, 6), (6, 10), (1, 10)]
    examples, order, *rest = told[1]
    assert examples is s.examples and rest == [11, 5, distributed.ignore_signals]
    assert (order.count, order.batch_size, order.accumulation, order.rank, order.world, order.seed) == (
        3, 2, 3, 1, 4, 7,
    )


# --- workers ---

MINE = """from dataclasses import dataclass

import torch

from crystal.corrupt import Mode
from crystal.layout import Format
from crystal.methods import crystal
from crystal.runtime.config import setting


class Shouted(Format):
    def text(self, text):
        return super().text(text.upper())


@dataclass(frozen=True)
class Settings(crystal.Settings):
    corruptions = crystal.Settings.corruptions | {
        "stripes": Mode(lambda x, share, g: x * (torch.rand(x.shape[1], 1, generator=g) > share), 0.2, 0.6, 1)
    }
    corruption: str = setting("stripes,noise=3:9", "as crystal's")
    marked: int = setting(3, "a number")


class Method(crystal.Method):
    Settings = Settings

    def format(self, tokenizer):
        return Shouted(tokenizer, self.settings.latents)

    def modules(self, model):
        self.width = model.hf.config.text_config.hidden_size
        self.heads = super().modules(model)
        return self.heads

    def extras(self, record, images):
        return {"own": torch.tensor([self.width, self.settings.marked, len(images)])}
"""


@pytest.fixture
def own(setup, records_file, tmp_path):
    """A file whose settings, format and lambdas no pickle takes -> (settings, sets to train on, the file)."""
    file = tmp_path / "own.py"
    file.write_text(MINE)
    s = setup("--method", str(file), "--data", str(records_file), "--marked", "5", "--batch_size", "2")
    sets, _, _ = training_data.open_data(s.settings, s.method, s.model, s.fmt, Processes())
    return s.settings, sets, file


def equal(x, y):
    """Whether two values of batches are the same, tensors to the bit."""
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_a_worker_makes_the_method_anew(own, start_by, how):
    """Whatever a file holds, a worker that is no fork makes the same batches, by the file as it was run."""
    settings, (examples,), file = own
    file.write_text("raise RuntimeError('edited since')")
    start_by(how)

    def batches(workers):
        chosen = replace(settings, workers=workers, max_steps=3)
        return list(training_data.stage_batches(0, examples, 0, chosen, 0, Processes()))

    right, found = batches(0), batches(2)
    assert len(right) == 3 and right[0]["own"][:, 1].tolist() == [5, 5]
    for x, y in zip(right, found, strict=True):
        assert x.keys() == y.keys() and all(equal(value, y[name]) for name, value in x.items())


def test_what_no_worker_can_be_given_is_told(own, start_by):
    settings, (examples,), file = own
    examples.recipe.method.trace = lambda x: x
    start_by("spawn")
    chosen = replace(settings, workers=1)
    told = f"--workers: self.trace of the method {file} cannot be given"
    with pytest.raises(UserError, match=told):
        list(training_data.stage_batches(0, examples, 0, chosen, 0, Processes()))
