"""card.py: what an export says of itself is the run's own, and of the checkpoint that is exported alone."""

import json
import os
import re
from dataclasses import replace

import pytest

import crystal.backbone.model
from crystal import card, export, methods, opening, train


@pytest.fixture
def run(model_dirs, records_file, tmp_path):
    return train.main(
        [
            "--model", str(model_dirs[True]), "--data", str(records_file), "--latents", "3", "--lora_r", "5",
            "--max_steps", "4", "--eval_every", "2", "--batch_size", "1", "--accumulation", "3",
            "--val_data", str(records_file), "--log_every", "9", "--seed", "11",
            "--teacher_grad", "--output", str(tmp_path / "a run"),
        ]
    )  # fmt: skip


def cards(run, which="best"):
    export.export(run, which, run / "merged", run / "adapter")
    return [(run / kind / "README.md").read_text() for kind in ("merged", "adapter")]


def test_a_card_says_what_made_it_and_how_to_load_it(run, model_dirs, records_file):
    merged, adapter = cards(run)
    made = json.loads((run / "config.json").read_text())
    record = json.loads((run / "checkpoints" / "best.json").read_text())
    for text in (merged, adapter):
        head, table = text.split("---\n")[1], text.split("---\n")[2]
        assert "base_model" not in head and "license" not in head  # a path of this machine says neither
        assert f"| base | `{model_dirs[True]}` |" in table and f"`{records_file}`" in table
        assert "| latents | 3 in the prompt" in table and "| seed | 11 |" in table
        assert f"adapters of rank 5; {record['step']} updates of 3 pairs" in table
        assert f"torch {made['versions']['torch']}" in table
        command = re.search(r"python -m crystal.train .*", text)[0]
        for flag in ("--method crystal", "--accumulation 3", "--seed 11", "--teacher_grad", "--latents 3"):
            assert flag in command
        assert "--output" not in command and "--log_every" not in command and "--lr" not in command
        assert f"{record['value']:.4f} at update {record['step']}" in text
        assert "That of its base" in text
    assert 'library_name: "transformers"' in merged and 'LLM("DIR")' in merged and "bad_words" not in merged
    assert 'library_name: "peft"' in adapter and f'from_pretrained("{model_dirs[True]}")' in adapter


def test_a_card_tells_the_evaluations_of_its_own_checkpoint_alone(run):
    asked = {
        "model": str(run), "checkpoint": "best", "latents": "drop", "limit": 7, "grey": True,
        "bottleneck": False, "corruption": "blur=8:10",
    }  # fmt: skip
    scores = {"count": {"right": 0.625, "rows": 40, "interval": [0.47, 0.758]}}
    folder = run / "evaluation"
    folder.mkdir()
    for name, digest in (("own", opening.content_of(str(run))), ("other", "0" * 64)):
        about = {"settings": asked | {"model_sha256": digest, "data": f"{name}.jsonl"}, "families": scores}
        (folder / f"{name}.json").write_text(json.dumps(about))
    (folder / "broken.json").write_text("[]")

    text, _ = cards(run)
    assert "| count | 40 | 62.5 | 47.0 to 75.8 |" in text and "other.jsonl" not in text
    shown = "--data own.jsonl --latents drop --corruption blur=8:10 --grey --limit 7"
    assert shown in text and "--bottleneck" not in text
    assert "`evaluation/broken.json` could not be read." in text


def test_a_card_says_whether_its_latents_carry(run):
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    step = json.loads((run / "checkpoints" / "best.json").read_text())["step"]

    def measured(**numbers):
        before = [line for line in lines if "val_swap" not in line]
        after = [{"step": step, **numbers}, {"step": step + 1, "val_swap": 9.0, "val_swap_pm": 0.1}]
        log.write_text("".join(json.dumps(line) + "\n" for line in before + after))

    measured(val_swap=0.25, val_swap_pm=0.125)
    assert "cost 0.250 ±0.125 nats of the answer: they carry something" in cards(run)[0]
    measured(val_swap=0.125, val_swap_pm=0.25)
    assert "±0.250 nats of the answer: that they carry anything is not shown" in cards(run)[1]
    measured(val_gain=0.5, val_gain_pm=0.125, val_swap=0.125, val_swap_pm=0.25)
    both = (
        f"At update {step} the intact picture's latents, given to the corrupted one, are worth 0.500 ±0.125 "
        f"nats of the answer: they carry something. At update {step} another record's latents cost 0.125 ±"
    )
    assert both in cards(run)[0]
    measured(val_loss=1.0)
    assert "Not measured. `python -m crystal.evaluate --model" in cards(run)[0]

    folder = run / "reliance" / "test"
    folder.mkdir(parents=True)
    said = {
        "model": str(run), "checkpoint": "best", "data": "test.jsonl", "questions": 12,
        "verdict": "They are used.", "conditions": [{"condition": "as trained", "right": 0.75}],
    }  # fmt: skip
    (folder / "reliance.json").write_text(json.dumps(said))
    text, _ = cards(run)
    assert "They are used." in text and "| as trained | 75.0 |" in text and "--reliance --limit 12" in text

    # Of a checkpoint that was written after it, or of another one, it says nothing.
    os.utime(folder / "reliance.json", (1, 1))
    assert "They are used." not in cards(run)[0]
    os.utime(folder / "reliance.json")
    (folder / "reliance.json").write_text(json.dumps(said | {"checkpoint": str(6 - step)}))
    assert step in (2, 4) and "They are used." not in cards(run)[0]


def test_a_card_of_latents_that_are_fed_back_warns_every_tool(run, tmp_path):
    model = crystal.backbone.model.load("tiny")
    settings = methods.parse(["--method", "valr", "--latents", "5", "--encoders", "none"])
    _, fmt = methods.attach(model, settings)
    begin = model.tokenizer.convert_tokens_to_ids("<latent>")
    card.write(tmp_path, run, "best", settings, fmt, "merged")
    text = (tmp_path / "README.md").read_text()
    assert 'max_tokens=64, bad_words=["<latent>"]' in text and 'license: "mit"' in text
    assert "5 before each step" in text and "with and without `--latents drop`" in text
    card.write(tmp_path, run, "best", settings, fmt, "adapter")
    assert f"suppress_tokens=[{begin}]" in (tmp_path / "README.md").read_text()


def test_names_of_a_hub_are_told_and_odd_ones_break_nothing(run, tmp_path):
    _, fmt, settings = opening.open_model(run)
    card.write(tmp_path, run, "best", replace(settings, model="owner/base"), fmt, "merged")
    assert 'base_model: "owner/base"' in (tmp_path / "README.md").read_text()
    card.write(tmp_path, run, "best", replace(settings, data="a|b`\n# no title"), fmt, "merged")
    text = (tmp_path / "README.md").read_text()
    assert "| data | `a¦b'?# no title` |" in text
    assert text.count("\n# ") == 1 + text.split("```bash")[1].split("```")[0].count("\n# ")
