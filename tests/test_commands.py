"""Every flag of every command does what it says: a table of flags, each with a test at another
value than its default.

The table is held against the commands' own parsers: a flag without a test fails here, and so does a test of a
flag that is gone. train.py's settings have a table of their own. The tests below go from argv to what the
flag reaches: the prompt that is decoded, the tensors of the checkpoint that was named, files and numbers as
they are written. What stands behind and takes minutes (a training, a benchmark's measurement) is replaced by
a recorder of its arguments. Right values are counted by hand or read from the files themselves.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import json
import math
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_benchmarks import picture
from test_opening import run, saved  # noqa: F401  a fixture, and what reads its files

from crystal import bench, compare, demo, evaluate, export, generate, opening, serve, train, visualize
from crystal.evaluation import asking
from crystal.runtime import checkpoint, config, toy

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"

# What opens a model takes these four, and two tests hold them: what is asked arrives, and
# what arrives is done.
OPENS = "test_what_opens_a_model_is_told_what_was_asked"
MODEL = {"--checkpoint": OPENS, "--device": OPENS, "--min_pixels": OPENS, "--max_pixels": OPENS}

# Whose code a command may run that opens a run: one test takes every such command, another
# gives it both answers.
TRUST = dict.fromkeys(
    ["--method", "--trust_method"], "test_methods.py::test_every_command_takes_both_answers"
)
MODEL = MODEL | TRUST

# {command: {flag: test}}; a test without a file stands in this one.
TABLE = {
    "crystal.generate": MODEL
    | {
        "--model": OPENS,
        "--image": "test_generate_asks_what_was_typed",
        "--question": "test_generate_asks_what_was_typed",
        "--max_new_tokens": "test_generate_asks_what_was_typed",
        "--latents": "test_generate_asks_what_was_typed",
    },
    "crystal.export": TRUST
    | {
        "--run": "test_export_writes_the_checkpoint_that_was_named",
        "--checkpoint": "test_export_writes_the_checkpoint_that_was_named",
        "--out": "test_export_writes_the_checkpoint_that_was_named",
        "--verify": "test_verify.py::test_the_command_ends_with_1_where_something_is_broken",
    },
    "crystal.visualize": TRUST
    | {
        "--run": "test_visualize_draws_what_was_asked",
        "--checkpoint": "test_visualize_draws_what_was_asked",
        "--data": "test_visualize_draws_what_was_asked",
        "--image_root": "test_visualize_draws_what_was_asked",
        "--out": "test_visualize_draws_what_was_asked",
        "--count": "test_visualize_draws_what_was_asked",
        "--attn_layers": "test_visualize_draws_what_was_asked",
        "--html": "test_visualize_writes_the_page_that_was_asked",
        "--questions": "test_visualize_writes_the_page_that_was_asked",
        "--device": "test_visualize_draws_what_was_asked",
    },
    "crystal.evaluate": MODEL
    | {
        "--model": OPENS,
        "--data": "test_evaluate_reads_asks_and_writes",
        "--benchmark": "test_evaluate_scores_a_benchmark_as_told",
        "--image_root": "test_evaluate_reads_asks_and_writes",
        "--reliance": "test_evaluate_passes_reliance_its_flags",
        "--diagnose": "test_evaluate_passes_diagnose_its_flags",
        "--bottleneck": "test_evaluate_asks_under_the_methods_mask",
        "--latents": "test_evaluate_asks_with_and_without_latents",
        "--corruption": "test_evaluate_shows_corrupted_or_grey_images",
        "--grey": "test_evaluate_shows_corrupted_or_grey_images",
        "--blind": "test_evaluate_shows_corrupted_or_grey_images",
        "--scores": "test_evaluate_scores_a_benchmark_as_told",
        "--suffix": "test_evaluate_scores_a_benchmark_as_told",
        "--batch_size": "test_evaluate_reads_asks_and_writes",
        "--max_new_tokens": "test_evaluate_reads_asks_and_writes",
        "--seed": "test_evaluate_shows_corrupted_or_grey_images",
        "--limit": "test_evaluate_reads_asks_and_writes",
        "--out": "test_evaluate_reads_asks_and_writes",
        "--overwrite": "test_evaluate.py::test_a_killed_run_goes_on",
    },
    "crystal.calibrate": {
        "--candidates": "test_calibrate.py::test_the_command_probes_each_level_with_the_runs_flags",
        "--updates": "test_calibrate.py::test_the_command_probes_each_level_with_the_runs_flags",
    },
    "crystal.serve": MODEL
    | {
        "--model": OPENS,
        "--name": "test_serve_is_told_what_was_asked",
        "--host": "test_serve_is_told_what_was_asked",
        "--port": "test_serve_is_told_what_was_asked",
        "--latents": "test_serve_is_told_what_was_asked",
        "--body": "test_serve_is_told_what_was_asked",
        "--characters": "test_serve_is_told_what_was_asked",
        "--images": "test_serve_is_told_what_was_asked",
        "--pixels": "test_serve_is_told_what_was_asked",
        "--tokens": "test_serve_is_told_what_was_asked",
        "--default_tokens": "test_serve_is_told_what_was_asked",
        "--queue": "test_serve_is_told_what_was_asked",
        "--batch": "test_serve_is_told_what_was_asked",
    },
    "crystal.compare": {
        "--study": "test_run_study.py::test_what_was_asked_is_done",
        "--page": "test_run_study.py::test_what_was_asked_is_done",
        "--methods": "test_compare_trains_and_asks_what_was_asked",
        "--seeds": "test_compare_trains_and_asks_what_was_asked",
        "--max_steps": "test_compare_trains_and_asks_what_was_asked",
        "--model": "test_compare_trains_and_asks_what_was_asked",
        "--data": "test_compare_trains_and_asks_what_was_asked",
        "--test": "test_compare_trains_and_asks_what_was_asked",
        "--questions": "test_compare_trains_and_asks_what_was_asked",
        "--max_new_tokens": "test_compare_trains_and_asks_what_was_asked",
        "--output": "test_compare_trains_and_asks_what_was_asked",
    },
    "crystal.demo": {
        "--method": "test_demo_passes_its_flags_on",
        "--max_steps": "test_demo_passes_its_flags_on",
        "--seed": "test_demo_passes_its_flags_on",
        "--questions": "test_demo_passes_its_flags_on",
        "--output": "test_demo_passes_its_flags_on",
        "--processes": "test_demo_passes_its_flags_on",
    },
    "crystal.bench": {
        "--device": "test_bench_measures_what_was_asked",
        "--dtype": "test_bench_measures_what_was_asked",
        "--only": "test_bench_measures_what_was_asked",
        "--rows": "test_bench_measures_what_was_asked",
        "--vocab": "test_bench_measures_what_was_asked",
        "--slice": "test_bench_measures_what_was_asked",
        "--repeats": "test_bench_measures_what_was_asked",
        "--compile": "test_bench_measures_what_was_asked",
        "--out": "test_bench_measures_what_was_asked",
    },
    "crystal.bench_step": {
        "--model": "test_bench_step.py::test_every_row_of_a_small_model",
        "--layers": "test_widths.py::test_real_widths_are_the_published_ones",
        "--vision_layers": "test_widths.py::test_real_widths_are_the_published_ones",
        "--lengths": "test_bench_step.py::test_every_row_of_a_small_model",
        "--only": "test_bench_step.py::test_a_row_that_fails_is_a_line",
        "--repeats": "test_bench_step.py::test_every_row_of_a_small_model",
        "--device": "test_bench_step.py::test_every_row_of_a_small_model",
        "--out": "test_bench_step.py::test_every_row_of_a_small_model",
    },
    "crystal.planning": {
        "--gpus": "test_planning.py::test_the_flags_change_the_plan",
        "--gpu": "test_planning.py::test_the_flags_change_the_plan",
        "--memory": "test_planning.py::test_the_flags_change_the_plan",
        "--tflop_s": "test_planning.py::test_the_flags_change_the_plan",
        "--image": "test_planning.py::test_the_flags_change_the_plan",
        "--length": "test_planning.py::test_the_flags_change_the_plan",
    },
    "data_prep.ade20k_depth": {
        "--images": "test_ade20k_depth.py::test_maps_may_lie_in_one_folder_and_names_end_in_capitals",
        "--depth": "test_ade20k_depth.py::test_maps_may_lie_in_one_folder_and_names_end_in_capitals",
        "--out": "test_ade20k_depth.py::test_maps_may_lie_in_one_folder_and_names_end_in_capitals",
        "--count": "test_ade20k_depth.py::test_the_seed_draws_order_and_points",
        "--gap": "test_ade20k_depth.py::test_a_wider_gap_is_kept",
        "--seed": "test_ade20k_depth.py::test_the_seed_draws_order_and_points",
        "--on_bad_record": "test_ade20k_depth.py::test_what_cannot_be_used_is_told",
    },
    "data_prep.covt": {
        "--parts": "test_covt.py::test_the_command_samples_by_hash",
        "--out": "test_covt.py::test_the_command_samples_by_hash",
        "--list": "test_covt.py::test_subsets",
        "--subsets": "test_covt.py::test_subsets",
        "--sample": "test_covt.py::test_the_command_samples_by_hash",
        "--seed": "test_covt.py::test_the_command_samples_by_hash",
        "--on_bad_record": "test_covt.py::test_the_command_leaves_out_a_broken_row",
    },
    "data_prep.tallyqa": {
        "--questions": "test_tallyqa.py::test_the_smallest_hashes_are_the_sample",
        "--images": "test_tallyqa.py::test_the_smallest_hashes_are_the_sample",
        "--out": "test_tallyqa.py::test_the_smallest_hashes_are_the_sample",
        "--kind": "test_tallyqa.py::test_kinds_and_samples",
        "--sample": "test_tallyqa.py::test_the_smallest_hashes_are_the_sample",
        "--seed": "test_tallyqa.py::test_the_smallest_hashes_are_the_sample",
        "--prompt": "test_tallyqa.py::test_records_that_training_takes",
        "--on_bad_record": "test_tallyqa.py::test_a_broken_question_is_one_line",
    },
    "data_prep.easy_vqa": {
        "--out": "test_easy_vqa.py::test_the_command_writes_what_training_takes",
        "--val": "test_easy_vqa.py::test_the_command_writes_what_training_takes",
        "--seed": "test_easy_vqa.py::test_the_seed_holds_pictures_out",
        "--package": "test_easy_vqa.py::test_the_command_writes_what_training_takes",
    },
    "data_prep.encoder_features": {
        "--encoder": "test_encoder_features.py::test_files_hold_what_the_flags_say",
        "--data": "test_encoder_features.py::test_files_hold_what_the_flags_say",
        "--image_root": "test_encoder_features.py::test_files_hold_what_the_flags_say",
        "--name": "test_encoder_features.py::test_files_hold_what_the_flags_say",
        "--shard": "test_encoder_features.py::test_files_hold_what_the_flags_say",
        "--device": "test_encoder_features.py::test_files_hold_what_the_flags_say",
        "--on_bad_record": "test_encoders.py::test_a_broken_image_is_left_out_and_files_are_made_once",
        "--quiet": "test_encoder_features.py::test_the_bar_counts_records_and_quiet_leaves_what_was_written",
    },
    "data_prep.lavit_teacher": MODEL
    | {
        "--teacher": OPENS,
        "--data": "test_lavit_teacher.py::test_the_command_passes_its_flags_on",
        "--image_root": "test_lavit_teacher.py::test_the_command_passes_its_flags_on",
        "--keep": "test_lavit_teacher.py::test_the_command_keeps_what_passes",
        "--share": "test_lavit_teacher.py::test_the_command_keeps_what_passes",
        "--on_bad_record": "test_lavit_teacher.py::test_a_broken_image_is_left_out_and_told",
        "--limit": "test_lavit_teacher.py::test_the_command_passes_its_flags_on",
        "--shard": "test_lavit_teacher.py::test_the_command_passes_its_flags_on",
        "--batch_size": "test_lavit_teacher.py::test_the_command_passes_its_flags_on",
        "--max_new_tokens": "test_lavit_teacher.py::test_the_command_passes_its_flags_on",
        "--dtype": "test_lavit_teacher.py::test_the_command_passes_its_flags_on",
        "--overwrite": "test_lavit_teacher.py::test_files_resume_and_the_student_learns_from_them",
        "--quiet": "test_lavit_teacher.py::test_the_bar_counts_every_look_and_quiet_leaves_what_was_written",
    },
    "data_prep.checks.feedback": TRUST
    | {
        "--run": "test_feedback_check.py::test_the_flags_choose_model_records_and_updates",
        "--data": "test_feedback_check.py::test_the_flags_choose_model_records_and_updates",
        "--image_root": "test_feedback_check.py::test_the_flags_choose_model_records_and_updates",
        "--records": "test_feedback_check.py::test_the_flags_choose_model_records_and_updates",
        "--repeats": "test_feedback_check.py::test_the_flags_choose_model_records_and_updates",
        "--updates": "test_feedback_check.py::test_the_flags_choose_model_records_and_updates",
    },
    "data_prep.checks.attack": {
        flag: "test_attack_check.py::test_the_flags_choose_model_attackers_and_parts"
        for flag in ("--model", "--attackers", "--seconds", "--rounds", "--rest", "--seed")
    },
    "data_prep.checks.soak": {
        flag: "test_soak_check.py::test_the_flags_choose_rounds"
        for flag in ("--minutes", "--steps", "--faults", "--seed", "--output")
    },
    "data_prep.checks.reliance": {
        "--methods": "test_reliance_check.py::test_the_flags_choose_runs_and_questions",
        "--seeds": "test_reliance_check.py::test_the_flags_choose_runs_and_questions",
        "--max_steps": "test_reliance_check.py::test_the_flags_choose_runs_and_questions",
        "--family": "test_reliance_check.py::test_the_flags_choose_runs_and_questions",
        "--questions": "test_reliance_check.py::test_the_flags_choose_runs_and_questions",
        "--output": "test_reliance_check.py::test_the_flags_choose_runs_and_questions",
    },
    "data_prep.tiny.base": {
        "--out": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--work": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--only": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--steps": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--wordy_steps": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--dense_steps": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--images": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--muon_lr": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--adam_lr": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--seed": "test_tiny_base.py::test_the_command_trains_what_was_asked",
        "--compile": "test_tiny_base.py::test_the_command_trains_what_was_asked",
    },
    "data_prep.tiny.carrying": {
        "--run": "test_tiny_crystal.py::test_a_run_is_shipped",
        "--out": "test_tiny_crystal.py::test_a_run_is_shipped",
    },
    "data_prep.tiny.check": {
        "--base": "test_tiny_base.py::test_the_check_measures_what_was_asked",
        "--blind": "test_tiny_base.py::test_the_check_measures_what_was_asked",
        "--per_family": "test_tiny_base.py::test_the_check_measures_what_was_asked",
        "--seed": "test_tiny_base.py::test_the_check_measures_what_was_asked",
    },
    "data_prep.tiny.encoder": {
        "--out": "test_tiny_encoder.py::test_it_trains_and_writes_what_opens",
        "--steps": "test_tiny_encoder.py::test_it_trains_and_writes_what_opens",
        "--images": "test_tiny_encoder.py::test_each_flag_does_what_it_says",
        "--lr": "test_tiny_encoder.py::test_each_flag_does_what_it_says",
        "--muon_lr": "test_tiny_encoder.py::test_each_flag_does_what_it_says",
        "--seed": "test_tiny_encoder.py::test_each_flag_does_what_it_says",
        "--probe": "test_tiny_encoder.py::test_it_trains_and_writes_what_opens",
    },
    "data_prep.toy": {
        "--out": "test_toy.py::test_the_command_draws_what_was_asked",
        "--seed": "test_toy.py::test_the_command_draws_what_was_asked",
        "--train": "test_toy.py::test_the_command_draws_what_was_asked",
        "--val": "test_toy.py::test_the_command_draws_what_was_asked",
        "--test": "test_toy.py::test_the_command_draws_what_was_asked",
        "--families": "test_toy_steps.py::test_the_command_asks_the_families_that_were_named",
    },
}


# --- the table ---


class Parser(Exception):
    """Raised in the place of parsing, so that nothing after it runs."""


def commands():
    """Dotted names of the files that have a parser of their own; train.py's is made of its settings."""
    files = [*ROOT.glob("crystal/**/*.py"), *ROOT.glob("data_prep/**/*.py")]
    own = [
        path for path in files if re.search(r"= (config\.)?OneLineParser\(\s*(prog|desc)", path.read_text())
    ]
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in own
        if path != ROOT / "crystal" / "runtime" / "config.py"
    )


