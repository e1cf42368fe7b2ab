"""Train the small DINOv3 that VaLR's latents are aligned to by default, and write crystal/assets/encoder.

    python data_prep/tiny/encoder.py        # twenty minutes of one core; encoder.log is its log

Published DINOv3 learn from pictures alone, by comparing crops, which takes far more of both than a toy has.
This one is told what is in each patch of 14 pixels: nothing, or an object's shape, colour and size. It sees
endless scenes that no run trains on or is tested with, half of them as easy as the base's, half as hard as
the demo's.
The heads that read the answers off the patches are thrown away; the features stay.

--probe trains the heads alone on an encoder of random weights, which says what the training is worth.

I images, P = 64 patches, E feature size.
"""

import json
import os
import time
from pathlib import Path

if not __package__:  # run as a script
    import sys

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from crystal.backbone import encoders
from crystal.runtime import config, toy

ASSET = Path(__file__).resolve().parents[2] / "crystal" / "assets" / "encoder"
PATCH = 14
ROW = toy.SIDE // PATCH  # patches in a row
SIZES = dict(
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    patch_size=PATCH,
    image_size=toy.SIDE,
)
RULES = {
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "size": {"height": toy.SIDE, "width": toy.SIDE},
    "resample": 2,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
EMPTY = len(toy.SHAPES)  # the shape of a patch without an object
IGNORE = -100
PARTS = {"shape": EMPTY + 1, "colour": len(toy.COLOURS), "size": len(toy.SIZES)}


def lesson(scene):
    """[P,3]: index of the shape (EMPTY for none), the colour and the size of what a patch shows.

    An object is what a patch shows if its box covers an eighth of it; the nearer of two wins.
    """
    found = np.full((ROW, ROW, 3), IGNORE)
    found[..., 0] = EMPTY
    for thing in scene.things:  # far to near
        x0, y0, x1, y1 = thing.box
        for row in range(ROW):
            for column in range(ROW):
                wide = min(x1, (column + 1) * PATCH) - max(x0, column * PATCH)
                high = min(y1, (row + 1) * PATCH) - max(y0, row * PATCH)
                if wide > 0 and high > 0 and wide * high * 8 >= PATCH**2:
                    found[row, column] = (
                        toy.SHAPES.index(thing.shape),
                        list(toy.COLOURS).index(thing.colour),
                        thing.level,
                    )
    return found.reshape(ROW * ROW, 3)


class Scenes(torch.utils.data.Dataset):
    """Step -> (pixels [I,3,112,112], lessons [I,P,3]); a scene depends on its name, step and number alone."""

    def __init__(self, name, seed, images):
        self.name = name
        self.seed = seed
        self.images = images
        self.mean = torch.tensor(RULES["image_mean"])[:, None, None]
        self.std = torch.tensor(RULES["image_std"])[:, None, None]

    def __getitem__(self, step):
        pixels, lessons = [], []
        for i in range(self.images):
            rng = toy.rng_for("encoder", self.name, self.seed, step, i)
            scene = toy.draw_for("demo" if i % 2 else "base", rng)
            picture = torch.from_numpy(toy.render(scene)).permute(2, 0, 1) / 255
            pixels.append((picture - self.mean) / self.std)
            lessons.append(torch.from_numpy(lesson(scene)))
        return torch.stack(pixels), torch.stack(lessons)


def losses(heads, features, lessons):
    """Sum of the cross entropies of shape, colour and size, each a mean over patches."""
    logits = heads(features).split(list(PARTS.values()), -1)
    return sum(
        F.cross_entropy(part.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
        for part, target in zip(logits, lessons.unbind(-1))
    )


@torch.no_grad()
def right(encoder, heads, stream, batches=8):
    """{part: percent of the patches with an object that are read right}, of held-out hard scenes."""
    hits, count = torch.zeros(3), 0
    for step in range(batches):
        pixels, lessons = stream[step]
        pixels, lessons = pixels[1::2], lessons[1::2]
        logits = heads(encoder(pixels)).split(list(PARTS.values()), -1)
        there = lessons[..., 0] != EMPTY
        for n, part in enumerate(logits):
            hits[n] += (part.argmax(-1) == lessons[..., n])[there].sum()
        count += int(there.sum())
    return {name: round(100 * float(hit) / count, 1) for name, hit in zip(PARTS, hits)}


def optimisers_of(hf, heads, args):
    """As the base's: Muon for the hidden matrices, AdamW for the rest; with --probe for the heads alone."""
    hidden, others = [], list(heads.parameters())
    if not args.probe:
        hidden = [p for p in hf.parameters() if p.ndim == 2]
        others += [p for p in hf.parameters() if p.ndim != 2]
    made = [torch.optim.AdamW(others, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.95))]
    if hidden:
        made.append(torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=0.01))
    return made


def write(hf, folder):
    """The encoder as a directory in Hugging Face layout, in half precision."""
    hf.to(torch.float16).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(RULES, indent=2) + "\n")
    weights = folder / "model.safetensors"
    os.chmod(weights, 0o644)
    print(f"{weights.name}: {weights.stat().st_size / 1e6:.2f} MB")


def main(argv=None):
    parser = config.OneLineParser(description="Train the small encoder of VaLR's default.")
    parser.add_argument("--out", type=Path, default=ASSET)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--images", type=int, default=64, help="scenes a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe", action="store_true", help="random weights, the heads alone learn")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    hf = DINOv3ViTModel(DINOv3ViTConfig(**SIZES))
    heads = torch.nn.Linear(hf.config.hidden_size, sum(PARTS.values()))
    prefix = 1 + hf.config.num_register_tokens
    features = lambda pixels: hf(pixel_values=pixels).last_hidden_state[:, prefix:]

    optimisers = optimisers_of(hf, heads, args)
    rate = lambda step: min(1, (step + 1) / 50, (args.steps - step) / (0.4 * args.steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, rate) for optimiser in optimisers]
    print(f"{sum(p.numel() for p in hf.parameters()) / 1e6:.2f} M parameters, {args.steps} steps", flush=True)

    held_out = Scenes("held out", args.seed, args.images)
    stream = Scenes("lessons", args.seed, args.images)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, sampler=range(args.steps), num_workers=1)
    started, sums = time.time(), []
    for step, (pixels, lessons) in enumerate(loader, 1):
        loss = losses(heads, features(pixels), lessons)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser, schedule in zip(optimisers, schedules):
            optimiser.step()
            schedule.step()

        sums.append(float(loss.detach()))
        if step % 200 == 0 or step == args.steps:
            read = " ".join(f"{k} {v}" for k, v in right(features, heads, held_out).items())
            print(f"step {step} {time.time() - started:.0f}s loss {np.mean(sums):.3f}  {read}", flush=True)
            sums.clear()

    if not args.probe:
        write(hf, args.out)
        again = encoders.load(str(args.out))
        print("as written: " + " ".join(f"{k} {v}" for k, v in right(again, heads, held_out).items()))


if __name__ == "__main__":
    config.run_cli(main)
