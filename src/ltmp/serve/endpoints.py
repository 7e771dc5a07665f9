"""The endpoints. A request can name nothing but a number of classes: no file, no URL, no model."""

# annotations stay values here: FastAPI reads them
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
from .bodies import Guard, image_in, read_body, unless_gone
from .decoding import Decoders
from .limits import FORM, MEDIA_TYPES, UNITS, UNNAMED, Limits, check_media_type
from .metrics import GONE, Metrics, Watch
from .problems import ProblemError

_DESCRIPTION = "Classifies images with a vision transformer whose tokens are merged and pruned image by image."


class Prediction(BaseModel):
    """One class."""

    index: int = Field(ge=0, description="Number of the model's output.")
    label: str | None = Field(description="Its name, where the service knows it.")
    score: float = Field(ge=0, le=1, description="Probability.")


class Predictions(BaseModel):
    """The likeliest classes of an image, best first, and what the answer cost."""

    predictions: list[Prediction]
    share: float = Field(description="FLOPs spent on this image, as a share of the dense model's.")
    tokens: float = Field(description="Tokens left after a block, as a mean over the blocks.")


class Health(BaseModel):
    """Always `ok`; a service that is not answers with a problem."""

    status: str


class Info(BaseModel):
    """The model that is served."""

    version: str = Field(description="Of ltmp.")
    model: str | None
    classes: int
    input_size: list[int] = Field(description="Channels, height and width of what the model sees.")
    engine: str
    variant: str
    device: str
    about: dict[str, Any] = Field(description="What the thresholds file says about itself.")
    limits: dict[str, float]
    units: dict[str, str] = Field(description="What each of the limits is counted in.")


class Service:
    """A model thread, processes that decode, and how many requests are inside."""

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
        self.inside = 0
        self.metrics.in_flight.set_function(lambda: self.inside)
        self.metrics.queue.set_function(lambda: self.batcher.waiting)

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Ready when the model has run its smallest and its largest batch; ends when everything queued is answered."""
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
        """Read, decode, queue and wait; whatever the client does, its place is free again afterwards.

        Raises:
            ProblemError: the request is refused, or nobody waits for its answer any more.
        """
        if not self.batcher.alive:
            raise ProblemError("not-ready", "the model is not running: try again later", {"Retry-After": "10"})
        if self.inside >= self.limits.max_queue:
            raise ProblemError(
                "queue-full",
                f"{self.inside} requests are being answered: try again after the time in Retry-After",
                {"Retry-After": str(self.retry_after())},
            )
        self.inside += 1
        try:
            body = await read_body(request, self.limits.max_body, self.limits.read_timeout)
            return await self._answer(request, image_in(body, request.headers.get("content-type")))
        finally:
            self.inside -= 1

    async def _answer(self, request: Request, body: bytes) -> Answer:
        end = monotonic() + self.limits.timeout
        image = await self.decoders.decode(body, end)
        try:
            answer = unless_gone(request, self.batcher.submit(image))
            return await asyncio.wait_for(answer, end - monotonic())
        except asyncio.TimeoutError:
            raise ProblemError("timeout", f"no answer within {self.limits.timeout:g} s: try again later") from None
        except ClientDisconnect:
            raise
        except Exception as error:
            raise ProblemError("model-failed", "the image was read, but the model failed on its batch") from error

    def retry_after(self) -> int:
        """Seconds until what is inside should be answered, from the model's recent speed."""
        return min(60, max(1, math.ceil(self.inside * self.batcher.seconds_per_item)))

    def named(self, answer: Answer, top_k: int) -> Predictions:
        """The likeliest `top_k` classes."""
        scores, classes = answer.scores.topk(top_k)
        names = self.deployment.names
        found = [
            Prediction(index=index, label=names[index] if names else None, score=min(score, 1.0))
            for index, score in zip(classes.tolist(), scores.tolist(), strict=True)
        ]
        return Predictions(predictions=found, share=answer.share, tokens=answer.tokens)

    def info(self, about: dict[str, Any]) -> Info:
        """Description of the served model, without paths of this machine."""
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
    """The service as an ASGI application; its OpenAPI is under /openapi.json.

    Args:
        deployment: the model, attached, with its preprocessing and class names.
        limits: the default are `Limits()`.
        about: what /v1/info tells of the thresholds: `ltmp.load(...).metadata`.

    Raises:
        LTMPError: nothing is attached, or the model is no classifier.
        UsageError: another number of names than classes.
    """
    service = Service(deployment, limits or Limits())
    app = FastAPI(
        title="ltmp", version=__version__, description=_DESCRIPTION, lifespan=service.lifespan, redoc_url=None
    )
    app.state.service = service
    answer = partial(_answer_problem, service.metrics)
    app.add_middleware(Guard, most=service.limits.max_headers, answer=answer)
    app.add_middleware(Watch, metrics=service.metrics)
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
        top_k: int = Query(min(5, classes), ge=1, le=classes, description="Classes in the answer."),
    ) -> Predictions:
        """Classify one image: its bytes are the body, or the one file of a form."""
        check_media_type(request.headers.get("content-type"))
        return service.named(await service.predict(request), top_k)


def _add_status(app: FastAPI, service: Service, info: Info) -> None:
    @app.get("/", include_in_schema=False)
    async def start() -> dict[str, Any]:
        """Where to go from here."""
        return {"service": "ltmp", "model": info.model, "docs": "/docs", "openapi": "/openapi.json", "info": "/v1/info",
                "classify": "POST an image to /v1/predict"}  # fmt: skip

    @app.get("/healthz")
    async def live() -> Health:
        """Whether the process answers."""
        return Health(status="ok")

    @app.get("/readyz", responses=problems.documented("not-ready"))
    async def ready() -> Health:
        """Whether images can be sent."""
        if not service.batcher.alive:
            raise ProblemError("not-ready", "the model is not running")
        return Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/info")
    async def about() -> Info:
        """The model, its thresholds and the limits."""
        return info


def _answer_problem(metrics: Metrics, problem: ProblemError) -> Response:
    metrics.problems.labels(problem.code).inc()
    return JSONResponse(problem.body(), problem.status, problem.headers, problems.MEDIA_TYPE)


def _add_problems(app: FastAPI, answer: Callable[[ProblemError], Response]) -> None:
    """Every error leaves as problem JSON, also those of the framework."""

    async def own(_request: Request, problem: ProblemError) -> Response:
        return answer(problem)

    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return answer(ProblemError("invalid-parameter", f"{first['loc'][-1]}: {first['msg']}"))

    async def http(request: Request, error: HTTPException) -> Response:
        codes = {404: "not-found", 405: "method-not-allowed"}
        code = codes.get(error.status_code, "bad-request")
        detail = f"{error.detail}: see /openapi.json for what there is"
        return answer(ProblemError(code, detail, dict(error.headers or {})))

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=GONE)

    async def failed(_request: Request, _error: Exception) -> Response:
        return answer(ProblemError("internal-error", "the service failed: its log says why"))

    app.add_exception_handler(ProblemError, own)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, failed)
