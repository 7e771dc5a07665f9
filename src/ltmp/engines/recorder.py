"""Recorders, which turn a call into a graph that can be replayed, and snapshots of the recorded model."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Recorder(Protocol):
    """Turns a call into a graph that can be replayed; tests use one that needs no GPU."""

    def record(self, call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Return a function that replays `call`, and its outputs, whose memory each replay overwrites."""

    def seconds(self, replay: Callable[[], None]) -> float:
        """Return the duration of a replay in seconds."""

    def release(self) -> None:
        """Return freed memory to the device."""


class CudaRecorder:
    """CUDA graphs that share one memory pool: they never run at the same time, and their outputs are copied."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def record(self, call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # compiles kernels and allocates workspaces of libraries, which a capture must not do
        torch.cuda.current_stream().wait_stream(stream)
        if not self._graphs:
            # a pool is freed with the last graph that uses it
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
    """Children, weights and buffers of modules, and the addresses of these tensors.

    Keeps the tensors alive, so that no graph reads freed memory, and no new tensor gets the address of an old one.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._entries: list[tuple[dict[str, Any], str, Any, int]] = []
        self._tensors: list[Tensor] = []
        for module in modules:
            dicts: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
            for values in dicts:
                for name, value in values.items():
                    at = value.data_ptr() if isinstance(value, Tensor) else 0
                    self._entries.append((values, name, value, at))
                    if isinstance(value, Tensor):
                        self._tensors.append(value.data)

    def is_current(self) -> bool:
        """Whether nothing was replaced or moved. Runs for every batch: one dictionary look-up per entry."""
        return all(
            values.get(name) is value and (not at or value.data_ptr() == at)  # type: ignore[union-attr]
            for values, name, value, at in self._entries
        )
