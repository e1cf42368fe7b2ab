"""Charts of the page as SVG text, drawn by hand: curves, histograms, shares with intervals, points.

No numbers are made here. Colours and strokes are classes of assets/page/page.css, so that light, dark and
paper each have their own; every text goes through `html.escape`. Sizes are pixels of the viewBox.
"""

import math
from html import escape

from crystal.evaluation.figures import CARRIED, MASSES, smooth
from crystal.evaluation.gaze import by_threshold
from crystal.evaluation.scoring import wilson

DRAWN = 400  # points of a curve; of a longer one every so-manyth is drawn
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 30  # room around the plot
BINS = 16  # bars of a histogram
PATHS = ("intact", "corrupted")


class Chart:
    """A plot between two ranges. What is drawn adds to `parts`; `svg` is the whole of it.

    x, y: (lowest, highest) of the data. log: y is logarithmic, and positive.
    """

    def __init__(self, x, y, x_label="", y_label="", width=270, height=180, log=False, percent=False):
        self.width, self.height = width, height
        self.x_label, self.y_label = x_label, y_label
        self.log, self.percent = log, percent
        self.x, self.y = widened(*x), widened(*y) if not log else y
        self.parts = []

    def at(self, x, y):
        """Data -> pixels, cut to a tenth."""
        lift = math.log if self.log else float
        low, high = lift(self.y[0]), lift(self.y[1])
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (lift(y) - low) / (high - low)
        px = LEFT + across * (self.width - LEFT - RIGHT)
        py = self.height - BOTTOM - up * (self.height - TOP - BOTTOM)
        return f"{px:.1f}", f"{py:.1f}"

    def line(self, points, css):
        """points: (x, y), in order."""
        path = " ".join(",".join(self.at(x, y)) for x, y in points)
        self.parts.append(f'<polyline class="{css}" points="{path}"/>')

    def band(self, points, css):
        """points: (x, low, high), in order; the area between."""
        corners = [(x, high) for x, _, high in points] + [(x, low) for x, low, _ in reversed(points)]
        path = " ".join(",".join(self.at(x, y)) for x, y in corners)
        self.parts.append(f'<polygon class="{css}" points="{path}"/>')

    def dots(self, points, css, size=2.5, titles=()):
        """points: (x, y). titles: what a pointer over each is told."""
        for i, (x, y) in enumerate(points):
            px, py = self.at(x, y)
            title = f"<title>{escape(titles[i])}</title>" if titles else ""
            self.parts.append(f'<circle class="{css}" cx="{px}" cy="{py}" r="{size}">{title}</circle>')

    def whiskers(self, points, css):
        """points: (x, low, high), a line each."""
        for x, low, high in points:
            (px, bottom), (_, top) = self.at(x, low), self.at(x, high)
            self.parts.append(f'<line class="{css}" x1="{px}" x2="{px}" y1="{bottom}" y2="{top}"/>')

    def bars(self, edges, heights, css):
        """edges: one more than heights."""
        for left, right, height in zip(edges, edges[1:], heights):
            (x0, y0), (x1, y1) = self.at(left, self.y[0]), self.at(right, height)
            size = f'width="{float(x1) - float(x0):.1f}" height="{float(y0) - float(y1):.1f}"'
            self.parts.append(f'<rect class="{css}" x="{x0}" y="{y1}" {size}/>')

    def word(self, x, y, text):
        """A word below a point; above it where it would leave the plot."""
        px, py = self.at(x, y)
        low = float(py) + 15 > self.height - BOTTOM
        lift = -7 if low else 15
        self.parts.append(f'<text x="{px}" y="{float(py) + lift:.1f}" class="middle">{escape(text)}</text>')

    def rule(self, y=None, x=None, css="zero"):
        """A line right across, at a height or at a place."""
        ends = [(self.x[0], y), (self.x[1], y)] if x is None else [(x, self.y[0]), (x, self.y[1])]
        self.line(ends, css)

    def axes(self):
        """Both axes with their ticks and labels, as parts."""
        (x0, y0), (x1, y1) = self.at(self.x[0], self.y[0]), self.at(self.x[1], self.y[1])
        drawn = [f'<path class="axis" d="M{x0},{y1}V{y0}H{x1}"/>']
        for x in ticks(*self.x):
            px, py = self.at(x, self.y[0])
            drawn.append(f'<text x="{px}" y="{float(py) + 13:.1f}" class="middle">{number(x)}</text>')
        for y in powers(*self.y) if self.log else ticks(*self.y):
            px, py = self.at(self.x[0], y)
            said = f"{100 * y:.0f} %" if self.percent else number(y)
            drawn.append(f'<text x="{float(px) - 4:.1f}" y="{float(py) + 4:.1f}" class="end">{said}</text>')
            drawn.append(f'<line class="grid" x1="{x0}" x2="{x1}" y1="{py}" y2="{py}"/>')
        middle = (LEFT + self.width - RIGHT) / 2
        drawn.append(f'<text x="{middle}" y="{self.height - 3}" class="middle">{escape(self.x_label)}</text>')
        if self.y_label:
            turn = f'transform="translate(10,{self.height / 2}) rotate(-90)"'
            drawn.append(f'<text {turn} class="middle">{escape(self.y_label)}</text>')
        return drawn

    def svg(self, title):
        """title: what it shows, for those who cannot see it."""
        inside = "".join([*self.axes(), *self.parts])
        box = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}"'
        return f'<svg class="chart" {box}>{inside}</svg>'


