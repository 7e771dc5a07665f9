"""Helpers that the Triton kernels share.

Packed layout: the live tokens of all images in rows, rows cu[b]:cu[b + 1] for image b, in its current order. Rows past
cu[B] are unused capacity, which kernels neither read nor write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
"""Softmax in base 2: GPUs have exp2 in hardware."""


@triton.jit
def image_rows(CU, image):
    """First row (int64: a batch may hold more than 2^31 numbers) and token count of an image."""
    first = tl.load(CU + image)
    return first.to(tl.int64), tl.load(CU + image + 1) - first


@triton.jit
def mean_received(RECEIVED, token, live, n, rows, H: tl.constexpr):
    """Mean attention received over heads and queries."""
    total = tl.load(RECEIVED + token, mask=live, other=0.0)
    for head in tl.static_range(1, H):
        total += tl.load(RECEIVED + head * rows + token, mask=live, other=0.0)
    return total / (n * H)


@triton.jit
def to_power(x, power):
    """x ** power, with x clamped to the smallest normal float32, so that its logarithm is finite."""
    return tl.exp2(tl.log2(tl.maximum(x, 1.1754943508222875e-38)) * power)


def pow2(n: int) -> int:
    """Smallest power of two >= n and >= 16, the smallest size that matrix units support."""
    return max(16, triton.next_power_of_2(n))


def strides(heads: Tensor) -> tuple[int, int]:
    """Row and head strides of a [T, H, D] view.

    Raises:
        ValueError: D does not have unit stride.
    """
    if heads.stride(-1) != 1:
        raise ValueError(f"kernels need a unit stride inside a head, got strides {heads.stride()}")
    return heads.stride(0), heads.stride(1)


def precision(heads: Tensor) -> str:
    """Precision of matrix products of this dtype: full float32 for float32, never tf32."""
    return "ieee" if heads.element_size() == 4 else "tf32"
