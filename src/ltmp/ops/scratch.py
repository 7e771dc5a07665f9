"""Memory that a thread keeps from call to call, for what one kernel writes and the next one reads."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Held(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}


_HELD = _Held()


def scratch(name: str, size: int) -> Tensor:
    """float32 [size] of any values, valid until this thread asks for the same name again: never hand it out."""
    held = _HELD.tensors.get(name)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):
            held = _HELD.tensors[name] = torch.empty(size)
    return held[:size]
