"""Exports that other tools load: a merged directory for transformers alone, an adapter for
peft; answers equal ours.
"""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, put_in, write_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import crystal.backbone.model
from crystal import export, lora, methods, opening, train
from crystal.generate import generate
from crystal.runtime import data
from crystal.runtime.config import UserError

STOCK = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
torch.set_num_threads(1)
for directory in sys.argv[2:]:
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    answers = []
    for question, paths in json.loads(sys.argv[1]):
        messages = [{"role": "user", "content": [{"type": "image"}] * len(paths) + [{"type": "text", "text": question}]}]
        images = processor(images=[Image.open(p) for p in paths], return_tensors="pt")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for n in (images["image_grid_thw"].prod(-1) // 4).tolist():
            text = text.replace("<|image_pad|>", "<|placeholder|>" * n, 1)
        ids = tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"), return_tensors="pt")
        kinds = (ids["input_ids"] == model.config.image_token_id).int()
        out = model.generate(**ids, **images, mm_token_type_ids=kinds, max_new_tokens=5, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip())
    print(json.dumps(answers))
assert "crystal" not in sys.modules
"""  # noqa: E501


@pytest.fixture(scope="module")
def runs(model_dirs, records_file, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("runs"), {}
    for name, tied, more in (
        ("crystal", True, []),
        ("untied", False, []),
        ("full", True, ["--tune", "full"]),
        ("sft", True, ["--method", "sft"]),
        ("released", False, ["--method", "released"]),
    ):
        made[name] = train.main(
            [
                "--model", str(model_dirs[tied]), "--data", str(records_file), "--latents", "3",
                "--lora_r", "2", "--lr", "1e-2", "--max_steps", "3", "--eval_every", "0", "--log_every", "9",
                "--output", str(root / name), *more,
            ]
        )
    return made


@pytest.fixture(scope="module")
def theirs(runs, records_file, tmp_path_factory):
    """{run: what its merged directory answers in transformers alone}, all in one process
    that never imports crystal.
    """
    records, _ = data.read(records_file)
    for run in runs.values():
        export.export(run, merged=run / "merged", adapter=run / "adapter")
    asked = [(r.turns[-1][1].replace("<image>", "").strip(), [str(p) for p in r.images]) for r in records]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, json.dumps(asked), *(str(run / "merged") for run in runs.values())],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(runs, map(json.loads, done.stdout.splitlines())))


@pytest.mark.parametrize("name", ["crystal", "untied", "full", "sft", "released"])
def test_merged_directory_answers_as_we_do_in_transformers_alone(
    runs, theirs, name, records_file, model_dirs
):
    run = runs[name]
    records, _ = data.read(records_file)
    model, fmt, _ = opening.open_model(run)
    ours = []
    for r in records:
        images = model.image_processor(images=[Image.open(p) for p in r.images], return_tensors="pt")
        ids, _, _ = fmt.question(r.turns, model.image_tokens(images["image_grid_thw"]))
        ours.append(generate(model, [(ids, images["pixel_values"], images["image_grid_thw"])], fmt, 5)[0])
    assert theirs[name] == ours and any(ours)
    # untouched weights are the base's to the bit
    before, after = (sums(d) for d in (model_dirs[name not in ("untied", "released")], run / "merged"))
    touched = {n for n in before if before[n] != after[n]}
    assert set(before) == set(after) and touched and all(TOUCHED[name](n) for n in touched)


VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
TOUCHED = {
    "crystal": lambda n: ("_proj.weight" in n and "visual" not in n) or n.endswith(VOCABULARY),
    "full": lambda n: "visual" not in n,
    "sft": lambda n: "_proj.weight" in n and "visual" not in n,
    "released": lambda n: n.endswith(
        ("proj.weight", "qkv.weight", "mlp.0.weight", "mlp.2.weight", *VOCABULARY)
    ),
}
TOUCHED["untied"] = TOUCHED["crystal"]


def sums(directory):
    """{tensor: (dtype, shape, SHA-256 of its bytes)} of all safetensors files of a directory."""
    found = {}
    for file in directory.glob("*.safetensors"):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for key, entry in json.loads(raw[8:start]).items():
            if key != "__metadata__":
                low, high = entry["data_offsets"]
                found[key] = (
                    entry["dtype"],
                    tuple(entry["shape"]),
                    hashlib.sha256(raw[start + low : start + high]).hexdigest(),
                )
    return found


def rewrite(source, path, dtype, shards, old_names=False, wrapper=""):
    """A copy of a model directory in another dtype, in several files, with the tensors' names of years ago,
    or with what a wrapper put before them.
    """
    shutil.copytree(source, path)
    state = {n: t.to(dtype) for n, t in load_file(path / "model.safetensors").items()}
    if old_names:
        state = {
            n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t
            for n, t in state.items()
        }
    state = {wrapper + n: t for n, t in state.items()}
    (path / "model.safetensors").unlink()
    names, where = sorted(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {n: state[n] for n in names[i::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"dtype": str(dtype).removeprefix("torch.")}))
    return path


LOADS = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    print(json.dumps([str(model.dtype), float(model.lm_head.weight.double().sum()), float(model.model.language_model.layers[0].mlp.up_proj.weight.double().sum())]))
assert "crystal" not in sys.modules
"""  # noqa: E501
BASES = {  # name: tied, dtype, files, names of years ago, what a wrapper put before them
    "bf16": (True, torch.bfloat16, 1, False, ""),
    "bf16 untied": (False, torch.bfloat16, 3, False, ""),
    "old names": (False, torch.float32, 2, True, ""),
    "old bf16": (True, torch.bfloat16, 2, True, ""),
    "wrapped": (False, torch.float32, 2, False, "module."),
    "wrapped old": (True, torch.float32, 1, True, "base_model.model."),
}


def test_every_kind_of_base(model_dirs, records_file, tmp_path):
    """Changed tensors are W + (alpha / r) B A and the new rows, rounded once; all others, dtypes and files
    are the base's, and names less a wrapper's prefix.
    """
    expected = []
    for name, (tied, dtype, shards, old, wrapper) in BASES.items():
        base = rewrite(model_dirs[tied], tmp_path / f"{name} base", dtype, shards, old, wrapper)
        run = train.main(
            [
                "--model", str(base), "--data", str(records_file), "--latents", "3", "--lora_r", "2",
                "--lr", "1e-2", "--max_steps", "1", "--eval_every", "0",
                "--dtype", str(dtype).removeprefix("torch."), "--output", str(tmp_path / name),
            ]
        )
        assert export.export(run, merged=run / "merged") == [run / "merged"]
        before, after = {n.removeprefix(wrapper): x for n, x in sums(base).items()}, sums(run / "merged")
        assert sorted(p.name for p in (run / "merged").glob("*.safetensors*")) == sorted(
            p.name for p in base.glob("*.safetensors*")
        )
        assert {n: x[:2] for n, x in before.items()} == {n: x[:2] for n, x in after.items()}
        index = run / "merged" / "model.safetensors.index.json"
        assert not index.exists() or json.loads(index.read_text())["weight_map"].keys() == after.keys()
        touched = {n for n in before if before[n] != after[n]}
        assert touched and all(TOUCHED["crystal"](n) for n in touched)

        model, fmt, _ = opening.open_model(run)  # the run itself, in memory
        put_in(model.hf)
        ours = dict(model.hf.named_parameters())
        stored = {}
        for file in (run / "merged").glob("*.safetensors"):
            stored |= load_file(file)
        for key, parameter in crystal.backbone.model.parameter_names(model.hf, stored).items():
            assert torch.equal(stored[key], ours[parameter]), key
        first = ours["model.language_model.layers.0.mlp.up_proj.weight"]
        expected.append(
            [str(dtype), float(model.hf.lm_head.weight.double().sum()), float(first.double().sum())]
        )
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *(str(tmp_path / n / "merged") for n in BASES)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(x) for x in done.stdout.splitlines()] == expected


