"""The paper's training set: the public CoVT parquet parts become our JSONL and images.

    python data_prep/covt.py --parts CoVT-Dataset --list                                 what is in it, subset
                                                                                         by subset
    python data_prep/covt.py --parts CoVT-Dataset --out data/covt --sample 16000         16k questions, as the
                                                                                         paper trains on
    python data_prep/covt.py --parts CoVT-Dataset --out data/covt-tallyqa --subsets tallyqa

The parts (Wakals/CoVT-Dataset, 315 GB) have the columns `id`, `image` ({bytes, path}), `image_relpath`
and `conversations` ([{from, value}]); that is what the authors' own converter reads, and what is
checked before anything is written. No column names the subset: it is the first folder of a row's
image_relpath, or where there is none the letters that its file's name begins with
(`identity_177477.png` is `identity`; all digits: `numbers`).

    OUT/train.jsonl      id, image, conversations, family (the subset)
    OUT/images/..        the bytes as they came, at image_relpath, each once
    OUT/progress.json    where it is: a killed conversion goes on from there with the same command

A row group is in memory at a time. The sample is drawn by the rows' hashes with the seed: it depends
neither on how the parts are cut nor on their order. The paper names no seed for its 16k (4 GPUs x 4000
steps), so it is *a* sample.
"""

import argparse
import hashlib
import heapq
import io
import json
import os
import re
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from PIL import Image
from tqdm import tqdm

from crystal.runtime import config, data
from crystal.runtime.config import UserError
from crystal.runtime.images import FORMATS
from data_prep.broken import leave_out

COLUMNS = ("id", "image", "image_relpath", "conversations")


class BadRow(Exception):
    """One row cannot be used; the message names its column."""


# --- the parts ---


def find(parts):
    """A folder (or one file) -> its parquet files in the natural order of their names. UserError
    if there is none.
    """
    root = Path(parts)
    files = [root] if root.is_file() else root.rglob("*.parquet")
    natural = lambda path: [
        int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.relative_to(root.parent).as_posix())
    ]
    files = sorted((p for p in files if p.suffix == ".parquet"), key=natural)
    if not files:
        raise UserError(f"{root}: no .parquet files in it (--parts)")
    return files


def opened(path):
    """A part -> pyarrow's ParquetFile, its columns checked. UserError names what is missing
    and what is there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        part = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)  # streamed, not mapped
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable parquet file: {' '.join(str(error).split())[:200]}"
        ) from None
    names = part.schema_arrow.names
    if missing := [name for name in COLUMNS if name not in names]:
        raise UserError(
            f"{path}: no column {missing[0]!r}; it has {', '.join(names)}; the CoVT parts have "
            f"{', '.join(COLUMNS)}"
        )
    kind = part.schema_arrow.field("image").type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise UserError(f"{path}: column 'image' is {kind}, not a struct with 'bytes'")
    return part


def subset_of(relpath):
    """An image's relative path -> the name of its subset."""
    parts = Path(relpath).parts
    return parts[0] if len(parts) > 1 else re.match(r"[A-Za-z]*", parts[0] if parts else "")[0] or "numbers"


def names(part, group):
    """(id, image_relpath) of a row group's rows, without reading an image."""
    table = part.read_row_group(group, columns=["id", "image_relpath"])
    return zip(map(str, table["id"].to_pylist()), map(str, table["image_relpath"].to_pylist()))


def survey(files, progress=True):
    """Files -> {subset: rows}, and how many rows there are in all."""
    counts = {}
    for path in tqdm(
        files, desc="survey", unit="part", disable=not (progress and sys.stderr.isatty()), leave=False
    ):
        part = opened(path)
        for group in range(part.num_row_groups):
            for _, relpath in names(part, group):
                counts[subset_of(relpath)] = counts.get(subset_of(relpath), 0) + 1
    return counts


