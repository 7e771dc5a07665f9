"""`ltmp show`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from ...ranges import Range
from ..options import (
    OUTPUT,
    Budgets,
    CertifiedOption,
    Device,
    OutputOptions,
    PreprocessingOptions,
    SavedModel,
    name_in,
    option,
    pick_device,
    verb,
)

if TYPE_CHECKING:
    from ...evaluate.tables import Row
    from ...visualize.showing import Shown


@dataclass(frozen=True, kw_only=True)
class ShowModel(SavedModel, CertifiedOption):
    """A model at several budgets."""

    thresholds: Annotated[
        list[Path], option("A file that `ltmp learn` wrote; may be repeated, one row of pictures each.")
    ]
    budget: Budgets = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Pictures(OutputOptions):
    """Options for the drawing."""

    out: Annotated[Path, option("Folder, or for one image a .png, .gif or .mp4.", OUTPUT)] = Path("ltmp-show")
    formats: Annotated[
        list[str] | None,
        option(
            "png (a strip over blocks), gif, mp4, or blocks (a picture each); may be repeated.",
            OUTPUT,
            "--format",
            show_default="png",
            metavar="png|gif|mp4|blocks",
        ),
    ] = None
    blocks: Annotated[
        str | None, option("Which blocks, counted from 1: 4,8,11 or 1-6, or all.", OUTPUT, metavar="LIST")
    ] = None
    width: Annotated[int, option("Width of one picture in pixels.", OUTPUT, within=Range(min=32, max=4096))] = 224


@verb
def show_verb(
    images: Annotated[list[Path], typer.Argument(help="Photographs, or folders of them.", metavar="IMAGE")],
    model: ShowModel,
    reading: PreprocessingOptions,
    pictures: Pictures,
) -> None:
    """Draw which patches of photographs survive, block by block: merged ones in one colour, pruned ones hatched.

    Example: ltmp show cat.jpg --thresholds runs/deit/thresholds.safetensors --pretrained --format png --format gif
    """
    from ...checkpoint import read
    from ...data import class_names
    from ...evaluate import tables
    from ...visualize.showing import show_images
    from ..progress import progress_bar
    from ..screen import say, suggest

    images = [file for path in images for file in _files(path)]
    name = model.model or name_in(model.thresholds[0])
    network = model.build(name, classifier=False)
    blocks = pictures.blocks
    with progress_bar("drawing", len(images)) as advance:
        shown = show_images(
            network,
            images,
            model.thresholds,
            pictures.out,
            budgets=model.shares(network, model.thresholds, None, model.budget),
            formats=pictures.formats or ["png"],
            blocks=None if blocks is None else parse_blocks(blocks, read(model.thresholds[0]).merge.numel()),
            width=pictures.width,
            device=pick_device(model.device),
            names=class_names(network, pretrained=model.weights is None),
            progress=advance,
            **reading.transform,
        )
    if pictures.json:
        tables.write_json([_as_json(one) for one in shown], pictures.json)
    if not pictures.quiet:
        tables.show(_rows(shown), f"{name}: tokens that enter and those that are left")
        for file in (file for one in shown for file in one.files):
            say(file)
        folder = images[0].parent
        suggest("ltmp", "app", *model.again(model.thresholds[0]), "--images", folder)


def _files(path: Path) -> list[Path]:
    """The path itself, or the images in a folder."""
    from ...data.images import is_image_name

    if not path.exists():
        raise UsageError(f"no image {path}: check the path")
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
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last <= depth:
            raise UsageError(f"--blocks {text!r}: expected numbers from 1 to {depth}, such as 4,8,11 or 1-6, or all")
        chosen += range(first - 1, last)
    return chosen


def _rows(shown: list[Shown]) -> list[Row]:
    return [
        {
            "image": one.image.name,
            "budget": name,
            "tokens": seen.tokens,
            "left": seen.left,
            "share": seen.share,
            **({"answers": seen.answers} if seen.answers else {}),
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
