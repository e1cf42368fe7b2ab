"""A checkpoint directory becomes a model: loading, new tokens, adapters, and the doors to its forward.

`tiny`, a directory and a hub name take the same road; no path here asks which it is; what differs between
kinds of models is families.py's. B sequences, L length, D hidden size, H query heads, G key/value heads, d
head size, V vocabulary rows, I images.

transformers' own forward runs untouched. What crystal adds reaches it by three doors that transformers
leaves open: a registered attention function (attention_functions.py), a pre-hook on each decoder layer
(latent_copy.py), and keywords of the forward that travel to both (`Model.hidden`).
"""

import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from huggingface_hub import snapshot_download
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import logging as transformers_logging

from crystal.attention_bias import additive_mask
from crystal.backbone import (
    attention_functions,  # noqa: F401 (it registers them)
    files,
)
from crystal.backbone.families import FAMILIES
from crystal.backbone.files import why
from crystal.backbone.no_pictures import taking_part
from crystal.latent_copy import copy_before_each
from crystal.lora import TrainableTokens, add_lora
from crystal.runtime.config import UserError

# In an export: the chat template of the model that was trained, without what the method put into it.
BASE_TEMPLATE = "base_chat_template.jinja"
TINY = Path(__file__).parents[1] / "assets" / "tiny"

# What wrappers put before (torch.compile also amid) the names of the weights that they
# save: DataParallel, torch.compile, PEFT.
WRAPPERS = {r"^(module\.|_orig_mod\.|base_model\.model\.)+": "", r"(?<=\.)_orig_mod\.": ""}


