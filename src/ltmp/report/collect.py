"""The data of a report, and the evaluation that fills it."""

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
    """A line of the table and a dot in the charts.

    Attributes:
        series: the dots of a series are joined by a line.
        row: as `evaluate.tables.comparison` makes them; what was not measured is None or missing.
    """

    series: str
    row: tables.Row


@dataclass(frozen=True)
class Budget:
    """One set of thresholds, evaluated.

    Attributes:
        images: what became of each image, None where only the figures are known.
        merge, prune: thresholds a block, None where there are none, or they are not known.
        about: what the thresholds file says of itself.
        left: index of an evaluated image to a picture of what the last blocks see of it; see `gallery.with_left`.
    """

    name: str
    evaluation: Evaluation
    images: ImageRows | None = None
    merge: Sequence[float] | None = None
    prune: Sequence[float] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    left: Mapping[int, Image.Image] = field(default_factory=dict)

    def measured(self) -> list[Measured]:
        """The dense model and this budget."""
        dense, reduced = tables.comparison(self.evaluation, self.name)
        return [Measured(DENSE, dense), Measured(LEARNED, reduced)]


@dataclass(frozen=True)
class Report:
    """Everything on the page; whatever is empty leaves its section out.

    Attributes:
        title: of the page.
        budgets: thresholds that were evaluated.
        measured: more lines of the table, from other runs.
        learning: run name to its steps, mappings with step, loss and share.
        classes: class names in the order of the model's outputs.
        picture: index of an evaluated image to the image, for thumbnails.
        image_name: index of an evaluated image to its file.
        settings: what was run, on what.
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
        """Everything that was measured: dense once, then the rest."""
        found = [one for budget in self.budgets for one in budget.measured()] + list(self.measured)
        dense = [one for one in found if one.series == DENSE]
        return dense[:1] + [one for one in found if one.series != DENSE]


def shown_path(path: str | Path) -> str:
    """A path as a report may name it, which others will read: from the working folder, or else its last two parts."""
    whole = Path(path).absolute()
    if whole.is_relative_to(Path.cwd()):
        return str(whole.relative_to(Path.cwd()))
    return str(Path(*whole.parts[-2:])) if whole.parent != Path(whole.anchor) else whole.name


def evaluate_budget(
    model: nn.Module, loader: Any, name: str, *, about: Mapping[str, Any] | None = None, **how: Any
) -> Budget:
    """Evaluate an attached model and keep what became of each image.

    Args:
        model, loader: as `evaluate` takes them; the loader must not shuffle, so that images are found again.
        name: of the budget on the page.
        how: more arguments of `evaluate`.

    Raises:
        LTMPError: as `evaluate`.
    """
    parts: list[ImageRows] = []
    evaluation = evaluate(model, loader, on_images=parts.append, **how)
    rows = ImageRows(
        *(torch.cat([getattr(part, what) for part in parts]) for what in ("label", "dense", "reduced", "share", "kept"))
    )
    policy = attachment(model).policy
    # fixed rates have none to draw
    merge, prune = (policy.merge.tolist(), policy.prune.tolist()) if isinstance(policy, Thresholds) else (None, None)
    return Budget(name, evaluation, rows, merge, prune, about or {})
