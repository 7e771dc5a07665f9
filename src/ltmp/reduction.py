"""The method itself: which tokens merge, which are dropped, and the order of those that stay.

Everything here works on what is known of a token in a few numbers, [B, N]; the features follow the plan in whatever
layout an engine keeps them. The same plan is made in training, where the gone stay behind as a masked tail, and in
deployment, where the tail is cut: parity sees the same sequence either way (paper, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops.match.reference import match
from .sources import follow
from .thresholds import Thresholds
from .tokens import Tokens, take, take_all


@dataclass(frozen=True)
class Plan:
    """One block's reduction.

    Attributes:
        tokens: the state after it, live tokens first.
        order: int64 [B, N], for each new place the old place whose token moves there.
        into: int64 [B, N], for each old place the old place it is folded into: itself unless it merged.
    """

    tokens: Tokens
    order: Tensor
    into: Tensor

    @property
    def merged(self) -> Tensor:
        """bool [B, N], the old places whose token was folded into another."""
        return self.into != torch.arange(self.into.shape[1], device=self.into.device)


@dataclass(frozen=True)
class _Scored:
    """Tokens on their way through a plan, [B, N] each; the metric is [B, N, D]."""

    size: Tensor
    keep: Tensor
    origin: Tensor
    importance: Tensor
    metric: Tensor


def similarity_metric(k: Tensor) -> Tensor:
    """What similarity is measured on: the mean of the keys over heads, of length one, in float32.

    Args:
        k: [..., H, D].

    Returns:
        float32 [..., D].
    """
    return F.normalize(k.detach().float().mean(-2), dim=-1)


def make_plan(
    tokens: Tokens,
    metric: Tensor | None,
    importance: Tensor | None,
    thresholds: Thresholds,
    block: int,
    steps: tuple[str, ...],
    protected: int,
) -> Plan:
    """Decide what happens to every token of a block (paper, section 3.2).

    Args:
        tokens: state at this block, [B, N].
        metric: float32 [B, N, D] unit vectors; needed to merge.
        importance: float32 [B, N], mean attention received; needed to prune.
        thresholds: the learned numbers; `block` says which to use.
        steps: which of "merge" and "prune", in order.
        protected: the first `protected` tokens of the input are never merged away, never receive, are never pruned.

    Returns:
        The plan; `plan.tokens.keep` carries the gradient of the two thresholds.
    """
    images, length = tokens.keep.shape
    place = torch.arange(length, device=tokens.keep.device)
    into = order = place.expand(images, length)
    if importance is None:
        importance = tokens.keep.detach()
    if metric is None:
        metric = tokens.keep.detach()[..., None]
    state = _Scored(tokens.size, tokens.keep, tokens.origin, importance.detach(), metric)
    rank = place
    for step in steps:
        if step == "prune":
            state = _prune(state, thresholds, block, protected)
        elif length > 1:
            if step is not steps[0]:
                # parity is taken among those that are left
                order = _live_first(state.keep, rank)
                state = take_all(state, order)
            state, partner = _merge(state, thresholds, block, protected)
            receiver = torch.where(partner < 0, order[:, ::2], order[:, 1::2].gather(1, partner.clamp_min(0)))
            into = into.scatter(1, order[:, ::2], receiver)
            # evens, then odds; but a block that cannot merge keeps its order, because deployment skips it
            evens_first = place // 2 + place % 2 * ((length + 1) // 2)
            rank = torch.where(thresholds.can_merge[block], evens_first, place)
    last = _live_first(state.keep, rank)
    after = Tokens(*(take(t, last) for t in (state.size, state.keep, state.origin)))
    order = order.gather(1, last)
    if tokens.source is not None:
        after = replace(after, source=follow(tokens.source, into, order, after.live, block))
    return Plan(after, order, into)


def _live_first(keep: Tensor, rank: Tensor) -> Tensor:
    """int64 [B, N], the order with the live tokens first, each part by rank [N]."""
    return (rank + len(rank) * (keep <= 0)).argsort(dim=1)


def _merge(state: _Scored, thresholds: Thresholds, block: int, protected: int) -> tuple[_Scored, Tensor]:
    """Fold each selected even token into the odd token most like it.

    Returns:
        The state, every token still in its place, and int64 [B, ceil(N/2)]: the odd token that each even one went
        into, or -1.
    """
    free = (state.keep > 0) & (state.origin >= protected)
    best, partner = match(state.metric, free)
    gone = thresholds.select("merge", block, best, best > float("-inf"))
    moved = gone.detach()
    size, importance, leaving = state.size.clone(), state.importance.clone(), torch.zeros_like(state.keep)
    size[:, 1::2].scatter_add_(1, partner, size[:, ::2] * moved)
    arriving = importance[:, ::2].masked_fill(moved == 0, float("-inf"))
    importance[:, 1::2] = importance[:, 1::2].scatter_reduce(1, partner, arriving, "amax")
    leaving[:, ::2] = gone
    state = replace(state, size=size, importance=importance, keep=state.keep * (1 - leaving))
    return state, partner.masked_fill_(moved == 0, -1)


def _prune(state: _Scored, thresholds: Thresholds, block: int, protected: int) -> _Scored:
    """Drop the tokens that are not important enough; those that stay keep their order."""
    spared = state.origin < protected
    if protected == 0:
        # without a class token nothing else would keep an image from losing every token
        top = state.importance.masked_fill(state.keep <= 0, float("-inf")).argmax(1, keepdim=True)
        spared = spared.scatter(1, top, True)
    kept = thresholds.select("prune", block, state.importance, (state.keep > 0) & ~spared)
    return replace(state, keep=state.keep * kept.masked_fill(spared, 1.0))


def fold(x: Tensor, size: Tensor, plan: Plan) -> Tensor:
    """Features after a plan: a receiver becomes the size-weighted mean of its group (paper, section 3.2).

    Args:
        x: [B, N, C] features before.
        size: [B, N] sizes before.

    Returns:
        [B, N, C] in the new order; a token that merged away also stays, as itself, in the masked tail.
    """
    weight = (size * plan.merged)[..., None].to(x.dtype)
    index = plan.into[..., None].expand_as(x)
    old = torch.zeros_like(size).scatter_add(1, plan.into, size * plan.merged) + size
    total = (x * size[..., None].to(x.dtype)).scatter_add(1, index, x * weight)
    return take(total / old[..., None].to(x.dtype), plan.order)
