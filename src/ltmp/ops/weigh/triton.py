"""Merge penalties and importance of `reference` on packed rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, image_rows, mean_received, pow2, strides, to_power
from ..probe.reference import LIFT
from .reference import MERGE_POWER, PRUNE_POWER


@triton.jit
def _store_blend(RECEIVED, IMPORTANCE, other, position, live, n, rows, power, H: tl.constexpr):
    """Store `reference.blend` of attention received and `other`, times n, as a sum over queries like RECEIVED."""
    received = mean_received(RECEIVED, position, live, n, rows, H)
    importance = to_power(received, 1 - power) * to_power(other, power)
    tl.store(IMPORTANCE + position, importance * n, mask=live)


@triton.jit(do_not_specialize=["rows"])
def _class_kernel(
    Q, K, WEIGHT, SIZE, RECEIVED, CU, PENALTY, IMPORTANCE, q_row, q_head, k_row, k_head, rows, scale, power,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, FULL: tl.constexpr, COLUMNS: tl.constexpr,
    PRUNES: tl.constexpr,
):  # fmt: skip
    """One program = one image: attention from its class token to all tokens, some columns of the keys at a time."""
    first, n = image_rows(CU, tl.program_id(0))
    position = tl.arange(0, FULL)
    live = position < n
    bias = tl.log2(tl.load(WEIGHT + first + position, mask=live, other=1.0))
    attended = tl.zeros([FULL], tl.float32)
    for head in range(0, H):
        score = tl.zeros([FULL], tl.float32)
        for start in tl.static_range(0, DB, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            q = tl.load(Q + first * q_row + head * q_head + column, mask=column < D, other=0.0).to(tl.float32)
            at = K + (first + position)[:, None] * k_row + head * k_head + column[None, :]
            k = tl.load(at, mask=live[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
            score += tl.sum(k * q[None, :], 1)
        score = tl.where(live, score * scale + bias, -float("inf"))
        p = tl.exp2(score - tl.max(score, 0))
        attended += p / tl.sum(p, 0)
    patches = tl.sum(tl.load(SIZE + first + position, mask=live, other=0.0), 0)
    attended /= H
    tl.store(PENALTY + first + position, to_power(attended * patches, power / 2), mask=live)
    if PRUNES:
        _store_blend(RECEIVED + first, IMPORTANCE + first, attended, position, live, n, rows, power, H)


def class_attention_rows(
    q: Tensor, k: Tensor, weight: Tensor, size: Tensor, received: Tensor | None, cu: Tensor, longest: int, power: float
) -> tuple[Tensor, Tensor | None]:
    """Compute `reference.merge_penalty` and `reference.blend` from class-token attention on packed rows.

    Args:
        q, k: [T, H, D], unit stride in D; the class token is the first of each image.
        weight, size: float32 [T], weight of each token in attention, and its number of patches.
        received: float32 [H, T] from `attend`, or None if nothing is pruned by it.
        cu, longest: as in `ops.match.triton.match`.
        power: see `Policy.class_power`.

    Returns:
        penalty: float32 [T], merge penalty; rows past the last image are not written.
        received: float32 [1, T], to prune by instead of `received`; None if that is None.
    """
    rows, heads, width = k.shape
    full, padded = pow2(longest), pow2(width)
    penalty, importance = torch.empty(2, 1, rows, device=k.device, dtype=torch.float32)
    _class_kernel[(cu.shape[0] - 1,)](
        q, k, weight, size, penalty if received is None else received, cu, penalty, importance,
        *strides(q), *strides(k), rows, width**-0.5 * LOG2E, power,
        H=heads, D=width, DB=padded, FULL=full, COLUMNS=min(padded, max(1, 32768 // full)),
        PRUNES=received is not None, num_warps=8,
    )  # fmt: skip
    return penalty[0], None if received is None else importance


@triton.jit
def _saliency(LOG_SALIENCY, position, bias, patch):
    """`reference.saliency` of one image: a softmax over its patches, 0 elsewhere."""
    score = tl.load(LOG_SALIENCY + position, mask=patch, other=0.0) + bias
    score = tl.where(patch, score, -float("inf"))
    p = tl.exp(score - tl.maximum(tl.max(score, 0), -1e30))
    return p / tl.maximum(tl.sum(p, 0), 1e-30)


@triton.jit(do_not_specialize=["rows", "protected"])
def _saliency_kernel(
    LOG_SALIENCY, WEIGHT, SIZE, RECEIVED, ORIGIN, CU, PENALTY, IMPORTANCE,
    rows, protected, lift, merge_power, prune_power,
    H: tl.constexpr, FULL: tl.constexpr, PRUNES: tl.constexpr,
):  # fmt: skip
    """One program = one image."""
    first, n = image_rows(CU, tl.program_id(0))
    position = tl.arange(0, FULL)
    live = position < n
    patch = live & (tl.load(ORIGIN + first + position, mask=live, other=-1) >= protected)
    bias = tl.log(tl.load(WEIGHT + first + position, mask=patch, other=1.0))
    patches = tl.sum(tl.load(SIZE + first + position, mask=live, other=0.0), 0)
    moved = _saliency(LOG_SALIENCY + first, position, bias, patch)
    tl.store(PENALTY + first + position, to_power(moved * patches, merge_power / 2) * lift, mask=live)
    if PRUNES:
        dropped = _saliency(LOG_SALIENCY + rows + first, position, bias, patch)
        _store_blend(RECEIVED + first, IMPORTANCE + first, dropped, position, live, n, rows, prune_power, H)


def saliency_rows(
    log_saliency: Tensor, weight: Tensor, size: Tensor, received: Tensor | None, origin: Tensor, cu: Tensor,
    longest: int, protected: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute merge penalty and importance from the saliency of a probe on packed rows, as `method.scores` does.

    Args:
        log_saliency: float32 [2, T], see `probe_rows`.
        weight, size: float32 [T], weight of each token in attention, and its number of patches.
        received: float32 [H, T] from `attend`, or None if nothing is pruned by it.
        origin, cu, longest, protected: as in `ops.match.triton.match`.

    Returns:
        penalty: float32 [T], merge penalty; rows past the last image are not written.
        received: float32 [1, T], to prune by instead of `received`; None if that is None.
    """
    rows = size.shape[0]
    penalty, importance = torch.empty(2, 1, rows, device=size.device, dtype=torch.float32)
    _saliency_kernel[(cu.shape[0] - 1,)](
        log_saliency, weight, size, penalty if received is None else received, origin, cu, penalty, importance,
        rows, protected, (1 + LIFT) ** 0.5, MERGE_POWER, PRUNE_POWER,
        H=1 if received is None else received.shape[0], FULL=pow2(longest), PRUNES=received is not None, num_warps=8,
    )  # fmt: skip
    return penalty[0], None if received is None else importance
