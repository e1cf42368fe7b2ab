"""train.py --plan: its sizes are those of the model that would train, every flag counts, the page is true."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import crystal.backbone.model
from crystal import methods, planning, train
from crystal.backbone import widths
from crystal.runtime import plan
from crystal.runtime.config import UserError

ROOT = Path(__file__).resolve().parents[1]
SEVEN = ["--model", "Qwen/Qwen2.5-VL-7B-Instruct"]


def numbers(text):
    return {name: float(x) for name, x in re.findall(r"^  (\w+) +([\d.]+) GB", text, re.M)}


def told(capsys, *flags):
    train.main(["--plan", *SEVEN, *flags])
    return capsys.readouterr().out


def test_the_flags_change_the_plan(capsys):
    """CrystaL's 7B, by hand: 2 x 8.29 B + 4 x 40 M bytes of weights, 4 and 8 x 40 M behind them."""
    plain = told(capsys)
    assert "40,456,192 of 8,332,622,848 parameters train" in plain and "4000 updates" in plain
    assert "of 48 (a40): fits" in plain and "at 29.94 TFLOP/s" in plain
    parts = numbers(plain)
    assert parts["weights"] == 16.7 and parts["gradients"] == 0.2 and parts["optimiser"] == 0.3
    assert parts["together"] == pytest.approx(sum(parts.values()) - parts["together"], abs=0.3)

    flags = ["--gpus", "4", "--gpu", "h100", "--shard", "full", "--length", "2048", "--tflop_s", "400"]
    cut = told(capsys, *flags)
    assert "of 80 (h100): fits" in cut and "at 400 TFLOP/s" in cut and "4 an update" in cut
    assert "2 sequence(s) of 2048 tokens" in cut and "--shard full" in cut

    # 2 x 1.09 B of vocabulary, and a quarter of the rest.
    assert numbers(cut)["weights"] == pytest.approx(2 * 1.09 + (16.74 - 2 * 1.09) / 4, abs=0.06)
    assert numbers(cut)["activations"] > 6 * parts["activations"]

    # A picture of 896x448 has 512 image tokens where 448x448 has 256; the question is as long.
    length = lambda text: int(re.search(r"of (\d+) tokens", text)[1])
    assert length(told(capsys, "--image", "896x448")) - length(plain) == 256

    tight = told(capsys, "--memory", "20", "--batch_size", "4")
    assert (
        "of 20 (20 GB): does not fit" in tight
        and "the first to lower: --batch_size 1 --accumulation 4 " in tight
    )


@pytest.mark.parametrize("method", ["crystal", "livr", "sft"])
def test_the_sizes_are_the_models_own(method, model_dirs, tmp_path):
    """Parameters that train and that do not, and the width of everything, as in the model that is loaded."""
    flags = ["--method", method, "--model", str(model_dirs[False]), "--latents", "3", "--lora_r", "2"]
    settings = methods.parse([*flags[:4], *(flags[4:] if method != "sft" else flags[6:])])
    run = planning.of_settings(settings)
    model = crystal.backbone.model.load(settings.model, torch.float32, "cpu")
    methods.attach(model, settings)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert run.counts.trained == sum(trained)
    assert run.counts.all == sum(p.numel() for p in model.parameters())
    assert (run.text.D, run.text.I, run.text.H, run.text.G, run.text.d, run.text.count) == (
        32,
        48,
        4,
        2,
        8,
        3,
    )
    assert (
        run.rank == 2
        and run.paths == 1 + (method == "crystal")
        and run.new_tokens == {"sft": 0, "livr": 3}.get(method, 7)
    )


def test_towers_of_every_family(family_dirs):
    """The tower's own numbers, whatever its configuration calls them."""
    for name, count in (("qwen3_vl", 3), ("llava_onevision", 2)):
        directory = str(family_dirs(name, True))
        model = crystal.backbone.model.load(directory, weights=False)
        _, vision = widths.blocks(model, 16)
        assert vision.count == count and model.hf.config.vision_config.hidden_size == vision.D
        assert vision.seen == 16 * count  # no windows
        run = planning.of_settings(methods.parse(["--model", directory]))
        assert sum(plan.memory(run).values()) > plan.CONTEXT and run.patches > 0


def test_windows_of_the_tower():
    """Qwen2.5-VL: 28 of 32 blocks see windows of 8 x 8 patches, four the whole picture."""
    model = widths.outline("Qwen/Qwen2.5-VL-7B-Instruct", torch.bfloat16)
    assert widths.blocks(model, 1024)[1].seen == 28 * 64 + 4 * 1024
    assert widths.blocks(model, 36)[1].seen == 32 * 36
    assert model.tied is False and widths.outline("Qwen/Qwen2.5-VL-3B-Instruct", torch.bfloat16).tied is True


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--memory", "-1"], "--memory"),
        (["--length", "100"], "--length 100: with its image a sequence has"),
        (["--image", "448"], "--image 448"),
        (["--image", "0x448"], "--image 0x448"),
        (["--shard", "full"], "--gpus says how many"),
        (["--gpu", "k80"], "--gpu"),
        (["--learning_rate", "1"], "--learning_rate"),
        (["--model", "nowhere/at/all"], "nowhere/at/all: no such directory"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        train.main(["--plan", *SEVEN, *flags])
    assert "\n" not in str(error.value)


def test_a_length_is_met_exactly():
    for method in ("crystal", "livr", "lavit", "valr", "sft", "released"):
        settings = methods.parse(["--method", method])
        assert planning.of_settings(settings, length=777).length == 777, method


def test_the_page_is_made_anew():
    """Every number of the table, from the plan."""
    place = ROOT / "tutorials" / "gpus.py"
    spec = importlib.util.spec_from_file_location("gpus", place)
    gpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpus)
    page = (ROOT / "tutorials" / "gpus.md").read_text()
    between = page.split(gpus.MARKS[0])[1].split(gpus.MARKS[1])[0]
    assert between.splitlines() == gpus.table(), "python tutorials/gpus.py makes it anew"
