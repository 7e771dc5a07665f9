"""Plans on packed rows for what the kernels do not know (fixed rates, floors, other importance), by the definition.

A few numbers a token are padded to images, planned by `reduction.make_plan` and brought back to rows: plain torch on
the device, at sizes known beforehand, nothing read by the host, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..method import reduction, scores
from ..method.policy import Policy
from ..method.tokens import Tokens
from ..ops.match import reference, triton
from ..ops.plan.triton import Plan
from .rows import Padding, _where, tokens_of

if TYPE_CHECKING:
    from .rows import Rows


def slots(plan: reduction.Plan) -> Tensor:
    """int64 [B, N], a plan of one merge step as the kernels write it: `ops.plan.triton.Plan.slot`."""
    place = torch.arange(plan.order.shape[1], device=plan.order.device).expand_as(plan.order)
    stays = torch.zeros_like(place).scatter(1, plan.order, torch.where(plan.tokens.live, place, -1))
    return torch.where(plan.merged, -2 - plan.into, stays)


def metric_rows(policy: Policy, k: Tensor, cu: Tensor) -> Tensor:
    """float32 [T, D], or [T, H D] where all heads count, of length one: what is compared of keys [T, H, D]."""
    kind = policy.config.similarity
    return triton.similarity_metric(k, cu).flatten(1) if kind == "mean" else reference.similarity_metric(k, kind)


def plan_rows(
    policy: Policy, block: int, steps: tuple[str, ...], rows: Rows, q: Tensor, k: Tensor, keys: Tensor,
    received: Tensor | None, protected: int, stats: Tensor, room: int | None, reluctance: Tensor | None = None,
) -> tuple[Plan, reduction.Plan]:  # fmt: skip
    """`ops.plan.triton.plan` for any policy, with the definition's own plan beside it.

    Args:
        q, k: [T, H, D]; read only where tokens are dropped by the class token's attention.
        keys: [T, H, D], what similarity is measured on.
        received: float32 [H, T], or [1, T] with the class token's say in it, or None. The others are as in the kernel.
        reluctance: float32 [T], from `ops.match.triton.class_rows` or `ops.probe.triton.matter_rows`, or None.
    """
    padding = Padding.of(rows.cu, rows.longest, rows.x.shape[0])
    tokens = tokens_of(rows, padding)
    metric = importance = None
    if "merge" in steps:
        metric = padding.pad(metric_rows(policy, keys, rows.cu))
    if steps != ("merge",):
        importance = _importance(policy, block, padding, tokens, rows.cu, q, k, received)
    if reluctance is not None:
        reluctance = padding.pad(reluctance, 1.0)
    given = scores.Scores(metric, importance, reluctance)
    plan = reduction.make_plan(tokens, given, policy, block, steps, protected)
    counts = plan.tokens.counts().int()
    stats[:2].copy_(torch.stack([counts.sum(), counts.max()]))
    most = rows.x.shape[0] if room is None else room
    cu = torch.cat([counts.new_zeros(1), counts.cumsum(0).clamp(max=most).int()])
    size = torch.empty_like(plan.tokens.size).scatter(1, plan.order, plan.tokens.size)
    slot = slots(plan)
    if "fuse" in steps:
        slot = torch.where(plan.merged, -1, slot)
    image, place = _where(rows)
    return Plan(slot[image, place].int(), size[image, place], cu), plan


def fuse_rows(x: Tensor, rows: Rows, plan: reduction.Plan) -> Tensor:
    """`x` [T, C] with the mean of what is fused in its receiver's row, added up in a fixed order."""
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
    if policy.config.asks_class:
        # of the queries only the class token's is read
        attended = scores.attended_for(policy, block, q[padding.at[:, :1]], k[padding.at], tokens)
    return scores.importance_for(policy, block, None, attended, tokens)