def flags_of(command, monkeypatch):
    """The flags that a command's parser takes, `--no-x` and --help left out."""
    caught = []

    def stop(parser, *_, **__):
        caught.append(parser)
        raise Parser

    monkeypatch.setattr(config.OneLineParser, "parse_known_args", stop)
    monkeypatch.setattr("sys.argv", [command])
    with pytest.raises(Parser):
        importlib.import_module(command).main()
    options = [option for action in caught[0]._actions for option in action.option_strings]
    return {option for option in options if option.startswith("--") and not option.startswith("--no-")} - {
        "--help"
    }


@functools.cache
def functions_of(file):
    """{test function: its text, decorators included} of a test file; {} where there is none."""
    path = TESTS / file
    if not path.is_file():
        return {}
    text, found = path.read_text(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return found


def source_of(test):
    """The text of a test function; None where there is no such test."""
    place, _, name = test.rpartition("::")
    return functions_of(place or "test_commands.py").get(name)


def test_the_table_has_every_command():
    assert commands() == sorted(TABLE)


@pytest.mark.parametrize("command", sorted(TABLE))
def test_the_table_has_every_flag_and_no_other(command, monkeypatch):
    assert flags_of(command, monkeypatch) == set(TABLE[command])


@pytest.mark.parametrize("command", sorted(TABLE))
def test_each_named_test_exists_and_gives_the_flag(command):
    for flag, test in TABLE[command].items():
        source = source_of(test)
        assert source is not None, f"{command} {flag}: there is no {test}"
        given = flag in source or f"--no-{flag[2:]}" in source
        assert given or test == OPENS, f"{command} {flag}: {test} never gives it"


# --- what several commands share ---


class Opened(Exception):
    """Raised in the place of opening a model, with what it was asked for."""


def stop_at_opening(monkeypatch, module):
    """Lets `open_model` of a module raise Opened with its arguments by name."""
    signature = inspect.signature(opening.open_model)

    def stop(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        raise Opened(dict(bound.arguments))

    monkeypatch.setattr(module, "open_model", stop)


REST = {  # flag that names the model, and what else the command needs
    "crystal.generate": ("--model", ["--question", "Why?"]),
    "crystal.evaluate": ("--model", ["--data", "RECORDS"]),
    "crystal.serve": ("--model", ["--port", "0"]),
    "data_prep.lavit_teacher": ("--teacher", ["--data", "RECORDS"]),
}


@pytest.mark.parametrize("command", sorted(REST))
def test_what_opens_a_model_is_told_what_was_asked(command, records_file, monkeypatch, tmp_path):
    shutil.copytree(records_file.parent, tmp_path / "d")
    flag, rest = REST[command]
    rest = [str(tmp_path / "d" / "train.jsonl") if word == "RECORDS" else word for word in rest]
    module = importlib.import_module(command)
    stop_at_opening(monkeypatch, module)
    # Lavit_teacher's look at a run's manifest.
    monkeypatch.setattr(module, "weights", lambda args: "", raising=False)
    with pytest.raises(Opened) as opened:
        module.main(
            [
                flag, "some/run", "--checkpoint", "2", "--device", "cpu:0", "--min_pixels", "3136",
                "--max_pixels", "6272", *rest,
            ]
        )
    asked = opened.value.args[0]
    assert (asked["name"], asked["which"], asked["device"]) == ("some/run", "2", torch.device("cpu:0"))
    assert (asked["min_pixels"], asked["max_pixels"]) == (3136, 6272)


@pytest.fixture
def attached(setup, monkeypatch):
    """attached(module, *flags) -> a method on a small model, which `module` opens whatever it is asked for.
    """

    def make(module, *flags):
        s = setup(*flags, dtype=torch.float32)
        s.model.eval()
        monkeypatch.setattr(module, "open_model", lambda *_, **__: (s.model, s.fmt, s.settings))
        return s

    return make


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
THOUGHT = {
    "keep": "<think> Because the feature of the image is"
    "<|latent_0|><|latent_1|><|latent_2|>. </think><answer>",
    "drop": "<think> Because the feature of the image is. </think><answer>",
    "free": "",
    "none": "",
}


def prompt(question, tokens, latents):
    """What the model is to be given, as text. tokens: how many each image takes."""
    images = "".join("<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in tokens)
    return (
        f"{SYSTEM}<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n{THOUGHT[latents]}"
    )


def shown(pixels):
    """Rows of pixel_values [P, 3 x 2 x 14 x 14] as the processor makes them -> colours from 0 to 1, [pixels,
    3] of the first frame.
    """
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    return pixels.view(-1, 3, 2, 196)[:, :, 0].permute(0, 2, 1).reshape(-1, 3) * std + mean


def colours(path):
    """The pixels of a picture file, [pixels, 3], from 0 to 1, sorted: whatever order the
    processor puts them in.
    """
    return in_order(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).view(-1, 3).float() / 255)


def in_order(pixels):
    return pixels.sort(0).values


# --- generate ---


@pytest.mark.parametrize("latents", ["keep", "drop", "free"])
def test_generate_asks_what_was_typed(attached, records_file, monkeypatch, capsys, latents):
    """--image twice, in order; --question as text; room for a thought of the
    model's own beside --max_new_tokens.
    """
    s = attached(generate)
    asked = []
    monkeypatch.setattr(generate, "generate", lambda *args, **how: asked.append((args, how)) or ["an answer"])
    folder = records_file.parent
    generate.main(
        [
            "--image", str(folder / "0_0.png"), "--image", str(folder / "1_0.png"),
            "--question", "Which <image>?", "--max_new_tokens", "7", "--latents", latents,
        ]
    )
    (model, [(ids, pixels, grid)], fmt, room), how = asked[0]
    assert capsys.readouterr().out == "an answer\n" and (model, fmt) == (s.model, s.fmt)

    # 112 x 84 and 56 x 56 pixels, tokens of 28 x 28.
    assert s.model.tokenizer.decode(ids) == prompt("Which <image>?", [12, 4], latents)
    assert grid.tolist() == [[1, 6, 8], [1, 4, 4]]
    assert (in_order(shown(pixels[:48])) - colours(folder / "0_0.png")).abs().max() < 1e-5
    assert (in_order(shown(pixels[48:])) - colours(folder / "1_0.png")).abs().max() < 1e-5

    # A thought of its own: the words, three latents, the full stop, and four tags.
    words = (
        s.model.tokenizer(" Because the feature of the image is").input_ids
        + s.model.tokenizer(". ").input_ids
    )
    assert room == 7 + (len(words) + 3 + 4 if latents == "free" else 0)
    assert how["latents"] == latents


# --- export ---


def test_export_writes_the_checkpoint_that_was_named(run, model_dirs, tmp_path, capsys):
    """W + (alpha / r) B A of the first of three checkpoints, by hand from its tensors, below --out."""
    export.main(["--run", str(run), "--checkpoint", "1", "--out", str(tmp_path / "to")])
    assert capsys.readouterr().out == f"wrote {tmp_path}/to/merged and {tmp_path}/to/adapter\n"
    assert (
        sorted(p.name for p in (tmp_path / "to").iterdir()) == ["adapter", "merged"]
        and not (run / "merged").exists()
    )

    base, merged, tensors = (
        load_file(model_dirs[True] / "model.safetensors"),
        load_file(tmp_path / "to" / "merged" / "model.safetensors"),
        saved(run, 1),
    )
    adapted = 0
    for name, W in base.items():
        prefix = f"model.hf.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A" in tensors:
            A, B = tensors[f"{prefix}.lora_A"].double(), tensors[f"{prefix}.lora_B"].double()
            assert (merged[name].double() - (W.double() + 6 / 2 * B @ A)).abs().max() < 1e-6
            adapted += 1
    assert adapted == 3 * 7  # layers, matrices of each

    adapter = load_file(tmp_path / "to" / "adapter" / "adapter_model.safetensors")
    layer = "model.language_model.layers.2.mlp.down_proj"
    assert torch.equal(
        adapter[f"base_model.model.{layer}.lora_B.weight"], tensors[f"model.hf.{layer}.lora_B"]
    )
    assert tensors[f"model.hf.{layer}.lora_B"].abs().max() > 0

    # By default into the run, and the best checkpoint.
    export.main(["--run", str(run)])
    best = load_file(run / "adapter" / "adapter_model.safetensors")
    assert torch.equal(
        best[f"base_model.model.{layer}.lora_B.weight"], saved(run, 2)[f"model.hf.{layer}.lora_B"]
    )


# --- visualize ---


def test_visualize_draws_what_was_asked(run, records_file, monkeypatch, tmp_path, capsys):
    """Records from another folder than their images, two of three, families in turn; layers, checkpoint and
    device of the model.
    """
    records = tmp_path / "elsewhere.jsonl"
    records.write_text(records_file.read_text())
    drawn, opened = {}, []
    signature, open_model = inspect.signature(opening.open_model), opening.open_model

    def opening_model(*args, **kwargs):
        opened.append(signature.bind(*args, **kwargs).arguments)
        return open_model(*args, **kwargs)

    def maps(model, fmt, settings, chosen, path, layers=None, corruption=None):
        drawn.update(model=model, records=chosen, layers=layers, settings=settings, corruption=corruption)
        return path

    monkeypatch.setattr(visualize, "open_model", opening_model)
    monkeypatch.setattr(visualize, "attention_maps", maps)
    monkeypatch.setattr(visualize, "loss_curves", lambda of, path: drawn.update(run=Path(of)) or path)
    monkeypatch.setattr(visualize, "corruption_grid", lambda image, path: drawn.update(image=image) or path)
    visualize.main(
        [
            "--run", str(run), "--checkpoint", "1", "--data", str(records),
            "--image_root", str(records_file.parent), "--out", str(tmp_path / "to"), "--count", "2",
            "--attn_layers", "0,-1", "--device", "cpu:0",
        ]
    )
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "to" / f"{name}.png") for name in ("losses", "corruptions", "attention")
    ]
    assert drawn["run"] == run and drawn["image"].size == (112, 84)
    assert (
        [r.id for r in drawn["records"]] == ["0", "1"]
        and drawn["layers"] == {0, 2}
        and drawn["corruption"] is None
    )
    assert drawn["settings"].lora_alpha == 6
    ours = dict(drawn["model"].named_parameters())
    assert torch.equal(ours["new_tokens.embedding"], saved(run, 1)["model.new_tokens.embedding"])
    assert opened[0]["device"] == torch.device("cpu:0")


