"""The whole host, head included, as one CUDA graph per batch size, replayed without launches or synchronizations.

Each block gets a fixed capacity for its tokens, planned from batches that ran before. Whether a batch fitted is read
together with its result, before the result is returned; a batch that did not fit runs again at its exact sizes, and the
capacity grows.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..calls import Trace, is_dense, record, recording, trace, tracing
from ..method.flops import Geometry
from ..method.policy import Active, Policy
from .blockwise import PLACES
from .body import Body, Engine, running, running_body, running_engine
from .capacity import SLACK, Capacity, Level, plan_capacity
from .deferred import read
from .hooks import hooked_inside
from .patches import patches_as_product
from .recorder import CudaRecorder, Recorder, Snapshot

log = logging.getLogger("ltmp")

Forward = Callable[..., Any]

GRAPHS = 16
"""Default number of graphs kept per model: one for each level of a dial. The least recently used is evicted first."""

_TIGHT = 0.9
"""Share of the capacity that a batch should use in at least one block."""

_PATIENCE = 32
"""Consecutive batches that may use less than `_TIGHT` before the capacity is planned again."""


@dataclass(frozen=True)
class ForwardResult:
    """Everything that a forward pass produced. The next replay of its graph overwrites the tensors.

    Attributes:
        output: return value of the host.
        kept: float32 [B, L], tokens after each block.
        geometry: geometry of the blocks, for the FLOPs of `kept`.
        trace: where the patches ended; empty unless the call is traced.
    """

    output: Any
    kept: Tensor
    geometry: Geometry
    trace: Trace

    def publish(self, count: int) -> Any:
        """Return a copy of the output for the first `count` images, and add them to the active record and trace."""
        calls, traced = recording(), tracing()
        if calls is not None:
            calls.add(self.kept[:count].clone(), self.geometry)
        if traced is not None:
            traced.sources += [source[:count].clone() for source in self.trace.sources]
            traced.blocks += [blocks[:count].clone() for blocks in self.trace.blocks]
        return tree_map(lambda value: value[:count].clone() if isinstance(value, Tensor) else value, self.output)


@dataclass
class Graph:
    """A recorded forward pass.

    Attributes:
        images: static memory for the input.
        replay: runs the graph.
        result: what the graph writes.
        report: int32 on the device: stats [L, 3] as in `triton.Pass`, then the active steps [2, L].
        active: the steps that were active when the graph was recorded.
        capacity: None for a dense graph.
        weights: snapshot of the model that it reads.
        policy: the policy that it reads.
        underused: number of consecutive batches that used little of the capacity.
    """

    images: Tensor
    replay: Callable[[], None]
    result: ForwardResult
    report: Tensor
    active: Active
    capacity: Capacity | None
    weights: Snapshot
    policy: Policy
    underused: int = 0

    def is_oversized(self, stats: Sequence[Sequence[float]]) -> bool:
        """Whether many batches in a row used far less than the capacity, because thresholds or images have changed.

        Counts the batch with these `stats`.
        """
        if self.capacity is None:
            return False
        used = max(total / rows for (total, *_), rows in zip(stats, self.capacity.rows, strict=True))
        self.underused = self.underused + 1 if used < _TIGHT else 0
        return self.underused >= _PATIENCE

    def launch(self, images: Tensor) -> None:
        """Replay the graph on at most as many images as it was recorded with, without waiting for it."""
        count = images.shape[0]
        self.images[:count].copy_(images)
        if count < self.images.shape[0]:
            self.images[count:].copy_(images[-1:].expand_as(self.images[count:]))
        self.replay()

    def read(self) -> tuple[list[list[int]], Active]:
        """Wait for the replay; return its stats and the steps that were active."""
        depth = len(self.active)
        report = self.report.tolist()
        stats = [report[3 * i : 3 * i + 3] for i in range(depth)]
        flags = report[3 * depth :]
        return stats, tuple((bool(a), bool(b)) for a, b in zip(flags[:depth], flags[depth:], strict=True))


class GraphedForward:
    """Stands in for `host.forward` of a model whose engine is `graph` or `auto`.

    The first batch of a size runs at its exact sizes; the second is recorded, with a capacity planned from the first. A
    batch of a new size is padded to a recorded one if it fills at least half of it; otherwise it runs at its exact size
    until that size comes again. Thresholds are read from device memory, so new values need no new graph. A threshold
    that switches a step on or off does need one, as does a model that was moved, cast or given other weights. Each
    `Level` of a budget dial has graphs of its own, with capacity for every budget in it, so that going back and forth
    on the dial records nothing again.

    Args:
        body: body of the host whose forward this replaces.
        recorder: makes the graphs.
        graphs: number of graphs to keep.
        inner: a replacement of the host's forward that was there before, if any; it is recorded instead of the forward
            of the host's class.
    """

    def __init__(
        self, body: Body, recorder: Recorder | None = None, graphs: int = GRAPHS, inner: Forward | None = None
    ) -> None:
        self.own, self.graphs, self.inner = body, graphs, inner
        self._reset(recorder)

    @property
    def host(self) -> nn.Module:
        return self.own.host

    @property
    def body(self) -> Body:
        """The body that this thread runs, which `running` may have replaced."""
        return running_body(self.own)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or type(self.host).forward.__get__(self.host))

    def _reset(self, recorder: Recorder | None = None) -> None:
        self.recorder: Recorder = recorder or CudaRecorder()
        self._recorded: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._seen: set[tuple[Any, ...]] = set()
        self._capacities: dict[tuple[Any, ...], Capacity] = {}
        self._slack: dict[tuple[Any, ...], float] = {}
        self._unrecordable: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"own": self.own, "graphs": self.graphs, "inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # transformers and its pipelines pass images by keyword
        images: Any = args[0] if len(args) == 1 and not kwargs else kwargs.get("pixel_values")
        if len(args) + len(kwargs) != 1 or not self._applies(images):
            return self._host_forward(*args, **kwargs)
        # graphs write to static memory: one caller at a time
        with self._lock, torch.no_grad():
            return self._run(images)

    def _host_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.host).forward(self.host, *args, **kwargs)

    def _applies(self, images: Any) -> bool:
        from .select import supports_triton, unavailable

        return (
            not torch.compiler.is_compiling()
            and isinstance(images, Tensor)
            and images.ndim in (4, 5)
            and self.body.policy.config.engine in ("graph", "auto")
            and len(images) > 0
            and (images.is_cuda or not isinstance(self.recorder, CudaRecorder))
            and not self.host.training
            and supports_triton(self.body)
            and not self.body.policy.masks
            and running_engine() is None
            # a replay calls no modules, and so no hooks
            and not hooked_inside(self.host)
            and not is_dense()
            and PLACES.get() is None
            and unavailable(images.device) is None
            and not torch.is_autocast_enabled(images.device.type)
            and not (
                self.automatic and torch.is_grad_enabled() and any(p.requires_grad for p in self.host.parameters())
            )
        )

    @property
    def automatic(self) -> bool:
        """Whether a dense graph may run instead if it is faster."""
        return self.body.policy.config.engine == "auto"

    def _run(self, images: Tensor) -> Any:
        policy, traced = self.body.policy, tracing()
        level = Level.of(policy)
        # the scores of a policy may change while it learns
        variant = (policy.config.scores, self.body.grid, traced and traced.every_block)
        key = (len(images), images.shape[1:], images.dtype, images.device, level.top, weakref.ref(policy), *variant)
        own = self._recorded.get(key)
        graph = own or self._larger(key)
        if graph is None and key in self._seen and key not in self._unrecordable:
            own = graph = self._record(key, images)
        if graph is None:
            return self._exactly(key, level, images)
        graph.launch(images)
        same = graph.weights.is_current()
        if self.automatic and graph.capacity is None:
            # dense was faster, whatever the thresholds are: nothing to wait for
            return graph.result.publish(len(images)) if same else self._again(graph, key, level, images)
        stats, active = graph.read()
        if not same or active != graph.active:
            return self._again(graph, key, level, images)
        if graph.capacity is not None and not graph.capacity.fits(stats):
            log.debug("a batch exceeded the planned capacity; it runs again at its exact size")
            # if it was padded to a larger graph, that one is kept, and this size gets a graph of its own
            if own is not None:
                self._drop(graph, replan=False)
                self._slack[key] = 2 * self._slack.get(key, SLACK)
            return self._exactly(key, level, images)
        if graph.is_oversized(level.scaled(stats)):
            self._drop(graph)
        return graph.result.publish(len(images))

    def _again(self, graph: Graph, key: tuple[Any, ...], level: Level, images: Tensor) -> Any:
        """Drop a graph whose model or active steps have changed, and run at exact sizes."""
        self._drop(graph)
        return self._exactly(key, level, images)

    def _larger(self, key: tuple[Any, ...]) -> Graph | None:
        """Return the graph of the smallest recorded batch size that this batch fills at least by half, or None."""
        fits = [k for k in self._recorded if k[1:] == key[1:] and key[0] <= k[0] <= 2 * key[0]]
        if not fits or key in self._seen:
            return None
        best = min(fits)
        self._recorded.move_to_end(best)
        return self._recorded[best]

    def _exactly(self, key: tuple[Any, ...], level: Level, images: Tensor) -> Any:
        """Run at exact sizes, and plan the capacity of a graph for batches like this at the top of its level."""
        from .triton import CountingEngine

        engine = CountingEngine()
        result = self._forward(images, engine)
        self._seen.add(key)
        if result.geometry.each is not None:
            # images of different lengths are located by reading from the device, which a graph cannot do
            self._unrecordable.add(key)
        if engine.stats is not None:
            tokens = result.geometry.tokens
            slack = self._slack.setdefault(key, SLACK)
            stats = level.scaled(engine.stats.tolist())
            before = self._capacities.get(key)
            self._capacities[key] = plan_capacity(stats, tokens, len(images) * tokens, slack, before)
        return result.publish(len(images))

    def _forward(self, images: Tensor, engine: Engine) -> ForwardResult:
        """Run the host's forward with `engine`, recorded, and traced if the caller traces."""
        outer = tracing()
        tracer = nullcontext() if outer is None else trace(every_block=outer.every_block)
        with running(engine), record() as calls, tracer as traced, patches_as_product(self.host):
            # deferred features of intermediate blocks have to be computed inside the graph
            output = tree_map(read, self._host_forward(images))
        return ForwardResult(output, calls.kept[0], calls.geometry[0], traced or Trace())

    def _record(self, key: tuple[Any, ...], images: Tensor) -> Graph | None:
        """Record a graph for batches like this one; return None if its capacity is unknown or memory is short."""
        active = self.body.active()
        capacity = self._capacities.get(key)
        if capacity is None and any(map(any, active)):
            return None
        try:
            graph = self._capture(images, active, capacity)
            if self.automatic and graph.capacity is not None:
                graph = self._faster(graph, images, active)
        except torch.OutOfMemoryError:
            self._recorded.clear()
            self.recorder.release()
            self._unrecordable.add(key)
            log.warning("no memory for a CUDA graph of %d images: they run without one, more slowly", key[0])
            return None
        self._recorded[key] = graph
        while len(self._recorded) > self.graphs:
            self._recorded.popitem(last=False)
        return graph

    def _faster(self, graph: Graph, images: Tensor, active: Active) -> Graph:
        """Return `graph` or a dense one, whichever is faster."""
        dense = self._capture(images, active, None)
        reduced_time, dense_time = (self.recorder.seconds(g.replay) for g in (graph, dense))
        if reduced_time <= dense_time:
            return graph
        log.warning(
            "token reduction does not pay for batches of %d on this device (%.2f ms against %.2f ms dense): "
            "running dense; name an engine to reduce all the same",
            len(images), 1e3 * reduced_time, 1e3 * dense_time,
        )  # fmt: skip
        return dense

    def _capture(self, images: Tensor, active: Active, capacity: Capacity | None) -> Graph:
        """Record the host on `images`; dense if `capacity` is None."""
        from .triton import CountingEngine

        static = images.clone()
        body = self.body
        weights = Snapshot([*self.host.modules(), body.policy])
        results: list[ForwardResult] = []

        def call() -> tuple[Any, Tensor, Tensor, Any]:
            # the fused kernels make a dense pass faster, too
            engine = CountingEngine(((False, False),) * len(active) if capacity is None else active, capacity)
            result = self._forward(static, engine)
            results.append(result)
            stats = engine.stats
            if stats is None:  # block by block, a dense pass runs the host's own blocks
                stats = torch.zeros(len(active), 3, dtype=torch.int32, device=images.device)
            flags = body.active_on_device().T.flatten().int()
            report = torch.cat([stats.flatten(), flags])
            return result.output, result.kept, report, (result.trace.sources, result.trace.blocks)

        replay, (output, kept, report, patches) = self.recorder.record(call)
        result = ForwardResult(output, kept, results[0].geometry, Trace(*patches))
        return Graph(static, replay, result, report, active, capacity, weights, body.policy)

    def _drop(self, graph: Graph, replan: bool = True) -> None:
        """Drop a graph, and with `replan` its capacity, too; otherwise the next capacity can only be larger."""
        for key in [key for key, value in self._recorded.items() if value is graph]:
            del self._recorded[key]
            if replan:
                self._capacities.pop(key, None)
