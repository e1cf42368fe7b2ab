"""The plan's sums against what is measured at two layers: bytes that autograd keeps, operations of torch.

Activations and copies are within 2 % of the storages that saved-tensor hooks see, each counted once,
operations within 1 % of FlopCounterMode's. What cannot be measured without a GPU or eight of them is worked
out by hand.
"""

from dataclasses import replace

import pytest
import torch

from crystal import bench_measures, methods, planning, train
from crystal.backbone import widths
from crystal.bench_rows import write_record
from crystal.runtime import data, plan

SMALL = {
    "hidden_size": 512, "intermediate_size": 1280, "num_attention_heads": 4, "num_key_value_heads": 1,
    "num_hidden_layers": 2, "vocab_size": 4096,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """A decoder of two layers and a tower of two blocks, wide enough that no rounding hides."""
    monkeypatch.setitem(widths.TEXT, "small", SMALL)
    monkeypatch.setattr(
        widths, "VISION", widths.VISION | {"hidden_size": 128, "intermediate_size": 342, "num_heads": 4}
    )


def measured(flags, dtype, folder, length=200):
    """One forward of train.py's objective -> (bytes kept, operations with backward, the plan.Run of it)."""
    torch.manual_seed(0)
    settings = methods.parse([*flags, "--dtype", str(dtype).removeprefix("torch.")])
    mixed = settings.tune == "full" and dtype == torch.bfloat16
    kept_dtype = torch.float32 if mixed else dtype
    model = widths.build("small", 2, 2, torch.device("cpu"), kept_dtype)
    method, fmt = methods.attach(model, settings)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    objective = train.Objective(model, method, autocast).train()

    records, _ = data.read(write_record(folder, length))
    layout = method.layout(fmt, records[0], [256])
    examples = data.RecordDataset(
        records, lambda r, n: layout, model.image_processor, method.corruption, copies=fmt.copies
    )
    batch = data.collate([examples[0, 0]] * settings.batch_size, model.tokenizer.pad_token_id)
    batch = data.to_device(batch, torch.device("cpu"), kept_dtype)

    def forward():
        return train.weighted(objective(batch, settings.progress(0)), method, settings)

    forward()  # what is made once, such as the windows' plan, is there
    there = [*objective.parameters(), *objective.buffers()]
    there += [x for x in batch.values() if isinstance(x, torch.Tensor)]
    kept, _ = bench_measures.saved_bytes(forward, there)
    operations = bench_measures.flops(lambda: forward().backward())

    paths = 2 if method.corruption else 1
    text, vision = widths.blocks(model, 1024)
    run = plan.Run(
        text, vision, SMALL["vocab_size"], planning.counts_of(model, objective.heads), settings.tune,
        batch["input_ids"].shape[1], planning.rows_of(layout, paths), 1024 * paths, settings.batch_size,
        paths,
        checkpointing=settings.checkpointing, dropout=settings.lora_dropout,
        new_tokens=len(dict.fromkeys(method.tokens)), on_vision="vision" in settings.lora_on,
        masked=planning.is_masked(settings), bytes=torch.finfo(dtype).bits // 8, on_gpu=False,
    )  # fmt: skip
    return kept, operations, run


LIVR = ["--method", "livr", "--batch_size", "2"]
LAVIT = ["--method", "lavit", "--batch_size", "2", "--w_gaze", "0", "--w_semantics", "0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "sft"],
        ["--method", "crystal", "--lora_r", "16"],
        ["--method", "crystal", "--tune", "tokens"],
        LIVR,
        [*LIVR, "--masked", "0", "--lora_dropout", "0"],
        LAVIT,
        [*LAVIT, "--gate", "open"],
        ["--method", "sft", "--tune", "full"],
        ["--method", "released"],
    ],
    ids=" ".join,
)
def test_what_is_kept_and_computed_is_what_is_planned(flags, dtype, small, tmp_path):
    kept, operations, run = measured(flags, dtype, tmp_path)
    assert plan.activations(run) + plan.copies(run) == pytest.approx(kept, rel=0.02)
    assert plan.flops(run) == pytest.approx(operations, rel=0.01)


def test_recomputed_activations(small, tmp_path):
    """A layer's input stays, and the forward runs once more; the frozen tower's does not."""
    kept, operations, run = measured(["--method", "crystal", "--checkpointing"], torch.bfloat16, tmp_path)
    # The hooks see what comes into the frozen tower's two blocks, which nobody keeps, and not the angles,
    # which every layer's second run takes from the first.
    kept += 2 * 2 * 128 * run.positions - 2 * 2 * 128 * run.patches
    assert plan.activations(run) == pytest.approx(kept, rel=0.02)
    assert plan.flops(run) == pytest.approx(operations, rel=0.01)
    whole = replace(run, checkpointing=False)
    assert plan.activations(run) < plan.activations(whole) / 3
    assert plan.working(run) > plan.working(whole)


# --- by hand ---

TEXT = plan.Blocks(3, D=8, I=20, H=4, G=2, d=2)
COUNTS = plan.Counts(
    trained_layers=300, trained_rest=40, frozen_layers=6000, frozen_rest=500, vocabulary=2000
)
RUN = plan.Run(TEXT, TEXT, 100, COUNTS, "lora", length=10, rows=4, patches=16, rank=1, on_gpu=True)


