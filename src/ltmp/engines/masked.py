"""The training engine: removed tokens are masked instead of cut, so that gradients reach every threshold."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..method.policy import Active
from ..method.reduction import fold, make_plan
from ..method.scores import attended_for, score
from ..ops.attend.reference import attend
from .body import Body
from .positions import Positions
from .rows import finish
from .state import Reduced, State


def run(body: Body, x: Tensor, active: Active, positions: Positions | None = None) -> Reduced:
    """Run all blocks on [B, N, C], masking removed tokens; see `Run`."""
    state = State.start(x, packs=False, positions=positions)
    for i in range(body.depth):
        state = step(body, i, state, active)
    return finish(state, state.x, torch.stack(state.kept, 1), body.protected)


def step(body: Body, i: int, state: State, active: Active) -> State:
    """Run block `i`, with gradient checkpointing if the host uses it."""
    if body.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(_block, body, i, state, active, use_reentrant=False)
    return _block(body, i, state, active)


def _block(body: Body, i: int, state: State, active: Active) -> State:
    recipe, block, policy = body.recipe, body.blocks[i], body.policy
    x, tokens = state.x, state.tokens
    q, k, v = recipe.qkv(block, x)
    if state.positions is not None:
        q, k = state.positions.rotate(i, block, q, k, tokens.origin)
    bias = None if state.bias is None else state.bias(tokens.origin)
    y, received = attend(q, k, v, policy.weight(i, tokens.size), tokens.keep, bias)
    x = x + recipe.out(block, y.flatten(-2))
    steps = policy.steps(active, i)
    if steps:
        attended = attended_for(policy, i, q, k, tokens)
        scores = score(policy, i, steps, tokens, body.protected, x, k, received, attended)
        plan = make_plan(tokens, scores, policy, i, steps, body.protected)
        state = state.save_dropped(i, x, plan.tokens)
        x, tokens = fold(x, plan), plan.tokens
    return state.after(x + recipe.mlp(block, x), tokens)
