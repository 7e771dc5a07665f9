"""The packed engine on a CPU with compiled plans: each block's decisions and its fold are one call of a Numba kernel.

Features are torch tensors of packed rows; everything else about the tokens is in NumPy arrays. Whatever the kernels do
not support runs in plain torch (`packed`), which computes the same: gradients, dtypes other than float32, fusing
(`evit`), attention with a bias per pair of tokens, and special-purpose policies (calibration).
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
from ..method.scores import has_kernels
from ..method.thresholds import Thresholds
from ..method.tokens import Tokens, spread
from ..ops.attend.rows import attend_images
from ..ops.compiled import unavailable
from ..ops.probe.reference import WIDTH
from ..ops.probe.rows import probe_rows
from ..ops.scratch import Scratch, both, scratch
from .body import Body
from .onednn import Halves, dispatch_mode_active, halves, padded_rows
from .plain import look
from .positions import Positions
from .rows import finish, first_rows, pad
from .segments import Segments
from .state import Dropped, Reduced, State

if TYPE_CHECKING:
    from ..ops.plan.numba import Cut, Steps

Array = np.ndarray[Any, Any]

_NO_ORIGIN = 2**30
"""Origin of padding: larger than that of any prefix token."""

# stand-ins for arguments of the kernels that a call does not use
_EMPTY = np.empty(0, np.float32)
_NO_PROBE = np.empty((0, WIDTH + 2), np.float32)
_NO_DROPPED = np.empty((0, 0, 0), np.float32)


def applies(policy: Policy, x: Tensor) -> bool:
    """Whether the kernels compute what `packed` would for `x` [B, N, C], unless stochastic depth is active."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and type(x) is Tensor
        and type(policy) in (Thresholds, Rates)
        and "fuse" not in policy.config.steps
        and has_kernels(policy.config.scores)
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and not torch.jit.is_tracing()
        and not dispatch_mode_active()
        and unavailable() is None
    )


def applicable_halves(body: Body, x: Tensor) -> list[Halves] | None:
    """Return the two halves of each block for rows like `x`, or None if this engine does not apply to the call.

    It does not if `applies` is false, or if stochastic depth drops the branches of whole images. All blocks are
    inspected at once: between matrix products, the data that this reads would have left the CPU's caches.
    """
    if not applies(body.policy, x):
        return None
    facts = look(body.memory, body.recipe, body.blocks)
    return None if facts.drops_branches() else halves(body.recipe, body.blocks, x, facts)


