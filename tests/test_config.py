"""Settings: defaults, presets, the command line, and one line for what is wrong."""
from dataclasses import fields

import pytest

from crystal.config import PRESETS, Settings, UserError, parse


def test_every_field_has_help_and_round_trips():
    assert all(f.metadata["help"] for f in fields(Settings))
    s = parse([])
    assert s == Settings() and s.preset == "paper" and str(s.run_dir) == "runs/crystal"


def test_preset_then_what_was_given_by_hand():
    s = parse(["--preset", "released", "--kl_share", "0.5", "--lora_on", "language"])
    assert (s.ce, s.copied, s.attn_heads) == ("pooled", "thought", "mean") and (s.kl_share, s.lora_on) == (0.5, "language")
    # a value equal to the paper's default, but given by hand, still wins over the preset
    assert parse(["--preset", "released", "--kl_share", "1.0"]).kl_share == 1.0
    assert set(PRESETS["released"]) <= {f.name for f in fields(Settings)}


@pytest.mark.parametrize("flags, message", [
    (["--latent", "4"], "--latent"), (["--lr", "fast"], "--lr"), (["--corruption", "fog"], "--corruption"), (["--latents", "0"], "--latents 0: must be at least 1"),
    (["--kl_share", "0"], "--kl_share"), (["--lora_on", "head"], "--lora_on head"), (["--attn_layers", "first"], "--attn_layers first"),
    (["--strength_low", "1"], "go together"), (["--attn_heads", "mean", "--attn_loss", "mse"], "--attn_heads"), (["--warmup", "1"], "--warmup"), (["--clip", "0"], "--clip"),
    (["--eval_every", "-1"], "--eval_every"), (["--strength_low", "3", "--strength_high", "2"], "low <= high")])
def test_wrong_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        parse(flags)
    assert "\n" not in str(error.value)


def test_layers():
    assert parse([]).layers(28) == {27} and parse(["--attn_layers", "all"]).layers(3) == {0, 1, 2}
    assert parse(["--attn_layers", "0,-1"]).layers(28) == {0, 27}
    with pytest.raises(UserError, match="28 layers"):
        parse(["--attn_layers", "28"]).layers(28)
