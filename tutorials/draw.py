"""Draws the figures of these pages from the shipped model, and from the metrics of two runs.

    python tutorials/draw.py                  every figure
    python tutorials/draw.py packed masks     these
    python tutorials/draw.py --train crystal  trains a run anew first: crystal or sketch, some minutes

`packed`, `masks` and `paths` are measured on the shipped model and take seconds; what was measured is kept
beside the picture (tutorials/figures/NAME.json). `losses`, `mass_kl` and `own_term` draw a run's metrics
(tutorials/figures/RUN/metrics.jsonl), `reliance` draws data_prep/checks/reliance.log.
tests/test_tutorial_figures.py measures again, takes the first updates of both runs again, and compares.
`make demo` draws attention.png.
"""

import argparse
import json
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import torch
from PIL import Image

import crystal.backbone.model
from crystal import methods, train
from crystal.attention_bias import additive_mask
from crystal.evaluation import figures
from crystal.latent_copy import dual_forward, pack, parts_of
from crystal.runtime import data, toy

FOLDER = ROOT / "tutorials" / "figures"
SKETCH = "tutorials/06_sketch.py"

# What a position is, and its colour: those of two_paths.svg.
COLOURS = {
    "image": "#9ec1a3",
    "corrupted image": "#5f8f66",
    "latents": "#f2b84b",
    "answer": "#8fb8de",
    "text": "#d9d9d9",
}
INTACT, CORRUPTED = "tab:blue", "tab:orange"

# The two runs, as train.py takes them; their scenes are made by `scenes`.
RUNS = {
    "crystal": "--method crystal --batch_size 16 --lr 1e-3 --lr_tokens 10 --labels answer --max_steps 240",
    "sketch": f"--method {SKETCH} --batch_size 8 --lr 2e-3 --lr_tokens 20 --masked 1 --max_steps 200",
}
ALWAYS = "--eval_records 64 --eval_every 60 --save_every 1000 --log_every 30 --seed 0 --overwrite"


# --- what is measured on the shipped model ---


def scenes(folder, train=1024, val=64, test=64):
    """Toy scenes in `folder` -> its training file."""
    toy.generate(folder, seed=0, train=train, val=val, test=test)
    return Path(folder) / "train.jsonl"


def one(flags, folder):
    """The shipped model, a method, and a batch of the first toy record -> (model, method, batch)."""
    model = crystal.backbone.model.load("tiny")
    method, fmt = methods.attach(model, methods.parse(flags.split()))
    records, _ = data.read(scenes(folder, 1, 1, 1))
    examples = data.RecordDataset(
        records, lambda r, n: method.layout(fmt, r, n), model.image_processor, method.corruption
    )
    return model, method, data.collate([examples[0, 0]], model.tokenizer.pad_token_id)


def kinds(batch):
    """What each position of a batch of one record is -> [L] names."""
    names = ["text"] * batch["input_ids"].shape[1]
    for name, at in (("image", "image"), ("latents", "latents"), ("answer", "answer_positions")):
        for position in batch[at][0].tolist():
            names[position] = name
    return names


def drawn_mask(biases, attention_mask):
    """A mask as rows of signs: # what a row sees, + what it sees dimmed, . what it does not see."""
    factor = additive_mask(biases, attention_mask)[0, 0].exp()  # [L,L]
    signs = np.array([".", "+", "#"])[(factor > 0).int() + (factor == 1).int()]
    return ["".join(row) for row in signs]


def measure_packed():
    """The packed mask of one pair: its rows, what each position is, and where the five parts begin."""
    with tempfile.TemporaryDirectory() as folder:
        _, method, batch = one("--method crystal", folder)
    copied = method.copied(batch)
    image = batch["mm_token_type_ids"] == 1
    packed = pack(batch["attention_mask"], image, copied)

    names = kinds(batch)
    packed_names = [names[position] for position in packed.source[0].tolist()]
    bounds = parts_of(batch["attention_mask"][0], image[0], copied[0], 0)
    edges = np.cumsum([0] + [end - start for start, end in bounds]).tolist()
    for position in range(edges[1], edges[2]):
        if packed_names[position] == "image":
            packed_names[position] = "corrupted image"
    rows = drawn_mask(packed.blocks, (packed.source >= 0).long())
    return {"rows": rows, "names": packed_names, "edges": edges}


