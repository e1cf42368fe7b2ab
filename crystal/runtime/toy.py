"""Toy scenes: small drawn objects and short questions about them, in LLaVA's format.

A scene is a picture of 112 x 112 pixels. Its 4 x 4 grid of cells of 28 pixels is the grid of image
tokens of a Qwen2.5-VL (14 pixel patches, merged 2 x 2), and at most one object has its centre in a
cell. An object is named by its shape, and it is only 5 to 19 pixels wide: a Gaussian blur of 5 pixels
leaves a coloured cloud that no longer tells a star from a ring, so every question depends on a small
detail. The families are CV-Bench's:

    count      How many stars are there?                              1 2 3 4
    relation   Is the star to the left or right of the ring?          left right above below
    depth      Is the star in front of or behind the ring?            front behind
    nearer     Which is nearer to the star, the ring or the heart?    a shape
    attribute  What colour is the star?                               a colour

All objects are equally large in the scene, so the nearer ones look larger, and they hide what is behind
them. The light falls from the top, and from the left it is warm: what a patch shows of the background tells
where the patch is.

    python data_prep/toy.py --out data/toy --seed 0 --train 8000 --val 500 --test 2500

writes data/toy/{train,val,test}.jsonl and data/toy/images/{train,val,test}/000001.png ...; the same
arguments give the same bytes. Pixels: x grows to the right, y downwards; boxes are [x0, y0, x1, y1] with
x1 and y1 exclusive.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image

from crystal.runtime.silhouettes import SHAPES, mask

SIDE, CELLS = 112, 4
CELL = SIDE // CELLS  # pixels; one image token
COLOURS = {
    "red": (215, 40, 40), "orange": (240, 140, 20), "yellow": (245, 225, 60), "green": (50, 170, 60),
    "blue": (50, 80, 220), "purple": (150, 60, 190), "white": (245, 245, 245), "black": (20, 20, 20),
}
# Width in pixels at each of four depths, the farthest first.
SIZES = {"tiny": 9, "small": 12, "large": 15, "huge": 18}
FAMILIES = ("count", "relation", "depth", "nearer", "attribute")
ANSWERS = {
    "count": ("1", "2", "3", "4"),
    "relation": ("left", "right", "above", "below"),
    "depth": ("front", "behind"),
    "nearer": SHAPES,
    "attribute": tuple(COLOURS),
}
# Hardness adds noise and shrinks the objects a little; zoom shrinks them all. The base model learns from the
# easier scenes, so that the demo's, which it has never seen the like of, leave something to learn.
HARDNESS = {"base": (0.0, 0.6), "demo": (0.8, 1.2)}
ZOOM = {"base": 1.0, "demo": 0.72}


@dataclass(frozen=True)
class Thing:
    """One drawn object. x, y: its centre [px]; level: 0 (far, tiny) to 3 (near, huge); width [px]."""

    shape: str
    colour: str
    x: int
    y: int
    level: int
    width: int

    @property
    def centre(self):
        return self.x, self.y

    @property
    def row(self):
        return self.y // CELL + 1

    @property
    def column(self):
        return self.x // CELL + 1

    @property
    def size(self):
        return tuple(SIZES)[self.level]

    @property
    def box(self):
        half = self.width // 2
        x0 = self.x - half
        y0 = self.y - half
        return [x0, y0, x0 + self.width, y0 + self.width]

    @property
    def place(self):
        return f"row {self.row}, column {self.column}"


@dataclass(frozen=True)
class Scene:
    """things: far to near, the order of drawing; counted: the one shape that may occur more than once."""

    things: tuple
    counted: str
    hardness: float
    seed: int  # of the pixels' noise

    @property
    def named(self):
        """Objects that their shape alone identifies."""
        shapes = [thing.shape for thing in self.things]
        alone = shapes.count(self.counted) == 1
        return [thing for thing in self.things if alone or thing.shape != self.counted]

    @property
    def digest(self):
        return hashlib.sha256(repr(self.things).encode()).hexdigest()


@dataclass(frozen=True)
class Question:
    """boxes: of the objects asked about; cot: two sentences that lead to the answer."""

    family: str
    text: str
    answer: str
    boxes: tuple
    cot: tuple


def rng_for(*names):
    """A numpy generator of its own for every tuple of names, so that different names share no scene."""
    name = "/".join(map(str, names))
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


# --- scenes ---


def draw_for(stream, rng, count=None):
    """A scene as hard as those of the stream "base" or "demo"."""
    hardness = rng.uniform(*HARDNESS[stream])
    return draw_scene(rng, hardness, ZOOM[stream], count)


def draw_scene(rng, hardness=0.0, zoom=1.0, count=None):
    """Places 5 to 8 objects: `count` of one shape (1 to 4, drawn if None) and four others, one of each.

    Two neighbours are pushed together in half of the scenes, so that the nearer one hides a part
    of the farther one.
    """
    count = int(rng.integers(1, 5)) if count is None else count
    kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    counted, *others = kinds
    shapes = [counted] * count + others[:4]

    # A cell for each, and a centre near the cell's own.
    order = rng.permutation(CELLS * CELLS).tolist()
    cells = [(c % CELLS, c // CELLS) for c in order[: len(shapes)]]
    centres = []
    for column, row in cells:
        x = near_middle(rng, column)
        y = near_middle(rng, row)
        centres.append([x, y])
    if rng.random() < 0.5:
        push_together(centres, cells, round(6 * zoom))

    # Which shape stands where, at what depth, in what colour.
    shuffled = rng.permutation(len(shapes))
    widths = tuple(SIZES.values())
    scale = zoom * (1.05 - 0.25 * hardness)
    things = []
    for (x, y), i in zip(centres, shuffled):
        level = int(rng.integers(len(SIZES)))
        colour = pick(rng, tuple(COLOURS))
        width = round(scale * widths[level])
        things.append(Thing(shapes[i], colour, x, y, level, width))
    things.sort(key=lambda thing: thing.level)

    seed = int(rng.integers(2**32))
    return Scene(tuple(things), counted, hardness, seed)


def near_middle(rng, cell):
    """A coordinate [px] at most 4 px from the middle of a cell's row or column."""
    middle = cell * CELL + CELL // 2
    return middle + int(rng.integers(-4, 5))


