"""An adapter's directory becomes a model to ask: our own export's, or peft's, on the base that it names.

The adapter is merged into the base's weights as they are loaded, W + s B A, and rows of the vocabulary
that it trained, or whole weights, replace the base's. What else peft can do (DoRA, biases, ranks that differ
by layer) is refused by its name: peft merges it (`merge_and_unload`), and the result opens.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

import crystal.backbone.model
from crystal.backbone.files import why
from crystal.lora import CONFIG, PREFIX, WEIGHTS
from crystal.runtime.config import UserError

# What would change W by another rule, and its value where it does not.
OTHER_RULES = {
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_parameters": None,
    "megatron_config": None,
}
ROWS = ".token_adapter.trainable_tokens_delta"


def is_adapter(name):
    """Whether a directory holds an adapter and no model."""
    path = Path(name)
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def load(name, dtype=torch.float32, device="cpu", min_pixels=None, max_pixels=None):
    """An adapter's directory -> Model: the base with the adapter merged into it, frozen.

    The tokenizer and its chat template are the adapter's where it has them, else the base's. Arguments:
    see model.load. UserError if the base is not there, or anything in the directory has no place in it.
    """
    directory = Path(name)
    config = read_config(directory)
    model = base_of(config, directory, dtype, min_pixels, max_pixels)

    try:
        state = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{directory / WEIGHTS}: not a readable safetensors file: {problem}") from None
    # A base without spare rows was enlarged for the new tokens when it was trained, and is here.
    stems = {key.removeprefix(PREFIX).removesuffix(ROWS) for key in state if key.endswith(ROWS)}
    trained = [ids for stem in stems if (ids := token_ids(config, stem))]
    model.enlarge(max((max(ids) + 1 for ids in trained), default=0))
    merge(model, state, config, directory)

    if (directory / "tokenizer_config.json").is_file():
        take_tokenizer(model, directory)
    model.name = str(name)
    return model.to(device)


def read_config(directory):
    """The contents of adapter_config.json -> dict; UserError for what is not LoRA as crystal knows it."""
    file = directory / CONFIG
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: not a readable adapter config: {error}") from None

    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}; LORA alone can be opened")
    for key, usual in OTHER_RULES.items():
        if config.get(key) not in (usual, None):
            raise UserError(
                f"{file}: {key} is {config[key]!r}, which crystal does not know; merge it by peft "
                "(merge_and_unload, save_pretrained) and open the result"
            )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{file}: base_model_name_or_path is {base!r}; a model is wanted")
    r, alpha = config.get("r"), config.get("lora_alpha")
    is_rank = isinstance(r, int) and r > 0
    if not is_rank or not isinstance(alpha, (int, float)):
        raise UserError(f"{file}: r is {r!r} and lora_alpha {alpha!r}; a rank and a number are wanted")
    return config


def base_of(config, directory, dtype, min_pixels, max_pixels):
    """The Model that adapter_config.json names; UserError that names both files where it cannot be had."""
    try:
        base = config["base_model_name_or_path"]
        return crystal.backbone.model.load(base, dtype, "cpu", min_pixels, max_pixels)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: base_model_name_or_path: {error}") from None


@torch.no_grad()
def merge(model, state, config, directory):
    """Puts an adapter's tensors {peft's key: tensor} into the model's weights; UserError names what is left.

    Matrices act by alpha / r, or by alpha / sqrt r where the adapter is rank-stabilised.
    """
    weights = dict(model.hf.named_parameters())
    if model.tied:
        weights["lm_head.weight"] = model.hf.lm_head.weight
    r = config["r"]
    scale = config["lora_alpha"] / (r**0.5 if config.get("use_rslora") else r)
    file = directory / WEIGHTS

    left = set(state)
    for key, tensor in state.items():
        name = key.removeprefix(PREFIX)
        stem, _, kind = name.partition(".lora_")
        if kind == "A.weight":
            other = f"{PREFIX}{stem}.lora_B.weight"
            W = weights.get(f"{stem}.weight")
            if W is not None and other in state:
                add_product(W, tensor, state[other], r, scale, f"{file}: key {key}")
                left -= {key, other}

        elif name.endswith(ROWS):
            stem = name.removesuffix(ROWS)
            W = weights.get(f"{stem}.weight")
            ids = token_ids(config, stem)
            if W is not None and ids is not None:
                put_rows(W, ids, tensor, f"{file}: key {key}")
                left.discard(key)

        elif name in weights and weights[name].shape == tensor.shape:  # a module that was trained whole
            weights[name].copy_(tensor)
            left.discard(key)

    if left:
        raise UserError(
            f"{file}: key {min(left)} has no place in {config['base_model_name_or_path']}; if another base "
            "was trained, name it there, and what is no low-rank matrix is merged by peft (merge_and_unload)"
        )


def add_product(W, A, B, r, scale, where):
    """W + scale B A in W's place, summed in float32 (float64 if W is) and rounded once; W [out,in]."""
    wanted = [r, W.shape[1]], [W.shape[0], r]
    found = list(A.shape), list(B.shape)
    if found != wanted:
        base = f"with r {r} the base's weight {list(W.shape)} wants"
        said = f"{where} has shape {found[0]} beside {found[1]}"
        raise UserError(f"{said}; {base} {wanted[0]} beside {wanted[1]}")
    wide = torch.promote_types(W.dtype, torch.float32)
    BA = B.to(wide) @ A.to(wide)
    W.copy_(W.to(wide) + scale * BA)


def put_rows(W, ids, rows, where):
    """Rows [n,D] in the place of W's rows `ids`; W [V,D]."""
    inside = all(0 <= i < len(W) for i in ids)
    if not inside or rows.shape != (len(ids), W.shape[1]):
        raise UserError(
            f"{where} has shape {list(rows.shape)}, for {len(ids)} tokens of a vocabulary {list(W.shape)} "
            f"up to token {max(ids)}"
        )
    W[ids] = rows.to(W.dtype)


def token_ids(config, stem):
    """The vocabulary's rows that an adapter trained of the module `stem`, from trainable_token_indices.

    peft keeps a list for the embedding alone, or lists by module names; None where there are none.
    """
    said = config.get("trainable_token_indices")
    if isinstance(said, dict):
        # A module is named in full or by its end.
        named = [ids for name, ids in said.items() if f".{stem}".endswith(f".{name}")]
        said = named[0] if named else None
    if not isinstance(said, list) or not said:
        return None
    return said if all(isinstance(i, int) for i in said) else None


def take_tokenizer(model, directory):
    """Gives the model the tokenizer of the adapter's directory, whose new tokens must have rows."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers and its parts raise a dozen kinds for files that do not fit
        problem = why(error)
        raise UserError(f"{directory}: its tokenizer cannot be loaded: {problem}") from None

    rows = model.hf.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"{directory}: its tokenizer has {len(tokenizer)} tokens, the base's vocabulary {rows} rows"
        )
    if tokenizer.chat_template is None:  # some base models keep it with the processor
        tokenizer.chat_template = model.tokenizer.chat_template
    tokenizer.image_marks = model.family.marks
    model.tokenizer = tokenizer
