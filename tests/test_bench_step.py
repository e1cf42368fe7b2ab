"""bench step at small sizes: rows whose losses agree where they must, FLOPs by hand, what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from crystal import bench, bench_measures, bench_rows, bench_step
from crystal.backbone import widths
from crystal.bench_rows import ROWS, Update
from crystal.runtime import ops, plan
from crystal.runtime.config import UserError


def rows_of(path):
    return {(row["row"], row["length"]): row for row in json.loads(path.read_text())["rows"]}


def small_picture(monkeypatch):
    """112 x 112 pixels instead of 448 x 448."""
    for file in (widths, bench_rows):
        monkeypatch.setattr(file, "SIDE", 112)


def test_every_row_of_a_small_model(tmp_path, capsys, monkeypatch):
    """Each is measured; a peer's loss is its row's, and CrystaL's is one however its latents are shared."""
    small_picture(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # which the next test looks at
    out = tmp_path / "a" / "step.json"
    bench.main(["step", "--model", "tiny", "--device", "cpu", "--repeats", "1", "--out", str(out)])
    rows = rows_of(out)
    assert set(rows) == {(name, 0) for name in ROWS}
    assert all(len(row["ms"]) == 1 and min(row["ms"]) > 0 for row in rows.values())

    loss = {name: rows[name, 0]["loss"] for name in ROWS}
    assert loss["peft"] == pytest.approx(loss["sft"], rel=1e-5)
    for name in ("two_passes", "hidden", "packed", "plain", "checkpointing", "kv_x4", "kv_compile"):
        assert loss[name] == pytest.approx(loss["kv"], rel=1e-4), name
    assert loss["kv"] > loss["sft"] and rows["sft_x4", 0]["tokens"] == 4 * rows["sft", 0]["tokens"]
    assert rows["kv", 0]["tokens"] == 2 * rows["kv", 0]["L"]

    # 8 x 8 patches. Labelled are eight words and their end.
    counts = {name: (row["patches"], row["loss_rows"]) for (name, _), row in rows.items()}
    assert counts["sft"] == (64, 9) and counts["sft_x4"] == (256, 36) and counts["kv"][0] == 128

    # The same losses in other operations: packed is one sequence, checkpointing goes forward twice.
    flops = {name: rows[name, 0]["flops"] for name in ROWS}
    assert flops["packed"] != flops["kv"] and flops["checkpointing"] > 1.2 * flops["kv"]
    for name in ("sft", "kv", "hidden", "checkpointing", "kv_x4"):
        assert rows[name, 0]["floor_flops"] == pytest.approx(flops[name], rel=0.01), name

    # Attention that returns its weights keeps them; recomputed activations are not kept.
    kept = {name: rows[name, 0]["kept_bytes"] for name in ROWS}
    assert kept["two_passes"] > 1.1 * kept["kv"] > 2 * kept["checkpointing"]
    assert kept["kv_x4"] == pytest.approx(4 * kept["kv"], rel=0.02)
    assert all(row["waits"] > 0 and row["waits_at"] for row in rows.values())
    assert rows["packed", 0]["waits"] > rows["kv", 0]["waits"]
    assert all(min(row["parts_ms"].values()) > 0 and len(row["parts_ms"]) == 5 for row in rows.values())

    printed = capsys.readouterr().out
    assert printed.count("cannot run") == 0 and "wrote" in printed
    sft = [line for line in printed.splitlines() if line.startswith("sft ")]
    assert len(sft) == 1 and " 1.00 " in sft[0]

    few = ["--only", "sft,kv", "--lengths", "0,400", "--repeats", "2"]
    bench.main(["step", "--model", "tiny", *few, "--out", str(out)])
    rows = rows_of(out)
    assert set(rows) == {(name, length) for name in ("sft", "kv") for length in (0, 400)}
    assert all(rows[name, 0]["L"] < 90 < 110 < rows[name, 400]["L"] < 160 for name in ("sft", "kv"))
    assert all(len(row["ms"]) == 2 for row in rows.values())


def test_compiled_is_what_asks_for_it(tmp_path, monkeypatch):
    """Also after a row whose operations were counted, which torch.compile does not forget by itself."""
    small_picture(monkeypatch)

    # A back end that leaves the traced operations as they are: torch's own takes half a minute.
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=lambda graph, _: graph, **how))
    out = tmp_path / "step.json"
    few = ["--only", "sft,sft_compile", "--repeats", "1", "--device", "cpu"]
    bench.main(["step", "--model", "tiny", *few, "--out", str(out)])
    rows = rows_of(out)
    assert {name for (name, _), row in rows.items() if row["graphs"]} == {"sft_compile"}
    assert rows["sft_compile", 0]["loss"] == pytest.approx(rows["sft", 0]["loss"], rel=1e-5)


