"""Pictures: the numbers drawn are the model's and the log's, and wrong input is one clear line."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from crystal import corrupt, feedback
from crystal.corrupt import Corruption
from crystal.evaluation import figures
from crystal.latent_copy import LatentCopy
from crystal.runtime import data
from crystal.runtime.config import UserError


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in order."""
    saved, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda fig, path: saved.append(fig) or save(fig, path))
    return saved


def check_png(path, inches):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[:2] == (round(inches[1] * 150), round(inches[0] * 150))
    assert pixels.std() > 20, "blank"


def eager(s, batch, copied):
    """Every weight of both paths, [layers,2,H,L,L], and the last states, from
    transformers' own eager attention.
    """
    s.model.hf.set_attn_implementation({"text_config": "eager"})
    out = s.model.hf.model(
        input_ids=batch["input_ids"].repeat(2, 1),
        attention_mask=batch["attention_mask"].repeat(2, 1),
        position_ids=s.model.positions(batch).repeat(1, 2, 1),
        image_grid_thw=batch["image_grid_thw"].repeat(2, 1),
        pixel_values=torch.cat([batch["pixel_values"], batch["pixel_values_cor"]]),
        use_cache=False,
        output_attentions=True,
        latent_copy=None if copied is None else LatentCopy(copied, "hidden"),
    )
    s.model.hf.set_attn_implementation({"text_config": "crystal"})
    return torch.stack(out.attentions), out.last_hidden_state


def one(s, which, seed=0):
    """The batch of one record, corrupted whatever the method."""
    examples = data.RecordDataset(
        s.records,
        lambda r, n: s.method.layout(s.fmt, r, n),
        s.model.image_processor,
        Corruption("blur=8"),
        seed,
    )
    return data.to_device(
        data.collate([examples[0, which]], s.model.tokenizer.pad_token_id), torch.device("cpu"), torch.float64
    )


@pytest.mark.parametrize("which", [0, 2])  # a one-token answer; two images
@pytest.mark.parametrize(
    "flags", [(), ("--method", "released"), ("--latent_copy", "hidden"), ("--method", "sft")]
)
@pytest.mark.parametrize("layers", [{0, 1, 2}, {1}])
def test_answer_attention_equals_a_full_softmax(setup, flags, which, layers):
    s = setup(*flags)
    s.model.eval()
    batch = one(s, which)
    copied = s.method.copied(batch) if s.fmt.count else None
    found = figures.answer_attention(s.model, batch, s.settings, layers, copied)
    with torch.no_grad():
        weights, states = eager(s, batch, copied)
    row = batch["answer_positions"][0, 0]
    # It predicts the answer.
    assert s.model.tokenizer.decode(batch["targets"][0, row]) in s.records[which].answer
    weights = weights[sorted(layers), :, :, row].mean((0, 2))  # [2,L]
    h, w = batch["image_grid_thw"][0, 1:] // 2
    image, latents = batch["image"][0, : h * w], batch["latents"][0]
    assert found.image.shape == (2, h, w) and found.latents.shape == (2, len(latents))
    assert (found.image.flatten(1) - weights[:, image]).abs().max() < 1e-6
    if len(latents):
        assert (found.latents - weights[:, latents]).abs().max() < 1e-6
    others = torch.ones(weights.shape[1], dtype=torch.bool).index_fill(0, torch.cat([image, latents]), False)
    assert (found.rest - weights[:, others].sum(1)).abs().max() < 1e-6
    assert (found.logits - s.model.logits(states[:, row])).abs().max() < 1e-4 * found.logits.abs().max()
    assert (found.image[0] - found.image[1]).abs().max() > 1e-4  # the paths differ


