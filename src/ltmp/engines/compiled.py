"""The packed engine on a CPU with its plans compiled: what each block decides and folds is one call of a kernel.

Features are rows of torch; all else that is known of tokens are rows of NumPy. What the kernels do not know runs in
plain torch (`packed`), which computes the same: gradients, types other than float32, fusing (`evit`), attention with a
bias for each pair of tokens, and policies made for one purpose (calibration).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..calls import tracing
from ..config import Scores
from ..method.policy import Active, Policy
from ..method.rates import Rates, noise
from ..method.recipe import Bias
from ..method.thresholds import Thresholds
from ..method.tokens import Tokens, spread
from ..ops.attend.rows import attend_images
from ..ops.compiled import unavailable
from ..ops.probe.reference import WIDTH
from ..ops.probe.rows import probe_rows
from ..ops.scratch import Scratch, both, scratch
from .body import Body
from .masked import finish
from .onednn import Halves, halves, room, watched
from .plain import look
from .positions import Positions
from .rows import first_rows, pad
from .segments import Segments
from .state import Dropped, Reduced, State

if TYPE_CHECKING:
    from ..ops.plan.numba import Cut, Steps

Array = np.ndarray[Any, Any]

_NOWHERE = 2**30
_NOTHING = np.empty(0, np.float32)
_UNREAD = np.empty((0, WIDTH + 2), np.float32)
_UNASKED = np.empty((0, 0, 0), np.float32)


def applies(policy: Policy, x: Tensor) -> bool:
    """Whether the kernels compute what `packed` would for `x` [B, N, C], where no block drops whole images."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and type(x) is Tensor
        and type(policy) in (Thresholds, Rates)
        and "fuse" not in policy.config.steps
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and not torch.jit.is_tracing()
        and not watched()
        and unavailable() is None
    )


def halves_of(body: Body, x: Tensor) -> list[Halves] | None:
    """How to run each block on rows like `x`; None where `applies` is not true, or a block drops whole images.

    All blocks are looked up at once, as between products the processor has to fetch again what it takes to look.
    """
    if not applies(body.policy, x):
        return None
    known = look(body.memory, body.recipe, body.blocks)
    return None if known.drops() else halves(body.recipe, body.blocks, x, known)


class LiveRows(NamedTuple):
    """The live tokens of a batch between two blocks, one image after the other.

    Attributes:
        x: float32, [T, C] and spare rows of any values behind (`onednn.room`).
        size: float32 [T]; origin: int64 [T]; source: int32 [B, N], [B, 0] where nobody asks; see `Tokens`.
        counts: int64 [B], tokens of each image.
        merged: whether any size may be other than 1.
        dropped: what pruned patches were, where unmerging asks.
    """

    x: Tensor
    size: Array
    origin: Array
    counts: Array
    source: Array
    merged: bool = True
    dropped: Dropped | None = None

    @classmethod
    def start(
        cls, x: Tensor, traced: bool = False, *, unmerges: bool = False, among: Segments | None = None,
        positioned: bool = False,
    ) -> LiveRows:  # fmt: skip
        """The tokens of x [B, N, C].

        Args:
            traced: whether sources are asked for; unmerges: whether grids are, too.
            among: where images are among the host's features, if not of N tokens each.
            positioned: whether the host's positions differ between images, so that origins are rows of them.
        """
        images, length, width = x.shape
        places = np.arange(length).repeat(images).reshape(length, images).T
        rows, origin, counts = x.reshape(-1, width), places.reshape(-1), np.full(images, length)
        source = np.ascontiguousarray(places[:, : length if traced or unmerges else 0], np.int32)
        if among is not None:
            live = among.live.numpy()
            rows, counts, source = x[among.live], live.sum(1), np.where(live, source, -1)
            origin = among.index.numpy()[live] if positioned else places[live]
        rows = rows.contiguous()
        spare = room(len(rows), width) - len(rows)
        rows = torch.cat([rows, rows.new_zeros(spare, width)]) if spare else rows
        dropped = Dropped.start(x, among) if unmerges else None
        return cls(rows, np.ones(len(origin), np.float32), origin, counts, source, False, dropped)

    def tokens(self) -> Tokens:
        """The same as [B, N]."""
        counts = self.counts.tolist()
        size, origin = (pad(torch.from_numpy(values), counts) for values in (self.size, self.origin))
        keep = torch.arange(size.shape[1], device="cpu") < torch.from_numpy(self.counts)[:, None]
        source = torch.from_numpy(self.source) if self.source.shape[1] else None
        # rows that are not there are no prefix tokens
        return Tokens(size, keep.float(), origin.masked_fill(~keep, _NOWHERE), source)


