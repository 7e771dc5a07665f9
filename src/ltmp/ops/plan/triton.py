"""Decide which tokens of a block merge and which are pruned, and the order of the rest, on packed rows.

`method.reduction` defines the result. One program per image; the host reads nothing.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import image_rows, mean_received, pow2, strides
from ..match.triton import Partners, best_partner, match, tile_of

_ANY = ["MERGE", "PRUNE", "STATS", "protected", "rows", "images", "room"]
"""Arguments whose value or alignment differs between blocks, which one compilation must serve."""


class RowPlan(NamedTuple):
    """The reduction of one block on packed rows.

    Attributes:
        slot: int32 [T], each token's position in the new order of its image; -1 if pruned; -2 - i if merged into the
            token at position i.
        size: float32 [T], sizes after merging, by old position.
        cu: int32 [B + 1], row bounds of the images after the block, limited to the rows available.
    """

    slot: Tensor
    size: Tensor
    cu: Tensor


@triton.jit
def _merge_image(
    best, partner, RECEIVED, SIZE, ORIGIN, SIZE_OUT, IMPORTANCE, SLOT, n, rows, merge_theta, prune_theta, protected,
    H: tl.constexpr, PRUNES: tl.constexpr, SPARES: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Merge, then prune if PRUNES; return the number of tokens left. `best`, `partner`: [HALF], for even tokens."""
    index = tl.arange(0, HALF)
    even, odd = 2 * index, 2 * index + 1
    is_even, is_odd = even < n, odd < n
    merged = is_even & (best > merge_theta)
    size = tl.load(SIZE + even, mask=is_even, other=0.0)
    tl.store(SIZE_OUT + even, size, mask=is_even)
    tl.store(SIZE_OUT + odd, tl.load(SIZE + odd, mask=is_odd, other=0.0), mask=is_odd)
    if PRUNES:
        importance = mean_received(RECEIVED, even, is_even, n, rows, H)
        received = mean_received(RECEIVED, odd, is_odd, n, rows, H)
        # non-negative floats are ordered like their bits as integers
        tl.store(IMPORTANCE + odd, received.to(tl.int32, bitcast=True), mask=is_odd)
    tl.debug_barrier()
    # sums of integers, and maxima, do not depend on the order: atomics return the same bits in every run
    into = 2 * partner + 1
    tl.atomic_add(SIZE_OUT + into, size, mask=merged, sem="relaxed")
    stays_even = is_even & (merged == 0)
    stays_odd = is_odd
    if PRUNES:
        tl.atomic_max(IMPORTANCE + into, importance.to(tl.int32, bitcast=True), mask=merged, sem="relaxed")
        tl.debug_barrier()
        # bypass the first-level cache, which atomics do not update
        received = tl.load(IMPORTANCE + odd, mask=is_odd, other=0, cache_modifier=".cg").to(tl.float32, bitcast=True)
        received = tl.where(is_odd, received, -1.0)
        if SPARES:
            # no token is protected: keep the most important one, of equals the first in the new order
            candidate = tl.where(stays_even, importance, -1.0)
            top_even, top_odd = tl.max(candidate, 0), tl.max(received, 0)
            spared_even = index == tl.where(top_even >= top_odd, tl.argmax(candidate, 0), -1)
            spared_odd = index == tl.where(top_even >= top_odd, -1, tl.argmax(received, 0))
        else:
            spared_even = tl.load(ORIGIN + even, mask=is_even, other=0) < protected
            spared_odd = tl.load(ORIGIN + odd, mask=is_odd, other=0) < protected
        stays_even = stays_even & ((importance > prune_theta) | spared_even)
        stays_odd = stays_odd & ((received > prune_theta) | spared_odd)
    count = tl.sum(stays_even.to(tl.int32), 0)
    at_even = tl.cumsum(stays_even.to(tl.int32), 0) - 1
    at_odd = count + tl.cumsum(stays_odd.to(tl.int32), 0) - 1
    tl.store(SLOT + even, tl.where(stays_even, at_even, tl.where(merged, -2 - into, -1)), mask=is_even)
    tl.store(SLOT + odd, tl.where(stays_odd, at_odd, -1), mask=is_odd)
    return count + tl.sum(stays_odd.to(tl.int32), 0)


