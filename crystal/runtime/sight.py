"""What a model gets to see of a data set, told before it trains on it.

Two mistakes show in nothing but a poor accuracy, hours later: pictures that become so few tokens that nothing
small is left of them, and a corruption that takes nothing away by the time the picture has been scaled to
what the model sees. Both can be read off some dozens of records.

P rows of pixel_values, I images of a record.
"""

import copy
import statistics
from dataclasses import dataclass
from types import SimpleNamespace

LOOKED = 8  # records, spread over the whole set; large photographs take a second each
FEW = 12  # tokens of a picture, below which a warning is due; the toy scenes have 16
SAME = 0.05  # share of a picture's contrast, below which the two paths see the same


@dataclass(frozen=True)
class Sight:
    """tokens: of each picture. moved, contrast: mean over the records, in the units of pixel_values.

    moved: the mean difference of both paths' pixels, None without a corrupted path. contrast: that of the
    intact path's pixels to their picture's mean.
    """

    tokens: list
    moved: float | None
    contrast: float

    @property
    def share(self):
        """What the corruption moves, as a share of the contrast."""
        return (self.moved or 0.0) / max(self.contrast, 1e-9)


def look(examples, count=LOOKED):
    """Some records of a data.RecordDataset, as the model would get them -> Sight, None without a picture.

    A broken record is passed over: whoever trains on it is told.
    """
    # Their pictures alone: no method is asked for a layout, and nobody's features are read.
    pictures = copy.copy(examples)
    pictures.layout = no_layout
    pictures.extras, pictures.skip = None, False

    stride = max(1, len(examples) // count)
    tokens, moved, contrasts = [], [], []
    for i in range(0, len(examples), stride)[:count]:
        example = pictures[0, i]
        if example.get("pixel_values") is None:
            continue
        pixels = example["pixel_values"].double()                                     # [P,..]
        tokens += examples.image_processor.tokens(example["image_grid_thw"])          # [I]
        contrasts.append(float((pixels - pixels.mean()).abs().mean()))
        if "pixel_values_cor" in example:
            moved.append(float((pixels - example["pixel_values_cor"]).abs().mean()))

    if not tokens:
        return None
    return Sight(tokens, statistics.fmean(moved) if moved else None, statistics.fmean(contrasts))


def no_layout(record, image_tokens):
    """In the place of a method's layout: a sequence of nothing, which no limit refuses."""
    return SimpleNamespace(ids=[])


def told(examples):
    """The lines that training prints of what a model gets to see of a data.RecordDataset."""
    seen = look(examples)
    if seen is None:
        return []

    middle = int(statistics.median_low(seen.tokens))
    lines = [f"pictures become {middle} tokens each ({min(seen.tokens)} to {max(seen.tokens)})"]
    if middle < FEW:
        lines.append(
            f"warning: {middle} tokens a picture are few, and what is smaller than one may not be seen; "
            "--min_pixels scales pictures up, --blind shows what is answered without seeing"
        )
    if examples.grey:
        lines.append("blind: every picture is replaced by a grey one")
    if examples.grey or seen.moved is None:
        return lines

    lines.append(
        f"both paths' pixels differ by {seen.moved:.3f} as the model sees them, "
        f"{100 * seen.share:.1f} % of a picture's contrast ({examples.corruption})"
    )
    if seen.share < SAME:
        lines.append(
            "warning: the corrupted path sees next to the same picture, so latents have nothing to tell it; "
            "a stronger --corruption takes more away, --calibrate measures how much"
        )
    return lines
