"""Train a method of visual latent reasoning. Read it from top to bottom.

    python crystal/train.py                                   the shipped tiny model on toy scenes
    torchrun --nproc_per_node=4 crystal/train.py              the same on four processes
    python -m crystal.train --method sft --max_steps 200      another method, another length
    python crystal/train.py --model Qwen/Qwen2.5-VL-7B-Instruct --data covt.jsonl --image_root images

B pairs per process and forward; an update sees B x accumulation x processes of them. Every term is a mean
over the update's pairs, whatever the numbers of processes and forwards that share them.
"""
import gc
import itertools
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script: the repository root, not this folder, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn as nn
from tqdm import tqdm

import crystal.backbone.model
from crystal import calibrate, methods, planning
from crystal.evaluation import carrying
from crystal.losses import total
from crystal.run_directory import (
    begin,
    begin_with,
    check_overwrite,
    check_writable,
    has_checkpoints,
    holds_a_run,
    list_bad,
    lock,
    restore,
    store,
    summary_writer,
    unlock,
    validated,
    write,
)
from crystal.runtime import checkpoint, config, data, distributed, ops, shard, sight
from crystal.runtime.config import UserError
from crystal.training_data import open_data, stage_batches


class Objective(nn.Module):
    """Model, extra heads and method as one module, so that DDP sees one forward: batch in, loss terms out."""

    def __init__(self, model, method, autocast=nullcontext()):
        super().__init__()
        self.model = model
        self.method = method
        self.autocast = autocast
        self.heads = method.modules(model)

    def forward(self, batch, progress):
        with self.autocast:
            return self.method.losses(self.model, batch, progress)


