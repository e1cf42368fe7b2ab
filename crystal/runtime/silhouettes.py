"""What the things of the toy scenes look like: a silhouette of any width for each shape.

A shape is given in a square of side 1 whose x grows to the right and y downwards, drawn eight times as large
and averaged, so that a width of 5 pixels still tells a ring from a circle.
"""

import math
from functools import cache

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
# What points from one thing to the next: a triangle whose tip is where its name says.
ARROWS = {
    "arrow_left": ((0, 0.5), (1, 0), (1, 1)),
    "arrow_right": ((1, 0.5), (0, 0), (0, 1)),
    "arrow_up": ((0.5, 0), (0, 1), (1, 1)),
    "arrow_down": ((0.5, 1), (0, 0), (1, 0)),
}


@cache
def mask(shape, width):
    """Anti-aliased silhouette, an "L" image of width x width pixels."""
    big = 8 * width  # supersampling
    image = Image.new("L", (big, big))
    pen = ImageDraw.Draw(image)

    def points(*xy):
        return [(big * x, big * y) for x, y in xy]

    def turn(n, i):
        angle = i * math.pi / 5
        x = 0.5 + n * math.sin(angle)
        y = 0.53 - n * math.cos(angle)
        return x, y

    if shape == "circle":
        pen.ellipse(points((0.03, 0.03), (0.97, 0.97)), fill=255)
    elif shape == "square":
        pen.rectangle(points((0.08, 0.08), (0.92, 0.92)), fill=255)
    elif shape == "triangle":
        pen.polygon(points((0.5, 0.02), (1, 0.95), (0, 0.95)), fill=255)
    elif shape == "star":
        tips = [turn(0.55 if i % 2 == 0 else 0.22, i) for i in range(10)]
        pen.polygon(points(*tips), fill=255)
    elif shape == "cross":
        pen.rectangle(points((0.34, 0), (0.66, 1)), fill=255)
        pen.rectangle(points((0, 0.34), (1, 0.66)), fill=255)
    elif shape == "diamond":
        pen.polygon(points((0.5, 0), (0.92, 0.5), (0.5, 1), (0.08, 0.5)), fill=255)
    elif shape == "ring":
        pen.ellipse(points((0, 0), (1, 1)), fill=255)
        pen.ellipse(points((0.27, 0.27), (0.73, 0.73)), fill=0)
    elif shape == "heart":
        pen.ellipse(points((0, 0.08), (0.54, 0.58)), fill=255)
        pen.ellipse(points((0.46, 0.08), (1, 0.58)), fill=255)
        pen.polygon(points((0.03, 0.45), (0.97, 0.45), (0.5, 1)), fill=255)
    elif shape in ARROWS:
        pen.polygon(points(*ARROWS[shape]), fill=255)
    return image.resize((width, width), Image.Resampling.BOX)
