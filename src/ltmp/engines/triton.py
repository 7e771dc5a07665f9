"""Inference with Triton kernels on packed rows: one row per live token, however many each image has left.

A standard block, whose weights are accessible (`Recipe.parts`), takes eight launches: the residual addition, the fold
and the norm after a branch are one kernel, and in half precision the GELU is part of the matrix product. Other blocks
run their own modules on the rows, with the same kernels in between.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import tracing
from ..method import reduction
from ..method.policy import Active
from ..method.recipe import Bias, Parts, Recipe
from ..method.thresholds import Thresholds
from ..method.tokens import Tokens
from ..ops.attend.triton import attend
from ..ops.fold.triton import fold
from ..ops.follow.triton import follow, spread
from ..ops.match.triton import candidates, similarity_metric
from ..ops.norm.triton import Norm, add_norm
from ..ops.plan.triton import RowPlan, plan
from ..ops.probe.triton import probe_rows
from ..ops.weigh.triton import class_attention_rows, saliency_rows
from .body import Body
from .capacity import Capacity
from .plain import look
from .planned import fuse_rows, metric_rows, plan_rows
from .positions import Positions
from .rows import Padding, Rows, tokens_of, unpack
from .segments import Segments
from .state import Reduced


class Branches(Protocol):
    """The two residual branches of a block, on rows."""

    @property
    def norms(self) -> tuple[Norm | None, Norm | None]:
        """The norms before the branches, if the preceding kernel has to apply them."""

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Layer-scale vectors [C], if the kernel after a branch has to apply them."""

    def qkv(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, each [T, H, D]."""

    def out(self, y: Tensor) -> Tensor:
        """Project the attention output [T, H * D] to [T, C]."""

    def mlp(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """Apply the MLP to x [T, C]; `normed` is `x` after the second norm if the preceding kernel applied it."""


class OwnBranches:
    """The branches of a block that runs its own modules, including norms and layer scale."""

    norms = (None, None)
    scales = (None, None)

    def __init__(self, block: nn.Module, recipe: Recipe) -> None:
        self.block, self.recipe = block, recipe

    def qkv(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        return self.recipe.qkv(self.block, rows.x)

    def out(self, y: Tensor) -> Tensor:
        return self.recipe.out(self.block, y)

    def mlp(self, x: Tensor, normed: Tensor | None) -> Tensor:
        return self.recipe.mlp(self.block, x)


class FusedBranches:
    """The branches of a standard block; norms, residual additions and layer scale are left to the fused kernels."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.norms = (Norm.of(parts.norm1), Norm.of(parts.norm2))
        self.scales = (parts.scale1, parts.scale2)

    def qkv(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        assert rows.normed is not None
        return self.parts.project(rows.normed, nn.Linear.__call__)

    def out(self, y: Tensor) -> Tensor:
        return self.parts.proj(y)

    def mlp(self, x: Tensor, normed: Tensor | None) -> Tensor:
        assert normed is not None
        return self.parts.fc2(_activated(self.parts.fc1, self.parts.act, normed))


def _activated(linear: nn.Linear, act: str, x: Tensor) -> Tensor:
    """Return `act(linear(x))`.

    In half precision the GELU is the epilogue of the matrix product, in its tanh form, applied before rounding. That is
    closer to the exact GELU than the host's two steps, which round in between (RMS error in bfloat16 over normal
    inputs: 1.7e-3 against 2.4e-3). Float32 keeps the host's form to the last bit.
    """
    if act == "quick_gelu":
        y = linear(x)
        return y * torch.sigmoid(1.702 * y)
    if x.is_cuda and linear.bias is not None and linear.weight.dtype == x.dtype != torch.float32:
        return torch._addmm_activation(linear.bias, x, linear.weight.t(), use_gelu=True)
    return F.gelu(linear(x), approximate="tanh" if act == "gelu_tanh" else "none")


def branches(body: Body) -> list[Branches]:
    """Return the branches of each block, fused if the block is standard."""
    all_parts = look(body.memory, body.recipe, body.blocks).parts(body.blocks)
    return [
        OwnBranches(block, body.recipe) if parts is None else FusedBranches(parts)
        for block, parts in zip(body.blocks, all_parts, strict=True)
    ]


def run(body: Body, x: Tensor, active: Active, positions: Positions | None = None) -> Reduced:
    """Run all blocks on [B, N, C] at exact sizes, which reads two numbers back after each block that reduces."""
    return Pass(body, x, active, positions=positions).run()


@dataclass
class CountingEngine:
    """This engine for a single call, whose token counts it keeps; for `body.running`.

    Attributes:
        active: steps to run; None reads the thresholds, and runs the host's own blocks if no step is active.
        capacity: sizes to run at, without reading anything back; None for exact sizes.
        stats: after the call int32 [L, 3] on the device, see `Pass`; None if the host's own blocks ran.
    """

    active: Active | None = None
    capacity: Capacity | None = None
    stats: Tensor | None = None

    def __call__(self, body: Body, x: Tensor, positions: Positions | None) -> Reduced:
        active = body.active() if self.active is None else self.active
        if self.active is None and not any(map(any, active)):
            return body.dense_blocks(x, positions)
        batch = Pass(body, x, active, self.capacity, positions)
        self.stats = batch.stats
        return batch.run()

    def start(
        self, body: Body, x: Tensor, active: Active, positions: Positions | None, first_block: int,
        segments: Segments | None,
    ) -> TritonRun:  # fmt: skip
        """The same block by block, see `steps.SteppableEngine`."""
        run = start(body, x, active, positions, first_block, segments, self.capacity)
        self.stats = run.batch.stats
        return run


@dataclass(frozen=True)
class TritonRun:
    """A block-by-block run; see `state.BlockwiseRun`.

    Attributes:
        batch: the pass that runs the blocks.
        rows: the live tokens.
        bounds: `Rows.cu` after each block so far.
        trail: sources after each block so far, None unless every block is traced.
    """

    batch: Pass
    rows: Rows
    bounds: tuple[Tensor, ...] = ()
    trail: tuple[Tensor, ...] | None = None

    @property
    def tokens(self) -> Tokens:
        return tokens_of(self.rows, Padding.of(self.rows.cu, self.rows.longest, self.rows.x.shape[0]))

    def step(self, i: int, _bias: Bias | None = None) -> TritonRun:
        with torch.no_grad():
            rows = self.batch.block(i, self.rows)
        trail = self.trail if self.trail is None or rows.source is None else (*self.trail, rows.source)
        return replace(self, rows=rows, bounds=(*self.bounds, rows.cu), trail=trail)

    def unmerged(self) -> Tensor:
        rows = self.rows
        assert rows.source is not None
        assert rows.dropped is not None
        return spread(rows.x, rows.cu, rows.source, rows.dropped.values)

    @property
    def kept(self) -> Tensor:
        """float32 [B, L], tokens after each block."""
        return torch.stack(self.bounds).diff().float().T

    def result(self) -> Reduced:
        return Reduced(self.rows.x, self.rows.size, self.kept, self.rows.source, self.trail)


def start(
    body: Body, x: Tensor, active: Active, positions: Positions | None, first_block: int, segments: Segments | None,
    capacity: Capacity | None = None,
) -> TritonRun:  # fmt: skip
    """Start a run that will be unmerged, see `select.start`."""
    batch, calls = Pass(body, x, active, capacity, positions), tracing()
    rows = Rows.grid(x, batch.branches[first_block].norms[0], segments, positions is not None)
    every_block = calls is not None and calls.every_block
    trail = (rows.source,) * first_block if every_block and rows.source is not None else None
    return TritonRun(batch, rows, (rows.cu,) * first_block, trail)


def compile_ahead(body: Body, x: Tensor) -> None:
    """Compile the kernels that batches like `x` [B, N, C] need, in parallel.

    Kernels compile when they first run, which adds up to a minute for a first batch. This function runs one block for
    each length that has kernels of its own, in one thread per length, on images of a single token.
    """
    images, tokens, width = x.shape
    lengths = [tokens, *(n for n in (32, 64, 128, 192, 256, 512, 1024) if n < tokens)]
    depth = body.depth
    capacity = Capacity((images,) * depth, (1,) * depth)
    cu = torch.arange(images + 1, dtype=torch.int32, device=x.device)
    row = torch.zeros(images, width, dtype=x.dtype, device=x.device)

    @torch.no_grad()
    def block(longest: int) -> None:
        with torch.cuda.device(x.device):
            origin = torch.zeros(images, dtype=torch.int32, device=x.device)
            rows = Rows(row, row, torch.ones(images, device=x.device, dtype=torch.float32), origin, cu, longest, False)
            Pass(body, x, ((True, True),) * depth, capacity).block(0, rows)

    with ThreadPoolExecutor(len(lengths)) as threads:
        list(threads.map(block, lengths))


class Pass:
    """A pass of one batch through the blocks.

    Args:
        x: [B, N, C].
        active: steps to run in each block.
        capacity: sizes after each block, for a pass that reads nothing back; None for exact sizes.
        positions: positions of the tokens of `x`, None if the host's attention needs none.

    Attributes:
        stats: int32 [L, 3] on the device: for each block that reduces, tokens of the batch, tokens of its longest
            image, and 0; zeros for other blocks.
        plans: the last plan of each block, None for a block that does not reduce.
    """

    def __init__(
        self, body: Body, x: Tensor, active: Active, capacity: Capacity | None = None,
        positions: Positions | None = None,
    ) -> None:  # fmt: skip
        self.body, self.x, self.active, self.capacity, self.positions = body, x, active, capacity, positions
        self.branches = branches(body)
        self.policy = body.policy
        self.plans: list[RowPlan | None] = [None] * len(active)
        self.stats = torch.zeros(len(active), 3, dtype=torch.int32, device=x.device)

    @torch.no_grad()
    def run(self) -> Reduced:
        """Run all blocks; the final norm and the head are left to the host."""
        calls = tracing()
        rows = Rows.start(self.x, self.branches[0].norms[0], traced=calls is not None)
        run = TritonRun(self, rows, trail=() if calls is not None and calls.every_block else None)
        for i in range(len(self.branches)):
            run = run.step(i)
        x, size, source = unpack(run.rows, self.body.protected)
        return Reduced(x, size, run.kept, source, run.trail)

    def block(self, i: int, rows: Rows) -> Rows:
        """Run block `i`."""
        block = self.branches[i]
        steps = self.policy.steps(self.active, i)
        q, k, v = block.qkv(rows)
        if self.positions is not None:
            q, k = self.positions.rotate(i, self.body.blocks[i], q, k, rows.origin)
        weight = self.policy.weight(i, rows.size)
        y, received = _attend(q, k, v, rows, weight, self.policy.config.scores.needs_received(steps))
        y = block.out(y)
        if steps:
            rows = self._reduce(i, steps, rows, y, q, k, received)
        else:
            x, normed = add_norm(rows.x, y, block.scales[0], block.norms[1])
            rows = replace(rows, x=x, normed=normed)
        y = block.mlp(rows.x, rows.normed)
        next_norm = self.branches[i + 1].norms[0] if i + 1 < len(self.branches) else None
        x, normed = add_norm(rows.x, y, block.scales[1], next_norm)
        return replace(rows, x=x, normed=normed)

    def _reduce(
        self,
        i: int,
        steps: tuple[str, ...],
        rows: Rows,
        y: Tensor | None,
        q: Tensor,
        k: Tensor,
        received: Tensor | None,
    ) -> Rows:
        """Add the output `y` of the attention branch, and reduce by `steps`."""
        block = self.branches[i]
        scale = block.scales[0]
        config = self.policy.config
        keys, penalty, received = self._score(i, steps, rows, y, q, k, received)
        rows = replace(rows, dropped=None if rows.dropped is None else rows.dropped.ready(i))
        if steps == ("prune", "merge"):
            # tokens are split into even and odd after pruning, so pruning is a fold of its own, at the present size
            unused_stats = torch.zeros_like(self.stats[i])
            dropped, _ = self._plan(i, ("prune",), rows, q, k, keys, received, unused_stats)
            metric, *_ = _fold(rows, metric_rows(self.policy, keys, rows.cu), None, None, None, dropped)
            x, _, size, origin = _fold(rows, rows.x, y, scale, None, dropped)
            if penalty is not None:
                penalty = _fold(rows, penalty[:, None], None, None, None, dropped)[0][:, 0]
            source = _follow(i, rows, rows.x, y, scale, dropped)
            rows = replace(rows, x=x, size=size, origin=origin, cu=dropped.cu, source=source)
            heads = (1, -1) if config.scores.averages_keys else keys.shape[1:]
            keys, y, scale, steps = metric.unflatten(1, heads), None, None, ("merge",)
        limit = None if self.capacity is None else self.capacity.rows[i]
        planned, definition = self._plan(i, steps, rows, q, k, keys, received, self.stats[i], limit, penalty)
        self.plans[i] = planned
        if steps == ("fuse",):
            assert definition is not None
            # the plan drops fused tokens; mean and size go to the row of their receiver beforehand
            x = fuse_rows(add_norm(rows.x, y, scale, None)[0], rows, definition)
            rows, y, scale = replace(rows, x=x, size=planned.size), None, None
        if self.capacity is None:
            room, longest, _ = self.stats[i].tolist()
        else:
            room, longest = self.capacity.rows[i], self.capacity.longest[i]
        bipartite = not config.scores.mutual
        source = _follow(i, rows, rows.x, y, scale, planned)
        x, normed, size, origin = _fold(rows, rows.x, y, scale, block.norms[1], planned, room, bipartite)
        return Rows(x, normed, size, origin, planned.cu, longest, False, source, rows.dropped)

    def _score(
        self, i: int, steps: tuple[str, ...], rows: Rows, y: Tensor | None, q: Tensor, k: Tensor,
        received: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Compute scores beyond the paper's, from class-token attention and from a probe.

        Returns:
            Keys for the similarity [T, H, D], merge penalty [T] or None, and importance in the layout of `received`.
        """
        policy, config, penalty = self.policy, self.policy.config, None
        weight, power = policy.weight(i, rows.size), policy.class_power(i)
        blends = received if config.scores.blends_class_attention else None
        if power and ("merge" in steps or blends is not None):
            penalty, blended = class_attention_rows(q, k, weight, rows.size, blends, rows.cu, rows.longest, power)
            received = received if blended is None else blended
        if not config.needs_probe:
            return k, penalty, received
        assert isinstance(policy, Thresholds)
        scale, protected = self.branches[i].scales[0], self.body.protected
        metric, log_saliency = probe_rows(rows.x, y, scale, policy.probe_of(i), rows.cu)
        blends = received if config.scores.probes_importance else None
        saliency, blended = saliency_rows(
            log_saliency, weight, rows.size, blends, rows.origin, rows.cu, rows.longest, protected
        )  # fmt: skip
        received = received if blended is None else blended
        if config.scores.probes_similarity:
            k, penalty = metric[:, None], saliency if penalty is None else saliency * penalty
        return k, penalty, received

    def _plan(
        self, i: int, steps: tuple[str, ...], rows: Rows, q: Tensor, k: Tensor, keys: Tensor, received: Tensor | None,
        stats: Tensor, room: int | None = None, penalty: Tensor | None = None,
    ) -> tuple[RowPlan, reduction.BlockPlan | None]:  # fmt: skip
        """Plan with kernels if they support the policy, or else by the definition, whose own plan is returned, too."""
        policy, protected, scores = self.policy, self.body.protected, self.policy.config.scores
        if not isinstance(policy, Thresholds) or policy.bounded:
            return plan_rows(policy, i, steps, rows, q, k, keys, received, protected, stats, room, penalty)
        merge = policy.merge[i : i + 1] if "merge" in steps else None
        prune = policy.prune[i : i + 1] if "prune" in steps else None
        partners = None
        # bipartite matching of mean keys is fused into `plan`
        if merge is not None and (scores.mutual or not scores.averages_keys or penalty is not None):
            if scores.averages_keys:
                keys = similarity_metric(keys, rows.cu)
            partners = candidates(keys, rows.origin, rows.cu, rows.longest, protected, scores.mutual, penalty)
        row_plan = plan(
            keys, received, rows.size, rows.origin, rows.cu, rows.longest, merge, prune, protected, stats, room,
            partners,
        )  # fmt: skip
        return row_plan, None


def _fold(
    rows: Rows, x: Tensor, y: Tensor | None, scale: Tensor | None, norm: Norm | None, planned: RowPlan,
    room: int | None = None, bipartite: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    room = x.shape[0] if room is None else room
    return fold(x, y, scale, norm, planned, rows.size, rows.origin, rows.cu, rows.longest, room, bipartite)


def _follow(
    i: int, rows: Rows, x: Tensor, y: Tensor | None, scale: Tensor | None, planned: RowPlan
) -> Tensor | None:  # fmt: skip
    """Return the sources after a plan of block `i` if they are tracked; save dropped features if they are needed."""
    if rows.source is None:
        return None
    dropped = None if rows.dropped is None else rows.dropped.values
    return follow(rows.source, planned.slot, rows.cu, i, x, y, scale, dropped)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, weight: Tensor, need_received: bool
) -> tuple[Tensor, Tensor | None]:
    """Return attention [T, H * D] and, if needed, the attention that each token receives.

    Uses torch's fused attention as long as nothing was reduced and the attention received is not needed.
    """
    # under autocast the head norms return q and k in float32
    q, k = q.to(v.dtype), k.to(v.dtype)
    if not rows.whole or need_received:
        return attend(q, k, v, weight, rows.cu, rows.longest, need_received)
    images = (t.unflatten(0, (-1, rows.longest)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*images).transpose(1, 2).flatten(2).flatten(0, 1), None
