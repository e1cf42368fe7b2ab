"""A method composes the concepts; one file each, a screen or two.

`--method name` takes a built-in one, `--method path/to/mine.py` a user's own: a class `Method(settings)` with
    latents           whether its sequences hold latent tokens
    corrupts          whether it needs corrupted images in the batch
    layout(fmt, record, image_tokens) -> layout.Layout
    modules(model) -> nn.ModuleDict of extra trainable heads (may be empty)
    losses(model, batch, progress) -> {name: scalar}, each the mean over the batch's pairs
    watched           (optional) names among them that are logged and not trained
"""
import importlib
import importlib.util
from pathlib import Path

from crystal.config import UserError


def get(name):
    """A method's name or file -> its class. UserError if there is none."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"--method {name}: no such file")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")
        if name not in known:
            raise UserError(f"--method {name}: known are {', '.join(known)}, or give the path of a .py file")
        module = importlib.import_module(f"crystal.methods.{name}")
    if not hasattr(module, "Method"):
        raise UserError(f"--method {name}: defines no class Method")
    return module.Method
