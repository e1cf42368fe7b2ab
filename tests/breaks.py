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
    Break("config-preset-wins-over-hand", "crystal/config.py",
          '{"method": method, **kind.presets[given.get("preset", "paper")], **given}',
          '{"method": method, **given, **kind.presets[given.get("preset", "paper")]}',
          "A flag given by hand beside --preset released is ignored.",
          "tests/test_settings.py::test_the_presets_are_the_table_of_the_two_sources"),
    Break("config-preset-ignored", "crystal/config.py",
          'kind.presets[given.get("preset", "paper")]', 'kind.presets["paper"]',
          "--preset released parses and changes nothing.",
          "tests/test_settings.py::test_the_presets_are_the_table_of_the_two_sources"),
    Break("config-default-lr", "crystal/config.py",
          "lr: float = setting(2e-4,", "lr: float = setting(2e-5,",
          "Every run of CrystaL learns ten times slower than the paper's.",
          "tests/test_settings.py::test_defaults_are_the_papers[crystal]"),
    Break("config-default-weight-decay", "crystal/config.py",
          "weight_decay: float = setting(0.1,", "weight_decay: float = setting(0.01,",
          "The decay is not the released code's.",
          "tests/test_settings.py::test_defaults_are_the_papers[crystal]"),
    Break("config-default-warmup", "crystal/config.py",
          "warmup: float = setting(0.05,", "warmup: float = setting(0.03,",
          "The warm-up is not the released code's 5 %.",
          "tests/test_settings.py::test_defaults_are_the_papers[crystal]"),
    Break("config-default-alpha", "crystal/config.py",
          "lora_alpha: float = setting(32.0,", "lora_alpha: float = setting(16.0,",
          "Adapters count half of the paper's.",
          "tests/test_settings.py::test_defaults_are_the_papers[crystal]"),
    Break("config-choices-tune", "crystal/config.py",
          '("lora", "full", "rows"))', '("lora", "full"))',
          "--tune rows, prompt tuning, is refused.", "tests/test_settings.py::test_what_a_flag_may_be[sft]"),
    Break("config-choices-not-checked", "crystal/config.py",
          "if choices and value not in choices:", "if choices and value is None:",
          "A Settings made in code takes --decay step and trains with another.",
          "tests/test_settings.py::test_what_a_flag_may_be[sft]"),
    Break("config-zero-steps", "crystal/config.py",
          'for name in ("max_steps", "batch_size"', 'for name in ("batch_size"',
          "--max_steps 0 divides by zero later on.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("config-zero-keep", "crystal/config.py",
          '"lora_r", "keep", "save_every"', '"lora_r", "save_every"',
          "--keep 0 deletes every checkpoint.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("config-eval-every-zero-refused", "crystal/config.py",
          """for name in ("eval_every", "eval_records", "workers", "weight_decay"):
            if getattr(self, name) < 0:""",
          """for name in ("eval_every", "eval_records", "workers", "weight_decay"):
            if getattr(self, name) <= 0:""",
          "--eval_every 0, --workers 0 and --weight_decay 0 are refused.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("config-dropout-of-one", "crystal/config.py",
          "if not 0 <= self.lora_dropout < 1:", "if not 0 <= self.lora_dropout <= 1:",
          "--lora_dropout 1 trains nothing and divides by zero.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("config-warmup-of-one", "crystal/config.py",
          "if not 0 <= self.warmup < 1:", "if not 0 <= self.warmup <= 1:",
          "--warmup 1 never decays and never says so.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("config-lr-rows-negative", "crystal/config.py",
          "min(self.lr, self.lr_rows, self.clip) <= 0", "min(self.lr, self.clip) <= 0",
          "--lr_rows 0 leaves the latents untrained.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("config-seed-too-large", "crystal/config.py",
          "0 <= self.seed < 2**63", "0 <= self.seed <= 2**63",
          "--seed 2^63 ends in a traceback of torch.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("config-latents-least", "crystal/config.py",
          "if self.latents < self.least_latents:", "if self.latents < self.least_latents - 1:",
          "--latents 0 makes a thought without latents.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("config-nan-passes", "crystal/config.py",
          "if getattr(self, f.name) != getattr(self, f.name):", "if getattr(self, f.name) is NotImplemented:",
          "--lr nan trains to nan.", "tests/test_config.py::test_wrong_flags_are_one_line"),
    Break("config-lora-on-any", "crystal/config.py",
          'set(parts) - {"language", "vision", "merger"}',
          'set(parts) - {"language", "vision", "merger", "head", ""}',
          "--lora_on head is taken and ends in a traceback.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("config-run-dir", "crystal/config.py",
          "runs/{Path(self.method).stem}", "runs/crystal",
          "Runs of different methods lie over one another.",
          "tests/test_settings.py::test_method_names_the_file_whose_method_runs"),
    Break("config-output-ignored", "crystal/config.py",
          "return Path(self.output or", "return Path(",
          "--output is ignored: the run lies elsewhere.",
          "tests/test_config.py::test_a_run_is_where_its_method_or_its_user_says"),
    Break("config-span-truncates", "crystal/config.py",
          "round(sum(shares[:i]) * self.max_steps)", "int(sum(shares[:i]) * self.max_steps)",
          "The last update of a run is lost to rounding, stages begin early.",
          "tests/test_config.py::test_stages_cover_every_update_once"),
    Break("config-progress-of-run", "crystal/config.py",
          "1.0, step / self.max_steps)", "1.0, (step + 1) / self.max_steps)",
          "LaViT's gate opens an update early.", "tests/test_config.py::test_stages_cover_every_update_once"),
    Break("config-progress-of-stage", "crystal/config.py",
          "(step - start) / (stop - start) if", "step / stop if",
          "A second stage begins with half of it behind it.",
          "tests/test_config.py::test_stages_cover_every_update_once"),
    Break("config-progress-stage-off-by-one", "crystal/config.py",
          "if step < self.span(i)[1]), last)", "if step <= self.span(i)[1]), last)",
          "The first update of a stage is made as the stage's before.",
          "tests/test_config.py::test_stages_cover_every_update_once"),
    Break("config-layers-last", "crystal/config.py",
          '{count - 1} if text == "last"', '{0} if text == "last"',
          "Eq. 5 is taken at the first layer.", "tests/test_config.py::test_layers"),
    Break("config-layers-negative", "crystal/config.py",
          "return {i % count for i in chosen}", "return {abs(i) for i in chosen}",
          "--attn_layers -2 means layer 2.", "tests/test_config.py::test_layers_at_their_bounds"),
    Break("config-layers-bound", "crystal/config.py",
          "if not -count <= i < count]", "if not -count <= i <= count]",
          "A layer one past the last is taken for the first.", "tests/test_config.py::test_layers"),
    Break("config-exit-code", "crystal/config.py",
          "sys.exit(2)", "sys.exit(0)",
          "A script takes a mistake for a finished run.",
          "tests/test_config.py::test_a_users_mistake_is_one_line_and_exit_code_2"),
    Break("config-error-on-stdout", "crystal/config.py",
          'print(f"error: {error}", file=sys.stderr)', 'print(f"error: {error}")',
          "The message lands in the output that a program reads.",
          "tests/test_config.py::test_a_users_mistake_is_one_line_and_exit_code_2"),
    Break("config-abbreviations", "crystal/config.py",
          "formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)",
          "formatter_class=argparse.ArgumentDefaultsHelpFormatter)",
          "--max_step sets --max_steps; a mistyped flag sets another.",
          "tests/test_config.py::test_values_of_every_type_come_from_the_command_line"),
    Break("config-clip-default", "crystal/config.py",
          "clip: float = setting(1.0,", "clip: float = setting(10.0,",
          "Gradients are clipped ten times later than said.",
          "tests/test_settings.py::test_defaults_are_the_papers[crystal]"),
    Break("lora-alpha-alone", "crystal/lora.py",
          "self.scale = alpha / r", "self.scale = alpha",
          "Adapters count r times too much.",
          "tests/test_settings.py::test_an_adapter_has_rank_r_and_counts_alpha_over_r"),
    Break("lora-rank-stabilised", "crystal/lora.py",
          "self.scale = alpha / r", "self.scale = alpha / r ** 0.5",
          "The scale is rsLoRA's, and what peft loads is not what was trained.",
          "tests/test_settings.py::test_an_adapter_has_rank_r_and_counts_alpha_over_r"),
    Break("lora-dropout-at-test-time", "crystal/lora.py",
          "F.dropout(x, self.dropout, self.training)", "F.dropout(x, self.dropout)",
          "Validation and answers are noisy.",
          "tests/test_settings.py::test_adapters_drop_their_share_in_training_alone"),
    Break("lora-dropout-never", "crystal/lora.py",
          "F.dropout(x, self.dropout, self.training)", "F.dropout(x, self.dropout, False)",
          "--lora_dropout is ignored.",
          "tests/test_settings.py::test_adapters_drop_their_share_in_training_alone"),
    Break("lora-dropout-on-the-base", "crystal/lora.py",
          "y = self.base(x)  ", "x = F.dropout(x, self.dropout, self.training); y = self.base(x)  ",
          "Dropout hits the frozen model too.",
          "tests/test_lora.py::test_dropout_is_seeded_and_only_in_training"),
    Break("lora-generator-ignored", "crystal/lora.py",
          "a=5 ** 0.5, generator=generator)", "a=5 ** 0.5)",
          "The first adapters do not depend on --seed.",
          "tests/test_settings.py::test_first_adapters_depend_on_the_seed"),
    Break("lora-start-too-wide", "crystal/lora.py",
          "kaiming_uniform_(A, a=5 ** 0.5,", "kaiming_uniform_(A, a=0,",
          "Adapters begin sqrt 6 times too large.",
          "tests/test_settings.py::test_first_adapters_depend_on_the_seed"),
    Break("lora-b-not-zero", "crystal/lora.py",
          "self.lora_B = nn.Parameter(torch.zeros(", "self.lora_B = nn.Parameter(torch.ones(",
          "Training begins from another model than the one given.",
          "tests/test_settings.py::test_first_adapters_depend_on_the_seed"),
    Break("lora-no-scale-in-forward", "crystal/lora.py",
          "self.lora_B.to(y.dtype).T, alpha=self.scale)", "self.lora_B.to(y.dtype).T)",
          "--lora_alpha is ignored.",
          "tests/test_settings.py::test_an_adapter_has_rank_r_and_counts_alpha_over_r"),
    Break("lora-merge-without-scale", "crystal/lora.py",
          "self.scale * (self.lora_B @ self.lora_A)", "(self.lora_B @ self.lora_A)",
          "Merged weights are not what was trained.", "tests/test_lora.py::test_merge"),
    Break("lora-narrow-adapters", "crystal/lora.py",
          "return torch.float64 if weight.dtype == torch.float64 else torch.float32", "return weight.dtype",
          "Adapters on bfloat16 weights lose small updates.",
          "tests/test_settings.py::test_dtype_is_that_of_weights_and_products"),
    Break("lora-part-of-a-name", "crystal/lora.py",
          "re.fullmatch(pattern, name)}", "re.match(pattern, name)}",
          "Modules whose names merely begin alike are wrapped.",
          "tests/test_lora.py::test_wraps_exactly_what_matches"),
    Break("lora-mode-of-the-base", "crystal/lora.py",
          "        self.train(base.training)", "        # self.train(base.training)",
          "An adapter on a model in evaluation mode drops out.",
          "tests/test_lora.py::test_wraps_exactly_what_matches"),
    Break("lora-alpha-in-the-file", "crystal/lora.py",
          '"lora_alpha": int(alpha) if alpha == int(alpha) else alpha', '"lora_alpha": int(alpha)',
          "peft loads an adapter of alpha 4.5 as one of 4.",
          "tests/test_lora.py::test_the_adapters_file_says_what_the_adapter_is"),
    Break("lora-dropout-in-the-file", "crystal/lora.py",
          '"lora_dropout": dropout,', '"lora_dropout": 0.0,',
          "The adapter's file does not say how it was trained.",
          "tests/test_lora.py::test_the_adapters_file_says_what_the_adapter_is"),
    Break("lora-rows-sync-of-the-embedding-alone", "crystal/lora.py",
          """for module, P in self.pairs():
            if module""",
          """for module, P in self.pairs()[:1]:
            if module""",
          "An untied head keeps its first rows: latents and tags are never predicted as trained.",
          "tests/test_lora.py::test_rows_are_written_to_their_own_places"),
    Break("lora-rows-gradient-of-the-head", "crystal/lora.py",
          "P = self.rows if self.tied else self.head_rows", "P = self.rows",
          "An untied head's rows never learn; the embedding's get their gradient.",
          "tests/test_lora.py::test_row_gradients_by_hand"),
    Break("lora-rows-without-a-head", "crystal/lora.py",
          "self.hooks.append(head.register_forward_hook(self._after_head))", "pass",
          "The new tokens are never learned as predictions.",
          "tests/test_lora.py::test_row_gradients_are_those_of_full_training"),
    Break("lora-rows-start-elsewhere", "crystal/lora.py",
          "return nn.Parameter(module.weight.detach()[self.index].to(",
          "return nn.Parameter(module.weight.detach()[self.index.sort().values].to(",
          "Rows of ids out of order begin as one another's.",
          "tests/test_lora.py::test_rows_are_written_to_their_own_places"),
    Break("model-lora-alpha-ignored", "crystal/model.py",
          "settings.lora_r, settings.lora_alpha, settings.lora_dropout,",
          "settings.lora_r, 2 * settings.lora_r, settings.lora_dropout,",
          "--lora_alpha is ignored.",
          "tests/test_settings.py::test_an_adapter_has_rank_r_and_counts_alpha_over_r"),
    Break("model-lora-dropout-ignored", "crystal/model.py",
          "settings.lora_alpha, settings.lora_dropout,", "settings.lora_alpha, 0.0,",
          "--lora_dropout is ignored.",
          "tests/test_settings.py::test_adapters_drop_their_share_in_training_alone"),
    Break("model-lora-r-ignored", "crystal/model.py",
          "settings.lora_r, settings.lora_alpha", "2, settings.lora_alpha",
          "--lora_r is ignored.",
          "tests/test_settings.py::test_an_adapter_has_rank_r_and_counts_alpha_over_r"),
    Break("model-adapters-not-of-the-seed", "crystal/model.py",
          "torch.Generator().manual_seed(settings.seed))", "torch.Generator().manual_seed(0))",
          "The first adapters are the same whatever --seed.",
          "tests/test_settings.py::test_first_adapters_depend_on_the_seed"),
    Break("model-rows-not-of-the-seed", "crystal/model.py",
          "model.add_tokens(tokens, settings.seed)", "model.add_tokens(tokens)",
          "The latents' first rows are the same whatever --seed.",
          "tests/test_settings.py::test_first_rows_depend_on_the_seed"),
    Break("model-rows-without-noise", "crystal/model.py",
          "used.std(0) * 0.5", "used.std(0) * 0.0",
          "All latents begin as one and the same row and may stay so.",
          "tests/test_settings.py::test_first_rows_depend_on_the_seed"),
    Break("model-rows-twice-the-noise", "crystal/model.py",
          "used.std(0) * 0.5", "used.std(0)",
          "New rows begin as far from one another as words.",
          "tests/test_settings.py::test_first_rows_depend_on_the_seed"),
    Break("model-rows-around-zero", "crystal/model.py",
          "(used.mean(0) + noise)", "(noise)",
          "New rows begin far from an average token.",
          "tests/test_settings.py::test_first_rows_depend_on_the_seed"),
    Break("model-rows-mean-of-spare-ones", "crystal/model.py",
          "used = weight.detach()[: min(fresh, default=1)].float()", "used = weight.detach().float()",
          "The average takes in rows that no token has.",
          "tests/test_settings.py::test_first_rows_depend_on_the_seed"),
    Break("model-known-tokens-lose-their-rows", "crystal/model.py",
          "if token not in known]", "]",
          "Qwen3's learned <think> is overwritten.",
          "tests/test_families.py::test_tokens_that_the_vocabulary_has_keep_their_rows"),
    Break("model-spare-rows-off-by-one", "crystal/model.py",
          "if max(ids) >= embed.num_embeddings:", "if max(ids) >= embed.num_embeddings - 1:",
          "The last spare row cannot be used.",
          "tests/test_model.py::test_as_many_new_tokens_as_there_are_spare_rows"),
    Break("model-special-tokens-replaced", "crystal/model.py",
          "replace_extra_special_tokens=False", "replace_extra_special_tokens=True",
          "<|im_end|> and the image's marks are no special tokens any more.",
          "tests/test_model.py::test_new_tokens_take_spare_rows"),
    Break("model-lora-on-ignored", "crystal/model.py",
          'for part in settings.lora_on.split(",")]', 'for part in ["language"]]',
          "--lora_on is ignored.", "tests/test_settings.py::test_adapters_are_on_the_parts_that_are_named"),
    Break("model-tune-full-trains-the-vocabulary", "crystal/model.py",
          "weight.requires_grad_(False)  # of the vocabulary", "pass  # of the vocabulary",
          "Every row of the vocabulary trains and decays.",
          "tests/test_settings.py::test_tune_names_exactly_what_trains"),
    Break("model-tune-full-trains-the-tower", "crystal/model.py",
          "model.hf.model.language_model.requires_grad_(True)", "model.hf.model.requires_grad_(True)",
          "The vision tower trains with --tune full.",
          "tests/test_settings.py::test_tune_names_exactly_what_trains"),
    Break("model-tune-rows-gets-adapters", "crystal/model.py",
          'if settings.tune == "lora":', 'if settings.tune != "full":',
          "Prompt tuning trains adapters too.",
          "tests/test_settings.py::test_tune_names_exactly_what_trains"),
    Break("model-checkpointing-ignored", "crystal/model.py",
          "if settings.checkpointing:", "if False and settings.checkpointing:",
          "--checkpointing is ignored and memory runs out.",
          "tests/test_settings.py::test_checkpointing_recomputes_and_changes_nothing[sft]"),
    Break("model-checkpointing-reentrant", "crystal/model.py",
          '{"use_reentrant": False}', '{"use_reentrant": True}',
          "The attention loss silently loses its gradient: the released code's defect.",
          "tests/test_settings.py::test_checkpointing_recomputes_and_changes_nothing[crystal]"),
    Break("model-attention-sees-the-future", "crystal/model.py",
          "causal=query.shape[2] > 1)", "causal=False)",
          "Every token sees the answer.",
          "tests/test_model.py::test_the_decoders_attention_is_causal_scaled_and_grouped"),
    Break("model-attention-lone-query-causal", "crystal/model.py",
          "causal=query.shape[2] > 1)", "causal=True)",
          "A decoded token sees the first key alone.",
          "tests/test_model.py::test_the_decoders_attention_is_causal_scaled_and_grouped"),
    Break("model-attention-scale-ignored", "crystal/model.py",
          "attend(query, key, value, attention_mask, scale=scaling,",
          "attend(query, key, value, attention_mask, scale=None,",
          "A family whose scale is not 1 / sqrt(d) computes wrong weights.",
          "tests/test_model.py::test_the_decoders_attention_is_causal_scaled_and_grouped"),
    Break("model-tap-before-the-copy", "crystal/model.py",
          """    if latent_copy is not None:
        key, value = latent_copy.keys_values(key, value)
    if tap is not None:
        tap(module.layer_idx, query, key, scaling)
""",
          """    if tap is not None:
        tap(module.layer_idx, query, key, scaling)
    if latent_copy is not None:
        key, value = latent_copy.keys_values(key, value)
""",
          "Eq. 5 reads the corrupted path's own latents, not the copied ones.",
          "tests/test_model.py::test_the_doors_of_attention_open_in_their_order"),
    Break("model-tap-without-scale", "crystal/model.py",
          "tap(module.layer_idx, query, key, scaling)", "tap(module.layer_idx, query, key, None)",
          "The tap's weights are not those of the model where its scale is its own.",
          "tests/test_model.py::test_the_doors_of_attention_open_in_their_order"),
    Break("model-vision-windows-mixed", "crystal/model.py",
          "return torch.cat(outs)[torch.cat(order).argsort()][None], None",
          "return torch.cat(outs)[torch.cat(order)][None], None",
          "Patches of images of unequal sizes change places.",
          "tests/test_model.py::test_the_vision_towers_attention_stays_inside_its_windows"),
    Break("model-vision-windows-joined", "crystal/model.py",
          "q, k, v = (x.unflatten(1, (-1, n)).transpose(0, 1) for x in (q, k, v))",
          "q, k, v = (x[None] for x in (q, k, v))",
          "Images of a batch see one another.",
          "tests/test_model.py::test_the_vision_towers_attention_stays_inside_its_windows"),
    Break("model-vision-scale-ignored", "crystal/model.py",
          """dropout_p=dropout, scale=scaling)
        outs""",
          """dropout_p=dropout)
        outs""",
          "The vision tower's weights are wrong where its scale is its own.",
          "tests/test_model.py::test_the_vision_towers_attention_stays_inside_its_windows"),
    Break("model-states-copied-from-kwargs-alone", "crystal/model.py",
          """    if args:
        return (copy""",
          """    if False:
        return (copy""",
          "A layer called with its states by place copies nothing, or fails.",
          "tests/test_model.py::test_states_are_copied_however_a_layer_is_called"),
    Break("model-copy-at-the-first-layer-alone", "crystal/model.py",
          """for layer in self.layers:
            layer.register""",
          """for layer in self.layers[:1]:
            layer.register""",
          "The hidden realisation copies before one layer only.",
          "tests/test_model.py::test_every_layer_copies_its_own_input"),
    Break("model-own-positions-ignored", "crystal/model.py",
          'positions = inputs["position_ids"] if "position_ids" in inputs else self.positions(inputs)',
          "positions = self.positions(inputs)",
          "`packed` runs on positions of the packed sequence.",
          "tests/test_model.py::test_positions_that_are_given_are_used"),
    Break("model-biases-ignored", "crystal/model.py",
          "attention_mask=mask, use_cache=False, latent_copy",
          "attention_mask=None, use_cache=False, latent_copy",
          "LIVR's bottleneck and LaViT's gate do nothing.",
          "tests/test_settings.py::test_who_is_blind_in_livrs_first_stage"),
    Break("model-seeing-forgets-the-prompt", "crystal/model.py",
          "now, seen = mask, seen + n", "now, seen = mask, n",
          "Written rows see the prompt's mask again.",
          "tests/test_model.py::test_what_a_cached_forward_sees_grows_with_what_was_written"),
    Break("model-seeing-first-row", "crystal/model.py",
          "old = mask[:, :, -1:].expand", "old = mask[:, :, :1].expand",
          "Written rows see what the prompt's first row saw.",
          "tests/test_model.py::test_what_a_cached_forward_sees_grows_with_what_was_written"),
    Break("model-seeing-not-causal", "crystal/model.py",
          ".triu(seen - L - n + 1)", ".triu(seen - L - n + 2)",
          "Of several rows at once each sees the one behind it.",
          "tests/test_model.py::test_what_a_cached_forward_sees_grows_with_what_was_written"),
    Break("model-seeing-hook-stays", "crystal/model.py",
          """        finally:
            hook.remove()

    def logits""",
          """        finally:
            pass

    def logits""",
          "After one masked answer every forward is masked.",
          "tests/test_model.py::test_what_a_cached_forward_sees_grows_with_what_was_written"),
    Break("model-min-pixels-ignored", "crystal/model.py",
          'for k, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if',
          'for k, v in (("max_pixels", max_pixels),) if',
          "--min_pixels is ignored.", "tests/test_settings.py::test_pixel_bounds_are_seen_in_the_grid"),
    Break("model-pixels-exchanged", "crystal/model.py",
          '(("min_pixels", min_pixels), ("max_pixels", max_pixels))',
          '(("max_pixels", min_pixels), ("min_pixels", max_pixels))',
          "--min_pixels and --max_pixels mean each other.",
          "tests/test_model.py::test_pixel_bounds_reach_the_processor"),
    Break("model-not-frozen", "crystal/model.py",
          "hf.requires_grad_(False).eval().to(device)", "hf.eval().to(device)",
          "Everything trains, the vocabulary and the tower too.",
          "tests/test_model.py::test_a_loaded_model_is_frozen_in_evaluation_mode_and_of_its_dtype"),
    Break("model-training-mode", "crystal/model.py",
          "hf.requires_grad_(False).eval().to(device)", "hf.requires_grad_(False).train().to(device)",
          "Evaluation runs in training mode.",
          "tests/test_model.py::test_a_loaded_model_is_frozen_in_evaluation_mode_and_of_its_dtype"),
    Break("model-dtype-ignored", "crystal/model.py",
          "use_safetensors=True, dtype=dtype)", "use_safetensors=True, dtype=torch.float32)",
          "--dtype is ignored: twice the memory.",
          "tests/test_model.py::test_a_loaded_model_is_frozen_in_evaluation_mode_and_of_its_dtype"),
    Break("model-pickles-read", "crystal/model.py",
          "trust_remote_code=False, use_safetensors=True, dtype",
          "trust_remote_code=False, use_safetensors=False, dtype",
          "Opening a model can run code.", "tests/test_model.py::test_pickled_weights_are_refused"),
    Break("model-mistyped-path-asks-a-hub", "crystal/model.py",
          'name.startswith((".", "/", "~", "runs/"))', 'name.startswith((".", "/", "~"))',
          "A mistyped run directory asks a hub for it.",
          "tests/test_model.py::test_what_a_model_may_be_named"),
    Break("model-rows-not-synced", "crystal/model.py",
          """        if self.rows is not None:
            self.rows.sync()""",
          """        if self.rows is None:
            self.rows.sync()""",
          "The vocabulary never gets the trained rows.",
          "tests/test_model.py::test_token_rows_train_whatever_was_frozen_before_them"),
    Break("model-renaming-stops-early", "crystal/model.py",
          "key, _ = renaming.rename_source_key(key)", "key, _ = renaming.rename_source_key(name)",
          "Tensors of older checkpoints find no parameter.",
          "tests/test_model.py::test_names_of_older_checkpoints_find_their_parameters"),
    Break("model-vision-implementation", "crystal/model.py",
          '"vision_config": family.vision_attention}', '"vision_config": "sdpa"}',
          "The vision tower runs window by window.",
          "tests/test_model.py::test_a_loaded_model_is_frozen_in_evaluation_mode_and_of_its_dtype"),
    Break("model-meta-weights", "crystal/model.py",
          """device = "meta"
""",
          """device = "cpu"
""",
          "Reading names alone allocates the whole model.",
          "tests/test_model.py::test_shapes_alone_hold_no_values"),
    Break("families-rows-and-columns-exchanged", "crystal/families.py",
          "[(h // merge, w // merge)]", "[(w // merge, h // merge)]",
          "Gaze and pictures of images that are not square lie across.",
          "tests/test_families.py::test_tokens_and_rows_of_qwens_images_by_hand"),
    Break("families-merge-of-two", "crystal/families.py",
          "merge = self.processor.merge_size", "merge = 2",
          "A family that merges otherwise gets wrong numbers of tokens.",
          "tests/test_families.py::test_tokens_and_rows_of_qwens_images_by_hand"),
    Break("families-rows-without-frames", "crystal/families.py",
          "return image_grid_thw.prod(-1).tolist()", "return image_grid_thw[:, 1:].prod(-1).tolist()",
          "Pixels of images with frames are split wrongly.",
          "tests/test_families.py::test_tokens_and_rows_of_qwens_images_by_hand"),
    Break("families-positions-without-the-grid", "crystal/families.py",
          'image_grid_thw=batch["image_grid_thw"],', 'image_grid_thw=batch["image_grid_thw"].flip(0),',
          "Image tokens get another image's rows and columns.",
          "tests/test_model.py::test_positions_are_m_rope_by_hand"),
    Break("families-mlp-down-left-out", "crystal/families.py",
          '(self_attn\\.[qkvo]_proj|mlp\\.(gate|up|down)_proj)"',
          '(self_attn\\.[qkvo]_proj|mlp\\.(gate|up)_proj)"',
          "No adapter on down_proj.",
          "tests/test_settings.py::test_adapters_are_on_the_parts_that_are_named"),
    Break("families-attention-output-left-out", "crystal/families.py",
          """self_attn\\.[qkvo]_proj""", """self_attn\\.[qkv]_proj""",
          "No adapter on the attention's output.",
          "tests/test_settings.py::test_tune_names_exactly_what_trains"),
    Break("families-qwen25-merger", "crystal/families.py",
          'merger=r"model\\.visual\\.merger\\.mlp\\.\\d+"', 'merger=r"model\\.visual\\.merger\\.mlp\\.0"',
          "Half of the merger gets no adapter.",
          "tests/test_settings.py::test_adapters_are_on_the_parts_that_are_named"),
    Break("families-qwen25-vision", "crystal/families.py",
          """(attn\\.(qkv|proj)|mlp\\.(gate|up|down)_proj)",
        merger=r"model\\.visual\\.merger\\.mlp""",
          """(attn\\.(qkv)|mlp\\.(gate|up|down)_proj)",
        merger=r"model\\.visual\\.merger\\.mlp""",
          "The tower's attention output gets no adapter.",
          "tests/test_settings.py::test_adapters_are_on_the_parts_that_are_named"),
    Break("families-qwen3-deepstack", "crystal/families.py",
          """(merger|deepstack_merger_list\\.\\d+)""", "(merger)",
          "DeepStack's mergers get no adapters.",
          "tests/test_families.py::test_each_part_names_its_own_modules_and_no_others"),
    Break("families-siglip-out-proj", "crystal/families.py",
          "(q|k|v|out)_proj", "(q|k|v)_proj",
          "SigLIP's attention output gets no adapter.",
          "tests/test_families.py::test_each_part_names_its_own_modules_and_no_others"),
    Break("families-llava-sizes-exchanged", "crystal/families.py",
          'out["image_sizes"] = inputs["image_grid_thw"][:, 1:]',
          'out["image_sizes"] = inputs["image_grid_thw"][:, 1:].flip(1)',
          "LLaVA cuts the padding of the wrong side.",
          "tests/test_families.py::test_which_of_llavas_images_belong_together"),
    Break("families-llava-images-each-alone", "crystal/families.py",
          "([run] if one else [1] * run)", "[1] * run",
          "Several images of a record are taken for records of their own.",
          "tests/test_families.py::test_which_of_llavas_images_belong_together"),
    Break("families-llava-newline", "crystal/families.py",
          "(len(lines), int(lines[0]) + 1)", "(len(lines), int(lines[0]))",
          "Image tokens are as many fewer as there are rows.",
          "tests/test_families.py::test_llavas_grid_of_a_wide_picture_by_hand"),
    Break("families-llava-positions", "crystal/families.py",
          ".expand(3, B, L)", ".flip(0).expand(3, B, L)",
          "LLaVA reads its sequence backwards.",
          "tests/test_families.py::test_which_of_llavas_images_belong_together"),
    Break("families-llava-marks", "crystal/families.py",
          'marks=("<image>",)', "marks=layout.IMAGE",
          "LLaVA's image token is not known.", "tests/test_families.py::test_what_else_a_row_says"),
    Break("families-bounded", "crystal/families.py",
          "    bounded = False", "    bounded = True",
          "--max_pixels is silently ignored for LLaVA.", "tests/test_families.py::test_what_else_a_row_says"),
    Break("encoders-registers-counted", "crystal/encoders.py",
          '1 + getattr(hf.config, "num_register_tokens", 0)', "1",
          "Registers are taken for patches, and every patch for another.",
          "tests/test_encoders.py::test_class_token_and_registers_are_left_out"),
    Break("encoders-height-and-width", "crystal/encoders.py",
          'F.interpolate(x[None], (size["height"], size["width"])',
          'F.interpolate(x[None], (size["width"], size["height"])',
          "Images are drawn the wrong way for encoders that are not square.",
          "tests/test_encoders.py::test_rows_columns_and_channels_keep_their_places"),
    Break("encoders-longer-side", "crystal/encoders.py",
          "min(image.height, image.width)", "max(image.height, image.width)",
          "The longer side is scaled, and the crop reaches beyond the image.",
          "tests/test_encoders.py::test_the_shorter_side_is_scaled_and_the_middle_is_cut_out"),
    Break("encoders-corner-crop", "crystal/encoders.py",
          "top, left = (x.shape[1] - h) // 2, (x.shape[2] - w) // 2", "top, left = 0, 0",
          "The corner is cut out, not the middle.",
          "tests/test_encoders.py::test_the_shorter_side_is_scaled_and_the_middle_is_cut_out"),
    Break("encoders-always-crop", "crystal/encoders.py",
          'if rules.get("do_center_crop"):', 'if rules.get("crop_size"):',
          "A checkpoint that says not to crop is cropped.",
          "tests/test_encoders.py::test_the_shorter_side_is_scaled_and_the_middle_is_cut_out"),
    Break("encoders-always-bilinear", "crystal/encoders.py",
          'mode=RESAMPLE[rules.get("resample", 2)]', 'mode="bilinear"',
          "SigLIP's pictures are not resampled as it was trained.",
          "tests/test_encoders.py::test_resampling_is_the_one_that_is_configured"),
    Break("encoders-no-antialias", "crystal/encoders.py",
          "antialias=True", "antialias=False",
          "Small features alias.", "tests/test_encoders.py::test_resampling_is_the_one_that_is_configured"),
    Break("encoders-one-mean", "crystal/encoders.py",
          "(torch.tensor(rules[n])[:, None, None]", "(torch.tensor(rules[n][:1])[:, None, None]",
          "All channels have the first one's mean and deviation.",
          "tests/test_encoders.py::test_each_channel_has_its_own_mean_and_deviation"),
    Break("encoders-plus-mean", "crystal/encoders.py",
          "return (x - mean) / std", "return x / std - mean",
          "Pixels are normalised wrongly.",
          "tests/test_encoders.py::test_each_channel_has_its_own_mean_and_deviation"),
    Break("encoders-trains", "crystal/encoders.py",
          "hf.eval().requires_grad_(False), rules", "hf.eval(), rules",
          "The frozen encoder's weights train with the model.", "tests/test_encoders.py::test_frozen"),
    Break("encoders-training-mode", "crystal/encoders.py",
          "return super().train(False)", "return super().train(mode)",
          "Dropout of an encoder is on in training.", "tests/test_encoders.py::test_frozen"),
    Break("encoders-tiny-of-the-run", "crystal/encoders.py",
          "torch.manual_seed(0)", "torch.seed()",
          "The shipped encoder is another in each run.",
          "tests/test_encoders.py::test_tiny_is_the_same_every_time_and_disturbs_no_seed"),
    Break("encoders-disturb-the-seed", "crystal/encoders.py",
          "with torch.random.fork_rng(devices=[]):", "if True:",
          "Loading an encoder changes every later draw.",
          "tests/test_encoders.py::test_tiny_is_the_same_every_time_and_disturbs_no_seed"),
    Break("encoders-autocast", "crystal/encoders.py",
          "torch.autocast(pixels.device.type, enabled=False)",
          "torch.autocast(pixels.device.type, enabled=True)",
          "Features in training are not those computed before it.",
          "tests/test_encoders.py::test_autocast_changes_nothing"),
    Break("encoders-missing-rules", "crystal/encoders.py",
          '{"size", "image_mean", "image_std"} - rules.keys()', '{"size"} - rules.keys()',
          "A checkpoint without a mean ends in a traceback.",
          "tests/test_encoders.py::test_rules_that_are_missing_are_named"),
    Break("settings-init-prepare-without-tokens", "crystal/methods/__init__.py",
          "prepare(model, settings, method.tokens)", "prepare(model, settings)",
          "New tokens get no rows.", "tests/test_settings.py::test_tune_names_exactly_what_trains[crystal]"),
    Break("settings-init-always-the-default", "crystal/methods/__init__.py",
          "method = get(settings.method)(settings)", 'method = get("crystal")(settings)',
          "--method trains CrystaL whatever it names.",
          "tests/test_settings.py::test_method_names_the_file_whose_method_runs"),
    Break("settings-init-file-run-twice", "crystal/methods/__init__.py",
          "if key not in sys.modules:", "if True:",
          "A file's classes are others for each who asks.",
          "tests/test_config.py::test_a_file_of_ones_own_has_settings_of_its_own"),
    Break("settings-init-broken-file-stays", "crystal/methods/__init__.py",
          """                del sys.modules[key]
""",
          """                pass
""",
          "A file that failed once is taken for a module without Method.",
          "tests/test_config.py::test_a_file_that_breaks_while_it_is_read_is_read_again"),
    Break("settings-init-relative-path", "crystal/methods/__init__.py",
          "settings.method = str(Path(settings.method).resolve())",
          "settings.method = str(Path(settings.method))",
          "A run of one's own method opens from its folder alone.",
          "tests/test_config.py::test_a_file_of_ones_own_has_settings_of_its_own"),
    Break("settings-init-any-class", "crystal/methods/__init__.py",
          "if not issubclass(module.Method, ", "if False and not issubclass(module.Method, ",
          "A class that is no method fails in the middle of a run.",
          "tests/test_config.py::test_a_file_of_ones_own_has_settings_of_its_own"),
    Break("settings-init-lost-settings", "crystal/methods/__init__.py",
          "if wrong := saved.keys() ^ {", "if wrong := saved.keys() - {",
          "A run of an older version opens with defaults that it was not trained with.",
          "tests/test_config.py::test_every_field_has_help_and_round_trips"),
    Break("settings-init-init-is-a-method", "crystal/methods/__init__.py",
          'if p.stem != "__init__")', ")",
          "--method __init__ is offered.",
          "tests/test_config.py::test_a_file_that_breaks_while_it_is_read_is_read_again"),
    Break("settings-crystal-released-kl-share", "crystal/methods/crystal.py",
          'kl_share=0.1, answer_rows="span"', 'kl_share=0.01, answer_rows="span"',
          "`released` takes a hundredth of the KL rows.",
          "tests/test_settings.py::test_the_presets_are_the_table_of_the_two_sources"),
    Break("settings-crystal-released-dropout", "crystal/methods/crystal.py",
          "lora_dropout=0.01),", "lora_dropout=0.1),",
          "`released` drops ten times as much.",
          "tests/test_settings.py::test_the_presets_are_the_table_of_the_two_sources"),
    Break("settings-crystal-released-adapters", "crystal/methods/crystal.py",
          'lora_on="language,vision,merger", lora_dropout', 'lora_on="language,vision", lora_dropout',
          "`released` leaves the merger without adapters.",
          "tests/test_settings.py::test_the_presets_are_the_table_of_the_two_sources"),
    Break("settings-crystal-labels-ignored", "crystal/methods/crystal.py",
          "record.answer, record.cot, self.settings.labels)", "record.answer, record.cot)",
          "--labels answer is ignored.",
          "tests/test_settings.py::test_labels_are_all_that_is_said_or_the_answer_alone"),
    Break("settings-crystal-thought-ignored", "crystal/methods/crystal.py",
          "self.settings.latent_kind, self.settings.thought)", "self.settings.latent_kind)",
          "--thought cot is ignored.",
          "tests/test_settings.py::test_labels_are_all_that_is_said_or_the_answer_alone"),
    Break("settings-crystal-kind-ignored", "crystal/methods/crystal.py",
          "return new_tokens(self.settings.latents, self.settings.latent_kind)",
          'return new_tokens(self.settings.latents, "diverse")',
          "--latent_kind identical gives rows that nothing uses.",
          "tests/test_settings.py::test_k_latents_of_their_kind_stand_where_the_method_has_them"),
    Break("settings-crystal-weights-exchanged", "crystal/methods/crystal.py",
          '"kl": self.w_kl, "attn": self.w_attn}', '"kl": self.w_attn, "attn": self.w_kl}',
          "--w_kl and --w_attn mean each other.",
          "tests/test_settings.py::test_crystals_weights_belong_to_their_terms"),
    Break("settings-crystal-weight-of-ce-cor", "crystal/methods/crystal.py",
          '"ce_cor": self.w_ce_cor', '"ce_cor": self.w_ce_int',
          "--w_ce_cor is ignored.", "tests/test_settings.py::test_crystals_weights_belong_to_their_terms"),
    Break("settings-crystal-pooled-weight", "crystal/methods/crystal.py",
          '{"ce": self.w_ce_int, "ce_int"', '{"ce_int"',
          "--w_ce_int is ignored with --ce pooled.",
          "tests/test_settings.py::test_crystals_weights_belong_to_their_terms"),
    Break("settings-crystal-realisation-ignored", "crystal/methods/crystal.py",
          "dual_forward(model, batch, copied, s.realisation, taps)",
          'dual_forward(model, batch, copied, "kv", taps)',
          "--realisation is ignored.", "tests/test_settings.py::test_realisation_is_how_the_two_paths_run"),
    Break("settings-crystal-layers-ignored", "crystal/methods/crystal.py",
          "config.layers_of(s.attn_layers, len(model.layers))", 'config.layers_of("last", len(model.layers))',
          "--attn_layers is ignored.",
          "tests/test_settings.py::test_eq_6_is_the_mean_over_what_the_flags_name"),
    Break("settings-crystal-teacher-grad-of-attention", "crystal/methods/crystal.py",
          "s.attn_heads, teacher_grad=s.teacher_grad)", "s.attn_heads, teacher_grad=True)",
          "Eq. 5 pulls the teacher to the student.",
          "tests/test_settings.py::test_eq_6_is_the_mean_over_what_the_flags_name"),
    Break("settings-crystal-teacher-grad-of-kl", "crystal/methods/crystal.py",
          "                                         teacher_grad=s.teacher_grad, in_place=True)",
          "                                         teacher_grad=True, in_place=True)",
          "KL pulls the teacher to the student.",
          "tests/test_settings.py::test_eq_6_is_the_mean_over_what_the_flags_name"),
    Break("settings-crystal-strengths-crossed", "crystal/methods/crystal.py",
          "if self.strength_low is not None and not 0 <= self.strength_low <= self.strength_high:",
          "if self.strength_low is not None and not 0 <= self.strength_low:",
          "A range that ends below its start is taken.",
          "tests/test_settings.py::test_flags_that_exclude_one_another"),
    Break("settings-crystal-one-strength", "crystal/methods/crystal.py",
          "(self.strength_low is None) != (self.strength_high is None)",
          "(self.strength_low is None) < (self.strength_high is None)",
          "--strength_high alone is ignored.", "tests/test_settings.py::test_flags_that_exclude_one_another"),
    Break("settings-crystal-mean-heads-of-frobenius", "crystal/methods/crystal.py",
          'self.attn_heads == "mean" and self.attn_loss != "kl"',
          'self.attn_heads == "mean" and self.attn_loss == "mse"',
          "A pair of flags that nothing computes ends in a traceback.",
          "tests/test_settings.py::test_flags_that_exclude_one_another"),
    Break("settings-crystal-default-kind", "crystal/methods/crystal.py",
          'attn_loss: str = setting("kl",', 'attn_loss: str = setting("mse",',
          "The default of eq. 5 is not table 4's best row.",
          "tests/test_settings.py::test_defaults_are_the_papers[crystal]"),
    Break("settings-livr-stages-exchanged", "crystal/methods/livr.py",
          '[Stage("masked", self.masked, self.lr), Stage("open", 1 - self.masked, self.lr)]',
          '[Stage("masked", 1 - self.masked, self.lr), Stage("open", self.masked, self.lr)]',
          "--masked is the share of the open stage.",
          "tests/test_settings.py::test_each_stage_warms_up_and_falls_on_its_own"),
    Break("settings-livr-default-masked", "crystal/methods/livr.py",
          "masked: float = setting(0.4,", "masked: float = setting(0.6,",
          "Six epochs are masked, not four.", "tests/test_settings.py::test_defaults_are_the_papers[livr]"),
    Break("settings-livr-copies-ignored", "crystal/methods/livr.py",
          "settings.latents, settings.place, settings.image_copies", "settings.latents, settings.place, 1",
          "--image_copies is ignored.", "tests/test_settings.py::test_each_image_stands_as_often_as_told"),
    Break("settings-livr-place-ignored", "crystal/methods/livr.py",
          'if self.place == "before" and image:', "if False and image:",
          "--place before is ignored.",
          "tests/test_settings.py::test_livrs_latents_stand_before_the_question_if_told"),
    Break("settings-livr-mask-ignored", "crystal/methods/livr.py",
          'if self.settings.mask == "answer":', "if False:",
          "--mask answer is ignored.", "tests/test_settings.py::test_who_is_blind_in_livrs_first_stage"),
    Break("settings-livr-latents-see-ignored", "crystal/methods/livr.py",
          'if self.settings.latents_see == "image":', "if False:",
          "--latents_see image is ignored.",
          "tests/test_settings.py::test_who_is_blind_in_livrs_first_stage"),
    Break("settings-livr-nobody-sees", "crystal/methods/livr.py",
          'if self.masked and not self.latents and self.mask == "prompt":', "if False:",
          "Without latents nobody sees the image, and nothing says so.",
          "tests/test_settings.py::test_flags_that_exclude_one_another"),
    Break("settings-lavit-default-lr", "crystal/methods/lavit.py",
          "lr: float = setting(5e-6,", "lr: float = setting(5e-5,",
          "Ten times the paper's learning rate.",
          "tests/test_settings.py::test_defaults_are_the_papers[lavit]"),
    Break("settings-lavit-weights-exchanged", "crystal/methods/lavit.py",
          '{"semantics": self.w_semantics, "gaze": self.w_gaze}',
          '{"semantics": self.w_gaze, "gaze": self.w_semantics}',
          "--w_semantics and --w_gaze mean each other.",
          "tests/test_settings.py::test_lavits_weights_belong_to_their_terms"),
    Break("settings-lavit-top-ignored", "crystal/methods/lavit.py",
          "flat), self.settings.gaze_top)", "flat), 8)",
          "--gaze_top is ignored.", "tests/test_settings.py::test_the_largest_of_the_teachers_gaze_are_kept"),
    Break("settings-lavit-dim-ignored", "crystal/methods/lavit.py",
          "nn.Linear(D, self.settings.semantics_dim or D))", "nn.Linear(D, D))",
          "--semantics_dim is ignored.", "tests/test_settings.py::test_semantics_dim_is_the_teachers_size"),
    Break("settings-lavit-head-not-of-the-seed", "crystal/methods/lavit.py",
          "torch.manual_seed(self.settings.seed)", "torch.manual_seed(0)",
          "The semantics head begins the same whatever --seed.",
          "tests/test_settings.py::test_first_heads_depend_on_the_seed"),
    Break("settings-lavit-gate-start-ignored", "crystal/methods/lavit.py",
          "return s.gate_start + (1 - s.gate_start) / 2", "return (1 - s.gate_start) / 2",
          "--gate_start is ignored at update 0: the image is shut out.",
          "tests/test_settings.py::test_the_gate_opens_as_told"),
    Break("settings-lavit-gate-warmup-ignored", "crystal/methods/lavit.py",
          "of_run >= s.gate_warmup:", "of_run >= 0.4:",
          "--gate_warmup does not end the gate.", "tests/test_settings.py::test_the_gate_opens_as_told"),
    Break("settings-lavit-hard-is-open", "crystal/methods/lavit.py",
          """if s.gate == "hard":
            return 0.0""",
          """if s.gate == "hard":
            return 1.0""",
          "--gate hard never closes.", "tests/test_settings.py::test_the_gate_opens_as_told"),
    Break("settings-lavit-turns", "crystal/methods/lavit.py",
          'if self.turns == "all" and (self.w_semantics or self.w_gaze):',
          'if self.turns == "all" and (self.w_semantics and self.w_gaze):',
          "Later turns learn the first question's gaze.",
          "tests/test_settings.py::test_flags_that_exclude_one_another"),
    Break("settings-valr-lr-of-the-second-stage", "crystal/methods/valr.py",
          "1 - self.first_share, self.lr_latents)]", "1 - self.first_share, self.lr)]",
          "--lr_latents is ignored.",
          "tests/test_settings.py::test_each_stage_warms_up_and_falls_on_its_own"),
    Break("settings-valr-weight-ignored", "crystal/methods/valr.py",
          'return {"repa": self.w_repa}', "return {}",
          "--w_repa is ignored: the alignment counts twice the paper's.",
          "tests/test_settings.py::test_valrs_weights_and_stages_as_the_loop_logs_them"),
    Break("settings-valr-updates-ignored", "crystal/methods/valr.py",
          "fed, self.settings.updates, (self.layer,)", "fed, None, (self.layer,)",
          "--updates is ignored.",
          "tests/test_settings.py::test_latents_are_aligned_after_the_layer_that_is_named"),
    Break("settings-valr-layer-ignored", "crystal/methods/valr.py",
          "self.layer = s.align_layer or max(", "self.layer = max(",
          "--align_layer is ignored.",
          "tests/test_settings.py::test_latents_are_aligned_after_the_layer_that_is_named"),
    Break("settings-valr-projections-alike", "crystal/methods/valr.py",
          "torch.manual_seed(data.seed_of(s.seed, m))", "torch.manual_seed(s.seed)",
          "Two encoders' projections begin as one.",
          "tests/test_settings.py::test_first_heads_depend_on_the_seed"),
    Break("settings-valr-encoders-ignored", "crystal/methods/valr.py",
          'if self.encoders == "none" else self.encoders.split(",")',
          'if self.encoders == "none" else ["tiny"]',
          "--encoders is ignored.", "tests/test_settings.py::test_encoders_are_those_that_are_named"),
    Break("settings-valr-none-among-others", "crystal/methods/valr.py",
          'if not name or name == "none" or (', "if not name or (",
          "--encoders none,tiny looks for a hub's model named none.",
          "tests/test_settings.py::test_each_bound_just_met_and_just_passed"),
    Break("settings-train-never-clipped", "crystal/train.py",
          "nn.utils.clip_grad_norm_([p for _, p in named], settings.clip)",
          "nn.utils.clip_grad_norm_([p for _, p in named], math.inf)",
          "--clip is ignored.", "tests/test_settings.py::test_the_gradients_norm_is_at_most_clip"),
    Break("settings-train-rows-rate-ignored", "crystal/train.py",
          '"lr_scale": settings.lr_rows}', '"lr_scale": 1.0}',
          "--lr_rows is ignored.", "tests/test_settings.py::test_each_group_moves_by_its_rate_and_its_decay"),
    Break("settings-train-rows-decay", "crystal/train.py",
          '{"params": rows, "weight_decay": 0.0,', '{"params": rows, "weight_decay": settings.weight_decay,',
          "Latents shrink with every update.",
          "tests/test_settings.py::test_each_group_moves_by_its_rate_and_its_decay"),
    Break("settings-train-vectors-decay", "crystal/train.py",
          '{"params": vectors, "weight_decay": 0.0,',
          '{"params": vectors, "weight_decay": settings.weight_decay,',
          "Norms and biases shrink.",
          "tests/test_settings.py::test_each_group_moves_by_its_rate_and_its_decay"),
    Break("settings-train-decay-ignored", "crystal/train.py",
          '{"params": matrices, "weight_decay": settings.weight_decay,',
          '{"params": matrices, "weight_decay": 0.01,',
          "--weight_decay is ignored.",
          "tests/test_settings.py::test_each_group_moves_by_its_rate_and_its_decay"),
    Break("settings-train-dropout-mask-repeats", "crystal/train.py",
          "data.seed_of(settings.seed, step, part, procs.rank)",
          "data.seed_of(settings.seed, part, procs.rank)",
          "Dropout drops the same at every update.",
          "tests/test_settings.py::test_dropout_is_drawn_anew_for_each_update_part_and_rank_and_from_the_seed"),
    Break("settings-train-ranks-drop-alike", "crystal/train.py",
          "data.seed_of(settings.seed, step, part, procs.rank)", "data.seed_of(settings.seed, step, part)",
          "All ranks drop the same.",
          "tests/test_settings.py::test_dropout_is_drawn_anew_for_each_update_part_and_rank_and_from_the_seed"),
    Break("settings-train-max-pixels-ignored", "crystal/train.py",
          "settings.min_pixels, settings.max_pixels)", "settings.min_pixels, None)",
          "--max_pixels is ignored in training.", "tests/test_settings.py::test_pixel_bounds_reach_the_loop"),
    Break("settings-train-workers-ignored", "crystal/train.py",
          "pad, settings.workers, processes.ignore_signals", "pad, 0, processes.ignore_signals",
          "--workers is ignored.",
          "tests/test_settings.py::test_workers_prepare_the_same_batches_in_their_processes"),
    Break("settings-train-order-not-of-the-seed", "crystal/train.py",
          "procs.world, settings.seed, max(start, step), stop)", "procs.world, 0, max(start, step), stop)",
          "The order of records is the same whatever --seed.",
          "tests/test_settings.py::test_order_depends_on_the_seed"),
    Break("settings-train-eval-records-ignored", "crystal/train.py",
          "records = records[: settings.eval_records]", "records = records[:256]",
          "--eval_records is ignored.",
          "tests/test_settings.py::test_records_come_from_the_files_that_are_named"),
    Break("settings-train-toy-seed", "crystal/train.py",
          "toy.generate(root, seed=settings.seed)", "toy.generate(root)",
          "Toy scenes are the same whatever --seed.",
          "tests/test_settings.py::test_without_data_the_toy_scenes_of_the_seed_are_made"),
    Break("settings-train-turns-ignored", "crystal/train.py",
          "data.read(path, root, settings.turns)", "data.read(path, root)",
          "--turns all is ignored.",
          "tests/test_settings.py::test_turns_are_the_first_answer_or_a_record_each"),
    Break("settings-train-keep-ignored", "crystal/train.py",
          "checkpoint.prune(run, settings.keep)", "checkpoint.prune(run, 2)",
          "--keep is ignored.", "tests/test_settings.py::test_validations_and_checkpoints_come_when_told"),
    Break("settings-train-save-every-ignored", "crystal/train.py",
          "(step % settings.save_every == 0 or last)", "(step % 500 == 0 or last)",
          "--save_every is ignored.",
          "tests/test_settings.py::test_validations_and_checkpoints_come_when_told"),
    Break("settings-train-device-ignored", "crystal/train.py",
          "processes.start(settings.device)", "processes.start()",
          "--device is ignored.", "tests/test_settings.py::test_device_is_where_it_runs"),
    Break("settings-train-linear-is-cosine", "crystal/train.py",
          'if settings.decay == "cosine" else 1 - behind)', "if settings.decay else 1 - behind)",
          "--decay linear is ignored.", "tests/test_settings.py::test_the_rate_warms_up_and_falls_as_told"),
    Break("settings-train-autocast-off", "crystal/train.py",
          "enabled=weights_dtype != dtype)", "enabled=False)",
          "Whole training in bfloat16 computes in float32.",
          "tests/test_settings.py::test_dtype_is_that_of_weights_and_products"),
    Break("settings-train-narrow-full", "crystal/train.py",
          'settings.tune == "full" and dtype == torch.bfloat16 else dtype',
          'settings.tune == "none" else dtype',
          "Whole training keeps its weights in bfloat16 and loses small updates.",
          "tests/test_settings.py::test_dtype_is_that_of_weights_and_products"),
    Break("settings-train-image-root-ignored", "crystal/train.py",
          "settings.stages, settings.image_root", 'settings.stages, ""',
          "--image_root is ignored.",
          "tests/test_settings.py::test_records_come_from_the_files_that_are_named"),
    Break("settings-train-validation-of-the-same-seed", "crystal/train.py",
          'settings.seed + (split == "val")', "settings.seed",
          "Validation is corrupted just as training.",
          "tests/test_settings.py::test_validation_is_corrupted_from_a_seed_of_its_own"),
    Break("settings-data-strength-ignored", "crystal/data.py",
          "PRIOR[mode] if settings.strength_low is None else (settings.strength_low, settings.strength_high)",
          "PRIOR[mode]",
          "--strength_low and --strength_high are ignored.",
          "tests/test_settings.py::test_corruption_has_the_mode_and_strength_that_are_told_and_the_seeds_own"),
    Break("settings-data-mode-ignored", "crystal/data.py",
          "mode = settings.corruption", 'mode = "blur"',
          "--corruption is ignored.", "tests/test_settings.py::test_each_mode_has_its_own_range"),
]

# ---- commands and data preparation ------------------------------------------------------------------------------------

COMMANDS = [
]

# ---- the loop: train, checkpoint, processes ---------------------------------------------------------------------------

LOOP = [
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