class Model(nn.Module):
    """A transformers model with its tokenizer and image processor, seen as crystal needs it.

    hf: the transformers model. image_processor: a families.Images. new_tokens: TrainableTokens of those that
    were added, or None. base_template: of an export, the chat template that it is trained further with, else
    None. dtype, device: of the weights.
    """

    def __init__(self, hf, tokenizer, image_processor, family, name):
        super().__init__()
        self.hf = hf
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.family = family
        self.name = name
        self.new_tokens = None
        self.base_template: str | None = None
        tokenizer.image_marks = family.marks  # the formats know a tokenizer, not its model

        hf.set_attn_implementation({"text_config": "crystal", "vision_config": family.vision_attention})
        self.layers = hf.model.language_model.layers
        copy_before_each(self.layers)

    @property
    def device(self):
        return self.hf.lm_head.weight.device

    @property
    def tied(self):
        return self.hf.lm_head.weight is self.hf.get_input_embeddings().weight

    def add_tokens(self, tokens, seed=0):
        """Gives `tokens` vocabulary rows, initialised like an average token, and makes those rows trainable.

        One that the vocabulary has already (Qwen3's `<think>`) starts from the row that the model has
        learned for it. The vocabulary matrix keeps its size, unless it has too few spare rows (see
        `enlarge`). Returns the ids.
        """
        known = self.tokenizer.get_vocab().keys() & set(tokens)
        self.tokenizer.add_special_tokens(
            {"additional_special_tokens": tokens}, replace_extra_special_tokens=False
        )
        ids = self.tokenizer.convert_tokens_to_ids(tokens)
        embed, head = self.hf.get_input_embeddings(), self.hf.lm_head

        self.enlarge(max(ids) + 1)

        # An average row plus a little spread: harmless, and far enough apart to become different.
        fresh = [i for i, token in zip(ids, tokens) if token not in known]
        weights = [embed.weight] if self.tied else [embed.weight, head.weight]
        g = torch.Generator().manual_seed(seed)
        for weight in weights if fresh else []:
            used = weight.detach()[: min(fresh)].float()
            noise = torch.randn(len(fresh), used.shape[1], generator=g).to(used.device)
            rows = used.mean(0) + noise * used.std(0) * 0.5
            weight.data[fresh] = rows.to(weight.dtype)

        self.new_tokens = TrainableTokens(embed, head, ids)
        return ids

    @torch.no_grad()
    def enlarge(self, rows):
        """Gives the vocabulary at least so many rows, new ones of zeros, at the input and the output.

        Both matrices stay tied where they were, and the config says how many rows there are. Not one row more
        than is asked for: nobody can generate a token that means nothing.
        """
        if rows <= self.hf.get_input_embeddings().num_embeddings:
            return
        embed, head = self.hf.get_input_embeddings(), self.hf.lm_head
        tied = self.tied
        embed.weight = with_rows(embed.weight, rows)
        head.weight = embed.weight if tied else with_rows(head.weight, rows)
        embed.num_embeddings = head.out_features = rows
        self.hf.config.get_text_config().vocab_size = rows

    def add_adapters(self, settings):
        """Low-rank adapters on the parts named by --lora_on -> the wrapped modules' names.

        UserError for a part without any.
        """
        patterns = [getattr(self.family, part) for part in settings.lora_on.split(",")]
        linears = [n for n, m in self.hf.named_modules() if isinstance(m, nn.Linear)]
        for pattern in patterns:
            if not any(re.fullmatch(pattern, n) for n in linears):
                raise UserError(
                    f"{self.name}: --lora_on {settings.lora_on}: no Linear of it matches {pattern!r} in "
                    "its row of families.py"
                )

        any_part = "|".join(f"(?:{pattern})" for pattern in patterns)
        g = torch.Generator().manual_seed(settings.seed)
        return add_lora(
            self.hf, any_part, settings.lora_r, settings.lora_alpha, settings.lora_dropout, g
        )

    @property
    def kept(self):
        """What transformers' model keeps between two steps of a generation: the next step wants it back."""
        return getattr(self.hf.model, "rope_deltas", None)

    @kept.setter
    def kept(self, value):
        if hasattr(self.hf.model, "rope_deltas"):
            self.hf.model.rope_deltas = value

    def image_tokens(self, grid):
        """image_grid_thw [I,3] -> how many tokens each image takes in the sequence (list of int)."""
        return self.image_processor.tokens(grid)

    def positions(self, batch):
        """Positions [3,B,L] of a batch: M-RoPE's three, or one position three times."""
        return self.image_processor.positions(self.hf.model, batch)

    def keywords(self, inputs):
        """Tensors of a batch by crystal's names -> keywords of transformers' forward and generate."""
        return self.image_processor.keywords(inputs)

    def hidden(self, inputs, latent_copy=None, recorder=None, biases=()):
        """inputs: tensors of a batch (right-padded) -> hidden states after the final norm [B,L,D].

        latent_copy, recorder: see latent_copy.py and attention.py. biases: a list of
        attention_bias.AttentionBias.
        """
        given = {n: inputs[n] for n in ("input_ids", "pixel_values", "image_grid_thw")}
        given["position_ids"] = inputs["position_ids"] if "position_ids" in inputs else self.positions(inputs)

        # Right padding needs no mask: causality alone keeps real tokens from seeing what comes after them.
        mask = None
        if biases:
            wide = torch.promote_types(self.hf.dtype, torch.float32)
            mask = additive_mask(biases, inputs["attention_mask"], wide)           # [B,1,L,L]

        return self.decode(given, mask, latent_copy=latent_copy, recorder=recorder)

    def decode(self, inputs, mask=None, **doors):
        """One forward of transformers' model, without its head -> states after the final norm [B,n,D].

        inputs: input_ids [B,n], pixel_values and image_grid_thw, or inputs_embeds [B,n,D]; and position_ids
        [3,B,n]. mask: what each row sees [B,1,n,S]; None is causal. doors: keywords that reach the layers.
        """
        with taking_part(self, inputs):
            out = self.hf.model(**self.keywords(inputs), attention_mask=mask, use_cache=False, **doors)
        return out.last_hidden_state

    @contextmanager
    def seeing(self, mask):
        """Inside, a cached forward sees `mask`, the additive mask [B,1,L,L] of a prompt, padding included.

        attention_bias.additive_mask makes it. The first forward is the prompt's; a row after it sees of the
        prompt what the prompt's last row sees, and every generated row up to itself.
        """
        seen, L = 0, mask.shape[-1]

        def replace(module, args, kwargs):
            nonlocal seen
            n = kwargs["inputs_embeds"].shape[1]
            seen += n
            now = mask
            if seen > L:
                written = seen - L
                old = mask[:, :, -1:].expand(-1, -1, n, -1)                        # [B,1,n,L]
                new = mask.new_full((n, written), float("-inf")).triu(written - n + 1)
                new = new.expand(len(mask), 1, -1, -1)                             # [B,1,n,written]
                now = torch.cat([old, new], -1)                                    # [B,1,n,seen]
            return args, {**kwargs, "attention_mask": now}

        hook = self.hf.model.language_model.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def logits(self, h):
        """Rows of hidden states [N,D] -> logits [N,V]: the head runs on the rows that a loss reads alone."""
        return self.hf.lm_head(h)

    def trainable(self):
        """(name, parameter) of all that trains in the transformers model and the new tokens."""
        return [(n, p) for n, p in self.named_parameters() if p.requires_grad]

    def after_update(self):
        """After each optimiser update: the vocabulary's own rows follow their trained copies."""
        if self.new_tokens is not None:
            self.new_tokens.sync()


