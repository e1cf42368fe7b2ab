"""The files around the tiny model's weights: tokenizer, chat template, image processor and configuration.

The directory looks like Qwen2.5-VL's in all that code can see: the same model class, the same image processor
class, a byte-level BPE that splits text as Qwen's does, the same 22 special tokens in the same order, spare
rows after the last token. Only the sizes are small. The merges are learned from the toy scenes' own text, so
a question is about ten tokens.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2Tokenizer

from crystal.runtime import toy

SPARE_ROWS = 64  # rows of the embedding after the last token: room for the tokens that a method adds

# Qwen2.5's added tokens, in the order of its vocabulary, and whether decoding may skip them.
CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VISIBLE = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]

# What separates words before any merge: contractions, letters with one leading character, single
# digits, punctuation, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = (
    """\
{%- if not messages or messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\n"""
    + SYSTEM
    + """<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)


# --- tokenizer ---


def corpus():
    """Yield the text that the merges are learned from: questions, answers, reasons, and the
    fixed text around them.
    """
    fixed = [
        SYSTEM,
        "system\n",
        "user\n",
        "assistant\n",
        "think",
        "answer",
        "Because the feature of the image is",
        "Describe the image.",
        "Think first.",
        "Answer with one word.",
        "Where is the",
        "How large is the",
        "What is in row 2, column 3?",
        "a",
        "nothing",
    ]
    words = [
        *toy.SHAPES,
        *map(toy.plural, toy.SHAPES),
        *toy.COLOURS,
        *toy.SIZES,
        *(a for f in toy.FAMILIES for a in toy.ANSWERS[f]),
    ]
    yield from fixed * 50 + words * 50 + [" " + word for word in words] * 50
    rng = toy.rng_for("tokenizer")
    for _ in range(500):
        scene = toy.draw_scene(rng)
        for question in filter(None, (toy.ask(scene, family, rng) for family in toy.FAMILIES)):
            yield from (question.text, *question.cot, " ".join(question.cot))


def make_tokenizer(out):
    """Learn the merges, write tokenizer.json, tokenizer_config.json and chat_template.jinja to
    `out`, return the tokenizer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=1000, min_frequency=20, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.add_tokens(
        [AddedToken(token, special=token in CONTROL, normalized=False) for token in CONTROL + VISIBLE]
    )
    bpe.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": CONTROL[1:],
        "add_prefix_space": False,
        "errors": "replace",
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return Qwen2Tokenizer.from_pretrained(out)


# --- configuration ---


def make_config(tokenizer):
    """About 2.9 million parameters, so that the model and its blind twin fit 12 MB in bfloat16."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer) + SPARE_ROWS,
        "hidden_size": 192,
        "intermediate_size": 432,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        # With Qwen's range of 0.02 the vision path of a model this narrow stays almost silent
        # and nothing is learned.
        "initializer_range": 0.07,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 192,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "initializer_range": 0.07,
        "fullatt_block_indexes": [0, 1, 2],  # an image is one window anyway
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def make_directory(out):
    """Write every file of the directory but the weights; return (tokenizer, config)."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(out)
    config = make_config(tokenizer)
    config.dtype = "bfloat16"
    config.save_pretrained(out)
    stop = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    GenerationConfig(
        do_sample=False, eos_token_id=stop, pad_token_id=stop[1], bos_token_id=stop[1]
    ).save_pretrained(out)
    # A toy scene keeps its 112 x 112 pixels, and larger images are reduced to as many tokens.
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 112 * 112,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return tokenizer, config
