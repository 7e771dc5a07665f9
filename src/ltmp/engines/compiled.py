"""The packed engine on a CPU with its plans compiled: what each block decides and folds is one call of a kernel.

Features are rows of torch; all else that is known of tokens are rows of NumPy. What the kernels do not know runs in
plain torch (`packed`), which computes the same: gradients, types other than float32, fusing (`evit`), policies made for
one purpose (calibration), and tokens that are unmerged block by block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..method.policy import Policy
from ..method.rates import Rates, noise
from ..method.thresholds import Thresholds
from ..method.tokens import Tokens
from ..ops.attend.rows import attend_images
from ..ops.compiled import unavailable
from ..ops.probe.reference import WIDTH
from ..ops.scratch import Scratch, scratch
from .masked import finish
from .onednn import halves, room, watched
from .positions import Positions
from .request import Active
from .rows import pad
from .state import Reduced, State

if TYPE_CHECKING:
    from ..hosts.stack import ReducedStack
    from ..ops.plan.numba import Cut, Steps

Array = np.ndarray[Any, Any]

_NOWHERE = 2**30
_NOTHING = np.empty(0, np.float32)
_UNREAD = np.empty((0, WIDTH + 2), np.float32)


def applies(policy: Policy, x: Tensor) -> bool:
    """Whether the kernels compute what `packed` would for `x` [B, N, C]."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and type(policy) in (Thresholds, Rates)
        and "fuse" not in policy.config.steps
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and not watched()
        and unavailable() is None
    )


@dataclass(frozen=True)
class Rows:
    """The live tokens of a batch between two blocks, one image after the other.

    Attributes:
        x: float32, [T, C] and spare rows of any values behind (`onednn.room`).
        size: float32 [T]; origin: int64 [T]; source: int32 [B, N], [B, 0] where nobody asks; see `Tokens`.
        counts: int64 [B], tokens of each image.
        merged: whether any size may be other than 1.
    """

    x: Tensor
    size: Array
    origin: Array
    counts: Array
    source: Array
    merged: bool = True

    @classmethod
    def start(cls, x: Tensor, traced: bool = False) -> Rows:
        """The tokens of x [B, N, C]."""
        images, length, width = x.shape
        origin = np.tile(np.arange(length), images)
        source = origin.astype(np.int32).reshape(images, length)[:, : length if traced else 0]
        rows = x.reshape(-1, width).contiguous()
        spare = room(len(rows), width) - len(rows)
        rows = torch.cat([rows, rows.new_zeros(spare, width)]) if spare else rows
        return cls(rows, np.ones(len(origin), np.float32), origin, np.full(images, length), source, False)

    def tokens(self) -> Tokens:
        """The same as [B, N]."""
        counts = self.counts.tolist()
        size, origin = (pad(torch.from_numpy(values), counts) for values in (self.size, self.origin))
        keep = torch.arange(size.shape[1]) < torch.from_numpy(self.counts)[:, None]
        source = torch.from_numpy(self.source) if self.source.shape[1] else None
        # rows that are not there are no prefix tokens
        return Tokens(size, keep.float(), origin.masked_fill(~keep, _NOWHERE), source)


def run(stack: ReducedStack, x: Tensor, active: Active, positions: Positions | None = None) -> Reduced:
    """Run all blocks on [B, N, C] of which `applies` is true; see `packed.run`."""
    policy, state = stack.thresholds, State.start(x, packs=True, positions=positions)
    i, planned = 0, plans(policy, active, stack.protected)
    while i < policy.depth and planned[i] is None:
        # nothing was reduced yet and nothing will be here: the host's own block, with its fused attention
        state = state.after(stack.whole(i, state.x, positions), state.tokens, state.counts)
        i += 1
    rows = Rows.start(state.x, state.tokens.source is not None)
    kept, trail = [*state.kept], state.trail
    for i in range(i, policy.depth):
        rows = _block(stack, i, rows, planned[i], positions)
        kept.append(rows.counts.tolist())
        trail = None if trail is None else (*trail, torch.from_numpy(rows.source))
    done = replace(state, tokens=rows.tokens(), trail=trail)
    left = pad(rows.x[: len(rows.size)], rows.counts.tolist())
    return finish(done, left, torch.tensor(kept, dtype=torch.float32).T, stack.protected)


