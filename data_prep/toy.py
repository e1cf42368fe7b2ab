"""Writes the toy scenes of crystal/runtime/toy.py as a data set in LLaVA's format.

    python data_prep/toy.py --out data/toy --seed 0 --train 8000 --val 500 --test 2500

The same arguments give the same bytes.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from crystal.runtime import config
from crystal.runtime.toy import generate


def main():
    parser = config.OneLineParser(description="Draw the toy scenes.")
    parser.add_argument("--out", required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=8000, help="records")
    parser.add_argument("--val", type=int, default=500, help="records")
    parser.add_argument("--test", type=int, default=2500, help="records")
    args = parser.parse_args()
    for name in ("train", "val", "test"):
        if getattr(args, name) < 0:
            raise config.UserError(f"--{name} {getattr(args, name)}: must not be negative")
    generate(args.out, args.seed, args.train, args.val, args.test)


if __name__ == "__main__":
    config.run_cli(main)
