"""Greedy answers: equal to teacher-forced logits, one by one or batched, with and without latents, fed back
or not; the command line.
"""

import json
import shutil

import pytest
import torch
from PIL import Image

from crystal import feedback, generate
from crystal.attention_bias import AttentionBias
from crystal.backbone.model import TINY
from crystal.opening import open_model
from crystal.runtime import data
from crystal.runtime.config import UserError


def prompts(s, latents="keep"):
    out = []
    for r in s.records:
        images = s.model.image_processor(images=[Image.open(p) for p in r.images], return_tensors="pt")
        ids, _, where = s.fmt.question(r.turns, s.model.image_tokens(images["image_grid_thw"]), latents)
        out.append((ids, images["pixel_values"], images["image_grid_thw"]))
    return out


@pytest.mark.parametrize("latents", ["keep", "drop"])
def test_generation_equals_teacher_forced_argmax(setup, latents):
    s = setup(dtype=torch.float64)
    s.model.eval()
    asked = prompts(s, latents)
    answers = generate.generate(s.model, asked, s.fmt, 4)
    for (ids, pixels, grid), answer in zip(asked, answers):
        ids = list(ids)
        said = []
        for _ in range(4):
            x = torch.tensor([ids])
            batch = {
                "input_ids": x,
                "attention_mask": torch.ones_like(x),
                "mm_token_type_ids": (x == s.fmt.image).long(),
                "pixel_values": pixels.double(),
                "image_grid_thw": grid,
            }
            with torch.no_grad():
                token = int(s.model.logits(s.model.hidden(batch)[:, -1]).argmax())
            if token in (s.fmt.end, s.fmt.answer_end_id):
                break
            ids.append(token)
            said.append(token)
        assert answer == s.model.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_a_thought_of_its_own_is_cut_off(setup, monkeypatch):
    s = setup("--thought", "cot")
    said = (
        s.fmt.text("I look.")
        + s.fmt.latents
        + [s.fmt.think_end_id, s.fmt.answer_start_id]
        + s.fmt.text("red")
        + [s.fmt.answer_end_id, s.fmt.end]
    )
    monkeypatch.setattr(
        s.model.hf, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([said])], 1)
    )
    assert generate.generate(s.model, prompts(s)[:1], s.fmt) == ["red"]


# --- latents that the model feeds back to itself ---


@pytest.fixture
def valr(setup, monkeypatch):
    """A random VaLR and what it is given to decode; `openings` {row: steps} are steps at which a row opens
    latents, `logits` what it computed.
    """
    s = setup("--method", "valr", "--encoders", "none")
    s.model.eval()
    s.openings, s.logits, plain = {0: {2, 9}, 2: {0}}, [], s.model.logits

    def logits(h):
        z = plain(h)
        s.logits.append(z.clone())
        # What would end the row or needs an image comes when we say so.
        z[:, [s.fmt.latent_start_id, s.fmt.answer_start_id, s.fmt.end, s.fmt.image]] = -1e9
        for row, steps in s.openings.items():
            if row < len(z) and len(s.logits) - 1 in steps:
                z[row, s.fmt.latent_start_id] = 1e9
        return z

    monkeypatch.setattr(s.model, "logits", logits)
    return s


def batch_of(s, prompts):
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(
        [torch.tensor(ids) for ids, _, _ in prompts],
        batch_first=True,
        padding_value=s.model.tokenizer.pad_token_id,
    )
    mask = pad([torch.ones(len(ids), dtype=torch.long) for ids, _, _ in prompts], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == s.fmt.image).int(),
        "pixel_values": torch.cat([p for _, p, _ in prompts]).double(),
        "image_grid_thw": torch.cat([g for _, _, g in prompts]),
    }


