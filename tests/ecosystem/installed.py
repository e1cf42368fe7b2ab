"""crystal's own package with what it depends on: the merged directory, the adapter and the command."""

import subprocess
import sys
from pathlib import Path

from common import ASKED, agreement, tell

import crystal

for kind in ("merged", "adapter"):
    run = crystal.open(ASKED[kind], device="cpu")
    answers = [run.answer(path, question, max_new_tokens=8) for path, question, _ in ASKED["questions"]]
    text = agreement(answers)
    assert text.startswith(f"{len(answers)} of"), f"{kind}: {text}"
program = Path(sys.executable).with_name("crystal-latents")
version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
tell(version, text)
