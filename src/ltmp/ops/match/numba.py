"""The vectors that similarity is measured on, on packed rows of a CPU; see `reference`."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled, inlined

_EPS = np.float32(1e-12)  # of torch.nn.functional.normalize


@inlined
def _inverse_length(values, at, width):
    """1 / length of `width` values from `at` on, by eight sums that need not wait for one another."""
    a = b = c = d = e = f = g = h = np.float32(0)
    whole = width // 8 * 8
    for i in range(at, at + whole, 8):
        a += values[i] * values[i]
        b += values[i + 1] * values[i + 1]
        c += values[i + 2] * values[i + 2]
        d += values[i + 3] * values[i + 3]
        e += values[i + 4] * values[i + 4]
        f += values[i + 5] * values[i + 5]
        g += values[i + 6] * values[i + 6]
        h += values[i + 7] * values[i + 7]
    for i in range(at + whole, at + width):
        a += values[i] * values[i]
    return np.float32(1) / max(np.sqrt(((a + e) + (b + f)) + ((c + g) + (d + h))), _EPS)


@compiled
def metric_rows(k, stride, heads, each_head, out):
    """`reference.similarity_metric` of rows that lie `stride` apart.

    Args:
        k: float32, 1-D memory of keys: row t, head h begins at t * stride + h * D.
        stride: values from one row to the next.
        heads: H.
        each_head: whether all heads count, or their mean.
        out: float32 [T, H * D] for all heads, [T, D] for their mean; filled.
    """
    rows, size = out.shape
    flat = out.reshape(-1)
    width = size // heads if each_head else size
    for t in range(rows):
        if each_head:
            for h in range(heads):
                begin = t * stride + h * width
                factor = _inverse_length(k, begin, width)
                for i in range(width):
                    flat[t * size + h * width + i] = k[begin + i] * factor
        else:
            for i in range(width):
                flat[t * size + i] = k[t * stride + i]
            for h in range(1, heads):
                for i in range(width):
                    flat[t * size + i] += k[t * stride + h * width + i]
        factor = _inverse_length(flat, t * size, size)
        for i in range(size):
            flat[t * size + i] *= factor