def test_feedback_decoding_equals_teacher_forced_logits(valr, float64_modules):
    """Three ragged rows with two, no and one segment: the logits of every step are those of one pass of the
    recurrence over what was said.
    """
    s, asked = valr, prompts(valr)
    said = generate.decode_feedback(s.model, batch_of(s, asked), s.fmt, 5, max_thought=14)
    pad, K = s.model.tokenizer.pad_token_id, s.fmt.count
    assert [row.count(pad) for row in said] == [2 * K, 0, K]
    for row in said:  # K latents, then the closing tag, and never one without the other
        for i, token in enumerate(row):
            if token == s.fmt.latent_start_id:
                assert row[i + 1 : i + 2 + K] == [pad] * K + [s.fmt.latent_end_id]
    assert (
        said[0][2] == s.fmt.latent_start_id == said[0][9] == said[2][0]
        and sum(t not in (pad, s.fmt.latent_end_id) for t in said[0]) == 14
    )
    whole = [(ids + row, p, g) for (ids, p, g), row in zip(asked, said)]
    batch = batch_of(s, whole)
    latents = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for b, ((ids, _, _), row) in enumerate(zip(asked, said)):
        latents[b, [len(ids) + i for i, t in enumerate(row) if t == pad]] = True
    with torch.no_grad():
        h, _ = feedback.recurrence(s.model, batch, latents)
    steps = list(s.logits)
    for b, ((ids, _, _), row) in enumerate(zip(asked, said)):
        forced = s.model.hf.lm_head(h[b, len(ids) - 1 : len(ids) - 1 + len(row)])
        assert (torch.stack([z[b] for z in steps[: len(row)]]) - forced).abs().max() < 1e-10


def test_a_row_does_not_see_its_batch(valr):
    asked = prompts(valr)
    together = generate.decode_feedback(valr.model, batch_of(valr, asked), valr.fmt, 5, max_thought=14)
    for b, openings in ((0, {0: {2, 9}}), (1, {}), (2, {0: {0}})):
        valr.openings, valr.logits[:] = openings, []
        assert generate.decode_feedback(
            valr.model, batch_of(valr, asked[b : b + 1]), valr.fmt, 5, max_thought=14
        ) == [together[b]]


def test_dropped_latents_are_never_opened(valr):
    valr.model.__dict__.pop("logits")
    plain = valr.model.logits

    def eager(h):
        z = plain(h)
        z[:, valr.fmt.latent_start_id] = 1e9
        return z

    valr.model.logits = eager
    batch = batch_of(valr, prompts(valr))
    for latents, opened in (("keep", True), ("drop", False)):
        said = generate.decode_feedback(valr.model, batch, valr.fmt, 3, latents, max_thought=6)
        assert all((valr.fmt.latent_start_id in row) == opened for row in said)


def test_the_answer_has_a_budget_of_its_own(valr):
    """Six tokens of thought, or three from <answer> on, whatever came before; <|im_end|> ends a row at once.
    """
    plain, ends = valr.model.__class__.logits, {0: {}, 1: {4: valr.fmt.answer_start_id}, 2: {1: valr.fmt.end}}
    steps = []

    def logits(h):
        z = plain(valr.model, h)
        z[:, [valr.fmt.latent_start_id, valr.fmt.answer_start_id, valr.fmt.end]] = -1e9
        for row, when in ends.items():
            if len(steps) in when:
                z[row, when[len(steps)]] = 1e9
        steps.append(1)
        return z

    valr.model.logits = logits
    said = generate.decode_feedback(valr.model, batch_of(valr, prompts(valr)), valr.fmt, 3, max_thought=6)
    assert (
        [len(row) for row in said] == [6, 8, 2]
        and said[1][4] == valr.fmt.answer_start_id
        and said[2][-1] == valr.fmt.end
    )
    ends |= {0: {0: valr.fmt.end}, 1: {2: valr.fmt.answer_start_id}, 2: {0: valr.fmt.end}}
    steps.clear()
    row = generate.decode_feedback(valr.model, batch_of(valr, prompts(valr)), valr.fmt, 3)[1]
    steps.clear()
    assert (
        generate.generate(valr.model, prompts(valr), valr.fmt, 3)[1]
        == valr.model.tokenizer.decode(row[3:], skip_special_tokens=True).strip()
    )


