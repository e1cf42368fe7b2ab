"""The part of the page that shows single questions: pictures under a veil, bars, grids of heads, answers.

It is drawn as page.js finds it at first: the mean over layers and heads of the first token. What a pointer
asks for beyond that page.js takes from the numbers of `maps`.

P paths, T looking tokens, N image tokens, K latents.
"""

import base64
import io
import math
from html import escape

import numpy as np

PATHS = ("intact", "corrupted")
SIDE = 384  # pixels, the longer side of a picture
DARKEST = 0.8  # opacity of the veil where nobody looks
CELL, STEP, APART = (
    11,
    12,
    4,
)  # a grid's cells, from one to the next, and what parts the means from the others

DONE = {
    "as trained": "Everything is as the model learned it.",
    "latents dropped": "The sequence stands without its latents.",
    "latents: mean": "Each latent holds its mean over the questions.",
    "latents: noise": "The latents hold noise of their own mean and spread.",
    "latents: swapped": "The latents hold what they hold for another picture.",
    "image hidden, latents kept": "Only the latents see the picture; the answer sees the latents.",
    "image hidden, latents dropped": "Nobody behind the picture sees it.",
    "image corrupted, latents intact": "The corrupted picture, and latents made from the intact one.",
    "image corrupted, latents corrupted": "The corrupted picture, and latents made from it.",
    "image corrupted": "The corrupted picture.",
}


def share_text(share):
    """A share of attention as text, as page.js says it."""
    return "under 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def paragraph(*sentences, css=""):
    """Sentences, safe HTML -> a paragraph; empty ones are left out."""
    name = f' class="{css}"' if css else ""
    return f"<p{name}>{' '.join(sentence for sentence in sentences if sentence)}</p>"


def table(head, rows, css=""):
    """Cells of safe HTML -> a table that scrolls by itself where the window is narrow."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    body = f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="wide"><table class="{css}">{body}</table></div>'


def sample(one, index):
    """One question, an inside.Sample -> HTML. index: its place among the samples."""
    question = one.record.turns[-1][1]
    question = question if isinstance(question, str) else question[-1]
    question = " ".join(question.replace("<image>", " ").split())
    family = f"{escape(one.record.family)}; " if one.record.family else ""
    paths = "".join(path(one, p, f"picture-{index}-{p}") for p in range(len(one.images)))
    plain = "".join(thumbnail(image, f"picture-{index}-{p}") for p, image in enumerate(one.images))
    return (
        f'<article class="sample" data-sample="{index}"><div class="question"><div>'
        f"<h3>{escape(question)}</h3>"
        f'<p class="about">{family}the reference answer is “{escape(one.record.answer)}”</p></div>'
        f'<div class="plain">{plain}</div></div>{choices(one)}'
        f'<div class="paths">{paths}</div><p class="pointed">&nbsp;</p>{answered(one)}</article>'
    )


def choices(one):
    """What may be chosen: which token looks, in which layer, with which head."""
    named = {
        "token": one.tokens,
        "layer": ["all layers, their mean"] + [f"layer {n}" for n in one.layers],
        "head": ["all heads, their mean"] + [f"head {n}" for n in one.heads],
    }
    selects = ""
    for name, texts in named.items():
        options = "".join(f'<option value="{i}">{escape(text)}</option>' for i, text in enumerate(texts))
        selects += f'<label>{name} <select data-choose="{name}">{options}</select></label>'
    return f'<div class="choose">{selects}<button type="button">back to the mean</button></div>'


def thumbnail(image, name):
    """A picture as it is, small. name: of the picture that is drawn below."""
    width, height = size_of(image)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="as it is"><use href="#{name}"/></svg>'


def path(one, p, name):
    """One picture of a question with what looks at it."""
    width, height = size_of(one.images[p])
    shown = one.image[p, 0, 0, 0]  # [N]
    peak = max(float(shown.max()), 1e-12)
    picture = (
        f'<svg class="picture" viewBox="0 0 {width} {height}" preserveAspectRatio="xMinYMin" role="img" '
        f'aria-label="the {PATHS[p]} picture, clear where the token looks">'
        f'<image id="{name}" href="{png(one.images[p])}" width="{width}" height="{height}"/>'
        f'<g class="veil">{veil(shown / peak, one.grid, width, height)}</g>{boxes(one, p)}</svg>'
    )

    share = one.share[p, 0, 0, 0].tolist()
    told = f'<b data-fill="image">{share_text(share[0])}</b> of its attention goes to the picture'
    bars = ""
    if one.latents.shape[-1]:
        told += f', <b data-fill="latents">{share_text(share[1])}</b> to the latents'
        bars = latent_bars(one, p)
    told += f'. The clearest place gets <b data-fill="peak">{share_text(peak)}</b>.'

    own = "From here it does not look for itself: the states of this token are the intact path's."
    title = f"{PATHS[p]} picture" if len(one.images) > 1 else "the picture"
    grids = heads(one, p, 0) + (heads(one, p, 1) if bars else "")
    return (
        f'<figure class="path" data-path="{p}">'
        f"<figcaption>{title}; the likeliest first word is “{escape(one.said[p])}”</figcaption>{picture}"
        f'<p class="told"><span class="shares">{told}</span><span class="own">{own}</span></p>{bars}'
        f'<div class="grids">{grids}</div></figure>'
    )


def veil(clear, grid, width, height):
    """clear [N], 1 where the token looks most -> a square for each place, the darker the less it looks."""
    rows, columns = grid
    wide, tall = width / columns, height / rows
    squares = []
    for i, value in enumerate(clear.tolist()):
        x, y = i % columns * wide, i // columns * tall
        place = f'x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{tall:.2f}"'
        squares.append(f'<rect {place} fill-opacity="{DARKEST * (1 - value):.3f}"/>')
    return "".join(squares)


def boxes(one, p):
    """The record's boxes, which are pixels of the picture as it came, as outlines."""
    image = one.images[p]
    scale = size_of(image)[0] / image.width
    drawn = ""
    for x0, y0, x1, y1 in one.record.boxes:
        place = f'x="{x0 * scale:.1f}" y="{y0 * scale:.1f}"'
        size = f'width="{abs(x1 - x0) * scale:.1f}" height="{abs(y1 - y0) * scale:.1f}"'
        drawn += f'<rect class="box" {place} {size}/>'
    return drawn


