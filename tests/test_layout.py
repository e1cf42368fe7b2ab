"""Sequences: the template's ids, spans that name the right tokens, users' text that stays text."""

import pytest
from transformers import AutoTokenizer

from crystal.backbone.model import TINY
from crystal.layout import IGNORE, THOUGHT, Format, new_tokens

TURNS = [("user", "<image>\nWhat colour is the small star?")]


def make(count=3, kind="diverse", thought="fixed"):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": new_tokens(count, kind)}, replace_extra_special_tokens=False
    )
    return Format(tokenizer, count, kind, thought)


def stock(fmt, turns, n):
    """What transformers itself makes of the conversation, the image token repeated n times."""
    messages = [
        {
            "role": r,
            "content": [{"type": "image"}] * t.count("<image>")
            + [{"type": "text", "text": t.replace("<image>", "").strip("\n")}],
        }
        for r, t in turns
    ]
    text = fmt.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).replace(
        "<|image_pad|>", "<|image_pad|>" * n
    )
    return fmt.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat colour is the small star?",
        "<image>How many, 3 or 4?\nAnswer with a number.",
        "<image>\n<image>\nCompare them.",
    ],
)
def test_prompt_is_the_stock_template(text):
    fmt = make()
    ids, image = fmt.prompt([("user", text)], [4] * text.count("<image>"))
    assert ids == stock(fmt, [("user", text)], 4)
    assert (
        len(image) == 4 * text.count("<image>")
        and all(ids[i] == fmt.image for i in image)
        and ids.count(fmt.image) == len(image)
    )


def test_several_turns_and_a_system_turn():
    fmt = make()
    turns = [
        ("system", "Be brief."),
        ("user", "<image>\nHow many rings?"),
        ("assistant", "3"),
        ("user", "And stars?"),
    ]
    text = fmt.tokenizer.decode(fmt.prompt(turns, [2])[0])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and "You are" not in text
    assert text.endswith(
        "<|im_start|>assistant\n3<|im_end|>\n<|im_start|>user\nAnd stars?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "evil", ["<|image_pad|>", "<|im_end|>", "<|latent_0|>", "</answer>", "\ue0000\ue001"]
)
def test_special_tokens_typed_by_a_user_stay_text(evil):
    fmt = make()
    special = set(
        fmt.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|im_end|>", *new_tokens(3, "diverse")])
    )
    assert not special & set(fmt.text(f"a {evil} b"))
    clean, _ = fmt.prompt([("user", "<image>\na b")], [2])
    ids, image = fmt.prompt([("user", f"<image>\na {evil} b")], [2])
    assert len(image) == 2 and all(ids.count(t) == clean.count(t) for t in special)
    assert evil in fmt.tokenizer.decode(ids)
    layout = fmt.latent(TURNS, [2], f"x {evil}")
    assert sum(t in special for t in layout.ids[layout.answer[0] :]) == 3  # <answer>, </answer>, <|im_end|>


@pytest.mark.parametrize("kind", ["diverse", "identical"])
def test_latent_layout(kind):
    fmt = make(3, kind)
    x = fmt.latent(TURNS, [2], "red", ["I look."])
    prompt, _ = fmt.prompt(TURNS, [2])
    assert x.ids[: len(prompt)] == prompt
    said = fmt.tokenizer.decode(x.ids[len(prompt) :])
    names = "<|latent_0|><|latent_1|><|latent_2|>" if kind == "diverse" else "<|latent_0|>" * 3
    assert said == f"<think> {THOUGHT}{names}. </think><answer>red</answer><|im_end|>"
    assert [x.ids[i] for i in x.latents] == fmt.latents
    assert (
        x.ids[x.thought[0]] == fmt.think_start_id
        and x.ids[x.thought[1] - 1] == fmt.think_end_id
        and x.thought[1] == x.answer[0]
    )
    assert x.ids[x.answer[0]] == fmt.answer_start_id and x.answer[1] == len(x.ids)
    # everything the assistant says is a label, predicted by the row before it
    assert (
        all(t == IGNORE for t in x.targets[: len(prompt) - 1])
        and x.targets[len(prompt) - 1 : -1] == x.ids[len(prompt) :]
        and x.targets[-1] == IGNORE
    )
    assert x.answer_positions == list(range(x.answer[0], len(x.ids) - 1))


def test_the_answer_alone_as_label():
    fmt = make(3)
    x = fmt.latent(TURNS, [2], "red", labels="answer")
    assert (
        fmt.tokenizer.decode([t for t in x.targets if t != IGNORE]) == "red</answer><|im_end|>"
        and [x.targets[r] for r in x.answer_positions] == x.ids[x.answer[0] + 1 :]
    )
    assert x.ids == fmt.latent(TURNS, [2], "red").ids


def test_plain_layout():
    fmt = make(0)
    x = fmt.plain(TURNS, [2], "red")
    assert fmt.tokenizer.decode([t for t in x.targets if t != IGNORE]) == "red<|im_end|>"
    assert [x.targets[r] for r in x.answer_positions] == x.ids[x.answer[0] :]


def test_thought_of_the_record():
    fmt = make(2, thought="cot")
    x = fmt.latent(TURNS, [2], "red", ["I look.", "It is red."])
    assert "<think> I look. It is red.<|latent_0|><|latent_1|>. </think>" in fmt.tokenizer.decode(x.ids)
    assert THOUGHT in fmt.tokenizer.decode(fmt.latent(TURNS, [2], "red").ids)  # a record without one
    assert fmt.question(TURNS, [2])[0][-1] == fmt.think_start_id  # the model writes the rest itself


def test_prompts_to_generate_from():
    fmt = make()
    x = fmt.latent(TURNS, [2], "red")
    ids, _, latents = fmt.question(TURNS, [2])
    assert ids == x.ids[: x.answer[0] + 1] and latents == x.latents
    dropped, _, none = fmt.question(TURNS, [2], "drop")
    assert dropped == [t for t in ids if t not in fmt.latents] and none == []
    assert fmt.question(TURNS, [2], "none")[0] == fmt.prompt(TURNS, [2])[0]


@pytest.mark.parametrize("kind, thought", [("diverse", "fixed"), ("identical", "fixed"), ("diverse", "cot")])
def test_the_exported_template_asks_as_training_does(kind, thought):
    """What stock tools render with it, encoded, is the prompt that the model was trained to answer; a
    finished talk stays as it was.
    """
    fmt = make(3, kind, thought)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What colour is the small star?"}],
        }
    ]
    template = fmt.chat_template()
    asked = fmt.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert fmt.tokenizer.encode(asked, add_special_tokens=False) == fmt.question(TURNS, [1])[0]
    finished = [*messages, {"role": "assistant", "content": "red"}]
    for how in (template, None):
        rendered = fmt.tokenizer.apply_chat_template(finished, chat_template=how, tokenize=False)
        assert rendered.endswith("red<|im_end|>\n") and "<think>" not in rendered
    assert make(0).chat_template() == fmt.tokenizer.chat_template
