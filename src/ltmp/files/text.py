"""Files of others as text and JSON: regular files alone, none larger than such files are, and nothing that is odd."""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader
from typing import Any

MAX_JSON = 1 << 26
"""Bytes: a run that learns for 100,000 steps writes 10 million."""


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """A file to read bytes from.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file: a pipe would be waited for, a device read for ever.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - it is what is returned
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file, but a pipe, a device or a socket")
    return file


def _open_at_once(path: str, flags: int) -> int:
    """Without O_NONBLOCK opening a pipe waits until somebody writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """The text in a file of `most` bytes in UTF-8, with line ends as Python reads them.

    Raises:
        OSError, ValueError: as `open_regular`, or larger, or no text.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"over {most / 1e6:.0f} MB, which no such file has")
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str], most: int = MAX_JSON) -> Any:
    """The value in a JSON file of `most` bytes.

    Raises:
        OSError, ValueError: as `read_text` and `strict_json`.
    """
    return strict_json(read_text(path, most))


def strict_json(text: str | bytes) -> Any:
    """The value in a JSON text, where it says each thing once, and numbers are numbers.

    Raises:
        ValueError: no JSON, nested too deep, a name twice in a mapping, NaN or infinity.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
