"""What the scripts of this folder share: what is asked, and one line of JSON that says what came out.

A script runs in its tool's own environment, without crystal: `python SCRIPT asked.json`.
"""

import json
import sys

import torch

torch.set_num_threads(2)
with open(sys.argv[1], encoding="utf-8") as file:
    # merged, adapter, base: directories; questions: [[image, question, crystal's answer]]
    ASKED = json.load(file)


def agreement(answers):
    """How many of a tool's answers are crystal's own."""
    right = [answer for *_, answer in ASKED["questions"]]
    same = sum(a == b for a, b in zip(answers, right, strict=True))
    return f"{same} of {len(right)} answers are crystal's own"


def tell(version, text):
    """The last line of a script: the tool's version, and what came out."""
    print(json.dumps([version, text]))
