"""What other tools make of an export: each installed into an environment of its own, asked, and told of.

    python tests/ecosystem/run.py                  # all of them: the network, some gigabytes, half an hour
    python tests/ecosystem/run.py peft trl         # these alone
    python tests/ecosystem/run.py --work DIR       # where environments and the export stay for the next time

Prints a row of a Markdown table for each tool: tool, version, command, what came out. What cannot be
installed or does not run is a row that says so. Exit code 0: every tool that could be installed ran.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
QUESTIONS = 12
# A tool: what pip installs, the script that asks it.
TOOLS = {
    "transformers 4": (["transformers==4.57.*", "torch", "pillow"], "stock.py"),
    "transformers 5": (["transformers>=5.18,<6", "torch", "pillow"], "stock.py"),
    "pipeline": (["transformers>=5.18,<6", "torch", "torchvision", "pillow"], "pipeline.py"),
    "transformers serve": (["transformers[serving]>=5.18,<6", "torch", "torchvision", "pillow"], "serve.py"),
    "peft": (["peft", "transformers>=5.18,<6", "torch", "pillow"], "adapter.py"),
    "trl": (["trl", "datasets", "transformers>=5.18,<6", "torch", "pillow"], "sft.py"),
    "crystal-latents": ([str(ROOT)], "installed.py"),
    "vllm": (["vllm"], "offline.py"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tools", nargs="*", help=f"of {', '.join(TOOLS)}; all of them if none is named")
    parser.add_argument("--work", default="runs/ecosystem", help="folder for environments and the export")
    parser.add_argument("--minutes", type=float, default=20, help="a tool's most, to install and to run")
    args = parser.parse_args()
    if unknown := set(args.tools) - set(TOOLS):
        parser.error(f"{sorted(unknown)[0]}: no such tool; known are {', '.join(TOOLS)}")

    work = Path(args.work).resolve()
    asked = prepare(work)
    print("| tool | version | command | what came out |\n| --- | --- | --- | --- |")
    failed = False
    for tool in args.tools or TOOLS:
        version, text, fine = try_tool(tool, work, asked, args.minutes * 60)
        packages, script = TOOLS[tool]
        named = " ".join("." if name == str(ROOT) else name for name in packages)
        cells = [tool, version, f"`pip install {named}`; `{script}`", text]
        shown = [" ".join(cell.split()).replace("|", "¦") for cell in cells]
        print(f"| {' | '.join(shown)} |", flush=True)
        failed |= not fine
    sys.exit(failed)


def prepare(work):
    """Trains a small run, exports it, asks it -> the file that says all that to the scripts."""
    file = work / "asked.json"
    if file.exists():
        return file
    sys.path.insert(0, str(ROOT))
    from crystal import export, generate, opening, train
    from crystal.runtime import data, toy

    work.mkdir(parents=True, exist_ok=True)
    toy.generate(work / "scenes", seed=3, train=512, val=32, test=60)
    flags = ["--max_steps", "40", "--batch_size", "8", "--lr", "1e-3", "--lr_tokens", "10"]
    flags += ["--labels", "answer", "--overwrite"]
    files = ["--data", f"{work}/scenes/train.jsonl", "--val_data", f"{work}/scenes/val.jsonl"]
    run = train.main([*files, *flags, "--output", str(work / "run")])
    export.main(["--run", str(run)])

    model, fmt, _ = opening.open_model(run / "merged")
    records, _ = data.read(work / "scenes" / "test.jsonl")
    questions = []
    for record in records[:QUESTIONS]:
        path, question = record.images[0], record.turns[-1][1].removeprefix("<image>\n")
        questions.append([str(path), question, generate.ask(model, fmt, [path], question, 8)])
    about = {"merged": str(run / "merged"), "adapter": str(run / "adapter"), "questions": questions}
    about["base"] = str(ROOT / "crystal" / "assets" / "tiny")
    file.write_text(json.dumps(about, indent=1))
    return file


def try_tool(tool, work, asked, seconds):
    """Installs a tool and runs its script -> (version, what came out, whether it ran or could not be had)."""
    packages, script = TOOLS[tool]
    home, started = work / tool.replace(" ", "-"), time.monotonic()
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    # Neither this environment's packages nor a checkout's crystal.
    own = {"PYTHONPATH", "PYTHONHOME"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    code, text = run(install, environment, seconds, work)
    if code:
        return "", f"could not be installed: {text}", True
    left = seconds - (time.monotonic() - started)
    code, text = run([python, HERE / script, asked], environment, left, work)
    if code:
        return "", f"did not run: {text}", False
    version, text = json.loads(text)
    return version, text, True


def run(command, environment, seconds, folder):
    """A command -> (exit code, its last line; of one that failed the last line of its errors)."""
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired:
        return 124, f"not done within {seconds / 60:.0f} minutes"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    errors = [line for line in lines if "Error" in line or "ERROR" in line]
    last = (errors or lines or [""])[-1] if done.returncode else (lines or [""])[-1]
    return done.returncode, last[-300:] if done.returncode else last


if __name__ == "__main__":
    main()
