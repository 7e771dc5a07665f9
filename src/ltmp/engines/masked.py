"""Training: nothing is cut, what is gone is masked, so that gradients reach both thresholds of every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops.attend.reference import attend
from ..reduction import fold, make_plan, similarity_metric
from ..tokens import Reduced, Tokens, take

if TYPE_CHECKING:
    from ..stack import ReducedStack


def run(stack: ReducedStack, x: Tensor, active: tuple[tuple[bool, bool], ...]) -> Reduced:
    """Run all blocks on [B, N, C] with masks; see `ReducedStack`. Follows the host's gradient checkpointing."""
    tokens = Tokens.start(x.shape[0], x.shape[1], x.device)
    kept = []
    recompute = stack.grad_checkpointing and torch.is_grad_enabled()
    for i in range(stack.thresholds.depth):
        if recompute:
            x, tokens = checkpoint(_block, stack, i, x, tokens, active, use_reentrant=False)
        else:
            x, tokens = _block(stack, i, x, tokens, active)
        kept.append(tokens.counts())
    x, size = prefix_first(x, tokens, stack.protected)
    return Reduced(x, size, torch.stack(kept, 1))


def _block(
    stack: ReducedStack, i: int, x: Tensor, tokens: Tokens, active: tuple[tuple[bool, bool], ...]
) -> tuple[Tensor, Tokens]:
    recipe, block, thresholds = stack.recipe, stack.blocks[i], stack.thresholds
    q, k, v = recipe.qkv(block, x)
    y, importance = attend(q, k, v, tokens.size, tokens.keep)
    x = x + recipe.out(block, y.flatten(-2))
    steps = thresholds.steps(active, i)
    if steps:
        plan = make_plan(tokens, similarity_metric(k), importance, thresholds, i, steps, stack.protected)
        x, tokens = fold(x, tokens.size, plan), plan.tokens
    return x + recipe.mlp(block, x), tokens


def prefix_first(x: Tensor, tokens: Tokens, protected: int) -> tuple[Tensor, Tensor]:
    """Bring the prefix tokens back to where the host's head looks for them.

    Returns:
        x [B, N, C] and size float32 [B, N], 0 for rows that are gone; the size carries the gradient of keeping the row,
        for heads that pool rows.
    """
    size = tokens.size * tokens.keep
    if protected > 1:
        order = (tokens.origin - protected).clamp_(max=0).argsort(dim=1, stable=True)
        x, size = take(x, order), take(size, order)
    return x, size
