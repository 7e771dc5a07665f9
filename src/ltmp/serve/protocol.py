"""HTTP with the limits that uvicorn lacks: on slow clients, idle connections, and bodies in tiny chunks."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits

MAX_HEADER_BYTES = 16_384
"""Bytes in the headers of a request."""

_PIECE = 1024
"""Bytes that are parsed between checks, as every chunk of a body takes parser time."""

_FREE_LINES, _BYTES_PER_LINE = 100, 64
"""A chunked body may have this many lines, and one more for each so many bytes; each chunk takes two lines."""

_SERVICE_FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
_TINY_CHUNKS = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class LimitedProtocol(H11Protocol):
    """A connection that is closed for any of these reasons.

    - There are more than `max_connections`.
    - Headers take longer than `read_timeout` seconds. The limit also applies to a body that is still being sent after
      an early refusal; bodies that the application reads have a time limit of their own.
    - The client does not take its answers within twice `read_timeout`.
    - A body arrives in chunks of a few bytes.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.read_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.unparsed = bytearray()
        # Lines and bytes of the chunked body of one request cycle.
        self.counted_cycle: Any = None
        self.lines = self.body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._check_answers_taken(was_empty=True)
        if len(self.connections) > self.limits.max_connections:
            transport.write(_SERVICE_FULL)
            transport.close()
            return
        self._start_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_read_timer()
        if self.write_timer is not None:
            self.write_timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.unparsed += data
        self._parse()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._parse()

    def _parse(self) -> None:
        """Parse the received bytes piece by piece; those of a later request wait until this one is answered."""
        while self.unparsed and not self.transport.is_closing():
            if self.conn.their_state is h11.DONE:
                self.flow.pause_reading()
                break
            size = len(self.unparsed) if self._in_sized_body() else _PIECE
            piece, self.unparsed = bytes(self.unparsed[:size]), self.unparsed[size:]
            if self._has_tiny_chunks(piece):
                self.transport.write(_TINY_CHUNKS)
                self.transport.close()
                break
            super().data_received(piece)
        answered_early = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if self.conn.their_state is h11.IDLE or answered_early:
            self._start_read_timer()
        else:
            self._stop_read_timer()

    def _is_chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers or ())

    def _in_sized_body(self) -> bool:
        """Whether a body of known length is being read, which takes hardly any parser time."""
        return self.conn.their_state is h11.SEND_BODY and not self._is_chunked()

    def _has_tiny_chunks(self, piece: bytes) -> bool:
        """Whether a chunked body has too many chunks for its length, including the next `piece`."""
        if self.counted_cycle is not self.cycle:
            self.counted_cycle, self.lines, self.body_bytes = self.cycle, 0, 0
        if self.conn.their_state is not h11.SEND_BODY or not self._is_chunked():
            return False
        self.lines += piece.count(b"\r\n")
        self.body_bytes += len(piece)
        return self.lines > _FREE_LINES + self.body_bytes // _BYTES_PER_LINE

    def _check_answers_taken(self, was_empty: bool) -> None:
        """Cut off a client that leaves part of an answer in the write buffer at two checks in a row."""
        empty = self.transport.get_write_buffer_size() == 0
        if not (empty or was_empty):
            self.transport.abort()
            return
        self.write_timer = self.loop.call_later(self.limits.read_timeout, self._check_answers_taken, empty)

    def _start_read_timer(self) -> None:
        if self.read_timer is None:
            self.read_timer = self.loop.call_later(self.limits.read_timeout, self.transport.close)

    def _stop_read_timer(self) -> None:
        if self.read_timer is not None:
            self.read_timer.cancel()
            self.read_timer = None
