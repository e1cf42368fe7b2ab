"""Reliance on a model made by hand (by_hand.py), whose answer under every condition is written out here.

The right tables are worked out from by_hand.py's rules: of eight questions, `see` goes by the latents, `look`
by the picture, `both` needs the two, and `guess` is always wrong. Intervals come from
scipy's Wilson; attention from counting tokens.
"""

import copy
import math
import threading
from types import SimpleNamespace

import by_hand
import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from crystal.attention_bias import AttentionBias
from crystal.corrupt import Corruption
from crystal.evaluation import reliance
from crystal.runtime import data, distributed

WHOLE = Corruption("mask=1")  # corruption: every pixel becomes 0, so that a corrupted picture is black


@pytest.fixture(scope="module")
def ingredients(model_dirs):
    return by_hand.ingredients(model_dirs[True])


@pytest.fixture
def hand(ingredients, tmp_path, monkeypatch):
    """The model by hand, CrystaL's format with three latents, and the eight records."""
    s = ingredients
    records, _ = data.read(by_hand.write_records(tmp_path))
    monkeypatch.setattr(reliance, "generate", by_hand.generate)
    return SimpleNamespace(model=by_hand.model_by_hand(s.real), real=s.real, fmt=s.fmt, records=records)


def measured(hand, monkeypatch, **how):
    """reliance.measure -> (what it returns, {condition: predictions in the records' order}, the partners)."""
    kept, summarise = {}, reliance.summarise

    def spy(results, records, partner):
        kept.update(results=results, partner=partner)
        return summarise(results, records, partner)

    monkeypatch.setattr(reliance, "summarise", spy)
    found = reliance.measure(
        hand.model, hand.fmt, hand.records, WHOLE, **({"batch_size": 3, "max_new_tokens": 3} | how)
    )
    said = {}
    for r in sorted(kept["results"], key=lambda r: r["index"]):
        said.setdefault(r["condition"], []).append(r["prediction"])
    return found, said, kept["partner"]


# The answers, by hand. Records:          see       see       look       look       look       guess     both       see  # noqa: E501
SAID = {
    "as trained": ["black", "white", "dark", "light", "light", "white.", "white", "grey"],
    "latents dropped": ["nothing", "nothing", "dark", "light", "light", "pale", "nothing", "nothing"],
    # The mean code is (0 + 240 + 60 + 180 + 180 + 120 + 240 + 120) / 8 = 142.5, nearest to grey.
    "latents: mean": ["grey", "grey", "dark", "light", "light", "white.", "grey", "grey"],
    "latents: noise": ["static", "static", "dark", "light", "light", "white.", "static", "static"],
    # Who gets whose: 0 and 1 each other's (the same question), 2 of 3 or 4, these 2's, 5 and 6
    # each other's (the family).
    "latents: swapped": ["white", "black", "dark", "light", "light", "white.", "grey", None],
    "image hidden, latents kept": [
        "black", "white", "nothing", "nothing", "nothing", "white.", "nothing", "grey",
    ],
    "image hidden, latents dropped": [
        "nothing", "nothing", "nothing", "nothing", "nothing", "pale", "nothing", "nothing",
    ],
    "image corrupted, latents intact": [
        "black", "white", "black", "black", "black", "white.", "white", "grey",
    ],
    "image corrupted, latents corrupted": [
        "black", "black", "black", "black", "black", "white.", "black", "black",
    ],
}
# How many of the eight are right, and how many say another thing than as trained.
COUNTS = {
    "as trained": (7, None),
    "latents dropped": (3, 5),
    "latents: mean": (4, 3),
    "latents: noise": (3, 4),
    "latents: swapped": (3, 4),
    "image hidden, latents kept": (3, 4),
    "image hidden, latents dropped": (0, 8),
    "image corrupted, latents intact": (4, 3),
    "image corrupted, latents corrupted": (1, 6),
}


