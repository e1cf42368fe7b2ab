"""The demo's own part: what it refuses before it starts, each method's flags, and that each gets to its last line."""
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crystal import demo, methods
from crystal.config import UserError
from data_prep import toy

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("sft", "crystal", "livr", "lavit", "valr")


@pytest.mark.parametrize("flags, message", [(["--method", "nosuch"], "nosuch"), (["--max_stepz", "3"], "--max_stepz"), (["--processes", "3"], "--processes"),
                                            (["--questions", "0"], "--questions 0")])
def test_a_mistake_is_told_before_anything_starts(flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.processes, "launch", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(UserError, match=message) as error:
        demo.main(flags)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", NAMES)
def test_processes_share_the_batch(method):
    one, two = (methods.parse(["--method", method, *demo.recipe(method, world)]) for world in (1, 2))
    assert one.batch_size == 2 * two.batch_size == demo.BATCH
    one.batch_size = two.batch_size
    assert one == two


@pytest.mark.parametrize("method", NAMES[1:])
def test_it_gets_to_its_end(method, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "generate", functools.partial(toy.generate, train=40, val=10, test=10))
    demo.main(["--method", method, "--max_steps", "2", "--questions", "5", "--processes", "1"])
    out, made = capsys.readouterr().out, tmp_path / "runs" / "demo"
    table = (made / "table.txt").read_text()
    assert table.strip() in out and out.index("Done in") > out.index("the answer is")
    assert table.splitlines()[0].split()[:6] == ["family", "questions", "blind", "base", "sft", method]
    assert all((made / "pictures" / f"{name}.png").stat().st_size > 1000 for name in ("losses", "corruptions", "attention"))
    assert (made / method / "merged" / "model.safetensors").is_file()


SMALL = """
import functools
from crystal import demo
from data_prep import toy
toy.generate = functools.partial(toy.generate, train=40, val=10, test=10)
demo.main(["--method", "sft", "--max_steps", "1", "--questions", "4", "--processes", "2"])
"""


def test_two_processes_print_once(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "small.py"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    for once in ("== 1. Data", "2 process(es)", "count", "the answer is", "== Done"):
        assert done.stdout.count(once) == 1, once
