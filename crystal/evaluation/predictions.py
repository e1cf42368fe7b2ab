"""Predictions on disk: written as they come, shared by ranks, and gone on with after a kill."""

import json
from pathlib import Path

from crystal.runtime.config import UserError


class Predictions:
    """PATH.jsonl, a line per question, and PATH.json, what was asked how and what came of it.

    While a run lasts each rank appends to a part of its own, PATH.jsonl.RANK; `close` puts the parts together
    in order. Opening goes on with whatever is there (`done`: results by index), if it was asked in the same
    way; UserError if not. A line cut short by a kill is asked again.
    """

    def __init__(self, path, settings, overwrite, procs):
        self.path, self.about, self.settings, self.procs = (
            Path(path),
            Path(path).with_suffix(".json"),
            settings,
            procs,
        )
        self.file, self.done = None, {}
        parts = [p for p in self.path.parent.glob(f"{self.path.name}.*") if p.suffix[1:].isdigit()]
        if not overwrite and (parts or self.path.exists()):
            before = json.loads(self.about.read_text()).get("settings") if self.about.exists() else None
            if before != settings:
                changed = sorted(k for k in settings if before is None or before.get(k) != settings[k])
                raise UserError(
                    f"{self.path}: holds predictions that were made otherwise ({', '.join(changed)}); "
                    "--overwrite starts anew, --out names another file"
                )
            for part in [self.path, *parts]:
                for line in part.read_text().split("\n")[:-1] if part.exists() else ():
                    try:
                        result = json.loads(line)
                    except json.JSONDecodeError:
                        continue  # two pieces of lines where a kill fell between them
                    self.done[result["index"]] = result
        procs.barrier()  # all ranks have read
        if procs.is_first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if overwrite:
                self.path.unlink(missing_ok=True)
                for part in parts:
                    part.unlink()
            self.describe({})
        procs.barrier()
        if self.done:
            procs.print(f"{self.path}: {len(self.done)} questions are answered already and reused")

    def describe(self, outcome):
        """Writes PATH.json anew: the settings, and what came of them."""
        part = Path(f"{self.about}.part")
        part.write_text(json.dumps({"settings": self.settings} | outcome, indent=1) + "\n")
        part.replace(self.about)

    def tell(self, result):
        """Appends one result, a dict with its `index`, to this rank's part."""
        if self.file is None:
            at = Path(f"{self.path}.{self.procs.rank}")
            cut = at.exists() and not at.read_bytes().endswith(b"\n")
            self.file = open(at, "a")  # noqa: SIM115 (open until `close`)
            self.file.write("\n" if cut else "")
        self.file.write(json.dumps(result) + "\n")
        self.file.flush()

    def close(self, results, outcome):
        """Puts all results (of all ranks, in order) in the place of the parts; `outcome` joins the settings.
        """
        if self.file:
            self.file.close()
        self.procs.barrier()
        if self.procs.is_first:
            part = Path(f"{self.path}.part")
            part.write_text("".join(json.dumps(r) + "\n" for r in results))
            part.replace(self.path)
            for rank in self.path.parent.glob(f"{self.path.name}.*"):
                if rank.suffix[1:].isdigit():
                    rank.unlink()
            self.describe(outcome)
