"""Stochastic image corruption, CrystaL's eq. 3 (section 3.2, appendix A.3): I_cor = C(I; eta, S), eta ~ p(H).

The corrupted path must lack what the answer needs, so that the latents copied from the intact path become the
only way to get it. Four families S, seven modes: spectral decay (`blur`), spatial discontinuity (`mask`,
`crop`, `jigsaw`), chromatic distortion (`color`) and stochastic noise (`noise`, `impulse`). Every mode keeps
the image's size, so both paths share one image grid and one set of positions. `Corruption` is what a run's
`--corruption` says: one mode with its range of strengths, or a chain of them. Left out on purpose: batches
(images differ in size).

    x    an image [3, H, W], RGB, values in [0, 1]; H and W are its height and width in pixels (in this
         file H counts no heads)
    eta  strength, in the unit of its mode: radius [px], s and rho [share], sigma [of 255]; 0 leaves the
         image as it is
    S    mode, one of MODES
"""
import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F

MODES = ("blur", "mask", "crop", "jigsaw", "color", "noise", "impulse")

# Three levels per mode, weak to strong: appendix A.3, figures 9 to 13. It names crop and impulse but gives no
# levels for them; these are ours. Impulse: E(x - b)^2 = 1/3 for x ~ U(0, 1) and b in {0, 1}, so a share of
# 3 (sigma / 255)^2 does the squared damage of noise at 15, 30 and 50.
LEVELS = {
    "blur": (2.0, 5.0, 10.0),       # radius = standard deviation of the Gaussian, px
    "mask": (0.2, 0.5, 0.8),        # share of the area set to 0
    "crop": (0.2, 0.5, 0.8),        # share of the area thrown away
    "jigsaw": (0.2, 0.5, 0.8),      # share of the 16 tiles that move
    "color": (0.5, 1.0, 2.0),       # s: factors in 1 +- s, hue +- min(s / 4, 0.5) turns
    "noise": (15.0, 30.0, 50.0),    # standard deviation, of 255
    "impulse": (0.01, 0.04, 0.12),  # share of the pixels hit
}

# p(H) = U(low, high). The paper prints no prior. Blur's is that of the authors' released code; the others are
# ours, the range of the named levels (the released code has milder ones: erasing 0.1 to 0.3, colour jitter of
# 0.4 and hue 0.1).
PRIOR = {mode: (weakest, strongest) for mode, (weakest, _, strongest) in LEVELS.items()}
PRIOR["blur"] = (2.0, 5.0)

# The largest strength accepted. Shares end at 1 by their meaning, the rest where nothing is left of an image
# and only a slip would go on.
LIMIT = {
    "blur": 256.0, "mask": 1.0, "crop": 1.0, "jigsaw": 1.0, "color": 16.0, "noise": 255.0, "impulse": 1.0
}


def device_of(generator):
    """Where a generator draws; torch's own, for None, on the CPU."""
    return generator.device if generator else "cpu"


def uniform(n, generator):
    """n numbers of U[0, 1) on the generator's device, in float64 whatever the image's dtype."""
    return torch.rand(n, generator=generator, device=device_of(generator), dtype=torch.float64)


# --- spectral decay ---

