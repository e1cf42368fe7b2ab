"""Gain, swap and drop against forwards that share no code with carrying.py: the dual path's own copy, and one
record at a time with hooks written out.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crystal import train
from crystal.evaluation import carrying
from crystal.latent_copy import dual_forward
from crystal.methods.crystal import position_mask
from crystal.runtime import data
from crystal.runtime.distributed import Processes


def mean_ce(model, h, batch, b):
    """Cross-entropy of record b's answer by torch's own function."""
    rows = [at for at in batch["answer_positions"][b].tolist() if at >= 0]
    labels = batch["targets"][b, rows]
    return F.cross_entropy(model.hf.lm_head(h[b, rows]), labels)


def measured(s):
    """The numbers of each record of a setup, all in one block."""
    s.objective.eval()
    with torch.no_grad():
        return carrying.of_block(s.model, s.method, s.batch, carrying.donors(s.records))


@torch.no_grad()
@pytest.mark.parametrize("realisation", ["hidden", "kv", "packed"])
def test_gain_is_what_the_copy_does(setup, realisation):
    """The corrupted path of eq. 6's own forward, with the copy and with it cut."""
    s = setup("--method", "crystal", "--corruption", "mask=0.9")
    numbers = measured(s)
    copied = position_mask(s.batch["latents"], s.batch["input_ids"].shape[1])
    _, given = dual_forward(s.model, s.batch, copied, realisation)
    _, own = dual_forward(s.model, s.batch, None, "kv")
    for b in range(len(s.records)):
        expected = mean_ce(s.model, own, s.batch, b) - mean_ce(s.model, given, s.batch, b)
        assert float(expected) != 0
        assert float(numbers["gain"][b]) == pytest.approx(float(expected), rel=1e-6)


def test_gain_is_zero_where_nothing_is_corrupted(setup):
    s = setup("--method", "crystal", "--corruption", "mask=0.9")
    s.batch["pixel_values_cor"] = s.batch["pixel_values"]
    assert measured(s)["gain"].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("method", ["crystal", "livr", "valr"])
