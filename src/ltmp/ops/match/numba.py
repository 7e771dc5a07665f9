"""The vectors that similarity is measured on, on packed rows of a CPU; see `reference`."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled, inlined

_EPS = np.float32(1e-12)  # of torch.nn.functional.normalize


@inlined
def _inverse_length(values):
    """1 / length of `values`, by eight sums that need not wait for one another."""
    a = b = c = d = e = f = g = h = np.float32(0)
    parts = len(values) // 8
    for part in range(parts):
        i = 8 * part
        a += values[i] * values[i]
        b += values[i + 1] * values[i + 1]
        c += values[i + 2] * values[i + 2]
        d += values[i + 3] * values[i + 3]
        e += values[i + 4] * values[i + 4]
        f += values[i + 5] * values[i + 5]
        g += values[i + 6] * values[i + 6]
        h += values[i + 7] * values[i + 7]
    for i in range(8 * parts, len(values)):
        a += values[i] * values[i]
    return np.float32(1) / max(np.sqrt(((a + e) + (b + f)) + ((c + g) + (d + h))), _EPS)


@compiled
def metric_rows(k, stride, heads, each_head, out):
    """`reference.similarity_metric` of rows that lie `stride` apart.

    Loops run over slices, from 0: an index that may be negative, as far as numba knows, halves their speed.

    Args:
        k: float32, 1-D memory of keys: row t, head h begins at t * stride + h * D.
        stride: values from one row to the next.
        heads: H.
        each_head: whether all heads count, or their mean.
        out: float32 [T, H * D] for all heads, [T, D] for their mean; filled.
    """
    rows, size = out.shape
    width = size // heads if each_head else size
    for t in range(rows):
        row, begin = out[t], t * stride
        if each_head:
            for h in range(heads):
                head = k[begin + h * width : begin + (h + 1) * width]
                part, factor = row[h * width : (h + 1) * width], _inverse_length(head)
                for i in range(width):
                    part[i] = head[i] * factor
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
