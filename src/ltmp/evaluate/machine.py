"""The machine that a measurement was made on."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .._version import __version__
from ..ops.compiled import unavailable


def describe_machine() -> dict[str, Any]:
    """Versions, number of threads and devices of this machine."""
    import timm

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    reason = unavailable()
    return {
        "ltmp": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *devices],
        "plans on a CPU": "compiled" if reason is None else f"in plain torch, which is slower: compiling them {reason}",
    }
