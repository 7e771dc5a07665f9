"""The data of a report, and the evaluation of a budget for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..evaluate import Evaluation, ImageRows, evaluate, tables
from ..hosts.attach import attachment
from ..method.thresholds import Thresholds

LEARNED = "learned thresholds"
DENSE = "dense"


@dataclass(frozen=True)
class Measured:
    """A row of the table and a point in the charts.

    Attributes:
        series: points of the same series are joined by a line.
        row: as from `evaluate.tables.comparison`; values that were not measured are None or missing.
    """

    series: str
    row: tables.Row


@dataclass(frozen=True)
class Budget:
    """The evaluation of one set of thresholds.

    Attributes:
        name: of the budget on the page.
        evaluation: the overall results.
        images: the results of each image; None if only the overall results are known.
        merge, prune: thresholds per block; None if there are none, or they are unknown.
        about: metadata of the thresholds file.
        left: pictures of the tokens left of some images, by index of the image; see `gallery.with_left`.
    """

    name: str
    evaluation: Evaluation
    images: ImageRows | None = None
    merge: Sequence[float] | None = None
    prune: Sequence[float] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    left: Mapping[int, Image.Image] = field(default_factory=dict)

    def measured(self) -> list[Measured]:
        """Return the rows of the dense model and of this budget."""
        dense, reduced = tables.comparison(self.evaluation, self.name)
        return [Measured(DENSE, dense), Measured(LEARNED, reduced)]


@dataclass(frozen=True)
class Report:
    """Everything on the page; sections without data are left out.

    Attributes:
        title: of the page.
        budgets: thresholds that were evaluated.
        measured: further rows of the table, from other runs.
        learning: for each run, by name, its steps: mappings with `step`, `loss` and `share`.
        classes: class names in the order of the model's outputs.
        picture: returns an evaluated image by its index, for thumbnails.
        image_name: returns the file name of an evaluated image by its index.
        settings: settings, versions and machine.
    """

    title: str
    budgets: Sequence[Budget] = ()
    measured: Sequence[Measured] = ()
    learning: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    classes: Sequence[str] = ()
    picture: Callable[[int], Image.Image] | None = None
    image_name: Callable[[int], str] = "image {}".format
    settings: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[Measured]:
        """Return all rows of the table: the dense model once, then the rest."""
        results = [row for budget in self.budgets for row in budget.measured()] + list(self.measured)
        dense = [row for row in results if row.series == DENSE]
        return dense[:1] + [row for row in results if row.series != DENSE]


def shown_path(path: str | Path) -> str:
    """Shorten a path for a report that others will read: relative to the working folder, or its last two parts."""
    absolute = Path(path).absolute()
    if absolute.is_relative_to(Path.cwd()):
        return str(absolute.relative_to(Path.cwd()))
    return str(Path(*absolute.parts[-2:])) if absolute.parent != Path(absolute.anchor) else absolute.name


def evaluate_budget(
    model: nn.Module, loader: Any, name: str, *, about: Mapping[str, Any] | None = None, **how: Any
) -> Budget:
    """Evaluate an attached model and keep the results of each image.

    Args:
        model, loader: as for `evaluate`; the loader must not shuffle, so that indices identify images.
        name: of the budget on the page.
        about: metadata of the thresholds file.
        how: further arguments of `evaluate`.

    Raises:
        LTMPError: as `evaluate`.
    """
    parts: list[ImageRows] = []
    evaluation = evaluate(model, loader, on_images=parts.append, **how)
    rows = ImageRows(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("label", "dense", "reduced", "share", "kept"))
    )
    policy = attachment(model).policy
    # fixed rates have no thresholds to draw
    merge, prune = (policy.merge.tolist(), policy.prune.tolist()) if isinstance(policy, Thresholds) else (None, None)
    return Budget(name, evaluation, rows, merge, prune, about or {})
