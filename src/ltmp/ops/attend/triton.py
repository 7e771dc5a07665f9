"""Attention of packed rows with a bias by token size, and the attention that each token receives.

No stock fused kernel returns the column sums that importance needs. If the keys of an image fit on chip, one pass
computes both: the softmax of a query tile is final before it leaves the registers. Longer images take a second pass
over the keys. There are no atomics, so every run returns the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LOG2E, image_rows, pow2, precision, strides

_ON_CHIP = 64 * 1024
"""Bytes of keys and values of one head that one program may hold. Two programs then share a multiprocessor of Hopper,
and with the kernel's other shared memory one fits on any GPU since Ampere. Float32 products need twice that other
memory."""


@triton.jit
def _image_head(CU, program, H: tl.constexpr):
    """First row and token count of an image, and a head, from the number of a program that handles one head."""
    first, n = image_rows(CU, program // H)
    return first, n, program % H


@triton.jit
def _load_tile(POINTER, row, n, stride, D: tl.constexpr, DB: tl.constexpr):
    """[rows, DB] of one head. Rows past the image repeat its last one, to need no mask; columns past D are zero."""
    column = tl.arange(0, DB)
    at = POINTER + tl.minimum(row, n - 1)[:, None] * stride + column[None, :]
    return tl.load(at, mask=(column < D)[None, :], other=0.0) if D < DB else tl.load(at)


@triton.jit
def _store_tile(OUT, tile, row, n, stride, D: tl.constexpr, DB: tl.constexpr):
    column = tl.arange(0, DB)
    at = OUT + row[:, None] * stride + column[None, :]
    tl.store(at, tile.to(OUT.dtype.element_ty), mask=(row < n)[:, None] & (column < D)[None, :])


@triton.jit
def _halves(weight, dtype: tl.constexpr):
    """[16, rows] that sums to `weight` [rows]: high and low halves, so that matrix units lose no precision."""
    high = weight.to(dtype)
    low = (weight - high.to(tl.float32)).to(dtype)
    row = tl.arange(0, 16)[:, None]
    return tl.where(row == 0, high[None, :], tl.where(row == 1, low[None, :], 0.0)).to(dtype)


@triton.jit
def _head(
    Q, K, V, SIZE, OUT, RECEIVED, n, scale, q_row, k_row, v_row, out_row,
    D: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, UNITS: tl.constexpr,
    NEED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of one image of at most 64 x UNITS keys, all held on chip: chunks of 128, an odd unit as one of 64."""
    CHUNKS: tl.constexpr = (UNITS + 1) // 2
    keys = ()
    values = ()
    bias = ()
    received = ()
    for c in tl.static_range(CHUNKS):
        key = c * 128 + tl.arange(0, 64 if c * 2 + 1 == UNITS else 128)
        keys = keys + (_load_tile(K, key, n, k_row, D, DB),)
        values = values + (_load_tile(V, key, n, v_row, D, DB),)
        size = tl.load(SIZE + key, mask=key < n, other=1.0)
        bias = bias + (tl.where(key < n, tl.log2(size), -float("inf")),)
        received = received + (tl.zeros([16, 64 if c * 2 + 1 == UNITS else 128], tl.float32),)
    for m0 in range(0, n, BM):
        query = m0 + tl.arange(0, BM)
        q = _load_tile(Q, query, n, q_row, D, DB)
        top = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        out = tl.zeros([BM, DB], tl.float32)
        weights = ()
        tops = ()
        for c in tl.static_range(CHUNKS):
            score = tl.dot(q, tl.trans(keys[c]), input_precision=PRECISION) * scale + bias[c][None, :]
            highest = tl.maximum(top, tl.max(score, 1))
            fade = tl.exp2(top - highest)
            weight = tl.exp2(score - highest[:, None])
            total = total * fade + tl.sum(weight, 1)
            weight = weight.to(values[c].dtype)
            out = tl.dot(weight, values[c], out * fade[:, None], input_precision=PRECISION)
            weights = weights + (weight,)
            tops = tops + (highest,)
            top = highest
        share = tl.where(query < n, 1 / total, 0.0)
        _store_tile(OUT, out * share[:, None], query, n, out_row, D, DB)
        if NEED:
            # sum over queries by a matrix product: a reduction across threads would cost more than the softmax
            added = ()
            for c in tl.static_range(CHUNKS):
                halves = _halves(tl.exp2(tops[c] - top) * share, values[c].dtype)
                added = added + (tl.dot(halves, weights[c], received[c], input_precision=PRECISION),)
            received = added
    if NEED:
        for c in tl.static_range(CHUNKS):
            key = c * 128 + tl.arange(0, 64 if c * 2 + 1 == UNITS else 128)
            tl.store(RECEIVED + key, tl.sum(received[c], 0), mask=key < n)


