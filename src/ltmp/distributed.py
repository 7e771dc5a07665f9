"""One job on several processes ("ranks"), as `torchrun --nproc-per-node N -m ltmp ...` starts them.

Every rank holds the same model and the same loader; they take turns at the batches, and what they find is added up.
In a process of its own everything here is the identity. A Python program may also set up the process group itself.
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
"""How long a rank waits for the others before it gives them up."""


class LostRankError(LTMPError):
    """Another rank is gone. What this one has is whole: it may still save it, but not wait for anybody."""


def started() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """This process's number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that prints and writes; known before the group is there, too."""
    return int(os.environ["RANK"]) == 0 if started() else rank() == 0


def restarted() -> bool:
    """Whether torchrun (`--max-restarts`) started the job anew after it had lost a rank."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def rank() -> int:
    """This process's number in the group."""
    return distributed.get_rank() if _grouped() else 0


def world() -> int:
    """Processes in the group."""
    return distributed.get_world_size() if _grouped() else 1


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def group(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Work with the other ranks inside: by NCCL on GPUs, by Gloo on CPUs.

    Does nothing unless torchrun started this process, or where a group is there already. torchrun ends what is left of
    a job with SIGTERM; inside, that is a `LostRankError`, so that the run can be saved.
    """
    if not started() or _grouped():
        yield
        return
    if device.type == "cuda":
        # a lost rank is then an error in this thread, not the end of this process
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        torch.cuda.set_device(device)
    with _watched():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield
    except BaseException:
        _ignore_sigterm()
        raise
    signal.signal(signal.SIGTERM, before)
    # not after an error: a group that lost a rank may wait for it
    distributed.destroy_process_group()


def _ended(*_: Any) -> None:
    _ignore_sigterm()
    raise LostRankError("the run was ended from outside (SIGTERM), as torchrun does when a rank is lost")


def _ignore_sigterm() -> None:
    """On the way out, torchrun's SIGTERM must not cut short what is still saved and said; SIGKILL follows, anyway."""
    if signal.getsignal(signal.SIGTERM) is _ended:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _watched() -> Iterator[None]:
    """Say in a sentence what the backends say in their own ways."""
    try:
        yield
    except RuntimeError as error:
        _ignore_sigterm()
        raise LostRankError(
            "another rank of this run was lost, or did not answer in time: what it printed says why"
        ) from error


def gather(values: Tensor) -> Tensor:
    """[ranks, ...], everybody's `values`, of one shape and type on all ranks; the same bits on every rank."""
    if world() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(world())]
    with _watched():
        distributed.all_gather(parts, values.contiguous())
    return torch.stack(parts)


def total(values: Tensor) -> Tensor:
    """Sum over ranks, added up in one order, so that it is the same bits on every rank."""
    return gather(values).sum(0)


def mean(values: Tensor) -> Tensor:
    """Mean over all ranks' values, [n] with an n of each rank's own; its gradient is that of this rank's part.

    Gradients of a loss made of such means add up, over ranks, to those of the same loss in one process.
    """
    if world() == 1:
        return values.mean()
    own = values.sum()
    everybodys, count = total(torch.stack([own.detach(), own.new_tensor(len(values))]))
    return (own + (everybodys - own.detach())) / count


def exchange(value: Value) -> list[Value]:
    """Everybody's `value`, whatever it is, in the order of ranks."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    with _watched():
        distributed.all_gather_object(found, value)
    return found


def merge(own: dict[str, str]) -> None:
    """Add to `own` what the other ranks have in theirs."""
    for others in exchange(own):
        own.update(others)


def my_batches(loader: Iterable[Batch], limit: int | None = None) -> Iterator[Batch]:
    """This rank's batches of one pass over a loader that all ranks have alike: every world-th one.

    Each image is in exactly one rank's batches; a rank may have fewer of them, or none.

    Args:
        limit: stop after this many images, of all ranks together.
    """
    if isinstance(loader, Loader) and not isinstance(loader.dataset, IterableDataset):
        # what the other ranks take is not even read
        return loader.stream(0, min(limit or loader.images, loader.images), rank(), world())
    return _turns(loader, limit)


def _turns(loader: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    left = limit
    for number, (images, labels) in enumerate(loader):
        if number % world() == rank():
            yield images[:left], labels[:left]
        if left is not None:
            left -= len(images)
            if left <= 0:
                return
