"""What a frozen vision encoder sees of every image of a data set, computed once.

    python data_prep/encoder_features.py --encoder facebook/dinov3-vitl16-pretrain-lvd1689m --data train.jsonl
    --name dino python crystal/train.py --method valr --data train.dino.jsonl --encoders features:dino:1024

writes safetensors files of --shard records each below the image root, tensors ID/IMAGE [patches, size] in
float32, and next to the records a copy of them whose field `features` names those files. A file that the same
encoder made of the same records is not made again, one that lacks broken records only by --on_bad_record
stop: the same command goes on where it was stopped. torchrun shares the work. An encoder that transformers
does not have (VaLR's pi^3, of geometry) enters the same way: write files like these with it. Training on the
files equals training with the encoder.
"""

import hashlib
import json
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crystal.backbone import encoders
from crystal.runtime import config, data, distributed
from crystal.runtime.config import UserError
from data_prep.broken import leave_out
from data_prep.features import progress, quiet_flag, replace_file, say, usable, write_records


def hash_of(encoder):
    """What tells encoders apart, whatever they are called: the hash of weights and image rules."""
    found = hashlib.sha256(json.dumps(encoder.rules, sort_keys=True).encode())
    for x in encoder.state_dict().values():
        found.update(x.cpu().numpy().tobytes())
    return found.hexdigest()


def about(path):
    """What a file of features says of itself, {} where there is none: made_with, a hash, and broken,
    {id: what is wrong}.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("crystal", "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}


def main(argv=None):
    parser = config.OneLineParser(
        prog="encoder_features.py", description="Precompute a vision encoder's patch features of a data set."
    )
    parser.add_argument("--encoder", required=True, help="tiny, a directory, or a hub name")
    parser.add_argument("--data", required=True, help="records, JSON or JSONL, each with an id of its own")
    parser.add_argument(
        "--image_root", default="", help="folder that image paths start from; empty: the folder of the data"
    )
    parser.add_argument("--name", required=True, help="what to call the features in the records")
    parser.add_argument(
        "--on_bad_record",
        default="stop",
        choices=("stop", "skip"),
        help="stop at a broken record, or leave it out and tell (above 1 %% stop)",
    )
    parser.add_argument("--shard", type=int, default=1000, help="records a file")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    quiet_flag(parser)
    args = parser.parse_args(argv)
    if args.shard < 1:
        raise UserError(f"--shard {args.shard}: must be at least 1")
    # Ranks wait for the slowest one's last file.
    procs, skip = (
        distributed.start(args.device, timeout=86400.0),
        args.on_bad_record == "skip",
    )
    source, root = Path(args.data), Path(args.image_root or Path(args.data).parent)
    records, bad, _ = usable(source, root, skip)
    total, seen = len(records) + len(bad), list(bad)
    encoder = encoders.load(args.encoder, procs.device)
    made_by = hash_of(encoder)
    if procs.is_first:
        (root / args.name).mkdir(parents=True, exist_ok=True)
    parts, made_with, todo = {}, {}, []
    for at in range(0, len(records), args.shard):
        file = f"{args.name}/{source.stem}-{at // args.shard:05d}.safetensors"
        parts[file] = records[at : at + args.shard]
        made_with[file] = hashlib.sha256(
            json.dumps([made_by, *([r.id, *map(str, r.images)] for r in parts[file])]).encode()
        ).hexdigest()
        known = about(root / file)
        # An image may have been mended.
        if known.get("made_with") != made_with[file] or (known["broken"] and not skip):
            todo.append(file)
    procs.barrier()  # all ranks have seen the same ones missing
    there = len(parts) - len(todo)
    say(args, procs, f"{len(records)} records in {len(parts)} files, {there} there already")
    mine = todo[procs.rank :: procs.world]
    bar = progress(args, "encoder_features", procs, sum(len(parts[file]) for file in mine), "record")
    for file in mine:
        tensors, broken = {}, {}
        for r in parts[file]:
            bar.update(1)
            try:
                pixels = torch.stack([encoder.pixels(data.load_image(path, r.where)) for path in r.images])
            except data.RecordError as error:
                leave_out(str(error), seen, skip, total, "records")
                broken[r.id] = str(error)
                continue
            tensors |= {
                f"{r.id}/{n}": F.cpu().contiguous() for n, F in enumerate(encoder(pixels.to(procs.device)))
            }
        notes = json.dumps({"made_with": made_with[file], "broken": broken})
        replace_file(root / file, lambda path: save_file(tensors, path, {"crystal": notes}))
    bar.close()
    procs.barrier()
    if procs.is_first:
        files = {}
        for file, part in parts.items():
            broken = about(root / file)["broken"]
            for line in broken.values():  # those of all ranks, and of runs before this one
                leave_out(line, bad, skip, total, "records")
            files |= {r.where: file for r in part if r.id not in broken}
        print(
            f"wrote {write_records(source, args.name, files, bad)}: --encoders "
            f"features:{args.name}:{encoder.dim}"
        )
    procs.stop()


if __name__ == "__main__":
    config.run_cli(main)
