"""Which images, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...checkpoint.metadata import Preprocessing
from ...errors import LTMPError
from ...ranges import BATCH, IMAGES, WORKERS
from .groups import DATA, RUN, option

if TYPE_CHECKING:
    from torch import nn

    from ...data import Loader

Data = Annotated[
    str,
    option("Folder or .tar of class folders, flat folder of images, or a timm dataset (hfds/..., torch/...).", DATA),
]
ClassMap = Annotated[Path | None, option("The model's class names, one a line (.txt), where folders differ.", DATA)]
Limit = Annotated[int | None, option("Use at most this many images, of all classes alike.", DATA, within=IMAGES)]
BatchSize = Annotated[int, option("Images per batch.", RUN, within=BATCH)]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which part of a dataset."""

    split: Annotated[str | None, option("Split of the data; a folder's train/ or val/ is found by itself.", DATA)] = (
        None
    )
    data_root: Annotated[Path | None, option("Where a timm dataset lies on disk.", DATA)] = None


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions:
    """How an image becomes what the model takes; by default as its configuration says."""

    interpolation: Annotated[str | None, option("Resizing: bicubic, bilinear, ...; default: the model's.", DATA)] = None
    mean: Annotated[tuple[float, float, float] | None, option("Mean of the channels.", DATA)] = None
    std: Annotated[tuple[float, float, float] | None, option("Standard deviation of the channels.", DATA)] = None
    crop_pct: Annotated[float | None, option("Share of the resized image kept; 1: all.", DATA)] = None
    crop_mode: Annotated[str | None, option("center, squash (ignores the aspect ratio) or border.", DATA)] = None

    def __post_init__(self) -> None:
        Preprocessing.check(self.transform)

    @property
    def transform(self) -> dict[str, Any]:
        """The options of `eval_transform`."""
        names = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class BatchOptions(PreprocessingOptions):
    """How images are read and come in batches."""

    class_map: ClassMap = None
    strict: Annotated[bool, option("Refuse an image that cannot be read instead of skipping it.", DATA)] = False
    batch_size: BatchSize = 64
    workers: Annotated[int, option("Processes that read images.", RUN, within=WORKERS)] = 0


@dataclass(frozen=True, kw_only=True)
class DataOptions(BatchOptions, Source):
    """Which images, and how they come in batches."""

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
        augment: bool = False,
        evenly: bool = True,
    ) -> Loader:
        """Batches of `source` as `model` takes them, after checking that its classes fit the head.

        With a `limit`, a sample of the images, of all classes alike if `evenly`. With `augment`, cropped, flipped and
        coloured at random.
        """
        from ...data import check_classes, image_mode, make_loader, open_dataset, transforms
        from ...data.sample import sampled

        prepare = transforms.train_transform if augment else transforms.eval_transform
        dataset = open_dataset(
            source,
            split=split,
            transform=prepare(model, **self.transform),
            mode=image_mode(model),
            labelled=labelled,
            class_map=self.class_map,
            root=self.data_root,
        )
        check_classes(dataset, int(getattr(model, "num_classes", 0)), self.class_map)
        if limit is not None:
            dataset = sampled(dataset, limit, evenly=evenly)
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

    val: Annotated[str | None, option("Data to report accuracy on; default: val/ of the data folder.", DATA)] = None

    limit: Limit = None

    def open_both(
        self, model: nn.Module, *, labelled: bool, seed: int, check: bool, augment: bool = False
    ) -> tuple[Loader, Loader | None]:
        """Images to learn from, shuffled, and with `check` others to report on, where there are any.

        Raises:
            LTMPError: they are not of the same classes.
        """
        learned = self.open(
            self.data, model, split=self.split or "train", labelled=labelled, shuffle=True, seed=seed,
            limit=self.limit, augment=augment,
        )  # fmt: skip
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
    (one, ours), (other, theirs) = ((name, _classes(loader)) for name, loader in loaders.items())
    for name, missing in ((other, ours - theirs), (one, theirs - ours)):
        if ours and theirs and missing:
            few = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
            raise LTMPError(
                f"{name} lacks {len(missing)} of the classes ({few}): add their folders, or give a --class-map"
            )


def _classes(loader: Loader) -> set[str]:
    """Names of the class folders; none where there are no labels."""
    labelled = getattr(loader.dataset, "labelled", True)
    return set(getattr(loader.dataset, "class_to_index", None) or ()) if labelled else set()
