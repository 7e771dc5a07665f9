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
        size: float32 [B, N], as in `attend`. keep: float32 [B, N], 1 live and 0 gone.

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
    least = torch.finfo(torch.float32).tiny
    return received.clamp(min=least) ** (1 - power) * other.clamp(min=least) ** power


def merge_penalty(share: Tensor, patches: Tensor, power: float) -> Tensor:
    """Merge penalty per token: its share of an image against that of an average patch, to half of `power`.

    `(share * sum of patches) ** (power / 2)`, so that the penalties of a pair multiply to their geometric mean to that
    power. 1 for an average patch; scales 1 - similarity, see `ops.match.reference.penalise`.

    Args:
        share: float32 [B, N], class-token attention or saliency, summing to 1 over an image.
        patches: float32 [B, N], how many patches each token stands for, 0 where there is no token.

    Returns:
        float32 [B, N], positive.
    """
    relative = share * patches.sum(1, keepdim=True)
    return relative.clamp(min=torch.finfo(torch.float32).tiny) ** (power / 2)


@torch.no_grad()
def saliency(log_saliency: Tensor, weight: Tensor, patch: Tensor) -> Tensor:
    """Softmax over an image's patches of `log_saliency + log weight`: how much of its answer depends on each token.

    Args:
        log_saliency: float32 [B, N], one of the last two columns of `probe`.
        weight: float32 [B, N], weight of each token in attention, see `Policy.weight`.
        patch: bool [B, N], live tokens that are no prefix tokens, of which a probe knows nothing.

    Returns:
        float32 [B, N], 0 where `patch` is False.
    """
    score = (log_saliency + weight.log()).masked_fill(~patch, float("-inf"))
    return score.softmax(1).masked_fill(~patch, 0.0)
