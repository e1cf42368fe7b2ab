"""Exports that other tools load: a merged directory for transformers alone, an adapter for peft; answers equal ours."""
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from crystal import data, export, train
from crystal.config import UserError
from crystal.generate import generate

STOCK = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
directory, questions = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForImageTextToText.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
torch.set_num_threads(1)
for question, paths in questions:
    messages = [{"role": "user", "content": [{"type": "image"}] * len(paths) + [{"type": "text", "text": question}]}]
    images = processor(images=[Image.open(p) for p in paths], return_tensors="pt")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for n in (images["image_grid_thw"].prod(-1) // 4).tolist():
        text = text.replace("<|image_pad|>", "<|placeholder|>" * n, 1)
    ids = tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"), return_tensors="pt")
    kinds = (ids["input_ids"] == model.config.image_token_id).int()
    out = model.generate(**ids, **images, mm_token_type_ids=kinds, max_new_tokens=5, do_sample=False)
    print(json.dumps(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip()))
assert "crystal" not in sys.modules
"""


@pytest.fixture(scope="module")
def runs(model_dirs, records_file, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("runs"), {}
    for name, tied, more in (("crystal", True, []), ("untied", False, []), ("full", True, ["--tune", "full"]), ("sft", True, ["--method", "sft"]),
                             ("released", False, ["--preset", "released"])):
        made[name] = train.main(["--model", str(model_dirs[tied]), "--data", str(records_file), "--latents", "3", "--lora_r", "2", "--lr", "1e-2", "--max_steps", "3",
                                 "--eval_every", "0", "--log_every", "9", "--output", str(root / name), *more])
    return made


@pytest.mark.parametrize("name", ["crystal", "untied", "full", "sft", "released"])
def test_merged_directory_answers_as_we_do_in_transformers_alone(runs, name, records_file, model_dirs, tmp_path):
    run = runs[name]
    export.export(run, merged=run / "merged", adapter=run / "adapter")
    records, _ = data.read(records_file)
    model, fmt, _ = export.open_model(run)
    ours = []
    for r in records:
        images = model.image_processor(images=[Image.open(p) for p in r.images], return_tensors="pt")
        ids, _, _ = fmt.question(r.turns, model.image_tokens(images["image_grid_thw"]))
        ours.append(generate(model, [(ids, images["pixel_values"], images["image_grid_thw"])], fmt, 5)[0])
    asked = [(r.turns[-1][1].replace("<image>", "").strip(), [str(p) for p in r.images]) for r in records]
    done = subprocess.run([sys.executable, "-c", STOCK, str(run / "merged"), json.dumps(asked)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(x) for x in done.stdout.splitlines()] == ours
    assert any(ours)
    # untouched weights are the base's to the bit
    merged, base = load_file(run / "merged" / "model.safetensors"), load_file(model_dirs[name not in ("untied", "released")] / "model.safetensors")
    touched = ("visual",) if name != "released" else ("visual.patch_embed",)
    same = [n for n in base if any(t in n for t in touched) or n.endswith("norm.weight") and name != "full"]
    assert same and all(torch.equal(merged[n], base[n]) for n in same)
    assert any(not torch.equal(merged[n], base[n]) for n in base)


@pytest.mark.parametrize("name", ["crystal", "untied"])
def test_adapter_loads_in_peft_with_equal_logits(runs, name, setup):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    run = runs[name]
    export.export(run, adapter=run / "adapter")
    model, fmt, settings = export.open_model(run)
    stock = AutoModelForImageTextToText.from_pretrained(json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"], dtype=torch.float32)
    peft = PeftModel.from_pretrained(stock, run / "adapter").eval()
    b = setup(tied=name == "crystal", dtype=torch.float32).batch
    with torch.no_grad():
        ours = model.logits(model.hidden(b))
        theirs = peft(input_ids=b["input_ids"], pixel_values=b["pixel_values"], image_grid_thw=b["image_grid_thw"], mm_token_type_ids=b["mm_token_type_ids"],
                      attention_mask=b["attention_mask"]).logits
    real = b["attention_mask"].bool()
    assert (ours[real] - theirs[real]).abs().max() < 1e-4 and ours[real].abs().max() > 0.1


def test_the_generation_prompt_opens_the_answer(runs):
    from transformers import AutoTokenizer
    run = runs["crystal"]
    export.export(run, merged=run / "merged")
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n<think> Because the feature of the image is<|latent_0|><|latent_1|><|latent_2|>. </think><answer>")
    assert "<think>" not in tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert not list(run.glob("*.part"))


def test_checkpoints_are_found_or_named(runs, tmp_path):
    run = runs["sft"]
    assert export.find(run, "best") == export.find(run, "last") == export.find(run, "3")
    for which, message in (("4", "no checkpoint '4'"), ("newest", "best, last or a step")):
        with pytest.raises(UserError, match=message):
            export.find(run, which)
    with pytest.raises(UserError, match="not a run directory"):
        export.export("tiny", merged=tmp_path / "m")
