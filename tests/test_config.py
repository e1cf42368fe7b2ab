"""Settings: defaults, the command line, and one line for what is wrong."""

import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crystal import methods
from crystal.methods import parse
from crystal.runtime import config
from crystal.runtime.config import UserError, layers_of

NAMES = ("sft", "crystal", "livr", "lavit", "valr")


@pytest.mark.parametrize("name", NAMES)
def test_every_field_has_help_and_round_trips(name):
    kind = methods.get(name).Settings
    assert all(f.metadata["help"] for f in fields(kind))
    s = parse(["--method", name])
    assert s == kind(method=name) and str(s.run_dir) == f"runs/{name}"
    assert methods.saved_settings(asdict(s), "here") == s
    with pytest.raises(UserError, match=f"here: saved by another version of {name}: .* setting less, more$"):
        methods.saved_settings(asdict(s) | {"more": 1, "less": 2}, "here")
    assert sum(stage.share for stage in s.stages) == pytest.approx(1)


def test_a_setting_that_a_run_was_saved_without_has_its_default_and_is_told(capsys):
    """LIVR's own default is another than the common one, and what was saved stays as it was."""
    saved = {n: v for n, v in asdict(parse(["--method", "livr", "--lr", "3"])).items()}
    del saved["lora_dropout"], saved["masked"]
    found = methods.saved_settings(saved, "here")
    assert (found.lora_dropout, found.masked, found.lr) == (0.05, 0.4, 3.0)
    told = "note: here was saved before there were these settings: lora_dropout 0.05, masked 0.4\n"
    assert capsys.readouterr() == ("", told)


def test_a_method_has_its_own_settings(capsys):
    """--help lists those of the method named, another's are unknown to it, and the common part
    knows none of them.
    """
    assert parse(["--method", "livr"]).lr == 1e-4 and parse([]).lr == 2e-4
    with pytest.raises(SystemExit):
        parse(["--method=livr", "--help"])
    out = capsys.readouterr().out
    assert "--masked" in out and "--kl_share" not in out
    with pytest.raises(
        UserError, match=r"unrecognized arguments: --kl_share 0.5 \(--method livr --help lists every flag\)"
    ):
        parse(["--kl_share", "0.5", "--method", "livr"])
    with pytest.raises(UserError, match="--masked"):
        parse(["--masked", "0.5"])
    assert not {f.name for f in fields(config.Settings)} & {"corruption", "kl_share", "masked"}


