"""Images per second. Timed calls are interleaved, so that other load on the machine affects all of them alike."""

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

Call = Callable[[], Any]


@dataclass(frozen=True)
class Throughput:
    """Median images per second over `rounds` rounds, after a warm-up, at one batch size.

    Attributes:
        speedup: median over the rounds of dense time / reduced time.
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
    """Time an attached model on one batch [B, C, H, W]: dense, interleaved with reduced or with a baseline.

    Stops after `rounds` rounds, or after 3 once `seconds` have passed. The caller sets evaluation mode, inference mode,
    autocast and the device as deployed.
    """
    dense_seconds: list[float] = []
    reduced_seconds: list[float] = []
    reduced = (lambda: model(images)) if baseline is None else partial(baseline.run, baseline.prepared(images))
    start = perf_counter()
    for done in range(warmup + rounds):
        if done >= warmup + 3 and perf_counter() - start > seconds:
            break
        with dense():
            dense_seconds.append(_seconds(lambda: model(images), images.device))
        reduced_seconds.append(_seconds(reduced, images.device))
    del dense_seconds[:warmup], reduced_seconds[:warmup]
    return Throughput(
        batch_size=len(images),
        rounds=len(dense_seconds),
        dense=len(images) / median(dense_seconds),
        reduced=len(images) / median(reduced_seconds),
        speedup=median(a / b for a, b in zip(dense_seconds, reduced_seconds, strict=True)),
    )


def _seconds(call: Call, device: torch.device) -> float:
    """Wall-clock seconds of one call, including the GPU work that it launches."""
    _synchronize(device)
    start = perf_counter()
    call()
    _synchronize(device)
    return perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(ways: dict[str, Call], images: int, seconds: float) -> dict[str, float]:
    """Images per second of each call in `ways`, the median over rounds that run each of them.

    Args:
        images: number of images that one call processes.
        seconds: roughly how long to time each call.
    """
    cuda = torch.cuda.is_available()
    once = {name: min(_elapsed(call, 1, cuda) for _ in range(2)) for name, call in ways.items()}
    repeats = {name: max(1, round(seconds / 10 / max(took, 1e-6))) for name, took in once.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    rounds = 10 if max(once.values(), default=0) < seconds else 3
    for _ in range(rounds):
        for name, call in ways.items():
            times[name].append(_elapsed(call, repeats[name], cuda))
    return {name: images / median(elapsed) for name, elapsed in times.items()}


def _elapsed(call: Call, repeats: int, cuda: bool) -> float:
    """Seconds per call; on a GPU by CUDA events."""
    if not cuda:
        begin = perf_counter()
        for _ in range(repeats):
            call()
        return (perf_counter() - begin) / repeats
    begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin_event.record()
    for _ in range(repeats):
        call()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3 / repeats