def widened(low, high):
    """A range that is not empty."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low, high, most=4):
    """Round numbers within a range, about `most` of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def powers(low, high):
    """Powers of ten within a range; 1, 2 and 5 of each where they are fewer than two."""
    every = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    tens = [10.0**n for n in every if low <= 10.0**n <= high]
    return (
        tens
        if len(tens) > 1
        else [m * 10.0**n for n in every for m in (1, 2, 5) if low <= m * 10.0**n <= high]
    )


def number(x):
    """A number as a tick says it."""
    return f"{x:.0f}" if abs(x) >= 100 or x == round(x) else f"{x:.3g}"


def panel(title, chart, said):
    """A chart under its name -> HTML. said: what it shows, in words."""
    return f"<figure class='panel'><figcaption>{escape(title)}</figcaption>{chart.svg(said)}</figure>"


# --- the training ---


def curves(training, validation):
    """figures.read_metrics of a run -> HTML: what latents carry, a panel for each term, their share."""
    masses = [name for name in MASSES if name in training]
    carried = [name for name in CARRIED if name in validation]
    last = [name for name in ("lr", "grad_norm") if name in training]
    terms = [name for name in training if name not in masses + last]

    found = [carried_panel(validation, carried)] if carried else []
    found += [term_panel([name], training, validation) for name in terms]
    found += [term_panel(masses, training, validation)] if masses else []
    return "".join(found + [term_panel([name], training, validation) for name in last])


