"""`reference.similarity_metric` on packed rows, on a CPU."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled, inlined

_EPS = np.float32(1e-12)  # of torch.nn.functional.normalize


@inlined
def _inverse_length(values):
    """1 / length of `values`; the eight partial sums are independent, so that the CPU computes them in parallel."""
    a = b = c = d = e = f = g = h = np.float32(0)
    groups = len(values) // 8
    for group in range(groups):
        i = 8 * group
        a += values[i] * values[i]
        b += values[i + 1] * values[i + 1]
        c += values[i + 2] * values[i + 2]
        d += values[i + 3] * values[i + 3]
        e += values[i + 4] * values[i + 4]
        f += values[i + 5] * values[i + 5]
        g += values[i + 6] * values[i + 6]
        h += values[i + 7] * values[i + 7]
    for i in range(8 * groups, len(values)):
        a += values[i] * values[i]
    return np.float32(1) / max(np.sqrt(((a + e) + (b + f)) + ((c + g) + (d + h))), _EPS)


@compiled
def metric_rows(k, stride, heads, each_head, out):
    """Compute `reference.similarity_metric` of rows that are `stride` values apart.

    Loops run over slices, from 0: indices that numba cannot prove to be non-negative halve the speed.

    Args:
        k: float32, 1-D memory of keys; row t, head h begins at t * stride + h * D.
        stride: values from one row to the next.
        heads: H.
        each_head: True for kind "heads", False for "mean".
        out: float32 [T, H * D] for "heads", [T, D] for "mean"; filled.
    """
    rows, size = out.shape
    width = size // heads if each_head else size
    for t in range(rows):
        row, begin = out[t], t * stride
        if each_head:
            for h in range(heads):
                head = k[begin + h * width : begin + (h + 1) * width]
                target, factor = row[h * width : (h + 1) * width], _inverse_length(head)
                for i in range(width):
                    target[i] = head[i] * factor
        else:
            head = k[begin : begin + width]
            for i in range(width):
                row[i] = head[i]
            for h in range(1, heads):
                head = k[begin + h * width : begin + (h + 1) * width]
                for i in range(width):
                    row[i] += head[i]
        factor = _inverse_length(row)
        for i in range(size):
            row[i] *= factor
