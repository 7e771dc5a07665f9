"""Requests: reading headers and bodies within limits, and waiting for an answer while the client is connected."""

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

_MAX_PARTS = 16
"""Maximum number of form parts that are parsed."""


async def read_body(request: Request, max_body: int, timeout: float) -> bytes:
    """Read the complete body of a request.

    Raises:
        ProblemError: 413 as soon as the body is known to be too large, from its header or while it arrives; 408 if it
            is not complete after `timeout` seconds.
        ClientDisconnect: the client has disconnected.
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


def extract_image(body: bytes, content_type: str | None) -> bytes:
    """Return the image in a body: the body itself, or the only file of a form.

    Raises:
        ProblemError: 400 if a form is damaged, or has no file or several.
    """
    if media_type(content_type) != FORM:
        return body
    boundary = re.search(r'boundary="?([^";,]+)', content_type or "", re.IGNORECASE)
    if boundary is None:
        raise ProblemError("bad-request", "the form has no boundary: send the image's own bytes instead")
    # Parts are separated by lines of "--boundary"; there is no line break before the first one.
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary[1].strip().encode("latin-1"), _MAX_PARTS)
    files = []
    for part in parts[1:-1]:
        head, separator, content = part.partition(b"\r\n\r\n")
        if separator and b"filename" in head.lower():
            files.append(content)
    if len(files) != 1:
        raise ProblemError(
            "bad-request", f"the form has {len(files)} files: send one image, as in curl -F file=@cat.jpg"
        )
    return files[0]


async def unless_disconnected(request: Request, work: Future[Result]) -> Result:
    """Wait for the result of `work`, and cancel it if the client disconnects.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    task = asyncio.wrap_future(work)
    disconnect = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()


class HeaderCheck:
    """ASGI middleware that answers requests with unacceptable headers by a problem."""

    def __init__(self, app: ASGIApp, max_headers: int, answer: Callable[[ProblemError], Response]) -> None:
        self.app, self.max_headers, self.answer = app, max_headers, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = _header_problem(scope["headers"], self.max_headers) if scope["type"] == "http" else None
        await (self.app if problem is None else self.answer(problem))(scope, receive, send)


def _header_problem(headers: list[tuple[bytes, bytes]], max_headers: int) -> ProblemError | None:
    """Return the problem with a request's headers, or None; the connection is closed after the answer.

    A request with both a length and a transfer encoding allows request smuggling: a proxy and the server behind it may
    disagree where it ends (RFC 9112, section 6.1).
    """
    close = {"Connection": "close"}
    if len(headers) > max_headers:
        return ProblemError("too-many-headers", f"the request has over {max_headers} headers: send fewer", close)
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        return ProblemError("bad-request", "Content-Length and Transfer-Encoding together: send one of them", close)
    return None
