"""Stochastic image corruption: I_cor = C(I; eta, S), eta ~ p(H). CrystaL, equation (3), section 3.2 and appendix A.3.

The corrupted path must lack what the answer needs, so that the latents copied from the intact path become the only way to get it.
Four families S, seven modes: spectral decay (`blur`), spatial discontinuity (`mask`, `crop`, `jigsaw`), chromatic distortion
(`color`) and stochastic noise (`noise`, `impulse`). Every mode keeps the image's size, so both paths share one image grid and one
set of positions. `Corruption` is what a run's `--corruption` says: one mode with its range of strengths, or a chain of them. Left out on
purpose: batches (images differ in size).

    x    an image [3, H, W], RGB, values in [0, 1]; H and W are its height and width in pixels (in this file H counts no heads)
    eta  strength, in the unit of its mode: radius [px], s and rho [share], sigma [of 255]; 0 leaves the image as it is
    S    mode, one of MODES
"""
import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F

MODES = ("blur", "mask", "crop", "jigsaw", "color", "noise", "impulse")

# Three levels per mode, weak to strong. Appendix A.3, figures 9 to 13, except crop and impulse, which it names but gives no levels for.
LEVELS = {
    "blur": (2.0, 5.0, 10.0),       # radius = standard deviation of the Gaussian, px
    "mask": (0.2, 0.5, 0.8),        # share of the area set to 0
    "crop": (0.2, 0.5, 0.8),        # share of the area thrown away; ours: the shares of mask
    "jigsaw": (0.2, 0.5, 0.8),      # share of the 16 tiles that move
    "color": (0.5, 1.0, 2.0),       # s: factors in 1 +- s, hue +- min(s / 4, 0.5) turns
    "noise": (15.0, 30.0, 50.0),    # standard deviation, of 255
    "impulse": (0.01, 0.04, 0.12),  # share of the pixels hit; ours: E(x - b)^2 = 1/3 for x ~ U(0, 1), b in {0, 1}, so
}                                   # share = 3 (sigma / 255)^2 does the squared damage of noise at 15, 30, 50

# p(H) = U(low, high). The paper prints no prior. Blur's is that of the authors' released code; the others are ours, the range of the
# named levels (the released code has milder ones: erasing 0.1 to 0.3, colour jitter of 0.4 and hue 0.1).
PRIOR = {mode: (levels[0], levels[-1]) for mode, levels in LEVELS.items()} | {"blur": (2.0, 5.0)}

# The largest strength accepted. Shares end at 1 by their meaning, the rest where nothing is left of an image and only a slip would go on.
LIMIT = {"blur": 256.0, "mask": 1.0, "crop": 1.0, "jigsaw": 1.0, "color": 16.0, "noise": 255.0, "impulse": 1.0}


