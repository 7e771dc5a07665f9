"""Attention of packed rows on a CPU in float32, by image: fused, or in parts whose maps stay in a core's cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..scratch import scratch

MAP = 2**18
"""Values of a map that is worked on at a time: 1 MiB, and as much again for its softmax."""


@torch.no_grad()
def attend_images(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    counts: list[int],
    received: Tensor | None = None,
    attended: Tensor | None = None,
) -> Tensor:
    """`reference.attend` of packed rows, one image after the other.

    Args:
        q, k, v: float32 [T, H, D], the live tokens of all images one after the other.
        bias: float32 [T], the logarithms of what each token counts as; None where every one counts as 1.
        counts: live tokens of each image; they sum to T.
        received: float32 [T]; the mean attention received is added to it. None where nobody asks.
        attended: the same with the attention from each image's first token.

    Returns:
        [T, H * D].
    """
    rows, heads, width = q.shape
    out = torch.empty(rows, heads * width)
    images = [_split(_heads_first(t, q.shape, t is k), counts, 1 + (t is k)) for t in (q, k, v, out)]
    scores = [[None] * len(counts) if t is None else _split(t, counts, 0) for t in (bias, received, attended)]
    for image in zip(*images, *scores, strict=True):
        _attend_image(*image)
    return out


def _heads_first(rows: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """[H, T, D], or [H, D, T], of [T, H, D] or [T, H * D], in one call."""
    number, heads, width = shape
    head = rows.stride(1) if rows.ndim == 3 else width
    if transposed:
        return rows.as_strided((heads, width, number), (head, rows.stride(-1), rows.stride(0)))
    return rows.as_strided((heads, number, width), (head, rows.stride(0), rows.stride(-1)))


def _split(values: Tensor, counts: list[int], dim: int) -> Sequence[Tensor]:
    return (values,) if len(counts) == 1 else values.split(counts, dim)


def _attend_image(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, bias: Tensor | None, received: Tensor | None, attended: Tensor | None
) -> None:
    """One image [H, N, D], k [H, D, N]; `out` is filled, the scores [N] are added up."""
    heads, n, width = q.shape
    group, rows = max(1, min(heads, MAP // (n * n))), min(n, max(16, MAP // n))
    parts = [(h, i) for h in range(0, heads, group) for i in range(0, n, rows)]
    if len(parts) > 1 and received is None and attended is None:
        # nobody asks for the maps: torch's fused kernel keeps none, which pays where they are large
        mask = None if bias is None else bias[None, None, None]
        out.copy_(F.scaled_dot_product_attention(q[None], k.mT[None], v[None], attn_mask=mask)[0])
        return
    for h, i in parts:
        qi, ki, vi, yi = (q, k, v, out) if len(parts) == 1 else (
            q[h : h + group, i : i + rows], k[h : h + group], v[h : h + group], out[h : h + group, i : i + rows]
        )  # fmt: skip
        shape = (len(qi), qi.shape[1], n)
        score, p = _map("scores", shape), _map("softmax", shape)
        start, beta = (score, 0) if bias is None else (bias, 1)
        torch.baddbmm(start, qi, ki, beta=beta, alpha=width**-0.5, out=score)
        torch.softmax(score, -1, out=p)
        yi.copy_(torch.bmm(p, vi))
        if received is not None:
            received.add_(p.sum((0, 1)), alpha=1 / (heads * n))
        if attended is not None and i == 0:
            attended.add_(p[:, 0].sum(0), alpha=1 / heads)


def _map(name: str, shape: tuple[int, int, int]) -> Tensor:
    groups, rows, n = shape
    return scratch(name, groups * rows * n).tensor.as_strided(shape, (rows * n, n, 1))
