"""Train the tiny base model and its blind twin on endless toy scenes, and write crystal/assets.

    torchrun --nproc_per_node=2 data_prep/tiny/base.py     # one process a core
    python data_prep/tiny/base.py                          # one process
    python data_prep/tiny/base.py --only blind             # one of the two models

Both commands continue from the last checkpoint in --work. Two processes on two cores (AVX-512, AMX) need 0.1
s a step for the dense lesson and 0.45 s after it, a minute more for compiling each stage: by that about 16
minutes a model. The shipped runs, on two cores that also did other work, took 23 minutes for the base and 38
for its twin; tiny_base.log is their log.

The twin sees a uniformly grey image in place of every scene, and is trained like the base in all else: what
it answers right is what the questions give away.

A language-model loss alone teaches a model of this size to count, and little else, in an hour. Three lessons
at once do better:

    dense   for each image token, as it enters the language model: which shape, colour and size is in this
            cell, and which cell is it? The words' own embeddings read the shape and the colour, so a star's
            token resembles the word " star".
    look    for each word in a question that names an object, after the second layer: its colour, size, row
            and column; after the fourth, the number of a plural, and the distance where one is asked for.
            Finding what is named is the step that the questions are made of, and by itself it takes thousands
            of steps to form.
    answer  the usual loss on the answer's tokens.

A second, short stage puts up to 26 random words between the prompt and the answer in half of the questions. A
model that has only ever answered at once unlearns to see while it is taught to say anything first; a large
base does not, having read more.

The first steps are the dense lesson alone; the heads of dense and look are thrown away. Hidden matrices are
trained by Muon, the embeddings, norms and biases by AdamW; the learning rate is constant, and falls to 0 over
the last 40 % of the steps.

B images, N = 16 image tokens, S questions an image, T tokens a question, D hidden size.
"""

import argparse
import os
import sys
import time
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)

from crystal.runtime import config, toy
from data_prep.tiny import batches
from data_prep.tiny import check as tiny_check
from data_prep.tiny import files as tiny_files
from data_prep.tiny.batches import IGNORE, KINDS, N

# "flash": the vision tower then makes one call for all images.
AttentionInterface.register("flash_images", batches.image_attention)
AttentionInterface.register("slots", batches.slot_attention)