def test_visualize_writes_the_page_that_was_asked(run, records_file, monkeypatch, tmp_path, capsys):
    """Records from another folder than their images, two of three, families in turn, one of them drawn;
    layers, checkpoint and device of the model; the page is what page.build made of it.
    """
    records, file = tmp_path / "elsewhere.jsonl", tmp_path / "new" / "page.html"
    records.write_text(records_file.read_text())
    measured, opened = {}, []
    signature, open_model = inspect.signature(opening.open_model), opening.open_model

    def opening_model(*args, **kwargs):
        opened.append(signature.bind(*args, **kwargs).arguments)
        return open_model(*args, **kwargs)

    def measure(model, fmt, method, settings, chosen, count=4, layers=None, progress=False):
        measured.update(model=model, method=method, records=chosen, count=count, layers=layers)
        return SimpleNamespace(reliance={"of": "these"})

    monkeypatch.setattr(visualize, "open_model", opening_model)
    monkeypatch.setattr(visualize.inside, "measure", measure)
    monkeypatch.setattr(visualize.page, "build", lambda *args: measured.update(built=args) or "<html>é")
    flags = [
        "--run", str(run), "--checkpoint", "1", "--data", str(records),
        "--image_root", str(records_file.parent), "--html", str(file), "--count", "1", "--questions", "2",
        "--attn_layers", "0,-1", "--device", "cpu:0",
    ]  # fmt: skip
    visualize.main(flags)
    assert file.read_text(encoding="utf-8") == "<html>é"
    assert capsys.readouterr().out == f"wrote {file}, 0.0 MB\n"
    assert [r.id for r in measured["records"]] == ["0", "1"]
    assert measured["count"] == 1 and measured["layers"] == {0, 2}
    assert measured["method"].settings.lora_alpha == 6
    ours = dict(measured["model"].named_parameters())
    assert torch.equal(ours["new_tokens.embedding"], saved(run, 1)["model.new_tokens.embedding"])
    assert opened[0]["device"] == torch.device("cpu:0")
    about, found, (training, _), reliance = measured["built"]
    assert about == {"name": str(run), "method": "crystal", "checkpoint": "step-1", "data": str(records)}
    source = f"Asked for this page: 2 questions of {records}."
    assert "loss" in training and reliance == ({"of": "these"}, source)

    # Without --data it asks what the run was trained on; a result of the checkpoint comes first.
    monkeypatch.setattr(visualize.inside, "evaluated", lambda run, step: ({"of": step}, "Read."))
    flags = ["--run", str(run), "--checkpoint", "1", "--html", str(file), "--count", "2", "--device", "cpu"]
    visualize.main(flags)
    assert len(measured["records"]) == 3 and measured["count"] == 2
    about, _, _, reliance = measured["built"]
    assert about["data"] == str(records_file) and reliance == ({"of": "step-1"}, "Read.")


