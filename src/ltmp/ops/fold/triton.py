"""Apply a plan to packed rows: move, merge, and compute the layer norm that follows, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import image_rows, pow2
from ..norm.triton import Norm, norm_row, residual_row
from ..plan.triton import RowPlan


@triton.jit(do_not_specialize=["room"])
def _fold_kernel(
    X, Y, LAYER_SCALE, W, BIAS, CU, CU_OUT, SIZE, NEW_SIZE, SLOT, ORIGIN, X_OUT, H_OUT, SIZE_OUT, ORIGIN_OUT,
    room, eps,
    C: tl.constexpr, CB: tl.constexpr, SOURCES: tl.constexpr, STEP: tl.constexpr, ADDS: tl.constexpr,
    SCALES: tl.constexpr, AFFINE: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """One program = one token of one image."""
    image = tl.program_id(0)
    token = tl.program_id(1)
    first, n = image_rows(CU, image)
    if token < n:
        slot = tl.load(SLOT + first + token)
        target = tl.load(CU_OUT + image).to(tl.int64) + slot
        if (slot >= 0) & (target < room):
            x = residual_row(X, Y, LAYER_SCALE, first + token, C, CB, ADDS, SCALES)
            size = tl.load(NEW_SIZE + first + token)
            before = tl.load(SIZE + first + token)
            if size > before:
                x *= before
                # in bipartite matching only even tokens merge
                candidate = STEP * tl.arange(0, SOURCES)
                merging = tl.load(SLOT + first + candidate, mask=candidate < n, other=-1) == -2 - token
                left = tl.sum(merging.to(tl.int32), 0)
                while left > 0:
                    which = tl.argmax(merging.to(tl.int32), 0)
                    source = first + STEP * which
                    x += residual_row(X, Y, LAYER_SCALE, source, C, CB, ADDS, SCALES) * tl.load(SIZE + source)
                    merging = merging & (candidate != STEP * which)
                    left -= 1
                x /= size
            column = tl.arange(0, CB)
            tl.store(X_OUT + target * C + column, x.to(X_OUT.dtype.element_ty), mask=column < C)
            if NORMS:
                h = norm_row(x, W, BIAS, eps, C, CB, AFFINE)
                tl.store(H_OUT + target * C + column, h.to(H_OUT.dtype.element_ty), mask=column < C)
            tl.store(SIZE_OUT + target, size)
            tl.store(ORIGIN_OUT + target, tl.load(ORIGIN + first + token))


def fold(
    x: Tensor,
    y: Tensor | None,
    layer_scale: Tensor | None,
    norm: Norm | None,
    plan: RowPlan,
    size: Tensor,
    origin: Tensor,
    cu: Tensor,
    longest: int,
    room: int,
    bipartite: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Merge `x + layer_scale * y` by a plan (size-weighted means), and compute its layer norm.

    Args:
        x: [T, C], residual stream; y: [T, C], output of a branch, or None; layer_scale: [C] or None.
        norm: the layer norm that follows, or None.
        plan: the plan of the block, from `ops.plan.triton.plan`.
        size, origin: float32 [T] and int32 [T], before the block.
        cu: int32 [B + 1], row bounds of the images before the block; longest: an upper bound on the tokens of an image.
        room: rows of the result, at least plan.cu[B].
        bipartite: whether only even tokens merge, into odd ones.

    Returns:
        x [room, C], its norm [room, C] or None, size [room] and origin [room]; rows past plan.cu[B] are not written.
    """
    width = x.shape[1]
    new = x.new_empty(room, width)
    normed = x.new_empty(room, width) if norm is not None else None
    new_size = torch.empty(room, device=x.device, dtype=torch.float32)
    new_origin = torch.empty(room, dtype=torch.int32, device=x.device)
    weight, bias, eps = norm if norm is not None else (None, None, 0.0)
    block, step = pow2(width), 2 if bipartite else 1
    _fold_kernel[(cu.shape[0] - 1, longest)](
        x, y if y is not None else x, layer_scale if layer_scale is not None else x,
        weight if weight is not None else x, bias if bias is not None else x,
        cu, plan.cu, size, plan.size, plan.slot, origin,
        new, normed if normed is not None else new, new_size, new_origin, room, eps,
        C=width, CB=block, SOURCES=pow2(-(-longest // step)), STEP=step, ADDS=y is not None,
        SCALES=layer_scale is not None, AFFINE=(weight is not None) + (bias is not None), NORMS=norm is not None,
        num_warps=1 if block <= 512 else 2 if block <= 1024 else 4,
    )  # fmt: skip
    return new, normed, new_size, new_origin
