"""The method itself: which tokens merge, which are pruned, and the order of those that remain.

A plan is made from a few numbers per token, [B, N]; engines apply it to features in their own layout. Training and
deployment make the same plan: training keeps removed tokens as a masked tail and deployment cuts the tail off, so that
the parity of the live tokens is the same in both (paper, section 3).
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
    """The reduction of one block.

    Attributes:
        tokens: the state after the reduction, live tokens first.
        order: int64 [B, N], for each new position the old position of its token.
        into: int64 [B, N], for each old position the old position that its token is merged into, or its own.
        weight: float32 [B, N], by old position: the weight of each token in the mean of the group it merges in.
    """

    tokens: Tokens
    order: Tensor
    into: Tensor
    weight: Tensor

    @property
    def merged(self) -> Tensor:
        """bool [B, N], by old position: whether the token merged into another."""
        return self.into != torch.arange(self.into.shape[1], device=self.into.device)

    @property
    def part(self) -> Tensor:
        """float32 [B, N], by old position: the token's share of its new token, 1 if nothing else merged into that."""
        total = self.weight.scatter_add(1, self.into, self.weight * self.merged)
        return self.weight / total.gather(1, self.into)


@dataclass(frozen=True)
class _PlanState:
    """Tokens while their plan is being made, [B, N] each; the metric is [B, N, E]."""

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
        scores: a metric to merge by and importance to prune by; a merge penalty of None is 1.
        policy: selects the tokens of block number `block`.
        steps: those of "merge", "prune" and "fuse" that the block runs, in order.
        protected: the first `protected` tokens of the input are never merged, never receive, and are never pruned.

    Returns:
        The plan; `plan.tokens.keep` carries the gradient of the two thresholds.
    """
    images, length = tokens.keep.shape
    position = torch.arange(length, device=tokens.keep.device)
    into = order = position.expand(images, length)
    unused = tokens.keep.detach()
    importance = unused if scores.importance is None else scores.importance.detach()
    metric = unused[..., None] if scores.metric is None else scores.metric
    state = _PlanState(tokens.size, tokens.keep, tokens.origin, importance, scores.merge_penalty, metric)
    weight, rank_in_order = tokens.size, position
    for step in steps:
        if step == "prune":
            state = _prune(state, policy, block, protected)
        elif step == "fuse":
            state, into, weight = _fuse(state, policy, block, protected)
        elif length > 1:
            if step is not steps[0]:
                # parity is that of the remaining tokens
                order = _live_first(state.keep, rank_in_order)
                state = take_all(state, order)
            state, receiver = _merge(state, policy, block, protected)
            into = into.scatter(1, order, order.gather(1, receiver))
            if not policy.config.scores.mutual:
                # evens, then odds; but a block that cannot merge keeps its order, because deployment skips the step
                evens_first = position // 2 + position % 2 * ((length + 1) // 2)
                rank_in_order = torch.where(policy.on()[block, 0], evens_first, position)
    final = _live_first(state.keep, rank_in_order)
    after = Tokens(*(take(t, final) for t in (state.size, state.keep, state.origin)))
    order = order.gather(1, final)
    if tokens.source is not None:
        after = replace(after, source=follow(tokens.source, into, order, after.live, block))
    return BlockPlan(after, order, into, weight)


def _live_first(keep: Tensor, rank_in_order: Tensor) -> Tensor:
    """int64 [B, N], the permutation that puts live tokens first, and sorts both parts by `rank_in_order` [N]."""
    return (rank_in_order + len(rank_in_order) * (keep <= 0)).argsort(dim=1)


def _merge(state: _PlanState, policy: Policy, block: int, protected: int) -> tuple[_PlanState, Tensor]:
    """Merge each selected token into its partner: even tokens into odd ones, or the later of a pair into the earlier.

    Returns:
        The state, every token still in its position, and int64 [B, N]: the position each merges into, or its own.
    """
    free = (state.keep > 0) & (state.origin >= protected)
    mergeable, best, receiver = candidates(state.metric, free, policy.config.scores.mutual, state.merge_penalty)
    selected = policy.select("merge", block, best, best > float("-inf"), state.keep.detach().sum(1))
    merges = selected.detach()
    size = state.size.scatter_add(1, receiver, state.size[:, mergeable] * merges)
    arriving = state.importance[:, mergeable].masked_fill(merges == 0, float("-inf"))
    importance = state.importance.scatter_reduce(1, receiver, arriving, "amax")
    removed = torch.zeros_like(state.keep)
    removed[:, mergeable] = selected
    into = torch.arange(free.shape[1], device=free.device).repeat(len(free), 1)
    into[:, mergeable] = torch.where(merges > 0, receiver, into[:, mergeable])
    return replace(state, size=size, importance=importance, keep=state.keep * (1 - removed)), into


def _prune(state: _PlanState, policy: Policy, block: int, protected: int, step: str = "prune") -> _PlanState:
    """Remove the tokens that `policy` does not keep; the others stay in order (paper, section 3.3)."""
    spared = state.origin < protected
    if protected == 0:
        # without a prefix token an image could lose every token: keep its most important one
        top = state.importance.masked_fill(state.keep <= 0, float("-inf")).argmax(1, keepdim=True)
        spared = spared.scatter(1, top, True)
    free = (state.keep > 0) & ~spared
    kept = policy.select(step, block, state.importance, free, state.keep.detach().sum(1))
    return replace(state, keep=state.keep * kept.masked_fill(spared, 1.0))


def _fuse(state: _PlanState, policy: Policy, block: int, protected: int) -> tuple[_PlanState, Tensor, Tensor]:
    """Merge the tokens that pruning would drop into one, weighted by importance (Liang et al., ICLR 2022, equation 5).

    Returns:
        The state, and `into` and `weight` of the plan.
    """
    after = _prune(state, policy, block, protected, "fuse")
    dropped = (state.keep > 0) & (after.keep <= 0)
    first = rank(state.importance, dropped) == 0
    receiver = first.int().argmax(1, keepdim=True)
    position = torch.arange(dropped.shape[1], device=dropped.device).expand_as(dropped)
    into = torch.where(dropped, receiver, position)
    size = torch.where(first, (state.size * dropped).sum(1, keepdim=True), state.size)
    weight = torch.where(dropped, state.importance.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return replace(after, size=size, keep=torch.where(first, state.keep, after.keep)), into, weight


def fold(x: Tensor, plan: BlockPlan) -> Tensor:
    """Apply a plan to features: a receiver becomes the weighted mean of its group (paper, section 3.2).

    Args:
        x: [B, N, C] features before.

    Returns:
        [B, N, C] in the new order; a token that merged into another is unchanged in the masked tail.
    """
    merged, share = plan.merged[..., None], plan.part[..., None].to(x.dtype)
    arriving = torch.where(merged, x * share, 0)
    staying = torch.where(merged, x, x * share)
    return take(staying.scatter_add(1, plan.into[..., None].expand_as(x), arriving), plan.order)