def test_ratios_by_hand():
    """2 TFLOP/s: 6 TFLOP at the least take 3 s; a row of 6 s is twice the floor, and did 9 of 12 TFLOP."""
    machine = {"tflop_s": 2.0}

    def row(name, p50, length=0, pairs=1, **more):
        made = {"row": name, "length": length, "p50": p50, "ms": [p50], "B": pairs}
        return made | {"floor_flops": 6e12, "flops": 9e12} | more

    rows = []
    for one in (
        row("peft", 4000.0), row("sft", 6000.0), row("kv", 9000.0), row("sft_x4", 12000.0, pairs=4),
        {"row": "two_passes", "length": 0, "cannot_run": "no room"}, row("two_passes", 100.0, length=2048),
    ):  # fmt: skip
        rows.append(one)
        bench_step.compare(rows, machine)
    assert [r.get("times_sft") for r in rows] == [4 / 6, 1.0, 1.5, None, None, None]
    assert [r.get("times_peer") for r in rows] == [None, 1.5, None, None, None, None]
    assert [r.get("times_floor") for r in rows[:4]] == pytest.approx([4 / 3, 2.0, 3.0, 4.0])
    assert rows[1]["of_best"] == pytest.approx(9 / 12)


def test_the_floor_by_hand():
    """Operations of sft on the tiny model, on paper: 4 a weight and token, 6 a number of an adapter."""
    update = Update(ROWS["sft"], 0, ("tiny", 0, 0), torch.device("cpu"), torch.float32)
    config, L = update.model.hf.config.text_config, update.batch["input_ids"].shape[1]
    D, I, V = config.hidden_size, config.intermediate_size, config.vocab_size
    layers = config.num_hidden_layers
    d = D // config.num_attention_heads
    KV = d * config.num_key_value_heads

    # q and o are D x D, k and v D x KV, three of the MLP D x I; adapters of rank 16 beside each.
    weights = layers * (2 * D * D + 2 * D * KV + 3 * D * I)
    adapters = layers * 16 * (2 * 2 * D + 2 * (D + KV) + 3 * (D + I))
    decoder = L * (4 * weights + 6 * adapters)
    decoder -= L * 2 * D * (D + 2 * KV + 3 * 16)  # nothing before the first layer wants a gradient
    attention = layers * 7 * L * L * D  # 2 + 5 products of L x L x D, of which half of the cells
    head = 9 * 4 * D * V

    # The tower: forward alone. 1024 patches of 2 x 14 x 14 x 3 numbers, a merger on a quarter of them.
    vision = update.model.hf.config.vision_config
    W, J = vision.hidden_size, vision.intermediate_size
    whole = len(vision.fullatt_block_indexes)
    windows = vision.depth - whole
    cells = 1024 * (1024 * whole + (vision.window_size // 14) ** 2 * windows)
    tower = 2 * 1024 * (vision.depth * (4 * W * W + 3 * W * J) + 2 * 14 * 14 * 3 * W) + 4 * cells * W
    merger = 2 * 256 * (4 * W * 4 * W + 4 * W * D)

    by_hand = decoder + attention + head + tower + merger
    assert plan.flops(update.work) == pytest.approx(by_hand, rel=1e-3)
    assert bench_measures.flops(update) == pytest.approx(by_hand, rel=0.005)


def test_a_row_that_fails_is_a_line(tmp_path, monkeypatch, capsys):
    """The others go on, and the JSON says why; what was chosen of the operators is chosen again."""

    def full(*_):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(bench_rows, "by_peft", full)
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
