"""Images in an uncompressed tar, read without unpacking it; a damaged member affects no other."""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from typing import IO, Any, NamedTuple

from .images import Broken, is_image_name, open_part

_CHUNK = 1 << 20
# Limits per member: its headers, mostly long names, are read into memory.
MAX_HEADERS, MAX_HEADER_BYTES = 16, 1 << 20
# Records that apply to every later member; each member copies them all.
MAX_GLOBAL = 256
# Python takes hours to parse a number of a million digits; no real number in a header has this many.
_DIGITS = re.compile(rb"[0-9]{100}")
# Types of headers that only extend the next one, with a long name for example.
_EXTENSIONS = b"LKxgX"


class Slice(NamedTuple):
    """Bytes `offset` to `offset + size` of a file."""

    path: str
    offset: int
    size: int


Content = str | Slice | bytes
"""An encoded image: the path of a file, a slice of a file, or the bytes themselves."""


class Member(NamedTuple):
    """An image in a tar, or damage found in its place.

    Attributes:
        name: path in the tar; empty if it was destroyed by damage.
        content: the location of the image's bytes, or why they cannot be read.
        offset: byte offset in the tar.
    """

    name: str
    content: Slice | Broken
    offset: int


def open_content(content: Content) -> IO[bytes]:
    """Open an encoded image. A tar is opened for each image, as processes cannot share the position in an open file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, too large, empty, or ends within the image.
    """
    if isinstance(content, Slice):
        if content.offset + content.size > os.path.getsize(content.path):
            raise ValueError("the .tar ends inside this image")
        return open_part(*content)
    if isinstance(content, bytes):
        if not content:
            raise ValueError("the file is empty")
        return BytesIO(content)
    return open_part(content)


def tar_images(path: str) -> Iterator[Member]:
    """Yield the members of a tar that are images by name, in their order; links to other members are followed.

    A damaged part yields one `Broken` in its place, followed by the members that can be found after it.

    Raises:
        tarfile.TarError, OSError: the file is not an uncompressed tar, or cannot be read.
    """
    targets: dict[str, Slice | str] | None = None
    for member in _members(path):
        if isinstance(member, Member):
            yield member
        elif is_image_name(member.name):
            content: Slice | Broken
            if member.islnk() or member.issym():
                targets = _link_targets(path) if targets is None else targets
                content = _follow(member, targets)
            elif member.issparse():
                content = Broken(member.name, "a sparse member of the .tar, which is not read")
            elif member.isreg():
                content = Slice(path, member.offset_data, member.size)
            else:
                content = Broken(member.name, "not a regular file in the .tar")
            yield Member(member.name, content, member.offset_data)


def _link_targets(path: str) -> dict[str, Slice | str]:
    """Return what each name in a tar stands for: the slice of a regular member, or the name that a link points to."""
    targets: dict[str, Slice | str] = {}
    for member in _members(path):
        if isinstance(member, tarfile.TarInfo):
            name = posixpath.normpath(member.name)
            if member.islnk() or member.issym():
                targets[name] = _link_target(member)
            elif member.isreg() and not member.issparse():
                targets[name] = Slice(path, member.offset_data, member.size)
    return targets


