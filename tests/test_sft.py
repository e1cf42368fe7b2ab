"""Plain fine-tuning: the answer's cross-entropy, equal to what transformers computes from labels."""

import torch
from conftest import gradients

from crystal.layout import IGNORE


def test_loss_is_transformers_own(setup):
    s = setup("--method", "sft", which=[0])
    b = s.batch
    labels = torch.full_like(b["input_ids"], IGNORE)
    labels[:, 1:] = b["targets"][:, :-1]
    stock = s.model.hf(
        input_ids=b["input_ids"],
        pixel_values=b["pixel_values"],
        image_grid_thw=b["image_grid_thw"],
        mm_token_type_ids=b["mm_token_type_ids"],
        attention_mask=b["attention_mask"],
        labels=labels,
    ).loss
    assert abs(s.objective(b, 0.0)["ce"] - stock) < 1e-6
    assert [t for t in b["targets"][0].tolist() if t != IGNORE] == s.fmt.text("red") + [s.fmt.end]


def test_every_adapter_learns_and_nothing_else(setup):
    s = setup("--method", "sft")
    grads = gradients(s.objective(s.batch, 0.0)["ce"], s.named)
    assert all("lora_" in n for n in grads) and all(g.abs().max() > 0 for g in grads.values())
    assert s.model.new_tokens is None


def test_text_alone_trains_too(setup, tmp_path):
    """A record without an image: the plain method does not need one."""
    import json

    from crystal.runtime import data

    (tmp_path / "t.jsonl").write_text(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "What colour is grass?"},
                    {"role": "assistant", "content": "green"},
                ]
            }
        )
    )
    s = setup("--method", "sft")
    s.examples.records, _ = data.read(tmp_path / "t.jsonl")
    batch = data.to_device(
        data.collate([s.examples[0, 0]], s.model.tokenizer.pad_token_id), torch.device("cpu"), torch.float64
    )
    loss = s.objective(batch, 0.0)["ce"]
    assert loss.isfinite() and loss > 0
