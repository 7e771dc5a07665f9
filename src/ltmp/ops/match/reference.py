"""Similarity of tokens and the most similar partner of each, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def unit(values: Tensor) -> Tensor:
    """Vectors along the last axis divided by their lengths, as `torch.nn.functional.normalize` does.

    That one broadcasts by hand, which every exported graph would have to repeat.
    """
    return values / values.norm(dim=-1, keepdim=True).clamp_min(1e-12)


_METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda k: k.mean(-2),
    "heads": lambda k: unit(k).flatten(-2),
}


def similarity_metric(k: Tensor, kind: str = "mean") -> Tensor:
    """Unit vectors whose dot product is the similarity of two tokens (paper, section 3.2).

    Args:
        k: [..., H, D], keys.
        kind: "mean" for their mean over heads, or "heads" for all of them, each normalised.

    Returns:
        float32 [..., D], or [..., H D] for "heads": the dot product is then the mean of the heads' cosines.

    Raises:
        ValueError: another kind.
    """
    if kind not in _METRICS:
        raise ValueError(f"unknown similarity of keys {kind!r}: expected {' or '.join(_METRICS)}")
    return unit(_METRICS[kind](k.detach().float()))


def candidates(
    metric: Tensor, free: Tensor, mutual: bool, penalty: Tensor | None = None
) -> tuple[slice, Tensor, Tensor]:
    """The tokens that may merge: even ones into odd ones, or the later of each mutual pair into the earlier.

    Args:
        metric, free: as in `match`.
        mutual: whether pairs are matched by `match_mutual`.
        penalty: float32 [B, N], merge penalty, positive, see `penalise`; None is 1.

    Returns:
        asked: the places that may have a partner.
        best: float32 [B, M], the score of each of these places with its partner, -inf where it may not merge.
        receiver: int64 [B, M], the place of the partner.
    """
    if mutual:
        asked, (best, receiver) = slice(None), match_mutual(metric, free)
    else:
        best, odd = match(metric, free)
        asked, receiver = slice(None, None, 2), 2 * odd + 1
    if penalty is not None:
        best = penalise(best, penalty[:, asked], penalty.gather(1, receiver))
    return asked, best, receiver


def penalise(cosine: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """A pair's score, `1 - (1 - cosine) * one * other`, from the merge penalties of its two tokens."""
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
"""Rounds of mutual matching: tokens whose most similar one is in another pair look again (docs/accuracy.md)."""


@torch.no_grad()
def match_mutual(metric: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of tokens that are each other's most similar one, then such pairs among the others, in `ROUNDS` rounds.

    A pair does not depend on the tokens' order, so that a change elsewhere in the image does not shift it.

    Args:
        metric, free: as in `match`.

    Returns:
        best: float32 [B, N], for the later token of each pair its cosine to the earlier one, -inf for all others.
        partner: int64 [B, N], the place of the most similar token, of those unpaired when the token was last matched.
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
    """`match` of tokens already split by parity: metrics [B, E, D] and [B, O, D], free [B, E] and [B, O]."""
    with torch.autocast(even.device.type, enabled=False):
        cosine = even @ odd.transpose(1, 2)
    # a sum, as exported graphs are slow to choose
    best, partner = cosine.add_(torch.where(free_odd, 0.0, float("-inf"))[:, None]).max(-1)
    return best.masked_fill(~free_even, float("-inf")), partner
