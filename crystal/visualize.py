"""Pictures of a run: what the corruption does, how the losses went, where the answer looks in both paths.

    python -m crystal.visualize --run runs/crystal --data runs/toy/test.jsonl --out runs/crystal/pictures

What they show, and how they are drawn, is evaluation/figures.py's.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from crystal.evaluation.figures import attention_maps, corruption_grid, loss_curves
from crystal.opening import method_flags, open_model
from crystal.runtime import config, data, distributed
from crystal.runtime.config import UserError, layers_of


def spread(records, count):
    """The first `count` records, taking families in turn; records without an image are left out."""
    families = {}
    for r in records:
        if r.images:
            families.setdefault(r.family, []).append(r)
    turns = [
        r
        for rank in range(max(map(len, families.values()), default=0))
        for f in families.values()
        for r in f[rank : rank + 1]
    ]
    return turns[:count]


def pictures(
    run_dir,
    data_path,
    out_dir,
    count=4,
    which="best",
    image_root="",
    attn_layers="all",
    device="cpu",
    method="",
    trust_method=False,
):
    """All pictures of a run -> [paths]: corruptions.png, losses.png, attention.png in out_dir.

    data_path: records, of which `count` spread over families are asked. which: the checkpoint, as in
    opening.open_model. attn_layers: all, last, or indices as in 12,18,24. device: what the model runs on.
    method, trust_method: see methods.of_run. UserError: not a run, no metrics, broken or imageless records.
    """
    if count < 1:
        raise UserError(f"--count {count}: must be at least 1")
    out = Path(out_dir)
    # First: it needs no model, and tells a run from what is none.
    paths = [loss_curves(run_dir, out / "losses.png")]
    records, _ = data.read(data_path, image_root)
    if broken := [r for r in records if isinstance(r, data.RecordError)]:
        raise broken[0]
    chosen = spread(records, count)
    if not chosen:
        raise UserError(f"{data_path}: no record with an image")
    paths.append(
        corruption_grid(data.load_image(chosen[0].images[0], chosen[0].where), out / "corruptions.png")
    )
    model, fmt, settings = open_model(run_dir, which, device, method=method, trust_method=trust_method)
    layers = layers_of(attn_layers, len(model.layers))
    paths.append(attention_maps(model, fmt, settings, chosen, out / "attention.png", layers))
    return paths


def main(argv=None):
    parser = config.OneLineParser(
        prog="visualize.py", description="Pictures of a run: corruptions, losses, the answer's attention."
    )
    parser.add_argument("--run", required=True, help="run directory of train.py")
    method_flags(parser)
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument("--data", required=True, help="records to ask, as for training")
    parser.add_argument(
        "--image_root", default="", help="folder that image paths start from; empty: the folder of the data"
    )
    parser.add_argument(
        "--out", default="", help="folder for the pictures; empty: pictures/ in the run directory"
    )
    parser.add_argument("--count", type=int, default=4, help="questions drawn, spread over families")
    parser.add_argument(
        "--attn_layers",
        default="all",
        help="layers whose attention is averaged: all, last, or indices as in 12,18,24",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    device = distributed.start(args.device).device
    for path in pictures(
        args.run,
        args.data,
        args.out or Path(args.run) / "pictures",
        args.count,
        args.checkpoint,
        args.image_root,
        args.attn_layers,
        device,
        args.method,
        args.trust_method,
    ):
        print(path)


if __name__ == "__main__":
    config.run_cli(main)
