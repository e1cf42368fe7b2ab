"""What the tests share: small random models in Hugging Face layout, records with real images, and
one batch of them.
"""

import functools
import json
import multiprocessing
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import crystal.backbone.model
from crystal import methods
from crystal.attention_bias import additive_mask
from crystal.lora import LoRALinear
from crystal.runtime import data
from crystal.train import Objective

torch.set_num_threads(1)  # these models are too small to share


def pytest_addoption(parser):
    parser.addoption(
        "--require-cuda",
        action="store_true",
        help="fail, not skip, what needs a GPU where there is none (tests/test_ops.py)",
    )


def qwen3_vl(path, settings):
    """What makes a tiny directory one of Qwen3-VL: DeepStack after two of three vision blocks, patches of 16,
    a tokenizer that knows <think>.
    """
    text, vision = settings["text_config"], settings["vision_config"]
    settings |= {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
    # Heads wider than hidden size / heads, as in the smaller real ones.
    text |= {"model_type": "qwen3_vl_text", "head_dim": 12}
    text["rope_parameters"] |= {"mrope_section": [2, 2, 2], "mrope_interleaved": True}
    vision |= {
        "model_type": "qwen3_vl_vision",
        "depth": 3,
        "deepstack_visual_indexes": [0, 1],
        "patch_size": 16,
        "num_position_embeddings": 16,
    }
    rules = json.loads((path / "preprocessor_config.json").read_text())
    rules |= {
        "patch_size": 16,
        "size": {"shortest_edge": 4096, "longest_edge": 16384},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (path / "preprocessor_config.json").write_text(
        json.dumps({n: x for n, x in rules.items() if n not in ("min_pixels", "max_pixels")})
    )
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    tokenizer.save_pretrained(path)


def llava_onevision(path, settings):
    """What makes a tiny directory one of LLaVA-OneVision: SigLIP on tiles of 2 x 2 patches, up to 4 x 4
    of them, Qwen2, <image>.
    """
    text = {n: x for n, x in settings["text_config"].items() if n not in ("rope_parameters", "model_type")}
    text |= {"model_type": "qwen2", "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 28,
        "vision_use_head": False,
    }
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<image>", "<video>"]}, replace_extra_special_tokens=False
    )
    # Like the real one: all images, then all text, of lists alone.
    tokenizer.chat_template = (
        "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + ' ' -}}"
        "{%- for part in message['content'] if part is mapping and part['type'] == 'image' -%}{{- "
        "'<image>\n' -}}{%- endfor -%}"
        "{%- for part in message['content'] if part is mapping and part['type'] == 'text' -%}{{- '\n' + "
        "part['text'] -}}{%- endfor -%}"
        "{{- '<|im_end|>' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' "
        "-}}{%- endif -%}"
    )
    tokenizer.save_pretrained(path)
    pinpoints = [[28 * h, 28 * w] for h in (1, 2, 4) for w in (1, 2, 4)]
    rules = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 28, "width": 28},
        "image_grid_pinpoints": pinpoints,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(rules))
    (path / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "LlavaOnevisionProcessor",
                "num_image_tokens": 4,
                "vision_feature_select_strategy": "full",
                "image_processor": rules,
            }
        )
    )
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    tied = settings["tie_word_embeddings"]
    settings.clear()
    settings |= {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "image_token_index": image,
        "video_token_index": video,
        "image_grid_pinpoints": pinpoints,
        "tie_word_embeddings": tied,
    }


