"""The shipped adapter: its latents carry the answer to a blurred picture, and what opens it says whose it is.

Right values: cross-entropies of the two paths with and without the copy, and with zeros in the place of the
latents; the files themselves.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_carrying import mean_ce

import crystal
from crystal import opening, train
from crystal.evaluation import interventions
from crystal.evaluation.carrying import donors, of_block
from crystal.latent_copy import dual_forward
from crystal.runtime import checkpoint, data, toy
from crystal.runtime.config import UserError
from data_prep.tiny import carrying

FOLDER = Path(crystal.__file__).parent / "assets" / "tiny-crystal"
SCRIPTS = Path(__file__).resolve().parents[1] / "data_prep" / "tiny"


@pytest.fixture(scope="module")
def run():
    return crystal.open("tiny-crystal", device="cpu")


@pytest.fixture(scope="module")
def batches(run, tmp_path_factory):
    """64 scenes that nobody trained on, eight a batch -> [(records, batch)]."""
    folder = tmp_path_factory.mktemp("scenes")
    toy.generate(folder, seed=1234, train=1, val=64, test=1)
    records, _ = data.read(folder / "val.jsonl")
    blocks = [records[i : i + 8] for i in range(0, 64, 8)]
    examples = data.RecordDataset(
        records,
        lambda record, n: run.method.layout(run.format, record, n),
        run.model.image_processor,
        run.method.corruption,
    )
    pad = run.model.tokenizer.pad_token_id
    built = [[examples[0, i] for i in range(start, start + 8)] for start in range(0, 64, 8)]
    return [
        (block, data.to_device(data.collate(some, pad), torch.device("cpu"), torch.float32))
        for block, some in zip(blocks, built)
    ]


def test_it_says_what_it_is(run):
    assert run.settings.method == "crystal" and run.settings.labels == "answer" and not run.is_run
    assert str(run.method.corruption) == "blur=8:10" and run.format.count == 8
    assert run.model.name == "tiny-crystal"


@torch.no_grad()
def test_its_latents_carry_the_answer_and_without_the_copy_it_is_gone(run, batches):
    """In nats of the answer: the intact path's latents against the corrupted path's own, which the copy
    makes of them, and against zeros.
    """
    gains, by_copy, zeroed = [], [], []
    for records, batch in batches:
        numbers = of_block(run.model, run.method, batch, donors(records))
        gains += numbers["gain"].tolist()

        corrupted = {**batch, "pixel_values": batch["pixel_values_cor"]}
        _, shared = dual_forward(run.model, batch, run.method.copied(batch), "kv")
        own = run.method.hidden(run.model, corrupted)
        layers, (B, K), D = len(run.model.layers), batch["latents"].shape, own.shape[2]
        nothing = [torch.zeros(B, K, D) for _ in range(layers)]
        with interventions.replaced(run.model, batch["latents"], nothing, batch["input_ids"].shape[1]):
            without = run.method.hidden(run.model, corrupted)
        for b in range(B):
            ce = float(mean_ce(run.model, own, batch, b))
            by_copy.append(ce - float(mean_ce(run.model, shared, batch, b)))
            zeroed.append(ce - float(mean_ce(run.model, without, batch, b)))

    gains, by_copy, zeroed = map(torch.tensor, (gains, by_copy, zeroed))
    assert torch.allclose(gains, by_copy, atol=1e-4)
    half = 1.96 * gains.std() / 8
    assert gains.mean() > 0.05 and gains.mean() - half > 0
    assert zeroed.mean() < gains.mean() / 3


def test_it_is_small_and_names_no_machine():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) < 1e6
    for path in FOLDER.iterdir():
        if path.suffix != ".safetensors":
            assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text()), path
    assert json.loads((FOLDER / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    with safe_open(FOLDER / "adapter_model.safetensors", "pt") as file:
        tensors = list(file.keys())
        assert {str(file.get_tensor(key).dtype) for key in tensors} == {"torch.bfloat16"}


def test_its_settings_are_those_of_its_training():
    """crystal.json is what the demo's flags make, less what a place on a disk says."""
    said = json.loads((FOLDER / "crystal.json").read_text())
    assert said["method"] == "crystal" and said["corruption"] == "blur=8:10" and said["max_steps"] == 500
    assert not {"output", "data", "val_data", "overwrite"} & said.keys()
    settings = opening.exported_settings("tiny-crystal")
    assert (settings.lr, settings.lr_tokens, settings.latents) == (1e-3, 10, 8)
    log = (SCRIPTS / "carrying.log").read_text()
    assert "step 500  gain" in log


def test_a_run_is_shipped(model_dirs, records_file, tmp_path, capsys):
    """The last checkpoint, not the best; opened again it answers as the run does, up to half precision."""
    flags = {
        "--model": model_dirs[True], "--data": records_file, "--val_data": records_file,
        "--output": tmp_path / "r", "--method": "crystal", "--latents": 3, "--lora_r": 2, "--lr": 1e-2,
        "--max_steps": 2, "--eval_every": 1, "--save_every": 1, "--device": "cpu", "--corruption": "noise=40",
    }  # fmt: skip
    made = train.main([str(word) for pair in flags.items() for word in pair])
    checkpoint.mark_best(made, 1, 0.0, "loss")
    carrying.main(["--run", str(made), "--out", str(tmp_path / "shipped")])
    said = capsys.readouterr().out
    assert "step 2  gain" in said and "adapter_model.safetensors: " in said

    note = json.loads((tmp_path / "shipped" / "crystal.json").read_text())
    own = {"lora_r": 2, "lr": 1e-2, "max_steps": 2, "latents": 3, "corruption": "noise=40"}
    assert own.items() <= note.items() and not {"output", "data", "device", "save_every"} & note.keys()
    config = json.loads((tmp_path / "shipped" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["base_model_name_or_path"] == "tiny"
    last = load_file(made / "checkpoints" / "step-2" / "trainable.safetensors")
    A = next(tensor for name, tensor in last.items() if name.endswith("layers.0.self_attn.q_proj.lora_A"))
    stored = load_file(tmp_path / "shipped" / "adapter_model.safetensors")
    key = next(name for name in stored if name.endswith("layers.0.self_attn.q_proj.lora_A.weight"))
    assert torch.equal(stored[key], A.to(torch.bfloat16))


def test_another_adapter_answers_under_another_digest():
    assert opening.content_of("tiny-crystal") != opening.content_of("tiny")


@pytest.mark.parametrize(
    "text, line",
    [
        ("{", "crystal.json: not what crystal.export wrote"),
        ('{"method": "crystal", "latents": "many"}', "crystal.json: not what crystal.export wrote"),
        ('{"method": "x.py"}', "crystal.json: exported by x.py, a method of its own"),
        ('{"method": "crystal", "no_such": 1}', "crystal.json: not what crystal.export wrote: .*no_such"),
    ],
)
def test_a_broken_note_is_one_line(tmp_path, text, line):
    (tmp_path / "crystal.json").write_text(text)
    with pytest.raises(UserError, match=line):
        opening.exported_settings(tmp_path)
    assert opening.exported_settings(tmp_path / "elsewhere") is None
