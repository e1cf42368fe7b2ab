"""easy-VQA becomes our JSONL and images: drawn shapes, 64 pixels wide, and questions about them.

    pip install easy-vqa                                   (or crystal-latents[vqa])
    python data_prep/easy_vqa.py --out data/easy_vqa --val 400

The package of that name (github vzhou842/easy-VQA, MIT) holds its data: 4,000 pictures with 38,575 questions
to train on, 1,000 with 9,673 to test, and 13 answers. What is written is {train,val,test}.jsonl and
images/{train,test}/ID.png; val is of pictures that are taken from those to train on, with all of their
questions. The families are yes_no, shape and colour, as the answers are.

Three questions of four ask for yes or no, and many of them are worded so that one answer is the likelier. So
the command says how many of the test's questions are answered rightly by one who has learned the training
questions and sees no picture: a model that scores no more has not seen one either.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from crystal.runtime import config, data
from crystal.runtime.config import UserError

FAMILIES = {"yes_no": ("yes", "no"), "shape": ("circle", "rectangle", "triangle")}  # all else is a colour


def family_of(answer):
    """The family of a question with this answer."""
    return next((family for family, answers in FAMILIES.items() if answer in answers), "colour")


def package_folder(given):
    """The folder of the package easy_vqa: the one that was named, or where Python finds it."""
    if given:
        folder = Path(given)
    else:
        spec = importlib.util.find_spec("easy_vqa")
        if spec is None or spec.origin is None:
            raise UserError(
                "the package easy-vqa is not installed: pip install easy-vqa, or --package names its folder"
            )
        folder = Path(spec.origin).parent
    if not (folder / "data" / "train").is_dir():
        raise UserError(f"{folder}: holds no data/train, so it is not easy-vqa's package (--package)")
    return folder


def read_questions(file):
    """A file of questions -> [(text, answer, picture's number)]. UserError naming the entry that is wrong."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: a JSON list of questions is needed")

    for i, entry in enumerate(entries):
        kinds = [type(value) for value in entry] if isinstance(entry, list) else []
        if kinds != [str, str, int] or not entry[0].strip() or not entry[1].strip():
            raise UserError(f"{file}[{i}]: a list of question, answer and the number of a picture is needed")
    return [tuple(entry) for entry in entries]


def record(split, number, picture, text, answer):
    """One line of the JSONL. picture: its path below the output."""
    return {
        "id": f"{split}-{number:06d}",
        "image": picture,
        "family": family_of(answer),
        "conversations": [
            {"from": "human", "value": f"<image>\n{text}"},
            {"from": "gpt", "value": answer},
        ],
    }


def held_out(pictures, count, seed):
    """The `count` pictures with the smallest hash of seed and number."""

    def digest(picture):
        return hashlib.sha256(f"{seed}\n{picture}".encode()).digest()

    return set(sorted(pictures, key=digest)[:count])


def guessing(train, test):
    """The share of test questions that the most frequent answer to the same words gets -> {family: share}.

    A question that was never asked in training counts as wrong. "all" stands last.
    """
    answers = defaultdict(Counter)
    for text, answer, _ in train:
        answers[text][answer] += 1

    right, asked = Counter(), Counter()
    for text, answer, _ in test:
        likeliest = answers[text].most_common(1)
        hit = bool(likeliest) and likeliest[0][0] == answer
        for family in (family_of(answer), "all"):
            asked[family] += 1
            right[family] += hit
    families = [family for family in asked if family != "all"]
    return {family: right[family] / asked[family] for family in [*families, "all"]}


def copy_pictures(source, folder, asked):
    """Copies the pictures that questions ask about into another folder. UserError if one is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in sorted({picture for _, _, picture in asked}):
        file = source / f"{picture}.png"
        if not file.is_file():
            raise UserError(f"{source}: no picture {picture}.png, which a question asks about")
        shutil.copyfile(file, folder / file.name)


def write_records(file, source, asked):
    """Writes questions as records. source: "train" or "test", which of the pictures they ask about."""
    lines = []
    for i, (text, answer, picture) in enumerate(asked, 1):
        line = record(file.stem, i, f"images/{source}/{picture}.png", text, answer)
        data.check(f"{file}:{i}", line, file.parent)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def run(package, out, val=400, seed=0, say=print):
    """The package's folder -> files below `out`. val: pictures that are held out of training."""
    package, out = Path(package), Path(out)
    train, test = (read_questions(package / "data" / split / "questions.json") for split in ("train", "test"))
    pictures = {picture for _, _, picture in train}
    if val >= len(pictures):
        raise UserError(f"--val {val}: there are only {len(pictures)} pictures to train on")

    for split, asked in (("train", train), ("test", test)):
        copy_pictures(package / "data" / split / "images", out / "images" / split, asked)

    # A picture is held out with all of its questions, so that none of them is known from another.
    apart = held_out(pictures, val, seed)
    kept = [entry for entry in train if entry[2] not in apart]
    held = [entry for entry in train if entry[2] in apart]
    for name, source, asked in (("train", "train", kept), ("val", "train", held), ("test", "test", test)):
        file = out / f"{name}.jsonl"
        if not asked:
            file.unlink(missing_ok=True)
            continue
        write_records(file, source, asked)
        count = len({picture for _, _, picture in asked})
        say(f"{name}: {len(asked)} questions about {count} pictures in {file}")

    shares = guessing(kept, test)
    listed = ", ".join(f"{family} {100 * share:.1f}" for family, share in shares.items())
    say(f"guessing from the question alone gets, percent of the test: {listed}")


def main(argv=None):
    parser = config.OneLineParser(
        prog="easy_vqa.py",
        description="Turns the package easy-vqa into JSONL and images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="data/easy_vqa", help="directory to write to")
    parser.add_argument("--val", type=int, default=400, help="pictures held out of training, for validation")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures that are held out")
    parser.add_argument("--package", default="", help="folder of the package; empty: the installed one")
    args = parser.parse_args(argv)
    if args.val < 0:
        raise UserError(f"--val {args.val}: must not be negative")
    run(package_folder(args.package), args.out, args.val, args.seed)


if __name__ == "__main__":
    config.run_cli(main)
