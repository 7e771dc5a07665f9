"""Attention of packed rows on a CPU in float32, by image: fused, or in parts whose maps stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..scratch import scratch

MAP = 2**19
"""Values of a map that is worked on at a time: 2 MiB. With less, threads wait for one another at each of many steps."""

MANY = 192
"""Tokens from which on an image has many: torch's softmax of a map then takes longer than its parts by themselves, and
its fused attention is the fastest where nobody asks for the map."""


def attend_images(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    counts: list[int],
    received: Tensor | None = None,
    attended: Tensor | None = None,
) -> Tensor:
    """`reference.attend` of packed rows, one image after the other; called where no gradients are asked for.

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
    out = torch.empty(rows, heads * width, device=q.device)
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
    """The whole map at once."""
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
    """Some heads or queries at a time, in as few passes over a map as there can be.

    What tokens count as multiplies values and sums, instead of being added to each score; and sums divide what comes of
    a map, instead of the map.
    """
    heads, n, width = q.shape
    counts = v.new_ones(n) if bias is None else bias.exp()
    v = torch.mul(v, counts[:, None], out=_scratch("values", (heads, n, width)))
    group, rows = max(1, min(heads, MAP // (n * n))), min(n, max(16, MAP // n))
    for h in range(0, heads, group):
        some = slice(h, h + group)
        for i in range(0, n, rows):
            qi = q[some, i : i + rows]
            weight = _scratch("scores", (len(qi), qi.shape[1], n))
            torch.baddbmm(weight, qi, k[some], beta=0, alpha=width**-0.5, out=weight)
            weight.sub_(weight.amax(-1, keepdim=True)).exp_()
            part = torch.mv(weight.view(-1, n), counts).reciprocal_().view(*weight.shape[:2], 1)
            torch.mul(torch.bmm(weight, v[some]), part, out=out[some, i : i + rows])
            if received is not None:
                given = torch.mv(weight.view(-1, n).t(), part.view(-1))
                received.addcmul_(given, counts, value=1 / (heads * n))
            if attended is not None and i == 0:
                attended.addcmul_((weight[:, 0] * part[:, 0]).sum(0), counts, value=1 / heads)


def _scratch(name: str, shape: tuple[int, int, int]) -> Tensor:
    heads, rows, columns = shape
    return scratch(name, heads * rows * columns).tensor.as_strided(shape, (rows * columns, columns, 1))
