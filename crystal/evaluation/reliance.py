"""Are the latents used? Interventions on their hidden states, the answer's attention, and a verdict whose
rule is fixed beforehand.

    python -m crystal.evaluate --model runs/crystal --data runs/toy/test.jsonl --reliance

Dropping latents shortens the sequence to one that the model was never trained on, and attention mass says
where a model looks, not what it takes. The causal question is another: does the answer change when the
latents hold what they would hold for another image? So every condition below keeps weights, question and
positions, and replaces the hidden states of the K latents at the input of every decoder layer. All later
rows see a latent through its key and value alone, so replacing its states replaces all that the answer
can know of it.

    as trained                           everything as the model learned it
    latents dropped                      the sequence without them
    latents: mean, noise                 states replaced by their mean over the data, or by Gaussian noise of
                                         their mean and spread
    latents: swapped                     states of another image with another answer: the causal test
    image hidden, latents kept           every later row but the latents is blind to the image (LIVR's
                                         bottleneck), and the floor without latents
    image corrupted, latents intact      what CrystaL trains; and corrupted latents with it

THE RULE: the latents are used if, of the questions that are right under one of (as trained, swapped) alone,
so many more are right as trained that an exact sign test gives p < 0.05, and the paired 95 % interval of the
difference lies above 0. Where neither holds, and a use of more than 10 points could have gone unseen, the
questions are too few to tell.

B questions, L prompt length, K latents, N image tokens, M answer positions, H heads, D hidden size.
"""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from crystal.attention import AttentionRecorder, in_turn
from crystal.corrupt import Corruption
from crystal.evaluation import figures
from crystal.evaluation.interventions import (
    asked,
    hidden_image,
    images_seen_once,
    questions,
    recorded,
    replaced,
)
from crystal.evaluation.scoring import paired_interval, percent, score, sign_test, tidy, wilson
from crystal.generate import generate
from crystal.layout import IGNORE, Layout
from crystal.runtime import data, distributed
from crystal.runtime.config import UserError
from crystal.runtime.ops import attn_slice

RULE = "used if as trained more answers are right than swapped: exact sign test p < 0.05, interval above 0"
SEEN = 0.1  # a verdict of no use says that a use of more than so much would have been seen


@dataclass(frozen=True)
class Condition:
    """latents: keep or drop them. states: whose stand at the latents. hidden: the image is, from later rows.
    corrupted: the image is.
    """

    name: str
    latents: str = "keep"
    states: str = "own"
    hidden: bool = False
    corrupted: bool = False


AS_TRAINED = Condition("as trained")
SWAPPED = Condition("latents: swapped", states="swapped")
CONDITIONS = (
    AS_TRAINED,
    Condition("latents dropped", latents="drop"),
    Condition("latents: mean", states="mean"),
    Condition("latents: noise", states="noise"),
    SWAPPED,
    Condition("image hidden, latents kept", hidden=True),
    Condition("image hidden, latents dropped", hidden=True, latents="drop"),
    Condition("image corrupted, latents intact", corrupted=True, states="intact"),
    Condition("image corrupted, latents corrupted", corrupted=True),
)


# --- the numbers ---


def donors(records, seed=0):
    """For each record the index of one with another image and another answer, to
    swap latents with: [len(records)].

    If there is one, it was asked the same question; else it is of the same family; else any. UserError if
    all answers are alike.
    """
    g = torch.Generator().manual_seed(data.seed_of(seed, 1))
    keys: list[list[tuple]] = [
        [(0, str(r.turns)) for r in records],
        [(1, r.family) for r in records],
        [(2,) for r in records],
    ]
    groups = {}
    for tier in keys:
        for i, key in enumerate(tier):
            groups.setdefault(key, []).append(i)
    found = []
    for i, record in enumerate(records):
        for tier in keys:
            group = groups[tier[i]]
            start = int(torch.randint(len(group), (), generator=g))
            donor = next(
                (
                    j
                    for j in group[start:] + group[:start]
                    if tidy(records[j].answer) != tidy(record.answer) and records[j].images != record.images
                ),
                None,
            )
            if donor is not None:
                break
        if donor is None:
            raise UserError(
                f"--reliance: no other image with another answer than {record.answer!r} to swap "
                f"{record.where}'s latents with"
            )
        found.append(donor)
    return found


