"""The realisations of the copy are one thing: equal logits, losses and gradients; without the copy all of them change."""
import pytest
import torch
from conftest import gradients

from crystal import latent_copy
from crystal.latent_copy import LatentCopy, dual_forward

PRESETS = {"paper": [], "released": ["--preset", "released", "--lora_dropout", "0"], "all layers, frobenius": ["--attn_layers", "all", "--attn_loss", "frobenius"],
           "identical": ["--latent_kind", "identical"], "all columns": ["--attn_columns", "all"], "full": ["--tune", "full"], "checkpointing": ["--checkpointing"]}


def step(setup, *flags, **how):
    s = setup("--teacher_grad", *flags, **how)
    terms = s.objective(s.batch, 0.0)
    terms = {n: t for n, t in terms.items()}
    return s, terms, gradients(sum(terms[n] for n in s.settings.weights if n in terms), s.named)


@pytest.mark.parametrize("preset, tied", [(p, False) for p in PRESETS] + [("paper", True), ("released", True)])
def test_hidden_equals_kv_in_float64(setup, float64_modules, preset, tied):
    s, hidden, g_hidden = step(setup, "--realisation", "hidden", *PRESETS[preset], tied=tied)
    _, kv, g_kv = step(setup, "--realisation", "kv", *PRESETS[preset], tied=tied)
    for name in hidden:
        assert abs(hidden[name] - kv[name]) < 1e-10, name
    assert max(g.abs().max() for g in g_hidden.values()) > 1e-3
    for name in g_hidden:
        assert (g_hidden[name] - g_kv[name]).abs().max() < 1e-10, name


def test_hidden_equals_kv_with_stock_modules(setup):
    _, hidden, g_hidden = step(setup, "--realisation", "hidden")
    _, kv, g_kv = step(setup, "--realisation", "kv")
    assert all(abs(hidden[n] - kv[n]) < 1e-6 for n in hidden)
    assert all((g_hidden[n] - g_kv[n]).abs().max() < 1e-6 for n in g_hidden)


def test_labelled_logits_are_equal_and_copied_rows_are_the_only_difference(setup, float64_modules):
    s = setup()
    copied = s.method.copied(s.batch)
    out = {how: dual_forward(s.model, s.batch, copied, how) for how in ("hidden", "kv")}
    real = s.batch["attention_mask"].bool()
    for which in (0, 1):
        h, k = out["hidden"][which], out["kv"][which]
        keep = real & ~copied if which else real  # kv leaves the corrupted path's copied rows as they are: nobody reads them
        assert (s.model.logits(h[keep]) - s.model.logits(k[keep])).abs().max() < 1e-10
    assert (out["hidden"][1][copied] - out["kv"][1][copied]).abs().max() > 1e-3


def test_removing_the_copy_changes_losses_and_gradients(setup, monkeypatch):
    _, shared, g_shared = step(setup, "--realisation", "hidden")
    monkeypatch.setattr(latent_copy, "_share", lambda x, mask: x)
    _, apart, g_apart = step(setup, "--realisation", "hidden")
    assert abs(shared["ce_int"] - apart["ce_int"]) < 1e-12  # the intact path never sees the other
    assert all(abs(shared[n] - apart[n]) > 1e-5 for n in ("ce_cor", "kl", "attn"))
    assert any((g_shared[n] - g_apart[n]).abs().max() > 1e-4 for n in g_shared)


def test_gradient_flows_through_the_copy_into_the_intact_path(setup):
    """CE_cor alone moves the intact image: through nothing but the latents that it lent."""
    s = setup()
    pixels = s.batch["pixel_values"].requires_grad_()
    s.objective(s.batch, 0.0)["ce_cor"].backward()
    assert pixels.grad.abs().max() > 0


def test_the_corrupted_latents_are_the_intact_ones_at_every_layer(setup):
    s = setup()
    copied, seen = s.method.copied(s.batch), []
    for layer in s.model.layers[1:]:
        layer.register_forward_pre_hook(lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    dual_forward(s.model, s.batch, copied, "hidden")
    assert len(seen) == len(s.model.layers) - 1
    for h in seen:
        h_int, h_cor = h.chunk(2)
        assert torch.equal(h_int[copied], h_cor[copied]) and not torch.equal(h_int[~copied], h_cor[~copied])


def test_unknown_realisation():
    with pytest.raises(ValueError, match="choose hidden or kv"):
        LatentCopy(torch.zeros(1, 1, dtype=torch.bool), "packed?")
