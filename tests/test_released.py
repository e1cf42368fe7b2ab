"""CrystaL as its authors released it: every choice of paper and released code, typed out
from the two sources.
"""

import pytest

from crystal import methods
from crystal.methods import crystal, released

# What each of the two sources does (the table of DESIGN.md, section 1, and the released code
# at bc08a90), written out.
SOURCES = {
    "crystal": {
        "thought": "fixed",
        "labels": "all",
        "corruption": "blur",
        "copied": "latents",
        "ce": "per_path",
        "kl_share": 1.0,
        "answer_positions": "predicting",
        "attn_loss": "kl",
        "attn_heads": "keep",
        "attn_columns": "latents",
        "attn_layers": "last",
        "teacher_grad": False,
        "latents": 8,
        "latent_kind": "diverse",
        "lora_r": 16,
        "lora_alpha": 32.0,
        "lora_on": "language",
        "lora_dropout": 0.0,
        "max_steps": 4000,
        "lr": 2e-4,
        "warmup": 0.05,
        "decay": "cosine",
    },
    "released": {
        "thought": "fixed",
        "labels": "all",
        "corruption": "blur",
        "copied": "thought",
        "ce": "pooled",
        "kl_share": 0.1,
        "answer_positions": "span",
        "attn_loss": "kl",
        "attn_heads": "mean",
        "attn_columns": "thought",
        "attn_layers": "last",
        "teacher_grad": False,
        "latents": 8,
        "latent_kind": "diverse",
        "lora_r": 16,
        "lora_alpha": 32.0,
        "lora_on": "language,vision,merger",
        "lora_dropout": 0.01,
        "max_steps": 4000,
        "lr": 2e-4,
        "warmup": 0.05,
        "decay": "cosine",
    },
}


@pytest.mark.parametrize("method", SOURCES)
def test_both_are_the_table_of_the_two_sources(setup, method):
    settings = methods.parse(["--method", method])
    assert {name: getattr(settings, name) for name in SOURCES[method]} == SOURCES[method]
    assert settings.weights == {"ce": 1.0, "ce_int": 1.0, "ce_cor": 1.0, "kl": 1.0, "attn": 1.0}

    # The parts that get adapters are those that the source adapts.
    s = setup("--method", method, "--latents", "2")
    adapted = {"language": "language_model", "vision": "visual.blocks", "merger": "visual.merger"}
    found = {part for part, name in adapted.items() if any(name in n for n, _ in s.named)}
    assert found == set(SOURCES[method]["lora_on"].split(","))


def test_nothing_else_differs():
    """The class adds no code of its own: what it trains is crystal.py's under other settings."""
    own = {name for name in vars(released.Method) if not name.startswith("__")}
    assert own == {"Settings"} and released.Method.__mro__[1] is crystal.Method
    assert released.Method.Settings is released.Settings
    help_of = {name: field.metadata for name, field in crystal.Settings.__dataclass_fields__.items()}
    assert {name: field.metadata for name, field in released.Settings.__dataclass_fields__.items()} == help_of
