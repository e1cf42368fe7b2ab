"""Comparisons: intervals over seeds, paired differences, and runs that are made once."""

import json
import os
import signal
from types import SimpleNamespace

import pytest

from crystal import compare, train
from crystal.methods import livr
from crystal.runtime import checkpoint
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes


def test_table_pairs_seeds():
    """Two methods that differ by the same in every seed: a difference without spread, whatever the
    spread of the seeds.
    """
    scores = {"sft": [{"all": 50.0}, {"all": 70.0}], "mine": [{"all": 51.0}, {"all": 71.0}]}
    lines = [line.split() for line in compare.table(scores).splitlines()]
    assert lines[1] == ["all", "60.0", "±127.1", "61.0", "±127.1"] and lines[4] == ["all", "1.0", "±0.0"]
    assert lines[3] == ["family", "mine", "-", "sft"]
    # No interval from one seed.
    assert compare.table({"sft": [{"all": 50.0}]}).splitlines()[1].split() == ["all", "50.0"]


def test_runs_are_made_once_and_go_on_where_they_stopped(
    model_dirs, records_file, tmp_path, monkeypatch, capsys
):
    flags = [
        "--methods", "sft,livr,livr: --masked 0", "--seeds", "2", "--model", str(model_dirs[True]),
        "--data", str(records_file), "--test", str(records_file), "--output", str(tmp_path),
        "--max_steps", "2", "--batch_size", "1", "--lora_r", "2", "--eval_every", "0", "--save_every", "1",
        "--max_new_tokens", "2",
    ]
    trained, main, losses = [], train.main, livr.Method.losses
    monkeypatch.setattr(train, "main", lambda argv: (trained.append(argv), main(argv))[1])

    def interrupted(self, *args):
        if len(trained) == 3 and args[2].step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, *args)

    with monkeypatch.context() as m:
        m.setattr(livr.Method, "losses", interrupted)
        # The third run, after one of two updates.
        with pytest.raises(UserError, match="livr_masked_0-0: stopped before its end"):
            compare.main(flags)
    compare.main(flags)
    assert len(trained) == 7 and [("--resume" in argv) for argv in trained] == [
        False, False, False, True, False, False, False,
    ]
    out = capsys.readouterr().out
    assert (
        "[6/6] livr: --masked 0, seed 1" in out
        and "after 2 of 2 seeds" in out
        and "livr: --masked 0 - sft" in out
    )
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert names == ["livr-0", "livr-1", "livr_masked_0-0", "livr_masked_0-1", "sft-0", "sft-1"]
    assert json.loads((tmp_path / "livr_masked_0-1" / "config.json").read_text())["masked"] == 0
    assert json.loads((tmp_path / "livr-1" / "config.json").read_text())["seed"] == 1
    assert all(checkpoint.newest(tmp_path / name) for name in names)
    compare.main(flags)
    assert len(trained) == 7  # nothing is repeated
    with pytest.raises(UserError, match="another --output is needed"):
        compare.main([*flags, "--lr", "1"])
    # Results are those of other questions, decoding or data: what is asked says so by its content.
    for flag, value in (("--questions", "1"), ("--max_new_tokens", "3")):
        with pytest.raises(UserError, match=f"sft-0/compare.json: its {flag} differed from what is asked"):
            compare.main([*flags, flag, value])
    lines = records_file.read_text().splitlines(True)
    fewer = records_file.with_name("fewer.jsonl")
    fewer.write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="compare.json: its --data, --test differed"):
        compare.main([*flags, "--data", str(fewer), "--test", str(fewer)])
    same = records_file.with_name("same.jsonl")
    same.write_text("".join(lines))
    compare.main([*flags, "--data", str(same), "--test", str(same)])
    assert len(trained) == 7
    with pytest.raises(UserError, match="--data goes with --test"):
        compare.main(["--data", "x"])
    for flag in ("--questions", "--max_new_tokens", "--seeds"):
        with pytest.raises(UserError, match=f"{flag}.* must be at least 1"):
            compare.main([flag, "0", "--data", "nowhere.jsonl", "--test", "nowhere.jsonl"])


def test_the_file_of_a_method_is_asked_by_its_content(records_file, tmp_path):
    """An edited file is another method, wherever it lies."""
    args = SimpleNamespace(data="", questions=3, max_new_tokens=2)
    text = "from crystal.methods.sft import Method\n"
    found = []
    for name, written in (("a.py", text), ("b.py", text), ("c.py", text + "# edited\n")):
        (tmp_path / name).write_text(written)
        found.append(compare.what_is_asked(args, str(tmp_path / name), records_file))
    assert found[0] == found[1] != found[2]


def test_lavit_needs_its_teacher_first(tmp_path):
    from crystal import demo

    with pytest.raises(UserError, match="sft has to be trained first"):
        demo.data_of("lavit", tmp_path, tmp_path / "sft-0", Processes())
    assert demo.data_of("livr", tmp_path, tmp_path / "sft-0", Processes()) == [
        "--data", str(tmp_path / "train.jsonl"), "--val_data", str(tmp_path / "val.jsonl"),
    ]
    assert demo.recipe("crystal")[-4:] == ["--labels", "answer", "--corruption", "blur=8:10"]
