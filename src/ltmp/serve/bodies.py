"""A request's headers and body, as long as they stay within their limits, and its answer, while somebody waits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .limits import FORM, media_type
from .problems import ProblemError

Result = TypeVar("Result")

_PARTS = 16
"""Parts of a form that are looked at."""


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


def image_in(body: bytes, content_type: str | None) -> bytes:
    """The image in a body: the body itself, or the one file of a form.

    Raises:
        ProblemError: 400, a form that is damaged, or that has no file or several.
    """
    if media_type(content_type) != FORM:
        return body
    found = re.search(r'boundary="?([^";,]+)', content_type or "", re.IGNORECASE)
    if found is None:
        raise ProblemError("bad-request", "the form has no boundary: send the image's own bytes instead")
    # parts stand between lines of "--boundary"; the first one has no line before it
    parts = (b"\r\n" + body).split(b"\r\n--" + found[1].strip().encode("latin-1"), _PARTS)
    files = []
    for part in parts[1:-1]:
        head, end, content = part.partition(b"\r\n\r\n")
        if end and b"filename" in head.lower():
            files.append(content)
    if len(files) != 1:
        raise ProblemError(
            "bad-request", f"the form has {len(files)} files: send one image, as in curl -F file=@cat.jpg"
        )
    return files[0]


def refused(headers: list[tuple[bytes, bytes]], most: int) -> ProblemError | None:
    """The problem with a request's headers, or None; the connection ends with the answer.

    A body with both a length and an encoding of its own may be read as two requests by one program and as one by the
    next (RFC 9112, section 6.1).
    """
    closing = {"Connection": "close"}
    if len(headers) > most:
        return ProblemError("too-many-headers", f"the request has over {most} headers: send fewer", closing)
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        return ProblemError("bad-request", "Content-Length and Transfer-Encoding together: send one of them", closing)
    return None


class Guard:
    """ASGI middleware: answers requests whose headers are refused."""

    def __init__(self, app: ASGIApp, most: int, answer: Callable[[ProblemError], Response]) -> None:
        self.app, self.most, self.answer = app, most, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = refused(scope["headers"], self.most) if scope["type"] == "http" else None
        await (self.app if problem is None else self.answer(problem))(scope, receive, send)


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