def _block(stack: ReducedStack, i: int, rows: Rows, steps: Steps | None, positions: Positions | None) -> Rows:
    """Run block `i` on the live tokens."""
    block, policy, x, live = stack.blocks[i], stack.thresholds, rows.x, len(rows.size)
    half = halves(stack.recipe, block, x)
    q, k, v = half.qkv(x)
    if live < len(x):
        q, k, v = q[:live], k[:live], v[:live]
    if positions is not None:
        q, k = positions.rotate(i, block, q, k, torch.from_numpy(rows.origin))
    bias = policy.weight(i, torch.from_numpy(rows.size)).log() if rows.merged else None
    received = attended = None
    if steps is not None:
        received = _zeros("received", live) if steps.prunes and policy.config.by_received else None
        attended = _zeros("attended", live) if policy.config.asks_class else None
    sums = [None if found is None else found.tensor.as_strided((live,), (1,)) for found in (received, attended)]
    y = attend_images(q, k, v, bias, rows.counts.tolist(), *sums)
    if live < len(x):
        y = torch.cat([y, y.new_zeros(len(x) - live, y.shape[1])])
    x = x + half.out(y)
    if steps is not None:
        arrays = [None if found is None else found.array[:live] for found in (received, attended)]
        rows = reduce_rows(policy, steps, replace(rows, x=x), k, *arrays)
        x = rows.x
    return replace(rows, x=x + half.mlp(x))


def _zeros(name: str, size: int) -> Scratch:
    found = scratch(name, size)
    found.array[:size] = 0
    return found


def plans(policy: Policy, active: Active, protected: int) -> list[Steps | None]:
    """What each block does, None where that is nothing. Reads the thresholds once."""
    from ..ops.plan.numba import Steps

    merges, prunes = _cuts(policy, "merge"), _cuts(policy, "prune")
    steps = [policy.steps(active, i) for i in range(policy.depth)]
    mutual = policy.config.matching == "mutual"
    return [
        Steps("merge" in s, "prune" in s, s[0] == "prune", mutual, merge, prune, protected, i) if s else None
        for i, (s, merge, prune) in enumerate(zip(steps, merges, prunes, strict=True))
    ]


def _cuts(policy: Policy, step: str) -> list[Cut]:
    """How each block's `step` selects tokens."""
    from ..ops.plan.numba import Cut

    config = policy.config
    ceiling = config.ceiling if config.ceiling is not None and step == config.steps[-1] else -1
    if not isinstance(policy, Rates):
        values = (policy.merge if step == "merge" else policy.prune).tolist()  # type: ignore[union-attr]
        return [Cut(np.float32(value), floor=config.floor, ceiling=ceiling) for value in values]
    # a part for merging is one of the tokens of both parities, though only the even ones are asked
    halves_of = 2 if step == "merge" else 1
    return [
        Cut(np.float32(0), part=np.float32(halves_of * rate), floor=config.floor, ceiling=ceiling)
        if isinstance(rate, float)
        else Cut(np.float32(0), tokens=rate, floor=config.floor, ceiling=ceiling)
        for rate in policy.rates[step]
    ]


