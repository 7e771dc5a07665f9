"""Reading one image, whatever its format: greyscale, palette, alpha, CMYK, 16-bit, rotated by EXIF, very large."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from ..errors import LTMPError, UsageError

# From here on a JPEG is decoded at reduced size: a ViT sees a few hundred pixels a side.
LARGE_PIXELS = 50_000_000
DRAFT_SIZE = (2048, 2048)
# Longer side over shorter: resizing the shorter one to a model's makes the longer one grow with it, to gigabytes.
MAX_ASPECT = 50
# Pillow reads these by starting other programs.
_UNSAFE = {"EPS", "WMF"}
# What counts as an image among other files, by its name; whether it is one shows when it is decoded.
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden files are not."""
    _, _, file = name.rpartition("/")
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS


def decode(source: IO[bytes] | Image.Image, mode: str = "RGB") -> Image.Image:
    """The image in `source`, upright, as `mode` ("RGB" or "L").

    Alpha is dropped and CMYK converted as Pillow (and timm) do it; 16-bit images are scaled to 8 bits, not
    clipped; JPEGs over 50 megapixels are decoded at reduced size. Raises what Pillow raises for bytes that are
    no image, and ValueError for floating-point pixels, whose range no file states, and for stripes.
    """
    image = source if isinstance(source, Image.Image) else Image.open(source, formats=_formats())
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: over {MAX_ASPECT} times longer than wide")
    if image.width * image.height > LARGE_PIXELS:
        image.draft(mode, DRAFT_SIZE)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels: convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.mode == "P":
        # Straight to RGB, Pillow warns about palettes with transparency.
        image = image.convert("RGBA")
    return image.convert(mode)


def read_image(path: str | os.PathLike[str], mode: str = "RGB") -> Image.Image:
    """`decode` of a file.

    Raises:
        UsageError: no such file.
        LTMPError: it cannot be read as an image; the message says why.
    """
    try:
        with Path(path).open("rb") as file:
            return decode(file, mode)
    except FileNotFoundError as error:
        raise UsageError(f"no image {path}: check the path") from error
    # what Pillow raises for broken files depends on the format
    except Exception as error:
        raise LTMPError(f"cannot read {path}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why an image could not be read, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return f"over the limit of {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or in a format Pillow does not know"
    return f"{error}" or type(error).__name__


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _UNSAFE)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Pillow clips integers above 255 when it converts; the high byte is what is wanted."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("integer pixels outside 0 to 65,535: convert the image to 8 or 16 bits")
    return Image.fromarray((pixels // 257).astype(np.uint8))
