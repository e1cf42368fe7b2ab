"""ADE20K photographs and their depth maps become relative depth questions: which of the
lettered points is nearest?

    python data_prep/ade20k_depth.py --images ADE20K --depth ADE_depth --out data/ade20k-depth --count 5000

CoVT takes its 5k ADE20K-Depth questions from Aurora (Bigverdi et al. 2024): two to five circled points on a
photograph, far enough apart in the plane and in depth, and the letter of the nearest as the answer. The depth
maps are pseudo ground truth: grey pictures of a monocular estimator (Depth Anything; `--pred-only
--grayscale`), brighter is nearer, named like the photograph with `_depth.png`. Those exact 5k rows come with
`data_prep/covt.py`; this makes such questions from the sources.

    OUT/train.jsonl    id, image, conversations, boxes (of the circles), family
    OUT/images/..      the photographs with their circles, PNG

Ours beyond Aurora's recipe: points keep off depth edges and the border, and the photograph keeps its size.
Everything is drawn from the seed and the photograph's name. h, w: height and width in pixels; depth 0 to 255.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import ImageDraw, ImageFont
from tqdm import tqdm

from crystal.runtime import config, data
from crystal.runtime.config import UserError
from data_prep.broken import leave_out

LETTERS = "ABCDE"
SUFFIXES = (".jpg", ".jpeg", ".png")
QUESTION = (
    "Points of the image are circled, with a letter beside each circle. "
    "Which point is nearest to the camera? Answer with its letter."
)


def points(depth, count, gap, rng, tries=2000):
    """depth [h,w] uint8 -> `count` points (x, y, depth), or None if they are not found.

    Any two differ by at least `gap` in depth and lie an eighth of the shorter side apart; each lies on a
    patch of 5 x 5 pixels without a depth edge, and within the middle 80 %.
    """
    h, w = depth.shape
    found = []
    for x, y in zip(
        rng.integers(w // 10, w - w // 10, tries).tolist(), rng.integers(h // 10, h - h // 10, tries).tolist()
    ):
        patch = depth[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].astype(int)
        d = int(np.median(patch))
        if d == 0 or patch.max() - patch.min() > gap // 2:  # 0: nothing was estimated there
            continue
        if all(
            abs(d - e) >= gap and (x - a) ** 2 + (y - b) ** 2 >= (min(h, w) / 8) ** 2 for a, b, e in found
        ):
            found.append((x, y, d))
            if len(found) == count:
                return found
    return None


def mark(image, places, letters):
    """Draws a circle at each (x, y) with its letter above -> the circles' boxes [x0, y0, x1, y1]. In place.
    """
    draw, boxes = ImageDraw.Draw(image), []
    r = max(4, min(image.size) // 60)
    font = ImageFont.load_default(size=3 * r)
    for (x, y), letter in zip(places, letters):
        draw.ellipse([x - r, y - r, x + r, y + r], outline="red", width=max(2, r // 3))
        box = draw.textbbox((x, y - r - 1), letter, font=font, anchor="mb")
        draw.rectangle([box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 1], fill="black")
        draw.text((x, y - r - 1), letter, font=font, anchor="mb", fill="white")
        boxes.append([x - r, y - r, x + r + 1, y + r + 1])
    return boxes


def question(path, depth_path, name, out, gap, seed):
    """One photograph and its depth map -> our record with the marked image written, or None where
    no points are found.
    """
    image = data.load_image(path, path)
    depth = np.asarray(data.load_image(depth_path, depth_path).convert("L"))  # [h,w]
    if depth.shape != (image.height, image.width):
        raise data.RecordError(
            f"{depth_path}: is {depth.shape[1]} x {depth.shape[0]}, the photograph {image.width} x "
            f"{image.height}"
        )
    rng = np.random.default_rng(
        int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8], "big")
    )
    count = int(rng.integers(2, len(LETTERS) + 1))
    found = points(depth, count, gap, rng)
    if found is None:
        return None
    letters = [LETTERS[i] for i in rng.permutation(count)]
    boxes = mark(image, [(x, y) for x, y, _ in found], letters)
    nearest = letters[max(range(count), key=lambda i: found[i][2])]
    file = out / "images" / Path(name).with_suffix(".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return {
        "id": f"ade20k-{Path(name).with_suffix('').as_posix()}",
        "image": file.relative_to(out / "images").as_posix(),
        "family": "ade20k_depth",
        "boxes": [boxes[letters.index(letter)] for letter in sorted(letters)],
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": nearest},
        ],
    }


def run(images, depth, out, count=0, gap=20, seed=0, skip=False, say=print):
    """Folders of photographs and depth maps -> number of records in OUT/train.jsonl; stops
    after `count` (0: all).
    """
    images, depth, out = Path(images), Path(depth), Path(out)
    for folder, flag in ((images, "--images"), (depth, "--depth")):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder ({flag})")
    names = sorted(
        p.relative_to(images).as_posix() for p in images.rglob("*") if p.suffix.lower() in SUFFIXES
    )
    # A seeded order, so that a smaller --count is a sample of all photographs and not the first folders.
    names.sort(key=lambda name: hashlib.sha256(f"{seed}\norder\n{name}".encode()).digest())
    if not names:
        raise UserError(f"{images}: no photographs in it ({', '.join(SUFFIXES)})")
    records, bad, flat, lacking = [], [], 0, []
    for name in tqdm(names, unit="photograph", disable=not sys.stderr.isatty()):
        if count and len(records) == count:
            break
        map_path = depth / Path(name).with_name(f"{Path(name).stem}_depth.png")
        if not map_path.is_file():
            # Depth Anything writes all maps into one folder.
            map_path = depth / f"{Path(name).stem}_depth.png"
        if not map_path.is_file():
            lacking.append(name)
            continue
        try:
            record = question(images / name, map_path, name, out, gap, seed)
        except data.RecordError as error:
            leave_out(str(error), bad, skip, len(names), "photographs")
            continue
        if record is None:
            flat += 1
        else:
            records.append(record)
    if not records:
        raise UserError(
            f"{depth}: no question could be made: {len(lacking)} of {len(names)} photographs have no "
            f"NAME_depth.png, {flat} have too flat a depth map"
        )
    (out / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for line in bad:
        say(f"left out: {line}")
    say(
        f"{len(records)} records in {out / 'train.jsonl'}; {len(lacking)} photographs without a depth map"
        + (f" (the first: {lacking[0]})" if lacking else "")
        + f", {flat} with too flat a one, {len(bad)} broken"
    )
    if count > len(records):
        say(f"fewer than --count {count}")
    return len(records)


def main(argv=None):
    parser = config.OneLineParser(
        prog="ade20k_depth.py",
        description="Relative depth questions from photographs and depth maps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", required=True, help="folder of photographs, searched through")
    parser.add_argument(
        "--depth", required=True, help="folder of grey depth maps NAME_depth.png, brighter is nearer"
    )
    parser.add_argument("--out", default="data/ade20k-depth", help="folder to write")
    parser.add_argument("--count", type=int, default=0, help="so many questions; 0: one of every photograph")
    parser.add_argument(
        "--gap", type=int, default=20, help="least difference in depth between two points, of 255"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--on_bad_record",
        default="stop",
        choices=("stop", "skip"),
        help="stop at a broken photograph, or leave it out and tell (above 1 %% stop)",
    )
    args = parser.parse_args(argv)
    if args.count < 0 or not 1 <= args.gap <= 127:
        raise UserError(
            f"--count {args.count} --gap {args.gap}: --count must not be negative, --gap lies from 1 to 127"
        )
    run(args.images, args.depth, args.out, args.count, args.gap, args.seed, args.on_bad_record == "skip")


if __name__ == "__main__":
    config.run_cli(main)
