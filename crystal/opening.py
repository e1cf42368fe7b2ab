"""What --model takes becomes a model to ask: a run directory, an export, "tiny", a directory, a hub name.

"tiny-crystal" is a shipped adapter of the tiny base: CrystaL after the demo's updates, whose latents carry
(made by data_prep/tiny/carrying.py). A run holds only what it trained, so its base is loaded and the
checkpoint's tensors are put into it; an adapter's directory, ours or peft's, likewise. A merged export is an
ordinary model directory, and crystal.json in either says what stock tools cannot know of its latents.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

import crystal.backbone.model
from crystal import methods
from crystal.backbone import adapter
from crystal.layout import Format
from crystal.runtime import checkpoint
from crystal.runtime.config import UserError

SHIPPED = {"tiny-crystal": crystal.backbone.model.TINY.parent / "tiny-crystal"}
MARK = "crystal.json"  # in an export that stock tools use in part


def method_flags(parser):
    """Adds --method and --trust_method, whose code may run if a run's method is a file (methods.of_run)."""
    parser.add_argument(
        "--method",
        default="",
        help="of a run whose method is a file of its own: the file to run, "
        "which you name because you know it",
    )
    parser.add_argument(
        "--trust_method",
        action="store_true",
        help="of such a run: run the copy of the file that the run directory keeps",
    )


def model_flags(parser):
    """Adds --checkpoint, --device, --min_pixels, --max_pixels and what `method_flags` adds.

    Every command that asks a model takes them.
    """
    method_flags(parser)
    parser.add_argument("--checkpoint", default="best", help="of a run: best, last or a step")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--min_pixels", type=int, help="images are scaled up to at least this area; default: the model's own"
    )
    parser.add_argument(
        "--max_pixels", type=int, help="images are scaled down to at most this area; default: the model's own"
    )


def open_model(
    name,
    which="best",
    device="cpu",
    dtype=None,
    min_pixels=None,
    max_pixels=None,
    weights=True,
    method="",
    trust_method=False,
):
    """Anything that --model takes -> (Model in evaluation mode, Format, Settings of a run or None).

    which: of a run, the checkpoint "best" (by validation; the last if there was none), "last", or a step's
    number. dtype: of what is no run; None takes bfloat16 on a GPU, float32 elsewhere; a run keeps its own.
    min_pixels, max_pixels: see model.load; of a run they default to what it was trained with. weights
    False: of a run, what it trained has values and the frozen rest is shapes alone. method, trust_method:
    what a run that was made by a file of its own needs, see methods.of_run; the settings then name the
    file that was run.
    """
    asked = name
    name = SHIPPED.get(name, name)
    run = Path(name)
    if not (run / "checkpoints").is_dir():
        if (run / "metrics.jsonl").exists():
            raise UserError(f"{run}: a run without checkpoints")
        if method:
            raise UserError(f"--method {method}: {name} is no run of train.py, and opens without")

        # As train.py's --dtype auto.
        dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
        if adapter.is_adapter(name):
            model = adapter.load(name, dtype, device, min_pixels, max_pixels)
            model.name = str(asked)
            return model, exported_format(name, model.tokenizer), None
        model = crystal.backbone.model.load(name, dtype, device, min_pixels, max_pixels)
        fmt = exported_format(crystal.backbone.model.resolve(name), model.tokenizer)
        return model, fmt, None

    # What was trained, by which method, on which base.
    directory = find(run, which)
    files, state = checkpoint.load(directory)
    allowed = methods.of_run(state, directory, method, trust_method)
    settings = methods.saved_settings(state["settings"] | {"method": allowed}, directory)
    dtype = torch.float32 if settings.tune == "full" else getattr(torch, settings.dtype)

    model = crystal.backbone.model.load(
        settings.model,
        dtype,
        device,
        min_pixels or settings.min_pixels,
        max_pixels or settings.max_pixels,
        weights,
    )
    settings = replace(settings, checkpointing=False, compile=False)
    _, fmt = methods.attach(model, settings)

    # A method's heads, and the encoders behind them, serve its losses alone: they stay in the checkpoint.
    named = [(f"model.{n}", p) for n, p in model.named_parameters() if p.requires_grad]
    tensors = {n: t for n, t in files["trainable.safetensors"].items() if not n.startswith("heads.")}
    checkpoint.load_parameters(named, tensors, directory)

    if weights:
        model.to(device)
        model.after_update()
    else:  # what has a place but no memory is given the checkpoint's own tensors
        for n, _ in named:
            owner, _, leaf = n.removeprefix("model.").rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensors[n], requires_grad=False))
    return model.eval(), fmt, settings


def open_run(run, which="best", device="cpu", weights=True, method="", trust_method=False):
    """open_model of a run directory and nothing else: a mistyped one is not asked of a hub."""
    if not (Path(run) / "checkpoints").is_dir():
        raise UserError(f"{run}: not a run directory of train.py (no checkpoints in it)")
    return open_model(run, which, device, weights=weights, method=method, trust_method=trust_method)


def exported_format(directory, tokenizer):
    """The Format of a directory that is no run: plain, or what its crystal.json says.

    UserError if that file is broken.
    """
    settings = exported_settings(directory)
    if settings is None:
        return Format(tokenizer)
    return methods.get(settings.method)(settings).format(tokenizer)


def exported_settings(name):
    """The Settings that a directory's crystal.json holds, None where there is no such file.

    UserError if it is broken.
    """
    file = Path(SHIPPED.get(name, name)) / MARK
    if not file.is_file():
        return None

    try:
        saved = json.loads(file.read_text())
        if saved["method"].endswith(".py"):  # a directory may come from anywhere: what it names is not run
            raise UserError(
                f"{file}: exported by {saved['method']}, a method of its own; open the run directory instead"
            )
        settings = methods.get(saved["method"]).Settings(**saved)
        methods.get(settings.method)(settings)  # what no method can be made of is told here
        return settings
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not what crystal.export wrote: {error}") from None


def content_of(name, which="best"):
    """A digest of what answers under this name: it changes when a run goes on or a directory is written anew.

    Of a run it is its checkpoint's manifest, which holds every file's own digest. Of another directory it is
    each file's name, size and time of writing: to read a large model's bytes again would take minutes. An
    adapter's base counts too.
    """
    name = SHIPPED.get(name, name)
    if (Path(name) / "checkpoints").is_dir():
        manifest = find(Path(name), which) / checkpoint.MANIFEST
        return hashlib.sha256(manifest.read_bytes()).hexdigest()

    known = []
    if adapter.is_adapter(name):
        root = Path(name)
        base = adapter.read_config(root)["base_model_name_or_path"]
        known.append(content_of(base))
    else:
        root = Path(crystal.backbone.model.resolve(name))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    known += [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def find(run, which):
    """The directory of a run's checkpoint: "best", "last" or a step. UserError if there is none."""
    record = checkpoint.best(run) if which == "best" else None
    if which == "last" or (which == "best" and record is None):
        directory = checkpoint.newest(run)
    elif record or which.isdigit():
        directory = checkpoint.step_dir(run, record["step"] if record else which)
    else:
        raise UserError(f"--checkpoint {which}: best, last or a step")

    if directory is None or not directory.is_dir():
        raise UserError(f"{run}: no checkpoint {which!r} that can be used")
    return directory