class InNumba(NamedTuple):
    """A batch between two blocks; see `state.Partway`.

    Attributes:
        body: of the call.
        halves: how to run each block, see `halves_of`.
        planned: steps of each block.
        positions: of the tokens at the start.
        rows: what is left.
        kept: tokens of each image after each block so far.
        trail: sources after each block so far, where every block is traced.
    """

    body: Body
    halves: list[Halves]
    planned: list[BlockSteps | None]
    positions: Positions | None
    rows: LiveRows
    kept: tuple[list[int], ...]
    trail: tuple[Tensor, ...] | None

    @property
    def tokens(self) -> Tokens:
        return self.rows.tokens()

    def step(self, i: int, _bias: Bias | None = None) -> InNumba:
        rows = run_block(self.body, i, self.halves[i], self.rows, self.planned[i], self.positions)
        trail = None if self.trail is None else (*self.trail, torch.from_numpy(rows.source))
        return self._replace(rows=rows, kept=(*self.kept, rows.counts.tolist()), trail=trail)

    def unmerged(self) -> Tensor:
        rows = self.rows
        assert rows.dropped is not None
        first = first_rows(rows.counts.tolist(), rows.x.device)
        return spread(rows.x, first, torch.from_numpy(rows.source), rows.dropped.values)

    def reduced(self) -> Reduced:
        rows, kept = self.rows, torch.tensor(self.kept, dtype=torch.float32, device="cpu").T
        source = torch.from_numpy(rows.source) if rows.source.shape[1] else None
        return Reduced(rows.x, torch.from_numpy(rows.size), kept, source, self.trail)


def start(
    body: Body, x: Tensor, active: Active, positions: Positions | None, before: int, found: list[Halves], *,
    unmerges: bool = True, among: Segments | None = None,
) -> InNumba:  # fmt: skip
    """`x` [B, N, C] behind `before` blocks that removed nothing; `found` is `halves_of` it."""
    calls = tracing()
    rows = LiveRows.start(x, calls is not None, unmerges=unmerges, among=among, positioned=positions is not None)
    trail = (torch.from_numpy(rows.source),) * before if calls is not None and calls.every_block else None
    planned = block_steps(body.policy, active, body.protected)
    return InNumba(body, found, planned, positions, rows, (rows.counts.tolist(),) * before, trail)


def run(body: Body, x: Tensor, active: Active, positions: Positions | None, found: list[Halves]) -> Reduced:
    """Run all blocks on [B, N, C], of which `found` is `halves_of`; see `packed.run`."""
    first = next((i for i in range(body.depth) if body.policy.steps(active, i)), body.depth)
    for i in range(first):
        # nothing was reduced yet and nothing will be here: the host's own block, with its fused attention
        x = body.whole(i, x, positions)
    partway = start(body, x, active, positions, first, found, unmerges=False)
    for i in range(first, body.depth):
        partway = partway.step(i)
    counts = partway.rows.counts.tolist()
    left = pad(partway.rows.x[: sum(counts)], counts)
    state = State(left, partway.tokens, trail=partway.trail)
    return finish(state, left, partway.reduced().kept, body.protected)


def run_block(
    body: Body, i: int, half: Halves, rows: LiveRows, planned: BlockSteps | None, positions: Positions | None
) -> LiveRows:
    """Run block `i` on the live tokens."""
    left = _attend_and_reduce(body, i, half, rows, planned, positions)
    return left._replace(x=half.mlp(left.x))


def _attend_and_reduce(
    body: Body, i: int, half: Halves, rows: LiveRows, planned: BlockSteps | None, positions: Positions | None
) -> LiveRows:
    """Block `i` up to its MLP: a function of its own, so that queries, keys and values are gone when that one runs."""
    policy, x, live = body.policy, rows.x, len(rows.size)
    q, k, v = half.qkv(x)
    if live < len(x):
        q, k, v = q[:live], k[:live], v[:live]
    if positions is not None:
        q, k = positions.rotate(i, body.blocks[i], q, k, torch.from_numpy(rows.origin))
    weight: Array = policy.weight(i, rows.size)
    bias = torch.from_numpy(np.log(weight)) if rows.merged else None
    received = _zeros("received", live) if planned is not None and planned.needs.received else None
    attended = _zeros("attended", live) if planned is not None and planned.needs.attended else None
    signals = [None if found is None else found.tensor.as_strided((live,), (1,)) for found in (received, attended)]
    y = attend_images(q, k, v, bias, rows.counts.tolist(), *signals)
    if live < len(x):
        y = torch.cat([y, y.new_zeros(len(x) - live, y.shape[1])])
    rows = rows._replace(x=half.out(x, y))
    if planned is None:
        return rows
    arrays = [None if found is None else found.array[:live] for found in (received, attended)]
    return reduce_rows(policy, planned, rows, k, weight, *arrays)


