"""Output of a run: one Parquet file per shard and lists of unreadable images; all files are written atomically."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_path
from ..sanitize import printable, spreadsheet_cell
from .reading import Unreadable
from .shards import Shard, parquet

Columns = Mapping[str, Any]

# Readers of a folder of Parquet files (pyarrow, pandas, Spark) skip names that begin with an underscore.
ERRORS = "_errors"
_METADATA = b"ltmp"


@dataclass(frozen=True)
class Written:
    """Summary of a finished shard, stored in the metadata of its file.

    Attributes:
        name, source: as in `Shard`.
        images: number of rows written.
        broken: number of images that could not be read, listed in the side file.
        duplicates: number of rows whose key appears earlier in the shard.
        share: mean FLOPs share of the images; 1 if there are none.
    """

    name: str
    source: str
    images: int
    broken: int
    duplicates: int
    share: float


def write_shard(
    out: Path,
    shard: Shard,
    columns: Columns,
    broken: Sequence[Unreadable],
    *,
    embeddings: bool = False,
    class_names: Sequence[str] | None = None,
) -> Written:
    """Write a scored shard. Its Parquet file is written last, and so marks the shard as finished.

    Args:
        columns: `key` and `row`, and the columns of `Predictor.scores`, absent if no image could be read.
        embeddings: whether the columns hold embeddings rather than classes.
        class_names: names of all classes, in order, for a column of names.

    Raises:
        LTMPError: the folder cannot be written, or the disk is full.
    """
    keys = columns["key"]
    share = float(columns["share"].mean(dtype=np.float64)) if keys else 1.0
    written = Written(shard.name, shard.source, len(keys), len(broken), len(keys) - len(set(keys)), share)
    _write_errors(out / ERRORS / f"{shard.name}.csv", broken)
    table = _table(columns, embeddings, class_names).replace_schema_metadata({_METADATA: json.dumps(asdict(written))})
    # An open file, as pyarrow accepts no path that is not UTF-8.
    with atomic_path(file_of(out, shard)) as temporary, temporary.open("wb") as file:
        parquet().write_table(table, file)
    return written


def file_of(out: Path, shard: Shard) -> Path:
    """Return the path of a shard's Parquet file."""
    return out / f"{shard.name}.parquet"


def finished(out: Path, shard: Shard) -> Written | None:
    """Return the summary of a finished shard, or None; raises MissingExtraError if pyarrow is not installed."""
    pq = parquet()
    try:
        with file_of(out, shard).open("rb") as file:
            return Written(**json.loads(pq.read_metadata(file).metadata[_METADATA]))
    # No file, or one that was cut off when the machine crashed.
    except (OSError, ValueError, KeyError, TypeError):
        return None


def merge_errors(out: Path, shards: Sequence[Shard]) -> Path | None:
    """Merge all side files into `_errors.csv` and return its path, or None if every image could be read."""
    merged = out / f"{ERRORS}.csv"
    lines = [line for shard in shards for line in _error_lines(out, shard)]
    if not lines:
        merged.unlink(missing_ok=True)
        return None
    _write_csv(merged, ["shard", *Unreadable._fields], lines)
    return merged


def _error_lines(out: Path, shard: Shard) -> Iterator[list[str]]:
    path = out / ERRORS / f"{shard.name}.csv"
    if path.exists():
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            for line in list(csv.reader(file))[1:]:
                yield [shard.name, *line]


def _write_errors(path: Path, broken: Sequence[Unreadable]) -> None:
    """Write the side file of a shard, or remove one that an earlier, unfinished run has left."""
    if broken:
        _write_csv(path, Unreadable._fields, broken)
    else:
        path.unlink(missing_ok=True)


def _write_csv(path: Path, header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(value) for value in line] for line in lines)


def _cell(value: Any, max_length: int = 1000) -> Any:
    """Make a value safe for a CSV file; names in the source may be of any length."""
    if not isinstance(value, str):
        return value
    return spreadsheet_cell(printable(value if len(value) <= max_length else value[: max_length - 3] + "..."))


def _table(columns: Columns, embeddings: bool, class_names: Sequence[str] | None) -> Any:
    import pyarrow as pa

    keys = [key.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for key in columns["key"]]
    empty = np.empty((len(keys), 0), np.float32)
    table = {"key": pa.array(keys, pa.string()), "row": pa.array(columns["row"], pa.int64())}
    if embeddings:
        table["embedding"] = _lists(columns.get("embedding", empty), pa.float32())
    else:
        classes = columns.get("classes", empty)
        table["classes"] = _lists(classes, pa.int32())
        if class_names:
            names = pa.array(list(class_names)).take(table["classes"].flatten())
            table["names"] = pa.ListArray.from_arrays(table["classes"].offsets, names)
        table["probabilities"] = _lists(columns.get("probabilities", empty), pa.float32())
    tokens = columns.get("tokens", [None] * len(keys))
    table["tokens"] = pa.array(tokens, pa.int32())
    table["share"] = pa.array(columns.get("share", []), pa.float32())
    return pa.table(table)


def _lists(values: np.ndarray, kind: Any) -> Any:
    """Convert values [B, k] to a pyarrow array of B lists of k."""
    import pyarrow as pa

    count, length = values.shape
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * length)
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), kind))
