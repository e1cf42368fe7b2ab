"""What a LaViT student learns from its teacher: where it looked and what it saw, for every record
of a data set.

    python data_prep/lavit_teacher.py --teacher Qwen/Qwen2.5-VL-32B-Instruct --data viscot.jsonl
    torchrun --nproc_per_node=4 data_prep/lavit_teacher.py --teacher runs/sft --data runs/toy/train.jsonl
    python crystal/train.py --method lavit --data viscot.lavit.jsonl --semantics_dim 5120

Below the image root it writes lavit/NAME-00000.safetensors ... with the tensors
    ID/gaze [N]       A_traj, eq. 2 and 3, over all layers and heads, on the teacher's grid, one image after
                      the other
    ID/gaze_grid [I,2] rows and columns of each image's tokens; [I,3] where newlines stand behind the rows
    ID/gaze_top [8]   its largest tokens; a student takes the largest of its own grid, which are these where
                      the grids agree
    ID/v_sem [E]      V_sem: mean of the image tokens' states after the last layer and its norm (section 4.1)
beside each a NAME-00000.jsonl, a line a record: what it answered with the image and without, and its
attention's statistics, or why it was left out; and next to the records NAME.lavit.jsonl: those that pass the
three filters, with their field `features`. A shard that is there is not computed again, one with broken
records only by --on_bad_record stop: the same command goes on where it was stopped.

Text rows are those after the last image: question, the template's words, and the reference answer, which for
a record that passes the first filter is the teacher's own. B records, L length, M text rows, N image tokens,
H heads, E hidden size.
"""

import glob
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from crystal import evaluate, methods
from crystal.methods.lavit import entropy, focus, inside, normalise, salient
from crystal.methods.sft import Method as SFT
from crystal.opening import find, model_flags, open_model
from crystal.runtime import config, data, distributed
from crystal.runtime.checkpoint import MANIFEST
from crystal.runtime.config import UserError
from crystal.runtime.ops import attn_slice
from data_prep.broken import leave_out
from data_prep.features import progress, quiet_flag, replace_file, say, usable, write_records

TOP = 8  # section 4.1
LOOKS = 3  # at each record: asked with its image, asked without, and where it looks


class Looks:
    """Eq. 2 in one forward: S [B,N], mean over layers, heads and text rows of the attention
    that image tokens get.

    A recorder (attention.py): layer by layer it adds up M x N weights, so no L x L matrix exists, and fused
    attention stays on. rows [B,M] text, cols [B,N] image, -1 padded.
    """

    def __init__(self, rows, cols):
        self.rows, self.cols, self.sum, self.heads = rows, cols, 0, 0

    def __call__(self, layer, q, k, scale):
        A = attn_slice(q, k, self.rows, self.cols, scale=scale)  # [B,H,M,N], 0 where padded
        self.sum, self.heads = self.sum + A.sum((1, 2)), self.heads + A.shape[1]

    @property
    def S(self):
        return self.sum / (self.heads * (self.rows >= 0).sum(1, keepdim=True))


def text_rows(batch):
    """Positions after the last image that are neither latents nor padding -> [B,M], -1 padded."""
    at = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    text = (at > batch["image"].max(1, keepdim=True).values) & batch["attention_mask"].bool()  # [B,L]
    text &= ~(batch["latents"][:, :, None] == at).any(1)
    return torch.nn.utils.rnn.pad_sequence(
        [row.nonzero()[:, 0] for row in text], batch_first=True, padding_value=-1
    )


@torch.no_grad()
def look(model, fmt, method, records, batch_size):
    """Records -> [(tensors of the record, its attention's statistics)]; tensors and statistics as
    the module's docstring says.
    """
    sizes = lambda record, images: {"sizes": torch.tensor([image.size for image in images])}
    examples = data.RecordDataset(
        records, lambda r, n: method.layout(fmt, r, n), model.image_processor, extras=sizes
    )
    found = []
    for at in range(0, len(records), batch_size):
        group = records[at : at + batch_size]
        batch = data.collate(
            [examples.build(at + i, 0) | {"bad": []} for i in range(len(group))], model.tokenizer.pad_token_id
        )
        batch = data.to_device(batch, model.device, model.hf.dtype)
        recorder = Looks(text_rows(batch), batch["image"])
        h = method.hidden(model, batch, recorder)  # [B,L,E]
        # Rows and columns of tokens of every image.
        images = model.image_processor.grids(batch["image_grid_thw"])
        for r, S, cols, states, sizes_of in zip(
            group, recorder.S.cpu(), batch["image"], h, batch["sizes"].tolist()
        ):
            seen, images = images[: len(r.images)], images[len(r.images) :]
            own = torch.tensor(
                [grid for image in seen for grid in image]
            )  # [I,3], for some families more than one of an image
            cols = cols[cols >= 0]
            A = normalise(S[: len(cols)].float())  # eq. 3
            tensors = {
                "gaze": A,
                "gaze_grid": own if own[:, 2].any() else own[:, :2].clone(),
                "gaze_top": A.argsort(descending=True, stable=True)[:TOP],
                "v_sem": states[cols].float().mean(0).cpu(),
            }
            target = torch.zeros(len(A), dtype=torch.bool)
            if r.boxes:  # boxes are pixels of the first image
                first = torch.cat([inside(r.boxes, sizes_of[0], grid) for grid in seen[0]])
                target[: len(first)] = first
            found.append(
                (
                    tensors,
                    {
                        "focus": float(focus(A, target)) if r.boxes else None,
                        "entropy": float(entropy(A)),
                        "salient": salient(A),
                    },
                )
            )
    return found