def test_command_line(records_file, capsys, tmp_path):
    image = records_file.parent / "0_0.png"
    generate.main(["--image", str(image), "--question", "What colour is the star?", "--max_new_tokens", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(data.RecordError, match="none.png"):
        generate.main(["--image", str(tmp_path / "none.png"), "--question", "x"])
    with pytest.raises(UserError, match="--question"):
        generate.main(["--image", str(image)])
    for flags, says in (
        (["--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ):
        with pytest.raises(UserError, match=says):
            generate.main(["--question", "x", *flags])


def test_what_is_typed_is_text_and_the_flags_reach_the_model(records_file, monkeypatch):
    """A question with markers of images in it; an image scaled down to half its tokens."""
    asked = []
    monkeypatch.setattr(
        generate,
        "generate",
        lambda model, prompts, fmt, *_, **__: asked.append((model, fmt, *prompts[0])) or ["red"],
    )
    question = "what is <image> here? <|image_pad|>"
    for flags in ([], ["--max_pixels", "4704"]):
        generate.main(
            [
                "--image",
                str(records_file.parent / "0_0.png"),
                "--question",
                question,
                "--device",
                "cpu",
                *flags,
            ]
        )
    for model, fmt, ids, _, grid in asked:
        assert (
            ids.count(fmt.image) == model.image_tokens(grid)[0]
            and question in model.tokenizer.decode(ids)
            and model.device.type == "cpu"
        )
    assert asked[1][4].prod() < asked[0][4].prod()


def test_dropped_latents_are_never_written(setup, monkeypatch):
    """--thought cot: the model would write its latents itself."""
    s, told = setup("--thought", "cot"), []
    monkeypatch.setattr(
        s.model.hf, "generate", lambda input_ids, **how: told.append(how.get("suppress_tokens")) or input_ids
    )
    for latents in ("keep", "drop"):
        generate.write(s.model, prompts(s), s.fmt, latents=latents)
    assert told == [None, s.fmt.latents]


def test_latents_that_the_model_writes_itself(setup, monkeypatch):
    """--latents free: the plain chat prompt, room for the thought, and the answer behind `<answer>`."""
    s = setup()
    said = (
        s.fmt.thinking()[0] + [s.fmt.answer_start_id] + s.fmt.text("red") + [s.fmt.answer_end_id, s.fmt.end]
    )
    assert generate.thought_length(s.fmt, "x") == len(said) - len(s.fmt.text("red")) - 1
    fed = []
    monkeypatch.setattr(
        s.model.hf,
        "generate",
        lambda input_ids, **_: fed.append(input_ids) or torch.cat([input_ids, torch.tensor([said])], 1),
    )
    ask = prompts(s, "none")[:1]
    assert generate.write(s.model, ask, s.fmt) == [said] and generate.generate(s.model, ask, s.fmt) == ["red"]
    assert not set(s.fmt.latents) & set(fed[0][0].tolist())
    with pytest.raises(UserError, match="x has no latents that it learned to write"):
        generate.thought_length(setup("--method", "sft").fmt, "x")


def test_an_answer_ends_at_its_tag(setup):
    """What stands between the first `<answer>` and the first `</answer>` behind it; without tags all of it;
    no special tokens, no blanks around it.
    """
    fmt, model = (s := setup()).fmt, s.model
    red, blue = fmt.text(" red "), fmt.text("blue")
    for ids, says in (
        (red, "red"),
        ([*blue, fmt.answer_start_id, *red], "red"),
        ([*blue, fmt.answer_start_id, *red, fmt.answer_end_id, *blue, fmt.end], "red"),
        ([*red, fmt.answer_end_id, *blue], "red"),
        ([fmt.answer_end_id, *blue, fmt.answer_start_id, *red], "red"),
        ([fmt.answer_start_id, *red, fmt.end], "red"),
        ([*red, fmt.end], "red"),
        ([fmt.answer_start_id, fmt.answer_end_id], ""),
        ([], ""),
    ):
        assert generate.answer_text(model, fmt, ids) == says


def test_what_transformers_is_told(setup, monkeypatch):
    """Greedy, so many tokens, our end and our padding, the streamer; prompts to the left of nothing, pictures
    in the order of their prompts.
    """
    s, told = setup(dtype=torch.float32), []
    asked, streamer = prompts(s), object()
    asked.insert(1, (asked[0][0][:5], None, None))  # one without a picture
    monkeypatch.setattr(
        s.model.hf,
        "generate",
        lambda **how: (
            told.append(how) or torch.cat([how["input_ids"], torch.tensor([[7, s.fmt.end]] * 4)], 1)
        ),
    )
    assert generate.write(s.model, asked, s.fmt, 9, streamer=streamer) == [[7, s.fmt.end]] * 4
    how = told[0]
    pad = s.model.tokenizer.pad_token_id
    assert (
        how["max_new_tokens"], how["do_sample"], how["eos_token_id"], how["pad_token_id"], how["streamer"],
    ) == (9, False, s.fmt.end, pad, streamer)
    assert "suppress_tokens" not in how
    L = max(len(ids) for ids, _, _ in asked)
    assert how["input_ids"].tolist() == [[pad] * (L - len(ids)) + ids for ids, _, _ in asked]
    assert how["attention_mask"].tolist() == [[0] * (L - len(ids)) + [1] * len(ids) for ids, _, _ in asked]
    assert how["mm_token_type_ids"].tolist() == [
        [0] * (L - len(ids)) + [int(token == s.fmt.image) for token in ids] for ids, _, _ in asked
    ]
    assert torch.equal(
        how["pixel_values"], torch.cat([pixels for _, pixels, _ in asked if pixels is not None])
    )
    assert torch.equal(how["image_grid_thw"], torch.cat([grid for _, _, grid in asked if grid is not None]))


def test_a_mask_is_asked_for_the_last_row(setup, monkeypatch):
    """A method's biases see the batch as it is padded, and the row that answers: the last of each prompt; the
    model then sees their mask.
    """
    s, seen, masks = setup(dtype=torch.float32), [], []
    s.model.eval()
    asked = prompts(s)
    L = max(len(ids) for ids, _, _ in asked)

    def biases(batch):
        seen.append(batch)
        return [AttentionBias(torch.ones(3, L, dtype=torch.bool), batch["input_ids"] == s.fmt.image, -2.5)]

    plain = s.model.seeing
    monkeypatch.setattr(s.model, "seeing", lambda mask: masks.append(mask) or plain(mask))
    generate.write(s.model, asked, s.fmt, 2, biases)
    assert seen[0]["answer_positions"].tolist() == [[L - 1]] * 3
    for b, (ids, _, _) in enumerate(asked):
        left = L - len(ids)
        row = masks[0][b, 0, L - 1].tolist()
        assert row == [float("-inf")] * left + [-2.5 if token == s.fmt.image else 0.0 for token in ids]


def test_what_a_directory_says_of_decoding_decides_nothing(records_file, tmp_path):
    """Penalties, beams and lengths of generation_config.json would change every answer of a model."""
    directory = tmp_path / "own-rules"
    shutil.copytree(TINY, directory)
    rules = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 6,
        "num_beams": 3,
        "suppress_tokens": list(range(40, 90)),
        "begin_suppress_tokens": list(range(300, 600)),
        "do_sample": True,
        "temperature": 9.0,
    }
    (directory / "generation_config.json").write_text(json.dumps(rules))

    said = []
    for name in ("tiny", str(directory)):
        torch.manual_seed(0)
        model, fmt, _ = open_model(name)
        image = Image.new("RGB", (112, 112), "red")
        said.append(generate.ask(model, fmt, [image], "What colour is the small star?", 12))
    assert said[0] == said[1]
    assert len(said[0]) < 12  # it ends by itself, long before the least length
