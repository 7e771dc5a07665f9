"""Shards: the pieces of a source that are scored, written and, after a kill, found finished one at a time."""

from __future__ import annotations

import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..data import Broken
from ..data.images import LARGE_BYTES, MAX_DECODED
from ..data.tars import Content, tar_images
from ..errors import LTMPError, MissingExtraError, first_line

MAX_UNPACKED = 10
"""Bytes that a column may unpack to for each that is stored, if they are many; those of images hardly compress."""


class Item(NamedTuple):
    """One image of a shard, not read yet.

    Attributes:
        row: its place in the shard, broken images counted.
        key: what the source calls it.
        content: where the encoded image is, or why there is none.
        position: share of the shard that is behind it, in [0, 1].
    """

    row: int
    key: str
    content: Content | Broken
    position: float


@dataclass(frozen=True)
class Shard(ABC):
    """A piece of a source. Picklable and small: it says where the images are, and `items` finds them.

    Attributes:
        name: of the output file, unique among the shards of a run.
        source: of the input, for messages.
        path: the input on disk, absolute.
        images: how many there are, or None where only reading all of it would tell.
    """

    name: str
    source: str
    path: str
    images: int | None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash over names and sizes: another one is another input."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """The images in order, always the same; what cannot be read any further is one `Broken` at the end."""


@dataclass(frozen=True)
class FolderShard(Shard):
    """Some files of a folder: their paths in it, and their sizes."""

    files: tuple[tuple[str, int], ...]

    @property
    def fingerprint(self) -> str:
        return _hash(*(f"{name}\0{size}" for name, size in self.files))

    def items(self) -> Iterator[Item]:
        for row, (name, _) in enumerate(self.files):
            yield Item(row, name, f"{self.path}/{name}", (row + 1) / len(self.files))


@dataclass(frozen=True)
class TarShard(Shard):
    """An uncompressed tar, read in its own order; members that are not images by their name are passed over."""

    size: int

    @property
    def fingerprint(self) -> str:
        return _hash(self.source, str(self.size))

    def items(self) -> Iterator[Item]:
        row = 0
        try:
            for member in tar_images(self.path):
                yield Item(row, member.name or self.source, member.content, min(1.0, member.offset / self.size))
                row += 1
        except (tarfile.TarError, OSError) as error:
            yield _unread(self, row, f"no plain .tar: {error}")


@dataclass(frozen=True)
class ParquetShard(Shard):
    """A Parquet file with a column of encoded images or of paths, and one to name the rows by, if any."""

    size: int
    column: str
    key_column: str | None

    @property
    def fingerprint(self) -> str:
        return _hash(self.source, str(self.size), self.column, str(self.key_column))

    def items(self) -> Iterator[Item]:
        start = 0
        try:
            file = open_parquet(self.path)
        # damaged files make pyarrow fail in many ways; each means that nothing, or no further row, can be read
        except Exception as error:
            yield _unread(self, 0, f"not a whole Parquet file: {first_line(error)}")
            return
        with file:
            for group in range(file.num_row_groups):
                row, end = start, start + file.metadata.row_group(group).num_rows
                try:
                    self._check_memory(file, group)
                    for value, key in self._rows(file, group):
                        yield self._item(row, value, key)
                        row += 1
                except Exception as error:
                    yield _unread(self, row, f"rows {row} to {end - 1} cannot be read: {first_line(error)}")
                start = end

    def _rows(self, file: Any, group: int) -> Iterator[tuple[Any, Any]]:
        """Image and key of each row of a row group."""
        columns = [self.column, *([self.key_column] if self.key_column else [])]
        # row by row: images may be of any size, and compressed ones of nothing at all
        for batch in file.iter_batches(1, row_groups=[group], columns=columns):
            keys = map(_key, batch[self.key_column]) if self.key_column else [None] * len(batch)
            yield from zip(map(_value, batch[self.column]), keys, strict=True)

    def _check_memory(self, file: Any, group: int) -> None:
        """Refuse a row group whose pages, each of which is unpacked whole, may take gigabytes; raises LTMPError."""
        about = file.metadata.row_group(group)
        for number in range(about.num_columns):
            chunk = about.column(number)
            if not any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in (self.column, self.key_column)):
                continue
            unpacked, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
            # an image of average size that is too large is none that is read, either
            if unpacked > MAX_DECODED and unpacked > min(MAX_UNPACKED * stored, LARGE_BYTES * about.num_rows):
                raise LTMPError(
                    f"{stored / 1e6:.1f} MB of column {chunk.path_in_schema!r} unpack to {unpacked / 1e9:.1f} GB, "
                    "which no images do: write it with smaller row groups"
                )

    def _item(self, row: int, value: Any, key: Any) -> Item:
        path = value.get("path") if isinstance(value, dict) else None
        if isinstance(value, dict):  # as Hugging Face datasets store images
            value = value.get("bytes") or path
        if key is None:
            key = path if path is not None else value if isinstance(value, str) else f"row {row}"
        content: Content | Broken
        if isinstance(value, str):
            try:
                content = str(Path(self.path).parent / local_path(value))
            except LTMPError as error:
                content = Broken(str(key), str(error))
        elif isinstance(value, int):
            content = Broken(
                str(key),
                f"{value / 1e6:.0f} MB are over the limit of {LARGE_BYTES / 1e6:.0f} MB for one row: give this image "
                "as a file of its own or in a .tar",
            )
        else:
            content = Broken(str(key), "there is no image in this row") if value is None else value
        return Item(row, str(key), content, (row + 1) / (self.images or row + 1))


def _value(scalar: Any) -> Any:
    """A row's image or path; the size alone, in bytes, of what is too large to be copied from process to process."""
    stored = getattr(scalar, "value", scalar)  # of a dictionary
    encoded = stored.get("bytes") if hasattr(stored, "get") else stored
    size = len(encoded.as_buffer() or b"") if hasattr(encoded, "as_buffer") else 0
    return size if size > LARGE_BYTES else scalar.as_py()


def _key(scalar: Any) -> Any:
    """A row's key, or None where Python has no such value, as for times in other millennia."""
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return None


def local_path(name: str) -> str:
    """The path in `name`, a plain path or a file:// URL; raises LTMPError for what would need a network."""
    if "://" not in name:
        return name
    url = urlsplit(name)
    if url.scheme.lower() == "file" and url.netloc in ("", "localhost"):
        return url2pathname(url.path)
    raise LTMPError(f"{name} is not on this machine, and nothing is downloaded: fetch it first and give its local path")


def parquet() -> Any:
    """pyarrow.parquet, which reads and writes Parquet."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "predict", "Bulk scoring") from error
    return pyarrow.parquet


def open_parquet(path: str) -> Any:
    """A `ParquetFile` that never holds more than a megabyte of a column besides the rows that are asked for."""
    files = parquet()
    import pyarrow

    return files.ParquetFile(pyarrow.OSFile(os.fsencode(path)), buffer_size=1 << 20)


def _unread(shard: Shard, row: int, reason: str) -> Item:
    return Item(row, shard.source, Broken(shard.source, reason), 1.0)


def _hash(*parts: str) -> str:
    digest = sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]
