"""Every family of the table in families.py on a tiny random model: what the other tests show of
Qwen2.5-VL holds for each.

Loads, logits as stock; realisations, feedback and generation equal; every method's every term alive; exports
that stock tools load. Tied heads in one half of the tests, untied ones in the other.
"""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, gradients
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.image_processing_utils import select_best_resolution

import crystal.backbone.model
from crystal import export, feedback, layout, methods, opening, train
from crystal import generate as generate_module
from crystal.backbone import families
from crystal.evaluation import figures
from crystal.generate import decode_feedback, generate
from crystal.losses import ce_rows
from crystal.methods.lavit import align, focus, inside, top
from crystal.runtime import data
from crystal.runtime.config import Progress, UserError
from data_prep import lavit_teacher

each = pytest.mark.parametrize("family", FAMILIES)
FULL = ("--lora_on", "language,vision,merger", "--lora_dropout", "0")


def batched(s):
    """A batch as the stock model takes it."""
    return s.model.keywords(
        {
            n: s.batch[n]
            for n in ("input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids", "attention_mask")
        }
    )


@pytest.fixture(scope="session")
def records_file(records_file, family_dirs):
    """conftest's records with a teacher's features for LaViT: gaze on as many tokens as a Qwen sees, made up.
    """
    g, tensors, lines = torch.Generator().manual_seed(5), {}, []
    for line in records_file.read_text().splitlines():
        record = json.loads(line)
        n = len(record["images"])
        tensors |= {
            f"{record['id']}/gaze": torch.rand(6 * n, generator=g),
            f"{record['id']}/gaze_grid": torch.tensor([[2, 3]] * n),
            f"{record['id']}/v_sem": torch.randn(32, generator=g),
        }
        lines.append(json.dumps(record | {"features": {"lavit": "family.safetensors"}}) + "\n")
    save_file(tensors, records_file.parent / "family.safetensors")
    path = records_file.parent / "family.jsonl"
    path.write_text("".join(lines))
    return path


# --- the model ---


@each
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_stock_eager_model(setup, family_dirs, family, tied):
    from transformers import AutoModelForImageTextToText

    s = setup("--method", "sft", "--tune", "full", tied=tied, family=family)
    assert s.model.tied == tied
    with torch.no_grad():
        ours = s.model.logits(s.model.hidden(s.batch))
        stock = AutoModelForImageTextToText.from_pretrained(
            family_dirs(family, tied), dtype=torch.float64, attn_implementation="eager"
        ).eval()
        theirs = stock(**batched(s)).logits
    real = s.batch["attention_mask"].bool()
    assert real.sum(1).unique().numel() > 1 and len(s.batch["image_grid_thw"]) == 4
    # Stock eager attention takes its softmax in float32.
    assert (ours[real] - theirs[real]).abs().max() < 1e-5
    s.batch["input_ids"][0, -1 - int((~real[0]).sum())] += 1  # the last token: nothing before it may move
    with torch.no_grad():
        moved = (s.model.logits(s.model.hidden(s.batch)) - ours)[0][real[0]].abs().amax(-1)
    assert moved[-1] > 1e-3 and moved[:-1].max() == 0


