"""The pictures of a run: three files, of records spread over families, and wrong input is one clear line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from crystal import train, visualize
from crystal.runtime import data
from crystal.runtime.config import UserError


def test_a_run_gives_three_pictures(model_dirs, records_file, tmp_path, capsys, monkeypatch):
    run = train.main(
        [
            "--model", str(model_dirs[True]), "--data", str(records_file), "--output", str(tmp_path / "run"),
            "--max_steps", "2", "--latents", "3", "--lora_r", "2", "--device", "cpu",
        ]
    )
    capsys.readouterr()
    opened, open_model = [], visualize.open_model
    monkeypatch.setattr(
        visualize, "open_model", lambda *args, **how: opened.append(args[2]) or open_model(*args, **how)
    )
    visualize.main(
        [
            "--run", str(run), "--data", str(records_file), "--count", "2", "--attn_layers", "last",
            "--device", "cpu:0",
        ]
    )
    assert opened == [torch.device("cpu:0")]
    paths = capsys.readouterr().out.split()
    assert [p.split("/")[-2:] for p in paths] == [
        ["pictures", n] for n in ("losses.png", "corruptions.png", "attention.png")
    ]
    for path in paths:
        assert np.asarray(Image.open(path)).std() > 20


def test_records_are_spread_over_families():
    make = lambda family, images=("x",): data.Record("", "", [], "", list(images), family=family)
    records = [make("a"), make("a"), make("a"), make("b", ()), make("b"), make("c")]
    assert [r.family for r in visualize.spread(records, 4)] == ["a", "b", "c", "a"] and visualize.spread(
        records, 9
    )[-1] is records[2]


@pytest.mark.parametrize(
    "files, how, message",
    [
        ({}, {}, "no metrics.jsonl in it; --run wants a run directory"),
        ({"metrics.jsonl": json.dumps({"step": 1, "loss": 1.0})}, {}, "a run without checkpoints"),
        ({}, {"count": 0}, "--count 0: must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(files, how, message, records_file, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        visualize.pictures(tmp_path, records_file, tmp_path / "pictures", **how)
    assert "\n" not in str(refused.value)


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="--device cuda:99"):
        visualize.main(["--run", "x", "--data", "y", "--device", "cuda:99"])