class Pupil(torch.nn.Module):
    """The model with the heads of its lessons."""

    def __init__(self, config, layout):
        super().__init__()
        self.model = Qwen2_5_VLForConditionalGeneration(config).float()
        self.model.set_attn_implementation({"vision_config": "flash_images", "text_config": "slots"})
        self.layout, D = layout, config.text_config.hidden_size
        self.dense = torch.nn.Linear(D, 1 + 4 + 4 + 4)  # an empty cell, size, row, column
        self.look = torch.nn.Linear(D, 8 + 4 + 4 + 4)  # colour, size, row, column
        self.number, self.distance = torch.nn.Linear(D, 4), torch.nn.Linear(D, 4)
        self.words = torch.tensor(
            [layout.tokenizer(" " + word).input_ids[0] for word in (*toy.SHAPES, *toy.COLOURS)]
        )
        self.opening = torch.tensor(layout.opening)
        # A still image fills both frames of the patch convolution with the same pixels, so half of
        # its work is enough.
        patch = self.model.model.visual.patch_embed
        patch.forward = lambda pixels: F.linear(pixels, patch.proj.weight.sum(2).flatten(1))

    @property
    def embed(self):
        return self.model.model.language_model.embed_tokens

    def see(self, pixels):
        """float [B x 64, 588] to image tokens [B, N, D]."""
        grid = torch.tensor([[1, 8, 8]] * (len(pixels) // 64))
        return self.model.model.visual(pixels, grid_thw=grid).pooler_output.view(
            -1, N, self.embed.embedding_dim
        )

    def read(self, seen, tokens):
        """Image tokens [B, N, D] and questions [B, S, T] to the questions' states [B, S, T, D]: final, and
        after the
        second and the fourth layer."""
        lm, layout, B = self.model.model.language_model, self.layout, len(tokens)
        opening = self.embed(self.opening).expand(B, -1, -1)
        x = torch.cat(
            [
                opening[:, : layout.image.start],
                seen.to(opening.dtype),
                opening[:, layout.image.stop :],
                self.embed(tokens.flatten(1)),
            ],
            1,
        )
        positions = layout.positions.expand(3, B, -1)
        rotary = lm.rotary_emb(x, positions)
        states = []
        for layer in lm.layers:
            x = layer(x, attention_mask=layout.mask, position_ids=positions, position_embeddings=rotary)
            states.append(x)
        return [
            state[:, layout.P :].unflatten(1, tokens.shape[1:])
            for state in (lm.norm(x), states[1], states[3])
        ]

    def dense_loss(self, seen, cells):
        """seen [B, N, D]; cells [B, N, 3]: indices of shape, colour and size, IGNORE where the cell is empty.
        """
        seen = seen.float()
        named, other = seen @ self.embed.weight[self.words].T, self.dense(seen)
        shape, colour, size = cells.flatten(0, 1).T
        cell = torch.arange(N).expand(len(seen), -1).flatten()
        loss = lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target, ignore_index=IGNORE)
        return (
            loss(torch.cat([named[..., :8], other[..., :1]], -1), torch.where(shape == IGNORE, 8, shape))
            + loss(named[..., 8:], colour)
            + loss(other[..., 1:5], size)
            + 0.3 * loss(other[..., 5:9], cell // toy.CELLS)
            + 0.3 * loss(other[..., 9:], cell % toy.CELLS)
        )

    def look_loss(self, second, fourth, marks):
        """second, fourth [B, S, T, D]: states after these layers; marks [B, S, T, 6], see
        `tiny_batches.marks_of`.
        """

        def loss(head, states, marks, sizes):
            at = marks[..., 0] != IGNORE
            parts = head(F.rms_norm(states[at], states.shape[-1:])).float().split(sizes, -1)
            return sum(F.cross_entropy(part, target) for part, target in zip(parts, marks[at].T))

        return (
            loss(self.look, second, marks[..., :4], (8, 4, 4, 4))
            + loss(self.number, fourth, marks[..., 4:5], 4)
            + loss(self.distance, fourth, marks[..., 5:], 4)
        )

    def answer_loss(self, final, labels):
        """final [B, S, T, D]; labels [B, S, T]. The head runs on the labelled rows only."""
        target = labels[..., 1:]
        rows = target != IGNORE
        return F.cross_entropy(self.model.lm_head(final[..., :-1, :][rows]).float(), target[rows])


@torch.no_grad()
def accuracy(pupil, batch, blind):
    """{kind of question: share of answers whose every token, the end included, is the most likely one}."""
    with torch.autocast("cpu", torch.bfloat16):
        final, *_ = pupil.read(pupil.see(batches.pixels(batch.patches, blind)), batch.tokens)
        guess = pupil.model.lm_head(final[..., :-1, :]).argmax(-1)
    right = ((guess == batch.labels[..., 1:]) | (batch.labels[..., 1:] == IGNORE)).all(-1)
    return {kind: right[batch.kinds == i].float().mean().item() for i, kind in enumerate(KINDS)}


# --- optimisers and checkpoints ---


def make_optimisers(pupil, args):
    """Muon for the hidden matrices, AdamW for the rest."""
    named = dict(pupil.named_parameters())
    hidden = [
        name
        for name, p in named.items()
        if name.startswith("model.") and p.ndim == 2 and "embed_tokens" not in name
    ]
    others = [p for name, p in named.items() if name not in hidden]
    return (
        torch.optim.Muon([named[name] for name in hidden], lr=args.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.adam_lr, weight_decay=0.01, betas=(0.9, 0.95)),
    )


def schedule(step, args):
    """Factor of the learning rates: up over 50 steps, constant, down to 0 over the last 40 %; in stage two up
    to 0.5 and down.
    """
    if step >= args.steps:
        step, steps = step - args.steps, args.wordy_steps
        return 0.5 * min(1, (step + 1) / 25, (steps - step) / (0.7 * steps))
    return min(1, (step + 1) / 50, (args.steps - step) / (0.4 * args.steps))


def average(parameters, world):
    """Replace the gradients by their mean over all processes, in one message."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    for grad, mean in zip(grads, flat.div_(world).split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def save(path, pupil, optimisers, step):
    """All that a resumed run needs, as one flat file of tensors; the old file stays until the
    new one is whole.
    """
    # Tied.
    state = {f"pupil.{k}": v for k, v in pupil.state_dict().items() if not k.endswith("lm_head.weight")}
    for o, optimiser in enumerate(optimisers):
        for i, slots in optimiser.state_dict()["state"].items():
            state.update({f"optimiser.{o}.{i}.{name}": value for name, value in slots.items()})
    save_file({**{k: v.contiguous() for k, v in state.items()}, "step": torch.tensor(step)}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load(path, pupil, optimisers):
    """Undo `save`; returns the number of steps done."""
    state = load_file(path)
    pupil.load_state_dict(
        {k.removeprefix("pupil."): v for k, v in state.items() if k.startswith("pupil.")}, strict=False
    )
    for o, optimiser in enumerate(optimisers):
        whole = optimiser.state_dict()
        for key, value in state.items():
            if key.startswith(f"optimiser.{o}."):
                _, _, i, name = key.split(".")
                whole["state"].setdefault(int(i), {})[name] = value
        optimiser.load_state_dict(whole)
    return int(state["step"])


# --- training ---


def train(args, blind, rank, world):
    """Train one of the two models and return it, in bfloat16."""
    name = "blind" if blind else "base"
    work = args.work / name
    say = lambda line: print(line, flush=True) if rank == 0 else None
    torch.manual_seed(args.seed)
    if rank == 0:
        tiny_files.make_directory(work)
    if world > 1:
        torch.distributed.barrier()
    layout = batches.Layout(AutoTokenizer.from_pretrained(work))
    wordy = batches.Layout(layout.tokenizer, batches.WORDY_SLOTS, batches.WORDY_SLOT)
    steps = args.steps + args.wordy_steps
    pupil = Pupil(tiny_files.make_config(layout.tokenizer), layout)
    optimisers = make_optimisers(pupil, args)
    state = work / "state.safetensors"
    first = load(state, pupil, optimisers) if state.exists() else 0
    say(
        f"{name}: {sum(p.numel() for p in pupil.model.parameters()) / 1e6:.2f} M parameters, {args.steps} "
        f"+ {args.wordy_steps} steps of {args.images} images "
        f"with {batches.SLOTS} questions, {world} processes, from step {first}"
    )

    stream = batches.Stream(layout, wordy, args.seed, args.steps, args.images, rank, world)
    loader = torch.utils.data.DataLoader(
        stream, batch_size=None, sampler=range(first, steps), num_workers=1, prefetch_factor=4
    )
    watch = lambda stream, layout, words: batches.make_batch(
        layout,
        [toy.rng_for(stream, "watch", i) for i in range(100)],
        stream,
        dict.fromkeys(KINDS, 1 / len(KINDS)),
        words,
    )
    watched = {f"{stream} scenes": watch(stream, layout, 0) for stream in ("base", "demo")}
    watched_wordy = {f"demo scenes, {words} words": watch("demo", wordy, words) for words in (0, 21)}
    read = torch.compile(pupil.read, dynamic=False) if args.compile else pupil.read
    start, sums = time.time(), torch.zeros(4)
    for step, batch in enumerate(loader, first):
        if step == args.steps or first > args.steps:
            pupil.layout, watched = wordy, watched_wordy
        for optimiser, lr in zip(optimisers, (args.muon_lr, args.adam_lr)):
            optimiser.param_groups[0]["lr"] = lr * schedule(step, args)
        with torch.autocast("cpu", torch.bfloat16):
            if blind:  # one grey image stands for all
                seen = pupil.see(batches.pixels(batch.patches[: 4 * N], blind)).expand(
                    len(batch.tokens), -1, -1
                )
            else:
                seen = pupil.see(batches.pixels(batch.patches))
            dense = pupil.dense_loss(seen, batch.cells)
            look = answer = torch.zeros(())
            if step >= args.dense_steps:
                final, second, fourth = read(seen, batch.tokens)
                look, answer = (
                    pupil.look_loss(second, fourth, batch.marks),
                    pupil.answer_loss(final, batch.labels),
                )
            loss = (0.3 if step >= args.dense_steps else 1) * dense + 0.3 * look + answer
        loss.backward()
        if world > 1:
            average(pupil.parameters(), world)
        torch.nn.utils.clip_grad_norm_(optimisers[1].param_groups[0]["params"], 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()

        sums += torch.tensor([dense.item(), look.item(), answer.item(), 1])
        done = step + 1
        if done % 50 == 0 or done in (args.steps, steps):
            means = " ".join(f"{k} {v:.3f}" for k, v in zip(("dense", "look", "answer"), sums[:3] / sums[3]))
            say(f"{name} step {done} {time.time() - start:.0f}s {means}")
            sums.zero_()
        if rank == 0 and (done % 200 == 0 or done in (args.steps, steps)):
            save(state, pupil, optimisers, done)
            for stream, batch in watched.items() if done > args.dense_steps else ():
                say(
                    f"  {stream}: "
                    + " ".join(f"{kind} {100 * v:.0f}" for kind, v in accuracy(pupil, batch, blind).items())
                )
    return pupil.model.to(torch.bfloat16)


def install(model, blind, args):
    """Put the weights, and for the base the files around them, in the assets; a reader never
    sees half a file.
    """
    work = args.work / "export"
    model.save_pretrained(work)  # with the names that the hub's checkpoints have
    folder = args.out / ("blind" if blind else "tiny")
    folder.mkdir(parents=True, exist_ok=True)
    if not blind:
        tiny_files.make_directory(folder)
    target = folder / "model.safetensors"
    (work / target.name).chmod(0o644)
    os.replace(work / target.name, target)
    print(f"{target.relative_to(args.out)}: {target.stat().st_size / 1e6:.2f} MB", flush=True)


def main():
    parser = config.OneLineParser(description="Train the tiny base and its blind twin.")
    parser.add_argument("--out", type=Path, default=tiny_check.ASSETS, help="gets tiny/ and blind/")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_base"), help="checkpoints")
    parser.add_argument("--only", choices=("base", "blind"), help="train one of the two")
    parser.add_argument("--steps", type=int, default=1600, help="updates in all")
    parser.add_argument("--wordy_steps", type=int, default=300, help="updates of stage two, after those")
    parser.add_argument(
        "--dense_steps", type=int, default=350, help="the first of them, with the dense lesson alone"
    )
    parser.add_argument("--images", type=int, default=32, help="scenes a step, over all processes")
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adam_lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile the language model",
    )
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
    for name in ("base", "blind"):
        if args.only in (None, name):
            model = train(args, name == "blind", rank, world)
            if rank == 0:
                install(model, name == "blind", args)
    if rank == 0 and args.only is None:
        folder = args.out / "tiny"
        rows = tiny_check.measure(
            tiny_check.load(folder),
            tiny_check.load(folder, args.out / "blind" / "model.safetensors"),
            AutoTokenizer.from_pretrained(folder),
            AutoImageProcessor.from_pretrained(folder),
            1000,
        )
        print(tiny_check.table(rows))
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    config.run_cli(main)
