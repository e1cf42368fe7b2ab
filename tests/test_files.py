"""Model directories with one thing wrong each: one line, exit code 2, which names directory, file and field.

Templates wherever models keep them are found, and quantised weights are refused with what to take instead.
"""

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import crystal.backbone.model
from crystal import generate
from crystal.backbone import encoders, files
from crystal.layout import Format
from crystal.runtime import config

WEIGHTS = "model.safetensors"


def edit(file, **changes):
    """A change of a directory's JSON file: `part__field=value`; a value of ... takes the field out."""

    def change(path):
        found = json.loads((path / file).read_text())
        for name, value in changes.items():
            *parts, last = name.split("__")
            place = found
            for part in parts:
                place = place[part]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        (path / file).write_text(json.dumps(found))

    return change


def gone(*names):
    return lambda path: [(path / name).unlink() for name in names]


def text(file, content):
    return lambda path: (path / file).write_text(content)


def rename_token(path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = path / name
        file.write_text(file.read_text().replace("<|image_pad|>", "<|other_pad|>"))


def cut(share):
    def change(path):
        data = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(data[: int(len(data) * share)])

    return change


def sharded(**shards):
    def change(path):
        (path / WEIGHTS).rename(path / "model-1.safetensors")
        (path / files.INDEX).write_text(json.dumps(shards))

    return change


def lying_header(path):
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + data[8:])


def without_layers(path):
    state = {n: t for n, t in load_file(path / WEIGHTS).items() if ".layers.2." not in n}
    save_file(state, path / WEIGHTS, metadata={"format": "pt"})


