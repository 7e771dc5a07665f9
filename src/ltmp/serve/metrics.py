"""Metrics of the service, for Prometheus and for its log."""

from __future__ import annotations

import logging
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import Answer

log = logging.getLogger(__name__)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARES = tuple(tenth / 10 for tenth in range(1, 11))
TOKENS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024)

GONE = 499
"""The status counted for a client that left before its answer; nginx's number."""


class Metrics:
    """The counters of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ltmp_requests", "Requests, by endpoint and status.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "ltmp_request_seconds", "From headers to answer.", ("path",), buckets=SECONDS, registry=self.registry
        )
        self.problems = Counter("ltmp_problems", "Requests refused or failed.", ("code",), registry=self.registry)
        self.in_flight = Gauge("ltmp_requests_in_flight", "Images being read or answered.", registry=self.registry)
        self.queue = Gauge("ltmp_queue_length", "Images waiting for the model.", registry=self.registry)
        self.batch = Histogram("ltmp_batch_size", "Images a batch.", buckets=IMAGES, registry=self.registry)
        self.model_seconds = Histogram(
            "ltmp_model_seconds", "The model's time for a batch.", buckets=SECONDS, registry=self.registry
        )
        self.share = Histogram(
            "ltmp_flops_share", "FLOPs of an image over the dense model's.", buckets=SHARES, registry=self.registry
        )
        self.tokens = Histogram(
            "ltmp_tokens_kept", "Tokens left after a block, mean over blocks.", buckets=TOKENS, registry=self.registry
        )

    def on_batch(self, size: int, seconds: float, answers: list[Answer]) -> None:
        """Count a batch."""
        self.batch.observe(size)
        self.model_seconds.observe(seconds)
        for answer in answers:
            self.share.observe(answer.share)
            self.tokens.observe(answer.tokens)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Watch:
    """ASGI middleware: counts, times and logs every request under its endpoint, never under what the client wrote."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = str(GONE), perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            status = "500"
            raise
        finally:
            path = getattr(scope.get("route"), "path", "other")
            seconds = perf_counter() - start
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            log.info(
                "%s %s in %.1f ms", path, status, 1e3 * seconds, extra={"path": path, "status": status, "s": seconds}
            )
