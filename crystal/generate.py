"""Ask a model: prompts in, answers out, greedily.

    python -m crystal.generate --model runs/crystal/merged --image photo.jpg --question "What colour is the small star?"

B questions, L prompt length (left-padded), P patches.
"""
import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from crystal import config, data
from crystal.config import UserError
from crystal.export import open_model


def generate(model, prompts, fmt, max_new_tokens=64, streamer=None):
    """Prompts as `write` takes them -> list of decoded answers."""
    return [answer_text(model, fmt, ids) for ids in write(model, prompts, fmt, max_new_tokens, streamer)]


@torch.no_grad()
def write(model, prompts, fmt, max_new_tokens=64, streamer=None):
    """prompts: list of (ids, pixel_values [P,..] or None, image_grid_thw [I,3] or None) -> list of the ids written after each.

    streamer: an object with put(tokens [B]) and end(), told each step's tokens as they come (first put: the prompts).
    """
    B, L = len(prompts), max(len(ids) for ids, _, _ in prompts)
    pad = model.tokenizer.pad_token_id
    input_ids = torch.full((B, L), pad, dtype=torch.long)
    mask = torch.zeros(B, L, dtype=torch.long)
    for i, (ids, _, _) in enumerate(prompts):
        input_ids[i, L - len(ids) :] = torch.tensor(ids)
        mask[i, L - len(ids) :] = 1
    images = {}
    if any(p is not None for _, p, _ in prompts):
        images = {"pixel_values": torch.cat([p for _, p, _ in prompts if p is not None]).to(model.device, model.hf.dtype),
                  "image_grid_thw": torch.cat([g for _, _, g in prompts if g is not None]).to(model.device)}
    out = model.hf.generate(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device),
                            mm_token_type_ids=(input_ids == fmt.image).int().to(model.device), **images,
                            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=fmt.end, pad_token_id=pad, streamer=streamer)
    return out[:, L:].tolist()


def answer_text(model, fmt, ids):
    """Ids that a model wrote -> the answer: what stands after `<answer>`, if it wrote one, else all; no special tokens, trimmed."""
    if fmt.count and fmt.open in ids:
        ids = ids[ids.index(fmt.open) + 1 :]
    if fmt.count and fmt.close in ids:
        ids = ids[: ids.index(fmt.close)]
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def thought_length(fmt, name):
    """Tokens that a model needs for the thought, its latents and the tags, if it is to write them itself. UserError if it has none."""
    if not fmt.count:
        raise UserError(f"--latents free: {name} has no latents that it could write; a run directory of a method with latents is needed")
    return len(fmt.thinking()[0]) + 2


def main(argv=None):
    parser = config.OneLineParser(prog="generate.py", description="Ask a run, a checkpoint or an exported directory one question.")
    parser.add_argument("--model", default="tiny", help="a run directory, an exported directory, tiny, or a hub name")
    parser.add_argument("--checkpoint", default="best", help="of a run: best, last or a step")
    parser.add_argument("--image", action="append", default=[], help="an image file; give it again for several")
    parser.add_argument("--question", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--latents", default="keep", choices=("keep", "drop", "free"), help="keep the thought and its latents in the prompt, leave the latents out, or let the model write them itself")
    args = parser.parse_args(argv)
    model, fmt, _ = open_model(args.model, args.checkpoint)
    images = [data.load_image(path, "--image") for path in args.image]
    out = model.image_processor(images=images, return_tensors="pt") if images else {}
    counts = model.image_tokens(out["image_grid_thw"]) if images else []
    ids, _, _ = fmt.question([("user", "<image>" * len(images) + args.question)], counts, "none" if args.latents == "free" else args.latents)
    room = thought_length(fmt, args.model) if args.latents == "free" else 0
    print(generate(model, [(ids, out.get("pixel_values"), out.get("image_grid_thw"))], fmt, args.max_new_tokens + room)[0])


if __name__ == "__main__":
    config.run_cli(main)
