"""How tokens are weighed beyond cosine and attention received: penalties of merging and importance."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def class_attention(q: Tensor, k: Tensor, size: Tensor, keep: Tensor) -> Tensor:
    """How much the first token, the class token, attends to each token (Liang et al., ICLR 2022, section 3.2).

    Args:
        q, k: [B, N, H, D]; of q only the first token's is read.
        size: float32 [B, N], as in `attend`. keep: float32 [B, N], 1 live and 0 gone.

    Returns:
        float32 [B, N], mean over heads.
    """
    with torch.autocast(q.device.type, enabled=False):
        scores = (k.float() * (q[:, :1].float() * q.shape[-1] ** -0.5)).sum(-1)  # [B, N, H]
        scores = scores + size.log()[..., None]
        return scores.masked_fill((keep <= 0)[..., None], float("-inf")).softmax(1).mean(-1)


def importance_by(received: Tensor, attended: Tensor, power: float) -> Tensor:
    """What pruning goes by where the class token has a say: the mean attention received and the attention from it.

    Both sum to 1 over an image's tokens; this is their geometric mean, weighted by `power`.

    Args:
        received: float32, any shape, see `attend`. attended: the same, see `class_attention`.
        power: the class token's say, from 0 to 1.
    """
    least = torch.finfo(torch.float32).tiny
    return received.clamp(min=least) ** (1 - power) * attended.clamp(min=least) ** power


def reluctance_by(attended: Tensor, patches: Tensor, power: float) -> Tensor:
    """float32 [B, N], how little tokens want to merge: the class token's attention relative to a patch's even share.

    Half the power each, so that a pair's product is that of their geometric mean.

    Args:
        attended: float32 [B, N], see `ops.attend.reference.class_attention`.
        patches: float32 [B, N], how many each token stands for, 0 where there is none.
    """
    share = attended * patches.sum(1, keepdim=True)
    return share.clamp(min=torch.finfo(torch.float32).tiny) ** (power / 2)


MERGES = 0.5


PRUNES = 0.7
"""The powers to which its share of what matters counts in a token's merging and pruning (docs/accuracy.md)."""


@torch.no_grad()
def matter(logarithm: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """float32 [B, N], each token's share of what matters in its image; 0 for those that do not count.

    Args:
        logarithm: float32 [B, N], one of the last two columns of `probe`.
        weight: float32 [B, N], what each token counts as, see `Policy.weight`.
        counts: bool [B, N], the tokens that are there and are patches: of others a probe knows nothing.
    """
    score = (logarithm + weight.log()).masked_fill(~counts, float("-inf"))
    return score.softmax(1).masked_fill(~counts, 0.0)