class LiveRows(NamedTuple):
    """The live tokens of a batch between two blocks, one image after the other.

    Attributes:
        x: float32 [T, C], followed by spare rows of arbitrary values (`onednn.padded_rows`).
        size: float32 [T], see `Tokens`.
        origin: int64 [T], see `Tokens`.
        counts: int64 [B], tokens of each image.
        source: int32 [B, N], see `Tokens`; [B, 0] unless the call is traced or will be unmerged.
        merged: whether any size may be other than 1.
        dropped: features of pruned patches, if the call will be unmerged.
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
        cls, x: Tensor, traced: bool = False, *, unmerges: bool = False, segments: Segments | None = None,
        has_positions: bool = False,
    ) -> LiveRows:  # fmt: skip
        """Pack the tokens of x [B, N, C].

        Args:
            traced: whether to track sources.
            unmerges: whether the result will be unmerged, which needs sources and the features of pruned patches.
            segments: rows of each image among the host's features, None if every image has N tokens.
            has_positions: whether the host passes positions to its blocks. They differ between the images of
                `segments`, so that origins are then rows of the host's features.
        """
        images, length, width = x.shape
        places = np.arange(length).repeat(images).reshape(length, images).T
        rows, origin, counts = x.reshape(-1, width), places.reshape(-1), np.full(images, length)
        source = np.ascontiguousarray(places[:, : length if traced or unmerges else 0], np.int32)
        if segments is not None:
            live = segments.live.numpy()
            rows, counts, source = x[segments.live], live.sum(1), np.where(live, source, -1)
            origin = segments.index.numpy()[live] if has_positions else places[live]
        rows = rows.contiguous()
        spare = padded_rows(len(rows), width) - len(rows)
        rows = torch.cat([rows, rows.new_zeros(spare, width)]) if spare else rows
        dropped = Dropped.start(x, segments) if unmerges else None
        return cls(rows, np.ones(len(origin), np.float32), origin, counts, source, False, dropped)

    def tokens(self) -> Tokens:
        """The same tokens as padded images [B, N]."""
        counts = self.counts.tolist()
        size, origin = (pad(torch.from_numpy(values), counts) for values in (self.size, self.origin))
        keep = torch.arange(size.shape[1], device="cpu") < torch.from_numpy(self.counts)[:, None]
        source = torch.from_numpy(self.source) if self.source.shape[1] else None
        # padding must not pass for prefix tokens
        return Tokens(size, keep.float(), origin.masked_fill(~keep, _NO_ORIGIN), source)


class NumbaRun(NamedTuple):
    """A block-by-block run, see `state.BlockwiseRun`.

    Attributes:
        body: the blocks and the policy of the call.
        halves: the two halves of each block, see `applicable_halves`.
        steps: the steps of each block, None for a block that removes nothing.
        positions: positions of the tokens that entered the first block.
        rows: the live tokens.
        kept: tokens of each image after each block so far.
        trail: sources after each block so far, None unless every block is traced.
    """

    body: Body
    halves: list[Halves]
    steps: list[BlockSteps | None]
    positions: Positions | None
    rows: LiveRows
    kept: tuple[list[int], ...]
    trail: tuple[Tensor, ...] | None

    @property
    def tokens(self) -> Tokens:
        return self.rows.tokens()

    def step(self, i: int, _bias: Bias | None = None) -> NumbaRun:
        rows = run_block(self.body, i, self.halves[i], self.rows, self.steps[i], self.positions)
        trail = None if self.trail is None else (*self.trail, torch.from_numpy(rows.source))
        return self._replace(rows=rows, kept=(*self.kept, rows.counts.tolist()), trail=trail)

    def unmerged(self) -> Tensor:
        rows = self.rows
        assert rows.dropped is not None
        first = first_rows(rows.counts.tolist(), rows.x.device)
        return spread(rows.x, first, torch.from_numpy(rows.source), rows.dropped.values)

    def result(self) -> Reduced:
        rows, kept = self.rows, torch.tensor(self.kept, dtype=torch.float32, device="cpu").T
        source = torch.from_numpy(rows.source) if rows.source.shape[1] else None
        return Reduced(rows.x, torch.from_numpy(rows.size), kept, source, self.trail)


def start(
    body: Body, x: Tensor, active: Active, positions: Positions | None, first_block: int, block_halves: list[Halves], *,
    unmerges: bool = True, segments: Segments | None = None,
) -> NumbaRun:  # fmt: skip
    """Start a block-by-block run.

    Args:
        x: [B, N, C], the input of block `first_block`; the blocks before it removed nothing.
        block_halves: result of `applicable_halves`.
        unmerges, segments: as in `LiveRows.start`.
    """
    calls = tracing()
    rows = LiveRows.start(
        x, calls is not None, unmerges=unmerges, segments=segments, has_positions=positions is not None
    )
    trail = (torch.from_numpy(rows.source),) * first_block if calls is not None and calls.every_block else None
    steps = block_steps(body.policy, active, body.protected)
    return NumbaRun(body, block_halves, steps, positions, rows, (rows.counts.tolist(),) * first_block, trail)


def run(body: Body, x: Tensor, active: Active, positions: Positions | None, block_halves: list[Halves]) -> Reduced:
    """Run all blocks on [B, N, C]; see `packed.run`. `block_halves` is the result of `applicable_halves`."""
    first = next((i for i in range(body.depth) if body.policy.steps(active, i)), body.depth)
    for i in range(first):
        # nothing is removed up to here: run the host's own block, with its fused attention
        x = body.dense_block(i, x, positions)
    partial = start(body, x, active, positions, first, block_halves, unmerges=False)
    for i in range(first, body.depth):
        partial = partial.step(i)
    counts = partial.rows.counts.tolist()
    padded = pad(partial.rows.x[: sum(counts)], counts)
    state = State(padded, partial.tokens, trail=partial.trail)
    return finish(state, padded, partial.result().kept, body.protected)


def run_block(
    body: Body, i: int, half: Halves, rows: LiveRows, block: BlockSteps | None, positions: Positions | None
) -> LiveRows:
    """Run block `i` on the live tokens; `block` holds its steps, None if it removes nothing."""
    reduced = _attend_and_reduce(body, i, half, rows, block, positions)
    return reduced._replace(x=half.mlp(reduced.x))


def _attend_and_reduce(
    body: Body, i: int, half: Halves, rows: LiveRows, block: BlockSteps | None, positions: Positions | None
) -> LiveRows:
    """Run block `i` up to its MLP, in a separate function so that q, k and v are freed before the MLP runs."""
    policy, x, live = body.policy, rows.x, len(rows.size)
    q, k, v = half.qkv(x)
    if live < len(x):
        q, k, v = q[:live], k[:live], v[:live]
    if positions is not None:
        q, k = positions.rotate(i, body.blocks[i], q, k, torch.from_numpy(rows.origin))
    weight: Array = policy.weight(i, rows.size)
    bias = torch.from_numpy(np.log(weight)) if rows.merged else None
    received = _zeros("received", live) if block is not None and block.needs.received else None
    attended = _zeros("attended", live) if block is not None and block.needs.attended else None
    signals = [None if s is None else s.tensor.as_strided((live,), (1,)) for s in (received, attended)]
    y = attend_images(q, k, v, bias, rows.counts.tolist(), *signals)
    if live < len(x):
        y = torch.cat([y, y.new_zeros(len(x) - live, y.shape[1])])
    rows = rows._replace(x=half.out(x, y))
    if block is None:
        return rows
    arrays = [None if s is None else s.array[:live] for s in (received, attended)]
    return reduce_rows(policy, block, rows, k, weight, *arrays)


def _zeros(name: str, size: int) -> Scratch:
    """Return scratch memory whose first `size` values are 0."""
    memory = scratch(name, size)
    memory.array[:size] = 0
    return memory


class Needs(NamedTuple):
    """Which signals of `method.scores` the steps of a block need, and for what.

    Attributes:
        received: whether the attention that tokens receive is needed.
        attended: whether the class token's attention is needed.
        probe_merges: whether a probe is part of the merge penalty.
        probe_prunes: whether a probe is part of the importance.
        penalised: whether there is a merge penalty.
        blended: whether the importance blends two signals.
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
        """Return the needs of a block's active `steps`, for a variant with `all_steps`."""
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
    """The steps of a block, as arguments of the kernels.

    Attributes:
        steps: how tokens are selected.
        needs: the signals to select them by.
        probe: matrix [C, WIDTH + 2] and bias of the block's probe, None if the scores need none.
    """

    steps: Steps
    needs: Needs
    probe: tuple[Tensor, Array] | None


