"""The page of a run: what inside.py measured becomes one HTML file that needs no server and no network.

Everything that it shows stands in its HTML already, so that it reads on paper and without a script; page.js
only answers a pointer, out of a JSON tag that holds numbers alone. What comes from records and models is
text: it goes through `html.escape`, and a policy in the head lets no script run but page.js and nothing be
loaded.

The question that each section ends with: what would be seen if the latents carried nothing?
"""

import base64
import hashlib
import json
import math
from html import escape
from pathlib import Path

from crystal.evaluation import charts, gaze, inside
from crystal.evaluation.page_samples import PATHS, maps, paragraph, sample, table
from crystal.evaluation.scoring import percent

ASSETS = Path(__file__).parents[1] / "assets" / "page"
SECTIONS = {
    "training": "How the training went",
    "samples": "What single questions look at",
    "states": "Where the latents lie",
    "gaze": "How sharply it looks, and whether at the right place",
    "reliance": "Whether the latents are used",
    "stored": "What this page holds",
}
CARRIED = {
    "gain": "<i>gain</i>, what the intact picture's latents take off the answer to the corrupted one",
    "swap": "<i>swap</i>, what another record's latents add to the answer",
    "drop": "<i>drop</i>, what it adds that nobody sees the latents",
}


def build(about, found, metrics, reliance):
    """A run's page -> HTML.

    about: {"name", "method", "checkpoint", "data"}, texts. found: inside.Inside. metrics:
    figures.read_metrics. reliance: (reliance.measure's summary or None, where it is from in words).
    """
    bodies = {
        "training": training(found, *metrics),
        "samples": samples(found),
        "states": states(found),
        "gaze": looks(found) + focused(found),
        "reliance": relied(found, *reliance),
        "stored": stored(found),
    }
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title in SECTIONS.items())
    sections = "".join(
        f'<section id="{key}"><h2>{title}</h2>{bodies[key]}</section>' for key, title in SECTIONS.items()
    )

    style = (ASSETS / "page.css").read_text(encoding="utf-8")
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    numbers = json.dumps([maps(one) for one in found.samples])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(about["name"])}, from the inside</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(about["name"])}, from the inside</h1>
{heading(about, found, metrics[1], reliance[0])}
<nav>{links}</nav>
</header>
<main>{sections}</main>
<script type="application/json" id="numbers">{numbers}</script>
<script>{script}</script>
</body>
</html>
"""


def heading(about, found, validation, summary):
    """What the run is, and the answer in short."""
    right = sum(found.right) / len(found.right)
    method, step, asked = (escape(about[name]) for name in ("method", "checkpoint", "data"))
    what = (
        f"This is a run of the method <b>{method}</b>, its checkpoint {step}. Of {len(found.right)} "
        f"questions of {asked} it answers {100 * right:.0f} % rightly."
    )
    told = [escape(summary["verdict"])] if summary else []
    for name in CARRIED:
        if name in validation:
            step, value = validation[name][-1]
            half = dict(validation.get(f"{name}_pm", [])).get(step, math.nan)
            told.append(f"At the last validation {name} was {value:+.3f} ±{half:.3f} nats.")
    if not found.count:
        told.append("The method has no latents, and what this page says of latents is left out.")
    return paragraph(what) + (paragraph(*told, css="verdict") if told else "")


def legend(names, classes=None):
    """Names beside their colours."""
    marks = "".join(
        f'<span><i class="mark {css}"></i>{escape(name)}</span>' for name, css in zip(names, classes or names)
    )
    return f'<p class="legend">{marks}</p>'


# --- the training ---


def training(found, training, validation):
    """Every term over the updates."""
    carried = [name for name in CARRIED if name in validation]
    said = [
        "Each panel is a term of the log over the updates: pale as it was, dark its running mean, dots at "
        "the validations. An axis is logarithmic where the values span more than a factor of ten.",
    ]
    key = ""
    if carried:
        key = legend(carried, PATHS)
        said.append(
            "The first panel is what the latents carry, in nats of the answer with 95 % intervals: "
            f"{'; '.join(CARRIED[name] for name in carried)}. If the latents carried nothing, both would "
            "stay on the line at 0."
        )
    elif found.count:
        said.append(
            "The log holds no gain, swap or drop: there was no validation, or the run is older than they are."
        )
    else:
        said.append("Gain and swap are of latents, which this method does not have.")
    if "mass_int" in training:
        said.append("Where two paths share a panel, blue is the intact one and orange the corrupted one.")
    return paragraph(*said) + key + panels(charts.curves(training, validation))


def panels(drawn):
    """Charts side by side."""
    return f'<div class="panels">{drawn}</div>'


# --- single questions ---


def samples(found):
    """Chosen questions: pictures, attention and answers."""
    said = [
        "A picture is dark where the chosen token does not look and clear where it looks most; how much that "
        "is stands below it. The grids are layers by heads: the stronger a cell's colour, the more of that "
        "head's attention goes there. Point at a cell to see where its head looks, click to keep it, and "
        "point at the picture to read what a place gets. What is drawn at first is the mean over all layers "
        "and heads, of the token that predicts the answer."
    ]
    if found.count:
        said.append(
            "The bars are the latents, as that token sees them. If the latents carried nothing, their bars "
            "could still be long: attention says where a model looks and not what it takes. The answers "
            "under each intervention tell: they would be the same whatever the latents hold."
        )
    else:
        said.append("There are no latents here, and so neither bars nor interventions on them.")
    if not found.two_paths:
        said.append("The method has one path: no second picture is given its latents.")
    return paragraph(*said) + "".join(sample(one, i) for i, one in enumerate(found.samples))


# --- states ---


def states(found):
    """LIVR's figure 4."""
    said = [
        f"Each dot is a token's state in one of {found.shown} questions: image, text and latent tokens in "
        "the two directions in which they vary most (principal components; LIVR's figure 4 is a t-SNE of "
        "the last layer, while components keep distances and say how much they leave out). Every state is "
        "first divided by its root mean square, as the next layer's norm does.",
    ]
    between = [each for each in found.states if each.between is not None]
    if between:
        shares = "; ".join(
            f"{100 * each.between:.0f} % {charts.where(each.depth, found.layers)}" for each in between
        )
        said.append(
            "If the latents carried nothing of the picture, each would lie on a spot of its own whatever "
            "the picture; where they lie in clouds, they differ from question to question. Of the latents' "
            f"own variance, in all dimensions, so much lies between questions: {shares}. Latents that are "
            "learned embeddings begin at 0 %. To differ is not yet to be of use: latents that nobody trained "
            "differ too, as every token does that sees picture and question."
        )
    if not found.count:
        said.append("There are no latents here: the dots are image and text alone.")
    kinds = list(found.states[0].points)
    drawn = "".join(charts.scatter(each, found.layers) for each in found.states)
    return paragraph(*said) + legend(kinds) + panels(drawn)