def newcombe(a, b):
    """Newcombe's interval of a paired difference by scipy's Wilson and its correlation, corrected by hand."""
    n = len(a)
    ends = [binomtest(sum(x), n).proportion_ci(0.95, method="wilson") for x in (a, b)]
    pa, pb = sum(a) / n, sum(b) / n
    phi = 0.0
    if 0 < pa < 1 and 0 < pb < 1:
        covariance = np.mean(np.multiply(a, b)) - pa * pb
        corrected = max(covariance - 1 / (2 * n), 0) if covariance > 0 else covariance
        phi = corrected / math.sqrt(pa * (1 - pa) * pb * (1 - pb))
    join = lambda x, y: math.sqrt(x * x + y * y - 2 * phi * x * y)
    low = pa - pb - join(pa - ends[0].low, ends[1].high - pb)
    return low, pa - pb + join(ends[0].high - pa, pb - ends[1].low)


def test_every_condition_has_its_right_table(hand, monkeypatch):
    found, said, partner = measured(hand, monkeypatch)
    assert said.keys() == SAID.keys()
    for name, expected in SAID.items():
        assert said[name][:7] == expected[:7] and expected[7] in (said[name][7], None), name
    # The last has no other of its question or family: its partner is any with another answer, and it
    # says that one's level.
    assert said["latents: swapped"][7] == by_hand.PICTURES[partner[7]] != "grey"

    right = {
        name: [
            a.removesuffix(".").lower() == q[2].removesuffix(".").lower()
            for a, q in zip(answers, by_hand.QUESTIONS)
        ]
        for name, answers in said.items()
    }
    lines = {c["condition"]: c for c in found["conditions"]}
    assert list(lines) == list(SAID)
    for name, line in lines.items():
        count, changed = COUNTS[name]
        wilson = binomtest(count, 8).proportion_ci(0.95, method="wilson")
        assert sum(right[name]) == count and line["right"] == count / 8, name
        assert (line["low"], line["high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-4)
        if changed is None:
            assert not {"difference", "difference_low", "difference_high", "changed"} & line.keys()
            continue
        low, high = newcombe(right[name], right["as trained"])
        assert line["difference"] == (count - 7) / 8 and line["changed"] == changed / 8, name
        assert (line["difference_low"], line["difference_high"]) == pytest.approx((low, high), abs=1e-4), name

    # With the other's latents five answers are the other's (0, 1, 5, 6, 7); as trained the guess at 5 alone,
    # for 6 is white.
    assert found["followed"] == {"latents: swapped": 5 / 8, "as trained": 1 / 8}
    # Four of eight are lost and none won: a fair coin does as much twice in 2^4.
    assert found["used"] is None and found["verdict"].startswith("These 8 questions cannot tell")
    assert "(+50.0 points, " in found["verdict"] and "p = 0.12)" in found["verdict"]
    assert (found["questions"], found["latents"], found["corruption"], found["seed"]) == (8, 3, "mask=1", 0)
    assert found["rule"].startswith("used if as trained more answers are right than swapped: exact sign test")


def test_partners_by_hand(hand):
    for seed in range(8):
        found = reliance.donors(hand.records, seed)
        assert (
            found[:2] == [1, 0]
            and found[2] in (3, 4)
            and found[3:7] == [2, 2, 6, 5]
            and found[7] in (0, 1, 2, 3, 4, 6)
        )
    assert {reliance.donors(hand.records, seed)[2] for seed in range(12)} == {3, 4}
    assert len({reliance.donors(hand.records, seed)[7] for seed in range(30)}) > 3


def test_a_batch_of_any_size_and_another_seed(hand, monkeypatch):
    """Latents come from the partner of each question, also where it stands in another batch."""
    first, said, _ = measured(hand, monkeypatch, batch_size=8)
    for size in (1, 5):
        again = measured(hand, monkeypatch, batch_size=size)
        for mine, one in zip(again[0].pop("attention").values(), first["attention"].values()):
            assert mine == pytest.approx(one, abs=1e-12)
        assert again[1] == said and again[0] == {n: x for n, x in first.items() if n != "attention"}
    other, heard, partner = measured(hand, monkeypatch, seed=3)
    assert other["seed"] == 3 and partner == reliance.donors(hand.records, 3)
    assert heard["latents: swapped"][7] == by_hand.PICTURES[partner[7]]


# --- what is put in ---


def states_put_in(hand, monkeypatch, batch_size, seed):
    """What stands at the latents for noise, for each record: {index: [layers,K,D]}, and for each condition
    how often something was put in.
    """
    kept, replaced = [], reliance.replaced

    def spy(model, where, states):
        kept.append(torch.stack(list(states)))  # [layers,B,K,D]
        return replaced(model, where, states)

    with monkeypatch.context() as patch:
        patch.setattr(reliance, "replaced", spy)
        reliance.measure(
            hand.model, hand.fmt, hand.records, WHOLE, batch_size=batch_size, max_new_tokens=3, seed=seed
        )
    order = ["mean", "noise", "swapped", "intact"]
    assert len(kept) % 4 == 0
    return {name: torch.cat(kept[i::4], 1) for i, name in enumerate(order)}


def test_mean_and_noise_by_number(hand, monkeypatch):
    """Their moments are those of the eight codes; every question, layer, latent and number has
    noise of its own.
    """
    codes = np.array([by_hand.LEVELS[level] for level in by_hand.PICTURES])
    assert codes.mean() == 142.5
    put_in = states_put_in(hand, monkeypatch, 3, 0)
    base = torch.tensor(
        [[by_hand.STEP * n + by_hand.APART * k for k in range(3)] for n in range(2)], dtype=torch.float64
    )  # [layers,K]

    assert torch.allclose(
        put_in["mean"], (142.5 + base)[:, None, :, None].expand(2, 8, 3, by_hand.WIDTH), atol=1e-2
    )
    own = (torch.tensor(codes)[None, :, None] + base[:, None])[..., None].expand(2, 8, 3, by_hand.WIDTH)
    assert torch.allclose(put_in["intact"], own.double(), atol=1e-2)
    assert torch.allclose(put_in["swapped"], own[:, reliance.donors(hand.records)].double(), atol=1e-2)

    standard = (put_in["noise"] - put_in["mean"]) / codes.std()  # the spread over questions, not of a sample
    assert abs(float(standard.mean())) < 0.06 and float(standard.std()) == pytest.approx(1, abs=0.04)
    # Gaussian.
    assert abs(float(standard.pow(3).mean())) < 0.2 and float(standard.pow(4).mean()) == pytest.approx(
        3, abs=0.4
    )
    for axis in range(3):  # a layer's, a question's or a latent's is no other's
        rows = standard.transpose(0, axis).flatten(1)
        correlation = torch.corrcoef(rows) - torch.eye(len(rows))
        assert correlation.abs().max() < 0.2, ("layer", "question", "latent")[axis]


def test_noise_is_of_seed_and_question_alone(hand, monkeypatch):
    one = states_put_in(hand, monkeypatch, 3, 0)["noise"]
    assert torch.allclose(one, states_put_in(hand, monkeypatch, 8, 0)["noise"], atol=1e-6)
    other = states_put_in(hand, monkeypatch, 3, 1)["noise"]
    assert float((one - other).abs().mean()) > 20


def test_a_mask_that_all_is_asked_under(hand, monkeypatch):
    """`biases` joins every condition's own mask. Here it hides the picture from every row but the
    latents', as --bottleneck does.
    """

    def bottleneck(batch):
        latents = torch.isin(batch["input_ids"], torch.tensor(hand.fmt.latents))
        picture = batch["input_ids"] == hand.fmt.image
        return [AttentionBias(~latents & ~picture, picture)]

    _, said, _ = measured(hand, monkeypatch, biases=bottleneck)
    assert said["as trained"] == said["image hidden, latents kept"] == SAID["image hidden, latents kept"]
    assert (
        said["latents dropped"]
        == said["image hidden, latents dropped"]
        == SAID["image hidden, latents dropped"]
    )
    assert said["latents: swapped"][:6] == ["white", "black", "nothing", "nothing", "nothing", "white."]


def test_the_partners_are_asked_under_the_mask_too(hand, monkeypatch):
    """A mask that blinds the latents themselves: what a partner's latents then hold is nothing
    that anybody could read.
    """

    def blind(batch):
        picture = batch["input_ids"] == hand.fmt.image
        return [AttentionBias(~picture, picture)]

    _, said, _ = measured(hand, monkeypatch, biases=blind)
    for name in ("as trained", "latents: swapped", "image corrupted, latents intact"):
        assert said[name] == [
            "static", "static", "nothing", "nothing", "nothing", "white.", "nothing", "static",
        ], name


# --- attention ---


def expected_mass(hand):
    """Counted: of row t the first layer gives each of t + 1 tokens as much; the second layer's first head 2
    to a latent, 3 to the image's.
    """
    totals = {"latents": [0.0, 0.0], "image": [0.0, 0.0]}
    examples = reliance.questions(hand.model, hand.fmt, hand.records)
    for i, record in enumerate(hand.records):
        ids = examples.build(i, 0)["layout"][0]
        K, N = 3, ids.count(hand.fmt.image)
        # Each predicts a token of the answer.
        rows = range(len(ids) - 1, len(ids) - 1 + len(hand.fmt.text(record.answer)))
        plain = sum(1 / (t + 1) for t in rows) / len(rows)
        heavy = sum(1 / (t + 1 + K + 2 * N) for t in rows) / len(rows)
        for name, count, weight in (("latents", K, 2), ("image", N, 3)):
            totals[name][0] += count * plain / 8
            totals[name][1] += count * (plain + weight * heavy) / 2 / 8
    return totals


def test_attention_by_counting(hand, monkeypatch):
    for size in (1, 3, 8):
        mass = reliance.attention_mass(hand.model, hand.fmt, hand.records, size)
        for name, expected in expected_mass(hand).items():
            assert mass[name] == pytest.approx(expected, abs=1e-6)
    found, _, _ = measured(hand, monkeypatch)
    for name, expected in expected_mass(hand).items():
        assert found["attention"][name] == pytest.approx(expected, abs=1e-6)


# --- ranks ---


class Rank:
    """One of two processes that are threads here: sums and lists of all ranks, in rank order."""

    world, device = 2, torch.device("cpu")

    def __init__(self, rank, board, meet):
        self.rank, self.board, self.meet, self.is_first = rank, board, meet, rank == 0

    def exchange(self, value):
        self.meet.wait(60)
        self.board[self.rank] = value
        self.meet.wait(60)
        return list(self.board)

    def sum(self, value):
        first, second = self.exchange(value)
        return first + second

    def gather(self, items):
        first, second = self.exchange(list(items))
        return first + second


def test_two_ranks_share_the_questions(hand, monkeypatch):
    """Each asks every second question, and both know what one process would."""
    asked = {0: [], 1: []}
    alone = reliance.measure(hand.model, hand.fmt, hand.records, WHOLE, batch_size=3, max_new_tokens=3)
    ranks = threading.local()

    def counted(model, prompts, *rest, **how):
        asked[ranks.number] += [model.tokenizer.decode(ids).count("see") for ids, _, _ in prompts]
        return by_hand.generate(model, prompts, *rest, **how)

    monkeypatch.setattr(reliance, "generate", counted)
    board, meet, found = [None, None], threading.Barrier(2), [None, None]

    def work(rank):
        ranks.number = rank
        model = by_hand.model_by_hand(hand.real)  # layers of its own: hooks of one rank are not the other's
        fmt = copy.deepcopy(hand.fmt)  # and a tokenizer, which keeps state while it encodes
        model.tokenizer = fmt.tokenizer
        found[rank] = reliance.measure(
            model, fmt, hand.records, WHOLE, batch_size=3, max_new_tokens=3, procs=Rank(rank, board, meet)
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for mine in found:
        assert {n: x for n, x in mine.items() if n != "attention"} == {
            n: x for n, x in alone.items() if n != "attention"
        }
        for name in ("latents", "image"):
            assert mine["attention"][name] == pytest.approx(alone["attention"][name], abs=1e-9)
    # Four questions each, under nine conditions, and two passes more that record states: the
    # partner's and its own.
    assert len(asked[0]) == len(asked[1]) == 4 * 11


def test_too_few_questions_for_the_ranks(hand):
    two = SimpleNamespace(rank=0, world=2, is_first=True, device=torch.device("cpu"))
    for records, procs in ((hand.records[:1], distributed.Processes()), (hand.records[:1], two)):
        with pytest.raises(reliance.UserError, match=f"1 questions for {procs.world} process"):
            reliance.measure(hand.model, hand.fmt, records, WHOLE, procs=procs)
    with pytest.raises(reliance.UserError, match="2 questions for 3 process"):
        reliance.measure(
            hand.model,
            hand.fmt,
            hand.records[:2],
            WHOLE,
            procs=SimpleNamespace(rank=0, world=3, is_first=True, device=torch.device("cpu")),
        )


# --- what a reader sees ---

RESULT = {
    "questions": 40,
    "latents": 3,
    "corruption": "blur=2:5",
    "rule": "the rule",
    "verdict": "the verdict",
    "conditions": [
        {"condition": "as trained", "right": 0.75, "low": 0.6, "high": 0.86},
        {
            "condition": "latents: swapped",
            "right": 0.5,
            "low": 0.35,
            "high": 0.65,
            "difference": -0.25,
            "difference_low": -0.4,
            "difference_high": -0.075,
            "changed": 0.325,
        },
    ],
    "followed": {"latents: swapped": 0.275, "as trained": 0.05},
    "attention": {"latents": [0.011, 0.2], "image": [0.5, 0.125]},
}


def test_the_text_by_hand():
    """A half width where the interval lies around the share, else its ends; signs and columns as printed."""
    assert reliance.text(RESULT).splitlines() == [
        "40 questions; percent right; differences to the first line are paired, with 95 % intervals; "
        "corruption blur=2:5",
        f"{'condition':36}{'right':>20}{'difference':>12}{'95 % interval':>18}{'answers changed':>17}",
        "as trained                           75.0 (60.0 to 86.0)",
        f"{'latents: swapped':36}{'50.0 ±15.0':>20}{'-25.0':>12}{'-40.0 to -7.5':>18}{'32.5':>17}",
        "answers that are the other image's: 27.5 % with its latents, 5.0 % as trained",
        "attention of the answer positions by layer, percent",
        "  to 3 latents         1.1  20.0",
        "  to the image        50.0  12.5",
        "rule: the rule",
        "verdict: the verdict",
    ]


def test_the_picture_by_hand(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(reliance.figures, "save", lambda fig, path: kept.update(fig=fig, path=path))
    reliance.picture(RESULT | {"used": True}, tmp_path / "a.png")
    (axes,) = kept["fig"].axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {
        "3 latents": ([0, 1], pytest.approx([1.1, 20.0])),
        "image": ([0, 1], pytest.approx([50.0, 12.5])),
    }
    assert axes.get_title() == "used" and kept["path"] == tmp_path / "a.png"
    reliance.picture(RESULT | {"used": False}, tmp_path / "b.png")
    assert kept["fig"].axes[0].get_title() == "no use shown"
    reliance.picture(RESULT | {"used": None}, tmp_path / "c.png")
    assert kept["fig"].axes[0].get_title() == "too few questions to tell"
