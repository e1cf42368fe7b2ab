"""Settings: defaults, presets, the command line, and one line for what is wrong."""
import sys
from dataclasses import asdict, fields

import pytest

from crystal import config, methods
from crystal.config import UserError, layers_of
from crystal.methods import parse
from crystal.methods.crystal import PRESETS, Settings

NAMES = ("sft", "crystal", "livr", "lavit", "valr")


@pytest.mark.parametrize("name", NAMES)
def test_every_field_has_help_and_round_trips(name):
    kind = methods.get(name).Settings
    assert all(f.metadata["help"] for f in fields(kind))
    s = parse(["--method", name])
    assert s == kind(method=name) and s.preset == "paper" and str(s.run_dir) == f"runs/{name}"
    assert methods.saved_settings(asdict(s), "here") == s
    with pytest.raises(UserError, match=f"here: saved by another version of {name}: .* latents, more"):
        methods.saved_settings({n: v for n, v in asdict(s).items() if n != "latents"} | {"more": 1}, "here")
    assert sum(stage.share for stage in s.stages) == pytest.approx(1)


def test_a_method_has_its_own_settings(capsys):
    """--help lists those of the method named, another's are unknown to it, and the common part knows none of them."""
    assert parse(["--method", "livr"]).lr == 1e-4 and parse([]).lr == 2e-4
    with pytest.raises(SystemExit):
        parse(["--method=livr", "--help"])
    out = capsys.readouterr().out
    assert "--masked" in out and "--kl_share" not in out
    with pytest.raises(UserError, match=r"unrecognized arguments: --kl_share 0.5 \(--method livr --help lists every flag\)"):
        parse(["--kl_share", "0.5", "--method", "livr"])
    with pytest.raises(UserError, match="--masked"):
        parse(["--masked", "0.5"])
    with pytest.raises(UserError, match="--preset: invalid choice: 'released'"):
        parse(["--method", "sft", "--preset", "released"])
    assert not {f.name for f in fields(config.Settings)} & {"corruption", "kl_share", "masked"}


MINE = """from __future__ import annotations
from dataclasses import dataclass
from crystal.config import setting
from crystal.methods import livr

@dataclass
class Settings(livr.Settings):
    lr: float = setting(3e-4, "peak learning rate")
    twist: int = setting(7, "how much")

class Method(livr.Method):
    Settings = Settings
"""


def test_a_file_of_ones_own_has_settings_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    s = parse(["--method", "mine.py", "--twist", "8"])
    assert (s.twist, s.lr, s.masked) == (8, 3e-4, 0.4) and str(s.run_dir) == "runs/mine"
    monkeypatch.chdir("/")
    assert methods.saved_settings(asdict(s), "here") == s and methods.get(s.method) is methods.get(s.method)  # its run opens from anywhere
    for text, message in (("class Method(:", r"--method bad.py: line 1: "), ("x = 1", "defines no class Method"), ("class Method: pass", "must inherit")):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(UserError, match=message):
            parse(["--method", "bad.py"])
        sys.modules.pop(str(tmp_path / "bad.py"), None)
    with pytest.raises(UserError, match="--method nowhere.py: no such file"):
        parse(["--method", "nowhere.py"])
    with pytest.raises(UserError, match="--method: expected one argument"):
        parse(["--method"])


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
    (["--eval_every", "-1"], "--eval_every"), (["--strength_low", "3", "--strength_high", "2"], "low <= high"),
    (["--lora_dropout", "1"], "--lora_dropout 1.0: a share, at least 0 and below 1"), (["--lora_dropout", "-0.1"], "--lora_dropout -0.1"),
    (["--seed", "9" * 20], "--seed 9+: a whole number, at least 0 and below 2"), (["--seed", "-1"], "--seed -1"),
    (["--weight_decay", "-1"], "--weight_decay -1.0: must not be negative"), (["--lr", "nan"], "--lr nan: a number is needed"), (["--w_kl", "nan"], "--w_kl nan")])
def test_wrong_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        parse(flags)
    assert "\n" not in str(error.value)


def test_layers():
    assert layers_of("last", 28) == {27} and layers_of("all", 3) == {0, 1, 2} and layers_of("0,-1", 28) == {0, 27}
    with pytest.raises(UserError, match="28 layers"):
        layers_of("28", 28)
