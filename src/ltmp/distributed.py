"""One job on several processes ("ranks"), as `torchrun --nproc-per-node N -m ltmp ...` starts them.

Every rank has the same model and the same loader. Batches are dealt out to the ranks in turn, and their results are
combined. In a single process everything here is the identity. A Python program may set up the process group itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils.data import IterableDataset

from .data import Loader
from .errors import LTMPError

Batch = tuple[Tensor, Tensor]
Value = TypeVar("Value")

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others before it counts them as lost."""


class LostRankError(LTMPError):
    """Another rank is gone. The state of this rank is intact and may be saved, but no rank can be waited for."""


def started() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """This process's index on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that prints and writes; also valid before the group is set up."""
    return int(os.environ["RANK"]) == 0 if started() else rank() == 0


def restarted() -> bool:
    """Whether torchrun (`--max-restarts`) restarted the job after losing a rank."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def rank() -> int:
    """This process's index in the group, 0 without one."""
    return distributed.get_rank() if _grouped() else 0


def world() -> int:
    """Number of processes in the group, 1 without one."""
    return distributed.get_world_size() if _grouped() else 1


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def group(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Set up a process group inside: NCCL for GPUs, Gloo for CPUs.

    Does nothing if torchrun did not start this process, or if there is a group already. When a rank is lost, torchrun
    ends the others with SIGTERM; inside, this raises a `LostRankError`, so that the run can be saved.
    """
    if not started() or _grouped():
        yield
        return
    if device.type == "cuda":
        # makes a lost rank an error in this thread instead of ending the process
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        torch.cuda.set_device(device)
    with _lost_rank_errors():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    before = signal.signal(signal.SIGTERM, _raise_lost_rank)
    try:
        yield
    except BaseException:
        _ignore_sigterm()
        raise
    signal.signal(signal.SIGTERM, before)
    # not after an error: a group that lost a rank may wait for it
    distributed.destroy_process_group()


def _raise_lost_rank(*_: Any) -> None:
    _ignore_sigterm()
    raise LostRankError("the run was ended from outside (SIGTERM), as torchrun does when a rank is lost")


def _ignore_sigterm() -> None:
    """On the way out, keep torchrun's SIGTERM from interrupting saving and printing; SIGKILL follows in any case."""
    if signal.getsignal(signal.SIGTERM) is _raise_lost_rank:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _lost_rank_errors() -> Iterator[None]:
    """Turn the backends' various errors into a `LostRankError`."""
    try:
        yield
    except RuntimeError as error:
        _ignore_sigterm()
        raise LostRankError(
            "another rank of this run was lost, or did not answer in time: what it printed says why"
        ) from error


def gather(values: Tensor) -> Tensor:
    """The `values` of all ranks, [ranks, ...], identical to the bit on every rank; shape and dtype must agree."""
    if world() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(world())]
    with _lost_rank_errors():
        distributed.all_gather(parts, values.contiguous())
    return torch.stack(parts)


def total(values: Tensor) -> Tensor:
    """Sum over ranks in a fixed order, so that it is identical to the bit on every rank."""
    return gather(values).sum(0)


def mean(values: Tensor) -> Tensor:
    """Mean over the values [n] of all ranks, whose n may differ; its gradient is that of this rank's part.

    Summed over ranks, the gradients of a loss made of such means are those of the same loss in one process.
    """
    if world() == 1:
        return values.mean()
    own = values.sum()
    everyones, count = total(torch.stack([own.detach(), own.new_tensor(len(values))]))
    return (own + (everyones - own.detach())) / count


def exchange(value: Value) -> list[Value]:
    """The `value` of each rank, any picklable object, in the order of ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with _lost_rank_errors():
        distributed.all_gather_object(values, value)
    return values


def merge(own: dict[str, str]) -> None:
    """Update `own` with the entries of the other ranks."""
    for others in exchange(own):
        own.update(others)


def my_batches(loader: Iterable[Batch], limit: int | None = None) -> Iterator[Batch]:
    """This rank's batches in one pass over a loader that is the same on all ranks: every `world()`th batch.

    Each image is in exactly one rank's batches; some ranks may get fewer batches, or none.

    Args:
        limit: stop after this many images, counted over all ranks.
    """
    if isinstance(loader, Loader) and not isinstance(loader.dataset, IterableDataset):
        # batches of other ranks are not even read
        return loader.stream(0, min(limit or loader.images, loader.images), rank(), world())
    return _dealt(loader, limit)


def _dealt(loader: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    left = limit
    for number, (images, labels) in enumerate(loader):
        if number % world() == rank():
            yield images[:left], labels[:left]
        if left is not None:
            left -= len(images)
            if left <= 0:
                return
