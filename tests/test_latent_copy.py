"""The realisations of the copy are one thing: equal logits, losses and gradients; without the copy
all of them change.
"""

import pytest
import torch
from conftest import gradients

from crystal import latent_copy
from crystal.attention_bias import additive_mask
from crystal.latent_copy import LatentCopy, dual_forward, pack

PRESETS = {
    "paper": [],
    "released": ["--method", "released", "--lora_dropout", "0"],
    "all layers, frobenius": ["--attn_layers", "all", "--attn_loss", "frobenius"],
    "identical": ["--latent_kind", "identical"],
    "all columns": ["--attn_columns", "all"],
    "full": ["--tune", "full"],
    "checkpointing": ["--checkpointing"],
}
# Of packed alone: its slice is read elsewhere.
MORE = {
    "mse": ["--attn_loss", "mse", "--attn_layers", "0,2"],
    "heads' mean": ["--attn_heads", "mean", "--attn_columns", "thought"],
    "cot": ["--thought", "cot", "--method", "released", "--lora_dropout", "0"],
    "checkpointing, released": ["--method", "released", "--lora_dropout", "0", "--checkpointing"],
}


def step(setup, *flags, **how):
    s = setup("--teacher_grad", *flags, **how)
    terms = s.objective(s.batch, 0.0)
    terms = {n: t for n, t in terms.items()}
    return s, terms, gradients(sum(terms[n] for n in s.settings.weights if n in terms), s.named)


