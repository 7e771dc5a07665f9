"""Memory that a thread keeps from call to call, for what one kernel writes and the next one reads."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Scratch(NamedTuple):
    """The same float32 memory for both libraries, 1-D."""

    tensor: Tensor
    array: np.ndarray[Any, Any]


class _Held(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, Scratch] = {}


_HELD = _Held()


def scratch(name: str, size: int) -> Scratch:
    """At least `size` values of any kind, valid until this thread asks for the same name again: never hand it out."""
    held = _HELD.by_name.get(name)
    if held is None or len(held.array) < size:
        array = np.empty(size, np.float32)
        with torch.inference_mode(False):
            held = _HELD.by_name[name] = Scratch(torch.from_numpy(array), array)
    return held


_LINE = 16
"""float32 values in a cache line, which rows should begin with."""


def both(rows: int, width: int) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """New float32 memory [rows, width] of any values, as both libraries see it."""
    memory = np.empty(rows * width + _LINE, np.float32)
    skip = -memory.ctypes.data // memory.itemsize % _LINE
    array = memory[skip : skip + rows * width].reshape(rows, width)
    return torch.from_numpy(array), array