def term_panel(names, training, validation):
    """Terms that share a panel: each as it was, its running mean, and its validations."""
    seen = [value for name in names for _, value in training[name] + validation.get(name, [])]
    log = min(seen) > 0 and max(seen) > 10 * min(seen) and names != ["lr"]
    steps = [step for name in names for step, _ in training[name]]
    low = min(seen) if log else min(0.0, *seen)
    chart = Chart((min(steps), max(steps)), (low, max(seen)), "updates", log=log)
    for name, css in zip(names, PATHS):
        points = training[name]
        at, values = zip(*points)
        window = 2 * (len(points) // 40) + 1
        means = list(zip(at, smooth(values, window)))
        chart.line(thinned(points), f"faint {css}")
        chart.line(thinned(means if name != "lr" else points), css)
        chart.dots(validation.get(name, []), f"held {css}", 3)
    title = "attention that latents get" if len(names) > 1 or names[0] in MASSES else names[0]
    ends = [f"{name} from {training[name][0][1]:.3g} to {training[name][-1][1]:.3g}" for name in names]
    return panel(title, chart, f"{title} over updates: {', '.join(ends)}")


def carried_panel(validation, names):
    """Gain, swap or drop at each validation with its interval, and the 0 of latents without use."""
    spans = {}
    for name in names:
        halves = dict(validation.get(f"{name}_pm", []))
        spans[name] = [
            (step, value - halves.get(step, 0.0), value + halves.get(step, 0.0))
            for step, value in validation[name]
        ]
    every = [end for points in spans.values() for _, *ends in points for end in ends]
    steps = [step for points in spans.values() for step, *_ in points]
    chart = Chart((min(steps), max(steps)), (min(0.0, *every), max(0.0, *every)), "updates", "nats")
    chart.rule(y=0.0)
    for name, css in zip(names, PATHS):
        chart.whiskers(spans[name], css)
        chart.line(validation[name], css)
        chart.dots(validation[name], css, 3)
    title = " and ".join(names)
    ends = ", ".join(f"{name} {validation[name][-1][1]:+.3f} nats at the end" for name in names)
    return panel(title, chart, f"what the latents carry: {ends}")


def thinned(points):
    """At most about DRAWN of a curve's points, the last among them."""
    step = math.ceil(len(points) / DRAWN)
    return points[::step] + ([points[-1]] if (len(points) - 1) % step else [])


# --- LaViT's figures ---


def entropies(paths, looker):
    """Figure 4: how many questions have which entropy -> HTML. paths: lists of gaze.judge's dicts."""
    values = [[question["entropy"] for question in path] for path in paths]
    top = math.log(max(question["tokens"] for question in paths[0]))
    low = min(map(min, values))
    low, high = low - 0.05 * (top - low) - 1e-3, top + 1e-3
    edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    counts = []
    for path in values:
        places = [min(BINS - 1, int((value - low) / (high - low) * BINS)) for value in path]
        counts.append([places.count(i) for i in range(BINS)])
    chart = Chart((low, high), (0, max(map(max, counts))), "entropy, nats", "questions")
    for heights, css in zip(counts, PATHS):
        chart.bars(edges, heights, f"bar {css}")
    chart.rule(x=top, css="limit")
    means = ", ".join(f"{css} {sum(path) / len(path):.3f}" for path, css in zip(values, PATHS))
    return panel(f"rows of the {looker}", chart, f"entropy of the {looker}'s attention, mean: {means}")


def accuracy(numbers, looker):
    """Figure 2: share right of the questions at or above a focus score, with Wilson's interval -> HTML.

    numbers: gaze.judge's dicts of one path, those with a focus.
    """
    found = by_threshold(numbers)
    spans = [(at, *wilson(round(share * n), n)) for at, share, n in found]
    chart = Chart((0, max(found[-1][0], 1e-6)), (0, 1), "focus score at least", "right", percent=True)
    chart.band(spans, "interval")
    points = [(at, share) for at, share, _ in found]
    chart.line(points, "intact")
    told = [f"focus at least {at:.2f}: {100 * share:.0f} % of {n} questions right" for at, share, n in found]
    chart.dots(points, "intact", 3, told)
    for at, share, n in found[::4]:
        chart.word(at, share, f"{n}")
    return panel(f"rows of the {looker}", chart, "; ".join(told))


# --- latents beside image and text ---


def scatter(states, layers):
    """LIVR's figure 4: latent_space.States of one depth -> HTML. layers: the model's."""
    every = [point for points in states.points.values() for point in points.tolist()]
    xs, ys = zip(*every)
    shares = [f"{100 * share:.0f} %" for share in states.kept]
    chart = Chart(
        (min(xs), max(xs)),
        (min(ys), max(ys)),
        f"first component, {shares[0]} of the variance",
        f"second, {shares[1]}",
        330,
        300,
    )
    for kind, points in states.points.items():
        rounded = [(round(x, 3), round(y, 3)) for x, y in points.tolist()]
        chart.dots(rounded, f"point {kind}", 2.2)
    kept = f"{100 * sum(states.kept):.0f} % of the variance kept"
    title = f"{where(states.depth, layers)}: {kept}"
    return panel(title, chart, f"{', '.join(states.points)} tokens; {kept}")


def where(depth, layers):
    """A depth in words."""
    if depth == layers:
        return f"after the last of {layers} layers"
    return f"before layer {depth} of 0 to {layers - 1}" if depth else "before the first layer"
