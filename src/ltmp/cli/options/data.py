"""Which images, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import LTMPError
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
Limit = Annotated[
    int | None, typer.Option(min=1, help="Use at most this many images, of all classes alike.", rich_help_panel=DATA)
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
        limit: int | None = None,
    ) -> Loader:
        """Batches of `source` as `model` takes them, after checking that its classes fit the head.

        With a `limit`, images of all classes alike; where the source streams, whoever reads it has to count.
        """
        from ...data import Images, check_classes, eval_transform, input_channels, make_loader, open_dataset
        from ...data.sample import sampled

        dataset = open_dataset(
            source,
            split=split,
            transform=eval_transform(model, **self.transform),
            mode="L" if input_channels(model) == 1 else "RGB",
            labelled=labelled,
            class_map=self.class_map,
            root=self.data_root,
        )
        check_classes(dataset, int(getattr(model, "num_classes", 0)), self.class_map)
        if limit is not None and isinstance(dataset, Images):
            dataset = sampled(dataset, limit)
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

    limit: Limit = None

    def open_both(self, model: nn.Module, *, labelled: bool, seed: int, check: bool) -> tuple[Loader, Loader | None]:
        """Images to learn from, shuffled, and with `check` others to report on, where there are any.

        Raises:
            LTMPError: they are not of the same classes.
        """
        learned = self.open(
            self.data, model, split=self.split or "train", labelled=labelled, shuffle=True, seed=seed, limit=self.limit
        )
        source = self.val
        if source is None and any((Path(self.data) / name).is_dir() for name in ("val", "validation")):
            source = self.data
        if source is None or not check:
            return learned, None
        held_out = self.open(source, model, split="validation", limit=self.limit)
        if self.class_map is None and labelled:
            _check_alike({self.data: learned, source if source != self.data else "its validation part": held_out})
        return learned, held_out


def _check_alike(loaders: dict[str, Loader]) -> None:
    """Refuse parts of other classes: their folders would be numbered differently."""
    (one, ours), (other, theirs) = (
        (name, set(getattr(loader.dataset, "class_to_index", None) or ())) for name, loader in loaders.items()
    )
    for name, missing in ((other, ours - theirs), (one, theirs - ours)):
        if ours and theirs and missing:
            few = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
            raise LTMPError(
                f"{name} lacks {len(missing)} of the classes ({few}): add their folders, or give a --class-map"
            )
