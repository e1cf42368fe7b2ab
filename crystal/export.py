"""What a run learned, in other tools' formats: a PEFT adapter, and a merged stock directory.

    python -m crystal.export --run runs/crystal     # writes merged/ and adapter/ below it
    python -m crystal.export --verify runs/crystal  # says what of it is whole, and what is not

The merged directory is an ordinary one of its family: transformers, vLLM, VLMEvalKit and lmms-eval load it
with no crystal code. Its chat template's generation prompt holds the latents where the method has them
(CrystaL's ends with `<think> ..latents. </think><answer>`), and all of that is special tokens or prompt, so
what is decoded is the bare answer; for tools that show special tokens, tokenizer_config.json says where the
answer stands. Latents that a model feeds back to itself (VaLR) are beyond those tools: transformers answers
without them, since generation_config.json suppresses the tag that opens them, and vLLM, which reads no such
rule, has to be told. crystal reads `crystal.json` in the directory and decodes with them.
"""

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from safetensors import safe_open

import crystal.backbone.files
import crystal.backbone.model
from crystal import card, lora, verify
from crystal.opening import MARK, method_flags, open_run
from crystal.runtime import checkpoint, config
from crystal.runtime.config import UserError

CHUNK = 2**24  # bytes of a file that are copied at a time


def export(run, which="best", merged=None, adapter=None, method="", trust_method=False):
    """A run's checkpoint -> `merged` and `adapter` directories (None leaves one out).
    Written beside, then renamed.

    Returns the directories written: a run of `--tune full` has no adapter. The base's weights are never
    in memory together: beside what was trained, this needs three times the memory of the largest matrix
    that changes, the vocabulary.
    """
    model, fmt, settings = open_run(run, which, weights=False, method=method, trust_method=trust_method)
    base = crystal.backbone.model.directory(settings.model)
    written = []
    if merged:
        with fresh(merged) as out:
            merge(base, out, model, changes(model, settings))
            for name in ("config.json", "generation_config.json"):
                if (base / name).exists():
                    shutil.copyfile(base / name, out / name)
            rows = model.hf.get_input_embeddings().num_embeddings
            say_rows(out / "config.json", rows)
            say_rotation_twice(out / "config.json")
            if fmt.feeds_back:
                suppress(fmt, out / "generation_config.json")
            save_readers(base, model, fmt, settings, out)
            card.write(out, run, which, settings, fmt, "merged")
        written.append(Path(merged))
    if adapter and settings.tune == "lora":
        with fresh(adapter) as out:
            say_wider(base, model)
            lora.save_adapter(out, model.hf, model.new_tokens, crystal.backbone.model.resolve(settings.model))
            save_readers(base, model, fmt, settings, out)
            card.write(out, run, which, settings, fmt, "adapter")
        written.append(Path(adapter))
    return written


def say_wider(base, model):
    """Tells on stderr what other tools need before they take an adapter of an enlarged vocabulary."""
    config = crystal.backbone.files.read_config(str(base), str(base))
    before, rows = config.get_text_config().vocab_size, model.hf.get_input_embeddings().num_embeddings
    if before < rows:
        print(
            f"note: the base's vocabulary of {before} rows has {rows} in the adapter: before another tool "
            f"takes it, model.resize_token_embeddings({rows}) is needed; merged/ needs nothing",
            file=sys.stderr,
        )


def say_rows(file, rows):
    """Says in a config.json how many rows the vocabulary has, where training enlarged it."""
    config = json.loads(file.read_text(encoding="utf-8"))
    parts = [config.get("text_config", config), config]
    said = [part for part in parts if "vocab_size" in part] or parts[:1]
    if any(part.get("vocab_size") != rows for part in said):
        for part in said:
            part["vocab_size"] = rows
        write_json(file, config)


