"""Whether the Triton engine makes the same decisions as the reference."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engines import packed
from ..engines.body import Body, running
from ..engines.positions import Positions
from ..engines.state import Reduced
from ..hosts.attach import attachment
from ..method.policy import Policy
from ..method.reduction import make_plan
from ..method.scores import attended_for, score
from ..method.tokens import Tokens

DECISIONS = 0.999
"""Least fraction of decisions that must equal the reference's, block by block on the same inputs."""


def under(policy: Policy, **settings: Any) -> Policy:
    """A copy of a policy with other settings, such as its engine; it shares the thresholds of the original."""
    changed = copy.copy(policy)
    changed.config = replace(policy.config, **settings)
    return changed


def entering(model: nn.Module, images: Tensor) -> tuple[Tensor, Positions | None]:
    """The input of an attached model's first block, [B, N, C], and the positions of its tokens."""
    inputs: list[tuple[Tensor, Positions | None]] = []

    def capture(body: Body, x: Tensor, positions: Positions | None) -> Reduced:
        inputs.append((x, positions))
        return body.dense_blocks(x, positions)

    body = attachment(model).body
    # tokens="reduced" makes all blocks run in one call of the engine
    with running(capture, body=replace(body, policy=under(body.policy, tokens="reduced"))):
        model(images)
    return inputs[0]


@torch.no_grad()
def decisions_agree(body: Body, x: Tensor) -> float:
    """Fraction of the Triton engine's decisions that equal the reference's on the engine's own inputs to each block.

    Args:
        x: [B, N, C], embedded tokens.

    Returns:
        Among the live tokens of all blocks that reduce, the fraction for which both decide alike: keep, drop, or merge
        into the same partner. 1 if no block reduces.
    """
    from ..engines import triton
    from ..ops.norm.triton import add_norm

    active = body.active()
    equal: list[Tensor] = []

    class Compared(triton.Pass):
        def block(self, i: int, rows: triton.Rows) -> triton.Rows:
            q, k, v = self.branches[i].qkv(rows)
            after = super().block(i, rows)
            planned = self.plans[i]
            if planned is not None:
                live = int(rows.cu[-1])
                slots = _reference_slots(body, i, active, rows, self.attended[:live], q[:live], k[:live], v[:live])
                equal.append(planned.slot[:live].clamp(max=0) == slots)
            return after

        def _reduce(self, i: int, steps: Any, rows: triton.Rows, y: Any, *rest: Any) -> triton.Rows:
            self.attended = add_norm(rows.x, y, self.branches[i].scales[0], None)[0]
            return super()._reduce(i, steps, rows, y, *rest)

    Compared(body, x, active).run()
    return torch.cat(equal).double().mean().item() if equal else 1.0


def _reference_slots(
    body: Body, block: int, active: Any, rows: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """The reference decision for each row: 0 kept, -1 dropped, -2 - i merged into the token at position i.

    Args:
        x: [T, C], tokens after the block's attention.
        q, k, v: [T, H, D].
    """
    from ..engines.planned import slots

    counts = rows.cu.diff().tolist()
    pad, live = partial(packed.pad, counts=counts), sum(counts)
    size, origin = (pad(t[:live]) for t in (rows.size, rows.origin.long()))
    present = torch.arange(size.shape[1], device=size.device) < rows.cu.diff()[:, None]
    tokens = Tokens(torch.where(present, size, 1.0), present.float(), origin)
    weight = body.policy.weight(block, tokens.size)
    _, received = packed.attend_to(q, k, v, weight, tokens.keep, counts, True)
    assert received is not None
    attended = attended_for(body.policy, block, pad(q), pad(k), tokens)
    steps = body.policy.steps(active, block)
    scores = score(body.policy, block, steps, tokens, body.protected, x, k, pad(received), attended, pad)
    plan = make_plan(tokens, scores, body.policy, block, steps, body.protected)
    return packed.rows(slots(plan).clamp(max=0), counts)
