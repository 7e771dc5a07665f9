"""Similarity of tokens and the most similar partner of each, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def unit(values: Tensor) -> Tensor:
    """Normalise vectors along the last axis, as `torch.nn.functional.normalize` does.

    `normalize` expands the norm explicitly, which would add a node to every exported graph.
    """
    return values / values.norm(dim=-1, keepdim=True).clamp_min(1e-12)


_METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda k: k.mean(-2),
    "heads": lambda k: unit(k).flatten(-2),
}


def similarity_metric(k: Tensor, kind: str = "mean") -> Tensor:
    """Return unit vectors whose dot product is the similarity of two tokens (paper, section 3.2).

    Args:
        k: [..., H, D], keys.
        kind: "mean" for the mean of the keys over heads, or "heads" for the keys of all heads, each normalised.

    Returns:
        float32 [..., D], or [..., H D] for "heads": the dot product is then the mean of the heads' cosines.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind not in _METRICS:
        raise ValueError(f"unknown similarity of keys {kind!r}: expected {' or '.join(_METRICS)}")
    return unit(_METRICS[kind](k.detach().float()))


def candidates(
    metric: Tensor, free: Tensor, mutual: bool, penalty: Tensor | None = None
) -> tuple[slice, Tensor, Tensor]:
    """Find the tokens that may merge: even ones into odd ones, or the later of each mutual pair into the earlier.

    Args:
        metric, free: as in `match`.
        mutual: whether to match pairs with `match_mutual`.
        penalty: float32 [B, N], merge penalty, positive, see `penalise`; None is 1.

    Returns:
        positions: slice of the M positions whose tokens may have a partner.
        best: float32 [B, M], the score of each of these tokens with its partner, -inf if it may not merge.
        receiver: int64 [B, M], the position of the partner.
    """
    if mutual:
        positions, (best, receiver) = slice(None), match_mutual(metric, free)
    else:
        best, odd = match(metric, free)
        positions, receiver = slice(None, None, 2), 2 * odd + 1
    if penalty is not None:
        best = penalise(best, penalty[:, positions], penalty.gather(1, receiver))
    return positions, best, receiver


def penalise(cosine: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Score of a pair, `1 - (1 - cosine) * one * other`, from the merge penalties of its two tokens."""
    return 1 - (1 - cosine) * one * other


@torch.no_grad()
def match(metric: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Find the most similar odd token of each even token (paper, section 3.2: bipartite matching by parity).

    Args:
        metric: float32 [B, N, D], unit vectors in the current order.
        free: bool [B, N]; False for removed and protected tokens, which neither merge nor receive.

    Returns:
        best: float32 [B, ceil(N/2)], cosine with the best partner, -inf if there is none.
        partner: int64 [B, ceil(N/2)], index among the odd tokens: 0 is the token at position 1.
    """
    # no .contiguous() copies: matmul takes the strided halves as they are
    return match_halves(metric[:, ::2], metric[:, 1::2], free[:, ::2], free[:, 1::2])


ROUNDS = 3
"""Rounds of mutual matching: tokens not paired yet are matched again among themselves (docs/accuracy.md)."""


@torch.no_grad()
def match_mutual(metric: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Pair tokens that are each other's most similar token, then the rest likewise, in `ROUNDS` rounds.

    Pairs do not depend on the order of the tokens, so a change elsewhere in the image does not shift them.

    Args:
        metric, free: as in `match`.

    Returns:
        best: float32 [B, N], for the later token of each pair its cosine with the earlier one, -inf for all others.
        partner: int64 [B, N], position of the most similar token among those unpaired when the token was last matched.
    """
    with torch.autocast(metric.device.type, enabled=False):
        cosine = metric @ metric.transpose(1, 2)
    position = torch.arange(metric.shape[1], device=metric.device)
    possible = free[:, :, None] & free[:, None, :] & (position[:, None] != position)
    best, partner = cosine.masked_fill_(~possible, float("-inf")).max(-1)
    for _ in range(ROUNDS - 1):
        paired = partner.gather(1, partner) == position
        next_best, next_partner = cosine.masked_fill_(paired[:, :, None] | paired[:, None, :], float("-inf")).max(-1)
        best, partner = torch.where(paired, best, next_best), torch.where(paired, partner, next_partner)
    later_of_pair = (partner.gather(1, partner) == position) & (partner < position)
    return best.masked_fill(~later_of_pair, float("-inf")), partner


def match_halves(even: Tensor, odd: Tensor, free_even: Tensor, free_odd: Tensor) -> tuple[Tensor, Tensor]:
    """`match` for tokens already split by parity: metrics [B, E, D] and [B, O, D], free [B, E] and [B, O]."""
    with torch.autocast(even.device.type, enabled=False):
        cosine = even @ odd.transpose(1, 2)
    # added rather than filled in: selecting is slow in exported graphs
    best, partner = cosine.add_(torch.where(free_odd, 0.0, float("-inf"))[:, None]).max(-1)
    return best.masked_fill(~free_even, float("-inf")), partner
