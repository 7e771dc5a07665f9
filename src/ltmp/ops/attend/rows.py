"""Attention of packed rows, float32 on a CPU, image by image: fused, or in tiles whose maps stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..scratch import scratch

MAP = 2**19
"""Values of the attention map computed at a time: 2 MiB. With fewer, threads wait for one another too often."""

MANY = 192
"""Tokens of an image from which torch's softmax of a whole map takes longer than its single steps on tiles, and torch's
fused attention is the fastest if no map is needed."""


def attend_images(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    counts: list[int],
    received: Tensor | None = None,
    attended: Tensor | None = None,
) -> Tensor:
    """`reference.attend` of packed rows, one image after the other, without gradients.

    Args:
        q, k, v: float32 [T, H, D], the live tokens of all images one after the other.
        bias: float32 [T], the logarithm of each token's weight; None if all weights are 1.
        counts: live tokens of each image; they sum to T.
        received: float32 [T], the mean attention received is added to it; None if it is not needed.
        attended: float32 [T], attention from the first token of each image is added to it; None if it is not needed.

    Returns:
        [T, H * D].
    """
    rows, heads, width = q.shape
    out = torch.empty(rows, heads * width, device=q.device)
    images = [_split(_heads_first(t, q.shape, t is k), counts, 1 + (t is k)) for t in (q, k, v, out)]
    scores = [[None] * len(counts) if t is None else _split(t, counts, 0) for t in (bias, received, attended)]
    for image in zip(*images, *scores, strict=True):
        _attend_image(*image)
    return out


def _heads_first(rows: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """View [T, H, D] or [T, H * D] as [H, T, D], or as [H, D, T] if `transposed`, in one call."""
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
    """Attention of one image: q, v [H, N, D], k [H, D, N]. Fills `out`; adds to `received` and `attended` [N]."""
    if q.shape[1] < MANY:
        _attend_few(q, k, v, out, bias, received, attended)
    elif received is None and attended is None:
        mask = None if bias is None else bias[None, None, None]
        out.copy_(F.scaled_dot_product_attention(q[None], k.mT[None], v[None], attn_mask=mask)[0])
    else:
        _attend_many(q, k, v, out, bias, received, attended)


def _attend_few(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, bias: Tensor | None, received: Tensor | None, attended: Tensor | None
) -> None:
    """The whole attention map at once."""
    heads, n, width = q.shape
    score, p = _scratch("scores", (heads, n, n)), _scratch("softmax", (heads, n, n))
    start, beta = (score, 0) if bias is None else (bias, 1)
    torch.baddbmm(start, q, k, beta=beta, alpha=width**-0.5, out=score)
    torch.softmax(score, -1, out=p)
    out.copy_(torch.bmm(p, v))
    if received is not None:
        received.add_(p.sum((0, 1)), alpha=1 / (heads * n))
    if attended is not None:
        attended.add_(p[:, 0].sum(0), alpha=1 / heads)


def _attend_many(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, bias: Tensor | None, received: Tensor | None, attended: Tensor | None
) -> None:
    """Some heads or queries at a time, in as few passes over a tile of the map as possible.

    Weights of tokens multiply values and sums, rather than being added to every score; and the softmax divides its
    results by the sums, rather than the map itself.
    """
    heads, n, width = q.shape
    token_weight = v.new_ones(n) if bias is None else bias.exp()
    v = torch.mul(v, token_weight[:, None], out=_scratch("values", (heads, n, width)))
    group, rows = max(1, min(heads, MAP // (n * n))), min(n, max(16, MAP // n))
    for h in range(0, heads, group):
        some = slice(h, h + group)
        for i in range(0, n, rows):
            qi = q[some, i : i + rows]
            weight = _scratch("scores", (len(qi), qi.shape[1], n))
            torch.baddbmm(weight, qi, k[some], beta=0, alpha=width**-0.5, out=weight)
            weight.sub_(weight.amax(-1, keepdim=True)).exp_()
            scale = torch.mv(weight.view(-1, n), token_weight).reciprocal_().view(*weight.shape[:2], 1)
            torch.mul(torch.bmm(weight, v[some]), scale, out=out[some, i : i + rows])
            if received is not None:
                column_sum = torch.mv(weight.view(-1, n).t(), scale.view(-1))
                received.addcmul_(column_sum, token_weight, value=1 / (heads * n))
            if attended is not None and i == 0:
                attended.addcmul_((weight[:, 0] * scale[:, 0]).sum(0), token_weight, value=1 / heads)


def _scratch(name: str, shape: tuple[int, int, int]) -> Tensor:
    heads, rows, columns = shape
    return scratch(name, heads * rows * columns).tensor.as_strided(shape, (rows * columns, columns, 1))