def measure_masks():
    """The mask of each method on one record: {title: its rows and what each position is}."""
    teacherless = "--w_gaze 0 --w_semantics 0"
    panels = {
        "sft": ("--method sft", lambda method, *_: []),
        "crystal, both paths": ("--method crystal --latents 4", lambda method, *_: []),
        "livr, stage 1": ("--method livr --latents 4", lambda method, *of: method.biases(*of)),
        "lavit, 20 % of the run": (
            f"--method lavit --latents 4 {teacherless}",
            lambda method, *of: method.gated(*of, method.gamma(0.2)),
        ),
        "valr": ("--method valr --latents 4 --encoders none", lambda method, *_: []),
    }
    found = {}
    for title, (flags, biases) in panels.items():
        with tempfile.TemporaryDirectory() as folder:
            model, method, batch = one(flags, folder)
        rows = drawn_mask(biases(method, model, batch), batch["attention_mask"])
        found[title] = {"rows": rows, "names": kinds(batch)}
    return found


@torch.no_grad()
def measure_paths():
    """How far apart both paths are at each layer's input and each position, as a share of the intact state's
    length, with the copy and without: {"names": [L], "copied": [layers,L], "alone": [layers,L]}.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, method, batch = one("--method crystal --corruption blur=5", folder)
    found = {"names": kinds(batch)}
    copied = method.copied(batch)
    for name, at in (("copied", copied), ("alone", torch.zeros_like(copied))):
        inputs = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            for layer in model.layers
        ]
        dual_forward(model, batch, at, "hidden")
        for hook in hooks:
            hook.remove()

        h_int, h_cor = torch.stack(inputs).unbind(1)  # [layers,L,D] each
        apart = (h_int - h_cor).norm(dim=-1) / h_int.norm(dim=-1)
        found[name] = [[round(x, 4) for x in row] for row in apart.tolist()]
    return found


def measure_constant():
    """The squared error of two constant predictions of tutorial 06's colours, over the training scenes: one
    colour for each token, whatever the picture, and one colour for all.
    """
    sketch = sys.modules[methods.get(str(ROOT / SKETCH)).__module__]
    model = crystal.backbone.model.load("tiny")
    with tempfile.TemporaryDirectory() as folder:
        records, _ = data.read(scenes(folder, 256, 1, 1))
        pictures = [data.load_image(record.images[0], record.where) for record in records]
        pixels = model.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    seen = sketch.colours(pixels, len(pictures))  # [B,N,3]
    by_token = (seen - seen.mean(0)).square().mean().item()
    one_for_all = (seen - seen.mean((0, 1))).square().mean().item()
    return {"a colour for each token": round(by_token, 6), "one colour for all": round(one_for_all, 6)}


def measure_reliance():
    """data_prep/checks/reliance.log -> {"open", "bottleneck": {condition: [(difference, low, high)]}}.
    """
    number = r"([-+]\d+\.\d)"
    line = re.compile(rf"(.+?) +\d+\.\d ±\d+\.\d +{number} +{number} to {number} +\d+\.\d")
    found, conditions = {}, {}
    for text in (ROOT / "data_prep/checks/reliance.log").read_text(encoding="utf-8").splitlines():
        if model := re.match(r"(open|bottleneck), seed \d+:", text):
            conditions = found.setdefault(model[1], {})
        elif match := line.fullmatch(text):
            conditions.setdefault(match[1], []).append([float(x) for x in match.groups()[1:]])
    return found


def measure_carrying():
    """data_prep/tiny/carrying.log -> {run: {"gain", "swap": [(update, nats, half of the interval)]}}."""
    number = r"(-?\d+\.\d+)"
    line = re.compile(rf"step (\d+)  gain {number} ±{number}  swap {number} ±{number}")
    found, run = {}, {}
    for text in (ROOT / "data_prep/tiny/carrying.log").read_text(encoding="utf-8").splitlines():
        if title := re.match(r"([a-z ]+), seed \d+:", text):
            run = found.setdefault(title[1], {"gain": [], "swap": []})
        elif match := line.fullmatch(text):
            step, *values = [float(x) for x in match.groups()]
            run["gain"].append([step, *values[:2]])
            run["swap"].append([step, *values[2:]])
    return found


# --- runs ---


def trained(name, output, folder):
    """Trains a run of RUNS on toy scenes in `folder` -> its directory."""
    file = scenes(folder)
    where = ["--data", str(file), "--val_data", str(file.with_name("val.jsonl")), "--output", str(output)]
    return train.main([*RUNS[name].split(), *ALWAYS.split(), *where])


def keep(name, run):
    """A run's metrics to five digits, without speed and memory, in tutorials/figures/NAME."""
    lines = []
    for text in (Path(run) / "metrics.jsonl").read_text().splitlines():
        values = {n: v for n, v in json.loads(text).items() if n not in ("tokens_per_s", "peak_memory_gb")}
        lines.append(json.dumps({n: float(f"{v:.5g}") if n != "step" else v for n, v in values.items()}))
    target = FOLDER / name / "metrics.jsonl"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(lines) + "\n")


