"""Runs of commit 9890c43, kept in tests/old, open, ask and go on; an old flag says its new name in one line.

Each was stopped after the second of four updates; metrics.jsonl holds what the old code logged for all four.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crystal import methods, opening, train
from crystal.generate import generate
from crystal.runtime import renamed
from crystal.runtime.config import UserError

ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests" / "old"

# Each run, and the flags that it would have today.
COMMON = [
    "--data", "tests/old/records.jsonl", "--max_steps", "4", "--save_every", "2", "--eval_every", "0",
    "--latents", "2", "--device", "cpu",
]
RUNS = {
    "released": [
        "--method", "released", "--latent_copy", "hidden", "--lora_r", "1", "--lr_tokens", "2",
        "--lr", "1e-2", "--lora_on", "language",
    ],
    "rows": ["--method", "livr", "--tune", "tokens", "--lr", "1e-2", "--batch_size", "1"],
    "positions": ["--answer_positions", "span", "--tune", "tokens", "--lr", "1e-2"],
}


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """copied(name) -> a copy of an old run, in the folder from which it named its records."""
    monkeypatch.chdir(ROOT)
    return lambda name: Path(shutil.copytree(OLD / name, tmp_path / name))


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_opens_under_todays_names(copied, name):
    model, fmt, settings = opening.open_model(copied(name))
    today = methods.parse(
        [*RUNS[name], *COMMON, "--keep", "2", "--log_every", "1", "--output", f"tests/old/{name}"]
    )
    today = replace(today, dtype=settings.dtype)  # what "auto" meant is saved
    assert settings == today
    prompt = fmt.question([("user", "Hello")], [])[0]
    assert fmt.count == 2 and len(generate(model, [(prompt, None, None)], fmt, 2)) == 1


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_goes_on(copied, name):
    """Its third and fourth update have the losses that the old code logged, so weights and
    moments found their places.
    """
    run = copied(name)
    expected = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train.main([*RUNS[name], *COMMON, "--keep", "2", "--log_every", "1", "--output", str(run), "--resume"])
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3, 4]
    for line, old in zip(found[2:], expected[2:]):
        for term in old.keys() - {"tokens_per_s", "peak_memory_gb"}:
            assert line[term] == pytest.approx(old[term], rel=1e-3, abs=1e-5), term


def test_todays_names_are_left_as_they_are():
    today = {"latent_copy": "kv", "tune": "tokens", "method": "crystal", "lr_tokens": 2.0}
    assert renamed.settings(today) == today
    tensors = {"model.new_tokens.head": torch.zeros(1), "model.hf.rows.rows": torch.ones(1)}
    assert renamed.tensors(tensors) == tensors


def test_old_tensors_have_todays_names():
    old = ["model.rows.rows", "model.rows.head_rows", "model.rows.rows.exp_avg", "model.rows.head_rows.step"]
    new = [
        "model.new_tokens.embedding",
        "model.new_tokens.head",
        "model.new_tokens.embedding.exp_avg",
        "model.new_tokens.head.step",
    ]
    tensors = [torch.full((1,), float(i)) for i in range(4)]
    assert renamed.tensors(dict(zip(old, tensors))) == dict(zip(new, tensors))


def test_a_preset_of_a_file_of_ones_own_goes():
    """What it chose is saved in every setting; which method a file defines is the file's own."""
    assert renamed.settings({"preset": "released", "method": "/x/mine.py", "ce": "pooled"}) == {
        "method": "/x/mine.py",
        "ce": "pooled",
    }


def test_the_two_ends_of_a_strength_stand_behind_its_mode():
    old = {"method": "crystal", "corruption": "mask", "strength_low": 0.25, "strength_high": 0.3}
    assert renamed.settings(old) == {"method": "crystal", "corruption": "mask=0.25:0.3"}
    own = {"method": "crystal", "corruption": "mask", "strength_low": None, "strength_high": None}
    assert renamed.settings(own) == {"method": "crystal", "corruption": "mask"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--realisation", "kv"], "--realisation is now --latent_copy"),
        (["--lr_rows=2"], "--lr_rows is now --lr_tokens"),
        (["--answer_rows", "span"], "--answer_rows is now --answer_positions"),
        (["--tune", "rows"], "--tune rows is now --tune tokens"),
        (["--tune=rows"], "--tune rows is now --tune tokens"),
        (["--preset", "released"], "--preset released is now --method released"),
        (["--strength_low", "2"], "--strength_low is now part of --corruption, as in --corruption blur=2:8"),
        (["--strength_high=2"], "--strength_high is now part of --corruption, as in --corruption blur=2:8"),
        (["--preset", "paper"], "--preset paper is now --method crystal"),
    ],
)
def test_an_old_flag_ends_in_one_line(flags, message):
    with pytest.raises(UserError) as refused:
        methods.parse(["--max_steps", "2", *flags])
    assert str(refused.value) == message


def test_values_that_look_like_old_flags_are_left():
    assert methods.parse(["--output", "realisation", "--image_root", "rows"]).image_root == "rows"
