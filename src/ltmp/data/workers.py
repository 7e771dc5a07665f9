"""Worker processes that decode images: how batches leave them, and how a lost worker is detected."""

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
"""Linux's shared memory, through which torch passes tensors between processes."""

SIGNAL_WITHIN = 1.0
"""Seconds within which the signal of a killed process follows any other symptom of its death."""


class LostWorkerError(LTMPError):
    """A worker process has ended; nothing is wrong with the images."""


def start_worker(_worker: int) -> None:
    """Set up a DataLoader's worker process, so that it ends if a batch cannot be handed over.

    A worker hands batches over from a thread. If that fails (no room in /dev/shm, a limit on the size or number of
    files), Python prints the error and continues, and the main process would wait for the batch forever. torch does
    notice a process that ends. Other errors are passed on by torch; the exception hook would only print tracebacks of
    workers whose run was stopped.
    """
    sys.excepthook = lambda *_: None
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_exit)  # type: ignore[attr-defined]


def _exit(_error: BaseException, _batch: Any) -> None:
    os._exit(1)


def pack_batch(batch: Tensor) -> Tensor | np.ndarray:
    """Prepare a batch to leave its worker: unchanged for shared memory, or an array for a pipe if that is too small.

    Containers have 64 MB of shared memory by default: two batches of 64 images of 224 pixels.
    """
    worker = get_worker_info()
    if worker is None or not isinstance(batch, Tensor):
        return batch
    # torch prefetches two batches per worker.
    needed = 2 * (worker.num_workers + 1) * batch.nbytes
    return batch if free_shared_memory() > needed else batch.numpy()


def unpack_batch(batch: Tensor | np.ndarray) -> Tensor:
    """Return the result of `pack_batch` as a tensor."""
    return torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch


def free_shared_memory() -> float:
    """Return the free shared memory in bytes; infinite on systems without `/dev/shm`."""
    try:
        stats = os.statvfs(SHARED)
    except (OSError, AttributeError):
        return float("inf")
    return stats.f_bavail * stats.f_frsize


@contextmanager
def detect_lost_workers() -> Iterator[None]:
    """Raise `LostWorkerError` if a worker of a DataLoader that is used inside was lost.

    torch reports a killed process by a signal, which raises RuntimeError wherever the main process happens to be. Or
    a tensor that is being received ends half-way, or the socket through which it would arrive is gone.

    Raises:
        LostWorkerError: a worker has ended.
    """
    try:
        try:
            yield
        except (EOFError, ConnectionError, FileNotFoundError):
            # The signal may arrive after these symptoms; unless waited for, it would raise in unrelated code.
            sleep(SIGNAL_WITHIN)
            raise
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise LostWorkerError(
            "a process that decodes images was killed or could not hand its images over, perhaps for lack of memory or "
            f"of room in {SHARED}, or by a limit on files: repeat the same command to continue; if it fails again, use "
            "fewer --workers or a smaller --batch-size"
        ) from error