def _zeros(name: str, size: int) -> Scratch:
    """Scratch memory whose first `size` values are 0."""
    found = scratch(name, size)
    found.array[:size] = 0
    return found


class Needs(NamedTuple):
    """Which signals of `method.scores` a block's steps need, and what they make of them.

    Attributes:
        received, attended: attention received, and the class token's.
        probe_merges, probe_prunes: whether a probe is part of the merge penalty, and of the importance.
        penalised, blended: whether there is a merge penalty, and whether the importance is made of two signals.
    """

    received: bool
    attended: bool
    probe_merges: bool
    probe_prunes: bool
    penalised: bool
    blended: bool

    @classmethod
    @cache
    def of(cls, scores: Scores, all_steps: tuple[str, ...], steps: tuple[str, ...]) -> Needs:
        """Those of `steps`, of which a variant has `all_steps`."""
        merges, prunes = "merge" in steps, "prune" in steps
        attended = scores.needs_class_attention(all_steps)
        by_class = attended and scores.class_power > 0
        probe_merges, probe_prunes = scores.probes_similarity and merges, scores.probes_importance and prunes
        penalised = merges and (by_class or probe_merges)
        blended = prunes and (probe_prunes or (by_class and scores.blends_class_attention))
        received = scores.needs_received(steps)
        return cls(received, attended, probe_merges, probe_prunes, penalised, blended)


@dataclass(frozen=True)
class BlockSteps:
    """A block's steps, as arguments of the kernels.

    Attributes:
        probe: its matrix [C, WIDTH + 2] and bias, where the scores ask for one.
    """

    steps: Steps
    needs: Needs
    probe: tuple[Tensor, Array] | None


def block_steps(policy: Policy, active: Active, protected: int) -> list[BlockSteps | None]:
    """The steps of each block, None where it has none. Reads the thresholds once."""
    from ..ops.plan.numba import Steps

    config, merges, prunes = policy.config, _cuts(policy, "merge"), _cuts(policy, "prune")
    probes = _probes(policy)
    found: list[BlockSteps | None] = []
    for i, (merge, prune) in enumerate(zip(merges, prunes, strict=True)):
        names = policy.steps(active, i)
        if not names:
            found.append(None)
            continue
        order = ("merge" in names, "prune" in names, names[0] == "prune", config.scores.mutual)
        steps, needs = Steps(*order, merge, prune, protected, i), Needs.of(config.scores, config.steps, names)
        found.append(BlockSteps(steps, needs, None if probes is None else probes[i]))
    return found


def _probes(policy: Policy) -> list[tuple[Tensor, Array]] | None:
    """The probe of each block, as `BlockSteps` has it; None where the scores ask for none."""
    if not policy.config.needs_probe:
        return None
    assert isinstance(policy, Thresholds)
    # complains where there is none
    policy.probe_of(0)
    assert policy.probe is not None
    return list(zip(policy.probe[:, :-1].unbind(), policy.probe[:, -1].numpy(), strict=True))


def _cuts(policy: Policy, step: str) -> list[Cut]:
    """How each block's `step` selects tokens."""
    from ..ops.plan.numba import Cut

    config = policy.config
    ceiling = config.ceiling if config.ceiling is not None and step == config.steps[-1] else -1
    if isinstance(policy, Thresholds):
        values = (policy.merge if step == "merge" else policy.prune).tolist()
        return [Cut(np.float32(value), floor=config.floor, ceiling=ceiling) for value in values]
    assert isinstance(policy, Rates)
    # a part for merging is one of the tokens of both parities, though only the even ones are asked
    halves_of = 2 if step == "merge" else 1
    return [
        Cut(np.float32(0), part=np.float32(halves_of * rate), floor=config.floor, ceiling=ceiling)
        if isinstance(rate, float)
        else Cut(np.float32(0), tokens=rate, floor=config.floor, ceiling=ceiling)
        for rate in policy.rates[step]
    ]


