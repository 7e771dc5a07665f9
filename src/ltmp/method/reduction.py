"""The method itself: which tokens merge, which are pruned, and the order of those that stay.

A plan is made from a few numbers per token, [B, N]; engines apply it to the features in their own layout. Training and
deployment make the same plan: training keeps removed tokens as a masked tail and deployment cuts the tail, so that the
parity of the live tokens is the same in both (paper, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.match.reference import candidates
from .policy import Policy, rank
from .scores import BlockScores
from .tokens import Tokens, follow, take, take_all


@dataclass(frozen=True)
class BlockPlan:
    """One block's reduction.

    Attributes:
        tokens: the state after it, live tokens first.
        order: int64 [B, N], for each new place the old place that its token comes from.
        into: int64 [B, N], for each old place the old place it is merged into; itself unless it merged.
        weight: float32 [B, N], by old place: the weights of the mean that a group of tokens becomes.
    """

    tokens: Tokens
    order: Tensor
    into: Tensor
    weight: Tensor

    @property
    def merged(self) -> Tensor:
        """bool [B, N], the old places whose token merged into another."""
        return self.into != torch.arange(self.into.shape[1], device=self.into.device)

    @property
    def part(self) -> Tensor:
        """float32 [B, N], by old place: the old token's weight in its new token, 1 where nothing merged."""
        total = self.weight.scatter_add(1, self.into, self.weight * self.merged)
        return self.weight / total.gather(1, self.into)


@dataclass(frozen=True)
class _Draft:
    """Tokens while their plan is made, [B, N] each; the metric is [B, N, E]."""

    size: Tensor
    keep: Tensor
    origin: Tensor
    importance: Tensor
    merge_penalty: Tensor | None
    metric: Tensor


def make_plan(
    tokens: Tokens, scores: BlockScores, policy: Policy, block: int, steps: tuple[str, ...], protected: int
) -> BlockPlan:
    """Decide what happens to every token of a block (paper, section 3.2).

    Args:
        tokens: state at this block, [B, N].
        scores: a metric to merge by, importance to prune by; a merge penalty of None is 1.
        policy: selects the tokens of block number `block`.
        steps: which of "merge", "prune" and "fuse", in order.
        protected: the first `protected` tokens of the input are never merged away, never receive, are never pruned.

    Returns:
        The plan; `plan.tokens.keep` carries the gradient of the two thresholds.
    """
    images, length = tokens.keep.shape
    place = torch.arange(length, device=tokens.keep.device)
    into = order = place.expand(images, length)
    there = tokens.keep.detach()
    importance = there if scores.importance is None else scores.importance.detach()
    metric = there[..., None] if scores.metric is None else scores.metric
    state = _Draft(tokens.size, tokens.keep, tokens.origin, importance, scores.merge_penalty, metric)
    weight, turn = tokens.size, place
    for step in steps:
        if step == "prune":
            state = _prune(state, policy, block, protected)
        elif step == "fuse":
            state, into, weight = _fuse(state, policy, block, protected)
        elif length > 1:
            if step is not steps[0]:
                # parity is taken among those that are left
                order = _live_first(state.keep, turn)
                state = take_all(state, order)
            state, receiver = _merge(state, policy, block, protected)
            into = into.scatter(1, order, order.gather(1, receiver))
            if not policy.config.scores.mutual:
                # evens, then odds; but a block that cannot merge keeps its order, because deployment skips the step
                evens_first = place // 2 + place % 2 * ((length + 1) // 2)
                turn = torch.where(policy.on()[block, 0], evens_first, place)
    last = _live_first(state.keep, turn)
    after = Tokens(*(take(t, last) for t in (state.size, state.keep, state.origin)))
    order = order.gather(1, last)
    if tokens.source is not None:
        after = replace(after, source=follow(tokens.source, into, order, after.live, block))
    return BlockPlan(after, order, into, weight)


def _live_first(keep: Tensor, turn: Tensor) -> Tensor:
    """int64 [B, N], the order with the live tokens first, each part by turn [N]."""
    return (turn + len(turn) * (keep <= 0)).argsort(dim=1)


def _merge(state: _Draft, policy: Policy, block: int, protected: int) -> tuple[_Draft, Tensor]:
    """Merge each selected token into its partner: even tokens into odd ones, or the later of a pair into the earlier.

    Returns:
        The state, every token still in its place, and int64 [B, N]: the place that each merges into, or its own.
    """
    free = (state.keep > 0) & (state.origin >= protected)
    asked, best, receiver = candidates(state.metric, free, policy.config.scores.mutual, state.merge_penalty)
    gone = policy.select("merge", block, best, best > float("-inf"), state.keep.detach().sum(1))
    moved = gone.detach()
    size = state.size.scatter_add(1, receiver, state.size[:, asked] * moved)
    arriving = state.importance[:, asked].masked_fill(moved == 0, float("-inf"))
    importance = state.importance.scatter_reduce(1, receiver, arriving, "amax")
    leaving = torch.zeros_like(state.keep)
    leaving[:, asked] = gone
    into = torch.arange(free.shape[1], device=free.device).repeat(len(free), 1)
    into[:, asked] = torch.where(moved > 0, receiver, into[:, asked])
    return replace(state, size=size, importance=importance, keep=state.keep * (1 - leaving)), into


def _prune(state: _Draft, policy: Policy, block: int, protected: int, step: str = "prune") -> _Draft:
    """Remove the tokens that `policy` does not keep; the others stay in order (paper, section 3.3)."""
    spared = state.origin < protected
    if protected == 0:
        # without a prefix token an image could lose every token: its most important one stays
        top = state.importance.masked_fill(state.keep <= 0, float("-inf")).argmax(1, keepdim=True)
        spared = spared.scatter(1, top, True)
    free = (state.keep > 0) & ~spared
    kept = policy.select(step, block, state.importance, free, state.keep.detach().sum(1))
    return replace(state, keep=state.keep * kept.masked_fill(spared, 1.0))


def _fuse(state: _Draft, policy: Policy, block: int, protected: int) -> tuple[_Draft, Tensor, Tensor]:
    """Fuse what pruning would drop into one token, weighted by importance (Liang et al., ICLR 2022, equation 5).

    Returns:
        The state, and `into` and `weight` of the plan.
    """
    after = _prune(state, policy, block, protected, "fuse")
    dropped = (state.keep > 0) & (after.keep <= 0)
    first = rank(state.importance, dropped) == 0
    receiver = first.int().argmax(1, keepdim=True)
    place = torch.arange(dropped.shape[1], device=dropped.device).expand_as(dropped)
    into = torch.where(dropped, receiver, place)
    size = torch.where(first, (state.size * dropped).sum(1, keepdim=True), state.size)
    weight = torch.where(dropped, state.importance.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return replace(after, size=size, keep=torch.where(first, state.keep, after.keep)), into, weight


def fold(x: Tensor, plan: BlockPlan) -> Tensor:
    """Apply a plan to features: a receiver becomes the size-weighted mean of its group (paper, section 3.2).

    Args:
        x: [B, N, C] features before.

    Returns:
        [B, N, C] in the new order; a token that merged away stays unchanged in the masked tail.
    """
    merged, part = plan.merged[..., None], plan.part[..., None].to(x.dtype)
    arriving = torch.where(merged, x * part, 0)
    own = torch.where(merged, x, x * part)
    return take(own.scatter_add(1, plan.into[..., None].expand_as(x), arriving), plan.order)
