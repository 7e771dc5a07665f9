"""Write pictures of how images are reduced: the work of `ltmp show`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..calls import dense
from ..checkpoint import load, read
from ..data.dataset import check_names
from ..deploy import Deployment
from ..errors import LTMPError, UsageError
from ..files import atomic_path, check_file_writable, short_stem
from ..hosts.attach import detach
from .animation import save_film
from .groups import ReducedView, see
from .pictures import choose_blocks, frames, strip

FORMATS = ("png", "gif", "mp4", "blocks")
"""A strip over blocks, two kinds of animation, and one picture per block."""

_NUMBERED = "-{block}.png"
"""Placeholder at the end of a file name of the format "blocks", which stands for one file per block."""


@dataclass(frozen=True)
class Shown:
    """One image: its reduction at each budget, and the files with its pictures."""

    image: Path
    budgets: dict[str, ReducedView]
    files: list[Path]


def show_images(
    model: nn.Module,
    images: Sequence[Path],
    thresholds: Sequence[Path],
    out: Path,
    *,
    budgets: Sequence[float] = (),
    formats: Sequence[str] = ("png",),
    blocks: Sequence[int] | None = None,
    width: int = 224,
    device: torch.device | None = None,
    names: Sequence[str] = (),
    progress: Callable[[], object] = lambda: None,
    **data_options: Any,
) -> list[Shown]:
    """Draw which patches of each image `model` keeps at each budget.

    Args:
        model: without thresholds attached; any that are attached are detached.
        images: files that Pillow can read.
        thresholds: files that `ltmp learn` wrote for this model, one per budget.
        out: a folder, or for a single image a file, whose suffix is the format.
        budgets: FLOPs shares to set each file's dial to; if empty, each file is used as it was saved.
        formats: any of `FORMATS`, if `out` is a folder.
        blocks: from 0; by default a selection in strips, and in animations all that leave patches.
        width: of one picture in pixels.
        device: where the model runs.
        names: class names, in order, for the predictions beside the pictures.
        progress: called after each image.
        data_options: how images are resized, cropped and normalised, as in `ltmp.data.eval_transform`.

    Raises:
        UsageError: there is no image or no thresholds file, a format or block is unknown, or an output file would
            overwrite an input.
        LTMPError: an image or a thresholds file cannot be read, or a picture cannot be written.
    """
    outputs = _output_files(images, out, formats)
    deployment = Deployment(model, options=data_options, device=device or "cpu", names=names)
    results = []
    for path, files in zip(images, outputs, strict=True):
        image = deployment.read(path)
        views = see_budgets(deployment, deployment.prepare(image)[None], thresholds, budgets)
        sharp = deployment.view(image, width)
        written = []
        for file in files:
            written += _write(file, sharp, views, blocks, width)
        results.append(Shown(path, views, written))
        progress()
    return results


def see_budgets(
    deployment: Deployment, images: torch.Tensor, thresholds: Sequence[Path], budgets: Sequence[float] = ()
) -> dict[str, ReducedView]:
    """Return the reduction of the first of `images` at each budget, by a short name of the budget.

    Raises:
        UsageError: there is no thresholds file, or a file was given twice or has no dial for a budget.
    """
    if not thresholds:
        raise UsageError("nothing to show: give at least one thresholds file")
    model, views = deployment.model, {}
    try:
        for name, (path, budget) in named_budgets(thresholds, budgets).items():
            detach(model)
            load(model, path, engine="packed", budget=budget)
            view = see(model, images.to(deployment.device))[0]
            views[name] = replace(view, answers=_predictions(deployment, images[:1]))
    finally:
        detach(model)
    return views


def _predictions(deployment: Deployment, image: torch.Tensor) -> str:
    """The top classes of the dense and the reduced model, or "" if the model is not a classifier."""
    try:
        with dense():
            dense_logits = deployment(image).logits
        reduced_logits = deployment(image).logits
    # models of images and text return other outputs, or need a text
    except (LTMPError, TypeError, ValueError):
        return ""
    if dense_logits.ndim != 2 or getattr(deployment.model, "num_classes", None) == 0:
        return ""
    check_names(deployment.names, dense_logits.shape[1])
    return f"dense {_top_class(deployment, dense_logits)} -> reduced {_top_class(deployment, reduced_logits)}"


def _top_class(deployment: Deployment, logits: torch.Tensor) -> str:
    probabilities = logits[0].softmax(-1)
    return f"{deployment.name(int(probabilities.argmax()))} {probabilities.max().item():.0%}"


def named_budgets(thresholds: Sequence[Path], budgets: Sequence[float] = ()) -> dict[str, tuple[Path, float | None]]:
    """Return pairs of a file and a budget for its dial, by short names; the budget None is the one it was saved at.

    Raises:
        UsageError: a file was given twice.
    """
    names = budget_names(thresholds)
    if not budgets:
        return {name: (path, None) for name, path in zip(names, thresholds, strict=True)}
    prefixes = [""] if len(names) == 1 else [f"{name}, " for name in names]
    return {
        f"{prefix}budget {budget:g}": (path, budget)
        for prefix, path in zip(prefixes, thresholds, strict=True)
        for budget in budgets
    }


def budget_names(thresholds: Sequence[Path]) -> list[str]:
    """Return a short, unique name for each file: its target, or else its file name, with its folder, or its path.

    Raises:
        UsageError: a file was given twice.
    """
    targets = [read(path).metadata.get("target") for path in thresholds]
    by_target = [f"target {target:g}" for target in targets if isinstance(target, int | float)]
    with_folder = [f"{path.parent.name}/{path.stem}" for path in thresholds]
    for names in (by_target, [path.stem for path in thresholds], with_folder, [str(path) for path in thresholds]):
        if len(set(names)) == len(thresholds):
            return names
    raise UsageError("the same thresholds file was given twice: give each budget once")


def _output_files(images: Sequence[Path], out: Path, formats: Sequence[str]) -> list[list[Path]]:
    """The files to write for each image; the name for the format "blocks" ends in `_NUMBERED`."""
    if not images:
        raise UsageError("nothing to show: give at least one image")
    if out.suffix.lower() in (".png", ".gif", ".mp4"):
        if len(images) > 1:
            raise UsageError(f"{out} is one file, but there are {len(images)} images: give a folder instead")
        files = [[out]]
    else:
        unknown = sorted(set(formats) - set(FORMATS))
        if unknown:
            raise UsageError(f"unknown format {unknown[0]!r}: expected {', '.join(FORMATS)}")
        suffixes = {"blocks": _NUMBERED}
        files = [
            [out / (name + "-patches" + suffixes.get(kind, f".{kind}")) for kind in dict.fromkeys(formats)]
            for name in _distinct([short_stem(image) for image in images])
        ]
    inputs = {image.resolve() for image in images}
    for file in (file for group in files for file in group):
        if file.resolve() in inputs:
            raise UsageError(f"{file} is itself to be shown, and would be overwritten: choose another --out")
    # all files go to one folder
    check_file_writable(files[0][0])
    return files


def _distinct(names: list[str]) -> list[str]:
    """Number the names that occur more than once."""
    return [name if names.index(name) == i else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _write(
    file: Path, image: torch.Tensor, views: dict[str, ReducedView], blocks: Sequence[int] | None, width: int
) -> list[Path]:
    """Write one output of an image, and return the files written: several for the format "blocks"."""
    if file.suffix.lower() != ".png":
        save_film(frames(image, views, blocks, width), file)
        return [file]
    if not file.name.endswith(_NUMBERED):
        _save_png(strip(image, views, blocks, width), file)
        return [file]
    numbers = [0, *(block + 1 for block in choose_blocks(views, blocks, limit=None))]
    stem = file.name.removesuffix(_NUMBERED)
    files = [file.with_name(f"{stem}-{number:02d}.png") for number in numbers]
    for frame, path in zip(frames(image, views, blocks, width), files, strict=True):
        _save_png(frame, path)
    return files


def _save_png(picture: Image.Image, file: Path) -> None:
    with atomic_path(file) as temporary:
        picture.save(temporary, "PNG", optimize=True)
