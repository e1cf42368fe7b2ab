"""What one sees inside a run, as plain data: who looks where, where latents lie, what interventions change.

page.py makes a page of it. Each question is looked at in one forward, the reference answer given and no mask
of the method's own set: both paths as training runs them where the method has two, else the one path. The
answers are those of reliance.py, about the same pictures, corrupted alike.

P paths, T looking tokens, H heads, N image tokens, K latents, L sequence length, V vocabulary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from crystal.attention import AttentionRecorder, in_turn
from crystal.corrupt import Corruption
from crystal.evaluation import figures, gaze, latent_space, reliance
from crystal.evaluation.asking import answers
from crystal.evaluation.interventions import questions
from crystal.evaluation.latent_space import evenly
from crystal.latent_copy import dual_forward
from crystal.opening import find
from crystal.runtime import data
from crystal.runtime.config import UserError
from crystal.runtime.ops import attn_slice

ANSWERS, LATENTS = 4, 8  # looking tokens of a sample: the answer's first ones, and latents, evenly taken
SIDE = 24  # rows and columns of a stored map; of a larger grid neighbours are merged
BYTES = 6 * 2**20  # for the maps of all samples, a byte a number


@dataclass
class Sample:
    """One question with its pictures, attention and answers.

    images: PIL, the intact one and of two paths the corrupted one. tokens: names of the T that look. copied:
    of each, whether the corrupted path takes its states from the intact one and has no attention of its own
    there. grid: rows and columns of a map. layers, heads: those that are kept. image [P,T,1+layers,1+heads,
    rows*columns]: softmax weights on the first image's first view; latents [.., K]: on each latent; share
    [.., 2]: on all image tokens, on all latents. Index 0 of layers and of heads is the mean over all that
    were asked for. said: each path's likeliest first token. answers: {condition: (text, whether right)}.
    other: the answer of the record whose latents are put in, if any.
    """

    record: data.Record
    images: list
    tokens: list
    copied: list
    grid: tuple
    layers: list
    heads: list
    image: torch.Tensor
    latents: torch.Tensor
    share: torch.Tensor
    said: list
    answers: dict
    other: str


@dataclass
class Inside:
    """Everything that `measure` found.

    looks: {looker: a list over paths of one dict a question, gaze.judge's and whether the answer is right}.
    states: [latent_space.States]. reliance: reliance.measure's summary, or None and why in one sentence.
    right: whether each question is answered rightly as trained. two_paths: whether the method has them.
    count: its latents. layers, heads: the model's. shown: questions whose states are drawn. corruption: in
    words.
    """

    samples: list
    looks: dict
    states: list
    reliance: dict | None
    why: str
    right: list
    two_paths: bool
    count: int
    layers: int
    heads: int
    shown: int
    corruption: str


def measure(model, fmt, method, settings, records, count=4, layers=None, progress=False):
    """A run and records with a picture and an answer -> Inside.

    The first `count` records become samples, all are answered and looked at. layers: set of decoder layers
    whose maps are kept, None for all. RecordError for a record that cannot be prepared.
    """
    two_paths = has_two_paths(method)
    found, summary, partner, why = asked(model, fmt, method, settings, records, progress)
    right = [found[i][reliance.AS_TRAINED.name][1] for i in range(len(records))]

    examples = figures.Seen(
        records,
        lambda r, n: method.layout(fmt, r, n),
        model.image_processor,
        method.corruption if two_paths else None,
        settings.seed,
        grey=settings.blind,
        copies=fmt.copies,
    )
    layers = sorted(set(range(len(model.layers))) if layers is None else layers)
    budget = BYTES // (max(1, min(count, len(records))) * (2 if two_paths else 1))

    samples, looks, states, heads = [], {}, [], 0
    for i, record in enumerate(records):
        examples.images = []
        batch = data.collate([examples.build(i, 0) | {"bad": []}], model.tokenizer.pad_token_id)
        batch = data.to_device(batch, model.device, model.hf.dtype)
        views = model.image_processor.grids(batch["image_grid_thw"])[0]
        seen, means, logits = look(model, method, settings, batch, layers if i < count else [])

        for looker, paths in gaze.judge(record, examples.images[0].size, views, means).items():
            columns = looks.setdefault(looker, [[] for _ in paths])
            for column, numbers in zip(columns, paths):
                column.append(numbers | {"right": right[i]})
        if i < latent_space.QUESTIONS:
            states.append(latent_space.states_of(model, method, batch))
        if seen is not None:
            heads = seen.shape[3]
            sample = Sample(
                record=record,
                images=examples.images,
                tokens=names_of(model, batch),
                copied=method.copied(batch)[0, looking(batch)].tolist() if two_paths else [],
                said=[model.tokenizer.decode([int(token)]).strip() for token in logits.argmax(-1)],
                answers=found[i],
                other=records[partner[i]].answer if partner else "",
                **bounded(batch, seen, views[0], layers, budget),
            )
            samples.append(sample)

    corruption = figures.described(method.corruption or Corruption())
    return Inside(
        samples,
        looks,
        latent_space.drawn(states),
        summary,
        why,
        right,
        two_paths,
        fmt.count,
        len(model.layers),
        heads,
        len(states),
        corruption,
    )


def has_two_paths(method):
    """Whether a method runs a corrupted path that takes latents from the intact one."""
    return method.corruption is not None and hasattr(method, "copied")


# --- answers ---


def evaluated(run, step):
    """What `evaluate --reliance` left in a run directory -> (its newest result or None, where from in words).

    step: the name of the checkpoint that is looked into; a result of another one is told and left. UserError
    for a file that is not such a result.
    """
    files = sorted(Path(run).glob("reliance/*/reliance.json"), key=lambda file: file.stat().st_mtime_ns)
    if not files:
        return None, ""
    file = files[-1]
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        missing = {"verdict", "rule", "conditions"} - result.keys()
        missing |= {"condition", "right", "low", "high"} - set.intersection(*map(set, result["conditions"]))
        if missing:
            raise KeyError(missing)
        source = f"Read from {file}: {result['questions']} questions of {result['data']}, "
        source += f"corruption {result['corruption']}."
        which = result["checkpoint"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not a result of crystal.evaluate --reliance") from None

    of = find(run, which).name
    if of != step:
        return None, f"{file} is of the checkpoint {of} (--checkpoint {which}) and not shown. "
    return result, source


def asked(model, fmt, method, settings, records, progress=False):
    """Records under every intervention that the method allows.

    -> ([{condition: (answer, right)} of each], reliance.measure's summary or None, donors or None, why none).
    """
    corruption = method.corruption or Corruption()
    found = [{} for _ in records]
    summary, partner, why = None, None, ""
    try:
        if settings.blind:
            raise UserError("the run was trained blind, and there is nothing to take away")
        if len(records) < 2:
            raise UserError("one question has no other whose latents it could be given")
        kept = questions(model, fmt, records, "keep", corruption, settings.seed)
        reliance.latents_of_prompts(model, fmt, kept, len(records))
        partner = reliance.donors(records, settings.seed)
    except data.RecordError:
        raise
    except UserError as error:
        why = str(error)

    if not why:

        def tell(result):
            found[result["index"]][result["condition"]] = (result["prediction"], result["correct"])

        summary = reliance.measure(
            model, fmt, records, corruption, seed=settings.seed, progress=progress, tell=tell
        )
        in_order = [condition.name for condition in reliance.CONDITIONS]
        return [{name: each[name] for name in in_order} for each in found], summary, partner, why

    ways = {reliance.AS_TRAINED.name: {"grey": settings.blind}}
    if fmt.count:
        ways["latents dropped"] = {"latents": "drop", "grey": settings.blind}
    if not settings.blind:
        ways["image corrupted"] = {"corruption": corruption, "seed": settings.seed}
    for name, how in ways.items():
        for result in answers(model, fmt, records, 16, progress=name if progress else "", **how):
            found[result["index"]][name] = (result["prediction"], result["correct"])
    return found, None, None, why


# --- attention ---


def looking(batch):
    """A batch of one record -> positions of the T tokens whose maps are kept: of the answer, then latents."""
    answer = batch["answer_positions"][0][:ANSWERS]
    latents = batch["latents"][0]
    return torch.cat([answer, latents[evenly(len(latents), LATENTS)]])


@torch.no_grad()
def look(model, method, settings, batch, layers):
    """One record's forward -> (seen, means, logits).

    seen: [P,T,layers,H,N+K] weights of the tokens of `looking` in these layers, on the image tokens, then the
    latents, 0 for a token whose states are the other path's; None without layers. means: {looker: [P,N], over
    all layers, heads and rows}, less a path that has no rows of its own. logits [P,V]: of the row that
    predicts the answer's first token. float32 on the CPU.
    """
    copied = method.copied(batch) if has_two_paths(method) else None
    P = 1 if copied is None else 2
    image = batch["image"]
    columns = torch.cat([image, batch["latents"]], 1)  # [1,N+K]
    every = range(len(model.layers))

    recorders = {
        looker: AttentionRecorder(every, gaze.of_paths(rows, copied), image.repeat(P, 1), gaze.mean_of_rows)
        for looker, rows in gaze.rows_of(batch).items()
    }
    tokens = gaze.of_paths(looking(batch), copied)  # [P,T]
    each = AttentionRecorder(layers, tokens, columns.repeat(P, 1), attn_slice)
    watch = in_turn(each, *recorders.values())
    if copied is not None:
        h = dual_forward(model, batch, copied, settings.latent_copy, watch)
    else:
        h = [method.hidden(model, batch, watch)]

    first = batch["answer_positions"][0, 0]
    logits = model.logits(torch.cat([x[:, first] for x in h])).float().cpu()
    means = {}
    for looker, recorder in recorders.items():
        looks = (recorder.rows >= 0).any(1)  # [P]; nothing of a path whose rows are all copied
        means[looker] = recorder.mean()[looks].float().cpu()
    seen = None
    if layers:
        maps = torch.stack(list(each.slices.values()), 2)  # [P,H,layers,T,N+K]
        seen = maps.permute(0, 3, 2, 1, 4).float().cpu()
    return seen, means, logits


def bounded(batch, seen, view, layers, budget):
    """What `look` saw of a record -> {"grid", "layers", "heads", "image", "latents", "share"} of Sample.

    view: the grid of the first image's first view. budget: numbers of maps that a path may keep.
    """
    N, K = batch["image"].shape[1], batch["latents"].shape[1]
    T, H = seen.shape[1], seen.shape[3]
    grid = (min(view.rows, SIDE), min(view.columns, SIDE))

    # The means over all layers and heads stand first, and are taken before any is left out.
    seen = torch.cat([seen.mean(2, keepdim=True), seen], 2)
    seen = torch.cat([seen.mean(3, keepdim=True), seen], 3)  # [P,T,1+layers,1+H,N+K]
    many_layers, many_heads = fitting(len(layers), H, T * (grid[0] * grid[1] + K), budget)
    some_layers = evenly(len(layers), many_layers)
    some_heads = evenly(H, many_heads)
    seen = seen[:, :, [0] + [i + 1 for i in some_layers]]
    seen = seen[:, :, :, [0] + [i + 1 for i in some_heads]]

    latents = seen[..., N:]
    share = torch.stack([seen[..., :N].sum(-1), latents.sum(-1)], -1)
    image = merged(seen[..., : view.rows * view.columns], (view.rows, view.columns), grid)
    kept = [layers[i] for i in some_layers]
    return {
        "grid": grid, "layers": kept, "heads": some_heads,
        "image": image, "latents": latents, "share": share,
    }  # fmt: skip


def fitting(layers, heads, cells, budget):
    """How many layers and heads are kept, so that these and their means, `cells` numbers each, fit a budget.

    The larger of both is halved until they do, or one of each is left.
    """
    while (layers + 1) * (heads + 1) * cells > budget and max(layers, heads) > 1:
        if heads >= layers:
            heads = math.ceil(heads / 2)
        else:
            layers = math.ceil(layers / 2)
    return layers, heads


def merged(maps, view, grid):
    """maps [..,N] of a view's rows and columns -> [.., rows*columns of grid], the mean of what is merged."""
    if view == grid:
        return maps
    pictures = maps.reshape(-1, 1, *view)
    return F.adaptive_avg_pool2d(pictures, grid).reshape(*maps.shape[:-1], -1)


def names_of(model, batch):
    """The names of the T tokens of `looking`."""
    targets = batch["targets"][0]
    ids = batch["input_ids"][0]
    answer = batch["answer_positions"][0][:ANSWERS].tolist()
    names = []
    for number, t in enumerate(answer, 1):
        token = int(targets[t]) if targets[t] >= 0 else int(ids[t + 1])
        names.append(f"answer {number}: “{model.tokenizer.decode([token]).strip()}”")
    K = batch["latents"].shape[1]
    return names + [f"latent {i + 1} of {K}" for i in evenly(K, LATENTS)]
