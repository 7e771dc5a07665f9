"""Run the application on a socket: idle clients are cut off, and a signal stops it once everything is answered."""

from __future__ import annotations

import json
import logging
import math
import signal
import socket
import sys
from datetime import datetime, timezone
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..errors import LTMPError
from .limits import Limits
from .protocol import MAX_HEADER_BYTES, LimitedProtocol


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket at `host` and `port` (0: any free port); early connections wait for `run`.

    Raises:
        LTMPError: the address is not one of this machine, or is in use.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except (OSError, OverflowError) as error:
        if bound is not None:
            bound.close()
        reason = getattr(error, "strerror", None) or error
        raise LTMPError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from error
    return bound


def make_server(app: FastAPI) -> Server:
    """Return a server for an app of `create_app`; its `run` takes bound sockets and returns after a signal."""
    limits: Limits = app.state.service.limits
    config = uvicorn.Config(
        app,
        http=partial(LimitedProtocol, limits=limits),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=math.ceil(limits.read_timeout + limits.timeout) + 5,
    )
    return Server(config)


def run(app: FastAPI, host: str = "127.0.0.1", port: int = 8000, *, bound: socket.socket | None = None) -> None:
    """Serve `app` until SIGTERM or Ctrl-C; then stop accepting, answer the requests in flight and return.

    Args:
        app: the result of `create_app`.
        bound: a socket from `bind`, instead of `host` and `port`.

    Raises:
        LTMPError: the model failed on its first batches; the log has the reason.
    """
    server = make_server(app)
    # uvicorn raises the signal again after its shutdown, but a service that stopped as requested has not failed.
    before = signal.signal(signal.SIGTERM, lambda _signal, _frame: None)
    try:
        server.run([bound or bind(host, port)])
    except SystemExit as error:
        raise LTMPError("the service did not start: see its log") from error
    finally:
        signal.signal(signal.SIGTERM, before)


class Server(uvicorn.Server):
    """A server that limits decoding to a few seconds once it is asked to stop."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Any = self.config.app
        app.state.service.decoders.hurry()
        await super().shutdown(sockets)


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON, with its extra fields."""

    _standard = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in vars(record).items() if name not in self._standard}
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        values = {"time": time, "level": record.levelname.lower(), "message": record.getMessage(), **fields}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


def log_to_stderr(*, as_json: bool = False) -> None:
    """Write the logs of the service and of uvicorn to stderr, as text or with one JSON object per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("ltmp", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