def test_a_base_that_lacks_what_was_trained_is_named(runs, tmp_path, monkeypatch, model_dirs):
    base = shutil.copytree(model_dirs[True], tmp_path / "base")
    monkeypatch.setattr(crystal.backbone.model, "directory", lambda name: base)
    state = load_file(base / "model.safetensors")
    lost = "model.language_model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in state.items() if n != lost}, base / "model.safetensors")
    with pytest.raises(UserError, match=f"{lost} was trained, but no safetensors file there has it"):
        export.export(runs["crystal"], merged=tmp_path / "merged")
    # There, and still none of the base's.
    shutil.copyfile(base / "model.safetensors", tmp_path / "other.safetensors")
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {lost: "../other.safetensors"}})
    )
    with pytest.raises(UserError, match="no file ../other.safetensors"):
        export.export(runs["crystal"], merged=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_adapter_alone_needs_no_weights(runs, monkeypatch, tmp_path):
    """What is exported from names and shapes is what the run holds."""
    run = runs["untied"]
    monkeypatch.setattr(crystal.backbone.model.AutoModelForImageTextToText, "from_pretrained", None)
    export.export(run, adapter=tmp_path / "adapter", merged=tmp_path / "merged")
    monkeypatch.undo()
    model, _, _ = opening.open_model(run)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = lora.adapter_state(model.hf, model.new_tokens)
    assert stored.keys() == ours.keys() and all(torch.equal(stored[n], ours[n]) for n in ours)
    assert any("lora_B" in n and t.abs().max() > 0 for n, t in stored.items())


@pytest.mark.parametrize("name", ["crystal", "untied"])
def test_adapter_loads_in_peft_with_equal_logits(runs, name, setup):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    run = runs[name]
    export.export(run, adapter=run / "adapter")
    model, fmt, settings = opening.open_model(run)
    stock = AutoModelForImageTextToText.from_pretrained(
        json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"],
        dtype=torch.float32,
    )
    peft = PeftModel.from_pretrained(stock, run / "adapter").eval()
    b = setup(tied=name == "crystal", dtype=torch.float32).batch
    with torch.no_grad():
        ours = model.logits(model.hidden(b))
        theirs = peft(
            input_ids=b["input_ids"],
            pixel_values=b["pixel_values"],
            image_grid_thw=b["image_grid_thw"],
            mm_token_type_ids=b["mm_token_type_ids"],
            attention_mask=b["attention_mask"],
        ).logits
    real = b["attention_mask"].bool()
    assert (ours[real] - theirs[real]).abs().max() < 1e-4 and ours[real].abs().max() > 0.1


def test_the_generation_prompt_opens_the_answer(runs):
    from transformers import AutoTokenizer

    run = runs["crystal"]
    export.export(run, merged=run / "merged")
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith(
        "<|im_start|>assistant\n<think> Because the feature of the image "
        "is<|latent_0|><|latent_1|><|latent_2|>. </think><answer>"
    )
    assert "<think>" not in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )
    assert not list(run.glob("*.part"))