@pytest.mark.parametrize(
    "preset, tied", [(p, False) for p in PRESETS] + [("paper", True), ("released", True)]
)
def test_hidden_equals_kv_in_float64(setup, float64_modules, preset, tied):
    s, hidden, g_hidden = step(setup, "--latent_copy", "hidden", *PRESETS[preset], tied=tied)
    _, kv, g_kv = step(setup, "--latent_copy", "kv", *PRESETS[preset], tied=tied)
    for name in hidden:
        assert abs(hidden[name] - kv[name]) < 1e-10, name
    assert max(g.abs().max() for g in g_hidden.values()) > 1e-3
    for name in g_hidden:
        assert (g_hidden[name] - g_kv[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize(
    "preset, tied", [(p, False) for p in PRESETS | MORE] + [("paper", True), ("released", True)]
)
def test_kv_equals_packed_in_float64(setup, float64_modules, preset, tied):
    flags = (PRESETS | MORE)[preset]
    s, kv, g_kv = step(setup, "--latent_copy", "kv", *flags, tied=tied)
    _, packed, g_packed = step(setup, "--latent_copy", "packed", *flags, tied=tied)
    # Padding, several images.
    assert len(set(s.batch["attention_mask"].sum(1).tolist())) > 1 and len(s.batch["image_grid_thw"]) > len(
        s.batch["input_ids"]
    )
    for name in kv:
        assert abs(kv[name] - packed[name]) < 1e-10, name
    assert max(g.abs().max() for g in g_kv.values()) > 1e-3
    for name in g_kv:
        assert (g_kv[name] - g_packed[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("other", ["kv", "packed"])
def test_all_equal_hidden_with_stock_modules(setup, other, preset):
    _, hidden, g_hidden = step(setup, "--latent_copy", "hidden", *PRESETS[preset])
    _, same, g_same = step(setup, "--latent_copy", other, *PRESETS[preset])
    assert all(abs(hidden[n] - same[n]) < 1e-6 for n in hidden)
    assert all((g_hidden[n] - g_same[n]).abs().max() < 1e-6 for n in g_hidden)


def test_packed_stands_as_the_paper_draws_it(setup):
    """prefix | I_cor Q thought | I_int Q thought latents | rest (int) | rest (cor), and its
    mask, cell by cell.
    """
    for flags, tail in (
        ((), lambda s, b: s.batch["latents"][b].max()),
        (("--method", "released"), lambda s, b: s.batch["thought"][b, 1] - 1),
    ):
        s = setup(*flags)
        image, copied = s.batch["mm_token_type_ids"] == 1, s.method.copied(s.batch)
        p = pack(s.batch["attention_mask"], image, copied)
        mask = additive_mask(p.blocks, (p.source >= 0).long())[:, 0] == 0  # [B,P,P], who sees whom
        for b in range(len(copied)):
            n, first, end = (
                int(s.batch["attention_mask"][b].sum()),
                int(s.batch["image"][b, 0]),
                int(tail(s, b)) + 1,
            )
            start = int(copied[b].nonzero()[0])
            paths = (
                ["both"] * first
                + ["cor"] * (start - first)
                + ["int"] * (end - first)
                + ["int"] * (n - end)
                + ["cor"] * (n - end)
            )
            places = [*range(first), *range(first, start), *range(first, end), *range(end, n), *range(end, n)]
            assert p.source[b].tolist() == places + [-1] * (p.source.shape[1] - len(places))
            for i, (path, t) in enumerate(zip(paths, places)):
                sees = [
                    (other in (path, "both") or (path == "cor" and bool(copied[b, u]))) and u <= t
                    for other, u in zip(paths, places)
                ]
                assert mask[b, i, : len(paths)].tolist() == sees, (path, t)
            assert mask[b].any(-1).all()  # no row is blind, padding included


def test_packed_in_one_path_only_what_the_other_lends(setup):
    """The corrupted path's gradient at the intact image passes the copied rows; the intact path has none
    at the corrupted one.
    """
    s = setup()
    batch = dict(
        s.batch,
        pixel_values=s.batch["pixel_values"].clone().requires_grad_(),
        pixel_values_cor=s.batch["pixel_values_cor"].clone().requires_grad_(),
    )
    none = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    real = batch["attention_mask"].bool()

    def reach(copied):
        h_int, h_cor = dual_forward(s.model, batch, copied, "packed")
        own = real if copied is None else real & ~copied
        return [
            torch.autograd.grad(
                h[rows].sum(), batch[x], allow_unused=True, retain_graph=True, materialize_grads=True
            )[0]
            .abs()
            .max()
            > 0
            for h, rows in ((h_int, real), (h_cor, own))
            for x in ("pixel_values", "pixel_values_cor")
        ]

    assert reach(s.method.copied(batch)) == [True, False, True, True]
    assert reach(none) == reach(None) == [True, False, False, True]


def test_packed_refuses_copied_rows_that_are_not_one_run(setup):
    s = setup(which=[0])
    copied = torch.zeros_like(s.batch["input_ids"], dtype=torch.bool)
    copied[0, [-5, -3]] = True
    with pytest.raises(ValueError, match="pair 0: realisation packed needs the copied positions in one run"):
        dual_forward(s.model, s.batch, copied, "packed")


def test_labelled_logits_are_equal_and_copied_rows_are_the_only_difference(setup, float64_modules):
    s = setup()
    copied = s.method.copied(s.batch)
    out = {how: dual_forward(s.model, s.batch, copied, how) for how in ("hidden", "kv", "packed")}
    real = s.batch["attention_mask"].bool()
    for which in (0, 1):
        h, k, p = (out[how][which] for how in ("hidden", "kv", "packed"))
        # Nobody reads the corrupted path's copied rows, and each leaves something else there.
        keep = real & ~copied if which else real
        for other in (k, p):
            assert (s.model.logits(h[keep]) - s.model.logits(other[keep])).abs().max() < 1e-10
    assert (out["hidden"][1][copied] - out["kv"][1][copied]).abs().max() > 1e-3


def test_removing_the_copy_changes_losses_and_gradients(setup, monkeypatch):
    _, shared, g_shared = step(setup, "--latent_copy", "hidden")
    monkeypatch.setattr(latent_copy, "_share", lambda x, mask: x)
    _, apart, g_apart = step(setup, "--latent_copy", "hidden")
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
        layer.register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
    dual_forward(s.model, s.batch, copied, "hidden")
    assert len(seen) == len(s.model.layers) - 1
    for h in seen:
        h_int, h_cor = h.chunk(2)
        assert torch.equal(h_int[copied], h_cor[copied]) and not torch.equal(h_int[~copied], h_cor[~copied])


def test_unknown_realisation():
    with pytest.raises(ValueError, match="choose hidden, kv or packed"):
        LatentCopy(torch.zeros(1, 1, dtype=torch.bool), "packed?")


@pytest.mark.parametrize("how", ["hidden", "kv", "packed"])
def test_a_batch_without_corrupted_images_is_told(setup, how):
    s = setup("--latent_copy", how)
    without = {n: x for n, x in s.batch.items() if n != "pixel_values_cor"}
    for batch in (without, s.batch | {"pixel_values_cor": None}):
        with pytest.raises(ValueError, match=r"no corrupted images \(pixel_values_cor\); give .*corruption"):
            s.method.losses(s.model, batch, None)
