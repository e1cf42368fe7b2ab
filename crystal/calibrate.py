"""How strong a corruption has to be: what of a picture's worth can be learned from corrupted pictures alone.

    python -m crystal.train --calibrate                              the toy scenes
    python -m crystal.train --calibrate --data mine.jsonl --val_data val.jsonl --lr 1e-3 --batch_size 16

Latents carry what the second path cannot see for itself (section 3.3). So the corruption has to take away
what the answers need, and no paper says how to choose it. Asking an untrained model does not tell: nearly
every corruption is unlike anything it has seen. What counts is what can be *learned*. A probe is a short
plain fine-tuning, with the run's own flags, on pictures that are all corrupted alike, then asked about such
pictures; one probe sees them intact, and one sees grey ones. Of their difference, the picture's worth, each
candidate leaves a share:

    share = (CE_grey - CE_candidate) / (CE_grey - CE_intact)          and the same of the right answers

A share below 0 is worse than no picture: the probe takes what it sees for something else and has not yet
unlearned it, and the second path would have to do the same. So the rule: of the candidates whose share of
the CE is at most LEFT on either side of nothing, the one that leaves least; where there is none, the
nearest to nothing. It rests on the toy scenes (tutorials/results.md): there latents carried the more, the
more was taken away, and the answers lost nothing by it.

train.py hands its own main in, which trains the probes: each is a run in OUTPUT-calibration, without its
checkpoints, whose method is this very file's (`--method FILE`).
"""
import json
import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

from crystal.evaluation import figures
from crystal.layout import IGNORE
from crystal.losses import mean_per_pair
from crystal.methods import parse
from crystal.methods.sft import Method as SFT
from crystal.run_directory import logged_lines
from crystal.runtime import config, data, distributed
from crystal.runtime.config import UserError, setting
from crystal.runtime.ops import ce_rows
from crystal.training_data import toy_folder

CANDIDATES = "blur=2:5 blur=5:8 blur=8:10 mask=0.5:0.8 mask=0.8:1 noise=30:50 jigsaw=0.8"
LEFT = 0.15  # of the picture's worth in CE: as much may be left, or be missing
# What a probe says otherwise than the run that is calibrated.
OWN = (
    "method", "output", "max_steps", "eval_every", "save_every", "keep", "resume", "overwrite", "tensorboard",
    "blind", "latents", "latent_kind", "init_from",
)


# --- a probe's method ---


@dataclass(frozen=True)
class Settings(config.Settings):
    """Plain fine-tuning's, and what its pictures are corrupted by."""

    corruption: str = setting("", "what all pictures are corrupted by; empty: nothing")


class Method(SFT):
    """Plain fine-tuning on corrupted pictures, which counts its right answers.

    An answer is right if each of its tokens, the end included, is the likeliest one behind those before it:
    it is then what greedy decoding says.
    """

    Settings = Settings
    monitored = ("right",)

    @property
    def corruption(self):
        return config.corruption_of(self.settings.corruption) if self.settings.corruption else None

    def losses(self, model, batch, progress):
        """{"ce", "right"}: means over the batch's pairs, of a token mean and of 0 or 1."""
        if self.corruption:
            batch = {**batch, "pixel_values": batch["pixel_values_cor"]}
        labelled = batch["targets"] != IGNORE                    # [B,L]
        pair = labelled.nonzero()[:, 0]                          # [N]
        targets = batch["targets"][labelled]
        logits = model.logits(model.hidden(batch)[labelled])     # [N,V]

        likeliest = (logits.argmax(-1) == targets).to(logits.dtype)
        right = mean_per_pair(likeliest, pair, len(labelled)) == 1
        ce = mean_per_pair(ce_rows(logits, targets), pair, len(labelled))
        return {"ce": ce.mean(), "right": right.to(ce.dtype).mean()}


# --- what the probes found ---


@dataclass(frozen=True)
class Probe:
    """name: "intact", "grey" or a corruption. ce: nats of the validation answers. right: share of them."""

    name: str
    ce: float
    right: float


def share(probe, grey, intact, what):
    """What a probe leaves of the picture's worth in `what`, "ce" or "right"; NaN if it is worth nothing."""
    floor, top = getattr(grey, what), getattr(intact, what)
    if top == floor:
        return math.nan
    return (getattr(probe, what) - floor) / (top - floor) + 0.0  # never -0


def seen(grey, intact, count):
    """Whether the model that sees is better, beyond chance: the 95 % interval of the difference in right
    answers of two sets of `count`, as if they were two sets of questions, lies above 0.
    """
    spread = sum(p.right * (1 - p.right) / count for p in (grey, intact))
    return intact.ce < grey.ce and intact.right - grey.right > 1.96 * math.sqrt(spread)


def choice(candidates, grey, intact):
    """The candidate to take, by the rule above."""

    def left(probe):
        return share(probe, grey, intact, "ce")

    little = [probe for probe in candidates if abs(left(probe)) <= LEFT]
    return min(little, key=left) if little else min(candidates, key=lambda probe: abs(left(probe)))


def table(candidates, grey, intact):
    """Probes -> text: a line each, CE and right answers, and what is left of the picture's worth in both."""
    probes = (intact, *candidates, grey)
    width = 2 + max(len(probe.name) for probe in probes)
    lines = ["".ljust(width) + f"{'CE':>8}{'right':>9}{'left, in CE':>14}{'in right':>10}"]
    for probe in probes:
        in_ce, in_right = (100 * share(probe, grey, intact, what) for what in ("ce", "right"))
        numbers = f"{probe.ce:8.4f}{100 * probe.right:7.1f} %{in_ce:12.0f} %{in_right:8.0f} %"
        lines.append(probe.name.ljust(width) + numbers)
    return "\n".join(lines)


