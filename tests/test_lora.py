"""Adapters and trainable tokens: the values, the gradients, what does not move, and that other tools
load what is saved.
"""

import copy
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import put_in
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from crystal.lora import (
    LoRALinear,
    TrainableTokens,
    adapter_config,
    adapter_state,
    adapters,
    add_lora,
    load_adapter,
    save_adapter,
)

V, IMAGE, IDS = 96, 90, [80, 3, 77]  # ids out of order on purpose
LANGUAGE = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VISION = r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)"
EVERYWHERE = f"{LANGUAGE}|{VISION}|" + r"model\.visual\.merger\.mlp\.\d+"
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def tiny(tied, dtype=torch.float32, seed=0):
    """A frozen random Qwen2.5-VL: 2 decoder layers, hidden size 64, a vision tower of depth 1."""
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=V,
            initializer_range=0.1,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
        ),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
            fullatt_block_indexes=[0], initializer_range=0.1,
        ),
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_(std=0.1)  # they start as zeros, in which a change by a factor would go unseen
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    return model


def batch(model, ids=IDS):
    """Two sequences, each with an image of 4 tokens; `ids` occur several times, and as labels."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 70, (2, 20), generator=g)
    tokens[tokens == 3] = 5
    tokens[:, 2:6] = IMAGE
    for i, t in enumerate(ids):
        tokens[0, 8 + i] = tokens[1, 12 + 2 * i] = tokens[0, 16] = t
    pixels = torch.randn(32, 3 * 2 * 14 * 14, generator=g).to(model.dtype)
    return dict(
        input_ids=tokens,
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
        mm_token_type_ids=(tokens == IMAGE).int(),
    )


def logits(model, b):
    return model(**b, use_cache=False).logits  # [2,20,V]


def loss(model, b):
    z = logits(model, b)
    return F.cross_entropy(z[:, :-1].flatten(0, 1), b["input_ids"][:, 1:].flatten())


def adapted(tied, dtype=torch.float32, pattern=EVERYWHERE, r=16, alpha=32, dropout=0.0):
    """A tiny model with trainable tokens and adapters that differ from their initial values -> (model, rows).
    """
    model, g = tiny(tied, dtype), torch.Generator().manual_seed(2)
    rows = TrainableTokens(model.get_input_embeddings(), model.lm_head, IDS)
    add_lora(model, pattern, r, alpha, dropout, g)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g) * 0.05)
        for _, P in rows.pairs():
            P.add_(torch.randn(P.shape, generator=g) * 0.1)
    rows.sync()
    return model, rows


# --- low-rank adapters ---


def test_wraps_exactly_what_matches():
    model = tiny(True)
    before = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = add_lora(model, LANGUAGE, r=4)
    assert len(names) == 14 and names == list(adapters(model)) and set(names) <= before
    layer, base = (
        model.model.language_model.layers[0].self_attn.q_proj,
        tiny(True).model.language_model.layers[0].self_attn.q_proj,
    )
    assert isinstance(layer, LoRALinear) and not layer.training
    assert torch.equal(layer.weight, base.weight) and torch.equal(layer.bias, base.bias)
    assert (layer.in_features, layer.out_features) == (64, 64)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{n}.lora_{x}" for n in names for x in "AB"
    }
    # The whole name must match, a Linear gets one adapter, and the Linear inside an adapter is
    # not a new target.
    for pattern in (r"model\.visual\.merger", LANGUAGE, r".*q_proj\.base"):
        with pytest.raises(ValueError, match="no nn.Linear without an adapter"):
            add_lora(model, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_starts_as_the_base_and_from_a_seed(dtype):
    model = tiny(True, dtype)
    expected = logits(model, batch(model))
    add_lora(model, EVERYWHERE, generator=torch.Generator().manual_seed(7))
    assert torch.equal(logits(model, batch(model)), expected)
    other, again = tiny(True, dtype), tiny(True, dtype, seed=1)
    add_lora(again, EVERYWHERE, generator=torch.Generator().manual_seed(7))
    add_lora(other, EVERYWHERE, generator=torch.Generator().manual_seed(8))
    for name, layer in adapters(model).items():
        # Kaiming-uniform: gain sqrt(2 / (1 + 5)), so gain sqrt(3 / in) = in^-1/2.
        bound = layer.in_features**-0.5
        assert (
            layer.lora_A.dtype
            == layer.lora_B.dtype
            == (torch.float64 if dtype == torch.float64 else torch.float32)
        )
        assert 0.9 * bound < layer.lora_A.abs().max() <= bound and not layer.lora_B.any()
        assert torch.equal(layer.lora_A, adapters(again)[name].lora_A) and not torch.equal(
            layer.lora_A, adapters(other)[name].lora_A
        )


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (0, 64)])
def test_formula(shape):
    torch.manual_seed(0)
    base = nn.Linear(64, 48).double().requires_grad_(False)
    layer = LoRALinear(base, r=4, alpha=6)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape, dtype=torch.float64)
    expected = x @ (base.weight + 1.5 * layer.lora_B @ layer.lora_A).T + base.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


@pytest.mark.gradcheck
@pytest.mark.parametrize("bias", [True, False])
def test_lora_gradient(bias):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(5, 4, bias=bias).double().requires_grad_(False), r=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def f(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, x)

    assert torch.autograd.gradcheck(f, (x, layer.lora_A, layer.lora_B))


def test_dropout_is_seeded_and_only_in_training():
    torch.manual_seed(0)
    base = nn.Linear(64, 48).double().requires_grad_(False)
    layer = LoRALinear(base, r=4, alpha=4, dropout=0.25)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 64, dtype=torch.float64)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    torch.manual_seed(0)
    kept = F.dropout(x, 0.25)  # the base sees x, the adapter what dropout leaves of it
    torch.testing.assert_close(run(0), base(x) + kept @ layer.lora_A.T @ layer.lora_B.T, rtol=0, atol=1e-13)
    layer.eval()
    assert torch.equal(run(0), run(1))


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-5), (torch.float32, 2e-5), (torch.bfloat16, 0.15)], ids=str
)
@TIED
def test_merged_weights(tied, dtype, tolerance):
    # Stock float64 modules still compute RMSNorm in float32, hence 1e-5 there too.
    model, rows = adapted(tied, dtype)
    b = batch(model)
    before, weights = logits(model, b), {n: w.clone() for n, w in model.state_dict().items()}
    layers = adapters(model)
    put_in(model)
    assert not adapters(model) and set(model.state_dict()) == set(tiny(tied).state_dict())
    assert (logits(model, b) - before).abs().max() < tolerance
    for name, W in model.state_dict().items():
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            assert torch.equal(W, weights.get(name, weights.get(name.replace(".bias", ".base.bias")))), name
            continue
        own = weights[name.replace(".weight", ".base.weight")]
        wide = own.to(layer.lora_A.dtype)
        assert torch.equal(layer.merged(own), W)
        assert torch.equal(W, (wide + 2 * (layer.lora_B @ layer.lora_A)).to(dtype)), name
        assert not torch.equal(W, wide.to(dtype)) and W.dtype == dtype


# --- trainable rows of the vocabulary ---


def full_gradient(model, b):
    """Gradients [V,D] of embedding and head when the whole vocabulary trains."""
    plain = copy.deepcopy(model)
    E, H = plain.get_input_embeddings().weight.requires_grad_(), plain.lm_head.weight.requires_grad_()
    loss(plain, b).backward()
    return E.grad, H.grad


@TIED
def test_row_gradients_are_those_of_full_training(tied):
    model = tiny(tied, torch.float64)
    b = batch(model)
    expected = full_gradient(model, b)
    rows = TrainableTokens(model.get_input_embeddings(), model.lm_head, IDS)
    assert [n for n, _ in rows.named_parameters()] == (["embedding"] if tied else ["embedding", "head"])
    loss(model, b).backward()
    for (_, P), dW in zip(rows.pairs(), expected):
        assert P.dtype == torch.float64 and P.grad.abs().max() > 1e-3
        torch.testing.assert_close(P.grad, dW[IDS], rtol=0, atol=1e-15 * 4)


@TIED
def test_no_other_row_ever_moves(tied):
    model = tiny(tied)
    start = {n: w.clone() for n, w in model.state_dict().items()}
    rows = TrainableTokens(model.get_input_embeddings(), model.lm_head, IDS)
    add_lora(model, LANGUAGE)
    trained = [p for m in (model, rows) for p in m.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    b, losses = batch(model), []
    for _ in range(4):
        losses.append(loss(model, b))
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
        rows.sync()
    assert losses[-1] < losses[0]
    others = [i for i in range(V) if i not in IDS]
    assert all(torch.equal(module.weight[IDS], P) for module, P in rows.pairs())
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        W = model.state_dict()[name]
        assert (
            torch.equal(W[others], start[name][others])
            and ((W - start[name])[IDS].abs().amax(1) > 1e-3).all()
        )
    # Values with the hooks are those of a plain model that holds the same rows, gradients on or not.
    plain = tiny(tied, seed=5)
    put_in(model)
    plain.load_state_dict(model.state_dict())
    with_hooks = logits(model, b)
    assert with_hooks.requires_grad and torch.equal(with_hooks, logits(plain, b))
    with torch.no_grad():
        assert torch.equal(logits(model, b), with_hooks)
    rows.remove()
    assert not logits(model, b).requires_grad and torch.equal(logits(model, b), with_hooks)


@TIED
def test_rows_of_bfloat16_weights(tied):
    model = tiny(tied, torch.bfloat16)
    b, before = batch(model), logits(model, batch(model))
    expected = full_gradient(model, b)
    rows = TrainableTokens(model.get_input_embeddings(), model.lm_head, IDS)
    assert torch.equal(logits(model, b), before)
    loss(model, b).backward()
    for (module, P), dW in zip(rows.pairs(), expected):
        assert P.dtype == P.grad.dtype == torch.float32
        torch.testing.assert_close(P.grad, dW[IDS].float(), rtol=0.05, atol=0.02 * dW.abs().max().item())
        with torch.no_grad():
            P += 1e-4  # far below bfloat16's resolution of most rows: P keeps it, W rounds it
        rows.sync()
        assert torch.equal(module.weight[IDS], P.bfloat16()) and not torch.equal(
            module.weight[IDS].float(), P
        )


@TIED
def test_absent_ids_get_zeros(tied):
    # In the head the rows are competitors wherever a token is predicted; zeros there need
    # logits that nothing reads.
    model = tiny(tied)
    rows = TrainableTokens(model.get_input_embeddings(), model.lm_head, IDS)
    b = batch(model, ids=[])
    others = [i for i in range(V) if i not in IDS]
    logits(model, b)[..., others].sum().backward()
    for _, P in rows.pairs():
        assert P.grad is not None and not P.grad.any()


def test_any_leading_shape():
    torch.manual_seed(0)
    embed, head = (
        nn.Embedding(9, 4).double().requires_grad_(False),
        nn.Linear(4, 9, bias=False).double().requires_grad_(False),
    )
    rows = TrainableTokens(embed, head, [8, 1])
    for shape in ((), (5,), (2, 3), (2, 1, 3), (0,)):
        ids = torch.randint(9, shape)
        h = embed(ids)
        assert h.shape == (*shape, 4) and torch.equal(h, embed.weight[ids])
        z = head(h)
        assert torch.equal(z, F.linear(h, head.weight))
        z.sum().backward()
        torch.testing.assert_close(
            rows.head.grad, h.detach().reshape(-1, 4).sum(0).expand(2, 4), rtol=0, atol=1e-14
        )
        rows.zero_grad()


@TIED
def test_gradients_under_checkpointing(tied):
    gradients = []
    for recompute in (False, True):
        model, rows = adapted(tied, dropout=0.1)
        model.train()
        if recompute:  # this name warns from transformers 5.23 on, the new one is not in 5.17
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.model.language_model.layers[0].gradient_checkpointing
        torch.manual_seed(3)
        loss(model, batch(model)).backward()
        gradients.append(
            {n: p.grad for m in (model, rows) for n, p in m.named_parameters() if p.requires_grad}
        )
    plain, recomputed = gradients
    assert len(plain) == len(recomputed) == 2 * len(adapters(model)) + (1 if tied else 2)
    for name, g in plain.items():
        assert g.abs().max() > 0 and torch.equal(g, recomputed[name]), name


def test_misuse_of_rows():
    model = tiny(True)
    embed = model.get_input_embeddings()
    for ids in ([], [1, 1], [-1], [V]):
        with pytest.raises(ValueError, match="need different ids"):
            TrainableTokens(embed, model.lm_head, ids)
    with pytest.warns(UserWarning, match="pass a tied head too"):
        assert TrainableTokens(embed, None, IDS).tied
    rows = TrainableTokens(embed, model.lm_head, IDS)
    embed.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="must be frozen"):
        rows.sync()


# --- on disk ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@TIED
def test_peft_and_transformers_load_it(tied, dtype, tmp_path):
    from peft import PeftModel

    model, rows = adapted(tied, dtype)
    b = batch(model)
    with torch.no_grad():
        expected = logits(model, b)
        base = logits(tiny(tied, dtype), b)
        save_adapter(tmp_path, model, rows, "base")
        peft = PeftModel.from_pretrained(tiny(tied, dtype), tmp_path).eval()
        stock = tiny(tied, dtype)
        stock.load_adapter(str(tmp_path))
        # alpha / r is a power of two here, so order of operations cannot matter in float32: equal to the bit.
        for name, other in {"peft": peft, "transformers": stock}.items():
            found = {
                n.split(".lora_A")[0].removeprefix("base_model.model.")
                for n, _ in other.named_parameters()
                if "lora_A" in n
            }
            assert found == set(adapters(model)), name
            z = logits(other, b)
            if dtype == torch.float32:
                assert torch.equal(z, expected), name
            else:  # peft adds the adapter in float32, crystal in x's dtype
                assert (z - expected).abs().max() < 0.05 * (base - expected).abs().max(), name
        if dtype == torch.float32:
            put_in(model)
            assert (logits(peft.merge_and_unload(), b) - logits(model, b)).abs().max() < 1e-6


def test_peft_saves_the_same_keys(tmp_path):
    from peft import PeftModel

    for tied in (True, False):
        model, rows = adapted(tied)
        model.config.save_pretrained(tmp_path / "base")
        save_adapter(tmp_path / "ours", model, rows, tmp_path / "base")
        PeftModel.from_pretrained(tiny(tied), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
        ours, theirs = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("ours", "theirs"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        names = ["model.language_model.embed_tokens"] + ([] if tied else ["lm_head"])
        assert {k for k in ours if "lora" not in k} == {
            f"base_model.model.{n}.token_adapter.trainable_tokens_delta" for n in names
        }
        assert adapter_config(model, rows, "base")["trainable_token_indices"] == {n: IDS for n in names}
        config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
        for key, value in adapter_config(model, rows, tmp_path / "base").items():
            if key != "target_modules":  # peft shortens the names
                assert config[key] == value, key


@TIED
@pytest.mark.parametrize("with_rows", [True, False], ids=["rows", "no_rows"])
def test_round_trip(tied, with_rows, tmp_path):
    model, rows = adapted(tied)
    if not with_rows:
        rows.remove()
        model, rows = tiny(tied), None
        add_lora(model, LANGUAGE)
    b = batch(model)
    save_adapter(tmp_path / "a", model, rows, "base")
    other = tiny(tied)
    other_rows = TrainableTokens(other.get_input_embeddings(), other.lm_head, IDS) if with_rows else None
    add_lora(other, EVERYWHERE if with_rows else LANGUAGE, generator=torch.Generator().manual_seed(9))
    load_adapter(tmp_path / "a", other, other_rows)
    state = adapter_state(model, rows)
    assert state.keys() == adapter_state(other, other_rows).keys() and all(
        torch.equal(v, adapter_state(other, other_rows)[k]) for k, v in state.items()
    )
    assert torch.equal(logits(model, b), logits(other, b))
    with torch.no_grad():  # what was taken is a copy, not the parameter that trains on
        adapters(model)[name := next(iter(adapters(model)))].lora_A.zero_()
    assert state[f"base_model.model.{name}.lora_A.weight"].any()


def test_a_wrong_file_is_refused_whole(tmp_path):
    model, rows = adapted(False)
    save_adapter(tmp_path, model, rows, "base")
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    state, settings = load_file(weights), json.loads(config.read_text())
    q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    delta = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    with torch.no_grad():
        for p in (*rows.parameters(), *(layer.lora_A for layer in adapters(model).values())):
            p.zero_()

    def refused(*words):
        with pytest.raises(ValueError) as error:
            load_adapter(tmp_path, model, rows)
        assert all(w in str(error.value) for w in words), error.value
        assert not rows.embedding.any() and not adapters(model)["model.visual.blocks.0.attn.qkv"].lora_A.any()

    for broken, words in (
        ({k: v for k, v in state.items() if k != q}, ("no key", q)),
        ({k: v for k, v in state.items() if k != delta}, ("no key", delta)),
        (state | {"base_model.model.extra": torch.zeros(1)}, ("base_model.model.extra", "no place")),
        (state | {q: state[q][:8].clone()}, (q, "[8, 64]", "[16, 64]")),
    ):
        save_file(broken, weights)
        refused(str(weights), *words)
    save_file(state, weights)
    for key, value in (
        ("r", 8), ("lora_alpha", 16), ("peft_type", "LOHA"), ("trainable_token_indices", None),
    ):
        config.write_text(json.dumps(settings | {key: value}))
        refused(str(config), key)
    for text in ("", "[1]", "\xff"):
        config.write_text(text)
        refused(str(config), "not a readable adapter config")
    config.write_text(json.dumps(settings))
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(str(weights), "not a readable safetensors file")
    weights.unlink()
    refused(str(weights), "not a readable safetensors file")


def test_one_kind_of_adapter_per_file(tmp_path):
    model = tiny(True)
    with pytest.raises(ValueError, match="has 0"):
        save_adapter(tmp_path / "none", model, None, "base")
    add_lora(model, LANGUAGE, r=4)
    add_lora(model, VISION, r=8)
    with pytest.raises(ValueError, match="has 2"):
        save_adapter(tmp_path / "none", model, None, "base")
    assert not (tmp_path / "none").exists()


def test_the_adapters_file_says_what_the_adapter_is():
    """Typed out: PEFT's keys, an alpha that is no whole number as it is, and one that is as one."""
    model = tiny(False)
    names = add_lora(
        model, r"model\.language_model\.layers\.1\.self_attn\.[qv]_proj", r=3, alpha=4.5, dropout=0.25
    )
    assert names == [f"model.language_model.layers.1.self_attn.{x}_proj" for x in "qv"]
    assert adapter_config(model, None, "base/model") == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base/model",
        "r": 3,
        "lora_alpha": 4.5,
        "lora_dropout": 0.25,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": names,
        "trainable_token_indices": None,
    }
    whole = tiny(True)
    add_lora(whole, LANGUAGE, r=2, alpha=5.0)
    written = adapter_config(whole, TrainableTokens(whole.get_input_embeddings(), whole.lm_head, [7, 2]), "b")
    assert isinstance(written["lora_alpha"], int) and written["lora_alpha"] == 5
    assert written["trainable_token_indices"] == {"model.language_model.embed_tokens": [7, 2]}


