"""Whether reduction pays on a CPU: `auto` times both ways on a few calls, and then runs dense where that is faster.

What reduction saves has to pay for deciding, which it does not in very small models or with few tokens. Reduced answers
are close to dense ones and not equal to them, so nothing switches where answers were promised to be reduced: calls
inside `record()`, `trace()` or `unmerge()`, as all jobs of this package make, and models with a named engine.
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
from .onednn import watched
from .positions import Positions
from .state import Reduced

log = logging.getLogger("ltmp")

FIRST = 2
"""Calls before anything is timed: they compile kernels and allocate memory."""

PAIRS = 5
"""Calls that are timed both ways; the dense answer is thrown away."""

MARGIN = 1.05
"""Reduction may take this much of the dense time before it is given up: less is noise."""

_KEPT = 64
"""Trials kept for one host: shapes times budgets. The oldest one goes first."""


@dataclass
class Trial:
    """Times of one kind of call, and the verdict.

    Attributes:
        calls: how many there were.
        times: (reduced, dense) seconds of those that were timed.
        dense: the verdict, None while there is none.
    """

    calls: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)
    dense: bool | None = None

    def add(self, reduced: float, dense: float) -> bool:
        """Note the times of one call; returns whether they decided that dense runs from now on."""
        self.times.append((reduced, dense))
        if self.dense is not None or len(self.times) < PAIRS:
            return False
        self.dense = median(a / b for a, b in self.times) > MARGIN
        return self.dense


@dataclass
class _Trials:
    """Trials of one host, by what tells calls apart, and the batch sizes that it was reported to run dense at."""

    by_kind: OrderedDict[Hashable, Trial] = field(default_factory=OrderedDict)
    told: set[int] = field(default_factory=set)

    def of(self, kind: Hashable) -> Trial:
        trial = self.by_kind.setdefault(kind, Trial())
        while len(self.by_kind) > _KEPT:
            self.by_kind.popitem(last=False)
        return trial


_TRIALS: WeakKeyDictionary[nn.Module, _Trials] = WeakKeyDictionary()


def applies(body: Body, x: Tensor) -> bool:
    """Whether a call with `x` [B, N, C] may run dense: deployed on a CPU by `auto`, and nobody asks what is removed."""
    return (
        body.policy.config.engine == "auto"
        and x.device.type == "cpu"
        and type(x) is Tensor
        and type(body.policy) in (Thresholds, Rates)
        and not (torch.is_grad_enabled() or body.policy.training or body.blocks[0].training)
        and recording() is None
        and tracing() is None
        and not (unmerging() or torch.compiler.is_compiling() or torch.jit.is_tracing() or watched())
        # they would see both ways of a call that is timed
        and not any(map(hooked_inside, body.blocks))
    )


def chosen_dense(body: Body, x: Tensor) -> bool:
    """Whether a trial found that calls like this one are faster dense."""
    return bool(_trial(body, x).dense)


def run(body: Body, x: Tensor, active: Active, positions: Positions | None = None) -> Reduced:
    """Run all blocks on [B, N, C] of which `applies` is true, reduced or dense; see `packed.run`."""
    trial = _trial(body, x)
    trial.calls += 1
    if trial.dense:
        return body.all_whole(x, positions)
    if trial.dense is None and trial.calls > FIRST:
        return _timed(trial, body, x, active, positions)
    return packed.run(body, x, active, positions)


def _timed(trial: Trial, body: Body, x: Tensor, active: Active, positions: Positions | None) -> Reduced:
    """Run both ways, in turn the one or the other first; returns the reduced answer."""

    def plain() -> float:
        start = perf_counter()
        body.all_whole(x, positions)
        return perf_counter() - start

    dense = plain() if trial.calls % 2 else None
    start = perf_counter()
    found = packed.run(body, x, active, positions)
    reduced = perf_counter() - start
    if trial.add(reduced, plain() if dense is None else dense):
        _say(body, len(x), *(median(times) for times in zip(*trial.times, strict=True)))
    return found


def _say(body: Body, images: int, reduced: float, dense: float) -> None:
    told = _TRIALS[body.host].told
    if images not in told:
        told.add(images)
        log.warning(
            "token reduction does not pay for batches of %d on this CPU (%.2f ms against %.2f ms dense): running "
            "dense; name an engine (engine='packed') to reduce all the same",
            images, 1e3 * reduced, 1e3 * dense,
        )  # fmt: skip


def _trial(body: Body, x: Tensor) -> Trial:
    """That of calls like this one: as many images and tokens, in the same type, threads and thresholds."""
    policy = body.policy
    values = (
        tuple(t.detach().numpy().tobytes() for t in (policy.merge, policy.prune))
        if isinstance(policy, Thresholds)
        else None
    )
    amp = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    kind = (x.shape, x.dtype, amp, torch.get_num_threads(), policy.config, values)
    return _TRIALS.setdefault(body.host, _Trials()).of(kind)
