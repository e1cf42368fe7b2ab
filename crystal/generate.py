"""Ask a model: prompts in, answers out, greedily. transformers generates; latents fed back by the model
itself need a loop of ours.

The rules are the same for both: each token is the likeliest by the model's logits alone, until the answer
ends or has its length. What a directory's generation_config.json says (penalties, beams, least lengths,
suppressed tokens) decides nothing here.

    python -m crystal.generate --model runs/crystal/merged --image photo.jpg --question "What colour
    is the small star?"

B questions, L prompt length (padded to the left for transformers, to the right in `decode_feedback`), P
patches, K latents, D hidden size, V vocabulary.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from crystal.attention_bias import additive_mask
from crystal.feedback import Stream
from crystal.opening import model_flags, open_model
from crystal.runtime import config, data, distributed
from crystal.runtime.config import UserError

# What evaluation writes beside its answers; the rules are those of this file's first paragraphs.
DECODING = "greedy, by the logits alone"


class Query(NamedTuple):
    """What a model is asked: the ids of a layout.Prompt, and its images as the processor made them."""

    ids: list[int]  # L of them
    pixel_values: torch.Tensor | None  # [P,..], None without images
    image_grid_thw: torch.Tensor | None  # [I,3]


def generate(model, prompts, fmt, max_new_tokens=64, biases=None, latents="keep", streamer=None):
    """Prompts and the rest as `write` takes them -> list of decoded answers."""
    return [
        answer_text(model, fmt, ids)
        for ids in write(model, prompts, fmt, max_new_tokens, biases, latents, streamer)
    ]


@torch.no_grad()
def write(model, prompts, fmt, max_new_tokens=64, biases=None, latents="keep", streamer=None):
    """prompts: a list of Query, or of tuples of its fields -> list of the ids written after each.

    biases: function (batch) -> [attention_bias.AttentionBias] over the prompts, as a method's `biases`; what
    is generated sees of its prompt what the prompt's last row sees. latents: "drop" keeps a model that writes
    or opens its latents itself from doing so; other formats leave them out of the prompt. streamer: an object
    with put(tokens [B]) and end(), told each step's tokens as they come (first put: the prompts).
    """
    batch = padded(model, fmt, [Query(*prompt) for prompt in prompts])
    B, L = batch["input_ids"].shape
    kinds = (batch["input_ids"] == fmt.image).int()
    if fmt.feeds_back:
        whole = {"pixel_values": None, "image_grid_thw": None, **batch, "mm_token_type_ids": kinds}
        return decode_feedback(model, whole, fmt, max_new_tokens, latents, streamer)

    # A method's mask is asked for with the row that answers: the prompt's last one.
    blocked = []
    if biases:
        blocked = biases(batch | {"answer_positions": torch.full((B, 1), L - 1, device=model.device)})
    masked = nullcontext()
    if blocked:
        masked = model.seeing(additive_mask(blocked, batch["attention_mask"]))

    never = {"suppress_tokens": fmt.latents} if latents == "drop" and fmt.writes_own_latents else {}
    with masked:
        out = model.hf.generate(
            **model.keywords(batch | {"mm_token_type_ids": kinds}),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=fmt.end,
            pad_token_id=model.tokenizer.pad_token_id,
            streamer=streamer,
            **never,
        )
    return out[:, L:].tolist()


def padded(model, fmt, prompts):
    """A list of Query -> input_ids and attention_mask [B,L] on the model's device, and the images if any."""
    B, L = len(prompts), max(len(prompt.ids) for prompt in prompts)
    input_ids = torch.full((B, L), model.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros(B, L, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        n = len(prompt.ids)
        place = slice(0, n) if fmt.feeds_back else slice(L - n, L)
        input_ids[i, place] = torch.tensor(prompt.ids)
        mask[i, place] = 1

    batch = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
    shown = [prompt for prompt in prompts if prompt.pixel_values is not None]
    if shown:
        pixels = torch.cat([prompt.pixel_values for prompt in shown])
        grids = torch.cat([prompt.image_grid_thw for prompt in shown])
        batch["pixel_values"] = pixels.to(model.device, model.hf.dtype)
        batch["image_grid_thw"] = grids.to(model.device)
    return batch


def ask(model, fmt, images, question, max_new_tokens=64, latents="keep"):
    """One question about images -> the answer. images: a list of paths, PIL images or bytes of files.
    UserError for one that cannot be read.

    latents: "keep" the thought and its latents in the prompt, "drop" the latents, or "free": the model writes
    them itself. A `<image>` typed in the question is text.
    """
    record = data.Record("--image", "", [("user", [""] * len(images) + [question])], "", images)
    how = "none" if latents == "free" else latents
    examples = data.RecordDataset(
        [record], lambda r, n: fmt.question(r.turns, n, how), model.image_processor, copies=fmt.copies
    )
    asked = examples.build(0, 0)

    room = thought_length(fmt, model.name) if latents == "free" else 0
    prompt = Query(asked["layout"].ids, asked["pixel_values"], asked["image_grid_thw"])
    return generate(model, [prompt], fmt, max_new_tokens + room, latents=latents)[0]


def answer_text(model, fmt, ids):
    """Ids that a model wrote -> the answer: what stands after `<answer>`, if it wrote one, else all;
    no special tokens, trimmed.
    """
    if fmt.answer_start_id in ids:
        ids = ids[ids.index(fmt.answer_start_id) + 1 :]
    if fmt.answer_end_id in ids:
        ids = ids[: ids.index(fmt.answer_end_id)]
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def thought_length(fmt, name):
    """Tokens that a model needs for the thought, its latents and the tags, if it is to write them itself.
    UserError if it never learned to.
    """
    if fmt.think_start_id is None:
        raise UserError(
            f"--latents free: {name} has no latents that it learned to write; a run directory of crystal "
            "is needed"
        )
    return len(fmt.thinking()[0]) + 2


@torch.no_grad()
def decode_feedback(model, batch, fmt, max_new_tokens, latents="keep", streamer=None, max_thought=256):
    """Greedy decoding that switches modes at the tags of latents -> list of the ids each row says,
    pads for its latents.

    After `fmt.latent_start_id` the next fmt.count inputs are the states before them (feedback.py), then
    `fmt.latent_end_id` is forced and tokens are inputs again; every row by its own clock, over one cache.
    batch: right-padded prompts. latents: "drop" never chooses `begin`. max_new_tokens: from `<answer>` on;
    before it a row may say max_thought tokens that are no latents.
    """
    tell = streamer.put if streamer else lambda tokens: None
    tell(batch["input_ids"])
    embedding = model.hf.get_input_embeddings()
    pad = model.tokenizer.pad_token_id

    # The prompts, up to the state before the first token that is chosen.
    stream, prompt = Stream(model), batch["attention_mask"].bool()
    positions = model.positions(batch)  # [3,B,L]
    h, _, piece = stream.run(
        positions,
        prompt,
        input_ids=batch["input_ids"],
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
    )
    B = len(h)
    last = h[torch.arange(B), prompt.sum(1) - 1]  # [B,D]

    # Text counts on from the largest of the three axes.
    at = positions.masked_fill(~prompt, 0).amax((0, 2)) + 1  # [B]

    # What a row does next: choose a token, close the latents, or (1 and more) that many latents.
    free, finish = -1, 0
    mode = [free] * B
    budget = [max_thought] * B
    said = [[] for _ in range(B)]
    done = [False] * B
    while True:
        stream.keep(piece)
        logits = model.logits(last)  # [B,V]
        if latents == "drop":
            logits[:, fmt.latent_start_id] = float("-inf")
        tokens = logits.argmax(-1).tolist()
        fed = [m > 0 and not d for m, d in zip(mode, done)]

        for b in range(B):
            if done[b] or fed[b]:
                tokens[b] = pad
                mode[b] -= fed[b]
            elif mode[b] == finish:
                tokens[b] = fmt.latent_end_id
                mode[b] = free
            else:
                mode[b] = fmt.count if tokens[b] == fmt.latent_start_id else free
                budget[b] = max_new_tokens if tokens[b] == fmt.answer_start_id else budget[b] - 1

            if not done[b]:
                said[b].append(tokens[b])
                done[b] = tokens[b] == fmt.end or (budget[b] <= 0 and mode[b] == free)

        tell(torch.tensor(tokens))
        if all(done):
            if streamer:
                streamer.end()
            return said

        # The next input: a token's embedding, or the state before it where a latent stands.
        x = embedding(torch.tensor(tokens, device=last.device))  # [B,D]
        x = torch.where(torch.tensor(fed, device=last.device)[:, None], last.to(x.dtype), x)
        going = ~torch.tensor(done, device=last.device)[:, None]  # [B,1]
        h, _, piece = stream.run(at[None, :, None].expand(3, -1, 1), going, inputs_embeds=x[:, None])
        last = h[:, 0]
        at = at + 1


def main(argv=None):
    parser = config.OneLineParser(
        prog="generate.py", description="Ask a run, a checkpoint or an exported directory one question."
    )
    parser.add_argument(
        "--model", default="tiny", help="a run directory, an export, tiny, tiny-crystal, or a hub name"
    )
    model_flags(parser)
    parser.add_argument(
        "--image", action="append", default=[], help="an image file; give it again for several"
    )
    parser.add_argument("--question", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument(
        "--latents",
        default="keep",
        choices=("keep", "drop", "free"),
        help="keep the thought and its latents in the prompt, leave the latents out, or let the model "
        "write them itself",
    )
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    procs = distributed.start(args.device)
    model, fmt, _ = open_model(
        args.model,
        args.checkpoint,
        procs.device,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        method=args.method,
        trust_method=args.trust_method,
    )
    procs.print(ask(model, fmt, args.image, args.question, args.max_new_tokens, args.latents))
    procs.stop()


if __name__ == "__main__":
    config.run_cli(main)
