"""What was renamed since commit 9890c43: old runs and exports open, and an old flag says its new name.

One table for everything that stands on a user's disk or in a user's scripts. Nothing else in crystal
knows an old name.
"""

import re

from crystal.runtime.config import UserError

# Settings as a run saved them, and their flags.
SETTINGS = {"realisation": "latent_copy", "lr_rows": "lr_tokens", "answer_rows": "answer_positions"}

# Settings whose value has another name: {setting: {old: new}}.
VALUES = {"tune": {"rows": "tokens"}}

# Tensors of a checkpoint, trained ones and the optimizer's state of them.
TENSORS = {
    r"^model\.rows\.rows\b": "model.new_tokens.embedding",
    r"^model\.rows\.head_rows\b": "model.new_tokens.head",
}


def settings(saved):
    """A run's settings as they were saved, dict -> the same under today's names.

    Today's own are left as they are.
    """
    saved = {SETTINGS.get(name, name): value for name, value in saved.items()}
    for name, values in VALUES.items():
        if name in saved:
            saved[name] = values.get(saved[name], saved[name])

    # Two flags were the ends of the strength's range; the range now stands behind the mode.
    low, high = saved.pop("strength_low", None), saved.pop("strength_high", None)
    if low is not None:
        saved["corruption"] += f"={low}:{high}"

    # What a preset chose is saved in each setting; the authors' choices are a method of their own now.
    if saved.pop("preset", "paper") == "released" and saved.get("method") == "crystal":
        saved["method"] = "released"
    return saved


def tensors(saved):
    """{name: tensor} of a checkpoint -> the same under today's names."""
    found = {}
    for name, tensor in saved.items():
        for old, new in TENSORS.items():
            name = re.sub(old, new, name)
        found[name] = tensor
    return found


def check_flags(argv):
    """UserError with the new name for the first renamed flag or value in `argv` (list of str)."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for word, following in zip(words, [*words[1:], ""]):
        name = word.removeprefix("--")
        if word == name:
            continue
        if name == "preset":
            raise UserError(
                f"--preset {following} is now --method {following if following == 'released' else 'crystal'}"
            )
        if name in ("strength_low", "strength_high"):
            raise UserError(f"{word} is now part of --corruption, as in --corruption blur=2:8")
        if name in SETTINGS:
            raise UserError(f"{word} is now --{SETTINGS[name]}")
        if following in VALUES.get(name, {}):
            raise UserError(f"{word} {following} is now {word} {VALUES[name][following]}")
