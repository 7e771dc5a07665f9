"""Images in an uncompressed tar, found without unpacking; a damaged member costs itself and no other."""

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
# Of one member: what its headers say beside its data, long names above all, is read into memory.
MAX_HEADERS, MAX_HEADER_BYTES = 16, 1 << 20
# Records that hold for every member behind them, each of which copies them all.
MAX_GLOBAL = 256
# Python's parser takes hours for a million digits; no number has more than these.
_DIGITS = re.compile(rb"[0-9]{100}")
_EXTENSIONS = b"LKxgX"


class Slice(NamedTuple):
    """Bytes `offset` to `offset + size` of a file."""

    path: str
    offset: int
    size: int


Content = str | Slice | bytes
"""An encoded image: a file, a part of one, or the bytes themselves."""


class Member(NamedTuple):
    """One image of a tar, or what became of one.

    Attributes:
        name: in the tar; empty where damage has destroyed it.
        content: where its bytes are, or why they cannot be had.
        offset: bytes of the tar that lie before it.
    """

    name: str
    content: Slice | Broken
    offset: int


def open_content(content: Content) -> IO[bytes]:
    """The encoded image. A tar is opened anew for each: a position in a file cannot be shared by several processes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, too large, empty, or ends inside the image.
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
    """The images of a tar in its own order, by their names; links to other members are followed.

    What is damaged is one `Broken` in its place, and whatever can be found behind it comes after.

    Raises:
        tarfile.TarError, OSError: no plain tar at all, or it cannot be read.
    """
    targets: dict[str, Slice | str] | None = None
    for member in _members(path):
        if isinstance(member, Member):
            yield member
        elif is_image_name(member.name):
            content: Slice | Broken
            if member.islnk() or member.issym():
                targets = _targets(path) if targets is None else targets
                content = _follow(member, targets)
            elif member.issparse():
                content = Broken(member.name, "a sparse member of the .tar, which is not read")
            elif member.isreg():
                content = Slice(path, member.offset_data, member.size)
            else:
                content = Broken(member.name, "not a regular file in the .tar")
            yield Member(member.name, content, member.offset_data)


def _members(path: str) -> Iterator[tarfile.TarInfo | Member]:
    """Everything in a tar but folders, in order; a `Member` tells of damage, once for all that is behind each other."""
    length = os.path.getsize(path)
    with open(path, "rb") as file:
        archive = _empty_archive()
        start, following, damage = 0, None, None
        while True:
            file.seek(start)
            headers: Any = _Headers(file)
            archive.fileobj = headers
            try:
                member = archive.tarinfo.fromtarfile(archive)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                following, member = None, None
            # headers fail in as many ways as there are numbers in them
            except Exception as error:
                following, member = _next_header(file, start + tarfile.BLOCKSIZE, length, not headers.spent), None
                if start == 0 and following is None and isinstance(error, tarfile.HeaderError):
                    raise tarfile.ReadError(f"{error}") from error
                damage = damage or (start, error)
                if len(archive.pax_headers) > MAX_GLOBAL:
                    archive.pax_headers = {}
            if damage and (member or following is None):
                at, why = damage
                yield Member("", Broken(path, _damage(at, length, start if member else None, why)), at)
                damage = None
            if member:
                following = archive.offset
                if member.size < 0 or not start < following < length + tarfile.BLOCKSIZE:
                    following = _next_header(file, member.offset_data, length)
                if not member.isdir():
                    yield member
                if following is None:
                    yield Member("", Broken(path, _damage(length, length, None, None)), length)
            if following is None:
                return
            start = following


class _Headers:
    """A tar's file as the headers of one member may read it: little of it, and few times.

    Attributes:
        spent: whether they wanted more.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.left, self.count, self.spent = file, MAX_HEADER_BYTES, 0, False

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int) -> bytes:
        self.left -= size
        data = self.file.read(size) if self.left >= 0 else b""
        self.check(self.left >= 0 and not _DIGITS.search(data), "its header is larger than any that is written")
        return data

    def check(self, fine: bool, why: str) -> None:
        if not fine:
            self.spent = True
            raise tarfile.HeaderError(why)


class _Header(tarfile.TarInfo):
    """A member's header, or one that says more of the next, which then is read inside."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> _Header:
        headers = archive.fileobj
        headers.count += 1
        headers.check(headers.count <= MAX_HEADERS, f"over {MAX_HEADERS} headers for one member")
        headers.check(len(archive.pax_headers) <= MAX_GLOBAL, f"over {MAX_GLOBAL} records for every member")
        return super().fromtarfile(archive)


def _empty_archive() -> tarfile.TarFile:
    """A parser of headers. Opened on the tar itself it would read the first one, and fail with it."""
    archive = tarfile.TarFile(fileobj=BytesIO(bytes(2 * tarfile.BLOCKSIZE)))
    archive.tarinfo = _Header
    return archive


def _damage(start: int, length: int, following: int | None, error: Exception | None) -> str:
    if following is not None:
        return f"the .tar is damaged at byte {start} ({error}): what lies before byte {following} is lost"
    if length - start < tarfile.BLOCKSIZE:
        return f"the .tar is truncated at byte {length}: images after this point are missing"
    return f"the .tar is damaged at byte {start} ({error}): images after this point could not be found"


def _next_header(file: IO[bytes], start: int, length: int, extensions: bool = True) -> int | None:
    """Where the next block from `start` on begins that is a header by its magic word and its checksum.

    With `extensions` also one that only says more of the next.
    """
    start, size = -(-start // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, 8 * tarfile.BLOCKSIZE
    while start < length:
        file.seek(start)
        chunk = file.read(size)
        at = chunk.find(b"ustar")
        while at >= 0:
            block = at - 257
            header = chunk[block : block + tarfile.BLOCKSIZE] if block >= 0 else b""
            fits = block % tarfile.BLOCKSIZE == 0 and _is_header(header)
            if fits and (extensions or header[156] not in _EXTENSIONS):
                return start + block
            at = chunk.find(b"ustar", at + 1)
        # little at first: where much is damaged, the next one is near
        start, size = start + size, min(2 * size, _CHUNK)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except Exception:
        return False
    return True


def _targets(path: str) -> dict[str, Slice | str]:
    """The targets of links: every regular member by its name, and every link by that of its target."""
    found: dict[str, Slice | str] = {}
    for member in _members(path):
        if isinstance(member, tarfile.TarInfo):
            name = posixpath.normpath(member.name)
            if member.islnk() or member.issym():
                found[name] = _target(member)
            elif member.isreg() and not member.issparse():
                found[name] = Slice(path, member.offset_data, member.size)
    return found


def _target(link: tarfile.TarInfo) -> str:
    """The name that a link stands for: a symbolic one is relative to its own folder."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _follow(link: tarfile.TarInfo, targets: dict[str, Slice | str], most: int = 16) -> Slice | Broken:
    at: Slice | str | None = _target(link)
    for _ in range(most):
        if not isinstance(at, str):
            break
        at = targets.get(at)
    if isinstance(at, Slice):
        return at
    return Broken(link.name, f"a link to {link.linkname}, which is no image in the .tar")