def blur(x, radius, generator=None):
    """Gaussian low-pass of standard deviation `radius` px, as Pillow's GaussianBlur(radius) approximates.

    The kernel exp(-t^2 / 2 radius^2), |t| <= ceil(4 radius) (6e-5 of the mass is cut), is divided by its
    sum and runs along columns, then rows. Beyond an edge the edge pixel repeats, as in Pillow, however
    far the kernel reaches.
    """
    H, W = x.shape[1:]
    reach = math.ceil(4 * radius)

    # One half of the kernel, by distance 0..reach, divided by the sum of both.
    kernel = [gaussian(t / radius) for t in range(reach + 1)]
    total = 2 * sum(kernel) - kernel[0]
    kernel = [weight / total for weight in kernel]

    def convolve(p, dim):
        """Shifted sums: faster on a CPU than conv2d with a thin kernel, and free of a GPU's TF32."""
        n = p.shape[dim] - 2 * reach
        out = p.narrow(dim, reach, n) * kernel[0]
        for t in range(1, reach + 1):
            before = p.narrow(dim, reach - t, n)
            after = p.narrow(dim, reach + t, n)
            out.add_(before, alpha=kernel[t])
            out.add_(after, alpha=kernel[t])
        return out

    # Strips of 65536 px stay in the cache: three times faster at 4000 x 4000.
    p = F.pad(x, (0, 0, reach, reach), mode="replicate")            # [3, H + 2 reach, W]
    rows = max(1, 65536 // W)
    strips = []
    for top in range(0, H, rows):
        strip = p[:, top:top + rows + 2 * reach]                    # [3, <= rows + 2 reach, W]
        strip = convolve(strip, dim=1)                              # [3, <= rows, W]
        strip = F.pad(strip, (reach, reach), mode="replicate")
        strips.append(convolve(strip, dim=2))
    return torch.cat(strips, dim=1)


def gaussian(t):
    """exp(-t^2 / 2), a float."""
    return math.exp(-0.5 * t * t)


# --- spatial discontinuity ---

def rectangle(share, H, W, generator, stretch=1.0):
    """top, left, height, width [px] of a random rectangle with `share` of the area of H x W.

    The area is exact to half the longer side, or one px. Height over width, relative to the image's
    own aspect, is log-uniform in [1/a, a], a = min(stretch, 1/share): beyond 1/share it would not fit.
    The place is uniform.
    """
    u_aspect, u_top, u_left = uniform(3, generator).tolist()
    largest = min(stretch, 1 / share)
    a = largest ** (2 * u_aspect - 1)
    h = math.sqrt(share * a) * H
    w = math.sqrt(share / a) * W

    # The shorter side is rounded, and the longer makes up the area.
    area = share * H * W
    if h < w:
        h = side(h, H)
        w = side(area / h, W)
    else:
        w = side(w, W)
        h = side(area / w, H)

    top = int(u_top * (H - h + 1))
    left = int(u_left * (W - w + 1))
    return top, left, h, w


def side(length, longest):
    """A length [px] as a side of a rectangle: a whole number from 1 to `longest`."""
    return min(max(round(length), 1), longest)


def window(x, top, left, h, w):
    """The part of an image x [3, H, W] in a rectangle, [3, h, w], a view."""
    return x.narrow(1, top, h).narrow(2, left, w)


def mask(x, share, generator=None):
    """One rectangle of area share `share` set to 0.

    Its aspect is within 1/3.3 to 3.3 of the image's, Random Erasing's bounds.
    """
    H, W = x.shape[1:]
    hidden = rectangle(share, H, W, generator, stretch=3.3)
    out = x.clone()
    window(out, *hidden).zero_()
    return out


def crop(x, share, generator=None):
    """Throw away all but a window of area share 1 - `share` and resize that bilinearly to H x W.

    The window has at least a pixel, and the image's aspect: what is lost is context, not proportion.
    """
    H, W = x.shape[1:]
    kept = max(1 - share, 1 / (H * W))
    left_over = window(x, *rectangle(kept, H, W, generator))[None]  # [1, 3, h, w]
    resized = F.interpolate(left_over, size=(H, W), mode="bilinear", align_corners=False)
    return resized[0]


def jigsaw(x, share, generator=None):
    """4 x 4 tiles, of which a random round(16 share) trade places along one random cycle; none of them stays.

    Tiles are floor(H/4) x floor(W/4) px; the H mod 4 bottom rows and W mod 4 right columns stay. One tile
    alone cannot move, and an image under 4 px has none.
    """
    h = x.shape[1] // 4
    w = x.shape[2] // 4
    inner = (0, 0, 4 * h, 4 * w)
    tiles = window(x, *inner).reshape(3, 4, h, 4, w).permute(1, 3, 0, 2, 4)
    tiles = tiles.reshape(16, 3, h, w)

    # A cycle through distinct tiles has no fixed point.
    order = torch.randperm(16, generator=generator, device=device_of(generator))
    moving = round(16 * share)
    chosen = order[:moving].to(x.device)
    source = torch.arange(16, device=x.device)
    source[chosen] = chosen.roll(1)

    moved = tiles[source].reshape(4, 4, 3, h, w).permute(2, 0, 3, 1, 4)  # [3, 4, h, 4, w]
    out = x.clone()
    window(out, *inner).copy_(moved.reshape(3, 4 * h, 4 * w))
    return out


# --- chromatic distortion ---

def grey(x):
    """Luma of ITU-R BT.601, [1, H, W].

    torchvision's 0.2989 is 0.299 here, as in Pillow: weights of sum 1 keep grey pixels grey.
    """
    r, g, b = x.split(1)  # [1, H, W] each
    return 0.299 * r + 0.587 * g + 0.114 * b


def shift_hue(x, turns):
    """Add `turns` to the hue of HSV; value and chroma stay."""
    r, g, b = x  # [H, W] each
    v = x.amax(0)
    c = v - x.amin(0)
    d = c.where(c > 0, 1)  # grey has no hue: chroma 0 makes any angle right

    # Hue in sixths of a turn, counted from the largest channel.
    from_red = (g - b) / d
    from_green = 2 + (b - r) / d
    from_blue = 4 + (r - g) / d
    sextant = torch.where(v == g, from_green, from_blue)
    sextant = torch.where(v == r, from_red, sextant)
    sextant = sextant + 6 * turns

    # Back to RGB: each channel falls from v by c over one sextant and climbs again four sextants on, offset
    # by 5, 3 and 1.
    channels = []
    for offset in (5, 3, 1):
        k = (offset + sextant) % 6
        fallen = torch.minimum(k, 4 - k).clamp(0, 1)
        channels.append(v - c * fallen)
    return torch.stack(channels)  # [3, H, W]


def jitter(x, brightness, contrast, saturation, hue):
    """torchvision's ColorJitter with given factors (1 leaves as is) and hue shift [turns].

    The four are applied in the order of the arguments, each result clipped.
    """
    x = (brightness * x).clamp(0, 1)

    # lerp(a, b, f) = a + f (b - a)
    mean = grey(x).mean()
    x = torch.lerp(mean, x, contrast).clamp(0, 1)
    x = torch.lerp(grey(x), x, saturation).clamp(0, 1)
    return shift_hue(x, hue)


def color(x, s, generator=None):
    """`jitter` with three factors of U(max(0, 1 - s), 1 + s) and a hue shift of U(-a, a) turns.

    a = min(s / 4, 0.5).
    """
    *u_factors, u_hue = uniform(4, generator).tolist()
    low = max(0.0, 1 - s)
    high = 1 + s
    brightness, contrast, saturation = (low + (high - low) * u for u in u_factors)
    a = min(s / 4, 0.5)
    turns = a * (2 * u_hue - 1)
    return jitter(x, brightness, contrast, saturation, turns)


# --- stochastic noise ---

def noise(x, sigma, generator=None):
    """Independent Gaussian noise of standard deviation sigma / 255 on every value, then clipped."""
    device = device_of(generator)
    e = torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32)
    return x + sigma / 255 * e.to(x.device)


