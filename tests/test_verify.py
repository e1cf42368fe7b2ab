"""verify.py: each kind of damage is told of the part that has it, and of no other."""

import json
import shutil

import pytest

from crystal import export, train, verify
from crystal.runtime.config import UserError


@pytest.fixture(scope="module")
def whole(model_dirs, records_file, tmp_path_factory):
    run = train.main(
        [
            "--model", str(model_dirs[True]), "--data", str(records_file), "--latents", "2", "--lora_r", "2",
            "--val_data", str(records_file), "--max_steps", "4", "--eval_every", "2", "--save_every", "2",
            "--output", str(tmp_path_factory.mktemp("runs") / "run"),
        ]
    )  # fmt: skip
    export.main(["--run", str(run)])
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def parts(path):
    """{part's path below the run: what is said of it}, and whether all is whole."""
    lines, fine = verify.report(path)
    said = dict(line.split(": ", 1) for line in lines)
    return {name.removeprefix(f"{path}/"): words for name, words in said.items()}, fine


def test_a_run_as_it_was_written_is_whole(run):
    said, fine = parts(run)
    names = ["config.json", "metrics.jsonl"]
    names += ["checkpoints/best.json", "checkpoints/step-2", "checkpoints/step-4"]
    assert fine and said == dict.fromkeys([*names, "merged", "adapter"], "whole")
    for part in ("merged", "adapter", "checkpoints/step-2"):
        assert verify.report(run / part) == ([f"{run / part}: whole"], True)


def flip(path):
    """One bit of a file's last byte."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGE = {  # what is done: part that has it, what is said
    "a weight of merged flips": (
        lambda run: flip(run / "merged/model.safetensors"), "merged", "model.safetensors was changed",
    ),
    "the adapter loses its settings": (
        lambda run: (run / "adapter/adapter_config.json").unlink(),
        "adapter", "adapter_config.json is missing",
    ),
    "a checkpoint is cut": (
        lambda run: (run / "checkpoints/step-2/state.json").write_text("{"),
        "checkpoints/step-2", "state.json has 1 bytes instead of",
    ),
    "the best is gone": (
        lambda run: (run / "checkpoints/best.json").write_text('{"step": 9, "value": 1.0, "metric": "val"}'),
        "checkpoints/best.json", "names step 9, which is not there",
    ),
    "a bad line": (
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n[1\n{"step": 2}\n'),
        "metrics.jsonl", "line 2 is no JSON object",
    ),
    "no settings": (lambda run: (run / "config.json").unlink(), "config.json", "is missing"),
    "a killed export": (lambda run: (run / "merged.part").mkdir(), "merged.part", "that was killed"),
    "a killed replacement": (
        lambda run: (run / "adapter").rename(run / "adapter.old"), "adapter.old", "brings adapter back",
    ),
    "a killed save": (
        lambda run: (run / "checkpoints/step-6.tmp").mkdir(),
        "checkpoints/step-6.tmp", "a save that was killed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_where_it_is(run, name):
    do, part, words = DAMAGE[name]
    do(run)
    said, fine = parts(run)
    assert not fine and words in said.pop(part)
    assert set(said.values()) == {"whole"}


def test_a_last_line_that_a_kill_left_is_no_damage(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert parts(run)[1]


def test_a_directory_without_a_manifest(model_dirs, tmp_path):
    model = shutil.copytree(model_dirs[True], tmp_path / "model")
    lines, fine = verify.report(model)
    assert fine and "without a manifest a change cannot be told" in lines[0]
    raw = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(raw[:-1])
    lines, fine = verify.report(model)
    assert not fine and "model.safetensors cannot be read" in lines[0]
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "two.safetensors"}}))
    assert "two.safetensors is missing" in verify.report(model)[0][0]


def test_the_command_ends_with_1_where_something_is_broken(run, capsys):
    with pytest.raises(SystemExit) as ended:
        export.main(["--verify", str(run)])
    assert ended.value.code == 0 and capsys.readouterr().out.count(": whole\n") == 7
    flip(run / "checkpoints/step-4/trainable.safetensors")
    with pytest.raises(SystemExit) as ended:
        export.main(["--verify", str(run)])
    assert ended.value.code == 1 and "step-4: trainable.safetensors was changed" in capsys.readouterr().out


def test_what_is_neither_is_one_line(run, tmp_path):
    for arguments, message in (
        (["--verify", str(tmp_path)], "neither a run of train.py nor an export"),
        (["--verify", str(tmp_path / "none")], "no such directory"),
        ([], "--run RUN exports a run"),
        (["--run", str(run), "--verify", str(run)], "--run RUN exports a run"),
    ):
        with pytest.raises(UserError, match=message):
            export.main(arguments)
