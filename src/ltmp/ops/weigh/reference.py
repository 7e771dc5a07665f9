"""Merge penalties and importance from class-token attention and from a probe, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

MERGE_POWER = 0.5
"""Power of a token's saliency in its merge penalty (docs/accuracy.md)."""

PRUNE_POWER = 0.7
"""Power of a token's saliency in its importance (docs/accuracy.md)."""


@torch.no_grad()
def class_attention(q: Tensor, k: Tensor, size: Tensor, keep: Tensor) -> Tensor:
    """Attention from the first token, the class token, to each token (Liang et al., ICLR 2022, section 3.2).

    Args:
        q, k: [B, N, H, D]; only the first token's query is read.
        size: float32 [B, N], as in `attend`.
        keep: float32 [B, N], 1 if live and 0 if removed.

    Returns:
        float32 [B, N], mean over heads; sums to 1 over an image's live tokens.
    """
    with torch.autocast(q.device.type, enabled=False):
        scores = (k.float() * (q[:, :1].float() * q.shape[-1] ** -0.5)).sum(-1)  # [B, N, H]
        scores = scores + size.log()[..., None]
        return scores.masked_fill((keep <= 0)[..., None], float("-inf")).softmax(1).mean(-1)


def blend(received: Tensor, other: Tensor, power: float) -> Tensor:
    """Importance from two distributions over an image's tokens: `received ** (1 - power) * other ** power`.

    Args:
        received: float32, any shape, mean attention received, see `attend`.
        other: the same shape; class-token attention or saliency.
        power: in [0, 1].
    """
    tiny = torch.finfo(torch.float32).tiny
    return received.clamp(min=tiny) ** (1 - power) * other.clamp(min=tiny) ** power


def merge_penalty(share: Tensor, patches: Tensor, power: float) -> Tensor:
    """Merge penalty of each token: its share of the image relative to an average patch, to the power of `power / 2`.

    `(share * sum of patches) ** (power / 2)`, so that the product of two penalties is the geometric mean of the two
    relative shares, to the power of `power`. 1 for an average patch. See `ops.match.reference.penalise`.

    Args:
        share: float32 [B, N], class-token attention or saliency; sums to 1 over an image.
        patches: float32 [B, N], number of patches of each token, 0 for removed tokens.

    Returns:
        float32 [B, N], positive.
    """
    relative = share * patches.sum(1, keepdim=True)
    return relative.clamp(min=torch.finfo(torch.float32).tiny) ** (power / 2)


@torch.no_grad()
def saliency(log_saliency: Tensor, weight: Tensor, patch: Tensor) -> Tensor:
    """Each token's share of the saliency of its image: the softmax over patches of `log_saliency + log weight`.

    Args:
        log_saliency: float32 [B, N], one of the last two columns of `probe`.
        weight: float32 [B, N], weight of each token in attention, see `Policy.weight`.
        patch: bool [B, N], live tokens that are not prefix tokens, for which a probe predicts nothing.

    Returns:
        float32 [B, N], 0 where `patch` is False.
    """
    score = (log_saliency + weight.log()).masked_fill(~patch, float("-inf"))
    return score.softmax(1).masked_fill(~patch, 0.0)