MINE = """from __future__ import annotations
from dataclasses import dataclass
from crystal.runtime.config import setting
from crystal.methods import livr

@dataclass(frozen=True)
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
    # Its run opens from anywhere.
    assert methods.saved_settings(asdict(s), "here") == s and methods.get(s.method) is methods.get(s.method)
    for text, message in (
        ("class Method(:", r"--method bad.py: line 1: "),
        ("x = 1", "defines no class Method"),
        ("class Method: pass", "must inherit"),
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(UserError, match=message):
            parse(["--method", "bad.py"])
        sys.modules.pop(str(tmp_path / "bad.py"), None)
    with pytest.raises(UserError, match="--method nowhere.py: no such file"):
        parse(["--method", "nowhere.py"])
    with pytest.raises(UserError, match="--method: expected one argument"):
        parse(["--method"])


def test_what_is_given_wins_over_a_methods_default():
    s = parse(["--method", "released", "--kl_share", "0.5", "--lora_on", "language"])
    assert (s.kl_share, s.lora_on, s.ce) == (0.5, "language", "pooled")
    # A value equal to the paper's default, but given by hand, wins too.
    assert parse(["--method", "released", "--kl_share", "1.0"]).kl_share == 1.0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--latent", "4"], "--latent"),
        (["--lr", "fast"], "--lr"),
        (["--corruption", "fog"], "--corruption"),
        (["--latents", "0"], "--latents 0: must be at least 1"),
        (["--kl_share", "0"], "--kl_share"),
        (["--lora_on", "head"], "--lora_on head"),
        (["--attn_layers", "first"], "--attn_layers first"),
        (["--corruption", "noise=1:2:3"], "--corruption noise=1:2:3: a strength is"),
        (["--attn_heads", "mean", "--attn_loss", "mse"], "--attn_heads"),
        (["--warmup", "1"], "--warmup"),
        (["--clip", "0"], "--clip"),
        (["--eval_every", "-1"], "--eval_every"),
        (["--corruption", "blur=3:2"], "--corruption blur=3:2: blur goes from 0 to 256, and a range"),
        (["--lora_dropout", "1"], "--lora_dropout 1.0: a share, at least 0 and below 1"),
        (["--lora_dropout", "-0.1"], "--lora_dropout -0.1"),
        (["--seed", "9" * 20], "--seed 9+: a whole number, at least 0 and below 2"),
        (["--seed", "-1"], "--seed -1"),
        (["--weight_decay", "-1"], "--weight_decay -1.0: must not be negative"),
        (["--lr", "nan"], "--lr nan: a number is needed"),
        (["--w_kl", "nan"], "--w_kl nan"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        parse(flags)
    assert "\n" not in str(error.value)


def test_layers():
    assert (
        layers_of("last", 28) == {27}
        and layers_of("all", 3) == {0, 1, 2}
        and layers_of("0,-1", 28) == {0, 27}
    )
    with pytest.raises(UserError, match="28 layers"):
        layers_of("28", 28)


def test_layers_at_their_bounds():
    """Negative ones count from the end; of those that are not there the first is named."""
    assert layers_of("-28", 28) == {0} and layers_of("27", 28) == {27} and layers_of("1,-2,1", 3) == {1}
    assert layers_of("last", 1) == layers_of("all", 1) == {0}
    for text, named in (("-29", "-29"), ("3,28", "28")):
        with pytest.raises(UserError, match=f"--attn_layers {named}: the model has 28 layers"):
            layers_of(text, 28)
    for text in ("", "1;2", "1,", "one"):
        with pytest.raises(UserError, match=f"--attn_layers {text}: last, all, or indices"):
            layers_of(text, 28)


@dataclass(frozen=True)
class Thirds(config.Settings):
    """Three stages whose shares no number of updates divides evenly."""

    @property
    def stages(self):
        return [config.Stage(name, 1 / 3, self.lr) for name in "abc"]


def test_stages_cover_every_update_once():
    """Of 8 updates in three stages 8/3 and 16/3 round to 3 and 5.

    The end of the run is the end of the last stage.
    """
    s = Thirds(max_steps=8)
    assert [s.span(i) for i in range(3)] == [(0, 3), (3, 5), (5, 8)]
    assert [s.progress(step).stage for step in range(9)] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert [s.progress(step).of_stage for step in range(9)] == [0, 1 / 3, 2 / 3, 0, 1 / 2, 0, 1 / 3, 2 / 3, 1]
    assert [s.progress(step).of_run for step in range(9)] == [step / 8 for step in range(9)]
    assert s.progress(4).step == 4


def test_values_of_every_type_come_from_the_command_line():
    """--no-x turns off, `=` is a space, the last of two wins, a number stays of its type, and a name may
    not be cut short.
    """
    s = parse(
        [
            "--checkpointing", "--no-checkpointing", "--lr=3", "--max_steps", "5", "--max_steps=6",
            "--min_pixels", "7",
        ]
    )
    assert (s.checkpointing, s.lr, s.max_steps, s.min_pixels, s.max_pixels) == (False, 3.0, 6, 7, None)
    assert isinstance(s.lr, float) and parse(["--teacher_grad"]).teacher_grad is True
    for flags in (["--max_steps", "1.5"], ["--accum", "2"], ["--min_pixels", "none"], ["more"]):
        with pytest.raises(UserError, match=r"\(--method crystal --help lists every flag\)$"):
            parse(flags)
    assert parse(["--lr", "5", "--method", "sft"]).method == parse(["--method=sft"]).method == "sft"


def test_argv_is_the_programs_own_where_none_is_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "livr", "--latents", "5"])
    assert (parse().method, parse().latents, config.parse([]).latents) == ("livr", 5, 8)


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys):
    """Another error keeps its traceback, and where there is none nothing happens."""

    def mistaken():
        raise UserError("--x: no")

    with pytest.raises(SystemExit) as ended:
        config.run_cli(mistaken)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "error: --x: no\n")
    with pytest.raises(ZeroDivisionError):
        config.run_cli(lambda: 1 / 0)
    assert config.run_cli(lambda: 3) is None and capsys.readouterr() == ("", "")


def test_one_of_several_processes_ends_before_anything_can_abort():
    """What an open process group does at the end (here abort()) does not become the exit code."""
    code = (
        "import atexit, os; from crystal.runtime.config import UserError, run_cli\n"
        "def mistaken(): raise UserError('--x: no')\n"
        "atexit.register(os.abort); print('before', end=''); run_cli(mistaken)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "before", "error: --x: no\n")


def full_disk():
    """A real one: what is written to /dev/full does not fit."""
    with open("/dev/full", "w") as file:
        file.write("x")


@pytest.mark.parametrize(
    "fails, line",
    [
        (full_disk, "a file: No space left on device"),
        (lambda: save_file({"x": torch.zeros(2)}, "/no/such/x"), "a file: No such file or directory"),
        (lambda: open("/no/such/place"), "/no/such/place: No such file or directory"),
        (lambda: open("n" * 300), "n" * 300 + ": File name too long"),
        (lambda: open("/dev/null/x"), "/dev/null/x: Not a directory"),
        (lambda: open("/"), "/: Is a directory"),
    ],
)
def test_what_the_system_refuses_is_one_line(fails, line, capsys):
    with pytest.raises(SystemExit) as ended:
        config.run_cli(fails)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert (out, err) == ("", f"error: {line}\n")


def test_what_was_being_done_when_the_system_refused_is_kept(capsys):
    """An error of ours over the system's: its own line where a user can have caused what is behind it."""

    def fails(behind):
        try:
            behind()
        except Exception as error:
            raise OSError("step-2: not written") from error

    with pytest.raises(SystemExit) as ended:
        config.run_cli(lambda: fails(full_disk))
    assert ended.value.code == 2 and capsys.readouterr() == ("", "error: step-2: not written\n")
    with pytest.raises(OSError, match="not written"):
        config.run_cli(lambda: fails(lambda: 1 / 0))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset"), OSError("no number")])