@each
def test_every_linear_of_a_part_is_found(setup, family):
    s = setup("--lora_on", "language,vision,merger", "--method", "sft", family=family)
    linear = {
        n.removesuffix(".base") for n, m in s.model.hf.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert linear - {n for n, m in s.model.hf.named_modules() if hasattr(m, "lora_A")} == {"lm_head"}
    parts = [
        setup("--lora_on", part, "--method", "sft", family=family).model
        for part in ("language", "vision", "merger")
    ]
    wrapped = [{n for n, m in model.hf.named_modules() if hasattr(m, "lora_A")} for model in parts]
    assert all(wrapped) and sum(map(len, wrapped)) == len(set.union(*wrapped)) == len(linear) - 1


@each
def test_tokens_that_the_vocabulary_has_keep_their_rows(setup, family_dirs, family):
    """Qwen3's <think> has a learned row: training starts from it, and new tokens take
    rows behind the tokenizer's.
    """
    before = crystal.backbone.model.load(str(family_dirs(family, True)))
    vocabulary, weight = before.tokenizer.get_vocab(), before.hf.get_input_embeddings().weight
    s = setup(family=family, dtype=torch.float32)
    now, after = (
        s.model.tokenizer.convert_tokens_to_ids(s.method.tokens),
        s.model.hf.get_input_embeddings().weight,
    )
    for token, i in zip(s.method.tokens, now):
        assert torch.equal(weight[i], after[i]) == (token in vocabulary) and (i < len(vocabulary)) == (
            token in vocabulary
        )
    known = set(s.method.tokens) & vocabulary.keys()
    assert known == ({"<think>", "</think>"} if family == "qwen3_vl" else set())
    assert s.model.tokenizer.decode(now, skip_special_tokens=True) == "" and s.model.new_tokens.ids == now
    assert not set(s.fmt.text("<think>")) & set(now)  # a user's text stays text
    more = before.add_tokens(layout.new_tokens(70, "diverse"))
    assert len(before.hf.get_input_embeddings().weight) == max(more) + 1 > len(weight)


def test_pixel_bounds_reach_qwen3s_processor(family_dirs):
    """Its rule is in `size`, its sides are multiples of 32."""
    low, high = 32 * 32 * 4, 32 * 32 * 9
    model = crystal.backbone.model.load(str(family_dirs("qwen3_vl", True)), min_pixels=low, max_pixels=high)
    for size in ((300, 200), (20, 30), (70, 90)):
        grid = model.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
        area = int(grid.prod()) * 16 * 16
        assert low <= area <= high and model.image_tokens(grid) == [area // 32**2]


def test_llavas_image_tokens_are_as_many_as_its_processor_says():
    """Real geometry, SigLIP at 384 with patches of 14: sizes that fit, that are cut, and that are shrunk
    because they exceed nine tiles.
    """
    from transformers import LlavaOnevisionConfig, LlavaOnevisionProcessor

    config = LlavaOnevisionConfig()
    images = families.Tiles(SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints), config)
    stock = SimpleNamespace(
        image_processor=images.processor, num_image_tokens=729, vision_aspect_ratio="anyres_max_9"
    )
    stock._get_unpadded_features = lambda *args: LlavaOnevisionProcessor._get_unpadded_features(stock, *args)
    for h, w in ((384, 384), (100, 100), (480, 640), (1333, 800), (700, 4000), (3000, 4000), (37, 411)):
        best = select_best_resolution((h, w), config.image_grid_pinpoints)
        grid = torch.tensor([[best[0] * best[1] // 384**2 + 1, h, w]])
        assert images.tokens(grid) == [
            LlavaOnevisionProcessor._get_number_of_features(stock, h, w, 384, 384)
        ], (h, w)
        ((whole, (rows, columns, newlines)),) = images.grids(grid)
        assert (
            whole == (27, 27, 0)
            and newlines == 1
            and images.rows(grid) == [int(grid[0, 0])]
            and abs(columns / rows / (w / h) - 1) < 0.1
        )
    # One of several: the whole view and its newline.
    assert images.grids(torch.tensor([[1, 480, 640]])) == [[(27, 27, 0), (1, 0, 1)]]


def test_llava_shows_several_images_as_one_tile_each(setup):
    s = setup("--method", "sft", family="llava_onevision")
    tiles = s.batch["image_grid_thw"][:, 0].tolist()
    assert min(tiles[:2]) > 1 and tiles[2:] == [1, 1] and len(s.batch["pixel_values"]) == sum(tiles)
    assert s.model.keywords(s.batch)["batch_num_images"] == [1, 1, 2]
    sizes = [image.size[::-1] for record in s.records for image in map(Image.open, record.images)]
    assert s.model.keywords(s.batch)["image_sizes"].tolist() == [list(size) for size in sizes]


def test_a_template_that_wants_lists_shows_the_whole_conversation(setup):
    fmt = setup("--method", "sft", family="llava_onevision", which=[0]).fmt
    ids, image = fmt.prompt(
        [
            ("system", "Be short."), ("user", "<image>\nA star?"), ("assistant", "Yes."),
            ("user", "Red <|im_end|>?"),
        ],
        [3],
    )
    text = fmt.tokenizer.decode(ids)
    assert text == (
        "<|im_start|>system \nBe short.<|im_end|><|im_start|>user <image><image><image>\n\nA star?<|im_end|>"
        "<|im_start|>assistant \nYes.<|im_end|><|im_start|>user \nRed "
        "<|im_end|>?<|im_end|><|im_start|>assistant\n"
    )
    assert ids.count(fmt.end) == 4 and [ids[t] for t in image] == [fmt.image] * 3


REAL = {  # the text, vision and other settings of published config.json files, where they differ from transformers' defaults  # noqa: E501
    "Qwen2.5-VL-3B": (
        "qwen2_5_vl",
        True,
        36,
        dict(
            hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_key_value_heads=2,
            vocab_size=151936,
        ),
        dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048),
        2,
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        False,
        28,
        dict(
            hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
            vocab_size=152064,
        ),
        dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584),
        2,
    ),
    "Qwen2.5-VL-32B": (
        "qwen2_5_vl",
        False,
        64,
        dict(
            hidden_size=5120, intermediate_size=27648, num_attention_heads=40, num_key_value_heads=8,
            vocab_size=152064,
        ),
        dict(hidden_size=1280, intermediate_size=3456, num_heads=16, out_hidden_size=5120),
        2,
    ),
    "Qwen3-VL-4B": (
        "qwen3_vl",
        True,
        36,
        dict(
            hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8,
            head_dim=128, vocab_size=151936,
        ),
        dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_heads=16,
            out_hidden_size=2560,
            deepstack_visual_indexes=[0, 1, 2],
        ),
        8,
    ),
    "Qwen3-VL-8B": (
        "qwen3_vl",
        False,
        36,
        dict(
            hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8,
            head_dim=128, vocab_size=151936,
        ),
        dict(
            hidden_size=1152,
            intermediate_size=4304,
            num_heads=16,
            out_hidden_size=4096,
            deepstack_visual_indexes=[0, 1, 2],
        ),
        8,
    ),
    "LLaVA-OneVision-0.5B": (
        "llava_onevision",
        True,
        24,
        dict(
            hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
            vocab_size=152000,
        ),
        {},
        2,
    ),
    "LLaVA-OneVision-7B": (
        "llava_onevision",
        False,
        28,
        dict(
            hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
            vocab_size=152128,
        ),
        {},
        2,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configurations(name):
    """Real widths, two of the decoder's layers, no weights at all: adapters, trainable tokens and head land
    where and as large as they should.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    family, tied, depth, text, vision, merger = REAL[name]
    kind = "qwen2" if family == "llava_onevision" else f"{family}_text"
    vision = vision | ({"num_hidden_layers": 3} if family == "llava_onevision" else {"depth": 3})
    if family == "llava_onevision":  # its defaults are the real ones, given whole or not at all
        vision |= dict(
            model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
            num_attention_heads=16, patch_size=14, image_size=384, vision_use_head=False,
        )
    config = AutoConfig.for_model(
        family,
        text_config=text | {"model_type": kind, "num_hidden_layers": 2, "tie_word_embeddings": tied},
        vision_config=vision,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    hf.requires_grad_(False)
    row = families.FAMILIES[family]
    model = crystal.backbone.model.Model(
        hf, AutoTokenizer.from_pretrained(crystal.backbone.model.TINY), row.images(None, config), row, name
    )
    settings = methods.parse(["--lora_on", "language,vision,merger"])
    names = model.add_adapters(settings)
    blocks, D, r, d = (
        3,
        text["hidden_size"],
        16,
        text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]),
    )
    per_block = {"qwen2_5_vl": 5, "qwen3_vl": 4, "llava_onevision": 6}[family]
    assert len(names) == 7 * 2 + per_block * blocks + merger and model.tied == tied == (
        hf.config.tie_word_embeddings and "lm_head.weight" in hf.all_tied_weights_keys
    )
    H, G, I = text["num_attention_heads"] * d, text["num_key_value_heads"] * d, text["intermediate_size"]
    layer = r * ((D + H) + 2 * (D + G) + (H + D) + 3 * (D + I))
    language = sum(p.numel() for n, p in hf.named_parameters() if "lora" in n and "language_model" in n)
    # The adapters of all layers, in bytes of bfloat16.
    assert language == 2 * layer and depth * layer * 2 < 0.9e9
    model.add_tokens(layout.new_tokens(8, "diverse"))
    trained = dict(model.new_tokens.named_parameters())
    assert {n: tuple(p.shape) for n, p in trained.items()} == {
        n: (12, D) for n in (["embedding"] if tied else ["embedding", "head"])
    }
    assert hf.lm_head.weight.shape == (text["vocab_size"], D)


def test_what_is_not_supported_is_told_in_one_line(family_dirs, tmp_path, monkeypatch):
    with pytest.raises(
        UserError,
        match="^[^\n]*--max_pixels mean nothing to llava_onevision: its image_grid_pinpoints[^\n]*$",
    ):
        crystal.backbone.model.load(str(family_dirs("llava_onevision", True)), max_pixels=10**5)
    (tmp_path / "config.json").write_text('{"model_type": "mllama"}')
    with pytest.raises(
        UserError,
        match="^[^\n]*'mllama' has no row in families.py .known: qwen2_5_vl, qwen3_vl, llava_onevision.; "
        "tutorials/10_backbones.md[^\n]*$",
    ):
        crystal.backbone.model.load(str(tmp_path))
    wrong = replace(families.FAMILIES["qwen3_vl"], merger=r"model\.visual\.merger\.mlp\.\d+")
    monkeypatch.setitem(families.FAMILIES, "qwen3_vl", wrong)
    model = crystal.backbone.model.load(str(family_dirs("qwen3_vl", True)))
    with pytest.raises(UserError, match="--lora_on language,merger: no Linear of it matches .* in its row"):
        model.add_adapters(methods.parse(["--lora_on", "language,merger"]))


# --- the dual path ---


@each
@pytest.mark.parametrize(
    "flags",
    [
        ("--attn_layers", "all", "--attn_columns", "all", *FULL),
        ("--method", "released", "--lora_dropout", "0", "--checkpointing"),
    ],
    ids=["paper", "released"],
)
def test_realisations_are_equal(setup, float64_modules, family, flags):
    """Ragged pairs, one with two images: logits' losses and every gradient, adapters in the vision tower
    and its mergers too.
    """
    found = []
    for how in ("hidden", "kv", "packed"):
        s = setup("--teacher_grad", "--latent_copy", how, *flags, family=family, tied="released" not in flags)
        s.model.train("--checkpointing" in flags)
        terms = s.objective(s.batch, 0.0)
        found.append((terms, gradients(sum(terms[n] for n in s.settings.weights if n in terms), s.named)))
    (terms, grads), rest = found[0], found[1:]
    for other_terms, other in rest:
        assert all(abs(terms[n] - other_terms[n]) < 1e-10 for n in terms)
        assert all((grads[n] - other[n]).abs().max() < 1e-10 for n in grads)
    # B is 0 at first, so A's gradient is.
    dead = [n for n in grads if grads[n].abs().max() < 1e-12 and "lora_A" not in n]
    assert not dead and len(grads) > 50


# --- methods ---

METHODS = {
    "sft": (),
    "livr": (),
    "lavit": ("--lora_dropout", "0"),
    "valr": ("--encoders", "own,tiny"),
    "crystal": ("--latent_copy", "packed"),
}


@each
@pytest.mark.parametrize("method", METHODS)
def test_every_term_moves_what_trains(setup, family, method):
    s = setup(
        "--method",
        method,
        "--tune",
        "full",
        *METHODS[method],
        family=family,
        tied=method in ("livr", "crystal"),
    )
    # LIVR's masked stage, LaViT's gate nearly shut, VaLR's latents.
    progress = Progress(0, 1 if method == "valr" else 0, 0.1, 0.1)
    terms = s.objective(s.batch, progress)
    weights = {n: s.settings.weights.get(n, 1.0) for n in terms if n not in s.method.monitored}
    assert (
        set(weights)
        == {
            "sft": {"ce"},
            "livr": {"ce"},
            "lavit": {"ce", "semantics", "gaze"},
            "valr": {"ce", "repa"},
            "crystal": {"ce_int", "ce_cor", "kl", "attn"},
        }[method]
    )
    for name in weights:
        grads = gradients(terms[name], s.named)
        first = [n for n in grads if ".layers.0.self_attn" in n and n.endswith("weight")]
        assert first and all(grads[n].abs().max() > 1e-9 for n in first), name
    total = gradients(sum(w * terms[n] for n, w in weights.items()), s.named)
    if s.model.new_tokens is not None:
        assert next(g for n, g in total.items() if n.endswith("new_tokens.embedding")).abs().max() > 1e-9
    before = {n: p.detach().clone() for n, p in s.named}
    with torch.no_grad():
        for n, p in s.named:
            p -= 1e-3 * total[n]
        s.model.after_update()
        assert any(not torch.equal(before[n], p) for n, p in s.named)
        again = s.objective(s.batch, progress)
    lost = lambda terms: float(sum(w * terms[n].detach() for n, w in weights.items()))
    assert lost(again) < lost(terms)  # a small step along the gradient


@each
def test_the_bottleneck_hides_the_image(setup, family):
    """LIVR's first stage without latents to look through: another picture changes nothing behind the image.
    """
    s = setup("--method", "livr", "--tune", "tokens", family=family, which=[2])
    biases = s.method.biases(s.model, s.batch)
    image, end = s.batch["image"][0], int(s.batch["image"].max())
    other = dict(s.batch, pixel_values=s.batch["pixel_values"].flip(0) * 2)
    latents = s.batch["latents"][0]
    blocked = [
        *biases,
        biases[0].__class__(
            biases[0].queries | torch.isin(torch.arange(len(biases[0].queries[0])), latents), biases[0].keys
        ),
    ]
    with torch.no_grad():
        behind = lambda batch, mask: s.model.hidden(batch, biases=mask)[0, end + 2 :]
        assert torch.equal(behind(s.batch, blocked), behind(other, blocked))
        assert not torch.equal(behind(s.batch, biases), behind(other, biases))  # the latents let it through
    assert biases[0].keys[0][image].all() and not biases[0].queries[0][image].any()


@each
def test_a_teacher_looks_and_a_student_learns_its_gaze(setup, family):
    """lavit_teacher's features of a family serve a student of it, grid for grid; a teacher's single grid
    serves both grids of LLaVA's.
    """
    s = setup("--method", "lavit", "--tune", "lora", family=family)
    found = lavit_teacher.look(s.model, s.fmt, s.method, s.records, 3)
    grids = [x["gaze_grid"] for x, _ in found]
    several = 2 if family == "llava_onevision" else 1
    assert [len(g) for g in grids] == [several, several, 2 * several]
    assert (
        [sum(families.Grid(*view).tokens for view in g.tolist()) for g in grids]
        == [len(x["gaze"]) for x, _ in found]
        == (s.batch["image"] >= 0).sum(1).tolist()
    )
    pad = lambda name: torch.nn.utils.rnn.pad_sequence([x[name] for x, _ in found], batch_first=True)
    targets = s.method.targets(s.model, {**s.batch, "gaze": pad("gaze"), "gaze_grid": pad("gaze_grid")})
    for b, (x, _) in enumerate(found):
        rows = [families.Grid(*view) for view in x["gaze_grid"].tolist()]
        place = [[1] * v.columns + [0] * v.newlines for v in rows for _ in range(v.rows)]
        seen = x["gaze"] * torch.tensor(sum(place, []))
        assert (
            torch.equal(targets[b, : len(seen)], top(seen, 8))
            and not targets[b, len(x["gaze"]) :].any()
        )
    one = torch.arange(4.0)
    targets = s.method.targets(
        s.model,
        {
            **s.batch,
            "gaze": one.repeat(3, 2),
            "gaze_grid": torch.tensor([[[2, 2, 0], [0, 0, 0]]] * 2 + [[[2, 2, 0], [2, 2, 0]]]),
        },
    )
    own = [tuple(g) for g in grids[0].tolist()]
    assert torch.allclose(
        targets[0, : len(found[0][0]["gaze"])], top(torch.cat([align(one, [(2, 2)], [g]) for g in own]), 8)
    )


@each
def test_pictures_know_the_first_images_grid(setup, family):
    s = setup(family=family, which=[0])
    seen = figures.answer_attention(s.model, s.batch, s.settings, {0, 2}, s.method.copied(s.batch))
    assert tuple(seen.image.shape[1:]) == s.model.image_processor.grids(s.batch["image_grid_thw"])[0][0][:2]
    total = seen.image.sum((1, 2)) + seen.latents.sum(1) + seen.rest
    assert torch.allclose(total, torch.ones(2), atol=1e-5) and seen.image.min() > 0


@each
@pytest.mark.parametrize("place", ["after", "before"])
def test_livrs_export_asks_as_training_does(setup, family, place):
    s = setup("--method", "livr", "--place", place, family=family)
    n = s.model.image_tokens(s.batch["image_grid_thw"])[0]
    ids, _, latents = s.fmt.question([("user", "<image>\nWhat is it?")], [n])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    rendered = s.model.tokenizer.apply_chat_template(
        messages, chat_template=s.fmt.chat_template(), tokenize=False, add_generation_prompt=True
    )
    token = s.model.family.marks[0]
    assert s.model.tokenizer.decode(ids).replace(token * n, token) == rendered
    assert [ids[t] for t in latents] == s.fmt.latents and s.model.tokenizer.decode(ids[latents[0] - 1]) in (
        s.model.family.marks[-1] if place == "before" else "What is it?"
    )


# --- feedback ---


@each
def test_feedback_equals_whole_forwards(setup, float64_modules, family):
    """A batch of two, latents at different places: the recurrence, one full forward per latent, and
    the exact parallel iteration.
    """
    s = setup("--method", "sft", "--tune", "full", family=family, which=[0, 2])
    batch, ends = dict(s.batch), s.batch["attention_mask"].sum(1).tolist()
    latents = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for b, places in enumerate([(3, 4), (2,)]):
        latents[b, [ends[b] - p for p in places]] = True
    h, _ = feedback.recurrence(s.model, batch, latents)
    real = batch["attention_mask"].bool()
    T = int(latents.sum(1).max()) - 1
    assert (feedback.parallel(s.model, batch, latents, T)[0] - h)[real].abs().max() < 1e-10
    # By the letter: the whole batch from the start for every latent, its embedding overwritten as
    # it is looked up.
    fed = {}

    def overwrite(module, args, out):
        out = out.clone()
        for (b, t), state in fed.items():
            out[b, t] = state
        return out

    hook = s.model.hf.get_input_embeddings().register_forward_hook(overwrite)
    for n in range(T + 1):
        states = s.model.hidden(batch)
        fed |= {
            (b, t): states[b, t - 1]
            for b, t in (
                (b, latents[b].nonzero()[:, 0].tolist()[n]) for b in range(2) if int(latents[b].sum()) > n
            )
        }
    expected = s.model.hidden(batch)
    hook.remove()
    assert (h - expected)[real].abs().max() < 1e-10
    loss = lambda h: ce_rows(
        s.model.logits(h[:, :-1][real[:, 1:]]), batch["input_ids"][:, 1:][real[:, 1:]]
    ).sum()
    a, b = gradients(loss(h), s.named), gradients(loss(expected), s.named)
    assert all((a[n] - b[n]).abs().max() < 1e-10 * (1 + b[n].abs().max()) for n in a)


def prompts_of(s):
    for record in s.records:
        e = s.examples.pixels([data.load_image(p, "") for p in record.images])
        ids, _, _ = s.fmt.question(record.turns, s.model.image_tokens(e["image_grid_thw"]))
        yield ids, e["pixel_values"], e["image_grid_thw"]


@each
def test_a_padded_batch_answers_as_each_alone(setup, family):
    """Left padding, transformers' own generation; under LIVR's mask too."""
    s = setup("--method", "livr", dtype=torch.float32, family=family)
    s.model.eval()
    prompts, answers = list(prompts_of(s)), []
    for biases in (None, lambda batch: s.method.biases(s.model, batch)):
        answers.append(generate(s.model, prompts, s.fmt, 4, biases))
        assert answers[-1] == [generate(s.model, [p], s.fmt, 4, biases)[0] for p in prompts]
    assert answers[0] != answers[1]


@each
def test_fed_back_latents_are_decoded_alike_in_a_batch_and_alone(setup, family, monkeypatch):
    """Right padding and our own loop; the prompt's last state is made to open the latents, which a
    random model never does.
    """
    s = setup("--method", "valr", "--encoders", "none", family=family)
    s.model.eval()
    head, calls = s.model.logits, []

    def logits(h):
        calls.append(h)
        out = head(h)
        out[:, s.fmt.latent_start_id] += 1e3 * (len(calls) == 1)
        return out

    def said(prompts):
        calls.clear()
        monkeypatch.setattr(
            generate_module,
            "decode_feedback",
            lambda *args: ids.append(decode_feedback(*args, max_thought=6)) or ids[-1],
        )
        generate(s.model, prompts, s.fmt, 4)
        return ids[-1]

    ids, prompts = [], list(prompts_of(s))
    monkeypatch.setattr(s.model, "logits", logits)
    together = said(prompts)
    assert together == [said([p])[0] for p in prompts]
    pad = s.model.tokenizer.pad_token_id
    assert (
        all(
            x[:5] == [s.fmt.latent_start_id, pad, pad, pad, s.fmt.latent_end_id] and len(x) > 6
            for x in together
        )
        and len({tuple(x) for x in together}) == 3
    )


# --- export ---

STOCK = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
torch.set_num_threads(1)
for directory, questions in json.loads(sys.argv[1]):
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    for question, paths in questions:
        messages = [{"role": "user", "content": [{"type": "image"}] * len(paths) + [{"type": "text", "text": question}]}]
        images = [Image.open(p) for p in paths]
        images = processor(images=[images] if "llava" in model.config.model_type else images, return_tensors="pt")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        with torch.no_grad():
            counts = [len(f) for f in model.model.get_image_features(**images).pooler_output]  # what the model itself makes of them
        for n in counts:
            text = text.replace(token, "@@" * n, 1)
        ids = tokenizer(text.replace("@@", token), return_tensors="pt")
        kinds = {} if "llava" in model.config.model_type else {"mm_token_type_ids": (ids["input_ids"] == model.config.image_token_id).int()}
        out = model.generate(**ids, **images, **kinds, max_new_tokens=5, do_sample=False)
        print(json.dumps(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip()))
assert "crystal" not in sys.modules
"""  # noqa: E501


@pytest.fixture(scope="module")
def runs(family_dirs, records_file, tmp_path_factory):
    """{(family, kind): run directory}, exported."""
    root, made = tmp_path_factory.mktemp("runs"), {}
    for family in FAMILIES:
        for kind, tied, more in (("tied", True, ()), ("untied", False, ("--method", "released"))):
            made[family, kind] = train.main(
                [
                    "--model", str(family_dirs(family, tied)), "--data", str(records_file), "--latents", "3",
                    "--lora_r", "2", "--lr", "1e-2", "--max_steps", "2", "--eval_every", "0",
                    "--log_every", "9", "--output", str(root / f"{family}-{kind}"), *more,
                ]
            )
            export.export(
                made[family, kind],
                merged=made[family, kind] / "merged",
                adapter=made[family, kind] / "adapter",
            )
    return made


def test_merged_directories_answer_as_we_do_in_transformers_alone(runs, records_file, tmp_path):
    """One process for all directories: importing transformers is what takes the time."""
    records, _ = data.read(records_file)
    asked = [(r.turns[-1][1].replace("<image>", "").strip(), [str(p) for p in r.images]) for r in records]
    ours = []
    for run in runs.values():
        model, fmt, _ = opening.open_model(run)
        for r in records:
            images = model.image_processor(images=[Image.open(p) for p in r.images], return_tensors="pt")
            ids, _, _ = fmt.question(r.turns, model.image_tokens(images["image_grid_thw"]))
            ours.append(generate(model, [(ids, images["pixel_values"], images["image_grid_thw"])], fmt, 5)[0])
    done = subprocess.run(
        [sys.executable, "-c", STOCK, json.dumps([(str(run / "merged"), asked) for run in runs.values()])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(x) for x in done.stdout.splitlines()] == ours and len(set(ours)) > 3


@each
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_untouched_weights_are_the_bases_to_the_bit(runs, family_dirs, family, kind):
    """Every tensor, bit for bit, but those that an adapter was merged into; of the vocabulary all rows
    but the trained ones.
    """
    run = runs[family, kind]
    merged, base = (
        load_file(run / "merged" / "model.safetensors"),
        load_file(family_dirs(family, kind == "tied") / "model.safetensors"),
    )
    assert merged.keys() == base.keys()
    # What its processor needs beside the image processor's settings, which stand elsewhere.
    if family == "llava_onevision":
        carried = json.loads((run / "merged" / "processor_config.json").read_text())
        assert (
            carried["num_image_tokens"] == 4
            and "image_processor" not in carried
            and (run / "merged" / "preprocessor_config.json").is_file()
        )
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    touched = {f"{n}.weight" for n in adapter["target_modules"]}
    trained = adapter["trainable_token_indices"]
    assert (
        touched < base.keys()
        and any("language_model" in n for n in touched)
        and any("vis" in n for n in touched) == (kind == "untied")
    )
    for name in base:
        rows = trained.get(name.removesuffix(".weight"), [])
        same = torch.ones(len(base[name]), dtype=torch.bool)
        same[rows] = False
        equal = torch.equal(merged[name][same].view(torch.uint8), base[name][same].view(torch.uint8))
        assert equal == (name not in touched), name
        assert all(not torch.equal(merged[name][i], base[name][i]) for i in rows), name
    assert set(trained) == {"model.language_model.embed_tokens"} | (
        {"lm_head"} if kind == "untied" else set()
    )


@each
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_adapter_loads_in_peft_with_equal_logits(runs, family_dirs, family, kind, setup):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    run = runs[family, kind]
    model, _, _ = opening.open_model(run)
    stock = AutoModelForImageTextToText.from_pretrained(
        family_dirs(family, kind == "tied"), dtype=torch.float32
    )
    peft = PeftModel.from_pretrained(stock, run / "adapter").eval()
    s = setup(tied=kind == "tied", dtype=torch.float32, family=family)
    with torch.no_grad():
        ours, theirs = model.logits(model.hidden(s.batch)), peft(**batched(s)).logits
        before = s.model.logits(s.model.hidden(s.batch))
    real = s.batch["attention_mask"].bool()
    assert (ours[real] - theirs[real]).abs().max() < 1e-4 < 1e-2 < (ours[real] - before[real]).abs().max()


# --- the table, typed out ---

NAMES = {  # family: part: names of Linear modules that get adapters
    "qwen2_5_vl": {
        "language": [
            "model.language_model.layers.27.self_attn.o_proj",
            "model.language_model.layers.0.mlp.gate_proj",
        ],
        "vision": [
            "model.visual.blocks.31.attn.qkv",
            "model.visual.blocks.0.attn.proj",
            "model.visual.blocks.7.mlp.up_proj",
        ],
        "merger": ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"],
    },
    "qwen3_vl": {
        "language": [
            "model.language_model.layers.35.self_attn.k_proj",
            "model.language_model.layers.0.mlp.down_proj",
        ],
        "vision": [
            "model.visual.blocks.26.attn.qkv",
            "model.visual.blocks.0.mlp.linear_fc1",
            "model.visual.blocks.0.mlp.linear_fc2",
        ],
        "merger": ["model.visual.merger.linear_fc1", "model.visual.deepstack_merger_list.2.linear_fc2"],
    },
    "llava_onevision": {
        "language": [
            "model.language_model.layers.23.self_attn.v_proj",
            "model.language_model.layers.10.mlp.up_proj",
        ],
        "vision": [
            "model.vision_tower.vision_model.encoder.layers.25.self_attn.out_proj",
            "model.vision_tower.encoder.layers.3.mlp.fc2",
        ],
        "merger": ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
    },
}
NOBODYS = [
    "lm_head",
    "model.language_model.embed_tokens",
    "model.language_model.layers.0.self_attn",
    "model.visual.patch_embed.proj",
    "model.language_model.layers.0.self_attn.q_proj.base",
    "model.language_model.layers.x.mlp.up_proj",
    "model.vision_tower.vision_model.head.mlp.fc1",
]


@pytest.mark.parametrize("family", NAMES)
def test_each_part_names_its_own_modules_and_no_others(family):
    row = families.FAMILIES[family]
    patterns = {part: getattr(row, part) for part in NAMES[family]}
    for part, names in NAMES[family].items():
        for name in names:
            assert [p for p, pattern in patterns.items() if re.fullmatch(pattern, name)] == [part], name
    assert not any(re.fullmatch(pattern, name) for name in NOBODYS for pattern in patterns.values())


def test_what_else_a_row_says():
    """The marks around an image, the last one closing it; how the vision tower attends.

    Who prepares images.
    """
    qwen = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    found = {
        name: (row.marks, row.vision_attention, row.images.__name__, row.images.bounded)
        for name, row in families.FAMILIES.items()
    }
    assert found == {
        "qwen2_5_vl": (qwen, "crystal_flash_vision", "Images", True),
        "qwen3_vl": (qwen, "crystal_flash_vision", "Images", True),
        "llava_onevision": (("<image>",), "sdpa", "Tiles", False),
    }


def test_tokens_and_rows_of_qwens_images_by_hand():
    """6 x 8 patches, merged two by two: 3 rows of 4 tokens, from 48 rows of pixels. Merged three by three.

    2 x 2 of 6 x 8.
    """
    grid = torch.tensor([[1, 6, 8], [1, 4, 10], [2, 2, 6]])
    images = families.Images(SimpleNamespace(merge_size=2, size="own"), None)
    assert images.grids(grid) == [[(3, 4, 0)], [(2, 5, 0)], [(1, 3, 0)]]
    assert images.tokens(grid[:2]) == [12, 10] and images.rows(grid) == [48, 40, 24] and images.size == "own"
    assert families.Images(SimpleNamespace(merge_size=3), None).grids(grid[:1]) == [[(2, 2, 0)]]
    batch = {"input_ids": 1, "image_grid_thw": grid}
    assert images.keywords(batch) is batch


def test_which_of_llavas_images_belong_together():
    """One tile is one of several of a record, two and more are an image on its own.

    1 1 | 3 | 1 1 1 | 5 | 2.
    """
    images = families.Tiles(None, None)
    tiles = torch.tensor(
        [[1, 10, 20], [1, 30, 40], [3, 50, 60], [1, 1, 1], [1, 2, 2], [1, 3, 3], [5, 70, 80], [2, 90, 95]]
    )
    given = {
        "input_ids": "ids",
        "mm_token_type_ids": "kinds",
        "image_grid_thw": tiles,
        "position_ids": torch.arange(12).view(3, 2, 2),
    }
    found = images.keywords(given)
    assert found.keys() == {"input_ids", "position_ids", "image_sizes", "batch_num_images"}
    assert found["batch_num_images"] == [2, 1, 3, 1, 1]
    assert found["image_sizes"].tolist() == [
        [10, 20], [30, 40], [50, 60], [1, 1], [2, 2], [3, 3], [70, 80], [90, 95],
    ]
    assert found["position_ids"].tolist() == [[0, 1], [2, 3]] and images.rows(tiles) == [
        1, 1, 3, 1, 1, 1, 5, 2,
    ]
    assert images.keywords({"input_ids": "ids", "position_ids": None, "image_grid_thw": None}).keys() == {
        "input_ids", "position_ids", "image_grid_thw",
    } - {"image_grid_thw"}
    assert images.positions(None, {"input_ids": torch.zeros(2, 3)}).tolist() == [[[0, 1, 2]] * 2] * 3


def test_llavas_grid_of_a_wide_picture_by_hand():
    """Four tiles in a row of 2 x 2 patches.

    The whole image in one tile, then 8 columns and a newline for each of two rows.
    """
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=28, patch_size=14),
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[28, 112], [112, 28], [56, 56]],
    )
    images = families.Tiles(None, config)
    wide, tall = torch.tensor([[5, 30, 120]]), torch.tensor([[5, 120, 30]])
    assert images.grids(wide) == [[(2, 2, 0), (2, 8, 1)]] and images.tokens(wide) == [4 + 18]
    assert images.grids(tall) == [[(2, 2, 0), (8, 2, 1)]] and images.tokens(tall) == [4 + 24]


def test_a_newline_is_no_place_of_the_picture():
    """Of a wide picture's 22 tokens two are newlines: a box around all holds 20, 0.909 of even attention.

    Two views of 2 rows: 4 + 2 x (8 + 1) tokens. The right half of the picture is columns 4 to 7 of 8.
    """
    whole, tiles = families.Grid(2, 2), families.Grid(2, 8, 1)
    found = torch.cat([inside([[0, 0, 120, 30]], (120, 30), grid) for grid in (whole, tiles)])
    assert found.sum() == 20 and len(found) == 22
    assert focus(torch.ones(22), found).item() == pytest.approx(20 / 22)
    half = inside([[60, 0, 120, 15]], (120, 30), tiles).view(2, 9)
    assert half.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 0], [0] * 9]
    assert inside([[0, 0, 9, 9]], (120, 30), families.Grid(1, 0, 1)).tolist() == [False]