def reduce_rows(
    policy: Policy, steps: Steps, rows: Rows, k: Tensor, received: Array | None, attended: Array | None
) -> Rows:
    """Decide and fold: `method.reduction` on rows.

    Args:
        rows: with the features that the block's attention left.
        k: float32 [T, H, D], keys.
        received, attended: float32 [T], mean attention received and the class token's, where they are asked for.
    """
    from ..ops.plan.numba import plan_rows

    read = policy.probed(steps.block, rows.x[: len(rows.size)])
    importance, penalty = _weigh(policy, steps, rows, received, attended, read)
    cosine = _similarities(policy, steps, rows.counts, k, read) if steps.merges else _NOTHING
    x, size, origin = torch.empty_like(rows.x), np.empty_like(rows.size), np.empty_like(rows.origin)
    counts, source = np.empty_like(rows.counts), rows.source.copy()
    left = plan_rows(
        rows.x.numpy(), rows.size, rows.origin, rows.counts, cosine, importance, penalty, steps, steps.whole,
        x.numpy(), size, origin, counts, source,
    )  # fmt: skip
    kept = min(room(left, x.shape[1]), len(x))
    if left < kept:
        x[left:kept] = 0
    return Rows(x.as_strided((kept, x.shape[1]), x.stride()), size[:left], origin[:left], counts, source, rows.merged or steps.merges)


def _weigh(
    policy: Policy, steps: Steps, rows: Rows, received: Array | None, attended: Array | None, read: Tensor | None
) -> tuple[Array, Array]:
    """Importance and penalties, float32 [T], see `method.scores`; empty where nothing asks."""
    from ..ops.weigh.numba import weigh_rows

    config, power = policy.config, policy.class_power(steps.block) if attended is not None else 0.0
    kind = config.goes_by if steps.prunes else None
    importance = penalty = _NOTHING
    if kind == "random":
        importance = noise(torch.from_numpy(rows.origin), steps.block, config.seed).numpy()
    elif kind is not None:
        importance = attended if kind == "class" else received
    probes = (config.similarity == "probe" and steps.merges, kind == "probe")
    blends = kind == "probe" or (kind == "received" and power > 0)
    if steps.merges and (power > 0 or probes[0]):
        penalty = np.empty_like(rows.size)
    if blends or len(penalty):
        blended = np.empty_like(rows.size) if blends else _NOTHING
        weight = policy.weight(steps.block, torch.from_numpy(rows.size)).numpy()
        weigh_rows(
            _NOTHING if received is None else received, _NOTHING if attended is None else attended,
            _UNREAD if read is None else read.numpy(), rows.size, weight,
            rows.origin, rows.counts, steps.protected, np.float32(power), probes, blended, penalty,
        )  # fmt: skip
        importance = blended if blends else importance
    return importance, penalty


def _similarities(policy: Policy, steps: Steps, counts: Array, k: Tensor, read: Tensor | None) -> Array:
    """Cosines of the tokens of each image as `plan_rows` takes them: its own product each, so that a batch changes none."""
    from ..ops.match.numba import metric_rows

    kind = policy.config.similarity
    vectors, width = k, k.shape[-1]
    if kind == "probe":
        assert read is not None
        vectors, width = read[:, None], WIDTH
    heads = vectors.shape[1]
    if vectors.stride(2) != 1 or (heads > 1 and vectors.stride(1) != width):
        vectors = vectors.contiguous()
    size = width * heads if kind == "heads" else width
    metric = scratch("metric", len(k) * size)
    flat = vectors.as_strided(((len(k) - 1) * vectors.stride(0) + heads * width,), (1,))
    metric_rows(flat.numpy(), vectors.stride(0), heads, kind == "heads", metric.array[: len(k) * size].reshape(len(k), size))
    shapes = [(n, n) if steps.whole else (n // 2, n - n // 2) for n in counts.tolist()]
    cosine, at, start = scratch("cosine", sum(rows * columns for rows, columns in shapes)), 0, 0
    for rows, columns in shapes:
        # the rows of all tokens, or of every other one
        step = 1 if steps.whole else 2
        odd = metric.tensor.as_strided((rows, size), (step * size, 1), start + (step - 1) * size)
        even = metric.tensor.as_strided((size, columns), (1, step * size), start)
        torch.mm(odd, even, out=cosine.tensor.as_strided((rows, columns), (columns, 1), at))
        at += rows * columns
        start += (rows if steps.whole else rows + columns) * size
    return cosine.array
