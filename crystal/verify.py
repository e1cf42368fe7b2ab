"""What of a run or an export is whole: every byte is read, and every file held against what it was.

A checkpoint and an export bring a manifest with the SHA-256 of each of their files. A directory that another
tool wrote has none: of it the safetensors files are opened, and held against their index.
"""

import json

from safetensors import SafetensorError, safe_open

from crystal.lora import CONFIG
from crystal.runtime import checkpoint
from crystal.runtime.config import UserError


def report(path):
    """A run's, a checkpoint's or an export's directory -> (a line for each part of it, whether all is whole).

    UserError if it is none of them.
    """
    if not path.is_dir():
        raise UserError(f"--verify {path}: no such directory")
    if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").exists():
        parts = of_run(path)
    elif (path / checkpoint.STATE).exists() or path.parent.name == "checkpoints":
        parts = {str(path): checkpoint.verify(path)}
    elif (path / "config.json").exists() or (path / CONFIG).exists() or (path / checkpoint.MANIFEST).exists():
        parts = {str(path): of_export(path)}
    else:
        raise UserError(f"--verify {path}: neither a run of train.py nor an export (nor any model)")

    if list(parts) == [str(path)] and not (path / checkpoint.MANIFEST).exists() and not any(parts.values()):
        said = "no file is missing or cut short; without a manifest a change cannot be told"
        return [f"{path}: {said}"], True
    lines = [f"{name}: {'; '.join(found) if found else 'whole'}" for name, found in parts.items()]
    return lines, not any(parts.values())


def of_run(run):
    """A run's directory -> {part of it: its problems, [] if it is whole}."""
    parts = {str(run / "config.json"): of_json(run / "config.json")}
    parts[str(run / "metrics.jsonl")] = of_lines(run / "metrics.jsonl")

    folder = run / "checkpoints"
    for path in sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name)):
        if path.suffix == ".tmp":
            parts[str(path)] = ["left by a save that was killed; the next save deletes it"]
        elif path.suffix == ".old" and path.with_suffix("").exists():
            parts[str(path)] = ["an older one that was replaced; the next save deletes it"]
        else:
            parts[str(path)] = checkpoint.verify(path)
    if not any(folder.glob("step-*")):
        parts[str(folder)] = ["no checkpoint in it"]
    if (folder / "best.json").exists():
        parts[str(folder / "best.json")] = of_best(run)

    for name in ("merged", "adapter"):
        if (run / name).is_dir():
            parts[str(run / name)] = of_export(run / name)
        if (run / f"{name}.part").exists():
            parts[str(run / f"{name}.part")] = ["left by an export that was killed; the next one deletes it"]
        if (run / f"{name}.old").exists():
            was = "an older one that was replaced; the next export deletes it"
            if not (run / name).exists():
                was = f"an export that was killed while it was replaced; the next one brings {name} back"
            parts[str(run / f"{name}.old")] = [was]
    return parts


def of_best(run):
    """The problems of a run's note of its best checkpoint."""
    try:
        step = checkpoint.best(run)["step"]
    except checkpoint.CheckpointError as error:
        return [str(error)]
    found = checkpoint.step_dir(run, step).is_dir()
    return [] if found else [f"names step {step}, which is not there"]


def of_export(directory):
    """The problems of a merged directory or an adapter: by its manifest, or by what safetensors files say."""
    if (directory / checkpoint.MANIFEST).exists():
        return checkpoint.verify(directory, needed=())

    index = directory / "model.safetensors.index.json"
    problems = of_json(index) if index.exists() else []
    names = {path.name for path in directory.glob("*.safetensors")}
    if index.exists() and not problems:
        listed = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        problems += [f"{name} is missing" for name in sorted(listed - names)]
    if not names:
        problems.append("no safetensors file in it")
    for name in sorted(names):
        try:
            with safe_open(directory / name, "pt") as file:
                file.keys()
        except (OSError, SafetensorError) as error:
            problems.append(f"{name} cannot be read: {' '.join(str(error).split())}")
    return problems


def of_json(path):
    """The problems of a file that should hold one JSON object."""
    try:
        dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ["is missing"]
    except (OSError, ValueError, TypeError) as error:
        return [f"cannot be read: {' '.join(str(error).split())}"]
    return []


def of_lines(path):
    """The problems of a file with a JSON object a line; a last line may be cut short, as a kill leaves it."""
    if not path.exists():
        return ["is missing"]
    wrong = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            dict(json.loads(line)) if line.strip() else None
        except (ValueError, TypeError):
            wrong.append(f"line {number} is no JSON object")
    return wrong[:3] + ([f"and {len(wrong) - 3} lines more"] if len(wrong) > 3 else [])
