"""Read one image of any kind: greyscale, palette, alpha, CMYK, 16-bit, rotated by EXIF, very large, or hostile."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BufferedReader, BytesIO, RawIOBase
from typing import IO, Any

import numpy as np
from PIL import Image

from ..errors import LTMPError, UsageError
from ..files.text import open_regular

# Images of more pixels are reduced, JPEGs while they are decoded: a ViT sees a few hundred pixels per side.
LARGE_PIXELS = 50_000_000
DRAFT_SIZE = (2048, 2048)
# Images that take more bytes than this to decode are refused; it is the memory that bulk scoring has for one image.
MAX_DECODED = 2**29
# Images are converted in pieces of about this many pixels, as each conversion makes at least one copy.
PIECE = 2**20
# Bytes per pixel that decoders allocate themselves, whatever size is requested; measured on Pillow 12.
_DECODERS = {"WEBP": 16, "JPEG2000": 20, "AVIF": 10}
# Longer side over shorter side: resizing the shorter side to the model's makes the longer one grow, to gigabytes.
MAX_ASPECT = 50
# Files of more bytes are not read: no useful image is as large, and sparse files cost nothing to create.
MAX_BYTES = 2**30
# Files of more bytes are decoded from disk, which reads no more of them than the decoder needs.
LARGE_BYTES = 2**26
# Each scan of a JPEG is a pass over all of its pixels, however few bytes it has; encoders write about ten.
MAX_SCANS = 100
# JPEG metadata before the pixels (camera, colour profile) takes a few megabytes at most. Pillow reads what lies
# between segments byte by byte, and copies what it has of some segments at each further one: minutes for many.
MAX_HEADER, MAX_FILL, MAX_SEGMENTS = 2**24 + 2**22, 2**16, 2000
# Seconds of processor time for one image: Pillow reads some formats in Python, byte by byte.
MAX_SECONDS = 60.0
# Formats that Pillow reads by starting other programs.
_UNSAFE = {"EPS", "WMF"}
# Files with these extensions count as images; whether they are shows when they are decoded.
EXTENSIONS = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
        ".pbm", ".pnm", ".avif", ".jp2", ".tga",
    )
)  # fmt: skip


class UnfitImageError(ValueError):
    """An image that is refused, although Pillow might read it; the message gives the reason."""


@dataclass(frozen=True)
class Broken:
    """Takes the place of an image that could not be read."""

    name: str
    reason: str


def is_image_name(name: str) -> bool:
    """Whether a path is that of an image by its extension; hidden files and those in hidden folders are not."""
    *folders, file = name.split("/")
    if any(part.startswith(".") and part not in (".", "..") for part in (*folders, file)):
        return False
    return os.path.splitext(file)[1].lower() in EXTENSIONS


def open_part(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> IO[bytes]:
    """Open `size` bytes of a file from `offset` on, or all of them: in memory, or on disk if they are many.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or the part is empty or over 1 GB.
    """
    file = open_regular(path)
    try:
        size = os.fstat(file.fileno()).st_size - offset if size is None else size
        if size > MAX_BYTES:
            raise ValueError(f"{size / 1e9:.1f} GB are over the limit of {MAX_BYTES / 1e9:.1f} GB for one image")
        if size == 0:
            raise ValueError("the file is empty")
        if size > LARGE_BYTES:
            return BufferedReader(Part(file, offset, size))
        file.seek(offset)
        data = BytesIO(file.read(size))
    except BaseException:
        file.close()
        raise
    file.close()
    return data


class Part(RawIOBase):
    """Part of an open file as a file of its own."""

    def __init__(self, file: BufferedReader, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.position)])
        self.position += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def decode(source: IO[bytes] | Image.Image, mode: str = "RGB") -> Image.Image:
    """Decode an image, upright by its EXIF orientation, in `mode` ("RGB" or "L").

    Alpha is dropped and CMYK converted as Pillow (and timm) do it; 16-bit images are scaled to 8 bits, not clipped;
    images of over 50 megapixels are reduced in size.

    Raises:
        UnfitImageError: floating-point pixels, whose range no file states; one side over 50 times the other; a JPEG
            header or number of scans that takes minutes to read; over 0.5 GB to decode; or, in the main thread,
            anything else that takes over a minute.
        Exception: whatever Pillow raises for bytes that are not an image.
    """
    with _time_limit(MAX_SECONDS):
        return _decode(source, mode)


def read_image(path: str | os.PathLike[str], mode: str = "RGB") -> Image.Image:
    """Read an image file with `decode`.

    Raises:
        UsageError: there is no such file.
        LTMPError: the file cannot be read as an image; the message gives the reason.
    """
    try:
        with open_part(path) as file:
            return decode(file, mode)
    except FileNotFoundError as error:
        raise UsageError(f"no image {path}: check the path") from error
    # What Pillow raises for broken files depends on the format.
    except Exception as error:
        raise LTMPError(f"cannot read {path}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return in a few words why an image could not be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"over the limit of {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or in a format Pillow does not know"
    return f"{error}" or type(error).__name__


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `UnfitImageError` after `seconds` of processor time, in the main thread; other threads get no signals."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise UnfitImageError(f"takes over {seconds:g} seconds to decode")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _decode(source: IO[bytes] | Image.Image, mode: str) -> Image.Image:
    if isinstance(source, Image.Image):
        image = source
    else:
        _check_header(source)
        image = Image.open(source, formats=_formats())
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnfitImageError(f"{image.width} x {image.height} pixels: over {MAX_ASPECT} times longer than wide")
    _check_scans(image)
    _check_memory(image, mode)
    if image.width * image.height > LARGE_PIXELS:
        image.draft(mode, DRAFT_SIZE)
    image.load()
    orientation = _orientation(image)
    factor, pixels = _reduction(image), image.width * image.height
    at_once = factor == 1 and (image.mode == mode or pixels <= PIECE)
    image = _convert(image, mode) if at_once else _convert_reduced(image, mode, factor)
    return image if orientation is None else image.transpose(orientation)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _UNSAFE)


_START_OF_IMAGE = b"\xff\xd8"
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_START_OF_SCAN, _END, _WITHOUT_LENGTH = 0xDA, 0xD9, (0x01, 0xD8)


def _check_header(file: IO[bytes]) -> None:
    """Refuse a JPEG whose header alone takes minutes to read; raises `UnfitImageError`."""
    if file.read(2) == _START_OF_IMAGE:
        _check_segments(file)
    file.seek(0)


def _check_segments(file: IO[bytes]) -> None:
    position, fill, segments = 2, 0, 0
    while True:
        file.seek(position)
        chunk = file.read(MAX_FILL)
        found = _MARKER.search(chunk)
        if found is None and len(chunk) < MAX_FILL:  # the end of the file
            return
        if found:
            position += found.end()
            fill += found.start()
            segments += 1
        if found is None or fill >= MAX_FILL or position > MAX_HEADER or segments > MAX_SEGMENTS:
            raise UnfitImageError("a header of more bytes than any camera or program writes")
        marker = chunk[found.end() - 1]
        if marker in (_START_OF_SCAN, _END):
            return
        if marker not in _WITHOUT_LENGTH:
            position += int.from_bytes(chunk[found.end() : found.end() + 2], "big")


def _check_scans(image: Image.Image) -> None:
    """Refuse a JPEG whose number of scans takes minutes to decode; raises `UnfitImageError`."""
    file = getattr(image, "fp", None)
    if image.format not in ("JPEG", "MPO") or file is None:
        return
    position = file.tell()
    file.seek(0)
    # No JPEG within the other limits is larger.
    data = file.read(4 * LARGE_BYTES)
    file.seek(position)
    # Parsed only if there may be too many scans: thumbnails, and videos after the image, contain such bytes as well.
    if data.count(b"\xff\xda") > MAX_SCANS and _count_scans(data) > MAX_SCANS:
        raise UnfitImageError(f"over {MAX_SCANS} scans, which no camera or program writes")


def _count_scans(data: bytes) -> int:
    """Count the scans of a JPEG up to its end marker, or up to one more than allowed; other segments are skipped."""
    scans, position = 0, 2
    while scans <= MAX_SCANS and (found := _MARKER.search(data, position)):
        marker, position = data[found.start() + 1], found.end()
        if marker == _END:
            break
        scans += marker == _START_OF_SCAN
        if marker not in _WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2], "big")
    return scans


def _check_memory(image: Image.Image, mode: str) -> None:
    """Refuse an image whose header shows that decoding would take over `MAX_DECODED`; raises `UnfitImageError`."""
    factor, pixels = _reduction(image), image.width * image.height
    # All in bytes per pixel: what is stored, what the decoder needs beside it, and the converted result.
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    decoder = 0
    if image.format in ("JPEG", "MPO"):
        # Progressive JPEGs keep all coefficients, others a few rows.
        decoder = 6 if image.info.get("progressive") else 0
        stored = 1 if pixels > LARGE_PIXELS and min(image.size) >= 2 * max(DRAFT_SIZE) else stored
    result = 0 if image.mode == mode and factor == 1 else 4 / factor**2
    per_pixel = max(_DECODERS.get(image.format or "", 0), decoder + stored, stored + result)
    needed = per_pixel * pixels + _tiff_piece(image)
    if needed > MAX_DECODED:
        raise UnfitImageError(
            f"{image.width} x {image.height} pixels of {image.format} take {needed / 1e9:.1f} GB to decode: over the "
            f"limit of {MAX_DECODED / 1e9:.1f} GB"
        )


def _tiff_piece(image: Image.Image) -> int:
    """Return the bytes of one strip or tile of a TIFF, which is decompressed as a whole; a strip may hold all rows."""
    tags = getattr(image, "tag_v2", {})
    if image.format != "TIFF" or image.info.get("compression", "raw") == "raw":
        return 0
    width, rows = tags.get(322, image.width), tags.get(323, min(tags.get(278, image.height), image.height))
    return int(width * rows * sum(tags.get(258, (8,))) // 8)


def _reduction(image: Image.Image) -> int:
    """Return the factor by which an image is reduced: at least 2 if it is large, even if its shorter side is not."""
    return max(2, min(image.size) // max(DRAFT_SIZE)) if image.width * image.height > LARGE_PIXELS else 1


def _convert_reduced(image: Image.Image, mode: str, factor: int) -> Image.Image:
    """`_convert` and reduce by `factor`, piece by piece, as full-size copies of a large image take gigabytes."""
    small = Image.new(mode, (image.width // factor, image.height // factor))
    rows = max(1, PIECE // (factor * image.width))
    for top in range(0, small.height, rows):
        bottom = min(top + rows, small.height)
        strip = image.crop((0, factor * top, factor * small.width, factor * bottom))
        small.paste(_convert(strip, mode).reduce(factor), (0, top))
    return small


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise UnfitImageError("floating-point pixels: convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.mode == "P":
        # Pillow warns about palettes with transparency if they are converted directly to RGB.
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit pixels to 8 bits; Pillow's own conversion clips them at 255."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise UnfitImageError("integer pixels outside 0 to 65,535: convert the image to 8 or 16 bits")
    return Image.fromarray((pixels // 257).astype(np.uint8))


_EXIF_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientations, and the transpositions that undo them."""


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright; unlike `ImageOps.exif_transpose` it never writes EXIF."""
    try:
        return _TRANSPOSES.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    # Damaged EXIF is no reason to lose the pixels.
    except Exception:
        return None
