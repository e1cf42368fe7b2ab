"""Pictures: what the corruption does, how the losses went, where the answer looks in both paths.

B pairs (here 1), H query heads, N tokens of the drawn image on a grid of h x w, K latents. Of a pair, index 0
is the intact path and index 1 the corrupted one. Left out on purpose: images of a record after its first.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from crystal import feedback, methods
from crystal.attention import AttentionRecorder
from crystal.corrupt import LEVELS, MODES, Corruption, corrupt
from crystal.latent_copy import dual_forward
from crystal.methods.crystal import position_mask
from crystal.runtime import data, images
from crystal.runtime.config import Settings, UserError
from crystal.runtime.ops import attn_slice

UNITS = {
    "blur": "r = {:g} px",
    "mask": "s = {:g}",
    "crop": "s = {:g}",
    "jigsaw": "ρ = {:g}",
    "color": "s = {:g}",
    "noise": "σ = {:g}",
    "impulse": "s = {:g}",
}
PATHS = ("intact", "corrupted")
COLOURS = ("tab:blue", "tab:orange")
MASSES = {"mass_int": "intact", "mass_cor": "corrupted"}
UNDRAWN = ("step", "tokens_per_s", "peak_memory_gb")  # of metrics.jsonl: speed is not learning
CARRIED = ("gain", "swap", "drop")  # what evaluation/carrying.py measures


def figure(width, height):
    """An Agg figure of width x height inches that pyplot does not know of: nothing to
    close, no display needed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install --no-build-isolation -e '.[plots]'") from None
    fig = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def save(fig, path):
    """Writes a figure -> Path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    return Path(path)


def show(ax, image):
    """Draws a PIL image in its own pixel coordinates, small ones enlarged without blurring their pixels."""
    small = image.copy()
    small.thumbnail((800, 800))  # a photograph of 4000 px would be resampled at every save
    ax.imshow(
        np.asarray(small),
        extent=(0, image.width, image.height, 0),
        interpolation="nearest" if image.width < 400 else "antialiased",
    )
    ax.set(xticks=[], yticks=[])
    return small.height, small.width


# --- the corruption ---


def corruption_grid(image, path, seed=0):
    """Every mode of corrupt.MODES at its three named levels, as in figures 9 to 13 -> path of the PNG.

    image: PIL, any mode and size; strengths in pixels are pixels of this image. One row per mode: intact,
    then weak to strong, all from the same seed.
    """
    image = images.rgb(image)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # [3,height,width]
    aspect = min(max(image.height / image.width, 0.4), 2.5)
    fig = figure(8.5, len(MODES) * (2 * aspect + 0.25))
    axes = fig.subplots(len(MODES), 4)
    for row, mode in zip(axes, MODES):
        show(row[0], image)
        row[0].set_ylabel(mode, fontsize=12)
        row[0].set_title("intact", fontsize=10)
        for ax, level in zip(row[1:], LEVELS[mode]):
            y = corrupt(x, mode, level, torch.Generator().manual_seed(seed))
            show(ax, Image.fromarray((y * 255).round().byte().permute(1, 2, 0).numpy()))
            ax.set_title(UNITS[mode].format(level), fontsize=10)
    return save(fig, path)


# --- the losses ---


def read_metrics(run):
    """A run's metrics.jsonl -> (training, validation), each {name: [(step, value)]} in order of steps.

    A step that a resumed run took again counts once, as it went last. UserError: no such file, a
    broken line, no steps.
    """
    file = Path(run) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{run}: no metrics.jsonl in it; --run wants a run directory of train.py")
    training, validation = {}, {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}:{number}: not a line of metrics (a JSON object with a step)") from None
        for name, value in values.items():
            if name not in UNDRAWN and isinstance(value, Real) and math.isfinite(value):
                group = validation if name.startswith("val_") else training
                group.setdefault(name.removeprefix("val_"), {})[step] = value
    if not training:
        raise UserError(f"{file}: holds no training step yet")
    return tuple(
        {name: sorted(points.items()) for name, points in group.items()} for group in (training, validation)
    )


def smooth(values, window):
    """Centred running mean over `window` (odd) values, fewer at the ends: sequence -> list
    of the same length.
    """
    return [float(np.mean(values[max(0, i - window // 2) : i + window // 2 + 1])) for i in range(len(values))]


def loss_curves(run, path):
    """Every term of a run's metrics.jsonl over its updates, a panel each, whatever the method calls them ->
    path of the PNG.

    Training is light as it was and dark as a running mean; validation is points. The share of attention that
    latents get, learning rate and gradient norm come last. Logarithmic where positive values span a factor of
    10. UserError: see read_metrics.
    """
    training, validation = read_metrics(run)
    masses = [name for name in MASSES if name in training]
    last = [name for name in ("lr", "grad_norm") if name in training]
    terms = [name for name in training if name not in masses + last]
    carried = [name for name in CARRIED if name in validation]

    # A panel each; what belongs together shares one.
    panels = [[name] for name in terms]
    panels += [masses] if masses else []
    panels += [[name] for name in last]
    panels += [carried] if carried else []

    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / 4)
    fig = figure(3.1 * columns, 2.5 * rows + 0.5)
    axes = fig.subplots(rows, columns, squeeze=False).flatten()
    window = 2 * (max(map(len, training.values())) // 40) + 1  # odd: about a 20th of the run
    for ax, names in zip(axes, panels):
        if names == carried:
            draw_carried(ax, validation, carried)
        else:
            draw_terms(ax, names, training, validation, window)
            ax.set_title("attention mass on latents" if names == masses else names[0], fontsize=10)
        if names == masses:
            ax.legend(fontsize=7, frameon=False)
    for ax in axes[len(panels) :]:
        ax.remove()

    points = "; points: validation" if validation else ""
    title = f"{Path(run).name}, by update; line: training (dark: mean of {window}){points}"
    fig.suptitle(title, fontsize=10)
    return save(fig, path)


def draw_terms(ax, names, training, validation, window):
    """Terms that share a panel: training as it was, its running mean over `window` updates, validation."""
    seen = []
    for name, colour in zip(names, COLOURS):
        steps, values = zip(*training[name])
        shown = values if name == "lr" else smooth(values, window)
        ax.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        ax.plot(steps, shown, color=colour, linewidth=1.5, label=MASSES.get(name))

        held = validation.get(name, [])
        points = zip(*held) if held else ((), ())
        ax.plot(*points, "o", color=colour, markersize=4, markeredgecolor="black", zorder=3)
        seen += [*values, *(value for _, value in held)]

    if names != ["lr"] and min(seen) > 0 and max(seen) > 10 * min(seen):
        ax.set_yscale("log")
    ax.tick_params(which="both", labelsize=7)


def draw_carried(ax, validation, names):
    """Gain, swap or drop at each validation with its 95 % interval, and the 0 of latents without use."""
    ax.axhline(0, color="black", linewidth=0.8)
    for name, colour in zip(names, COLOURS):
        steps, values = zip(*validation[name])
        halves = [half for _, half in validation[f"{name}_pm"]]
        ax.errorbar(
            steps, values, halves, color=colour, marker="o", markersize=4, capsize=2, linewidth=1.2,
            label=name,
        )
    ax.set_title("nats that the latents carry", fontsize=10)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False)


# --- the answer's attention ---


@dataclass
class AnswerAttention:
    """Softmax weights of the row that predicts the answer's first token, mean over heads and layers; index
    0 intact, 1 corrupted.

    image [2,h,w] on the first image's tokens, latents [2,K] (K = 0 without latents), rest [2] on every other
    key that the row sees: each path's three parts sum to 1. logits [2,V] are that row's. float32 on the CPU.
    """

    image: torch.Tensor
    latents: torch.Tensor
    rest: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def answer_attention(model, batch, settings, layers, copied=None, fed=None):
    """One pair through both paths -> AnswerAttention.

    batch: of one record, with corrupted pixels (data.collate). layers: set of decoder layers to average over.
    copied: bool [1,L], the rows that the corrupted path takes from the intact one; None shares nothing.
    fed: bool [1,L], latents that each path feeds back to itself (feedback.py); None where there are none.
    """
    h, w, _ = model.image_processor.grids(batch["image_grid_thw"])[0][0]
    row = batch["answer_positions"][:, :1]  # [1,1]
    image = batch["image"][:, : h * w]  # [1,N]; the first image's come first
    cols = torch.cat([image, batch["latents"]], 1)  # [1,N+K]
    recorder = AttentionRecorder(layers, row.repeat(2, 1), cols.repeat(2, 1), attn_slice)
    inputs: Any = nullcontext()
    if fed is not None:
        both = [
            feedback.recurrence(model, batch | {"pixel_values": batch[pixels]}, fed)[0]
            for pixels in ("pixel_values", "pixel_values_cor")
        ]
        inputs = feedback.filled(model, torch.cat(both), fed.repeat(2, 1))
    with inputs:
        states = torch.cat(
            dual_forward(model, batch, copied, getattr(settings, "latent_copy", "kv"), recorder)
        )  # [2,L,D]
    weights = (
        torch.stack([x.mean(1)[:, 0] for x in recorder.slices.values()]).mean(0).float().cpu()
    )  # [2,N+K]
    return AnswerAttention(
        weights[:, : h * w].unflatten(1, (h, w)),
        weights[:, h * w :],
        1 - weights.sum(1),
        model.logits(states[:, int(row)]).float().cpu(),
    )


class Seen(data.RecordDataset):
    """Examples that remember the first image of each call, so that the picture drawn is the one
    the model was given.
    """

    def pixels(self, images):
        self.images = getattr(self, "images", []) + images[:1]
        return super().pixels(images)


def described(corruption):
    """What a corruption does, in words with units; of a function that is no corrupt.Corruption, its text."""
    if not isinstance(corruption, Corruption):
        return str(corruption)
    parts = []
    for mode, low, high in corruption.steps:
        strength = UNITS.get(mode, "{:g}").format(low)
        parts.append(f"{mode}, {strength}" + (f" to {high:g}" if high > low else ""))
    return "; then ".join(parts)


def attention_maps(model, fmt, settings, records, path, layers=None, corruption=None):
    """Where the answer looks in both paths, a line per record, as in figures 14 to 16 -> path of the PNG.

    settings: of the run, or None for a model that is not one. layers: set of decoder layers, None for all.
    corruption: corrupt.Corruption, by default the method's own, else CrystaL's. Brightness is the mean over
    heads and layers of true softmax weights, one scale for both paths of a record; boxes are the record's.
    What a path says is its greedy first token, green where the reference has it too. RecordError: no image,
    or boxes that are not four numbers each.
    """
    fig = figure(9.6 if fmt.count else 7.4, 4.1 * len(records) + 0.5)
    from matplotlib.colors import (
        LinearSegmentedColormap,  # after figure(), which tells of a missing matplotlib
    )

    settings = settings or Settings(method="sft")
    method = methods.get(settings.method)(settings)
    layers = set(range(len(model.layers))) if layers is None else layers
    corruption = corruption or method.corruption or Corruption()
    # A veil that lifts where the answer looks: colours stay true, and a question may be about them.
    veil = LinearSegmentedColormap.from_list("veil", [(0, 0, 0, 0.8), (0, 0, 0, 0)])
    bars = [1.2] if fmt.count else []
    lines = fig.subfigures(len(records), 1, squeeze=False)[:, 0]
    which = (
        "all layers" if len(layers) == len(model.layers) else f"layers {', '.join(map(str, sorted(layers)))}"
    )
    fig.suptitle(
        f"Attention of the token that predicts the answer, mean over heads and {which}\ncorruption: "
        f"{described(corruption)}",
        fontsize=10,
    )
    for line, record in zip(lines, records):
        examples = Seen(
            [record],
            lambda r, n: method.layout(fmt, r, n),
            model.image_processor,
            corruption,
            settings.seed,
            copies=fmt.copies,
        )
        batch = data.to_device(
            data.collate([examples.build(0, 0) | {"bad": []}], model.tokenizer.pad_token_id),
            model.device,
            model.hf.dtype,
        )
        copied = method.copied(batch) if hasattr(method, "copied") else None
        fed = None if not fmt.feeds_back else position_mask(batch["latents"], batch["input_ids"].shape[1])
        seen = answer_attention(model, batch, settings, layers, copied, fed)
        target = batch["targets"][0, batch["answer_positions"][0, 0]]
        question = " ".join(record.turns[-1][1].replace("<image>", "").split())
        line.suptitle(f"{tidy(question, 80)}   reference: {tidy(record.answer, 30)}", fontsize=11)
        axes = line.subplots(1, 2 + 2 * len(bars), width_ratios=([3] + bars) * 2)
        maps = axes[:: 1 + len(bars)]
        ends = [seen.image.min().item(), seen.image.max().item()]
        longest = max(seen.latents.max().item(), 1e-12) if bars else 1.0
        for p, (ax, image) in enumerate(zip(maps, examples.images)):
            heat = F.interpolate(seen.image[p][None, None], size=show(ax, image), mode="bilinear")[
                0, 0
            ].numpy()
            ax.imshow(heat, cmap=veil, vmin=ends[0], vmax=ends[1], extent=(0, image.width, image.height, 0))
            ax.set_xlabel(
                f"attention to an image token: {ends[0]:.2%} dark, {ends[1]:.2%} bright", fontsize=8
            )
            draw_boxes(ax, record)
            said = int(seen.logits[p].argmax())
            shares = (
                [f"image {seen.image[p].sum():.0%}"]
                + [f"latents {seen.latents[p].sum():.0%}"] * len(bars)
                + [f"rest {seen.rest[p]:.0%}"]
            )
            ax.set_title(
                f"{PATHS[p]}, says “{tidy(fmt.tokenizer.decode([said]).strip(), 20)}”\n{', '.join(shares)}",
                fontsize=9,
                color="darkgreen" if said == target else "firebrick",
            )
            if bars:
                chart = axes[2 * p + 1]
                count = len(seen.latents[p])  # of all segments
                chart.barh(range(1, count + 1), seen.latents[p].numpy(), color=COLOURS[p])
                chart.set(
                    xlim=(0, 1.05 * longest),
                    ylim=(count + 0.5, 0.5),
                    xticks=[0, longest],
                    xticklabels=["0", f"{longest:.1%}"],
                    yticks=range(1, count + 1, 1 + (count - 1) // 16),
                )
                chart.tick_params(labelsize=7)
                chart.set_title("each latent", fontsize=9)
    return save(fig, path)


def draw_boxes(ax, record):
    """The record's boxes [x0, y0, x1, y1], pixels of the image, as outlines. RecordError for anything else.
    """
    boxes = record.boxes if isinstance(record.boxes, list) else [record.boxes]
    for box in boxes:
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, Real) for v in box)):
            raise data.RecordError(
                f"{record.where}: field 'boxes': a list of [x0, y0, x1, y1] in pixels is needed, got "
                f"{str(box)[:60]}"
            )
        x0, y0, x1, y1 = box
        for colour, width in (("black", 2.6), ("white", 1.2)):  # seen on any background
            ax.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=colour, linewidth=width)


def tidy(text, n):
    """At most n characters; two prices in a question are not a formula of matplotlib's."""
    return (text if len(text) <= n else text[: n - 1] + "…").replace("$", r"\$")
