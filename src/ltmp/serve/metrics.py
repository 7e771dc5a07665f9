"""Metrics of the service for Prometheus, and its request log."""

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

CLIENT_CLOSED = 499
"""Status counted for a client that disconnected before its answer, as in nginx."""


class Metrics:
    """The metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "ltmp_requests", "Number of requests, by endpoint and status.", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "ltmp_request_seconds", "Seconds from headers to answer.", ("path",), buckets=SECONDS, registry=registry
        )
        self.problems = Counter(
            "ltmp_problems", "Number of requests refused or failed, by code.", ("code",), registry=registry
        )
        self.in_flight = Gauge(
            "ltmp_requests_in_flight", "Number of requests being read or answered.", registry=registry
        )
        self.queue = Gauge("ltmp_queue_length", "Number of images waiting for the model.", registry=registry)
        self.batch = Histogram("ltmp_batch_size", "Number of images per batch.", buckets=IMAGES, registry=registry)
        self.model_seconds = Histogram(
            "ltmp_model_seconds", "Seconds that the model takes for a batch.", buckets=SECONDS, registry=registry
        )
        self.share = Histogram(
            "ltmp_flops_share", "FLOPs of an image, as a share of the dense model's.", buckets=SHARES, registry=registry
        )
        self.tokens = Histogram(
            "ltmp_tokens_kept",
            "Tokens of an image left after each block, averaged over blocks.",
            buckets=TOKENS,
            registry=registry,
        )

    def on_batch(self, size: int, seconds: float, answers: list[Answer]) -> None:
        """Record a batch."""
        self.batch.observe(size)
        self.model_seconds.observe(seconds)
        for answer in answers:
            self.share.observe(answer.share)
            self.tokens.observe(answer.tokens)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class RequestMetrics:
    """ASGI middleware that counts, times and logs requests by endpoint, never by the path that the client sent."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = str(CLIENT_CLOSED), perf_counter()

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
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
