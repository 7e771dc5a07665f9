"""`ltmp export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

from ... import load
from ...data.transforms import eval_settings
from ...errors import UsageError, printable
from ...evaluate import tables
from .. import options as o
from ..options import ModelName, Thresholds
from ..progress import console, progress_bar
from ..runs import name_in
from ..setup import DataOptions, ModelOptions


def export_verb(
    thresholds: Thresholds,
    out: Annotated[
        Path | None, typer.Option(help="The file; default: MODEL_FORM.onnx (or .pt2) in this folder.")
    ] = None,
    form: o.Form = "batch",
    format: Annotated[
        str, typer.Option(help="onnx, program (torch.export) or aoti (AOTInductor, compiled for this CPU).")
    ] = "onnx",
    opset: Annotated[int, typer.Option(help="Of ONNX.")] = 20,
    int8: o.Int8 = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="Export the model without its reduction, to compare with.")
    ] = False,
    static_batch: Annotated[int, typer.Option(min=1, help="Images a batch of the static form.")] = 1,
    data: Annotated[
        str | None,
        typer.Option(help="Images to verify on, as for `ltmp eval`; default: made ones.", rich_help_panel="Data"),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images to verify on.", rich_help_panel="Data")] = 8,
    model: ModelName = None,
    budget: o.Budget = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    img_size: o.ImageSize = None,
    model_kwargs: o.ModelKwargs = None,
    split: o.Split = None,
    data_root: o.DataRoot = None,
    interpolation: o.Interpolation = None,
    mean: o.Mean = None,
    std: o.Std = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Write the reduced model for another runtime, after checking that the file gives what the model gives.

    Example: ltmp export --thresholds runs/deit/thresholds.safetensors --pretrained --form batch --out deit.onnx
    """
    from ...export import FORMATS, Plan, export

    plan = Plan(format, form, opset, int8, dense, static_batch)
    name = model or name_in(thresholds, budget)
    path = out or Path(f"{name}_{form}{'_int8' if int8 else ''}{FORMATS[format]}")
    network = ModelOptions(name, weights, pretrained, num_classes, img_size, model_kwargs or []).build()
    about = load(network, thresholds, budget=budget).metadata
    options = DataOptions(data_root, None, interpolation, mean, std, crop_pct, crop_mode, batch_size=images)
    with progress_bar("exporting", 4 if int8 else 3) as bar:
        found = export(
            network,
            path,
            plan,
            images=first_images(options, data, network, split) if data else None,
            # a dial's file was measured at another budget than it may be set to now
            share=about.get("budget", about.get("share", about.get("target"))),
            metadata={"model": name, "preprocessing": eval_settings(network, options.transform)},
            progress=lambda stage: bar(0, stage) if stage == "tracing" else bar(1, stage),
        )
        bar(1, "done")
    values = {"path": str(path), "format": format, "form": form, "opset": opset, "int8": int8, **found.to_dict()}
    if json != "-":
        typer.echo(
            f"{path}: {form}, verified on {found.images} images with {found.counts} different token counts "
            f"(largest difference of a logit {found.difference:.1e}, share {found.share:.3f})"
        )
    if found.note:
        console.print(printable(found.note), markup=False)
    if json:
        tables.write_json(values, json)


def first_images(options: DataOptions, data: str, network: nn.Module, split: str | None) -> Tensor:
    """The first batch of a dataset; its labels do not matter."""
    loader = options.open(data, network, split=split or "validation", labelled=False, shuffle=True)
    for images, _ in loader:
        return images
    raise UsageError(f"{data} holds no images that can be read: give others, or no --data")
