"""Asks a model the questions of records, in its share of the ranks, and scores what it says.

`answers` asks in one way: with or without latents, from intact, corrupted or grey images, under a mask or
none. `diagnose` asks in LIVR's four (its section 4.4.1).

B questions, M answer positions, K latents, H heads.
"""

import sys
import time

import torch
from tqdm import tqdm

from crystal.attention import AttentionRecorder
from crystal.attention_bias import AttentionBias
from crystal.evaluation.scoring import score
from crystal.generate import Query, answer_text, generate, thought_length, write
from crystal.methods.sft import Method as SFT
from crystal.runtime import data, distributed, ops
from crystal.runtime.config import UserError


class Bar:
    """How far a rank is: a bar on a terminal, elsewhere a line each half minute, both with the time left.

    Nothing without a name.
    """

    def __init__(self, total, name, procs, unit="question"):
        on = bool(name) and procs.is_first
        hidden = not (on and sys.stderr.isatty())
        self.bar = tqdm(total=total, desc=name, unit=unit, disable=hidden, leave=False)
        self.unit = unit
        self.lines = on and self.bar.disable
        self.name = name
        self.total = total
        self.done = 0
        self.started = time.perf_counter()
        self.told = self.started

    def update(self, n):
        self.bar.update(n)
        self.done += n
        now = time.perf_counter()
        if self.lines and now - self.told > 30:
            self.told = now
            left = (now - self.started) / self.done * (self.total - self.done)
            minutes = f"about {left / 60:.0f} min left"
            print(f"{self.name}: {self.done} of {self.total} {self.unit}s, {minutes}", flush=True)

    def close(self):
        self.bar.close()


def answers(
    model,
    fmt,
    records,
    batch_size=32,
    latents="keep",
    corruption=None,
    grey=False,
    seed=0,
    max_new_tokens=32,
    procs=None,
    progress="",
    biases=None,
    done=None,
    tell=lambda result: None,
):
    """Records -> one dict each, in order: id, family, question, answer, prediction, extracted, correct.

    latents: "keep"; "drop" leaves them out of the sequence; "mask" lets nothing but themselves see them;
    "free" lets the model write them, each result then says how many it wrote. corruption: a
    corrupt.Corruption answers from corrupted images; grey answers from grey ones. biases: function
    (batch) -> [attention_bias.AttentionBias], a mask at test time. Ranks share the records and all return
    the whole list. done: results of an earlier run by index, which are not asked again; tell is called
    with each new result.
    """
    procs = procs or distributed.Processes(device=model.device)
    if latents == "mask":
        latents, biases = "keep", hide_latents(fmt, biases)

    # The plain chat prompt: thought and latents are the model's to write.
    prompt = "none" if latents == "free" else latents
    examples = data.RecordDataset(
        records, lambda r, n: fmt.question(r.turns, n, prompt), model.image_processor, corruption, seed,
        grey=grey, copies=fmt.copies,
    )
    pixels = "pixel_values_cor" if corruption else "pixel_values"
    whole = data.RecordDataset(records, examples.layout, model.image_processor, copies=fmt.copies)

    # Each rank asks its share of what is left.
    done = done or {}
    left = [i for i in range(len(records)) if i not in done]
    mine, found = left[procs.rank :: procs.world], []
    bar = Bar(len(mine), progress, procs)
    for at in range(0, len(mine), batch_size):
        indices = mine[at : at + batch_size]
        # A question without a picture has nothing to corrupt.
        batch = [(examples if records[i].images else whole).build(i, 0) for i in indices]
        prompts = [Query(e["layout"].ids, e.get(pixels), e["image_grid_thw"]) for e in batch]
        said = ask_batch(model, fmt, prompts, latents, max_new_tokens, biases)
        for i, (prediction, own) in zip(indices, said):
            result = judged(records[i], i, prediction)
            if own is not None:
                result["latents"] = own
            found.append(result)
            tell(result)
        bar.update(len(batch))
    bar.close()
    return sorted([*done.values(), *procs.gather(found)], key=lambda f: f["index"])


