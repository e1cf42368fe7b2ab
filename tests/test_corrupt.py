"""Equation (3) against implementations that share no code with crystal/corrupt.py: scipy,
scikit-image, Pillow, colorsys, numpy.
"""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from scipy import ndimage, stats
from skimage.measure import label, regionprops
from skimage.transform import resize

from crystal import corrupt as C
from crystal.corrupt import BUILT_IN, LEVELS, LIMIT, MODES, PRIOR, Corruption, Mode, corrupt, draw_strength

SIZES = [(37, 53), (1, 1), (3, 500), (500, 3), (4, 4), (64, 48)]
EVERY = [(mode, eta) for mode in MODES for eta in LEVELS[mode]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(H=37, W=53, seed=0, low=0.0, high=1.0, dtype=torch.float32):
    # 1000: not the numbers that corrupt draws.
    u = torch.rand(3, H, W, generator=seeded(1000 + seed), dtype=torch.float64)
    return (low + (high - low) * u).to(dtype)


# --- what every mode promises ---


def test_names_levels_and_priors():
    assert MODES == ("blur", "mask", "crop", "jigsaw", "color", "noise", "impulse")
    assert set(MODES) == set(LEVELS) == set(PRIOR) == set(LIMIT) == set(C.OPERATORS)
    # appendix A.3, figures 9 to 13
    assert LEVELS["blur"] == (2, 5, 10) and LEVELS["noise"] == (15, 30, 50) and LEVELS["color"] == (0.5, 1, 2)
    assert LEVELS["mask"] == LEVELS["jigsaw"] == (0.2, 0.5, 0.8)
    assert LEVELS["crop"] == (0.2, 0.5, 0.8) and LEVELS["impulse"] == (0.01, 0.04, 0.12)  # ours
    assert PRIOR == {
        "blur": (2, 5),
        "mask": (0.2, 0.8),
        "crop": (0.2, 0.8),
        "jigsaw": (0.2, 0.8),
        "color": (0.5, 2),
        "noise": (15, 50),
        "impulse": (0.01, 0.12),
    }
    assert LIMIT == {"blur": 256, "mask": 1, "crop": 1, "jigsaw": 1, "color": 16, "noise": 255, "impulse": 1}
    assert all(0 < low < high <= LIMIT[mode] for mode, (low, high) in PRIOR.items())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_size_dtype_range_and_input(mode, size):
    """Odd, tiny and long images, every level and the limit: same shape and dtype, values in [0, 1],
    the input left alone.
    """
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = picture(*size, dtype=dtype)
        before = x.clone()
        for eta in (*LEVELS[mode], LIMIT[mode] if mode != "blur" else 30.0, 1e-200, 5e-324):
            y = corrupt(x, mode, eta, seeded())
            assert y.shape == x.shape and y.dtype == dtype and y.isfinite().all()
            assert y.min() >= 0 and y.max() <= 1
            assert torch.equal(x, before) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("mode", MODES)
def test_strength_zero_is_the_identity(mode):
    for size in SIZES:
        x = picture(*size)
        y = corrupt(x, mode, 0, seeded())
        assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("mode", MODES)
def test_every_level_changes_the_image(mode):
    x = picture()
    damage = [
        np.mean([(corrupt(x, mode, eta, seeded(i)) - x).square().mean().item() for i in range(5)])
        for eta in LEVELS[mode]
    ]
    assert damage[0] > 1e-3
    assert damage == sorted(damage) or mode == "crop"  # all crops of white noise are equally far from it


@pytest.mark.parametrize("mode", MODES)
def test_the_generator_is_the_only_randomness(mode):
    x = picture()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = corrupt(x, mode, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), before), "torch's global generator was used"
    torch.rand(7)
    assert torch.equal(first, corrupt(x, mode, generator=seeded(3)))
    assert not torch.equal(first, corrupt(x, mode, generator=seeded(4)))
    g = seeded(3)
    assert torch.equal(first, corrupt(x, mode, generator=g))
    assert not torch.equal(first, corrupt(x, mode, generator=g)), "the generator must advance"
    eta = LEVELS[mode][1]
    assert mode == "blur" or not torch.equal(corrupt(x, mode, eta, g), corrupt(x, mode, eta, g)), (
        "place and noise too"
    )
    torch.manual_seed(1)  # and without one, torch's own
    a = corrupt(x, mode)
    torch.manual_seed(1)
    assert torch.equal(a, corrupt(x, mode))


