"""Limits on requests; images are opened only after their header was checked."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from ..data.images import MAX_ASPECT, UnfitImageError, decode, reason
from ..errors import UsageError
from .problems import ProblemError

MEDIA_TYPES = {
    "image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP", "image/gif": "GIF", "image/bmp": "BMP",
}  # fmt: skip
"""What is taken, and Pillow's name of it. Nothing else is tried: some of Pillow's readers start other programs."""

UNNAMED = "application/octet-stream"
"""Taken, too: the bytes say themselves which of the formats they are."""

FORM = "multipart/form-data"
"""Taken, too, with the image as its one file: `curl -F file=@cat.jpg`."""

OTHER_NAMES = ("image/jpg", "image/pjpeg", "image/x-png", "image/x-ms-bmp", "application/x-www-form-urlencoded", "")
"""What clients also call images, or say where they were told nothing: `curl --data-binary @cat.jpg`."""


@dataclass(frozen=True)
class Limits:
    """Bounds on what one client, and all together, can cost.

    Attributes:
        max_body: bytes of a request's body.
        max_pixels: pixels of an image, by its header.
        max_queue: requests at once, from their first byte to their answer; more are told to come back (429). Bodies
            in memory stay under `max_queue * max_body`.
        max_connections: open connections; more are closed at once (503).
        max_batch: images a call of the model.
        max_wait: seconds that the first image of a batch waits for others.
        read_timeout: seconds a client has for its headers, again for its body, and to take its answer.
        timeout: seconds from a whole body to the answer.
        decode_timeout: seconds that decoding one image may take.
        max_headers: headers of a request.
        decoders: processes that decode images.
    """

    max_body: int = 10_000_000
    max_pixels: int = 25_000_000
    max_queue: int = 128
    max_connections: int = 512
    max_batch: int = 32
    max_wait: float = 0.005
    read_timeout: float = 10.0
    timeout: float = 30.0
    decode_timeout: float = 5.0
    max_headers: int = 100
    decoders: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name != "max_wait"):
                raise UsageError(f"{name} is {value}: expected a number over 0")


UNITS = {
    "max_body": "bytes", "max_pixels": "pixels", "max_queue": "requests", "max_connections": "connections",
    "max_batch": "images", "max_wait": "seconds", "read_timeout": "seconds", "timeout": "seconds",
    "decode_timeout": "seconds", "max_headers": "headers", "decoders": "processes",
}  # fmt: skip
"""What each of the limits is counted in."""


def check_media_type(header: str | None) -> None:
    """Refuse what is certainly no image, before its body is read; which format it has, the bytes say themselves.

    Raises:
        ProblemError: 415.
    """
    kind = media_type(header)
    if kind not in (*MEDIA_TYPES, UNNAMED, FORM, *OTHER_NAMES):
        raise ProblemError(
            "unsupported-media-type",
            f"content type {kind[:100]!r} is not taken: send an image's own bytes as {', '.join(MEDIA_TYPES)} or "
            f"{UNNAMED}, or as the one file of a form",
        )


def media_type(header: str | None) -> str:
    """The type in a Content-Type header, without its parameters."""
    return (header or "").partition(";")[0].strip().lower()


def read_image(body: bytes, mode: str, max_pixels: int) -> Image.Image:
    """The image in `body`, upright, as `mode`; its size is checked before any pixel is decoded.

    Raises:
        ProblemError: 400 an empty body, 413 too many pixels, 422 no image of a known format, or a damaged one.
    """
    if not body:
        raise ProblemError("empty-body", "the body is empty: send the bytes of an image")
    try:
        image = Image.open(BytesIO(body), formats=tuple(MEDIA_TYPES.values()))
    except Image.DecompressionBombError as error:
        raise ProblemError("too-many-pixels", f"the image is {reason(error)}: send a smaller one") from error
    except Exception as error:
        raise _unreadable(error) from error
    with image:
        _check_size(image.width, image.height, max_pixels)
        try:
            return decode(image, mode)
        # decoders fail in many ways on damaged bytes; each means that this image cannot be read
        except Exception as error:
            raise _unreadable(error) from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ProblemError(
            "too-many-pixels",
            f"the image is {width} x {height}, over the limit of {max_pixels / 1e6:g} megapixels: send a smaller one",
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ProblemError(
            "unreadable-image",
            f"the image is {width} x {height}: its longer side may be at most {MAX_ASPECT} times its shorter one",
        )


def _unreadable(error: Exception) -> ProblemError:
    if isinstance(error, UnfitImageError):
        return ProblemError("unreadable-image", f"the image is not taken: {error}")
    known = ", ".join(MEDIA_TYPES.values())
    why = f"not an image of a known kind ({known})" if isinstance(error, Image.UnidentifiedImageError) else "damaged"
    return ProblemError("unreadable-image", f"the body is {why}: check that it is the whole file")
