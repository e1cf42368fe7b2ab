"""Do the latents carry anything? Gain, swap and drop, in nats, at every validation.

reliance.py asks a trained model questions and counts its answers. This is its small sister for the
training loop: nothing is decoded, and what is measured is the cross-entropy of the answer's tokens.

    gain   what the intact path's latents take off the corrupted path's, against its own latents
    swap   what another record's latents, one with another answer, add to the intact path's
    drop   what it adds that nobody sees the latents, for methods without a corrupted path

All three are 0, up to their interval, as long as the answer does not come through the latents.

Latents reach the rows after them through their states alone, which are replaced before every decoder
layer. Blocks of eight records are measured whatever the batch size, so that a record's donor does not
depend on it, nor on the number of processes.

B records of a block, L sequence length, K latents, M answer positions, D hidden size.
"""

import math

import torch

from crystal.attention_bias import AttentionBias
from crystal.evaluation.interventions import recorded, replaced
from crystal.evaluation.scoring import tidy
from crystal.layout import IGNORE
from crystal.losses import mean_per_pair
from crystal.run_directory import logged_lines
from crystal.runtime import data
from crystal.runtime.ops import ce_rows

BLOCK = 8  # records that are measured together, and among which each has its donor
RECORDS = 64  # of the validation set, the first ones


@torch.no_grad()
def measure(objective, method, examples, pad, procs, dtype, stopped=lambda: False):
    """Gain, swap and drop over the first validation records -> {name: mean, name_pm: half of its interval}.

    objective: train.Objective, in evaluation mode. examples: a RecordDataset; broken records are left out.
    Every process measures every world-th block. {} for a method without latents, and no entry for a number
    that no record has: swap, where all answers of a block are alike. stopped: asked before each block; once
    it says so no more are measured, and the result means nothing.
    """
    if not method.tokens:
        return {}

    found = []  # (block, name, value of a record)
    for start in range(BLOCK * procs.rank, min(RECORDS, len(examples)), BLOCK * procs.world):
        if stopped():
            break
        block = range(start, min(start + BLOCK, RECORDS, len(examples)))
        whole = {i: examples[0, i] for i in block}
        whole = {i: example for i, example in whole.items() if "error" not in example}
        if not whole:
            continue
        batch = data.to_device(data.collate(list(whole.values()), pad), procs.device, dtype)
        donor = donors([examples.records[i] for i in whole])
        with objective.autocast:
            numbers = of_block(objective.model, method, batch, donor)
        found += [(start, name, value) for name, values in numbers.items() for value in values.tolist()]

    # Added up in the blocks' order, so that every number of processes gives the same sum.
    found = sorted(procs.gather(found), key=lambda entry: entry[0])
    results = {}
    for name in ("gain", "swap", "drop"):
        values = torch.tensor([value for _, of, value in found if of == name], dtype=torch.float64)
        if len(values) > 1:
            results[name] = float(values.mean())
            results[f"{name}_pm"] = float(1.96 * values.std() / math.sqrt(len(values)))
    return results


SENTENCES = {
    "gain": "the intact path's latents take {0:.3f} nats off the corrupted path's answer",
    "swap": "another record's latents cost {0:.3f} nats of the answer",
}


class News:
    """A sentence when gain or swap first leaves its noise, once in a run's life."""

    def __init__(self, run=None):
        """run: the directory of a run that goes on, whose log says what has been told."""
        log = run / "metrics.jsonl" if run else None
        lines = logged_lines(log) if log and log.exists() else []
        self.told = {name for name in SENTENCES for line in lines if clear(line, f"val_{name}")}

    def of(self, step, measured):
        """What measure() returned after an update -> the sentences to print."""
        fresh = [name for name in SENTENCES if clear(measured, name) and name not in self.told]
        self.told.update(fresh)
        return [
            f"step {step}: {SENTENCES[name].format(measured[name])} "
            f"(95 % interval {measured[name] - measured[f'{name}_pm']:.3f} "
            f"to {measured[name] + measured[f'{name}_pm']:.3f}): they carry something"
            for name in fresh
        ]


def clear(numbers, name):
    """Whether the interval of a number lies above 0."""
    return numbers.get(name, 0.0) > numbers.get(f"{name}_pm", math.inf)


def donors(records):
    """For each record the place of the next one with another image and another answer, -1 without one."""
    found = []
    for i, record in enumerate(records):
        others = [(i + step) % len(records) for step in range(1, len(records))]
        fit = [
            j
            for j in others
            if records[j].images != record.images and tidy(records[j].answer) != tidy(record.answer)
        ]
        found.append(fit[0] if fit else -1)
    return found


def of_block(model, method, batch, donor):
    """A batch of B records and their donors' places -> {"gain", "swap" or "drop": a number per record}."""
    where = batch["latents"]  # [B,K]
    if not where.shape[1]:
        return {}
    # A whole sequence's forward; a method that feeds states back has shorter ones too.
    L = batch["input_ids"].shape[1]

    with recorded(model, where, L) as states:
        intact = answer_ce(model, method.hidden(model, batch), batch)  # [B]
    numbers = {}

    if method.corruption:
        corrupted = {**batch, "pixel_values": batch["pixel_values_cor"]}
        own = answer_ce(model, method.hidden(model, corrupted), batch)
        with replaced(model, where, states, L):
            given = answer_ce(model, method.hidden(model, corrupted), batch)
        numbers["gain"] = own - given
    else:
        latents = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
        latents.scatter_(1, where.clamp(min=0), where >= 0)
        unseen = [AttentionBias(~latents, latents)]
        numbers["drop"] = answer_ce(model, method.hidden(model, batch, biases=unseen), batch) - intact

    has_donor = [i for i, j in enumerate(donor) if j >= 0]
    if has_donor:
        at = [max(j, 0) for j in donor]
        theirs = [layer[at] for layer in states]
        shared = where.masked_fill(where[at] < 0, -1)  # a donor with fewer latents has nothing for the others
        with replaced(model, shared, theirs, L):
            swapped = answer_ce(model, method.hidden(model, batch), batch)
        numbers["swap"] = (swapped - intact)[has_donor]
    return numbers


def answer_ce(model, h, batch):
    """Cross-entropy of each record's answer, mean over its tokens -> [B]. h [B,L,D]: the last states."""
    at = batch["answer_positions"]  # [B,M]
    rows = at.clamp(min=0)
    targets = batch["targets"].gather(1, rows)
    read = (at >= 0) & (targets != IGNORE)

    h = h.gather(1, rows[:, :, None].expand(-1, -1, h.shape[2]))  # [B,M,D]
    ce = ce_rows(model.logits(h[read]), targets[read])
    pair = read.nonzero()[:, 0]
    return mean_per_pair(ce, pair, len(at))