def _link_target(link: tarfile.TarInfo) -> str:
    """Return the name that a link points to; symbolic links are relative to their own folder."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _follow(link: tarfile.TarInfo, targets: dict[str, Slice | str], max_links: int = 16) -> Slice | Broken:
    target: Slice | str | None = _link_target(link)
    for _ in range(max_links):
        if not isinstance(target, str):
            break
        target = targets.get(target)
    if isinstance(target, Slice):
        return target
    return Broken(link.name, f"a link to {link.linkname}, which is no image in the .tar")


def _members(path: str) -> Iterator[tarfile.TarInfo | Member]:
    """Yield all members of a tar except folders, in order, and one `Member` for each run of consecutive damage."""
    length = os.path.getsize(path)
    with open(path, "rb") as file:
        archive = _header_parser()
        start, next_start, damage = 0, None, None
        while True:
            file.seek(start)
            header_file: Any = _HeaderFile(file)
            archive.fileobj = header_file
            try:
                member = archive.tarinfo.fromtarfile(archive)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                next_start, member = None, None
            # Damaged headers raise errors of many types, depending on the field.
            except Exception as error:
                # After a chain of headers over the limits, go on at the next member, not within the chain.
                extensions = not header_file.exceeded
                next_start, member = _next_header(file, start + tarfile.BLOCKSIZE, length, extensions), None
                if start == 0 and next_start is None and isinstance(error, tarfile.HeaderError):
                    raise tarfile.ReadError(f"{error}") from error
                damage = damage or (start, error)
                if len(archive.pax_headers) > MAX_GLOBAL:
                    archive.pax_headers = {}
            if damage and (member or next_start is None):
                damaged_at, cause = damage
                reason = _describe_damage(damaged_at, length, start if member else None, cause)
                yield Member("", Broken(path, reason), damaged_at)
                damage = None
            if member:
                next_start = archive.offset
                if member.size < 0 or not start < next_start < length + tarfile.BLOCKSIZE:
                    next_start = _next_header(file, member.offset_data, length)
                if not member.isdir():
                    yield member
                if next_start is None:
                    yield Member("", Broken(path, _describe_damage(length, length, None, None)), length)
            if next_start is None:
                return
            start = next_start


def _header_parser() -> tarfile.TarFile:
    """Return an empty archive to parse headers with; one opened on the tar itself fails on a damaged first header."""
    archive = tarfile.TarFile(fileobj=BytesIO(bytes(2 * tarfile.BLOCKSIZE)))
    archive.tarinfo = _Header
    return archive


class _Header(tarfile.TarInfo):
    """The header of a member; tarfile calls `fromtarfile` recursively if a header only extends the next one."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> _Header:
        file: _HeaderFile = archive.fileobj
        file.headers += 1
        file.check(file.headers <= MAX_HEADERS, f"over {MAX_HEADERS} headers for one member")
        file.check(len(archive.pax_headers) <= MAX_GLOBAL, f"over {MAX_GLOBAL} records for every member")
        return super().fromtarfile(archive)


class _HeaderFile:
    """A tar file that limits what the headers of one member may read.

    Attributes:
        exceeded: whether they tried to read more.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.bytes_left, self.headers, self.exceeded = file, MAX_HEADER_BYTES, 0, False

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int) -> bytes:
        self.bytes_left -= size
        data = self.file.read(size) if self.bytes_left >= 0 else b""
        self.check(self.bytes_left >= 0 and not _DIGITS.search(data), "its header is larger than any that is written")
        return data

    def check(self, within_limits: bool, message: str) -> None:
        if not within_limits:
            self.exceeded = True
            raise tarfile.HeaderError(message)


def _describe_damage(start: int, length: int, following: int | None, error: Exception | None) -> str:
    if following is not None:
        return f"the .tar is damaged at byte {start} ({error}): what lies before byte {following} is lost"
    if length - start < tarfile.BLOCKSIZE:
        return f"the .tar is truncated at byte {length}: images after this point are missing"
    return f"the .tar is damaged at byte {start} ({error}): images after this point could not be found"


def _next_header(file: IO[bytes], start: int, length: int, extensions: bool = True) -> int | None:
    """Return the offset of the first block from `start` on that is a header by its magic word and checksum.

    Args:
        extensions: whether a header that only extends the next one counts.
    """
    start, size = -(-start // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, 8 * tarfile.BLOCKSIZE
    while start < length:
        file.seek(start)
        chunk = file.read(size)
        magic = chunk.find(b"ustar")
        while magic >= 0:
            block = magic - 257
            header = chunk[block : block + tarfile.BLOCKSIZE] if block >= 0 else b""
            valid = block % tarfile.BLOCKSIZE == 0 and _is_header(header)
            if valid and (extensions or header[156] not in _EXTENSIONS):
                return start + block
            magic = chunk.find(b"ustar", magic + 1)
        # Chunks start small: if there is much damage, the next header is near.
        start, size = start + size, min(2 * size, _CHUNK)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except Exception:
        return False
    return True