def impulse(x, share, generator=None):
    """Each pixel, all channels together: black with probability share / 2, white with share / 2."""
    u = uniform(x.shape[1:], generator).to(x.device)  # [H, W]
    white = x.masked_fill(u < share, 1)
    return white.masked_fill(u < share / 2, 0)


# --- equation (3) ---

class Mode(NamedTuple):
    """One mode S.

    A method's file may add its own to its Settings.corruptions; it is then named, drawn
    and chained like these.
    """

    function: Callable  # (x [3, H, W], strength, generator) -> x of the same shape; it is clipped to [0, 1]
    low: float          # p(H) = U(low, high) where no strength is given
    high: float
    limit: float        # the largest strength accepted


OPERATORS = {
    "blur": blur,
    "mask": mask,
    "crop": crop,
    "jigsaw": jigsaw,
    "color": color,
    "noise": noise,
    "impulse": impulse,
}
BUILT_IN = {}
for mode, operator in OPERATORS.items():
    BUILT_IN[mode] = Mode(operator, *PRIOR[mode], LIMIT[mode])


def check_mode(mode, modes=BUILT_IN):
    """ValueError, in one line, for a mode that is none of `modes`."""
    if mode not in modes:
        raise ValueError(f"{mode!r} is no corruption mode: choose one of {', '.join(modes)}")


def draw(low, high, generator=None):
    """eta ~ U(low, high), a float. Also where both are the same it takes one number from the generator."""
    u = torch.rand((), generator=generator, device=device_of(generator), dtype=torch.float32)
    return low + (high - low) * u.item()


def draw_strength(mode="blur", generator=None):
    """eta ~ p(H) = U(low, high) of PRIOR[mode] (eq. 3), a float in the mode's unit.

    ValueError for an unknown mode.
    """
    check_mode(mode)
    return draw(*PRIOR[mode], generator)


