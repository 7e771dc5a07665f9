"""Reading one image, whatever its format: greyscale, palette, alpha, CMYK, 16-bit, rotated by EXIF, very large."""

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

# From here on an image is reduced, JPEGs while they are decoded: a ViT sees a few hundred pixels a side.
LARGE_PIXELS = 50_000_000
DRAFT_SIZE = (2048, 2048)
# Decoded images beyond this many bytes are not read; a process of bulk scoring has that much for one.
MAX_DECODED = 2**29
# Conversions are done piece by piece of about this many pixels: each is a copy, or several.
PIECE = 2**20
# What decoders take for a pixel of their own, whatever size is asked for; measured on Pillow 12.
_DECODERS = {"WEBP": 16, "JPEG2000": 20, "AVIF": 10}
# Longer side over shorter: resizing the shorter one to a model's makes the longer one grow with it, to gigabytes.
MAX_ASPECT = 50
# Encoded images beyond this are not read: nothing that a ViT sees needs as much, and sparse files cost nothing to make.
MAX_BYTES = 2**30
# Those beyond this are decoded from where they lie, which reads no more of them than it takes.
LARGE_BYTES = 2**26
# Each scan of a JPEG is a pass over all of its pixels, however few bytes it has; encoders write about ten.
MAX_SCANS = 100
# Before its pixels a JPEG tells of its camera and its colours, in megabytes at most; Pillow reads it a byte at a time
# between segments, and copies what it has of some at each further one, which takes minutes for many.
MAX_HEADER, MAX_FILL, MAX_SEGMENTS = 2**24 + 2**22, 2**16, 2000
# Seconds of processor time for one image: some of Pillow's formats are read in Python, byte by byte.
MAX_SECONDS = 60.0
# Pillow reads these by starting other programs.
_UNSAFE = {"EPS", "WMF"}
# What counts as an image among other files, by its name; whether it is one shows when it is decoded.
EXTENSIONS = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
        ".pbm", ".pnm", ".avif", ".jp2", ".tga",
    )
)  # fmt: skip


class UnfitImageError(ValueError):
    """An image that Pillow could read, perhaps, and we do not; the message says why."""


@dataclass(frozen=True)
class Broken:
    """Stands where an image should be that could not be read."""

    name: str
    reason: str


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; what is hidden, or lies in a hidden folder, is not."""
    *folders, file = name.split("/")
    if any(part.startswith(".") and part not in (".", "..") for part in (*folders, file)):
        return False
    return os.path.splitext(file)[1].lower() in EXTENSIONS


def open_part(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> IO[bytes]:
    """The bytes of a file from `offset` on, `size` of them or all: in memory, or where they lie if that is much.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, empty, or over 1 GB.
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
    """Part of an open file, read where it lies."""

    def __init__(self, file: BufferedReader, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        self.at = max(0, start + at)
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.at)])
        self.at += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def decode(source: IO[bytes] | Image.Image, mode: str = "RGB") -> Image.Image:
    """The image in `source`, upright, as `mode` ("RGB" or "L").

    Alpha is dropped and CMYK converted as Pillow (and timm) do it; 16-bit images are scaled to 8 bits, not
    clipped; what is over 50 megapixels comes at reduced size. Raises what Pillow raises for bytes that are
    no image, and `UnfitImageError` for floating-point pixels, whose range no file states, for stripes, for JPEGs of
    hundreds of scans, which take minutes, and in a main thread for whatever else takes over a minute.
    """
    with _within(MAX_SECONDS):
        return _decode(source, mode)


def _decode(source: IO[bytes] | Image.Image, mode: str) -> Image.Image:
    if not isinstance(source, Image.Image):
        _check_header(source)
    image = source if isinstance(source, Image.Image) else Image.open(source, formats=_formats())
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnfitImageError(f"{image.width} x {image.height} pixels: over {MAX_ASPECT} times longer than wide")
    _check_scans(image)
    _check_memory(image, mode)
    if image.width * image.height > LARGE_PIXELS:
        image.draft(mode, DRAFT_SIZE)
    image.load()
    turn = _turn(image)
    times, pixels = _times(image), image.width * image.height
    whole = times == 1 and (image.mode == mode or pixels <= PIECE)
    image = _converted(image, mode) if whole else _reduced(image, mode, times)
    return image if turn is None else image.transpose(turn)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise `UnfitImageError` after so much processor time; signals reach the main thread alone."""
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


def _times(image: Image.Image) -> int:
    """How many times smaller an image comes; at least by two where it is large, however short its shorter side is."""
    return max(2, min(image.size) // max(DRAFT_SIZE)) if image.width * image.height > LARGE_PIXELS else 1


def _reduced(image: Image.Image, mode: str, times: int) -> Image.Image:
    """`_converted` and so many times smaller, piece by piece: whole copies of this many pixels take gigabytes."""
    small = Image.new(mode, (image.width // times, image.height // times))
    rows = max(1, PIECE // (times * image.width))
    for top in range(0, small.height, rows):
        bottom = min(top + rows, small.height)
        strip = image.crop((0, times * top, times * small.width, times * bottom))
        small.paste(_converted(strip, mode).reduce(times), (0, top))
    return small


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "F":
        raise UnfitImageError("floating-point pixels: convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.mode == "P":
        # Straight to RGB, Pillow warns about palettes with transparency.
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def read_image(path: str | os.PathLike[str], mode: str = "RGB") -> Image.Image:
    """`decode` of a file.

    Raises:
        UsageError: no such file.
        LTMPError: it cannot be read as an image; the message says why.
    """
    try:
        with open_part(path) as file:
            return decode(file, mode)
    except FileNotFoundError as error:
        raise UsageError(f"no image {path}: check the path") from error
    # what Pillow raises for broken files depends on the format
    except Exception as error:
        raise LTMPError(f"cannot read {path}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why an image could not be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"over the limit of {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or in a format Pillow does not know"
    return f"{error}" or type(error).__name__


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _UNSAFE)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations, and how to undo them."""


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes the image upright by its EXIF orientation; unlike Pillow's it never writes EXIF."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    # damaged EXIF is no reason to lose the pixels
    except Exception:
        return None