def block_steps(policy: Policy, active: Active, protected: int) -> list[BlockSteps | None]:
    """Return the steps of each block, None for a block without any. Reads the thresholds once."""
    from ..ops.plan.numba import Steps

    config, merges, prunes = policy.config, _cuts(policy, "merge"), _cuts(policy, "prune")
    probes = _probes(policy)
    blocks: list[BlockSteps | None] = []
    for i, (merge, prune) in enumerate(zip(merges, prunes, strict=True)):
        names = policy.steps(active, i)
        if not names:
            blocks.append(None)
            continue
        order = ("merge" in names, "prune" in names, names[0] == "prune", config.scores.mutual)
        steps, needs = Steps(*order, merge, prune, protected, i), Needs.of(config.scores, config.steps, names)
        blocks.append(BlockSteps(steps, needs, None if probes is None else probes[i]))
    return blocks


def _probes(policy: Policy) -> list[tuple[Tensor, Array]] | None:
    """Return `BlockSteps.probe` of each block, or None if the scores need no probe."""
    if not policy.config.needs_probe:
        return None
    assert isinstance(policy, Thresholds)
    # raises if the probe is missing
    policy.probe_of(0)
    assert policy.probe is not None
    return list(zip(policy.probe[:, :-1].unbind(), policy.probe[:, -1].numpy(), strict=True))