def verdict(trained, swapped):
    """Right or wrong [n] as trained and with swapped latents -> (used, one line in plain words).

    used: True, False, or None where the questions are too few to tell.
    """
    difference, low, high = paired_interval(trained, swapped)
    p = sign_test(trained, swapped)
    numbers = f"{100 * difference:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    numbers += f"; exact sign test, p = {p:.2g}"

    if p < 0.05 and low > 0:
        said = "The latents are used: with another image's latents fewer answers are right"
        return True, f"{said} ({numbers})."
    if p < 0.05 and high < 0:
        said = "The latents are not used to advantage: with another image's latents more answers are right"
        return False, f"{said} ({numbers})."
    if high > SEEN:
        said = f"These {len(trained)} questions cannot tell whether the latents are used"
        return None, f"{said}: a use of {100 * high:.0f} points could go unseen; ask more ({numbers})."
    said = "No use of the latents is shown: another image's latents leave as many answers right"
    return False, f"{said} ({numbers})."


@torch.no_grad()
def attention_mass(model, fmt, records, batch_size=16, procs=None, advance=lambda n: None):
    """Share of the answer positions' attention, by decoder layer, mean over heads, rows and questions ->
    {"latents": [..], "image": [..]}.

    The rows are those that predict the reference answer's tokens, with the answer given; the weights
    are the true softmax's.
    """
    procs = procs or distributed.Processes(device=model.device)
    examples = questions(model, fmt, records)
    ask, layers = examples.layout, range(len(model.layers))

    def layout(record, image_tokens):
        ids, image, latents = ask(record, image_tokens)
        whole = ids + fmt.text(record.answer)
        rows = list(range(len(ids) - 1, len(whole) - 1))
        return Layout(whole, [IGNORE] * len(whole), image, latents=latents, answer_positions=rows)

    examples.layout = layout
    sums = {name: torch.zeros(len(layers), dtype=torch.float64) for name in ("latents", "image")}
    mine = list(range(procs.rank, len(records), procs.world))
    for at in range(0, len(mine), batch_size):
        some = [examples[0, i] for i in mine[at : at + batch_size]]
        batch = data.collate(some, model.tokenizer.pad_token_id)
        if "error" in batch:
            raise data.RecordError(batch["error"])
        batch = data.to_device(batch, model.device, model.hf.dtype)

        # One forward, of which both slices are read.
        answer = batch["answer_positions"]
        recorders = {name: AttentionRecorder(layers, answer, batch[name], attn_slice) for name in sums}
        model.hidden(batch, recorder=in_turn(*recorders.values()))

        rows = (answer >= 0).sum(1)  # [B]
        for name, recorder in recorders.items():
            # A slice is [B,H,M,columns]: summed over its columns, a mean over heads and rows.
            masses = [A.sum(-1).mean(1).sum(1) / rows for A in recorder.slices.values()]
            sums[name] += torch.stack(masses).double().sum(1).cpu()  # of [layers,B]
        advance(len(rows))

    return {name: (procs.sum(total) / len(records)).tolist() for name, total in sums.items()}


