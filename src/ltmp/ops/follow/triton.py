"""Track patches on packed rows: follow them through a block's plan, and give each the features of its token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import image_rows, pow2
from ..norm.triton import residual_row

_PATCHES = 64
"""Patches per program."""


@triton.jit(do_not_specialize=["block", "patches"])
def _follow_kernel(
    X, Y, LAYER_SCALE, CU, SLOT, SOURCE, SOURCE_OUT, DROPPED, block, patches,
    C: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr, KEEPS: tl.constexpr, ADDS: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """One program = TILE patches of one image."""
    image = tl.program_id(0)
    start = tl.program_id(1) * TILE
    first, n = image_rows(CU, image)
    base = image.to(tl.int64) * patches + start
    lane = tl.arange(0, TILE)
    inside = start + lane < patches
    source = tl.load(SOURCE + base + lane, mask=inside, other=-1)
    # positions past the end are of an image cut short for lack of room, whose result is discarded
    live = (source >= 0) & (source < n)
    slot = tl.load(SLOT + first + source, mask=live, other=-1)
    merged = live & (slot < -1)
    slot = tl.where(merged, tl.load(SLOT + first - 2 - slot, mask=merged, other=-1), slot)
    pruned = live & (slot < 0)
    after = tl.where(live, tl.where(pruned, -1 - block, slot), source)
    tl.store(SOURCE_OUT + base + lane, after, mask=inside)
    if KEEPS:
        column = tl.arange(0, CB)
        left = tl.sum(pruned.to(tl.int32), 0)
        while left > 0:
            which = tl.argmax(pruned.to(tl.int32), 0)
            row = first + tl.load(SOURCE + base + which)
            x = residual_row(X, Y, LAYER_SCALE, row, C, CB, ADDS, SCALES)
            at = (base + which) * C + column
            tl.store(DROPPED + at, x.to(DROPPED.dtype.element_ty), mask=column < C)
            pruned = pruned & (lane != which)
            left -= 1


def follow(
    source: Tensor,
    slot: Tensor,
    cu: Tensor,
    block: int,
    x: Tensor,
    y: Tensor | None = None,
    layer_scale: Tensor | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """`method.tokens.follow` on packed rows; also keeps the last features of pruned patches, in `dropped`.

    Args:
        source: int32 [B, N], see `Tokens`.
        slot: int32 [T], of a `RowPlan`.
        cu: int32 [B + 1], row bounds of the images before that plan.
        block: number of the block, recorded for patches that it prunes.
        x: [T, C], residual stream; y: [T, C], output of a branch, or None; layer_scale: [C] or None. The features are
            `x + layer_scale * y`.
        dropped: [B, N, C], written at the patches pruned here; None if only sources are needed.

    Returns:
        int32 [B, N] after.
    """
    images, patches = source.shape
    width, after = x.shape[1], torch.empty_like(source)
    block_width = pow2(width)
    # a pointer that a constexpr flag leaves unread can be any tensor
    _follow_kernel[(images, triton.cdiv(patches, _PATCHES))](
        x, y if y is not None else x, layer_scale if layer_scale is not None else x, cu, slot, source, after,
        dropped if dropped is not None else x, block, patches,
        C=width, CB=block_width, TILE=_PATCHES, KEEPS=dropped is not None, ADDS=y is not None,
        SCALES=layer_scale is not None, num_warps=1 if block_width <= 512 else 2 if block_width <= 1024 else 4,
    )  # fmt: skip
    return after


@triton.jit(do_not_specialize=["patches", "rows"])
def _spread_kernel(X, CU, SOURCE, DROPPED, OUT, patches, rows, C: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr):
    """One program = TILE patches of one image."""
    image = tl.program_id(0)
    patch = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists = patch < patches
    at = image.to(tl.int64) * patches + patch
    source = tl.load(SOURCE + at, mask=exists, other=-1)
    row = tl.load(CU + image).to(tl.int64) + source
    live = (source >= 0) & (row < rows)
    column = tl.arange(0, CB)
    inside = exists[:, None] & (column < C)[None, :]
    token = tl.load(X + row[:, None] * C + column[None, :], mask=inside & live[:, None], other=0.0)
    dropped = tl.load(DROPPED + at[:, None] * C + column[None, :], mask=inside & (live == 0)[:, None], other=0.0)
    features = tl.where(live[:, None], token.to(OUT.dtype.element_ty), dropped.to(OUT.dtype.element_ty))
    tl.store(OUT + at[:, None] * C + column[None, :], features, mask=inside)


def spread(x: Tensor, cu: Tensor, source: Tensor, dropped: Tensor) -> Tensor:
    """`method.tokens.spread` on packed rows: every patch with the features of its token.

    Args:
        x: [T, C], features of the tokens.
        cu: int32 [B + 1], row bounds of the images.
        source: int32 [B, N], see `Tokens`.
        dropped: [B, N, C], features of patches whose source is negative.

    Returns:
        [B, N, C].
    """
    images, patches = source.shape
    rows, width = x.shape
    out = x.new_empty(images, patches, width)
    block_width = pow2(width)
    tile = max(1, 4096 // block_width)
    _spread_kernel[(images, triton.cdiv(patches, tile))](
        x, cu, source, dropped, out, patches, rows, C=width, CB=block_width, TILE=tile, num_warps=4
    )
    return out
