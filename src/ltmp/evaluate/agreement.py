"""Whether two engines decide alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engines import packed, select
from ..hosts.stack import ReducedStack
from ..method.reduction import make_plan
from ..method.scores import attended_for, score
from ..method.tokens import Tokens

DECISIONS = 0.999
"""Share of decisions that must equal the reference's, block by block on the same inputs."""


@torch.no_grad()
def decisions_agree(stack: ReducedStack, x: Tensor) -> float:
    """Share of equal decisions of the Triton engine and the method's definition, each block on the engine's own inputs.

    Args:
        x: [B, N, C] embedded tokens.

    Returns:
        Of all live tokens of all blocks that reduce, how many are kept, dropped or merged into the same partner alike.
    """
    from ..engines import triton
    from ..ops.norm.triton import add_norm

    active = select.active(stack.thresholds)
    equal: list[Tensor] = []

    class Compared(triton.Pass):
        def block(self, i: int, rows: triton.Rows) -> triton.Rows:
            q, k, v = self.branches[i].qkv(rows)
            after = super().block(i, rows)
            planned = self.plans[i]
            if planned is not None:
                live = int(rows.cu[-1])
                wanted = _reference_slots(stack, i, active, rows, self.attended[:live], q[:live], k[:live], v[:live])
                equal.append(planned.slot[:live].clamp(max=0) == wanted)
            return after

        def _reduce(self, i: int, steps: Any, rows: triton.Rows, y: Any, *rest: Any) -> triton.Rows:
            self.attended = add_norm(rows.x, y, self.branches[i].scales[0], None)[0]
            return super()._reduce(i, steps, rows, y, *rest)

    Compared(stack, x, active).run()
    return torch.cat(equal).double().mean().item() if equal else 1.0


def _reference_slots(
    stack: ReducedStack, block: int, active: Any, rows: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """What the definition does with each row: 0 kept, -1 dropped, -2 - i merged into the token at place i.

    Args:
        x: [T, C], what the block's attention left; q, k, v: [T, H, D].
    """
    from ..engines.planned import slots

    counts = rows.cu.diff().tolist()
    pad, live = partial(packed.pad, counts=counts), sum(counts)
    size, origin = (pad(t[:live]) for t in (rows.size, rows.origin.long()))
    there = torch.arange(size.shape[1], device=size.device) < rows.cu.diff()[:, None]
    tokens = Tokens(torch.where(there, size, 1.0), there.float(), origin)
    weight = stack.thresholds.weight(block, tokens.size)
    _, received = packed.attend_to(q, k, v, weight, tokens.keep, counts, True)
    assert received is not None
    attended = attended_for(stack.thresholds, block, pad(q), pad(k), tokens)
    steps = stack.thresholds.steps(active, block)
    scores = score(stack.thresholds, block, steps, tokens, stack.protected, x, k, pad(received), attended, pad)
    plan = make_plan(tokens, scores, stack.thresholds, block, steps, stack.protected)
    return packed.rows(slots(plan).clamp(max=0), counts)
