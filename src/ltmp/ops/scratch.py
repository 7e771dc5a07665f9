"""Buffers for intermediate results between kernels: each thread keeps its own from call to call."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Scratch(NamedTuple):
    """1-D float32 memory, as a tensor and as an array."""

    tensor: Tensor
    array: np.ndarray[Any, Any]


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, Scratch] = {}


_BUFFERS = _Buffers()


def scratch(name: str, size: int) -> Scratch:
    """Return uninitialised memory of at least `size` values.

    It is valid until this thread requests the same name again, so results must not be returned in it.
    """
    buffer = _BUFFERS.by_name.get(name)
    if buffer is None or len(buffer.array) < size:
        array = np.empty(size, np.float32)
        with torch.inference_mode(False):
            buffer = _BUFFERS.by_name[name] = Scratch(torch.from_numpy(array), array)
    return buffer


_LINE = 16
"""float32 values per cache line."""


def both(rows: int, width: int) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Return new, uninitialised float32 memory [rows, width] as a tensor and as an array, aligned to cache lines."""
    memory = np.empty(rows * width + _LINE, np.float32)
    skip = -memory.ctypes.data // memory.itemsize % _LINE
    array = memory[skip : skip + rows * width].reshape(rows, width)
    return torch.from_numpy(array), array
