"""Image decoding in worker processes: an image that takes too long, or crashes its process, affects no other image."""

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
"""Maps a request body to the model's input for that image; raises `ProblemError`."""

HURRY = 3.0
"""Seconds that decoding may still take once the service is asked to stop."""

_TICK = 0.1
"""Seconds between two checks of whether the service is stopping."""


class Decoders:
    """A pool of processes that run `work`; a process that was killed is replaced.

    Args:
        work: maps a body to an image; must be picklable on systems other than Linux, where processes are spawned.
        count: number of processes.
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
        """Start all processes now, while there are few threads whose locks a fork could inherit."""
        for decoder in self._all:
            decoder.start()

    async def decode(self, body: bytes, deadline: float) -> Tensor:
        """Decode the image in `body`; `deadline` is a time of `time.monotonic`.

        Raises:
            ProblemError: raised by `work`; or there was no time left, or decoding took too long or crashed.
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
        """Limit all running and waiting requests for decoding to `seconds` from now."""
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
        # On systems other than Linux, system libraries do not survive a fork.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_end, self._work), name="decode", daemon=True)
        self._process.start()
        child_end.close()
        return self._pipe

    def __call__(self, body: bytes, seconds_left: Callable[[], float]) -> Tensor:
        """Decode the image in `body` while `seconds_left()` is positive."""
        if seconds_left() <= 0:
            raise ProblemError("timeout", "no time was left to decode the image: try again later")
        if self._process is not None and not self._process.is_alive():
            self.stop()
        pipe = self._pipe or self.start()
        try:
            pipe.send_bytes(body)
            while not pipe.poll(min(_TICK, max(0.0, seconds_left()))):
                if seconds_left() <= 0:
                    self.stop()
                    raise ProblemError("timeout", "decoding the image takes too long: send a simpler or smaller one")
            result = pipe.recv()
        except (EOFError, OSError) as error:
            self.stop()
            raise ProblemError("unreadable-image", "the image cannot be decoded: its decoder crashed") from error
        if isinstance(result, tuple):
            raise ProblemError(*result)
        if isinstance(result, str):
            raise RuntimeError(result)
        return torch.from_numpy(result)

    def stop(self) -> None:
        """Kill the process; the next image starts another one."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None


def _serve(pipe: Connection, work: Work) -> None:
    """Run the main loop of a process, until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        # Inherited connections to clients would stay open for as long as this process lives.
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 1024)
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_decode_one(work, pipe.recv_bytes()))


def _decode_one(work: Work, body: bytes) -> Any:
    """Return the image as an array, the arguments of a `ProblemError` as a tuple, or any other error as text."""
    try:
        with torch.inference_mode():
            return work(body).numpy()
    except ProblemError as problem:
        return problem.code, problem.detail, problem.headers
    except Exception as error:
        return f"{type(error).__name__}: {error}"
