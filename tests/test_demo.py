"""The demo's own part: what it refuses before it starts, each method's flags, and that each gets
to its last line.
"""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crystal import demo, methods
from crystal.runtime import data, distributed, toy
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("sft", "crystal", "livr", "lavit", "valr")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "nosuch"], "nosuch"),
        (["--max_stepz", "3"], "--max_stepz"),
        (["--processes", "3"], "--processes"),
        (["--questions", "0"], "--questions 0"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.distributed, "launch", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(UserError, match=message) as error:
        demo.main(flags)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", NAMES)
def test_processes_share_the_batch(method):
    one, two = (methods.parse(["--method", method, *demo.recipe(method, world)]) for world in (1, 2))
    assert one.batch_size == 2 * two.batch_size == demo.BATCH
    one = replace(one, batch_size=two.batch_size)
    assert one == two


@pytest.mark.parametrize("method", NAMES[1:])
def test_it_gets_to_its_end(method, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "generate", functools.partial(toy.generate, train=40, val=10, test=10))
    demo.main(["--method", method, "--max_steps", "2", "--questions", "5", "--processes", "1"])
    out, made = capsys.readouterr().out, tmp_path / "runs" / "demo"
    table = (made / "table.txt").read_text()
    assert table.strip() in out and out.index("Done in") > out.index("the answer is")
    assert table.splitlines()[0].split()[:6] == ["family", "questions", "blind", "base", "sft", method]
    assert all(
        (made / "pictures" / f"{name}.png").stat().st_size > 1000
        for name in ("losses", "corruptions", "attention")
    )
    assert (made / method / "merged" / "model.safetensors").is_file()


def test_each_method_trains_by_its_own_flags(tmp_path):
    """The flags that the head of demo.py explains, method by method; a file's are those of the method
    that it builds on.
    """
    common = ["--batch_size", "16", "--lr", "1e-3", "--lr_tokens", "10", "--eval_records", "64"]
    own = {
        "sft": [],
        "livr": [],
        "crystal": ["--labels", "answer", "--corruption", "blur=8:10"],
        "lavit": ["--tune", "lora"],
        "valr": [
            "--lr_latents", "3e-4", "--lr_tokens", "5", "--first_share", "0.6", "--latents", "4",
            "--encoders", "tiny",
        ],
    }
    assert {method: demo.recipe(method) for method in NAMES} == {
        method: common + own[method] for method in NAMES
    }
    (tmp_path / "mine.py").write_text("from crystal.methods.valr import Method\n")
    assert demo.recipe(str(tmp_path / "mine.py"), 4) == ["--batch_size", "4", *common[2:], *own["valr"]]
    valr = methods.parse(["--method", "valr", *demo.recipe("valr")])
    assert (valr.lr_tokens, valr.latents, valr.first_share) == (5.0, 4, 0.6)  # the later of two counts


def test_updates_are_told_or_the_methods_own(tmp_path):
    """500; 240 for VaLR and what is built on it, whose sequences take three times as long."""
    (tmp_path / "mine.py").write_text("from crystal.methods.valr import Method\n")
    assert [demo.updates(method) for method in ("sft", "crystal", "livr", "lavit")] == [500] * 4
    assert demo.updates("valr") == demo.updates(str(tmp_path / "mine.py")) == 240


def test_lavits_data_are_what_the_teacher_saw(tmp_path, monkeypatch):
    """All of the training scenes and 64 for validation, each kept; the files that it writes are the
    ones to train on.
    """
    (tmp_path / "sft" / "checkpoints").mkdir(parents=True)
    told = []
    monkeypatch.setattr(
        distributed, "run_program", lambda count, script, argv: told.append([count, script, *map(str, argv)])
    )
    flags = demo.data_of("lavit", tmp_path / "toy", tmp_path / "sft", Processes())
    assert flags == [
        "--data",
        str(tmp_path / "toy" / "train.lavit.jsonl"),
        "--val_data",
        str(tmp_path / "toy" / "val.lavit.jsonl"),
    ]
    assert told == [
        [
            1,
            Path(__file__).resolve().parents[1] / "data_prep" / "lavit_teacher.py",
            "--teacher",
            str(tmp_path / "sft"),
            "--data",
            str(tmp_path / "toy" / f"{split}.jsonl"),
            "--limit",
            limit,
            "--keep",
            "all",
            "--batch_size",
            "64",
            "--max_new_tokens",
            "8",
            "--overwrite",
        ]
        for split, limit in (("train", "0"), ("val", "64"))
    ]


def test_the_last_question_goes_to_the_export(tmp_path, monkeypatch, capsys):
    """Pictures of the run below --output, its export, and the record's own question to the merged directory.
    """
    told = []
    monkeypatch.setattr(
        demo.visualize, "pictures", lambda *args, **how: told.append(("pictures", args, how)) or ["a.png"]
    )
    monkeypatch.setattr(demo.export, "main", lambda argv: told.append(("export", argv)))
    monkeypatch.setattr(demo.generate, "main", lambda argv: told.append(("generate", argv)))
    record = data.Record("", "", [("user", "<image>\nWhat colour is the star?")], "red", ["/x/1.png"])
    run, scenes, out = tmp_path / "run", tmp_path / "toy", tmp_path / "out"
    demo.show(run, "livr", record, scenes, out, 5, "cpu")
    assert told == [
        (
            "pictures",
            (run, scenes / "test.jsonl", out / "pictures"),
            {"which": "last", "device": "cpu", "method": "livr"},
        ),
        ("export", ["--run", str(run), "--checkpoint", "last", "--method", "livr"]),
        (
            "generate",
            ["--model", str(run / "merged"), "--image", "/x/1.png", "--question", "What colour is the star?"],
        ),
    ]
    assert (
        capsys.readouterr().out == "\n== 5. Pictures\na.png\n\n== 6. Export and one question\n"
        "/x/1.png\nWhat colour is the star?\n(the answer is red)\n"
    )


def test_the_end_of_the_training_is_asked(tmp_path):
    """Its last checkpoint: 64 validation records are too few to choose one by."""
    flags = demo.reliance_flags(tmp_path / "run", "mine.py", tmp_path)
    assert flags[flags.index("--checkpoint") + 1] == "last"
    assert flags[flags.index("--method") + 1] == "mine.py"


SMALL = """
import functools
from crystal import demo
from crystal.runtime import toy
toy.generate = functools.partial(toy.generate, train=40, val=10, test=10)
demo.main(["--method", "sft", "--max_steps", "1", "--questions", "4", "--processes", "2"])
"""


def test_two_processes_print_once(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "small.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for once in ("== 1. Data", "2 process(es)", "count", "the answer is", "== Done"):
        assert done.stdout.count(once) == 1, once


def test_a_teacher_that_no_wheel_holds_is_missed_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "TEACHER", tmp_path / "lavit_teacher.py")
    monkeypatch.setattr(demo.distributed, "launch", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match="--method lavit: needs lavit_teacher.py, which no wheel holds"):
        demo.main(["--method", "lavit"])
