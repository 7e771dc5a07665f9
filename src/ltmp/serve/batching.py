"""Dynamic batching: images of concurrent requests run through the model in batches, in one thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    future: Future[Result]
    since: float = field(default_factory=perf_counter)


class Batcher(Generic[Item, Result]):
    """Collects items until a batch is full or its first item has waited for `max_wait`, and calls `run` on the batch.

    Args:
        run: maps a list of items to as many results, in order; called from one thread only.
        inside: returns a context manager that the thread enters once.
        max_batch: maximum number of items per call.
        max_wait: seconds that the first item of a batch waits for others.
        on_batch: called after each batch with its size, duration in seconds and results.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], list[Result]],
        *,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
        max_batch: int = 32,
        max_wait: float = 0.005,
        on_batch: Callable[[int, float, list[Result]], None] = lambda size, seconds, results: None,
    ) -> None:
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.seconds_per_item = 0.0
        self._run = run
        self._inside = inside
        self._on_batch = on_batch
        self._queue: SimpleQueue[_Waiting[Item, Result] | None] = SimpleQueue()
        self._thread: Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of items that are not in a batch yet."""
        return self._queue.qsize()

    def start(self, warm_up: list[list[Item]] | None = None) -> None:
        """Start the thread and wait until it has run the batches in `warm_up`; raises any exception of theirs."""
        ready: Future[None] = Future()
        self._thread = Thread(target=self._loop, args=(ready, warm_up or []), name="model", daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, item: Item) -> Future[Result]:
        """Queue an item. If the future is cancelled before its batch begins, the item is skipped."""
        if not self.alive:
            raise RuntimeError("the batcher is not running")
        future: Future[Result] = Future()
        self._queue.put(_Waiting(item, future))
        return future

    def stop(self) -> None:
        """Finish the queued items and end the thread."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def _loop(self, ready: Future[None], warm_up: list[list[Item]]) -> None:
        with self._inside():
            try:
                for items in warm_up:
                    self._run(items)
            except Exception as error:
                ready.set_exception(error)
                return
            ready.set_result(None)
            running = True
            while running:
                batch, running = self._collect()
                self._run_batch([waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()])

    def _collect(self) -> tuple[list[_Waiting[Item, Result]], bool]:
        """Return the next batch, and whether there may be another one."""
        batch: list[_Waiting[Item, Result]] = []
        while len(batch) < self.max_batch:
            try:
                # With no time left, items that are already queued are still taken.
                timeout = max(0.0, batch[0].since + self.max_wait - perf_counter()) if batch else None
                waiting = self._queue.get(timeout=timeout)
            except Empty:
                break
            if waiting is None:
                return batch, False
            batch.append(waiting)
        return batch, True

    def _run_batch(self, batch: list[_Waiting[Item, Result]]) -> None:
        if not batch:
            return
        start = perf_counter()
        try:
            results = self._run([waiting.item for waiting in batch])
            seconds = perf_counter() - start
            self._on_batch(len(batch), seconds, results)
        # Any error fails this batch only; the thread goes on with the next one.
        except Exception as error:
            log.exception("a batch of %d failed", len(batch))
            for waiting in batch:
                waiting.future.set_exception(error)
            return
        per_item = seconds / len(batch)
        self.seconds_per_item = 0.9 * self.seconds_per_item + 0.1 * per_item if self.seconds_per_item else per_item
        for waiting, result in zip(batch, results, strict=True):
            waiting.future.set_result(result)
