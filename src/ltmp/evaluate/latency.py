"""A budget in milliseconds: what blocks cost on this device by the tokens that they have, and the share that meets it.

The halves of a block are timed alone at a few numbers of tokens, without reduction and with it; the whole model at
three budgets then says how they add up: what embedding and head take, and how much a block in its place differs from
one alone. Between the measured numbers of tokens, costs are interpolated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..dial import Dial
from ..engines import packed, select
from ..engines.onednn import halves
from ..engines.positions import Positions
from ..engines.request import Active, Capacity
from ..engines.state import State
from ..errors import LTMPError, UsageError
from ..models import stack_of, thresholds_of
from ..ops.match.reference import match
from ..reduction import similarity_metric
from ..stack import ReducedStack, dense, record
from ..thresholds import Thresholds
from .accuracy import deployed
from .bench import Call, timed

POINTS = 7
"""Numbers of tokens that blocks are timed at."""

MERGED = 0.1
"""Share of the even tokens that merge while a block is timed with its reduction."""

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class BlockCosts:
    """Seconds of one shape of block for a batch, by tokens an image; [P] each.

    Attributes:
        tokens: rising.
        attention: of what comes before the reduction, by tokens that enter.
        reduction: of the reduction, by tokens that enter.
        mlp: of what comes after it, by tokens that leave.
        whole: of the host's own block with all tokens, a number.
    """

    tokens: Floats
    attention: Floats
    reduction: Floats
    mlp: Floats
    whole: float

    def seconds(self, entering: Floats, leaving: Floats, reduces: bool) -> Floats:
        """Seconds of a block for a batch, like `entering`."""
        before = self.attention + self.reduction if reduces else self.attention
        return np.interp(entering, self.tokens, before) + np.interp(leaving, self.tokens, self.mlp)


@dataclass(frozen=True)
class Costs:
    """What a batch costs in time on one device and engine.

    Attributes:
        images: of the batch that was measured.
        tokens: that enter the first block.
        blocks: for each block the costs of its shape; `reduces` says which of them reduce.
        factor, rest: seconds of the model = factor * those of its blocks + rest.
        dense: seconds with all reduction off.
    """

    images: int
    tokens: int
    blocks: tuple[BlockCosts, ...]
    reduces: tuple[bool, ...]
    factor: float
    rest: float
    dense: float

    def predict_seconds(self, kept: Tensor) -> Tensor:
        """float64 [...], seconds for a batch.

        Args:
            kept: [..., L], mean tokens after each block, as `Dial.kept_at` gives them.
        """
        return torch.from_numpy(np.asarray(self.factor * self.blocks_alone(kept) + self.rest))

    def blocks_alone(self, kept: Tensor) -> Floats:
        """[...], seconds of all blocks as each took alone."""
        left = kept.double().numpy()
        total, entering, reduced = np.zeros(left.shape[:-1]), np.full(left.shape[:-1], float(self.tokens)), False
        for i, (block, reduces) in enumerate(zip(self.blocks, self.reduces, strict=True)):
            reduced |= reduces
            total += block.seconds(entering, left[..., i], reduces) if reduced else block.whole
            entering = left[..., i]
        return total

    def share_for(self, dial: Dial, seconds: float) -> float:
        """The largest share of `dial` that is predicted to take at most `seconds` a batch; 1 where dense does.

        Raises:
            UsageError: not a time.
            LTMPError: the dial's lowest share takes longer; the message says what can be reached.
        """
        if not (np.isfinite(seconds) and seconds > 0):
            raise UsageError(f"a batch cannot take {1e3 * seconds:g} ms: give a positive time or speed")
        if self.dense <= seconds:
            return 1.0
        shares = np.linspace(dial.lowest, dial.highest, 512)
        predicted = self.predict_seconds(torch.stack([dial.kept_at(share) for share in shares.tolist()])).numpy()
        fast = np.flatnonzero(predicted <= seconds)
        if len(fast) == 0:
            first, last = float(predicted.min()), max(float(predicted.max()), self.dense)
            raise LTMPError(
                f"{speed(seconds, self.images)} are out of reach: for batches of {self.images} this model takes "
                f"between {speed(first, self.images)} and {speed(last, self.images)} here"
            )
        # a round number, rather a little faster
        return max(dial.lowest, int(1e4 * shares[fast[-1]]) / 1e4)


def speed(seconds: float, images: int) -> str:
    """A batch's time in words: 9.53 ms (839 images/s)."""
    return f"{_three(1e3 * seconds)} ms ({_three(images / seconds)} images/s)"


