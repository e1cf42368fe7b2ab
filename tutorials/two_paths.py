"""Writes figures/two_paths.svg, the method's figure: two paths, the copy before every layer, the losses.

    python tutorials/two_paths.py
"""

from pathlib import Path

FILE = Path(__file__).resolve().parent / "figures" / "two_paths.svg"
RED, BLUE, GREY = "#d1495b", "#2e6f95", "#555"

# What the sequence is made of: name, positions drawn, x of the first, its colour in each path.
PARTS = (
    ("image", 4, 150, "#9ec1a3", "#c8d8cb"),
    ("question", 3, 282, "#d9d9d9", "#d9d9d9"),
    ("thought", 2, 384, "#c9c4e4", "#c9c4e4"),
    ("latents", 4, 456, "#f2b84b", "#f2b84b"),
    ("answer", 3, 588, "#8fb8de", "#8fb8de"),
)
WIDTH, HEIGHT, COLUMN, LAYER, LAYERS = 26, 16, 30, 19, 4  # of a cell; from cell to cell
INTACT, CORRUPTED = 62, 262  # y of each path's top layer

STAR = "M92,100 l6,13 14,1.6 -10.5,9.6 3,14 -12.5,-7.2 -12.5,7.2 3,-14 -10.5,-9.6 14,-1.6 z"


def text(x, y, words, size, anchor="start", fill="#222", weight="normal"):
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {style}>{words}</text>'


def line(x, y, x_end, y_end, colour, width, ends=""):
    return f'<path d="M{x},{y} L{x_end},{y_end}" stroke="{colour}" stroke-width="{width}" fill="none"{ends}/>'


def head():
    """The canvas, arrow heads, and the two clouds that a blur leaves of a disc and a star."""
    says = (
        "CrystaL: two paths through the same decoder; at every layer the latents of the intact path replace "
        "those of the corrupted one; the answers and their attention are aligned."
    )
    heads = [
        f'<marker id="{name}" markerWidth="7" markerHeight="7" refX="5" refY="3.5" orient="{orient}">'
        f'<path d="M0,0 L7,3.5 L0,7 z" fill="{colour}"/></marker>'
        for name, orient, colour in (("head", "auto", RED), ("grey", "auto-start-reverse", GREY))
    ]
    clouds = [
        f'<radialGradient id="{name}"><stop offset="0" stop-color="{colour}" stop-opacity="0.75"/>'
        f'<stop offset="1" stop-color="{colour}" stop-opacity="0"/></radialGradient>'
        for name, colour in (("red", RED), ("blue", BLUE))
    ]
    return [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 430" '
        f'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="{says}">',
        f"<defs>{''.join(heads + clouds)}</defs>",
        '<rect width="960" height="430" rx="10" fill="#ffffff"/>',
    ]


def path(top, name, drawing, colour):
    """One path: its picture at the left, then a column of cells, a layer each, for every position."""
    frame = f'<rect x="28" y="{top - 6}" width="92" height="92" rx="6"'
    background = f'<rect x="28" y="{top - 6}" width="92" height="92" fill="#eef2f5"/>'
    out = [
        f'<clipPath id="c{top}">{frame}/></clipPath>',
        f'<g clip-path="url(#c{top})">{background}{drawing}</g>',
        f'{frame} fill="none" stroke="#999"/>',
        text(74, top + 104, name, 13, "middle", weight="bold"),
    ]
    for _, count, x, *colours in PARTS:
        for column in range(count):
            for layer in range(LAYERS):
                place = f'x="{x + COLUMN * column}" y="{top + LAYER * layer}"'
                size = f'width="{WIDTH}" height="{HEIGHT}" rx="3"'
                out.append(f'<rect {place} {size} fill="{colours[colour]}"/>')
    return out


def copies():
    """The copy: one arrow a layer, drawn at one latent each, from the bottom layer up."""
    _, count, x, *_ = PARTS[3]
    out = []
    for latent in range(count):
        at = x + COLUMN * latent + WIDTH / 2
        start = INTACT + LAYER * (LAYERS - 1 - latent) + HEIGHT / 2
        end = start + CORRUPTED - INTACT - 5
        out.append(line(at, start, at, end, "#ffffff", 5))
        out.append(line(at, start, at, end, RED, 2, ' marker-end="url(#head)"'))
        out.append(f'<circle cx="{at}" cy="{start}" r="3.2" fill="{RED}"/>')
    out.append(text(442, 196.0, "copied before every layer:", 13, "end", RED, "bold"))
    out.append(text(442, 214.0, "one arrow a layer, gradient flows back", 12, "end", RED))
    out.append(text(150, 154, "layers, from the bottom up", 11, fill="#777"))
    return out


def losses():
    """The terms of eq. 6, at the right."""
    grey, both = ' marker-end="url(#grey)"', ' marker-start="url(#grey)" marker-end="url(#grey)"'
    out = []
    for y, whence in ((70.0, "intact image"), (270.0, "latents")):
        out.append(line(684, y, 722, y, GREY, 1.6, grey))
        out.append(text(728, y - 2, "CE", 15, weight="bold"))
        out.append(text(728, y + 15, f"the answer, from the {whence}", 12, fill=GREY))
    out.append(line(664, 138, 664, 256, GREY, 1.6, both))
    out.append(line(666, 184.0, 722, 184.0, GREY, 1.6, grey))
    for y, name, what in (
        (168.0, "KL", "both paths' answers agree (eq. 4)"),
        (210.0, "attention", "and look at the latents alike (eq. 5)"),
    ):
        out.append(text(728, y, name, 15, weight="bold"))
        out.append(text(728, y + 17, what, 12, fill=GREY))
    return out


def svg():
    """The whole figure -> its text."""
    sharp = f'<circle cx="58" cy="88" r="13" fill="{RED}"/><path d="{STAR}" fill="{BLUE}"/>'
    red, blue = '<circle cx="58" cy="288" r="24"', '<circle cx="92" cy="319" r="30"'
    blurred = f'{red} fill="url(#red)"/>{blue} fill="url(#blue)"/>'
    names = [text(x + (COLUMN * count - 4) / 2, 48, name, 13, "middle") for name, count, x, *_ in PARTS]
    below = (
        "One model, the same weights, question and positions. Nothing but the task supervises the latents:",
        "they must hold what the corrupted image has lost.",
    )
    lines = [
        *head(),
        *path(INTACT, "intact", sharp, 0),
        *path(CORRUPTED, "corrupted", blurred, 1),
        *names,
        *copies(),
        *losses(),
        *(text(150, 362 + 18 * i, words, 13, fill="#333") for i, words in enumerate(below)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(svg(), encoding="utf-8")
