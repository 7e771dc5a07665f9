"""What tokens are compared by, and the best partners of them, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def similarity_metric(k: Tensor, kind: str = "mean") -> Tensor:
    """What similarity is measured on: a vector of length one, in float32.

    Args:
        k: [..., H, D], keys.
        kind: "mean" for their mean over heads, or "heads" for all of them, each of the same length.

    Returns:
        float32 [..., D], or [..., H D] for "heads", whose cosine is the mean of the heads' cosines.
    """
    k = k.detach().float()
    return F.normalize(k.mean(-2) if kind == "mean" else F.normalize(k, dim=-1).flatten(-2), dim=-1)


def candidates(
    metric: Tensor, free: Tensor, matching: str, reluctance: Tensor | None = None
) -> tuple[slice, Tensor, Tensor]:
    """The tokens that may merge, by `bipartite` or `mutual` matching.

    Args:
        metric, free: as in `match`.
        reluctance: float32 [B, N], positive, see `weighed`; None is 1.

    Returns:
        asked: the places that may have one.
        best: float32 [B, M], of each of these places the score with what it would merge into, -inf where it may not.
        receiver: int64 [B, M], the place of that.
    """
    if matching == "mutual":
        asked, (best, receiver) = slice(None), match_mutual(metric, free)
    else:
        best, odd = match(metric, free)
        asked, receiver = slice(None, None, 2), 2 * odd + 1
    if reluctance is not None:
        best = weighed(best, reluctance[:, asked], reluctance.gather(1, receiver))
    return asked, best, receiver


def weighed(cosine: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """A pair's score: its cosine where both tokens' reluctance to merge is 1, and further from 1 the higher it is."""
    return 1 - (1 - cosine) * one * other


@torch.no_grad()
def match(metric: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """For each even token its most similar odd token (paper, section 3.2: bipartite matching by parity).

    Args:
        metric: float32 [B, N, D] unit vectors in the current order.
        free: bool [B, N]; False for tokens that are gone or protected: they neither merge nor receive.

    Returns:
        best: float32 [B, ceil(N/2)], cosine to the best partner, -inf where there is none.
        partner: int64 [B, ceil(N/2)], which odd token: 0 is the token at place 1.
    """
    # no .contiguous() copies: matmul takes the strided halves as they are
    return match_halves(metric[:, ::2], metric[:, 1::2], free[:, ::2], free[:, 1::2])


ROUNDS = 3
"""How often tokens look for their pair: those whose nearest is in another find one later (docs/accuracy.md)."""


@torch.no_grad()
def match_mutual(metric: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of tokens that are each other's most similar one, then such pairs among the others, in `ROUNDS` rounds.

    Nothing depends on a token's rank, so that one decision more or less elsewhere shifts none here.

    Args:
        metric, free: as in `match`.

    Returns:
        best: float32 [B, N], for the later token of each pair its cosine to the earlier one, -inf for all others.
        partner: int64 [B, N], the place of the most similar token that was left when it was last asked for.
    """
    with torch.autocast(metric.device.type, enabled=False):
        cosine = metric @ metric.transpose(1, 2)
    place = torch.arange(metric.shape[1], device=metric.device)
    possible = free[:, :, None] & free[:, None, :] & (place[:, None] != place)
    best, partner = cosine.masked_fill_(~possible, float("-inf")).max(-1)
    for _ in range(ROUNDS - 1):
        paired = partner.gather(1, partner) == place
        again, other = cosine.masked_fill_(paired[:, :, None] | paired[:, None, :], float("-inf")).max(-1)
        best, partner = torch.where(paired, best, again), torch.where(paired, partner, other)
    later_of_pair = (partner.gather(1, partner) == place) & (partner < place)
    return best.masked_fill(~later_of_pair, float("-inf")), partner


def match_halves(even: Tensor, odd: Tensor, free_even: Tensor, free_odd: Tensor) -> tuple[Tensor, Tensor]:
    """`match` of tokens that are split already: metrics [B, E, D] and [B, O, D], free [B, E] and [B, O]."""
    with torch.autocast(even.device.type, enabled=False):
        cosine = even @ odd.transpose(1, 2)
    possible = free_even[:, :, None] & free_odd[:, None, :]
    best, partner = cosine.masked_fill_(~possible, float("-inf")).max(-1)
    return best, partner