def reduce_rows(
    policy: Policy,
    block: BlockSteps,
    rows: LiveRows,
    k: Tensor,
    weight: Array,
    received: Array | None,
    attended: Array | None,
) -> LiveRows:
    """Decide and fold: `method.reduction` on rows.

    Args:
        rows: with the features after attention.
        k: float32 [T, H, D], keys.
        weight: float32 [T], what tokens count as in attention.
        received, attended: float32 [T], mean attention received and the class token's, where they are needed.
    """
    from ..ops.plan.numba import plan_rows

    steps = block.steps
    live = len(rows.size)
    read = None if block.probe is None else probe_rows(*block.probe, rows.x[:live] if live < len(rows.x) else rows.x)
    importance, penalty = _weigh(policy, block, rows, weight, received, attended, read)
    cosine = _similarities(policy.config.scores, steps, rows.counts, k, read) if steps.merges else _NOTHING
    x, folded = both(*rows.x.shape)
    size, origin = np.empty_like(rows.size), np.empty_like(rows.origin)
    counts, source = np.empty_like(rows.counts), rows.source.copy()
    dropped = None if rows.dropped is None else rows.dropped.ready(steps.block)
    left = plan_rows(
        rows.x.numpy(), rows.size, rows.origin, rows.counts, cosine, importance, penalty, steps, steps.whole,
        folded, size, origin, counts, source, _UNASKED if dropped is None else dropped.values.numpy(),
    )  # fmt: skip
    kept = min(room(left, x.shape[1]), len(x))
    if left < kept:
        x[left:kept] = 0
    x = x.as_strided((kept, x.shape[1]), x.stride())
    return LiveRows(x, size[:left], origin[:left], counts, source, rows.merged or steps.merges, dropped)


def _weigh(
    policy: Policy,
    block: BlockSteps,
    rows: LiveRows,
    weight: Array,
    received: Array | None,
    attended: Array | None,
    read: Array | None,
) -> tuple[Array, Array]:
    """Importance and merge penalties, float32 [T], see `method.scores`; empty where no step needs them."""
    from ..ops.weigh.numba import weigh_rows

    steps, needs, kind = block.steps, block.needs, policy.config.scores.importance
    importance = _NOTHING
    if steps.prunes and kind == "random":
        importance = noise(torch.from_numpy(rows.origin), steps.block, policy.config.seed).numpy()
    elif steps.prunes:
        signal = attended if kind == "class" else received
        assert signal is not None
        importance = signal
    if not (needs.penalised or needs.blended):
        return importance, _NOTHING
    blended = np.empty_like(rows.size) if needs.blended else _NOTHING
    penalty = np.empty_like(rows.size) if needs.penalised else _NOTHING
    weigh_rows(
        _NOTHING if received is None else received, _NOTHING if attended is None else attended,
        _UNREAD if read is None else read, rows.size, weight, rows.origin, rows.counts, steps.protected,
        np.float32(policy.class_power(steps.block)), (needs.probe_merges, needs.probe_prunes), blended, penalty,
    )  # fmt: skip
    return blended if needs.blended else importance, penalty


def _similarities(scores: Scores, steps: Steps, counts: Array, k: Tensor, read: Array | None) -> Array:
    """Cosines of tokens as `plan_rows` takes them: one product per image, so that no batch changes them."""
    from ..ops.match.numba import metric_rows

    number, heads, width = k.shape
    each_head = not scores.averages_keys
    if scores.probes_similarity:
        assert read is not None
        heads, width, each_head, step, flat = 1, WIDTH, False, read.shape[1], read.reshape(-1)
    else:
        if k.stride(2) != 1 or (heads > 1 and k.stride(1) != width):
            k = k.contiguous()
        step = k.stride(0)
        flat = k.as_strided(((number - 1) * step + heads * width,), (1,)).numpy()
    size = width * heads if each_head else width
    metric = scratch("metric", number * size)
    metric_rows(flat, step, heads, each_head, metric.array[: number * size].reshape(number, size))
    images = counts.tolist()
    pairs = [n * n if steps.whole else (n // 2) * (n - n // 2) for n in images]
    cosine, at, start = scratch("cosine", sum(pairs)), 0, 0
    for n, number in zip(images, pairs, strict=True):
        # the vectors of all tokens, or of every other one
        rows, columns, skip = (n, n, 1) if steps.whole else (n // 2, n - n // 2, 2)
        odd = metric.tensor.as_strided((rows, size), (skip * size, 1), start + (skip - 1) * size)
        even = metric.tensor.as_strided((size, columns), (1, skip * size), start)
        torch.mm(odd, even, out=cosine.tensor.as_strided((rows, columns), (columns, 1), at))
        at, start = at + number, start + n * size
    return cosine.array
