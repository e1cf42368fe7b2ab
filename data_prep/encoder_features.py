"""What a frozen vision encoder sees of every image of a data set, computed once.

    python data_prep/encoder_features.py --encoder facebook/dinov3-vitl16-pretrain-lvd1689m --data train.jsonl --name dino
    python crystal/train.py --method valr --data train.dino.jsonl --encoders features:dino:1024

writes safetensors files of 1000 records each below the image root, tensors ID/IMAGE [patches, size] in float32, and next to the
records a copy of them whose field `features` names those files. An encoder that transformers does not have (VaLR's pi^3, of
geometry) enters the same way: write files like these with it. Training on the files equals training with the encoder.
"""
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save_file

from crystal import config, data, encoders

SHARD = 1000  # records a file


def main(argv=None):
    parser = config.OneLineParser(prog="encoder_features.py", description="Precompute a vision encoder's patch features of a data set.")
    parser.add_argument("--encoder", required=True, help="tiny, a directory, or a hub name")
    parser.add_argument("--data", required=True, help="records, JSONL")
    parser.add_argument("--image_root", default="", help="folder that image paths start from; empty: the folder of the data")
    parser.add_argument("--name", required=True, help="what to call the features in the records")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    source, root = Path(args.data), Path(args.image_root or Path(args.data).parent)
    records, _ = data.read(source, root)
    if broken := [r for r in records if isinstance(r, data.RecordError)]:
        raise broken[0]
    known = set()
    for r in records:
        if r.id == r.where or r.id in known:
            raise data.RecordError(f"{r.where}: field 'id': missing, or that of another record; features are found by it")
        if not r.images:
            raise data.RecordError(f"{r.where}: field 'image': missing")
        known.add(r.id)
    encoder = encoders.load(args.encoder, args.device)
    (root / args.name).mkdir(parents=True, exist_ok=True)
    files = {}
    for at in range(0, len(records), SHARD):
        tensors, file = {}, f"{args.name}/{source.stem}-{at // SHARD:05d}.safetensors"
        for r in records[at : at + SHARD]:
            pixels = torch.stack([encoder.pixels(data.load_image(path, r.where)) for path in r.images])
            tensors |= {f"{r.id}/{n}": F.cpu() for n, F in enumerate(encoder(pixels.to(args.device)))}
            files[r.id] = file
        save_file({key: F.contiguous() for key, F in tensors.items()}, root / file)
        print(f"{min(at + SHARD, len(records))}/{len(records)} records", flush=True)
    out = source.with_suffix(f".{args.name}.jsonl")
    with open(out, "w") as lines:
        for item in map(json.loads, filter(str.strip, source.read_text(encoding="utf-8").split("\n"))):
            lines.write(json.dumps(item | {"features": item.get("features", {}) | {args.name: files[str(item["id"])]}}) + "\n")
    print(f"wrote {out}: --encoders features:{args.name}:{encoder.dim}")


if __name__ == "__main__":
    config.run_cli(main)
