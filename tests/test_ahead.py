"""What a step wants to know of its batch is computed before the batch leaves the host: counted, and equal.

The counts are those of bench_measures.host_waits, which finds on a CPU what would wait for a GPU.
"""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from crystal import train
from crystal.bench_measures import host_waits
from crystal.runtime import data
from crystal.runtime.ahead import Ahead, known, sent
from crystal.runtime.config import Progress

CPU = torch.device("cpu")


class Calls:
    """A function of a batch's tensor that says how often it ran."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, *by):
        self.seen.append(x)
        return x + 1, len(x), by


def batch_of(*values):
    return {"x": torch.tensor(values), "pixel_values": torch.zeros(2)}


def arrived(ahead, batch):
    """A batch as train.py gets it."""
    return data.to_device(ahead(batch), CPU, torch.float32)


# --- what is known ---


def test_without_ahead_it_is_computed_where_it_is_asked():
    f = Calls()
    batch = batch_of(1, 2)
    for _ in range(2):
        found, n, by = known(batch, f, "x", by=(7,))
        assert found.tolist() == [2, 3] and n == 2 and by == (7,)
    assert len(f.seen) == 2


def test_what_one_batch_was_asked_the_next_ones_bring():
    ahead, f = Ahead(), Calls()
    first = arrived(ahead, batch_of(1, 2))
    assert not f.seen
    assert known(first, f, "x")[0].tolist() == known(first, f, "x")[0].tolist() == [2, 3]
    assert len(f.seen) == 1

    second = arrived(ahead, batch_of(5, 6, 7))
    assert len(f.seen) == 2 and f.seen[1].tolist() == [5, 6, 7]
    assert known(second, f, "x")[0].tolist() == [6, 7, 8] and len(f.seen) == 2

    # Nobody asked of the third: the fourth brings nothing.
    arrived(ahead, batch_of(8))
    arrived(ahead, batch_of(9))
    assert len(f.seen) == 3


def test_other_tensors_are_not_what_it_was_computed_from():
    """A method that looks at other tokens than the batch came with gets what is true of these."""
    ahead, f = Ahead(), Calls()
    known(arrived(ahead, batch_of(1)), f, "x")
    batch = arrived(ahead, batch_of(2))
    changed = batch | {"x": torch.tensor([10])}
    assert known(changed, f, "x")[0].tolist() == [11] and known(batch, f, "x")[0].tolist() == [3]

    # Of the whole batch too, but for its pixels, which f does not get.
    whole = Whole()
    known(batch, whole)
    batch = arrived(ahead, batch_of(3))
    assert known(batch | {"pixel_values": torch.ones(2)}, whole) == known(batch, whole) == [3]
    assert whole.names == [["x"]] * 2
    assert known(batch | {"x": torch.tensor([4])}, whole) == [4] and len(whole.names) == 3


class Whole:
    def __init__(self):
        self.names = []

    def __call__(self, batch):
        self.names.append(sorted(batch))
        return batch["x"].tolist()


def test_what_is_wrong_is_told_where_it_is_asked():
    def f(x):
        if len(x) > 1:
            raise ValueError("too many")
        return x

    ahead = Ahead()
    known(arrived(ahead, batch_of(1)), f, "x")
    batch = arrived(ahead, batch_of(1, 2))
    with pytest.raises(ValueError, match="too many"):
        known(batch, f, "x")


def test_a_batch_that_tells_an_error_stays_what_it_is():
    ahead = Ahead()
    assert ahead({"error": "broken", "bad": []}) == {"error": "broken", "bad": []}


class Pair(NamedTuple):
    tensor: torch.Tensor
    number: int


@dataclass
class Held:
    inside: list


def test_tensors_are_found_in_what_holds_them():
    x = torch.zeros(2)
    found = sent({"a": [Pair(x, 3), None], "b": (Held([x]), "text")}, torch.device("meta"))
    pair, nothing = found["a"]
    assert type(pair) is Pair and pair.tensor.is_meta and pair.number == 3 and nothing is None
    held, text = found["b"]
    assert type(held) is Held and held.inside[0].is_meta and text == "text"


def test_what_is_known_keeps_no_graph():
    x = torch.ones(2, requires_grad=True)
    assert not known({"x": x}, lambda y: y * 2, "x").requires_grad


# --- in a step ---

METHODS = {
    "sft": (),
    "kv": ("--method", "crystal", "--latent_copy", "kv", "--attn_columns", "all"),
    "hidden": ("--method", "crystal", "--latent_copy", "hidden", "--attn_loss", "frobenius"),
    "packed": ("--method", "crystal", "--latent_copy", "packed", "--attn_loss", "mse"),
    "released": ("--method", "released",),
    "livr": ("--method", "livr", "--mask", "answer"),
    "livr, latents see the image": ("--method", "livr", "--latents_see", "image"),
    "lavit": ("--method", "lavit", "--tune", "lora", "--w_gaze", "0"),
    "valr": ("--method", "valr", "--tune", "lora", "--encoders", "tiny,own", "--latents", "2"),
    "valr, parallel": ("--method", "valr", "--tune", "lora", "--encoders", "none", "--updates", "2"),
}  # fmt: skip
# transformers checks that the tokens of the images are as many as their features, and writes their number
# into a message that nobody reads.
THEIRS = 2


def step_of(s, stage=0):
    """An update of s's batch as train.py makes it, but for the optimiser -> (a batch arrives, the rest)."""
    ahead, pad = Ahead(), s.model.tokenizer.pad_token_id
    progress = Progress(0, stage, 0.0, 0.1)
    if s.method.corruption is not None:
        s.examples.corruption = s.method.corruption
    held = {}

    def arrive():
        batch = data.collate([s.examples[0, i] for i in range(len(s.records))], pad)
        held["batch"] = data.to_device(ahead(batch), CPU, s.model.hf.dtype)

    def step():
        terms = s.objective(held["batch"], progress)
        loss = train.weighted(terms, s.method, s.settings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in s.named], 1.0)
        return loss.detach()

    return arrive, step


