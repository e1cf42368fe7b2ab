"""The pictures of a run: three files, of records spread over families, and wrong input is one clear line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from crystal import methods, train, visualize
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


def test_a_run_gives_a_page(model_dirs, records_file, tmp_path, capsys):
    """From the command to a file: three questions, two drawn, and the run's own terms."""
    run = train.main(
        [
            "--model", str(model_dirs[True]), "--data", str(records_file), "--output", str(tmp_path / "run"),
            "--max_steps", "2", "--latents", "3", "--lora_r", "2", "--device", "cpu",
        ]
    )
    capsys.readouterr()
    file = tmp_path / "page.html"
    visualize.main(["--run", str(run), "--html", str(file), "--count", "2", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB"
    text = file.read_text()
    assert text.count('<article class="sample"') == 2 and "What colour is the star?" in text
    terms = ("loss", "ce_int", "ce_cor", "kl", "attn")
    assert all(f"<figcaption>{term}</figcaption>" in text for term in terms)
    assert text.count("<b>latents: swapped</b>") == 3  # of two samples, and in the table
    assert file.stat().st_size < 1e6


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--html", "x.html", "--out", "y"], "--out changes nothing with --html"),
        (["--data", "y", "--questions", "7"], "--questions changes nothing without --html"),
        ([], "--data names the records"),
        (["--html", "x.html", "--count", "0"], "--count 0, --questions 100: at least 1"),
        (["--html", "x.html", "--questions", "3"], "--count 4, --questions 3: .* as many questions"),
        (["--html", "x.html"], "no metrics.jsonl in it"),
    ],
)
def test_flags_that_mean_nothing_are_one_line(flags, message, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        visualize.main(["--run", str(tmp_path), "--device", "cpu", *flags])
    assert "\n" not in str(refused.value)


def test_a_run_without_records_of_its_own_wants_some(model_dirs, records_file, tmp_path, monkeypatch):
    """Scenes that were made for a run may be gone; records without a picture or an answer are not asked."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}))
    settings = methods.parse(["--model", str(model_dirs[True]), "--method", "sft"])
    monkeypatch.setattr(visualize, "open_model", lambda *args, **how: (None, None, settings))
    monkeypatch.setattr(visualize, "find", lambda *args: tmp_path / "step-1")
    with pytest.raises(UserError, match="was trained on scenes made for it; --data names the records"):
        visualize.write_page(tmp_path, "", tmp_path / "page.html")
    line = json.loads(records_file.read_text().splitlines()[0])
    del line["images"]
    line["conversations"][0]["value"] = "What?"
    (tmp_path / "text.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"text\.jsonl: no record with an image and an answer"):
        visualize.write_page(tmp_path, tmp_path / "text.jsonl", tmp_path / "page.html")
    (tmp_path / "broken.jsonl").write_text(json.dumps(line) + "\n{}\n")
    with pytest.raises(UserError, match=r"broken\.jsonl:2"):
        visualize.write_page(tmp_path, tmp_path / "broken.jsonl", tmp_path / "page.html")


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="--device cuda:99"):
        visualize.main(["--run", "x", "--data", "y", "--device", "cuda:99"])
