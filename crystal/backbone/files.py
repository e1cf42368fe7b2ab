"""What a model's directory holds, read and checked before its weights are: a fault is told by file and field.

transformers' own errors are many, some name no file, and some come when the first image is prepared, and
would then be blamed on a record. What is read here: config.json, the safetensors files' headers, the
tokenizer, the chat template and preprocessor_config.json. A hub's copy is read in the same way.
"""

import json
import math
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import cached_file

from crystal.layout import END
from crystal.runtime.config import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
# Files of quantisers that say nothing in config.json, and whose they are.
QUANTISERS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}

# Of a decoder's config: numbers from 1 up.
COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


@contextmanager
def reading(name, file):
    """Turns whatever goes wrong inside into a UserError of one line that names the directory and the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers and its parts raise a dozen kinds for files that do not fit
        raise UserError(f"{name}: {file}: {why(error)}") from error


def why(error):
    """What transformers says of files that it cannot load, as one line.

    Of a directory whose weights are pickles: that they are not what is wanted.
    """
    text = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, KeyError):
        text = f"no {text}"
    if "safetensors" in text:
        text += " (weights are read from safetensors alone: a pickle can run code)"
    return text


def find(source, file):
    """Where a file of a directory or a hub's model lies -> Path, or None if it has none of that name."""
    found = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def object_of(name, source, file):
    """A JSON file's object -> dict; None if there is no such file. UserError for anything else in it."""
    path = find(source, file)
    if path is None:
        return None
    with reading(name, file):
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise UserError(f"{name}: {file}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}: {file}: a JSON object is wanted, not a {type(found).__name__}")
    return found


# --- config.json ---


