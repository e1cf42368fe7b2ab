"""What each way of asking feeds and answers, on a model made by hand (by_hand.py), by value."""

from types import SimpleNamespace

import by_hand
import pytest
import torch
from hand import (  # noqa: F401  (fixtures)
    AS_TRAINED,
    BLACK,
    BOTTLENECK,
    CORRUPTED,
    DROPPED,
    GREY,
    RIGHT,
    Masked,
    counted_mass,
    hand,
    ingredients,
    said,
)

from crystal import methods
from crystal.attention_bias import AttentionBias
from crystal.corrupt import Corruption
from crystal.evaluation import asking

# --- one way of asking after the other ---


@pytest.mark.parametrize(
    "how, expected",
    [
        ({}, AS_TRAINED),
        ({"latents": "drop"}, DROPPED),
        ({"latents": "mask"}, DROPPED),
        ({"grey": True}, GREY),
        ({"corruption": BLACK}, CORRUPTED),
        ({"corruption": Corruption("mask=0")}, AS_TRAINED),
        (
            {"latents": "drop", "grey": True},
            ["nothing", "nothing", "grey", "grey", "grey", "pale", "nothing", "nothing"],
        ),
    ],
    ids=["keep", "drop", "mask", "grey", "corrupted", "corrupted by nothing", "drop and grey"],
)
def test_what_each_way_of_asking_is_answered(hand, how, expected):
    results = asking.answers(hand.model, hand.fmt, hand.records, batch_size=3, max_new_tokens=5, **how)
    assert said(results) == expected
    assert [r["index"] for r in results] == list(range(8)) and [r["id"] for r in results] == [
        f"q{i}" for i in range(8)
    ]
    latents = how.get("latents", "keep")
    assert hand.fed == [(3, 5, "keep" if latents == "mask" else latents)] * 2 + [
        (2, 5, "keep" if latents == "mask" else latents)
    ]


def test_a_result_in_full(hand):
    """Case and a final full stop do not count; a family's absence is "all"; the question is the
    last turn's last part.
    """
    hand.records[6].family = ""
    hand.records[7].turns = [("user", ["", "not this see", "see five"])]
    hand.records[7].images *= 2
    results = asking.answers(hand.model, hand.fmt, hand.records)
    assert results[6] == {
        "index": 6,
        "id": "q6",
        "family": "all",
        "question": "<image>\nboth four",
        "answer": "White.",
        "prediction": "white",
        "extracted": "white",
        "correct": True,
    }
    assert results[5] == {
        "index": 5,
        "id": "q5",
        "family": "b",
        "question": "<image>\nguess three",
        "answer": "grey",
        "prediction": "white.",
        "extracted": "white",
        "correct": False,
    }
    assert results[7]["question"] == "see five" and [r["correct"] for r in results] == RIGHT


def test_masks_add_up(hand):
    """--bottleneck alone closes the picture to the answer; with the latents masked too nothing is left."""
    mask = lambda batch: Masked(None).biases(hand.model, batch)
    assert said(asking.answers(hand.model, hand.fmt, hand.records, biases=mask)) == BOTTLENECK
    both = said(asking.answers(hand.model, hand.fmt, hand.records, latents="mask", biases=mask))
    assert both == ["nothing"] * 5 + ["pale"] + ["nothing"] * 2


def test_the_mask_that_hides_latents(hand):
    """Every token but a latent is blind to the latents, the latents are not, and nothing else is hidden."""
    ids = torch.tensor([[1, hand.fmt.latents[0], 2, hand.fmt.latents[2]]])
    (bias,) = asking.hide_latents(hand.fmt)({"input_ids": ids})
    assert (
        bias.queries.tolist() == [[True, False, True, False]]
        and bias.keys.tolist() == [[False, True, False, True]]
        and bias.value == float("-inf")
    )
    own = AttentionBias(bias.keys, bias.keys)
    assert asking.hide_latents(hand.fmt, lambda batch: [own])({"input_ids": ids})[0] is own


def test_corruption_depends_on_the_seed(hand):
    fed = []
    for seed in (0, 0, 1):
        hand.fed.clear()
        examples = []
        original = by_hand.generate

        def keep(model, prompts, fmt, n, biases=None, latents="keep"):
            examples.extend(pixels for _, pixels, _ in prompts)
            return original(model, prompts, fmt, n, biases)

        asking.generate = keep
        asking.answers(hand.model, hand.fmt, hand.records[:2], corruption=Corruption("noise=50"), seed=seed)
        fed.append(torch.cat(examples))
    assert torch.equal(fed[0], fed[1]) and not torch.equal(fed[0], fed[2])
    deviation = (fed[0] - fed[2]).std()
    assert 0.2 < float(deviation) < 1.2  # two noises of 50 of 255 apart, in units of the processor's