# --- LaViT's numbers ---


def looks(found):
    """LaViT's table 2 and figure 4."""
    said = paragraph(
        "These numbers are LaViT's. Attention to the image tokens is averaged over all layers, heads and "
        "rows of a question and stretched to 0 to 1 (its eq. 2 and 3): A. <i>Entropy</i> is −Σ p log p of "
        "A as a distribution, in nats (eq. 10): low is a sharp look, and the dashed line is that of an even "
        "one. <i>Salient</i> tokens have more than 1.5 times the mean of A. <i>CV</i> is the standard "
        "deviation over the questions divided by their mean: low is a steady way of looking (table 2). The "
        "rows are the <i>text</i> behind the picture, as in the paper, and those that predict the "
        f"<i>answer</i>{', and the <i>latents</i>' if found.count else ''}."
    )
    if found.count:
        said += paragraph(
            "If the latents carried nothing, theirs could be any of these numbers; but a look of theirs as "
            "even as the dashed line would hold little of one place of a picture."
        )
    rows = []
    for looker, paths in found.looks.items():
        for path, numbers in zip(PATHS, paths):
            rows.append([f"{looker}, {path}" if found.two_paths else looker, *table2(numbers)])
    head = ["rows", "salient tokens", "of all", "std", "range", "CV"]
    head += ["entropy", "of an even look's", "std", "CV"]
    drawn = "".join(charts.entropies(paths, looker) for looker, paths in found.looks.items())
    key = legend(PATHS) if found.two_paths else ""
    return said + table(head, rows, "numbers") + key + panels(drawn)


def table2(numbers):
    """gaze.judge's dicts of one path -> the cells of LaViT's table 2, with shares beside the counts."""
    salient = gaze.over_questions([n["salient"] for n in numbers])
    entropy = gaze.over_questions([n["entropy"] for n in numbers])
    share = sum(n["salient"] / n["tokens"] for n in numbers) / len(numbers)
    even = sum(n["entropy"] / math.log(max(n["tokens"], 2)) for n in numbers) / len(numbers)
    return [
        f"{salient['mean']:.1f}",
        f"{100 * share:.0f} %",
        f"{salient['std']:.1f}",
        f"{salient['low']}–{salient['high']}",
        f"{salient['cv']:.3f}",
        f"{entropy['mean']:.3f}",
        f"{100 * even:.0f} %",
        f"{entropy['std']:.3f}",
        f"{entropy['cv']:.3f}",
    ]


