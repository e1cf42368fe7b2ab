"""Train a method of visual latent reasoning. Read it from top to bottom.

    python crystal/train.py                                   the shipped tiny model on toy scenes
    torchrun --nproc_per_node=4 crystal/train.py              the same on four processes
    python -m crystal.train --method sft --max_steps 200      another method, another length
    python crystal/train.py --model Qwen/Qwen2.5-VL-7B-Instruct --data covt.jsonl --image_root images

B pairs per process and forward; an update sees B x accumulation x processes of them. Every term is a mean over the
update's pairs, whatever the numbers of processes and forwards that share them.
"""
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, fields, replace
from pathlib import Path

if not __package__:  # run as a script: the repository root, not this folder, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn as nn
import transformers
from tqdm import tqdm

import crystal.backbone.model
from crystal import methods
from crystal.losses import total
from crystal.runtime import checkpoint, config, data, distributed, ops
from crystal.runtime.config import UserError


class Objective(nn.Module):
    """Model, extra heads and method as one module, so that DDP sees one forward: a batch in, the loss terms out."""

    def __init__(self, model, method, autocast=nullcontext()):
        super().__init__()
        self.model, self.method, self.autocast = model, method, autocast
        self.heads = method.modules(model)

    def forward(self, batch, progress):
        with self.autocast:
            return self.method.losses(self.model, batch, progress)


def learning_rate(step, settings):
    """Learning rate of update `step` (from 0): in each stage a linear warm-up over a share of its steps, then a cosine (or a line) to 0."""
    stage = settings.progress(step).stage
    start, stop = settings.span(stage)
    peak, warmup = settings.stages[stage].lr, math.ceil(settings.warmup * (stop - start))
    if step - start < warmup:
        return peak * (step - start + 1) / warmup
    behind = (step - start - warmup) / max(1, stop - start - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * behind)) if settings.decay == "cosine" else 1 - behind)


