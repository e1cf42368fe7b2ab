"""A picture of any kind becomes RGB of 8 bits, as a person sees it: turned, on white, in its own range."""

import numpy as np
from PIL import Image, ImageOps

# What Pillow may open, whatever a file is called; of an animation the first picture counts. Formats that
# start a program (EPS) or stand for other files are none of them.
READ = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
FORMATS = tuple(name for name in READ if name in Image.OPEN)  # older Pillows lack one

PIXELS = 2 * 89_478_485  # of all pictures of a record together, Pillow's own limit of one

def rgb(image):
    """A PIL image of any mode -> RGB, turned as its EXIF says.

    On white where it is transparent, more than 8 bits scaled to 8. Pillow's own convert("RGB") drops
    the alpha, so that the black stored under what is transparent shows, and clips 16 bits at 255.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")

    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def eight_bits(image):
    """A grey image of more than 8 bits (modes I;16, I and F) -> mode LA, its values scaled to 0..255.

    I;16 reaches to 65535. I and F name no range: it is the first of 0..1 (F alone), 0..255 and 0..65535 that
    holds all values, or else (below zero, 32 bits) from the least to the largest. What is no number is black.
    """
    values = np.asarray(image, np.float64)
    numbers = values[np.isfinite(values)]
    if not numbers.size:
        raise ValueError("no finite value in it")

    # The range that the values lie in.
    ends = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    low, high = numbers.min(), numbers.max()
    fitting = [end for end in ends if low >= 0 and high <= end]
    if fitting:
        low, high = 0, fitting[0]

    scaled = np.nan_to_num(255 * (values - low) / max(high - low, 1e-30), nan=0, posinf=255, neginf=0)
    opaque = values != image.info.get("transparency", np.nan)  # a PNG may name one value that is transparent
    bands = [scaled.round(), 255 * opaque]
    return Image.merge("LA", [Image.fromarray(band.astype(np.uint8)) for band in bands])
