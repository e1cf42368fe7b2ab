"""Writes the toy scenes of crystal/runtime/toy.py as a data set in LLaVA's format.

    python data_prep/toy.py --out data/toy --seed 0 --train 8000 --val 500 --test 2500
    python data_prep/toy.py --out data/steps --families hops,closest,left_of,pairs

The same arguments give the same bytes. The second command asks the questions of crystal/runtime/toy_steps.py,
which take several steps.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from crystal.runtime import config, toy, toy_steps


def main():
    parser = config.OneLineParser(description="Draw the toy scenes.")
    parser.add_argument("--out", required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=8000, help="records")
    parser.add_argument("--val", type=int, default=500, help="records")
    parser.add_argument("--test", type=int, default=2500, help="records")
    known = (*toy.FAMILIES, *toy_steps.FAMILIES)
    parser.add_argument(
        "--families",
        default=",".join(toy.FAMILIES),
        help=f"kinds of questions, comma-separated, which take turns: {', '.join(known)}",
    )
    args = parser.parse_args()
    for name in ("train", "val", "test"):
        if getattr(args, name) < 0:
            raise config.UserError(f"--{name} {getattr(args, name)}: must not be negative")

    families = args.families.split(",")
    for family in families:
        if family not in known:
            raise config.UserError(
                f"--families {args.families}: {family!r} is none; known are {', '.join(known)}"
            )
    if len(set(families)) < len(families):
        raise config.UserError(f"--families {args.families}: names one twice")
    toy_steps.generate(args.out, args.seed, args.train, args.val, args.test, families=families)


if __name__ == "__main__":
    config.run_cli(main)