def test_a_model_that_feeds_itself_says_so_to_other_tools(model_dirs, records_file, tmp_path, capsys):
    """VaLR: crystal.json with its method and K, the tag that opens latents suppressed beside the base's own
    rules, and a Format that decodes with them.
    """
    run = train.main(
        [
            "--method", "valr", "--encoders", "none", "--model", str(model_dirs[True]),
            "--data", str(records_file), "--latents", "5", "--tune", "lora", "--lora_r", "2",
            "--max_steps", "2", "--eval_every", "0", "--log_every", "9", "--output", str(tmp_path / "run"),
        ]
    )
    export.main(["--run", str(run)])
    assert "Its latents are states that the model feeds back to itself" in capsys.readouterr().out
    model, fmt, _ = opening.open_model(run)
    assert json.loads((run / "merged" / "crystal.json").read_text()) == {"method": "valr", "latents": 5}
    base, merged = (
        json.loads((folder / "generation_config.json").read_text())
        for folder in (model_dirs[True], run / "merged")
    )
    begin = model.tokenizer.convert_tokens_to_ids("<latent>")
    assert merged == base | {"suppress_tokens": [begin]}
    found = opening.exported_format(run / "merged", model.tokenizer)
    assert (type(found), found.count, found.latent_start_id) == (type(fmt), 5, begin)
    assert (
        not (model_dirs[True] / "crystal.json").exists()
        and opening.exported_format(model_dirs[True], model.tokenizer).count == 0
    )
    for text, message in (
        ('{"method": "/x/mine.py", "latents": 5}', "a method of its own"),
        ('{"latents": 5}', "not what crystal.export wrote"),
        ("[]", "not what crystal.export wrote"),
    ):
        (run / "merged" / "crystal.json").write_text(text)
        with pytest.raises(UserError, match=message):
            opening.exported_format(run / "merged", model.tokenizer)