def push_together(centres, cells, gap):
    """Moves the first two neighbours to `gap` px from the border between their cells; changes `centres`."""
    for i, (xi, yi) in enumerate(cells):
        for j, (xj, yj) in enumerate(cells):
            first, second = centres[i], centres[j]
            step = (xj - xi, yj - yi)
            if step == (1, 0):
                border = xj * CELL
                second[:] = [border + gap, first[1]]
                first[0] = border - gap
                return
            if step == (0, 1):
                border = yj * CELL
                second[:] = [first[0], border + gap]
                first[1] = border - gap
                return


def render(scene):
    """uint8 [112, 112, 3]."""
    rng = np.random.default_rng(scene.seed)

    # The background: light from the top, warm from the left.
    pixels = np.mgrid[0:SIDE, 0:SIDE]
    y, x = pixels / SIDE - 0.5
    light = 118 - 60 * y
    warmth = -50 * x
    red = light + warmth
    blue = light - warmth
    background = np.stack([red, light, blue], -1)
    image = Image.fromarray(background.astype(np.uint8))

    for thing in scene.things:
        shade = rng.normal(0, 4 + 10 * scene.hardness, 3)
        shaded = np.clip(COLOURS[thing.colour] + shade, 0, 255)
        colour = tuple(int(c) for c in shaded)
        x0, y0, _, _ = thing.box
        image.paste(colour, (x0, y0), mask(thing.shape, thing.width))

    spread = 3 + 12 * scene.hardness
    noise = rng.normal(0, spread, (SIDE, SIDE, 1))
    noisy = np.clip(np.asarray(image) + noise, 0, 255)
    return noisy.astype(np.uint8)


# --- questions ---


def plural(shape):
    return shape + ("es" if shape.endswith("s") else "s")


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def ask(scene, family, rng, answer=None):
    """One random question of a family, its answer `answer` if given; None if the scene has none."""
    choices = []
    for found, things in CHOICES[family](scene):
        if answer in (None, found):
            choices.append((found, things))
    if not choices:
        return None

    found, things = pick(rng, choices)
    texts, cot = WORDS[family](found, *things)
    boxes = tuple(thing.box for thing in things)
    return Question(family, pick(rng, texts), found, boxes, cot)


# What can be asked of a scene: every (answer, things), the things in the order in which
# the question names them.


def count_choices(scene):
    things = [thing for thing in scene.things if thing.shape == scene.counted]
    things.sort(key=lambda thing: (thing.row, thing.column))
    return [(str(len(things)), things)]


def relation_choices(scene):
    for a, b in permutations(scene.named, 2):
        if a.column != b.column:
            yield ("left" if a.x < b.x else "right"), (a, b)
        if a.row != b.row:
            yield ("above" if a.y < b.y else "below"), (a, b)


def depth_choices(scene):
    for a, b in permutations(scene.named, 2):
        if a.level != b.level:
            yield ("front" if a.level > b.level else "behind"), (a, b)


