"""Deliberate faults, each with the test that must notice it.

    python tests/breaks.py                     put every fault in, one at a time, and print what no test noticed
    python tests/breaks.py NAME ..             these alone; a name may end in * (crystal-*)
    python tests/breaks.py --jobs 4 --list     how many run side by side; names only

A suite that passes says little about what it would notice. This table says it: each fault is one that a developer could
make, put into a copy of the repository in place of the right text, and the test that it names must then fail. First every
named test runs on the unbroken copy, because a test that fails anyway notices nothing.

A new concept brings its faults with it. `tests/test_breaks.py` keeps that every text still stands exactly once.
The whole table takes half an hour on two cores; it is no part of `make test`.
"""
import argparse
import fnmatch
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Every test runs in a process of its own, forked from one that has imported the slow libraries, and nothing of crystal.
PROCESSES = multiprocessing.get_context("forkserver")
SLOW = ["pytest", "numpy", "PIL.Image", "safetensors.torch", "torch", "transformers", "transformers.generation.utils",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"]
LIMIT = 600  # seconds for one test; one that hangs has not noticed anything


class Break(NamedTuple):
    """One fault: in `file`, `text` (which stands there once) becomes `wrong`."""
    name: str         # unique; begins with the stem of the file
    file: str         # from the repository's root
    text: str
    wrong: str
    consequence: str  # what would go wrong, for somebody who uses crystal
    test: str         # arguments of pytest that must fail: a node id, or a file and -k


# ---- methods, layout, latent copy, losses, attention (tests/test_oracle.py and the tests of each concept) --------------

METHODS = [
]

# ---- settings: config, model, adapters, families, encoders ------------------------------------------------------------

SETTINGS = [
]

# ---- commands and data preparation ------------------------------------------------------------------------------------

COMMANDS = [
]

# ---- the loop: train, checkpoint, processes ---------------------------------------------------------------------------

SIX = "tests/test_loop.py::test_six_updates_equal_the_plain_loop_to_the_bit"
TWO = "tests/test_loop.py::test_two_processes_equal_the_plain_loop"
IN_TRAIN = "tests/test_train.py::test_"
IN_CHECKPOINT = "tests/test_checkpoint.py::test_"
IN_PROCESSES = "tests/test_processes.py::test_"

LOOP = [
    Break("train-warm-up-starts-at-zero", "crystal/train.py",
          "return peak * (step - start + 1) / warmup",
          "return peak * (step - start) / warmup",
          "The first update of every stage does nothing.",
          IN_TRAIN + "learning_rate"),
    Break("train-warm-up-rounded-down", "crystal/train.py",
          "math.ceil(settings.warmup",
          "math.floor(settings.warmup",
          "A short stage warms up for one update less.",
          SIX + "[full]"),
    Break("train-warm-up-of-the-run", "crystal/train.py",
          "settings.warmup * (stop - start)",
          "settings.warmup * settings.max_steps",
          "A stage warms up over a share of the whole run.",
          SIX + "[livr]"),
    Break("train-decay-never-linear", "crystal/train.py",
          'if settings.decay == "cosine" else 1 - behind',
          "if settings.decay else 1 - behind",
          "--decay linear is a cosine.",
          SIX + "[full]"),
    Break("train-decay-to-the-runs-end", "crystal/train.py",
          "max(1, stop - start - warmup)",
          "max(1, settings.max_steps - start - warmup)",
          "A stage ends at half its rate.",
          SIX + "[livr]"),
    Break("train-one-rate-for-all-stages", "crystal/train.py",
          "settings.stages[stage].lr",
          "settings.lr",
          "--lr_latents does nothing.",
          SIX + "[valr]"),
    Break("train-never-clipped", "crystal/train.py",
          "[p for _, p in named], settings.clip)",
          "[p for _, p in named], math.inf)",
          "--clip does nothing.",
          SIX + "[lora]"),
    Break("train-rows-not-clipped", "crystal/train.py",
          "clip_grad_norm_([p for _, p in named]",
          "clip_grad_norm_(matrices",
          "The token rows' gradient is neither measured nor clipped.",
          SIX + "[lora]"),
    Break("train-lr-rows-ignored", "crystal/train.py",
          '"lr_scale": settings.lr_rows',
          '"lr_scale": 1.0',
          "--lr_rows does nothing.",
          SIX + "[rows]"),
    Break("train-lr-rows-for-matrices", "crystal/train.py",
          '"weight_decay": settings.weight_decay, "lr_scale": 1.0',
          '"weight_decay": settings.weight_decay, "lr_scale": settings.lr_rows',
          "--lr_rows scales the adapters' rate too.",
          SIX + "[lora]"),
    Break("train-rows-decayed", "crystal/train.py",
          '"weight_decay": 0.0, "lr_scale": settings.lr_rows',
          '"weight_decay": settings.weight_decay, "lr_scale": settings.lr_rows',
          "New tokens' rows are pulled towards 0.",
          SIX + "[rows]"),
    Break("train-vectors-decayed", "crystal/train.py",
          '"params": vectors, "weight_decay": 0.0',
          '"params": vectors, "weight_decay": settings.weight_decay',
          "Biases and norms are pulled towards 0.",
          SIX + "[full]"),
    Break("train-nothing-decayed", "crystal/train.py",
          '"params": matrices, "weight_decay": settings.weight_decay',
          '"params": matrices, "weight_decay": 0.0',
          "--weight_decay does nothing.",
          SIX + "[lora]"),
    Break("train-rows-not-written-back", "crystal/train.py",
          '        model.after_update()\n        step += 1',
          "        step += 1",
          "The vocabulary keeps the first rows: the forward never sees what was trained.",
          SIX + "[rows]"),
    Break("train-gradients-add-up", "crystal/train.py",
          '        optimizer.zero_grad(set_to_none=True)\n',
          "",
          "Every update sees the gradients of all before it.",
          SIX + "[rows]"),
    Break("train-one-dropout-mask", "crystal/train.py",
          "data.seed_of(settings.seed, step, part, procs.rank)",
          "data.seed_of(settings.seed, part, procs.rank)",
          "Dropout draws the same mask at every update.",
          SIX + "[lora]"),
    Break("train-one-mask-for-all-parts", "crystal/train.py",
          "data.seed_of(settings.seed, step, part, procs.rank)",
          "data.seed_of(settings.seed, step, 0, procs.rank)",
          "All parts of an update share a mask.",
          SIX + "[livr]"),
    Break("train-one-mask-for-all-ranks", "crystal/train.py",
          "data.seed_of(settings.seed, step, part, procs.rank)",
          "data.seed_of(settings.seed, step, part, 0)",
          "All processes share a mask.",
          TWO),
    Break("train-dropout-without-seed", "crystal/train.py",
          "data.seed_of(settings.seed, step, part, procs.rank)",
          "data.seed_of(0, step, part, procs.rank)",
          "--seed does not reach dropout.",
          IN_TRAIN + "seed_fixes_a_run_and_each_thing_that_is_drawn_follows_it"),
    Break("train-parts-are-summed", "crystal/train.py",
          "(loss / settings.accumulation).backward()",
          "loss.backward()",
          "Accumulation multiplies the gradient.",
          SIX + "[full]"),
    Break("train-logs-the-last-part", "crystal/train.py",
          "logged[name] = logged.get(name, 0.0) + value.detach()",
          "logged[name] = value.detach()",
          "The log shows a share of the last part.",
          SIX + "[livr]"),
    Break("train-no-dropout-at-all", "crystal/train.py",
          "Objective(model, method, autocast).to(device).train()",
          "Objective(model, method, autocast).to(device).eval()",
          "--lora_dropout and checkpointing do nothing.",
          SIX + "[lora]"),
    Break("train-gradients-of-one-rank", "crystal/train.py",
          "part < settings.accumulation - 1)",
          "part < settings.accumulation)",
          "Processes never exchange gradients and drift apart.",
          TWO),
    Break("train-full-in-bfloat16", "crystal/train.py",
          'settings.tune == "full" and dtype',
          'settings.tune == "lora" and dtype',
          "Full fine-tuning rounds its updates away.",
          SIX + "[full]"),
    Break("train-full-computes-in-float32", "crystal/train.py",
          "enabled=weights_dtype != dtype",
          "enabled=False",
          "--dtype bfloat16 of a full run computes in float32, twice the memory.",
          SIX + "[full]"),
    Break("train-auto-is-always-bfloat16", "crystal/train.py",
          'torch.bfloat16 if device.type == "cuda" else torch.float32',
          "torch.bfloat16",
          "Runs on a CPU are in bfloat16.",
          IN_TRAIN + "run_directory"),
    Break("train-watched-terms-train", "crystal/train.py",
          "{n: t for n, t in terms.items() if n not in method.watched}",
          "dict(terms)",
          "Monitored masses are part of the loss.",
          IN_TRAIN + "the_loss_is_the_weighted_sum_of_what_trains"),
    Break("train-weights-ignored", "crystal/train.py",
          "settings.weights.get(n, 1.0)",
          "1.0",
          "No weight of a term does anything.",
          SIX + "[lora]"),
    Break("train-a-term-without-weight-drops-out", "crystal/train.py",
          "settings.weights.get(n, 1.0)",
          "settings.weights.get(n, 0.0)",
          "A new method's own term does not train.",
          SIX + "[own]"),
    Break("train-stage-data-ignored", "crystal/train.py",
          "[stage.data or settings.data for stage in stages]",
          "[settings.data for stage in stages]",
          "The second stage trains on the first one's file.",
          SIX + "[own]"),
    Break("train-layout-of-the-last-stage", "crystal/train.py",
          "method.layout(fmt, record, n, stage)",
          "method.layout(fmt, record, n)",
          "VaLR's first stage has latents.",
          SIX + "[valr]"),
    Break("train-every-stage-from-the-first-record", "crystal/train.py",
          "max(start, step), stop)",
          "max(0, step), stop)",
          "A stage sees the records of updates that are over.",
          SIX + "[own]"),
    Break("train-validation-of-the-first-stage", "crystal/train.py",
          'examples("val", val, len(stages) - 1)',
          'examples("val", val, 0)',
          "VaLR is validated without latents.",
          IN_TRAIN + "what_a_run_reads"),
    Break("train-order-without-seed", "crystal/train.py",
          "procs.world, settings.seed, max(start",
          "procs.world, 0, max(start",
          "The order of records does not follow --seed.",
          SIX + "[lora]"),
    Break("train-ranks-read-the-same", "crystal/train.py",
          "settings.accumulation, procs.rank, procs.world, settings.seed",
          "settings.accumulation, 0, procs.world, settings.seed",
          "All processes train on the first one's records.",
          TWO),
    Break("train-extras-dropped", "crystal/train.py",
          "extras=method.extras)",
          "extras=None)",
          "Teachers and encoders reach no batch.",
          IN_TRAIN + "what_a_run_reads"),
    Break("train-copies-ignored", "crystal/train.py",
          "copies=fmt.copies",
          "copies=1",
          "--image_copies 2 finds tokens without pixels.",
          IN_TRAIN + "what_a_run_reads"),
    Break("train-turns-ignored", "crystal/train.py",
          "data.read(path, root, settings.turns)",
          "data.read(path, root)",
          "--turns all trains on first turns.",
          IN_TRAIN + "turns_and_image_root_reach_the_reader"),
    Break("train-all-validation-records", "crystal/train.py",
          "records = records[: settings.eval_records]",
          "records = records[:]",
          "--eval_records does nothing.",
          IN_TRAIN + "what_a_run_reads"),
    Break("train-skip-ignored", "crystal/train.py",
          'settings.on_bad_record == "skip" and split == "train"',
          "False",
          "--on_bad_record skip stops at the first broken picture.",
          IN_TRAIN + "a_record_that_breaks_while_loading_is_listed_and_told_once"),
    Break("train-validation-skips", "crystal/train.py",
          'settings.on_bad_record == "skip" and split == "train"',
          'settings.on_bad_record == "skip"',
          "A broken validation record is replaced by one that then counts twice.",
          IN_TRAIN + "what_a_run_reads"),
    Break("train-toy-without-seed", "crystal/train.py",
          "toy.generate(root, seed=settings.seed)",
          "toy.generate(root, seed=0)",
          "The toy scenes do not follow --seed.",
          IN_TRAIN + "without_data_the_toy_scenes_are_made_with_the_seed"),
    Break("train-workers-ignored", "crystal/train.py",
          "order, pad, settings.workers, ",
          "order, pad, 0, ",
          "--workers does nothing.",
          IN_TRAIN + "the_loader_is_told_how_to_make_batches"),
    Break("train-workers-die-of-the-signal", "crystal/train.py",
          "settings.workers, processes.ignore_signals)",
          "settings.workers)",
          "A scheduler's signal breaks the update that was to be finished.",
          IN_TRAIN + "the_loader_is_told_how_to_make_batches"),
    Break("train-lr-logged-is-the-peak", "crystal/train.py",
          '"lr": rate, "grad_norm"',
          '"lr": settings.lr, "grad_norm"',
          "The log's lr is a constant.",
          SIX + "[lora]"),
    Break("train-norm-logged-after-clipping", "crystal/train.py",
          '"grad_norm": float(norm)',
          '"grad_norm": min(float(norm), settings.clip)',
          "The log hides that gradients are large.",
          SIX + "[lora]"),
    Break("train-tokens-of-one-path", "crystal/train.py",
          "(2 if method.corrupts else 1)",
          "1",
          "Throughput of CrystaL is told as half of what it is.",
          SIX + "[lora]"),
    Break("train-padding-is-counted", "crystal/train.py",
          'int(batch["attention_mask"].sum())',
          'batch["attention_mask"].numel()',
          "Throughput counts padding.",
          SIX + "[lora]"),
    Break("train-tokens-of-the-last-part", "crystal/train.py",
          "tokens += int(",
          "tokens = int(",
          "Throughput forgets all parts but one.",
          SIX + "[livr]"),
    Break("train-tokens-of-one-rank", "crystal/train.py",
          "tokens = procs.sum(tokens)",
          "tokens = 1 * tokens",
          "Throughput is one process's.",
          TWO),
    Break("train-log-of-one-rank", "crystal/train.py",
          "float(procs.sum(value)) / procs.world",
          "float(value)",
          "The log shows the first process's losses.",
          TWO),
    Break("train-log-every-ignored", "crystal/train.py",
          "step % settings.log_every == 0",
          "step % 10 == 0",
          "--log_every does nothing.",
          IN_TRAIN + "what_is_saved_validated_and_printed_when"),
    Break("train-tensorboard-without-steps", "crystal/train.py",
          'board.add_scalar(name, value, line["step"])',
          "board.add_scalar(name, value)",
          "TensorBoard shows one point.",
          IN_TRAIN + "tensorboard_gets_every_number_of_every_line"),
    Break("train-world-not-told", "crystal/train.py",
          '"world": procs.world}',
          '"world": 1}',
          "config.json names one process.",
          TWO),
    Break("train-memory-in-kilobytes", "crystal/train.py",
          "else 1024) / 1e9",
          "else 1) / 1e9",
          "Peak memory is told a thousand times too small.",
          IN_TRAIN + "versions_and_memory_are_those_of_this_process"),
    Break("train-validates-with-dropout", "crystal/train.py",
          '    objective.eval()\n',
          "",
          "Validation is noisy.",
          SIX + "[lora]"),
    Break("train-stays-in-evaluation", "crystal/train.py",
          '    objective.train()\n    if broken',
          "    if broken",
          "After the first validation there is no dropout.",
          SIX + "[lora]"),
    Break("train-validates-as-at-the-start", "crystal/train.py",
          "settings.progress(settings.max_steps)",
          "settings.progress(0)",
          "LaViT is validated behind a closed gate, LIVR under its mask.",
          SIX + "[lavit]"),
    Break("train-validation-corrupts-as-training", "crystal/train.py",
          'settings.seed + (split == "val")',
          "settings.seed",
          "Validation draws the training's corruptions.",
          IN_TRAIN + "what_a_run_reads"),
    Break("train-validation-counts-batches", "crystal/train.py",
          "+ float(value) * pairs",
          "+ float(value) * size",
          "A last short batch counts as a full one.",
          IN_TRAIN + "validation_is_shared_by_batches_and_counts_every_record_once"),
    Break("train-ranks-validate-unlike-shares", "crystal/train.py",
          "[procs.rank :: procs.world]",
          "[procs.rank :]",
          "Some validation records count twice.",
          IN_TRAIN + "validation_is_shared_by_batches_and_counts_every_record_once"),
    Break("train-resume-forgets-the-best", "crystal/train.py",
          "checkpoint.best(run) if settings.resume else None",
          "None",
          "The first validation after a resume is taken for the best.",
          IN_TRAIN + "the_best_checkpoint_is_that_of_the_least_cross_entropy_and_a_resume_remembers_it"),
    Break("train-best-is-the-worst", "crystal/train.py",
          'value < best["value"]',
          'value > best["value"]',
          "The worst checkpoint is kept as the best.",
          IN_TRAIN + "the_best_checkpoint_is_that_of_the_least_cross_entropy_and_a_resume_remembers_it"),
    Break("train-best-by-the-loss", "crystal/train.py",
          'measured.get("ce_int", measured.get("ce", measured["loss"]))',
          'measured["loss"]',
          "The best checkpoint is chosen by terms that are no quality.",
          IN_TRAIN + "the_best_checkpoint_is_that_of_the_least_cross_entropy_and_a_resume_remembers_it"),
    Break("train-keep-ignored", "crystal/train.py",
          "checkpoint.prune(run, settings.keep)",
          "checkpoint.prune(run, 1)",
          "--keep does nothing.",
          IN_TRAIN + "what_is_saved_validated_and_printed_when"),
    Break("train-no-checkpoint-at-the-end", "crystal/train.py",
          "(step % settings.save_every == 0 or last)",
          "step % settings.save_every == 0",
          "The last updates are lost.",
          IN_TRAIN + "what_is_saved_validated_and_printed_when"),
    Break("train-no-validation-at-the-end", "crystal/train.py",
          "(step % settings.eval_every == 0 or last)",
          "step % settings.eval_every == 0",
          "The last model is not validated.",
          IN_TRAIN + "what_is_saved_validated_and_printed_when"),
    Break("train-resume-keeps-what-happens-again", "crystal/train.py",
          'if x["step"] <= step]',
          'if x["step"]]',
          "The log has updates twice.",
          IN_TRAIN + "resume_equals_not_having_stopped"),
    Break("train-resume-drops-a-line", "crystal/train.py",
          'if x["step"] <= step]',
          'if x["step"] < step]',
          "The log has a gap.",
          IN_TRAIN + "resume_equals_not_having_stopped"),
    Break("train-resume-with-another-lr", "crystal/train.py",
          '"log_every", "resume", "overwrite", "tensorboard"}',
          '"log_every", "resume", "overwrite", "tensorboard", "lr"}',
          "A resume may change the schedule.",
          IN_TRAIN + "each_setting_is_kept_by_a_resume_or_may_change[lr]"),
    Break("train-resume-with-another-seed", "crystal/train.py",
          '"workers", "on_bad_record"',
          '"workers", "seed", "on_bad_record"',
          "A resume may see records twice and others never.",
          IN_TRAIN + "each_setting_is_kept_by_a_resume_or_may_change[seed]"),
    Break("train-resume-on-as-many-workers", "crystal/train.py",
          '"checkpointing", "workers", "on_bad_record"',
          '"checkpointing", "on_bad_record"',
          "A resume on another machine is refused.",
          IN_TRAIN + "each_setting_is_kept_by_a_resume_or_may_change[workers]"),
    Break("train-pairs-of-one-process", "crystal/train.py",
          "    return settings.batch_size * settings.accumulation * procs.world",
          "    return settings.batch_size * settings.accumulation",
          "A resume on fewer processes halves its updates without a word.",
          IN_TRAIN + "a_resume_keeps_the_pairs_of_an_update"),
    Break("train-resume-without-moments", "crystal/train.py",
          '    checkpoint.load_optimizer(optimizer, named, files["optimizer.safetensors"])\n',
          "",
          "A resume starts AdamW from zero.",
          IN_TRAIN + "restored_by_value"),
    Break("train-resume-without-rows", "crystal/train.py",
          '    objective.model.after_update()\n',
          "",
          "A resumed run's first forward sees fresh rows.",
          IN_TRAIN + "restored_by_value"),
    Break("train-overwrite-deletes-at-once", "crystal/train.py",
          '        check_overwrite(run, settings)\n',
          '        shutil.rmtree(run)\n',
          "A wrong flag costs the old run.",
          IN_TRAIN + "overwrite_deletes_nothing_for_a_run_that_fails_before_its_first_update"),
    Break("train-overwrite-deletes-its-data", "crystal/train.py",
          "Path(path).resolve().is_relative_to(run.resolve())",
          "False",
          "A run deletes the records that it trains on.",
          IN_TRAIN + "overwrite_deletes_nothing_for_a_run_that_fails_before_its_first_update"),
    Break("train-tensorboard-asked-for-late", "crystal/train.py",
          '        summary_writer()  # whether there is one\n',
          '        pass\n',
          "Without the package the old run is deleted, then the new one fails.",
          IN_TRAIN + "overwrite_deletes_nothing_for_a_run_that_fails_before_its_first_update"),
    Break("train-overwrite-keeps-the-old", "crystal/train.py",
          '        shutil.rmtree(run)\n',
          '        pass\n',
          "Two runs share a log.",
          IN_TRAIN + "overwrite_starts_anew"),
    Break("train-begins-before-the-first-update", "crystal/train.py",
          '        logged, tokens = {}, 0\n',
          "        if not begun and procs.is_first:\n"
          "            log, board = begin(run, step, settings, procs)\n"
          "        begun, logged, tokens = True, {}, 0\n",
          "A first batch that fails costs the old run.",
          IN_TRAIN + "a_crash_in_the_first_update_leaves_the_old_run_whole"),
    Break("train-infinite-gradients-pass", "crystal/train.py",
          " and math.isfinite(float(norm))",
          "",
          "An infinite gradient ruins the weights.",
          IN_TRAIN + "a_gradient_without_an_end_stops_before_the_update"),
    Break("train-signal-unheard", "crystal/train.py",
          "stopping = procs.any(stop.asked)",
          "stopping = False",
          "A scheduler's signal is ignored until it kills.",
          IN_TRAIN + "a_signal_ends_the_run_with_a_checkpoint"),
    Break("train-bad-records-of-one-rank", "crystal/train.py",
          'settings.accumulation * procs.world\n    if count',
          'settings.accumulation\n    if count',
          "Many processes stop at far fewer broken records.",
          IN_TRAIN + "broken_records_in_a_batch"),
    Break("train-bad-records-forgotten", "crystal/train.py",
          "if count + len(broken) > max(",
          "if len(broken) > max(",
          "Any number of broken records passes, one at a time.",
          IN_TRAIN + "broken_records_in_a_batch"),
    Break("train-bad-records-listed-again", "crystal/train.py",
          '        list_bad(unlisted, run, procs)\n        unlisted = []\n',
          '        list_bad(unlisted, run, procs)\n',
          "A broken record is listed at every update.",
          IN_TRAIN + "a_record_that_breaks_while_loading_is_listed_and_told_once"),
    Break("checkpoint-hash-not-compared", "crystal/checkpoint.py",
          'elif _sha256(found[name]) != listed[name]["sha256"]:',
          "elif False:",
          "A flipped bit is trained on.",
          IN_CHECKPOINT + "a_flipped_byte_is_named_and_the_checkpoint_before_is_chosen"),
    Break("checkpoint-load-without-looking", "crystal/checkpoint.py",
          "    problems = verify(directory)\n    if problems:\n        raise",
          "    problems = []\n    if problems:\n        raise",
          "A damaged checkpoint is read.",
          IN_CHECKPOINT + "a_flipped_byte_is_named_and_the_checkpoint_before_is_chosen"),
    Break("checkpoint-newest-is-the-oldest", "crystal/checkpoint.py",
          "in reversed(_steps(run_dir)):",
          "in _steps(run_dir):",
          "A resume goes back to the first checkpoint.",
          IN_CHECKPOINT + "a_flipped_byte_is_named_and_the_checkpoint_before_is_chosen"),
    Break("checkpoint-steps-by-name", "crystal/checkpoint.py",
          "return sorted(found.items())",
          "return list(found.items())",
          "Step 90 is taken for newer than step 100.",
          IN_CHECKPOINT + "a_flipped_byte_is_named_and_the_checkpoint_before_is_chosen"),
    Break("checkpoint-best-is-pruned", "crystal/checkpoint.py",
          'elif record is None or step != record["step"]:',
          "else:",
          "The best checkpoint is deleted.",
          IN_CHECKPOINT + "prune_keeps_the_newest_and_the_best"),
    Break("checkpoint-broken-ones-count", "crystal/checkpoint.py",
          "kept += not verify(directory)",
          "kept += 1",
          "A good checkpoint is deleted in favour of a broken one.",
          IN_CHECKPOINT + "prune_deletes_nothing_good_in_favour_of_something_broken"),
    Break("checkpoint-pruned-by-step", "crystal/checkpoint.py",
          "key=lambda item: (_written(item[1]), item[0])",
          "key=lambda item: item[0]",
          "A run that went back loses what it saves.",
          IN_CHECKPOINT + "prune_keeps_the_newest_and_the_best"),
    Break("checkpoint-keeps-one-more", "crystal/checkpoint.py",
          "        if kept < keep:",
          "        if kept <= keep:",
          "The disk holds more than --keep says.",
          IN_CHECKPOINT + "prune_keeps_the_newest_and_the_best"),
    Break("checkpoint-stray-files-pass", "crystal/checkpoint.py",
          "for name in sorted(found.keys() - listed.keys())]",
          "for name in ()]",
          "What was put in afterwards is not noticed.",
          IN_CHECKPOINT + "every_damage_is_one_problem_that_names_the_file"),
    Break("checkpoint-replaced-without-way-back", "crystal/checkpoint.py",
          '            final.rename(old)\n',
          '            shutil.rmtree(final)\n',
          "A kill while a step is replaced loses it.",
          IN_CHECKPOINT + "a_kill_at_any_moment_leaves_a_checkpoint"),
    Break("checkpoint-old-not-put-back", "crystal/checkpoint.py",
          'r"step-(\\d+)(\\.old)?"',
          'r"step-(\\d+)"',
          "A kill between two renames hides the checkpoint.",
          IN_CHECKPOINT + "leftovers_are_ignored_and_cleaned"),
    Break("checkpoint-files-not-flushed", "crystal/checkpoint.py",
          'for path in [*temporary.rglob("*"), temporary]:',
          "for path in [temporary]:",
          "A power cut leaves names without contents.",
          IN_CHECKPOINT + "a_kill_at_any_moment_leaves_a_checkpoint"),
    Break("checkpoint-manifest-of-names-alone", "crystal/checkpoint.py",
          '"tensors": list(files), "files"',
          '"tensors": [], "files"',
          "A checkpoint loads without its tensors.",
          IN_CHECKPOINT + "what_lies_on_the_disk"),
    Break("checkpoint-parameters-half-changed", "crystal/checkpoint.py",
          '    for name, param in named.items():\n        if param.shape',
          '    for name, param in named.items():\n        param.zero_()\n        if param.shape',
          "A refused checkpoint has ruined the weights.",
          IN_CHECKPOINT + "parameters_are_copied_or_refused_whole"),
    Break("checkpoint-moments-rounded", "crystal/checkpoint.py",
          "key: value.to(param.device if beside",
          "key: value.to(param.dtype).to(param.device if beside",
          "Moments in float32 of bfloat16 weights are rounded.",
          IN_CHECKPOINT + "optimizer_state_keeps_its_dtype"),
    Break("checkpoint-old-moments-stay", "crystal/checkpoint.py",
          '    optimizer.state.clear()\n',
          "",
          "Moments that the checkpoint does not have survive.",
          IN_CHECKPOINT + "what_had_no_gradient_has_no_state_again"),
    Break("checkpoint-hyper-not-restored", "crystal/checkpoint.py",
          "zip(groups, hyper or [])",
          "zip(groups, [])",
          "Betas and decay of the checkpoint are lost.",
          IN_CHECKPOINT + "adamw_goes_on_as_if_it_had_not_stopped"),
    Break("checkpoint-best-of-another-step", "crystal/checkpoint.py",
          '{"step": int(step), "value": value, "metric": metric}',
          '{"step": 0, "value": value, "metric": metric}',
          "The best checkpoint is none.",
          IN_CHECKPOINT + "prune_keeps_the_newest_and_the_best"),
    Break("checkpoint-failed-save-stays", "crystal/checkpoint.py",
          "shutil.rmtree(temporary, ignore_errors=True)   # after",
          "pass   # after",
          "A full disk stays full.",
          IN_CHECKPOINT + "a_save_that_fails_leaves_the_one_before"),
    Break("processes-sum-in-float32", "crystal/processes.py",
          "torch.float64 if isinstance(value, float)",
          "torch.float32 if isinstance(value, float)",
          "Sums of losses lose digits.",
          IN_PROCESSES + "two_processes_communicate"),
    Break("processes-sum-in-place", "crystal/processes.py",
          "value.to(self.device, copy=True)",
          "value.detach().to(self.device)",
          "A sum over ranks changes what was summed.",
          IN_PROCESSES + "two_processes_communicate"),
    Break("processes-any-is-all", "crystal/processes.py",
          "self.sum(int(bool(flag))) > 0",
          "self.sum(int(bool(flag))) == self.world",
          "One rank's failure does not stop the others.",
          IN_PROCESSES + "two_processes_communicate"),
    Break("processes-gather-of-equal-lengths", "crystal/processes.py",
          "json.loads(bytes(part[:n].tolist()))",
          "json.loads(bytes(part.tolist()))",
          "Lists of unequal lengths cannot be gathered.",
          IN_PROCESSES + "two_processes_communicate"),
    Break("processes-others-do-not-wait", "crystal/processes.py",
          "if not leads and any_failed(False):",
          "if False and any_failed(False):",
          "Every process downloads the model.",
          IN_PROCESSES + "first_runs_first_and_its_failure_reaches_the_others"),
    Break("processes-first-waits-ten-minutes", "crystal/processes.py",
          "timeout=timedelta(days=1)",
          "timeout=timedelta(seconds=1)",
          "A long download ends the run.",
          IN_PROCESSES + "others_wait_for_the_first_longer_than_for_each_other"),
    Break("processes-guest-ends-the-group", "crystal/processes.py",
          "if self.world > 1 and not self.guest and",
          "if self.world > 1 and",
          "A program that calls another's main loses its group.",
          IN_PROCESSES + "a_group_that_is_there_is_shared_and_left_alone"),
    Break("processes-always-in-sync", "crystal/processes.py",
          "if on and self.world > 1 else",
          "if not on and self.world > 1 else",
          "The last part's gradients are not exchanged.",
          IN_PROCESSES + "wrapped_gradients_equal_one_process"),
    Break("processes-buffers-sent", "crystal/processes.py",
          '"broadcast_buffers": False}',
          '"broadcast_buffers": True}',
          "Every forward waits for the first process's buffers.",
          IN_PROCESSES + "a_module_is_wrapped_for_its_device_without_sending_buffers"),
    Break("processes-all-cores-each", "crystal/processes.py",
          "max(1, cores // local_world)",
          "cores",
          "Processes fight for the cores.",
          IN_PROCESSES + "threads_are_cores_over_processes_unless_the_user_chose"),
    Break("processes-threads-not-set", "crystal/processes.py",
          '        torch.set_num_threads(threads)\n',
          '        pass\n',
          "Under torchrun a CPU idles.",
          IN_PROCESSES + "a_process_takes_its_share_of_this_machines_cores"),
    Break("processes-cores-over-the-world", "crystal/processes.py",
          'os.environ.get("LOCAL_WORLD_SIZE", world)',
          "world",
          "On several machines cores idle.",
          IN_PROCESSES + "a_process_takes_its_share_of_this_machines_cores"),
    Break("processes-gpu-by-global-rank", "crystal/processes.py",
          "local_rank if world > 1 or device.index is None",
          "rank if world > 1 or device.index is None",
          "The second machine's processes ask for GPUs that it has not.",
          IN_PROCESSES + "which_gpu_is_whose"),
    Break("processes-gpu-choice-ignored", "crystal/processes.py",
          "local_rank if world > 1 or device.index is None else device.index",
          "local_rank",
          "--device cuda:1 takes the first GPU.",
          IN_PROCESSES + "which_gpu_is_whose"),
    Break("processes-one-interrupt-is-two", "crystal/processes.py",
          "time.monotonic() - self.at > 0.5",
          "True",
          "One Ctrl-C kills instead of saving.",
          IN_PROCESSES + "a_signal_asks_and_restore_forgets"),
    Break("processes-handlers-stay", "crystal/processes.py",
          '            signal.signal(number, handler)\n',
          '            pass\n',
          "After a run Ctrl-C does nothing.",
          IN_PROCESSES + "a_signal_asks_and_restore_forgets"),
    Break("processes-child-cannot-be-ended", "crystal/processes.py",
          "                os._exit(128 + number)",
          "                return",
          "A loader's worker outlives the run.",
          IN_PROCESSES + "a_forked_child_can_still_be_ended"),
    Break("processes-workers-hear-sigterm", "crystal/processes.py",
          '    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n',
          "",
          "A scheduler's signal kills the loader's workers.",
          IN_PROCESSES + "a_worker_ignores_what_ends_a_run"),
    Break("processes-every-rank-prints", "crystal/processes.py",
          "        return self.rank == 0",
          "        return self.local_rank == 0",
          "Every machine writes the log.",
          IN_PROCESSES + "the_first_prints_at_once"),
    Break("processes-timeout-ignored", "crystal/processes.py",
          "timeout=timedelta(seconds=timeout)",
          "timeout=timedelta(seconds=600)",
          "start()'s timeout does nothing.",
          IN_PROCESSES + "a_process_takes_its_share_of_this_machines_cores"),
    Break("processes-threads-of-a-launch", "crystal/processes.py",
          'os.environ.setdefault("OMP_NUM_THREADS", "1")',
          'os.environ.setdefault("OMP_THREADS", "1")',
          "torchrun prints its warning.",
          IN_PROCESSES + "a_launch_from_a_shell_takes_one_thread_each"),
]

# ---- data and corruption ----------------------------------------------------------------------------------------------

DATA = [
]

# ---- measures: evaluation, reliance, benchmarks, the endpoint ---------------------------------------------------------

MEASURES = [
]

# ---- operators: ops.py, csrc's CPU part, setup ------------------------------------------------------------------------

OPERATORS = [
]

BREAKS = METHODS + SETTINGS + COMMANDS + LOOP + DATA + MEASURES + OPERATORS


# ---- putting them in --------------------------------------------------------------------------------------------------

def copy_of_the_repository(to, built):
    """The files that git knows or would know, and what was compiled; with `built` the objects too, so that a rebuild is short."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    compiled = [path.relative_to(ROOT).as_posix() for path in (ROOT / "crystal").glob("*.so")]
    for name in listed.stdout.splitlines() + compiled:
        if (ROOT / name).is_file():  # one that was deleted and not yet committed is listed too
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    if built and (ROOT / "build").is_dir():
        shutil.copytree(ROOT / "build", to / "build", copy_function=shutil.copy2)


def run_test(test, where):
    """Runs pytest with the arguments `test` in a copy -> (its exit code, or None after LIMIT seconds; what it printed)."""
    output = Path(f"{where}.txt")
    process = PROCESSES.Process(target=inside, args=(test.split(), str(where), str(output)))
    process.start()
    process.join(LIMIT)
    late = process.is_alive()
    if late:
        os.killpg(process.pid, signal.SIGKILL)  # with whatever the test has started
        process.join()
    printed = output.read_text(errors="replace")
    output.unlink()
    return None if late else process.exitcode, printed


def inside(arguments, where, output):
    """What the process of one test does: pytest in the folder `where`, all that it prints into a file."""
    os.setsid()
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(where)
    sys.path.insert(0, where)  # before an installed crystal
    os.environ |= {"PYTHONPATH": where, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True

    import pytest
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))


def rebuild(where):
    """Compiles a copy's operators for the CPU -> what went wrong, or nothing."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=where, env=os.environ | {"CRYSTAL_CUDA": "0"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode else ""


def put_in(fault):
    """Puts one fault into a copy and runs its test -> (verdict, seconds, what pytest printed)."""
    started = time.monotonic()
    compiled = fault.file.startswith("csrc/") or fault.file == "setup.py"
    with tempfile.TemporaryDirectory(prefix="break-") as folder:
        where = Path(folder)
        copy_of_the_repository(where, compiled)
        text = (where / fault.file).read_text()
        if text.count(fault.text) != 1:
            return f"its text stands {text.count(fault.text)} times", 0.0, ""
        (where / fault.file).write_text(text.replace(fault.text, fault.wrong))
        if compiled and (problem := rebuild(where)):
            return "does not compile", time.monotonic() - started, problem
        code, printed = run_test(fault.test, where)
    verdict = {0: "NOT NOTICED", 1: "noticed", 2: "noticed", None: "no answer"}.get(code, f"pytest ended with {code}")
    return verdict, time.monotonic() - started, printed


def tests_that_pass(tests, jobs):
    """Runs each test on an unbroken copy -> those that pass; the others are printed."""
    with tempfile.TemporaryDirectory(prefix="unbroken-") as folder:
        copy_of_the_repository(Path(folder), False)
        with ThreadPoolExecutor(jobs) as pool:
            ended = list(pool.map(lambda test: run_test(test, Path(folder)), tests))
    for test, (code, printed) in zip(tests, ended):
        if code != 0:
            print(f"without any fault, {test} ends with {code}:\n{printed}", flush=True)
    return {test for test, (code, _) in zip(tests, ended) if code == 0}


def main():
    parser = argparse.ArgumentParser(description="Puts deliberate faults into a copy and prints which no test notices.")
    parser.add_argument("names", nargs="*", help="faults to put in; all of them if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many run side by side")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--verbose", action="store_true", help="print what pytest printed, too")
    options = parser.parse_args()

    chosen = [fault for fault in BREAKS if not options.names or any(fnmatch.fnmatch(fault.name, name) for name in options.names)]
    if not chosen:
        sys.exit(f"no fault is named {' or '.join(options.names)}; --list prints the names")
    if options.list:
        print("\n".join(f"{fault.name:50} {fault.file}" for fault in chosen))
        return

    os.environ["OMP_NUM_THREADS"] = "1"
    PROCESSES.set_forkserver_preload(SLOW)
    fine = tests_that_pass(list(dict.fromkeys(fault.test for fault in chosen)), options.jobs)
    missed = [fault for fault in chosen if fault.test not in fine]
    noticed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, (verdict, seconds, printed) in zip(chosen, pool.map(put_in, chosen)):
            print(f"{verdict:12} {fault.name:50} {seconds:5.0f} s  {fault.test}", flush=True)
            if options.verbose or verdict not in ("noticed", "NOT NOTICED"):
                print(printed, flush=True)
            if verdict != "noticed":
                missed.append(fault)
            elif fault.test in fine:
                noticed += 1

    print(f"\n{noticed} of {len(chosen)} faults noticed ({100 * noticed / len(chosen):.1f} %)")
    for fault in missed:
        print(f"  not noticed: {fault.name} ({fault.file}): {fault.consequence}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
