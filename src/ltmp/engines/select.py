"""Which engine runs a deployed model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import packed


def engine(name: str, device: torch.device) -> Callable[..., Any]:
    """The engine called `name`; `auto` picks what is best for `device`."""
    if name in ("auto", "packed"):
        return packed.run
    raise RuntimeError(f"engine {name!r} needs a CUDA device with Triton; use engine='packed' on {device.type}")
