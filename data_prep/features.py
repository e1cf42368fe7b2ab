"""What the commands share that compute features of records (lavit_teacher.py, encoder_features.py): which
records, whole files, a copy with paths.
"""

import base64
import json
import os
from pathlib import Path

from crystal.evaluation.asking import Bar
from crystal.runtime import data
from crystal.runtime.config import UserError
from data_prep.broken import leave_out


def quiet_flag(parser):
    """Adds --quiet, which `progress` and `say` heed."""
    parser.add_argument(
        "--quiet", action="store_true", help="say what was left out and what was written, and nothing else"
    )


def progress(args, name, procs, total, unit):
    """A bar, or a line each half minute, with the time left: over what this rank does of `total` units."""
    return Bar(total, "" if args.quiet else name, procs, unit)


def say(args, procs, text):
    """A line on the first rank, unless --quiet."""
    if not args.quiet:
        procs.print(text)


def usable(source, root, skip, limit=0):
    """The first `limit` records of a source (0: all) -> (those with an id of their own and an image, lines
    that name the others, later turns dropped).

    UserError as in broken.leave_out.
    """
    found, dropped = data.read(source, root)
    found = found[: limit or None]
    records, bad, known = [], [], set()
    for r in found:
        try:
            if isinstance(r, data.RecordError):
                raise r
            if r.id == r.where or r.id in known:
                raise data.RecordError(
                    f"{r.where}: field 'id': missing, or that of another record; a record's features are "
                    "found by it"
                )
            if not r.images:
                raise data.RecordError(f"{r.where}: field 'image': missing; there is nothing to look at")
        except data.RecordError as error:
            leave_out(str(error), bad, skip, len(found), "records")
            continue
        known.add(r.id)
        records.append(r)
    return records, bad, dropped


def replace_file(path, write):
    """write(temporary path), then renamed to `path`: whole or not at all."""
    write(f"{path}.part")
    os.replace(f"{path}.part", path)


def write_records(source, name, files, bad):
    """Next to the source a copy of its records that have a file, {record's `where`: path below the image
    root}, as their feature `name` -> Path.

    bad: lines that name the records left out, printed. UserError if none is left.
    """
    for line in bad:
        print(f"left out: {line}")
    if not files:
        raise UserError(f"{source}: no record is left")
    out = source.with_suffix(f".{name}.jsonl")
    items = data.items(source)
    lines = [
        json.dumps(
            item | {"features": (item.get("features") or {}) | {name: files[where]}},
            default=lambda raw: base64.b64encode(raw).decode(),  # pictures of Parquet
        )
        + "\n"
        for where, item in items
        if where in files
    ]
    replace_file(out, lambda path: Path(path).write_text("".join(lines)))
    return out