def say_rotation_twice(file):
    """Says the rotary embedding's settings in transformers 4's words too, where a config.json has 5's alone.

    transformers 4 finds no `rope_parameters`, and would take its defaults without a word.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    said = False
    for part in (config, config.get("text_config", {})):
        rotation = part.get("rope_parameters")
        if rotation and "rope_theta" in rotation and "rope_scaling" not in part:
            part["rope_theta"] = rotation["rope_theta"]
            part["rope_scaling"] = {n: x for n, x in rotation.items() if n != "rope_theta"}
            said = True
    if said:
        write_json(file, config)


def suppress(fmt, file):
    """Adds the tag that opens fed-back latents to the tokens that a generation_config.json forbids."""
    rules = json.loads(file.read_text()) if file.exists() else {}
    rules["suppress_tokens"] = [fmt.latent_start_id]
    write_json(file, rules)


def changes(model, settings):
    """{parameter's name: function from the base's weight W to the trained one, in W's dtype} of
    all that training changed.
    """
    if settings.tune == "full":
        found = {}
        for n, p in model.hf.named_parameters():
            if p.device.type != "meta":
                found[n] = partial(trained, p)
    else:
        found = {f"{n}.weight": layer.merged for n, layer in lora.adapters(model.hf).items()}
    if model.new_tokens is not None:
        ids = torch.tensor(model.new_tokens.ids)
        names = {module: f"{n}.weight" for n, module in model.hf.named_modules()}
        for module, P in model.new_tokens.pairs():
            found[names[module]] = partial(with_rows, P, ids)
        if model.new_tokens.tied:  # some files hold the tied head too
            found["lm_head.weight"] = found[names[model.hf.get_input_embeddings()]]
    return found


def trained(p, W):
    """The trained weight p in the base's dtype."""
    return p.to(W.dtype)


def with_rows(P, ids, W):
    """The base's weight W with its rows `ids` replaced by P; those behind its last row are added."""
    added = max(int(ids.max()) + 1 - len(W), 0)
    W = F.pad(W, (0, 0, 0, added))
    return W.index_copy(0, ids, P.to(W.dtype))


def merge(base, out, model, changes):
    """Copies the base's safetensors files as they are and writes the changed tensors over their own bytes.

    A vocabulary that training enlarged is given room for its new rows.

    Untouched weights are the base's to the bit because nothing else is written: dtypes, order and shards
    stay, and names but for what a wrapper put before them, since stock tools would not find their weights.
    UserError if the base has no safetensors files or a changed tensor is not in them.
    """
    index = base / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    left = set(changes) - ({"lm_head.weight"} if model.tied else set())
    embedding = model.hf.get_input_embeddings()
    rows, added = embedding.num_embeddings, 0
    wide = {n for n, p in model.hf.named_parameters() if p is embedding.weight} | {"lm_head.weight"}
    for name in files:
        if Path(name).name != name or not (base / name).is_file():
            raise UserError(f"{base}: no file {name}; an export needs the base's safetensors files")
        with safe_open(base / name, "pt") as tensors:
            names = crystal.backbone.model.parameter_names(model.hf, tensors.keys())
            added += copy_with_room(base / name, out / name, [k for k, n in names.items() if n in wide], rows)
        start, header = header_of(out / name)
        own_names = {crystal.backbone.model.unwrapped(key): entry for key, entry in header.items()}
        renamed = any(crystal.backbone.model.unwrapped(key) != key for key in header)
        with safe_open(base / name, "pt") as tensors, open(out / name, "r+b") as file:
            if renamed:
                # Shorter names leave room, which spaces fill as the format allows: the tensors
                # stay where they are.
                text = json.dumps(own_names, separators=(",", ":"), ensure_ascii=False)
                file.seek(8)
                file.write(text.encode().ljust(start - 8))
            for key, parameter in names.items():
                if (change := changes.get(parameter)) is not None:
                    W = tensors.get_tensor(key)
                    new = change(W)
                    if list(new.shape) != header[key]["shape"]:
                        raise UserError(
                            f"{base / name}: {key} has shape {tuple(W.shape)}, the trained one "
                            f"{tuple(new.shape)}"
                        )
                    file.seek(start + header[key]["data_offsets"][0])
                    file.write(new.contiguous().view(torch.uint8).numpy())
                    left.discard(parameter)
    if left:
        raise UserError(f"{base}: {sorted(left)[0]} was trained, but no safetensors file there has it")
    if index.exists():
        shards = json.loads(index.read_text())
        shards["weight_map"] = {
            crystal.backbone.model.unwrapped(key): name for key, name in shards["weight_map"].items()
        }
        if added and "total_size" in shards.get("metadata", {}):
            shards["metadata"]["total_size"] += added
        (out / index.name).write_text(json.dumps(shards, indent=2) + "\n")


def header_of(file):
    """A safetensors file -> (where its tensors start, its header).

    The format: the header's length in 8 bytes, the header in JSON, the tensors.
    """
    with open(file, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        return start, json.loads(opened.read(start - 8))


def copy_with_room(source, target, keys, rows):
    """Copies a safetensors file, and zeros behind its tensors `keys` [V,D] up to [rows,D] -> bytes added.

    Where none of them is shorter the copy is the file to the byte.
    """
    start, header = header_of(source)
    short = [key for key in keys if header[key]["shape"][0] < rows]
    if not short:
        shutil.copyfile(source, target)
        return 0

    # Every tensor keeps its place in the order, those behind a longer one move.
    entries = [(key, entry) for key, entry in header.items() if key != "__metadata__"]
    entries.sort(key=lambda item: item[1]["data_offsets"])
    new, room, at = {k: x for k, x in header.items() if k == "__metadata__"}, {}, 0
    for key, entry in entries:
        first, end = entry["data_offsets"]
        height, *rest = entry["shape"] or [1]
        room[key] = (end - first) // height * (rows - height) if key in short else 0
        shape = [rows, *rest] if key in short else entry["shape"]
        new[key] = entry | {"shape": shape, "data_offsets": [at, at + end - first + room[key]]}
        at = new[key]["data_offsets"][1]

    text = json.dumps(new, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at a multiple of eight bytes
    with open(source, "rb") as old, open(target, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, entry in entries:
            first, end = entry["data_offsets"]
            old.seek(start + first)
            for piece in range(first, end, CHUNK):
                file.write(old.read(min(CHUNK, end - piece)))
            file.write(bytes(room[key]))
    return sum(room.values())


def save_readers(base, model, fmt, settings, out):
    """Saves what turns a conversation into tensors, and tokens into an answer: tokenizer and processors.

    Latents that the model feeds back to itself are told of in a file that crystal alone reads.
    """
    save_tokenizer(model, fmt, out)
    model.image_processor.save_pretrained(out)

    if (base / "video_preprocessor_config.json").exists():
        shutil.copyfile(base / "video_preprocessor_config.json", out / "video_preprocessor_config.json")
    # Less the image processor's settings and the template: they are written above, and twice they could
    # disagree.
    if (base / "processor_config.json").exists():
        rules = json.loads((base / "processor_config.json").read_text())
        rules.pop("image_processor", None)
        rules.pop("chat_template", None)
        write_json(out / "processor_config.json", rules)

    if fmt.feeds_back:
        write_json(out / MARK, {"method": settings.method, "latents": settings.latents})


def save_tokenizer(model, fmt, out):
    """Saves the tokenizer with a chat template that ends in the method's own prompt (see
    Format.chat_template), and with what separates the answer from the thought (see response_template).
    """
    template = model.tokenizer.chat_template
    parts = response_template(fmt)
    model.tokenizer.chat_template = fmt.chat_template()
    model.tokenizer.save_pretrained(out)
    model.tokenizer.chat_template = template
    # A later stage trains with this one, and a method of its own.
    (out / crystal.backbone.model.BASE_TEMPLATE).write_text(template, encoding="utf-8")

    file = out / "tokenizer_config.json"
    rules = json.loads(file.read_text())
    # transformers 4 knows a list of special tokens by this name alone, and 5 by both.
    if isinstance(rules.get("extra_special_tokens"), list):
        rules["additional_special_tokens"] = rules.pop("extra_special_tokens")
    # How the base was found on this machine says nothing on another one.
    for name in ("is_local", "local_files_only"):
        rules.pop(name, None)
    if parts:
        rules["response_template"] = parts
    write_json(file, rules)


def response_template(fmt):
    """How transformers (`serve`, pipelines, parse_response) finds the answer in what a model writes -> dict.

    None for a format whose answers bear no tags: there all that is written is the answer.
    """
    if fmt.answer_start_id is None:
        return None

    def name(token):
        return fmt.tokenizer.convert_ids_to_tokens(token)

    # An answer ends at its tag where the format has one, at the turn's end, or where the model was cut.
    end, pad = re.escape(name(fmt.end)), re.escape(fmt.tokenizer.pad_token)
    turn = rf"(?:{end}|{pad})"
    closes = rf"\s*{turn}+"
    if fmt.answer_end_id is not None:
        closes = rf"\s*(?:{re.escape(name(fmt.answer_end_id))}\s*{turn}*|{turn}+)"
    answer = {"open": name(fmt.answer_start_id), "close_pattern": closes, "content": "text"}

    fields = {"content": answer}
    if fmt.think_start_id is not None:
        opens, ends = name(fmt.think_start_id), name(fmt.think_end_id)
        fields["reasoning_content"] = {"open": opens, "close": ends, "content": "text"}
    elif fmt.feeds_back:  # its steps stand in no tags: they are all that comes before the answer
        fields["reasoning_content"] = {"content": "text"}
    return {
        "version": 1,
        "defaults": {"role": "assistant"},
        "start_anchor": opening_words(fmt.tokenizer),
        "fields": fields,
    }


def opening_words(tokenizer):
    """What the chat template writes where the assistant is to speak, `<|im_start|>assistant` and a break."""
    asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    closed = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=False)
    opened = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return opened.removeprefix(closed)


def write_json(file, what):
    """A dict as an indented JSON file."""
    file.write_text(json.dumps(what, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class fresh:
    """A directory that appears whole or not at all, with a manifest of its files (checkpoint.seal).

    It is filled under another name, flushed to the disk and renamed. An older one steps aside until then, and
    stays if anything fails; a kill leaves it or the new one. UserError where what stands there is no export.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.part, self.old = Path(f"{path}.part"), Path(f"{path}.old")

    def __enter__(self):
        # What a killed export left: its older one comes back if the kill fell between the two renames.
        if self.old.exists() and not self.path.exists():
            self.old.rename(self.path)
        shutil.rmtree(self.old, ignore_errors=True)
        shutil.rmtree(self.part, ignore_errors=True)

        if self.path.exists() and not may_be_replaced(self.path):
            raise UserError(f"{self.path}: holds no export, so none replaces it; --out names another folder")
        self.part.mkdir(parents=True)
        return self.part

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                checkpoint.seal(self.part, {"tensors": []})
                if self.path.exists():
                    self.path.rename(self.old)
                self.part.rename(self.path)
        finally:
            # After a success there is none; after a failure it may be what fills the disk.
            shutil.rmtree(self.part, ignore_errors=True)
        shutil.rmtree(self.old, ignore_errors=True)


def may_be_replaced(path):
    """Whether what stands there is an export, whole or not, or an empty folder."""
    if not path.is_dir():
        return False
    names = {p.name for p in path.iterdir()}
    return not names or bool(names & {"config.json", lora.CONFIG, checkpoint.MANIFEST})


def main(argv=None):
    parser = config.OneLineParser(
        prog="export.py", description="Export a run as a PEFT adapter and a merged directory."
    )
    parser.add_argument("--run", default="", help="run directory of train.py")
    parser.add_argument(
        "--verify",
        default="",
        help="a run or an export: say what of it is whole and what is not, and write nothing",
    )
    method_flags(parser)
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument(
        "--out", default="", help="folder to write merged/ and adapter/ into; empty: the run directory"
    )
    args = parser.parse_args(argv)
    if bool(args.run) == bool(args.verify):
        raise UserError("--run RUN exports a run, --verify DIR says what of a run or an export is whole")
    if args.verify:
        lines, whole = verify.report(Path(args.verify))
        print("\n".join(lines))
        sys.exit(0 if whole else 1)

    out = Path(args.out or args.run)
    written = export(
        args.run, args.checkpoint, out / "merged", out / "adapter", args.method, args.trust_method
    )
    print(f"wrote {' and '.join(map(str, written))}")
    if (out / "merged" / MARK).exists():
        print(
            "Its latents are states that the model feeds back to itself: crystal.generate and "
            "crystal.evaluate decode them; transformers, vLLM and other\n"
            "tools load the directory, but cannot. In transformers it answers without latents: "
            "generation_config.json suppresses the tag that\n"
            'opens them. vLLM reads no such rule: give its requests bad_words=["<latent>"].'
        )


if __name__ == "__main__":
    config.run_cli(main)
