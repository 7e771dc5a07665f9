"""`reference.probe` on packed rows, float32 on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..scratch import scratch
from .reference import EPS, WIDTH


def probe_rows(weight: Tensor, bias: np.ndarray[Any, Any], x: Tensor) -> np.ndarray[Any, Any]:
    """Apply a block's probe to features [T, C].

    Args:
        weight: float32 [C, WIDTH + 2]; bias: float32 [WIDTH + 2].

    Returns:
        float32 [T, WIDTH + 2], valid until this thread's next call.
    """
    size = len(x) * (WIDTH + 2)
    buffer = scratch("probe", size)
    normed = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)[0]
    torch.mm(normed, weight, out=buffer.tensor.as_strided((len(x), WIDTH + 2), (WIDTH + 2, 1)))
    probed = buffer.array[:size].reshape(len(x), WIDTH + 2)
    probed += bias
    return probed