def main(argv=None):
    # ------------------------------------------------------------------------------------------------- settings
    settings = methods.parse(argv)
    run = settings.run_dir
    nearest = next(p for p in (run, *run.absolute().parents) if p.exists())  # where the run directory is, or will be made
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--output {run}: {nearest} is not a directory that can be written to")
    if settings.tensorboard:
        summary_writer()  # whether there is one

    # ------------------------------------------------------------------------------------------------ processes
    procs = distributed.start(settings.device)
    device = procs.device
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(settings.dtype) or getattr(torch, settings.dtype)
    settings = replace(settings, dtype=str(dtype).removeprefix("torch."))  # what `auto` came to, for those who open the run later
    # Full fine-tuning keeps its weights in float32 and computes in the smaller type; adapters are float32 on frozen small weights.
    weights_dtype = torch.float32 if settings.tune == "full" and dtype == torch.bfloat16 else dtype
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=weights_dtype != dtype)

    # ----------------------------------------------------------------------------------------------------- model
    ops.announce(procs.print)
    with procs.main_process_first():  # a hub name is downloaded once
        model = crystal.backbone.model.load(settings.model, weights_dtype, device, settings.min_pixels, settings.max_pixels)
    method, fmt = methods.attach(model, settings)
    objective = Objective(model, method, autocast).to(device).train()
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    if not named:
        raise UserError(f"--tune {settings.tune}: with --method {settings.method} nothing is left to train")
    count = sum(p.numel() for _, p in named)
    procs.print(f"{settings.method} on {settings.model}: {count:,} trainable of {sum(p.numel() for p in objective.parameters()):,} parameters, "
                f"{procs.world} process(es) on {device.type}, {weights_dtype}".replace("torch.", ""))

    # ------------------------------------------------------------------------------------------------------ data
    # One set to train on for each stage; what was broken is listed once the directory is this run's.
    train_sets, val_set, unlisted = open_data(settings, method, model, fmt, procs)
    pad = model.tokenizer.pad_token_id

    # ------------------------------------------------------------------------------------------------- optimiser
    # Vocabulary rows are not decayed (decay pulls a latent towards 0, not towards a small map), nor are vectors.
    tokens = [] if model.new_tokens is None else list(model.new_tokens.parameters())
    others = [p for _, p in named if not any(p is token for token in tokens)]
    vectors = [p for p in others if p.ndim < 2]
    matrices = [p for p in others if p.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay, "lr_scale": 1.0}, {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
              {"params": tokens, "weight_decay": 0.0, "lr_scale": settings.lr_tokens}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr)

    # ---------------------------------------------------------------------------------------------------- resume
    step = 0
    if settings.resume:
        newest = checkpoint.newest(run, procs.print)
        if newest is None:
            raise UserError(f"{run}/checkpoints: nothing to resume from")
        step = restore(newest, settings, objective, optimizer, named, procs)
        procs.print(f"resumed {newest} at update {step}")
    elif holds_a_run(run):
        if not settings.overwrite:
            raise UserError(f"{run}: holds a run already; --resume goes on from it, --overwrite starts anew, --output names another directory")
        check_overwrite(run, settings)

    # ------------------------------------------------------------------------------------------------------ loop
    wrapped = procs.wrap(objective)
    batches = itertools.chain.from_iterable(stage_batches(i, train_set, step, settings, pad, procs) for i, train_set in enumerate(train_sets))
    bar = tqdm(total=settings.max_steps, initial=step, unit="step", disable=not (procs.is_first and sys.stderr.isatty()))
    log, board, begun = None, None, False
    bad_count, last_saved = 0, step if settings.resume else None
    best = checkpoint.best(run) if settings.resume else None
    stop, stopping = distributed.StopSignal(), False
    terms = loss = None

    while step < settings.max_steps and not stopping:
        started = time.perf_counter()
        rate = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        logged, tokens = {}, 0
        for part in range(settings.accumulation):
            batch = data.to_device(next(batches), device, weights_dtype)
            broken = report_bad(batch, bad_count, step, settings, procs)
            bad_count, unlisted = bad_count + len(broken), unlisted + broken
            # Dropout is seeded by update, part and rank, so a resumed run draws what the unbroken one would have.
            torch.manual_seed(data.seed_of(settings.seed, step, part, procs.rank))
            with procs.no_sync(wrapped, part < settings.accumulation - 1):
                terms = wrapped(batch, settings.progress(step))
                loss = weighted(terms, method, settings)  # eq. 6
                (loss / settings.accumulation).backward()
            for name, value in {"loss": loss, **terms}.items():
                logged[name] = logged.get(name, 0.0) + value.detach().double() / settings.accumulation
            tokens += int(batch["attention_mask"].sum()) * (2 if method.corruption else 1)
        norm = nn.utils.clip_grad_norm_([p for _, p in named], settings.clip)
        # Ranks share gradients but not losses: either may be the first to break, and all must stop together.
        if procs.any(not (math.isfinite(float(logged["loss"])) and math.isfinite(float(norm)))):
            good = checkpoint.newest(run, procs.print) if last_saved is not None else None
            raise UserError(f"update {step}: loss {float(logged['loss'])} or gradient norm {float(norm)} is not finite; stopped before the update, "
                            f"the last good checkpoint is {good or 'none'}")
        # Only now, with a first update that works on all ranks, does the directory become this run's:
        # whatever fails before leaves an older run whole.
        if not begun and procs.is_first:
            log, board = begin(run, step, settings, procs)
        begun = True
        list_bad(unlisted, run, procs)
        unlisted = []
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_update()
        step += 1

        means = {name: float(procs.sum(value)) / procs.world for name, value in logged.items()}
        tokens = procs.sum(tokens)
        if procs.is_first:
            line = {"step": step, **means, "lr": rate, "grad_norm": float(norm),
                    "tokens_per_s": tokens / (time.perf_counter() - started), "peak_memory_gb": peak_memory(device)}
            write(log, board, line)
            bar.set_postfix({n: f"{v:.3f}" for n, v in means.items() if n not in method.monitored}, refresh=False)
            bar.update()
            if bar.disable and (step % settings.log_every == 0 or step == settings.max_steps):
                print(f"step {step}/{settings.max_steps}  " + "  ".join(f"{n} {v:.4f}" for n, v in means.items()) + f"  {line['tokens_per_s']:.0f} tokens/s", flush=True)

        stopping = procs.any(stop.asked)  # asked once a step, so that all ranks end after the same one
        last = stopping or step == settings.max_steps
        if val_set and settings.eval_every and (step % settings.eval_every == 0 or last):
            measured = validate(objective, val_set, settings, method, pad, procs, weights_dtype)
            if method.metric not in measured:
                raise UserError(f"--method {settings.method}: its metric {method.metric!r} is none of what it measures, {', '.join(measured)}")
            value = measured[method.metric]
            if best is None or value < best["value"]:
                best = {"step": step, "value": value, "metric": f"val_{method.metric}"}
                if procs.is_first:
                    store(run, step, settings, optimizer, named, procs, best)
                last_saved = step
            if procs.is_first:
                write(log, board, {"step": step, **{f"val_{n}": v for n, v in measured.items()}})
                bar.write(f"step {step}  validation  " + "  ".join(f"{n} {v:.4f}" for n, v in measured.items()) + ("  (best)" if best["step"] == step else ""))
        if (step % settings.save_every == 0 or last) and last_saved != step:
            if procs.is_first:
                store(run, step, settings, optimizer, named, procs, None)
            last_saved = step

    # ------------------------------------------------------------------------------------------------------- end
    bar.close()
    if stopping and step < settings.max_steps:
        procs.print(f"stopped by {stop.asked or 'a signal'} after update {step}; the same command with --resume goes on from there")
    stop.restore()
    if log:
        log.close()
    procs.barrier()
    del wrapped, terms, loss  # what holds the process group goes before it: its end could otherwise wait for ever, once in a while
    gc.collect()
    procs.stop()
    return run


