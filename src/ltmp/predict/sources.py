"""Shards of a run, from the sources that the user names: folders, tars, Parquet files, or patterns of these."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from ..data.folders import describe_others, list_images
from ..errors import LTMPError, UsageError
from ..files import short_stem
from .shards import FolderShard, ParquetShard, Shard, TarShard, local_path, open_parquet

log = logging.getLogger(__name__)

TARS, PARQUETS, COMPRESSED = (".tar",), (".parquet", ".pq"), (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
# Names of columns that are looked for by default, in this order.
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content", "data")
PATH_COLUMNS = ("path", "file", "file_name", "filename", "filepath", "image_path", "url", "uri")
KEY_COLUMNS = ("key", "__key__", "id", "image_id", "path", "file", "file_name", "filename")

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
MAX_FILES = 1_000_000
"""Limit of files that one pattern with braces may expand to."""


def find_shards(
    sources: Sequence[str | Path], *, shard_size: int = 1024, column: str | None = None, key_column: str | None = None
) -> list[Shard]:
    """Return the shards of all sources, in order; the same sources always give the same shards.

    Args:
        sources: one folder of images, read recursively; or folders, files and patterns of .tar and .parquet files,
            such as "shards/{000..099}.tar" or "shards/*.parquet".
        shard_size: images per shard of a folder; each tar or Parquet file is one shard.
        column: column of a Parquet file that holds the images or their paths; None looks for one.
        key_column: column that names the rows of a Parquet file; None looks for one.

    Raises:
        UsageError: a source does not exist, holds no images, is a compressed tar, or a Parquet file without a column
            of images.
        LTMPError: a source cannot be read.
    """
    paths = [Path(path) for source in sources for path in _expand(str(source))]
    if len(paths) == 1 and paths[0].is_dir():
        images = _images_below(paths[0])
        if images:
            return _folder_shards(paths[0], images, shard_size)
    files = [file for path in paths for file in (_shards_in(path) if path.is_dir() else [path])]
    duplicates = [file for file, count in Counter(files).items() if count > 1]
    if duplicates:
        raise UsageError(f"{min(duplicates)} is given twice: its images would be scored twice; name it once")
    return [_file_shard(file, number, column, key_column) for number, file in enumerate(files)]


def _expand(source: str) -> list[str]:
    """Return the paths that a source stands for: expand braces as a shell does, then wildcards, sorted."""
    if os.path.exists(source):
        return [source]
    if "://" in source:
        source = local_path(source)
    paths = []
    for pattern in _expand_braces(source):
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches or not os.path.exists(matches[0]):
            part = "" if pattern == source else f" (part of {source})"
            raise UsageError(f"{pattern}{part} does not exist: give a folder of images, a .tar or a .parquet file")
        paths += matches
    return paths


def _expand_braces(pattern: str) -> Iterator[str]:
    """Expand `a{1..3}{x,y}` to a1x, a1y, a2x, ...; ranges keep leading zeros.

    Raises:
        UsageError: the pattern stands for more than `MAX_FILES` files.
    """
    # Text and the contents of braces alternate.
    parts = _BRACES.split(pattern)
    choices = [[part] if number % 2 == 0 else _choices(part) for number, part in enumerate(parts)]
    if prod(map(len, choices)) > MAX_FILES:
        raise UsageError(_too_many(pattern))
    return ("".join(combination) for combination in product(*choices))


def _choices(braces: str) -> list[str]:
    span = _RANGE.fullmatch(braces)
    if span is None:
        return braces.split(",")
    first, last = span.groups()
    if int(last) - int(first) >= MAX_FILES:
        raise UsageError(_too_many(f"{{{braces}}}"))
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _too_many(pattern: str) -> str:
    return f"{pattern} stands for more than {MAX_FILES:,} files: give the folder, or fewer at a time"


def _images_below(folder: Path) -> list[tuple[str, int]]:
    """Return path and size of each image of a folder, sorted."""
    listing = list_images(folder)
    shards = [name for name in listing.others if name.lower().endswith((*TARS, *PARQUETS))]
    if listing.images and shards:
        raise UsageError(
            f"{folder} holds image files and also {shards[0]}: give either a folder of images only, or the shards by "
            f"a pattern, such as '{folder}/*{Path(shards[0]).suffix}'"
        )
    if listing.images and listing.others:
        log.warning("%s: left out %s", folder, describe_others(listing.others))
    return listing.images


def _folder_shards(folder: Path, images: list[tuple[str, int]], shard_size: int) -> list[Shard]:
    parts = [tuple(images[start : start + shard_size]) for start in range(0, len(images), shard_size)]
    return [
        FolderShard(f"{number:05d}", f"{folder} from {part[0][0]}", os.path.abspath(folder), len(part), part)
        for number, part in enumerate(parts)
    ]


def _shards_in(folder: Path) -> list[Path]:
    """Return the tars or the Parquet files of a folder."""
    listing = list_images(folder)
    if listing.images:
        raise UsageError(
            f"{folder} is a folder of images, and not the only source: images are named by their path within one "
            "folder; give the folder above, or one at a time, each with its own --out"
        )
    tars = [folder / name for name in listing.others if name.lower().endswith(TARS)]
    parquets = [folder / name for name in listing.others if name.lower().endswith(PARQUETS)]
    if tars and parquets:
        raise UsageError(f"{folder} holds .tar and .parquet files: give one kind, such as '{folder}/*.tar'")
    if not (tars or parquets):
        raise UsageError(f"{folder} holds no images: expected image files, or shards (.tar, .parquet), at any depth")
    return tars or parquets


def _file_shard(path: Path, number: int, column: str | None, key_column: str | None) -> Shard:
    name = f"{number:05d}-{short_stem(path)}"
    lowercase = path.name.lower()
    if lowercase.endswith(COMPRESSED):
        raise UsageError(f"{path} is compressed, and random access takes an uncompressed .tar: decompress it first")
    if not lowercase.endswith((*TARS, *PARQUETS)):
        raise UsageError(f"{path} is neither a folder nor a .tar nor a .parquet file: give one of these")
    if not path.is_file():
        raise UsageError(f"{path} is a pipe, a device or a folder: give regular files, which allow random access")
    if not os.access(path, os.R_OK):
        raise LTMPError(f"cannot read {path}: permission denied")
    size = path.stat().st_size
    if lowercase.endswith(TARS):
        return TarShard(name, path.name, os.path.abspath(path), None, size)
    return _parquet_shard(name, path, size, column, key_column)


def _parquet_shard(name: str, path: Path, size: int, column: str | None, key_column: str | None) -> Shard:
    absolute = os.path.abspath(path)
    try:
        with open_parquet(absolute) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            images, keys = _choose_columns(path, schema, column, key_column)
            # Checked here rather than row by row: if the first path needs a network, the others do as well.
            if rows and _kind(schema.field(images).type) == "text":
                local_path(next(file.iter_batches(1, columns=[images]))[0][0].as_py() or "")
    except LTMPError:
        raise
    # A damaged file stops no run: it is listed with the reason when its turn comes.
    except Exception:
        return ParquetShard(name, path.name, absolute, None, size, column or "image", key_column)
    return ParquetShard(name, path.name, absolute, rows, size, images, keys)


def _choose_columns(path: Path, schema: Any, column: str | None, key_column: str | None) -> tuple[str, str | None]:
    """Return the column of images or paths, and the column of keys if there is one.

    Raises:
        UsageError: there is no such column, or it is ambiguous, or does not hold images.
    """
    images = column or _image_column(path, schema)
    candidates = (key for key in KEY_COLUMNS if schema.names.count(key) == 1 and key != images)
    keys = key_column or next(candidates, None)
    for name in filter(None, (images, keys)):
        if name not in schema.names:
            raise UsageError(f"{path} has no column {name!r}: it has {', '.join(schema.names)}")
        if schema.names.count(name) > 1:
            raise UsageError(f"{path} has more than one column {name!r}: rename all but one")
    if _kind(schema.field(images).type) is None:
        raise UsageError(
            f"{path}: column {images!r} holds {schema.field(images).type}, not one image per row: expected encoded "
            "images (binary, or a struct of bytes and path), or paths (text); name it with --column"
        )
    return images, keys


def _image_column(path: Path, schema: Any) -> str:
    """Return the column that holds encoded images, or else the one that holds their paths."""
    kinds = {field.name: _kind(field.type) for field in schema}
    binary = [name for name, kind in kinds.items() if kind == "binary"]
    text = [name for name, kind in kinds.items() if kind == "text"]
    for names, usual in ((binary, IMAGE_COLUMNS), (text, (*PATH_COLUMNS, *IMAGE_COLUMNS))):
        for name in usual:
            if name in names:
                return name
    if len(binary) == 1:
        return binary[0]
    raise UsageError(
        f"{path} has no column that looks like images or their paths (it has {', '.join(kinds)}): name it with --column"
    )


def _kind(column: Any) -> str | None:
    """Return what a column of this pyarrow type may hold: encoded images ("binary"), paths ("text"), or neither."""
    import pyarrow.types as types

    if types.is_dictionary(column):
        return _kind(column.value_type)
    if types.is_struct(column):  # as Hugging Face datasets store images
        fields = {column.field(number).name: column.field(number).type for number in range(column.num_fields)}
        kinds = {name: None if types.is_struct(kind) else _kind(kind) for name, kind in fields.items()}
        return "binary" if kinds.get("bytes") == "binary" or kinds.get("path") == "text" else None
    binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    if any(is_type(column) for is_type in binary):
        return "binary"
    text = (types.is_string, types.is_large_string, types.is_string_view)
    if any(is_type(column) for is_type in text):
        return "text"
    return None