def made(setup, name, **more):
    """A method's ingredients; the pictures of the second of two records are of other sizes."""
    flags = METHODS[name]
    if "lavit" in flags:
        flags += ("--w_semantics", "0")
    return setup(*flags, which=[0, 2], dtype=torch.float32, **more)


@pytest.mark.parametrize("name", METHODS)
def test_nobody_waits_from_a_batch_that_has_come_to_the_update(setup, name, monkeypatch):
    """crystal's own code never does; transformers', whose forward is untouched, does twice."""
    monkeypatch.setenv("CRYSTAL_OPS", "auto")
    stage = 1 if "valr" in name else 0
    s = made(setup, name)
    arrive, step = step_of(s, stage)
    arrive()
    asked = host_waits(step)
    arrive()
    found = host_waits(step)
    assert asked["waits"] > 10
    assert found["waits_of_others"] == THEIRS, found["waits_at"]
    assert found["waits"] == found["waits_of_others"], found["waits_at"]


# Qwen3-VL's DeepStack adds features to two layers by a mask: read once and written once, and three times in
# the backward pass, where no line of anybody runs. LLaVA-OneVision sends the lengths of its images to the
# device, and its decoder looks whether positions are packed.
MORE = [("qwen3_vl", 2 * 2, 2 * 3), ("llava_onevision", 2, 0)]


@pytest.mark.parametrize(("family", "more", "behind"), MORE)
def test_nobody_but_transformers_waits_in_other_families(setup, family, more, behind):
    s = made(setup, "kv", family=family)
    arrive, step = step_of(s)
    arrive()
    step()
    arrive()
    found = host_waits(step)
    places = dict(map(tuple, found["waits_at"]))
    assert places.pop("?", 0) == behind
    assert sum(places.values()) == found["waits_of_others"] == THEIRS + more, places


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_the_same_to_the_bit(setup, name):
    stage = 1 if "valr" in name else 0
    s = made(setup, name)
    arrive, step = step_of(s, stage)
    found = []
    for _ in range(2):
        arrive()
        torch.manual_seed(0)  # of dropout
        loss = step()
        found.append((loss, {n: p.grad.clone() for n, p in s.named if p.grad is not None}))
        s.objective.zero_grad()
    (first, g), (second, h) = found
    assert torch.equal(first, second) and g.keys() == h.keys()
    assert all(torch.equal(g[n], h[n]) for n in g)


@pytest.mark.parametrize("family", [None, "qwen3_vl", "llava_onevision"])
def test_a_tower_that_is_told_sees_the_same(setup, family):
    """Against transformers' own way, which works its windows and positions out of the grids by itself."""
    s = setup(dtype=torch.float32, family=family)
    images = s.model.image_processor
    assert images.tower(s.batch["image_grid_thw"]) is not None
    told = s.model.hidden(s.batch)
    by_itself = s.model.hidden(s.batch | {"tower": None})
    assert torch.equal(told, by_itself)
