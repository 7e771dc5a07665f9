"""Time that a block takes on this device, by its number of tokens.

The halves of a block are timed alone at a few numbers of tokens, without reduction and with it; the whole model at
three budgets then says how they add up: what embedding and head take, and how much a block in its place differs from
one alone. Between the measured numbers of tokens, costs are interpolated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calls import record
from ..deploy import deployed
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
"""Numbers of tokens that blocks are timed at."""

MERGED = 0.1
"""Share of the even tokens that merge while a block is timed with its reduction."""


def measure_costs(
    model: nn.Module,
    images: Tensor,
    *,
    amp: torch.dtype | None = None,
    seconds: float = 0.3,
    progress: Callable[[int, int], None] | None = None,
) -> Costs:
    """Time the blocks of a model with a dial, and the model, on batches like `images`: some ten seconds.

    Args:
        model: attached, with a dial; it is left as it was, on the images' device.
        images: [B, C, H, W], real ones: how many tokens leave a block depends on them.
        amp: autocast type.
        seconds: how long to time each of about thirty calls.
        progress: called with the parts done and their number.

    Raises:
        UsageError: the model has no dial.
    """
    made = attachment(model)
    body, own = made.body, made.thresholds
    dial, told = dial_of(own), progress or (lambda done, total: None)
    with deployed(model, images.device, amp=amp), _as_it_was(own), record():
        own.set_budget(dial.lowest)
        active = own.active()
        x, positions = entering(model, images)
        shapes = [tuple(parameter.shape for parameter in block.parameters()) for block in body.blocks]
        # one block of each shape, one that reduces where there is one
        chosen = {shape: i for i, shape in enumerate(shapes)}
        chosen |= {shape: i for i, shape in enumerate(shapes) if any(active[i])}
        found = {}
        for shape, i in chosen.items():
            found[shape] = _block_costs(body, i, x, positions, active, dial, seconds)
            told(len(found), len(chosen) + 1)
        costs = Costs(
            len(images), x.shape[1], tuple(found[shape] for shape in shapes), tuple(map(any, active)), 1.0, 0.0, 0.0
        )
        shares = (dial.lowest, (dial.lowest + dial.highest) / 2, dial.highest, 1.0)
        kept, took = _whole_model(model, own, images, shares, seconds)
        told(len(chosen) + 1, len(chosen) + 1)
    # by what these images kept: the dial's own counts are for others
    factor, rest = _line(costs.blocks_alone(kept[:-1]), np.array(took[:-1]))
    return replace(costs, factor=factor, rest=rest, dense=took[-1])


@contextmanager
def _as_it_was(own: Thresholds) -> Iterator[None]:
    """Whatever is set inside is set back."""
    merge, prune, asked = own.merge.detach().clone(), own.prune.detach().clone(), own.asked
    try:
        yield
    finally:
        own.set(merge, prune)
        own.asked = asked


def _block_costs(
    body: Body, i: int, x: Tensor, positions: Positions | None, active: Active, dial: Dial, seconds: float
) -> BlockCosts:
    """Block `i` alone at a few numbers of tokens."""
    tokens = x.shape[1]
    least = min(max(2.0, body.protected + 1.0, float(dial.kept.min())), tokens)
    counts = sorted({round(n) for n in np.linspace(least, tokens, POINTS).tolist()})
    engine = body.policy.config.engine
    triton = engine != "packed" and x.is_cuda and select.unavailable(x.device) is None
    pieces = _triton_pieces if triton else _packed_pieces
    policy = copy.deepcopy(body.policy)
    ways: dict[str, Call] = {"whole": lambda: body.whole(i, x, positions)}
    left = []
    own = replace(body, policy=policy)
    for n in counts:
        part = x[:, :n].contiguous()
        _merge_some(own, i, part)
        calls, leaving = pieces(own, i, part, positions, active)
        ways |= {f"{name} {n}": call for name, call in calls.items()}
        left.append(leaving)
    if triton and engine in ("auto", "graph"):
        ways = _recorded(ways)
    took = {name: 1 / speed for name, speed in timed(ways, 1, seconds).items()}
    plain, mlp, reduced = (np.array([took[f"{name} {n}"] for n in counts]) for name in ("plain", "mlp", "reduced"))
    at = np.array(counts, dtype=np.float64)
    attention = np.maximum(plain - mlp, 0)
    reduction = np.maximum(reduced - attention - np.interp(left, at, mlp), 0)
    return BlockCosts(at, attention, reduction, mlp, took["whole"])


def _merge_some(body: Body, i: int, x: Tensor) -> None:
    """Thresholds of block `i` at which a few tokens of x [B, n, C] merge, and none is pruned."""
    policy = body.policy
    assert isinstance(policy, Thresholds)
    q, k, _ = body.recipe.qkv(body.blocks[i], x)
    # thresholds, not answers, are wanted: what comes in is as good as what attention makes of it
    tokens = Tokens.start(x.shape[0], x.shape[1], x.device)
    attended = attended_for(policy, i, q, k, tokens)
    scores = score(policy, i, ("merge",), tokens, body.protected, x, k, None, attended)
    assert scores.metric is not None
    _, best, _ = candidates(scores.metric, tokens.live, policy.config.scores.mutual, scores.merge_penalty)
    found = best[:, 1:][best[:, 1:].isfinite()]
    policy.merge[i] = found.quantile(1 - MERGED) if len(found) else 0.999
    policy.prune[i] = torch.finfo(torch.float32).tiny


def _half(body: Body, i: int, x: Tensor) -> Halves:
    blocks = body.blocks[i : i + 1]
    return halves(body.recipe, blocks, x, look(body.memory, body.recipe, blocks))[0]


def _packed_pieces(
    body: Body, i: int, x: Tensor, positions: Positions | None, active: Active
) -> tuple[dict[str, Call], float]:
    """Block `i` on [B, n, C] without its reduction, with it, and its MLP; and the tokens an image that it leaves."""
    if compiled.applies(body.policy, x):
        return _compiled_pieces(body, i, x, positions, active)
    off = ((False, False),) * len(active)
    start = State.start(x, packs=True, positions=positions)
    rows = replace(start, x=x.flatten(0, 1))
    mlp = _half(body, i, rows.x).mlp
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
    """The same with a compiled plan."""
    rows = compiled.LiveRows.start(x)
    steps = compiled.block_steps(body.policy, active, body.protected)[i]
    half = _half(body, i, rows.x)
    calls: dict[str, Call] = {
        "plain": lambda: compiled.run_block(body, i, half, rows, None, positions),
        "reduced": lambda: compiled.run_block(body, i, half, rows, steps, positions),
        "mlp": lambda: half.mlp(rows.x),
    }
    return calls, float(compiled.run_block(body, i, half, rows, steps, positions).counts.mean())


def _triton_pieces(
    body: Body, i: int, x: Tensor, positions: Positions | None, active: Active
) -> tuple[dict[str, Call], float]:
    """The same on a GPU, at fixed sizes, so that nothing is read back: the MLP runs on as many rows as entered."""
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


def _recorded(ways: dict[str, Call]) -> dict[str, Call]:
    """Each as a CUDA graph, as the model will run: launching small kernels one by one would take longer."""
    from ..engines.recorder import CudaRecorder

    recorder = CudaRecorder()
    return {name: recorder.record(call)[0] for name, call in ways.items()}


def _whole_model(
    model: nn.Module, own: Thresholds, images: Tensor, shares: tuple[float, ...], seconds: float
) -> tuple[Tensor, list[float]]:
    """Tokens after each block, [S, L] on the CPU, and seconds of the model at each share."""

    def at(share: float) -> Call:
        def call() -> Any:
            own.set_budget(share)
            return model(images)

        return call

    calls = {str(share): at(share) for share in shares}
    kept = []
    for call in calls.values():
        for _ in range(3):  # graphs take two batches to get going
            with record() as recorded:
                call()
        kept.append(torch.cat(recorded.kept).mean(0).cpu())
    speeds = timed(calls, 1, 3 * seconds)
    return torch.stack(kept), [1 / speeds[str(share)] for share in shares]


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Factor and rest, neither negative, that come closest to y = factor * x + rest."""
    factor, rest = np.polyfit(x, y, 1)
    if factor <= 0:
        factor, rest = 1.0, max(0.0, float((y - x).mean()))
    elif rest < 0:
        factor, rest = (x * y).sum() / (x * x).sum(), 0.0
    return float(factor), float(rest)
