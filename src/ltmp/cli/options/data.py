"""Which images, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .groups import DATA, RUN

if TYPE_CHECKING:
    from torch import nn

    from ...data import Loader

Data = Annotated[
    str,
    typer.Option(
        help="Folder or .tar of class folders, flat folder of images, or a timm dataset (hfds/..., torch/...).",
        rich_help_panel=DATA,
    ),
]
ClassMap = Annotated[
    Path | None,
    typer.Option(help="The model's class names, one a line (.txt), where folders differ.", rich_help_panel=DATA),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a batch.", rich_help_panel=RUN)]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which part of a dataset."""

    split: Annotated[
        str | None,
        typer.Option(help="Split of the data; a folder's train/ or val/ is found by itself.", rich_help_panel=DATA),
    ] = None
    data_root: Annotated[Path | None, typer.Option(help="Where a timm dataset lies on disk.", rich_help_panel=DATA)] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes what the model takes; by default as its configuration says."""

    interpolation: Annotated[
        str | None, typer.Option(help="Resizing: bicubic, bilinear, ...; default: the model's.", rich_help_panel=DATA)
    ] = None
    mean: Annotated[
        tuple[float, float, float] | None, typer.Option(help="Mean of the channels.", rich_help_panel=DATA)
    ] = None
    std: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Standard deviation of the channels.", rich_help_panel=DATA),
    ] = None
    crop_pct: Annotated[
        float | None, typer.Option(help="Share of the resized image kept; 1: all.", rich_help_panel=DATA)
    ] = None
    crop_mode: Annotated[
        str | None, typer.Option(help="center, squash (ignores the aspect ratio) or border.", rich_help_panel=DATA)
    ] = None

    @property
    def transform(self) -> dict[str, Any]:
        """The options of `eval_transform`."""
        names = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class DataOptions(Preprocessing, Source):
    """Which images, and how they come in batches."""

    class_map: ClassMap = None
    strict: Annotated[
        bool, typer.Option(help="Refuse an image that cannot be read instead of skipping it.", rich_help_panel=DATA)
    ] = False
    batch_size: BatchSize = 64
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.", rich_help_panel=RUN)] = 0

    def open(
        self,
        source: str,
        model: nn.Module,
        *,
        split: str,
        labelled: bool = True,
        shuffle: bool = False,
        seed: int = 0,
    ) -> Loader:
        """Batches of `source` as `model` takes them, after checking that its classes fit the head."""
        from ...data import check_classes, eval_transform, image_mode, make_loader, open_dataset

        dataset = open_dataset(
            source,
            split=split,
            transform=eval_transform(model, **self.transform),
            mode=image_mode(model),
            labelled=labelled,
            class_map=self.class_map,
            root=self.data_root,
        )
        check_classes(dataset, int(getattr(model, "num_classes", 0)), self.class_map)
        return make_loader(
            dataset, self.batch_size, shuffle=shuffle, seed=seed, workers=self.workers, strict=self.strict
        )


@dataclass(frozen=True, kw_only=True)
class GivenData(DataOptions):
    """Images that must be named."""

    data: Data


@dataclass(frozen=True, kw_only=True)
class LearningData(GivenData):
    """Images to learn from, and others to report on."""

    val: Annotated[
        str | None,
        typer.Option(help="Data to report accuracy on; default: val/ of the data folder.", rich_help_panel=DATA),
    ] = None

    def open_held_out(self, model: nn.Module) -> Loader | None:
        """Images that nothing is learned from, where there are any."""
        source = self.val
        if source is None and any((Path(self.data) / name).is_dir() for name in ("val", "validation")):
            source = self.data
        return self.open(source, model, split="validation") if source else None