def test_a_gaze_is_aligned_without_its_newlines():
    """By hand: 1 x 2 to 1 x 4 lies at -1/4, 1/4, 3/4 and 5/4; what a newline got, 9, goes nowhere."""
    plain, wide = families.Grid(1, 2), families.Grid(1, 4, 1)
    assert align(torch.tensor([0.0, 1.0]), [plain], [wide]).tolist() == [0, 0.25, 0.75, 1, 0]
    seen = torch.tensor([0.0, 1.0, 9.0])
    assert align(seen, [families.Grid(1, 2, 1)], [families.Grid(1, 4)]).tolist() == [0, 0.25, 0.75, 1]
    assert align(seen, [families.Grid(1, 2, 1)] * 1, [families.Grid(1, 2, 1)]).tolist() == [0, 1, 0]
    assert align(seen, [plain, families.Grid(1, 0, 1)], [plain, families.Grid(1, 0, 1)]).tolist() == [0, 1, 0]


def test_a_teacher_of_llavas_says_where_newlines_stand(setup):
    s = setup("--method", "lavit", "--tune", "lora", family="llava_onevision", which=[0])
    s.records[0].boxes = [[0, 0, 112, 84]]  # all of it
    tensors, told = lavit_teacher.look(s.model, s.fmt, s.method, s.records, 1)[0]
    rows = tensors["gaze_grid"].tolist()
    assert [row[2] for row in rows] == [0, 1]
    place = torch.tensor(sum([[1.0] * c + [0.0] * n for r, c, n in rows for _ in range(r)], []))
    assert told["focus"] == pytest.approx(float((tensors["gaze"] * place).sum() / tensors["gaze"].sum()))
    assert told["focus"] < 1
