"""The tutorials' figures are what crystal computes today: measured again, and drawn again.

The rule for what takes minutes: of a trained run the first two updates are taken again and compared with its
committed metrics; data_prep/checks/reliance.log is compared with the table of the page that tells it.
attention.png is drawn by `make demo`, from trained weights that are not committed, and not compared here.
"""

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_docs import ROOT, name

import crystal.backbone.model
from crystal import methods, train

FOLDER = ROOT / "tutorials" / "figures"
OTHERS = {"attention.png", "page.png", "two_paths.svg"}  # by the demo, and by tutorials/two_paths.py


def module(path):
    """A script of tutorials/ as a module."""
    spec = importlib.util.spec_from_file_location(f"figures_{path.stem}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


draw = module(ROOT / "tutorials" / "draw.py")


def agree(a, b, tolerance=0.01):
    """Equal in structure and text, and in numbers to a share of `tolerance` or 0.001."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(agree(a[n], b[n], tolerance) for n in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(agree(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, float):
        return a == pytest.approx(b, rel=tolerance, abs=1e-3)
    return a == b


@pytest.mark.parametrize("figure", draw.MEASURED)
def test_what_was_measured_is_measured_again(figure):
    assert agree(draw.MEASURED[figure](), draw.kept(figure)), f"python tutorials/draw.py {figure}"


@pytest.mark.parametrize("figure", draw.DRAWN)
def test_a_figure_is_drawn_from_what_is_kept(figure, tmp_path):
    """Pixel by pixel, but for a thousandth: antialiasing may round otherwise on another machine."""
    new = np.asarray(Image.open(draw.DRAWN[figure](tmp_path / "new.png")).convert("RGB")).astype(int)
    old = np.asarray(Image.open(FOLDER / f"{figure}.png").convert("RGB")).astype(int)
    assert new.shape == old.shape
    assert (np.abs(new - old).max(-1) > 16).mean() < 1e-3, f"python tutorials/draw.py {figure}"


@pytest.mark.parametrize("run", draw.RUNS)
def test_the_first_updates_of_a_run_are_taken_again(run, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    taken, write = [], train.write

    def stop_after_two(log, board, line):
        write(log, board, line)
        taken.append(line)
        if len(taken) == 2:
            raise Enough

    monkeypatch.setattr(train, "write", stop_after_two)
    monkeypatch.chdir(ROOT)  # the sketch's file is named from here
    with pytest.raises(Enough):
        draw.trained(run, tmp_path / "run", tmp_path / "scenes")
    lines = (FOLDER / run / "metrics.jsonl").read_text().splitlines()
    for line, kept in zip(taken, map(json.loads, lines)):
        assert agree(kept, {name: value for name, value in line.items() if name in kept})
    assert json.loads(lines[-1])["step"] == int(re.search(r"--max_steps (\d+)", draw.RUNS[run])[1])


def test_the_methods_figure_is_what_its_script_writes():
    two_paths = module(ROOT / "tutorials" / "two_paths.py")
    assert two_paths.FILE.read_text(encoding="utf-8") == two_paths.svg()


def test_reliance_bars_are_the_numbers_of_the_page():
    page = (ROOT / "tutorials" / "08_reliance.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| swapped, points lost"))
    told = [[float(x) for x in re.findall(r"-?\d+\.\d", cell)] for cell in row.split("|")[2:4]]
    for model, numbers in zip(("open", "bottleneck"), told):
        drawn = draw.measure_reliance()[model]
        assert len(drawn) == 8 and all(len(seeds) == 3 for seeds in drawn.values())
        lost = [[-difference, -high, -low] for difference, low, high in drawn["latents: swapped"]]
        assert sum(lost, []) == pytest.approx(numbers)


def test_the_sketchs_colours_are_the_pictures():
    """The mean of each quarter of a quarter, in the order of the image tokens."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8))
    model = crystal.backbone.model.load("tiny")
    pixels = model.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    module(ROOT / draw.SKETCH)
    sketch = draw.sys.modules[methods.get(str(ROOT / draw.SKETCH)).__module__]
    scaled = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    processor = model.image_processor.processor
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    expected = ((scaled - mean) / std).unflatten(1, (4, 28)).unflatten(3, (4, 28)).mean((2, 4))
    assert (sketch.colours(pixels, 1)[0] - expected.flatten(1).T).abs().max() < 1e-4


def test_every_committed_figure_is_made_by_a_script_and_small():
    pictures = [path for path in FOLDER.iterdir() if path.suffix in (".png", ".svg")]
    assert {path.name for path in pictures} == {f"{figure}.png" for figure in draw.DRAWN} | OTHERS
    shown = "".join(p.read_text() for p in [ROOT / "README.md", *(ROOT / "tutorials").glob("*.md")])
    for path in pictures:
        assert path.stat().st_size < 150_000, name(path)
        assert f"figures/{path.name})" in shown, f"no page shows {name(path)}"
