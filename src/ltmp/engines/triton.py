"""Deployment on packed rows with Triton kernels: one row a live token, whatever the images of the batch have left.

A block is eight launches where its weights are known (`Recipe.parts`): the residual addition, the fold and the norm
after each branch are one kernel, and in half precision the GELU rides in the matrix product. Other blocks run their own
modules on the rows, with the same kernels around them.
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
        """The norms before the branches, where the kernel before them is to take them."""

    @property
    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Layer-scale vectors [C] that the kernel after a branch is to apply."""

    def qkv(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Each [T, H, D]."""

    def out(self, y: Tensor) -> Tensor:
        """[T, H * D] to [T, C]."""

    def mlp(self, x: Tensor, normed: Tensor | None) -> Tensor:
        """[T, C] to [T, C]."""


class OwnBranches:
    """A block that runs its own modules, norms and layer scale included."""

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
    """A standard block, by its weights: norms, residual additions and layer scale are left to the fused kernels."""

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
    """`act(linear(x))`.

    In half precision the GELU is the matrix product's epilogue, in its tanh form, on the sum before it is rounded. That
    is closer to the exact GELU than the host's own two steps, which round the sum first (bfloat16, root mean square
    over normal inputs: 1.7e-3 against 2.4e-3). Float32 keeps the host's form to the last bit.
    """
    if act == "quick_gelu":
        y = linear(x)
        return y * torch.sigmoid(1.702 * y)
    if x.is_cuda and linear.bias is not None and linear.weight.dtype == x.dtype != torch.float32:
        return torch._addmm_activation(linear.bias, x, linear.weight.t(), use_gelu=True)
    return F.gelu(linear(x), approximate="tanh" if act == "gelu_tanh" else "none")


def branches(body: Body) -> list[Branches]:
    """The blocks, fused where they are standard."""
    found = look(body.memory, body.recipe, body.blocks).parts(body.blocks)
    return [
        OwnBranches(block, body.recipe) if parts is None else FusedBranches(parts)
        for block, parts in zip(body.blocks, found, strict=True)
    ]


def run(body: Body, x: Tensor, active: Active, positions: Positions | None = None) -> Reduced:
    """Run all blocks on [B, N, C] at their exact sizes, reading two numbers back after each block that reduces."""
    return Pass(body, x, active, positions=positions).run()


@dataclass
class Counted:
    """This engine for one call, which counts as it goes; see `body.running`.

    Attributes:
        active: steps to run, where they have been read already; None reads the thresholds, and leaves the blocks to the
            host where none is on.
        capacity: sizes to run at without reading anything back; None for exact sizes.
        stats: after the call int32 [L, 3] on the device, see `Pass`; None where the blocks were left to the host.
    """

    active: Active | None = None
    capacity: Capacity | None = None
    stats: Tensor | None = None

    def __call__(self, body: Body, x: Tensor, positions: Positions | None) -> Reduced:
        active = body.active() if self.active is None else self.active
        if self.active is None and not any(map(any, active)):
            return body.all_whole(x, positions)
        batch = Pass(body, x, active, self.capacity, positions)
        self.stats = batch.stats
        return batch.run()

    def start(
        self, body: Body, x: Tensor, active: Active, positions: Positions | None, before: int, among: Segments | None
    ) -> InTriton:
        """The same block by block, see `steps.Stepping`."""
        found = start(body, x, active, positions, before, among, self.capacity)
        self.stats = found.batch.stats
        return found


@dataclass(frozen=True)
class InTriton:
    """A batch between two blocks; see `state.Partway`.

    Attributes:
        batch: whose.
        rows: what is left.
        bounds: their `cu` after each block so far.
        trail: sources after each block so far, where every block is traced.
    """

    batch: Pass
    rows: Rows
    bounds: tuple[Tensor, ...] = ()
    trail: tuple[Tensor, ...] | None = None

    @property
    def tokens(self) -> Tokens:
        return tokens_of(self.rows, Padding.of(self.rows.cu, self.rows.longest, self.rows.x.shape[0]))

    def step(self, i: int, _bias: Bias | None = None) -> InTriton:
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

    def reduced(self) -> Reduced:
        return Reduced(self.rows.x, self.rows.size, self.kept, self.rows.source, self.trail)


def start(
    body: Body, x: Tensor, active: Active, positions: Positions | None, before: int, among: Segments | None,
    capacity: Capacity | None = None,
) -> InTriton:  # fmt: skip
    """`x` [B, N, C] behind `before` blocks that removed nothing, to be unmerged."""
    batch, calls = Pass(body, x, active, capacity, positions), tracing()
    rows = Rows.grid(x, batch.branches[before].norms[0], among, positions is not None)
    trail = (rows.source,) * before if calls is not None and calls.every_block and rows.source is not None else None
    return InTriton(batch, rows, (rows.cu,) * before, trail)


def compile_ahead(body: Body, x: Tensor) -> None:
    """Compile what batches like `x` [B, N, C] will need, several kernels at a time.

    Kernels are compiled when they first run, which adds up to a minute for a first batch. Here one block runs at each
    length that has kernels of its own, all lengths at the same time, on images of a single token.
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
    """One batch on its way through the blocks.

    Args:
        capacity: sizes after each block, for a pass that reads nothing back; None for exact sizes.
        positions: of the tokens of `x`, where the host's attention needs them.

    Attributes:
        stats: int32 [L, 3] on the device, tokens of the batch and of its longest image after each block that reduces,
            zero after the others.
        plans: for each block what it did with its tokens, the last step of it; None where nothing.
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
        """Blocks only: the host's own norm and head follow."""
        calls = tracing()
        rows = Rows.start(self.x, self.branches[0].norms[0], traced=calls is not None)
        partway = InTriton(self, rows, trail=() if calls is not None and calls.every_block else None)
        for i in range(len(self.branches)):
            partway = partway.step(i)
        x, size, source = unpack(partway.rows, self.body.protected)
        return Reduced(x, size, partway.kept, source, partway.trail)

    def block(self, i: int, rows: Rows) -> Rows:
        """Run one block."""
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
        following = self.branches[i + 1].norms[0] if i + 1 < len(self.branches) else None
        x, normed = add_norm(rows.x, y, block.scales[1], following)
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
        """Add the branch `y` and reduce by `steps`."""
        block = self.branches[i]
        scale = block.scales[0]
        config = self.policy.config
        keys, penalty, received = self._score(i, steps, rows, y, q, k, received)
        rows = replace(rows, dropped=None if rows.dropped is None else rows.dropped.ready(i))
        if steps == ("prune", "merge"):
            # parity is taken after the drop, so the drop comes first, at the size that there is
            spare = torch.zeros_like(self.stats[i])
            dropped, _ = self._plan(i, ("prune",), rows, q, k, keys, received, spare)
            metric, *_ = _fold(rows, metric_rows(self.policy, keys, rows.cu), None, None, None, dropped)
            x, _, size, origin = _fold(rows, rows.x, y, scale, None, dropped)
            if penalty is not None:
                penalty = _fold(rows, penalty[:, None], None, None, None, dropped)[0][:, 0]
            source = _follow(i, rows, rows.x, y, scale, dropped)
            rows = replace(rows, x=x, size=size, origin=origin, cu=dropped.cu, source=source)
            heads = (1, -1) if config.scores.averages_keys else keys.shape[1:]
            keys, y, scale, steps = metric.unflatten(1, heads), None, None, ("merge",)
        limit = None if self.capacity is None else self.capacity.rows[i]
        planned, defined = self._plan(i, steps, rows, q, k, keys, received, self.stats[i], limit, penalty)
        self.plans[i] = planned
        if steps == ("fuse",):
            assert defined is not None
            # what is fused is dropped, and its receiver brings mean and size along
            x = fuse_rows(add_norm(rows.x, y, scale, None)[0], rows, defined)
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
        """Scores beyond the paper's, from class-token attention and from a probe.

        Returns:
            Keys of the similarity [T, H, D], merge penalty [T] or None, and the importance to prune by, laid out like
            `received`.
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
        own, blended = saliency_rows(
            log_saliency, weight, rows.size, blends, rows.origin, rows.cu, rows.longest, protected
        )  # fmt: skip
        received = received if blended is None else blended
        if config.scores.probes_similarity:
            k, penalty = metric[:, None], own if penalty is None else own * penalty
        return k, penalty, received

    def _plan(
        self, i: int, steps: tuple[str, ...], rows: Rows, q: Tensor, k: Tensor, keys: Tensor, received: Tensor | None,
        stats: Tensor, room: int | None = None, penalty: Tensor | None = None,
    ) -> tuple[RowPlan, reduction.BlockPlan | None]:  # fmt: skip
        """By kernels where they know what decides, or else by the definition, whose own plan comes along."""
        policy, protected, scores = self.policy, self.body.protected, self.policy.config.scores
        if not isinstance(policy, Thresholds) or policy.bounded:
            return plan_rows(policy, i, steps, rows, q, k, keys, received, protected, stats, room, penalty)
        merge = policy.merge[i : i + 1] if "merge" in steps else None
        prune = policy.prune[i : i + 1] if "prune" in steps else None
        found = None
        # mean keys of even and odd tokens have one fused kernel
        if merge is not None and (scores.mutual or not scores.averages_keys or penalty is not None):
            if scores.averages_keys:
                keys = similarity_metric(keys, rows.cu)
            found = candidates(keys, rows.origin, rows.cu, rows.longest, protected, scores.mutual, penalty)
        done = plan(
            keys, received, rows.size, rows.origin, rows.cu, rows.longest, merge, prune, protected, stats, room, found
        )
        return done, None


def _fold(
    rows: Rows, x: Tensor, y: Tensor | None, scale: Tensor | None, norm: Norm | None, planned: RowPlan,
    room: int | None = None, bipartite: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    room = x.shape[0] if room is None else room
    return fold(x, y, scale, norm, planned, rows.size, rows.origin, rows.cu, rows.longest, room, bipartite)


def _follow(
    i: int, rows: Rows, x: Tensor, y: Tensor | None, scale: Tensor | None, planned: RowPlan
) -> Tensor | None:  # fmt: skip
    """Sources after a plan of block `i`, where they are asked for; what it drops is kept where that is."""
    if rows.source is None:
        return None
    dropped = None if rows.dropped is None else rows.dropped.values
    return follow(rows.source, planned.slot, rows.cu, i, x, y, scale, dropped)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, weight: Tensor, want_received: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention [T, H * D] and, if wanted, what each token received; the stock fused one where that says all."""
    # under autocast the head norms of q and k leave them in float32
    q, k = q.to(v.dtype), k.to(v.dtype)
    if not rows.whole or want_received:
        return attend(q, k, v, weight, rows.cu, rows.longest, want_received)
    images = (t.unflatten(0, (-1, rows.longest)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*images).transpose(1, 2).flatten(2).flatten(0, 1), None
