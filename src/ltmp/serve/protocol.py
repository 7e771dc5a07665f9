"""HTTP with what uvicorn leaves out: limits on what a connection may cost, however slowly or finely it talks."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits

HEAD = 16_384
"""Bytes of a request's headers."""

_PIECE = 1024
"""Bytes that are parsed before the next look at what they were: each chunk of a body costs the parser its time."""

_CRUMBS, _CHUNK = 100, 64
"""Lines that a chunked body may have, and bytes of it that pay for another: each chunk has two."""

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
_FINE = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class PatientProtocol(H11Protocol):
    """A connection that is closed when it costs too much.

    - There are more than `max_connections`.
    - Headers take longer than `read_timeout` seconds; bodies that the application reads have a limit there, and what
      is sent after an early refusal falls under this one.
    - The client does not take its answers within twice `read_timeout`.
    - A body comes in chunks of a few bytes.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.clock: asyncio.TimerHandle | None = None
        self.unread: asyncio.TimerHandle | None = None
        self.waiting = bytearray()
        self.counted: Any = None
        self.lines = self.body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_at_answers(was_empty=True)
        if len(self.connections) > self.limits.max_connections:
            transport.write(_FULL)
            transport.close()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()
        if self.unread is not None:
            self.unread.cancel()

    def data_received(self, data: bytes) -> None:
        self.waiting += data
        self._parse()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._parse()

    def _parse(self) -> None:
        """Hand on what was received, piece by piece; what belongs to a later request waits for its turn."""
        while self.waiting and not self.transport.is_closing():
            if self.conn.their_state is h11.DONE:
                self.flow.pause_reading()
                break
            size = len(self.waiting) if self._counts_its_bytes() else _PIECE
            piece, self.waiting = bytes(self.waiting[:size]), self.waiting[size:]
            if self._is_crumbs(piece):
                self.transport.write(_FINE)
                self.transport.close()
                break
            super().data_received(piece)
        unasked = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if self.conn.their_state is h11.IDLE or unasked:
            self._watch()
        else:
            self._stop_watching()

    def _in_chunks(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers or ())

    def _counts_its_bytes(self) -> bool:
        """Whether a body of a known length is being read, which takes the parser next to nothing."""
        return self.conn.their_state is h11.SEND_BODY and not self._in_chunks()

    def _is_crumbs(self, piece: bytes) -> bool:
        """Whether a chunked body has more chunks by now than its length pays for."""
        if self.counted is not self.cycle:
            self.counted, self.lines, self.body_bytes = self.cycle, 0, 0
        if self.conn.their_state is not h11.SEND_BODY or not self._in_chunks():
            return False
        self.lines += piece.count(b"\r\n")
        self.body_bytes += len(piece)
        return self.lines > _CRUMBS + self.body_bytes // _CHUNK

    def _look_at_answers(self, was_empty: bool) -> None:
        """Cut off a client that has left an answer in our hands for the second time in a row."""
        empty = self.transport.get_write_buffer_size() == 0
        if not (empty or was_empty):
            self.transport.abort()
            return
        self.unread = self.loop.call_later(self.limits.read_timeout, self._look_at_answers, empty)

    def _watch(self) -> None:
        if self.clock is None:
            self.clock = self.loop.call_later(self.limits.read_timeout, self.transport.close)

    def _stop_watching(self) -> None:
        if self.clock is not None:
            self.clock.cancel()
            self.clock = None
