"""A request's body, as long as it stays within its limits, and its answer, as long as somebody waits for it."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from .problems import ProblemError

Result = TypeVar("Result")


async def read_body(request: Request, max_body: int, timeout: float) -> bytes:
    """The whole body.

    Raises:
        ProblemError: 413 as soon as the body is known to be too large, from its header or while it arrives; 408 when it
            is not there after `timeout` seconds.
        ClientDisconnect: the client has gone.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_body:
        raise _too_large(max_body)
    try:
        return await asyncio.wait_for(_collect(request, max_body), timeout)
    except asyncio.TimeoutError:
        raise ProblemError(
            "slow-client", f"the body did not arrive within {timeout:g} s: send it faster", {"Connection": "close"}
        ) from None


async def _collect(request: Request, max_body: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body:
            raise _too_large(max_body)
    return bytes(body)


def _too_large(max_body: int) -> ProblemError:
    return ProblemError("body-too-large", f"the body is over {max_body / 1e6:g} MB: send a smaller image")


async def unless_gone(request: Request, work: Future[Result]) -> Result:
    """The result of `work`, which is cancelled when the client closes its connection.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.wrap_future(work)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
