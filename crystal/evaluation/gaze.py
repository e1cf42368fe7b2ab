"""Where rows look in a picture, in LaViT's numbers: how sharply, and whether at what the question is about.

Definitions are the paper's, by its numbers, and computed by methods/lavit.py:
    A_traj    attention to an image token, mean over all layers, heads and rows, then min-max (eq. 2 and 3)
    focus     the share of A_traj on the tokens that the record's boxes touch (eq. 1)
    entropy   -sum p log p of A_traj as a distribution, in nats (eq. 10)
    salient   how many tokens have more than 1.5 times the mean (table 2)
    CV        of either over the questions: standard deviation / mean (table 2)
The paper's rows are a text's. Here three kinds of rows are kept apart: `text`, everything behind the last
image but the latents, which is the paper's; `answer`, what predicts the reference answer; and `latents`.

B records, P paths, M rows, N image tokens, H heads.
"""

import torch

from crystal.methods import lavit
from crystal.runtime.ops import attn_slice

LOOKERS = ("text", "answer", "latents")


def mean_of_rows(q, k, rows, cols, **how):
    """attn_slice, mean over heads and over the rows that are none of padding -> [B,K]. For a recorder."""
    A = attn_slice(q, k, rows, cols, **how)  # [B,H,M,K]
    return A.mean(1).sum(1) / (rows >= 0).sum(1, keepdim=True).clamp(min=1)


def rows_of(batch):
    """A batch of one record -> {looker: positions [M]}, those that have any."""
    ids = batch["input_ids"][0]
    latents = batch["latents"][0]
    place = torch.arange(len(ids), device=ids.device)
    text = (place > batch["image"].max()) & (batch["attention_mask"][0] == 1)
    text[latents] = False
    rows = {"text": text.nonzero()[:, 0], "answer": batch["answer_positions"][0], "latents": latents}
    return {looker: rows[looker] for looker in LOOKERS if len(rows[looker])}


def of_paths(rows, copied=None):
    """Rows [M] of a record -> [P,M] for its paths; -1 where the second takes the first one's states.

    copied: bool [1,L], the positions that it takes; None for one path. What attention makes of the corrupted
    path's own copied rows nobody reads, and each realisation of the copy leaves something else there.
    """
    if copied is None:
        return rows[None]
    return torch.stack([rows, rows.masked_fill(copied[0][rows], -1)])


def judge(record, size, views, means):
    """LaViT's numbers of one record -> {looker: [dict of each path]}; of the first image, in all its views.

    size: width and height of that image. views: its grids. means: {looker: [P,N]}, from `mean_of_rows`.
    """
    n = sum(view.tokens for view in views)
    target = None
    if record.boxes:
        target = torch.cat([lavit.inside(record.boxes, size, view) for view in views])

    found = {}
    for looker, paths in means.items():
        found[looker] = []
        for S in paths[:, :n]:
            A = lavit.normalise(S)
            numbers = {"entropy": float(lavit.entropy(A)), "salient": lavit.salient(A), "tokens": n}
            if target is not None:
                numbers["focus"] = float(lavit.focus(A, target))
                numbers["chance"] = float(target.float().mean())
            found[looker].append(numbers)
    return found


def over_questions(values):
    """Table 2: numbers of the questions -> mean, std (of n - 1), low, high and cv."""
    x = torch.tensor(values, dtype=torch.float64)
    std = float(x.std()) if len(x) > 1 else 0.0
    mean = float(x.mean())
    return {
        "mean": mean,
        "std": std,
        "low": min(values),
        "high": max(values),
        "cv": std / mean if mean else 0.0,
    }


def by_threshold(numbers, steps=9):
    """Figure 2: dicts with focus and right -> [(threshold, share right, questions)].

    Right among the questions whose focus is the threshold or more; the thresholds go evenly from 0 to the
    90th percentile of the scores.
    """
    scores = sorted(n["focus"] for n in numbers)
    top = scores[int(0.9 * (len(scores) - 1))]
    found = []
    for i in range(steps):
        threshold = top * i / (steps - 1)
        right = [n["right"] for n in numbers if n["focus"] >= threshold]
        found.append((threshold, sum(right) / len(right), len(right)))
    return found
