"""Processes that decode: one that takes too long, or dies of an image, costs that image and no other."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from .problems import ProblemError

Work = Callable[[bytes], Tensor]
"""From a body to an image as the model takes it; raises `ProblemError`."""

HURRY = 3.0
"""Seconds that decoding may still take when the service is asked to stop."""

_TICK = 0.1
"""Seconds between two looks at whether the service is to stop."""


class Decoders:
    """Processes that do `work`, each begun anew after it was ended.

    Args:
        work: from a body to an image; picklable where processes cannot be forked.
        count: of processes.
        timeout: seconds that one image may take.
    """

    def __init__(self, work: Work, count: int, timeout: float) -> None:
        self.timeout = timeout
        self.end = float("inf")
        self._all = [_Decoder(work) for _ in range(count)]
        self._free: SimpleQueue[_Decoder] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decode")
        for decoder in self._all:
            self._free.put(decoder)

    def start(self) -> None:
        """Begin all processes now, while there are few threads that they could inherit locks of."""
        for decoder in self._all:
            decoder.start()

    async def decode(self, body: bytes, deadline: float) -> Tensor:
        """The image in `body`; `deadline` is by `time.monotonic`.

        Raises:
            ProblemError: what `work` raised; or there was no time left, or it took too long.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, body, deadline)

    def _decode(self, body: bytes, deadline: float) -> Tensor:
        decoder = self._free.get()
        try:
            deadline = min(deadline, monotonic() + self.timeout)
            return decoder(body, lambda: min(deadline, self.end) - monotonic())
        finally:
            self._free.put(decoder)

    def hurry(self, seconds: float = HURRY) -> None:
        """Give everything that is being decoded, or waits for it, at most this long from now."""
        self.end = monotonic() + seconds

    def stop(self) -> None:
        """End all processes."""
        self.end = 0.0
        self._threads.shutdown(cancel_futures=True)
        for decoder in self._all:
            decoder.stop()


class _Decoder:
    """One process and the pipe to it."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def start(self) -> Connection:
        # elsewhere than on Linux, libraries do not survive a fork
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, self._work), name="decode", daemon=True)
        self._process.start()
        there.close()
        return self._pipe

    def __call__(self, body: bytes, left: Callable[[], float]) -> Tensor:
        """The image in `body`, within the seconds that `left` still gives."""
        if left() <= 0:
            raise ProblemError("timeout", "no time was left to decode the image: try again later")
        if self._process is not None and not self._process.is_alive():
            self.stop()
        pipe = self._pipe or self.start()
        try:
            pipe.send_bytes(body)
            while not pipe.poll(min(_TICK, max(0.0, left()))):
                if left() <= 0:
                    self.stop()
                    raise ProblemError("timeout", "decoding the image takes too long: send a simpler or smaller one")
            found = pipe.recv()
        except (EOFError, OSError) as error:
            self.stop()
            raise ProblemError("unreadable-image", "the image cannot be decoded: its decoder ended") from error
        if isinstance(found, tuple):
            raise ProblemError(*found)
        if isinstance(found, str):
            raise RuntimeError(found)
        return torch.from_numpy(found)

    def stop(self) -> None:
        """End the process; the next image begins another."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None


def _serve(pipe: Connection, work: Work) -> None:
    """Main loop of the process, until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        # connections of clients, inherited, would stay open for as long as this process lives
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 1024)
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_outcome(work, pipe.recv_bytes()))


def _outcome(work: Work, body: bytes) -> Any:
    """The image as an array; the parts of a `ProblemError`; or what else went wrong, as text."""
    try:
        with torch.inference_mode():
            return work(body).numpy()
    except ProblemError as problem:
        return problem.code, problem.detail, problem.headers
    except Exception as error:
        return f"{type(error).__name__}: {error}"
