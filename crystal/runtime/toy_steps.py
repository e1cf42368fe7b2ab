"""Toy questions that take several steps, none of which the next can begin without.

    hops     Follow 3 arrows from the star: what colour is there?                a colour
    closest  What colour is the thing nearest to the star?                       a colour
    left_of  How many red things are to the left of the ring?                    0 1 2 3
    pairs    Which are closer together, the star and the ring or the heart and the cross?
                                                                                 first second

They are asked of toy.py's scenes, which show what is needed as clearly as they do to its own families; the
shipped base has learned none of these questions. What each step finds stands in `cot`: a written thought, or
latents that are fed back, may take the steps one after the other, where a single forward has no more
of them than the decoder has layers.

In the scene of `hops` each thing that has a neighbour has a white arrow to one of them. A path of ten
things starts at the star and visits none twice, so that eight hops, more than the shipped base has layers,
lead to a thing of their own; the things beside the path have arrows too. How long the path is does not
depend on what is asked. The records' families are hops-1 to hops-8, so that every table shows them apart.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

from crystal.runtime import toy
from crystal.runtime.silhouettes import ARROWS
from crystal.runtime.toy import CELL, CELLS, COLOURS, Question, Scene, Thing

FAMILIES = ("hops", "closest", "left_of", "pairs")
ANSWERS = {
    "hops": tuple(COLOURS),
    "closest": tuple(COLOURS),
    "left_of": ("0", "1", "2", "3"),
    "pairs": ("first", "second"),
}
HOPS = 8  # the most that are asked
PATH = HOPS + 2  # things: the path goes on behind what is asked
BESIDE = 3  # things that stand beside the path
CLEAR = 1.5  # the farther is at least so many times as far away
# Columns and rows to the neighbour that an arrow points to.
WAYS = {"arrow_left": (-1, 0), "arrow_right": (1, 0), "arrow_up": (0, -1), "arrow_down": (0, 1)}
RED = "red"


def generate(out, seed=0, train=8000, val=500, test=2500, stream="demo", families=toy.FAMILIES):
    """Write the three splits of toy.generate, with questions of these families, which take turns.

    families: names of toy.FAMILIES and of FAMILIES. Those of toy.py alone, in their order, give its files.
    """
    families = tuple(families)
    if families == toy.FAMILIES:
        toy.generate(out, seed, train, val, test, stream)
        return

    def draw(stream, split, seed, index):
        return draw_pair(stream, split, seed, index, families)

    toy.generate(out, seed, train, val, test, stream, draw, {"families": list(families)})


def draw_pair(stream, split, seed, index, families):
    """Scene and question number `index`: families take turns, and within a family the answers do."""
    family = families[index % len(families)]
    turn = index // len(families)
    rng = toy.rng_for(stream, split, seed, index)
    if family in toy.FAMILIES:
        return toy.draw_asked(stream, family, turn, rng)

    # Each number of hops meets each colour before one comes again.
    kind = family
    if kind == "hops":
        family = f"hops-{turn % HOPS + 1}"
        turn //= HOPS
    answers = ANSWERS[kind]
    answer = answers[turn % len(answers)]

    while True:
        scene = SCENES[kind](stream, rng)
        found = [question for question in questions(scene, family) if question.answer == answer]
        if found:
            return scene, toy.pick(rng, found)


# --- scenes ---


def hops_scene(stream, rng):
    """A scene whose things point to one another: PATH of them in a row from the star, BESIDE elsewhere."""
    hardness = rng.uniform(*toy.HARDNESS[stream])
    scale = toy.ZOOM[stream] * (1.05 - 0.25 * hardness)
    path = walk(rng)
    free = [cell for cell in all_cells() if cell not in path]
    beside = [free[i] for i in rng.permutation(len(free))[:BESIDE]]

    # Only the star is alone in its shape. A triangle could be taken for an arrow, and a wider thing would
    # leave its arrow no room.
    others = [shape for shape in toy.SHAPES if shape not in ("star", "triangle")]
    level = 2
    width = min(11, round(scale * toy.SIZES["large"]))
    taken = [*path, *beside]
    things = []
    for cell in taken:
        shape = toy.pick(rng, others) if things else "star"
        colour = toy.pick(rng, tuple(COLOURS))
        x, y = middle(cell)
        things.append(Thing(shape, colour, x, y, level, width))

    # On the path an arrow shows the way; beside it, and at its end, any neighbour.
    arrows = []
    for i, cell in enumerate(taken):
        onward = path[i + 1 : i + 2]
        if not onward:
            onward = [other for other in neighbours(cell) if other in taken]
        if onward:
            there = toy.pick(rng, onward)
            arrows.append(arrow(cell, there))

    seed = int(rng.integers(2**32))
    return Scene((*things, *arrows), "star", hardness, seed)


def walk(rng):
    """A way of PATH cells (column, row) from neighbour to neighbour that visits none twice."""
    while True:
        path = [toy.pick(rng, all_cells())]
        while len(path) < PATH:
            onward = [cell for cell in neighbours(path[-1]) if cell not in path]
            if not onward:
                break
            path.append(toy.pick(rng, onward))
        if len(path) == PATH:
            return path


def all_cells():
    return [(column, row) for row in range(CELLS) for column in range(CELLS)]


def neighbours(cell):
    """The cells above, below and beside a cell."""
    column, row = cell
    around = [(column + dx, row + dy) for dx, dy in WAYS.values()]
    return [other for other in around if other in all_cells()]


def middle(cell):
    """The pixel in the middle of a cell."""
    return tuple(CELL * at + CELL // 2 for at in cell)


def arrow(cell, neighbour):
    """The arrow of the thing in a cell, 7 px wide between it and the cell's border, towards a neighbour."""
    dx = neighbour[0] - cell[0]
    dy = neighbour[1] - cell[1]
    shape = next(name for name, way in WAYS.items() if way == (dx, dy))
    x, y = middle(cell)
    return Thing(shape, "white", x + 10 * dx, y + 10 * dy, 3, 7)