@pytest.mark.parametrize("mode", MODES)
def test_one_seed_is_one_corruption_in_every_dtype(mode):
    x = picture(dtype=torch.float16)  # exact in all three
    want = corrupt(x.double(), mode, generator=seeded(5))
    assert (corrupt(x.float(), mode, generator=seeded(5)) - want).abs().max() < 1e-5
    assert (corrupt(x, mode, generator=seeded(5)) - want).abs().max() < 1e-3
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(corrupt(x.double(), mode, generator=seeded(5)), want)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_strides_do_not_matter(mode):
    x = picture(24, 32)
    hwc = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # what an array of Pillow's gives
    assert not hwc.is_contiguous()
    want = corrupt(x, mode, generator=seeded())
    assert (corrupt(hwc, mode, generator=seeded()) - want).abs().max() < 1e-6
    assert (
        corrupt(x.transpose(1, 2).contiguous().transpose(1, 2), mode, generator=seeded()) - want
    ).abs().max() < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_cuda_agrees_with_cpu(mode):
    x = picture()
    for eta in LEVELS[mode]:
        y = corrupt(x.cuda(), mode, eta, seeded())  # a CPU generator: the same draw
        assert y.is_cuda and (y.cpu() - corrupt(x, mode, eta, seeded())).abs().max() < 1e-5
        z = corrupt(x.cuda(), mode, eta, torch.Generator("cuda").manual_seed(0))
        assert z.is_cuda and z.shape == x.shape


# --- the strength ---


@pytest.mark.parametrize("mode", MODES)
def test_drawn_strengths_are_uniform_over_the_prior(mode):
    low, high = PRIOR[mode]
    g = seeded(1)
    drawn = np.array([draw_strength(mode, g) for _ in range(2000)])
    assert low <= drawn.min() and drawn.max() < high
    assert stats.kstest(drawn, "uniform", (low, high - low)).pvalue > 0.01


def test_no_strength_means_a_drawn_one():
    """Read back from images: the share that a mask took, and what `draw_strength` says
    the same generator gives.
    """
    white = torch.ones(3, 40, 40)
    shares = [(corrupt(white, "mask", generator=seeded(i)) == 0).float().mean().item() for i in range(400)]
    assert stats.kstest(shares, "uniform", (0.2, 0.6)).pvalue > 0.01
    x = picture()
    for mode in MODES:
        g = seeded(2)
        eta = draw_strength(mode, g)
        assert torch.equal(corrupt(x, mode, eta, g), corrupt(x, mode, generator=seeded(2)))


# --- bad input ---

NAN = picture().index_fill(2, torch.tensor([0]), float("nan"))


@pytest.mark.parametrize(
    "kwargs, says",
    [
        (
            {"mode": "blurr"},
            "'blurr' is no corruption mode: choose one of blur, mask, crop, jigsaw, color, noise, impulse",
        ),
        ({"mode": "blurr", "strength": 2}, "'blurr' is no corruption mode"),
        ({"mode": None}, "None is no corruption mode"),
        ({"image": np.zeros((3, 4, 4), np.float32)}, "must be a torch tensor, got ndarray"),
        ({"image": torch.zeros(3, 4, 4, dtype=torch.uint8)}, "torch.uint8: divide 0..255 by 255 first"),
        ({"image": torch.zeros(3, 4, 4, dtype=torch.cfloat)}, "torch.complex64"),
        ({"image": torch.zeros(4, 4, 3)}, r"shape [3, H, W], H and W at least 1, got [4, 4, 3]"),
        ({"image": torch.zeros(1, 3, 4, 4)}, "got [1, 3, 4, 4]"),
        ({"image": torch.zeros(3, 0, 4)}, "got [3, 0, 4]"),
        ({"image": torch.full((3, 4, 4), 255.0)}, "values in [0, 1], got 255 to 255"),
        ({"image": torch.full((3, 4, 4), -0.5)}, "got -0.5 to -0.5"),
        ({"image": NAN}, "got nan to nan"),
        ({"strength": -1}, "the strength of blur must be a number from 0 to 256, got -1"),
        ({"strength": 257}, "from 0 to 256, got 257"),
        ({"strength": float("nan")}, "got nan"),
        ({"strength": "2"}, "got '2'"),
        ({"strength": True}, "got True"),
        ({"mode": "mask", "strength": 1.01}, "the strength of mask must be a number from 0 to 1, got 1.01"),
        ({"mode": "crop", "strength": 2}, "the strength of crop must be a number from 0 to 1, got 2"),
        ({"mode": "jigsaw", "strength": 2}, "the strength of jigsaw must be a number from 0 to 1, got 2"),
        ({"mode": "impulse", "strength": 2}, "the strength of impulse must be a number from 0 to 1, got 2"),
        ({"mode": "noise", "strength": 256}, "the strength of noise must be a number from 0 to 255, got 256"),
        (
            {"mode": "color", "strength": math.inf},
            "the strength of color must be a number from 0 to 16, got inf",
        ),
    ],
)
def test_bad_input_is_one_clear_line(kwargs, says):
    with pytest.raises(ValueError) as error:
        corrupt(**{"image": picture(), **kwargs})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_bad_mode_of_a_draw():
    with pytest.raises(ValueError, match="'blurr' is no corruption mode"):
        draw_strength("blurr")


