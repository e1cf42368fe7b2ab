"""adapter.py: an adapter's directory, ours or one that peft wrote, answers as the model that was trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import crystal.backbone.model
from crystal import export, opening, train
from crystal.backbone import adapter
from crystal.generate import ask
from crystal.runtime import data
from crystal.runtime.config import UserError


def trained(model, records_file, output, *more):
    return train.main(
        [
            "--model", str(model), "--data", str(records_file), "--latents", "3", "--lora_r", "2",
            "--lr", "1e-2", "--max_steps", "3", "--eval_every", "0", "--log_every", "9",
            "--output", str(output), *more,
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(model_dirs, records_file, tmp_path_factory):
    """{tied: a run whose adapter is exported}."""
    made = {}
    for tied in (True, False):
        run = trained(model_dirs[tied], records_file, tmp_path_factory.mktemp("runs") / "run")
        export.export(run, adapter=run / "adapter")
        made[tied] = run
    return made


@pytest.mark.parametrize("tied", [True, False])
def test_our_adapter_answers_as_its_run_does(runs, records_file, tied):
    records, _ = data.read(records_file)
    ours, fmt, _ = opening.open_model(runs[tied])
    theirs, plain, settings = opening.open_model(runs[tied] / "adapter")
    assert settings is None
    for r in records:
        question = r.turns[-1][1].replace("<image>", "").strip()
        said = ask(ours, fmt, r.images, question, 5)
        assert said and ask(theirs, plain, r.images, question, 5) == said

    ids = torch.arange(0, 40)[None]
    with torch.no_grad():
        right = ours.hf(input_ids=ids).logits
        found = theirs.hf(input_ids=ids).logits
        base = crystal.backbone.model.load(ours.name).hf(input_ids=ids).logits
    assert (right - found).abs().max() < 1e-4 < 1e-2 < (right - base).abs().max()


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_that_peft_wrote(model_dirs, tmp_path, stabilised):
    """Modules by the ends of their names, an alpha that is not twice the rank, a row of the vocabulary, and
    a matrix that was trained whole.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(1)
    stock = AutoModelForImageTextToText.from_pretrained(model_dirs[False], dtype=torch.float32)
    model = get_peft_model(
        stock,
        LoraConfig(
            r=3,
            lora_alpha=12,
            use_rslora=stabilised,
            target_modules=["q_proj", "gate_proj", "attn.proj"],
            modules_to_save=["linear_fc2", "o_proj"],
            trainable_token_indices={"embed_tokens": [7, 3]},
        ),
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path)
    ids = torch.arange(0, 40)[None]
    with torch.no_grad():
        right = model.eval()(input_ids=ids).logits
        found = adapter.load(tmp_path).hf(input_ids=ids).logits
        base = crystal.backbone.model.load(str(model_dirs[False])).hf(input_ids=ids).logits
    assert (right - found).abs().max() < 1e-4 < 1e-2 < (right - base).abs().max()


def test_an_adapter_of_latents_that_are_fed_back(model_dirs, records_file, tmp_path):
    run = trained(
        model_dirs[True], records_file, tmp_path / "run", "--method", "valr", "--encoders", "none",
        "--tune", "lora",
    )  # fmt: skip
    export.export(run, adapter=run / "adapter")
    _, fmt, _ = opening.open_model(run / "adapter")
    assert fmt.feeds_back and fmt.count == 3


def put(adapter_dir, **changes):
    file = adapter_dir / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


WRONG = [
    ({"peft_type": "IA3"}, "adapter_config.json: peft_type is 'IA3'"),
    ({"use_dora": True}, "adapter_config.json: use_dora is True"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"r": 0}, "r is 0"),
    ({"r": 4}, "with r 4 the base's weight"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
    ({"base_model_name_or_path": "/nowhere/base"}, "or_path: /nowhere/base: no such directory"),
    ({"base_model_name_or_path": "tiny"}, "has shape"),
    ({"trainable_token_indices": None}, "has no place in"),
    ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "for 2 tokens of a vocabulary"),
]


@pytest.mark.parametrize("changes, message", WRONG)
def test_what_does_not_fit_is_one_line(runs, tmp_path, changes, message):
    where = shutil.copytree(runs[True] / "adapter", tmp_path / "adapter")
    put(where, **changes)
    with pytest.raises(UserError) as error:
        opening.open_model(where)
    assert message in str(error.value) and "\n" not in str(error.value) and "adapter" in str(error.value)


def test_damaged_files_are_one_line(runs, tmp_path):
    where = shutil.copytree(runs[True] / "adapter", tmp_path / "adapter")
    state = load_file(where / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.layers.0.mlp.sideways"
    save_file(state | {name: torch.zeros(2)}, where / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"adapter_model.safetensors: key {name} has no place"):
        opening.open_model(where)
    one = next(n for n in state if n.endswith("lora_B.weight"))
    save_file({n: t for n, t in state.items() if n != one}, where / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lora_A.weight has no place"):
        opening.open_model(where)
    (where / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        opening.open_model(where)
    (where / "adapter_config.json").write_text("[1")
    with pytest.raises(UserError, match="not a readable adapter config"):
        opening.open_model(where)


def test_an_adapter_is_no_base(runs):
    with pytest.raises(UserError, match="an adapter, which answers but is no base"):
        crystal.backbone.model.load(str(runs[True] / "adapter"))


def test_stored_answers_know_an_adapter_and_its_base(runs, model_dirs, tmp_path):
    where = shutil.copytree(runs[True] / "adapter", tmp_path / "adapter")
    base = shutil.copytree(model_dirs[True], tmp_path / "base")
    put(where, base_model_name_or_path=str(base))
    first = opening.content_of(str(where))
    assert opening.content_of(str(where)) == first
    (base / "another.txt").write_text("of another base")
    second = opening.content_of(str(where))
    put(where, r=3)
    assert len({first, second, opening.content_of(str(where))}) == 3
