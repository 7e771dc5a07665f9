"""`ltmp predict`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...config import ENGINES
from ...data import read_names
from ...errors import UsageError
from ...evaluate import tables
from ...predict import RayOptions, Scoring, Summary, predict
from .. import options as o
from ..options import ModelName
from ..progress import console, progress_bar
from ..runs import InterruptedRunError, name_in
from ..setup import ModelOptions, build_reduced, pick_device

_OUTPUT, _DATA, _RUN, _RAY = "Output", "Data", "Running", "Ray"

Source = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="A folder of images at any depth, or tars (WebDataset shards) or Parquet files, by name, folder or "
        "pattern, such as 'shards/{000..099}.tar'.",
    ),
]
Out = Annotated[Path, typer.Option(help="Output folder; an interrupted run there goes on.", rich_help_panel=_OUTPUT)]
Top = Annotated[
    int | None,
    typer.Option(min=1, help="Classes to keep for each image; default: 5, or all of fewer.", rich_help_panel=_OUTPUT),
]
Embeddings = Annotated[
    bool,
    typer.Option("--embeddings", help="Keep what enters the classifier instead of classes.", rich_help_panel=_OUTPUT),
]
ShardSize = Annotated[
    int, typer.Option(min=1, help="Images a file where SOURCE is a folder of images.", rich_help_panel=_OUTPUT)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Remove the run in --out and start anew.", rich_help_panel=_OUTPUT)
]
Column = Annotated[str | None, typer.Option(help="Parquet column of images or their paths.", rich_help_panel=_DATA)]
KeyColumn = Annotated[str | None, typer.Option(help="Parquet column that names the rows.", rich_help_panel=_DATA)]
Thresholds = Annotated[
    Path | None,
    typer.Option(help="The file that `ltmp learn` wrote; without it the model runs dense.", rich_help_panel="Model"),
]
Engine = Annotated[
    str | None,
    typer.Option(help="auto, packed, triton or graph; ray is short for --runner ray.", rich_help_panel=_RUN),
]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Processes that decode ahead; default: 1, with a GPU up to 8.", rich_help_panel=_RUN),
]
Runner = Annotated[str, typer.Option(help="local: this process; ray: a Ray cluster.", rich_help_panel=_RAY)]
Actors = Annotated[
    int | None, typer.Option(min=1, help="Models at once; default: one a GPU, or else a CPU.", rich_help_panel=_RAY)
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Of a running cluster; default: RAY_ADDRESS, or a local one for this run.", rich_help_panel=_RAY),
]


def predict_verb(
    source: Source,
    out: Out,
    model: ModelName = None,
    thresholds: Thresholds = None,
    budget: o.Budget = None,
    top: Top = None,
    embeddings: Embeddings = False,
    shard_size: ShardSize = 1024,
    overwrite: Overwrite = False,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    img_size: o.ImageSize = None,
    model_kwargs: o.ModelKwargs = None,
    class_map: o.ClassMap = None,
    column: Column = None,
    key_column: KeyColumn = None,
    interpolation: o.Interpolation = None,
    mean: o.Mean = None,
    std: o.Std = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    batch_size: o.BatchSize = 64,
    workers: Workers = None,
    device: o.Device = "auto",
    amp: o.Amp = False,
    engine: Engine = None,
    runner: Runner = "local",
    actors: Actors = None,
    ray_address: RayAddress = None,
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Score every image of a large collection: top classes or embeddings, to Parquet.

    One output file a shard. Stopped or killed, the same command goes on where it stopped.

    Example: ltmp predict images/ --out scores --thresholds runs/deit/thresholds.safetensors --pretrained
    """
    ray = _ray_options(runner, engine, actors, ray_address)
    engine = None if engine == "ray" else engine
    name = _model_name(model, thresholds, engine, budget)
    options = ModelOptions(
        name, weights.absolute() if weights else None, pretrained, num_classes, img_size, model_kwargs or []
    )
    scoring = Scoring(
        partial(build_reduced, options, thresholds.absolute() if thresholds else None, engine, budget),
        top=top,
        embeddings=embeddings,
        class_names=tuple(read_names(class_map)) if class_map else None,
        pretrained=pretrained and weights is None,
        transform={
            "interpolation": interpolation, "mean": mean, "std": std, "crop_pct": crop_pct, "crop_mode": crop_mode
        },
        batch_size=batch_size,
        workers=workers,
        device=device if ray and device != "auto" else str(pick_device(device)),
        amp=amp,
        about={"name": name, "model_kwargs": model_kwargs, "img_size": img_size},
    )  # fmt: skip
    with progress_bar("scoring", None) as bar:
        try:
            summary = predict(
                source,
                out,
                scoring,
                shard_size=shard_size,
                column=column,
                key_column=key_column,
                overwrite=overwrite,
                ray=ray,
                report=bar.reach,
            )
        except KeyboardInterrupt:
            raise InterruptedRunError(f"interrupted: the same command goes on with the shards left in {out}") from None
    if json != "-":
        _show(summary)
    if json:
        tables.write_json(asdict(summary), json)


def _ray_options(runner: str, engine: str | None, actors: int | None, address: str | None) -> RayOptions | None:
    """None runs here."""
    if runner not in ("local", "ray"):
        raise UsageError(f"unknown runner {runner!r}: expected local or ray")
    if runner == "ray" or engine == "ray":
        return RayOptions(actors, address)
    if actors is not None or address is not None:
        raise UsageError("--actors and --ray-address are for --runner ray: add it, or leave them out")
    return None


def _model_name(model: str | None, thresholds: Path | None, engine: str | None, budget: float | None) -> str:
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}: expected {', '.join(ENGINES)}, or ray")
    if thresholds is not None:
        return model or name_in(thresholds, budget)
    for option, value in (("--engine", engine), ("--budget", budget)):
        if value is not None:
            raise UsageError(f"{option} is for reduced models: give --thresholds FILE, or leave it out")
    if model is None:
        raise UsageError("which model? give --thresholds FILE, or --model NAME for a dense one")
    return model


def _show(summary: Summary) -> None:
    row: dict[str, Any] = {
        "images": summary.images,
        "broken": summary.broken,
        "shards": summary.shards,
        "done before": summary.continued,
        "share": summary.share,
        "img/s": summary.images_per_second,
    }
    tables.show([row], f"scores in {summary.out}")
    if summary.errors:
        console.print(f"{summary.broken} images could not be read; {summary.errors} says why", markup=False)
    if summary.duplicates:
        console.print(f"{summary.duplicates} keys occur again in their shard; the column row tells them apart")