@torch.no_grad()
def measure(
    model,
    fmt,
    records,
    corruption=Corruption(),
    batch_size=16,
    max_new_tokens=32,
    seed=0,
    procs=None,
    progress=False,
    biases=None,
    tell=lambda result: None,
):
    """A model with latents on records -> everything as one JSON object (see `summarise`); all ranks take
    their share and return the whole.

    corruption: a corrupt.Corruption. biases: function (batch) -> [attention_bias.AttentionBias], a mask under
    which all is asked. tell: called with each answer, a dict of index, condition, prediction and correct.
    Raises UserError if the prompts hold no latents, or no two answers differ.
    """
    procs = procs or distributed.Processes(device=model.device)
    kept = questions(model, fmt, records, "keep", corruption, seed)
    dropped = questions(model, fmt, records, "drop", corruption, seed)
    if len(records) < max(2, procs.world):
        raise UserError(f"--reliance: {len(records)} questions for {procs.world} process(es) are too few")
    count = latents_of_prompts(model, fmt, kept, len(records))

    partner = donors(records, seed)
    mine = list(range(procs.rank, len(records), procs.world))
    batches = [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]
    hidden = not (progress and procs.is_first and sys.stderr.isatty())
    bar = tqdm(total=3 * len(mine), desc="reliance", unit="question", disable=hidden, leave=False)

    results = []  # {"index", "condition", "prediction", "correct"}
    always = biases or (lambda batch: [])

    def answer(batch, prompts, condition, blind=lambda batch: []):
        both = (lambda batch: [*always(batch), *blind(batch)]) if condition.hidden or biases else None
        for i, prediction in zip(batch, generate(model, prompts, fmt, max_new_tokens, both)):
            correct = score(records[i], prediction)[1]
            result = {"index": i, "condition": condition.name, "prediction": prediction, "correct": correct}
            results.append(result)
            tell(result)

    sharing = ExitStack()
    features = sharing.enter_context(images_seen_once(model))

    # As trained; on the way, mean and spread of the latents' states over all questions.
    moments = None  # [2,layers,K,D]: sums of states and of their squares
    for batch in batches:
        features.clear()
        ask = asked(model, [kept.build(i, 0) for i in batch])
        with recorded(model, ask.where) as states:
            answer(batch, ask.prompts, AS_TRAINED)
        states = torch.stack(states).double()  # [layers,B,K,D]
        sums = torch.stack([states.sum(1), states.square().sum(1)])
        moments = sums if moments is None else moments + sums
        bar.update(len(batch))
    moments = procs.sum(moments) / len(records)
    mean = moments[0]  # [layers,K,D]
    spread = (moments[1] - moments[0].square()).clamp(min=0).sqrt()

    # Under every intervention.
    for batch in batches:
        features.clear()
        examples = {"keep": [kept.build(i, 0) for i in batch]}
        examples["drop"] = [asked_otherwise(dropped, i, e) for i, e in zip(batch, examples["keep"])]
        others = asked(model, [kept.build(partner[i], 0) for i in batch])
        intact = asked(model, examples["keep"])

        # The states that latents are given, [layers,B,K,D]: the mean, noise around it, and others' own.
        noise = []
        for i in batch:
            g = torch.Generator().manual_seed(data.seed_of(seed, 2, i))
            noise.append(torch.randn(mean.shape, generator=g, dtype=mean.dtype))
        sources = {
            "mean": mean[:, None].expand(-1, len(batch), -1, -1),
            "noise": mean[:, None] + spread[:, None] * torch.stack(noise, 1).to(mean.device),
        }
        for name, source in (("swapped", others), ("intact", intact)):
            with recorded(model, source.where) as sources[name]:
                generate(model, source.prompts, fmt, 1, biases)

        for condition in CONDITIONS[1:]:
            pixels = "pixel_values_cor" if condition.corrupted else "pixel_values"
            ask = asked(model, examples[condition.latents], pixels)
            if condition.hidden:
                answer(batch, ask.prompts, condition, hidden_image(ask))
            elif condition.states != "own":
                with replaced(model, ask.where, sources[condition.states]):
                    answer(batch, ask.prompts, condition)
            else:
                answer(batch, ask.prompts, condition)
        bar.update(len(batch))

    sharing.close()
    mass = attention_mass(model, fmt, records, batch_size, procs, bar.update)
    bar.close()
    summary = summarise(procs.gather(results), records, partner)
    return summary | {"attention": mass, "corruption": str(corruption), "seed": seed, "latents": count}


def asked_otherwise(examples, i, example):
    """Record i's example in the layout of other `examples`, its images prepared already."""
    grid = example["image_grid_thw"]
    counts = [] if grid is None else examples.image_processor.tokens(grid)
    return example | {"layout": examples.layout(examples.records[i], counts)}


def latents_of_prompts(model, fmt, kept, n):
    """How many latents stand in the prompts of n questions; UserError for none, or for different numbers."""
    counts = {len(kept.build(i, 0)["layout"].latents) for i in (0, n - 1)}
    if 0 in counts and fmt.count:
        raise UserError(
            f"{model.name}: it makes its latents while it answers (VaLR, --thought cot), and --reliance "
            "replaces those of a prompt; --latents drop asks it without them"
        )
    if 0 in counts:
        raise UserError(f"{model.name}: no latents stand in its prompts, so there is nothing to test")
    if len(counts) > 1:
        raise UserError(
            f"{model.name}: --reliance needs the same number of latents in every prompt, not {sorted(counts)}"
        )
    return counts.pop()


