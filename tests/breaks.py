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

ROW = "tests/test_oracle.py::test_a_row_of_the_table"          # [settings of the row]
PLAIN = "tests/test_oracle.py::test_plain_operators"           # the same without compiled operators

METHODS = [
    # methods/sft.py
    Break("sft-mean-over-the-batch", "crystal/methods/sft.py", """mean_per_pair(ce_rows(logits, batch["targets"][labelled]), pair, B).mean()""",
          """ce_rows(logits, batch["targets"][labelled]).mean()""", "Long answers would count more than short ones.", f"{ROW}[sft]"),
    Break("sft-biases-lost", "crystal/methods/sft.py", """h = model.hidden(batch, biases=biases)""", """h = model.hidden(batch)""",
          "A method's mask would not reach the model.", "tests/test_livr.py::test_the_stages_differ_by_the_mask_alone"),
    Break("sft-mass-mean-over-columns", "crystal/methods/sft.py", """A.sum(-1).mean(1).sum(1)""", """A.mean(-1).mean(1).sum(1)""",
          "The logged share of attention would shrink with K.", f"{ROW}[livr-step=3]"),
    Break("sft-mass-sum-over-heads", "crystal/methods/sft.py", """A.sum(-1).mean(1).sum(1)""", """A.sum(-1).sum(1).sum(1)""",
          "The logged share of attention would exceed 1.", f"{ROW}[livr-step=3]"),
    Break("sft-mass-padded-rows-count", "crystal/methods/sft.py", """(rows >= 0).sum(1).clamp(min=1)""", """rows.shape[1]""",
          "The mass of a short answer would depend on its batch.", f"{ROW}[livr-step=3]"),
    Break("sft-mass-of-first-layer", "crystal/methods/sft.py", """AttentionTap({len(model.layers) - 1}""", """AttentionTap({0}""",
          "The mass logged by LIVR and LaViT would be another layer's.", f"{ROW}[livr-step=3]"),
    Break("sft-mass-without-mask", "crystal/methods/sft.py", """latent_mass, bias=bias)""", """latent_mass)""",
          "The logged mass would count an image that the answer cannot see.", f"{ROW}[livr-2-micro-batches]"),
    Break("sft-mass-sum-over-pairs", "crystal/methods/sft.py", """torch.stack(list(tap.slices.values())).mean()}""", """torch.stack(list(tap.slices.values())).sum()}""",
          "The logged mass would grow with the batch.", f"{ROW}[livr-step=3]"),
    Break("sft-hidden-without-tap", "crystal/methods/sft.py", """return model.hidden(batch, tap=tap)""", """return model.hidden(batch)""",
          "Evaluation could not look at attention.", "tests/test_livr.py::test_attention_on_latents_is_that_of_a_full_softmax"),
    Break("sft-layout-drops-the-end", "crystal/methods/sft.py", """image_tokens), record.answer)""", """image_tokens), record.answer[:-1])""",
          "The answer would lose its last character.", f"{ROW}[sft]"),

    # methods/crystal.py
    Break("crystal-first-latent-not-copied", "crystal/methods/crystal.py", """mask_of(batch["latents"] if""", """mask_of(batch["latents"][:, 1:] if""",
          "One latent of the corrupted path would see the corrupted image.", f"{ROW}[crystal]"),
    Break("crystal-copied-ignored", "crystal/methods/crystal.py", """self.settings.copied == "latents" else""", """True else""",
          "`released` would copy the latents alone.", f"{ROW}[crystal-preset=released-realisation=kv]"),
    Break("crystal-ce-cor-on-the-answer-alone", "crystal/methods/crystal.py", """(mask_of(rows, L) if s.ce == "pooled" else ~copied)""", """mask_of(rows, L)""",
          "The corrupted path's thought would not be learned.", f"{ROW}[crystal]"),
    Break("crystal-ce-cor-reads-copied-rows", "crystal/methods/crystal.py", """if s.ce == "pooled" else ~copied)""", """if s.ce == "pooled" else label_int)""",
          "CE_cor would read rows that are the intact path's.", f"{ROW}[crystal]"),
    Break("crystal-pooled-ce-counts-the-thought-twice", "crystal/methods/crystal.py", """(mask_of(rows, L) if s.ce == "pooled" else ~copied)""", """~copied""",
          "The released mean would have other tokens.", f"{ROW}[crystal-thought=cot-copied=thought-realisation=kv-ce=pooled]"),
    Break("crystal-weights-kl-attn-exchanged", "crystal/methods/crystal.py", """"kl": self.w_kl, "attn": self.w_attn""", """"kl": self.w_attn, "attn": self.w_kl""",
          "--w_kl would weigh the attention loss.", f"{ROW}[crystal]"),
    Break("crystal-weights-ce-exchanged", "crystal/methods/crystal.py", """"ce_int": self.w_ce_int, "ce_cor": self.w_ce_cor""", """"ce_int": self.w_ce_cor, "ce_cor": self.w_ce_int""",
          "--w_ce_int would weigh the corrupted path.", f"{ROW}[crystal]"),
    Break("crystal-weight-of-pooled-ce", "crystal/methods/crystal.py", """{"ce": self.w_ce_int,""", """{"ce": self.w_ce_cor,""",
          "The pooled CE would have another weight.", f"{ROW}[crystal-ce=pooled-answer_rows=predicting-labels=all]"),
    Break("crystal-eq5-summed-over-layers", "crystal/methods/crystal.py", """torch.stack(list(tap.slices.values())).mean(0)""", """torch.stack(list(tap.slices.values())).sum(0)""",
          "The attention loss would grow with the number of layers.", f"{ROW}[crystal-attn_heads=mean-attn_layers=all-attn_columns=latents]"),
    Break("crystal-masses-of-one-layer", "crystal/methods/crystal.py", """torch.stack(list(mass.slices.values())).mean(0)""", """torch.stack(list(mass.slices.values()))[0]""",
          "The logged mass would be one layer's.", f"{ROW}[crystal-attn_heads=mean-attn_layers=all-attn_columns=latents]"),
    Break("crystal-kl-share-ignored", "crystal/methods/crystal.py", """pair[answer], B, s.kl_share)""", """pair[answer], B)""",
          "--kl_share would do nothing.", f"{ROW}[crystal-kl_share=0.3]"),
    Break("crystal-kl-rows-of-the-labels", "crystal/methods/crystal.py", """mean_per_pair(kl[answer], pair[answer], B, s.kl_share)""", """mean_per_pair(kl[label_cor], pair[label_cor], B, s.kl_share)""",
          "The mean of eq. 4 would run over rows without a divergence.", f"{ROW}[crystal]"),
    Break("crystal-columns-all-without-latents", "crystal/methods/crystal.py", """torch.cat([batch["image"], batch["latents"]], 1)""", """batch["image"]""",
          "Table 4's row with image and latents would be the image alone.", f"{ROW}[crystal-realisation=kv-copied=latents-attn_columns=all-attn_layers=all]"),
    Break("crystal-columns-thought-ignored", "crystal/methods/crystal.py", """self.settings.attn_columns == "thought\"""", """self.settings.attn_columns == "thoughts\"""",
          "`released` would compare attention to the latents alone.", f"{ROW}[crystal-preset=released-realisation=kv]"),
    Break("crystal-labels-ignored", "crystal/methods/crystal.py", """record.cot, self.settings.labels)""", """record.cot)""",
          "--labels answer would do nothing.", f"{ROW}[crystal-labels=answer]"),
    Break("crystal-cot-ignored", "crystal/methods/crystal.py", """record.answer, record.cot, self""", """record.answer, (), self""",
          "A record's steps would not be learned.", f"{ROW}[crystal-thought=cot]"),
    Break("crystal-thought-ignored", "crystal/methods/crystal.py", """self.settings.latent_kind, self.settings.thought)""", """self.settings.latent_kind)""",
          "--thought cot would do nothing.", f"{ROW}[crystal-thought=cot]"),
    Break("crystal-latent-kind-ignored", "crystal/methods/crystal.py", """new_tokens(self.settings.latents, self.settings.latent_kind)""", """new_tokens(self.settings.latents, "diverse")""",
          "--latent_kind identical would add rows that nothing uses.", f"{ROW}[crystal-latents=5-latent_kind=identical]"),
    Break("crystal-masses-exchanged", "crystal/methods/crystal.py", """terms["mass_int"], terms["mass_cor"] =""", """terms["mass_cor"], terms["mass_int"] =""",
          "The log would show each path's attention as the other's.", f"{ROW}[crystal]"),
    Break("crystal-mass-of-the-columns", "crystal/methods/crystal.py", """rows2, batch["latents"].repeat(2, 1), latent_mass""", """rows2, cols.repeat(2, 1), latent_mass""",
          "The logged mass would follow --attn_columns.", f"{ROW}[crystal-realisation=kv-copied=latents-attn_columns=all-attn_layers=all]"),
    Break("crystal-teacher-always-moves-attn", "crystal/methods/crystal.py", """s.attn_loss, s.attn_heads, teacher_grad=s.teacher_grad)""", """s.attn_loss, s.attn_heads)""",
          "The intact path's attention would be pulled to the corrupted one's.", f"{ROW}[crystal]"),
    Break("crystal-teacher-always-moves-kl", "crystal/methods/crystal.py", """teacher_grad=s.teacher_grad, in_place=True""", """teacher_grad=True, in_place=True""",
          "The intact path's answer would be pulled to the corrupted one's.", f"{ROW}[crystal]"),
    Break("crystal-teacher-grad-ignored", "crystal/methods/crystal.py", """teacher_grad=s.teacher_grad, in_place=True""", """teacher_grad=False, in_place=True""",
          "--teacher_grad would leave KL's teacher alone.", f"{ROW}[crystal-teacher_grad=True]"),
    Break("crystal-attn-layers-ignored", "crystal/methods/crystal.py", """layers, rows2 = config.layers_of(s.attn_layers, len(model.layers))""", """layers, rows2 = config.layers_of("last", len(model.layers))""",
          "--attn_layers would do nothing.", f"{ROW}[crystal-attn_heads=mean-attn_layers=0-attn_columns=thought]"),
    Break("crystal-attn-loss-ignored", "crystal/methods/crystal.py", """partial(attn_align, s.attn_loss,""", """partial(attn_align, "kl",""",
          "--attn_loss would do nothing.", f"{ROW}[crystal-attn_loss=mse-attn_layers=all-attn_columns=latents-answer_rows=predicting]"),
    Break("crystal-realisation-ignored", "crystal/methods/crystal.py", """dual_forward(model, batch, copied, s.realisation, taps)""", """dual_forward(model, batch, copied, "kv", taps)""",
          "--realisation would do nothing.", "tests/test_crystal.py::test_the_realisation_that_runs_is_the_one_asked_for"),
    Break("crystal-answer-rows-exchanged", "crystal/methods/crystal.py", """self.settings.answer_rows == "predicting\"""", """self.settings.answer_rows == "span\"""",
          "A one-token answer would lose the prediction of that token.", f"{ROW}[crystal]"),
    Break("crystal-pooled-pairs-mixed", "crystal/methods/crystal.py", """torch.cat([pair[label_int], pair[label_cor]])""", """torch.cat([pair[label_cor], pair[label_int]])""",
          "A pair's pooled mean would hold another's tokens.", f"{ROW}[crystal-ce=pooled-answer_rows=predicting-labels=all]"),
    Break("crystal-terms-summed-over-pairs", "crystal/methods/crystal.py", """{name: term.mean() for name""", """{name: term.sum() for name""",
          "Losses would grow with the batch.", f"{ROW}[crystal]"),
    Break("crystal-positions-one-short", "crystal/methods/crystal.py", """torch.where(at < end, at, -1)""", """torch.where(at < end - 1, at, -1)""",
          "A span would lose its last position.", f"{ROW}[crystal-preset=released-one-pair]"),
    Break("crystal-positions-of-the-shortest", "crystal/methods/crystal.py", """(end - start).max()""", """(end - start).min()""",
          "Long spans would be cut to the shortest of their batch.", f"{ROW}[crystal-preset=released-realisation=kv]"),
    Break("crystal-padding-marks-position-0", "crystal/methods/crystal.py", """positions % (L + 1), True""", """positions.clamp(min=0), True""",
          "A short answer of a batch would have a row too many.", f"{ROW}[crystal]"),
    Break("crystal-released-kl-share", "crystal/methods/crystal.py", """kl_share=0.1, answer_rows""", """kl_share=0.2, answer_rows""",
          "`released` would not be what was released.", "tests/test_crystal.py::test_presets_are_the_table_of_the_two_sources"),
    Break("crystal-released-adapts-the-language-alone", "crystal/methods/crystal.py", """lora_on="language,vision,merger\"""", """lora_on="language,vision\"""",
          "`released` would not adapt the merger.", "tests/test_crystal.py::test_presets_are_the_table_of_the_two_sources"),
    Break("crystal-released-dropout", "crystal/methods/crystal.py", """lora_dropout=0.01)""", """lora_dropout=0.1)""",
          "`released` would drop ten times as much.", "tests/test_crystal.py::test_presets_are_the_table_of_the_two_sources"),
    Break("crystal-default-of-attn-loss", "crystal/methods/crystal.py", """attn_loss: str = setting("kl",""", """attn_loss: str = setting("mse",""",
          "The default would not be table 4's best row.", f"{ROW}[crystal-own-defaults]"),
    Break("crystal-default-weight", "crystal/methods/crystal.py", """w_ce_cor: float = setting(1.0""", """w_ce_cor: float = setting(0.5""",
          "Eq. 6's weights would not be 1.", f"{ROW}[crystal-own-defaults]"),
    Break("crystal-kl-share-of-1-refused", "crystal/methods/crystal.py", """if not 0 < self.kl_share <= 1""", """if not 0 <= self.kl_share <= 1""",
          "A share of 0 would pass.", "tests/test_config.py::test_wrong_flags_are_one_line"),

    # methods/livr.py
    Break("livr-mask-in-stage-2", "crystal/methods/livr.py", """if progress.stage == 0 else []""", """if progress.stage == 1 else []""",
          "The bottleneck would be closed in the wrong stage.", f"{ROW}[livr-step=3]"),
    Break("livr-mask-one-row-late", "crystal/methods/livr.py", """device=ids.device) >= batch["rows"][:, :1]""", """device=ids.device) > batch["rows"][:, :1]""",
          "An answer of one token would see the image.", f"{ROW}[livr-mask=answer-one-pair]"),
    Break("livr-mask-kind-ignored", "crystal/methods/livr.py", """self.settings.mask == "answer":""", """self.settings.mask == "prompt":""",
          "--mask would mean its opposite.", f"{ROW}[livr-mask=answer-latents_see=all-place=after]"),
    Break("livr-latents-blind", "crystal/methods/livr.py", """& ~image & ~latents  """, """& ~image  """,
          "Latents could not see the image: nothing could.", f"{ROW}[livr-mask=prompt-latents_see=all-place=after]"),
    Break("livr-latents-see-ignored", "crystal/methods/livr.py", """self.settings.latents_see == "image":""", """self.settings.latents_see == "images":""",
          "--latents_see image would do nothing.", f"{ROW}[livr-mask=prompt-latents_see=image-place=after]"),
    Break("livr-latents-cannot-see-each-other", "crystal/methods/livr.py", """Bias(latents, ~image & ~latents)""", """Bias(latents, ~image)""",
          "Under --latents_see image a latent would not see those before it.", f"{ROW}[livr-mask=prompt-latents_see=image-place=after]"),
    Break("livr-image-tokens-alone-are-hidden", "crystal/methods/livr.py", """is_one(model.family.marks)""", """is_one(model.family.marks[:1])""",
          "<|vision_end|>, which has seen the image, would leak it.", f"{ROW}[livr-mask=prompt-latents_see=all-place=after]"),
    Break("livr-place-ignored", "crystal/methods/livr.py", """if self.place == "before" and image:""", """if False:""",
          "--place before would do nothing.", f"{ROW}[livr-mask=prompt-latents_see=all-place=before]"),
    Break("livr-before-vision-end", "crystal/methods/livr.py", """image[-1] + 1 + (len(self.marks) > 1)""", """image[-1] + 1""",
          "Latents would stand inside the image.", f"{ROW}[livr-mask=prompt-latents_see=all-place=before]"),
    Break("livr-latents-in-the-first-turn", "crystal/methods/livr.py", """len(ids) - 1 - ids[::-1].index(self.end)""", """ids.index(self.end)""",
          "Latents would stand in the system's turn.", f"{ROW}[livr-mask=prompt-latents_see=all-place=after]"),
    Break("livr-copies-ignored", "crystal/methods/livr.py", """settings.place, settings.image_copies""", """settings.place, 1""",
          "--image_copies would do nothing.", f"{ROW}[livr-image_copies=2]"),
    Break("livr-latent-kind-ignored", "crystal/methods/livr.py", """layout.latent_tokens(settings.latents, settings.latent_kind))""", """layout.latent_tokens(settings.latents, "diverse"))""",
          "Shared embeddings would not be shared.", f"{ROW}[livr-latents=5-latent_kind=identical-place=before]"),
    Break("livr-mass-without-mask", "crystal/methods/livr.py", """mass_tap(model, batch, biases)""", """mass_tap(model, batch)""",
          "The logged mass would not be that of the masked model.", f"{ROW}[livr-mask=prompt-latents_see=all-place=after]"),
    Break("livr-share-of-stage-1", "crystal/methods/livr.py", """masked: float = setting(0.4""", """masked: float = setting(0.5""",
          "Stage 1 would not be 4 of 10 epochs.", f"{ROW}[livr-lora_dropout=0.0-step=1600]"),
    Break("livr-stage-2-rate", "crystal/methods/livr.py", """Stage("open", 1 - self.masked, self.lr)""", """Stage("open", 1 - self.masked, self.lr / 10)""",
          "Stage 2 would train at another rate.", "tests/test_livr.py::test_defaults_and_stages_are_the_papers"),
    Break("livr-exported-prompt", "crystal/methods/livr.py", """* (self.place == "before")""", """* (self.place == "after")""",
          "An exported model would be asked in another way than it was trained.", "tests/test_livr.py::test_the_exported_prompt_is_the_trained_one"),

    # methods/lavit.py
    Break("lavit-weights-exchanged", "crystal/methods/lavit.py", """{"semantics": self.w_semantics, "gaze": self.w_gaze}""", """{"semantics": self.w_gaze, "gaze": self.w_semantics}""",
          "--w_gaze would weigh the semantics.", f"{ROW}[lavit-step=1-one-pair]"),
    Break("lavit-gate-kind-ignored", "crystal/methods/lavit.py", """if s.gate == "hard":""", """if s.gate == "shut":""",
          "--gate hard would be the cosine.", f"{ROW}[lavit-gate=hard]"),
    Break("lavit-gate-opens-late", "crystal/methods/lavit.py", """or of_run >= s.gate_warmup""", """or of_run > s.gate_warmup""",
          "The hard gate would open an update late.", f"{ROW}[lavit-gate=hard-step=4]"),
    Break("lavit-gate-warmup-ignored", "crystal/methods/lavit.py", """math.cos(math.pi * of_run / s.gate_warmup)""", """math.cos(math.pi * of_run)""",
          "gamma would jump at T_w.", f"{ROW}[lavit-gate=cosine-step=3]"),
    Break("lavit-gate-start-ignored", "crystal/methods/lavit.py", """return s.gate_start + (1 - s.gate_start)""", """return 1e-6 + (1 - s.gate_start)""",
          "--gate_start would not be gamma at update 0.", f"{ROW}[lavit-gate_start=0.2]"),
    Break("lavit-gate-without-logarithm", "crystal/methods/lavit.py", """math.log(gamma) if gamma""", """gamma if gamma""",
          "The bias of eq. 4 would not be ln gamma.", f"{ROW}[lavit-gate=cosine-step=3]"),
    Break("lavit-gate-on-the-latents", "crystal/methods/lavit.py", """Bias(mask_of(batch["rows"], image.shape[1])""", """Bias(mask_of(batch["latents"], image.shape[1])""",
          "The gate would close the latents' view and not the answer's.", f"{ROW}[lavit-gate=hard]"),
    Break("lavit-progress-of-the-stage", "crystal/methods/lavit.py", """self.gamma(progress.of_run)""", """self.gamma(1.0)""",
          "The gate would be open from the start.", f"{ROW}[lavit-gate=cosine-step=3]"),
    Break("lavit-first-latent-for-the-last", "crystal/methods/lavit.py", """latents[:, -1]]""", """latents[:, 0]]""",
          "Eq. 6 would read the first latent.", f"{ROW}[lavit-step=1-one-pair]"),
    Break("lavit-gaze-of-the-last-layer", "crystal/methods/lavit.py", """AttentionTap(range(len(model.layers))""", """AttentionTap({len(model.layers) - 1}""",
          "The student's gaze would be one layer's.", f"{ROW}[lavit-gaze_top=3-step=1]"),
    Break("lavit-smallest-of-the-gaze", "crystal/methods/lavit.py", """A.argsort(descending=True, stable=True)""", """A.argsort(descending=False, stable=True)""",
          "The teacher's weakest tokens would be kept.", f"{ROW}[lavit-gaze_top=3-step=1]"),
    Break("lavit-gaze-top-ignored", "crystal/methods/lavit.py", """, self.settings.gaze_top)""", """, 8)""",
          "--gaze_top would do nothing.", f"{ROW}[lavit-gaze_top=3-step=1]"),
    Break("lavit-gaze-is-no-distribution", "crystal/methods/lavit.py", """return kept / kept.sum()""", """return kept / kept.max()""",
          "The teacher's gaze would not sum to 1.", f"{ROW}[lavit-gaze_top=3-step=1]"),
    Break("lavit-gaze-aligned-by-corners", "crystal/methods/lavit.py", """mode="bilinear", align_corners=False""", """mode="bilinear", align_corners=True""",
          "A teacher's grid would be drawn out wrongly.", f"{ROW}[lavit-gaze_top=99-step=1]"),
    Break("lavit-gaze-transposed", "crystal/methods/lavit.py", """part.view(1, 1, *grid)""", """part.view(1, 1, *grid[::-1])""",
          "Rows and columns of the teacher's grid would be exchanged.", f"{ROW}[lavit-gaze_top=99-step=1]"),
    Break("lavit-semantics-dim-ignored", "crystal/methods/lavit.py", """nn.Linear(D, self.settings.semantics_dim or D)""", """nn.Linear(D, D)""",
          "A teacher of another size could not be used.", f"{ROW}[lavit-data=wide.jsonl-semantics_dim=20-step=1]"),
    Break("lavit-head-without-seed", "crystal/methods/lavit.py", """torch.manual_seed(self.settings.seed)""", """torch.manual_seed(0)""",
          "Runs of several seeds would share their first head.", "tests/test_lavit.py::test_first_head_is_a_function_of_the_seed"),
    Break("lavit-head-relu", "crystal/methods/lavit.py", """nn.Linear(D, D), nn.GELU()""", """nn.Linear(D, D), nn.SiLU()""",
          "phi of eq. 6 would be another function.", f"{ROW}[lavit-step=1-one-pair]"),
    Break("lavit-extras-of-no-gaze", "crystal/methods/lavit.py", """["gaze", "gaze_grid"] * bool(s.w_gaze)""", """["gaze", "gaze_grid"] * bool(s.w_semantics)""",
          "Without semantics there would be no gaze to learn.", f"{ROW}[lavit-w_semantics=0.0-step=1]"),
    Break("lavit-default-lambda", "crystal/methods/lavit.py", """w_gaze: float = setting(0.3""", """w_gaze: float = setting(0.1""",
          "lambda of eq. 9 would not be the paper's.", f"{ROW}[lavit-own-defaults-step=100]"),
    Break("lavit-mass-without-gate", "crystal/methods/lavit.py", """mass_tap(model, batch, biases)""", """mass_tap(model, batch)""",
          "The logged mass would not be that of the gated model.", f"{ROW}[lavit-gate=cosine-step=3]"),
    Break("lavit-tokens-twice", "crystal/methods/lavit.py", """[TAGS[2], *dict""", """[TAGS[3], *dict""",
          "<answer> would be no token of its own.", f"{ROW}[lavit-step=1-one-pair]"),

    # methods/valr.py
    Break("valr-weight-ignored", "crystal/methods/valr.py", """return {"repa": self.w_repa}""", """return {}""",
          "--w_repa would do nothing.", f"{ROW}[valr-step=4]"),
    Break("valr-closing-tag-is-a-label", "crystal/methods/valr.py", """set(range(first, first + self.count + 1))""", """set(range(first, first + self.count))""",
          "</latent>, which is forced, would be learned.", f"{ROW}[valr-step=4]"),
    Break("valr-opening-tag-is-no-label", "crystal/methods/valr.py", """set(range(first, first + self.count + 1))""", """set(range(first - 1, first + self.count + 1))""",
          "The model would not learn to begin latents.", f"{ROW}[valr-step=4]"),
    Break("valr-step-without-its-end", "crystal/methods/valr.py", """self.text(step + "\\n")""", """self.text(step)""",
          "Steps would run into one another.", f"{ROW}[valr-step=3]"),
    Break("valr-latents-in-stage-1", "crystal/methods/valr.py", """latents=stage != 0)""", """latents=True)""",
          "The first stage would have latents that it does not feed.", f"{ROW}[valr-step=3]"),
    Break("valr-default-layer", "crystal/methods/valr.py", """round(12 / 28 * len(model.layers))""", """round(14 / 28 * len(model.layers))""",
          "The latents would be aligned behind another layer.", "tests/test_valr.py::test_the_papers_layers"),
    Break("valr-layer-ignored", "crystal/methods/valr.py", """self.layer = s.align_layer or""", """self.layer =""",
          "--align_layer would do nothing.", f"{ROW}[valr-align_layer=3-step=4]"),
    Break("valr-own-features-of-another-record", "crystal/methods/valr.py", """return own[0].split((batch["mm_token_type_ids"] == 1).sum(1).tolist())""", """return own[0].flip(0).split((batch["mm_token_type_ids"] == 1).sum(1).tolist())""",
          "Latents would be aligned to other patches.", f"{ROW}[valr-step=4]"),
    Break("valr-own-features-move", "crystal/methods/valr.py", """x[image[:, : x.shape[1]]].detach()""", """x[image[:, : x.shape[1]]]""",
          "The vision tower would be pulled to the latents.", f"{ROW}[valr-lora_on=language,vision-step=4]"),
    Break("valr-padded-features-count", "crystal/methods/valr.py", """[F[:n] for F, n in""", """[F for F, n in""",
          "A record's alignment would depend on its batch.", f"{ROW}[valr-encoders=features:x:7-step=4]"),
    Break("valr-sum-over-encoders", "crystal/methods/valr.py", """{"repa": torch.stack(aligned).mean()}""", """{"repa": torch.stack(aligned).sum()}""",
          "The alignment would grow with the number of encoders.", f"{ROW}[valr-encoders=features:x:7,own,features:wide:9-latents=2-step=4]"),
    Break("valr-updates-ignored", "crystal/methods/valr.py", """fed, self.settings.updates, (self.layer,))""", """fed, None, (self.layer,))""",
          "--updates would do nothing.", f"{ROW}[valr-updates=1-step=4]"),
    Break("valr-first-image-alone", "crystal/methods/valr.py", """return torch.cat(F).float()""", """return F[0].float()""",
          "Of several images the first alone would be seen.", f"{ROW}[valr-encoders=features:x:7-step=4]"),
    Break("valr-projections-alike", "crystal/methods/valr.py", """torch.manual_seed(data.seed_of(s.seed, m))""", """torch.manual_seed(s.seed)""",
          "The projections of all encoders would begin alike.", "tests/test_valr.py::test_first_projections_are_a_function_of_the_seed_and_of_their_place"),
    Break("valr-projection-relu", "crystal/methods/valr.py", """nn.Linear(D, D), nn.SiLU()""", """nn.Linear(D, D), nn.ReLU()""",
          "psi would be another function.", f"{ROW}[valr-step=4]"),
    Break("valr-stage-rates", "crystal/methods/valr.py", """1 - self.first_share, self.lr_latents)""", """1 - self.first_share, self.lr)""",
          "--lr_latents would do nothing.", "tests/test_valr.py::test_defaults_and_stages_are_the_papers"),
    Break("valr-share-of-stage-1", "crystal/methods/valr.py", """first_share: float = setting(0.5""", """first_share: float = setting(0.6""",
          "The stages would have other lengths.", f"{ROW}[valr-own-defaults-step=2000-one-pair]"),
    Break("valr-projections-without-gradient", "crystal/methods/valr.py", """cross_entropy(model, batch) + 0 * sum(p.sum() for p in self.projections.parameters())""", """cross_entropy(model, batch)""",
          "Processes would wait for gradients that never come.", f"{ROW}[valr-step=3]"),
    Break("valr-look-at-unfed-latents", "crystal/methods/valr.py", """with feedback.filled(model, h, fed):""", """with feedback.filled(model, h, ~fed & fed):""",
          "Evaluation would look at a model whose latents are padding.", "tests/test_valr.py::test_what_looks_at_attention_sees_the_recurrence"),

    # methods/__init__.py
    Break("methods-tokens-not-added", "crystal/methods/__init__.py", """prepare(model, settings, method.tokens)""", """prepare(model, settings)""",
          "The latents would be no tokens of the model.", f"{ROW}[crystal]"),
    Break("methods-path-stays-relative", "crystal/methods/__init__.py", """settings.method = str(Path(settings.method).resolve())""", """settings.method = str(Path(settings.method))""",
          "A run of one's own method would open from one folder alone.", "tests/test_config.py::test_a_file_of_ones_own_has_settings_of_its_own"),
    Break("methods-run-twice", "crystal/methods/__init__.py", """if key not in sys.modules:""", """if True:""",
          "A method's file would have two classes of one name.", "tests/test_config.py::test_a_file_of_ones_own_has_settings_of_its_own"),
    Break("methods-other-settings-pass", "crystal/methods/__init__.py", """saved.keys() ^ {f.name""", """{f.name for f in fields(kind)} - saved.keys() - {f.name""",
          "A run of another version would open with settings that it never had.", "tests/test_config.py::test_every_field_has_help_and_round_trips"),

    # layout.py
    Break("layout-labels-begin-late", "crystal/layout.py", """if start - 1 <= t < len(ids) - 1""", """if start <= t < len(ids) - 1""",
          "The first token that is said would not be learned.", f"{ROW}[sft]"),
    Break("layout-rows-of-the-answer-itself", "crystal/layout.py", """rows=list(range(start - 1, len(ids) - 1))""", """rows=list(range(start, len(ids)))""",
          "LaViT's gate would let the first prediction pass.", f"{ROW}[lavit-gate=hard]"),
    Break("layout-answer-rows-begin-late", "crystal/layout.py", """(answer_start, len(ids)), list(range(answer_start, len(ids) - 1)))""", """(answer_start, len(ids)), list(range(answer_start + 1, len(ids) - 1)))""",
          "A one-token answer would lose the prediction of that token.", f"{ROW}[crystal-one-pair]"),
    Break("layout-labels-answer-from-its-tag", "crystal/layout.py", """first = start if labels == "all" else answer_start + 1""", """first = start if labels == "all" else answer_start""",
          "--labels answer would label <answer> too.", f"{ROW}[crystal-labels=answer]"),
    Break("layout-steps-run-together", "crystal/layout.py", """words = " ".join(steps)""", """words = "".join(steps)""",
          "A record's steps would have no space between them.", f"{ROW}[crystal-thought=cot]"),
    Break("layout-fixed-thought", "crystal/layout.py", """THOUGHT = "Because the feature of the image is\"""", """THOUGHT = "Because the features of the image are\"""",
          "The thought would not be the released code's.", f"{ROW}[crystal-one-pair]"),
    Break("layout-line-break-after-image", "crystal/layout.py", """text.replace("<image>\\n", "<image>").split""", """text.split""",
          "Prompts would differ from the template's.", f"{ROW}[sft]"),
    Break("layout-image-positions-shifted", "crystal/layout.py", """image += range(len(ids), len(ids) + n)""", """image += range(len(ids) + 1, len(ids) + n + 1)""",
          "Masks and gaze would look beside the image.", f"{ROW}[lavit-gate=hard]"),
    Break("layout-latents-shifted", "crystal/layout.py", """(start, answer_start), [start + i for i in offsets],""", """(start, answer_start), [start + i + 1 for i in offsets],""",
          "The copy would miss the first latent.", f"{ROW}[crystal-one-pair]"),
    Break("layout-thought-without-its-tag", "crystal/layout.py", """image, (start, answer_start), [start""", """image, (start + 1, answer_start), [start""",
          "`released` would not copy <think>.", f"{ROW}[crystal-preset=released-one-pair]"),
    Break("layout-answer-span-without-its-tag", "crystal/layout.py", """(answer_start, len(ids)), list(range(answer_start""", """(answer_start + 1, len(ids)), list(range(answer_start""",
          "`released` would not read <answer>.", f"{ROW}[crystal-preset=released-one-pair]"),
    Break("layout-identical-latents-differ", "crystal/layout.py", """{i if kind == 'diverse' else 0}""", """{i}""",
          "--latent_kind identical would do nothing.", f"{ROW}[crystal-latents=5-latent_kind=identical]"),
    Break("layout-a-users-tokens-are-special", "crystal/layout.py", """split_special_tokens=True""", """split_special_tokens=False""",
          "A user could write <|im_end|> and speak as somebody else.", "tests/test_layout.py::test_special_tokens_typed_by_a_user_stay_text"),
    Break("layout-copies-ignored", "crystal/layout.py", """[{"type": "image"}] * self.copies""", """[{"type": "image"}]""",
          "An image that should stand twice would stand once.", f"{ROW}[livr-image_copies=2]"),
    Break("layout-no-space-after-latents", "crystal/layout.py", """self.tokenizer.encode(". ",""", """self.tokenizer.encode(".",""",
          "The thought would end in another way than the released one.", f"{ROW}[crystal-one-pair]"),
    Break("layout-drop-keeps-the-latents", "crystal/layout.py", """latents = [] if drop else self.latents""", """latents = self.latents""",
          "Dropping the latents at evaluation would drop nothing.", "tests/test_layout.py::test_prompts_to_generate_from"),
    Break("layout-exported-prompt", "crystal/layout.py", """{latents}. {TAGS[1]}{TAGS[2]}""", """{latents}. {TAGS[1]} {TAGS[2]}""",
          "An exported model would be asked in another way than it was trained.", "tests/test_layout.py::test_the_exported_template_asks_as_training_does"),
    Break("layout-exported-prompt-of-cot", "crystal/layout.py", """            prompt = TAGS[0]
""", """            prompt = TAGS[0] + " "
""",
          "A model that writes its own thought would be asked in another way than it was trained.", "tests/test_layout.py::test_the_exported_template_asks_as_training_does"),

    # latent_copy.py
    Break("latent_copy-no-gradient", "crystal/latent_copy.py", """torch.where(mask, x_int, x_cor)""", """torch.where(mask, x_int.detach(), x_cor)""",
          "Nothing would crystallise: the corrupted path's losses would not reach the intact latents.", f"{ROW}[crystal]"),
    Break("latent_copy-values-not-copied", "crystal/latent_copy.py", """return _share(k, mask), _share(v, mask)""", """return _share(k, mask), v""",
          "The corrupted path would look at intact latents and read its own.", f"{ROW}[crystal]"),
    Break("latent_copy-states-not-copied", "crystal/latent_copy.py", """return _share(h, self.copied[:, :, None])""", """return h""",
          "The literal realisation would copy nothing.", f"{ROW}[crystal-realisation=hidden-copied=latents-attn_columns=all-attn_layers=all]"),
    Break("latent_copy-paths-exchanged", "crystal/latent_copy.py", """torch.cat([batch["pixel_values"], batch["pixel_values_cor"]])""", """torch.cat([batch["pixel_values_cor"], batch["pixel_values"]])""",
          "The corrupted image would teach the intact one.", f"{ROW}[crystal]"),
    Break("latent_copy-packed-paths-exchanged", "crystal/latent_copy.py", """zip(batch["pixel_values_cor"].split(patches), batch["pixel_values"].split(patches))""", """zip(batch["pixel_values"].split(patches), batch["pixel_values_cor"].split(patches))""",
          "The packed paths would be exchanged.", f"{ROW}[crystal-tune=rows-realisation=packed]"),
    Break("latent_copy-packed-own-rows", "crystal/latent_copy.py", """torch.where(copied, at_int, at_cor)""", """at_cor""",
          "The corrupted path's latents would be read at the start.", f"{ROW}[crystal-realisation=packed-copied=thought-attn_columns=thought-attn_layers=0,2]"),
    Break("latent_copy-packed-answer-sees-the-intact-image", "crystal/latent_copy.py", """(part == 2) & ~lent | (part == 3)""", """(part == 3)""",
          "The corrupted answer would see the intact image.", f"{ROW}[crystal-tune=rows-realisation=packed]"),
    Break("latent_copy-packed-intact-answer-sees-the-corrupted-image", "crystal/latent_copy.py", """Bias((part == 2) | (part == 3), part == 1)""", """Bias(part == 2, part == 1)""",
          "The intact answer would see both images.", f"{ROW}[crystal-tune=rows-realisation=packed]"),
    Break("latent_copy-packed-images-of-others", "crystal/latent_copy.py", """torch.searchsorted(image.sum(1).cumsum(0), ends)""", """torch.searchsorted(image.sum(1).cumsum(0), ends, right=True).clamp(max=len(image) - 1)""",
          "A pair's last image would be the next pair's.", f"{ROW}[crystal-tune=rows-realisation=packed]"),
    Break("latent_copy-packed-slices-of-one-path", "crystal/latent_copy.py", """return torch.cat([take(self.at_int), take(self.at_cor)])""", """return torch.cat([take(self.at_int), take(self.at_int)])""",
          "Both paths would be the intact one.", f"{ROW}[crystal-tune=rows-realisation=packed]"),
    Break("latent_copy-packed-runs", "crystal/latent_copy.py", """not in (0, end - start)""", """not in (0, end - start, 2)""",
          "Copied rows with a gap would be packed wrongly.", "tests/test_latent_copy.py::test_packed_refuses_copied_rows_that_are_not_one_run"),
    Break("latent_copy-unknown-realisation", "crystal/latent_copy.py", """if realisation not in ("hidden", "kv"):""", """if not realisation:""",
          "A mistyped realisation would copy nothing.", "tests/test_latent_copy.py::test_unknown_realisation"),

    # losses.py
    Break("losses-kl-turned-round", "crystal/losses.py", """return _kl(_wide(logits_int).log_softmax(-1), _wide(logits_cor).log_softmax(-1))""", """return _kl(_wide(logits_cor).log_softmax(-1), _wide(logits_int).log_softmax(-1))""",
          "Eq. 4 would be KL(cor || int).", f"{PLAIN}[crystal]"),
    Break("losses-teacher-moves", "crystal/losses.py", """teacher = logits_int if teacher_grad else logits_int.detach()""", """teacher = logits_int""",
          "Without the compiled operator KL would move the teacher.", f"{PLAIN}[crystal]"),
    Break("losses-teacher-attention-moves", "crystal/losses.py", """X_int if teacher_grad else X_int.detach()""", """X_int""",
          "Without the compiled operator eq. 5 would move the teacher.", f"{PLAIN}[crystal]"),
    Break("losses-mse-over-heads-alone", "crystal/losses.py", """return (H * (rows >= 0).sum(1) * (cols >= 0).sum(1))""", """return (H * (rows >= 0).sum(1) * cols.shape[1])""",
          "Padded columns would count.", f"{PLAIN}[crystal-attn_loss=frobenius-attn_layers=0,1-attn_columns=all-answer_rows=span] tests/test_losses.py::test_attention_losses"),
    Break("losses-frobenius-mean-over-heads", "crystal/losses.py", """.square().sum((1, 2, 3))""", """.square().sum((2, 3)).mean(1)""",
          "Eq. 5 would not be the norm as printed.", f"{PLAIN}[crystal-attn_loss=frobenius-attn_layers=0,1-attn_columns=all-answer_rows=span]"),
    Break("losses-attention-kl-turned-round", "crystal/losses.py", """return mean_rows(_kl(log_p, log_q), rows)""", """return mean_rows(_kl(log_q, log_p), rows)""",
          "Eq. 5 would be KL(cor || int).", f"{PLAIN}[crystal]"),
    Break("losses-heads-mean-after-comparing", "crystal/losses.py", """(_log_share(_wide(A).mean(1), cols)""", """(_log_share(_wide(A)[:, 0], cols)""",
          "The released attention loss would compare one head.", f"{PLAIN}[crystal-teacher_grad=True-attn_heads=mean]"),
    Break("losses-mean-of-rows-not-of-heads", "crystal/losses.py", """(values.shape[1] * valid.sum(1)).clamp(min=1)""", """valid.sum(1).clamp(min=1)""",
          "The attention loss would grow with the number of heads.", f"{PLAIN}[crystal]"),
    Break("losses-pair-means-over-all", "crystal/losses.py", """own.sum() / max(1, len(own))""", """own.sum() / max(1, len(values) / pairs)""",
          "Long answers would count more.", f"{ROW}[sft]"),
    Break("losses-share-rounded-up", "crystal/losses.py", """math.floor(share * len(own) + 1e-9)""", """math.ceil(share * len(own) + 1e-9)""",
          "The released KL would keep a row too many.", f"{ROW}[crystal-kl_share=0.3]"),
    Break("losses-share-below-its-decimals", "crystal/losses.py", """share * len(own) + 1e-9""", """share * len(own)""",
          "A share of 0.29 of 100 rows would be 28.", "tests/test_losses.py::test_mean_per_pair"),
    Break("losses-smallest-kept", "crystal/losses.py", """len(own) + 1e-9))).values""", """len(own) + 1e-9)), largest=False).values""",
          "The released KL would keep the rows that agree.", f"{ROW}[crystal-kl_share=0.3]"),
    Break("losses-total-without-a-weight", "crystal/losses.py", """sum(weights[name] * term""", """sum(weights.get(name, 0.0) * term""",
          "A term without a weight would drop out unseen.", "tests/test_losses.py::test_a_term_without_a_weight_is_an_error"),
    Break("losses-upsampled-by-corners", "crystal/losses.py", """mode="linear", align_corners=False""", """mode="linear", align_corners=True""",
          "Latents would be aligned to other patches.", f"{ROW}[valr-step=4]"),
    Break("losses-alignment-repels", "crystal/losses.py", """return -torch.nn.functional.cosine_similarity(""", """return torch.nn.functional.cosine_similarity(""",
          "Latents would learn to differ from what the encoder sees.", f"{ROW}[valr-step=4]"),
    Break("losses-semantics-repel", "crystal/losses.py", """return 1 - torch.nn.functional.cosine_similarity(_wide(predicted)""", """return 1 + torch.nn.functional.cosine_similarity(_wide(predicted)""",
          "The last latent would learn the teacher's opposite.", f"{ROW}[lavit-step=1-one-pair]"),
    Break("losses-gaze-mean-over-latents", "crystal/losses.py", """return kl.sum(1).masked_fill(~p""", """return kl.mean(1).masked_fill(~p""",
          "Eq. 7 sums over the latents.", f"{ROW}[lavit-step=1-one-pair]"),
    Break("losses-gaze-of-nothing", "crystal/losses.py", """kl.sum(1).masked_fill(~p.any(-1), 0.0)""", """kl.sum(1)""",
          "A teacher who looked nowhere would teach something.", "tests/test_lavit.py::test_loss_functions"),
    Break("losses-textbook-kl", "crystal/losses.py", """(p * (log_p - log_q) - p + q).sum(-1)""", """(p * (log_p - log_q)).sum(-1)""",
          "Equal paths would have a gradient of round-off.", "tests/test_losses.py::test_equal_paths"),

    # attention.py
    Break("attention-scale-ignored", "crystal/attention.py", """(q * (d**-0.5 if scale is None else scale))""", """(q * d**-0.5)""",
          "A model with another scale would be read wrongly.", "tests/test_attention.py::test_values"),
    Break("attention-sees-itself-not", "crystal/attention.py", """hidden = (cols[:, None, :] > rows[:, :, None])""", """hidden = (cols[:, None, :] >= rows[:, :, None])""",
          "A row would not see itself.", f"{PLAIN}[crystal]"),
    Break("attention-normalised-over-the-columns", "crystal/attention.py", """norm = attn_lse(q, k, rows, scale=scale, bias=bias, key_padding=key_padding)""", """norm = scores.logsumexp(-1)""",
          "The weights would not be those of attention.", f"{PLAIN}[crystal]"),
    Break("attention-normaliser-without-gradient", "crystal/attention.py", """return (scores - norm.masked_fill(blind, 0.0)[..., None]).exp()""", """return (scores - norm.detach().masked_fill(blind, 0.0)[..., None]).exp()""",
          "Eq. 5's gradient would miss the keys that are no columns.", f"{PLAIN}[crystal-attn_loss=frobenius-attn_layers=0,1-attn_columns=all-answer_rows=span]"),
    Break("attention-bias-lost", "crystal/attention.py", """scores, hidden = scores + bias.to(dtype), hidden | bias.isneginf()""", """scores, hidden = scores, hidden | bias.isneginf()""",
          "The slice would not be that of gated attention.", f"{PLAIN}[lavit-gate=cosine-step=3]"),
    Break("attention-bias-blocks-not", "crystal/attention.py", """hidden | bias.isneginf()""", """hidden""",
          "A blocked key would have a gradient.", "tests/test_attention.py::test_scores_of_blocked_keys_have_no_gradient"),
    Break("attention-tap-of-every-layer", "crystal/attention.py", """if layer not in self.layers:""", """if layer in ():""",
          "The mean of eq. 5 would run over all layers.", f"{ROW}[crystal]"),
    Break("attention-tap-without-bias", "crystal/attention.py", """scale=scale, bias=self.bias, key_padding=self.key_padding)\n        # Checkpointing""", """scale=scale, key_padding=self.key_padding)\n        # Checkpointing""",
          "The slice would not be that of gated attention.", f"{ROW}[lavit-gate=cosine-step=3]"),
    Break("attention-tap-keeps-the-second-run", "crystal/attention.py", """self._slices.setdefault(layer, values)""", """self._slices[layer] = values""",
          "Under checkpointing the loss would hang on a graph that is gone.", "tests/test_attention.py::test_tap_under_checkpointing"),
    Break("attention-not-causal-under-a-mask", "crystal/attention.py", """is_causal=mask is None and causal""", """is_causal=mask is None""",
          "A token after the prompt would see one key.", "tests/test_attention.py::test_attend"),
    Break("attention-attend-without-scale", "crystal/attention.py", """is_causal=mask is None and causal, scale=scale,""", """is_causal=mask is None and causal,""",
          "A model with another scale would compute another attention.", "tests/test_attention.py::test_attend"),
    Break("attention-key-heads-shared-wrongly", "crystal/attention.py", """q = _take(q, rows).to(dtype).reshape(B, G, H // G * M, d)""", """q = _take(q, rows).to(dtype).reshape(B, H // G, G, M, d).transpose(1, 2).reshape(B, G, H // G * M, d)""",
          "Query heads would read other key heads.", f"{PLAIN}[crystal]"),

    # bottleneck.py
    Break("bottleneck-last-bias-wins", "crystal/bottleneck.py", """added = value if added is None else added + value""", """added = value""",
          "The logged mass would know one bias alone.", "tests/test_bottleneck.py::test_biases_of_chosen_rows_are_the_masks"),
    Break("bottleneck-queries-and-keys-exchanged", "crystal/bottleneck.py", """cells = bias.queries[:, :, None] & bias.keys[:, None, :]""", """cells = bias.keys[:, :, None] & bias.queries[:, None, :]""",
          "The image could not see the question, instead of the other way round.", f"{ROW}[livr-mask=prompt-latents_see=all-place=after]"),
    Break("bottleneck-padding-seen", "crystal/bottleneck.py", """.tril() & attention_mask.bool()[:, None, :]""", """.tril() & torch.ones_like(attention_mask).bool()[:, None, :]""",
          "Left padding would be looked at.", "tests/test_bottleneck.py::test_mask_is_causal_padded_and_biased"),
    Break("bottleneck-future-seen", "crystal/bottleneck.py", """device=device).tril() &""", """device=device).tril(1) &""",
          "Under a mask every token would see the next one.", f"{ROW}[livr-mask=prompt-latents_see=all-place=after]"),
    Break("bottleneck-empty-row", "crystal/bottleneck.py", """mask = mask.masked_fill(empty[:, :, None] & torch""", """mask = mask.masked_fill(~empty[:, :, None] & torch""",
          "A row that sees nothing would be NaN.", "tests/test_bottleneck.py::test_a_row_that_would_see_nothing_sees_itself"),
    Break("bottleneck-value-ignored", "crystal/bottleneck.py", """torch.where(cells, torch.as_tensor(bias.value, dtype=dtype, device=device)""", """torch.where(cells, torch.as_tensor(float("-inf"), dtype=dtype, device=device)""",
          "LaViT's gate would be shut until it is open.", f"{ROW}[lavit-gate=cosine-step=3]"),
    Break("bottleneck-rows-of-padding", "crystal/bottleneck.py", """bias.queries.gather(1, at)[:, None, :, None] & bias.keys""", """bias.queries.gather(1, at)[:, None, :, None] | bias.keys""",
          "The logged mass would be that of another mask.", f"{ROW}[livr-mask=prompt-latents_see=all-place=after]"),

    # feedback.py
    Break("feedback-cache-detached", "crystal/feedback.py", """k_past, v_past = self.past.held[layer]""", """k_past, v_past = (x.detach() for x in self.past.held[layer])""",
          "Gradients would not reach what stands before a latent.", f"{ROW}[valr-step=4]"),
    Break("feedback-padding-seen", "crystal/feedback.py", """self.valid[:, None, :].expand(-1, n, -1), own], 2)""", """self.valid[:, None, :].expand(-1, n, -1) | True, own], 2)""",
          "A short record would see the padding of its batch.", f"{ROW}[valr-step=4]"),
    Break("feedback-piece-not-causal", "crystal/feedback.py", """device=valid.device).tril() & valid[:, None, :]""", """device=valid.device) & valid[:, None, :]""",
          "A latent's piece would see its own future.", f"{ROW}[valr-step=4]"),
    Break("feedback-state-of-the-longest", "crystal/feedback.py", """fed = h.gather(1, (lengths[:, r] - 1).clamp(min=0)[:, None, None]""", """fed = h.gather(1, (lengths[:, r] * 0 + h.shape[1] - 1)[:, None, None]""",
          "A short record would be fed a state of padding.", f"{ROW}[valr-step=4]"),
    Break("feedback-one-update-less", "crystal/feedback.py", """for _ in range(updates + 1):""", """for _ in range(max(1, updates)):""",
          "T updates would be T - 1.", f"{ROW}[valr-updates=1-step=4]"),
    Break("feedback-own-state-fed", "crystal/feedback.py", """guess = torch.cat([before, h[:, :-1]], 1)""", """guess = h""",
          "A latent would be fed its own state and not the one before it.", f"{ROW}[valr-updates=1-step=4]"),
    Break("feedback-layers-from-0", "crystal/feedback.py", """self.model.layers[i - 1].register_forward_hook""", """self.model.layers[i % len(self.model.layers)].register_forward_hook""",
          "Latents would be aligned a layer later.", f"{ROW}[valr-step=4]"),
    Break("feedback-filled-with-itself", "crystal/feedback.py", """before = torch.cat([h[:, :1], h[:, :-1]], 1)""", """before = h""",
          "Whoever looks at attention would see other latents.", "tests/test_feedback.py::test_one_pass_over_filled_inputs_leaves_the_same_states"),
    Break("feedback-latent-at-the-start", "crystal/feedback.py", """(place == 0) | (place >= ends[:, None])""", """(place >= ends[:, None])""",
          "A latent without a token before it would be fed anything.", "tests/test_feedback.py::test_misplaced_latents_are_refused"),
    Break("feedback-images-behind-latents", "crystal/feedback.py", """& (latents.cumsum(1) > 0)).any()""", """& (latents.cumsum(1) > 9)).any()""",
          "An image after a latent would be lost.", "tests/test_feedback.py::test_misplaced_latents_are_refused"),
    Break("feedback-positions-of-the-piece", "crystal/feedback.py", """return positions.gather(2, at.expand(3, -1, -1))""", """return positions.gather(2, (at - at[:, :1]).expand(3, -1, -1).clamp(min=0))""",
          "Every piece would begin at position 0.", f"{ROW}[valr-step=4]"),
]