# --- evaluate ---


@pytest.fixture
def fed(monkeypatch):
    """What evaluate lets the model generate from; each prompt is answered "red"."""
    calls = []

    def record(model, prompts, fmt, max_new_tokens, biases=None, latents="keep", streamer=None):
        calls.append(SimpleNamespace(prompts=prompts, room=max_new_tokens, biases=biases, latents=latents))
        return ["red"] * len(prompts)

    monkeypatch.setattr(asking, "generate", record)
    return calls


def test_evaluate_reads_asks_and_writes(attached, fed, records_file, tmp_path, capsys):
    """Two of three records one by one, their images from another folder; the table's numbers by hand."""
    attached(evaluate)
    records, out = tmp_path / "elsewhere.jsonl", tmp_path / "to" / "p.jsonl"
    records.write_text(records_file.read_text())
    evaluate.main(
        [
            "--data", str(records), "--image_root", str(records_file.parent), "--limit", "2",
            "--batch_size", "1", "--max_new_tokens", "5", "--out", str(out), "--model", "some/where",
            "--device", "cpu",
        ]
    )
    assert [(len(call.prompts), call.room, call.biases, call.latents) for call in fed] == [
        (1, 5, None, "keep")
    ] * 2
    assert (
        in_order(shown(fed[1].prompts[0][1])) - colours(records_file.parent / "1_0.png")
    ).abs().max() < 1e-5

    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [
        (r["index"], r["id"], r["family"], r["answer"], r["prediction"], r["extracted"], r["correct"])
        for r in lines
    ] == [(0, "0", "b", "red", "red", "red", True), (1, "1", "a", "3", "red", "red", False)]
    assert lines[0]["question"] == "<image>\nWhat colour is the star?"

    # Wilson's interval of 1 of 1, 0 of 1 and 1 of 2 at z = 1.959964: half widths z sqrt(p(1-p)/n +
    # z^2/4n^2) / (1 + z^2/n).
    z = 1.959964
    one, two = z**2 / 2 / (1 + z**2), z * math.sqrt(1 / 8 + z**2 / 16) / (1 + z**2 / 2)
    printed = capsys.readouterr().out.splitlines()
    table = [line.split() for line in printed if line.startswith(("family", "b ", "a ", "all"))]
    assert table == [
        ["family", "questions", "where"],
        ["b", "1", "100.0", f"({100 - 200 * one:.1f}", "to", "100.0)"],
        ["a", "1", "0.0", "(0.0", "to", f"{200 * one:.1f})"],
        ["all", "2", "50.0", f"±{100 * two:.1f}"],
    ]
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["families"]["all"] == {
        "right": 0.5,
        "rows": 2,
        "interval": pytest.approx([0.5 - two, 0.5 + two], rel=1e-4),
    }
    assert about["families"]["b"]["interval"] == pytest.approx([1 - 2 * one, 1.0], rel=1e-4)
    settings = about["settings"]
    assert [
        settings[name]
        for name in (
            "model", "checkpoint", "data", "latents", "grey", "max_new_tokens", "limit", "seed", "corruption",
            "bottleneck", "suffix",
        )
    ] == ["some/where", "best", str(records), "keep", False, 5, 2, 0, "", False, ""]
    assert settings["prompt"].startswith(SYSTEM) and settings["prompt"].endswith(THOUGHT["keep"])
    assert f"wrote {out} and p.json" in printed