def uniform(n, generator):
    """n numbers of U[0, 1) on the generator's device (None: torch's own, CPU), in float64 whatever the image's dtype."""
    return torch.rand(n, generator=generator, device=generator.device if generator else "cpu", dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------------------------------
# spectral decay

def blur(x, radius, generator=None):
    """Gaussian low-pass of standard deviation `radius` px, as in Pillow's GaussianBlur(radius), which comes near it with box blurs.

    The kernel exp(-t^2 / 2 radius^2), |t| <= ceil(4 radius) (6e-5 of the mass is cut), is divided by its sum and runs along columns,
    then rows. Beyond an edge the edge pixel repeats, as in Pillow, however far the kernel reaches.
    """
    (_, H, W), reach = x.shape, math.ceil(4 * radius)
    kernel = [math.exp(-0.5 * (t / radius) * (t / radius)) for t in range(reach + 1)]  # one half: weights of the distances 0..reach
    total = 2 * sum(kernel) - kernel[0]

    def convolve(p, dim):  # shifted sums: on a CPU faster than conv2d with a thin kernel, and no TF32 setting of a GPU touches them
        n = p.shape[dim] - 2 * reach
        out = p.narrow(dim, reach, n) * (kernel[0] / total)
        for t in range(1, reach + 1):
            out.add_(p.narrow(dim, reach - t, n), alpha=kernel[t] / total)
            out.add_(p.narrow(dim, reach + t, n), alpha=kernel[t] / total)
        return out

    p = F.pad(x, (0, 0, reach, reach), mode="replicate")  # [3, H + 2 reach, W]
    strips, rows = [], max(1, 65536 // W)  # strips of 65536 px stay in the cache: 3 times faster at 4000 x 4000
    for top in range(0, H, rows):
        strip = convolve(p[:, top:top + rows + 2 * reach], dim=1)  # [3, <= rows, W]
        strips.append(convolve(F.pad(strip, (reach, reach), mode="replicate"), dim=2))
    return torch.cat(strips, dim=1)


# ------------------------------------------------------------------------------------------------------------------------------------
# spatial discontinuity

def rectangle(share, H, W, generator, stretch=1.0):
    """top, left, height, width [px] of a random rectangle with `share` of the area of H x W (to half its longer side, or one px).

    Height over width, relative to the image's own aspect, is log-uniform in [1/a, a], a = min(stretch, 1/share): beyond 1/share it
    would not fit. The place is uniform.
    """
    u = uniform(3, generator).tolist()
    a = min(stretch, 1 / share) ** (2 * u[0] - 1)
    h, w = math.sqrt(share * a) * H, math.sqrt(share / a) * W
    if h < w:  # round the shorter side and let the longer make up the area
        h = max(round(h), 1)
        w = min(max(round(share * H * W / h), 1), W)
    else:
        w = max(round(w), 1)
        h = min(max(round(share * H * W / w), 1), H)
    return int(u[1] * (H - h + 1)), int(u[2] * (W - w + 1)), h, w


def mask(x, share, generator=None):
    """One rectangle of area share `share` set to 0; aspect within 1/3.3 to 3.3 (Random Erasing's bounds) of the image's."""
    top, left, h, w = rectangle(share, *x.shape[1:], generator, stretch=3.3)
    out = x.clone()
    out[:, top:top + h, left:left + w] = 0
    return out


def crop(x, share, generator=None):
    """Throw away all but a window of area share 1 - `share` (at least a pixel) and resize that bilinearly to H x W.

    The window has the image's aspect: what is lost is context, not proportion.
    """
    H, W = x.shape[1:]
    top, left, h, w = rectangle(max(1 - share, 1 / (H * W)), H, W, generator)
    window = x[:, top:top + h, left:left + w]  # [3, h, w]
    return F.interpolate(window[None], size=(H, W), mode="bilinear", align_corners=False)[0]


def jigsaw(x, share, generator=None):
    """4 x 4 tiles, of which a random round(16 share) trade places along one random cycle, so that none of them stays.

    Tiles are floor(H/4) x floor(W/4) px; the H mod 4 bottom rows and W mod 4 right columns stay. One tile alone cannot move, and an
    image under 4 px has none.
    """
    h, w = x.shape[1] // 4, x.shape[2] // 4
    tiles = x[:, :4 * h, :4 * w].reshape(3, 4, h, 4, w).permute(1, 3, 0, 2, 4).reshape(16, 3, h, w)
    device = generator.device if generator else "cpu"
    chosen = torch.randperm(16, generator=generator, device=device)[:round(16 * share)].to(x.device)
    source = torch.arange(16, device=x.device)
    source[chosen] = chosen.roll(1)  # a cycle through distinct tiles has no fixed point
    out = x.clone()
    out[:, :4 * h, :4 * w] = tiles[source].reshape(4, 4, 3, h, w).permute(2, 0, 3, 1, 4).reshape(3, 4 * h, 4 * w)
    return out


# ------------------------------------------------------------------------------------------------------------------------------------
# chromatic distortion

def grey(x):
    """Luma of ITU-R BT.601, [1, H, W]. torchvision's 0.2989 is 0.299 here, as in Pillow: weights of sum 1 keep grey pixels grey."""
    return 0.299 * x[0:1] + 0.587 * x[1:2] + 0.114 * x[2:3]


def shift_hue(x, turns):
    """Add `turns` to the hue of HSV; value and chroma stay."""
    r, g, b = x  # [H, W] each
    v = x.amax(0)
    c = v - x.amin(0)
    d = c.where(c > 0, 1)  # grey has no hue: chroma 0 makes any angle right
    sextant = torch.where(v == r, (g - b) / d, torch.where(v == g, 2 + (b - r) / d, 4 + (r - g) / d)) + 6 * turns  # hue in sixths
    # Back to RGB: each channel falls from v by c over one sextant and climbs again four sextants on, offset by 5, 3, 1.
    k = [(n + sextant) % 6 for n in (5, 3, 1)]
    return torch.stack([v - c * torch.minimum(i, 4 - i).clamp(0, 1) for i in k])  # [3, H, W]


def jitter(x, brightness, contrast, saturation, hue):
    """torchvision's ColorJitter with given factors (1 leaves as is) and hue shift [turns], in this order, clipped after each."""
    x = (brightness * x).clamp(0, 1)
    x = torch.lerp(grey(x).mean(), x, contrast).clamp(0, 1)  # lerp(a, b, f) = a + f (b - a)
    x = torch.lerp(grey(x), x, saturation).clamp(0, 1)
    return shift_hue(x, hue)


def color(x, s, generator=None):
    """`jitter` with three factors of U(max(0, 1 - s), 1 + s) and a hue shift of U(-a, a) turns, a = min(s / 4, 0.5)."""
    u = uniform(4, generator).tolist()
    low, high, a = max(0.0, 1 - s), 1 + s, min(s / 4, 0.5)
    return jitter(x, *(low + (high - low) * v for v in u[:3]), a * (2 * u[3] - 1))


# ------------------------------------------------------------------------------------------------------------------------------------
# stochastic noise

def noise(x, sigma, generator=None):
    """Independent Gaussian noise of standard deviation sigma / 255 on every value, then clipped."""
    device = generator.device if generator else "cpu"
    return x + sigma / 255 * torch.randn(x.shape, generator=generator, device=device, dtype=torch.float32).to(x.device)


def impulse(x, share, generator=None):
    """Each pixel on its own, all three channels together: black with probability share / 2, white with share / 2."""
    u = uniform(x.shape[1:], generator).to(x.device)  # [H, W]
    return x.masked_fill(u < share, 1).masked_fill(u < share / 2, 0)


# ------------------------------------------------------------------------------------------------------------------------------------
# equation (3)

class Mode(NamedTuple):
    """One mode S. A method's file may add its own to its Settings.corruptions; it is then named, drawn and chained like these."""
    function: Callable  # (x [3, H, W] in [0, 1], strength, generator) -> x of the same shape; what leaves [0, 1] is clipped
    low: float          # p(H) = U(low, high) where no strength is given
    high: float
    limit: float        # the largest strength accepted


OPERATORS = {"blur": blur, "mask": mask, "crop": crop, "jigsaw": jigsaw, "color": color, "noise": noise, "impulse": impulse}
BUILT_IN = {mode: Mode(OPERATORS[mode], *PRIOR[mode], LIMIT[mode]) for mode in MODES}


def check_mode(mode, modes=BUILT_IN):
    """ValueError, in one line, for a mode that is none of `modes`."""
    if mode not in modes:
        raise ValueError(f"{mode!r} is no corruption mode: choose one of {', '.join(modes)}")


def draw(low, high, generator=None):
    """eta ~ U(low, high), a float. Also where both are the same it takes one number from the generator."""
    device = generator.device if generator else "cpu"
    return low + (high - low) * torch.rand((), generator=generator, device=device, dtype=torch.float32).item()


def draw_strength(mode="blur", generator=None):
    """eta ~ p(H) = U(low, high) of PRIOR[mode], a float in the mode's unit. ValueError: unknown mode. Source: equation (3)."""
    check_mode(mode)
    return draw(*PRIOR[mode], generator)


def corrupt(image, mode="blur", strength=None, generator=None, modes=BUILT_IN):
    """One corrupted image: equation (3), I_cor = C(I; eta, S).

    image      [3, H, W], RGB in [0, 1], any H, W >= 1, any floating dtype and device. Not modified. float16 and bfloat16 are
               computed in float32. uint8 is refused: divide by 255 first, once, where the image is read.
    mode       S, a key of `modes`; the function of each above says what it does.
    strength   eta in the mode's unit (see LEVELS), 0 <= eta <= LIMIT[mode]; 0 is the identity. None draws it by `draw_strength`.
    generator  the only source of randomness: one seed, one corruption, the same for every dtype and device of the image while the
               generator itself stays on one device (on the CPU, say). None is torch's global CPU generator.
    modes      {name: Mode}, the built-in ones unless a method has added its own.

    Returns a new tensor, shape, dtype and device of `image`, values in [0, 1].
    Raises ValueError, one line, for an unknown mode, another shape or dtype, values outside [0, 1] or NaN, a strength out of range,
    and a mode that changes the shape.
    """
    check_mode(mode, modes)
    function, prior_low, prior_high, limit = modes[mode]
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"the image to corrupt must be a torch tensor, got {type(image).__name__}")
    if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"the image to corrupt must have shape [3, H, W], H and W at least 1, got {list(image.shape)}")
    if not image.is_floating_point():
        raise ValueError(f"the image to corrupt must be floating point in [0, 1], got {image.dtype}: divide 0..255 by 255 first")
    x = image if image.dtype == torch.float64 else image.float()
    low, high = (v.item() for v in x.aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN fails too
        raise ValueError(f"the image to corrupt must have values in [0, 1], got {low:g} to {high:g}")
    if strength is None:
        strength = draw(prior_low, prior_high, generator)
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 <= strength <= limit:
        raise ValueError(f"the strength of {mode} must be a number from 0 to {limit:g}, got {strength!r}")
    if strength == 0:
        return image.clone()

    out = function(x, float(strength), generator)
    if out.shape != x.shape:
        raise ValueError(f"{mode} made an image of shape {list(out.shape)} from one of {list(x.shape)}; both paths need one size")
    return out.clamp(0, 1).to(image.dtype)  # clamp: also rounding of weights that sum to 1


class Corruption:
    """What `--corruption` says: modes one after another, each with the range that its strength is drawn from.

    text: `blur` (the mode's own range), `blur=5` (that strength), `blur=2:8` (a range), `blur=3,noise=15:30` (a chain: the noise
    is put on the blurred image). modes: {name: Mode}, the names it may use. ValueError, one line, for a text that says something else.

    Called with an image [3, H, W] in [0, 1] and a generator it returns the corrupted image, as `corrupt` does; `str` gives the text
    with every range written out. `steps` lists (mode, low, high).
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
                raise ValueError(f"{text}: a strength is a number as in {mode}={high:g}, or a range as in {mode}={low:g}:{high:g}")
            low, high = ends[0], ends[-1]
        if not 0 <= low <= high <= limit:
            raise ValueError(f"{text}: {mode} goes from 0 to {limit:g}, and a range from its lower end to its higher one")
        return mode, low, high

    def __call__(self, image, generator=None):
        for mode, low, high in self.steps:
            image = corrupt(image, mode, draw(low, high, generator), generator, self.modes)
        return image

    def __eq__(self, other):
        return isinstance(other, Corruption) and self.steps == other.steps

    def __str__(self):
        return ",".join(f"{mode}={low:g}" + (f":{high:g}" if high > low else "") for mode, low, high in self.steps)
