"""The endpoints. A request selects nothing but the number of classes: no file, URL or model.

FastAPI reads annotations at run time, so their evaluation is not postponed here.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import __version__
from ..deploy import Deployment
from ..hosts.attach import attachment
from . import answers, problems
from .answers import Answer
from .batching import Batcher
from .bodies import HeaderCheck, extract_image, read_body, unless_disconnected
from .decoding import Decoders
from .limits import FORM, MEDIA_TYPES, UNITS, UNNAMED, Limits, check_media_type
from .metrics import CLIENT_CLOSED, Metrics, RequestMetrics
from .problems import ProblemError

_DESCRIPTION = "Image classification by a vision transformer that merges and prunes tokens per image."


class Prediction(BaseModel):
    """A class and its probability."""

    index: int = Field(ge=0, description="Index of the class among the model's outputs.")
    label: str | None = Field(description="Name of the class; null if it is unknown.")
    score: float = Field(ge=0, le=1, description="Probability of the class.")


class Predictions(BaseModel):
    """The most likely classes of an image, and the cost of the prediction."""

    predictions: list[Prediction] = Field(description="The most likely classes, in descending order of probability.")
    share: float = Field(description="FLOPs spent on this image, as a share of the dense model's FLOPs.")
    tokens: float = Field(description="Number of tokens left after each block, averaged over the blocks.")


class Health(BaseModel):
    """Health of the service."""

    status: str = Field(description="Always `ok`; otherwise the response is a problem.")


class Info(BaseModel):
    """The served model and the limits of the service."""

    version: str = Field(description="Version of ltmp.")
    model: str | None = Field(description="Name or architecture of the model; null if it is unknown.")
    classes: int = Field(description="Number of classes.")
    input_size: list[int] = Field(description="Channels, height and width of the model's input.")
    engine: str = Field(description="Engine that runs the reduced model.")
    variant: str = Field(description="Variant of the reduction method.")
    device: str = Field(description="Device on which the model runs.")
    about: dict[str, Any] = Field(description="Metadata of the thresholds file.")
    limits: dict[str, float] = Field(description="Limits on requests and on the service.")
    units: dict[str, str] = Field(description="Unit of each limit.")


class Service:
    """State of the service: the model's thread, the decoding processes, and the number of requests in flight."""

    def __init__(self, deployment: Deployment, limits: Limits) -> None:
        answers.check(deployment)
        self.deployment = deployment
        self.limits = limits
        self.metrics = Metrics()
        self.batcher: Batcher[Any, Answer] = Batcher(
            partial(answers.answer, deployment),
            inside=deployment.running,
            max_batch=limits.max_batch,
            max_wait=limits.max_wait,
            on_batch=self.metrics.on_batch,
        )
        work = partial(answers.prepare, deployment.transform, deployment.mode, limits.max_pixels)
        self.decoders = Decoders(work, limits.decoders, limits.decode_timeout)
        self.in_flight = 0
        self.metrics.in_flight.set_function(lambda: self.in_flight)
        self.metrics.queue.set_function(lambda: self.batcher.waiting)

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Start with the smallest and largest batch as warm-up; at the end, answer everything that is queued."""
        blank = self.deployment.blank
        warm_up = [[blank] * size for size in sorted({1, self.limits.max_batch})]
        self.decoders.start()
        try:
            await asyncio.to_thread(self.batcher.start, warm_up)
            yield
        finally:
            await asyncio.to_thread(self.batcher.stop)
            await asyncio.to_thread(self.decoders.stop)

    async def predict(self, request: Request) -> Answer:
        """Read the image of a request, decode it, and wait for the model's answer.

        Raises:
            ProblemError: the request is refused, failed or took too long.
            ClientDisconnect: the client has disconnected.
        """
        if not self.batcher.alive:
            raise ProblemError("not-ready", "the model is not running: try again later", {"Retry-After": "10"})
        if self.in_flight >= self.limits.max_queue:
            raise ProblemError(
                "queue-full",
                f"{self.in_flight} requests are in progress: try again after the time in Retry-After",
                {"Retry-After": str(self.retry_after())},
            )
        self.in_flight += 1
        try:
            body = await read_body(request, self.limits.max_body, self.limits.read_timeout)
            return await self._answer(request, extract_image(body, request.headers.get("content-type")))
        finally:
            self.in_flight -= 1

    async def _answer(self, request: Request, body: bytes) -> Answer:
        deadline = monotonic() + self.limits.timeout
        image = await self.decoders.decode(body, deadline)
        try:
            answer = unless_disconnected(request, self.batcher.submit(image))
            return await asyncio.wait_for(answer, deadline - monotonic())
        except asyncio.TimeoutError:
            raise ProblemError("timeout", f"no answer within {self.limits.timeout:g} s: try again later") from None
        except ClientDisconnect:
            raise
        except Exception as error:
            raise ProblemError("model-failed", "the image was decoded, but the model failed on its batch") from error

    def retry_after(self) -> int:
        """Estimate the seconds until the requests in flight are answered, from the model's recent speed."""
        return min(60, max(1, math.ceil(self.in_flight * self.batcher.seconds_per_item)))

    def top_classes(self, answer: Answer, top_k: int) -> Predictions:
        """Return the `top_k` most likely classes with their names."""
        scores, classes = answer.scores.topk(top_k)
        names = self.deployment.names
        predictions = [
            Prediction(index=index, label=names[index] if names else None, score=min(score, 1.0))
            for index, score in zip(classes.tolist(), scores.tolist(), strict=True)
        ]
        return Predictions(predictions=predictions, share=answer.share, tokens=answer.tokens)

    def info(self, about: dict[str, Any]) -> Info:
        """Describe the served model, without paths of this machine."""
        config = attachment(self.deployment.model).policy.config
        return Info(
            version=__version__,
            model=about.get("model_name") or about.get("architecture"),
            classes=self.deployment.classes,
            input_size=list(self.deployment.blank.shape),
            engine=config.engine,
            variant=config.variant,
            device=str(self.deployment.device),
            about=about,
            limits=vars(self.limits),
            units=UNITS,
        )


