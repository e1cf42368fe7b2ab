"""Does the tiny base see, and does blur hide what it sees? One table, and exit code 1 if not.

Fresh scenes of the demo's distribution, none of them in any training set, and every question asked alone.
Three answers to each: the base's, the base's on the image blurred by 5 pixels, and the blind twin's, which
was trained like the base but on grey images and gets one here. An answer counts if greedy decoding gives
exactly it, and then ends the turn.

The bar: in at least four families, relation among them, the base is at least 15 points above the blind model
at the lower end of the 95 % interval and at most 85 % right; and in at least three, blur removes at least
half of that margin.

    python data_prep/tiny/check.py     # 1,000 questions a family, 3 to 6 minutes on two cores
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)

from crystal.runtime import config, toy

ASSETS = Path(__file__).resolve().parents[2] / "crystal" / "assets"
GREY = Image.new("RGB", (toy.SIDE, toy.SIDE), (128, 128, 128))
BLUR = ImageFilter.GaussianBlur(5)


@dataclass
class Row:
    """Shares right, 0 to 1, of n questions of one family; margin is base minus blind, spread half
    its 95 % interval.
    """

    family: str
    n: int
    blind: float
    base: float
    blurred: float
    margin: float
    spread: float

    @property
    def sees(self):
        return self.margin - self.spread >= 0.15 and self.base <= 0.85

    @property
    def removed(self):
        """Share of the margin that is gone on blurred images."""
        return (self.base - self.blurred) / self.margin if self.margin > 0 else 0.0


@torch.no_grad()
def right(model, tokenizer, processor, images, questions):
    """bool [len(questions)]: whether greedy decoding answers exactly.

    Greedy decoding gives an answer exactly if, with the answer as input, each of its tokens and the end of
    the turn are the most likely next ones; that takes one forward. Padding is on the right, where a causal
    model cannot see it.
    """
    rows, starts = [], []
    for question in questions:
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * toy.CELLS**2)).input_ids
        starts.append(len(prompt))
        rows.append(prompt + tokenizer(question.answer + "<|im_end|>").input_ids)
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    seen = processor(images=images, return_tensors="pt")
    guess = model(
        input_ids=ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=seen["pixel_values"],
        image_grid_thw=seen["image_grid_thw"],
    ).logits.argmax(-1)
    hits = [
        (guess[i, start - 1 : len(row) - 1] == ids[i, start : len(row)]).all()
        for i, (row, start) in enumerate(zip(rows, starts))
    ]
    return torch.stack(hits)


def measure(base, blind, tokenizer, processor, per_family, seed=0, batch=50):
    """A Row per family."""
    hits = {family: [] for family in toy.FAMILIES}
    for start in range(0, per_family * len(toy.FAMILIES), batch):
        drawn = [toy.draw_pair("demo", "check", seed, i) for i in range(start, start + batch)]
        questions = [question for _, question in drawn]
        sharp = [Image.fromarray(toy.render(scene)) for scene, _ in drawn]
        answers = torch.stack(
            [
                right(blind, tokenizer, processor, [GREY] * len(drawn), questions),
                right(base, tokenizer, processor, sharp, questions),
                right(base, tokenizer, processor, [image.filter(BLUR) for image in sharp], questions),
            ],
            1,
        ).float()  # [batch, 3]
        for question, answer in zip(questions, answers):
            hits[question.family].append(answer)
    rows = []
    for family, found in hits.items():
        found = torch.stack(found)
        gain = found[:, 1] - found[:, 0]  # the same questions, so the difference is taken per question
        rows.append(
            Row(
                family,
                len(found),
                *found.mean(0).tolist(),
                gain.mean().item(),
                1.96 * gain.std().item() / len(found) ** 0.5,
            )
        )
    return rows


def table(rows):
    """Rows -> a Markdown table."""
    lines = [
        "| family | questions | blind | base | base - blind (95 %) | base, blurred | margin removed | "
        "meets the bar |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r.family} | {r.n} | {100 * r.blind:.1f} | {100 * r.base:.1f} | {100 * r.margin:.1f} +- "
            f"{100 * r.spread:.1f} "
            f"| {100 * r.blurred:.1f} | {100 * r.removed:.0f} % | {'yes' if r.sees else 'no'} |"
        )
    return "\n".join(lines)


def met(rows):
    """Whether the bar above is met."""
    seen = [r.family for r in rows if r.sees]
    return len(seen) >= 4 and "relation" in seen and sum(r.sees and r.removed >= 0.5 for r in rows) >= 3


def load(folder, weights=None):
    """The model in a directory, in float32, with the weights of another safetensors file if given."""
    if weights is None:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(folder)
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=load_file(weights), dtype=torch.float32
    ).eval()


def main():
    parser = config.OneLineParser(description="Check the shipped tiny base and its blind twin.")
    parser.add_argument("--base", default=ASSETS / "tiny", type=Path, help="model directory")
    parser.add_argument(
        "--blind", default=ASSETS / "blind" / "model.safetensors", type=Path, help="weights of the blind twin"
    )
    parser.add_argument("--per_family", type=int, default=1000, help="questions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.base / "config.json").is_file():
        raise config.UserError(f"--base {args.base}: no directory with a config.json")
    if not args.blind.is_file():
        raise config.UserError(f"--blind {args.blind}: no such file")
    if args.per_family < 1:
        raise config.UserError(f"--per_family {args.per_family}: must be at least 1")
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(args.base),
        AutoImageProcessor.from_pretrained(args.base),
    )
    rows = measure(
        load(args.base), load(args.base, args.blind), tokenizer, processor, args.per_family, args.seed
    )
    print(table(rows))
    print("the bar is met" if met(rows) else "the bar is NOT met")
    sys.exit(not met(rows))


if __name__ == "__main__":
    config.run_cli(main)
