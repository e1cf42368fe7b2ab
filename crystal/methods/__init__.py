"""A method composes the concepts; one file each, a screen or two. The diff between two files is the lesson.

`--method name` takes a built-in one, `--method path/to/mine.py` a user's own: a class `Method(settings)`, which inherits
from sft's (or another's) what it does not change:
    Settings          config.Settings, or a subclass in the method's file: settings of its own, defaults, weights, stages
    corrupts          whether it needs corrupted images in the batch
    tokens            the new special tokens that it adds to the vocabulary
    format(tokenizer) -> layout.Format, which makes the prompt to generate from, and the chat template of the export
    layout(fmt, record, image_tokens, stage) -> layout.Layout; stage -1 is the last one, which validation sees
    extras(record, images) -> {name: tensor [n,..]}, put into the batch as [B,n,..], padded with zeros
    modules(model)    -> nn.ModuleDict of extra trainable heads (may be empty)
    hidden(model, batch, tap) -> the last states without losses, for evaluation's look at attention
    biases(model, batch) -> [bottleneck.Bias], the mask of `evaluate --bottleneck`
    losses(model, batch, progress) -> {name: scalar}, each the mean over the batch's pairs; progress: config.Progress
    watched           names among them that are logged and not trained
"""
import importlib
import importlib.util
import sys
from dataclasses import fields
from pathlib import Path

from crystal import config
from crystal.config import UserError
from crystal.model import prepare


def get(name):
    """A method's name or file -> its class. UserError if there is none."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"--method {name}: no such file")
        key = str(Path(name).resolve())
        if key not in sys.modules:  # a file is run once, so that its classes are the same for all who ask
            spec = importlib.util.spec_from_file_location(key, name)
            module = sys.modules[key] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException as error:
                del sys.modules[key]
                if isinstance(error, SyntaxError):
                    raise UserError(f"--method {name}: line {error.lineno}: {error.msg}") from None
                raise
        module = sys.modules[key]
    else:
        known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
        if name not in known:
            raise UserError(f"--method {name}: known are {', '.join(known)}, or give the path of a .py file")
        module = importlib.import_module(f"crystal.methods.{name}")
    if not hasattr(module, "Method"):
        raise UserError(f"--method {name}: defines no class Method")
    if not issubclass(module.Method, importlib.import_module("crystal.methods.sft").Method):
        raise UserError(f"--method {name}: its class Method must inherit from crystal.methods.sft's, or another method's")
    return module.Method


def parse(argv=None):
    """argv -> Settings of the method that it names; a file's path is kept whole, so that its run opens from anywhere."""
    settings = config.parse(argv, lambda name: get(name).Settings)
    if settings.method.endswith(".py"):
        settings.method = str(Path(settings.method).resolve())
    return settings


def saved_settings(saved, where):
    """A run's settings as they were saved (dict) -> Settings of its method. UserError naming `where` if they do not fit."""
    kind = get(saved["method"]).Settings
    if wrong := saved.keys() ^ {f.name for f in fields(kind)}:
        raise UserError(f"{where}: saved by another version of {saved['method']}: its settings differ in {', '.join(sorted(wrong))}")
    return kind(**saved)


def attach(model, settings):
    """Makes a loaded model trainable by the method of the settings -> (Method, layout.Format of its sequences)."""
    method = get(settings.method)(settings)
    prepare(model, settings, method.tokens)
    return method, method.format(model.tokenizer)