def read_config(name, source):
    """A directory or hub name -> transformers' config, whose numbers fit one another."""
    raw = object_of(name, source, "config.json")
    for part in ("text_config", "vision_config"):
        if raw is not None and part in raw and not isinstance(raw[part], dict):
            raise UserError(f"{name}: config.json: field {part!r}: {raw[part]!r}; an object is wanted")
    if raw is not None and not isinstance(raw.get("model_type"), str):
        kind = raw.get("model_type")
        raise UserError(f"{name}: config.json: field 'model_type': {kind!r}; a text is wanted")

    with reading(name, "config.json"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def check_sizes(name, config):
    """UserError for numbers of a known family's config.json that cannot be, or do not fit one another."""
    text, vision = config.get_text_config(), config.vision_config

    def bad(field, problem):
        raise UserError(f"{name}: config.json: field {field!r}: {problem}")

    for field in COUNTS:
        value = getattr(text, field, None)
        if value is not None and value < 1:
            bad(field, f"{value}; a number from 1 up is wanted")

    heads, groups = text.num_attention_heads, text.num_key_value_heads
    if getattr(text, "head_dim", None) is None and text.hidden_size % heads:
        bad("num_attention_heads", f"{heads} heads do not divide hidden_size {text.hidden_size}")
    if heads % groups:
        bad("num_key_value_heads", f"{groups} do not divide num_attention_heads {heads}")

    own = vision.hidden_size
    counts = [getattr(vision, field, None) for field in ("num_heads", "num_attention_heads")]
    for count in counts:
        if count is not None and (count < 1 or own % count):
            bad("vision_config", f"{count} heads do not divide hidden_size {own}")
    out = getattr(vision, "out_hidden_size", None)
    if out is not None and out != text.hidden_size:
        bad("vision_config", f"out_hidden_size {out} is not the decoder's hidden_size {text.hidden_size}")


def refuse_quantised(name, source, config):
    """UserError for quantised weights: training needs the numbers that they were rounded from."""
    rules = getattr(config, "quantization_config", None)
    rules = rules or getattr(config.get_text_config(), "quantization_config", None)
    rules = rules or getattr(config, "compression_config", None)
    if rules is not None:
        rules = rules if isinstance(rules, dict) else vars(rules)
        found = f"config.json: field 'quantization_config': {rules.get('quant_method', 'some kind')}"
    else:
        files = [file for file in QUANTISERS if find(source, file)]
        if not files:
            return
        found = f"{files[0]}: {QUANTISERS[files[0]]}"
    raise UserError(
        f"{name}: {found}: quantised weights are neither trained nor merged here; take the model that it was "
        "made from (the same name without AWQ, GPTQ, FP8, bnb, w4a16 or the like), in bfloat16 or float32"
    )


# --- weights ---


def check_files(name, source):
    """UserError for safetensors files of a directory that are cut off, empty, or named and not there."""
    folder = Path(source)
    if not folder.is_dir():  # a hub's files are checked as they come
        return
    index = object_of(name, source, INDEX)
    files = [SINGLE] if (folder / SINGLE).is_file() else []
    if index is not None and not files:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{name}: {INDEX}: field 'weight_map': an object of tensor: file is wanted")
        if not all(isinstance(file, str) and Path(file).name == file for file in shards.values()):
            raise UserError(f"{name}: {INDEX}: field 'weight_map': names of files beside it are wanted")
        files = sorted(set(shards.values()))

    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{name}: {file}: not there, and {INDEX} names it; copy the model anew")
        try:
            with safe_open(folder / file, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            problem = " ".join(str(error).split())
            raise UserError(
                f"{name}: {file}: not a whole safetensors file ({problem}); copy it anew"
            ) from None


# --- tokenizer and chat template ---


def read_tokenizer(name, source, config, marks):
    """The directory's tokenizer, which knows the family's marks; the model has a row for each token."""
    if not any(find(source, file) for file in TOKENIZERS):
        raise UserError(f"{name}: no tokenizer.json; the tokenizer belongs into the model's directory")
    with reading(name, "tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()

    missing = [token for token in (*marks, END) if token not in vocabulary]
    if missing:
        raise UserError(
            f"{name}: tokenizer.json: no token {missing[0]}, which a {config.model_type} speaks with; is it "
            "the tokenizer of another model?"
        )
    if tokenizer.pad_token is None:
        raise UserError(f"{name}: tokenizer_config.json: field 'pad_token': missing")

    image, own = config.image_token_id, vocabulary[marks[0]]
    if image != own:
        raise UserError(
            f"{name}: config.json: field 'image_token_id': {image}, the tokenizer's {marks[0]} is {own}"
        )
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"{name}: config.json: field 'vocab_size': {rows}, the tokenizer has {len(tokenizer)} tokens"
        )

    tokenizer.chat_template = chat_template(name, source, tokenizer, marks[0])
    # Of a text's length the model's own limit decides, and it is told of the whole sequence.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def chat_template(name, source, tokenizer, mark):
    """The first template of a directory that shows images: `mark` once for each image part of a message.

    Some models keep it with the processor, beside a template of the tokenizer's that knows text alone. Looked
    at in this order: chat_template.jinja, chat_template.json, processor_config.json, and the tokenizer's.
    """
    found = {}
    if path := find(source, "chat_template.jinja"):
        with reading(name, "chat_template.jinja"):
            found["chat_template.jinja"] = path.read_text(encoding="utf-8-sig")
    for file in ("chat_template.json", "processor_config.json"):
        found[file] = (object_of(name, source, file) or {}).get("chat_template")
    found["tokenizer_config.json"] = tokenizer.chat_template

    problems = []
    for file, template in found.items():
        if isinstance(template, dict):  # several by name
            template = template.get("default")
        if not template:
            continue
        problem = cannot_show(tokenizer, template, mark)
        if problem is None:
            return template
        problems.append(f"{file}: field 'chat_template': {problem}")
    if not problems:
        raise UserError(
            f"{name}: no chat template, in none of {', '.join(found)}; chat_template.jinja of the model's "
            "own page belongs beside its config.json"
        )
    raise UserError(f"{name}: {'; '.join(problems)}; chat_template.jinja of the model's own page is wanted")


def cannot_show(tokenizer, template, mark):
    """Why a chat template renders no question about an image, or None where it does."""
    if not isinstance(template, str):
        return f"a text is wanted, not a {type(template).__name__}"
    question = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    asked = [{"role": "user", "content": question}]
    try:
        rendered = tokenizer.apply_chat_template(
            asked, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of its own
        return f"cannot be rendered: {why(error)}"
    if rendered.count(mark) != 1:
        return f"shows an image of a message as {rendered.count(mark)} {mark}, one is wanted"
    if "what is this" not in rendered:
        return "leaves the text of a message out"
    return None


# --- preprocessor_config.json ---


def read_processor(name, source, config, family, pixels):
    """The directory's images.Images: preprocessor_config.json's rules, tried on a grey picture.

    pixels: bounds on an image's area that take the place of the file's.
    """
    file = "preprocessor_config.json"
    with reading(name, file):
        processor = AutoImageProcessor.from_pretrained(
            source, trust_remote_code=False, backend="pil", **pixels
        )
    for field in ("image_mean", "image_std"):
        value = getattr(processor, field, None)
        if not is_colour(value) or (field == "image_std" and not all(numbers(value))):
            raise UserError(f"{name}: {file}: field {field!r}: {value!r}; three numbers are wanted")

    least, most = (dict(processor.size).get(edge) for edge in ("shortest_edge", "longest_edge"))
    with reading(name, file):
        # A bound that was given on its own may pass the file's other one: it wins.
        exchanged = least and most and least > most and not pixels
    if exchanged:
        raise UserError(f"{name}: {file}: field 'min_pixels': {least}, above max_pixels {most}")

    images = family.images(processor, config)
    for field, own, where, wanted in images.agreements():
        if own != wanted:
            raise UserError(f"{name}: {file}: field {field!r}: {own!r}, config.json's {where} is {wanted!r}")

    with reading(name, file):
        tried = images([Image.new("RGB", (64, 48), (128, 128, 128))])
        grid, values = tried["image_grid_thw"], tried["pixel_values"]
        whole = sum(images.rows(grid)) == len(values) and images.tokens(grid)[0] > 0
    if not whole or not bool(values.isfinite().all()):
        raise UserError(f"{name}: {file}: a grey picture becomes no finite pixels of the size that it says")
    return images


def numbers(value):
    return [value] if isinstance(value, (int, float)) else list(value)


def is_colour(value):
    """Whether a value is a finite number, or three: one for each of red, green and blue."""
    if not isinstance(value, (int, float, list, tuple)):
        return False
    each = numbers(value)
    finite = all(isinstance(x, (int, float)) and math.isfinite(x) for x in each)
    return finite and (isinstance(value, (int, float)) or len(each) == 3)