def latent_bars(one, p):
    """How much of the first token's attention each latent gets."""
    shown = one.latents[:, 0, 0, 0]  # [P,K]
    peak = max(float(shown.max()), 1e-12)
    K = shown.shape[1]
    bars = ""
    for i, value in enumerate(shown[p].tolist()):
        tall = 40 * value / peak
        bars += f'<rect x="{10 * i + 1}" y="{40 - tall:.2f}" width="8" height="{tall:.2f}"/>'
    return (
        f'<svg class="bars {PATHS[p]}" viewBox="0 0 {10 * K} 41" preserveAspectRatio="none" role="img" '
        f'aria-label="attention to each of {K} latents">{bars}'
        f'<line x1="0" x2="{10 * K}" y1="40.5" y2="40.5"/></svg>'
        f'<p class="small">the {K} latents, from the first; the longest bar of a question is '
        f'<b data-fill="longest">{share_text(peak)}</b></p>'
    )


def heads(one, p, target):
    """Layers by heads: how much of a head's attention goes to the picture (target 0) or the latents (1)."""
    shares = one.share[p, 0, :, :, target]  # [1+layers,1+heads]
    peak = max(float(one.share[:, 0, :, :, target].max()), 1e-12)
    rows, columns = shares.shape

    def place(i):
        """Where cell i of an axis begins; the mean stands first and apart."""
        return STEP * i + APART * (i > 0)

    drawn = ""
    for i, row in enumerate(shares.tolist()):
        for j, value in enumerate(row):
            at = f'x="{24 + place(j)}" y="{12 + place(i)}" width="{CELL}" height="{CELL}"'
            opacity = f'fill-opacity="{value / peak:.3f}"'
            drawn += f'<rect {at} data-layer="{i}" data-head="{j}" {opacity}/>'

    # Of many layers and heads not every one is named.
    for i, label in list(enumerate(["all", *one.layers]))[:: math.ceil(rows / 14)]:
        drawn += f'<text x="20" y="{21 + place(i)}" class="end">{label}</text>'
    for j, label in list(enumerate(["all", *one.heads]))[:: math.ceil(columns / 10)]:
        drawn += f'<text x="{29.5 + place(j)}" y="9" class="middle">{label}</text>'

    name, words = (("image", "to the picture"), ("latents", "to the latents"))[target]
    width, height = 30 + STEP * columns, 18 + STEP * rows
    return (
        f'<figure><svg class="heads {name}" data-target="{name}" viewBox="0 0 {width} {height}" '
        f'style="max-width:{1.7 * width:.0f}px" role="img" aria-label="layers by heads, attention {words}">'
        f'{drawn}</svg><figcaption class="small">{words}; the strongest head gives '
        f'<b data-fill="most-{name}">{share_text(peak)}</b></figcaption></figure>'
    )


def answered(one):
    """What a question is answered with under each intervention."""
    rows = []
    for name, (said, right) in one.answers.items():
        done = escape(DONE.get(name, ""))
        if name == "latents: swapped" and one.other:
            done += f" That picture's answer is “{escape(one.other)}”."
        mark = '<span class="right">right</span>' if right else '<span class="wrong">wrong</span>'
        rows.append([f"<b>{escape(name)}</b>", done, escape(said) or "<i>nothing</i>", mark])
    return table(["intervention", "what is done", "answer", ""], rows, "answers")


def size_of(image):
    """The width and height in which a PIL image stands on the page."""
    scale = min(1.0, SIDE / max(image.size))
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def png(image):
    """A PIL image -> the data URL of a PNG of `size_of`."""
    file = io.BytesIO()
    image.resize(size_of(image)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{text64(file.getvalue())}"


# --- what page.js reads ---


def maps(one):
    """A sample's attention as JSON: a map's bytes, of which 255 is its largest value, beside that value."""
    paths = []
    for p in range(len(one.images)):
        image, peak = quantised(one.image[p])
        latents, longest = quantised(one.latents[p])
        share = (one.share[p].clamp(0, 1) * 65535).round().numpy().astype("<u2").tobytes()
        given = {"image": image, "peak": peak, "latents": latents, "longest": longest, "share": share}
        paths.append({name: text64(raw) for name, raw in given.items()})
    return {
        "sizes": [len(one.tokens), 1 + len(one.layers), 1 + len(one.heads)],
        "layers": one.layers,
        "heads": one.heads,
        "grid": one.grid,
        "count": one.latents.shape[-1],
        "copied": one.copied or [False] * len(one.tokens),
        "darkest": DARKEST,
        "paths": paths,
    }


def quantised(x):
    """Weights [..,n] -> (their bytes, 255 times each over the largest of its n; those largest as float32)."""
    if not x.shape[-1]:
        return b"", b""
    largest = x.amax(-1, keepdim=True)
    units = (x / largest.clamp(min=1e-30) * 255).round().numpy().astype(np.uint8)
    return units.tobytes(), largest[..., 0].numpy().astype("<f4").tobytes()


def text64(raw):
    """Bytes as base64 text."""
    return base64.b64encode(raw).decode()