WRITES = {  # method's flags, what a model writes after its prompt, then the answer and the thought in it
    "crystal": (
        ["--method", "crystal", "--latents", "2"],
        "left of it</answer><|im_end|><|endoftext|>",
        "left of it",
        "Because the feature of the image is<|latent_0|><|latent_1|>.",
    ),
    "crystal, cut short": (
        ["--method", "crystal", "--latents", "1", "--latent_kind", "identical"],
        "left of",
        "left of",
        "Because the feature of the image is<|latent_0|>.",
    ),
    "crystal, its own thought": (
        ["--method", "crystal", "--thought", "cot", "--latents", "2"],
        " I count<|latent_0|><|latent_1|>. </think><answer>3</answer><|im_end|>",
        "3",
        "I count<|latent_0|><|latent_1|>.",
    ),
    "lavit": (["--method", "lavit", "--latents", "2"], "left<|im_end|><|endoftext|>", "left", None),
    "valr": (
        ["--method", "valr", "--encoders", "none"],
        "I count.\n<answer>3</answer><|im_end|><|endoftext|>",
        "3",
        "I count.",
    ),
    "livr": (["--method", "livr"], "left<|im_end|>", None, None),
    "sft": (["--method", "sft"], "left<|im_end|>", None, None),
}


@pytest.mark.parametrize("name", WRITES)
def test_stock_transformers_finds_the_answer_in_what_is_written(name, tmp_path):
    """By response_template, which `transformers serve` and pipelines read; a bare answer needs none."""
    from transformers import AutoTokenizer

    flags, written, answer, thought = WRITES[name]
    model = crystal.backbone.model.load("tiny")
    _, fmt = methods.attach(model, methods.parse(flags))
    export.save_tokenizer(model, fmt, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if answer is None:
        assert tokenizer.response_template is None
        return
    asked = [{"role": "user", "content": "<answer>not this one</answer>"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    ids = tokenizer.encode(written, add_special_tokens=False)
    found = tokenizer.parse_response(ids, prefix=prompt)
    assert found.pop("reasoning_content", "").strip() == (thought or "")
    assert found == {"role": "assistant", "content": answer}


def test_older_transformers_are_told_the_special_tokens_by_the_name_that_they_know(runs, model_dirs):
    """transformers 4.57 fails on extra_special_tokens as a list; the base's own come first."""
    run = runs["crystal"]
    export.export(run, merged=run / "merged", adapter=run / "adapter")
    base = json.loads((model_dirs[True] / "tokenizer_config.json").read_text())
    base = base.get("additional_special_tokens") or base["extra_special_tokens"]
    for folder in ("merged", "adapter"):
        saved = json.loads((run / folder / "tokenizer_config.json").read_text())
        latents = ["<|latent_0|>", "<|latent_1|>", "<|latent_2|>"]
        added = ["<think>", "</think>", "<answer>", "</answer>", *latents]
        assert saved["additional_special_tokens"] == base + added
        assert not saved.keys() & {"extra_special_tokens", "is_local", "local_files_only"}


def test_older_transformers_are_told_the_rotary_embedding(tmp_path):
    """transformers 4 reads rope_theta and rope_scaling, and would take 10000 and none without a word."""
    file = tmp_path / "config.json"
    file.write_text('{"text_config": {"rope_parameters": {"rope_theta": 5e6, "mrope_section": [1, 2]}}}')
    export.say_rotation_twice(file)
    said = json.loads(file.read_text())["text_config"]
    assert (said["rope_theta"], said["rope_scaling"]) == (5e6, {"mrope_section": [1, 2]})
    assert said["rope_parameters"]["rope_theta"] == 5e6

    for older in ('{"rope_theta": 7, "rope_scaling": {"type": "mrope"}}', '{"text_config": {}}'):
        file.write_text(older)
        export.say_rotation_twice(file)
        assert file.read_text() == older


def test_an_adapter_brings_what_reads_images(family_dirs, records_file, tmp_path):
    """The image processor's rules, and the processor's, as merged/ has them."""
    for family in ("qwen3_vl", "llava_onevision"):
        base = family_dirs(family, True)
        run = train.main(
            [
                "--model", str(base), "--data", str(records_file), "--latents", "2", "--lora_r", "2",
                "--max_steps", "1", "--eval_every", "0", "--output", str(tmp_path / family),
            ]
        )
        export.main(["--run", str(run)])
        merged, adapter = run / "merged", run / "adapter"
        names = {p.name for p in merged.iterdir()} & {p.name for p in adapter.iterdir()}
        names -= {"README.md", "manifest.json"}
        assert "preprocessor_config.json" in names and "tokenizer.json" in names
        assert ("processor_config.json" in names) == (base / "processor_config.json").exists()
        for name in names:
            assert (merged / name).read_bytes() == (adapter / name).read_bytes()


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "config.json").write_text("old")
    (tmp_path / "to.part").mkdir()
    (tmp_path / "to.part" / "left").write_text("of a run that was killed")
    with pytest.raises(KeyboardInterrupt):
        with export.fresh(tmp_path / "to") as out:
            (out / "new").write_text("new")
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.rglob("*")] == ["to", "config.json"]
    with export.fresh(tmp_path / "to") as out:
        (out / "new").write_text("new")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["manifest.json", "new", "to"]


KILLED = """
import os, sys
from pathlib import Path
from crystal import export
def killed(self, to, rename=Path.rename, left=[int(sys.argv[3])]):
    left[0] -= self.suffix in (".part", "") and self.name.startswith("merged")
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return rename(self, to)
Path.rename = killed
export.export(sys.argv[1], merged=sys.argv[2])
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_leaves_the_older_export_or_what_brings_it_back(runs, tmp_path, renames):
    """Killed before its first rename, and between its two."""
    merged = tmp_path / "merged"
    export.export(runs["sft"], merged=merged)
    before = {p.name: p.read_bytes() for p in merged.iterdir()}
    done = subprocess.run([sys.executable, "-c", KILLED, str(runs["crystal"]), str(merged), str(renames)])
    assert done.returncode == -9
    there = merged if renames == 0 else tmp_path / "merged.old"
    assert {p.name: p.read_bytes() for p in there.iterdir()} == before

    # The next one, if it fails, has brought it back; if it does not, nothing else is left.
    with pytest.raises(ZeroDivisionError):
        with export.fresh(merged):
            raise ZeroDivisionError
    assert {p.name: p.read_bytes() for p in merged.iterdir()} == before
    export.export(runs["crystal"], merged=merged)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert (merged / "README.md").read_bytes() != before["README.md"]


FULL = """
import resource, signal, sys
from crystal import export
from crystal.runtime import config
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
config.run_cli(lambda: export.main(["--run", sys.argv[1], "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_file_that_cannot_be_written_leaves_no_part(runs, tmp_path, kind):
    """The system refuses to let a file grow, amid the weights of each of the two."""
    run = runs["untied"]
    export.main(["--run", str(run), "--out", str(tmp_path)])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    sizes = {"merged": "model.safetensors", "adapter": "adapter_model.safetensors"}
    limit = (tmp_path / kind / sizes[kind]).stat().st_size - 1
    if kind == "adapter":  # smaller than a merged one, which then has to be left out
        shutil.rmtree(tmp_path / "merged")
        before = {p: x for p, x in before.items() if kind in p.parts}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(run), str(tmp_path), str(limit)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not list(tmp_path.glob("*.part"))


def test_what_is_no_export_is_not_replaced(runs, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="merged: holds no export, so none replaces it"):
        export.export(runs["sft"], merged=tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["thesis.tex"]
    (tmp_path / "merged" / "thesis.tex").unlink()
    export.export(runs["sft"], merged=tmp_path / "merged")


# --- a second stage, from a merged first one ---

FIRST = {
    "crystal": [], "livr": [], "released": [],
    "lavit": ["--w_gaze", "0", "--w_semantics", "0", "--tune", "lora"],
    "valr": ["--encoders", "none", "--tune", "lora"],
    "sft": [],
}  # fmt: skip


STAGES = [
    ("crystal", "livr"), ("livr", "crystal"), ("released", "released"), ("lavit", "crystal"),
    ("valr", "lavit"), ("crystal", "valr"),
]  # fmt: skip


@pytest.mark.parametrize("first, second", STAGES)
def test_a_second_stage_writes_its_own_latents_alone(first, second, model_dirs, records_file, tmp_path):
    """Its sequences are those that the same method makes of the base; in its export no tag stands twice."""

    def trained(model, method, latents, name):
        return train.main(
            [
                "--method", method, *FIRST[method], "--model", str(model), "--data", str(records_file),
                "--latents", str(latents), "--lora_r", "2", "--max_steps", "2", "--eval_every", "0",
                "--output", str(tmp_path / name),
            ]
        )  # fmt: skip

    run = trained(model_dirs[True], first, 2, "first")
    export.export(run, merged=run / "merged")
    after = trained(run / "merged", second, 3, "second")
    export.export(after, merged=after / "merged")

    records, _ = data.read(records_file)
    settings = methods.parse(["--method", second, *FIRST[second], "--latents", "3"])
    written = []
    for base in (model_dirs[True], run / "merged", after / "merged"):
        model = crystal.backbone.model.load(str(base))
        method, fmt = methods.attach(model, settings)
        ids = [method.layout(fmt, r, [4] * len(r.images)).ids for r in records]
        written.append([model.tokenizer.decode(x) for x in ids])
    assert written[0] == written[1] == written[2]

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(after / "merged")
    asked = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    fmt.tokenizer.chat_template = model.base_template
    question = fmt.question([("user", "Hello")], [])
    assert prompt == fmt.tokenizer.decode(question.ids)
    assert all(prompt.count(token) <= 1 for token in method.tokens)


def test_a_template_that_opens_the_answer_itself_is_refused(runs, tmp_path):
    """An export without its base's template, and a thinking model's."""
    run = runs["crystal"]
    export.export(run, merged=tmp_path / "merged")
    (tmp_path / "merged" / "base_chat_template.jinja").unlink()
    model = crystal.backbone.model.load(str(tmp_path / "merged"))
    for method in ("crystal", "livr", "sft", "valr"):
        flags = ["--method", method, *FIRST[method]]
        with pytest.raises(UserError, match="its chat template writes <.*> before an answer, .* twice"):
            methods.attach(model, methods.parse(flags))

    model = crystal.backbone.model.load("tiny")
    opened = "{%- if add_generation_prompt -%}{{- '<think>\\n' -}}{%- endif -%}"
    model.tokenizer.chat_template += opened
    with pytest.raises(UserError, match="tiny: its chat template writes <think> before an answer"):
        methods.attach(model, methods.parse(["--method", "crystal"]))
    methods.attach(model, methods.parse(["--method", "livr"]))


# --- a vocabulary without spare rows ---


@pytest.mark.parametrize("tied, spare", [(True, 0), (False, 3)], ids=["tied", "untied"])
def test_stock_loaders_take_an_enlarged_vocabulary(tied, spare, records_file, tmp_path, capsys):
    """A base with as many rows as tokens, or three more: stock transformers reads its seven new tokens."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(crystal.backbone.model.TINY))
    base = write_model(tmp_path / "base", tied, vocab_size=size + spare)
    more = ["--lr_tokens", "0.1", "--output", str(tmp_path / "run")]
    flags = ["--model", str(base), "--data", str(records_file), "--latents", "3", "--lora_r", "2", *more]
    run = train.main([*flags, "--lr", "1e-2", "--max_steps", "2", "--eval_every", "0"])
    capsys.readouterr()
    export.export(run, "last", merged=tmp_path / "merged", adapter=tmp_path / "adapter")
    assert f"vocabulary of {size + spare} rows has {size + 7} in the adapter" in capsys.readouterr().err

    ours, fmt, _ = opening.open_run(run, "last")
    stock, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert stock.get_input_embeddings().weight.shape == stock.lm_head.weight.shape == (size + 7, 32)
    assert len(tokenizer) == size + 7 == stock.config.get_text_config().vocab_size
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == tied
    assert tokenizer.convert_tokens_to_ids("<|latent_2|>") == size + 6

    ids = torch.tensor([fmt.question([("user", "What colour is the star?")], [])[0]])
    with torch.no_grad():
        wanted, found = (model(input_ids=ids).logits for model in (ours.hf, stock.eval()))
        assert wanted.shape[-1] == size + 7 and torch.allclose(wanted, found, atol=1e-4)

        # The adapter opens here as it is, and in peft once the base has as many rows.
        again = opening.open_model(str(tmp_path / "adapter"))[0]
        assert torch.allclose(wanted, again.hf(input_ids=ids).logits, atol=1e-4)
        from peft import PeftModel

        base = AutoModelForImageTextToText.from_pretrained(base)
        base.resize_token_embeddings(size + 7, mean_resizing=False)
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.allclose(wanted, theirs(input_ids=ids).logits, atol=1e-4)

    # Nothing but the vocabulary, and what the adapters are on, is another than the base's.
    before, after = (load_file(d / "model.safetensors") for d in (tmp_path / "base", tmp_path / "merged"))
    name = "model.language_model.embed_tokens.weight"
    assert torch.equal(before[name][:size], after[name][:size]) and before.keys() == after.keys()
    vision = [n for n in before if ".visual." in n]
    assert vision and all(torch.equal(before[n], after[n]) for n in vision)


def test_a_processor_of_stock_transformers_takes_it_too(records_file, tmp_path):
    """AutoProcessor and LLaVA-OneVision, whose template and processor are other classes."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(crystal.backbone.model.TINY)) + 2  # <image> and <video>
    base = write_model(tmp_path / "base", False, FAMILIES["llava_onevision"], vocab_size=size)
    flags = ["--model", str(base), "--data", str(records_file), "--latents", "3", "--lora_r", "2"]
    run = train.main([*flags, "--max_steps", "1", "--eval_every", "0", "--output", str(tmp_path / "run")])
    export.export(run, "last", merged=tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    try:
        processor = AutoProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    except ImportError:  # of videos, which want torchvision
        processor = None
    for reader in filter(None, (tokenizer, processor)):
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        text = reader.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert text.endswith("<|latent_0|><|latent_1|><|latent_2|>. </think><answer>")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").lm_head.out_features == size + 7


def test_a_file_is_copied_with_room_for_longer_tensors(tmp_path):
    """By safetensors itself: two of four tensors grow, others move, and nothing else changes."""
    g = torch.Generator().manual_seed(0)
    state = {
        "a": torch.randn(3, 2, generator=g).bfloat16(),
        "b": torch.randn(5, generator=g),
        "c": torch.randn(3, 4, generator=g, dtype=torch.float64),
        "d": torch.tensor(7),
    }
    save_file(state, tmp_path / "old", metadata={"format": "pt"})
    added = export.copy_with_room(tmp_path / "old", tmp_path / "new", ["a", "c"], 6)
    assert added == 3 * 2 * 2 + 3 * 4 * 8
    found = load_file(tmp_path / "new")
    for name, tensor in state.items():
        assert torch.equal(found[name][:3] if name in "ac" else found[name], tensor), name
    assert found["a"].shape == (6, 2) and found["c"].shape == (6, 4)
    assert not found["a"][3:].any() and not found["c"][3:].any()
    with safe_open(tmp_path / "new", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert export.copy_with_room(tmp_path / "old", tmp_path / "same", ["a", "c"], 3) == 0
    assert (tmp_path / "same").read_bytes() == (tmp_path / "old").read_bytes()