def nearer_choices(scene):
    """Only where the farther one is at least 1.5 times as far away."""
    for a, b, c in permutations(scene.named, 3):
        to_b = math.dist(a.centre, b.centre)
        to_c = math.dist(a.centre, c.centre)
        if max(to_b, to_c) >= 1.5 * min(to_b, to_c):
            nearer = b if to_b < to_c else c
            yield nearer.shape, (a, b, c)


def attribute_choices(scene):
    return [(thing.colour, (thing,)) for thing in scene.named]


# How it is asked: the wordings of the question, and the two steps to the answer.


def where(thing):
    return f"The {thing.shape} is in {thing.place}."


def count_words(answer, *things):
    name = plural(things[0].shape)
    texts = (f"How many {name} are there?", f"How many {name} can you see?")
    places = " and ".join(thing.place for thing in things)
    return texts, (f"I look for {name}: {places}.", f"That makes {answer}.")


def relation_words(answer, a, b):
    if answer in ("left", "right"):
        ways = ("to the left or right of", "left or right of")
    else:
        ways = ("above or below", "placed above or below")
    texts = [f"Is the {a.shape} {way} the {b.shape}?" for way in ways]
    return tuple(texts), (where(a), where(b))


def depth_words(answer, a, b):
    texts = (f"Is the {a.shape} in front of or behind the {b.shape}?",)
    sizes = [f"The {thing.shape} is {thing.size}." for thing in (a, b)]
    return texts, tuple(sizes)


def nearer_words(answer, a, b, c):
    texts = (f"Which is nearer to the {a.shape}, the {b.shape} or the {c.shape}?",)
    others = f"The {b.shape} is in {b.place}, the {c.shape} in {c.place}."
    return texts, (where(a), others)


def attribute_words(answer, a):
    texts = (f"What colour is the {a.shape}?", f"Which colour does the {a.shape} have?")
    return texts, (where(a), f"It is {answer}.")


CHOICES: dict[str, Callable] = {
    "count": count_choices, "relation": relation_choices, "depth": depth_choices,
    "nearer": nearer_choices, "attribute": attribute_choices,
}
WORDS: dict[str, Callable] = {
    "count": count_words, "relation": relation_words, "depth": depth_words,
    "nearer": nearer_words, "attribute": attribute_words,
}


# --- files ---


def draw_pair(stream, split, seed, index):
    """Scene and question number `index`: families take turns, and within a family the answers do."""
    family = FAMILIES[index % len(FAMILIES)]
    rng = rng_for(stream, split, seed, index)
    return draw_asked(stream, family, index // len(FAMILIES), rng)


def draw_asked(stream, family, turn, rng):
    """A scene of a stream and a question of a family about it, the answer being the one whose turn it is."""
    answers = ANSWERS[family]
    answer = answers[turn % len(answers)]
    while True:
        scene = draw_for(stream, rng, int(answer) if family == "count" else None)
        question = ask(scene, family, rng, answer)
        if question:
            return scene, question


def generate(out, seed=0, train=8000, val=500, test=2500, stream="demo", draw=None, about=None):
    """Write the three splits under the directory `out`, unless its manifest says that they are there already.

    draw: function (stream, split, seed, index) -> (Scene, Question); draw_pair if None. about: what the
    manifest says of it, {name: value}. Raises RuntimeError if two splits share a scene.
    """
    out = Path(out)
    draw = draw or draw_pair
    wanted = {"seed": seed, "train": train, "val": val, "test": test, "stream": stream, "version": 2}
    wanted |= about or {}
    manifest = out / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text()) == wanted:
        print(f"toy scenes: {out} is complete")
        return
    manifest.unlink(missing_ok=True)

    seen = {}
    for split in ("train", "val", "test"):
        folder = out / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        with open(out / f"{split}.jsonl", "w") as lines:
            for index in range(wanted[split]):
                scene, question = draw(stream, split, seed, index)
                if seen.setdefault(scene.digest, split) != split:
                    raise RuntimeError(
                        f"{split} and {seen[scene.digest]} share a scene; take another seed than {seed}"
                    )

                number = index + 1
                name = f"images/{split}/{number:06d}.png"
                Image.fromarray(render(scene)).save(out / name)
                line = record(f"{split}-{number:06d}", name, question)
                lines.write(json.dumps(line) + "\n")
                if number % 1000 == 0 or number == wanted[split]:
                    print(f"toy scenes: {split} {number}/{wanted[split]}", flush=True)

    manifest.write_text(json.dumps(wanted))  # last: a directory without it is taken as unfinished


def record(name, image, question):
    """One line of a LLaVA JSONL."""
    asked = {"from": "human", "value": f"<image>\n{question.text}"}
    answered = {"from": "gpt", "value": question.answer}
    line = {"id": name, "image": image, "conversations": [asked, answered], "family": question.family}
    return line | {"boxes": list(question.boxes), "cot": list(question.cot)}
