"""Single images from many requests, to the model in batches, from one thread."""

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
    """Collects until a batch is full or its first item has waited long enough, and hands the batch to `run`.

    Args:
        run: from a list of items to as many results, in order; called from one thread only.
        inside: a context that the thread stays in.
        max_batch: items a call.
        max_wait: seconds that the first item of a batch waits for others.
        on_batch: called after each batch with its size, its seconds and its results.
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
        """Whether the thread is there to answer."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Items that no batch has taken yet."""
        return self._queue.qsize()

    def start(self, warm_up: list[list[Item]] | None = None) -> None:
        """Start the thread; returns when it has run the batches in `warm_up`, and raises what they raised."""
        ready: Future[None] = Future()
        self._thread = Thread(target=self._loop, args=(ready, warm_up or []), name="model", daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, item: Item) -> Future[Result]:
        """Queue an item. Cancel the future, and it is left out unless its batch has begun."""
        if not self.alive:
            raise RuntimeError("the batcher is not running")
        future: Future[Result] = Future()
        self._queue.put(_Waiting(item, future))
        return future

    def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def _loop(self, ready: Future[None], warm_up: list[list[Item]]) -> None:
        with self._inside():
            try:
                for batch in warm_up:
                    self._run(batch)
            except Exception as error:
                ready.set_exception(error)
                return
            ready.set_result(None)
            running = True
            while running:
                found, running = self._collect()
                self._answer([waiting for waiting in found if waiting.future.set_running_or_notify_cancel()])

    def _collect(self) -> tuple[list[_Waiting[Item, Result]], bool]:
        """The next batch, and whether there may be another."""
        found: list[_Waiting[Item, Result]] = []
        while len(found) < self.max_batch:
            try:
                # what is there already is taken even when time is over
                left = max(0.0, found[0].since + self.max_wait - perf_counter()) if found else None
                waiting = self._queue.get(timeout=left)
            except Empty:
                break
            if waiting is None:
                return found, False
            found.append(waiting)
        return found, True

    def _answer(self, batch: list[_Waiting[Item, Result]]) -> None:
        if not batch:
            return
        start = perf_counter()
        try:
            results = self._run([waiting.item for waiting in batch])
            seconds = perf_counter() - start
            self._on_batch(len(batch), seconds, results)
        # whatever it is, these items fail and the next ones are tried
        except Exception as error:
            log.exception("a batch of %d failed", len(batch))
            for waiting in batch:
                waiting.future.set_exception(error)
            return
        each = seconds / len(batch)
        self.seconds_per_item = 0.9 * self.seconds_per_item + 0.1 * each if self.seconds_per_item else each
        for waiting, result in zip(batch, results, strict=True):
            waiting.future.set_result(result)
