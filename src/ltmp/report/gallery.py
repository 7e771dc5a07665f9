"""Thumbnails of the cheapest images, the costliest, and those whose prediction changed."""

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
"""Maximum number of thumbnails in a row."""

ALL = 240
"""Maximum number of thumbnails on a page: with at most 8 kB each, it stays below 3 MB."""

SIDE = 96
"""Longest side of a thumbnail in pixels."""


@dataclass(frozen=True)
class GalleryImage:
    """One thumbnail.

    Attributes:
        source: the image as a data URI.
        name: of the image file.
        lines: the caption.
        left: another data URI, of the tokens left of the image; may be empty.
    """

    source: str
    name: str
    lines: Sequence[str]
    left: str = ""


def row_length(budgets: int) -> int:
    """Return the number of thumbnails per row: each budget has three rows, two of which show images in pairs."""
    return max(1, min(MAX_IMAGES, ALL // (5 * max(1, budgets))))


def with_left(deployment: Deployment, budget: Budget, picture: Callable[[int], Image.Image]) -> Budget:
    """Return the budget with pictures of the tokens left of its cheapest and its costliest images.

    Args:
        deployment: the model with this budget's thresholds.
        budget: its evaluation.
        picture: returns an evaluated image by its index.
    """
    if budget.images is None:
        return budget
    pictures = {}
    for index in {*_ordered(budget, MAX_IMAGES, costliest=False), *_ordered(budget, MAX_IMAGES, costliest=True)}:
        image = picture(index)
        (view,) = see(deployment.model, deployment.prepare(image)[None].to(deployment.device))
        pictures[index] = paint_last(deployment.view(image, 2 * SIDE), view, 2 * SIDE)
    return replace(budget, left=pictures)


def _ordered(budget: Budget, count: int, *, costliest: bool) -> list[int]:
    """Indices of the images that cost least, or most; ties in order of the index."""
    assert budget.images is not None
    indices: list[int] = budget.images.share.argsort(descending=costliest, stable=True)[:count].tolist()
    return indices


def by_cost(report: Report, budget: Budget, count: int, *, costliest: bool) -> list[GalleryImage]:
    """Return the images that cost least, or most."""
    if budget.images is None:
        return []
    order = _ordered(budget, count, costliest=costliest)
    lines = {index: [f"share {budget.images.share[index]:.2f}", _label(report, budget, index)] for index in order}
    return _thumbnails(report, lines, budget)


def flipped(report: Report, budget: Budget, changes: Changes, count: int) -> list[GalleryImage]:
    """Return images whose prediction changed, with both predictions."""
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
    return _thumbnails(report, lines)


def class_name(report: Report, index: int) -> str:
    """Return the name of a class, or its number if it has no name."""
    if index < 0:
        return "no label"
    return report.classes[index] if index < len(report.classes) else f"class {index}"


def _label(report: Report, budget: Budget, index: int) -> str:
    assert budget.images is not None
    label = int(budget.images.label[index])
    return f"label: {class_name(report, label)}" if label >= 0 else ""


def _thumbnails(report: Report, lines: dict[int, list[str]], budget: Budget | None = None) -> list[GalleryImage]:
    """Thumbnails with captions; with a budget, also the tokens it leaves of them."""
    if report.picture is None:
        return []
    left = {} if budget is None else budget.left
    return [
        GalleryImage(
            thumbnail(report.picture(i)), report.image_name(i), caption, thumbnail(left[i]) if i in left else ""
        )
        for i, caption in lines.items()
    ]


def thumbnail(image: Image.Image) -> str:
    """Return a JPEG of at most 96 pixels per side as a data URI; small images are enlarged without interpolation."""
    image = image.convert("RGB")
    scale = max(1, SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
