"""Proportional attention, and the attention that each token receives, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import LTMPError


def _scores(q: Tensor, k: Tensor, size: Tensor, added: Tensor | None) -> Tensor:
    """float32 [B, H, N, N]: `q k^T / sqrt(D) + log size_j + added`; half precision is accumulated in float32."""
    bias = size.float().log()[:, None, None, :]
    if added is not None:
        bias = bias + added.float()
    scale = q.shape[-1] ** -0.5
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        product = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
        return product.unflatten(0, q.shape[:2]).mul_(scale).add_(bias)
    return ((q.float() * scale) @ k.float().transpose(-2, -1)).add_(bias)


class _Attend(torch.autograd.Function):
    """Recomputes the attention map in backward, to need no more memory than fused attention."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, size: Tensor, keep: Tensor, added: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            score = _scores(q, k, size, added)
            live = keep > 0
            score.masked_fill_(~live[:, None, None, :], float("-inf"))
            lse = score.logsumexp(-1, keepdim=True)
            p = score.sub_(lse).exp_()
            out = (p.to(v.dtype) @ v).transpose(1, 2)
            # only live queries count
            received = live[:, None, None, :].to(p.dtype) @ p
            importance = received.sum((1, 2)) / (q.shape[1] * live.sum(1, keepdim=True))
        ctx.save_for_backward(q, k, v, size, keep, lse, out, added)
        ctx.mark_non_differentiable(importance)
        return out, importance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise LTMPError(
                "a model whose tokens are masked has no gradients of gradients (create_graph=True): freeze its "
                "thresholds (model.ltmp.requires_grad_(False)), or call it inside `with ltmp.dense():`"
            )
        q, k, v, size, keep, lse, out, added = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            live = (keep > 0)[:, None, None, :]
            # attention weights, also those that removed tokens would have, for the gradient of keep
            weight = _scores(q, k, size, added).sub_(lse)
            # a removed query whose bias hides all live tokens would overflow; it has no gradient
            weight = (weight if added is None else weight.clamp_(max=30)).exp_()
            grad = grad.transpose(1, 2)
            delta = (grad.float() * out.transpose(1, 2).float()).sum(-1, keepdim=True)
            grad_weight = (grad @ v.transpose(-2, -1)).float().sub_(delta).mul_(weight)
            grad_keep = grad_weight.sum((1, 2)).to(keep.dtype) if ctx.needs_input_grad[4] else None
            grad_score = grad_weight.mul_(live).mul_(q.shape[-1] ** -0.5).to(q.dtype)
            grad_v = weight.mul_(live).to(v.dtype).transpose(-2, -1) @ grad
            return grad_score @ k, grad_score.transpose(-2, -1) @ q, grad_v, None, grad_keep, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor, keep: Tensor, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Proportional attention over the live tokens of padded images, differentiable in `keep` (paper, section 3.1).

    Args:
        q, k, v: [B, N, H, D].
        size: float32 [B, N], weight of each token: its number of patches, or see `Policy.weight`.
        keep: float32 [B, N], 1 if live and 0 if removed; the gradient at a removed token is that of restoring it.
        added: [B, H or 1, N, N], added to the scores before the softmax; gets no gradient.

    Returns:
        out: [B, N, H, D] in the dtype of v.
        importance: float32 [B, N], mean attention received over heads and live queries (section 3.3); no gradient.
    """
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return _Attend.apply(*heads_first, size, keep, added)


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor, counts: list[int], need_importance: bool
) -> tuple[Tensor, Tensor | None]:
    """`attend` on packed rows, image by image: no padding, and the attention map of one image fits the cache.

    Args:
        q, k, v: [T, H, D], the live tokens of all images one after the other.
        size: float32 [T], as in `attend`.
        counts: live tokens of each image; they sum to T.
        need_importance: whether to return the importance.

    Returns:
        out: [T, H, D].
        importance: float32 [T], or None.
    """
    outs, received = [], []
    scale = q.shape[-1] ** -0.5
    unweighted = bool((size == 1).all())
    with torch.autocast(q.device.type, enabled=False):
        for qi, ki, vi, bi in zip(*(t.split(counts) for t in (q, k, v, size.log())), strict=True):
            qi, ki, vi = (t.transpose(0, 1) for t in (qi.float(), ki.float(), vi))
            score = (qi @ ki.transpose(1, 2)).mul_(scale)
            p = (score if unweighted else score.add_(bi)).softmax(-1)
            outs.append((p.to(vi.dtype) @ vi).transpose(0, 1))
            if need_importance:
                received.append(p.mean((0, 1)))
    return torch.cat(outs), torch.cat(received) if need_importance else None
