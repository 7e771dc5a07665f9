"""Shards: the pieces of a source, each of which is scored, written and resumed as a whole."""

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
"""Largest compression ratio of a large column; encoded images hardly compress any further."""


class Item(NamedTuple):
    """One image of a shard, before it is read.

    Attributes:
        row: index in the shard, broken images included.
        key: name of the image in the source.
        content: location of the encoded image, or why it cannot be read.
        position: share of the shard up to this image, in [0, 1].
    """

    row: int
    key: str
    content: Content | Broken
    position: float


@dataclass(frozen=True)
class Shard(ABC):
    """A piece of a source. Small and picklable: it holds the location of the images, and `items` lists them.

    Attributes:
        name: name of the output file, without extension; unique within a run.
        source: name of the input, for messages.
        path: absolute path of the input.
        images: number of images, or None if it is only known after reading the whole shard.
    """

    name: str
    source: str
    path: str
    images: int | None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of names and sizes, which differs for another input."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Yield the images in a fixed order. If the rest of the shard cannot be read, one `Broken` stands for it."""


@dataclass(frozen=True)
class FolderShard(Shard):
    """Some image files of a folder, as (path within the folder, size in bytes)."""

    files: tuple[tuple[str, int], ...]

    @property
    def fingerprint(self) -> str:
        return _hash(*(f"{name}\0{size}" for name, size in self.files))

    def items(self) -> Iterator[Item]:
        for row, (name, _) in enumerate(self.files):
            yield Item(row, name, f"{self.path}/{name}", (row + 1) / len(self.files))


@dataclass(frozen=True)
class TarShard(Shard):
    """An uncompressed tar, read in its own order; members that are not images by name are skipped."""

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
            yield _unread(self, row, f"not an uncompressed .tar: {error}")


@dataclass(frozen=True)
class ParquetShard(Shard):
    """A Parquet file with a column of encoded images or their paths, and possibly a column of keys."""

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
        # pyarrow raises all kinds of errors on damaged files; any means that no row, or no further one, can be read.
        except Exception as error:
            yield _unread(self, 0, f"not a complete Parquet file: {first_line(error)}")
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
        """Yield the image and key of each row of a row group."""
        columns = [self.column, *([self.key_column] if self.key_column else [])]
        # Row by row, as images may be of any size, and compress to nothing.
        for batch in file.iter_batches(1, row_groups=[group], columns=columns):
            keys = map(_key, batch[self.key_column]) if self.key_column else [None] * len(batch)
            yield from zip(map(_value, batch[self.column]), keys, strict=True)

    def _check_memory(self, file: Any, group: int) -> None:
        """Refuse a row group that may take gigabytes, as each page is decompressed as a whole; raises LTMPError."""
        metadata = file.metadata.row_group(group)
        for number in range(metadata.num_columns):
            chunk = metadata.column(number)
            if not any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in (self.column, self.key_column)):
                continue
            unpacked, stored = chunk.total_uncompressed_size, chunk.total_compressed_size
            # Images over LARGE_BYTES would be refused row by row, too; so is a column whose images average more.
            if unpacked > MAX_DECODED and unpacked > min(MAX_UNPACKED * stored, LARGE_BYTES * metadata.num_rows):
                raise LTMPError(
                    f"{stored / 1e6:.1f} MB of column {chunk.path_in_schema!r} unpack to {unpacked / 1e9:.1f} GB, "
                    "which no images do: write the file with smaller row groups"
                )

    def _item(self, row: int, value: Any, key: Any) -> Item:
        path = None
        if isinstance(value, dict):  # as Hugging Face datasets store images
            path = value.get("path")
            value = value.get("bytes") or path
        if key is None:
            key = path if path is not None else value if isinstance(value, str) else f"row {row}"
        return Item(row, str(key), self._content(str(key), value), (row + 1) / (self.images or row + 1))

    def _content(self, key: str, value: Any) -> Content | Broken:
        if value is None:
            return Broken(key, "there is no image in this row")
        if isinstance(value, int):
            return Broken(
                key,
                f"{value / 1e6:.0f} MB are over the limit of {LARGE_BYTES / 1e6:.0f} MB for one row: give this image "
                "as a file of its own or in a .tar",
            )
        if isinstance(value, str):
            try:
                return str(Path(self.path).parent / local_path(value))
            except LTMPError as error:
                return Broken(key, str(error))
        encoded: bytes = value
        return encoded


def _value(scalar: Any) -> Any:
    """Return a row's image or path, or only the size in bytes of an image that is too large to copy to a worker."""
    stored = getattr(scalar, "value", scalar)  # the value of a dictionary-encoded scalar
    encoded = stored.get("bytes") if hasattr(stored, "get") else stored
    size = len(encoded.as_buffer() or b"") if hasattr(encoded, "as_buffer") else 0
    return size if size > LARGE_BYTES else scalar.as_py()


def _key(scalar: Any) -> Any:
    """Return a row's key, or None if Python cannot represent it, such as a date after the year 9999."""
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return None


def local_path(name: str) -> str:
    """Return the path in `name`, a plain path or file:// URL; raises LTMPError for URLs that need a network."""
    if "://" not in name:
        return name
    url = urlsplit(name)
    if url.scheme.lower() == "file" and url.netloc in ("", "localhost"):
        return url2pathname(url.path)
    raise LTMPError(f"{name} is not on this machine, and nothing is downloaded: fetch it first and give its local path")


def parquet() -> Any:
    """Import and return pyarrow.parquet; raises MissingExtraError if pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "predict", "Bulk scoring") from error
    return pyarrow.parquet


def open_parquet(path: str) -> Any:
    """Open a `ParquetFile` that buffers at most a megabyte per column besides the requested rows."""
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