CONFIG, PIXELS, TEMPLATE = "config.json", "preprocessor_config.json", "chat_template.jinja"
DAMAGE = {  # what is done to the directory, and what the line says after its name
    # config.json
    "no config": (gone(CONFIG), "no config.json"),
    "config is not JSON": (text(CONFIG, '{"model_type": '), "config.json:1: not JSON"),
    "config is empty": (text(CONFIG, ""), "config.json:1: not JSON"),
    "config is a list": (text(CONFIG, "[]"), "config.json: a JSON object is wanted, not a list"),
    "no model type": (edit(CONFIG, model_type=...), "config.json: field 'model_type': None"),
    "a model type of no kind": (edit(CONFIG, model_type=7), "config.json: field 'model_type': 7"),
    "another type": (edit(CONFIG, model_type="qwen2"), "model type 'qwen2' has no row"),
    "a family beside": (edit(CONFIG, model_type="qwen3_vl"), "config.json|weights are not this model's|pre"),
    "text config is a text": (edit(CONFIG, text_config="x"), "config.json: field 'text_config': 'x'"),
    "vision config is null": (edit(CONFIG, vision_config=None), "config.json: field 'vision_config': None"),
    "width is a text": (edit(CONFIG, text_config__hidden_size="x"), "config.json: .*'hidden_size'.*int"),
    "width below zero": (edit(CONFIG, text_config__hidden_size=-4), "config.json: field 'hidden_size': -4"),
    "width doubled": (
        edit(CONFIG, text_config__hidden_size=64),
        "config.json: field 'vision_config': out_hid",
    ),
    "no layers": (
        edit(CONFIG, text_config__num_hidden_layers=0),
        "config.json: .*num_hidden_layers|layer_types",
    ),
    "heads do not divide": (
        edit(CONFIG, text_config__num_attention_heads=5),
        "config.json: field 'num_attent",
    ),
    "groups do not divide": (
        edit(CONFIG, text_config__num_key_value_heads=3),
        "config.json: field 'num_key_v",
    ),
    "vision heads do not divide": (
        edit(CONFIG, vision_config__num_heads=3),
        "config.json: field 'vision_conf",
    ),
    "an activation of no kind": (
        edit(CONFIG, text_config__hidden_act="nope"),
        "cannot be loaded as a model: .*nope",
    ),
    "a rotation of no kind": (
        edit(CONFIG, text_config__rope_parameters="x"),
        "config.json: .*rope_parameters",
    ),
    "few rows": (edit(CONFIG, text_config__vocab_size=100), "config.json: field 'vocab_size': 100, the tok"),
    "many rows": (
        edit(CONFIG, text_config__vocab_size=700),
        "weights are not this model's: of another shape",
    ),
    "another image token": (edit(CONFIG, image_token_id=3), "config.json: field 'image_token_id': 3, the"),
    # weights
    "no weights": (gone(WEIGHTS), "cannot be loaded as a model: .*safetensors"),
    "weights cut at the end": (cut(0.9), "model.safetensors: not a whole safetensors file"),
    "weights cut in the header": (cut(0.001), "model.safetensors: not a whole safetensors file"),
    "weights of no bytes": (cut(0), "model.safetensors: not a whole safetensors file"),
    "a header that lies": (lying_header, "model.safetensors: not a whole safetensors file"),
    "a layer is missing": (without_layers, "weights are not this model's: the files lack model"),
    "index without shards": (
        sharded(weight_map={"lm_head.weight": "model-9.safetensors"}),
        "model-9.safetensors: not there, and model.safetensors.index.json names it",
    ),
    "index without a map": (sharded(metadata={}), "model.safetensors.index.json: field 'weight_map': an obj"),
    "index that leaves": (
        sharded(weight_map={"a": "../b.safetensors"}),
        "index.json: field 'weight_map': names",
    ),
    "index is not JSON": (
        lambda path: [gone(WEIGHTS)(path), text(files.INDEX, "{")(path)],
        "model.safetensors.index.json:1: not JSON",
    ),
    # tokenizer and template
    "no tokenizer": (gone("tokenizer.json"), "no tokenizer.json"),
    "tokenizer is not JSON": (text("tokenizer.json", "{"), "tokenizer.json: "),
    "tokenizer of nothing": (text("tokenizer.json", "{}"), "tokenizer.json: "),
    "tokenizer config is not JSON": (text("tokenizer_config.json", "{"), "tokenizer.json: "),
    "no image token": (rename_token, "tokenizer.json: no token <|image_pad|>"),
    "no template": (gone(TEMPLATE), "no chat template"),
    "template of text alone": (
        text(TEMPLATE, "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
        "chat_template.jinja: field 'chat_template': shows an image of a message as 0 <|image_pad|>",
    ),
    "template without texts": (
        text(TEMPLATE, "<|image_pad|>"),
        "chat_template.jinja: field 'chat_template': leaves the text of a message out",
    ),
    "template is no program": (text(TEMPLATE, "{% if %}"), "field 'chat_template': cannot be rendered"),
    "template that fails": (text(TEMPLATE, "{{ messages.no.such }}"), "'chat_template': cannot be rendered"),
    # preprocessor_config.json
    "no preprocessor": (gone(PIXELS), "preprocessor_config.json: "),
    "preprocessor is not JSON": (text(PIXELS, "{"), "preprocessor_config.json: "),
    "mean is a text": (edit(PIXELS, image_mean="x"), "preprocessor_config.json: field 'image_mean': 'x'"),
    "mean of two": (edit(PIXELS, image_mean=[0.5, 0.5]), "preprocessor_config.json: field 'image_mean'"),
    "deviation of zero": (
        edit(PIXELS, image_std=[0.5, 0, 0.5]),
        "preprocessor_config.json: field 'image_std'",
    ),
    "patches are a text": (edit(PIXELS, patch_size="x"), "preprocessor_config.json: field 'patch_size': 'x'"),
    "other patches": (
        edit(PIXELS, patch_size=16),
        "field 'patch_size': 16, config.json's vision_config.patch",
    ),
    "other merge": (
        edit(PIXELS, merge_size=1),
        "preprocessor_config.json: field 'merge_size': 1, config.json's",
    ),
    "bounds are a text": (edit(PIXELS, min_pixels="a"), "preprocessor_config.json: "),
    "bounds exchanged": (
        edit(PIXELS, min_pixels=12544, max_pixels=3136),
        "preprocessor_config.json: field 'min",
    ),
    "another processor": (
        edit(PIXELS, image_processor_type="CLIPImageProcessor"),
        "preprocessor_config.json: ",
    ),
    "a processor of no kind": (edit(PIXELS, image_processor_type="Nope"), "preprocessor_config.json: "),
}


@pytest.fixture
def copy(model_dirs, tmp_path):
    return shutil.copytree(model_dirs[False], tmp_path / "model")


@pytest.mark.parametrize("damage, says", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_directory_is_one_line(copy, capsys, damage, says):
    damage(copy)
    with pytest.raises(SystemExit) as ended:
        config.run_cli(lambda: generate.main(["--model", str(copy), "--question", "What?"]))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and "Traceback" not in told
    assert told.startswith(f"error: {copy}: ")
    found = told.removeprefix(f"error: {copy}: ")
    assert re.search(says.replace("<|image_pad|>", r"<\|image_pad\|>"), found), found


# --- templates ---


def moved_to(place):
    """Takes the template out of chat_template.jinja; `place` puts it elsewhere."""

    def change(path):
        template = (path / TEMPLATE).read_text()
        (path / TEMPLATE).unlink()
        place(path, template)
        return template

    return change


def in_json(file):
    return moved_to(lambda path, t: (path / file).write_text(json.dumps({"chat_template": t})))


def in_tokenizer(path, template):
    edit("tokenizer_config.json", chat_template=template)(path)


def named_templates(path, template):
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    in_tokenizer(path, several)


def beside_a_text_only_one(path, template):
    in_tokenizer(path, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))


@pytest.mark.parametrize(
    "place",
    [
        in_json("chat_template.json"), in_json("processor_config.json"), moved_to(in_tokenizer),
        moved_to(named_templates), moved_to(beside_a_text_only_one),
    ],
    ids=["chat_template.json", "processor_config.json", "tokenizer", "named", "beside text"],
)
def test_a_template_is_found_wherever_it_lives(copy, model_dirs, place):
    template = place(copy)
    model = crystal.backbone.model.load(str(copy))
    assert model.tokenizer.chat_template == template
    turns = [("user", "<image>\nWhat is it?")]
    usual = crystal.backbone.model.load(str(model_dirs[False]))
    prompts = [Format(m.tokenizer).prompt(turns, [4]) for m in (model, usual)]
    assert prompts[0] == prompts[1] and prompts[0][1]


# --- quantised ---


@pytest.mark.parametrize(
    "rules",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ],
    ids=lambda rules: rules["quant_method"],
)
@pytest.mark.parametrize("part", ["", "text_config__"])
def test_quantised_weights_are_refused_with_what_to_take_instead(copy, rules, part):
    edit(CONFIG, **{f"{part}quantization_config": rules})(copy)
    found = f"^{copy}: config.json: field 'quantization_config': {rules['quant_method']}: quantised weights"
    with pytest.raises(config.UserError, match=f"{found}[^\n]*take the model that it was made from[^\n]*$"):
        crystal.backbone.model.load(str(copy))


@pytest.mark.parametrize("file, kind", files.QUANTISERS.items())
def test_a_quantisers_own_file_is_enough(copy, file, kind):
    (copy / file).write_text("{}")
    with pytest.raises(config.UserError, match=f"^{copy}: {file}: {kind}: quantised weights"):
        crystal.backbone.model.load(str(copy))


def test_quantised_encoders_are_refused_too(tmp_path):
    rules = {"quant_method": "awq", "bits": 4}
    kind = {"model_type": "dinov2", "quantization_config": rules, "hidden_size": 32, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(kind))
    with pytest.raises(config.UserError, match=f"^--encoders {tmp_path}: .*awq: quantised weights"):
        encoders.load(str(tmp_path))


def test_a_text_longer_than_the_tokenizers_number_is_no_warning(copy, caplog, capsys):
    """The model's own limit decides, over the whole sequence; the tokenizer's is another number."""
    edit("tokenizer_config.json", model_max_length=8)(copy)
    model = crystal.backbone.model.load(str(copy))
    assert len(Format(model.tokenizer).text("many words " * 20)) > 8
    assert "maximum" not in capsys.readouterr().err + caplog.text
    assert torch.is_tensor(model.hf.lm_head.weight)