def _cuts(policy: Policy, step: str) -> list[Cut]:
    """Return how `step` selects tokens in each block."""
    from ..ops.plan.numba import Cut

    config = policy.config
    ceiling = config.ceiling if config.ceiling is not None and step == config.steps[-1] else -1
    if isinstance(policy, Thresholds):
        values = (policy.merge if step == "merge" else policy.prune).tolist()
        return [Cut(np.float32(value), floor=config.floor, ceiling=ceiling) for value in values]
    assert isinstance(policy, Rates)
    # a merge rate is a share of all tokens, but only every other token can merge
    scale = 2 if step == "merge" else 1
    return [
        Cut(np.float32(0), part=np.float32(scale * rate), floor=config.floor, ceiling=ceiling)
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
    """Select tokens and fold them: `method.reduction` on packed rows.

    Args:
        rows: live tokens, with their features after attention.
        k: float32 [T, H, D], keys.
        weight: float32 [T], weight of each token in attention.
        received: float32 [T], mean attention that each token receives, if needed.
        attended: float32 [T], the class token's attention to each token, if needed.
    """
    from ..ops.plan.numba import plan_rows

    steps = block.steps
    live = len(rows.size)
    probed = None if block.probe is None else probe_rows(*block.probe, rows.x[:live] if live < len(rows.x) else rows.x)
    importance, penalty = _weigh(policy, block, rows, weight, received, attended, probed)
    cosine = _similarities(policy.config.scores, steps, rows.counts, k, probed) if steps.merges else _EMPTY
    x, folded = both(*rows.x.shape)
    size, origin = np.empty_like(rows.size), np.empty_like(rows.origin)
    counts, source = np.empty_like(rows.counts), rows.source.copy()
    dropped = None if rows.dropped is None else rows.dropped.ready(steps.block)
    remaining = plan_rows(
        rows.x.numpy(), rows.size, rows.origin, rows.counts, cosine, importance, penalty, steps, steps.whole,
        folded, size, origin, counts, source, _NO_DROPPED if dropped is None else dropped.values.numpy(),
    )  # fmt: skip
    padded = min(padded_rows(remaining, x.shape[1]), len(x))
    if remaining < padded:
        x[remaining:padded] = 0
    x = x.as_strided((padded, x.shape[1]), x.stride())
    return LiveRows(x, size[:remaining], origin[:remaining], counts, source, rows.merged or steps.merges, dropped)


def _weigh(
    policy: Policy,
    block: BlockSteps,
    rows: LiveRows,
    weight: Array,
    received: Array | None,
    attended: Array | None,
    probed: Array | None,
) -> tuple[Array, Array]:
    """Return importance and merge penalties, float32 [T], see `method.scores`; empty if no step needs them."""
    from ..ops.weigh.numba import weigh_rows

    steps, needs, kind = block.steps, block.needs, policy.config.scores.importance
    importance = _EMPTY
    if steps.prunes and kind == "random":
        importance = noise(torch.from_numpy(rows.origin), steps.block, policy.config.seed).numpy()
    elif steps.prunes:
        signal = attended if kind == "class" else received
        assert signal is not None
        importance = signal
    if not (needs.penalised or needs.blended):
        return importance, _EMPTY
    blended = np.empty_like(rows.size) if needs.blended else _EMPTY
    penalty = np.empty_like(rows.size) if needs.penalised else _EMPTY
    weigh_rows(
        _EMPTY if received is None else received, _EMPTY if attended is None else attended,
        _NO_PROBE if probed is None else probed, rows.size, weight, rows.origin, rows.counts, steps.protected,
        np.float32(policy.class_power(steps.block)), (needs.probe_merges, needs.probe_prunes), blended, penalty,
    )  # fmt: skip
    return blended if needs.blended else importance, penalty


def _similarities(scores: Scores, steps: Steps, counts: Array, k: Tensor, probed: Array | None) -> Array:
    """Return cosine similarities as `plan_rows` takes them.

    Each image has a matrix product of its own, so that its values do not depend on the rest of the batch.
    """
    from ..ops.match.numba import metric_rows

    tokens, heads, width = k.shape
    each_head = not scores.averages_keys
    if scores.probes_similarity:
        assert probed is not None
        heads, width, each_head, step, flat = 1, WIDTH, False, probed.shape[1], probed.reshape(-1)
    else:
        if k.stride(2) != 1 or (heads > 1 and k.stride(1) != width):
            k = k.contiguous()
        step = k.stride(0)
        flat = k.as_strided(((tokens - 1) * step + heads * width,), (1,)).numpy()
    size = width * heads if each_head else width
    metric = scratch("metric", tokens * size)
    metric_rows(flat, step, heads, each_head, metric.array[: tokens * size].reshape(tokens, size))
    images = counts.tolist()
    pairs = [n * n if steps.whole else (n // 2) * (n - n // 2) for n in images]
    cosine, at, start = scratch("cosine", sum(pairs)), 0, 0
    for n, entries in zip(images, pairs, strict=True):
        # similarities between all tokens, or between odd and even ones
        rows, columns, skip = (n, n, 1) if steps.whole else (n // 2, n - n // 2, 2)
        odd = metric.tensor.as_strided((rows, size), (skip * size, 1), start + (skip - 1) * size)
        even = metric.tensor.as_strided((size, columns), (1, skip * size), start)
        torch.mm(odd, even, out=cosine.tensor.as_strided((rows, columns), (columns, 1), at))
        at, start = at + entries, start + n * size
    return cosine.array