def _check_memory(image: Image.Image, mode: str) -> None:
    """Refuse what takes gigabytes to decode, by the header; raises `UnfitImageError`."""
    times, pixels = _times(image), image.width * image.height
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    decoder = 0
    if image.format in ("JPEG", "MPO"):
        # all coefficients of a progressive one are kept, of others a few rows
        decoder = 6 if image.info.get("progressive") else 0
        stored = 1 if pixels > LARGE_PIXELS and min(image.size) >= 2 * max(DRAFT_SIZE) else stored
    # the result is another copy, or a part of one
    result = 0 if image.mode == mode and times == 1 else 4 / times**2
    each = max(_DECODERS.get(image.format or "", 0), decoder + stored, stored + result)
    needed = each * pixels + _piece_of_tiff(image)
    if needed > MAX_DECODED:
        raise UnfitImageError(
            f"{image.width} x {image.height} pixels of {image.format} take {needed / 1e9:.1f} GB to decode: over the "
            f"limit of {MAX_DECODED / 1e9:.1f} GB"
        )


def _piece_of_tiff(image: Image.Image) -> int:
    """Bytes of a strip or tile, which is decompressed whole; a strip may hold all rows."""
    tags = getattr(image, "tag_v2", {})
    if image.format != "TIFF" or image.info.get("compression", "raw") == "raw":
        return 0
    width, rows = tags.get(322, image.width), tags.get(323, min(tags.get(278, image.height), image.height))
    return int(width * rows * sum(tags.get(258, (8,))) // 8)


_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_START_OF_SCAN, _END, _ALONE = 0xDA, 0xD9, (0x01, 0xD8)


def _check_header(file: IO[bytes]) -> None:
    """Refuse a JPEG whose header alone takes minutes to read; raises `UnfitImageError`."""
    at, fill, segments, head = 2, 0, 0, file.read(2)
    while head == b"\xff\xd8":
        file.seek(at)
        found = _MARKER.search(chunk := file.read(MAX_FILL))
        if found is None and len(chunk) < MAX_FILL:
            break
        at += found.end() if found else MAX_FILL
        fill += found.start() if found else MAX_FILL
        segments += 1
        if found is None or fill >= MAX_FILL or at > MAX_HEADER or segments > MAX_SEGMENTS:
            raise UnfitImageError("a header of more bytes than any camera or program writes")
        if chunk[found.end() - 1] in (_START_OF_SCAN, _END):
            break
        if chunk[found.end() - 1] not in _ALONE:
            at += int.from_bytes(chunk[found.end() : found.end() + 2], "big")
    file.seek(0)


def _check_scans(image: Image.Image) -> None:
    """Refuse a JPEG whose decoding would take minutes; raises `UnfitImageError`."""
    file = getattr(image, "fp", None)
    if image.format not in ("JPEG", "MPO") or file is None:
        return
    place = file.tell()
    file.seek(0)
    # no image of a size that is decoded takes more
    data = file.read(4 * LARGE_BYTES)
    file.seek(place)
    # counted properly only where there may be too many: thumbnails and videos behind the image hold such bytes, too
    if data.count(b"\xff\xda") > MAX_SCANS and _count_scans(data) > MAX_SCANS:
        raise UnfitImageError(f"over {MAX_SCANS} scans, which no camera or program writes")


def _count_scans(data: bytes) -> int:
    """Scans of a JPEG up to its end, or to one more than are allowed; segments of other kinds are passed over."""
    scans, at = 0, 2
    while scans <= MAX_SCANS and (found := _MARKER.search(data, at)):
        marker, at = data[found.start() + 1], found.end()
        if marker == _END:
            break
        scans += marker == _START_OF_SCAN
        if marker not in _ALONE:
            at += int.from_bytes(data[at : at + 2], "big")
    return scans


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Pillow clips integers above 255 when it converts; the high byte is what is wanted."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise UnfitImageError("integer pixels outside 0 to 65,535: convert the image to 8 or 16 bits")
    return Image.fromarray((pixels // 257).astype(np.uint8))