def focused(found):
    """LaViT's figure 2, where records have boxes."""
    judged = {looker: [n for n in paths[0] if "focus" in n] for looker, paths in found.looks.items()}
    judged = {looker: numbers for looker, numbers in judged.items() if len(numbers) > 1}
    if not judged:
        return paragraph(
            "No question has boxes, and so there is no focus score (eq. 1) to hold against the answers."
        )
    told = []
    for looker, numbers in judged.items():
        right, wrong = ([n["focus"] for n in numbers if n["right"] == kind] for kind in (True, False))
        told.append(
            f"of the {looker}, {average(right)} where the answer is right, {average(wrong)} where wrong"
        )
    first = next(iter(judged.values()))
    chance = sum(n["chance"] for n in first) / len(first)
    said = paragraph(
        "The <i>focus score</i> is the share of A on the tokens that the question's boxes touch (eq. 1). A "
        "point is the share of right answers among the questions whose score is at least so much, with its "
        "95 % interval and the number of questions: the paper's figure 2 rises. If where a model looks had "
        "nothing to do with what it answers, the line would be level. It says what goes together and not "
        "what causes what: questions of different kinds have larger boxes, and are harder.",
        f"An even look would score {chance:.2f} here; the mean score is {'; '.join(told)}.",
    )
    return said + panels("".join(charts.accuracy(numbers, looker) for looker, numbers in judged.items()))


def average(values):
    """The mean in two digits, or that there is none."""
    return f"{sum(values) / len(values):.2f}" if values else "none"


# --- reliance ---


def relied(found, summary, source):
    """The table of interventions, with paired differences."""
    if not summary:
        return paragraph(f"There is no table of interventions on latents: {escape(found.why)}.")
    said = paragraph(
        f"{escape(source)} Every line keeps weights, questions and positions and changes what its name says; "
        "differences are to the first line, question by question, with 95 % intervals. <i>Swapped</i> "
        "decides: if the latents carried nothing, another picture's would leave as many answers right, and "
        "its interval would hold 0."
    )
    lines = summary["conditions"]
    ends = [line[end] for line in lines for end in ("difference_low", "difference_high") if end in line]
    span = (min([-0.01, *ends]), max([0.01, *ends]))
    rows = []
    for line in lines:
        cells = [f"<b>{escape(line['condition'])}</b>", percent(line["right"], line["low"], line["high"])]
        if "difference" in line:
            low, high = 100 * line["difference_low"], 100 * line["difference_high"]
            cells += [f"{100 * line['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}"]
            cells += [interval(line, span), f"{100 * line['changed']:.1f}"]
        rows.append(cells + [""] * (6 - len(cells)))
    head = ["condition", "right, %", "difference, points", "95 % interval", "", "answers changed, %"]
    verdict = f"<b>{escape(summary['verdict'])}</b> The rule: {escape(summary['rule'])}."
    return said + table(head, rows, "numbers") + paragraph(verdict)


def interval(line, span):
    """A difference and its interval as a mark on a line over the span (lowest, highest) of all of them."""

    def x(value):
        return f"{5 + 130 * (value - span[0]) / (span[1] - span[0]):.1f}"

    low, at, high = (x(line[f"difference{end}"]) for end in ("_low", "", "_high"))
    return (
        '<svg class="interval" viewBox="0 0 140 14" aria-hidden="true">'
        f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="14"/>'
        f'<line x1="{low}" x2="{high}" y1="7" y2="7"/><circle cx="{at}" cy="7" r="3"/></svg>'
    )


# --- what is stored ---


def stored(found):
    """What was left out, and how exact what stands here is."""
    first = found.samples[0]
    rows, columns = first.grid
    kept = f"{len(first.layers)} and {len(first.heads)}"
    return paragraph(
        f"The model has {found.layers} layers of {found.heads} heads; of the first question {kept} of them "
        "are kept, evenly taken where not all, and the means are over all that were asked for. A map has "
        f"{rows} by {columns} places; of more than {inside.SIDE} a side neighbours are merged. Weights are "
        "the softmax's own, over everything that the token sees, in a byte each: 255 is the largest of a "
        "token, layer and head, and the error at most a 510th of it.",
        "Of several pictures the first is shown, of several tilings of it the whole one. While attention is "
        "read the reference answer is given, and no mask of the method's own is set.",
        f"The corruption is {escape(found.corruption)}. A picture is at most 384 pixels long here. Charts "
        "draw at most 400 points of a curve.",
    )
