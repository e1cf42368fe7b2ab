"""The very same code at real size: Qwen2.5-VL-7B's configuration with its 152064 rows, reduced in depth only.

Weights are random (none can be had offline), the tokenizer is tiny's, the pictures are photographs and images
up to 4000 pixels, the pixel rules are Qwen's.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import crystal.backbone.model
from crystal import train
from crystal.runtime import checkpoint, data

PHOTOS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png",
    "retina.jpg",
)


def write_real(path, layers=1, blocks=2):
    """Qwen2.5-VL-7B-Instruct's configuration with `layers` of its 28 decoder layers and `blocks` of
    its 32 vision blocks.
    """
    shutil.copytree(crystal.backbone.model.TINY, path)
    config = json.loads((path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    config["text_config"] |= {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": 128000,
        "vocab_size": 152064,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"},
    }
    config["vision_config"] |= {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "depth": blocks,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [blocks - 1],
        "tokens_per_second": 2,
    }
    (path / "config.json").write_text(json.dumps(config))
    processor = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(
        json.dumps(processor | {"min_pixels": 3136, "max_pixels": 12845056})
    )
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    block, state = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16(), {}
    # One block of noise over and over: what the values are does not matter here.
    for name, p in hf.named_parameters():
        scale = 1.0 if p.ndim == 1 and "norm" in name else 0.02
        state[name] = (
            torch.ones(p.shape, dtype=torch.bfloat16)
            if scale == 1.0
            else (block * scale)
            .repeat(math.ceil(p.numel() / len(block)))[: p.numel()]
            .view(p.shape)
            .contiguous()
        )
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A LLaVA JSON of photographs and generated images of extreme sizes, several turns each."""
    import skimage

    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name in PHOTOS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, root)
    sizes = {
        "wide.jpg": (4000, 700),
        "large.jpg": (4000, 3000),
        "small.png": (30, 20),
        "odd.png": (1021, 577),
    }
    for name, (w, h) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (h // 10 + 1, w // 10 + 1, 3), dtype=np.uint8)).resize(
            (w, h)
        ).save(root / name)
    items = [
        {
            "id": name,
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is in {name.split('.')[0]}?"},
                {"from": "gpt", "value": "Something to see."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        }
        for name in (*PHOTOS, *sizes)
    ]
    (root / "photographs.json").write_text(json.dumps(items))
    return root / "photographs.json"


def test_one_training_step(photographs, tmp_path_factory, capsys):
    directory = write_real(tmp_path_factory.mktemp("real") / "qwen2.5-vl-7b-1-layer")
    try:
        # A CPU without instructions for bfloat16 multiplies it number by number: minutes for what
        # float32 does in seconds.
        dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
        run = train.main(
            [
                "--model",
                str(directory),
                "--data",
                str(photographs),
                "--image_root",
                str(photographs.parent),
                "--dtype",
                dtype,
                "--max_pixels",
                "100352",
                "--batch_size",
                "2",
                "--max_steps",
                "1",
                "--eval_every",
                "0",
                "--output",
                str(tmp_path_factory.mktemp("run") / "r"),
            ]
        )
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert all(math.isfinite(line[n]) for n in ("ce_int", "ce_cor", "kl", "attn", "grad_norm"))
        # random weights guess among all rows of the vocabulary
        assert abs(line["ce_int"] - math.log(152064)) < 2 and line["grad_norm"] > 0
        assert "10 later turns left out" in capsys.readouterr().out
        files, _ = checkpoint.load(checkpoint.step_dir(run, 1))
        saved = files["trainable.safetensors"]
        rows = [n for n in saved if ".new_tokens." in n]
        # Untied: embedding and head.
        assert len(rows) == 2 and all(
            saved[n].shape == (12, 3584) and saved[n].dtype == torch.float32 for n in rows
        )
        assert sum(n.endswith("lora_A") for n in saved) == 7 and {
            saved[n].shape[0] for n in saved if n.endswith("lora_A")
        } == {16}
    finally:
        shutil.rmtree(directory)  # 2.7 GB


def area_rule(w, h, low, high, unit=28):
    """Qwen's rule, written from its description: sides rounded to 28, the area brought between
    the bounds, aspect kept.
    """
    side = lambda x: round(x / unit) * unit
    W, H = side(w), side(h)
    if high < W * H:
        shrink = math.sqrt(w * h / high)
        W, H = (max(unit, math.floor(x / shrink / unit) * unit) for x in (w, h))
    elif low > W * H:
        grow = math.sqrt(low / (w * h))
        W, H = (math.ceil(x * grow / unit) * unit for x in (w, h))
    return W, H


@pytest.mark.parametrize("low, high", [(3136, 12845056), (3136, 200704), (1003520, 12845056)])
def test_pixel_rules(photographs, low, high):
    """Every image's grid and token count at the 7B's own bounds, as released (448 x 448),
    and as VLMEvalKit asks.
    """
    model = crystal.backbone.model.load("tiny", min_pixels=low, max_pixels=high)
    for record in data.read(photographs)[0]:
        image = data.load_image(record.images[0], record.where)
        if low < 1e6 or image.width * image.height < 1e6:  # no need to patch twelve megapixels more than once
            out = model.image_processor(images=[image], return_tensors="pt")
            W, H = area_rule(*image.size, low, high)
            assert out["image_grid_thw"].tolist() == [[1, H // 14, W // 14]], record.id
            assert (
                model.image_tokens(out["image_grid_thw"]) == [W * H // 28**2]
                and len(out["pixel_values"]) == W * H // 14**2
            )