def open_data(settings, method, model, fmt, procs):
    """Settings -> (training Examples of each stage, validation Examples or None, messages of broken records).

    What was dropped is printed.
    """
    stages, root = settings.stages, settings.image_root
    train, val = [stage.data or settings.data for stage in stages], settings.val_data
    if not all(train):
        from crystal.runtime import toy
        root = "runs/toy"
        with procs.main_process_first(), nullcontext() if procs.is_first else redirect_stdout(None):
            toy.generate(root, seed=settings.seed)
        train, val = [path or f"{root}/train.jsonl" for path in train], val or f"{root}/val.jsonl"
    known, problems = {}, []  # what a file holds, since stages may share it
    for split, path in [("train", path) for path in dict.fromkeys(train)] + [("val", val)] * bool(val):
        records, dropped = data.read(path, root, settings.turns)
        broken = [r for r in records if isinstance(r, data.RecordError)]
        if broken and settings.on_bad_record == "stop":
            raise UserError(f"{broken[0]}" + (f" (and {len(broken) - 1} more broken records)" if len(broken) > 1 else "") + "; --on_bad_record skip leaves them out")
        if len(broken) > 0.01 * len(records):
            raise UserError(f"{path}: {len(broken)} of {len(records)} records are broken, more than 1 %; the first: {broken[0]}")
        if broken:
            problems += [str(b) for b in broken]
            records = [r for r in records if not isinstance(r, data.RecordError)]
        if split == "val":
            records = records[: settings.eval_records]
        procs.print(f"{split}: {len(records)} records of {path}" + (f"; {dropped} later turns left out (--turns all makes records of them)" if dropped else "")
                    + (f"; {len(broken)} broken ones skipped, see {settings.run_dir}/bad_records.jsonl" if broken else ""))
        known[split, path] = records

    def examples(split, path, stage):
        return data.RecordDataset(known[split, path], lambda record, n: method.layout(fmt, record, n, stage), model.image_processor, method.corruption,
                             settings.seed + (split == "val"), settings.on_bad_record == "skip" and split == "train", copies=fmt.copies, extras=method.extras)

    train_sets = [examples("train", path, i) for i, path in enumerate(train)]
    return train_sets, examples("val", val, len(stages) - 1) if val else None, problems


def holds_a_run(run):
    """Whether there is a run in a directory that a new one would spoil."""
    return (run / "metrics.jsonl").exists() or (run / "checkpoints").exists()