def test_swap_one_record_at_a_time(setup, method):
    """Each record alone in its batch, its latents' states before every layer taken from its donor's."""
    flags = {"crystal": ["--corruption", "blur=3"], "valr": ["--encoders", "tiny"]}.get(method, [])
    s = setup("--method", method, *flags)
    numbers, donor = measured(s), carrying.donors(s.records)
    alone = [setup("--method", method, *flags, which=[i]) for i in range(len(s.records))]
    for other in alone:
        other.objective.load_state_dict(s.objective.state_dict())
        other.objective.eval()

    def forward(one, give=None):
        """-> (CE, the latents' states at every layer's input); give: states to put there instead."""
        where, L, seen, hooks = one.batch["latents"][0], one.batch["input_ids"].shape[1], [], []

        def before(layer, args, kwargs):
            h = args[0] if args else kwargs["hidden_states"]
            if h.shape[1] == L:
                if give is not None:
                    h = h.clone()
                    h[0, where] = give[len(seen)]
                seen.append(h[0, where].clone())
            return ((h, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": h})

        for layer in one.model.layers:
            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        h = one.method.hidden(one.model, one.batch)
        for hook in hooks:
            hook.remove()
        return float(mean_ce(one.model, h, one.batch, 0)), seen

    plain = [forward(one) for one in alone]
    swapped = [i for i in range(len(alone)) if donor[i] >= 0]
    assert len(swapped) > 1
    for at, i in enumerate(swapped):
        expected = forward(alone[i], plain[donor[i]][1])[0] - plain[i][0]
        assert abs(expected) > 1e-6
        assert float(numbers["swap"][at]) == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_records_with_fewer_latents(setup):
    """A thought of one step and one of two: what one lacks stays the other's own, in a batch as by itself."""
    s = setup("--method", "valr", "--encoders", "none", which=[0, 1])
    s.objective.eval()
    for record, steps in zip(s.records, (["red"], ["red", "blue"])):
        record.cot = steps
    examples = [s.examples[0, i] for i in range(2)]
    pad = s.model.tokenizer.pad_token_id
    to = lambda *given: data.to_device(data.collate(list(given), pad), torch.device("cpu"), torch.float64)
    batch, alone = to(*examples), [to(example) for example in examples]
    assert [len(one["latents"][0]) for one in alone] == [3, 6] and (batch["latents"][0, 3:] == -1).all()
    numbers = carrying.of_block(s.model, s.method, batch, [1, 0])

    def forward(one, give=None):
        where, L, seen = one["latents"][0], one["input_ids"].shape[1], []

        def before(layer, args, kwargs):
            h = args[0] if args else kwargs["hidden_states"]
            if h.shape[1] != L:
                return None
            if give is not None:
                h = h.clone()
                h[0, where[:3]] = give[len(seen)][:3]
            seen.append(h[0, where].clone())
            return ((h, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": h})

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in s.model.layers]
        h = s.method.hidden(s.model, one)
        for hook in hooks:
            hook.remove()
        return float(mean_ce(s.model, h, one, 0)), seen

    plain = [forward(one) for one in alone]
    for i in range(2):
        expected = forward(alone[i], plain[1 - i][1])[0] - plain[i][0]
        assert abs(expected) > 1e-7
        assert float(numbers["swap"][i]) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_drop_hides_the_latents_from_all_that_follow(setup):
    s = setup("--method", "livr")
    numbers = measured(s)
    assert set(numbers) == {"drop", "swap"}
    ids, seen = s.batch["input_ids"], s.batch["attention_mask"].bool()
    B, L = ids.shape
    plain = s.method.hidden(s.model, s.batch)

    # A mask of every head and layer by hand: causal, no padding, and a latent for itself and latents alone.
    latent = torch.zeros(B, L, dtype=torch.bool)
    for b in range(B):
        latent[b, s.batch["latents"][b]] = True
    allowed = torch.ones(L, L, dtype=torch.bool).tril() & seen[:, None, :]
    allowed &= latent[:, :, None] | ~latent[:, None, :]
    allowed |= torch.eye(L, dtype=torch.bool)
    mask = torch.zeros(B, 1, L, L, dtype=torch.float64).masked_fill(~allowed[:, None], float("-inf"))
    given = {n: s.batch[n] for n in ("input_ids", "pixel_values", "image_grid_thw")}
    given["position_ids"] = s.model.positions(s.batch)
    h = s.model.hf.model(**s.model.keywords(given), attention_mask=mask, use_cache=False).last_hidden_state
    for b in range(B):
        expected = mean_ce(s.model, h, s.batch, b) - mean_ce(s.model, plain, s.batch, b)
        assert float(numbers["drop"][b]) == pytest.approx(float(expected), rel=1e-5, abs=1e-9)


def test_a_method_without_latents_has_nothing_to_measure(setup):
    s = setup("--method", "sft")
    pad = s.model.tokenizer.pad_token_id
    assert carrying.measure(s.objective, s.method, s.examples, pad, Processes(), torch.float64) == {}


def test_means_and_intervals_over_blocks(setup, monkeypatch):
    """Three records in blocks of two: a record alone in its block has a gain and no donor."""
    flags = ["--method", "crystal", "--corruption", "mask=0.9"]
    s = setup(*flags)
    s.objective.eval()
    monkeypatch.setattr(carrying, "BLOCK", 2)
    pad = s.model.tokenizer.pad_token_id
    found = carrying.measure(s.objective, s.method, s.examples, pad, Processes(), torch.float64)

    # Every record alone in a batch, its corruption drawn by its number among the three.
    gains, swaps = [], []
    for block in ([0, 1], [2]):
        batch = data.collate([s.examples[0, i] for i in block], pad)
        batch = data.to_device(batch, torch.device("cpu"), torch.float64)
        with torch.no_grad():
            numbers = carrying.of_block(s.model, s.method, batch, [1, 0] if len(block) == 2 else [-1])
        gains += numbers["gain"].tolist()
        swaps += numbers["swap"].tolist() if "swap" in numbers else []
    for name, values in (("gain", gains), ("swap", swaps)):
        assert len(values) == {"gain": 3, "swap": 2}[name]
        assert found[name] == pytest.approx(np.mean(values), rel=1e-9)
        half = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))
        assert found[f"{name}_pm"] == pytest.approx(half, rel=1e-9)

    monkeypatch.setattr(carrying, "RECORDS", 2)
    first = carrying.measure(s.objective, s.method, s.examples, pad, Processes(), torch.float64)
    assert first["gain"] == pytest.approx(np.mean(gains[:2]), rel=1e-9)


def test_donors_have_another_image_and_another_answer():
    record = lambda answer, image: SimpleNamespace(answer=answer, images=[image])
    records = [record("one", "a"), record("One.", "b"), record("two", "a"), record("two", "c")]
    # 0: record 1 has its answer, record 2 its image. 3 goes round to the first.
    assert carrying.donors(records) == [3, 2, 1, 0]
    assert carrying.donors([record("one", "a"), record("one", "b")]) == [-1, -1]


# --- what is told ---


def test_news_are_told_once(tmp_path):
    """When an interval first lies above 0; what the log of a resumed run has told is no news."""
    news = carrying.News()
    assert news.of(10, {"gain": 0.1, "gain_pm": 0.2, "swap": -0.3, "swap_pm": 0.1}) == []
    (told,) = news.of(20, {"gain": 0.11, "gain_pm": 0.04, "swap": 0.01, "swap_pm": 0.02})
    assert told.startswith("step 20: ") and "0.110 nats" in told and "0.070 to 0.150" in told
    assert news.of(30, {"gain": 0.2, "gain_pm": 0.04}) == []
    (told,) = news.of(40, {"gain": 0.2, "gain_pm": 0.04, "swap": 0.5, "swap_pm": 0.1})
    assert "another record's latents cost 0.500 nats" in told

    lines = [{"step": 20, "val_gain": 0.11, "val_gain_pm": 0.04, "val_swap": 0.01, "val_swap_pm": 0.02}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = carrying.News(tmp_path)
    assert again.of(30, {"gain": 0.2, "gain_pm": 0.04}) == []
    assert len(again.of(30, {"swap": 0.2, "swap_pm": 0.04})) == 1


def test_training_logs_and_tells_them(model_dirs, records_file, tmp_path, capsys):
    """In metrics.jsonl and on the screen at each validation; a sentence where one is there to be told."""
    flags = [
        "--method", "crystal", "--model", model_dirs[True], "--data", records_file,
        "--val_data", records_file, "--latents", "3", "--lora_r", "2", "--max_steps", "2",
        "--eval_every", "1", "--output", tmp_path / "run",
    ]
    original = carrying.measure
    try:
        carrying.measure = lambda *given: original(*given) | {"swap": 0.5, "swap_pm": 0.1}
        train.main([str(flag) for flag in flags])
    finally:
        carrying.measure = original
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "val_loss" in line]
    assert len(validations) == 2
    assert all({"val_gain", "val_gain_pm", "val_swap"} <= line.keys() for line in validations)
    said = capsys.readouterr()
    assert (said.out + said.err).count("another record's latents cost 0.500 nats") == 1
