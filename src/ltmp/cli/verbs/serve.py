"""`ltmp serve`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...ranges import BATCH, Range
from ..options import Budget, CertifiedOption, Engine, PreprocessingOptions, ReducedModel, RunOptions, option, verb

if TYPE_CHECKING:
    from ...deploy import Deployment
    from ...serve import Limits

_SERVICE, _LIMITS = "Service", "Limits"
_PATIENCE = Range(0.1, 86_400)


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Where the service listens, and how much it takes on."""

    host: Annotated[str, option("Address to listen on; 0.0.0.0: all of this machine's.", _SERVICE)] = "127.0.0.1"
    port: Annotated[int, option("0: any free one.", _SERVICE, within=Range(0, 65_535))] = 8000
    json_logs: Annotated[bool, option("Log in lines of JSON.", _SERVICE, "--json-logs")] = False
    max_batch: Annotated[int, option("Images per call of the model.", _LIMITS, within=BATCH)] = 32
    max_wait: Annotated[
        float, option("Milliseconds that an image waits for others.", _LIMITS, within=Range(0, 60_000))
    ] = 5.0
    max_queue: Annotated[int, option("Requests at once; more are answered 429.", _LIMITS, within=Range(1, 10**6))] = 128
    max_connections: Annotated[int, option("Open connections; more are closed.", _LIMITS, within=Range(1, 10**6))] = 512
    max_body: Annotated[float, option("Megabytes of a request.", _LIMITS, within=Range(0.001, 10_000))] = 10.0
    max_pixels: Annotated[float, option("Megapixels of an image.", _LIMITS, within=Range(0.001, 178))] = 25.0
    read_timeout: Annotated[float, option("Seconds a client has to send its request.", _LIMITS, within=_PATIENCE)] = (
        10.0
    )
    timeout: Annotated[float, option("Seconds from a whole request to its answer.", _LIMITS, within=_PATIENCE)] = 30.0
    decode_timeout: Annotated[float, option("Seconds that decoding one image may take.", _LIMITS, within=_PATIENCE)] = (
        5.0
    )
    decoders: Annotated[int, option("Processes that decode.", _LIMITS, within=Range(1, 256))] = 2

    def limits(self) -> Limits:
        """In bytes, pixels and seconds."""
        from ...serve import Limits

        return Limits(
            max_body=int(self.max_body * 1e6),
            max_pixels=int(self.max_pixels * 1e6),
            max_queue=self.max_queue,
            max_connections=self.max_connections,
            max_batch=self.max_batch,
            max_wait=self.max_wait / 1e3,
            read_timeout=self.read_timeout,
            timeout=self.timeout,
            decode_timeout=self.decode_timeout,
            decoders=self.decoders,
        )


@dataclass(frozen=True, kw_only=True)
class ServedModel(ReducedModel, CertifiedOption):
    """The model at a budget, on an engine."""

    budget: Budget = None
    engine: Engine = None


@dataclass(frozen=True, kw_only=True)
class RequestOptions(PreprocessingOptions):
    """From a request's image to its answer."""

    class_map: Annotated[
        Path | None, option("Class names for the answers, one a line (.txt); default: the weights' own.")
    ] = None


@verb
def serve_verb(model: ServedModel, service: ServiceOptions, reading: RequestOptions, run: RunOptions) -> None:
    """Classify images over HTTP, with the reduced model in batches; POST /v1/predict takes an image's bytes.

    Example: ltmp serve --thresholds runs/deit/thresholds.safetensors --pretrained

    Then: curl -H 'content-type: image/jpeg' --data-binary @cat.jpg http://127.0.0.1:8000/v1/predict

    SIGTERM and Ctrl-C stop it when everything is answered.
    """
    from ... import serve
    from ...data import read_names
    from ..screen import say, suggest

    limits = service.limits()
    names = read_names(reading.class_map) if reading.class_map else None
    serve.log_to_stderr(as_json=service.json_logs)
    # before the model is built: a taken port is the most likely mistake
    with serve.bind(service.host, service.port) as bound:
        deployment, about = _deployed(model, reading, run, names)
        app = serve.create_app(deployment, limits, about=about)
        address = f"[{service.host}]" if ":" in service.host else service.host
        url = f"http://{address}:{bound.getsockname()[1]}"
        say(f"serving {about['model_name']} on {url} (see {url}/docs)")
        if not service.json_logs:
            suggest("curl", "-F", "file=@cat.jpg", f"{url}/v1/predict")
        sys.stdout.flush()
        serve.run(app, bound=bound)


def _deployed(
    model: ServedModel, reading: RequestOptions, run: RunOptions, names: list[str] | None
) -> tuple[Deployment, dict[str, str]]:
    """The model at its budget, and what there is to tell of it."""
    from ... import load
    from ...data import class_names
    from ...deploy import Deployment

    name = model.name(model.budget)
    network = model.build(name, budget=model.budget)
    share = model.share(network, model.thresholds, run.cast, model.budget)
    file = load(network, model.thresholds, engine=model.engine, budget=share)
    deployment = Deployment(
        network,
        options=reading.transform,
        device=run.place,
        amp=run.cast,
        names=names or class_names(network, pretrained=model.pretrained),
    )
    return deployment, {"model_name": name, **file.metadata}