@triton.jit
def _merge_pairs(
    BEST, PARTNER, RECEIVED, SIZE, ORIGIN, SIZE_OUT, SLOT, n, rows, merge_theta, prune_theta, protected,
    H: tl.constexpr, PRUNES: tl.constexpr, SPARES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Merge the later of each mutual pair into the earlier, then prune if PRUNES; return the number of tokens left."""
    position = tl.arange(0, FULL)
    live = position < n
    partner = tl.load(PARTNER + position, mask=live, other=0)
    mutual = live & (tl.load(PARTNER + partner, mask=live, other=-1) == position)
    # both read the score of the later token: that of the earlier one may be rounded differently
    merged = mutual & (partner < position) & (tl.load(BEST + position, mask=live, other=0.0) > merge_theta)
    receives = mutual & (partner > position) & (tl.load(BEST + partner, mask=live, other=0.0) > merge_theta)
    size = tl.load(SIZE + position, mask=live, other=0.0) + tl.load(SIZE + partner, mask=receives, other=0.0)
    tl.store(SIZE_OUT + position, size, mask=live)
    stays = live & (merged == 0)
    if PRUNES:
        importance = mean_received(RECEIVED, position, live, n, rows, H)
        importance = tl.maximum(importance, mean_received(RECEIVED, partner, receives, n, rows, H))
        if SPARES:
            # no token is protected: keep the most important one, of equals the first
            spared = position == tl.argmax(tl.where(stays, importance, -1.0), 0)
        else:
            spared = tl.load(ORIGIN + position, mask=live, other=0) < protected
        stays = stays & ((importance > prune_theta) | spared)
    slot = tl.where(stays, tl.cumsum(stays.to(tl.int32), 0) - 1, tl.where(merged, -2 - partner, -1))
    tl.store(SLOT + position, slot, mask=live)
    return tl.sum(stays.to(tl.int32), 0)


@triton.jit
def _prune_image(
    RECEIVED, ORIGIN, SLOT, n, rows, prune_theta, protected,
    H: tl.constexpr, SPARES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Prune only, which keeps the order; return the number of tokens left."""
    token = tl.arange(0, FULL)
    live = token < n
    importance = mean_received(RECEIVED, token, live, n, rows, H)
    if SPARES:
        spared = token == tl.argmax(tl.where(live, importance, -1.0), 0)
    else:
        spared = tl.load(ORIGIN + token, mask=live, other=0) < protected
    stays = live & ((importance > prune_theta) | spared)
    tl.store(SLOT + token, tl.where(stays, tl.cumsum(stays.to(tl.int32), 0) - 1, -1), mask=live)
    return tl.sum(stays.to(tl.int32), 0)


@triton.jit
def _finish(image, count, KEPT, CU_OUT, STATS, images, room, SCAN: tl.constexpr):
    """Store an image's token count; the last program to finish turns the counts into row bounds.

    STATS holds [tokens of the batch, tokens of the longest image, programs done]; the last is zero before and after.
    """
    tl.store(KEPT + image, count)
    tl.debug_barrier()
    if tl.atomic_add(STATS + 2, 1, sem="acq_rel") == images - 1:
        total = 0
        longest = 0
        tl.store(CU_OUT, 0)
        for start in range(0, images, SCAN):
            which = start + tl.arange(0, SCAN)
            # bypass the first-level cache: other multiprocessors wrote these
            kept = tl.load(KEPT + which, mask=which < images, other=0, cache_modifier=".cg")
            # images that exceed the room are cut short; the host sees the total and runs the batch again
            tl.store(CU_OUT + 1 + which, tl.minimum(total + tl.cumsum(kept, 0), room), mask=which < images)
            total += tl.sum(kept, 0)
            longest = tl.maximum(longest, tl.max(kept, 0))
        tl.store(STATS, total)
        tl.store(STATS + 1, longest)
        tl.store(STATS + 2, 0)


@triton.jit(do_not_specialize=_ANY)
def _match_plan_kernel(
    K, RECEIVED, SIZE, ORIGIN, CU, MERGE, PRUNE, SIZE_OUT, IMPORTANCE, SLOT, KEPT, CU_OUT, STATS,
    k_row, k_head, protected, rows, images, room,
    HK: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ODD: tl.constexpr, H: tl.constexpr, PRUNES: tl.constexpr,
    SPARES: tl.constexpr, HALF: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Match and plan; one program = one image, short enough to be matched in one tile."""
    image = tl.program_id(0)
    first, n = image_rows(CU, image)
    even = tl.arange(0, HALF)
    best, partner = best_partner(K + first * k_row, ORIGIN + first, even, n, k_row, k_head, protected, HK, D, DB, ODD)
    prune_theta = tl.load(PRUNE) if PRUNES else 0.0
    count = _merge_image(
        best, partner, RECEIVED + first, SIZE + first, ORIGIN + first, SIZE_OUT + first,
        IMPORTANCE + first, SLOT + first, n, rows, tl.load(MERGE), prune_theta, protected, H, PRUNES, SPARES, HALF,
    )  # fmt: skip
    _finish(image, count, KEPT, CU_OUT, STATS, images, room, SCAN)


@triton.jit(do_not_specialize=_ANY)
def _plan_kernel(
    BEST, PARTNER, RECEIVED, SIZE, ORIGIN, CU, MERGE, PRUNE, SIZE_OUT, IMPORTANCE, SLOT, KEPT, CU_OUT, STATS,
    protected, rows, images, room,
    H: tl.constexpr, MERGES: tl.constexpr, PAIRS: tl.constexpr, PRUNES: tl.constexpr, SPARES: tl.constexpr,
    HALF: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Plan with given partners; one program = one image."""
    image = tl.program_id(0)
    first, n = image_rows(CU, image)
    prune_theta = tl.load(PRUNE) if PRUNES else 0.0
    if PAIRS:
        count = _merge_pairs(
            BEST + first, PARTNER + first, RECEIVED + first, SIZE + first, ORIGIN + first, SIZE_OUT + first,
            SLOT + first, n, rows, tl.load(MERGE), prune_theta, protected, H, PRUNES, SPARES, 2 * HALF,
        )  # fmt: skip
    elif MERGES:
        even = tl.arange(0, HALF)
        best = tl.load(BEST + first + even, mask=2 * even < n, other=-float("inf"))
        partner = tl.load(PARTNER + first + even, mask=2 * even < n, other=0)
        count = _merge_image(
            best, partner, RECEIVED + first, SIZE + first, ORIGIN + first, SIZE_OUT + first,
            IMPORTANCE + first, SLOT + first, n, rows, tl.load(MERGE), prune_theta, protected, H, PRUNES, SPARES, HALF,
        )  # fmt: skip
    else:
        count = _prune_image(
            RECEIVED + first, ORIGIN + first, SLOT + first, n, rows, prune_theta, protected, H, SPARES, 2 * HALF
        )
    _finish(image, count, KEPT, CU_OUT, STATS, images, room, SCAN)


def plan(
    k: Tensor | None,
    received: Tensor | None,
    size: Tensor,
    origin: Tensor,
    cu: Tensor,
    longest: int,
    merge_theta: Tensor | None,
    prune_theta: Tensor | None,
    protected: int,
    stats: Tensor,
    room: int | None = None,
    partners: Partners | None = None,
) -> RowPlan:
    """Plan the reduction of a block: merge, then prune; one of them alone if the other's threshold is None.

    Args:
        k: [T, H, D], keys to match by; required to merge, unless there are `partners`.
        received: float32 [H, T], attention received, from `attend`; required to prune.
        size, origin: float32 [T] and int32 [T], see `Tokens`.
        cu: int32 [B + 1], row bounds of the images; longest: an upper bound on the tokens of an image.
        merge_theta, prune_theta: float32 [1] on the device. Kernels read them there, so they are never out of date.
        protected: tokens with an origin below this never merge, never receive, and are never pruned.
        stats: int32 [3], the last element zero; the tokens left in the batch and in its longest image are written here.
        room: rows available for the result; None for as many as there are now.
        partners: partners by scores other than the paper's, from `ops.match.triton.candidates`.

    Raises:
        ValueError: a merge threshold with neither keys nor partners.
    """
    rows, images = size.shape[0], cu.shape[0] - 1
    slot = torch.empty(rows, dtype=torch.int32, device=size.device)
    kept = torch.empty(images, dtype=torch.int32, device=size.device)
    bounds = torch.empty(images + 1, dtype=torch.int32, device=size.device)
    prunes = prune_theta is not None
    new_size = torch.empty_like(size) if merge_theta is not None else size
    importance = torch.empty_like(slot) if merge_theta is not None and prunes else slot
    half = pow2((longest + 1) // 2)
    # a pointer that a constexpr flag leaves unread can be any tensor
    pointers = (received if prunes else size, size, origin, cu,
                merge_theta if merge_theta is not None else size, prune_theta if prunes else size,
                new_size, importance, slot, kept, bounds, stats)  # fmt: skip
    numbers = (protected, rows, images, rows if room is None else room)
    shape = {
        "H": received.shape[0] if received is not None else 1,
        "PRUNES": prunes, "SPARES": prunes and protected == 0, "HALF": half,
        "SCAN": min(pow2(images), 1024),
    }  # fmt: skip
    plan_merge = partial(_plan_kernel[(images,)], num_warps=8, num_stages=1, **shape)
    if merge_theta is None:
        _plan_kernel[(images,)](size, origin, *pointers, *numbers, MERGES=False, PAIRS=False, num_warps=4, **shape)
    elif partners is not None:
        plan_merge(partners.best, partners.partner, *pointers, *numbers, MERGES=True, PAIRS=partners.mutual)
    elif k is None:
        raise ValueError("merging needs the keys")
    elif half <= tile_of(k.shape[2])[0]:
        wide = half == 128
        _match_plan_kernel[(images,)](
            k, *pointers, *strides(k), *numbers,
            HK=k.shape[1], D=k.shape[2], DB=pow2(k.shape[2]), ODD=tile_of(k.shape[2])[1],
            # lets two programs share a multiprocessor, so that a batch of 256 images is one wave on 132 of them
            num_warps=8 if wide else 4, maxnreg=128 if wide else None, num_stages=1, **shape,
        )  # fmt: skip
    else:
        best, partner, _ = match(k, origin, cu, longest, protected)
        plan_merge(best, partner, *pointers, *numbers, MERGES=True, PAIRS=False)
    return RowPlan(slot, new_size, bounds)