def test_rows_are_written_to_their_own_places():
    """ids out of order.

    Each trained row goes to its own vocabulary row, of the embedding and of the head, and nowhere else.
    """
    embed = nn.Embedding(9, 4).requires_grad_(False)
    head = nn.Linear(4, 9, bias=False).requires_grad_(False)
    before = embed.weight.clone(), head.weight.clone()
    rows = TrainableTokens(embed, head, [8, 1, 5])
    assert torch.equal(rows.embedding, before[0][[8, 1, 5]]) and torch.equal(rows.head, before[1][[8, 1, 5]])
    with torch.no_grad():
        rows.embedding.copy_(torch.arange(12.0).view(3, 4))
        rows.head.copy_(-torch.arange(12.0).view(3, 4))
    assert torch.equal(embed.weight, before[0])  # not before sync
    rows.sync()
    for weight, start, sign in ((embed.weight, before[0], 1), (head.weight, before[1], -1)):
        assert (sign * weight[8]).tolist() == [0, 1, 2, 3] and (sign * weight[1]).tolist() == [4, 5, 6, 7]
        assert (sign * weight[5]).tolist() == [8, 9, 10, 11]
        others = [0, 2, 3, 4, 6, 7]
        assert torch.equal(weight[others], start[others])


def test_row_gradients_by_hand():
    """Of sum(c * logits) with one token in, by hand.

    The head's row i gets c_i h, the embedding's row what comes back to it.
    """
    embed = nn.Embedding(6, 3).double().requires_grad_(False)
    head = nn.Linear(3, 6, bias=False).double().requires_grad_(False)
    rows = TrainableTokens(embed, head, [4, 0])
    c = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0], dtype=torch.float64)
    (head(embed(torch.tensor([4, 1, 4]))) * c).sum().backward()
    back = (c[:, None] * head.weight).sum(0)
    assert torch.allclose(rows.embedding.grad, torch.stack([2 * back, 0 * back]))
    seen = 2 * embed.weight[4] + embed.weight[1]
    assert torch.allclose(rows.head.grad, torch.stack([11 * seen, 2 * seen]))