@pytest.mark.parametrize("method", ["crystal", "sft"])
def test_attention_maps_draw_those_numbers(setup, drawn, tmp_path, method):
    s = setup("--method", method, dtype=torch.float32)
    s.model.eval()
    record = s.records[0]
    record.boxes = [[10, 20, 40, 60]]
    path = figures.attention_maps(
        s.model, s.fmt, s.settings, [record, s.records[1]], tmp_path / "a.png", {2}, Corruption("blur=8")
    )
    check_png(path, (9.6 if method == "crystal" else 7.4, 8.7))
    batch = data.to_device(one(s, 0), torch.device("cpu"), torch.float32)
    copied = s.method.copied(batch) if s.fmt.count else None
    expected = figures.answer_attention(s.model, batch, s.settings, {2}, copied)
    line = drawn[0].subfigs[0]
    assert (
        "layers 2" in drawn[0].get_suptitle()
        and "What colour is the star?" in line.get_suptitle()
        and "red" in line.get_suptitle()
    )
    step = 2 if method == "crystal" else 1
    assert len(line.axes) == 2 * step
    for p, name in enumerate(("intact", "corrupted")):
        ax = line.axes[p * step]
        picture, heat = ax.images
        assert picture.get_array().shape[:2] == heat.get_array().shape == (84, 112)
        # A token is 28 px.
        coarse = (
            torch.tensor(np.asarray(heat.get_array()))
            .unflatten(0, (3, -1))
            .unflatten(2, (4, -1))
            .mean((1, 3))
        )
        assert torch.corrcoef(torch.stack([coarse.flatten(), expected.image[p].flatten()]))[0, 1] > 0.9
        assert heat.get_clim() == pytest.approx((expected.image.min().item(), expected.image.max().item()))
        said = s.model.tokenizer.decode([int(expected.logits[p].argmax())]).strip()
        assert (
            name in ax.get_title()
            and figures.tidy(said, 20) in ax.get_title()
            and f"image {expected.image[p].sum():.0%}" in ax.get_title()
        )
        assert list(ax.lines[0].get_xdata()) == [10, 40, 40, 10, 10] and list(
            ax.lines[0].get_ydata()
        ) == [20, 20, 60, 60, 20]
        if method == "crystal":
            assert [b.get_width() for b in line.axes[2 * p + 1].patches] == pytest.approx(
                expected.latents[p].tolist()
            )
            assert f"latents {expected.latents[p].sum():.0%}" in ax.get_title()
    intact = np.asarray(data.load_image(record.images[0], ""))
    assert (line.axes[0].images[0].get_array() == intact).all() and (
        line.axes[step].images[0].get_array() != intact
    ).any()


def test_latents_that_are_fed_back_are_each_paths_own(setup, float64_modules):
    """VaLR: the row that predicts the answer says of each path what the recurrence over
    that path's picture says.
    """
    s = setup("--method", "valr", "--encoders", "none")
    s.model.eval()
    batch = one(s, 0)
    fed = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    fed[0, batch["latents"][0]] = True
    found = figures.answer_attention(s.model, batch, s.settings, {0, 1, 2}, None, fed)
    row = int(batch["answer_positions"][0, 0])
    with torch.no_grad():
        for path, pixels in enumerate(("pixel_values", "pixel_values_cor")):
            h, _ = feedback.recurrence(s.model, batch | {"pixel_values": batch[pixels]}, fed)
            assert (found.logits[path] - s.model.hf.lm_head(h[0, row])).abs().max() < 1e-5
    assert (found.logits[0] - found.logits[1]).abs().max() > 1e-4
    assert (
        found.latents.shape == (2, len(batch["latents"][0]))
        and (found.image.flatten(1).sum(1) + found.latents.sum(1) + found.rest - 1).abs().max() < 1e-6
    )


