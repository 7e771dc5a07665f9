"""`ltmp eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from ... import distributed, load
from ...errors import UsageError
from ...evaluate import tables
from .. import options as o
from ..options import ModelName, Thresholds
from ..progress import progress_bar
from ..runs import evaluate_with_bar, name_in, report_skipped
from ..setup import DataOptions, ModelOptions, autocast_type, pick_device
from ..timing import Target, say_measured

EvalEngine = Annotated[
    str | None,
    typer.Option(
        help="auto, packed, triton or graph (default: as learned); onnx or openvino: exported, against a dense export.",
        rich_help_panel="Running",
    ),
]
Exported = Annotated[
    Path | None,
    typer.Option(
        help="With --engine onnx or openvino: the file that `ltmp export` wrote; default: export now, as --form says.",
        rich_help_panel="Running",
    ),
]
RUNTIMES = ("onnx", "openvino")


def evaluate_verb(
    data: o.Data,
    thresholds: Thresholds,
    model: ModelName = None,
    budget: o.Budget = None,
    milliseconds: o.Milliseconds = None,
    images_per_second: o.ImagesPerSecond = None,
    engine: EvalEngine = None,
    exported: Exported = None,
    form: o.Form = "batch",
    int8: o.Int8 = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many images.")] = None,
    speed: Annotated[bool, typer.Option(help="Measure images per second, too.")] = True,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    img_size: o.ImageSize = None,
    model_kwargs: o.ModelKwargs = None,
    split: o.Split = None,
    data_root: o.DataRoot = None,
    class_map: o.ClassMap = None,
    interpolation: o.Interpolation = None,
    mean: o.Mean = None,
    std: o.Std = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    strict: o.Strict = False,
    batch_size: o.BatchSize = 64,
    workers: o.Workers = 0,
    device: o.Device = "auto",
    amp: o.Amp = False,
    json: o.Json = None,
    csv: o.Csv = None,
    debug: o.Debug = False,
) -> None:
    """Compare the reduced model with the dense one: accuracy, agreement, FLOPs share, tokens and speed.

    Example: ltmp eval --data imagenet/ --thresholds runs/deit/thresholds.safetensors --pretrained
    """
    target = Target.of(milliseconds, images_per_second, budget)
    name = model or name_in(thresholds, budget)
    network = ModelOptions(name, weights, pretrained, num_classes, img_size, model_kwargs or []).build()
    elsewhere = engine in RUNTIMES
    if exported and not elsewhere:
        raise UsageError("--exported is for --engine onnx or openvino, which run such files")
    if elsewhere and (amp or device not in ("auto", "cpu")):
        raise UsageError(f"--engine {engine} runs float32 or INT8 on the CPU: leave out --amp and --device {device}")
    if elsewhere and target:
        raise UsageError(f"--engine {engine} is not timed block by block: give --budget instead of a time or a speed")
    load(network, thresholds, engine=None if elsewhere else engine, budget=budget)
    loader = DataOptions(
        data_root, class_map, interpolation, mean, std, crop_pct, crop_mode, strict, batch_size, workers
    ).open(data, network, split=split or "validation")
    place = torch.device("cpu") if elsewhere else pick_device(device)
    if target:
        images = next(iter(loader))[0].to(place)
        budget = target.meet(network.to(place), images, autocast_type(amp), quiet="-" in (json, csv))
    if engine is not None and elsewhere:
        network = _in_runtime(network, engine, exported, form, int8)
    with distributed.group(place):
        result = evaluate_with_bar(network, loader, device=place, amp=autocast_type(amp), limit=limit, speed=speed)
        if distributed.rank() > 0:
            return
    report_skipped(loader.skipped)
    rows = tables.comparison(result)
    if "-" not in (json, csv):
        at = "" if budget is None else f" at {budget:g}"
        tables.show(rows, f"{name}{at}, {result.images} images (top-1, top-5, agree in %)")
        typer.echo(tables.tokens_line(result))
        if target and result.throughput is not None:
            say_measured(result.throughput.batch_size, result.throughput.reduced)
    if json:
        about: dict[str, Any] = {"model": name, "thresholds": str(thresholds), "device": str(place)}
        about |= {} if budget is None else {"budget": budget}
        tables.write_json(tables.as_json(result, **about), json)
    if csv:
        tables.write_csv(rows, csv)


def _in_runtime(network: nn.Module, engine: str, exported: Path | None, form: str, int8: bool) -> nn.Module:
    """The exports of `network` in a runtime, with a bar while what is missing is exported."""
    from ...export import Plan, in_runtime

    with progress_bar("exporting", 1) as bar:
        sessions = in_runtime(
            network, engine, exported, Plan(form=form, int8=int8), progress=lambda stage: bar(0, stage)
        )
        bar(1, "exported")
    return sessions
