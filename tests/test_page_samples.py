"""Single questions on the page: veils, bars and grids by hand, bytes for page.js, text that stays text."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from crystal.evaluation import page_samples
from crystal.evaluation.inside import Sample
from crystal.runtime import data

NASTY = '</script><img src=x onerror="alert(1)">&amp;'


def made(paths=2, K=2, question="<image>\nWhat is there?", answer="a cat"):
    """A sample of two tokens, one layer and two heads, two by two places, whose numbers are easy to say.

    Weight of place i on path p: (i + 1) / 100 / (p + 1), of the first token, at the mean; others are random.
    """
    g = torch.Generator().manual_seed(0)
    image = torch.rand(paths, 2, 2, 3, 4, generator=g) / 8
    latents = torch.rand(paths, 2, 2, 3, K, generator=g) / 8
    for p in range(paths):
        image[p, 0, 0, 0] = torch.tensor([1.0, 2, 3, 4]) / 100 / (p + 1)
        latents[p, 0, 0, 0] = torch.arange(1, K + 1) / 50 / (p + 1)
    record = data.Record(
        "here:1", "1", [("user", question)], answer, ["x.png"], boxes=[[10, 0, 30, 20]], family="f"
    )
    return Sample(
        record=record,
        images=[Image.new("RGB", (40, 20), (200, 10 * p, 0)) for p in range(paths)],
        tokens=["answer 1: “a”", f"latent 1 of {K}"],
        copied=[False, True] if paths == 2 else [],
        grid=(2, 2),
        layers=[3],
        heads=[0, 5],
        image=image,
        latents=latents,
        share=torch.stack([image.sum(-1), latents.sum(-1)], -1),
        said=["a", "the"][:paths],
        answers={"as trained": ("a cat", True), "latents: swapped": ("a dog", False)},
        other="a dog",
    )


def figures_of(text):
    return re.findall(r'<figure class="path".*?</div></figure>', text, re.DOTALL)


def test_the_veil_lifts_where_the_token_looks():
    """Of the largest weight, 4 %, the darkest square has a quarter; the other path has its own scale."""
    intact, corrupted = figures_of(page_samples.sample(made(), 0))
    for figure in (intact, corrupted):
        veil = re.search('<g class="veil">(.*?)</g>', figure)[1]
        opacities = [float(x) for x in re.findall('fill-opacity="(.*?)"', veil)]
        expected = [page_samples.DARKEST * (1 - weight / 4) for weight in (1, 2, 3, 4)]
        assert opacities == pytest.approx(expected, abs=1e-3)
        places = re.findall('x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', veil)
        assert [tuple(map(float, place)) for place in places] == [
            (0, 0, 20, 10),
            (20, 0, 20, 10),
            (0, 10, 20, 10),
            (20, 10, 20, 10),
        ]
    assert '<b data-fill="image">10.0 %</b>' in intact and '<b data-fill="image">5.0 %</b>' in corrupted
    assert '<b data-fill="peak">4.0 %</b>' in intact and '<b data-fill="peak">2.0 %</b>' in corrupted
    assert "likeliest first word is “a”" in intact and "likeliest first word is “the”" in corrupted


def test_bars_and_grids():
    """The longest bar is 4 %; each head's cell against the largest share of both paths."""
    one = made()
    intact, corrupted = figures_of(page_samples.sample(one, 0))
    tall = [float(x) for x in re.findall('width="8" height="(.*?)"', corrupted)]
    assert tall == pytest.approx([10, 20], abs=0.01) and '<b data-fill="longest">4.0 %</b>' in corrupted
    for p, figure in enumerate((intact, corrupted)):
        for target, name in enumerate(("image", "latents")):
            grid = re.search(rf'<svg class="heads {name}".*?</svg>', figure, re.DOTALL)[0]
            cells = re.findall(r'data-layer="(\d)" data-head="(\d)" fill-opacity="(.*?)"', grid)
            assert [(int(i), int(j)) for i, j, _ in cells] == [(i, j) for i in range(2) for j in range(3)]
            expected = one.share[p, 0, :, :, target] / one.share[:, 0, :, :, target].max()
            assert [float(x) for _, _, x in cells] == pytest.approx(expected.flatten().tolist(), abs=1e-3)
            assert [text for text in re.findall(">([^<>]+)</text>", grid)] == ["all", "3", "all", "0", "5"]