# ---- settings: config, model, adapters, families, encoders ------------------------------------------------------------

SETTINGS = [
]

# ---- commands and data preparation ------------------------------------------------------------------------------------

COMMANDS = [
]

# ---- the loop: train, checkpoint, processes ---------------------------------------------------------------------------

LOOP = [
]

# ---- data and corruption ----------------------------------------------------------------------------------------------

DATA = [
    Break("data-image-root-ignored", "crystal/data.py", "Path(image_root) if image_root else path.parent",
          "path.parent", "--image_root would be ignored.",
          "tests/test_data_by_hand.py::test_the_same_twelve_elsewhere"),
    Break("data-first-keeps-all", "crystal/data.py", 'if keep == "all" or answers == 1:', "if True:",
          "--turns first would keep all answers.",
          "tests/test_data_by_hand.py::test_first_turns_of_the_twelve"),
    Break("data-all-keeps-first", "crystal/data.py", 'if keep == "all" or answers == 1:', "if answers == 1:",
          "--turns all would keep the first answer alone.",
          "tests/test_data_by_hand.py::test_all_turns_of_the_twelve"),
    Break("data-context-is-an-answer", "crystal/data.py", "continue  # the image comes later",
          "pass  # the image comes later", "An answer before any image would be the one that is learned.",
          "tests/test_data_by_hand.py::test_first_turns_of_the_twelve"),
    Break("data-later-images-too", "crystal/data.py", "said.strip(), images[:seen]", "said.strip(), images",
          "A first answer would come with the images of later turns.",
          "tests/test_data_by_hand.py::test_first_turns_of_the_twelve"),
    Break("data-answer-not-stripped", "crystal/data.py", "before, said.strip(),", "before, said,",
          "Line ends around an answer would be learned.",
          "tests/test_data_by_hand.py::test_all_turns_of_the_twelve"),
    Break("data-dropped-turns-uncounted", "crystal/data.py", "return records, answers - len(records)",
          "return records, 0", "Turns would be left out without a word.",
          "tests/test_data_by_hand.py::test_first_turns_of_the_twelve"),
    Break("data-lines-from-0", "crystal/data.py", 'enumerate(text.split("\\n"), 1)',
          'enumerate(text.split("\\n"))', "Messages would name the line before the broken one.",
          "tests/test_data_by_hand.py::test_all_turns_of_the_twelve"),
    Break("data-bare-parts-dropped", "crystal/data.py", "if isinstance(p, dict) else p) for p",
          'if isinstance(p, dict) else "") for p', "A content part that is a plain string would vanish.",
          "tests/test_data_by_hand.py::test_all_turns_of_the_twelve"),
    Break("data-image-url-is-text", "crystal/data.py", '.startswith("image") else', '== "image" else',
          "OpenAI's image_url parts would be no images.",
          "tests/test_data_by_hand.py::test_all_turns_of_the_twelve"),
    Break("data-images-before-the-system", "crystal/data.py", 'if role == "user"), None)', "if role), None)",
          "Images without markers would go into the system turn.",
          "tests/test_data_by_hand.py::test_all_turns_of_the_twelve"),
    Break("data-images-after-the-question", "crystal/data.py",
          '"<image>\\n" * len(paths) + turns[first_user][1]',
          'turns[first_user][1] + "\\n<image>" * len(paths)',
          "Images without markers would stand after the question.",
          "tests/test_data_by_hand.py::test_all_turns_of_the_twelve"),
    Break("data-image-beats-images", "crystal/data.py", 'item.get("images", item.get("image"))',
          'item.get("image", item.get("images"))', "Of both keys the wrong one would be read.",
          "tests/test_data_by_hand.py::test_every_speaker_and_both_keys"),
    Break("data-cot-lost", "crystal/data.py", "images[:seen], cot, boxes", "images[:seen], [], boxes",
          "--thought cot would train without a thought.",
          "tests/test_data_by_hand.py::test_all_turns_of_the_twelve"),
    Break("data-id-is-the-place", "crystal/data.py", 'str(item.get("id", where))', "where",
          "Features would never be found, results have no ids.",
          "tests/test_data_by_hand.py::test_all_turns_of_the_twelve"),
    Break("data-marker-of-the-system", "crystal/data.py", 'if ROLES[who] != "user" and',
          'if ROLES[who] == "assistant" and', "An image could stand in the system turn.",
          "tests/test_data_by_hand.py::test_every_speaker_and_both_keys"),
    Break("data-answer-after-an-answer", "crystal/data.py", 'if not before or before[-1][0] != "user":',
          "if not before:", "An answer to no question would be learned.",
          "tests/test_data_by_hand.py::test_every_speaker_and_both_keys"),
    Break("data-leaves-the-root", "crystal/data.py", "if not full.is_relative_to(root):", "if False:",
          "A record could read any file of the machine.",
          "tests/test_data.py::test_broken_records_name_file_line_and_field"),
    Break("data-features-of-longer-ids", "crystal/data.py", 'f"{record.id}/"', 'f"{record.id}"',
          "Record 1 would get the features of record 12.",
          "tests/test_data_by_hand.py::test_features_of_one_record_alone"),
    Break("data-check-elsewhere", "crystal/data.py", 'Path(root).resolve(), "first")',
          'Path().resolve(), "first")', "data_prep would look for images in the current folder.",
          "tests/test_data_by_hand.py::test_a_record_is_checked_without_being_kept"),
    Break("data-exif-ignored", "crystal/data.py", "image = ImageOps.exif_transpose(image)",
          "image = image.copy()", "Photographs would be trained on lying on their side.",
          "tests/test_data.py::test_a_picture_is_turned_as_its_exif_says"),
    Break("data-transparent-is-black", "crystal/data.py", "if not image.has_transparency_data:", "if True:",
          "Text drawn on a transparent ground would be black on black.",
          "tests/test_data.py::test_what_is_drawn_on_a_transparent_ground_is_seen"),
    Break("data-ground-is-black", "crystal/data.py", 'image.size, "white")', "image.size)",
          "Text drawn on a transparent ground would be black on black.",
          "tests/test_data.py::test_what_is_drawn_on_a_transparent_ground_is_seen"),
    Break("data-alpha-band-alone", "crystal/data.py", "if not image.has_transparency_data:",
          'if "A" not in image.getbands():', "Transparent entries of palettes and marked colours would show.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("data-alpha-all-or-nothing", "crystal/data.py", 'mask=image.getchannel("A"))',
          'mask=image.getchannel("A").point([0] + [255] * 255))', "Soft edges would be drawn hard.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("data-deep-grey-clipped", "crystal/data.py", '.startswith(("I", "F")):', '.startswith("F"):',
          "A 16-bit picture would become one white area.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("data-floats-clipped", "crystal/data.py", '.startswith(("I", "F")):', '.startswith("I"):',
          "A float picture would become one black area.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("data-deep-grey-cut", "crystal/data.py", "scaled.round(), 255",
          "scaled, 255", "Deep pictures would be darker by half a value.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("data-deep-dark-brightened", "crystal/data.py", ".get(image.mode, (65535,))",
          ".get(image.mode, (255, 65535))", "A dark 16-bit picture would be shown 257 times as bright.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("data-shares-are-bytes", "crystal/data.py", '"F": (1, 255, 65535)', '"F": (255, 65535)',
          "A float picture of 0 to 1 would be black.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("data-below-zero-fits", "crystal/data.py", "if low >= 0 and high <= end]", "if high <= end]",
          "Negative values would wrap around to bright ones.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("data-marked-grey-shows", "crystal/data.py",
          'opaque = values != image.info.get("transparency", np.nan)', "opaque = np.ones_like(values)",
          "The transparent value of a 16-bit PNG would show.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("data-holes-are-white", "crystal/data.py", "nan=0, posinf=255", "nan=255, posinf=255",
          "Where a depth map has no value it would be nearest.",
          "tests/test_data.py::test_a_picture_of_any_mode_shows_what_is_drawn"),
    Break("chat-pictures-of-its-own", "crystal/chat.py", "return rgb(image)", 'return image.convert("RGB")',
          "A request's picture would be read otherwise than in training.",
          "tests/test_data.py::test_the_server_sees_what_training_sees"),
    Break("visualize-pictures-of-its-own", "crystal/visualize.py", "image = data.rgb(image)",
          'image = image.convert("RGB")',
          "The corruptions' page would show another picture than training sees.",
          "tests/test_data.py::test_the_corruptions_pictures_begin_with_what_training_sees"),
    Break("ade20k_depth-deep-maps-clipped", "data_prep/ade20k_depth.py",
          "data.load_image(depth_path, depth_path)", "data.Image.open(depth_path)",
          "A 16-bit depth map would be flat, or have no answer.",
          "tests/test_ade20k_depth.py::test_a_depth_map_may_have_16_bits"),
    Break("data-skip-goes-back", "crystal/data.py", "(index + i) % len", "(index - i) % len",
          "Resumed with another version, other records would stand for broken ones.",
          "tests/test_data_by_hand.py::test_what_stands_for_a_broken_record"),
    Break("data-skip-ends-at-the-last", "crystal/data.py",
          "self.build((index + i) % len(self.records), epoch)",
          "self.build(min(index + i, len(self.records) - 1), epoch)",
          "A broken last record would end the run.",
          "tests/test_data_by_hand.py::test_the_first_stands_for_a_broken_last_one_and_nothing_for_all"),
    Break("data-skip-always", "crystal/data.py", "if not self.skip:", "if False:",
          "Validation would replace broken records without a word.",
          "tests/test_data_by_hand.py::test_the_first_stands_for_a_broken_last_one_and_nothing_for_all"),
    Break("data-skipped-untold", "crystal/data.py", 'return example | {"bad": bad}',
          'return example | {"bad": []}', "Broken records would be skipped without a word.",
          "tests/test_data_by_hand.py::test_what_stands_for_a_broken_record"),
    Break("data-copies-ignored", "crystal/data.py", "for image in images for _ in range(self.copies)]",
          "for image in images]", "--image_copies would have no effect on the pixels.",
          "tests/test_data_by_hand.py::test_intact_pixels"),
    Break("data-copies-in-rounds", "crystal/data.py",
          "[image for image in images for _ in range(self.copies)]", "images * self.copies",
          "With two images the second would stand where the first one's copy belongs.",
          "tests/test_data_by_hand.py::test_intact_pixels"),
    Break("data-corruption-forgets-seed", "crystal/data.py", "seed_of(self.seed, epoch, index, n)",
          "seed_of(0, epoch, index, n)",
          "Every --seed would have the same corruptions, validation training's.",
          "tests/test_data_by_hand.py::test_corruption_is_drawn_for_each_seed_epoch_record_and_image"),
    Break("data-corruption-forgets-epoch", "crystal/data.py", "seed_of(self.seed, epoch, index, n)",
          "seed_of(self.seed, 0, index, n)", "A record would be corrupted the same way in every epoch.",
          "tests/test_data_by_hand.py::test_corruption_is_drawn_for_each_seed_epoch_record_and_image"),
    Break("data-corruption-forgets-record", "crystal/data.py", "seed_of(self.seed, epoch, index, n)",
          "seed_of(self.seed, epoch, n)", "All records of an epoch would be corrupted the same way.",
          "tests/test_data_by_hand.py::test_corruption_is_drawn_for_each_seed_epoch_record_and_image"),
    Break("data-corruption-forgets-image", "crystal/data.py", "seed_of(self.seed, epoch, index, n)",
          "seed_of(self.seed, epoch, index, 0)", "All images of a record would be corrupted the same way.",
          "tests/test_data_by_hand.py::test_corruption_is_drawn_for_each_seed_epoch_record_and_image"),
    Break("data-strength-at-its-highest", "crystal/data.py",
          "strength = low + (high - low) * torch.rand((), generator=g).item()", "strength = high",
          "Every image would be corrupted at --strength_high.",
          "tests/test_data_by_hand.py::test_strengths_are_drawn_between_the_two_given"),
    Break("data-strength-from-zero", "crystal/data.py", "strength = low + (high - low) *",
          "strength = high *", "--strength_low would be ignored.",
          "tests/test_data_by_hand.py::test_strengths_are_drawn_between_the_two_given"),
    Break("data-always-blur", "crystal/data.py", "x = corrupt(x, mode, strength, g)",
          'x = corrupt(x, "blur", strength, g)', "--corruption would be ignored.",
          "tests/test_data_by_hand.py::test_corruption_is_drawn_for_each_seed_epoch_record_and_image"),
    Break("data-corrupted-bytes-cut", "crystal/data.py", "Image.fromarray((x * 255).round().byte()",
          "Image.fromarray((x * 255).byte()", "Corrupted images would be darker by half a value.",
          "tests/test_data_by_hand.py::test_a_photograph_is_blurred_as_scipy_does"),
    Break("data-corrupted-is-intact", "crystal/data.py", 'self.pixels(corrupted)["pixel_values"]',
          'self.pixels(images)["pixel_values"]', "Both paths would see the same image.",
          "tests/test_data_by_hand.py::test_both_copies_of_an_image_are_corrupted_alike"),
    Break("data-grey-is-black", "crystal/data.py", "image.size, (128, 128, 128)", "image.size, (0, 0, 0)",
          "The blind condition would show black, which models see in pictures.",
          "tests/test_data_by_hand.py::test_grey_is_128_at_the_images_size"),
    Break("data-grey-of-one-size", "crystal/data.py", "image.size, (128, 128, 128)",
          "images[0].size, (128, 128, 128)", "The blind condition would have another number of image tokens.",
          "tests/test_data_by_hand.py::test_grey_is_128_at_the_images_size"),
    Break("data-extras-without-pictures", "crystal/data.py", "self.extras(record, images) if",
          "self.extras(record, record.images) if", "A method's extras would get paths in place of pictures.",
          "tests/test_data_by_hand.py::test_intact_pixels"),
    Break("data-corrupted-path-without-image", "crystal/data.py", "if self.corruption and not images:",
          "if False:", "A text-only record would break inside the batch, without its line.",
          "tests/test_data.py::test_crystal_needs_an_image"),
    Break("data-refused-picture-untold", "crystal/data.py",
          'except ValueError as error:\n            raise RecordError(f"{record.where}',
          'except KeyError as error:\n            raise RecordError(f"{record.where}',
          "A picture that the processor refuses would end the run in a traceback.",
          "tests/test_data_by_hand.py::test_a_picture_that_the_processor_refuses_is_the_records_fault"),
    Break("data-pad-is-0", "crystal/data.py", "table([x.ids for x in layouts], pad, L)",
          "table([x.ids for x in layouts], 0, L)", "The pad token would be ignored.",
          "tests/test_data_by_hand.py::test_padding_by_hand"),
    Break("data-padding-is-a-label", "crystal/data.py", "[x.targets for x in layouts], IGNORE, L)",
          "[x.targets for x in layouts], pad, L)", "Padding would be learned.",
          "tests/test_data_by_hand.py::test_padding_by_hand"),
    Break("data-padding-is-seen", "crystal/data.py", "[[1] * len(x.ids) for x in layouts], 0, L)",
          "[[1] * len(x.ids) for x in layouts], 1, L)", "Padding would be attended to.",
          "tests/test_data_by_hand.py::test_padding_by_hand"),
    Break("data-row-0-is-padding", "crystal/data.py", "table([x.rows for x in layouts], -1)",
          "table([x.rows for x in layouts], 0)", "Row 0 would count as an answer row of shorter answers.",
          "tests/test_data_by_hand.py::test_padding_by_hand"),
    Break("data-pads-left", "crystal/data.py", "out[i, : len(x)] =", "out[i, out.shape[1] - len(x) :] =",
          "Every span would point beside its tokens.", "tests/test_data_by_hand.py::test_padding_by_hand"),
    Break("data-no-image-tokens", "crystal/data.py", '["mm_token_type_ids"][i, x.image] = 1',
          '["mm_token_type_ids"][i, x.latents] = 1', "Latents would get the positions of an image.",
          "tests/test_data_by_hand.py::test_padding_by_hand"),
    Break("data-pixels-turned-round", "crystal/data.py", "torch.cat(parts) if parts",
          "torch.cat(parts[::-1]) if parts", "Each question would get another one's image.",
          "tests/test_data_by_hand.py::test_padding_by_hand"),
    Break("data-extras-padded-with-ones", "crystal/data.py", "for e in examples], batch_first=True)",
          "for e in examples], batch_first=True, padding_value=1)",
          "A method's extras would have targets where there are none.",
          "tests/test_data_by_hand.py::test_padding_by_hand"),
    Break("data-bad-of-the-first", "crystal/data.py", '[line for e in examples for line in e["bad"]]',
          'examples[0]["bad"]', "Broken records would be skipped without a word.",
          "tests/test_data_by_hand.py::test_padding_by_hand"),
    Break("data-corrupted-pixels-keep-dtype", "crystal/data.py", 'if n.startswith("pixel_values") else',
          'if n == "pixel_values" else', "The corrupted path would end in a dtype error under bf16.",
          "tests/test_data_by_hand.py::test_only_pixels_take_the_weights_dtype"),
    Break("data-all-floats-cast", "crystal/data.py", 'if n.startswith("pixel_values") else',
          "if x.is_floating_point() else", "Extras would lose their precision under bf16.",
          "tests/test_data_by_hand.py::test_only_pixels_take_the_weights_dtype"),
    Break("data-loader-in-the-process", "crystal/data.py", "num_workers=workers,", "num_workers=0,",
          "--workers would be ignored.",
          "tests/test_data_by_hand.py::test_the_loader_pads_in_the_given_order_in_the_process_or_beside_it"),
    Break("data-loader-pads-with-0", "crystal/data.py", "lambda e: collate(e, pad)",
          "lambda e: collate(e, 0)", "The pad token would be ignored.",
          "tests/test_data_by_hand.py::test_the_loader_pads_in_the_given_order_in_the_process_or_beside_it"),
    Break("data-one-order-for-all-epochs", "crystal/data.py", "seed_of(self.seed, epoch))).tolist()",
          "seed_of(self.seed))).tolist()", "Every epoch would have the same order.",
          "tests/test_data_by_hand.py::test_two_seeds_are_two_orders_and_every_epoch_another"),
    Break("data-one-order-for-all-seeds", "crystal/data.py", "seed_of(self.seed, epoch))).tolist()",
          "seed_of(0, epoch))).tolist()", "Every --seed would have the same order.",
          "tests/test_data_by_hand.py::test_two_seeds_are_two_orders_and_every_epoch_another"),
    Break("data-order-of-the-file", "crystal/data.py", "shuffle[n % self.count]))", "n % self.count))",
          "Records would come in the order of the file.",
          "tests/test_data_by_hand.py::test_two_seeds_are_two_orders_and_every_epoch_another"),
    Break("data-ranks-overlap", "crystal/data.py", "self.rank * share + a", "self.rank * self.batch_size + a",
          "With accumulation ranks would share records and leave others out.",
          "tests/test_data_by_hand.py::test_the_shares_of_ranks_and_micro_batches"),
    Break("data-micro-batches-overlap", "crystal/data.py", "+ a * self.batch_size", "+ a",
          "Micro-batches would share records.",
          "tests/test_data_by_hand.py::test_the_shares_of_ranks_and_micro_batches"),
    Break("data-updates-overlap", "crystal/data.py", "first = step * share * self.world",
          "first = step * share", "With several ranks an update would repeat records of the one before.",
          "tests/test_data_by_hand.py::test_the_shares_of_ranks_and_micro_batches"),
    Break("data-resume-starts-over", "crystal/data.py", "range(self.start, self.stop)",
          "range(self.stop - self.start)", "A resumed run would see the first records again.",
          "tests/test_data_by_hand.py::test_the_shares_of_ranks_and_micro_batches"),
    Break("data-length-without-accumulation", "crystal/data.py",
          "(self.stop - self.start) * self.accumulation", "self.stop - self.start",
          "The loader would say that it has fewer batches.",
          "tests/test_data_by_hand.py::test_the_shares_of_ranks_and_micro_batches"),
    Break("data-epoch-of-the-batch", "crystal/data.py", "batch.append((epoch,",
          "batch.append((first // self.count,",
          "After an epoch's end a batch would be corrupted as in the last one.",
          "tests/test_data_by_hand.py::test_a_batch_over_an_epochs_end_and_one_larger_than_the_file"),
    Break("data-seed-mixes-less", "crystal/data.py", "seed ^= seed >> 31", "seed ^= seed >> 32",
          "Resumed with another version, a run would have another order.",
          "tests/test_data_by_hand.py::test_seeds_are_these_numbers"),
    Break("data-strengths-ignored", "crystal/data.py", "if settings.strength_low is None else",
          "if True else", "--strength_low and --strength_high would be ignored.",
          "tests/test_data_by_hand.py::test_the_range_of_every_mode"),
    Break("data-strength-high-is-low", "crystal/data.py", "(settings.strength_low, settings.strength_high)",
          "(settings.strength_low, settings.strength_low)", "--strength_high would be ignored.",
          "tests/test_data_by_hand.py::test_the_range_of_every_mode"),
    Break("data-strength-beyond-the-mode", "crystal/data.py", "if high > LIMIT[mode]:",
          "if high >= LIMIT[mode]:", "A mode's strongest corruption would be refused.",
          "tests/test_data_by_hand.py::test_the_range_of_every_mode"),
    Break("train-data-validation-corrupts-as-training", "crystal/train.py",
          'settings.seed + (split == "val")', "settings.seed",
          "Validation would see the corruptions that were trained on.",
          "tests/test_data_by_hand.py::test_flags_reach_the_pixels"),
    Break("train-data-turns-ignored", "crystal/train.py", "data.read(path, root, settings.turns)",
          "data.read(path, root)", "--turns would be ignored.",
          "tests/test_data_by_hand.py::test_flags_reach_the_pixels"),
    Break("train-data-sft-corrupts", "crystal/train.py",
          "data.corruption_of(settings) if method.corrupts else None",
          'data.corruption_of(settings) if hasattr(settings, "corruption") else ("blur", 2, 5)',
          "Plain fine-tuning would refuse text and corrupt images for nothing.",
          "tests/test_data_by_hand.py::test_without_those_flags"),
    Break("corrupt-blur-of-half-the-radius", "crystal/corrupt.py", "-0.5 * (t / radius) * (t / radius)",
          "-2 * (t / radius) * (t / radius)", "Blur would be half as wide as the paper's.",
          "tests/test_corrupt.py::test_blur_is_scipys_gaussian"),
    Break("corrupt-blur-cut-short", "crystal/corrupt.py", "math.ceil(4 * radius)", "math.ceil(2 * radius)",
          "Blur would have a visible edge.", "tests/test_corrupt.py::test_blur_is_scipys_gaussian"),
    Break("corrupt-blur-along-columns", "crystal/corrupt.py",
          'strips.append(convolve(F.pad(strip, (reach, reach), mode="replicate"), dim=2))',
          "strips.append(strip)", "Blur would run along one side.",
          "tests/test_corrupt.py::test_blur_is_scipys_gaussian"),
    Break("corrupt-blur-black-edges", "crystal/corrupt.py", 'mode="replicate")  # [3, H',
          'mode="constant")  # [3, H', "Blurred images would have dark edges.",
          "tests/test_corrupt.py::test_blur_is_scipys_gaussian"),
    Break("corrupt-blur-strips-apart", "crystal/corrupt.py", "rows + 2 * reach], dim=1)",
          "rows + reach], dim=1)", "Large images would lose rows.",
          "tests/test_corrupt.py::test_blur_joins_its_strips"),
    Break("corrupt-blur-paper-range", "crystal/corrupt.py", ' | {"blur": (2.0, 5.0)}', "",
          "Blur would be drawn up to 10 px.", "tests/test_corrupt.py::test_names_levels_and_priors"),
    Break("corrupt-noise-levels", "crystal/corrupt.py", '"noise": (15.0, 30.0, 50.0)',
          '"noise": (15.0, 25.0, 50.0)', "Noise would not have the paper's levels.",
          "tests/test_corrupt.py::test_names_levels_and_priors"),
    Break("corrupt-one-limit-for-shares", "crystal/corrupt.py", '"jigsaw": 1.0, "color": 16.0',
          '"jigsaw": 1.0, "color": 1.0', "Strong colour would be refused.",
          "tests/test_corrupt.py::test_names_levels_and_priors"),
    Break("corrupt-uniform-unseeded", "crystal/corrupt.py", "torch.rand(n, generator=generator,",
          "torch.rand(n, generator=None,", "Corruption would depend on torch's global state.",
          "tests/test_corrupt.py::test_the_generator_is_the_only_randomness"),
    Break("corrupt-rectangle-too-long", "crystal/corrupt.py", "min(stretch, 1 / share) **", "stretch **",
          "Long rectangles would not have their area.", "tests/test_corrupt.py::test_a_mask_by_hand"),
    Break("corrupt-rectangle-of-aspect-squared", "crystal/corrupt.py",
          "math.sqrt(share * a) * H, math.sqrt(share / a) * W", "share * a * H, 1 / a * W",
          "Rectangles would be flat.", "tests/test_corrupt.py::test_a_mask_by_hand"),
    Break("corrupt-rectangle-lying", "crystal/corrupt.py",
          "math.sqrt(share * a) * H, math.sqrt(share / a) * W",
          "math.sqrt(share / a) * H, math.sqrt(share * a) * W",
          "An older run's corruptions would not come again.", "tests/test_corrupt.py::test_a_mask_by_hand"),
    Break("corrupt-rectangle-never-last", "crystal/corrupt.py", "int(u[1] * (H - h + 1))",
          "int(u[1] * (H - h))", "The bottom row would never be masked.",
          "tests/test_corrupt.py::test_a_mask_by_hand"),
    Break("corrupt-mask-square", "crystal/corrupt.py", "left:left + w] = 0", "left:left + h] = 0",
          "Masks would be squares of another area.", "tests/test_corrupt.py::test_a_mask_by_hand"),
    Break("corrupt-mask-grey", "crystal/corrupt.py", "left:left + w] = 0", "left:left + w] = 0.5",
          "Masks would be grey.", "tests/test_corrupt.py::test_a_mask_by_hand"),
    Break("corrupt-crop-keeps-its-share", "crystal/corrupt.py", "max(1 - share, 1 / (H * W))",
          "max(share, 1 / (H * W))", "A weak crop would throw most of the image away.",
          "tests/test_corrupt.py::test_a_crop_by_hand"),
    Break("corrupt-crop-of-any-aspect", "crystal/corrupt.py", "1 / (H * W)), H, W, generator)",
          "1 / (H * W)), H, W, generator, 3.3)", "Crops would be stretched.",
          "tests/test_corrupt.py::test_a_crop_by_hand"),
    Break("corrupt-crop-corners-aligned", "crystal/corrupt.py", "align_corners=False", "align_corners=True",
          "Crops would be resized otherwise than by Pillow and torchvision.",
          "tests/test_corrupt.py::test_a_crop_by_hand"),
    Break("corrupt-jigsaw-cuts-its-share", "crystal/corrupt.py", "[:round(16 * share)]", "[:int(16 * share)]",
          "Fewer tiles would move.", "tests/test_corrupt.py::test_jigsaw_moves_exactly_its_share"),
    Break("corrupt-jigsaw-mirror", "crystal/corrupt.py", "chosen.roll(1)", "chosen.flip(0)",
          "A tile in the middle would stay.", "tests/test_corrupt.py::test_jigsaw_moves_exactly_its_share"),
    Break("corrupt-jigsaw-other-ring", "crystal/corrupt.py", "chosen.roll(1)", "chosen.roll(-1)",
          "An older run's corruptions would not come again.", "tests/test_corrupt.py::test_a_jigsaw_by_hand"),
    Break("corrupt-jigsaw-transposed", "crystal/corrupt.py", ".permute(1, 3, 0, 2, 4).reshape(16",
          ".permute(3, 1, 0, 2, 4).reshape(16", "Every tile would move.",
          "tests/test_corrupt.py::test_a_jigsaw_by_hand"),
    Break("corrupt-luma-of-blue", "crystal/corrupt.py", "0.299 * x[0:1] + 0.587 * x[1:2] + 0.114 * x[2:3]",
          "0.114 * x[0:1] + 0.587 * x[1:2] + 0.299 * x[2:3]",
          "Contrast and saturation would weigh blue as red.", "tests/test_corrupt.py::test_color_by_hand"),
    Break("corrupt-contrast-around-the-middle", "crystal/corrupt.py",
          "torch.lerp(grey(x).mean(), x, contrast)", "torch.lerp(torch.full_like(x[:1], 0.5), x, contrast)",
          "Contrast would change the brightness.", "tests/test_corrupt.py::test_color_by_hand"),
    Break("corrupt-hue-backwards", "crystal/corrupt.py", "+ 6 * turns", "- 6 * turns",
          "Hue would turn the other way.", "tests/test_corrupt.py::test_color_by_hand"),
    Break("corrupt-brightness-unclipped", "crystal/corrupt.py", "x = (brightness * x).clamp(0, 1)",
          "x = brightness * x", "Contrast would use a mean that no image has.",
          "tests/test_corrupt.py::test_color_leaves_grey_grey_and_clips_after_each_step"),
    Break("corrupt-color-below-zero", "crystal/corrupt.py", "low, high, a = max(0.0, 1 - s)",
          "low, high, a = 1 - s", "Strong colour would be black a fourth of the time.",
          "tests/test_corrupt.py::test_color_ranges_end_at_zero_and_half_a_turn"),
    Break("corrupt-hue-of-any-angle", "crystal/corrupt.py", "min(s / 4, 0.5)\n    return", "0.5\n    return",
          "Weak colour would turn the hue by any angle.",
          "tests/test_corrupt.py::test_color_draws_its_four_factors"),
    Break("corrupt-noise-grey", "crystal/corrupt.py", "torch.randn(x.shape,", "torch.randn(x.shape[1:],",
          "Noise would be grey.", "tests/test_corrupt.py::test_noise_by_hand"),
    Break("corrupt-noise-of-256", "crystal/corrupt.py", "sigma / 255 *", "sigma / 256 *",
          "Noise would be weaker than the paper's.", "tests/test_corrupt.py::test_noise_by_hand"),
    Break("corrupt-impulse-black-alone", "crystal/corrupt.py", "masked_fill(u < share / 2, 0)",
          "masked_fill(u < share, 0)", "Impulses would be black alone.",
          "tests/test_corrupt.py::test_an_impulse_by_hand"),
    Break("corrupt-strength-from-zero", "crystal/corrupt.py",
          "low + (high - low) * uniform(1, generator).item()", "high * uniform(1, generator).item()",
          "Strengths would be drawn from 0 on.", "tests/test_corrupt.py::test_a_strength_by_hand"),
    Break("corrupt-zero-shares-memory", "crystal/corrupt.py", "return image.clone()", "return image",
          "Who changes the corrupted image would change the intact one.",
          "tests/test_corrupt.py::test_strength_zero_is_the_identity"),
    Break("corrupt-unclipped", "crystal/corrupt.py", ".clamp(0, 1).to(image.dtype)", ".to(image.dtype)",
          "Noise would leave [0, 1] and wrap around as bytes.", "tests/test_corrupt.py::test_noise_by_hand"),
    Break("corrupt-nan-passes", "crystal/corrupt.py", "if not (low >= 0 and high <= 1):",
          "if low < 0 or high > 1:", "An image of NaN would be corrupted without a word.",
          "tests/test_corrupt.py::test_bad_input_is_one_clear_line"),
]

