"""`ltmp show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ...checkpoint import read
from ...data import class_names
from ...data.images import is_image_name
from ...errors import UsageError, printable
from ...evaluate import tables
from ...visualize.showing import FORMATS, Shown, show_images
from .. import options as o
from ..options import ModelName
from ..progress import progress_bar
from ..runs import name_in
from ..setup import ModelOptions, pick_device

_OUTPUT = "Output"


def show_verb(
    images: Annotated[list[Path], typer.Argument(help="Photographs, or folders of them.", metavar="IMAGE")],
    thresholds: Annotated[
        list[Path], typer.Option(help="A file that `ltmp learn` wrote; may be repeated, one row of pictures each.")
    ],
    budget: o.Budgets = None,
    out: Annotated[
        Path, typer.Option(help="Folder, or for one image a .png, .gif or .mp4.", rich_help_panel=_OUTPUT)
    ] = Path("ltmp-show"),
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="png (a strip over blocks), gif, mp4, or blocks (a picture each); may be repeated.  [default: png]",
            metavar="|".join(FORMATS),
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Which blocks, counted from 1: 4,8,11 or 1-6, or all.", metavar="LIST", rich_help_panel=_OUTPUT
        ),
    ] = None,
    width: Annotated[int, typer.Option(min=32, help="Of one picture in pixels.", rich_help_panel=_OUTPUT)] = 224,
    model: ModelName = None,
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
    json: o.Json = None,
    debug: o.Debug = False,
) -> None:
    """Draw which patches of photographs survive, block by block: merged ones in one colour, pruned ones hatched.

    Example: ltmp show cat.jpg --thresholds runs/deit/thresholds.safetensors --pretrained --format png --format gif
    """
    name = model or name_in(thresholds[0])
    network = ModelOptions(name, weights, pretrained, num_classes, img_size, model_kwargs or []).build()
    images = [file for path in images for file in _files(path)]
    with progress_bar("drawing", len(images)) as advance:
        shown = show_images(
            network,
            images,
            thresholds,
            out,
            budgets=budget or (),
            formats=formats or ["png"],
            blocks=None if blocks is None else parse_blocks(blocks, read(thresholds[0]).merge.numel()),
            width=width,
            device=pick_device(device),
            names=class_names(network, pretrained=weights is None),
            progress=advance,
            interpolation=interpolation,
            mean=mean,
            std=std,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
        )
    if json:
        tables.write_json([_as_json(one) for one in shown], json)
    if json != "-":
        tables.show(_rows(shown), f"{name}: tokens that enter and those that are left")
        for file in (file for one in shown for file in one.files):
            typer.echo(printable(str(file)))


def _files(path: Path) -> list[Path]:
    """The path itself, or the images in a folder."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if is_image_name(file.name))
    if not files:
        raise UsageError(f"{path} holds no images: give images, or a folder with some directly in it")
    return files


def parse_blocks(text: str, depth: int) -> list[int]:
    """ "4,8-10" as [3, 7, 8, 9]; "all" is every block."""
    if text == "all":
        return list(range(depth))
    chosen: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None:
            raise UsageError(f"--blocks {text!r}: expected numbers from 1 to {depth}, such as 4,8,11 or 1-6, or all")
        chosen += range(int(found[1]) - 1, int(found[2] or found[1]))
    return chosen


def _rows(shown: list[Shown]) -> list[tables.Row]:
    return [
        {
            "image": one.image.name,
            "budget": name,
            "tokens": seen.tokens,
            "left": seen.left,
            "share": seen.share,
            "answers": seen.answers,
        }
        for one in shown
        for name, seen in one.budgets.items()
    ]


def _as_json(one: Shown) -> dict[str, Any]:
    budgets = {
        name: {"tokens": seen.tokens, "kept": seen.kept, "share": seen.share, "answers": seen.answers}
        for name, seen in one.budgets.items()
    }
    return {"image": str(one.image), "budgets": budgets, "files": [str(file) for file in one.files]}