@pytest.mark.parametrize(
    "rank, done, mine",
    [(0, [], [0, 2, 4, 6]), (1, [], [1, 3, 5, 7]), (0, [0, 3], [1, 4, 6]), (1, [0, 3], [2, 5, 7])],
)
def test_the_shares_of_ranks(hand, rank, done, mine):
    """What is left to ask is dealt out one by one; what an earlier run answered is not asked again and
    stands in its place.
    """
    told = []
    procs = SimpleNamespace(
        rank=rank,
        world=2,
        is_first=rank == 0,
        device=torch.device("cpu"),
        gather=lambda items: [*items, {"index": 99}],
    )
    before = {i: {"index": i, "prediction": "earlier"} for i in done}
    results = asking.answers(
        hand.model, hand.fmt, hand.records, batch_size=3, procs=procs, done=before, tell=told.append
    )
    assert [r["index"] for r in told] == mine
    assert [r["index"] for r in results] == sorted([*mine, *done]) + [99]
    assert [r["prediction"] for r in results if r["index"] in done] == ["earlier"] * len(done)
    assert [r["prediction"] for r in told] == [AS_TRAINED[i] for i in mine]


def test_free_asks_the_bare_question_with_room_for_the_thought(hand, monkeypatch):
    asked = []

    def write(model, prompts, fmt, n, biases):
        asked.append(
            (
                n,
                biases,
                [any(token in ids for token in (fmt.think_start_id, *fmt.latents)) for ids, _, _ in prompts],
            )
        )
        return [
            fmt.thinking()[0] + [fmt.answer_start_id] + fmt.text("black") + [fmt.answer_end_id, fmt.end]
            for _ in prompts
        ]

    monkeypatch.setattr(asking, "write", write)
    results = asking.answers(hand.model, hand.fmt, hand.records[:2], latents="free", max_new_tokens=7)
    thought = len(hand.fmt.thinking()[0])  # <think>, words, three latents, a full stop, </think>
    assert asked == [(7 + thought + 2, None, [False, False])]  # and <answer> and one to spare
    assert said(results) == ["black", "black"] and [r["latents"] for r in results] == [3, 3]


# --- diagnosis ---


@pytest.mark.parametrize("size", [3, 8])
def test_attention_on_latents_by_counting(hand, size):
    method = methods.get("crystal")(hand.settings)
    hand.model.hidden = None
    method.hidden = lambda model, batch, recorder: by_hand.weigh(batch, recorder)
    assert asking.attention_on_latents(hand.model, hand.fmt, method, hand.records, size) == pytest.approx(
        counted_mass(hand), abs=1e-6
    )


def test_attention_on_latents_of_two_ranks(hand):
    method = methods.get("crystal")(hand.settings)
    method.hidden = lambda model, batch, recorder: by_hand.weigh(batch, recorder)
    parts = []
    for rank in (0, 1):
        procs = SimpleNamespace(
            rank=rank, world=2, device=torch.device("cpu"), sum=lambda x: parts.append(x) or x
        )
        asking.attention_on_latents(hand.model, hand.fmt, method, hand.records, 3, procs)
    assert sum(parts) / 8 == pytest.approx(counted_mass(hand), abs=1e-6) and parts[0] != parts[1]

    # What all ranks have together is divided by the number of records, whoever asked them.
    procs = SimpleNamespace(rank=1, world=2, device=torch.device("cpu"), sum=lambda x: 4.0)
    assert asking.attention_on_latents(hand.model, hand.fmt, method, hand.records, 3, procs) == 0.5


def test_diagnosis_has_four_columns(hand):
    crystal = methods.get("crystal")(hand.settings)
    masked = Masked(hand.settings)
    for method in (crystal, masked):
        method.layout = crystal.layout
        method.hidden = lambda model, batch, recorder: by_hand.weigh(batch, recorder)
    found, mass = asking.diagnose(hand.model, hand.fmt, masked, hand.records, batch_size=3)
    assert {name: said(results) for name, results in found.items()} == {
        "as trained": AS_TRAINED,
        "latents dropped": DROPPED,
        "bottleneck": BOTTLENECK,
        "bottleneck, dropped": ["nothing"] * 5 + ["pale"] + ["nothing"] * 2,
    }
    assert mass == pytest.approx(counted_mass(hand), abs=1e-6)
    # It has no mask.
    assert list(asking.diagnose(hand.model, hand.fmt, crystal, hand.records)[0]) == [
        "as trained", "latents dropped",
    ]


def test_diagnosis_of_a_model_without_latents(hand, model_dirs):
    s = by_hand.ingredients(model_dirs[True], "--method", "sft")
    s.fmt.latents = []
    found, mass = asking.diagnose(hand.model, s.fmt, s.method, hand.records)
    assert list(found) == ["as trained"] and mass is None and said(found["as trained"]) == DROPPED
    masked = Masked(s.settings)
    masked.latents = []
    assert list(asking.diagnose(hand.model, s.fmt, masked, hand.records)[0]) == ["as trained", "bottleneck"]
