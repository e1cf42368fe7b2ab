"""Several trainings one after the other in the same processes: torchrun tests/sharded.py FLAGS.json.

FLAGS.json: a list of command lines of crystal.train. Starting Python and importing torch is most of what a
short run takes.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from crystal import train
from crystal.runtime import distributed


def main():
    torch.set_num_threads(1)
    procs = distributed.start("cpu")  # the runs are its guests
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        train.main(flags)
    procs.stop()


if __name__ == "__main__":
    main()
