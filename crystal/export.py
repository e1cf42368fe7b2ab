"""What a run learned, in other tools' formats: a PEFT adapter, and a merged stock directory.

    python -m crystal.export --run runs/crystal                 writes runs/crystal/merged and runs/crystal/adapter

The merged directory is an ordinary one of its family: transformers, vLLM, VLMEvalKit and lmms-eval load it with no
crystal code. Its chat template's generation prompt holds the latents where the method has them (CrystaL's ends with
`<think> ..latents. </think><answer>`), and all of that is special tokens or prompt, so what is decoded is the bare answer.
Latents that a model feeds back to itself (VaLR) are beyond those tools: they answer without them, since generation_config.json
suppresses the tag that opens them. crystal reads `crystal.json` in the directory and decodes with them.
"""
import json
import shutil
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import crystal.model
from crystal import checkpoint, config, lora, methods
from crystal.config import UserError
from crystal.layout import Format

MARK = "crystal.json"  # in a merged directory that stock tools use in part


def open_model(name, which="best", device="cpu", **how):
    """A run directory, or anything that --model takes -> (Model in evaluation mode, Format, Settings or None).

    which: of a run, the checkpoint "best" (by validation; the last if there was none), "last", or a step's number.
    how: dtype, min_pixels and max_pixels of model.load for what is no run; a run keeps its own.
    """
    run = Path(name)
    if not (run / "checkpoints").is_dir():
        if (run / "metrics.jsonl").exists():
            raise UserError(f"{run}: a run without checkpoints")
        model = crystal.model.load(name, device=device, **how)
        return model, exported_format(crystal.model.resolve(name), model.tokenizer), None
    directory = find(run, which)
    files, state = checkpoint.load(directory)
    settings = methods.saved_settings(state["settings"], directory)
    dtype = torch.float32 if settings.tune == "full" else getattr(torch, settings.dtype)
    model = crystal.model.load(settings.model, dtype, device, settings.min_pixels, settings.max_pixels)
    settings.checkpointing = False
    _, fmt = methods.attach(model, settings)
    named = [(f"model.{n}", p) for n, p in model.named_parameters() if p.requires_grad]
    # A method's heads, and the encoders behind them, serve its losses alone: they stay in the checkpoint.
    tensors = {n: t for n, t in files["trainable.safetensors"].items() if not n.startswith("heads.")}
    checkpoint.load_parameters(named, tensors, directory)
    model.to(device)
    model.after_update()
    return model.eval(), fmt, settings


def open_run(run, which="best", device="cpu"):
    """open_model of a run directory and nothing else: a mistyped one is not asked of a hub."""
    if not (Path(run) / "checkpoints").is_dir():
        raise UserError(f"{run}: not a run directory of train.py (no checkpoints in it)")
    return open_model(run, which, device)


def exported_format(directory, tokenizer):
    """The Format of a directory that is no run: plain, or what its crystal.json says. UserError if that is broken."""
    file = Path(directory) / MARK
    if not file.is_file():
        return Format(tokenizer)
    try:
        saved = json.loads(file.read_text())
        method = methods.get(saved["method"])
        return method(method.Settings(**saved)).format(tokenizer)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not what crystal.export wrote: {error}") from None


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


def export(run, which="best", merged=None, adapter=None):
    """A run's checkpoint -> `merged` and `adapter` directories (None leaves one out). Written beside, then renamed."""
    model, fmt, settings = open_run(run, which)
    if adapter and settings.tune == "lora":
        with fresh(adapter) as out:
            lora.save_adapter(out, model.hf, model.rows, settings.model)
            save_tokenizer(model, fmt, out)
    if merged:
        lora.merge(model.hf)
        with fresh(merged) as out:
            if fmt.begin is not None:
                model.hf.generation_config.suppress_tokens = [fmt.begin]
                (out / MARK).write_text(json.dumps({"method": settings.method, "latents": settings.latents}) + "\n")
            model.hf.save_pretrained(out)
            save_tokenizer(model, fmt, out)
            model.image_processor.save_pretrained(out)


def save_tokenizer(model, fmt, out):
    template = model.tokenizer.chat_template
    model.tokenizer.chat_template = fmt.chat_template()
    model.tokenizer.save_pretrained(out)
    model.tokenizer.chat_template = template


class fresh:
    """A directory that appears whole or not at all: filled under another name, then renamed over an older one."""

    def __init__(self, path):
        self.path, self.part = Path(path), Path(f"{path}.part")

    def __enter__(self):
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        return self.part

    def __exit__(self, kind, *_):
        if kind is None:
            if self.path.exists():
                shutil.rmtree(self.path)
            self.part.rename(self.path)


def main(argv=None):
    parser = config.OneLineParser(prog="export.py", description="Export a run as a PEFT adapter and a merged directory.")
    parser.add_argument("--run", required=True, help="run directory of train.py")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument("--out", default="", help="folder to write merged/ and adapter/ into; empty: the run directory")
    args = parser.parse_args(argv)
    out = Path(args.out or args.run)
    export(args.run, args.checkpoint, out / "merged", out / "adapter")
    print(f"wrote {out / 'merged'}" + (f" and {out / 'adapter'}" if (out / "adapter").exists() else ""))
    if (out / "merged" / MARK).exists():
        print("Its latents are states that the model feeds back to itself: crystal.generate and crystal.evaluate decode them; transformers, vLLM and other\n"
              "tools load the directory, but cannot. There it answers without latents: generation_config.json suppresses the tag that opens them.")


if __name__ == "__main__":
    config.run_cli(main)
