"""Options for datasets and for how their images are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import LTMPError
from ...ranges import BATCH, IMAGES, WORKERS
from .groups import DATA, RUN, option

if TYPE_CHECKING:
    from torch import nn

    from ...data import Loader

Data = Annotated[
    str,
    option("Images: a folder or .tar of class folders, a flat folder, or a timm dataset (hfds/..., torch/...).", DATA),
]
ClassMap = Annotated[
    Path | None,
    option(
        "Class names (.txt), one per line in the order of the model's outputs; needed if class folders sort "
        "differently.",
        DATA,
    ),
]
Limit = Annotated[
    int | None, option("Use at most this many images, spread evenly over the classes.", DATA, within=IMAGES)
]
BatchSize = Annotated[int, option("Images per batch.", RUN, within=BATCH)]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The split of a dataset, and where timm stores it."""

    split: Annotated[
        str | None, option("Split of the dataset; the train/ or val/ of a folder is found automatically.", DATA)
    ] = None
    data_root: Annotated[Path | None, option("Folder in which timm stores the dataset.", DATA)] = None


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions:
    """Preprocessing of images; the defaults come from the model's configuration."""

    interpolation: Annotated[
        str | None, option("Interpolation for resizing: bicubic, bilinear, ...; default: the model's.", DATA)
    ] = None
    mean: Annotated[
        tuple[float, float, float] | None, option("Channel means for normalisation; default: the model's.", DATA)
    ] = None
    std: Annotated[
        tuple[float, float, float] | None,
        option("Channel standard deviations for normalisation; default: the model's.", DATA),
    ] = None
    crop_pct: Annotated[
        float | None, option("Share of the resized image that the crop keeps, 1 for all; default: the model's.", DATA)
    ] = None
    crop_mode: Annotated[
        str | None,
        option("Crop: center, squash (ignores the aspect ratio) or border; default: the model's.", DATA),
    ] = None

    def __post_init__(self) -> None:
        # imports torch, which --help must not wait for
        from ...checkpoint.metadata import Preprocessing

        Preprocessing.check(self.transform)

    @property
    def transform(self) -> dict[str, Any]:
        """The keyword arguments of `eval_transform`."""
        names = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class BatchOptions(PreprocessingOptions):
    """How images are read, labelled and batched."""

    class_map: ClassMap = None
    strict: Annotated[bool, option("Fail on an image that cannot be read instead of skipping it.", DATA)] = False
    batch_size: BatchSize = 64
    workers: Annotated[
        int, option("Worker processes that read images; 0 reads in the main process.", RUN, within=WORKERS)
    ] = 0


@dataclass(frozen=True, kw_only=True)
class DataOptions(BatchOptions, Source):
    """Options from a dataset to batches."""

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
        """Open `source` as batches preprocessed for `model`, after checking that its classes fit the head.

        Args:
            limit: sample at most this many images, spread over the classes if `evenly`.
            augment: crop, flip and colour the images at random.
        """
        from ...data import check_classes, image_mode, make_loader, open_dataset, transforms
        from ...data.sample import subsample

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
            dataset = subsample(dataset, limit, evenly=evenly)
        return make_loader(
            dataset, self.batch_size, shuffle=shuffle, seed=seed, workers=self.workers, strict=self.strict
        )


@dataclass(frozen=True, kw_only=True)
class RequiredData(DataOptions):
    """A dataset that must be given."""

    data: Data


@dataclass(frozen=True, kw_only=True)
class LearningData(RequiredData):
    """Images to learn from, and held-out images to report on."""

    val: Annotated[
        str | None, option("Held-out images to report accuracy on; default: val/ in the --data folder.", DATA)
    ] = None
    limit: Limit = None

    def open_both(
        self, model: nn.Module, *, labelled: bool, seed: int, check: bool, augment: bool = False
    ) -> tuple[Loader, Loader | None]:
        """Open the images to learn from, shuffled, and if `check` the held-out images; None if there are none.

        Raises:
            LTMPError: the two have different classes.
        """
        training = self.open(
            self.data, model, split=self.split or "train", labelled=labelled, shuffle=True, seed=seed,
            limit=self.limit, augment=augment,
        )  # fmt: skip
        source = self.val
        if source is None and any((Path(self.data) / name).is_dir() for name in ("val", "validation")):
            source = self.data
        if source is None or not check:
            return training, None
        held_out = self.open(source, model, split="validation", limit=self.limit)
        if self.class_map is None and labelled:
            _check_same_classes(training, held_out, self.data, source if source != self.data else "its validation part")
        return training, held_out


def _check_same_classes(training: Loader, held_out: Loader, training_name: str, held_out_name: str) -> None:
    """Refuse splits with different class folders: the same class would get different indices."""
    ours, theirs = _classes(training), _classes(held_out)
    for name, missing in ((held_out_name, ours - theirs), (training_name, theirs - ours)):
        if ours and theirs and missing:
            few = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
            raise LTMPError(
                f"{name} lacks {len(missing)} of the classes ({few}): add their folders, or give a --class-map"
            )


def _classes(loader: Loader) -> set[str]:
    """Names of the class folders; empty without labels."""
    labelled = getattr(loader.dataset, "labelled", True)
    return set(getattr(loader.dataset, "class_to_index", None) or ()) if labelled else set()