def test_what_is_shared_out():
    """340 numbers train: 4 bytes each, 4 for the gradient, 8 for the moments; frozen ones have 2 bytes."""
    assert plan.shared_out(RUN) == {"weights": 2 * 8500 + 4 * 340, "gradients": 4 * 340, "optimiser": 8 * 340}
    four = plan.shared_out(replace(RUN, gpus=4, shard="full"))
    assert four == {"weights": 2 * 2000 + (2 * 6500 + 4 * 340) / 4, "gradients": 340, "optimiser": 680}
    assert plan.shared_out(replace(RUN, gpus=4)) == plan.shared_out(RUN)

    # Full weights are kept in float32, those that do not train too, unless they are cut.
    full = replace(RUN, tune="full")
    assert plan.shared_out(full)["weights"] == 4 * 8840
    assert (
        plan.shared_out(replace(full, shard="full", gpus=2))["weights"] == 2 * 2000 + (2 * 6500 + 4 * 340) / 2
    )


def test_what_is_copied():
    """Autocast rounds the matrices and the head; shards are gathered two layers at a time, or all at once."""
    products = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 20
    assert TEXT.products == products
    assert plan.copies(replace(RUN, tune="full")) == 2 * (3 * products + 100 * 8)
    assert plan.copies(RUN) == 2 * 300
    cut = replace(RUN, shard="full", gpus=2)
    assert plan.copies(cut) == 2 * (2 * 2100 + 540) + 6 * 100
    assert plan.copies(replace(cut, repeats=True)) == 2 * 6840 + 4 * 340


def test_published_totals():
    """LaViT's 3B and VaLR's 7B, all trained: 16 bytes a number of the language model, 4 of the rest.

    3B: 36 layers of 77.07 M; 7B: 28 of 233.06 M. Towers of 0.67 B, vocabularies of 0.31 B (tied), 2 x 0.55 B.
    """
    for flags, static in (
        (["--model", "Qwen/Qwen2.5-VL-3B-Instruct", "--method", "lavit"], 48.4e9),
        (["--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--method", "valr", "--encoders", "none"], 111.6e9),
    ):
        run = planning.of_settings(methods.parse(flags))
        parts = plan.shared_out(replace(run, tune="full"))
        if "valr" in flags:
            assert (
                run.tune == "full" and run.pieces == (*run.pieces[:-1], run.length) and len(run.pieces) == 48
            )
        else:  # the last norm, phi of eq. 6, and <answer> with four latents
            assert run.counts.trained_rest == 2048 + 2 * (2048 * 2048 + 2048) + 5 * 2048
        assert sum(parts.values()) == pytest.approx(static, rel=0.005)


def test_hours():
    run = replace(RUN, accumulation=2)
    assert plan.hours(run, 1800, 1e-6) == pytest.approx(plan.flops(run) / 1e6)


def test_what_a_gpu_does_otherwise():
    """A dropped place is a bool, keys under a mask stand once for every head, pieces keep all heads' too."""
    cpu = replace(RUN, on_gpu=False)
    dropped = 5 * TEXT.D + TEXT.Q + TEXT.I
    for run in (replace(RUN, dropout=0.1), replace(cpu, dropout=0.1)):
        more = plan.kept_by_layer(TEXT, run) - plan.kept_by_layer(TEXT, RUN)
        assert more == dropped * (3 if run.on_gpu else 4) - 2 * (2 * TEXT.D + TEXT.I)
    masked = [plan.a_layer(replace(run, masked=True)) - plan.a_layer(run) for run in (RUN, cpu)]
    assert masked == [10 * 10 * 2 + 2 * 2 * (8 - 4) * 10, 10 * 10 * 2]
    pieces = [plan.a_layer(replace(run, pieces=(5, 10))) - plan.a_layer(run) for run in (RUN, cpu)]
    assert pieces == [2 * 2 * 8 * 15, 2 * 2 * 4 * 15]
    assert "context" in plan.memory(RUN) and plan.memory(cpu)["context"] == 0


def test_advice_is_the_first_that_is_enough():
    """Smaller batches, then checkpointing, shards, both, more GPUs; a batch that does not divide is none."""
    heavy = replace(RUN, batch=6, gpus=2, length=100)
    room = lambda run: sum(plan.memory(run).values())
    light = replace(heavy, batch=1, accumulation=6)
    for wanted, words in (
        (replace(heavy, batch=3, accumulation=2), "--batch_size 3 --accumulation 2"),
        (replace(heavy, batch=2, accumulation=3), "--batch_size 2 --accumulation 3"),
        (light, "--batch_size 1 --accumulation 6"),
        (replace(light, checkpointing=True), "--batch_size 1 --accumulation 6 --checkpointing"),
    ):
        assert plan.advice(heavy, room(wanted)) == (words, wanted)
    assert plan.advice(heavy, 1000)[0] is None

    big = replace(
        RUN, gpus=2, text=replace(TEXT, count=30), counts=replace(COUNTS, frozen_layers=6_000_000_000)
    )
    cut = replace(big, shard="full")
    assert plan.advice(big, room(cut)) == ("--shard full on 2 GPUs", cut)
    eight = replace(cut, gpus=8)
    words, found = plan.advice(big, room(eight))
    assert words == "--shard full on 8 GPUs" and found == eight