@pytest.mark.parametrize("right", [(True, False), (False, True)])
def test_what_is_said_is_green_where_it_is_right(setup, drawn, tmp_path, monkeypatch, right):
    """Of each path by itself; all layers unless told; the run's own corruption and seed; the shares of each
    path in its own title.
    """
    s = setup("--corruption", "mask=0.3:0.5", "--seed", "4", dtype=torch.float32)
    s.model.eval()
    told = []

    def attend(model, batch, settings, layers, copied=None, fed=None):
        told.append((batch, layers, fed))
        V, target = (
            s.model.hf.config.get_text_config().vocab_size,
            int(batch["targets"][0, batch["answer_positions"][0, 0]]),
        )
        logits = torch.zeros(2, V)
        for path, fine in enumerate(right):
            logits[path, target if fine else target + 1] = 1
        return figures.AnswerAttention(
            torch.full((2, 3, 4), 0.01),
            torch.tensor([[0.1, 0.1, 0.2], [0.0, 0.1, 0.1]]),
            torch.tensor([0.48, 0.68]),
            logits,
        )

    monkeypatch.setattr(figures, "answer_attention", attend)
    figures.attention_maps(s.model, s.fmt, s.settings, s.records[:1], tmp_path / "a.png")
    batch, layers, fed = told[0]
    assert layers == {0, 1, 2} and fed is None
    assert (
        drawn[0].get_suptitle()
        == "Attention of the token that predicts the answer, mean over heads and all layers\n"
        "corruption: mask, s = 0.3 to 0.5"
    )
    axes = drawn[0].subfigs[0].axes
    assert [axes[at].title.get_color() for at in (0, 2)] == [
        "darkgreen" if fine else "firebrick" for fine in right
    ]
    assert axes[0].get_title().endswith("image 12%, latents 40%, rest 48%") and axes[2].get_title().endswith(
        "image 12%, latents 20%, rest 68%"
    )
    assert [bar.get_width() for bar in axes[3].patches] == pytest.approx([0.0, 0.1, 0.1]) and axes[
        1
    ].get_xlim()[1] == pytest.approx(0.21)

    # The mask lies where the run's seed puts it in the first epoch: the share is drawn from 0.3 to 0.5.
    black = (np.asarray(axes[2].images[0].get_array()) == 0).all(-1)
    g = torch.Generator().manual_seed(data.seed_of(4, 0, 0, 0))
    strength = 0.3 + 0.2 * float(torch.rand((), generator=g))
    assert black.mean() == pytest.approx(strength, abs=0.02)
    expected = corrupt.corrupt(
        torch.from_numpy(np.array(Image.open(s.records[0].images[0]).convert("RGB"))).permute(2, 0, 1).float()
        / 255,
        "mask",
        strength,
        g,
    )
    assert (black == (expected == 0).all(0).numpy()).all()


def test_a_model_that_is_no_run_is_drawn_under_crystals_corruption(setup, drawn, tmp_path):
    """Blurred by 2 to 5 pixels, over the layers that are named."""
    s = setup("--method", "sft", dtype=torch.float32)
    s.model.eval()
    figures.attention_maps(s.model, s.fmt, None, s.records[:1], tmp_path / "a.png", {0, 2})
    assert drawn[0].get_suptitle().endswith("heads and layers 0, 2\ncorruption: blur, r = 2 px to 5")


def test_corruption_grid_shows_every_mode_and_level(drawn, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8))
    check_png(figures.corruption_grid(image, tmp_path / "new" / "c.png", seed=3), (8.5, 7 * 1.25))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    for i, mode in enumerate(corrupt.MODES):
        row = drawn[0].axes[4 * i : 4 * i + 4]
        assert row[0].get_ylabel() == mode and (row[0].images[0].get_array() == np.asarray(image)).all()
        for ax, level in zip(row[1:], corrupt.LEVELS[mode]):
            y = corrupt.corrupt(x, mode, level, torch.Generator().manual_seed(3))
            assert f"= {level:g}" in ax.get_title()
            assert np.abs(ax.images[0].get_array() / 255 - y.permute(1, 2, 0).numpy()).max() < 0.0021


