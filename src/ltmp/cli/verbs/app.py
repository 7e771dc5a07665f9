"""`ltmp app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import nn

from ...app import Budgets, Explorer, build_page, serving_options
from ...data import class_names, eval_transform, image_mode, read_image
from ...data.folders import list_images
from ...data.images import EXTENSIONS
from ...errors import LTMPError, UsageError, first_line
from .. import options as o
from ..progress import console, progress_bar
from ..runs import name_in
from ..setup import ModelOptions, pick_device


def app_verb(
    model: Annotated[
        str | None,
        typer.Option(help="timm model name, or hf:NAME_OR_FOLDER; default: the demo's.", rich_help_panel="Model"),
    ] = None,
    thresholds: Annotated[
        list[Path] | None, typer.Option(help="A file that `ltmp learn` wrote; may be repeated, a budget each.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="FLOPs share that the slider begins at; default: one in the middle."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures to choose from and calibrate on.", rich_help_panel="Data"),
    ] = None,
    class_names_file: Annotated[
        Path | None,
        typer.Option("--class-names", help="Names of the model's classes, one a line (.txt).", rich_help_panel="Data"),
    ] = None,
    demo_out: Annotated[Path, typer.Option(help="Where `ltmp demo` wrote its model.")] = Path("ltmp-demo"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is everybody.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; default: the first free one from 7860 on.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = False,
    weights: o.Weights = None,
    pretrained: o.Pretrained = False,
    num_classes: o.NumClasses = None,
    img_size: o.ImageSize = None,
    model_kwargs: o.ModelKwargs = None,
    interpolation: o.Interpolation = None,
    mean: o.Mean = None,
    std: o.Std = None,
    crop_pct: o.CropPct = None,
    crop_mode: o.CropMode = None,
    device: o.Device = "auto",
    debug: o.Debug = False,
) -> None:
    """Open a page to try it: drop a picture, slide the budget, watch patches and answers change block by block.

    Without options it shows the demo's digits, offline; a first start trains a small model in less than a minute.

    Example: ltmp app --thresholds runs/60/thresholds.safetensors --thresholds runs/50/thresholds.safetensors
    --pretrained --images photographs/
    """
    if model is None and not thresholds:
        if weights or pretrained or images or budget is not None:
            raise UsageError("for which model? give --model NAME or --thresholds FILE, or no options for the demo's")
        from ...app.default import demo_explorer

        explorer = demo_explorer(demo_out, progress_bar)
    else:
        name = model or name_in((thresholds or [])[0])
        network = ModelOptions(name, weights, pretrained, num_classes, img_size, model_kwargs or []).build()
        settings: dict[str, Any] = {"interpolation": interpolation, "mean": mean, "std": std}
        settings |= {"crop_pct": crop_pct, "crop_mode": crop_mode}
        network = network.to(pick_device(device))
        explorer = _explorer(network, thresholds or [], budget, images, class_names_file, settings)
    page = build_page(explorer)
    where = {"server_name": host, "server_port": port, "inbrowser": browser}
    try:
        page.launch(**serving_options(), **where, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise LTMPError(f"cannot listen on {host}, port {port}: {first_line(error)}") from error
    console.print(f"Open {page.local_url} in a browser; Ctrl-C stops.", markup=False)
    page.block_thread()


def _explorer(
    network: nn.Module,
    files: list[Path],
    budget: float | None,
    folder: Path | None,
    names: Path | None,
    settings: dict[str, Any],
) -> Explorer:
    """A model of one's own, with the pictures of a folder."""
    mode = image_mode(network)
    samples = _pictures(folder, mode) if folder else []
    transform = eval_transform(network, **settings)
    tensors = torch.stack([transform(image) for image in samples[:16]]) if samples else None
    tensors = None if tensors is None else tensors.to(next(network.parameters()))
    budgets = Budgets.from_files(network, files, tensors, budget)
    return Explorer(network, budgets, classes=class_names(network, None, names), samples=samples, data_options=settings)


def _pictures(folder: Path, mode: str, most: int = 24) -> list[Image.Image]:
    """The first pictures of a folder, in the order of their names."""
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: --images takes a folder of pictures")
    files = [name for name, _ in list_images(folder).images]
    if not files:
        raise UsageError(f"{folder} holds no pictures: expected files that end in {', '.join(sorted(EXTENSIONS))}")
    return [read_image(folder / name, mode) for name in files[:most]]
