"""Plans on packed rows for what the kernels do not support: fixed rates, floors, ceilings, other kinds of importance.

A few numbers per token are padded to images, planned by the definition (`reduction.make_plan`) and packed again: plain
torch on the device, at sizes known in advance and without synchronization, so that a CUDA graph can record it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..method import reduction, scores
from ..method.policy import Policy
from ..method.tokens import Tokens
from ..ops.match import reference, triton
from ..ops.plan.triton import RowPlan
from .rows import Padding, locate_rows, tokens_of

if TYPE_CHECKING:
    from .rows import Rows


def slots(plan: reduction.BlockPlan) -> Tensor:
    """Convert a plan of one merge step to the layout of the kernels, int64 [B, N]: `ops.plan.triton.RowPlan.slot`."""
    place = torch.arange(plan.order.shape[1], device=plan.order.device).expand_as(plan.order)
    stays = torch.zeros_like(place).scatter(1, plan.order, torch.where(plan.tokens.live, place, -1))
    return torch.where(plan.merged, -2 - plan.into, stays)


def metric_rows(policy: Policy, k: Tensor, cu: Tensor) -> Tensor:
    """Return float32 unit vectors whose dot products are similarities: [T, H D] if all heads count, else [T, D]."""
    if policy.config.scores.averages_keys:
        return triton.similarity_metric(k, cu).flatten(1)
    # the metric of a probe is passed as the keys of a single head
    return reference.similarity_metric(k, "heads")


def plan_rows(
    policy: Policy, block: int, steps: tuple[str, ...], rows: Rows, q: Tensor, k: Tensor, keys: Tensor,
    received: Tensor | None, protected: int, stats: Tensor, room: int | None, penalty: Tensor | None = None,
) -> tuple[RowPlan, reduction.BlockPlan]:  # fmt: skip
    """`ops.plan.triton.plan` for any policy; also returns the plan in the layout of the definition.

    Args:
        q, k: [T, H, D], used only to prune by class-token attention.
        keys: [T, H, D], keys for the similarity.
        received: float32 [H, T], or [1, T] from `ops.weigh.triton`, or None.
        penalty: float32 [T], merge penalty from `ops.weigh.triton`, or None.
        protected, stats, room: as in the kernel.
    """
    padding = Padding.of(rows.cu, rows.longest, rows.x.shape[0])
    tokens = tokens_of(rows, padding)
    metric = importance = None
    if "merge" in steps:
        metric = padding.pad(metric_rows(policy, keys, rows.cu))
    if steps != ("merge",):
        importance = _importance(policy, block, padding, tokens, rows.cu, q, k, received)
    if penalty is not None:
        penalty = padding.pad(penalty, 1.0)
    block_scores = scores.BlockScores(metric, importance, penalty)
    plan = reduction.make_plan(tokens, block_scores, policy, block, steps, protected)
    counts = plan.tokens.counts().int()
    stats[:2].copy_(torch.stack([counts.sum(), counts.max()]))
    most = rows.x.shape[0] if room is None else room
    cu = torch.cat([counts.new_zeros(1), counts.cumsum(0).clamp(max=most).int()])
    size = torch.empty_like(plan.tokens.size).scatter(1, plan.order, plan.tokens.size)
    slot = slots(plan)
    image, place = locate_rows(rows)
    return RowPlan(slot[image, place].int(), size[image, place], cu), plan


def fuse_rows(x: Tensor, rows: Rows, plan: reduction.BlockPlan) -> Tensor:
    """Return `x` [T, C] with the mean of the fused tokens in the row of their receiver, summed in a fixed order."""
    padding = Padding.of(rows.cu, rows.longest, x.shape[0])
    receiver = plan.into.gather(1, plan.merged.int().argmax(1, keepdim=True))
    group = (plan.into == receiver) & padding.live & plan.merged.any(1, keepdim=True)
    mean = ((plan.part * group).to(x.dtype)[:, None] @ padding.pad(x))[:, 0]
    row = padding.at.gather(1, receiver)[:, 0]
    return x.index_copy(0, row, torch.where(group.any(1, keepdim=True), mean, x[row]))


def _importance(
    policy: Policy, block: int, padding: Padding, tokens: Tokens, cu: Tensor, q: Tensor, k: Tensor,
    received: Tensor | None,
) -> Tensor | None:  # fmt: skip
    if received is not None:
        return padding.pad(received.sum(0)) / (received.shape[0] * cu.diff()[:, None])
    attended = None
    if policy.config.needs_class_attention:
        # only the class token's query is needed
        attended = scores.attended_for(policy, block, q[padding.at[:, :1]], k[padding.at], tokens)
    return scores.importance(policy, block, scores.Signals(tokens, attended=attended))
