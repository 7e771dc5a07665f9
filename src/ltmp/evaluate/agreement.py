"""Whether two engines decide alike."""

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
"""Share of decisions that must equal the reference's, block by block on the same inputs."""


def under(policy: Policy, **settings: Any) -> Policy:
    """A policy with the same thresholds, shared and not copied, that has other settings, such as its engine."""
    other = copy.copy(policy)
    other.config = replace(policy.config, **settings)
    return other


def entering(model: nn.Module, images: Tensor) -> tuple[Tensor, Positions | None]:
    """The input of an attached model's first block, [B, N, C], and the positions of its tokens."""
    found: list[tuple[Tensor, Positions | None]] = []

    def keep(body: Body, x: Tensor, positions: Positions | None) -> Reduced:
        found.append((x, positions))
        return body.all_whole(x, positions)

    body = attachment(model).body
    # in one pass through all blocks, whatever form the host gets
    with running(keep, body=replace(body, policy=under(body.policy, tokens="reduced"))):
        model(images)
    return found[0]


@torch.no_grad()
def decisions_agree(body: Body, x: Tensor) -> float:
    """Share of equal decisions of the Triton engine and the method's definition, each block on the engine's own inputs.

    Args:
        x: [B, N, C] embedded tokens.

    Returns:
        Of all live tokens of all blocks that reduce, how many are kept, dropped or merged into the same partner alike.
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
                wanted = _reference_slots(body, i, active, rows, self.attended[:live], q[:live], k[:live], v[:live])
                equal.append(planned.slot[:live].clamp(max=0) == wanted)
            return after

        def _reduce(self, i: int, steps: Any, rows: triton.Rows, y: Any, *rest: Any) -> triton.Rows:
            self.attended = add_norm(rows.x, y, self.branches[i].scales[0], None)[0]
            return super()._reduce(i, steps, rows, y, *rest)

    Compared(body, x, active).run()
    return torch.cat(equal).double().mean().item() if equal else 1.0


def _reference_slots(
    body: Body, block: int, active: Any, rows: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """The reference decision for each row: 0 kept, -1 dropped, -2 - i merged into the token at place i.

    Args:
        x: [T, C], what the block's attention left; q, k, v: [T, H, D].
    """
    from ..engines.planned import slots

    counts = rows.cu.diff().tolist()
    pad, live = partial(packed.pad, counts=counts), sum(counts)
    size, origin = (pad(t[:live]) for t in (rows.size, rows.origin.long()))
    there = torch.arange(size.shape[1], device=size.device) < rows.cu.diff()[:, None]
    tokens = Tokens(torch.where(there, size, 1.0), there.float(), origin)
    weight = body.policy.weight(block, tokens.size)
    _, received = packed.attend_to(q, k, v, weight, tokens.keep, counts, True)
    assert received is not None
    attended = attended_for(body.policy, block, pad(q), pad(k), tokens)
    steps = body.policy.steps(active, block)
    scores = score(body.policy, block, steps, tokens, body.protected, x, k, pad(received), attended, pad)
    plan = make_plan(tokens, scores, body.policy, block, steps, body.protected)
    return packed.rows(slots(plan).clamp(max=0), counts)
