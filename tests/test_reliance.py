"""Interventions that touch the latents and nothing else, a bottleneck without a leak, verdicts by number,
mass against eager softmax.
"""

import json
import re
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

# --- intervals, donors, verdict ---
from test_interventions import ask, states_of

from crystal import evaluate, train
from crystal.corrupt import Corruption
from crystal.evaluation import reliance
from crystal.evaluation.interventions import questions
from crystal.evaluation.reliance import CONDITIONS, donors, measure, verdict
from crystal.layout import Format
from crystal.runtime.config import UserError


@pytest.mark.parametrize(
    "trained, swapped, used, words",
    [
        ([1] * 6 + [0] * 4, [0] * 10, True, r"are used: .*\(\+60.0 points, .* p = 0.031\)"),  # 2 / 2^6
        ([0] * 10, [1] * 6 + [0] * 4, False, r"not used to advantage: .*\(-60.0 points"),
        ([1, 1], [0, 0], None, r"These 2 questions cannot tell .*p = 0.5\)"),
        ([1] * 5, [0] * 5, None, r"These 5 questions cannot tell .*p = 0.062\)"),  # 2 / 2^5
        ([0] * 7, [0] * 7, None, r"7 questions cannot tell .*a use of 35 points could go unseen; .* p = 1\)"),
        ([1] * 7, [1] * 7, None, "7 questions cannot tell"),
        ([1, 0] * 400, [1, 0] * 400, False, "No use of the latents is shown"),
        ([0] * 100, [0] * 100, False, "No use of the latents is shown"),
    ],
)
def test_verdict(trained, swapped, used, words):
    said, line = verdict(trained, swapped)
    assert said is used and re.search(words, line) and "\n" not in line


def test_donors():
    record = lambda question, answer, image, family: SimpleNamespace(
        turns=[("user", question)], answer=answer, images=[image], family=family, where=f"x:{image}"
    )
    records = [
        record("q", "1", "a", "f"), record("q", "2", "a", "f"), record("q", "2", "b", "f"),
        record("q", "1", "c", "f"), record("p", "2", "d", "f"), record("p", "Two.", "e", "g"),
        record("r", "two", "f", "g"),
    ]
    found = donors(records)
    # Its own image, or its own answer, will not do.
    assert found == donors(records) and found[0] == 2 and found[1] == 3 and found[2] in (0, 3)
    # Whatever is drawn: record 1 has another answer and record 0's own image.
    assert all(donors(records, seed)[0] == 2 for seed in range(20))
    assert found[4] == 5  # the same question, even in another family
    for i in (5, 6):  # nobody asked the same, nobody of the family answers otherwise: anybody
        assert records[found[i]].answer in "12"
    assert len({tuple(donors(records, seed)) for seed in range(20)}) > 1
    with pytest.raises(UserError, match="x:e"):
        donors(records[5:])


# --- attention ---


def test_mass_equals_eager_softmax(setup):
    s = setup()
    mass = reliance.attention_mass(s.model.eval(), s.fmt, s.records, batch_size=2)
    expected = {"latents": torch.zeros(3), "image": torch.zeros(3)}
    s.model.hf.set_attn_implementation({"text_config": "eager"})
    for i, record in enumerate(s.records):
        a = ask(s, [i])
        ids, pixels, grid = a.prompts[0]
        x = torch.tensor([ids + s.fmt.text(record.answer)])
        with torch.no_grad():
            out = s.model.hf(
                input_ids=x,
                mm_token_type_ids=(x == s.fmt.image).int(),
                pixel_values=pixels.double(),
                image_grid_thw=grid,
                output_attentions=True,
                use_cache=False,
            )
        for n, weights in enumerate(out.attentions):  # [1,H,L,L]
            rows = weights[0, :, len(ids) - 1 : -1].mean((0, 1))  # [L]
            expected["latents"][n] += rows[a.where[0]].sum() / 3
            expected["image"][n] += rows[x[0] == s.fmt.image].sum() / 3
    assert len(mass["image"]) == 3
    for name in mass:
        assert torch.allclose(torch.tensor(mass[name]), expected[name], atol=1e-5) and min(mass[name]) > 0


# --- the whole ---


def test_measure_is_the_same_whenever_and_however_batched(setup):
    s = setup()
    first = measure(s.model.eval(), s.fmt, s.records, batch_size=3, max_new_tokens=3)
    assert first == measure(s.model, s.fmt, s.records, batch_size=3, max_new_tokens=3)
    assert (
        [c["condition"] for c in first["conditions"]] == [c.name for c in CONDITIONS]
        and first["questions"] == 3
        and first["latents"] == 3
    )
    one = measure(s.model, s.fmt, s.records, batch_size=1, max_new_tokens=3)
    assert [c["right"] for c in one["conditions"]] == [c["right"] for c in first["conditions"]]
    assert one["attention"]["image"] == pytest.approx(first["attention"]["image"], abs=1e-6)
    lines = reliance.text(first).splitlines()
    assert (
        lines[-1] == f"verdict: {first['verdict']}"
        and lines[-2] == f"rule: {reliance.RULE}"
        and len(lines) == 2 + len(CONDITIONS) + 6
    )


