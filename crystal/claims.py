"""What a relative's paper says happens, held against a run: it happened, or it did not.

    livr    under the bottleneck its latents carry the answer (its section 4.4.1)
    lavit   its latents' gaze moves towards the teacher's, and what the last one says towards the teacher's
            semantics (its eq. 6 and 7)
    valr    its latents align with what the encoders see, and its words become likelier (its section 3)

LIVR's is asked: the same questions under the mask, with and without latents, with the paired 95 % interval of
the difference. The others' are read off the run's validations, the first and the last, whose means have no
interval here.
"""

from crystal import methods
from crystal.evaluation.scoring import paired_interval
from crystal.run_directory import logged_lines

# Of each method the terms of its validations that are to fall, and what that says.
FALLS = {
    "lavit": {
        "val_gaze": "its latents' gaze moves towards the teacher's (KL, eq. 7)",
        "val_semantics": "its last latent moves towards the teacher's semantics (1 - cosine, eq. 6)",
    },
    "valr": {
        "val_repa": "its latents align with what the encoders see (-cosine)",
        "val_ce": "its words and its answer become likelier (cross-entropy)",
    },
}


def told(method, run, found):
    """What a run of a method did of what its paper says -> lines, none for a method without a claim.

    found: {way of asking: results of asking.answers}, as evaluate.diagnose names the ways.
    """
    kind = methods.get(method)
    if issubclass(kind, methods.get("livr")):
        return bottleneck(found)
    for name, terms in FALLS.items():
        if issubclass(kind, methods.get(name)):
            return fallen(run / "metrics.jsonl", terms)
    return []


def bottleneck(found):
    """LIVR's: right answers under the mask, with latents and without."""
    kept, dropped = found.get("bottleneck"), found.get("bottleneck, dropped")
    if not kept or not dropped:
        return []
    right = [[result["correct"] for result in results] for results in (kept, dropped)]
    with_latents, without = (100 * sum(hits) / len(hits) for hits in right)
    mean, low, high = (100 * number for number in paired_interval(*right))
    return [
        f"{verdict(low > 0)}: with the image seen through latents alone they carry the answer. "
        f"{with_latents:.1f} % right with them, {without:.1f} % without: {mean:+.1f} points, "
        f"95 % interval {low:+.1f} to {high:+.1f}"
    ]


def fallen(log, terms):
    """Terms of a run's validations, the first and the last -> a line each, none of one measured once."""
    lines = logged_lines(log) if log.exists() else []
    found = []
    for name, claim in terms.items():
        measured = [line for line in lines if name in line]
        if len(measured) < 2:
            continue
        first, last = measured[0], measured[-1]
        values = f"{first[name]:.3f} after {first['step']} updates, {last[name]:.3f} after {last['step']}"
        found.append(f"{verdict(last[name] < first[name])}: {claim}. {values}")
    return found


def verdict(happened):
    """The beginning of a line."""
    return "it happened" if happened else "it did not happen"

