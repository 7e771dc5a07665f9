"""The whole host, head included, as one CUDA graph for each batch size: nothing is launched or read while it runs.

Every block gets a fixed room for its tokens, planned from batches that ran before. Whether a batch fitted is read with
its result; one that did not is run again at its exact sizes, and the room grows. A result is never handed out before
that is known.
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
"""Graphs kept for one model, by default: a whole dial of them. The least recently used one goes first."""

_TIGHT = 0.9
"""Share of its room that a batch should use in at least one block."""

_PATIENCE = 32
"""Batches in a row that may use less before the room is planned anew."""


@dataclass(frozen=True)
class Told:
    """What a forward gives; the next replay overwrites it.

    Attributes:
        output: what the host returns.
        kept: float32 [B, L], tokens after each block; geometry: what they cost.
        trace: where the patches ended; empty where nobody asks.
    """

    output: Any
    kept: Tensor
    geometry: Geometry
    trace: Trace

    def tell(self, count: int) -> Any:
        """Copies for the first `count` images: the output, and what the blocks would have recorded and traced."""
        calls, traced = recording(), tracing()
        if calls is not None:
            calls.add(self.kept[:count].clone(), self.geometry)
        if traced is not None:
            traced.sources += [source[:count].clone() for source in self.trace.sources]
            traced.blocks += [blocks[:count].clone() for blocks in self.trace.blocks]
        return tree_map(lambda value: value[:count].clone() if isinstance(value, Tensor) else value, self.output)


@dataclass
class Graph:
    """One recorded forward.

    Attributes:
        images: where the input goes.
        replay: runs it.
        told: what it gives.
        report: int32 on the device: stats [L, 3], then which thresholds can select anything [L, 2].
        active: the same when it was recorded.
        capacity: None for a dense graph.
        weights: what it reads.
        policy: whose thresholds.
        loose: batches in a row that used little of the room.
    """

    images: Tensor
    replay: Callable[[], None]
    told: Told
    report: Tensor
    active: Active
    capacity: Capacity | None
    weights: Snapshot
    policy: Policy
    loose: int = 0

    def wastes(self, stats: Sequence[Sequence[float]]) -> bool:
        """Whether batches have long needed far less room than there is: thresholds changed, or the images did."""
        if self.capacity is None:
            return False
        used = max(total / rows for (total, *_), rows in zip(stats, self.capacity.rows, strict=True))
        self.loose = self.loose + 1 if used < _TIGHT else 0
        return self.loose >= _PATIENCE

    def launch(self, images: Tensor) -> None:
        """Replay on up to as many images as were recorded."""
        count = images.shape[0]
        self.images[:count].copy_(images)
        if count < self.images.shape[0]:
            self.images[count:].copy_(images[-1:].expand_as(self.images[count:]))
        self.replay()

    def read(self) -> tuple[list[list[int]], Active]:
        """Wait for the replay: its stats, and the thresholds that were active."""
        depth = len(self.active)
        report = self.report.tolist()
        stats = [report[3 * i : 3 * i + 3] for i in range(depth)]
        flags = report[3 * depth :]
        return stats, tuple((bool(a), bool(b)) for a, b in zip(flags[:depth], flags[depth:], strict=True))


class GraphedForward:
    """Stands in for `host.forward` of a model whose engine is `graph` or `auto`.

    The first batch of a size runs at exact sizes; the second is recorded with the room that the first one took. A
    batch a little smaller than a recorded one is filled up; other sizes run exactly until they come again. Thresholds
    are read from device memory, so new values need no new graph; one that switches a step on or off does, as does a
    model that was moved, cast or given other weights. Each `Level` of a budget dial has graphs of its own, with room
    for all of it, so that turning the dial to and fro records nothing again.

    Args:
        body: whose host this is the forward of.
        recorder: makes the graphs.
        graphs: how many to keep.
        inner: what stood in for the host's forward before, if anything; this, or its class's, is what is recorded.
    """

    def __init__(
        self, body: Body, recorder: Recorder | None = None, graphs: int = GRAPHS, inner: Forward | None = None
    ) -> None:
        self.own, self.graphs, self.inner = body, graphs, inner
        self._forget(recorder)

    @property
    def host(self) -> nn.Module:
        return self.own.host

    @property
    def body(self) -> Body:
        """The policy that this thread runs, which may replace the model's own for a while."""
        return running_body(self.own)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or type(self.host).forward.__get__(self.host))

    def _forget(self, recorder: Recorder | None = None) -> None:
        self.recorder: Recorder = recorder or CudaRecorder()
        self._recorded: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._seen: set[tuple[Any, ...]] = set()
        self._room: dict[tuple[Any, ...], Capacity] = {}
        self._slack: dict[tuple[Any, ...], float] = {}
        self._refused: set[tuple[Any, ...]] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"own": self.own, "graphs": self.graphs, "inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # transformers and its pipelines call by keyword
        images: Any = args[0] if len(args) == 1 and not kwargs else kwargs.get("pixel_values")
        if len(args) + len(kwargs) != 1 or not self._applies(images):
            return self._host_forward(*args, **kwargs)
        # graphs write to memory of their own: one caller at a time
        with self._lock, torch.no_grad():
            return self._run(images)

    def _host_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.host).forward(self.host, *args, **kwargs)

    def _applies(self, images: Any) -> bool:
        from .select import on_device, unavailable

        return (
            not torch.compiler.is_compiling()
            and isinstance(images, Tensor)
            and images.ndim in (4, 5)
            and self.body.policy.config.engine in ("graph", "auto")
            and len(images) > 0
            and (images.is_cuda or not isinstance(self.recorder, CudaRecorder))
            and not self.host.training
            and on_device(self.body)
            and not self.body.policy.masks
            and running_engine() is None
            # a replay calls no module
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
        """Whether a dense graph may run instead, where it is faster."""
        return self.body.policy.config.engine == "auto"

    def _run(self, images: Tensor) -> Any:
        policy, traced = self.body.policy, tracing()
        level = Level.of(policy)
        # learning may change scores, too
        asked = (policy.config.scores, self.body.grid, traced and traced.every_block)
        key = (len(images), images.shape[1:], images.dtype, images.device, level.top, weakref.ref(policy), *asked)
        own = self._recorded.get(key)
        graph = own or self._larger(key)
        if graph is None and key in self._seen and key not in self._refused:
            own = graph = self._record(key, images)
        if graph is None:
            return self._exactly(key, level, images)
        graph.launch(images)
        same = graph.weights.holds()
        if self.automatic and graph.capacity is None:
            # dense by choice, whatever the thresholds say: nothing to wait for
            return graph.told.tell(len(images)) if same else self._again(graph, key, level, images)
        stats, active = graph.read()
        if not same or active != graph.active:
            return self._again(graph, key, level, images)
        if graph.capacity is not None and not graph.capacity.holds(stats):
            log.debug("a batch needed more room than planned; it runs again at its exact size")
            # a smaller batch that does not fit gets a graph of its own, and the larger ones keep theirs
            if own is not None:
                self._drop(graph, replan=False)
                self._slack[key] = 2 * self._slack.get(key, SLACK)
            return self._exactly(key, level, images)
        if graph.wastes(level.scaled(stats)):
            self._drop(graph)
        return graph.told.tell(len(images))

    def _again(self, graph: Graph, key: tuple[Any, ...], level: Level, images: Tensor) -> Any:
        """The graph is of another model by now: start over."""
        self._drop(graph)
        return self._exactly(key, level, images)

    def _larger(self, key: tuple[Any, ...]) -> Graph | None:
        """The smallest recorded batch that this one fills at least by half."""
        fits = [k for k in self._recorded if k[1:] == key[1:] and key[0] <= k[0] <= 2 * key[0]]
        if not fits or key in self._seen:
            return None
        best = min(fits)
        self._recorded.move_to_end(best)
        return self._recorded[best]

    def _exactly(self, key: tuple[Any, ...], level: Level, images: Tensor) -> Any:
        """Run at exact sizes, and remember how much room it took, or would have at the top of its level."""
        from .triton import Counted

        engine = Counted()
        told = self._forward(images, engine)
        self._seen.add(key)
        if told.geometry.each is not None:
            # where images are among a host's rows is found by reading them
            self._refused.add(key)
        if engine.stats is not None:
            tokens = told.geometry.tokens
            slack = self._slack.setdefault(key, SLACK)
            stats = level.scaled(engine.stats.tolist())
            self._room[key] = plan_capacity(stats, tokens, len(images) * tokens, slack, self._room.get(key))
        return told.tell(len(images))

    def _forward(self, images: Tensor, engine: Engine) -> Told:
        """The host's own forward."""
        asked = tracing()
        following = nullcontext() if asked is None else trace(every_block=asked.every_block)
        with running(engine), record() as calls, following as traced, patches_as_product(self.host):
            # features of intermediate blocks are computed here, and not when they are first read
            output = tree_map(read, self._host_forward(images))
        return Told(output, calls.kept[0], calls.geometry[0], traced or Trace())

    def _record(self, key: tuple[Any, ...], images: Tensor) -> Graph | None:
        """A new graph for batches like this one, or None when there is no memory for it."""
        active = self.body.active()
        room = self._room.get(key)
        if room is None and any(map(any, active)):
            return None
        try:
            graph = self._trace(images, active, room)
            if self.automatic and graph.capacity is not None:
                graph = self._faster(graph, images, active)
        except torch.OutOfMemoryError:
            self._recorded.clear()
            self.recorder.release()
            self._refused.add(key)
            log.warning("no memory for a CUDA graph of %d images: they run without one, more slowly", key[0])
            return None
        self._recorded[key] = graph
        while len(self._recorded) > self.graphs:
            self._recorded.popitem(last=False)
        return graph

    def _faster(self, graph: Graph, images: Tensor, active: Active) -> Graph:
        dense = self._trace(images, active, None)
        reduced_time, dense_time = (self.recorder.seconds(g.replay) for g in (graph, dense))
        if reduced_time <= dense_time:
            return graph
        log.warning(
            "token reduction does not pay for batches of %d on this device (%.2f ms against %.2f ms dense): "
            "running dense; name an engine to reduce all the same",
            len(images), 1e3 * reduced_time, 1e3 * dense_time,
        )  # fmt: skip
        return dense

    def _trace(self, images: Tensor, active: Active, capacity: Capacity | None) -> Graph:
        """Record the host on `images`; without capacity, dense."""
        from .triton import Counted

        static = images.clone()
        body = self.body
        weights = Snapshot([*self.host.modules(), body.policy])
        given: list[Told] = []

        def call() -> tuple[Any, Tensor, Tensor, Any]:
            # a dense pass gains by the fused kernels, too
            engine = Counted(((False, False),) * len(active) if capacity is None else active, capacity)
            told = self._forward(static, engine)
            given.append(told)
            stats = engine.stats
            if stats is None:  # blocks that a host takes one by one are its own where nothing is removed
                stats = torch.zeros(len(active), 3, dtype=torch.int32, device=images.device)
            flags = body.on().T.flatten().int()
            report = torch.cat([stats.flatten(), flags])
            return told.output, told.kept, report, (told.trace.sources, told.trace.blocks)

        replay, (output, kept, report, patches) = self.recorder.record(call)
        told = Told(output, kept, given[0].geometry, Trace(*patches))
        return Graph(static, replay, told, report, active, capacity, weights, body.policy)

    def _drop(self, graph: Graph, replan: bool = True) -> None:
        """Forget a graph, and the room that it was planned with unless the next one may only be larger."""
        for key in [key for key, value in self._recorded.items() if value is graph]:
            del self._recorded[key]
            if replan:
                self._room.pop(key, None)
