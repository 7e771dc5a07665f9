"""Recorders, which turn a call into something that can be replayed, and snapshots of the recorded model."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Recorder(Protocol):
    """Turns a call into something that can be replayed; tests bring one that needs no GPU."""

    def record(self, call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """A replay function, and the outputs whose memory each replay fills anew."""

    def seconds(self, replay: Callable[[], None]) -> float:
        """How long a replay takes."""

    def release(self) -> None:
        """Give freed memory back before another try."""


class CudaRecorder:
    """CUDA graphs that share one pool: they never run at the same time, and what they hand out is copied."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def record(self, call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # kernels compile and libraries take their workspaces before the capture
        torch.cuda.current_stream().wait_stream(stream)
        if not self._graphs:
            # a pool is gone with the last graph that used it
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = call()
        self._graphs.add(graph)
        return graph.replay, outputs

    def seconds(self, replay: Callable[[], None]) -> float:
        replay()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(5):
            replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / 5

    def release(self) -> None:
        torch.cuda.empty_cache()


class Snapshot:
    """Snapshot of a module tree: its children, and where each weight lies.

    The weights are held, so that none is freed under a graph that reads it, and none of the same address is new.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places: list[tuple[dict[str, Any], str, Any, int]] = []
        self._held: list[Tensor] = []
        for module in modules:
            places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
            for place in places:
                for name, value in place.items():
                    at = value.data_ptr() if isinstance(value, Tensor) else 0
                    self._places.append((place, name, value, at))
                    if isinstance(value, Tensor):
                        self._held.append(value.data)

    def holds(self) -> bool:
        """Whether all is where it was. Runs for every batch: a dictionary look-up for each part."""
        return all(
            place.get(name) is value and (not at or value.data_ptr() == at)  # type: ignore[union-attr]
            for place, name, value, at in self._places
        )
