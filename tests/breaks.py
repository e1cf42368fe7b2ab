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
