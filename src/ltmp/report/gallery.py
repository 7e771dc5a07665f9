"""Thumbnails of images that say something: the cheapest, the costliest, those whose answer changed."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from ..deploy import Deployment
from ..visualize import paint_last, see
from .changes import Changes
from .collect import Budget, Report

MAX_IMAGES = 12
"""Thumbnails in a row."""

ALL = 240
"""Thumbnails on a page: with 8 kB each, at the worst, it stays below 3 MB."""

SIDE = 96


@dataclass(frozen=True)
class GalleryImage:
    """One thumbnail.

    Attributes:
        source: a data URI.
        name: where the image is from.
        lines: what is written below.
        left: another data URI, of what is left of the image; empty where nobody looked.
    """

    source: str
    name: str
    lines: Sequence[str]
    left: str = ""


def row_length(budgets: int) -> int:
    """How many thumbnails a row may have where each of `budgets` budgets has three rows, two of them twice."""
    return max(1, min(MAX_IMAGES, ALL // (5 * max(1, budgets))))


def with_left(deployment: Deployment, budget: Budget, picture: Callable[[int], Image.Image]) -> Budget:
    """The budget with pictures of what is left of its cheapest and its costliest images.

    Args:
        deployment: the model with this budget's thresholds.
        picture: index of an evaluated image to the image.
    """
    if budget.images is None:
        return budget
    found = {}
    for index in {*_ordered(budget, MAX_IMAGES, costliest=False), *_ordered(budget, MAX_IMAGES, costliest=True)}:
        image = picture(index)
        (seen,) = see(deployment.model, deployment.prepare(image)[None].to(deployment.device))
        found[index] = paint_last(deployment.view(image, 2 * SIDE), seen, 2 * SIDE)
    return replace(budget, left=found)


def _ordered(budget: Budget, count: int, *, costliest: bool) -> list[int]:
    """Indices of the images that cost least, or most; of equal ones the first."""
    assert budget.images is not None
    found: list[int] = budget.images.share.argsort(descending=costliest, stable=True)[:count].tolist()
    return found


def by_cost(report: Report, budget: Budget, count: int, *, costliest: bool) -> list[GalleryImage]:
    """The images that cost least, or most."""
    if budget.images is None:
        return []
    order = _ordered(budget, count, costliest=costliest)
    lines = {index: [f"share {budget.images.share[index]:.2f}", _label(report, budget, index)] for index in order}
    return _show(report, lines, budget)


def flipped(report: Report, budget: Budget, changes: Changes, count: int) -> list[GalleryImage]:
    """Images whose answer changed, with both answers."""
    rows = budget.images
    if rows is None:
        return []
    lines = {
        index: [
            f"{class_name(report, int(rows.dense[index]))} → {class_name(report, int(rows.reduced[index]))}",
            _label(report, budget, index),
        ]
        for index in changes.flipped[:count]
    }
    return _show(report, lines)


def class_name(report: Report, index: int) -> str:
    """The name of a class, or its number."""
    if index < 0:
        return "no label"
    return report.classes[index] if index < len(report.classes) else f"class {index}"


def _label(report: Report, budget: Budget, index: int) -> str:
    assert budget.images is not None
    label = int(budget.images.label[index])
    return f"is {class_name(report, label)}" if label >= 0 else ""


def _show(report: Report, lines: dict[int, list[str]], budget: Budget | None = None) -> list[GalleryImage]:
    """Thumbnails, where a budget is given with what it leaves of them."""
    if report.picture is None:
        return []
    left = {} if budget is None else budget.left
    return [
        GalleryImage(thumbnail(report.picture(i)), report.image_name(i), text, thumbnail(left[i]) if i in left else "")
        for i, text in lines.items()
    ]


def thumbnail(image: Image.Image) -> str:
    """A JPEG of at most 96 pixels a side as a data URI; small images are enlarged, pixel by pixel."""
    image = image.convert("RGB")
    scale = max(1, SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
