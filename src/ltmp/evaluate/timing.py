"""Images per second, dense and reduced in turns, so that whatever else the machine does hits both alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import dense
from .baselines import Baseline


@dataclass(frozen=True)
class Throughput:
    """Median images per second of `rounds` turns, after a warm-up, at one batch size.

    Attributes:
        speedup: median over the turns of dense time over reduced time.
    """

    batch_size: int
    rounds: int
    dense: float
    reduced: float
    speedup: float


def measure(
    model: nn.Module,
    images: Tensor,
    baseline: Baseline | None = None,
    *,
    rounds: int = 9,
    warmup: int = 1,
    seconds: float = 20.0,
) -> Throughput:
    """Time an attached model on one batch [B, C, H, W], dense and reduced, or a baseline in its place, in turns.

    Stops after `rounds` turns, or after 3 once `seconds` are over.

    The caller has put the model in evaluation mode, where gradients, autocast and the device are as deployed.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    reduced = (lambda: model(images)) if baseline is None else partial(baseline.run, baseline.prepared(images))
    start = perf_counter()
    for turn in range(warmup + rounds):
        if turn >= warmup + 3 and perf_counter() - start > seconds:
            break
        with dense():
            times[True].append(_seconds(lambda: model(images), images.device))
        times[False].append(_seconds(reduced, images.device))
    slow, fast = times[True][warmup:], times[False][warmup:]
    return Throughput(
        batch_size=len(images),
        rounds=len(slow),
        dense=len(images) / median(slow),
        reduced=len(images) / median(fast),
        speedup=median(a / b for a, b in zip(slow, fast, strict=True)),
    )


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = perf_counter()
    call()
    _wait(device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    """A CUDA call returns before its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Call = Callable[[], Any]


def timed(ways: dict[str, Call], images: int, seconds: float) -> dict[str, float]:
    """Images per second of each way: medians over rounds in which every way has its turn."""
    cuda = torch.cuda.is_available()
    once = {name: min(_elapsed(call, 1, cuda) for _ in range(2)) for name, call in ways.items()}
    repeats = {name: max(1, round(seconds / 10 / max(took, 1e-6))) for name, took in once.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    rounds = 10 if max(once.values(), default=0) < seconds else 3
    for _ in range(rounds):
        for name, call in ways.items():
            times[name].append(_elapsed(call, repeats[name], cuda))
    return {name: images / median(found) for name, found in times.items()}


def _elapsed(call: Call, repeats: int, cuda: bool) -> float:
    """Seconds a call, on the device's own clock where it has one."""
    if not cuda:
        begin = perf_counter()
        for _ in range(repeats):
            call()
        return (perf_counter() - begin) / repeats
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    for _ in range(repeats):
        call()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3 / repeats