@triton.jit(do_not_specialize=["rows"])
def _one_pass_kernel(
    Q, K, V, SIZE, OUT, RECEIVED, CU, scale, rows,
    q_row, q_head, k_row, k_head, v_row, v_head,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, UNITS: tl.constexpr,
    NEED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program = one head of one image."""
    first, n, head = _image_head(CU, tl.program_id(0), H)
    # images of a batch differ in length: each runs with as many units as it needs
    for units in tl.static_range(1, UNITS + 1):
        if (n > (units - 1) * 64) & ((n <= units * 64) | (units == UNITS)):
            _head(
                Q + first * q_row + head * q_head, K + first * k_row + head * k_head, V + first * v_row + head * v_head,
                SIZE + first, OUT + first * (H * D) + head * D, RECEIVED + head.to(tl.int64) * rows + first,
                n, scale, q_row, k_row, v_row, H * D, D, DB, BM, units, NEED, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _flash_kernel(
    Q, K, V, BIAS, OUT, LSE, CU, scale, rows,
    q_row, q_head, k_row, k_head, v_row, v_head,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention and its log-sum-exp in base 2; one program = one query tile of one head of one image."""
    first, n, head = _image_head(CU, tl.program_id(1), H)
    m0 = tl.program_id(0) * BM
    if m0 < n:
        Q += first * q_row + head * q_head
        K += first * k_row + head * k_head
        V += first * v_row + head * v_head
        BIAS += first
        query = m0 + tl.arange(0, BM)
        q = _load_tile(Q, query, n, q_row, D, DB)
        top = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        out = tl.zeros([BM, DB], tl.float32)
        for n0 in range(0, n, BN):
            key = n0 + tl.arange(0, BN)
            k = _load_tile(K, key, n, k_row, D, DB)
            bias = tl.load(BIAS + key, mask=key < n, other=-float("inf"))
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
            highest = tl.maximum(top, tl.max(score, 1))
            fade = tl.exp2(top - highest)
            weight = tl.exp2(score - highest[:, None])
            total = total * fade + tl.sum(weight, 1)
            v = _load_tile(V, key, n, v_row, D, DB)
            out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)
            top = highest
        _store_tile(OUT + first * (H * D) + head * D, out / total[:, None], query, n, H * D, D, DB)
        tl.store(LSE + head.to(tl.int64) * rows + first + query, top + tl.log2(total), mask=query < n)


@triton.jit(do_not_specialize=["rows"])
def _received_kernel(
    Q, K, BIAS, LSE, RECEIVED, CU, scale, rows, q_row, q_head, k_row, k_head,
    H: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention received; one program = one key tile of one head of one image."""
    first, n, head = _image_head(CU, tl.program_id(1), H)
    n0 = tl.program_id(0) * BN
    if n0 < n:
        Q += first * q_row + head * q_head
        K += first * k_row + head * k_head
        of_head = head.to(tl.int64) * rows + first
        key = n0 + tl.arange(0, BN)
        k = _load_tile(K, key, n, k_row, D, DB)
        bias = tl.load(BIAS + first + key, mask=key < n, other=0.0)
        received = tl.zeros([BN], tl.float32)
        for m0 in range(0, n, BM):
            query = m0 + tl.arange(0, BM)
            q = _load_tile(Q, query, n, q_row, D, DB)
            lse = tl.load(LSE + of_head + query, mask=query < n, other=float("inf"))
            score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias[:, None]
            received += tl.sum(tl.exp2(score - lse[None, :]), 1)
        tl.store(RECEIVED + of_head + key, received, mask=key < n)


def units_on_chip(longest: int, width: int, number_bytes: int) -> int | None:
    """Units of 64 keys that the one-pass kernel holds for the longest image, or None if they do not fit on chip.

    Args:
        longest: tokens of the longest image.
        width: width of a head, D.
        number_bytes: bytes per element of the keys.
    """
    units = triton.cdiv(longest, 64)
    room = _ON_CHIP if number_bytes == 2 else _ON_CHIP // 2
    return units if units <= 4 and 2 * units * 64 * pow2(width) * number_bytes <= room else None


def attend(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor, cu: Tensor, longest: int, need_received: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Proportional attention within each image of packed rows (paper, section 3.1).

    Args:
        q, k, v: [T, H, D] views with unit stride in D, for example of one [T, 3, H, D] tensor. D is at most 256.
        size: float32 [T], weight of each token: its number of patches, or see `Policy.weight`.
        cu: int32 [B + 1] on the device; rows cu[b]:cu[b + 1] are those of image b.
        longest: an upper bound on the tokens of an image.
        need_received: whether to return the attention received.

    Returns:
        out: [T, H * D] in the dtype of v; rows past cu[B] are not written.
        received: float32 [H, T], attention received in each head, summed over the queries of the image, or None. Its
            sum over heads, divided by H times the image's token count, is the paper's importance (section 3.3).
    """
    rows, heads, width = q.shape
    images = cu.shape[0] - 1
    out = torch.empty(rows, heads * width, dtype=v.dtype, device=v.device)
    scale = width**-0.5 * LOG2E
    q_strides, k_strides, v_strides = strides(q), strides(k), strides(v)
    block = pow2(width)
    shape = {"H": heads, "D": width, "DB": block, "PRECISION": precision(q)}
    units = units_on_chip(longest, width, q.element_size())
    received = torch.empty(heads, rows, device=q.device, dtype=torch.float32) if need_received else None
    if units is not None:
        _one_pass_kernel[(images * heads,)](
            q, k, v, size, out, size if received is None else received, cu, scale, rows,
            *q_strides, *k_strides, *v_strides,
            BM=64, UNITS=units, NEED=need_received, num_warps=4, num_stages=1, **shape,
        )  # fmt: skip
        return out, received
    bias = size.log2()
    lse = torch.empty(heads, rows, device=q.device, dtype=torch.float32)
    narrow = block * q.element_size() <= 128
    tile, chunk = (128, 64) if narrow else (64, 32)
    _flash_kernel[(triton.cdiv(longest, tile), images * heads)](
        q, k, v, bias, out, lse, cu, scale, rows, *q_strides, *k_strides, *v_strides,
        BM=tile, BN=chunk, num_warps=4, num_stages=3 if narrow else 2, **shape,
    )  # fmt: skip
    if received is not None:
        _received_kernel[(triton.cdiv(longest, 64), images * heads)](
            q, k, bias, lse, received, cu, scale, rows, *q_strides, *k_strides,
            BM=chunk, BN=64, num_warps=4, num_stages=3 if narrow else 2, **shape,
        )  # fmt: skip
    return out, received