# --- drawing ---


def strips(ax, names, size):
    """What each position is, as a coloured strip along the top and the left of a mask."""
    from matplotlib.patches import Rectangle

    for i, name in enumerate(names):
        ax.add_patch(Rectangle((i, -size), 1, size, color=COLOURS[name], clip_on=False, linewidth=0))
        ax.add_patch(Rectangle((-size, i), size, 1, color=COLOURS[name], clip_on=False, linewidth=0))


def show_mask(ax, rows, names, size=4):
    """A mask's rows, dark where a row sees a column; strips say what each position is."""
    shade = {"#": 1.0, "+": 0.5, ".": 0.0}
    cells = np.array([[shade[sign] for sign in row] for row in rows])
    L = len(cells)
    ax.imshow(cells, cmap="Greys", vmin=0, vmax=1.3, extent=(0, L, L, 0), interpolation="nearest")
    strips(ax, names, size)
    ax.set(xlim=(-size, L), ylim=(L, -size), xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)


def key(names, more=()):
    """Patches for a legend: a colour for each kind of position, and greys for what is seen."""
    from matplotlib.patches import Patch

    found = [Patch(color=COLOURS[name], label=name) for name in COLOURS if name in names]
    return found + [Patch(facecolor=colour, edgecolor="#999", label=label) for label, colour in more]


SEEN = (("seen", "#404040"), ("not seen", "#ffffff"))
DIMMED = (("seen", "#404040"), ("dimmed by ln γ", "#a0a0a0"), ("not seen", "#ffffff"))


def draw_packed(path):
    found = kept("packed")
    fig = figures.figure(7.6, 5.2)
    fig.set_layout_engine("none")
    ax = fig.add_axes((0.18, 0.02, 0.62, 0.9))
    show_mask(ax, found["rows"], found["names"])
    edges, L = found["edges"], len(found["rows"])
    for edge in edges[1:-1]:
        ax.plot([0, L], [edge, edge], color="firebrick", linewidth=0.8)
        ax.plot([edge, edge], [0, L], color="firebrick", linewidth=0.8)
    labels = ("prefix", "I_cor Q thought", "I_int Q thought\nlatents", "answer (int)", "answer (cor)")
    middles = [(start + end) / 2 for start, end in pairwise(edges)]
    ax.set(yticks=middles, yticklabels=labels)
    ax.tick_params(labelsize=9, length=0)
    ax.set_title(f"One pair as one sequence of {L} positions: which column each row sees", fontsize=10)
    handles = key(found["names"], SEEN)
    fig.legend(handles=handles, loc="center right", fontsize=8, frameon=False)
    return figures.save(fig, path)


