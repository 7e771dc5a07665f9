"""`reference.probe` on packed rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import pow2
from .reference import EPS, WIDTH


@triton.jit
def _attended_tile(
    X, Y, LAYER_SCALE, row, live, column, C: tl.constexpr, ADDS: tl.constexpr, SCALES: tl.constexpr
):  # fmt: skip
    """float32 [rows, columns] of `x + layer_scale * y`, rounded to the type of `x`."""
    at = row[:, None] * C + column[None, :]
    mask = live[:, None] & (column < C)[None, :]
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        y = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
        if SCALES:
            y *= tl.load(LAYER_SCALE + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
        x = (x + y).to(X.dtype.element_ty).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["images", "rows"])
def _probe_kernel(
    X, Y, LAYER_SCALE, W, CU, METRIC, LOG_SALIENCY, images, rows, eps,
    C: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    ADDS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """One program = one tile of rows, some columns at a time, in two passes, as the norm needs the mean first."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tl.load(CU + images)
    metric_column = tl.arange(0, E)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, C, STEP):
        column = start + tl.arange(0, STEP)
        total += tl.sum(_attended_tile(X, Y, LAYER_SCALE, row, live, column, C, ADDS, SCALES), 1)
    mean = total / C
    square = tl.zeros([ROWS], tl.float32)
    metric = tl.zeros([ROWS, E], tl.float32)
    moved = tl.zeros([ROWS], tl.float32)
    dropped = tl.zeros([ROWS], tl.float32)
    for start in range(0, C, STEP):
        column = start + tl.arange(0, STEP)
        inside = column < C
        x = _attended_tile(X, Y, LAYER_SCALE, row, live, column, C, ADDS, SCALES) - mean[:, None]
        x = tl.where(inside[None, :], x, 0.0)
        square += tl.sum(x * x, 1)
        w = W + column * (E + 2)
        weight = tl.load(w[:, None] + metric_column[None, :], mask=inside[:, None], other=0.0)
        # as three tf32 products: lower precision than float32 would flip some decisions
        metric += tl.dot(x, weight, input_precision="tf32x3")
        moved += tl.sum(x * tl.load(w + E, mask=inside, other=0.0)[None, :], 1)
        dropped += tl.sum(x * tl.load(w + E + 1, mask=inside, other=0.0)[None, :], 1)
    scale = tl.rsqrt(square / C + eps)
    bias = W + C * (E + 2)
    metric = metric * scale[:, None] + tl.load(bias + metric_column)[None, :]
    tl.store(METRIC + row[:, None] * E + metric_column[None, :], metric, mask=live[:, None])
    tl.store(LOG_SALIENCY + row, moved * scale + tl.load(bias + E), mask=live)
    tl.store(LOG_SALIENCY + rows + row, dropped * scale + tl.load(bias + E + 1), mask=live)


def probe_rows(
    x: Tensor, y: Tensor | None, layer_scale: Tensor | None, weight: Tensor, cu: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.probe` on packed rows of `x + layer_scale * y`.

    Args:
        x: [T, C]; y: [T, C] or None; layer_scale: [C] or None.
        weight: float32 [C + 1, WIDTH + 2].
        cu: int32 [B + 1] row bounds of the images.

    Returns:
        metric: float32 [T, WIDTH], for similarity; log_saliency: float32 [2, T]. Rows past the last image are not
        written.
    """
    rows, width = x.shape
    metric = torch.empty(rows, WIDTH, device=x.device, dtype=torch.float32)
    log_saliency = torch.empty(2, rows, device=x.device, dtype=torch.float32)
    tile = 64
    _probe_kernel[(triton.cdiv(rows, tile),)](
        x, x if y is None else y, x if layer_scale is None else layer_scale, weight, cu, metric, log_saliency,
        cu.shape[0] - 1, rows, EPS,
        C=width, E=WIDTH, ROWS=tile, STEP=min(64, pow2(width)), ADDS=y is not None, SCALES=layer_scale is not None,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return metric, log_saliency
