"""Greedy answers: equal to teacher-forced logits, one by one or batched, with and without latents; the command line."""
import pytest
import torch
from PIL import Image

from crystal import data, generate
from crystal.config import UserError


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
            batch = {"input_ids": x, "attention_mask": torch.ones_like(x), "mm_token_type_ids": (x == s.fmt.image).long(), "pixel_values": pixels.double(), "image_grid_thw": grid}
            with torch.no_grad():
                token = int(s.model.logits(s.model.hidden(batch)[:, -1]).argmax())
            if token in (s.fmt.end, s.fmt.close):
                break
            ids.append(token)
            said.append(token)
        assert answer == s.model.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_a_thought_of_its_own_is_cut_off(setup, monkeypatch):
    s = setup("--thought", "cot")
    said = s.fmt.text("I look.") + s.fmt.latents + [s.fmt.unthink, s.fmt.open] + s.fmt.text("red") + [s.fmt.close, s.fmt.end]
    monkeypatch.setattr(s.model.hf, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([said])], 1))
    assert generate.generate(s.model, prompts(s)[:1], s.fmt) == ["red"]


def test_command_line(records_file, capsys, tmp_path):
    image = records_file.parent / "0_0.png"
    generate.main(["--image", str(image), "--question", "What colour is the star?", "--max_new_tokens", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(data.RecordError, match="none.png"):
        generate.main(["--image", str(tmp_path / "none.png"), "--question", "x"])
    with pytest.raises(UserError, match="--question"):
        generate.main(["--image", str(image)])


def test_latents_that_the_model_writes_itself(setup, monkeypatch):
    """--latents free: the plain chat prompt, room for the thought, and the answer behind `<answer>`."""
    s = setup()
    said = s.fmt.thinking()[0] + [s.fmt.open] + s.fmt.text("red") + [s.fmt.close, s.fmt.end]
    assert generate.thought_length(s.fmt, "x") == len(said) - len(s.fmt.text("red")) - 1
    fed = []
    monkeypatch.setattr(s.model.hf, "generate", lambda input_ids, **_: fed.append(input_ids) or torch.cat([input_ids, torch.tensor([said])], 1))
    ask = prompts(s, "none")[:1]
    assert generate.write(s.model, ask, s.fmt) == [said] and generate.generate(s.model, ask, s.fmt) == ["red"]
    assert not set(s.fmt.latents) & set(fed[0][0].tolist())
    with pytest.raises(UserError, match="x has no latents that it could write"):
        generate.thought_length(setup("--method", "sft").fmt, "x")