def check_overwrite(run, settings):
    """UserError where --overwrite would delete what the new run reads."""
    read = [(name, getattr(settings, name)) for name in ("method", "model", "data", "val_data", "image_root")]
    read += [("data", stage.data) for stage in settings.stages]
    for name, path in read:
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(run.resolve()):
            raise UserError(f"--overwrite would delete --{name} {path}, which lies in {run}; "
                            "move it, or name another --output")


def begin(run, step, settings, procs):
    """On rank 0, makes the directory this run's, from update `step` on -> (open log, SummaryWriter or None).

    With --overwrite an older run in it is deleted here, and nowhere else.
    """
    path = run / "metrics.jsonl"
    if settings.resume and path.exists():  # what was logged after the checkpoint happens again
        kept = [x for x in logged_lines(path) if x["step"] <= step]
        path.write_text("".join(json.dumps(x) + "\n" for x in kept))
    elif not settings.resume and holds_a_run(run):
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    made_by = methods.fingerprint(settings.method) | {"versions": versions(), "world": procs.world}
    (run / "config.json").write_text(json.dumps(asdict(settings) | made_by, indent=1) + "\n")
    methods.keep_copy(settings.method, run)
    return open(path, "a"), summary_writer()(run / "tensorboard") if settings.tensorboard else None


def stage_batches(stage, examples, step, settings, pad, procs):
    """This rank's batches of a stage (from 0), from update `step` of the run on; a stage that lies behind has none."""
    start, stop = settings.span(stage)
    order = data.BatchSampler(len(examples), settings.batch_size, settings.accumulation, procs.rank, procs.world, settings.seed, max(start, step), stop)
    if step < stop:
        yield from data.loader(examples, order, pad, settings.workers, distributed.ignore_signals)


def report_bad(batch, count, step, settings, procs):
    """Messages of all ranks' records that broke while the batch was loaded; `count` broke before.

    UserError, on all ranks, above 1 % of those seen so far, and for one that was not skipped.
    """
    if not procs.any(batch["bad"] or "error" in batch):
        return []
    if errors := procs.gather([batch["error"]] if "error" in batch else []):
        raise UserError(errors[0])
    broken = procs.gather(batch["bad"])
    seen = (step + 1) * settings.batch_size * settings.accumulation * procs.world
    if count + len(broken) > max(1, 0.01 * seen):
        raise UserError(f"{count + len(broken)} of {seen} records were broken, more than 1 %; "
                        f"the last: {broken[-1]}")
    return broken


def list_bad(lines, run, procs):
    """Appends lines to the run's bad_records.jsonl, on rank 0."""
    if lines and procs.is_first:
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "bad_records.jsonl", "a") as file:
            file.writelines(json.dumps({"problem": line}) + "\n" for line in lines)


@torch.no_grad()
def validate(objective, examples, settings, method, pad, procs, dtype):
    """Mean of every loss term over the validation records; each rank takes every world-th batch.

    A broken record is left out and not replaced, so that none counts twice. UserError for the first one, with --on_bad_record skip above 1 %.
    """
    objective.eval()
    n, size = len(examples), settings.batch_size
    batches = [range(at, min(at + size, n)) for at in range(0, n, size)][procs.rank :: procs.world]
    sums, seen, broken = {}, 0, []
    for indices in batches:
        made = {i: examples[0, i] for i in indices}
        broken += [[i, e["error"]] for i, e in made.items() if "error" in e and not isinstance(examples.records[i], data.RecordError)]
        made = [e for e in made.values() if "error" not in e]
        if not made:
            continue
        batch = data.to_device(data.collate(made, pad), procs.device, dtype)
        terms = objective(batch, settings.progress(settings.max_steps))  # the model as it will be asked, whatever stage it is in
        pairs = len(batch["input_ids"])
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value) * pairs
        seen += pairs
    objective.train()
    if broken := procs.gather(broken):
        if settings.on_bad_record == "stop":
            raise UserError(f"{broken[0][1]}; --on_bad_record skip leaves it out")
        list_bad([line for _, line in broken], settings.run_dir, procs)
        for i, line in broken:  # listed once; the records behind it keep their number, which their corruption is drawn from
            examples.records[i] = data.RecordError(line)
        count = sum(isinstance(r, data.RecordError) for r in examples.records)
        if count > 0.01 * n:
            raise UserError(f"{count} of {n} validation records are broken, more than 1 %; they are listed in {settings.run_dir}/bad_records.jsonl")
    names = sorted(set(procs.gather(list(sums))))  # a rank without a batch still takes part
    total = procs.sum(seen)
    means = {name: procs.sum(float(sums.get(name, 0.0))) / total for name in names}
    return {"loss": weighted(means, method, settings), **means}


