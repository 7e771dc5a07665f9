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
_TIMEOUT = Range(0.1, 86_400)


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """The address of the service, and its limits."""

    host: Annotated[str, option("Address to listen on; 0.0.0.0 listens on all interfaces.", _SERVICE)] = "127.0.0.1"
    port: Annotated[int, option("Port; 0 picks a free one.", _SERVICE, within=Range(0, 65_535))] = 8000
    json_logs: Annotated[bool, option("Write the log as lines of JSON.", _SERVICE, "--json-logs")] = False
    max_batch: Annotated[int, option("Largest batch for a call of the model.", _LIMITS, within=BATCH)] = 32
    max_wait: Annotated[
        float, option("Milliseconds that an image waits for others to fill a batch.", _LIMITS, within=Range(0, 60_000))
    ] = 5.0
    max_queue: Annotated[
        int,
        option(
            "Maximum number of concurrent requests; further ones are answered with status 429.",
            _LIMITS,
            within=Range(1, 10**6),
        ),
    ] = 128
    max_connections: Annotated[
        int, option("Maximum number of open connections; further ones are closed.", _LIMITS, within=Range(1, 10**6))
    ] = 512
    max_body: Annotated[float, option("Largest request in megabytes.", _LIMITS, within=Range(0.001, 10_000))] = 10.0
    max_pixels: Annotated[float, option("Largest image in megapixels.", _LIMITS, within=Range(0.001, 178))] = 25.0
    read_timeout: Annotated[
        float, option("Seconds that a client has to send its request.", _LIMITS, within=_TIMEOUT)
    ] = 10.0
    timeout: Annotated[float, option("Seconds from the complete request to its answer.", _LIMITS, within=_TIMEOUT)] = (
        30.0
    )
    decode_timeout: Annotated[float, option("Seconds that decoding one image may take.", _LIMITS, within=_TIMEOUT)] = (
        5.0
    )
    decoders: Annotated[int, option("Processes that decode images.", _LIMITS, within=Range(1, 256))] = 2

    def limits(self) -> Limits:
        """The limits in bytes, pixels and seconds."""
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
    """A model at a budget, and the engine to run it on."""

    budget: Budget = None
    engine: Engine = None


@dataclass(frozen=True, kw_only=True)
class RequestOptions(PreprocessingOptions):
    """Preprocessing of images, and class names for answers."""

    class_map: Annotated[
        Path | None,
        option(
            "Class names for the answers (.txt), one per line in the order of the model's outputs; default: those that "
            "belong to the weights."
        ),
    ] = None


@verb
def serve_verb(model: ServedModel, service: ServiceOptions, reading: RequestOptions, run: RunOptions) -> None:
    """Serve the reduced model over HTTP, with batching across requests; POST an image's bytes to /v1/predict.

    Example: ltmp serve --thresholds runs/deit/thresholds.safetensors --pretrained

    Then: curl -H 'content-type: image/jpeg' --data-binary @cat.jpg http://127.0.0.1:8000/v1/predict

    SIGTERM and Ctrl-C stop the service once all requests are answered.
    """
    from ... import serve
    from ...data import read_names
    from ..screen import print_result, suggest

    limits = service.limits()
    names = read_names(reading.class_map) if reading.class_map else None
    serve.log_to_stderr(as_json=service.json_logs)
    # bound before the model is built, as a port in use is the most likely mistake
    with serve.bind(service.host, service.port) as bound:
        deployment, metadata = _deployed(model, reading, run, names)
        app = serve.create_app(deployment, limits, about=metadata)
        address = f"[{service.host}]" if ":" in service.host else service.host
        url = f"http://{address}:{bound.getsockname()[1]}"
        print_result(f"serving {metadata['model_name']} on {url} (documentation: {url}/docs)")
        if not service.json_logs:
            suggest("curl", "-F", "file=@cat.jpg", f"{url}/v1/predict")
        sys.stdout.flush()
        serve.run(app, bound=bound)


def _deployed(
    model: ServedModel, reading: RequestOptions, run: RunOptions, names: list[str] | None
) -> tuple[Deployment, dict[str, str]]:
    """The model at its budget, and its metadata."""
    from ... import load
    from ...data import class_names
    from ...deploy import Deployment

    name = model.name(model.budget)
    network = model.build(name, budget=model.budget)
    share = model.resolve_budget(network, model.thresholds, run.amp_dtype, model.budget)
    file = load(network, model.thresholds, engine=model.engine, budget=share)
    deployment = Deployment(
        network,
        options=reading.transform,
        device=run.torch_device,
        amp=run.amp_dtype,
        names=names or class_names(network, pretrained=model.pretrained),
    )
    return deployment, {"model_name": name, **file.metadata}