def draw_masks(path):
    found = kept("masks")
    fig = figures.figure(9.6, 6.6)
    axes = fig.subplots(2, 3).flatten()
    for ax, (title, panel) in zip(axes, found.items()):
        show_mask(ax, panel["rows"], panel["names"])
        ax.set_title(title, fontsize=11)
    axes[-1].axis("off")
    axes[-1].legend(handles=key(COLOURS.keys() - {"corrupted image"}, DIMMED), loc="center", fontsize=10)
    fig.suptitle("Rows look at columns: one record in every method's mask", fontsize=11)
    return figures.save(fig, path)


def draw_paths(path):
    found = kept("paths")
    fig = figures.figure(9.0, 4.0)
    L = len(found["names"])
    highest = max(max(map(max, found[name])) for name in ("copied", "alone"))
    titles = {"copied": "latents copied before every layer", "alone": "nothing copied"}
    axes = fig.subplots(2, 1, sharex=True)
    for ax, (name, title) in zip(axes, titles.items()):
        layers = len(found[name])
        cells = ax.imshow(
            found[name], cmap="magma_r", vmin=0, vmax=highest, extent=(0, L, layers, 0), aspect="auto"
        )
        from matplotlib.patches import Rectangle

        for i, kind in enumerate(found["names"]):
            ax.add_patch(Rectangle((i, -0.7), 1, 0.6, color=COLOURS[kind], clip_on=False, linewidth=0))
        ax.set(yticks=[i + 0.5 for i in range(layers)], yticklabels=range(layers), xticks=[])
        ax.set_ylim(layers, -0.7)
        ax.set_ylabel("layer's input", fontsize=9)
        ax.set_title(title, fontsize=10)
        ax.tick_params(labelsize=8, length=0)
        for side in ax.spines.values():
            side.set_visible(False)
    bar = fig.colorbar(cells, ax=axes, shrink=0.8)
    bar.set_label("how far apart the paths are", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    fig.legend(handles=key(found["names"]), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figures.save(fig, path)


def draw_losses(path):
    return smaller(figures.loss_curves(FOLDER / "crystal", path))


def smaller(path, factor=1):
    """A picture with a side shrunk by `factor` and 256 colours, so that the file stays below 150 kB."""
    picture = Image.open(path).convert("RGB").reduce(factor)
    picture.quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)
    return path


def draw_mass_kl(path):
    training, _ = figures.read_metrics(FOLDER / "crystal")
    steps = [step for step, _ in training["kl"]]
    smoothed = {n: figures.smooth([v for _, v in training[n]], 9) for n in ("kl", "mass_int", "mass_cor")}

    fig = figures.figure(9.0, 3.8)
    left, right = fig.subplots(1, 2)
    left.plot(steps, smoothed["kl"], color="black", label="kl")
    left.set_xlabel("update", fontsize=9)
    left.set_ylabel("kl, nats a position", fontsize=9)
    mass = left.twinx()
    for name, colour, label in (("mass_int", INTACT, "intact"), ("mass_cor", CORRUPTED, "corrupted")):
        mass.plot(steps, [100 * x for x in smoothed[name]], color=colour, label=f"mass, {label}")
    mass.set_ylabel("attention to the latents, percent", fontsize=9)
    lines = left.get_lines() + mass.get_lines()
    fig.legend(lines, [line.get_label() for line in lines], loc="outside lower left", ncols=3, fontsize=8)

    x = [100 * v for v in smoothed["mass_int"]]
    right.plot(x, smoothed["kl"], color="#bbbbbb", linewidth=0.8, zorder=1)
    points = right.scatter(x, smoothed["kl"], c=steps, cmap="viridis", s=10, zorder=2)
    right.set_xlabel("attention to the latents, intact path, percent", fontsize=9)
    right.set_ylabel("kl, nats a position", fontsize=9)
    bar = fig.colorbar(points, ax=right)
    bar.set_label("update", fontsize=9)
    left.set_yscale("log")
    right.set_yscale("log")
    for ax in (left, mass, right, bar.ax):
        ax.tick_params(labelsize=8)
    return figures.save(fig, path)


def draw_reliance(path):
    found = measure_reliance()
    titles = {"open": "image in sight", "bottleneck": "through the latents alone"}
    fig = figures.figure(9.6, 4.4)
    axes = fig.subplots(1, 2, sharey=True, sharex=True)
    shades = ("#2e6f95", "#5a94b8", "#9cc0d8")
    for ax, (model, title) in zip(axes, titles.items()):
        conditions = list(found[model])
        for seed, shade in enumerate(shades):
            values = np.array([found[model][condition][seed] for condition in conditions])  # [conditions,3]
            difference, low, high = values.T
            places = np.arange(len(conditions)) + 0.26 * (seed - 1)
            errors = np.clip([difference - low, high - difference], 0, None)
            ax.barh(places, difference, 0.24, xerr=errors, color=shade, label=f"seed {seed}",
                    error_kw={"linewidth": 0.9, "capsize": 1.5})  # fmt: skip
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set(yticks=range(len(conditions)), yticklabels=conditions)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("points, against the model as trained", fontsize=9)
        ax.tick_params(labelsize=9)
    axes[0].invert_yaxis()
    labelled = axes[0].get_legend_handles_labels()
    fig.legend(*labelled, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figures.save(fig, path)


def draw_carrying(path):
    fig = figures.figure(6.4, 3.0)
    ax = fig.add_subplot()
    ax.axhline(0, color="#999", linewidth=0.8)
    for (run, numbers), colour in zip(measure_carrying().items(), ("#1f77b4", "#d62728")):
        step, gain, half = zip(*numbers["gain"])
        ax.errorbar(step, gain, half, color=colour, marker="o", markersize=4, capsize=3, label=run)
    ax.set_xlabel("updates")
    ax.set_ylabel("gain, nats of the answer")
    ax.set_xlim(0, None)
    ax.legend(frameon=False, loc="upper left")
    return figures.save(fig, path)


def draw_own_term(path):
    training, _ = figures.read_metrics(FOLDER / "sketch")
    steps, values = zip(*training["sketch"])
    fig = figures.figure(6.6, 3.8)
    ax = fig.subplots()
    ax.plot(steps, values, color=INTACT, alpha=0.3, linewidth=0.8)
    ax.plot(steps, figures.smooth(values, 9), color=INTACT, linewidth=1.6, label="the term, in training")
    for (name, value), style in zip(kept("own_term").items(), ("-", "--")):
        ax.axhline(value, color="firebrick", linestyle=style, linewidth=1.2, label=f"constant: {name}")
    ax.set_yscale("log")
    ax.set_xlabel("update", fontsize=9)
    ax.set_ylabel("sketch, squared error", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, frameon=False)
    return figures.save(fig, path)


def draw_corruptions(path):
    with tempfile.TemporaryDirectory() as folder:
        records, _ = data.read(scenes(folder, 1, 1, 1).with_name("test.jsonl"))
        figures.corruption_grid(data.load_image(records[0].images[0], records[0].where), path)

    return smaller(path, 3)


# --- what there is ---

# Measured in seconds on the shipped model: a test measures them all again.
MEASURED = {
    "packed": measure_packed,
    "masks": measure_masks,
    "paths": measure_paths,
    "own_term": measure_constant,
}
DRAWN = {
    "corruptions": draw_corruptions,
    "packed": draw_packed,
    "masks": draw_masks,
    "paths": draw_paths,
    "losses": draw_losses,
    "mass_kl": draw_mass_kl,
    "reliance": draw_reliance,
    "carrying": draw_carrying,
    "own_term": draw_own_term,
}


def kept(name):
    """What was measured for a figure."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(DRAWN)}; default: all")
    parser.add_argument("--train", choices=RUNS, action="append", default=[], help="train it anew first")
    args = parser.parse_args(argv)
    if unknown := set(args.figures) - DRAWN.keys():
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(DRAWN)}")

    for name in args.train:
        with tempfile.TemporaryDirectory() as folder:
            keep(name, trained(name, ROOT / "runs" / "tutorials" / f"figure_{name}", folder))
    for name in args.figures or DRAWN:
        if name in MEASURED:
            text = json.dumps(MEASURED[name](), indent=0)
            (FOLDER / f"{name}.json").write_text(text + "\n")
        print(DRAWN[name](FOLDER / f"{name}.png"))


if __name__ == "__main__":
    main()