def weighted(terms, method, settings):
    """Eq. 6 over what trains; a monitored term is left out. UserError for a term that the settings give no weight."""
    trained = {n: t for n, t in terms.items() if n not in method.monitored}
    try:
        return total(trained, settings.weights)
    except KeyError as missing:
        raise UserError(f"--method {settings.method}: its losses have a term {missing} without a weight; its Settings.weights "
                        "names the weight of each, or its Method.monitored names what does not train") from None


def store(run, step, settings, optimizer, named, procs, best):
    """Writes checkpoints/step-N: what trains, the optimiser's state, the settings; the older ones beyond --keep go."""
    files = {"trainable.safetensors": {n: p.detach() for n, p in named}, "optimizer.safetensors": checkpoint.optimizer_tensors(optimizer, named)}
    checkpoint.save(run, step, files, {"step": step, "settings": asdict(settings), "pairs": pairs(settings, procs)} | methods.fingerprint(settings.method))
    if best:
        checkpoint.mark_best(run, **best)
    checkpoint.prune(run, settings.keep)


def pairs(settings, procs):
    """Pairs in one update, of all ranks and micro-batches."""
    return settings.batch_size * settings.accumulation * procs.world


# What a resume may set anew: where and how the run computes, what it writes, and how an update's pairs are split. A run that stopped at a broken
# image goes on with --on_bad_record skip: which records there are, and their order, is the same.
MAY_CHANGE = {"output", "batch_size", "accumulation", "device", "checkpointing", "workers", "on_bad_record", "eval_every", "eval_records", "save_every",
              "keep", "log_every", "resume", "overwrite", "tensorboard"}


def restore(directory, settings, objective, optimizer, named, procs):
    """Loads what `store` wrote into module and optimiser -> the update to go on from. The ranks may be others than before."""
    files, state = checkpoint.load(directory)
    if state["pairs"] != pairs(settings, procs):
        raise UserError(f"{directory}: an update had {state['pairs']} pairs, not {pairs(settings, procs)}; keep batch_size x accumulation x processes")
    if (before := state["settings"]["method"]) != settings.method:  # before anything is done with it: what a run names is not run
        raise UserError(f"{directory}: was made with --method {before!r}, not {settings.method!r}; a resume keeps it")
    methods.of_run(state, directory, settings.method)  # tells where the file was edited since
    saved = methods.saved_settings(state["settings"], directory)
    for name in (f.name for f in fields(settings) if f.name not in MAY_CHANGE):  # the method's name comes first
        before, now = getattr(saved, name), getattr(settings, name)
        if before != now:
            raise UserError(f"{directory}: was made with --{name} {before!r}, not {now!r}; a resume keeps it")
    checkpoint.load_parameters(named, files["trainable.safetensors"], directory)
    checkpoint.load_optimizer(optimizer, named, files["optimizer.safetensors"])
    objective.model.after_update()
    return state["step"]


# ---------------------------------------------------------------------------------------------------------- small things

def write(log, board, line):
    """One line of metrics to the log, and to TensorBoard if there is one."""
    log.write(json.dumps(line) + "\n")
    log.flush()
    if board:
        for name, value in line.items():
            if name != "step":
                board.add_scalar(name, value, line["step"])


def logged_lines(path):
    """Lines of a metrics.jsonl; a last one that a killed process left unfinished is not one."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def summary_writer():
    """TensorBoard's SummaryWriter, a class; UserError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: needs the extra `track`: pip install tensorboard") from None
    return SummaryWriter


def peak_memory(device):
    """Peak memory of this process in GB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def versions():
    """Versions of what computes, and the code's own commit where there is one."""
    root = Path(__file__).resolve().parents[1]
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
            "git": git.stdout.strip() if git.returncode == 0 else None}


if __name__ == "__main__":
    config.run_cli(main)