def test_numpy_numbers_are_numbers():
    assert torch.equal(corrupt(picture(), "blur", np.float32(2)), corrupt(picture(), "blur", 2))


# --- blur ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", [0.3, 1, *LEVELS["blur"], 30])
def test_blur_is_scipys_gaussian(size, radius):
    """scipy's `nearest` repeats the edge pixel; float64 leaves only rounding. 30 px reach 120, beyond
    most of these images.
    """
    x = picture(*size, dtype=torch.float64)
    reach = math.ceil(4 * radius)
    want = ndimage.gaussian_filter(x.numpy(), (0, radius, radius), mode="nearest", radius=(0, reach, reach))
    np.testing.assert_allclose(corrupt(x, "blur", radius).numpy(), want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(corrupt(x.float(), "blur", radius).numpy(), want, rtol=0, atol=2e-6)


def test_blur_joins_its_strips():
    """Larger than one strip of 65536 px, and one row alone larger than that."""
    for size in ((300, 500), (3, 70000)):
        x = picture(*size, dtype=torch.float64)
        want = ndimage.gaussian_filter(x.numpy(), (0, 2, 2), mode="nearest", radius=(0, 8, 8))
        np.testing.assert_allclose(corrupt(x, "blur", 2).numpy(), want, rtol=0, atol=1e-12)


def test_blur_cuts_nothing_that_matters():
    """Against a kernel of 8 standard deviations."""
    x = picture(dtype=torch.float64)
    want = ndimage.gaussian_filter(x.numpy(), (0, 3, 3), mode="nearest", truncate=8)
    assert np.abs(corrupt(x, "blur", 3).numpy() - want).max() < 1e-4


@pytest.mark.parametrize("radius", LEVELS["blur"])
def test_blur_is_near_pillows(radius):
    """Pillow's radius is a standard deviation. Blocks of random colours, edges everywhere, are the worst case
    for its box blurs:
    they come within 6 of 255 of the Gaussian away from the border, 1.5 in the mean, and nearest when asked
    for this very radius.
    """
    coarse = (picture(9, 12) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(coarse).resize((120, 90), Image.Resampling.NEAREST)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    def away(r):
        theirs = np.array(image.filter(ImageFilter.GaussianBlur(r))).transpose(2, 0, 1)
        return np.abs(corrupt(x, "blur", radius).numpy() * 255 - theirs)

    margin = int(3 * radius)
    assert away(radius)[:, margin:-margin, margin:-margin].max() < 6 and away(radius).mean() < 1.5
    assert away(radius).mean() < min(away(0.8 * radius).mean(), away(1.25 * radius).mean())


def test_blur_of_a_constant_is_constant():
    x = torch.full((3, 9, 700), 0.7)
    assert (corrupt(x, "blur", 10) - 0.7).abs().max() < 1e-6


# --- mask ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.01, *LEVELS["mask"], 0.99, 1])
def test_mask_is_one_rectangle_of_its_area(size, share):
    H, W = size
    x = picture(H, W, low=0.1)
    for seed in range(20):
        y = corrupt(x, "mask", share, seeded(seed)).numpy()
        black = (y == 0).all(0)
        assert ((y == 0).any(0) == black).all(), "all three channels together"
        assert (y[:, ~black] == x.numpy()[:, ~black]).all(), "outside, nothing changes"
        (box,) = regionprops(label(black.astype(int), connectivity=1))
        top, left, bottom, right = box.bbox
        assert box.area == (bottom - top) * (right - left), "a full rectangle"
        assert abs(box.area - share * H * W) <= max(1, (bottom - top) / 2, (right - left) / 2)


def test_mask_places_and_aspects_vary():
    """The place is uniform over the room left, and the relative aspect spans 1/3.3 to 3.3, or 1/share to
    share where that is less.
    """
    white = torch.ones(3, 120, 80)
    for share, bound in ((0.05, 3.3), (0.2, 3.3), (0.8, 1.25)):
        aspects, ups, lefts, touched = [], [], [], np.zeros(4, int)
        for seed in range(300):
            rows, columns = np.nonzero((corrupt(white, "mask", share, seeded(seed)) == 0).all(0).numpy())
            h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
            aspects.append(math.log(h / 120) - math.log(w / 80))
            undo = np.random.default_rng(seed)  # of the rounding to whole px
            ups.append((rows.min() + undo.random()) / (120 - h + 1))
            lefts.append((columns.min() + undo.random()) / (80 - w + 1))
            touched += [rows.min() == 0, rows.max() == 119, columns.min() == 0, columns.max() == 79]
        edge = math.log(bound)
        assert -edge - 0.1 < min(aspects) < -0.9 * edge and 0.9 * edge < max(aspects) < edge + 0.1
        assert abs(np.mean(aspects)) < 0.2 * edge
        assert stats.kstest(ups, "uniform").pvalue > 0.01 and stats.kstest(lefts, "uniform").pvalue > 0.01
        assert share < 0.8 or (touched > 0).all(), "all four sides of the image can be reached"


# --- crop ---


@pytest.mark.parametrize("share", LEVELS["crop"])
def test_crop_is_a_resized_window(share):
    """An image that holds its own coordinates tells which window was kept; scikit-image's resize of that
    window is the rest.
    """
    H, W = 60, 90
    rows, columns = np.mgrid[:H, :W] / 100
    x = torch.from_numpy(np.stack([rows, columns, np.random.default_rng(0).random((H, W))]))
    lefts = set()
    for seed in range(10):
        y = corrupt(x, "crop", share, seeded(seed)).numpy()
        # Bilinear resizing repeats the window's edge pixels: extremes are its first and last row and column.
        top, bottom = round(100 * y[0].min()), round(100 * y[0].max()) + 1
        left, right = round(100 * y[1].min()), round(100 * y[1].max()) + 1
        h, w = bottom - top, right - left
        assert abs(h * w - (1 - share) * H * W) <= max(h, w) / 2
        # The image's aspect.
        assert abs(h - math.sqrt(1 - share) * H) <= 1 and abs(w - math.sqrt(1 - share) * W) <= 1
        window = x[:, top:bottom, left:right].numpy()
        want = [resize(channel, (H, W), order=1, mode="edge", anti_aliasing=False) for channel in window]
        np.testing.assert_allclose(y, want, atol=1e-10)
        lefts.add(left)
    assert len(lefts) > 3, "the place varies"


def test_crop_of_everything_keeps_a_pixel():
    x = picture(40, 30)
    y = corrupt(x, "crop", 1, seeded(1))
    pixel = y[:, :1, :1]
    assert (y - pixel).abs().max() < 1e-6 and ((x - pixel).abs() < 1e-6).all(0).any()


# --- jigsaw ---


@pytest.mark.parametrize("size", [(64, 48), (37, 53), (4, 4), (7, 500), (5, 4)])
@pytest.mark.parametrize("share, moved", [(0.05, 0), (0.2, 3), (0.5, 8), (0.8, 13), (1, 16)])
def test_jigsaw_moves_exactly_its_share(size, share, moved):
    H, W = size
    h, w = H // 4, W // 4
    x = picture(H, W).numpy()

    def tiles(image):
        return [
            image[:, r * h : (r + 1) * h, c * w : (c + 1) * w].tobytes() for r in range(4) for c in range(4)
        ]

    for seed in range(10):
        y = corrupt(torch.from_numpy(x), "jigsaw", share, seeded(seed)).numpy()
        assert sorted(tiles(x)) == sorted(tiles(y)), "a permutation of the tiles"
        assert sum(a != b for a, b in zip(tiles(x), tiles(y))) == moved
        assert (y[:, 4 * h :] == x[:, 4 * h :]).all() and (y[:, :, 4 * w :] == x[:, :, 4 * w :]).all(), (
            "the border stays"
        )


def test_jigsaw_under_four_pixels_stays():
    x = picture(3, 500)
    assert torch.equal(corrupt(x, "jigsaw", 1, seeded()), x)


def test_jigsaw_chooses_every_tile_equally():
    x = picture(4, 4)
    moved = sum((corrupt(x, "jigsaw", 0.5, seeded(i)) != x).any(0).double() for i in range(800)) / 800
    assert (moved - 0.5).abs().max() < 0.08  # 4.5 standard deviations


# --- color ---


@pytest.mark.parametrize(
    "factors",
    [
        (1.4, 1, 1, 0), (0.3, 1, 1, 0), (1, 1.7, 1, 0), (1, 0.2, 1, 0), (1, 1, 1.8, 0), (1, 1, 0, 0),
        (1.3, 0.6, 1.5, 0), (3, 3, 3, 0), (0, 1, 1, 0),
    ],
)
def test_color_factors_are_pillows(factors):
    """Pillow rounds to bytes after each step and its contrast rounds the mean: 3 of 255 for a chain of three,
    a factor of 3 grows it.
    """
    image = Image.fromarray((picture() * 255).round().byte().permute(1, 2, 0).numpy())
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    got = C.jitter(x, *factors)
    for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        image = enhance(image).enhance(factor)
    away = (got * 255 - torch.from_numpy(np.array(image)).permute(2, 0, 1)).abs()
    assert away.max() < max(1, *factors[:3]) ** 2 * 3 and away.mean() < 1.5


@pytest.mark.parametrize("turns", [0, 0.1, -0.25, 0.5, -0.5])
def test_hue_is_colorsys(turns):
    x = picture(dtype=torch.float64)
    # Greys, primaries.
    x[:, 0, :8] = torch.tensor(
        [[0, 1, 0.5, 1, 0, 0, 1, 0.3], [0, 1, 0.5, 0, 1, 0, 1, 0.3], [0, 1, 0.5, 0, 0, 1, 0, 0.9]]
    )
    want = []
    for rgb in x.flatten(1).T.tolist():
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        want.append(colorsys.hsv_to_rgb((h + turns) % 1, s, v))
    got = C.jitter(x, 1, 1, 1, turns).flatten(1).T.numpy()
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_color_leaves_grey_grey_and_clips_after_each_step():
    grey = picture()[:1].expand(3, -1, -1)
    y = C.jitter(grey, 1, 1, 3, 0.3)
    assert (y - grey).abs().max() < 1e-6
    x = torch.full((3, 2, 2), 0.8)
    assert torch.allclose(C.jitter(x, 2, 1, 1, 0), torch.ones(3, 2, 2))
    x[:, 0, 0] = (
        0.2  # brightness 2 clips three pixels to 1: contrast 0 then gives the mean after the clip, (0.4 + 3) / 4  # noqa: E501
    )
    assert torch.allclose(C.jitter(x, 2, 0, 1, 0), torch.full((3, 2, 2), 0.85))


def read_back(s, seed):
    """The four factors of corrupt(color), solved from what it does to two greys and one colour, mild
    enough that nothing clips.
    """
    x = torch.full((3, 10, 10), 0.3, dtype=torch.float64)
    x[:, 5:] = 0.4
    x[:, 0, 0] = torch.tensor([0.40, 0.30, 0.32])
    y = corrupt(x, "color", s, seeded(seed)).numpy()
    assert y.max() < 1
    a, b = y[0, 1, 0], y[0, 9, 0]  # brightness and contrast act on greys alone: y = B (C g + (1 - C) m)
    m = (49 * 0.3 + 50 * 0.4 + 0.299 * 0.40 + 0.587 * 0.30 + 0.114 * 0.32) / 100
    slope, offset = (b - a) / 0.1, a - (b - a) / 0.1 * 0.3
    brightness = slope + offset / m
    contrast = slope / brightness
    before, after = (colorsys.rgb_to_hsv(*v) for v in ((0.40, 0.30, 0.32), y[:, 0, 0]))
    turn = (after[0] - before[0] + 0.5) % 1 - 0.5
    chroma = (y[:, 0, 0].max() - y[:, 0, 0].min()) / 0.1  # = B C times the saturation factor
    return brightness, contrast, chroma / slope, turn


def test_color_draws_its_four_factors():
    s = 0.4
    drawn = np.array([read_back(s, seed) for seed in range(400)])
    for column, (low, high) in zip(drawn.T, [(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        assert low - 1e-9 <= column.min() and column.max() <= high + 1e-9
        assert stats.kstest(column, "uniform", (low, high - low)).pvalue > 0.01
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.15, "independent draws"


def test_color_ranges_end_at_zero_and_half_a_turn(monkeypatch):
    """s = 2: U(0, 3), not U(-1, 3) with a heap at 0, as in torchvision; hue half a turn each way."""
    seen = []
    monkeypatch.setattr(C, "jitter", lambda x, *factors: seen.append(factors) or x)
    for s in LEVELS["color"]:
        seen.clear()
        for seed in range(400):
            corrupt(picture(2, 2), "color", s, seeded(seed))
        low, a = max(0, 1 - s), min(s / 4, 0.5)
        for column, (lo, hi) in zip(np.array(seen).T, [(low, 1 + s)] * 3 + [(-a, a)]):
            assert stats.kstest(column, "uniform", (lo, hi - lo)).pvalue > 0.01


# --- noise and impulse ---


@pytest.mark.parametrize("sigma", LEVELS["noise"])
def test_noise_is_gaussian_and_independent(sigma):
    x = torch.full((3, 101, 103), 0.5)
    d = (corrupt(x, "noise", sigma, seeded(1)) - 0.5).numpy() * 255 / sigma
    inside = 127.5 / sigma  # where the clip lies, in standard deviations
    want = np.clip(np.random.default_rng(0).standard_normal(10**6), -inside, inside)
    assert abs(d.mean()) < 0.025 and abs(d.std() - want.std()) < 0.025
    assert (
        stats.kstest(d[np.abs(d) < inside].ravel()[::7], stats.truncnorm(-inside, inside).cdf).pvalue > 0.01
    )
    assert np.abs(np.corrcoef(d.reshape(3, -1)) - np.eye(3)).max() < 0.04  # channels
    # Neighbours.
    assert abs((d[:, :, 1:] * d[:, :, :-1]).mean()) < 0.025 and abs((d[:, 1:] * d[:, :-1]).mean()) < 0.025


@pytest.mark.parametrize("share", [*LEVELS["impulse"], 0.5, 1])
def test_impulse_hits_its_share(share):
    x = picture(101, 103, low=0.2, high=0.8)
    y = corrupt(x, "impulse", share, seeded(2)).numpy()
    n = 101 * 103
    black, white = ((y == v).all(0) for v in (0, 1))
    assert ((y == x.numpy()).all(0) | black | white).all(), "whole pixels or nothing"
    for count in (black.sum(), white.sum()):
        assert abs(count - n * share / 2) < 4 * math.sqrt(n * share / 2 * (1 - share / 2))
    if share == 1:
        assert (black | white).all()


def test_impulse_levels_do_the_damage_of_the_noise_levels():
    """The reason given for our three levels: equal squared error on uniform values, before the clip."""
    for sigma, share in zip(LEVELS["noise"], LEVELS["impulse"]):
        x = picture(300, 300)
        assert (corrupt(x, "impulse", share, seeded()) - x).square().mean().item() == pytest.approx(
            (sigma / 255) ** 2, rel=0.1
        )


# --- given numbers: what each mode makes of its draws, worked out by hand on pictures that are not square ---


def drawing(monkeypatch, numbers):
    """The next uniform numbers are these."""
    monkeypatch.setattr(C, "uniform", lambda n, generator: torch.tensor(numbers, dtype=torch.float64))


@pytest.mark.parametrize(
    "H, W, share, numbers, box",
    [
        # numbers: aspect (0 lowest, 0.5 the image's own, 1 highest), top, left. box: top, left, height, width
        (40, 90, 0.25, [0.5, 0.0, 0.999], (0, 45, 20, 45)),  # half of each side; the last of 46 places
        (40, 90, 0.25, [0.5, 0.999, 0.0], (20, 0, 20, 45)),  # the last of 21 places
        (40, 90, 0.25, [0.5, 0.5, 0.25], (10, 11, 20, 45)),  # floor(0.5 * 21), floor(0.25 * 46)
        # sqrt(0.1 * 3.3) 40 = 22.98 high, sqrt(0.1 / 3.3) 90 = 15.7 wide: 16, and 360 / 16 = 22.5
        (40, 90, 0.1, [1.0, 0.0, 0.0], (0, 0, 22, 16)),
        # sqrt(0.1 / 3.3) 40 = 6.96 high: 7, and 360 / 7 = 51.4
        (40, 90, 0.1, [0.0, 0.0, 0.0], (0, 0, 7, 51)),
        (40, 90, 0.8, [1.0, 0.0, 0.0], (0, 0, 40, 72)),  # no more than 1 / 0.8 fits: the full height
        (40, 90, 0.8, [0.0, 0.999, 0.0], (8, 0, 32, 90)),  # and the full width
        (90, 40, 0.25, [0.5, 0.999, 0.0], (45, 0, 45, 20)),  # upright
    ],
)
def test_a_mask_by_hand(monkeypatch, H, W, share, numbers, box):
    drawing(monkeypatch, numbers)
    x = picture(H, W, low=0.1)
    top, left, height, width = box
    want = x.clone()
    want[:, top : top + height, left : left + width] = 0
    assert torch.equal(corrupt(x, "mask", share), want)


def test_a_crop_by_hand(monkeypatch):
    """Three quarters thrown away: a window of half the sides at floor(0.5 * 21) and floor(0.2 * 46)."""
    for aspect in (0.0, 0.9):
        drawing(monkeypatch, [aspect, 0.5, 0.2])
        x = picture(40, 90, dtype=torch.float64)
        windows = x[:, 10:30, 9:54].numpy()
        want = [resize(window, (40, 90), order=1, mode="edge", anti_aliasing=False) for window in windows]
        np.testing.assert_allclose(corrupt(x, "crop", 0.75).numpy(), want, atol=1e-10)


def test_a_jigsaw_by_hand():
    """The tiles that torch.randperm(16) names first trade places in a ring.

    Each shows what the one named before it had, the first the last one's.
    """
    H, W, h, w = 13, 22, 3, 5  # a row and two columns stay
    x = picture(H, W)
    for share, count in ((0.2, 3), (0.5, 8), (1, 16)):
        named = torch.randperm(16, generator=seeded(4)).tolist()[:count]
        want = x.clone()
        for place, tile in enumerate(named):
            top, left = tile // 4 * h, tile % 4 * w
            top_of, left_of = named[place - 1] // 4 * h, named[place - 1] % 4 * w
            want[:, top : top + h, left : left + w] = x[:, top_of : top_of + h, left_of : left_of + w]
        assert torch.equal(corrupt(x, "jigsaw", share, seeded(4)), want)


def test_an_impulse_by_hand(monkeypatch):
    """Strength 0.4: below 0.2 black, from there to 0.4 white, from 0.4 on as it was; all three channels."""
    drawing(monkeypatch, [[0.0, 0.19, 0.2], [0.39, 0.4, 0.99]])
    x = picture(2, 3, low=0.3, high=0.7)
    want = x.clone()
    want[:, 0, :2] = 0
    want[:, 0, 2] = want[:, 1, 0] = 1
    assert torch.equal(corrupt(x, "impulse", 0.4), want)


def test_noise_by_hand():
    """The generator's normal numbers, one for each value, times sigma / 255, and the clip."""
    for dtype in (torch.float32, torch.float64):
        x = picture(5, 7, dtype=dtype)
        want = (x + 40 / 255 * torch.randn(3, 5, 7, generator=seeded(6))).clamp(0, 1)
        assert torch.equal(corrupt(x, "noise", 40, seeded(6)), want)
        assert (want == 0).any() and (want == 1).any()


def test_color_by_hand(monkeypatch):
    """s = 0.4; of 0.75, 0, 1, 0.75 come brightness 1.2, contrast 0.6, saturation 1.4, hue + 0.05."""
    drawing(monkeypatch, [0.75, 0.0, 1.0, 0.75])
    x = picture(2, 3, low=0.3, high=0.5, dtype=torch.float64)
    bright = 1.2 * x.numpy()
    luma = np.array([0.299, 0.587, 0.114])
    mean = np.tensordot(luma, bright, 1).mean()
    even = mean + 0.6 * (bright - mean)
    grey = np.tensordot(luma, even, 1)
    vivid = np.clip(grey + 1.4 * (even - grey), 0, 1)
    want = np.empty_like(vivid)
    for row, column in np.ndindex(2, 3):
        hue, saturation, value = colorsys.rgb_to_hsv(*vivid[:, row, column])
        want[:, row, column] = colorsys.hsv_to_rgb((hue + 0.05) % 1, saturation, value)
    np.testing.assert_allclose(corrupt(x, "color", 0.4).numpy(), want, atol=1e-12)


def test_a_strength_by_hand(monkeypatch):
    """One uniform number from the lower end to the higher; drawn before the place is."""
    number = torch.rand((), generator=seeded(9)).item()
    assert draw_strength("noise", seeded(9)) == 15 + 35 * number
    assert draw_strength(generator=seeded(9)) == 2 + 3 * number  # blur unless another is named
    x = picture(4, 6)
    generator = seeded(9)
    torch.rand((), generator=generator)
    want = corrupt(x, "noise", 15 + 35 * number, generator)
    assert torch.equal(corrupt(x, "noise", generator=seeded(9)), want)
    assert torch.equal(corrupt(x, generator=seeded(9)), corrupt(x, "blur", 2 + 3 * number))


# --- what --corruption says ---


@pytest.mark.parametrize(
    "text, steps",
    [
        ("blur", [("blur", 2, 5)]),
        ("blur=7", [("blur", 7, 7)]),
        ("blur=8:10", [("blur", 8, 10)]),
        ("noise=0", [("noise", 0, 0)]),
        ("blur=3,noise=30", [("blur", 3, 3), ("noise", 30, 30)]),
        ("mask , jigsaw=0.25:1", [("mask", 0.2, 0.8), ("jigsaw", 0.25, 1)]),
    ],
)
def test_a_text_becomes_modes_and_ranges(text, steps):
    found = Corruption(text)
    assert found.steps == steps
    assert Corruption(str(found)).steps == steps  # its own text, with every range, reads back


def test_a_corruptions_text_is_its_ranges():
    assert str(Corruption("blur,noise=30")) == "blur=2:5,noise=30"
    assert (
        Corruption("blur=2:5") == Corruption()
        and Corruption("blur=2") != Corruption()
        and Corruption() != "blur=2:5"
    )


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "sharpen",
            "'sharpen' is no corruption mode: choose one of blur, mask, crop, jigsaw, color, noise, impulse",
        ),
        ("", "'' is no corruption mode"),
        ("blur,", "'' is no corruption mode"),
        ("blur=", "blur=: a strength is a number as in blur=5, or a range as in blur=2:5"),
        ("blur=x", "blur=x: a strength is"),
        ("blur=1:2:3", "blur=1:2:3: a strength is"),
        ("blur=3:2", "blur=3:2: blur goes from 0 to 256, and a range from its lower end"),
        ("blur=-1", "blur=-1: blur goes from 0 to 256"),
        ("noise=3,mask=1.01", "mask=1.01: mask goes from 0 to 1"),
        ("blur=nan", "blur=nan: blur goes"),
    ],
)
def test_a_text_that_says_nothing_is_one_line(text, says):
    with pytest.raises(ValueError) as refused:
        Corruption(text)
    assert str(refused.value).startswith(says) and "\n" not in str(refused.value)


def test_a_chain_by_hand():
    """The second mode works on what the first one made; each draws its strength before it is
    applied, from one generator.
    """
    x = picture(8, 12)
    g = seeded(3)
    first = corrupt(x, "blur", 2 + 3 * torch.rand((), generator=g).item(), g)
    want = corrupt(first, "noise", 30 + 0 * torch.rand((), generator=g).item(), g)
    assert torch.equal(Corruption("blur,noise=30")(x, seeded(3)), want) and not torch.equal(want, first)


def shifted(x, strength, generator):
    """A mode of one's own: the picture moves to the right by so many columns, as many more
    as the generator says.
    """
    return x.roll(round(strength) + int(torch.randint(2, (), generator=generator)), 2)


def test_a_mode_of_ones_own_is_drawn_and_chained_like_the_others():
    modes = BUILT_IN | {"shift": Mode(shifted, 1.0, 1.0, 4.0)}
    x = picture(8, 12)
    g = seeded(5)
    torch.rand((), generator=g)  # its strength
    assert torch.equal(
        Corruption("shift", modes)(x, seeded(5)), x.roll(1 + int(torch.randint(2, (), generator=g)), 2)
    )
    assert Corruption("shift=2,mask", modes).steps == [("shift", 2, 2), ("mask", 0.2, 0.8)]
    with pytest.raises(ValueError, match="shift=5: shift goes from 0 to 4"):
        Corruption("shift=5", modes)
    cut = BUILT_IN | {"cut": Mode(lambda x, strength, generator: x[:, 1:], 1.0, 1.0, 1.0)}
    with pytest.raises(ValueError, match=r"cut made an image of shape \[3, 7, 12\] from one of \[3, 8, 12\]"):
        Corruption("cut", cut)(x, seeded(5))
    wild = BUILT_IN | {"wild": Mode(lambda x, strength, generator: 3 * x - 1, 1.0, 1.0, 1.0)}
    assert torch.equal(Corruption("wild", wild)(x, seeded(5)), (3 * x - 1).clamp(0, 1))
