"""Which patch became which token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import stack_of
from ..reduction import WATCHED, Plan
from ..stack import record
from ..tokens import Tokens

GONE = -1


@torch.inference_mode()
def patch_groups(model: nn.Module, images: Tensor) -> Tensor:
    """Follow every token of `images` through the blocks of an attached model.

    Args:
        model: attached, in evaluation mode.
        images: [B, C, H, W].

    Returns:
        int64 [B, L, N]: after each block, the input place of the token that each input token is part of; itself where
        it stands alone, -1 where it was pruned. Prefix tokens come first.

    Raises:
        LTMPError: nothing is attached.
    """
    depth = stack_of(model).thresholds.depth
    token = WATCHED.set([])
    try:
        with record() as calls:
            model(images)
        plans = {block: (before, plan) for block, before, plan in WATCHED.get() or []}
    finally:
        WATCHED.reset(token)
    group = torch.arange(calls.geometry[0].tokens, device=images.device).repeat(len(images), 1)
    after = []
    for block in range(depth):
        if block in plans:
            group = _follow(group, *plans[block])
        after.append(group)
    return torch.stack(after, 1)


def _follow(group: Tensor, before: Tokens, plan: Plan) -> Tensor:
    """One block further: [B, N] input places, -1 gone."""
    images, tokens = group.shape
    # one column more, for places that hold no live token and for groups that are gone
    into = torch.full((images, tokens + 1), GONE, device=group.device)
    origin = before.origin.masked_fill(~before.live, tokens)
    into.scatter_(1, origin, before.origin.gather(1, plan.into))
    survives = torch.zeros(images, tokens + 1, dtype=torch.bool, device=group.device)
    survives.scatter_(1, plan.tokens.origin.masked_fill(~plan.tokens.live, tokens), True)
    survives[:, tokens] = False
    moved = into.gather(1, group.masked_fill(group == GONE, tokens))
    moved = moved.masked_fill(group == GONE, GONE)
    return moved.masked_fill(~survives.gather(1, moved.masked_fill(moved == GONE, tokens)), GONE)