def choose(files, subsets, sample, seed):
    """Files -> (the rows wanted as {(file, row group): [rows]}, or None for all; how many they are).

    sample: so many rows of the chosen subsets, those with the smallest hash of seed, id and
    path; 0 takes all.
    """
    if not subsets and not sample:
        return None, sum(opened(path).metadata.num_rows for path in files)
    seen, best, kept = set(), [], []
    for f, path in enumerate(files):
        part = opened(path)
        for group in range(part.num_row_groups):
            for row, (id, relpath) in enumerate(names(part, group)):
                seen.add(subset_of(relpath))
                if subsets and subset_of(relpath) not in subsets:
                    continue
                if not sample:
                    kept.append((f, group, row))
                    continue
                rank = int.from_bytes(hashlib.sha256(f"{seed}\n{id}\n{relpath}".encode()).digest()[:8], "big")
                # The heap's root is the worst of the best; equal hashes (one row twice) are told
                # apart by their place.
                item = (-rank, -f, -group, -row)
                heapq.heappush(best, item) if len(best) < sample else heapq.heappushpop(best, item)
    if unknown := sorted(set(subsets) - seen):
        raise UserError(f"--subsets {unknown[0]}: not in these parts; they have {', '.join(sorted(seen))}")
    if sample > len(best):
        raise UserError(f"--sample {sample}: there are only {len(best)} such rows")
    kept += [(-f, -group, -row) for _, f, group, row in best]
    wanted = {}
    for f, group, row in sorted(kept):
        wanted.setdefault((f, group), []).append(row)
    return wanted, len(kept)


# --- one row ---


def convert(row, where, images):
    """A row -> the record for train.jsonl, its image written below `images`. BadRow names the
    column that is wrong.
    """
    relpath = row["image_relpath"]
    if (
        not isinstance(relpath, str)
        or not re.fullmatch(r"[^\x00-\x1f\\:]+", relpath)
        or relpath.startswith("/")
        or any(p in ("", ".", "..") for p in relpath.split("/"))
    ):
        raise BadRow(f"column 'image_relpath': {relpath!r} is not a relative path below the images")
    raw = (row["image"] or {}).get("bytes")
    if not raw:
        raise BadRow("column 'image': no bytes")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            image.load()
    except Exception as error:  # Pillow raises a dozen kinds for broken files
        raise BadRow(
            f"column 'image': {' '.join(str(error).split()).split(' <_io')[0] or type(error).__name__}"
        ) from None
    talk = row["conversations"]
    item = {
        "id": str(row["id"]),
        "image": store(raw, relpath, images),
        "conversations": talk,
        "family": subset_of(relpath),
    }
    try:
        data.check(where, item, images)  # what train.py will ask of it
    except data.RecordError as error:
        raise BadRow(str(error).removeprefix(f"{where}: ").replace("field", "column", 1)) from None
    return item


def store(raw, relpath, images):
    """Writes an image once -> its path below `images`. Another image of the same name gets its
    hash into its own.
    """
    path = images / relpath
    if path.exists() and not same(path, raw):
        path = path.with_stem(f"{path.stem}-{hashlib.sha256(raw).hexdigest()[:12]}")
    if not path.exists() or not same(path, raw):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(raw)
        os.replace(part, path)
    return path.relative_to(images).as_posix()


def same(path, raw):
    """True if the file at `path` holds `raw`."""
    return path.stat().st_size == len(raw) and path.read_bytes() == raw


# --- the conversion ---


