"""`ltmp serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ... import load
from ...data import eval_transform
from .. import options as o
from ..options import ModelName, Thresholds
from ..runs import name_in
from ..setup import ModelOptions, autocast_type, pick_device

_SERVICE, _LIMITS = "Service", "Limits"


def serve_verb(
    thresholds: Thresholds,
    model: ModelName = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.", rich_help_panel=_SERVICE)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.", rich_help_panel=_SERVICE)] = 8000,
    json_logs: Annotated[
        bool, typer.Option("--json-logs", help="Log in lines of JSON.", rich_help_panel=_SERVICE)
    ] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Images a call of the model.", rich_help_panel=_LIMITS)] = 32,
    max_wait: Annotated[
        float, typer.Option(min=0, help="Milliseconds that an image waits for others.", rich_help_panel=_LIMITS)
    ] = 5.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests at once; more are answered 429.", rich_help_panel=_LIMITS)
    ] = 128,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Open connections; more are closed.", rich_help_panel=_LIMITS)
    ] = 512,
    max_body: Annotated[float, typer.Option(min=0.001, help="Megabytes of a request.", rich_help_panel=_LIMITS)] = 10.0,
    max_pixels: Annotated[
        float, typer.Option(min=0.001, max=178, help="Megapixels of an image.", rich_help_panel=_LIMITS)
    ] = 25.0,
    read_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds a client has to send its request.", rich_help_panel=_LIMITS)
    ] = 10.0,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds from a whole request to its answer.", rich_help_panel=_LIMITS)
    ] = 30.0,
    decoders: Annotated[int, typer.Option(min=1, help="Threads that decode.", rich_help_panel=_LIMITS)] = 2,
    budget: o.Budget = None,
    engine: o.Engine = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    img_size: o.ImageSize = None,
    model_kwargs: o.ModelKwargs = None,
    class_map: Annotated[
        Path | None,
        typer.Option(help="Class names for the answers, one a line (.txt); default: the weights' own."),
    ] = None,
    interpolation: o.Interpolation = None,
    mean: o.Mean = None,
    std: o.Std = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    device: o.Device = "auto",
    amp: o.Amp = False,
    debug: o.Debug = False,
) -> None:
    """Classify images over HTTP, with the reduced model in batches; POST /v1/predict takes an image's bytes.

    Example: ltmp serve --thresholds runs/deit/thresholds.safetensors --pretrained

    Then: curl -H 'content-type: image/jpeg' --data-binary @cat.jpg http://127.0.0.1:8000/v1/predict

    SIGTERM and Ctrl-C stop it when everything is answered.
    """
    from ...data.names import known_names
    from ...serve import Limits, Predictor, bind, create_app, log_to_stderr, read_names, run

    limits = Limits(
        max_body=int(max_body * 1e6),
        max_pixels=int(max_pixels * 1e6),
        max_queue=max_queue,
        max_connections=max_connections,
        max_batch=max_batch,
        max_wait=max_wait / 1e3,
        read_timeout=read_timeout,
        timeout=timeout,
        decoders=decoders,
    )
    names = tuple(read_names(class_map)) if class_map else None
    log_to_stderr(as_json=json_logs)
    # before the model is built: a taken port is the most likely mistake
    bound = bind(host, port)
    name = model or name_in(thresholds, budget)
    network = ModelOptions(name, weights, pretrained, num_classes, img_size, model_kwargs or []).build()
    file = load(network, thresholds, engine=engine, budget=budget)
    predictor = Predictor(
        network,
        transform=eval_transform(
            network, interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct, crop_mode=crop_mode
        ),
        device=pick_device(device),
        amp=autocast_type(amp),
        names=names or known_names(network, pretrained),
    )
    app = create_app(predictor, limits, about={"model_name": name, **file.metadata})
    address = f"[{host}]" if ":" in host else host
    typer.echo(f"serving {name} on http://{address}:{bound.getsockname()[1]} (see /docs)")
    sys.stdout.flush()
    run(app, bound=bound)