def test_an_error_that_no_user_caused_keeps_its_traceback(error):
    def fails():
        raise error

    with pytest.raises(type(error)):
        config.run_cli(fails)


@pytest.mark.parametrize(
    "prints, code",
    [
        ("for i in range(99): print('x' * 9999)", 141),  # amid
        ("print('x')", 141),  # at the end, where what was printed is flushed
        ("import sys; print('x'); sys.exit(0)", 141),
        ("import os; raise BrokenPipeError(32, 'a pipe of our own')", 1),
    ],
)
def test_who_stops_reading_gets_no_traceback(prints, code):
    """`command | head -1`. A pipe that is not standard output is told as what it is."""
    text = f"from crystal.runtime import config\ndef main():\n    {prints}\nconfig.run_cli(main)\n"
    reading, writing = os.pipe()
    if code == 141:
        os.close(reading)
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    started = [sys.executable, "-c", text]
    done = subprocess.run(started, stdout=writing, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writing)
    assert done.returncode == code
    assert ("a pipe of our own" in done.stderr) if code == 1 else done.stderr == ""


def test_ctrl_c_is_one_line_and_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        config.run_cli(interrupted)
    assert ended.value.code == 130 and capsys.readouterr() == ("", "stopped by Ctrl-C\n")


def test_help_tells_every_flag_with_its_default(capsys):
    for name in NAMES:
        with pytest.raises(SystemExit) as ended:
            parse(["--method", name, "--help"])
        out = capsys.readouterr().out
        assert ended.value.code == 0 and all(f"--{f.name}" in out for f in fields(methods.get(name).Settings))
        assert f"(default: {methods.get(name).Settings().lr})" in out and "above 1 % stop" in " ".join(
            out.split()
        )


def test_a_file_that_breaks_while_it_is_read_is_read_again(tmp_path):
    """Its own error is shown as it is; once mended it counts. A name that is none says which there are."""
    path = tmp_path / "late.py"
    path.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        methods.get(str(path))
    path.write_text(
        "from crystal.methods.sft import Method as SFT\n\n\nclass Method(SFT):\n    found = True\n"
    )
    assert methods.get(str(path)).found
    with pytest.raises(
        UserError,
        match="^--method nothing: known are crystal, lavit, livr, released, sft, valr, or give the path of "
        "a .py file$",
    ):
        methods.get("nothing")
    with pytest.raises(UserError, match="^--method __init__: known are"):
        methods.get("__init__")


def test_a_run_is_where_its_method_or_its_user_says():
    assert parse([]).run_dir == Path("runs/crystal") and parse(["--output", "a/b"]).run_dir == Path("a/b")
