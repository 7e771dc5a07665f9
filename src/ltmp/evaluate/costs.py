"""Measure how long a block takes on this device as a function of its number of tokens.

The halves of a block are timed alone at a few numbers of tokens, with and without reduction, and interpolated in
between. Timing the entire model at three budgets then shows how the blocks add up: how long embedding and head take,
and how the time of a block inside the model differs from its time alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import record
from ..deploy import deployed, restored
from ..engines import compiled, packed, select
from ..engines.body import Body
from ..engines.capacity import Capacity
from ..engines.onednn import Halves, halves
from ..engines.plain import look
from ..engines.positions import Positions
from ..engines.state import State
from ..hosts.attach import attachment
from ..method.dial import Dial
from ..method.policy import Active
from ..method.scores import attended_for, score
from ..method.thresholds import Thresholds
from ..method.tokens import Tokens
from ..ops.match.reference import candidates
from .agreement import entering
from .latency import BlockCosts, Costs, Floats, dial_of
from .timing import Call, timed

POINTS = 7
"""How many different numbers of tokens each block is timed at."""

MERGED = 0.1
"""Fraction of the even tokens that merge while a block is timed with its reduction."""


def measure_costs(
    model: nn.Module,
    images: Tensor,
    *,
    amp: torch.dtype | None = None,
    seconds: float = 0.3,
    progress: Callable[[int, int], None] | None = None,
) -> Costs:
    """Time a model with a dial, and its blocks alone, on batches like `images`. Takes about ten seconds.

    Args:
        model: attached, with a dial; left unchanged, on the images' device.
        images: [B, C, H, W], real ones, as they determine how many tokens leave each block.
        amp: autocast dtype.
        seconds: how long to time each of about thirty calls.
        progress: called with the number of parts done and their total.

    Raises:
        UsageError: the model has no dial.
    """
    attached = attachment(model)
    body, thresholds = attached.body, attached.thresholds
    dial, report = dial_of(thresholds), progress or (lambda done, total: None)
    with deployed(model, images.device, amp=amp), restored(thresholds), record():
        thresholds.set_budget(dial.lowest)
        active = thresholds.active()
        x, positions = entering(model, images)
        shapes = [tuple(parameter.shape for parameter in block.parameters()) for block in body.blocks]
        # one block of each shape, preferably one that reduces
        chosen = {shape: i for i, shape in enumerate(shapes)}
        chosen |= {shape: i for i, shape in enumerate(shapes) if any(active[i])}
        by_shape = {}
        for shape, i in chosen.items():
            by_shape[shape] = _block_costs(body, i, x, positions, active, dial, seconds)
            report(len(by_shape), len(chosen) + 1)
        blocks = tuple(by_shape[shape] for shape in shapes)
        costs = Costs(len(images), x.shape[1], blocks, tuple(map(any, active)), 1.0, 0.0, 0.0)
        shares = (dial.lowest, (dial.lowest + dial.highest) / 2, dial.highest, 1.0)
        kept, took = _time_model(model, thresholds, images, shares, seconds)
        report(len(chosen) + 1, len(chosen) + 1)
    # fitted to the tokens that these images kept: the dial's own counts are of other images
    factor, rest = _fit_line(costs.blocks_alone(kept[:-1]), np.array(took[:-1]))
    return replace(costs, factor=factor, rest=rest, dense=took[-1])


def _block_costs(
    body: Body, i: int, x: Tensor, positions: Positions | None, active: Active, dial: Dial, seconds: float
) -> BlockCosts:
    """Time block `i` alone at a few numbers of tokens."""
    tokens = x.shape[1]
    least = min(max(2.0, body.protected + 1.0, float(dial.kept.min())), tokens)
    counts = sorted({round(n) for n in np.linspace(least, tokens, POINTS).tolist()})
    engine = body.policy.config.engine
    triton = engine != "packed" and x.is_cuda and select.unavailable(x.device) is None
    pieces = _triton_pieces if triton else _packed_pieces
    calls: dict[str, Call] = {"whole": lambda: body.dense_block(i, x, positions)}
    leaving = []
    own_body = replace(body, policy=copy.deepcopy(body.policy))
    for n in counts:
        part = x[:, :n].contiguous()
        _set_to_merge_some(own_body, i, part)
        piece_calls, left = pieces(own_body, i, part, positions, active)
        calls |= {f"{name} {n}": call for name, call in piece_calls.items()}
        leaving.append(left)
    if triton and engine in ("auto", "graph"):
        calls = _as_cuda_graphs(calls)
    took = {name: 1 / speed for name, speed in timed(calls, 1, seconds).items()}
    plain, mlp, reduced = (np.array([took[f"{name} {n}"] for n in counts]) for name in ("plain", "mlp", "reduced"))
    entering_counts = np.array(counts, dtype=np.float64)
    attention = np.maximum(plain - mlp, 0)
    reduction = np.maximum(reduced - attention - np.interp(leaving, entering_counts, mlp), 0)
    return BlockCosts(entering_counts, attention, reduction, mlp, took["whole"])


def _set_to_merge_some(body: Body, i: int, x: Tensor) -> None:
    """Set the thresholds of block `i` so that a few tokens of x [B, n, C] merge and none is pruned."""
    policy = body.policy
    assert isinstance(policy, Thresholds)
    q, k, _ = body.recipe.qkv(body.blocks[i], x)
    # x as it enters the block will do, without attention, because only a plausible threshold is needed
    tokens = Tokens.start(x.shape[0], x.shape[1], x.device)
    attended = attended_for(policy, i, q, k, tokens)
    scores = score(policy, i, ("merge",), tokens, body.protected, x, k, None, attended)
    assert scores.metric is not None
    _, best, _ = candidates(scores.metric, tokens.live, policy.config.scores.mutual, scores.merge_penalty)
    similarities = best[:, 1:][best[:, 1:].isfinite()]
    policy.merge[i] = similarities.quantile(1 - MERGED) if len(similarities) else 0.999
    policy.prune[i] = torch.finfo(torch.float32).tiny


def _block_halves(body: Body, i: int, x: Tensor) -> Halves:
    blocks = body.blocks[i : i + 1]
    return halves(body.recipe, blocks, x, look(body.memory, body.recipe, blocks))[0]


def _packed_pieces(
    body: Body, i: int, x: Tensor, positions: Positions | None, active: Active
) -> tuple[dict[str, Call], float]:
    """Calls of the packed engine for block `i` on [B, n, C]: without reduction, with it, and its MLP alone.

    Returns:
        The calls, and the mean number of tokens per image after the reduction.
    """
    if compiled.applies(body.policy, x):
        return _compiled_pieces(body, i, x, positions, active)
    off = ((False, False),) * len(active)
    start = State.start(x, packs=True, positions=positions)
    rows = replace(start, x=x.flatten(0, 1))
    mlp = _block_halves(body, i, rows.x).mlp
    calls: dict[str, Call] = {
        "plain": lambda: packed.step(body, i, rows, off),
        "reduced": lambda: packed.step(body, i, rows, active),
        "mlp": lambda: mlp(rows.x),
    }
    counts = packed.step(body, i, rows, active).counts
    assert counts is not None
    return calls, sum(counts) / len(counts)


def _compiled_pieces(
    body: Body, i: int, x: Tensor, positions: Positions | None, active: Active
) -> tuple[dict[str, Call], float]:
    """The same with compiled decisions, as the packed engine runs on a CPU with numba."""
    rows = compiled.LiveRows.start(x)
    steps = compiled.block_steps(body.policy, active, body.protected)[i]
    half = _block_halves(body, i, rows.x)
    calls: dict[str, Call] = {
        "plain": lambda: compiled.run_block(body, i, half, rows, None, positions),
        "reduced": lambda: compiled.run_block(body, i, half, rows, steps, positions),
        "mlp": lambda: half.mlp(rows.x),
    }
    return calls, float(compiled.run_block(body, i, half, rows, steps, positions).counts.mean())


def _triton_pieces(
    body: Body, i: int, x: Tensor, positions: Positions | None, active: Active
) -> tuple[dict[str, Call], float]:
    """The same with the Triton engine, at fixed sizes so that nothing is read back: the MLP runs on all rows."""
    from ..engines.rows import Rows
    from ..engines.triton import Pass

    images, n, _ = x.shape
    capacity = Capacity((images * n,) * len(active), (n,) * len(active))

    def block(active: Active) -> Call:
        run = Pass(body, x, active, capacity, positions)
        rows = replace(Rows.start(x, run.branches[i].norms[0]), whole=False)
        return lambda: run.block(i, rows)

    run = Pass(body, x, active, capacity, positions)
    rows = Rows.start(x, run.branches[i].norms[0])
    calls: dict[str, Call] = {
        "plain": block(((False, False),) * len(active)),
        "reduced": block(active),
        "mlp": lambda: run.branches[i].mlp(rows.x, rows.normed),
    }
    return calls, float(n)


def _as_cuda_graphs(calls: dict[str, Call]) -> dict[str, Call]:
    """Each call as a CUDA graph, as the model will run: launching small kernels one by one would take longer."""
    from ..engines.recorder import CudaRecorder

    recorder = CudaRecorder()
    return {name: recorder.record(call)[0] for name, call in calls.items()}


def _time_model(
    model: nn.Module, thresholds: Thresholds, images: Tensor, shares: tuple[float, ...], seconds: float
) -> tuple[Tensor, list[float]]:
    """Mean tokens after each block, [S, L] on the CPU, and seconds of the model, at each share."""

    def at(share: float) -> Call:
        def call() -> Any:
            thresholds.set_budget(share)
            return model(images)

        return call

    calls = {str(share): at(share) for share in shares}
    kept = []
    for call in calls.values():
        for _ in range(3):  # the graph engine captures its graph on the second batch
            with record() as recorded:
                call()
        kept.append(torch.cat(recorded.kept).mean(0).cpu())
    speeds = timed(calls, 1, 3 * seconds)
    return torch.stack(kept), [1 / speeds[str(share)] for share in shares]


def _fit_line(x: Floats, y: Floats) -> tuple[float, float]:
    """Least-squares factor and rest of y = factor * x + rest, neither of them negative."""
    factor, rest = np.polyfit(x, y, 1)
    if factor <= 0:
        factor, rest = 1.0, max(0.0, float((y - x).mean()))
    elif rest < 0:
        factor, rest = (x * y).sum() / (x * x).sum(), 0.0
    return float(factor), float(rest)
