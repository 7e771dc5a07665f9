"""Read untrusted text and JSON files: regular files only, of limited size, and strict JSON."""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader
from typing import Any

MAX_JSON = 1 << 26
"""Limit in bytes: a run that learns for 100,000 steps writes 10 million."""


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file: reading a pipe could block, and reading a device never end.
    """
    file = open(path, "rb", opener=_open_nonblocking)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file, but a pipe, a device or a socket")
    return file


def _open_nonblocking(path: str, flags: int) -> int:
    """Open with O_NONBLOCK: otherwise opening a pipe blocks until another process writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: str | os.PathLike[str], max_bytes: int) -> str:
    """Read a UTF-8 file of at most `max_bytes` bytes, with universal newlines and without a byte order mark.

    Raises:
        OSError, ValueError: as `open_regular`, or the file is larger, or not UTF-8.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"over {max_bytes / 1e6:.0f} MB, which no such file has")
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON) -> Any:
    """Read a JSON file of at most `max_bytes` bytes.

    Raises:
        OSError, ValueError: as `read_text` and `strict_json`.
    """
    return strict_json(read_text(path, max_bytes))


def strict_json(text: str | bytes) -> Any:
    """Parse JSON, refusing duplicate names and numbers that JSON does not have.

    Raises:
        ValueError: not JSON, nested too deep, a name twice in a mapping, NaN or infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            raise ValueError("a name is there twice")
        return mapping

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
