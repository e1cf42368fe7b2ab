"""Where latents lie beside image and text tokens (LIVR, figure 4), in the two directions that vary most.

LIVR draws t-SNE of the last layer's states. Here it is their principal components, which keep distances, need
no choice of settings and say how much they leave out; at three depths.

L sequence length, K latents, D hidden size, n points.
"""

from dataclasses import dataclass

import torch

from crystal.evaluation.gaze import rows_of
from crystal.evaluation.interventions import before_layers

POINTS = 12  # image and text tokens, of each, that a question gives
QUESTIONS = 25  # that give them


@dataclass
class States:
    """States of one depth in two dimensions: points {kind: [n,2]}, and how much of the variance each
    dimension keeps. between: the share of the latents' variance, in all D, that lies between questions and
    not between one latent and the next; None where the latents cannot be told apart by number.
    """

    depth: int
    points: dict
    kept: tuple
    between: float | None


def evenly(n, most):
    """At most `most` of the indices 0 to n - 1, evenly taken, the first and the last among them."""
    if n <= most:
        return list(range(n))
    if most == 1:
        return [n - 1]
    return [round(i * (n - 1) / (most - 1)) for i in range(most)]


@torch.no_grad()
def states_of(model, method, batch):
    """One record, its intact picture -> {depth: {kind: states [n,D]}}; at most POINTS of image and of text.

    Depths: before the first layer, before the middle one, and after the last and the final norm.
    """
    depths = sorted({0, len(model.layers) // 2})
    kept = {}

    def change(n, h, kwargs):
        # Where latents are fed back, shorter forwards come first; the last one is over the whole sequence.
        if n in depths:
            kept[n] = h[0].float().cpu()
        return h, kwargs

    with before_layers(model, change):
        kept[len(model.layers)] = method.hidden(model, batch)[0].float().cpu()

    places = {"image": batch["image"][0], "text": rows_of(batch)["text"], "latents": batch["latents"][0]}
    some = {}
    for kind, where in places.items():
        taken = where if kind == "latents" else where[evenly(len(where), POINTS)]
        some[kind] = taken.cpu()
    return {depth: {kind: h[at] for kind, at in some.items()} for depth, h in sorted(kept.items())}


def drawn(states):
    """What `states_of` gave of each question -> [States], a depth each."""
    found = []
    for depth in states[0] if states else []:
        kinds = {kind: [each[depth][kind] for each in states] for kind in states[0][depth]}
        together = {kind: torch.cat(parts) for kind, parts in kinds.items()}
        together = {kind: x for kind, x in together.items() if len(x)}
        flat, kept = plane(torch.cat(list(together.values())))
        parts = flat.split([len(x) for x in together.values()])
        points = dict(zip(together, parts))
        found.append(States(depth, points, kept, between_questions(kinds["latents"])))
    return found


def plane(x):
    """States [n,D] -> (their two principal components [n,2], the share of the variance in each).

    Each state is first divided by its root mean square, as the norm before the next layer does: else a few
    long ones are all that one sees. A component's sign is such that its largest coordinate is positive.
    """
    x = x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    x = x - x.mean(0)
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    flat = U[:, :2] * S[:2]
    largest = flat.gather(0, flat.abs().argmax(0, keepdim=True))  # [1,2]
    flat = flat * torch.where(largest < 0, -1.0, 1.0)
    share = S.square() / S.square().sum().clamp(min=1e-12)
    return flat, tuple(share[:2].tolist())


def between_questions(latents):
    """[K,D] of each question -> the share of their variance that lies between questions, 0 to 1.

    The rest lies between one latent and the next, and says nothing of a picture. None without latents, with
    one question, or where questions have different numbers of latents.
    """
    counts = {len(x) for x in latents}
    if len(latents) < 2 or len(counts) > 1 or 0 in counts:
        return None
    x = torch.stack(latents).double()  # [questions,K,D]
    total = (x - x.mean((0, 1))).square().sum()
    within = (x - x.mean(0)).square().sum()
    return float(within / total.clamp(min=1e-12))
