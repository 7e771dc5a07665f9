"""Limits on requests; an image is decoded only after its header was checked."""

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
"""Accepted media types, and Pillow's names of the formats. No other is tried: some of Pillow's readers run programs."""

UNNAMED = "application/octet-stream"
"""Accepted as well: the format is detected from the bytes."""

FORM = "multipart/form-data"
"""Accepted with the image as its only file: `curl -F file=@cat.jpg`."""

OTHER_NAMES = ("image/jpg", "image/pjpeg", "image/x-png", "image/x-ms-bmp", "application/x-www-form-urlencoded", "")
"""Other names that clients use for images, or send by default: `curl --data-binary @cat.jpg`."""


@dataclass(frozen=True)
class Limits:
    """Bounds on the cost of one client, and of all clients together.

    Attributes:
        max_body: bytes in the body of a request.
        max_pixels: pixels of an image, by its header.
        max_queue: concurrent requests, from their first byte to their answer; further ones are refused (429) with the
            time to retry after. Bodies in memory take at most `max_queue * max_body`.
        max_connections: open connections; further ones are closed at once (503).
        max_batch: images per call of the model.
        max_wait: seconds that the first image of a batch waits for others.
        read_timeout: seconds that a client has to send its headers, and again to send its body. It has up to twice as
            long to take its answer.
        timeout: seconds from the complete body to the answer.
        decode_timeout: seconds that decoding one image may take.
        max_headers: headers of a request.
        decoders: number of processes that decode images.
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
                expected = "0 or more" if name == "max_wait" else "a number over 0"
                raise UsageError(f"{name} is {value}: expected {expected}")


UNITS = {
    "max_body": "bytes", "max_pixels": "pixels", "max_queue": "requests", "max_connections": "connections",
    "max_batch": "images", "max_wait": "seconds", "read_timeout": "seconds", "timeout": "seconds",
    "decode_timeout": "seconds", "max_headers": "headers", "decoders": "processes",
}  # fmt: skip
"""Unit of each limit."""


def check_media_type(header: str | None) -> None:
    """Refuse a body that is certainly not an image before it is read; the format itself is detected from the bytes.

    Raises:
        ProblemError: 415.
    """
    kind = media_type(header)
    if kind not in (*MEDIA_TYPES, UNNAMED, FORM, *OTHER_NAMES):
        raise ProblemError(
            "unsupported-media-type",
            f"content type {kind[:100]!r} is not supported: send the bytes of an image as {', '.join(MEDIA_TYPES)} or "
            f"{UNNAMED}, or as the only file of a form",
        )


def media_type(header: str | None) -> str:
    """Return the type in a Content-Type header, without its parameters."""
    return (header or "").partition(";")[0].strip().lower()


def read_image(body: bytes, mode: str, max_pixels: int) -> Image.Image:
    """Decode the image in `body`, upright, in `mode`; its size is checked before any pixel is decoded.

    Raises:
        ProblemError: 400 for an empty body, 413 for too many pixels, 422 for anything but an intact image of a known
            format.
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
        # Decoders raise all kinds of errors on damaged bytes; any of them means that this image cannot be read.
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
        return ProblemError("unreadable-image", f"the image is refused: {error}")
    if isinstance(error, Image.UnidentifiedImageError):
        fault = f"not an image in a supported format ({', '.join(MEDIA_TYPES.values())})"
    else:
        fault = "damaged"
    return ProblemError("unreadable-image", f"the body is {fault}: check that it is the complete file")