def without_image(record):
    """The record's question alone, as text."""
    return replace(
        record, images=[], turns=[(role, text.replace("<image>", "").strip()) for role, text in record.turns]
    )


def shard(model, fmt, method, records, args, leave, tell=lambda looks: None):
    """Records -> (tensors to store, a dict to log for each record). leave: told the RecordError of one that
    is broken, as its image may turn out to be. tell: told how many looks were done, LOOKS a record.
    """
    examples, broken = (
        data.RecordDataset(records, lambda r, n: method.layout(fmt, r, n), model.image_processor),
        {},
    )
    for i, r in enumerate(records):
        try:
            examples.build(i, 0)
        except data.RecordError as error:
            leave(error)
            tell(LOOKS)
            broken[r.id] = {"id": r.id, "where": r.where, "broken": str(error)}
    records = [r for r in records if r.id not in broken]
    how = dict(batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    seeing = evaluate.answers(model, fmt, records, **how)
    tell(len(records))
    blind = evaluate.answers(model, fmt, [without_image(r) for r in records], **how)
    tell(len(records))
    tensors, lines = {}, []
    for r, a, b, (own, statistics) in zip(
        records, seeing, blind, look(model, fmt, method, records, args.batch_size)
    ):
        tensors |= {f"{r.id}/{name}": x.contiguous() for name, x in own.items()}
        tell(1)
        lines.append(
            {
                "id": r.id,
                "where": r.where,
                "answer": r.answer,
                "prediction": a["prediction"],
                "correct": a["correct"],
                "blind_prediction": b["prediction"],
                "blind_correct": b["correct"],
                **statistics,
            }
        )
    return tensors, [*lines, *broken.values()]


def passes(line, share):
    """The three filters of section 4.1 -> (correct, not solvable without the image, attention on target).

    Without boxes the third cannot be judged, and passes.
    """
    return line["correct"], not line["blind_correct"], line["focus"] is None or line["focus"] >= share


def report(lines, share):
    """What each filter keeps, alone and after those before it -> text."""
    n, kept = len(lines), lines
    out = [
        f"{n} records, entropy of the gaze {sum(x['entropy'] for x in lines) / n:.3f}, salient tokens "
        f"{sum(x['salient'] for x in lines) / n:.1f}"
    ]
    judged = [x["focus"] for x in lines if x["focus"] is not None]
    if judged:
        out[0] += f", focus score {sum(judged) / len(judged):.3f}"
    for i, what in enumerate(
        (
            "answered correctly",
            "not solved without the image",
            f"at least {100 * share:g} % of the attention inside the boxes",
        )
    ):
        kept = [x for x in kept if passes(x, share)[i]]
        out.append(
            f"  {what}: {sum(passes(x, share)[i] for x in lines)} alone, {len(kept)} after the filters before"
        )
    if len(judged) < n:
        out.append(f"  {n - len(judged)} records have no boxes: the last filter lets them pass")
    return "\n".join(out)


def weights(args):
    """What tells a run's checkpoints apart: the hash of the manifest that hashes its files. Empty for a
    directory or a hub name.
    """
    if not (Path(args.teacher) / "checkpoints").is_dir():
        return ""
    return hashlib.sha256((find(Path(args.teacher), args.checkpoint) / MANIFEST).read_bytes()).hexdigest()


def log(part):
    """The lines that a shard logged, [] where it is not there or not whole."""
    if not (Path(f"{part}.jsonl").is_file() and Path(f"{part}.safetensors").is_file()):
        return []
    return [json.loads(line) for line in Path(f"{part}.jsonl").read_text().splitlines()]


def main(argv=None):
    parser = config.OneLineParser(
        prog="lavit_teacher.py",
        description="Gaze and semantics of a teacher on a data set, for --method lavit.",
    )
    parser.add_argument(
        "--teacher", required=True, help="a run directory, an exported directory, tiny, or a hub name"
    )
    model_flags(parser)
    parser.add_argument("--data", required=True, help="records, JSON or JSONL, each with an id of its own")
    parser.add_argument(
        "--image_root", default="", help="folder that image paths start from; empty: the folder of the data"
    )
    parser.add_argument(
        "--keep",
        default="filtered",
        choices=("filtered", "all"),
        help="records to write: those that pass the filters, or all (for validation)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.2,
        help="of the attention on the image, what must lie inside the boxes",
    )
    parser.add_argument(
        "--on_bad_record",
        default="stop",
        choices=("stop", "skip"),
        help="stop at a broken record, or leave it out and tell (above 1 %% stop)",
    )
    parser.add_argument("--limit", type=int, default=0, help="first so many records; 0: all")
    parser.add_argument("--shard", type=int, default=256, help="records a file")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of a teacher that is no run; auto: bfloat16 on a GPU, float32 elsewhere",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="make shards anew that another teacher or other settings made",
    )
    quiet_flag(parser)
    args = parser.parse_args(argv)
    for name in ("shard", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.limit < 0:
        raise UserError(f"--limit {args.limit}: must not be negative")
    # Ranks wait for the slowest one's last shard.
    procs, skip = (
        distributed.start(args.device, timeout=86400.0),
        args.on_bad_record == "skip",
    )
    source, root = Path(args.data), Path(args.image_root or Path(args.data).parent)
    records, bad, dropped = usable(source, root, skip, args.limit)
    total, seen = len(records) + len(bad), list(bad)
    folder = root / "lavit"
    parts = [folder / f"{source.stem}-{i:05d}" for i in range((len(records) + args.shard - 1) // args.shard)]
    made_with = {
        n: getattr(args, n) for n in ("teacher", "shard", "min_pixels", "max_pixels", "max_new_tokens")
    }
    made_with |= {"weights": weights(args), "records": [r.id for r in records]}
    note = folder / f"{source.stem}.json"
    stale = note.is_file() and json.loads(note.read_text()) != made_with
    if stale and not args.overwrite:
        raise UserError(
            f"{note}: the shards there were made by another teacher, of other records or with other "
            "settings; --overwrite makes them anew"
        )
    procs.barrier()  # all ranks have looked
    if procs.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{glob.escape(source.stem)}-[0-9][0-9][0-9][0-9][0-9].*") if stale else ():
            old.unlink()
        note.write_text(json.dumps(made_with) + "\n")

    procs.barrier()
    logs = [log(part) for part in parts]
    # An image may have been mended.
    todo = [
        i
        for i, lines in enumerate(logs)
        if not lines or (not skip and any("broken" in line for line in lines))
    ]
    procs.barrier()  # all ranks have seen the same ones missing
    say(
        args,
        procs,
        f"{len(records)} records in {len(parts)} shards, {len(parts) - len(todo)} there already"
        + (f"; {dropped} later turns left out" if dropped else ""),
    )
    if todo:
        dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
        model, fmt, settings = open_model(
            args.teacher,
            args.checkpoint,
            procs.device,
            dtype=dtype,
            min_pixels=args.min_pixels,
            max_pixels=args.max_pixels,
            method=args.method,
            trust_method=args.trust_method,
        )
        method = methods.get(settings.method)(settings) if settings else SFT(config.Settings(method="sft"))
        if fmt.copies > 1:
            raise UserError(
                f"{args.teacher}: shows itself each image {fmt.copies} times; a gaze needs a teacher that "
                "sees it once"
            )
        mine = todo[procs.rank :: procs.world]
        held = {i: records[i * args.shard : (i + 1) * args.shard] for i in mine}
        bar = progress(args, "lavit_teacher", procs, LOOKS * sum(map(len, held.values())), "look")
        for i in mine:
            tensors, lines = shard(
                model,
                fmt,
                method,
                held[i],
                args,
                lambda error: leave_out(str(error), seen, skip, total, "records"),
                bar.update,
            )
            replace_file(f"{parts[i]}.safetensors", lambda path: save_file(tensors, path))
            replace_file(
                f"{parts[i]}.jsonl",
                lambda path: Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines)),
            )
        bar.close()
    procs.barrier()

    if procs.is_first:
        lines, kept = [], {}
        for part in parts:
            for line in log(part):
                if "broken" in line:  # on any rank, or in a run before this one
                    leave_out(line["broken"], bad, skip, total, "records")
                    continue
                lines.append(line)
                if args.keep == "all" or all(passes(line, args.share)):
                    kept[line["id"]] = f"lavit/{part.name}.safetensors"
        if lines:
            say(args, procs, report(lines, args.share))
            if not kept:
                raise UserError(
                    f"{source}: no record passes all three filters; a better teacher, or --keep all"
                )
        out = write_records(source, "lavit", {r.where: kept[r.id] for r in records if r.id in kept}, bad)
        name, path = next(iter(kept.items()))
        with safe_open(root / path, "pt") as file:
            E = file.get_slice(f"{name}/v_sem").get_shape()[0]
        print(f"wrote {len(kept)} records to {out}: --method lavit --semantics_dim {E}")
    procs.stop()


if __name__ == "__main__":
    config.run_cli(main)
