"""Numbers that are read one update late: summed, held back where they are no numbers, and the same log."""

import json
import math
import shutil

import pytest
import torch

from crystal import train
from crystal.methods import crystal as method
from crystal.runtime import checkpoint
from crystal.runtime.config import UserError
from crystal.runtime.distributed import Processes
from crystal.runtime.late import Numbers, hold_back, holds_back

FUSED = ("--adamw", "fused")


def number(x):
    return torch.tensor(x, dtype=torch.float32)


class Three(Processes):
    """Three ranks with the same numbers."""

    def sum(self, value):
        return value * 3


# --- the numbers ---


def test_terms_are_means_and_tokens_sums_over_the_ranks():
    means = {"loss": number(1.5), "ce": number(0.1).double()}
    numbers = Numbers(means, 7, True, number(0.3), Three(world=3))
    told = numbers.read()
    assert told.means == {"loss": 1.5, "ce": pytest.approx(float(number(0.1).double()), abs=1e-16)}
    assert told.tokens == 21 and told.stop and told.norm == float(number(0.3))
    assert told.finite and numbers.broken.item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_what_is_no_number_is_known_on_the_device(bad, where):
    given = {"loss": 1.0, "norm": 1.0, where: bad}
    means = {"ce": number(1.0), "loss": number(given["loss"])}
    numbers = Numbers(means, 1, False, number(given["norm"]), Processes())
    assert numbers.broken.item() == 1 and not numbers.read().finite and not numbers.read().stop


def test_a_term_beside_the_loss_may_be_no_number():
    means = {"loss": number(1.0), "mass": number(math.nan)}
    numbers = Numbers(means, 1, False, number(1.0), Processes())
    assert numbers.broken.item() == 0 and numbers.read().finite


# --- the optimiser ---


def adamw(x, **more):
    return torch.optim.AdamW([x], lr=0.1, weight_decay=0.1, **more)


def test_an_update_that_is_none_is_left_out_whole():
    """Three updates, the second of which is held back: weights, moments and counter are those of two."""
    gradients = [torch.tensor([1.0, -2.0]), torch.tensor([math.nan, 5.0]), torch.tensor([0.5, 3.0])]
    held, plain = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    optimizer, other = adamw(held, fused=True), adamw(plain, fused=True)
    assert holds_back(optimizer) and not holds_back(adamw(plain))
    for g in gradients:
        held.grad = g.clone()
        hold_back(optimizer, (~g.isfinite().all()).float())
        optimizer.step()
    for g in (gradients[0], gradients[2]):
        plain.grad = g.clone()
        other.step()
    assert torch.equal(held, plain)
    for name, value in other.state[plain].items():
        assert torch.equal(optimizer.state[held][name], value), name


def test_fused_is_adamw_within_rounding():
    """20 updates against the formula in float64 (Loshchilov and Hutter, algorithm 2)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=g, requires_grad=True)
    right, m, v = x.detach().double(), 0.0, 0.0
    optimizer = torch.optim.AdamW([x], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True)
    for t in range(1, 21):
        grad = torch.randn(50, generator=g)
        x.grad = grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad.double(), 0.999 * v + 0.001 * grad.double() ** 2
        step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        right = right - 0.01 * (step + 0.1 * right)
    assert (x.detach().double() - right).abs().max() < 5e-6  # 20 roundings of numbers below 4


# --- in a run ---


@pytest.fixture
def run(model_dirs, records_file, tmp_path):
    def go(name, *more):
        return train.main(
            [
                "--model", str(model_dirs[True]), "--data", str(records_file), "--lr", "1e-2",
                "--output", str(tmp_path / name), "--latents", "3", "--lora_r", "2", "--batch_size", "2",
                "--eval_every", "0", *more,
            ]
        )  # fmt: skip

    return go


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{n: x for n, x in line.items() if n not in ("tokens_per_s", "peak_memory_gb")} for line in found]


def test_the_log_is_the_same_however_late_it_is_read(run, records_file):
    """Read at once where every update is saved, else an update later, and at the last and a validation."""
    more = ("--max_steps", "5", "--val_data", str(records_file), "--eval_every", "3", *FUSED)
    at_once = lines(run("saved", *more, "--save_every", "1"))
    late = lines(run("late", *more))
    assert late == at_once and [line["step"] for line in late] == [1, 2, 3, 3, 4, 5, 5]


def test_plain_and_fused_agree_within_rounding(run):
    plain, fused = (lines(run(name, "--max_steps", "4", "--adamw", name)) for name in ("plain", "fused"))
    assert plain[0] == fused[0] and plain != fused
    for x, y in zip(plain, fused):
        assert x == pytest.approx(y, rel=1e-4)


def test_a_fused_run_goes_on_to_the_bit(run):
    whole = run("whole", "--max_steps", "4", *FUSED)
    run("part", "--max_steps", "4", "--save_every", "2", *FUSED)
    part = whole.parent / "part"
    shutil.rmtree(part / "checkpoints" / "step-4")
    run("part", "--max_steps", "4", "--resume", *FUSED)
    assert lines(part) == lines(whole)
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        one, other = ((r / "checkpoints" / "step-4" / file).read_bytes() for r in (whole, part))
        assert one == other, file


@pytest.mark.parametrize("adamw", ["fused", "plain"])
def test_a_loss_that_is_no_number_never_reaches_the_weights(run, monkeypatch, adamw):
    """Fused, update 2 is told while the next one runs; either way with its records, and before a save."""
    losses, seen = method.Method.losses, []

    def broken(self, model, batch, progress):
        terms = losses(self, model, batch, progress)
        seen.append((model.new_tokens.embedding.detach().clone(), batch["where"]))
        return terms | {"kl": terms["kl"] * (math.nan if len(seen) == 3 else 1.0)}

    monkeypatch.setattr(method.Method, "losses", broken)
    with pytest.raises(UserError) as stopped:
        run("nan", "--max_steps", "9", "--adamw", adamw, "--save_every", "2")
    said = str(stopped.value)
    assert said.startswith("update 2: loss nan or gradient norm nan is not finite; stopped before the update")
    assert said.endswith(f"its records: {', '.join(seen[2][1])}") and "step-2;" in said

    assert len(seen) == (4 if adamw == "fused" else 3)
    assert all(torch.equal(rows, seen[2][0]) for rows, _ in seen[3:])
    assert not torch.equal(seen[1][0], seen[2][0])


def test_nothing_that_is_no_number_is_saved(run, monkeypatch):
    """Fused, where the update after which a checkpoint is due is the broken one."""
    losses, seen = method.Method.losses, []

    def broken(self, *args):
        seen.append(1)
        terms = losses(self, *args)
        return terms | {"kl": terms["kl"] * (math.nan if len(seen) == 4 else 1.0)}

    monkeypatch.setattr(method.Method, "losses", broken)
    with pytest.raises(UserError, match=r"update 3: .*step-2; its records") as stopped:
        run("nan", "--max_steps", "9", *FUSED, "--save_every", "2")
    assert len(seen) == 4
    folder = str(stopped.value).split("checkpoint is ")[1].split("/checkpoints/")[0]
    assert checkpoint.newest(train.Path(folder)).name == "step-2"
