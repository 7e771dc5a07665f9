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
        list[Path],
        option("Folder or file written by `ltmp dial` or `ltmp learn`; may be repeated, one row of pictures each."),
    ]
    budget: Budgets = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class Pictures(OutputOptions):
    """The pictures to draw."""

    out: Annotated[Path, option("Output folder, or for a single image a .png, .gif or .mp4 file.", OUTPUT)] = Path(
        "ltmp-show"
    )
    formats: Annotated[
        list[str] | None,
        option(
            "Format: png (one strip over the blocks), gif, mp4, or blocks (one picture per block); may be repeated.",
            OUTPUT,
            "--format",
            show_default="png",
            metavar="png|gif|mp4|blocks",
        ),
    ] = None
    blocks: Annotated[
        str | None, option("Blocks to draw, counted from 1: 4,8,11 or 1-6, or all.", OUTPUT, metavar="LIST")
    ] = None
    width: Annotated[int, option("Width of one picture in pixels.", OUTPUT, within=Range(min=32, max=4096))] = 224


@verb
def show_verb(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.", metavar="IMAGE")],
    model: ShowModel,
    preprocessing: PreprocessingOptions,
    pictures: Pictures,
) -> None:
    """Draw which patches of an image survive, block by block: merged ones share a colour, pruned ones are hatched.

    Example: ltmp show cat.jpg --thresholds runs/deit/thresholds.safetensors --pretrained --format png --format gif
    """
    from ...checkpoint import read
    from ...data import class_names
    from ...evaluate import tables
    from ...visualize.showing import show_images
    from ..progress import progress_bar
    from ..screen import print_result, suggest

    images = [file for path in images for file in _image_files(path)]
    name = model.model or name_in(model.thresholds[0])
    network = model.build(name, classifier=False)
    blocks = pictures.blocks
    with progress_bar("drawing", len(images)) as advance:
        shown = show_images(
            network,
            images,
            model.thresholds,
            pictures.out,
            budgets=model.resolve_budgets(network, model.thresholds, None, model.budget),
            formats=pictures.formats or ["png"],
            blocks=None if blocks is None else parse_blocks(blocks, read(model.thresholds[0]).merge.numel()),
            width=pictures.width,
            device=pick_device(model.device),
            names=class_names(network, pretrained=model.weights is None),
            progress=advance,
            **preprocessing.transform,
        )
    if pictures.json:
        tables.write_json([_as_json(image) for image in shown], pictures.json)
    if not pictures.quiet:
        tables.show(_rows(shown), f"{name}: tokens before the first and after the last block")
        for image in shown:
            for file in image.files:
                print_result(file)
        folder = images[0].parent
        suggest("ltmp", "app", *model.arguments_for(model.thresholds[0]), "--images", folder)


def _image_files(path: Path) -> list[Path]:
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
    """Parse "4,8-10" into the indices [3, 7, 8, 9]; "all" is every block."""
    if text == "all":
        return list(range(depth))
    blocks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= depth:
            raise UsageError(f"--blocks {text!r}: expected numbers from 1 to {depth}, such as 4,8,11 or 1-6, or all")
        blocks += range(first - 1, last)
    return blocks


def _rows(shown: list[Shown]) -> list[Row]:
    """A row for each image at each budget."""
    return [
        {
            "image": image.image.name,
            "budget": name,
            "tokens": result.tokens,
            "left": result.left,
            "share": result.share,
            **({"answers": result.answers} if result.answers else {}),
        }
        for image in shown
        for name, result in image.budgets.items()
    ]


def _as_json(image: Shown) -> dict[str, Any]:
    budgets = {
        name: {"tokens": result.tokens, "kept": result.kept, "share": result.share, "answers": result.answers}
        for name, result in image.budgets.items()
    }
    return {"image": str(image.image), "budgets": budgets, "files": [str(file) for file in image.files]}