def test_many_layers_and_heads_are_not_all_named():
    one = made(1)
    one.layers, one.heads = list(range(28)), list(range(28))
    one.share = torch.rand(1, 2, 29, 29, 2)
    grid = page_samples.heads(one, 0, 0)
    assert grid.count("<rect") == 29 * 29 and 15 < grid.count("<text") < 30


def test_boxes_are_where_they_were_in_a_smaller_picture():
    one = made(1)
    one.images = [Image.new("RGB", (768, 400))]
    assert page_samples.size_of(one.images[0]) == (384, 200)
    assert 'x="5.0" y="0.0" width="10.0" height="10.0"' in page_samples.boxes(one, 0)
    assert page_samples.size_of(Image.new("RGB", (4000, 3))) == (384, 1)
    assert page_samples.size_of(Image.new("RGB", (30, 20))) == (30, 20)


def test_pictures_stand_in_the_page():
    text = page_samples.sample(made(), 3)
    urls = re.findall(r'<image id="(.*?)" href="data:image/png;base64,(.*?)"', text)
    assert [name for name, _ in urls] == ["picture-3-0", "picture-3-1"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(raw))) for _, raw in urls]
    assert [x.getpixel((0, 0)) for x in pictures] == [(200, 0, 0), (200, 10, 0)]
    assert re.findall('<use href="#(.*?)"', text) == [
        "picture-3-0",
        "picture-3-1",
    ]  # and small, without a veil


def test_what_comes_from_records_stays_text():
    one = made(question=f"<image>{NASTY}", answer=NASTY)
    one.record.family, one.said, one.other = NASTY, [NASTY, NASTY], NASTY
    one.tokens = [f"answer 1: “{NASTY}”", "latent"]
    one.answers = {"latents: swapped": (NASTY, False), NASTY: ("", True)}
    text = page_samples.sample(one, 0)
    assert "<img" not in text and "</script" not in text and "&amp;amp;" in text
    assert (
        text.count("&lt;/script&gt;&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;amp;") == 9
    )  # each of them once, `said` of both paths


def test_answers_say_what_was_done():
    text = page_samples.answered(made())
    rows = re.findall("<tr>(.*?)</tr>", text)
    assert "Everything is as the model learned it." in rows[1] and "right" in rows[1]
    assert "That picture's answer is “a dog”." in rows[2] and "wrong" in rows[2]
    assert "<i>nothing</i>" in page_samples.answered(
        Sample(**(vars(made()) | {"answers": {"x": ("", False)}}))
    )


def test_without_latents_there_are_no_bars():
    text = page_samples.sample(made(1, 0), 0)
    assert 'class="bars' not in text and "heads latents" not in text and "heads image" in text
    assert "the picture; the likeliest" in text


def test_bytes_are_exact_to_half_a_step():
    one = made()
    found = page_samples.maps(one)
    assert found["sizes"] == [2, 2, 3] and found["grid"] == (2, 2) and found["count"] == 2
    assert found["copied"] == [False, True] and (found["layers"], found["heads"]) == ([3], [0, 5])
    for p, path in enumerate(found["paths"]):
        raw = {name: base64.b64decode(text) for name, text in path.items()}
        for name, largest, exact in (("image", "peak", one.image), ("latents", "longest", one.latents)):
            peak = np.frombuffer(raw[largest], "<f4")
            units = np.frombuffer(raw[name], np.uint8).reshape(len(peak), -1)
            expected = exact[p].flatten(0, 2).numpy()
            assert np.array_equal(peak, expected.max(1))
            assert (np.abs(units / 255 * peak[:, None] - expected) <= peak[:, None] / 510 + 1e-7).all()
        share = np.frombuffer(raw["share"], "<u2") / 65535
        assert np.abs(share - one.share[p].flatten().numpy()).max() < 1 / 65535
    assert page_samples.maps(made(1, 0))["copied"] == [False, False]


def test_a_token_that_looks_nowhere_is_no_division_by_zero():
    units, largest = page_samples.quantised(torch.zeros(2, 3))
    assert units == bytes(6) and largest == bytes(8)
    one = made()
    one.image, one.share = one.image * 0, one.share * 0
    assert "nan" not in page_samples.sample(one, 0)


def test_shares_as_text():
    assert [page_samples.share_text(x) for x in (0.0, 0.0004, 0.0006, 0.25)] == [
        "0.0 %",
        "under 0.1 %",
        "0.1 %",
        "25.0 %",
    ]