def learning_rate(step, settings):
    """Learning rate of update `step`, counted from 0.

    In each stage it rises linearly over a share of the stage's steps, then falls to 0 along a
    cosine, or a line.
    """
    stage = settings.progress(step).stage
    start, stop = settings.span(stage)
    peak = settings.stages[stage].lr
    warmup = math.ceil(settings.warmup * (stop - start))
    if step - start < warmup:
        return peak * (step - start + 1) / warmup

    behind = (step - start - warmup) / max(1, stop - start - warmup)
    if settings.decay == "linear":
        return peak * (1 - behind)
    return peak * (0.5 * (1 + math.cos(math.pi * behind)))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:  # what the run would need, instead of the run
        return planning.main([flag for flag in argv if flag != "--plan"])
    if "--calibrate" in argv:  # what corruptions leave of a picture, instead of the run
        return calibrate.main([flag for flag in argv if flag != "--calibrate"], main)

    # --- settings ---
    settings = methods.parse(argv)
    run = settings.run_dir
    check_writable(run)
    if settings.tensorboard:
        summary_writer()  # whether there is one

    # --- processes ---
    procs = distributed.start(settings.device)
    device = procs.device
    dtype = dtype_of(settings, device)

    # What `auto` came to is kept, for those who open the run later.
    settings = replace(settings, dtype=str(dtype).removeprefix("torch."))

    # Full fine-tuning keeps its weights in float32 and computes in the smaller type; adapters are float32
    # on frozen small weights.
    sharded = settings.shard == "full"
    if sharded and procs.world == 1:
        raise UserError("--shard full: shards lie in several processes; torchrun --nproc_per_node=N ..")
    mixed = settings.tune == "full" and dtype == torch.bfloat16 and not sharded
    weights_dtype = torch.float32 if mixed else dtype
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed)

    # --- model ---
    ops.announce(procs.print)
    with procs.main_process_first():  # a hub name is downloaded once
        model = crystal.backbone.model.load(
            settings.model, weights_dtype, device, settings.min_pixels, settings.max_pixels
        )
    method, fmt = methods.attach(model, settings)
    objective = Objective(model, method, autocast).to(device).train()
    whole = shard.cut(objective, procs, dtype, method.repeats) if sharded else None
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    if not named:
        raise UserError(f"--tune {settings.tune}: with --method {settings.method} nothing is left to train")
    trainable = sum(p.numel() for _, p in named)
    everything = sum(p.numel() for p in objective.parameters())
    kind = str(weights_dtype).removeprefix("torch.")
    procs.print(
        f"{settings.method} on {settings.model}: {trainable:,} trainable of {everything:,} parameters, "
        f"{procs.world} process(es) on {device.type}, {kind}"
    )

    # --- data ---
    # One set to train on for each stage; what was broken is listed once the directory is this run's.
    train_sets, val_set, unlisted = open_data(settings, method, model, fmt, procs)
    pad = model.tokenizer.pad_token_id
    if procs.is_first:
        print(*sight.told(train_sets[0]), sep="\n", flush=True)

    # --- optimiser ---
    optimizer = optimizer_of(named, model, settings)

    # --- resume ---
    step = 0
    owner = lock(run, procs)
    auto = settings.resume == "auto"
    if auto:
        settings = replace(settings, resume=procs.any(procs.is_first and has_checkpoints(run)))
    if settings.resume:
        newest = checkpoint.newest(run, procs.print)
        if newest is None:
            raise UserError(f"{run}/checkpoints: nothing to resume from")
        step = restore(newest, settings, objective, optimizer, named, procs)
        procs.print(f"resumed {newest} at update {step}")
    elif holds_a_run(run) and not auto:
        if not settings.overwrite:
            raise UserError(
                f"{run}: holds a run already; --resume goes on from it, --overwrite starts anew, "
                "--output names another directory"
            )
        check_overwrite(run, settings)
    if settings.init_from and not settings.resume:  # what is resumed has begun with it
        begin_with(settings.init_from, settings, model, named, procs)

    # --- loop ---
    wrapped = whole or procs.wrap(objective)
    stages = [stage_batches(i, examples, step, settings, pad, procs) for i, examples in enumerate(train_sets)]
    batches = itertools.chain.from_iterable(stages)
    hide_bar = not (procs.is_first and sys.stderr.isatty())
    bar = tqdm(total=settings.max_steps, initial=step, unit="step", disable=hide_bar)
    log = board = None
    begun = False
    bad_count = 0
    last_saved = step if settings.resume else None
    best = checkpoint.best(run) if settings.resume else None
    news = carrying.News(run if settings.resume else None)
    stop, stopping = distributed.StopSignal(), False
    terms = loss = None

    def is_due(step):
        """Whether a validation follows update `step`."""
        every = settings.eval_every
        return bool(val_set and every) and (step % every == 0 or step == settings.max_steps)

    def measured():
        """A validation's numbers; None where a signal ended it."""
        with shard.gathered(whole) if sharded else nullcontext():
            return validate(objective, val_set, settings, method, pad, procs, weights_dtype, stop)

    def keep(numbers):
        """Logs a validation's numbers after `step` updates, and makes a checkpoint of the best."""
        nonlocal best, last_saved
        if method.metric not in numbers:
            raise UserError(
                f"--method {settings.method}: its metric {method.metric!r} is none of what it measures, "
                f"{', '.join(numbers)}"
            )
        value = numbers[method.metric]
        if best is None or value < best["value"]:
            best = {"step": step, "value": value, "metric": f"val_{method.metric}"}
            if last_saved != step:
                store(run, step, settings, optimizer, named, procs, best)
                last_saved = step
            elif procs.is_first:
                checkpoint.mark_best(run, **best)
        if procs.is_first:
            write(log, board, {"step": step, **{f"val_{n}": v for n, v in numbers.items()}})
            is_best = "  (best)" if best["step"] == step else ""
            said = f"step {step}  validation  {listed(numbers)}{is_best}"
            bar.write("\n".join([said, *news.of(step, numbers)]))

    # A validation that a signal or a kill came before is made up for: the log and the best are then those of
    # a run that went through.
    late = None
    if settings.resume and is_due(step) and not validated(run, step, procs):
        late = measured()
        stopping = late is None

    while step < settings.max_steps and not stopping:
        started = time.perf_counter()
        rate = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]

        # Forward and backward, in `accumulation` parts whose gradients add up.
        logged, tokens, read = {}, 0, []
        for part in range(settings.accumulation):
            batch = data.to_device(next(batches), device, weights_dtype)
            read += batch.get("where", [])
            broken = report_bad(batch, bad_count, step, settings, procs)
            bad_count += len(broken)
            unlisted = unlisted + broken

            # Dropout is seeded by update, part and rank, so a resumed run draws what the
            # unbroken one would have.
            torch.manual_seed(data.seed_of(settings.seed, step, part, procs.rank))
            last_part = part == settings.accumulation - 1
            with shard.in_step(whole, last_part) if sharded else procs.no_sync(wrapped, not last_part):
                terms = wrapped(batch, settings.progress(step))
                loss = weighted(terms, method, settings)  # eq. 6
                (loss / settings.accumulation).backward()

            for name, value in {"loss": loss, **terms}.items():
                logged[name] = logged.get(name, 0.0) + value.detach().double() / settings.accumulation
            paths = 2 if method.corruption else 1
            tokens += int(batch["attention_mask"].sum()) * paths

        # Ranks share gradients but not losses: either may be the first to break, and all must stop together.
        norm = shard.clip([p for _, p in named], settings.clip)
        finite = math.isfinite(float(logged["loss"])) and math.isfinite(float(norm))
        if procs.any(not finite):
            good = checkpoint.newest(run, procs.print) if last_saved is not None else None
            raise UserError(
                f"update {step}: loss {float(logged['loss'])} or gradient norm {float(norm)} is not finite; "
                f"stopped before the update, the last good checkpoint is {good or 'none'}; "
                f"its records: {', '.join(procs.gather(read))}"
            )

        # Only now, with a first update that works on all ranks, does the directory become this run's:
        # whatever fails before leaves an older run whole.
        if not begun and procs.is_first:
            log, board = begin(run, step, settings, procs)
            owner = lock(run, distributed.Processes()) if owner is None else owner
        if late and not begun:
            keep(late)
        begun = True
        list_bad(unlisted, run, procs)
        unlisted = []

        # The update.
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_update()
        step += 1

        # What is logged is the mean over all ranks.
        means = {name: float(procs.sum(value)) / procs.world for name, value in logged.items()}
        tokens = procs.sum(tokens)
        if procs.is_first:
            line = {
                "step": step, **means, "lr": rate, "grad_norm": float(norm),
                "tokens_per_s": tokens / (time.perf_counter() - started),
                "peak_memory_gb": peak_memory(device),
            }
            write(log, board, line)
            shown = {n: f"{v:.3f}" for n, v in means.items() if n not in method.monitored}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if bar.disable and (step % settings.log_every == 0 or step == settings.max_steps):
                speed = f"{line['tokens_per_s']:.0f} tokens/s"
                print(f"step {step}/{settings.max_steps}  {listed(means)}  {speed}", flush=True)

        # Asked once a step, so that all ranks end after the same one. A stop saves and does nothing else: who
        # sends a signal waits half a minute, and a validation may take longer.
        stopping = procs.any(stop.asked)
        if is_due(step) and not stopping:
            numbers = measured()
            stopping = numbers is None
            if not stopping:
                keep(numbers)

        # A checkpoint every so often, and of the last update.
        last = stopping or step == settings.max_steps
        if (step % settings.save_every == 0 or last) and last_saved != step:
            store(run, step, settings, optimizer, named, procs, None)
            last_saved = step

    # --- end ---
    if late and not begun:  # it was all that was missing
        if procs.is_first:
            log, board = begin(run, step, settings, procs)
        keep(late)
    bar.close()
    if stopping and (step < settings.max_steps or is_due(step)):
        by = stop.asked or "a signal"
        procs.print(f"stopped by {by} after update {step}; the same command with --resume goes on from there")
        stop.ended()
    else:
        procs.print(f"{run}: {step} updates. Next: python -m crystal.evaluate --model {run} --data TEST")
    stop.restore()
    if log:
        log.close()
    unlock(run, owner)
    procs.barrier()

    # Drop references to DDP before destroying the process group; otherwise its end occasionally hangs.
    wrapped = whole = terms = loss = None
    gc.collect()
    procs.stop()
    return run