def corrupt(image, mode="blur", strength=None, generator=None, modes=BUILT_IN):
    """One corrupted image: equation (3), I_cor = C(I; eta, S).

    image      [3, H, W], RGB in [0, 1], any H, W >= 1, any floating dtype and device. Not modified.
               float16 and bfloat16 are computed in float32. uint8 is refused: divide by 255 first, once,
               where the image is read.
    mode       S, a key of `modes`; the function of each above says what it does.
    strength   eta in the mode's unit (see LEVELS), 0 <= eta <= LIMIT[mode]; 0 is the identity. None
               draws it by `draw_strength`.
    generator  the only source of randomness: one seed, one corruption, the same for every dtype and device
               of the image while the generator itself stays on one device (on the CPU, say). None is
               torch's global CPU generator.
    modes      {name: Mode}, the built-in ones unless a method has added its own.

    Returns a new tensor, shape, dtype and device of `image`, values in [0, 1]. Raises ValueError, one line,
    for an unknown mode, another shape or dtype, values outside [0, 1] or NaN, a strength out of range, and a
    mode that changes the shape.
    """
    check_mode(mode, modes)
    function, prior_low, prior_high, limit = modes[mode]
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"the image to corrupt must be a torch tensor, got {type(image).__name__}")
    shape = list(image.shape)
    if len(shape) != 3 or shape[0] != 3 or 0 in shape:
        raise ValueError(f"the image to corrupt must have shape [3, H, W], H and W at least 1, got {shape}")

    if not image.is_floating_point():
        raise ValueError(
            f"the image to corrupt must be floating point in [0, 1], got {image.dtype}: "
            "divide 0..255 by 255 first"
        )
    x = image if image.dtype == torch.float64 else image.float()
    low = x.min().item()
    high = x.max().item()
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ValueError(f"the image to corrupt must have values in [0, 1], got {low:g} to {high:g}")

    if strength is None:
        strength = draw(prior_low, prior_high, generator)
    is_number = isinstance(strength, Real) and not isinstance(strength, bool)
    if not is_number or not 0 <= strength <= limit:
        raise ValueError(f"the strength of {mode} must be a number from 0 to {limit:g}, got {strength!r}")
    if strength == 0:
        return image.clone()

    out = function(x, float(strength), generator)
    if out.shape != x.shape:
        raise ValueError(
            f"{mode} made an image of shape {list(out.shape)} from one of {shape}; both paths need one size"
        )
    return out.clamp(0, 1).to(image.dtype)  # clamp: also rounding of weights that sum to 1


class Corruption:
    """What `--corruption` says: modes one after another, each with the range that its strength is drawn from.

    text: `blur` (the mode's own range), `blur=5` (that strength), `blur=2:8` (a range), `blur=3,noise=15:30`
    (a chain: the noise is put on the blurred image). modes: {name: Mode}, the names it may use. ValueError,
    one line, for a text that says something else.

    Called with an image [3, H, W] in [0, 1] and a generator it returns the corrupted image, as `corrupt`
    does; `str` gives the text with every range written out. `steps` lists (mode, low, high).
    """

    def __init__(self, text="blur", modes=BUILT_IN):
        self.modes = modes
        self.steps = [self.step(part) for part in text.split(",")]

    def step(self, text):
        """One part of the text -> (mode, low, high)."""
        mode, given, strengths = text.strip().partition("=")
        check_mode(mode, self.modes)
        _, low, high, limit = self.modes[mode]
        if given:
            try:
                ends = [float(end) for end in strengths.split(":")]
            except ValueError:
                ends = []
            if len(ends) not in (1, 2):
                number, interval = f"{mode}={high:g}", f"{mode}={low:g}:{high:g}"
                raise ValueError(
                    f"{text}: a strength is a number as in {number}, or a range as in {interval}"
                )
            low = ends[0]
            high = ends[-1]

        if not 0 <= low <= high <= limit:
            raise ValueError(
                f"{text}: {mode} goes from 0 to {limit:g}, and a range from its lower end to its higher one"
            )
        return mode, low, high

    def __call__(self, image, generator=None):
        for mode, low, high in self.steps:
            strength = draw(low, high, generator)
            image = corrupt(image, mode, strength, generator, self.modes)
        return image

    def __eq__(self, other):
        return isinstance(other, Corruption) and self.steps == other.steps

    def __str__(self):
        parts = []
        for mode, low, high in self.steps:
            to_high = f":{high:g}" if high > low else ""
            parts.append(f"{mode}={low:g}{to_high}")
        return ",".join(parts)
