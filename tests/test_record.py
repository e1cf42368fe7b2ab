"""record_attention against written-out attention of stock models: values, gradients, padding, windows,
and what it refuses.
"""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import crystal
import crystal.backbone.model

SIZE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, initializer_range=0.2,
)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE)),
}
IDS = torch.randint(1, 64, (2, 11), generator=torch.Generator().manual_seed(1))
QUERIES, KEYS = [[5, 10, -1], [3, 7, 9]], [[0, 4, 8], [2, 3, -1]]
MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 11, [1] * 10 + [0]]),
    "left": torch.tensor([[1] * 11, [0, 0] + [1] * 9]),
}


def expected(weights):
    """[B,H,L,L] of a layer -> the slice [B,H,M,K]; zero where either position is -1."""
    out = torch.zeros(2, weights.shape[1], 3, 3)
    for b in range(2):
        for m, q in enumerate(QUERIES[b]):
            for n, k in enumerate(KEYS[b]):
                if q >= 0 and k >= 0:
                    out[b, :, m, n] = weights[b, :, q, k]
    return out


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_the_slice_is_written_out_attention(name, padding):
    torch.manual_seed(2)
    model = MODELS[name]().eval()
    own = model.config._attn_implementation
    with crystal.record_attention(model, [0, 2], QUERIES, KEYS) as recorder:
        out = model(IDS, attention_mask=MASKS[padding])
    assert model.config._attn_implementation == own
    A = recorder.slices
    loss = (A[2] * torch.arange(3.0)).sum()
    found = torch.autograd.grad(loss, model.model.layers[1].self_attn.k_proj.weight)[0]

    model.set_attn_implementation("eager")
    eager = model(IDS, attention_mask=MASKS[padding], output_attentions=True)
    real = slice(None) if padding == "none" else MASKS[padding].bool()
    assert torch.allclose(out.logits[real], eager.logits[real], atol=1e-5)
    for layer in (0, 2):
        assert torch.allclose(A[layer], expected(eager.attentions[layer]), atol=1e-6)
    right = torch.autograd.grad(
        (expected(eager.attentions[2]) * torch.arange(3.0)).sum(),
        model.model.layers[1].self_attn.k_proj.weight,
    )[0]
    assert torch.allclose(found, right, atol=1e-6) and right.abs().max() > 1e-4


def test_a_vision_model_and_crystals_own(model_dirs, setup):
    """The tower's attention is no layer of the decoder; a crystal Model and its bare transformers
    model give the same.
    """
    s = setup()
    batch = {
        n: s.batch[n]
        for n in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    }
    stock = AutoModelForImageTextToText.from_pretrained(model_dirs[True]).eval()
    at, keys = s.batch["answer_positions"][:, :1], s.batch["image"][:, :4]
    with crystal.record_attention(stock, [1], at, keys) as recorder:
        stock(**batch)
    stock.set_attn_implementation("eager")
    weights = stock(**batch, output_attentions=True).attentions[1]
    right = torch.stack([weights[b][:, at[b]][:, :, keys[b]] for b in range(len(at))])
    assert torch.allclose(recorder.slices[1], right.masked_fill((keys < 0)[:, None, None], 0), atol=1e-5)

    ours = crystal.backbone.model.load(str(model_dirs[True]))
    with crystal.record_attention(ours, [1], at, keys) as again:
        ours.hf(**batch)
    assert torch.allclose(again.slices[1], recorder.slices[1], atol=1e-6)
    assert ours.hf.config.get_text_config()._attn_implementation == "crystal"


def test_two_at_a_time_and_a_forward_of_ones_own_kind():
    model = MODELS["llama"]().eval()
    with (
        crystal.record_attention(model, [0], QUERIES, KEYS) as first,
        crystal.record_attention(model, [1], [[4]] * 2, [[1]] * 2) as second,
    ):
        model(IDS)
    assert first.slices[0].shape == (2, 4, 3, 3) and second.slices[1].shape == (2, 4, 1, 1)
    model(IDS)  # nothing is read any more
    assert model.config._attn_implementation == "sdpa"


def test_what_no_slice_describes_is_refused():
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZE, attn_logit_softcapping=20.0)).eval()
    with (
        pytest.raises(ValueError, match="record_attention: layer 0 has softcap"),
        crystal.record_attention(capped, [0], QUERIES, KEYS),
    ):
        capped(IDS)
    model = MODELS["llama"]().eval()
    cache = model(IDS, use_cache=True).past_key_values
    with (
        pytest.raises(ValueError, match="record_attention: 1 queries for 12 keys"),
        crystal.record_attention(model, [0], [[0]] * 2, [[0]] * 2),
    ):
        model(IDS[:, :1], past_key_values=cache)
    for layers, queries, keys, says in (
        ([3], QUERIES, KEYS, "layer 3 of a model with 3 layers"),
        ([-1], QUERIES, KEYS, "layer -1"),
        ([0], [1, 2], KEYS, r"not \[2\] and"),
        ([0], [[1]], KEYS, r"not \[1, 1\] and \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=says), crystal.record_attention(model, layers, queries, keys):
            pass
    assert model.config._attn_implementation == "sdpa"
