"""The weights of `reference` on packed rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, image_rows, mean_received, pow2, strides, to_power
from ..probe.reference import LIFT
from .reference import MERGES, PRUNES


@triton.jit(do_not_specialize=["rows"])
def _class_kernel(
    Q, K, WEIGHT, SIZE, RECEIVED, CU, RELUCTANCE, IMPORTANCE, q_row, q_head, k_row, k_head, rows, scale, power,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, FULL: tl.constexpr, COLUMNS: tl.constexpr,
    PRUNES: tl.constexpr,
):  # fmt: skip
    """One program = one image: its class token's attention, all at once but a few columns of the keys at a time."""
    first, n = image_rows(CU, tl.program_id(0))
    place = tl.arange(0, FULL)
    live = place < n
    bias = tl.log2(tl.load(WEIGHT + first + place, mask=live, other=1.0))
    attended = tl.zeros([FULL], tl.float32)
    for head in range(0, H):
        score = tl.zeros([FULL], tl.float32)
        for start in tl.static_range(0, DB, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            q = tl.load(Q + first * q_row + head * q_head + column, mask=column < D, other=0.0).to(tl.float32)
            at = K + (first + place)[:, None] * k_row + head * k_head + column[None, :]
            k = tl.load(at, mask=live[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
            score += tl.sum(k * q[None, :], 1)
        score = tl.where(live, score * scale + bias, -float("inf"))
        p = tl.exp2(score - tl.max(score, 0))
        attended += p / tl.sum(p, 0)
    patches = tl.sum(tl.load(SIZE + first + place, mask=live, other=0.0), 0)
    attended /= H
    tl.store(RELUCTANCE + first + place, to_power(attended * patches, power / 2), mask=live)
    if PRUNES:
        received = mean_received(RECEIVED + first, place, live, n, rows, H)
        importance = to_power(received, 1 - power) * to_power(attended, power)
        # a sum over queries, as what it stands in for
        tl.store(IMPORTANCE + first + place, importance * n, mask=live)


def class_rows(
    q: Tensor, k: Tensor, weight: Tensor, size: Tensor, received: Tensor | None, cu: Tensor, longest: int, power: float
) -> tuple[Tensor, Tensor | None]:
    """The class token's say: `reference.reluctance_by` and `attend.reference.importance_by` on packed rows.

    Args:
        q, k: [T, H, D], unit stride in D; the class token is the first of each image.
        weight: float32 [T], what each token counts as. size: float32 [T], its patches.
        received: float32 [H, T] from `attend`, or None where nothing is pruned by it.
        cu, longest: as in `match`.
        power: as in `Policy.class_power`.

    Returns:
        reluctance: float32 [T], how little tokens want to merge; rows past the last image are not written.
        received: float32 [1, T], what stands in for it where tokens are pruned; None where it is None.
    """
    rows, heads, width = k.shape
    full, padded = pow2(longest), pow2(width)
    reluctance, importance = torch.empty(2, 1, rows, device=k.device, dtype=torch.float32)
    _class_kernel[(cu.shape[0] - 1,)](
        q, k, weight, size, reluctance if received is None else received, cu, reluctance, importance,
        *strides(q), *strides(k), rows, width**-0.5 * LOG2E, power,
        H=heads, D=width, DB=padded, FULL=full, COLUMNS=min(padded, max(1, 32768 // full)),
        PRUNES=received is not None, num_warps=8,
    )  # fmt: skip
    return reluctance[0], None if received is None else importance


@triton.jit
def _share(LOGARITHM, place, bias, counts):
    """Each token's share of what matters in its image, 0 for those that do not count."""
    score = tl.load(LOGARITHM + place, mask=counts, other=0.0) + bias
    score = tl.where(counts, score, -float("inf"))
    p = tl.exp(score - tl.maximum(tl.max(score, 0), -1e30))
    return p / tl.maximum(tl.sum(p, 0), 1e-30)


@triton.jit(do_not_specialize=["rows", "protected"])
def _matter_kernel(
    LOGARITHM, WEIGHT, SIZE, RECEIVED, ORIGIN, CU, RELUCTANCE, IMPORTANCE, rows, protected, spread, merges, prunes,
    H: tl.constexpr, FULL: tl.constexpr, PRUNES: tl.constexpr,
):  # fmt: skip
    """One program = one image."""
    first, n = image_rows(CU, tl.program_id(0))
    place = tl.arange(0, FULL)
    live = place < n
    counts = live & (tl.load(ORIGIN + first + place, mask=live, other=-1) >= protected)
    bias = tl.log(tl.load(WEIGHT + first + place, mask=counts, other=1.0))
    patches = tl.sum(tl.load(SIZE + first + place, mask=live, other=0.0), 0)
    moved = _share(LOGARITHM + first, place, bias, counts)
    tl.store(RELUCTANCE + first + place, to_power(moved * patches, merges / 2) * spread, mask=live)
    if PRUNES:
        received = mean_received(RECEIVED + first, place, live, n, rows, H)
        dropped = _share(LOGARITHM + rows + first, place, bias, counts)
        importance = to_power(received, 1 - prunes) * to_power(dropped, prunes)
        # a sum over queries, as what it stands in for
        tl.store(IMPORTANCE + first + place, importance * n, mask=live)


def matter_rows(
    logarithm: Tensor, weight: Tensor, size: Tensor, received: Tensor | None, origin: Tensor, cu: Tensor, longest: int,
    protected: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A probe's say: `scores.reluctance_for` and `scores.importance_for` of it on packed rows.

    Args:
        logarithm: float32 [2, T], see `probe_rows`.
        weight: float32 [T], what each token counts as. size: float32 [T], its patches.
        received: float32 [H, T] from `attend`, or None where nothing is pruned by it.
        origin, cu, longest, protected: as in `ops.match.triton.match`.

    Returns:
        reluctance: float32 [T], how little tokens want to merge; rows past the last image are not written.
        received: float32 [1, T], what stands in for it where tokens are pruned; None where it is None.
    """
    rows = size.shape[0]
    reluctance, importance = torch.empty(2, 1, rows, device=size.device, dtype=torch.float32)
    _matter_kernel[(cu.shape[0] - 1,)](
        logarithm, weight, size, reluctance if received is None else received, origin, cu, reluctance, importance,
        rows, protected, (1 + LIFT) ** 0.5, MERGES, PRUNES,
        H=1 if received is None else received.shape[0], FULL=pow2(longest), PRUNES=received is not None, num_warps=8,
    )  # fmt: skip
    return reluctance[0], None if received is None else importance
