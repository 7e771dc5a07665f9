"""`ltmp serve`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Budget, CertifiedOption, Engine, Preprocessing, ReducedModel, RunOptions, verb

if TYPE_CHECKING:
    from ...serve import Limits

_SERVICE, _LIMITS = "Service", "Limits"


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Where the service listens, and how much it takes on."""

    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.", rich_help_panel=_SERVICE)
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.", rich_help_panel=_SERVICE)] = 8000
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Log in lines of JSON.", rich_help_panel=_SERVICE)] = (
        False
    )
    max_batch: Annotated[int, typer.Option(min=1, help="Images a call of the model.", rich_help_panel=_LIMITS)] = 32
    max_wait: Annotated[
        float, typer.Option(min=0, help="Milliseconds that an image waits for others.", rich_help_panel=_LIMITS)
    ] = 5.0
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests at once; more are answered 429.", rich_help_panel=_LIMITS)
    ] = 128
    max_connections: Annotated[
        int, typer.Option(min=1, help="Open connections; more are closed.", rich_help_panel=_LIMITS)
    ] = 512
    max_body: Annotated[float, typer.Option(min=0.001, help="Megabytes of a request.", rich_help_panel=_LIMITS)] = 10.0
    max_pixels: Annotated[
        float, typer.Option(min=0.001, max=178, help="Megapixels of an image.", rich_help_panel=_LIMITS)
    ] = 25.0
    read_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds a client has to send its request.", rich_help_panel=_LIMITS)
    ] = 10.0
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds from a whole request to its answer.", rich_help_panel=_LIMITS)
    ] = 30.0
    decode_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that decoding one image may take.", rich_help_panel=_LIMITS)
    ] = 5.0
    decoders: Annotated[int, typer.Option(min=1, help="Processes that decode.", rich_help_panel=_LIMITS)] = 2

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
class RequestOptions(Preprocessing):
    """From a request's image to its answer."""

    class_map: Annotated[
        Path | None,
        typer.Option(help="Class names for the answers, one a line (.txt); default: the weights' own."),
    ] = None


@verb
def serve_verb(model: ServedModel, service: ServiceOptions, reading: RequestOptions, run: RunOptions) -> None:
    """Classify images over HTTP, with the reduced model in batches; POST /v1/predict takes an image's bytes.

    Example: ltmp serve --thresholds runs/deit/thresholds.safetensors --pretrained

    Then: curl -H 'content-type: image/jpeg' --data-binary @cat.jpg http://127.0.0.1:8000/v1/predict

    SIGTERM and Ctrl-C stop it when everything is answered.
    """
    from ... import load, serve
    from ...data import class_names, read_names
    from ..screen import say

    limits = service.limits()
    names = read_names(reading.class_map) if reading.class_map else None
    serve.log_to_stderr(as_json=service.json_logs)
    # before the model is built: a taken port is the most likely mistake
    bound = serve.bind(service.host, service.port)
    name = model.name(model.budget)
    network = model.build(name, budget=model.budget)
    share = model.share(network, model.thresholds, run.cast, model.budget)
    file = load(network, model.thresholds, engine=model.engine, budget=share)
    deployment = serve.Deployment(
        network,
        options=reading.transform,
        device=run.place,
        amp=run.cast,
        names=names or class_names(network, pretrained=model.pretrained),
    )
    app = serve.create_app(deployment, limits, about={"model_name": name, **file.metadata})
    address = f"[{service.host}]" if ":" in service.host else service.host
    say(f"serving {name} on http://{address}:{bound.getsockname()[1]} (see /docs)")
    sys.stdout.flush()
    serve.run(app, bound=bound)