# ---- measures: evaluation, reliance, benchmarks, the endpoint ---------------------------------------------------------

MEASURES = [
]

# ---- operators: ops.py, csrc's CPU part, setup ------------------------------------------------------------------------

OPERATORS = [
]

# ---- weights that do not fit the model they are given to --------------------------------------------------------------

WEIGHTS = [
    Break("weights-missing-ones-pass", "crystal/model.py",
          'if found["missing_keys"]:', "if False:",
          "A matrix that the files lack stays random, and training and evaluation go on.",
          "tests/test_model.py::test_weights_that_do_not_fit_are_named"),
    Break("weights-other-shapes-pass", "crystal/model.py",
          'if found["mismatched_keys"]:', "if False:",
          "A matrix of another shape stays random, and training and evaluation go on.",
          "tests/test_model.py::test_weights_that_do_not_fit_are_named"),
    Break("weights-unknown-ones-pass", "crystal/model.py",
          'if found["unexpected_keys"] and not part:', "if False:",
          "Tensors that the model has no place for are dropped without a word.",
          "tests/test_model.py::test_weights_that_do_not_fit_are_named"),
    Break("weights-report-of-many-lines", "crystal/model.py",
          "    transformers_logging.set_verbosity_error()", "    pass",
          "A page of a library's report hides the one line that says what is wrong.",
          "tests/test_model.py::test_weights_that_do_not_fit_are_named"),
    Break("weights-verbosity-stays-changed", "crystal/model.py",
          "transformers_logging.set_verbosity(level)", "pass",
          "After a model was loaded no warning of transformers is seen any more.",
          "tests/test_model.py::test_loading_leaves_the_verbosity_as_it_was"),
    Break("weights-names-of-ddp-unknown", "crystal/model.py",
          r"(module\.|_orig_mod\.|", r"(_orig_mod\.|",
          "Weights that DDP saved are refused.",
          "tests/test_model.py::test_names_that_a_wrapper_left_are_read_as_meant"),
    Break("weights-names-of-a-compiled-part-unknown", "crystal/model.py",
          r', r"(?<=\.)_orig_mod\.": ""}', "}",
          "Weights of a model with one compiled layer are refused.",
          "tests/test_model.py::test_names_within_a_compiled_part_are_read_as_meant"),
    Break("weights-encoder-refuses-its-sibling", "crystal/encoders.py",
          ", torch.float32, part=True)", ", torch.float32)",
          "A SigLIP checkpoint, which holds a text tower too, cannot be an encoder.",
          "tests/test_encoders.py::test_weights_that_do_not_fit_are_named"),
    Break("weights-export-keeps-a-wrapper-s-names", "crystal/export.py",
          "            if renamed:", "            if False:",
          "Stock tools find no weight in a merged directory whose base was saved by a wrapper.",
          "tests/test_export.py::test_every_kind_of_base"),
    Break("weights-export-keeps-a-wrapper-s-index", "crystal/export.py",
          "{crystal.model.unwrapped(key): name for", "{key: name for",
          "The index of a merged directory names tensors that are not there.",
          "tests/test_export.py::test_every_kind_of_base"),
]

BREAKS = METHODS + SETTINGS + COMMANDS + LOOP + DATA + MEASURES + OPERATORS + WEIGHTS


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