def with_rows(weight, rows):
    """A vocabulary's weight [V,D] -> a frozen one [rows,D], the new rows of zeros."""
    more = weight.new_zeros(rows - len(weight), weight.shape[1])
    return nn.Parameter(torch.cat([weight, more]), requires_grad=False)


def resolve(name):
    """A model's directory or hub name from what the user typed; UserError if it is neither."""
    if name == "tiny":
        return str(TINY)

    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise UserError(f"{path}: an adapter, which answers but is no base; merged/ is one")
            raise UserError(f"{path}: no config.json; --model wants a directory in Hugging Face layout")
        return str(path)

    # owner/name asks a hub; where `owner` is a folder here, or that of all runs, a mistyped path is likelier
    # than a hub's owner.
    looks_local = name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1
    in_a_folder = len(path.parts) > 1 and path.parent.is_dir()
    if path.exists() or looks_local or in_a_folder:
        raise UserError(
            f"{path}: no such directory; --model wants tiny, a directory in Hugging Face layout, or a hub "
            "name (owner/name)"
        )
    return name


def load(name, dtype=torch.float32, device="cpu", min_pixels=None, max_pixels=None, weights=True):
    """A model directory or hub name -> Model, frozen and in evaluation mode.

    min_pixels, max_pixels: bounds on an image's area in pixels after resizing; None keeps the directory's
    own. weights False: shapes alone, on torch's "meta" device, for those who need names and no values. Raises
    UserError if it cannot be loaded or is of a family that crystal does not know. Remote code never runs.
    """
    source = resolve(name)
    transformers_logging.disable_progress_bar()
    config = files.read_config(name, source)
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{name}: model type {config.model_type!r} has no row in families.py "
            f"(known: {', '.join(FAMILIES)}); tutorials/10_backbones.md shows how to add one"
        )
    family = FAMILIES[config.model_type]
    files.refuse_quantised(name, source, config)
    files.check_sizes(name, config)
    files.check_files(name, source)

    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    pixels = {flag: bound for flag, bound in bounds.items() if bound is not None}
    if pixels and not family.images.bounded:
        raise UserError(
            f"{name}: --min_pixels and --max_pixels mean nothing to {config.model_type}: its "
            "image_grid_pinpoints say into what tiles an image is cut"
        )
    if min(pixels.values(), default=1) < 1 or (len(pixels) == 2 and min_pixels > max_pixels):
        raise UserError(
            f"--min_pixels {min_pixels} --max_pixels {max_pixels}: areas in pixels, at least 1, the "
            "first not above the second"
        )

    tokenizer = files.read_tokenizer(name, source, config, family.marks)
    images = files.read_processor(name, source, config, family, pixels)
    template = files.find(source, BASE_TEMPLATE)
    kind = AutoModelForImageTextToText
    try:
        if weights:
            hf = load_weights(kind, source, dtype)
        else:
            device = "meta"
            with torch.device(device):
                hf = kind.from_config(config, trust_remote_code=False, dtype=dtype)
    except Exception as error:  # of what stands in the files, whichever part of transformers stumbles over it
        raise UserError(f"{name}: cannot be loaded as a model: {why(error)}") from error

    # Answers follow generate.py's rules alone: a directory's own (penalties, beams, least lengths) would
    # otherwise decide over what transformers decodes, and not over what our own loop does.
    hf.generation_config = GenerationConfig()

    hf.requires_grad_(False).eval().to(device)
    images.config = hf.config
    model = Model(hf, tokenizer, images, family, name)
    if template:
        model.base_template = template.read_text(encoding="utf-8")
    return model