def ask_batch(model, fmt, prompts, latents, max_new_tokens, biases):
    """Prompts -> [(answer, how many latents the model wrote itself: with latents "free", else None)]."""
    if latents != "free":
        return [(text, None) for text in generate(model, prompts, fmt, max_new_tokens, biases, latents)]
    room = max_new_tokens + thought_length(fmt, model.name)
    written = write(model, prompts, fmt, room, biases)
    return [(answer_text(model, fmt, ids), sum(token in fmt.latents for token in ids)) for ids in written]


def judged(record, index, prediction):
    """A record's result: what was asked, said, read in it, and whether that is right."""
    extracted, correct = score(record, prediction)
    question = record.turns[-1][1]
    return {
        "index": index,
        "id": record.id,
        "family": record.family or "all",
        "question": question if isinstance(question, str) else question[-1],
        "answer": record.answer,
        "prediction": prediction,
        "extracted": extracted,
        "correct": correct,
    }


# --- diagnostics ---


def hide_latents(fmt, biases=None):
    """A mask under which no row but a latent sees a latent (LaViT, table 3), added to `biases`:
    function (batch) -> [attention_bias.AttentionBias].
    """
    if not fmt.count or fmt.feeds_back or fmt.writes_own_latents:
        makes = " (the model makes them after it: --latents drop)" if fmt.count else ""
        raise UserError(f"--latents mask: the prompt holds no latents{makes}")

    def both(batch):
        ids = batch["input_ids"]
        latents = torch.isin(ids, torch.tensor(fmt.latents, device=ids.device))             # [B,L]
        own = biases(batch) if biases else []
        return [*own, AttentionBias(~latents, latents)]

    return both


def diagnose(model, fmt, method, records, **how):
    """LIVR's section 4.4.1 -> ({column: results of `answers`}, mean attention from answers
    to latents or None).

    Columns: as trained; latents dropped; under the method's mask, if it has one; and both.
    how: as for `answers`.
    """

    def mask(batch):
        return method.biases(model, batch)

    columns = {"as trained": {}}
    if fmt.count:
        columns["latents dropped"] = {"latents": "drop"}
    if type(method).biases is not SFT.biases:
        columns["bottleneck"] = {"biases": mask}
        if fmt.count:
            columns["bottleneck, dropped"] = {"latents": "drop", "biases": mask}

    found = {name: answers(model, fmt, records, progress=name, **c, **how) for name, c in columns.items()}
    if not fmt.count:
        return found, None
    batch_size, procs = how.get("batch_size", 32), how.get("procs")
    return found, attention_on_latents(model, fmt, method, records, batch_size, procs)


@torch.no_grad()
def attention_on_latents(model, fmt, method, records, batch_size=32, procs=None):
    """Share of attention that the rows which predict the reference answers give to the K latents together,
    no mask -> float.

    Mean over all layers, heads and answer positions of a record, then over records.
    """
    procs = procs or distributed.Processes(device=model.device)
    examples = data.RecordDataset(
        records, lambda r, n: method.layout(fmt, r, n), model.image_processor, copies=fmt.copies
    )
    total, mine = 0.0, list(range(procs.rank, len(records), procs.world))
    for at in range(0, len(mine), batch_size):
        built = [examples.build(i, 0) | {"bad": []} for i in mine[at : at + batch_size]]
        batch = data.collate(built, model.tokenizer.pad_token_id)
        batch = data.to_device(batch, model.device, model.hf.dtype)

        answer = batch["answer_positions"]                                                 # [B,M]
        recorder = AttentionRecorder(range(len(model.layers)), answer, batch["latents"], ops.attn_slice)
        method.hidden(model, batch, recorder)
        mass = torch.stack([x.sum(-1).mean(1) for x in recorder.slices.values()]).mean(0)  # [B,M]
        total += float((mass.sum(1) / (answer >= 0).sum(1)).sum())
    return procs.sum(total) / len(records)