def write(path, lines):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_loss_curves_draw_every_term(drawn, tmp_path):
    lines = [
        {
            "step": i,
            "loss": 100.0 / i,
            "mine": -1.0 * i,
            "mass_int": 0.1,
            "mass_cor": 0.2,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_s": 9.0,
        }
        for i in range(1, 101)
    ]
    # A resumed run took step 100 again.
    lines += [{"step": 100, "val_loss": 2.5}, {"step": 100, "loss": 7.0, "mine": 5.0}]
    check_png(figures.loss_curves(write(tmp_path / "run", lines), tmp_path / "l.png"), (12.4, 5.5))
    panels = {ax.get_title(): ax for ax in drawn[0].axes}
    assert list(panels) == ["loss", "mine", "attention mass on latents", "lr", "grad_norm"]
    raw, mean, points = panels["loss"].lines
    assert list(raw.get_xdata()) == list(range(1, 101)) and list(raw.get_ydata()) == [
        100.0 / i for i in range(1, 100)
    ] + [7.0]
    assert mean.get_ydata()[9] == pytest.approx(
        sum(100.0 / i for i in range(8, 13)) / 5
    ) and mean.get_ydata()[0] == pytest.approx((100 + 50 + 100 / 3) / 3)
    assert list(points.get_xdata()) == [100] and list(points.get_ydata()) == [2.5]
    assert panels["loss"].get_yscale() == "log" and panels["mine"].get_yscale() == "linear"
    assert [
        line.get_ydata()[0] for line in panels["attention mass on latents"].lines if len(line.get_ydata())
    ] == pytest.approx([0.1, 0.1, 0.2, 0.2])


def test_what_the_latents_carry_is_a_panel(drawn, tmp_path):
    """Gain and swap at each validation, with the half width of their intervals, and a line at 0."""
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    swap = {"val_swap": 0.2, "val_swap_pm": 0.1}
    lines += [{"step": 1, "val_loss": 2.5, "val_gain": 0.01, "val_gain_pm": 0.02, **swap}]
    lines += [{"step": 2, "val_loss": 2.0, "val_gain": 0.12, "val_gain_pm": 0.03, **swap}]
    figures.loss_curves(write(tmp_path / "run", lines), tmp_path / "l.png")
    panels = {ax.get_title(): ax for ax in drawn[0].axes}
    assert list(panels) == ["loss", "nats that the latents carry"]
    zero, gain, *_ = panels["nats that the latents carry"].lines
    assert list(zero.get_ydata()) == [0, 0] and list(gain.get_ydata()) == [0.01, 0.12]
    bars = panels["nats that the latents carry"].containers
    assert [bar.get_label() for bar in bars] == ["gain", "swap"]
    ends = bars[0].lines[2][0].get_segments()
    assert np.allclose([segment[:, 1] for segment in ends], [[-0.01, 0.03], [0.09, 0.15]])


def test_wrong_input_is_one_line(setup, tmp_path, monkeypatch):
    def refused(call, *words):
        with pytest.raises(UserError) as error:
            call()
        assert "\n" not in str(error.value) and all(w in str(error.value) for w in words), error.value

    out, steps = tmp_path / "out.png", [{"step": 1, "loss": 1.0}]
    curves = lambda run: lambda: figures.loss_curves(run, out)
    refused(curves(tmp_path / "none"), "none", "metrics.jsonl", "run directory")
    refused(curves(write(tmp_path / "r1", [{"step": 1, "val_loss": 1.0}])), "no training step")
    broken = write(tmp_path / "r2", steps)
    (broken / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    refused(curves(broken), "metrics.jsonl:2")
    s = setup(dtype=torch.float32)
    draw = lambda record: lambda: figures.attention_maps(s.model, s.fmt, s.settings, [record], out)
    for boxes in ([[1, 2, 3]], 7, ["abcd"]):
        s.records[0].boxes = boxes
        refused(draw(s.records[0]), "train.jsonl:1", "'boxes'")
    refused(draw(data.Record("x.jsonl:3", "", [("user", "What?")], "red", [])), "x.jsonl:3", "'image'")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(curves(write(tmp_path / "r3", steps)), "matplotlib", "[plots]")