# --- before the loop ---

def dtype_of(settings, device):
    """--dtype as a torch dtype; `auto` is bfloat16 on a GPU, float32 elsewhere."""
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)


def optimizer_of(named, model, settings):
    """AdamW over what trains: matrices, which decay; vectors; and new tokens, with a rate of their own.

    New tokens do not decay: decay pulls a latent towards 0, not towards a small map.
    """
    tokens = [] if model.new_tokens is None else list(model.new_tokens.parameters())
    others = [p for _, p in named if not any(p is token for token in tokens)]
    matrices = [p for p in others if p.ndim >= 2]
    vectors = [p for p in others if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": tokens, "weight_decay": 0.0, "lr_scale": settings.lr_tokens},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr)


# --- in the loop ---

def report_bad(batch, count, step, settings, procs):
    """Messages of all ranks' records that broke while the batch was loaded; `count` broke before.

    UserError, on all ranks, above 1 % of those seen so far, and for one that was not skipped.
    """
    if not procs.any(batch["bad"] or "error" in batch):
        return []
    errors = procs.gather([batch["error"]] if "error" in batch else [])
    if errors:
        raise UserError(errors[0])

    broken = procs.gather(batch["bad"])
    seen = (step + 1) * checkpoint.pairs(settings, procs)
    if count + len(broken) > max(1, 0.01 * seen):
        raise UserError(
            f"{count + len(broken)} of {seen} records were broken, more than 1 %; the last: {broken[-1]}"
        )
    return broken


def weighted(terms, method, settings):
    """Eq. 6 over what trains; a monitored term is left out.

    UserError for a term that the settings give no weight.
    """
    trained = {n: t for n, t in terms.items() if n not in method.monitored}
    try:
        return total(trained, settings.weights)
    except KeyError as missing:
        raise UserError(
            f"--method {settings.method}: its losses have a term {missing} without a weight; its "
            "Settings.weights names the weight of each, or its Method.monitored names what does not train"
        ) from None


@torch.no_grad()
def validate(objective, examples, settings, method, pad, procs, dtype, stop=None):
    """Mean of every loss term over the validation records, and what their latents carry (carrying.py).

    Each rank takes every world-th batch. A broken record is left out and not replaced, so that none counts
    twice. UserError for the first one, with --on_bad_record skip above 1 %. stop: a distributed.StopSignal;
    where it was asked on any rank, the validation is left, and None returned.
    """
    def stopped():
        return stop is not None and bool(stop.asked)

    objective.eval()
    n, size = len(examples), settings.batch_size
    batches = [range(at, min(at + size, n)) for at in range(0, n, size)]
    end = settings.progress(settings.max_steps)  # the model as it will be asked, whatever stage it is in
    sums, seen, broken = {}, 0, []
    for indices in batches[procs.rank :: procs.world]:
        if stopped():
            break
        whole = []
        for i in indices:
            example = examples[0, i]
            if "error" not in example:
                whole.append(example)
            elif not isinstance(examples.records[i], data.RecordError):
                broken.append([i, example["error"]])
        if not whole:
            continue
        batch = data.to_device(data.collate(whole, pad), procs.device, dtype)
        for name, value in objective(batch, end).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(whole)
        seen += len(whole)
    carried = carrying.measure(objective, method, examples, pad, procs, dtype, stopped)
    objective.train()
    if procs.any(stopped()):
        return None
    leave_out(procs.gather(broken), examples, settings, procs)

    names = sorted(set(procs.gather(list(sums))))  # a rank without a batch still takes part
    count = procs.sum(seen)
    means = {name: procs.sum(float(sums.get(name, 0.0))) / count for name in names}
    if taken := [name for name in means if name in carried]:
        raise UserError(
            f"--method {settings.method}: its losses have a term {taken[0]!r}, which is what the nats that "
            "latents carry are called; give it another name"
        )
    return {"loss": weighted(means, method, settings), **means, **carried}


def leave_out(broken, examples, settings, procs):
    """Takes validation records that broke out of all validations to come, and lists them once.

    broken: a list of [index, message]. The records behind one keep their number, which their
    corruption is drawn from.
    """
    if not broken:
        return
    if settings.on_bad_record == "stop":
        raise UserError(f"{broken[0][1]}; --on_bad_record skip leaves it out")
    list_bad([line for _, line in broken], settings.run_dir, procs)
    for i, line in broken:
        examples.records[i] = data.RecordError(line)

    count = sum(isinstance(record, data.RecordError) for record in examples.records)
    if count > 0.01 * len(examples):
        raise UserError(
            f"{count} of {len(examples)} validation records are broken, more than 1 %; "
            f"they are listed in {settings.run_dir}/bad_records.jsonl"
        )


# --- small things ---

def listed(numbers):
    """{name: number} as it is printed."""
    return "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())


def peak_memory(device):
    """Peak memory of this process in GB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    config.run_cli(main)
    sys.exit(distributed.StopSignal.code)
