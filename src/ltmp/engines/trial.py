"""Whether reduction pays on a CPU: `auto` times a few calls both reduced and dense, and then runs the faster way.

In very small models, or with few tokens, selecting tokens costs more than removing them saves. Reduced outputs are
close but not equal to dense ones, so `auto` never switches to dense if the caller relies on reduction: inside
`record()`, `trace()` or `unmerge()`, which all commands of this package use, or with a named engine.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..calls import recording, tracing, unmerging
from ..method.policy import Active
from ..method.rates import Rates
from ..method.thresholds import Thresholds
from . import packed
from .body import Body
from .hooks import hooked_inside
from .onednn import dispatch_mode_active
from .positions import Positions
from .state import Reduced

log = logging.getLogger("ltmp")

FIRST = 2
"""Warm-up calls, not timed: they compile kernels and allocate memory."""

PAIRS = 5
"""Calls that are timed both ways; the dense output is thrown away."""

MARGIN = 1.05
"""Dense runs if reduction takes more than this multiple of the dense time; smaller differences are noise."""

_MAX_TRIALS = 64
"""Trials kept per host, one for each combination of shape and budget; the oldest is evicted first."""


@dataclass
class Trial:
    """Times of one kind of call, and the verdict.

    Attributes:
        calls: number of calls so far.
        times: (reduced, dense) seconds of each timed call.
        dense: whether dense is faster, None until enough calls were timed.
    """

    calls: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)
    dense: bool | None = None

    def add(self, reduced: float, dense: float) -> bool:
        """Add the times of one call; return whether it settled the trial in favour of dense."""
        self.times.append((reduced, dense))
        if self.dense is not None or len(self.times) < PAIRS:
            return False
        self.dense = median(a / b for a, b in self.times) > MARGIN
        return self.dense


@dataclass
class _Trials:
    """Trials of one host by kind of call, and the batch sizes that were already warned about."""

    by_kind: OrderedDict[Hashable, Trial] = field(default_factory=OrderedDict)
    warned: set[int] = field(default_factory=set)

    def of(self, kind: Hashable) -> Trial:
        trial = self.by_kind.setdefault(kind, Trial())
        while len(self.by_kind) > _MAX_TRIALS:
            self.by_kind.popitem(last=False)
        return trial


_TRIALS: WeakKeyDictionary[nn.Module, _Trials] = WeakKeyDictionary()


def applies(body: Body, x: Tensor) -> bool:
    """Whether a call with `x` [B, N, C] may run dense: CPU inference with `auto` that does not rely on reduction."""
    return (
        body.policy.config.engine == "auto"
        and x.device.type == "cpu"
        and type(x) is Tensor
        and type(body.policy) in (Thresholds, Rates)
        and not (torch.is_grad_enabled() or body.policy.training or body.blocks[0].training)
        and recording() is None
        and tracing() is None
        and not (unmerging() or torch.compiler.is_compiling() or torch.jit.is_tracing() or dispatch_mode_active())
        # hooks would see both runs of a timed call
        and not any(map(hooked_inside, body.blocks))
    )


def chosen_dense(body: Body, x: Tensor) -> bool:
    """Whether a trial found that calls like this one run faster dense."""
    return bool(_trial(body, x).dense)


def run(body: Body, x: Tensor, active: Active, positions: Positions | None = None) -> Reduced:
    """Run all blocks on [B, N, C], reduced or dense; only for calls that `applies` accepts. See `packed.run`."""
    trial = _trial(body, x)
    trial.calls += 1
    if trial.dense:
        return body.dense_blocks(x, positions)
    if trial.dense is None and trial.calls > FIRST:
        return _timed(trial, body, x, active, positions)
    return packed.run(body, x, active, positions)


def _timed(trial: Trial, body: Body, x: Tensor, active: Active, positions: Positions | None) -> Reduced:
    """Run both ways, alternating which goes first, and return the reduced output."""

    def dense_seconds() -> float:
        start = perf_counter()
        body.dense_blocks(x, positions)
        return perf_counter() - start

    dense = dense_seconds() if trial.calls % 2 else None
    start = perf_counter()
    result = packed.run(body, x, active, positions)
    reduced = perf_counter() - start
    if trial.add(reduced, dense_seconds() if dense is None else dense):
        _warn_once(body, len(x), *(median(times) for times in zip(*trial.times, strict=True)))
    return result


def _warn_once(body: Body, images: int, reduced: float, dense: float) -> None:
    warned = _TRIALS[body.host].warned
    if images not in warned:
        warned.add(images)
        log.warning(
            "token reduction does not pay for batches of %d on this CPU (%.2f ms against %.2f ms dense): running "
            "dense; name an engine (engine='packed') to reduce all the same",
            images, 1e3 * reduced, 1e3 * dense,
        )  # fmt: skip


def _trial(body: Body, x: Tensor) -> Trial:
    """Return the trial of calls like this one: same shape, dtype, autocast, threads, config and thresholds."""
    policy = body.policy
    values = (
        tuple(t.detach().numpy().tobytes() for t in (policy.merge, policy.prune))
        if isinstance(policy, Thresholds)
        else None
    )
    amp = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    kind = (x.shape, x.dtype, amp, torch.get_num_threads(), policy.config, values)
    return _TRIALS.setdefault(body.host, _Trials()).of(kind)