def test_evaluate_asks_with_and_without_latents(attached, fed, records_file, monkeypatch, capsys):
    s = attached(evaluate)
    wrote = []

    def write(model, prompts, fmt, max_new_tokens, biases=None):
        wrote.append((prompts, max_new_tokens))
        return [fmt.latents + [fmt.answer_start_id] + fmt.text("red") + [fmt.answer_end_id]] * len(prompts)

    monkeypatch.setattr(asking, "write", write)
    flags = ["--data", str(records_file), "--limit", "1", "--max_new_tokens", "4", "--device", "cpu"]
    for latents in ("keep", "drop", "mask", "free"):
        evaluate.main([*flags, "--latents", latents])
    given = {
        name: s.model.tokenizer.decode(call.prompts[0][0])
        for name, call in zip(("keep", "drop", "mask"), fed)
    }
    assert given == {
        name: prompt("What colour is the star?", [12], "keep" if name == "mask" else name) for name in given
    }
    assert [call.latents for call in fed] == ["keep", "drop", "keep"]

    # mask: whoever is no latent sees no latent; a latent sees all.
    assert fed[0].biases is None is fed[1].biases
    ids = torch.tensor([fed[2].prompts[0][0]])
    [bias] = fed[2].biases({"input_ids": ids})
    own = [s.model.tokenizer.decode([token]).startswith("<|latent_") for token in ids[0]]
    assert (
        bias.keys[0].tolist() == own
        and bias.queries[0].tolist() == [not latent for latent in own]
        and sum(own) == 3
        and bias.value == -math.inf
    )

    [([(ids, _, _)], room)] = wrote
    words = (
        s.model.tokenizer(" Because the feature of the image is").input_ids
        + s.model.tokenizer(". ").input_ids
    )
    assert (
        s.model.tokenizer.decode(ids) == prompt("What colour is the star?", [12], "free")
        and room == 4 + len(words) + 3 + 4
    )
    assert (
        "latents that the model wrote itself: all 3 in 100.0 % of the answers, some in 0.0 %, none in 0.0 %"
        in capsys.readouterr().out
    )


def test_evaluate_shows_corrupted_or_grey_images(attached, fed, records_file, capsys):
    """The share of black pixels is the strength of a mask; where the mask lies is the seed's; the first image
    has 9,408 pixels of noise.
    """
    attached(evaluate)

    def look(*flags):
        evaluate.main(["--data", str(records_file), "--limit", "1", "--device", "cpu", *flags])
        return shown(fed[-1].prompts[0][1])

    plain, grey = look(), look("--grey")
    assert (look("--blind") == grey).all()
    assert (in_order(plain) - colours(records_file.parent / "0_0.png")).abs().max() < 1e-5
    assert (grey - 128 / 255).abs().max() < 1e-5

    black = {
        flags: (look(*flags).abs() < 1e-5).all(1)
        for flags in (
            ("--corruption", "mask=0.5"),
            ("--corruption", "mask=0.2"),
            ("--corruption", "mask=0.5", "--seed", "3"),
        )
    }
    half, fifth, other = black.values()
    assert not (plain.abs() < 1e-5).all(1).any()
    assert float(half.float().mean()) == pytest.approx(0.5, abs=0.02) and float(
        fifth.float().mean()
    ) == pytest.approx(0.2, abs=0.02)
    assert float(other.float().mean()) == pytest.approx(0.5, abs=0.02) and not torch.equal(half, other)
    assert torch.equal(look("--corruption", "mask=0.5").abs().lt(1e-5).all(1), half)

    # Without a strength it is drawn from the mode's own range, 0.2 to 0.8 of the image, by the seed.
    drawn = [
        float((look("--corruption", "mask", "--seed", seed).abs() < 1e-5).all(1).float().mean())
        for seed in "123"
    ]
    assert all(0.18 < share < 0.82 for share in drawn) and max(drawn) - min(drawn) > 0.02


def test_a_run_that_was_trained_blind_is_asked_blind(attached, fed, records_file):
    """Its pictures are grey without a flag; another image's latents would tell it nothing."""
    attached(evaluate, "--blind")
    flags = ["--data", str(records_file), "--limit", "1", "--device", "cpu", "--model", "some/where"]
    evaluate.main(flags)
    assert (shown(fed[-1].prompts[0][1]) - 128 / 255).abs().max() < 1e-5
    with pytest.raises(config.UserError, match="--reliance: some/where was trained blind"):
        evaluate.main([*flags, "--reliance"])


