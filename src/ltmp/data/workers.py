"""Processes that decode images: how batches leave them, and how their end is noticed."""

from __future__ import annotations

import multiprocessing.queues
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..errors import LTMPError

SHARED = "/dev/shm"
"""Where Linux keeps the memory through which torch hands tensors over."""

SIGNAL_WITHIN = 1.0
"""Seconds in which the signal of a killed process comes after whatever else shows that it is gone."""


class LostWorkerError(LTMPError):
    """A process that decodes has ended; nothing is wrong with the images."""


def start_worker(_worker: int) -> None:
    """Set up a DataLoader's worker process.

    It hands batches over from a thread, and where that fails (no room in /dev/shm, a limit on the size or number of
    files) Python prints the error and goes on: the batch would be waited for without end. So the process ends instead,
    which torch notices. Errors elsewhere torch hands on itself; its hook would print that a stopped run is gone.
    """
    sys.excepthook = lambda *_: None
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(_error: BaseException, _batch: Any) -> None:
    os._exit(1)


def handed_over(batch: Tensor) -> Tensor | np.ndarray:
    """A batch as it leaves its process: through shared memory, or through a pipe where that is too small.

    Containers have 64 MB of it by default, two batches of 64 images of 224 pixels.
    """
    worker = get_worker_info()
    if worker is None or not isinstance(batch, Tensor) or shared_room() > 2 * (worker.num_workers + 1) * batch.nbytes:
        return batch
    return batch.numpy()


def received(batch: Tensor | np.ndarray) -> Tensor:
    """The result of `handed_over` as a tensor."""
    return torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch


def shared_room() -> float:
    """Bytes that shared memory has left."""
    try:
        about = os.statvfs(SHARED)
    except (OSError, AttributeError):
        return float("inf")
    return about.f_bavail * about.f_frsize


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Around the use of a DataLoader: torch tells of a killed process by a signal, wherever this one just is.

    Or a tensor that is being handed over ends in the middle, or the socket that it should come through is gone.

    Raises:
        LostWorkerError: one has ended.
    """
    try:
        try:
            yield
        except (EOFError, ConnectionError, FileNotFoundError):
            # What a death breaks may show before its signal: left to come later, that would raise in code elsewhere.
            sleep(SIGNAL_WITHIN)
            raise
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise LostWorkerError(
            "a process that decodes images was killed or could not hand its images over, for lack of memory, of room "
            f"in {SHARED} or by a limit on files perhaps: the same command goes on, if it happens again with fewer "
            "--workers or a smaller --batch-size"
        ) from error