def draw(candidates, grey, intact, chosen, path):
    """The shares as bars, the chosen one's dark -> path of the PNG."""
    fig = figures.figure(6, 0.5 + 0.45 * len(candidates))
    axes = fig.subplots(1, 2, sharey=True)
    for ax, (what, title) in zip(axes, (("ce", "in CE"), ("right", "in right answers"))):
        shares = [100 * share(probe, grey, intact, what) for probe in candidates]
        colours = ["tab:blue" if probe == chosen else "lightsteelblue" for probe in candidates]
        ax.barh([probe.name for probe in candidates], shares, color=colours)
        ax.axvline(0, color="grey", lw=0.8)
        ax.axvline(100, color="grey", lw=0.8)
        ax.set_title(f"left of the picture's worth {title}, %", fontsize=9)
        ax.tick_params(labelsize=8)
    axes[0].axvspan(-100 * LEFT, 100 * LEFT, color="whitesmoke", zorder=0)
    axes[0].invert_yaxis()
    return figures.save(fig, path)


# --- the command ---


def probe_flags(settings):
    """A run's settings -> flags of train.py that a probe shares with it."""
    flags = []
    for field in fields(config.Settings):
        value = getattr(settings, field.name)
        if field.name in OWN or value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            flags.append(f"--{field.name}={value}")
    return flags


def measure(name, flags, out, updates, train, procs):
    """Trains one probe -> Probe of its last validation; its checkpoints go."""
    run = out / name
    corruption = "" if name in ("intact", "grey") else name
    blind = "--blind" if name == "grey" else "--no-blind"
    end = str(updates)
    train([
        "--method", str(Path(__file__).resolve()), *flags, f"--corruption={corruption}", blind,
        "--output", str(run), "--overwrite", "--max_steps", end, "--eval_every", end, "--save_every", end,
    ])

    last = logged_lines(run / "metrics.jsonl")[-1]
    if last["step"] != updates or "val_ce" not in last:
        raise UserError(f"{run}: stopped before its end; the same command begins anew")
    procs.barrier()  # all ranks have read
    if procs.is_first:
        shutil.rmtree(run / "checkpoints")
    return Probe(name, last["val_ce"], last["val_right"])


def candidates_of(given, settings):
    """--candidates and the run's own corruption -> their full names, blur=2:5 for blur, each once.

    UserError for one that is none. One of a method's own modes is left out, and it is said: a probe knows the
    built-in ones.
    """
    if not given.split():
        raise UserError("--candidates: names no corruption")
    names = []
    for text in given.split():
        try:
            names.append(str(config.corruption_of(text)))
        except UserError as error:
            raise UserError(str(error).replace("--corruption", "--candidates", 1)) from None

    own = getattr(settings, "corruption", "")
    if own:
        try:
            names.append(str(config.corruption_of(own)))
        except UserError:
            print(f"{own}: a mode of the method's own, which is not measured")
    return list(dict.fromkeys(names))


def main(argv=None, train=None):
    """argv: the run's flags and the two below. train: train.py's main."""
    parser = config.OneLineParser(
        prog="train.py --calibrate",
        description="Measures what corruptions leave of a picture's worth, and trains nothing else. All "
        "other flags are the run's.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--candidates", default=CANDIDATES, help=f"corruptions, separated by spaces; default: {CANDIDATES}"
    )
    parser.add_argument("--updates", type=int, default=100, help="of each probe; default 100")
    args, rest = parser.parse_known_args(argv)
    settings = parse(rest)

    # Mistakes are told before anything is trained.
    if args.updates < 1:
        raise UserError(f"--updates {args.updates}: must be at least 1")
    if settings.data and not settings.val_data:
        raise UserError("--calibrate: --data needs --val_data beside it, records that no probe trains on")
    if settings.eval_records < 1:
        raise UserError("--calibrate: --eval_records 0 leaves nothing to measure on")
    if settings.tune == "tokens":
        raise UserError("--calibrate: --tune tokens leaves nothing to train without latents; say --tune lora")
    names = candidates_of(args.candidates, settings)
    figures.figure(1, 1)  # whether there is something to draw with
    out = Path(f"{settings.run_dir}-calibration")  # beside the run

    procs = distributed.start(settings.device)
    found = {}
    for number, name in enumerate(("intact", "grey", *names), 1):
        procs.print(f"\n== probe {number} of {len(names) + 2}: {name}, {args.updates} updates")
        found[name] = measure(name, probe_flags(settings), out, args.updates, train, procs)
    if procs.is_first:
        report(found, names, settings, out)
    procs.stop()
    return out


def report(found, names, settings, out):
    """Prints the table and the level to take, and writes calibration.json and calibration.png."""
    intact, grey = found["intact"], found["grey"]
    candidates = [found[name] for name in names]
    print(f"\n{table(candidates, grey, intact)}")
    note = {"probes": [vars(probe) for probe in (intact, grey, *candidates)], "take": None}

    path = settings.val_data or f"{toy_folder(settings.seed)}/val.jsonl"
    val = data.read(path, settings.image_root)[0]
    if seen(grey, intact, min(settings.eval_records, len(val))):
        chosen = choice(candidates, grey, intact)
        note["take"] = chosen.name
        left = 100 * share(chosen, grey, intact, "ce")
        print(f"take --corruption {chosen.name}: it leaves {left:.0f} % of what a picture is worth in CE")
        print(draw(candidates, grey, intact, chosen, out / "calibration.png"))
    else:
        print(
            "no level can be named: with pictures the answers are no better than with grey ones, beyond "
            "chance. The model does not see what is asked, or has not learned to in so short a time: try "
            "more --updates, --min_pixels, --lora_on language,vision,merger or --tune full"
        )
    (out / "calibration.json").write_text(json.dumps(note, indent=1) + "\n")
