"""python -m crystal lists the commands, and importing the package costs nothing."""

import subprocess
import sys

import pytest

import crystal


def test_import_is_light_and_the_commands_are_listed():
    code = "import sys, crystal; assert crystal.__version__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = subprocess.run([sys.executable, "-m", "crystal"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == ["train", "evaluate", "generate", "export", "visualize", "serve", "compare", "demo", "bench"]  # noqa: E501
    assert all(len(line) < 160 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (["export", "--run", "/nowhere/run"], 2, "error: /nowhere/run: not a run directory"),
        (["exprot", "--run", "x"], 2, "error: exprot: no such command; known are train, evaluate, generate,"),
        (["--help"], 0, ""),
    ],
)
def test_a_command_runs_as_its_module_does(flags, code, words):
    """Flags reach it, its exit code and its one line come back."""
    done = subprocess.run([sys.executable, "-m", "crystal", *flags], capture_output=True, text=True)
    assert done.returncode == code and done.stderr.startswith(words)
    assert done.stderr.count("\n") == bool(words)


def test_the_version_is_told():
    done = subprocess.run([sys.executable, "-m", "crystal", "--version"], capture_output=True, text=True)
    assert done.stdout == f"{crystal.__version__}\n"