def test_each_condition_feeds_what_it_says(setup, monkeypatch):
    """Which prompts, pixels and states reach the model under each name; predictions decide right and wrong.
    """
    s = setup()
    fed, state, replace, real = [], {"replaced": None}, reliance.replaced, reliance.generate

    @contextmanager
    def spy(model, where, states):
        state["replaced"] = states
        with replace(model, where, states):
            yield
        state["replaced"] = None

    def fake(model, prompts, fmt, n, biases=None):
        if n == 1:
            return real(model, prompts, fmt, n)  # donors are recorded from a real forward
        real(model, prompts, fmt, 1)
        fed.append((prompts, state | {"hidden": biases is not None}))
        right = len(fed) in (1, 7)
        return [r.answer if right else "?" for r in s.records]

    monkeypatch.setattr(reliance, "replaced", spy)
    monkeypatch.setattr(reliance, "generate", fake)
    result = measure(s.model.eval(), s.fmt, s.records, Corruption("blur=3"), batch_size=3, max_new_tokens=3)
    assert len(fed) == len(CONDITIONS)
    assert [c["right"] for c in result["conditions"]] == [1.0, 0, 0, 0, 0, 0, 1.0, 0, 0]
    assert result["used"] is None and "These 3 questions cannot tell" in result["verdict"]
    assert [c.get("changed") for c in result["conditions"]] == [None, 1, 1, 1, 1, 1, 0, 1, 1]
    drops = [i for i, (prompts, _) in enumerate(fed) if not set(s.fmt.latents) & set(prompts[0][0])]
    blurred = [i for i, (prompts, _) in enumerate(fed) if not torch.equal(prompts[0][1], fed[0][0][0][1])]
    assert (
        drops == [1, 6] and blurred == [7, 8] and [i for i, (_, x) in enumerate(fed) if x["hidden"]] == [5, 6]
    )
    assert [i for i, (_, x) in enumerate(fed) if x["replaced"] is not None] == [2, 3, 4, 7]
    own = states_of(s, ask(s))
    partner = donors(s.records)
    mean, noise, swapped, intact = (fed[i][1]["replaced"] for i in (2, 3, 4, 7))
    for n in range(3):
        assert torch.allclose(mean[n], own[n].mean(0).expand(3, -1, -1)) and torch.allclose(
            intact[n], own[n], atol=1e-12
        )
        assert torch.allclose(swapped[n], own[n][partner], atol=1e-5)
    # Layer 0 is the embedding, alike for all.
    deviation = (noise[1:] - mean[1:]) / torch.stack([x.std(0, correction=0) for x in own[1:]])[:, None]
    assert deviation.std() == pytest.approx(1, abs=0.15) and abs(deviation.mean()) < 0.1


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--method", "sft"), "no latents stand in its prompts"),
        (("--thought", "cot"), "makes its latents while it answers"),
        (("--method", "valr", "--encoders", "none"), "makes its latents while it answers"),
    ],
)
def test_a_model_without_latents_in_its_prompts_is_refused(setup, flags, says):
    s = setup(*flags)
    with pytest.raises(UserError, match=says):
        measure(s.model.eval(), s.fmt, s.records)


def test_a_merged_directorys_latents_are_found_by_name(setup):
    s = setup()
    for latents in ("keep", "drop"):
        own = [questions(s.model, s.fmt, s.records, latents).build(i, 0)["layout"] for i in range(3)]
        template, s.model.tokenizer.chat_template = s.model.tokenizer.chat_template, s.fmt.chat_template()
        merged = [
            questions(s.model, Format(s.model.tokenizer), s.records, latents).build(i, 0)["layout"]
            for i in range(3)
        ]
        s.model.tokenizer.chat_template = template
        assert merged == own


def test_command_line(model_dirs, records_file, tmp_path, capsys):
    run = train.main(
        [
            "--model", str(model_dirs[True]), "--data", str(records_file), "--latents", "3", "--lora_r", "2",
            "--max_steps", "1", "--eval_every", "0", "--output", str(tmp_path / "run"),
        ]
    )
    capsys.readouterr()
    evaluate.main(
        [
            "--model", str(run), "--data", str(records_file), "--reliance", "--max_new_tokens", "2",
            "--device", "cpu", "--corruption", "noise=30",
        ]
    )
    out = capsys.readouterr().out
    folder = run / "reliance" / "train"
    result = json.loads((folder / "reliance.json").read_text())
    assert (
        result["verdict"] in out
        and result["corruption"] == "noise=30"
        and result["model"] == str(run)
        and (folder / "reliance.txt").read_text() in out
    )
    assert (folder / "attention.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="no latents"):
        evaluate.main(
            ["--model", str(model_dirs[True]), "--data", str(records_file), "--reliance", "--device", "cpu"]
        )


def test_a_batchs_conditions_share_what_they_see(setup, monkeypatch):
    """Twelve passes over a batch's images, five encodings: as trained, partners', intact, corrupted, mass.

    Without sharing every value is the same.
    """
    s = setup()
    model, count = s.model.eval(), []
    real = model.hf.model.visual.forward
    monkeypatch.setattr(model.hf.model.visual, "forward", lambda *a, **k: count.append(1) or real(*a, **k))
    shared = measure(model, s.fmt, s.records, batch_size=3, max_new_tokens=3)
    assert len(count) == 5
    count.clear()
    monkeypatch.setattr(reliance, "images_seen_once", lambda model: nullcontext({}))
    assert measure(model, s.fmt, s.records, batch_size=3, max_new_tokens=3) == shared and len(count) == 12