def summarise(results, records, partner):
    """Predictions of every condition -> questions, conditions (shares with intervals),
    followed, rule, used, verdict.

    followed: share of the answers that became the other image's answer when its latents were put in, and how
    many were that as trained.
    """
    table: dict[str, list] = {c.name: [None] * len(records) for c in CONDITIONS}
    for r in results:
        table[r["condition"]][r["index"]] = r
    right = {name: [r["correct"] for r in rows] for name, rows in table.items()}
    base, conditions = AS_TRAINED.name, []
    for name, rows in table.items():
        low, high = wilson(sum(right[name]), len(records))
        line = {"condition": name, "right": sum(right[name]) / len(records), "low": low, "high": high}
        if name != base:
            difference, low, high = paired_interval(right[name], right[base])
            line |= {
                "difference": difference,
                "difference_low": low,
                "difference_high": high,
                "changed": sum(r["prediction"] != t["prediction"] for r, t in zip(rows, table[base]))
                / len(records),
            }
        conditions.append(line)
    followed = {
        name: sum(score(records[j], r["prediction"])[1] for j, r in zip(partner, table[name])) / len(records)
        for name in (SWAPPED.name, base)
    }
    used, words = verdict(right[base], right[SWAPPED.name])
    return {
        "questions": len(records),
        "conditions": conditions,
        "followed": followed,
        "rule": RULE,
        "used": used,
        "verdict": words,
    }


# --- what a reader sees ---


def text(result):
    """The result of `measure` -> table, attention and verdict as lines."""
    lines = [
        f"{result['questions']} questions; percent right; differences to the first line are paired, with "
        f"95 % intervals; corruption {result['corruption']}",
        "condition".ljust(36)
        + "right".rjust(20)
        + "difference".rjust(12)
        + "95 % interval".rjust(18)
        + "answers changed".rjust(17),
    ]
    for c in result["conditions"]:
        line = c["condition"].ljust(36) + percent(c["right"], c["low"], c["high"]).rjust(20)
        if "difference" in c:
            interval = f"{100 * c['difference_low']:+.1f} to {100 * c['difference_high']:+.1f}"
            line += (
                f"{100 * c['difference']:+.1f}".rjust(12)
                + interval.rjust(18)
                + f"{100 * c['changed']:.1f}".rjust(17)
            )
        lines.append(line)
    lines.append(
        f"answers that are the other image's: {100 * result['followed'][SWAPPED.name]:.1f} % with its "
        f"latents, {100 * result['followed'][AS_TRAINED.name]:.1f} % as trained"
    )
    lines.append("attention of the answer positions by layer, percent")
    for name, mass in result["attention"].items():
        lines.append(
            f"  to {result['latents']} latents".ljust(20) if name == "latents" else "  to the image".ljust(20)
        )
        lines[-1] += "".join(f"{100 * m:6.1f}" for m in mass)
    return "\n".join([*lines, f"rule: {result['rule']}", f"verdict: {result['verdict']}"])


def picture(result, path):
    """Attention mass by layer, latents and image -> path of the PNG. UserError without matplotlib."""
    fig = figures.figure(5, 3.2)
    ax = fig.subplots()
    layers = range(len(result["attention"]["image"]))
    for (name, mass), colour in zip(result["attention"].items(), figures.COLOURS):
        ax.plot(
            layers,
            [100 * m for m in mass],
            "o-",
            color=colour,
            markersize=3,
            label=f"{result['latents']} latents" if name == "latents" else name,
        )
    ax.set(
        xlabel="decoder layer",
        ylabel="attention of the answer positions, %",
        ylim=(0, None),
        xticks=list(layers) if len(layers) < 13 else None,
    )
    ax.legend(frameon=False)
    titles = {True: "used", False: "no use shown", None: "too few questions to tell"}
    ax.set_title(titles[result["used"]], fontsize=10)
    return figures.save(fig, path)


def run(model, fmt, records, out, about, **how):
    """`measure`, printed by the first rank and written below `out`: reliance.json, reliance.txt,
    attention.png. about: what else the JSON says.
    """
    procs = how["procs"]
    started = time.perf_counter()
    result = measure(model, fmt, records, progress=True, **how)
    if procs.is_first:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        print(text(result))
        (out / "reliance.json").write_text(json.dumps(about | result, indent=1) + "\n")
        (out / "reliance.txt").write_text(text(result) + "\n")
        picture(result, out / "attention.png")
        print(
            f"wrote {out}/reliance.json, reliance.txt and attention.png in "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
    return result