def create_app(deployment: Deployment, limits: Limits | None = None, *, about: dict[str, Any] | None = None) -> FastAPI:
    """Create the service as an ASGI application, with its OpenAPI document at /openapi.json.

    Args:
        deployment: the model with thresholds attached, its preprocessing and class names.
        limits: limits on requests and on the service; the default is `Limits()`.
        about: metadata of the thresholds for /v1/info, such as `ltmp.load(...).metadata`.

    Raises:
        LTMPError: nothing is attached, or the model is not a classifier.
        UsageError: the number of names is not that of the classes.
    """
    service = Service(deployment, limits or Limits())
    app = FastAPI(
        title="ltmp", version=__version__, description=_DESCRIPTION, lifespan=service.lifespan, redoc_url=None
    )
    app.state.service = service
    answer = partial(_answer_problem, service.metrics)
    app.add_middleware(HeaderCheck, max_headers=service.limits.max_headers, answer=answer)
    app.add_middleware(RequestMetrics, metrics=service.metrics)
    _add_problems(app, answer)
    _add_predict(app, service)
    _add_status(app, service, service.info(about or {}))
    return app


def _add_predict(app: FastAPI, service: Service) -> None:
    image: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "required": ["file"], "properties": {"file": image["schema"]}}}
    refusals = problems.documented(
        *(code for code in problems.STATUS if code not in ("not-found", "method-not-allowed"))
    )
    classes = service.deployment.classes

    @app.post(
        "/v1/predict",
        response_model=Predictions,
        responses=refusals,
        openapi_extra={
            "requestBody": {"required": True, "content": {**dict.fromkeys((*MEDIA_TYPES, UNNAMED), image), FORM: form}},
        },
    )
    async def predict(
        request: Request,
        top_k: int = Query(min(5, classes), ge=1, le=classes, description="Number of classes to return."),
    ) -> Predictions:
        """Classify one image, sent as the request body or as the only file of a form."""
        check_media_type(request.headers.get("content-type"))
        return service.top_classes(await service.predict(request), top_k)


def _add_status(app: FastAPI, service: Service, info: Info) -> None:
    @app.get("/", include_in_schema=False)
    async def start() -> dict[str, Any]:
        """Name the other endpoints."""
        return {"service": "ltmp", "model": info.model, "docs": "/docs", "openapi": "/openapi.json", "info": "/v1/info",
                "classify": "POST an image to /v1/predict"}  # fmt: skip

    @app.get("/healthz")
    async def live() -> Health:
        """Report that the process is alive."""
        return Health(status="ok")

    @app.get("/readyz", responses=problems.documented("not-ready"))
    async def ready() -> Health:
        """Report whether the service is ready to classify images."""
        if not service.batcher.alive:
            raise ProblemError("not-ready", "the model is not running")
        return Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/info")
    async def about() -> Info:
        """Describe the model, its thresholds, and the limits of the service."""
        return info


def _answer_problem(metrics: Metrics, problem: ProblemError) -> Response:
    metrics.problems.labels(problem.code).inc()
    return JSONResponse(problem.body(), problem.status, problem.headers, problems.MEDIA_TYPE)


def _add_problems(app: FastAPI, answer: Callable[[ProblemError], Response]) -> None:
    """Answer every error by problem JSON, including those of the framework."""

    async def refused(_request: Request, problem: ProblemError) -> Response:
        return answer(problem)

    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return answer(ProblemError("invalid-parameter", f"{first['loc'][-1]}: {first['msg']}"))

    async def http(_request: Request, error: HTTPException) -> Response:
        codes = {404: "not-found", 405: "method-not-allowed"}
        code = codes.get(error.status_code, "bad-request")
        detail = f"{error.detail}: see /openapi.json for the available endpoints"
        return answer(ProblemError(code, detail, dict(error.headers or {})))

    async def disconnected(_request: Request, _error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    async def failed(_request: Request, _error: Exception) -> Response:
        return answer(ProblemError("internal-error", "the service failed: see its log"))

    app.add_exception_handler(ProblemError, refused)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, disconnected)
    app.add_exception_handler(Exception, failed)