def test_evaluate_asks_under_the_methods_mask(attached, fed, records_file):
    """LIVR's: who stands after the image and is no latent does not see it."""
    s = attached(evaluate, "--method", "livr")
    evaluate.main(["--data", str(records_file), "--limit", "1", "--device", "cpu"])
    evaluate.main(["--data", str(records_file), "--limit", "1", "--device", "cpu", "--bottleneck"])
    assert fed[0].biases is None
    ids = torch.tensor([fed[1].prompts[0][0]])
    biases = fed[1].biases(
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "answer_positions": torch.tensor([[ids.shape[1] - 1]]),
        }
    )
    names = s.model.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    image = [name in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>") for name in names]
    first = names.index("<|image_pad|>")
    blind = [
        at > first and not image[at] and not name.startswith("<|latent_") for at, name in enumerate(names)
    ]
    [bias] = biases
    assert bias.queries[0].tolist() == blind and bias.keys[0].tolist() == image and bias.value == -math.inf


@pytest.mark.parametrize("masked", [False, True])
def test_evaluate_passes_reliance_its_flags(attached, records_file, monkeypatch, tmp_path, masked):
    s = (
        attached(evaluate, "--method", "livr")
        if masked
        else attached(evaluate, "--corruption", "mask=0.3:0.4")
    )
    told = []
    monkeypatch.setattr(evaluate.reliance, "run", lambda *args, **how: told.append((args, how)))
    flags = [
        "--data", str(records_file), "--limit", "2", "--reliance", "--out", str(tmp_path / "to"),
        "--seed", "5", "--batch_size", "3", "--max_new_tokens", "4", "--device", "cpu", "--checkpoint", "7",
        "--model", "some/where",
    ]
    evaluate.main([*flags, "--corruption", "noise=30", *["--bottleneck"] * masked])
    (model, fmt, records, out, about), how = told[0]
    assert (model, fmt, [r.id for r in records], str(out)) == (
        s.model, s.fmt, ["0", "1"], str(tmp_path / "to"),
    )
    assert about == {
        "model": "some/where",
        "checkpoint": "7",
        "data": str(records_file),
        "bottleneck": masked,
    }
    assert str(how["corruption"]) == "noise=30" and (
        how["batch_size"], how["max_new_tokens"], how["seed"],
    ) == (3, 4, 5)
    assert (how["biases"] is not None) == masked
    if not masked:  # without --corruption the run's own
        evaluate.main(flags)
        assert str(told[1][1]["corruption"]) == "mask=0.3:0.4"


def test_evaluate_passes_diagnose_its_flags(attached, records_file, monkeypatch, tmp_path, capsys):
    """And prints and writes what comes back, each way of asking in its turn."""
    s = attached(evaluate)
    result = {
        "index": 0,
        "id": "0",
        "family": "b",
        "question": "q",
        "answer": "red",
        "prediction": "red",
        "extracted": "red",
        "correct": True,
    }
    told = []

    def diagnose(*args, **how):
        told.append((args, how))
        return {"as trained": [result], "latents dropped": [result | {"correct": False}]}, 0.12346

    monkeypatch.setattr(evaluate, "diagnose", diagnose)
    out = tmp_path / "to" / "d.jsonl"
    evaluate.main(
        [
            "--data", str(records_file), "--limit", "1", "--diagnose", "--out", str(out), "--seed", "5",
            "--batch_size", "3", "--max_new_tokens", "4", "--grey", "--corruption", "noise=30",
            "--device", "cpu",
        ]
    )
    (model, fmt, method, records), how = told[0]
    assert (model, fmt, [r.id for r in records]) == (s.model, s.fmt, ["0"]) and method.settings is s.settings
    assert (str(how["corruption"]), how["grey"], how["seed"], how["batch_size"], how["max_new_tokens"]) == (
        "noise=30", True, 5, 3, 4,
    )
    printed = capsys.readouterr().out
    assert "mean attention from answers to latents, over layers, heads and rows: 0.1235" in printed
    shares = "100.0 (20.7 to 100.0) 0.0 (0.0 to 79.3)"
    assert ["all", "1", *shares.split()] in [line.split() for line in printed.splitlines()]
    assert [(r["asked"], r["correct"]) for r in map(json.loads, out.read_text().splitlines())] == [
        ("as trained", True), ("latents dropped", False),
    ]


def test_evaluate_scores_a_benchmark_as_told(attached, fed, tmp_path, monkeypatch, capsys):
    """Answers "A": right for three of four of one group and none of the other's one. Plain: 3 of 5. HRBench:
    the mean over groups, 3 of 8.
    """
    s = attached(evaluate)
    monkeypatch.chdir(tmp_path)
    lines = ["index\timage\tquestion\tA\tB\tanswer\tcycle_category"]
    lines += [
        f"{i}\t{picture(i)}\tWhich?\tcat\tdog\t{answer}\t{group}"
        for i, (answer, group) in enumerate(zip("AAABB", "xxxxy"))
    ]
    (tmp_path / "mine.tsv").write_text("\n".join(lines) + "\n")
    told = asking.generate
    monkeypatch.setattr(asking, "generate", lambda *args: ["A" for _ in told(*args)])
    for flags, score in (([], 3 / 5), (["--scores", "HRBench4K"], 3 / 8)):
        evaluate.main(
            [
                "--benchmark", "mine.tsv", "--device", "cpu", "--model", "some/where",
                "--suffix", " In a word.", "--overwrite", *flags,
            ]
        )
        about = json.loads(Path("runs/where/evaluation/mine.json").read_text())
        assert about["scores"]["Overall"]["score"] == pytest.approx(score) and about["benchmark"] == "".join(
            flags[1:]
        )
        assert f"{100 * score:.2f}" in capsys.readouterr().out
    asked = s.model.tokenizer.decode(fed[0].prompts[0][0])
    assert (
        "Question: Which?\nOptions:\nA. cat\nB. dog\n"
        "Please select the correct answer from the options above. \n In a word.<|im_end|>" in asked
    )


# --- serve ---


@pytest.fixture
def served(attached, monkeypatch):
    """served(*flags) -> the Server that the command made, and the address it listens on;
    it takes no requests.
    """
    s = attached(serve)
    made = SimpleNamespace(setup=s)

    class Runner:
        handle_exit = None

        def __init__(self, app, limits):
            made.app, made.limits = app, limits

        def run(self, sockets):
            made.address = sockets[0].getsockname()
            sockets[0].close()

    server = serve.Server

    def remember(*args, **kwargs):
        made.server = server(*args, **kwargs)
        return made.server

    monkeypatch.setattr(serve, "Server", remember)
    monkeypatch.setattr(serve, "Runner", Runner)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    monkeypatch.delenv(serve.KEY, raising=False)

    def start(*flags):
        serve.main(["--device", "cpu", *flags])
        assert made.app is made.server.app and not made.server.engine.is_alive()
        return made

    return start


def test_serve_is_told_what_was_asked(served, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = {
        "body": 1001,
        "characters": 1002,
        "images": 2,
        "pixels": 3003,
        "tokens": 404,
        "default_tokens": 55,
        "queue": 6,
        "batch": 7,
    }
    flags = [word for name, value in limits.items() for word in (f"--{name}", str(value))]
    assert flags == [
        "--body", "1001", "--characters", "1002", "--images", "2", "--pixels", "3003", "--tokens", "404",
        "--default_tokens", "55", "--queue", "6", "--batch", "7",
    ]
    made = served(
        "--model", "runs/some/merged", "--name", "mine", "--host", "localhost", "--port", str(port),
        "--latents", "drop", *flags,
    )
    assert {name: getattr(made.server.limits, name) for name in limits} == limits
    assert (made.server.name, made.server.engine.latents, made.server.engine.batch, made.address) == (
        "mine", "drop", 7, ("127.0.0.1", port),
    )
    assert made.server.hosts == ("127.0.0.1", "localhost", "[::1]", "localhost") and made.server.key is None
    assert (
        capsys.readouterr().out == f"serving mine at http://127.0.0.1:{port}/v1 (stop with Ctrl-C)\nstopped\n"
    )

    # An address that others reach needs a key, and then answers to any name; the directory names the model; a
    # default above the limit is the limit.
    monkeypatch.setenv(serve.KEY, "secret")
    made = served("--model", "runs/some/merged", "--host", "0.0.0.0", "--port", "0", "--tokens", "9")
    assert (made.server.name, made.server.engine.latents, made.server.key, made.server.hosts) == (
        "merged", "keep", "secret", (),
    )
    assert made.address[0] == "0.0.0.0" and made.address[1] > 0 and made.server.limits.default_tokens == 9


# --- compare ---


def answered(right, asked, family="all"):
    """Results of evaluate.answers: so many of `asked` right."""
    return [{"family": family, "correct": i < right} for i in range(asked)]


def test_compare_trains_and_asks_what_was_asked(records_file, tmp_path, monkeypatch, capsys):
    """Two methods, two seeds, two of three questions; train.py's flags in the order that lets the method's
    own win; percents by hand.
    """
    trained, asked = [], []
    right = {"mine-0": 2, "mine-1": 1, "mine.py_lr_1-0": 1, "mine.py_lr_1-1": 1}

    def learn(argv):
        trained.append(argv)
        run = Path(argv[argv.index("--output") + 1])
        checkpoint.step_dir(run, argv[argv.index("--max_steps") + 1]).mkdir(parents=True)

    def answers(model, fmt, records, **how):
        asked.append((model.name, [r.id for r in records], how["max_new_tokens"]))
        return answered(right[model.name], len(records))

    monkeypatch.setattr(train, "main", learn)
    monkeypatch.setattr(opening, "open_model", lambda run, **_: (Path(run), None, None))
    monkeypatch.setattr(evaluate, "answers", answers)
    shutil.copytree(records_file.parent, tmp_path / "d")
    train_file, test_file, out = (str(tmp_path / "d" / name) for name in ("train.jsonl", "test.jsonl", "out"))
    shutil.copy(train_file, test_file)
    (tmp_path / "mine.py").write_text("from crystal.methods.livr import Method\n")
    monkeypatch.chdir(tmp_path)
    compare.main(
        [
            "--methods", "mine.py, mine.py: --lr 1", "--seeds", "2", "--max_steps", "7",
            "--model", "some/model", "--data", train_file, "--test", test_file, "--questions", "2",
            "--max_new_tokens", "3", "--output", out, "--batch_size", "5",
        ]
    )
    flags = ["--method", "mine.py", "--model", "some/model", "--max_steps", "7", "--batch_size", "5"]
    where = ["--data", train_file, "--output"]
    names = ("mine-0", "mine.py_lr_1-0", "mine-1", "mine.py_lr_1-1")
    assert trained == [
        [*flags, *own, "--seed", seed, *where, f"{out}/{name}", "--overwrite"]
        for name, own, seed in zip(names, ([], ["--lr", "1"]) * 2, "0011")
    ]
    assert asked == [(name, ["0", "1"], 3) for name in names]

    # 100 and 50 percent, 50 and 50; Student's t for one degree of freedom is 12.706, the deviation of two
    # numbers their difference / sqrt(2).
    half = 12.706 * (50 / math.sqrt(2)) / math.sqrt(2)
    table = (Path(out) / "table.txt").read_text()
    rows = [line.split() for line in table.splitlines()]
    assert rows[1] == ["all", "75.0", f"±{half:.1f}", "50.0", "±0.0"] and rows[4] == [
        "all", "-25.0", f"±{half:.1f}",
    ]
    assert table.rstrip() in capsys.readouterr().out
    note = json.loads((Path(out) / "mine.py_lr_1-1" / "compare.json").read_text())
    content = hashlib.sha256(Path(train_file).read_bytes()).hexdigest()
    method = {"method_sha256": hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()}
    files = {"--data": content, "--test": content, "method's file": method}
    said = files | {"--questions": 2, "--max_new_tokens": 3}
    assert note == {"flags": [*flags, "--lr", "1", "--seed", "1"], "asked": said, "percent": {"all": 50.0}}


def test_compare_percents_are_of_each_family(records_file, tmp_path, monkeypatch):
    """One of two and three of three, by hand, in the table and in the note beside the run."""
    monkeypatch.setattr(
        train,
        "main",
        lambda argv: checkpoint.step_dir(argv[argv.index("--output") + 1], 7).mkdir(parents=True),
    )
    monkeypatch.setattr(opening, "open_model", lambda *_, **__: (None, None, None))
    monkeypatch.setattr(evaluate, "answers", lambda *_, **__: answered(1, 2, "x") + answered(3, 3, "y"))
    compare.main(
        [
            "--methods", "sft", "--seeds", "1", "--max_steps", "7", "--model", "some/model",
            "--data", str(records_file), "--test", str(records_file), "--output", str(tmp_path),
        ]
    )
    assert json.loads((tmp_path / "sft-0" / "compare.json").read_text())["percent"] == {
        "x": 50.0,
        "y": 100.0,
        "all": 80.0,
    }
    assert [line.split() for line in (tmp_path / "table.txt").read_text().splitlines()] == [
        ["family", "sft"], ["x", "50.0"], ["y", "100.0"], ["all", "80.0"],
    ]


def test_compare_on_the_tiny_base_uses_the_demos_flags_and_scenes(tmp_path, monkeypatch):
    """--method's own flags of the demo come before what was typed; LaViT's data is what the run sft-0 saw;
    --max_steps of 2 and the scenes' test split.
    """
    trained, drawn, questions = [], [], []

    def learn(argv):
        trained.append(argv)
        checkpoint.step_dir(argv[argv.index("--output") + 1], 2).mkdir(parents=True)

    generate_scenes = toy.generate
    monkeypatch.setattr(
        toy, "generate", lambda out, **how: (drawn.append((out, how)), generate_scenes(out, 0, 2, 1, 3))
    )
    monkeypatch.setattr(train, "main", learn)
    monkeypatch.setattr(opening, "open_model", lambda run, **_: (Path(run), None, None))
    monkeypatch.setattr(
        evaluate,
        "answers",
        lambda model, fmt, records, **how: questions.append(len(records)) or answered(1, len(records)),
    )
    monkeypatch.setattr(
        demo, "data_of", lambda method, scenes, teacher, procs: ["DATA", method, str(scenes), str(teacher)]
    )
    out = tmp_path / "out"
    compare.main(
        ["--methods", "sft,lavit", "--seeds", "1", "--max_steps", "2", "--output", str(out), "--lr", "5"]
    )
    recipe = ["--batch_size", "16", "--lr", "1e-3", "--lr_tokens", "10", "--eval_records", "64"]
    for argv, method, own in zip(trained, ("sft", "lavit"), ([], ["--tune", "lora"])):
        assert argv == [
            "--method", method, "--model", "tiny", *recipe, *own, "--max_steps", "2", "--lr", "5",
            "--seed", "0", "DATA", method, str(out / "toy"), str(out / "sft-0"),
            "--output", str(out / f"{method}-0"), "--overwrite",
        ]
    assert drawn == [(out / "toy", {})] and questions == [3, 3]


# --- demo ---


def test_demo_passes_its_flags_on(tmp_path, monkeypatch, capsys):
    """What is drawn, launched, trained, asked and written; the table's columns are the ways
    of asking, in order.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from crystal.methods.livr import Method\n")
    launched, drawn, trained, asked, diagnosed, shown_last = [], [], [], [], [], []
    intervened = []
    generate_scenes = toy.generate

    def learn(argv):
        trained.append(argv)
        run = Path(argv[argv.index("--output") + 1])
        checkpoint.step_dir(run, 3).mkdir(parents=True)
        return run

    def answers(model, fmt, records, **how):
        asked.append(
            (
                how.get("grey", False),
                len(records),
                how["max_new_tokens"],
                float(model.hf.lm_head.weight.float().sum()),
            )
        )
        return answered(1, len(records))

    def diagnose(model, fmt, method, records, **how):
        diagnosed.append((model, len(records)))
        return {"as trained": answered(2, len(records)), "latents dropped": answered(0, len(records))}, 0.25

    monkeypatch.setattr(demo.distributed, "launch", lambda *args: launched.append(args))
    monkeypatch.setattr(
        toy, "generate", lambda out, seed=0: (drawn.append((out, seed)), generate_scenes(out, seed, 3, 2, 5))
    )
    monkeypatch.setattr(train, "main", learn)
    monkeypatch.setattr(evaluate, "answers", answers)
    monkeypatch.setattr(evaluate, "diagnose", diagnose)
    monkeypatch.setattr(
        opening,
        "open_model",
        lambda run, which, method, **_: which == "last" and (
            str(run),
            SimpleNamespace(count=8 * (method != "sft"), writes_own_latents=False, feeds_back=False),
            SimpleNamespace(method="sft"),
        ),
    )
    monkeypatch.setattr(evaluate, "main", intervened.append)
    monkeypatch.setattr(demo, "show", lambda *args: shown_last.append(args))
    argv = [
        "--method", "mine.py", "--max_steps", "3", "--seed", "4", "--questions", "2", "--output", "to",
        "--processes", "4",
    ]
    demo.main(argv)
    assert launched == [(4, "crystal.demo", argv)] and drawn == [(Path("runs/toy-4"), 4)]
    common = [
        "--data", "runs/toy-4/train.jsonl", "--val_data", "runs/toy-4/val.jsonl", "--max_steps", "3",
        "--seed", "4", "--save_every", "1000", "--eval_every", "100", "--log_every", "50", "--overwrite",
    ]
    recipe = ["--batch_size", "16", "--lr", "1e-3", "--lr_tokens", "10", "--eval_records", "64"]
    assert trained == [
        ["--method", "sft", "--output", "to/sft", *recipe, *common],
        ["--method", "mine.py", "--output", "to/mine", *recipe, *common],
    ]

    # The base sees, its twin does not; two questions each.
    twin = load_file(ROOT / "crystal" / "assets" / "blind" / "model.safetensors")
    tied = next(tensor for name, tensor in twin.items() if name.endswith("embed_tokens.weight"))
    assert [(grey, n, room) for grey, n, room, _ in asked] == [(False, 2, 8), (True, 2, 8)] and asked[0][
        3
    ] != asked[1][3]
    assert asked[1][3] == pytest.approx(float(tied.float().sum()), rel=1e-5) and diagnosed == [
        ("to/sft", 2), ("to/mine", 2),
    ]
    table = (tmp_path / "to" / "table.txt").read_text().splitlines()
    assert re.split(r"  +", table[0]) == [
        "family", "questions", "blind", "base", "sft", "sft, latents dropped", "mine",
        "mine, latents dropped",
    ]
    assert [cell for cell in re.sub(r"±\S+|\(.*?\)", "", table[1]).split()] == [
        "all", "2", "50.0", "50.0", "100.0", "0.0", "100.0", "0.0",
    ]
    assert table[2:] == [
        f"{name}: mean attention from answers to latents, over layers, heads and rows: 0.2500"
        for name in ("sft", "mine")
    ]
    run, method, record, scenes, out, n, device = shown_last[0]
    assert (run, Path(method).name, record.id, scenes, out, n, device) == (
        Path("to/mine"), "mine.py", "test-000001", Path("runs/toy-4"), Path("to"), 6, torch.device("cpu"),
    )
    assert intervened == [
        [
            "--model", "to/mine", "--checkpoint", "last", "--method", "mine.py",
            "--data", "runs/toy-4/test.jsonl", "--limit", "1000", "--reliance",
            "--batch_size", "100", "--max_new_tokens", "8", "--overwrite",
        ]
    ]
    assert "== 4. Accuracy on 2 held-out questions" in capsys.readouterr().out


# --- bench ---


def test_bench_measures_what_was_asked(tmp_path, monkeypatch, capsys):
    """Shapes, dtypes, repeats and devices as they reach the measurement; bytes and products of
    the floor by hand.
    """
    measured, probed, compiled = [], [], []
    machine = {"name": "a test's", "threads": 1, "copy_gb_s": 10.0, "tflop_s": 0.1, "empty_us": 1.0}
    monkeypatch.setattr(bench, "probe", lambda device, dtype: probed.append((device, dtype)) or machine)
    monkeypatch.setattr(bench, "measure", lambda *args: measured.append(args) or [{"operator": args[0]}])
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(f) or f)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # auto would take it
    out = tmp_path / "a" / "bench.json"
    flags = [
        "--device", "cpu", "--rows", "3", "--vocab", "50", "--slice", "2,10,4,3,6,2,8", "--repeats", "7",
        "--out", str(out),
    ]
    bench.main(
        [
            *flags,
            "--dtype",
            "float32",
            "--no-compile",
            "--only",
            "vocab,slice,align,frobenius,attention,layer",
        ]
    )
    assert probed == [(torch.device("cpu"), torch.float32)] and not compiled
    found = {args[0]: args for args in measured}
    assert list(found) == ["vocab", "slice", "align", "frobenius", "attention", "layer"]
    for name, title, leaves, peers, floor, given, repeats, device in measured:
        assert (given, repeats, device) == (machine, 7, torch.device("cpu"))
        assert all(x.dtype == torch.float32 and x.requires_grad for x in leaves)
        assert name == "layer" or peers["torch.compile"] == "left out (--no-compile)"

    B, L, M, K, H, G, d = 2, 10, 4, 3, 6, 2, 8
    shapes = {name: [tuple(x.shape) for x in args[2]] for name, args in found.items()}
    heads = [(B, H, L, d), (B, G, L, d)]
    assert shapes == {
        "vocab": [(3, 50)] * 2,
        "slice": heads,
        "align": heads,
        "frobenius": heads,
        "attention": [*heads, (B, G, L, d)],
        "layer": [(B, L, H * d)],
    }

    # Answer positions 6 to 9 see 7 to 10 keys: 34 of a sequence. A product of d numbers is 2 d operations;
    # backward forms three where forward forms one.
    seen, four = 7 + 8 + 9 + 10, 4
    keys = B * G * L * d * four
    assert found["vocab"][4] == ((2 * 3 * 50 * four, 0), (2 * 2 * 3 * 50 * four, 0))
    assert found["slice"][4] == ((keys, 2 * H * d * B * seen), (2 * keys, 3 * 2 * H * d * B * seen))
    assert found["frobenius"][4] == found["slice"][4]  # the same pass over all keys
    read, written = B * (H * M + G * K) * d * four, B * (H + G) * L * d * four
    assert found["align"][4] == ((read, 2 * B * H * M * K * d), (read + written, 3 * 2 * B * H * M * K * d))
    half, moved = 2 * 2 * B * H * (L * (L + 1) // 2) * d, written + keys  # two products over half of L x L
    assert found["attention"][4] == ((moved, half), (2 * moved, 5 * half // 2))
    D, inner = 48, 37 * 48 // 7
    weights = 2 * D * D + 2 * G * d * D + 3 * D * inner
    products, moved = 2 * B * L * weights, (weights + B * L * D) * four
    assert found["layer"][4] == ((moved, products + half), (moved, products + 5 * half // 2))
    assert (
        found["vocab"][1] == "KL + CE, both gradients, 2 x 3 x 50 float32"
        and found["slice"][1] == "B 2, L 10, M 4, K 3, H 6, G 2, d 8, float32"
    )
    written_json = json.loads(out.read_text())
    assert (
        written_json["machine"] == machine
        and [row["operator"] for row in written_json["rows"]] == list(found)
        and written_json["settings"]["repeats"] == 7
    )
    assert "copy 10.0 GB/s, product 0.100 TFLOP/s, empty call 1.0 us" in capsys.readouterr().out

    # The other dtype halves the bytes, --compile brings its peers; auto takes the GPU that is there.
    measured.clear()
    bench.main([*flags, "--only", "vocab"])
    assert (
        measured[0][2][0].dtype == torch.bfloat16
        and measured[0][4] == ((2 * 3 * 50 * 2, 0), (4 * 3 * 50 * 2, 0))
        and len(compiled) == 1
    )
    monkeypatch.setattr(bench, "probe", lambda device, dtype: pytest.fail(f"{device}, {dtype}"))
    with pytest.raises(pytest.fail.Exception, match="cuda, torch.bfloat16"):
        bench.main([*flags, "--device", "auto"])
