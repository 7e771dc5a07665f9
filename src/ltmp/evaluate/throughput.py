"""Images per second, dense and reduced in turns, so that whatever else the machine does hits both alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from ..calls import dense


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


def measure(model: nn.Module, images: Tensor, *, rounds: int = 9, warmup: int = 1, seconds: float = 20.0) -> Throughput:
    """Time an attached model on one batch [B, C, H, W], dense and reduced in turns.

    Stops after `rounds` turns, or after 3 once `seconds` are over.

    The caller has put the model in evaluation mode, where gradients, autocast and the device are as deployed.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    start = perf_counter()
    for turn in range(warmup + rounds):
        if turn >= warmup + 3 and perf_counter() - start > seconds:
            break
        for plain in (True, False):
            with dense() if plain else nullcontext():
                times[plain].append(_seconds(lambda: model(images), images.device))
    slow, fast = times[True][warmup:], times[False][warmup:]
    return Throughput(
        batch_size=len(images),
        rounds=len(slow),
        dense=len(images) / median(slow),
        reduced=len(images) / median(fast),
        speedup=median(a / b for a, b in zip(slow, fast, strict=True)),
    )


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    _wait(device)
    start = perf_counter()
    call()
    _wait(device)
    return perf_counter() - start


def _wait(device: torch.device) -> None:
    """A CUDA call returns before its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
