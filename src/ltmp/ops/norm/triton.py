"""Residual addition and the layer norm after it, in one pass over each row."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, nn

from .._triton import pow2


class Norm(NamedTuple):
    """A layer norm over C. `weight` [C] and `bias` [C] may be None; there is no bias without a weight."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> Norm:
        return cls(module.weight, module.bias, module.eps)


@triton.jit
def residual_row(
    X, Y, LAYER_SCALE, row, C: tl.constexpr, CB: tl.constexpr,
    ADDS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """float32 [CB]: `x + layer_scale * y` of one row, zeros past C."""
    column = tl.arange(0, CB)
    x = tl.load(X + row * C + column, mask=column < C, other=0.0).to(tl.float32)
    if ADDS:
        y = tl.load(Y + row * C + column, mask=column < C, other=0.0).to(tl.float32)
        if SCALES:
            y *= tl.load(LAYER_SCALE + column, mask=column < C, other=0.0).to(tl.float32)
        x += y
    return x


@triton.jit
def norm_row(x, W, BIAS, eps, C: tl.constexpr, CB: tl.constexpr, AFFINE: tl.constexpr):
    """Layer norm of one row in float32. AFFINE: 0 for neither weight nor bias, 1 for weight, 2 for both."""
    column = tl.arange(0, CB)
    centred = tl.where(column < C, x - tl.sum(x, 0) / C, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    if AFFINE >= 1:
        y *= tl.load(W + column, mask=column < C, other=0.0).to(tl.float32)
    if AFFINE == 2:
        y += tl.load(BIAS + column, mask=column < C, other=0.0).to(tl.float32)
    return y


@triton.jit
def _add_norm_kernel(
    X, Y, LAYER_SCALE, W, BIAS, X_OUT, H_OUT, eps,
    C: tl.constexpr, CB: tl.constexpr, ADDS: tl.constexpr, SCALES: tl.constexpr,
    AFFINE: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CB)
    x = residual_row(X, Y, LAYER_SCALE, row, C, CB, ADDS, SCALES)
    if ADDS:
        tl.store(X_OUT + row * C + column, x.to(X_OUT.dtype.element_ty), mask=column < C)
    if NORMS:
        h = norm_row(x, W, BIAS, eps, C, CB, AFFINE)
        tl.store(H_OUT + row * C + column, h.to(H_OUT.dtype.element_ty), mask=column < C)


def add_norm(
    x: Tensor, y: Tensor | None, layer_scale: Tensor | None, norm: Norm | None
) -> tuple[Tensor, Tensor | None]:
    """`x + layer_scale * y` and its layer norm.

    Args:
        x: [T, C], residual stream; y: [T, C], output of a branch, or None; layer_scale: [C] or None.
        norm: the layer norm that follows, or None.

    Returns:
        The sum [T, C] (x itself if y is None) and its norm, [T, C] or None.
    """
    rows, width = x.shape
    total = x.new_empty(rows, width) if y is not None else x
    normed = x.new_empty(rows, width) if norm is not None else None
    weight, bias, eps = norm if norm is not None else (None, None, 0.0)
    block = pow2(width)
    _add_norm_kernel[(rows,)](
        x, y if y is not None else x, layer_scale if layer_scale is not None else x,
        weight if weight is not None else x, bias if bias is not None else x,
        total, normed if normed is not None else x, eps,
        C=width, CB=block, ADDS=y is not None, SCALES=layer_scale is not None,
        AFFINE=(weight is not None) + (bias is not None), NORMS=norm is not None,
        num_warps=1 if block <= 512 else 2 if block <= 1024 else 4,
    )  # fmt: skip
    return total, normed