def write_model(path, tied=True, family=None, **text):
    """A random model of two or three layers with tiny's tokenizer and image rules, written as a directory.

    family: what makes of it another than Qwen2.5-VL, a function (directory, contents of config.json).
    """
    shutil.copytree(crystal.backbone.model.TINY, path)
    settings = json.loads((path / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = tied
    settings["text_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"mrope_section": [2, 1, 1], "rope_theta": 100.0, "rope_type": "default"},
    } | text
    settings["vision_config"] |= {
        "hidden_size": 16,
        "intermediate_size": 24,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": settings["text_config"]["hidden_size"],
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    if family:
        family(path, settings)
    settings["dtype"] = "float32"
    (path / "config.json").write_text(json.dumps(settings))
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    hf = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    for name, p in hf.named_parameters():  # far enough from the identity that every path matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
        elif "bias" in name:
            torch.nn.init.normal_(p, std=0.05)
    state = {n: p.detach().clone() for n, p in hf.named_parameters()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(autouse=True, scope="module")
def off_the_gpu(request):
    """Tests compare float32 with float32, some to the bit: they see no GPU, but for those that are about it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ("test_ops", "test_corrupt"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that they start
        yield


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {tied: write_model(root / ("tied" if tied else "untied"), tied) for tied in (True, False)}


FAMILIES = {"qwen3_vl": qwen3_vl, "llava_onevision": llava_onevision}  # beside Qwen2.5-VL


@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory):
    """family_dirs(family, tied) -> directory of a tiny random model of it, written once."""
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def make(family, tied):
        return write_model(root / f"{family}-{'tied' if tied else 'untied'}", tied, FAMILIES[family])

    return make


RECORDS = [  # (question, answer, sizes of the images)
    ("What colour is the star?", "red", [(112, 84)]),
    ("How many rings are there in the picture?", "3", [(56, 56)]),
    ("Which is nearer to the cross, the ring or the heart?", "the heart is nearer", [(84, 112), (56, 84)]),
]


@pytest.fixture(scope="session")
def records_file(tmp_path_factory):
    """A JSONL of RECORDS with pictures that are not uniform."""
    root, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    with open(root / "train.jsonl", "w") as lines:
        for i, (question, answer, sizes) in enumerate(RECORDS):
            names = [f"{i}_{n}.png" for n in range(len(sizes))]
            for name, (w, h) in zip(names, sizes):
                Image.fromarray(rng.integers(0, 256, (h // 7, w // 7, 3), dtype=np.uint8)).resize(
                    (w, h)
                ).save(root / name)
            talk = [
                {"from": "human", "value": "<image>\n" * len(names) + question},
                {"from": "gpt", "value": answer},
            ]
            lines.write(
                json.dumps(
                    {
                        "id": str(i),
                        "images": names,
                        "conversations": talk,
                        "family": "a" if i else "b",
                        "cot": ["I look.", "I see."],
                    }
                )
                + "\n"
            )
    return root / "train.jsonl"


@pytest.fixture
def setup(model_dirs, family_dirs, records_file):
    """setup(*flags, tied=, dtype=, which=, family=) -> settings, model, method, objective, fmt,
    batch: one step's ingredients.
    """

    def make(*flags, tied=True, dtype=torch.float64, which=None, family=None):
        directory = family_dirs(family, tied) if family else model_dirs[tied]
        settings = methods.parse(["--latents", "3", "--lora_r", "2", "--model", str(directory), *flags])
        model = crystal.backbone.model.load(settings.model, dtype)
        method, fmt = methods.attach(model, settings)
        objective = Objective(model, method).train()
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():  # a fresh adapter's B is 0: nothing behind it would have a gradient
            for name, p in objective.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=g) * 0.1)
        records, _ = data.read(records_file)
        records = [records[i] for i in which] if which is not None else records
        examples = data.RecordDataset(
            records,
            lambda r, n: method.layout(fmt, r, n),
            model.image_processor,
            method.corruption,
            copies=fmt.copies,
            extras=method.extras,
        )
        batch = data.collate([examples[0, i] for i in range(len(records))], model.tokenizer.pad_token_id)
        batch = data.to_device(batch, torch.device("cpu"), dtype)
        named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
        return SimpleNamespace(
            settings=settings, model=model, method=method, objective=objective, fmt=fmt, batch=batch,
            named=named, records=records, examples=examples,
        )

    return make


@pytest.fixture
def start_by():
    """Sets how processes are started, as Python 3.14 does by itself and a caller may at any time."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield lambda how: multiprocessing.set_start_method(how, force=True)
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def float64_modules(monkeypatch):
    """RMSNorm and rotary embeddings compute in float64; the stock modules drop to float32 on the way."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as m
    from transformers.models.qwen3_vl import modeling_qwen3_vl as m3

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotate(q, k, cos, sin):
        cos, sin = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double()
        turn = lambda x: x * cos + m.rotate_half(x) * sin
        return turn(q), turn(k)

    for kind in (m.Qwen2_5_VLRMSNorm, Qwen2RMSNorm, m3.Qwen3VLTextRMSNorm):
        monkeypatch.setattr(kind, "forward", norm)
    for module in (m, m3):
        monkeypatch.setattr(module, "apply_rotary_pos_emb_vision", rotate)


def eager_mass(s, biases):
    """The share of the answer positions' attention that the latents get at the last layer, by a softmax over
    L x L: mean over heads, rows and the pairs of s.batch.
    """
    kept, batch = {}, s.batch
    with torch.no_grad():
        s.model.hidden(
            batch, recorder=lambda layer, q, k, scale: kept.update(last=(q, k, scale)), biases=biases
        )
    q, k, scale = kept["last"]
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale + additive_mask(
        biases, batch["attention_mask"]
    )  # [B,H,L,L]
    masses = []
    for A, rows, latents in zip(scores.softmax(-1), batch["answer_positions"], batch["latents"]):
        masses.append(A[:, rows[rows >= 0]][:, :, latents].sum(-1).mean())
    return float(sum(masses)) / len(masses)


def gradients(loss, named):
    """[(name, gradient)] of a scalar; a parameter that it does not reach has zeros."""
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, grads)}


@torch.no_grad()
def put_in(model):
    """Puts every adapter of a model into its Linear: W + (alpha / r) B A, computed as wide as the adapter
    is kept, rounded once.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            W, A, B = layer.base.weight, layer.lora_A, layer.lora_B
            W.copy_((W.to(A.dtype) + layer.alpha / layer.r * (B @ A)).to(W.dtype))
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)