def load_weights(kind, source, dtype, part=False):
    """kind.from_pretrained(source), but only if every weight of the model comes from the files.

    transformers leaves a weight random where the files hold none of its name, and goes on. Here that is a
    ValueError which names the weights, as are tensors of another shape and those that the model has no place
    for; a head or a tower as a whole that the model has not is told on stderr and left out. part: the model
    is one tower of what the files hold, so that the others' tensors are no mistake. Names that a wrapper left
    (WRAPPERS) are read as meant.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of many lines says what the one line below says
    try:
        hf, found = kind.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            key_mapping=WRAPPERS,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(level)

    problems = []
    if found["missing_keys"]:
        problems.append(f"the files lack {named(found['missing_keys'])}")
    if found["mismatched_keys"]:
        shapes = [f"{key} {list(theirs)}, not {list(ours)}" for key, theirs, ours in found["mismatched_keys"]]
        problems.append(f"of another shape are {named(shapes)}")
    unexpected = [] if part else found["unexpected_keys"]
    unused = unused_parts(hf, unexpected) if unexpected and not problems else {}
    if homeless := set(unexpected) - unused.keys():
        problems.append(f"the model has no place for {named(homeless)}")
    if problems:
        raise ValueError(f"its weights are not this model's: {'; '.join(problems)}")
    if unused:
        count, parts = len(unused), ", ".join(sorted(set(unused.values())))
        print(
            f"note: {source}: {count} tensors of parts that the model does not have are left out: {parts}",
            file=sys.stderr,
        )
    return hf


def unused_parts(hf, keys):
    """{tensor's name: the head or tower that it belongs to} of those that are no part of the model at all.

    A tensor of a part that the model has, a layer too many, say, is none of them: the model would be another.
    """
    found = {}
    for key, name in parameter_names(hf, keys).items():
        # Down the name as far as the model has modules of it.
        module, path = hf, name.split(".")
        while path and hasattr(module, path[0]):
            module = getattr(module, path.pop(0))
        if path and module in (hf, hf.model, hf.model.language_model):
            found[key] = path[0]
    return found


def named(names, most=3):
    """Names in one line: the first few in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def directory(name):
    """Where a model's files lie: the directory itself, or the local copy of a hub's.

    UserError if it cannot be had.
    """
    source = resolve(name)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: its files cannot be had: {' '.join(str(error).split())[:300]}") from error


def parameter_names(hf, keys):
    """{a tensor's name in a checkpoint file: the parameter's in the model}.

    Older files of a family, and wrappers, use other prefixes.
    """
    renamings, names = get_model_conversion_mapping(hf, WRAPPERS), {}
    for name in keys:
        key = name
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        names[name] = key
    return names


def unwrapped(name):
    """A tensor's name in a checkpoint file without a wrapper's prefix: what stock tools look for."""
    for pattern, nothing in WRAPPERS.items():
        name = re.sub(pattern, nothing, name)
    return name


def prepare(model, settings, tokens=()):
    """Makes a loaded model trainable as the settings say: new tokens, and adapters, full weights or neither.

    tokens: the new special tokens of the method. Token rows come last and stay trainable whatever was
    frozen before them. The vision tower trains only if its adapters are asked for; otherwise nothing in
    it needs a graph.
    """
    if settings.tune == "lora":
        model.add_adapters(settings)
    elif settings.tune == "full":
        model.hf.model.language_model.requires_grad_(True)
        for weight in (model.hf.get_input_embeddings().weight, model.hf.lm_head.weight):
            weight.requires_grad_(False)  # of the vocabulary only the new rows train
    if tokens:
        model.add_tokens(tokens, settings.seed)

    if settings.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        # It lets every input need a gradient, as its reentrant way wants: a frozen vision tower would then be
        # run again, and gone through backward, for nothing.
        model.hf.disable_input_require_grads()
    if settings.compile:
        compile_layers(model.layers)
    return model


def compile_layers(layers):
    """torch.compile for the forward of each decoder layer, in two pieces, before attention and after it.

    Attention itself stays as it is (attention_functions.py): there latents are copied and slices read. A
    layer's own hooks stay outside too, because torch.compile would not notice one that comes later: the copy
    of `hidden`, interventions, feedback. Layers of one kind share their pieces.
    """
    # A piece is compiled for inputs with and without gradient, for one sequence and more, with a mask and
    # without one, in training and in validation. Beyond torch's limit of 8 it would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
