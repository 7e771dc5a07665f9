"""Inference in plain torch, on any device: linear layers run over the live tokens of the batch only."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..method.policy import Active
from ..method.reduction import BlockPlan, make_plan
from ..method.scores import attended_for, score
from ..method.tokens import Tokens, take
from ..ops.attend.reference import attend, attend_rows
from . import compiled
from .body import Body
from .onednn import halves
from .plain import look
from .positions import Positions
from .rows import by_image, finish, first_rows, pad, rows
from .state import Reduced, State


def run(body: Body, x: Tensor, active: Active, positions: Positions | None = None) -> Reduced:
    """Run all blocks on [B, N, C], dropping removed tokens; see `Run`. Delegates to `compiled` if that applies."""
    block_halves = compiled.applicable_halves(body, x)
    if block_halves is not None:
        return compiled.run(body, x, active, positions, block_halves)
    state = State.start(x, packs=True, positions=positions)
    for i in range(body.depth):
        state = step(body, i, state, active)
    x = state.x if state.x.ndim == 3 else pad(state.x, _counts(state))
    kept = torch.tensor(state.kept, dtype=torch.float32, device=x.device).T
    return finish(state, x, kept, body.protected)


def step(body: Body, i: int, state: State, active: Active) -> State:
    """Run block `i` on the live tokens."""
    recipe, block, policy = body.recipe, body.blocks[i], body.policy
    x, tokens, counts = state.x, state.tokens, _counts(state)
    steps = policy.steps(active, i)
    if not steps and x.ndim == 3:
        # nothing is removed up to here: run the host's own block, with its fused attention
        return state.after(body.dense_block(i, x, state.positions), tokens, counts)
    x = x.reshape(-1, x.shape[-1])
    facts = look(body.memory, recipe, (block,))
    half, drops = halves(recipe, (block,), x, facts)[0], facts.drops_branches()
    q, k, v = half.qkv(x)
    if state.positions is not None:
        q, k = state.positions.rotate(i, block, q, k, rows(tokens.origin, counts))
    weight = policy.weight(i, tokens.size)
    bias = None if state.bias is None else state.bias(tokens.origin)
    need_importance = policy.config.scores.needs_received(steps)
    y, received = attend_to(q, k, v, weight, tokens.keep, counts, need_importance, bias)
    y = y.flatten(-2)
    x = x + by_image(partial(recipe.out, block), y, counts) if drops else half.out(x, y)
    if steps:
        attended = None
        if policy.config.needs_class_attention:
            # only the class token's query is needed
            first = q[first_rows(counts, x.device)][:, None]
            attended = attended_for(policy, i, first, pad(k, counts), tokens)
        received = None if received is None else pad(received, counts)
        to_images = partial(pad, counts=counts)
        scores = score(policy, i, steps, tokens, body.protected, x, k, received, attended, to_images)
        plan = make_plan(tokens, scores, policy, i, steps, body.protected)
        state = state.save_dropped(i, x, plan.tokens)
        x, tokens, counts = _fold_rows(x, counts, plan)
    x = x + by_image(partial(recipe.mlp, block), x, counts) if drops else half.mlp(x)
    return state.after(x, tokens, counts)


def _counts(state: State) -> list[int]:
    assert state.counts is not None
    return state.counts


def attend_to(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    keep: Tensor,
    counts: list[int],
    need_importance: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention on packed rows, and the attention that each token receives if `need_importance`.

    On a CPU it runs image by image, so that an attention map fits the cache; elsewhere on padded images, to fill the
    device.

    Args:
        bias: added to the attention scores of padded images, see `ops.attend.reference.attend`.
    """
    if q.device.type == "cpu" and bias is None:
        return attend_rows(q, k, v, rows(weight, counts), counts, need_importance)
    padded_q, padded_k, padded_v = (pad(t.flatten(1), counts).unflatten(-1, t.shape[1:]) for t in (q, k, v))
    out, importance = attend(padded_q, padded_k, padded_v, weight, keep, bias)
    return rows(out.flatten(2), counts).unflatten(-1, q.shape[1:]), rows(importance, counts)


def _fold_rows(x: Tensor, counts: list[int], plan: BlockPlan) -> tuple[Tensor, Tokens, list[int]]:
    """`reduction.fold` on packed rows: surviving rows are gathered, and only merged rows are summed.

    Args:
        x: [T, C].
        counts: tokens of each image before the fold.

    Returns:
        x [T', C], the tokens cut to the longest image, and the new counts.
    """
    left = [int(n) for n in plan.tokens.counts().tolist()]
    first = first_rows(counts, x.device)[:, None]
    live = plan.tokens.live
    old_row = (plan.order + first)[live]
    out = x.index_select(0, old_row)
    image, place = plan.merged.nonzero(as_tuple=True)
    if len(image):
        # a receiver may itself have been dropped, together with what merged into it
        new_row = torch.full((len(x),), -1, device=x.device).scatter(
            0, old_row, torch.arange(len(out), device=x.device)
        )
        receiver = new_row[(plan.into + first)[image, place]]
        part = plan.part
        weight = part[image, place] * (receiver >= 0)
        moved = x.index_select(0, first[image, 0] + place) * weight[:, None].to(x.dtype)
        own = take(part, plan.order)[live]
        out = (out * own[:, None].to(x.dtype)).index_add(0, receiver.clamp_min(0), moved)
    longest, after = max(left), plan.tokens
    cut = Tokens(after.size[:, :longest], after.keep[:, :longest], after.origin[:, :longest], after.source)
    return out, cut, left
