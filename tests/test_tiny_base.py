"""The tiny base's training forward is the stock model's, and its batches say what the scenes show."""
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from crystal.config import UserError
from data_prep import tiny_base, tiny_batches, tiny_check, tiny_files, toy

TINY = Path(__file__).resolve().parent.parent / "crystal" / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def layout(tokenizer):
    return tiny_batches.Layout(tokenizer)


@pytest.fixture(scope="module")
def batch(layout):
    rngs = [toy.rng_for("test", i) for i in range(3)]
    return tiny_batches.make_batch(layout, rngs, "demo", dict.fromkeys(tiny_batches.KINDS, 1 / len(tiny_batches.KINDS)))


def test_training_forward_is_the_stock_forward(tokenizer, layout, batch):
    """Every slot's logits equal those of the stock model, which gets the same question alone, through its own image processor."""
    torch.manual_seed(0)
    pupil = tiny_base.Pupil(AutoConfig.from_pretrained(TINY), layout)
    stock = tiny_check.load(TINY)
    stock.load_state_dict(pupil.model.state_dict())
    processor = AutoImageProcessor.from_pretrained(TINY)
    with torch.no_grad():
        ours = pupil.model.lm_head(pupil.read(pupil.see(tiny_batches.pixels(batch.patches)), batch.tokens)[0])
        for b in range(3):
            rng = toy.rng_for("test", b)
            image = Image.fromarray(toy.render(toy.draw_for("demo", rng)))
            seen = processor(images=[image], return_tensors="pt")
            for s in range(tiny_batches.SLOTS):
                ids = torch.cat([torch.tensor(layout.opening), batch.tokens[b, s]])[None]
                theirs = stock(input_ids=ids, mm_token_type_ids=(ids == stock.config.image_token_id).int(), **seen).logits
                torch.testing.assert_close(ours[b, s], theirs[0, layout.P:], atol=1e-4, rtol=1e-4)


def test_opening_and_slot_are_the_chat_template(tokenizer, layout):
    content = [{"type": "image"}, {"type": "text", "text": "What colour is the star?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * tiny_batches.N)
    tokens, labels = layout.encode("What colour is the star?", "red")
    kept = [token for token in tokens if token != tokenizer.pad_token_id]
    assert tokenizer.decode(layout.opening + kept) + "\n" == text
    assert tokenizer.decode([label for label in labels if label != tiny_batches.IGNORE]) == "red<|im_end|>"


def test_marks_tell_what_is_named_and_never_the_answer(tokenizer, layout):
    for i in range(200):
        rng = toy.rng_for("marks", i)
        scene = toy.draw_scene(rng)
        for family in toy.FAMILIES:
            question = toy.ask(scene, family, rng)
            if question is None:
                continue
            tokens, labels = layout.encode(question.text, question.answer)
            for mark, token, label in zip(tiny_batches.marks_of(layout, scene, family, tokens, labels), tokens, labels):
                word = tokenizer.decode([token]).strip()
                if label != tiny_batches.IGNORE:
                    assert set(mark) == {tiny_batches.IGNORE}
                for thing in scene.named:
                    if thing.shape == word and label == tiny_batches.IGNORE:
                        assert mark[:4] == [list(toy.COLOURS).index(thing.colour), thing.level, thing.row - 1, thing.column - 1]
                if family == "count" and mark[4] >= 0:
                    assert word == toy.plural(scene.counted) and str(mark[4] + 1) == question.answer


def test_tokenizer_is_made_again_to_the_byte(tmp_path):
    """The configuration too is made by the script, but names the version of transformers that wrote it."""
    tiny_files.make_directory(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


@pytest.mark.parametrize("flags", [["--base", "nowhere"], ["--blind", "nowhere"], ["--per_family", "0"]])
def test_wrong_flags_of_the_check_are_one_line(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["tiny_check.py", *flags])
    with pytest.raises(UserError, match=" ".join(flags)):
        tiny_check.main()