def left_of_scene(stream, rng):
    """A scene with a ring and many red things, none of them in the ring's own column."""
    rings = []
    while not rings:
        scene = toy.draw_for(stream, rng)
        rings = [thing for thing in scene.named if thing.shape == "ring"]

    things = []
    for thing in scene.things:
        colour = thing.colour
        if thing.column != rings[0].column and rng.random() < 0.5:
            colour = RED
        elif colour == RED:
            colour = "blue"
        things.append(replace(thing, colour=colour))
    return replace(scene, things=tuple(things))


SCENES: dict[str, Callable] = {
    "hops": hops_scene, "closest": toy.draw_for, "left_of": left_of_scene, "pairs": toy.draw_for,
}


# --- questions ---


def questions(scene, family):
    """Every question of a family, hops-3 say, that can be asked of a scene."""
    kind, _, hops = family.partition("-")
    if hops:
        return hops_questions(scene, int(hops))
    return QUESTIONS[kind](scene)


def hops_questions(scene, hops):
    """From the star `hops` arrows on."""
    # What stands in each cell, and which way its arrow points.
    standing, ways = {}, {}
    for thing in scene.things:
        cell = thing.column, thing.row
        if thing.shape in ARROWS:
            ways[cell] = WAYS[thing.shape]
        else:
            standing[cell] = thing

    (star,) = [thing for thing in standing.values() if thing.shape == "star"]
    followed, cot = [star], []
    for i in range(1, hops + 1):
        here = followed[-1]
        dx, dy = ways[here.column, here.row]
        there = standing[here.column + dx, here.row + dy]
        followed.append(there)
        cot.append(f"Arrow {i} leads to the {there.shape} in {there.place}.")

    colour = followed[-1].colour
    cot.append(f"It is {colour}.")
    arrows = "1 arrow" if hops == 1 else f"{hops} arrows"
    text = f"Follow {arrows} from the star: what colour is there?"
    return [question(f"hops-{hops}", text, colour, followed, cot)]


def closest_questions(scene):
    """Where one thing is the nearest beyond doubt."""
    for thing in scene.named:
        others = [other for other in scene.things if other is not thing]
        others.sort(key=lambda other: distance(thing, other))
        nearest, second = others[:2]
        if distance(thing, second) < CLEAR * distance(thing, nearest):
            continue

        found = f"The nearest to it is the {nearest.shape} in {nearest.place}."
        cot = (toy.where(thing), found, f"It is {nearest.colour}.")
        text = f"What colour is the thing nearest to the {thing.shape}?"
        yield question("closest", text, nearest.colour, (thing, nearest), cot)


def left_of_questions(scene):
    """Of the one ring, where no red thing is in its column."""
    (ring,) = [thing for thing in scene.named if thing.shape == "ring"]
    others = [thing for thing in scene.things if thing is not ring]
    left = [thing for thing in others if thing.colour == RED and thing.column < ring.column]
    left.sort(key=lambda thing: (thing.row, thing.column))

    places = " and ".join(thing.place for thing in left)
    found = f"Red things to its left: {places}." if left else "No red thing is to its left."
    number = str(len(left))
    cot = (toy.where(ring), found, f"That makes {number}.")
    text = "How many red things are to the left of the ring?"
    return [question("left_of", text, number, (ring, *left), cot)]


def pairs_questions(scene):
    """Of four things that their shapes identify, where one distance is the shorter beyond doubt."""
    for a, b, c, d in permutations(scene.named, 4):
        one, two = distance(a, b), distance(c, d)
        if max(one, two) < CLEAR * min(one, two):
            continue

        answer = "first" if one < two else "second"
        pairs = f"the {a.shape} and the {b.shape} or the {c.shape} and the {d.shape}"
        text = f"Which are closer together, {pairs}?"
        yield question("pairs", text, answer, (a, b, c, d), (apart(a, b), apart(c, d)))


def apart(a, b):
    """The sentence of a thought that says how far two things are from one another."""
    pixels = round(distance(a, b))
    return f"The {a.shape} in {a.place} and the {b.shape} in {b.place} are {pixels} pixels apart."


def distance(a, b):
    """Pixels between the centres of two things."""
    return math.dist(a.centre, b.centre)


def question(family, text, answer, things, cot):
    """A Question about these things."""
    boxes = tuple(thing.box for thing in things)
    return Question(family, text, answer, boxes, tuple(cot))


QUESTIONS: dict[str, Callable] = {
    "closest": closest_questions, "left_of": left_of_questions, "pairs": pairs_questions,
}
