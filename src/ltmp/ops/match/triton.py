"""Similarity of tokens and the most similar partner of each, on packed rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import image_rows, pow2, strides
from .reference import ROUNDS


class Partners(NamedTuple):
    """The partner that each token may merge into.

    Attributes:
        best: float32 [T], the score with the partner, -inf if the token may not merge.
        partner: int32 [T]. Bipartite: row cu[b] + i is for the even token at position 2 i of image b, whose partner is
            at position 2 partner + 1; other rows are not written. Mutual: row cu[b] + i is for the token at position i,
            and holds the position of the most similar token among those unpaired when it was last matched, whether the
            two are a mutual pair or not.
        mutual: whether mutual pairs merge, rather than even tokens into odd ones.
    """

    best: Tensor
    partner: Tensor
    mutual: bool


def tile_of(width: int) -> tuple[int, int]:
    """Tile sizes for heads of this width: even tokens per program, and odd tokens compared with them at a time.

    Shared memory holds both tiles twice, as the halves of float32; together they fit the 96 KiB of GPUs since Ampere.
    """
    block = pow2(width)
    return min(128, 8192 // block), min(64, 4096 // block)


@triton.jit
def metric_tile(
    K, row, live, k_row, k_head,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
):  # fmt: skip
    """float32 [rows, DB] unit vectors: the mean of the keys over heads."""
    column = tl.arange(0, DB)
    mask = live[:, None] & (column < D)[None, :]
    at = K + row[:, None] * k_row + column[None, :]
    mean = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for head in tl.static_range(1, H):
        mean += tl.load(at + head * k_head, mask=mask, other=0.0).to(tl.float32)
    mean /= H
    return mean / tl.maximum(tl.sqrt(tl.sum(mean * mean, 1)), 1e-12)[:, None]


@triton.jit
def best_partner(
    K, ORIGIN, even, n, k_row, k_head, protected,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ODD: tl.constexpr,
):  # fmt: skip
    """Cosine and index of the most similar odd token, for a tile of even tokens; -inf if there is none."""
    is_even = 2 * even < n
    free_even = is_even & (tl.load(ORIGIN + 2 * even, mask=is_even, other=-1) >= protected)
    a = metric_tile(K, 2 * even, is_even, k_row, k_head, H, D, DB)
    best = tl.full(even.shape, -float("inf"), tl.float32)
    partner = tl.zeros(even.shape, tl.int32)
    for start in range(0, n // 2, ODD):
        odd = start + tl.arange(0, ODD)
        is_odd = 2 * odd + 1 < n
        free_odd = is_odd & (tl.load(ORIGIN + 2 * odd + 1, mask=is_odd, other=-1) >= protected)
        b = metric_tile(K, 2 * odd + 1, is_odd, k_row, k_head, H, D, DB)
        # as three tf32 products: lower precision than float32 would flip some decisions
        cosine = tl.dot(a, tl.trans(b), input_precision="tf32x3")
        cosine = tl.where(free_even[:, None] & free_odd[None, :], cosine, -float("inf"))
        highest = tl.max(cosine, 1)
        index = start + tl.argmax(cosine, 1)
        partner = tl.where(highest > best, index, partner)
        best = tl.maximum(best, highest)
    return best, partner


@triton.jit(do_not_specialize=["protected"])
def _match_kernel(
    K, ORIGIN, CU, BEST, PARTNER, k_row, k_head, protected,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, TILE: tl.constexpr, ODD: tl.constexpr,
):  # fmt: skip
    """One program = one tile of even tokens of one image."""
    first, n = image_rows(CU, tl.program_id(0))
    even = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if tl.program_id(1) * TILE * 2 < n:
        best, partner = best_partner(
            K + first * k_row, ORIGIN + first, even, n, k_row, k_head, protected, H, D, DB, ODD
        )
        tl.store(BEST + first + even, best, mask=2 * even < n)
        tl.store(PARTNER + first + even, partner, mask=2 * even < n)


@triton.jit
def _paired(PARTNER, position, live):
    """Whether tokens were paired in an earlier round."""
    partner = tl.load(PARTNER + position, mask=live, other=0)
    return live & (tl.load(PARTNER + partner, mask=live, other=-1) == position)


@triton.jit(do_not_specialize=["protected"])
def _candidates_kernel(
    K, PENALTY, ORIGIN, CU, EARLIER_BEST, EARLIER, BEST, PARTNER, k_row, k_head, protected,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, TILE: tl.constexpr, OTHER: tl.constexpr,
    MUTUAL: tl.constexpr, PENALISED: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """One program = one tile of the tokens of one image that may have a partner: all if MUTUAL, else the even ones.

    AGAIN matches only tokens that were not paired in EARLIER, and copies the results of the others.
    """
    first, n = image_rows(CU, tl.program_id(0))
    STEP: tl.constexpr = 1 if MUTUAL else 2
    K += first * k_row
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    position = index * STEP
    if tl.program_id(1) * TILE * STEP < n:
        live = position < n
        free = live & (tl.load(ORIGIN + first + position, mask=live, other=-1) >= protected)
        if AGAIN:
            paired = _paired(EARLIER + first, position, live)
            free = free & (paired == 0)
        best = tl.full(index.shape, -float("inf"), tl.float32)
        partner = tl.zeros(index.shape, tl.int32)
        for start in range(0, n // STEP, OTHER):
            other = (start + tl.arange(0, OTHER)) * STEP + (STEP - 1)
            live_other = other < n
            free_other = live_other & (tl.load(ORIGIN + first + other, mask=live_other, other=-1) >= protected)
            if AGAIN:
                free_other = free_other & (_paired(EARLIER + first, other, live_other) == 0)
            cosine = tl.zeros([TILE, OTHER], tl.float32)
            for head in range(0, H):
                a = metric_tile(K + head * k_head, position, live, k_row, k_head, 1, D, DB)
                b = metric_tile(K + head * k_head, other, live_other, k_row, k_head, 1, D, DB)
                cosine += tl.dot(a, tl.trans(b), input_precision="tf32x3")
            possible = free[:, None] & free_other[None, :] & (position[:, None] != other[None, :])
            cosine = tl.where(possible, cosine / H, -float("inf"))
            highest = tl.max(cosine, 1)
            partner = tl.where(highest > best, start + tl.argmax(cosine, 1), partner)
            best = tl.maximum(best, highest)
        if PENALISED:
            penalty = tl.load(PENALTY + first + position, mask=live, other=1.0)
            receiver = partner * STEP + (STEP - 1)
            best = 1 - (1 - best) * penalty * tl.load(PENALTY + first + receiver, mask=receiver < n, other=1.0)
        if AGAIN:
            best = tl.where(paired, tl.load(EARLIER_BEST + first + position, mask=paired, other=0.0), best)
            partner = tl.where(paired, tl.load(EARLIER + first + position, mask=paired, other=0), partner)
        tl.store(BEST + first + index, best, mask=live)
        tl.store(PARTNER + first + index, partner, mask=live)


@triton.jit(do_not_specialize=["images"])
def _metric_kernel(
    K, CU, METRIC, k_row, k_head, images,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tl.load(CU + images)
    column = tl.arange(0, DB)
    metric = metric_tile(K, row, live, k_row, k_head, H, D, DB)
    tl.store(METRIC + row[:, None] * D + column[None, :], metric, mask=live[:, None] & (column < D)[None, :])


def similarity_metric(k: Tensor, cu: Tensor) -> Tensor:
    """The mean of the keys [T, H, D] over heads, normalised: float32 [T, 1, D]."""
    rows, heads, width = k.shape
    metric = torch.empty(rows, 1, width, device=k.device, dtype=torch.float32)
    _metric_kernel[(triton.cdiv(rows, 32),)](
        k, cu, metric, *strides(k), cu.shape[0] - 1, H=heads, D=width, DB=pow2(width), ROWS=32, num_warps=4
    )
    return metric


def match(k: Tensor, origin: Tensor, cu: Tensor, longest: int, protected: int) -> Partners:
    """For each even token of each image, find the odd token with the most similar mean key (paper, section 3.2).

    Args:
        k: [T, H, D] keys, unit stride in D.
        origin: int32 [T], position of each token in its image's input; below `protected`, a token neither merges nor
            receives.
        cu: int32 [B + 1], row bounds of the images.
        longest: an upper bound on the tokens of an image.

    Returns:
        Bipartite partners.
    """
    half = (longest + 1) // 2
    most, odd = tile_of(k.shape[2])
    tile = min(pow2(half), most)
    if half > tile and k.shape[1] > 1:
        # several programs read each key: compute the mean over heads once
        k = similarity_metric(k, cu)
    rows, heads, width = k.shape
    best = torch.empty(rows, device=k.device, dtype=torch.float32)
    partner = torch.empty(rows, dtype=torch.int32, device=k.device)
    _match_kernel[(cu.shape[0] - 1, triton.cdiv(half, tile))](
        k, origin, cu, best, partner, *strides(k), protected,
        H=heads, D=width, DB=pow2(width), TILE=tile, ODD=odd, num_warps=8 if tile == 128 else 4, num_stages=1,
    )  # fmt: skip
    return Partners(best, partner, mutual=False)


def candidates(
    k: Tensor, origin: Tensor, cu: Tensor, longest: int, protected: int, mutual: bool, penalty: Tensor | None = None
) -> Partners:
    """Find the partners that tokens may merge into, by any scores: `reference.candidates` on packed rows.

    Args:
        k: [T, H, D], unit stride in D; similarity is the mean of the cosines of all heads.
        origin, cu, longest, protected: as in `match`.
        mutual: whether mutual pairs merge, rather than even tokens into odd ones.
        penalty: float32 [T], merge penalty, see `ops.weigh.triton`; None is 1.
    """
    rows, heads, width = k.shape
    matched = longest if mutual else (longest + 1) // 2
    most, other = tile_of(width)
    tile = min(pow2(matched), most)
    best, partner = k.new_empty(rows, dtype=torch.float32), origin
    for matching_round in range(ROUNDS if mutual else 1):
        earlier_best, earlier = best, partner
        best, partner = torch.empty_like(best), torch.empty_like(origin)
        # a pointer that a constexpr flag leaves unread can be any tensor
        _candidates_kernel[(cu.shape[0] - 1, triton.cdiv(matched, tile))](
            k, best if penalty is None else penalty, origin, cu, earlier_best, earlier, best, partner,
            *strides(k), protected,
            H=heads, D=width, DB=pow2(width), TILE=tile, OTHER=other, MUTUAL=mutual, PENALISED=penalty is not None,
            AGAIN=matching_round > 0, num_warps=8 if tile == 128 else 4, num_stages=1,
        )  # fmt: skip
    return Partners(best, partner, mutual)
