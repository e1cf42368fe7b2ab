"""TallyQA's raw files become our JSONL: counting questions, simple and complex (Acharya et al. 2019).

    python data_prep/tallyqa.py --questions train.json --images images --out data/tallyqa.jsonl
    --kind complex --sample 20000

The questions are a JSON list with the fields `image`, `question`, `answer` (a number), `issimple`,
`data_source`, `image_id` and `question_id`; the images are Visual Genome's and COCO's, below one folder as
`image` names them (VG_100K/2.jpg, train2014/COCO_train2014_000000000009.jpg). What is written is the path
relative to that folder, so training takes `--image_root images`. CoVT uses a filtered TallyQA without saying
how it was filtered: its rows come with `data_prep/covt.py`.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from crystal.runtime import config, data
from crystal.runtime.config import UserError
from data_prep.broken import leave_out

FIELDS = ("image", "question", "answer", "issimple", "question_id")


def convert(item, where, images, prompt):
    """One raw question -> our record. RecordError names the field that is missing or wrong."""
    if not isinstance(item, dict):
        raise data.RecordError(f"{where}: a question is a JSON object, not {type(item).__name__}")
    for name in FIELDS:
        if name not in item:
            raise data.RecordError(
                f"{where}: no field {name!r}; it has {', '.join(map(str, item))}; TallyQA's questions have "
                f"{', '.join(FIELDS)}"
            )
    if not isinstance(item["answer"], int) or isinstance(item["answer"], bool) or item["answer"] < 0:
        raise data.RecordError(f"{where}: field 'answer': {item['answer']!r} is not a count")
    if not isinstance(item["issimple"], bool):
        raise data.RecordError(f"{where}: field 'issimple': {item['issimple']!r} is not true or false")
    if not isinstance(item["question"], str) or not item["question"].strip():
        raise data.RecordError(f"{where}: field 'question': empty")
    question = item["question"].strip() + (f"\n{prompt}" if prompt else "")
    record = {
        "id": f"tallyqa-{item['question_id']}",
        "image": item["image"],
        "family": "simple" if item["issimple"] else "complex",
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": str(item["answer"])},
        ],
    }
    data.check(where, record, images)
    return record


def run(questions, images, out, kind="all", sample=0, seed=0, prompt="", skip=False, say=print):
    """Raw questions -> number of records written to `out`. sample: so many, those with the smallest hash
    of seed and id.
    """
    questions, images, out = Path(questions), Path(images), Path(out)
    try:
        items = json.loads(questions.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{questions}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{questions}: not JSON: {error}") from None
    if not isinstance(items, list) or not items:
        raise UserError(f"{questions}: a JSON list of questions is needed")
    if not images.is_dir():
        raise UserError(f"{images}: no such folder (--images)")
    records, bad = [], []
    for i, item in enumerate(items):
        try:
            record = convert(item, f"{questions}[{i}]", images, prompt)
        except data.RecordError as error:
            leave_out(str(error), bad, skip, len(items), "questions")
            continue
        if kind in ("all", record["family"]):
            records.append(record)
    if sample > len(records):
        raise UserError(f"--sample {sample}: there are only {len(records)} such questions")
    if sample:
        order = sorted(
            range(len(records)), key=lambda i: hashlib.sha256(f"{seed}\n{records[i]['id']}".encode()).digest()
        )
        records = [records[i] for i in sorted(order[:sample])]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    for line in bad:
        say(f"left out: {line}")
    counts = {k: sum(r["family"] == k for r in records) for k in ("simple", "complex")}
    say(
        f"{len(records)} records in {out} ({counts['simple']} simple, {counts['complex']} complex), "
        f"{len(bad)} broken ones left out"
    )
    return len(records)


def main(argv=None):
    parser = config.OneLineParser(
        prog="tallyqa.py",
        description="Turns TallyQA's raw questions into JSONL.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--questions", required=True, help="TallyQA's train.json or test.json")
    parser.add_argument("--images", required=True, help="folder that the questions' image paths start from")
    parser.add_argument("--out", default="data/tallyqa.jsonl", help="file to write")
    parser.add_argument("--kind", default="all", choices=("all", "simple", "complex"), help="which questions")
    parser.add_argument("--sample", type=int, default=0, help="so many questions, drawn by --seed; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--prompt", default="", help="a line added to every question, such as: Answer with a number."
    )
    parser.add_argument(
        "--on_bad_record",
        default="stop",
        choices=("stop", "skip"),
        help="stop at a broken question, or leave it out and tell (above 1 %% stop)",
    )
    args = parser.parse_args(argv)
    if args.sample < 0:
        raise UserError(f"--sample {args.sample}: must not be negative")
    run(
        args.questions,
        args.images,
        args.out,
        args.kind,
        args.sample,
        args.seed,
        args.prompt,
        args.on_bad_record == "skip",
    )


if __name__ == "__main__":
    config.run_cli(main)
