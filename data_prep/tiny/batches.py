"""Scenes become training batches for the tiny model: many questions about one image, each as if
it were asked alone.

A row of the batch is the chat's opening with the image, P tokens, followed by S slots of T tokens. A slot
holds one question with its answer and sees the opening and itself, nothing else; its positions continue the
opening's. So every question is the first one after its image, as in the test, and the opening's work is
shared by S of them.

B images, P opening tokens, S slots, T tokens a slot, N = 16 image tokens.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from crystal.runtime import toy
from data_prep.tiny import files as tiny_files

N = toy.CELLS**2
SLOTS, SLOT = 8, 21
# Stage two: fewer and longer slots, with room for words between the prompt and the answer.
WORDY_SLOTS, WORDS = 4, 26
WORDY_SLOT = SLOT + WORDS
IGNORE = -100
NORMALISE = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

# Questions that no test asks. They teach the steps that the others are made of: find a thing, read its
# place and its size.
LESSONS = ("place", "size")
KINDS = toy.FAMILIES + LESSONS
# Share of each kind of question at the start and at the end of training.
START = {
    "place": 0.1,
    "size": 0.1,
    "attribute": 0.2,
    "count": 0.15,
    "relation": 0.15,
    "depth": 0.15,
    "nearer": 0.15,
}
END = {
    "place": 0.02,
    "size": 0.03,
    "attribute": 0.1,
    "count": 0.2,
    "relation": 0.2,
    "depth": 0.2,
    "nearer": 0.25,
}


def lesson(scene, kind, rng):
    """(question, answer) of one of the LESSONS."""
    thing = toy.pick(rng, scene.named)
    if kind == "place":
        return f"Where is the {thing.shape}?", thing.place
    return f"How large is the {thing.shape}?", thing.size


class Layout:
    """The fixed part of a batch: the opening's tokens, every token's position, and the mask of a slot."""

    def __init__(self, tokenizer, slots=SLOTS, length=SLOT):
        self.slots, self.length = slots, length
        marker = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        opening = tokenizer(
            f"<|im_start|>system\n{tiny_files.SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * N
            + "<|vision_end|>"
        ).input_ids
        self.tokenizer, self.opening, self.P = tokenizer, opening, len(opening)
        self.image = slice(opening.index(marker), opening.index(marker) + N)
        self.singulars = {shape: tokenizer(" " + shape).input_ids[0] for shape in toy.SHAPES}
        self.plurals = {shape: tokenizer(" " + toy.plural(shape)).input_ids[0] for shape in toy.SHAPES}
        self.start = tokenizer(" Because the feature of the image is").input_ids
        self.cache = {}

        # M-RoPE: text counts on in all three axes, the image's tokens share a time and have a
        # row and a column.
        before = self.image.start
        grid = (
            before
            + torch.stack([torch.zeros(N), torch.arange(N) // toy.CELLS, torch.arange(N) % toy.CELLS]).long()
        )
        after = before + toy.CELLS + torch.arange(self.P - self.image.stop)
        slot = int(after[-1]) + 1 + torch.arange(length)
        text = lambda positions: positions.expand(3, -1)
        self.positions = torch.cat([text(torch.arange(before)), grid, text(after), *[text(slot)] * slots], 1)[
            :, None
        ]  # [3, 1, L]
        blocked = torch.ones(length, length).triu(1) * -1e9
        self.mask = torch.cat([torch.zeros(length, self.P), blocked], 1)[
            None, None
        ]  # [1, 1, T, P + T], additive

    def encode(self, question, answer, words=((), ())):
        """(tokens, labels) of one slot, two lists of T; the labels are the answer and the end of the turn,
        at their own places.

        words: tokens that the assistant says before its answer, and their labels.
        """
        if question not in self.cache:
            self.cache[question] = self.tokenizer(f"{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        if answer not in self.cache:
            self.cache[answer] = self.tokenizer(f"{answer}<|im_end|>").input_ids
        asked, said = self.cache[question] + list(words[0]), self.cache[answer]
        empty = self.length - len(asked) - len(said)
        if empty < 0:
            raise ValueError(f"{question!r} with {answer!r} does not fit {self.length} tokens")
        pad = self.tokenizer.pad_token_id
        labels = [IGNORE] * (len(asked) - len(words[1])) + list(words[1])
        return asked + said + [pad] * empty, labels + said + [IGNORE] * empty

    def words(self, rng, count=None):
        """Tokens and labels of what is said before an answer: in half of the cases nothing, else 1 to WORDS
        ordinary tokens (`count` if given) drawn at random, in half of these behind the beginning of a
        sentence, the only words that are labels."""
        if count is None:
            count = int(rng.integers(1, WORDS + 1)) * int(rng.integers(2))
        start = self.start[:count] if count and rng.integers(2) else []
        drawn = rng.integers(0, self.tokenizer.vocab_size, count - len(start)).tolist()
        return start + drawn, [IGNORE] * min(1, len(start)) + start[1:] + [IGNORE] * len(drawn)


@dataclass
class Batch:
    """patches uint8 [B x 64, 588]; tokens, labels [B, S, T]; kinds [B, S] (index into KINDS); cells [B, N, 3]
    (see `cells_of`);
    marks [B, S, T, 6] (see `marks_of`)."""

    patches: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor
    cells: torch.Tensor
    marks: torch.Tensor


def patches_of(image):
    """uint8 [112, 112, 3] to [64, 588]: 14 pixel patches, channels first, the four that merge to one
    token in a row.
    """
    k = toy.CELLS
    return image.reshape(k, 2, 14, k, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5).reshape(4 * N, 588)


def cells_of(scene):
    """[N, 3]: index of the shape, of the colour and of the size of the object with its centre in each
    cell; -100 if none.
    """
    cells = np.full((N, 3), IGNORE)
    for thing in scene.things:
        cell = (thing.row - 1) * toy.CELLS + thing.column - 1
        cells[cell] = toy.SHAPES.index(thing.shape), list(toy.COLOURS).index(thing.colour), thing.level
    return cells


def marks_of(layout, scene, kind, tokens, labels):
    """[T, 6]: what is known about the word at each token of a question; IGNORE where nothing is.

    Of a named object its colour, size, row and column; of the plural in a count question the number less one;
    of the two objects that could be the nearer one the distance to the third, 0 to 3 cells beyond the first.
    """
    named = {layout.singulars[thing.shape]: thing for thing in scene.named}
    marks, first = [[IGNORE] * 6 for _ in tokens], None
    for mark, token, label in zip(marks, tokens, labels):
        if label != IGNORE:  # the answer itself must not be read
            break
        if token in named:
            thing = named[token]
            mark[:4] = list(toy.COLOURS).index(thing.colour), thing.level, thing.row - 1, thing.column - 1
            if kind == "nearer" and first:
                mark[5] = min(
                    3, max(0, round(math.dist((thing.x, thing.y), (first.x, first.y)) / toy.CELL) - 1)
                )
            first = first or thing
        elif kind == "count" and token == layout.plurals[scene.counted]:
            mark[4] = sum(thing.shape == scene.counted for thing in scene.things) - 1
    return marks


def make_batch(layout, rngs, stream, share, words=0):
    """A Batch of one fresh scene of the stream "base" or "demo" per generator in `rngs`; share: {kind:
    probability}; words: how
    many stand before each answer, None for a random number."""
    patches, tokens, labels, kinds, cells, marks = [], [], [], [], [], []
    names, weights = list(share), np.array(list(share.values()))
    for rng in rngs:
        scene = toy.draw_for(stream, rng)
        patches.append(patches_of(toy.render(scene)))
        cells.append(cells_of(scene))
        for _ in range(layout.slots):
            question = None
            while question is None:  # a scene may have no question of some family
                kind = names[rng.choice(len(names), p=weights / weights.sum())]
                asked = toy.ask(scene, kind, rng) if kind in toy.FAMILIES else lesson(scene, kind, rng)
                question = asked and ((asked.text, asked.answer) if kind in toy.FAMILIES else asked)
            # A record may keep a line break between the image and its question, or not.
            slot = layout.encode(
                "\n" * int(rng.integers(2)) + question[0], question[1], layout.words(rng, words)
            )
            tokens.append(slot[0])
            labels.append(slot[1])
            marks.append(marks_of(layout, scene, kind, *slot))
            kinds.append(KINDS.index(kind))
    shape = (len(rngs), layout.slots, layout.length)
    return Batch(
        torch.from_numpy(np.concatenate(patches)),
        torch.tensor(tokens).view(shape),
        torch.tensor(labels).view(shape),
        torch.tensor(kinds).view(shape[:2]),
        torch.from_numpy(np.stack(cells)),
        torch.tensor(marks).view(*shape, 6),
    )


class Stream(torch.utils.data.Dataset):
    """A process's share of every step's batch. Scene i of a step depends on (seed, step, i) alone, however
    many processes there are.
    """

    def __init__(self, layout, wordy, seed, steps, images, rank, world):
        self.layout, self.wordy, self.seed, self.steps, self.mine = (
            layout,
            wordy,
            seed,
            steps,
            range(rank, images, world),
        )

    def __getitem__(self, step):
        t = min(1, 1.5 * step / self.steps)
        share = {kind: (1 - t) * START[kind] + t * END[kind] for kind in KINDS}
        rngs = [toy.rng_for("base", "scenes", self.seed, step, i) for i in self.mine]
        if step < self.steps:
            return make_batch(self.layout, rngs, "base", share)
        return make_batch(self.wordy, rngs, "base", share, None)


def pixels(patches, blind=False):
    """uint8 [.., 588] to normalised float32, as the image processor does; a blind model
    gets uniform grey instead.
    """
    if blind:
        patches = torch.full_like(patches, 128)
    mean, std = (torch.tensor(NORMALISE[k]).repeat_interleave(196) for k in ("mean", "std"))
    return (patches / 255 - mean) / std


# --- attention ---


def slot_attention(module, query, key, value, attention_mask, scaling=None, **unused):
    """Attention of the layout above; query [B, H, P + S T, d], key and value [B, G, ..]; attention_mask [1,
    1, T, P + T].

    The opening is causal; a slot's keys are the opening's and its own, so nothing of size L x L is made. In
    float32, because PyTorch's bfloat16 attention is several times slower backwards on a CPU.
    """
    B, H, L, d = query.shape
    query, key, value = (t.float().repeat_interleave(H // t.shape[1], 1) for t in (query, key, value))
    T, P = attention_mask.shape[2], attention_mask.shape[3] - attention_mask.shape[2]
    S = (L - P) // T
    own = lambda t: t[:, :, P:].unflatten(2, (S, T)).transpose(1, 2)  # [B, S, H, T, d]
    both = lambda t: torch.cat([t[:, None, :, :P].expand(B, S, H, P, d), own(t)], 3).flatten(0, 1)
    with torch.autocast("cpu", enabled=False):
        head = F.scaled_dot_product_attention(
            *(t[:, :, :P] for t in (query, key, value)), is_causal=True, scale=scaling
        )
        tail = F.scaled_dot_product_attention(
            own(query).flatten(0, 1), both(key), both(value), attn_mask=attention_mask, scale=scaling
        )
    tail = tail.unflatten(0, (B, S)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return torch.cat([head.transpose(1, 2), tail], 1), None


def image_attention(module, query, key, value, attention_mask, scaling=None, **unused):
    """The vision tower's, all images at once: they are equally large, 64 patches each. query, key, value [1,
    H, B x 64, d].
    """
    one = lambda t: t[0].float().unflatten(1, (-1, 4 * N)).transpose(0, 1)
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(one(query), one(key), one(value), scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)[None], None
