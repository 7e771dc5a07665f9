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
        best: float32 [T], the score with the partner, -inf where the token may not merge.
        partner: int32 [T]. Bipartite: row cu[b] + i belongs to the even token at place 2 i of image b, whose partner is
            at place 2 partner + 1; other rows are not written. Mutual: row cu[b] + i belongs to the token at place i,
            and is the place of the most similar token, of those unpaired when it was last matched, mutual or not.
        mutual: whether tokens merge in mutual pairs, or even ones into odd ones.
    """

    best: Tensor
    partner: Tensor
    mutual: bool


def tile_of(width: int) -> tuple[int, int]:
    """Even tokens per program, and odd tokens that it compares them with at a time.

    Both tiles are in shared memory twice, as the halves of float32; together they fit the 96 KiB of GPUs since Ampere.
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
    """Cosine and number of the most similar odd token for a tile of even tokens; -inf where there is none."""
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
        # three tf32 products: decisions need float32, and fewer bits would flip some
        cosine = tl.dot(a, tl.trans(b), input_precision="tf32x3")
        cosine = tl.where(free_even[:, None] & free_odd[None, :], cosine, -float("inf"))
        highest = tl.max(cosine, 1)
        place = start + tl.argmax(cosine, 1)
        partner = tl.where(highest > best, place, partner)
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
def _paired(PARTNER, place, live):
    """Whether tokens were paired in an earlier round."""
    partner = tl.load(PARTNER + place, mask=live, other=0)
    return live & (tl.load(PARTNER + partner, mask=live, other=-1) == place)


@triton.jit(do_not_specialize=["protected"])
def _candidates_kernel(
    K, PENALTY, ORIGIN, CU, EARLIER_BEST, EARLIER, BEST, PARTNER, k_row, k_head, protected,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, TILE: tl.constexpr, OTHER: tl.constexpr,
    MUTUAL: tl.constexpr, PENALISED: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """One program = one tile of the tokens of one image that may have a partner: all if MUTUAL, else the even ones.

    AGAIN matches only those not paired in EARLIER, and copies the results of the others.
    """
    first, n = image_rows(CU, tl.program_id(0))
    STEP: tl.constexpr = 1 if MUTUAL else 2
    K += first * k_row
    asked = tl.program_id(1) * TILE + tl.arange(0, TILE)
    place = asked * STEP
    if tl.program_id(1) * TILE * STEP < n:
        is_asked = place < n
        free = is_asked & (tl.load(ORIGIN + first + place, mask=is_asked, other=-1) >= protected)
        if AGAIN:
            paired = _paired(EARLIER + first, place, is_asked)
            free = free & (paired == 0)
        best = tl.full(asked.shape, -float("inf"), tl.float32)
        partner = tl.zeros(asked.shape, tl.int32)
        for start in range(0, n // STEP, OTHER):
            other = start + tl.arange(0, OTHER)
            there = other * STEP + (STEP - 1)
            is_other = there < n
            free_other = is_other & (tl.load(ORIGIN + first + there, mask=is_other, other=-1) >= protected)
            if AGAIN:
                free_other = free_other & (_paired(EARLIER + first, there, is_other) == 0)
            cosine = tl.zeros([TILE, OTHER], tl.float32)
            for head in range(0, H):
                a = metric_tile(K + head * k_head, place, is_asked, k_row, k_head, 1, D, DB)
                b = metric_tile(K + head * k_head, there, is_other, k_row, k_head, 1, D, DB)
                cosine += tl.dot(a, tl.trans(b), input_precision="tf32x3")
            possible = free[:, None] & free_other[None, :] & (place[:, None] != there[None, :])
            cosine = tl.where(possible, cosine / H, -float("inf"))
            highest = tl.max(cosine, 1)
            partner = tl.where(highest > best, start + tl.argmax(cosine, 1), partner)
            best = tl.maximum(best, highest)
        if PENALISED:
            one = tl.load(PENALTY + first + place, mask=is_asked, other=1.0)
            there = partner * STEP + (STEP - 1)
            best = 1 - (1 - best) * one * tl.load(PENALTY + first + there, mask=there < n, other=1.0)
        if AGAIN:
            best = tl.where(paired, tl.load(EARLIER_BEST + first + place, mask=paired, other=0.0), best)
            partner = tl.where(paired, tl.load(EARLIER + first + place, mask=paired, other=0), partner)
        tl.store(BEST + first + asked, best, mask=is_asked)
        tl.store(PARTNER + first + asked, partner, mask=is_asked)


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
    """The mean of the keys [T, H, D] over heads, of length one: float32 [T, 1, D]."""
    rows, heads, width = k.shape
    metric = torch.empty(rows, 1, width, device=k.device, dtype=torch.float32)
    _metric_kernel[(triton.cdiv(rows, 32),)](
        k, cu, metric, *strides(k), cu.shape[0] - 1, H=heads, D=width, DB=pow2(width), ROWS=32, num_warps=4
    )
    return metric


def match(k: Tensor, origin: Tensor, cu: Tensor, longest: int, protected: int) -> Partners:
    """For each even token of each image the odd token with the most similar mean key (paper, section 3.2).

    Args:
        k: [T, H, D] keys, unit stride in D.
        origin: int32 [T], each token's place in its image's input; below `protected` it neither merges nor receives.
        cu: int32 [B + 1] row bounds of the images.
        longest: a bound on the tokens of an image.

    Returns:
        Bipartite partners.
    """
    half = (longest + 1) // 2
    most, odd = tile_of(k.shape[2])
    tile = min(pow2(half), most)
    if half > tile and k.shape[1] > 1:
        # several tiles read each key: take the mean over heads once
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
    """The partners that tokens may merge into, by any scores: `reference.candidates` on packed rows.

    Args:
        k: [T, H, D], unit stride in D; similarity is the mean of the cosines of all heads.
        origin, cu, longest, protected: as in `match`.
        mutual: whether tokens merge in mutual pairs, or even ones into odd ones.
        penalty: float32 [T], merge penalty, see `ops.weigh.triton`; None is 1.
    """
    rows, heads, width = k.shape
    asked = longest if mutual else (longest + 1) // 2
    most, other = tile_of(width)
    tile = min(pow2(asked), most)
    best, partner = k.new_empty(rows, dtype=torch.float32), origin
    for number in range(ROUNDS if mutual else 1):
        earlier_best, earlier = best, partner
        best, partner = torch.empty_like(best), torch.empty_like(origin)
        # a pointer that a constexpr flag leaves unread may be any tensor
        _candidates_kernel[(cu.shape[0] - 1, triton.cdiv(asked, tile))](
            k, best if penalty is None else penalty, origin, cu, earlier_best, earlier, best, partner,
            *strides(k), protected,
            H=heads, D=width, DB=pow2(width), TILE=tile, OTHER=other, MUTUAL=mutual, PENALISED=penalty is not None,
            AGAIN=number > 0, num_warps=8 if tile == 128 else 4, num_stages=1,
        )  # fmt: skip
    return Partners(best, partner, mutual)
