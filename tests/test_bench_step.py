"""bench step at small sizes: rows whose losses agree where they must, FLOPs by hand, what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from crystal import bench, bench_step
from crystal.backbone import widths
from crystal.runtime import ops
from crystal.runtime.config import UserError


def rows_of(path):
    return {(row["row"], row["length"]): row for row in json.loads(path.read_text())["rows"]}


def test_every_row_of_a_small_model(tmp_path, capsys):
    """Each is measured; PEFT's loss is sft's, and CrystaL's is one however its latents are shared."""
    out = tmp_path / "a" / "step.json"
    bench.main(["step", "--model", "tiny", "--device", "cpu", "--repeats", "1", "--out", str(out)])
    rows = rows_of(out)
    assert set(rows) == {(name, 0) for name in bench_step.ROWS}
    assert all(len(row["ms"]) == 1 and min(row["ms"]) > 0 for row in rows.values())

    loss = {name: rows[name, 0]["loss"] for name in bench_step.ROWS}
    assert loss["peft"] == pytest.approx(loss["sft"], rel=1e-5)
    for name in ("hidden", "packed", "plain", "checkpointing", "kv_compile", "kv_x4"):
        assert loss[name] == pytest.approx(loss["kv"], rel=1e-4), name
    # Compiled is what asks for it, after rows whose operations were counted too.
    assert {name for name in rows if rows[name]["graphs"]} == {("sft_compile", 0), ("kv_compile", 0)}
    # The same losses in other operations: packed is one sequence, checkpointing goes forward twice.
    flops = {name: rows[name, 0]["flops"] for name in bench_step.ROWS}
    assert flops["packed"] != flops["kv"] and flops["checkpointing"] > 1.2 * flops["kv"]
    assert loss["kv"] > loss["sft"] and rows["sft_x4", 0]["tokens"] == 4 * rows["sft", 0]["tokens"]
    assert rows["kv", 0]["tokens"] == 2 * rows["kv", 0]["L"]

    printed = capsys.readouterr().out
    assert printed.count("cannot run") == 0 and "wrote" in printed
    sft = [line for line in printed.splitlines() if line.startswith("sft ")]
    assert len(sft) == 1 and " 1.00 " in sft[0]

    few = ["--only", "sft,kv", "--lengths", "0,400", "--repeats", "2"]
    bench.main(["step", "--model", "tiny", *few, "--out", str(out)])
    rows = rows_of(out)
    assert set(rows) == {(name, length) for name in ("sft", "kv") for length in (0, 400)}
    assert all(rows[name, 0]["L"] < 330 < 350 < rows[name, 400]["L"] < 400 for name in ("sft", "kv"))
    assert all(len(row["ms"]) == 2 for row in rows.values())


def test_flops_are_those_of_the_products(tmp_path):
    """Of sft on the tiny model: 4 a weight and token of the decoder, more for adapters and the tower."""

    class Settings:
        model, layers, vision_layers, repeats = "tiny", 0, 0, 1

    row = bench_step.ROWS["sft"]
    found = bench_step.measure(row, 0, Settings, torch.device("cpu"), torch.float32)
    model = widths.build("tiny", 0, 0, torch.device("cpu"), torch.float32)
    L = found["L"]
    layers = model.hf.model.language_model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    visual = sum(p.numel() for p in model.hf.model.visual.parameters() if p.ndim >= 2)
    # The decoder: a product forward and one for its input's gradient; adapters of rank 16 add theirs.
    decoder = 4 * weights * L
    # The tower: forward alone, its 1024 patches; the merger runs on a quarter of them.
    tower = 2 * visual * 1024
    assert decoder < found["flops"] < 1.7 * (decoder + tower)


def test_a_row_that_fails_is_a_line(tmp_path, monkeypatch, capsys):
    """The others go on, and the JSON says why; what was chosen of the operators is chosen again."""

    def full(*_):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(bench_step, "by_peft", full)
    monkeypatch.setenv("CRYSTAL_OPS", "require")
    ops._forget()
    out, before = tmp_path / "step.json", ops.choice()
    bench.main(["step", "--model", "tiny", "--only", "peft,sft,plain", "--repeats", "1", "--out", str(out)])
    rows = rows_of(out)
    assert rows["peft", 0]["cannot_run"] == "RuntimeError: no room" and "ms" in rows["sft", 0]
    assert "cannot run: RuntimeError: no room" in capsys.readouterr().out
    assert before[0] == "require" and ops.choice() == before
    monkeypatch.undo()
    ops._forget()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "sft,none"], "no row none"),
        (["--lengths", "long"], "--lengths long"),
        (["--lengths", "-1"], "at least 0"),
        (["--repeats", "0"], "--repeats at least 1"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        bench.main(["step", "--model", "tiny", "--out", str(tmp_path / "x.json"), *flags])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_machine_without_git_has_no_commit(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(bench_step.subprocess, "run", missing)
    assert bench_step.commit() == "" and bench_step.version("no-such-package") == ""


def test_a_commit_says_whether_files_differ(monkeypatch):
    answers = iter(["abc\n", " M setup.py\n", "abc\n", ""])
    run = lambda *_, **__: SimpleNamespace(stdout=next(answers))
    monkeypatch.setattr(bench_step.subprocess, "run", run)
    assert bench_step.commit() == "abc+" and bench_step.commit() == "abc"