def _three(value: float) -> str:
    """Three digits, or the whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def set_latency(
    model: nn.Module, costs: Costs, *, milliseconds: float | None = None, images_per_second: float | None = None
) -> float:
    """Turn a model's dial to the largest budget that is predicted to be fast enough; all off where dense is.

    >>> costs = ltmp.measure_costs(model, images)
    >>> ltmp.set_latency(model, costs, milliseconds=12)

    Args:
        model: attached, with a dial.
        costs: measured on this model, device and batch size.
        milliseconds: for a batch of `costs.images`; or
        images_per_second: at that batch size.

    Returns:
        The share.

    Raises:
        UsageError: no dial, or not exactly one target.
        LTMPError: out of reach; the message says what can be reached, and the thresholds stay as they are.
    """
    if (milliseconds is None) == (images_per_second is None):
        raise UsageError("how fast? give either milliseconds a batch or images per second")
    if milliseconds is None:
        seconds = costs.images / images_per_second if images_per_second else float("nan")
    else:
        seconds = milliseconds / 1e3
    own = thresholds_of(model)
    share = costs.share_for(_dial_of(own), seconds)
    own.set_budget(share)
    return share


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
    stack, own = stack_of(model), thresholds_of(model)
    dial, told = _dial_of(own), progress or (lambda done, total: None)
    with deployed(model, images.device, amp=amp), _as_it_was(own), record():
        own.set_budget(dial.lowest)
        active = own.active()
        x, positions = _entering(model, stack, images)
        shapes = [tuple(parameter.shape for parameter in block.parameters()) for block in stack.blocks]
        # one block of each shape, one that reduces where there is one
        chosen = {shape: i for i, shape in enumerate(shapes)}
        chosen |= {shape: i for i, shape in enumerate(shapes) if any(active[i])}
        found = {}
        for shape, i in chosen.items():
            found[shape] = _block_costs(stack, i, x, positions, active, dial, seconds)
            told(len(found), len(chosen) + 1)
        costs = Costs(
            len(images), x.shape[1], tuple(found[shape] for shape in shapes), tuple(map(any, active)), 1.0, 0.0, 0.0
        )
        shares = (dial.lowest, (dial.lowest + dial.highest) / 2, dial.highest, 1.0)
        took = _whole_model(model, own, images, shares, seconds)
        told(len(chosen) + 1, len(chosen) + 1)
    kept = torch.stack([dial.kept_at(share) for share in shares[:-1]])
    factor, rest = _line(costs.blocks_alone(kept), np.array(took[:-1]))
    return replace(costs, factor=factor, rest=rest, dense=took[-1])


def _dial_of(own: Thresholds) -> Dial:
    if own.dial is None:
        raise UsageError("a time is met by turning the dial, and these thresholds have none: docs/dial.md says how")
    return own.dial


@contextmanager
def _as_it_was(own: Thresholds) -> Iterator[None]:
    """Whatever is set inside is set back."""
    merge, prune, asked = own.merge.detach().clone(), own.prune.detach().clone(), own.asked
    try:
        yield
    finally:
        own.set(merge, prune)
        own.asked = asked


def _entering(model: nn.Module, stack: ReducedStack, images: Tensor) -> tuple[Tensor, Positions | None]:
    """[B, N, C], what enters the first block, and where its tokens are."""
    found: list[Any] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args[0], stack.positions(args[0], args[1:], dict(kwargs))))

    hook = stack.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with dense():
            model(images)
    finally:
        hook.remove()
    return found[0]


def _block_costs(
    stack: ReducedStack, i: int, x: Tensor, positions: Positions | None, active: Active, dial: Dial, seconds: float
) -> BlockCosts:
    """Block `i` alone at a few numbers of tokens."""
    tokens = x.shape[1]
    least = min(max(2.0, stack.protected + 1.0, float(dial.kept.min())), tokens)
    counts = sorted({round(n) for n in np.linspace(least, tokens, POINTS).tolist()})
    engine = stack.thresholds.config.engine
    triton = engine != "packed" and x.is_cuda and select.unavailable(x.device) is None
    pieces = _triton_pieces if triton else _packed_pieces
    policy = copy.deepcopy(stack.thresholds)
    assert isinstance(policy, Thresholds)
    ways: dict[str, Call] = {"whole": lambda: stack.whole(i, x, positions)}
    left = []
    with stack.using(policy):
        for n in counts:
            part = x[:, :n].contiguous()
            _merge_some(policy, stack, i, part)
            calls, leaving = pieces(stack, i, part, positions, active)
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


def _merge_some(policy: Thresholds, stack: ReducedStack, i: int, x: Tensor) -> None:
    """Thresholds of block `i` at which a few tokens of x [B, n, C] merge, and none is pruned."""
    _, k, _ = stack.recipe.qkv(stack.blocks[i], x)
    metric = similarity_metric(k)
    best, _ = match(metric, torch.ones(metric.shape[:2], dtype=torch.bool, device=x.device))
    policy.merge[i] = best[:, 1:].flatten().quantile(1 - MERGED) if best.shape[1] > 1 else 0.999
    policy.prune[i] = torch.finfo(torch.float32).tiny


def _packed_pieces(
    stack: ReducedStack, i: int, x: Tensor, positions: Positions | None, active: Active
) -> tuple[dict[str, Call], float]:
    """Block `i` on [B, n, C] without its reduction, with it, and its MLP; and the tokens an image that it leaves."""
    off = ((False, False),) * len(active)
    start = State.start(x, packs=True, positions=positions)
    rows = replace(start, x=x.flatten(0, 1))
    mlp = halves(stack.recipe, stack.blocks[i], rows.x).mlp
    calls: dict[str, Call] = {
        "plain": lambda: packed.step(stack, i, rows, off),
        "reduced": lambda: packed.step(stack, i, rows, active),
        "mlp": lambda: rows.x + mlp(rows.x),
    }
    counts = packed.step(stack, i, rows, active).counts
    assert counts is not None
    return calls, sum(counts) / len(counts)


def _triton_pieces(
    stack: ReducedStack, i: int, x: Tensor, positions: Positions | None, active: Active
) -> tuple[dict[str, Call], float]:
    """The same on a GPU, at fixed sizes, so that nothing is read back: the MLP runs on as many rows as entered."""
    from ..engines.triton import Pass, Rows

    images, n, _ = x.shape
    capacity = Capacity((images * n,) * len(active), (n,) * len(active))

    def block(active: Active) -> Call:
        run = Pass(stack, x, active, capacity, positions)
        rows = replace(Rows.start(x, run.branches[i].norms[0]), whole=False)
        return lambda: run.block(i, rows)

    run = Pass(stack, x, active, capacity, positions)
    rows = Rows.start(x, run.branches[i].norms[0])
    calls: dict[str, Call] = {
        "plain": block(((False, False),) * len(active)),
        "reduced": block(active),
        "mlp": lambda: run.branches[i].mlp(rows.x, rows.normed),
    }
    return calls, float(n)


def _recorded(ways: dict[str, Call]) -> dict[str, Call]:
    """Each as a CUDA graph, as the model will run: launching small kernels one by one would take longer."""
    from ..engines.graph import CudaRecorder

    recorder = CudaRecorder()
    return {name: recorder.record(call)[0] for name, call in ways.items()}


def _whole_model(
    model: nn.Module, own: Thresholds, images: Tensor, shares: tuple[float, ...], seconds: float
) -> list[float]:
    """Seconds of the model at each share."""

    def at(share: float) -> Call:
        def call() -> Any:
            own.set_budget(share)
            return model(images)

        return call

    calls = {str(share): at(share) for share in shares}
    for call in calls.values():
        for _ in range(3):  # graphs take two batches to get going
            call()
    speeds = timed(calls, 1, 3 * seconds)
    return [1 / speeds[str(share)] for share in shares]


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Factor and rest, neither negative, that come closest to y = factor * x + rest."""
    factor, rest = np.polyfit(x, y, 1)
    if factor <= 0:
        factor, rest = 1.0, max(0.0, float((y - x).mean()))
    elif rest < 0:
        factor, rest = (x * y).sum() / (x * x).sum(), 0.0
    return float(factor), float(rest)