def run(parts, out, subsets=(), sample=0, seed=0, skip=False, say=print):
    """Converts, or goes on where it was killed -> number of records in OUT/train.jsonl."""
    files, out = find(parts), Path(out)
    images, lines, state = out / "images", out / "train.jsonl", out / "progress.json"
    settings = {
        "subsets": sorted(subsets),
        "sample": sample,
        "seed": seed,
        "skip": skip,
        "parts": [[p.name, p.stat().st_size] for p in files],
    }
    done = {"settings": settings, "file": 0, "group": 0, "bytes": 0, "records": 0, "bad": []}
    if state.exists():
        done = json.loads(state.read_text())
        if done["settings"] != settings:
            raise UserError(f"{state}: was begun with other parts or flags; give the same, or another --out")
        say(f"going on after {done['records']} records")
    elif lines.exists():
        raise UserError(f"{lines}: exists, and no progress.json beside it; give another --out")
    wanted, total = choose(files, subsets, sample, seed)
    say(
        f"{total} rows of {len(files)} parts" + (f", subsets {', '.join(sorted(subsets))}" if subsets else "")
    )
    images.mkdir(parents=True, exist_ok=True)
    save(state, done)
    bar = tqdm(
        total=total, initial=done["records"] + len(done["bad"]), unit="row", disable=not sys.stderr.isatty()
    )
    with open(lines, "ab") as file:
        file.truncate(done["bytes"])  # lines after the last saved place were written just before a kill
        file.seek(0, os.SEEK_END)
        for f in range(done["file"], len(files)):
            part = opened(files[f])
            for group in range(done["group"] if f == done["file"] else 0, part.num_row_groups):
                rows = None if wanted is None else wanted.get((f, group), [])
                if rows is None or rows:
                    for at, row in taken(part, group, rows):
                        where = f"{files[f]}, row group {group}, row {at}"
                        try:
                            record = convert(row, where, images)
                        except BadRow as error:
                            leave_out(f"{where}: {error}", done["bad"], skip, total, "rows")
                        else:
                            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                            done["records"] += 1
                        bar.update()
                    file.flush()
                    os.fsync(file.fileno())
                    save(state, done | {"file": f, "group": group + 1, "bytes": file.tell()})
    bar.close()
    if done["bad"]:
        (out / "bad_records.jsonl").write_text(
            "".join(json.dumps({"problem": line}) + "\n" for line in done["bad"])
        )
        say(f"{len(done['bad'])} broken rows left out, see {out / 'bad_records.jsonl'}")
    say(f"{done['records']} records in {lines}")
    return done["records"]


def taken(part, group, rows):
    """(row's number, row as a dict) of the wanted rows of a group, or of all; 16 in Python's
    memory at a time.
    """
    wanted, at = None if rows is None else set(rows), 0
    for batch in part.iter_batches(batch_size=16, row_groups=[group], columns=list(COLUMNS)):
        numbers = [i for i in range(batch.num_rows) if wanted is None or at + i in wanted]
        for i, row in zip(numbers, batch.take(numbers).to_pylist() if numbers else []):
            yield at + i, row
        at += batch.num_rows


def save(path, value):
    """A small JSON file that is whole or the old one."""
    part = path.with_name(path.name + ".part")
    with open(part, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def main(argv=None):
    parser = config.OneLineParser(
        prog="covt.py",
        description="Turns the CoVT parquet parts into JSONL and images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--parts", required=True, help="folder of the downloaded parts, searched for .parquet files"
    )
    parser.add_argument("--out", default="data/covt", help="folder to write")
    parser.add_argument(
        "--list", action="store_true", help="print the subsets and how many rows each has, and write nothing"
    )
    parser.add_argument(
        "--subsets", default="", help="comma-separated names as --list prints them; empty: all"
    )
    parser.add_argument("--sample", type=int, default=0, help="so many rows, drawn by --seed; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--on_bad_record",
        default="stop",
        choices=("stop", "skip"),
        help="stop at a broken row, or leave it out, count and list it (above 1 %% stop)",
    )
    args = parser.parse_args(argv)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError("covt.py reads parquet and needs the extra `data`: pip install pyarrow") from None
    if args.sample < 0:
        raise UserError(f"--sample {args.sample}: must not be negative")
    if args.list:
        counts = survey(find(args.parts))
        for name, n in sorted(counts.items(), key=lambda x: -x[1]):
            print(f"{n:8} {name}")
        print(f"{sum(counts.values()):8} in all")
        return
    run(
        args.parts,
        args.out,
        {s.strip() for s in args.subsets.split(",") if s.strip()},
        args.sample,
        args.seed,
        args.on_bad_record == "skip",
    )


if __name__ == "__main__":
    config.run_cli(main)
