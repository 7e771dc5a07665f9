"""From photographs and thresholds to files with pictures."""

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
"""A strip over blocks, two kinds of film, and a picture for each block."""


_NUMBERED = "-{block}.png"


@dataclass(frozen=True)
class Shown:
    """One image: what became of it at each budget, and the files that show it."""

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
    """Draw what `model` keeps of each image at each budget.

    Args:
        model: not attached; afterwards it is not, either.
        images: files that Pillow can read.
        thresholds: files that `ltmp learn` wrote for this model, one a budget.
        budgets: FLOPs shares to set each file's dial to; none leaves each as it was saved.
        out: a folder, or the file to write for a single image, whose ending is the format.
        formats: any of `FORMATS`, for a folder.
        blocks: from 0; by default a choice in strips, and in films all that leave patches.
        width: of one picture in pixels.
        device: where the model runs.
        names: of the classes, in order, for the answers beside the pictures.
        progress: called after each image.
        data_options: how images are resized, cropped and normalised, as in `ltmp.data.eval_transform`.

    Raises:
        UsageError: no image or thresholds, an unknown format or block, or a file that would be overwritten by itself.
        LTMPError: an image or a thresholds file cannot be read, or a picture not written.
    """
    targets = _targets(images, out, formats)
    deployment = Deployment(model, options=data_options, device=device or "cpu", names=names)
    done = []
    for image, files in zip(images, targets, strict=True):
        photograph = deployment.read(image)
        seen = see_budgets(deployment, deployment.prepare(photograph)[None], thresholds, budgets)
        view = deployment.view(photograph, width)
        written = []
        for file in files:
            written += _write(file, view, seen, blocks, width)
        done.append(Shown(image, seen, written))
        progress()
    return done


def see_budgets(
    deployment: Deployment, images: torch.Tensor, thresholds: Sequence[Path], budgets: Sequence[float] = ()
) -> dict[str, ReducedView]:
    """The reduction of the first of `images` at each budget, by a short name of the budget."""
    if not thresholds:
        raise UsageError("nothing to show: give at least one thresholds file")
    model, found = deployment.model, {}
    try:
        for name, (path, budget) in named_budgets(thresholds, budgets).items():
            detach(model)
            load(model, path, engine="packed", budget=budget)
            seen = see(model, images.to(deployment.device))[0]
            found[name] = replace(seen, answers=_answers(deployment, images[:1]))
    finally:
        detach(model)
    return found


def _answers(deployment: Deployment, image: torch.Tensor) -> str:
    """The first choices of the dense and the reduced model; nothing of a model that is no classifier."""
    try:
        with dense():
            plain = deployment(image).logits
        answers = (plain, deployment(image).logits)
    # towers of images and text return other things, or ask for a text
    except (LTMPError, TypeError, ValueError):
        return ""
    if plain.ndim != 2 or getattr(deployment.model, "num_classes", None) == 0:
        return ""
    check_names(deployment.names, plain.shape[1])
    (first, before), (second, after) = (
        (deployment.name(int(chances.argmax())), chances.max().item())
        for chances in (logits[0].softmax(-1) for logits in answers)
    )
    return f"dense {first} {before:.0%} -> reduced {second} {after:.0%}"


def named_budgets(thresholds: Sequence[Path], budgets: Sequence[float] = ()) -> dict[str, tuple[Path, float | None]]:
    """Each file as it was saved, or with its dial at each of `budgets`, by short names.

    Raises:
        UsageError: a file was given twice, or has no dial for a budget.
    """
    names = budget_names(thresholds)
    if not budgets:
        return {name: (path, None) for name, path in zip(names, thresholds, strict=True)}
    files = [""] if len(names) == 1 else [f"{name}, " for name in names]
    return {
        f"{name}budget {budget:g}": (path, budget)
        for name, path in zip(files, thresholds, strict=True)
        for budget in budgets
    }


def budget_names(thresholds: Sequence[Path]) -> list[str]:
    """A short name for each file, none twice: its target, or else its own name, with its folder, or its path."""
    targets = [read(path).metadata.get("target") for path in thresholds]
    by_target = [f"target {target:g}" for target in targets if isinstance(target, int | float)]
    with_folder = [f"{path.parent.name}/{path.stem}" for path in thresholds]
    for names in (by_target, [path.stem for path in thresholds], with_folder, [str(path) for path in thresholds]):
        if len(set(names)) == len(thresholds):
            return names
    raise UsageError("the same thresholds file was given twice: give each budget once")


def _targets(images: Sequence[Path], out: Path, formats: Sequence[str]) -> list[list[Path]]:
    """For each image the files to write; that of "blocks" ends in `_NUMBERED`, which stands for one a block."""
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
        endings = {"blocks": _NUMBERED}
        files = [
            [out / (name + "-patches" + endings.get(kind, f".{kind}")) for kind in dict.fromkeys(formats)]
            for name in _distinct([short_stem(image) for image in images])
        ]
    inputs = {image.resolve() for image in images}
    for file in (file for group in files for file in group):
        if file.resolve() in inputs:
            raise UsageError(f"{file} is itself to be shown, and would be overwritten: choose another --out")
    # all others lie beside it
    check_file_writable(files[0][0])
    return files


def _distinct(names: list[str]) -> list[str]:
    """Names that occur again get a number."""
    return [name if names.index(name) == i else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)]


def _write(
    file: Path, view: torch.Tensor, budgets: dict[str, ReducedView], blocks: Sequence[int] | None, width: int
) -> list[Path]:
    if file.suffix.lower() != ".png":
        save_film(frames(view, budgets, blocks, width), file)
        return [file]
    if not file.name.endswith(_NUMBERED):
        _save_png(strip(view, budgets, blocks, width), file)
        return [file]
    numbers = [0, *(block + 1 for block in choose_blocks(budgets, blocks, most=None))]
    stem = file.name.removesuffix(_NUMBERED)
    files = [file.with_name(f"{stem}-{number:02d}.png") for number in numbers]
    for frame, one in zip(frames(view, budgets, blocks, width), files, strict=True):
        _save_png(frame, one)
    return files


def _save_png(picture: Image.Image, file: Path) -> None:
    with atomic_path(file) as temporary:
        picture.save(temporary, "PNG", optimize=True)
