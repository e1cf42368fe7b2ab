"""Accuracy by question family, each with its 95 % interval.

    python -m crystal.evaluate --model runs/crystal --data runs/toy/test.jsonl
    torchrun --nproc_per_node=4 crystal/evaluate.py --model runs/crystal --data runs/toy/test.jsonl --latents drop

    python -m crystal.evaluate --model runs/livr --data runs/toy/test.jsonl --diagnose

Greedy answers, compared with the reference exactly, case and a final full stop aside. Every rank answers its share.
--diagnose asks whether a run's latents are used (LIVR, section 4.4.1): without them, under the method's mask, and both.

B questions, M answer rows, K latents, H heads.
"""
import json
import math
import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from crystal import config, data, methods, processes
from crystal.attention import AttentionTap
from crystal.bottleneck import Bias
from crystal.config import UserError
from crystal.export import open_model
from crystal.generate import generate
from crystal.methods.sft import Method as SFT


def wilson(hits, n, z=1.96):
    """Wilson's score interval of a proportion: (low, high) of hits / n at 95 %; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def same(prediction, answer):
    """Exact match after trimming, lower case, and dropping one final full stop on either side."""
    tidy = lambda text: text.strip().lower().removesuffix(".").strip()
    return tidy(prediction) == tidy(answer)


def answers(model, fmt, records, batch_size=32, latents="keep", corruption=None, grey=False, seed=0, max_new_tokens=32, procs=None, progress="",
            biases=None):
    """Records -> one dict each, in order: id, family, question, answer, prediction, correct.

    latents: "keep"; "drop" leaves them out of the sequence; "mask" lets nothing but themselves see them. corruption: (mode, low, high) answers from corrupted
    images; grey answers from grey ones. biases: function (batch) -> [bottleneck.Bias], a mask at test time. Ranks share
    the records and all return the whole list.
    """
    procs = procs or processes.Processes(device=model.device)
    if latents == "mask":
        latents, biases = "keep", hide_latents(fmt, biases)
    examples = data.Examples(records, lambda r, n: fmt.question(r.turns, n, latents), model.image_processor, corruption, seed, grey=grey,
                             copies=fmt.copies)
    mine, found = list(range(procs.rank, len(records), procs.world)), []
    bar = tqdm(total=len(mine), desc=progress, unit="question", disable=not (progress and procs.is_first and sys.stderr.isatty()), leave=False)
    for at in range(0, len(mine), batch_size):
        batch = [examples.build(i, 0) for i in mine[at : at + batch_size]]
        pixels = "pixel_values_cor" if corruption else "pixel_values"
        prompts = [(e["layout"][0], e[pixels], e["image_grid_thw"]) for e in batch]
        for i, prediction in zip(mine[at:], generate(model, prompts, fmt, max_new_tokens, biases, latents)):
            r = records[i]
            found.append({"index": i, "id": r.id, "family": r.family or "all", "question": r.turns[-1][1], "answer": r.answer,
                          "prediction": prediction, "correct": same(prediction, r.answer)})
        bar.update(len(batch))
    bar.close()
    return sorted(procs.gather(found), key=lambda f: f["index"])


def hide_latents(fmt, biases=None):
    """A mask under which no row but a latent sees a latent (LaViT, table 3), added to `biases`: function (batch) -> [bottleneck.Bias]."""
    if not fmt.count or fmt.begin is not None:
        raise UserError("--latents mask: the prompt holds no latents" + (" (they are fed back after it: --latents drop)" if fmt.count else ""))

    def both(batch):
        latents = torch.isin(batch["input_ids"], torch.tensor(fmt.latents, device=batch["input_ids"].device))  # [B,L]
        return [*(biases(batch) if biases else []), Bias(~latents, latents)]

    return both


def diagnose(model, fmt, method, records, **how):
    """LIVR's section 4.4.1 -> ({column: results of `answers`}, mean attention from answers to latents or None).

    Columns: as trained; latents dropped; under the method's mask, if it has one; and both. how: as for `answers`.
    """
    mask = lambda batch: method.biases(model, batch)
    masked = type(method).biases is not SFT.biases
    columns = {"as trained": {}, "latents dropped": {"latents": "drop"}, "bottleneck": {"biases": mask}, "bottleneck, dropped": {"latents": "drop", "biases": mask}}
    columns = {name: c for name, c in columns.items() if (fmt.count or "latents" not in c) and (masked or "biases" not in c)}
    found = {name: answers(model, fmt, records, progress=name, **c, **how) for name, c in columns.items()}
    return found, attention_on_latents(model, fmt, method, records, how.get("batch_size", 32), how.get("procs")) if fmt.count else None


@torch.no_grad()
def attention_on_latents(model, fmt, method, records, batch_size=32, procs=None):
    """Share of attention that the rows which predict the reference answers give to the K latents together, no mask -> float.

    Mean over all layers, heads and answer rows of a record, then over records.
    """
    procs = procs or processes.Processes(device=model.device)
    examples = data.Examples(records, lambda r, n: method.layout(fmt, r, n), model.image_processor, copies=fmt.copies)
    total, mine = 0.0, list(range(procs.rank, len(records), procs.world))
    for at in range(0, len(mine), batch_size):
        batch = data.collate([examples.build(i, 0) | {"bad": []} for i in mine[at : at + batch_size]], model.tokenizer.pad_token_id)
        batch = data.to_device(batch, model.device, model.hf.dtype)
        tap = AttentionTap(range(len(model.layers)), batch["rows"], batch["latents"], "weights")
        method.hidden(model, batch, tap)
        mass = torch.stack([x.sum(-1).mean(1) for x in tap.slices.values()]).mean(0)   # [B,M]
        total += float((mass.sum(1) / (batch["rows"] >= 0).sum(1)).sum())
    return procs.sum(total) / len(records)


def by_family(results):
    """Results of `answers` -> {family: (hits, n)}, families in order of appearance, then "all"."""
    table = {}
    for r in results:
        for family in dict.fromkeys((r["family"], "all")):
            hits, n = table.get(family, (0, 0))
            table[family] = (hits + r["correct"], n + 1)
    table["all"] = table.pop("all")
    return table


def table(columns):
    """{column: {family: (hits, n)}} -> text, a line per family: percent and the half width of its 95 % interval."""
    families = list(dict.fromkeys(f for c in columns.values() for f in c))
    families = [f for f in families if f != "all"] + ["all"]
    width = {c: max(12, len(c) + 2) for c in columns}
    lines = ["family".ljust(12) + "questions".rjust(10) + "".join(c.rjust(width[c]) for c in columns)]
    for family in families:
        cells, count = "", 0
        for name, column in columns.items():
            hits, count = column[family]
            low, high = wilson(hits, count)
            cells += f"{100 * hits / count:.1f} ±{50 * (high - low):.1f}".rjust(width[name])
        lines.append(family.ljust(12) + str(count).rjust(10) + cells)
    return "\n".join(lines)


def main(argv=None):
    parser = config.OneLineParser(prog="evaluate.py", description="Accuracy by question family on a JSON or JSONL file.")
    parser.add_argument("--model", default="tiny", help="a run directory, an exported directory, tiny, or a hub name")
    parser.add_argument("--checkpoint", default="best", help="of a run: best, last or a step")
    parser.add_argument("--data", required=True, help="records, JSON or JSONL")
    parser.add_argument("--image_root", default="", help="folder that image paths start from; empty: the folder of the data")
    parser.add_argument("--latents", default="keep", choices=("keep", "drop", "mask"), help="leave the latents out of the sequence, or let no other token see them")
    parser.add_argument("--bottleneck", action="store_true", help="answer under the method's mask, as LIVR's: the image is seen through latents alone")
    parser.add_argument("--diagnose", action="store_true", help="are the latents used: without them, under the method's mask, both, and the attention they get")
    parser.add_argument("--corruption", default="", help="answer from corrupted images: MODE, or MODE=STRENGTH as in blur=5")
    parser.add_argument("--grey", action="store_true", help="answer from grey images")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--limit", type=int, default=0, help="first so many records; 0: all")
    parser.add_argument("--out", default="", help="write a line of JSON per question here")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    try:
        procs = processes.start(args.device)
    except ValueError as error:
        raise UserError(f"--device {args.device}: {error}") from None
    model, fmt, settings = open_model(args.model, args.checkpoint, procs.device)
    method = methods.get(settings.method)(settings) if settings else SFT(config.Settings(method="sft"))
    if args.bottleneck and type(method).biases is SFT.biases:
        raise UserError(f"--bottleneck: {method.settings.method} has no mask")
    records, dropped = data.read(args.data, args.image_root)
    if broken := [r for r in records if isinstance(r, data.RecordError)]:
        raise broken[0]
    if dropped:
        procs.print(f"{dropped} later turns are not asked")
    records = records[: args.limit or None]
    corruption = None
    if args.corruption:
        mode, _, strength = args.corruption.partition("=")
        if mode not in data.PRIOR:
            raise UserError(f"--corruption {mode}: choose one of {', '.join(data.PRIOR)}")
        corruption = (mode, float(strength), float(strength)) if strength else (mode, *data.PRIOR[mode])
    started = time.perf_counter()
    how = dict(batch_size=args.batch_size, corruption=corruption, grey=args.grey, max_new_tokens=args.max_new_tokens, procs=procs)
    if args.diagnose:
        found, mass = diagnose(model, fmt, method, records, **how)
        results = [r | {"asked": name} for name, part in found.items() for r in part]
    else:
        biases = (lambda batch: method.biases(model, batch)) if args.bottleneck else None
        found, mass = {Path(args.model).name: answers(model, fmt, records, latents=args.latents, biases=biases, progress="evaluate", **how)}, None
        results = found[Path(args.model).name]
    procs.print(table({name: by_family(part) for name, part in found.items()}))
    if mass is not None:
        procs.print(f"mean attention from answers to latents, over layers, heads and rows: {mass:.4f}")
    procs.print(f"{len(results)} questions in {time.perf_counter() - started:.0f} s")
    if args.out and procs.is_first:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text("".join(json.dumps(r) + "\n" for r in results))
    procs.stop()


if __name__ == "__main__":
    config.run_cli(main)
