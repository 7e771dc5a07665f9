"""Labelled images from a folder, a tar or one of timm's datasets, robust to images that cannot be read."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import IO, Any

from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ..errors import LTMPError, UsageError
from ..files.text import read_text
from .folders import class_folders, describe_others, list_images, natural_key
from .images import EXTENSIONS, Broken, decode, reason
from .tars import Content, open_content, tar_images

log = logging.getLogger(__name__)

Transform = Callable[[Image.Image], Any]
ClassMap = Mapping[str, int] | str | Path

UNLABELLED = -1
MAX_NAMES = 1 << 24
# Folder names of each split, the most common first.
TRAIN = ("train", "training")
EVALUATION = ("val", "validation", "valid", "eval", "evaluation")
# Prefixes of the dataset names that `timm.data.create_dataset` accepts.
TIMM_PREFIXES = ("hfds", "hfids", "tfds", "torch", "wds")
# The class name that timm gives to images outside any class folder.
_NO_FOLDER = {"", "."}


class Images(Dataset):
    """Map-style dataset of (transformed image, label), with a `Broken` in place of an image that cannot be read.

    A broken image keeps its index, so the order and labels of the other images do not change. `make_loader` skips and
    counts broken images, or raises an error that names the first one. Unlabelled images have label -1.
    """

    def __init__(
        self, source: Any, *, transform: Transform | None = None, mode: str = "RGB", labelled: bool = True
    ) -> None:
        """Wrap `source`, a timm reader or torchvision dataset whose items are (open file or Pillow image, label)."""
        self.source = source
        self.transform = transform
        self.mode = mode
        self.class_to_index = _class_to_index(source)
        self.labelled = labelled and not (self.class_to_index and set(self.class_to_index) <= _NO_FOLDER)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int] | Broken:
        try:
            image, label = self._read(index)
        # Decoders raise all kinds of errors on damaged bytes; any of them means that this image cannot be read.
        except Exception as error:
            return Broken(self.name(index), reason(error))
        transformed = self.transform(image) if self.transform else image
        return transformed, int(label) if self.labelled else UNLABELLED

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        file, label = self.source[index]
        # timm's readers never close the files they open.
        with file if isinstance(file, IOBase) else nullcontext():
            return decode(file, self.mode), label

    def picture(self, index: int) -> Image.Image:
        """Return image `index` before the transform; raises whatever decoding raises."""
        return self._read(index)[0]

    def name(self, index: int) -> str:
        """Return the path or other origin of image `index`, for messages."""
        if hasattr(self.source, "filename"):
            return str(self.source.filename(index, absolute=True) or f"image {index}")
        return f"image {index}"


def open_dataset(
    source: str | Path,
    *,
    split: str = "validation",
    transform: Transform | None = None,
    mode: str = "RGB",
    labelled: bool = True,
    class_map: ClassMap | None = None,
    root: str | Path | None = None,
) -> Images | IterableDataset:
    """Open a dataset of images for learning or evaluation.

    Args:
        source: folder or .tar of class folders, flat folder or .tar of unlabelled images, or a dataset name for
            `timm.data.create_dataset` ("hfds/...", "torch/cifar10", "wds/...").
        split: for a folder, "train" or "validation": reads PATH/train, or PATH/val or PATH/validation, or PATH itself
            if it has no split folders. For a timm dataset, the name of its split.
        transform: maps a Pillow image to the model's input; see `eval_transform`.
        mode: "RGB", or "L" for a single-channel model.
        labelled: whether to return labels; False ignores existing ones.
        class_map: class name to index, as a dict or a .txt file with one class name per line. By default classes are
            numbered in timm's natural order of their folder names.
        root: directory of a timm dataset on disk.

    Returns:
        `Images`, or timm's iterable dataset for streaming sources ("wds/", "hfids/", "tfds/").

    Raises:
        UsageError: the source does not exist.
        LTMPError: the source has no images, mixes labelled and unlabelled ones, or has other splits but not this one.
    """
    path = Path(source)
    if not path.exists():
        return _open_timm(str(source), split, transform, mode, labelled, class_map, root)
    reader = _open_path(path, split, class_map)
    images = Images(reader, transform=transform, mode=mode, labelled=labelled)
    names = set(images.class_to_index or ())
    if labelled and names & _NO_FOLDER and names - _NO_FOLDER:
        raise LTMPError(
            f"{path} has images beside its class folders, so their class is unknown: move them into class folders, "
            "or ask for unlabelled data"
        )
    return images


def check_classes(dataset: Dataset, num_classes: int, class_map: ClassMap | None = None) -> None:
    """Raise LTMPError unless the dataset's classes fit a model with `num_classes` outputs.

    Without a class map the counts must be equal: the folders of a subset would otherwise be numbered from 0 and
    silently stand for the wrong classes. Datasets that are unlabelled or whose classes are unknown pass. Raises
    UsageError if `class_map` is a file whose number of names is not `num_classes`.
    """
    classes = getattr(dataset, "class_to_index", None)
    if not classes or not getattr(dataset, "labelled", True):
        return
    if class_map is not None and not isinstance(class_map, Mapping):
        check_names(classes, num_classes)
    highest = max(classes.values())
    if highest >= num_classes or (class_map is None and len(classes) != num_classes):
        what = f"{len(classes)} classes" if class_map is None else f"class indices up to {highest}"
        root = getattr(getattr(dataset, "source", None), "root", None)
        subject = "the data have" if root is None else f"{root} has"
        raise LTMPError(
            f"{subject} {what} but the model's head has {num_classes} (the folders are {_first_few(list(classes))}): "
            "use the model fine-tuned on these classes, or give a class map (a .txt file with the model's class names, "
            "one per line, in the order of its outputs)"
        )


def check_names(names: Collection[str], classes: int | None) -> None:
    """Raise UsageError if names and number of classes are both known but differ in count."""
    if names and classes and len(names) != classes:
        raise UsageError(f"{len(names)} class names for a model with {classes} classes: give one per class, in order")


def read_names(path: str | Path) -> list[str]:
    """Read class names from a text file, one per line.

    Raises:
        UsageError: the file is missing, not text or too large, or has an empty line.
    """
    try:
        lines = read_text(path, MAX_NAMES).rstrip().split("\n")
    except FileNotFoundError as error:
        raise UsageError(f"no class map {path}: expected a .txt file with one class name per line") from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"class map {path} cannot be read ({error}): expected a .txt file with one class name per line"
        ) from error
    names = [line.strip() for line in lines]
    if not all(names):
        raise UsageError(f"class map {path}: line {1 + names.index('')} is empty; expected one class name per line")
    return names


def _open_path(path: Path, split: str, class_map: ClassMap | None) -> _Reader:
    """Open a folder or tar of images, labelled by their folders, in timm's natural order of their paths."""
    if path.is_dir():
        path = _split_folder(path, split)
        images = _images_in_folder(path)
    elif path.is_file() and path.suffix.lower() == ".tar":
        images = _images_in_tar(path)
    else:
        raise UsageError(f"{path} is a file but not a .tar: give a folder of images or an uncompressed .tar of them")
    if not images:
        raise LTMPError(
            f"{path} holds no images: expected a folder or .tar with one folder of images per class, or a flat one of "
            f"unlabelled images (extensions: {', '.join(sorted(EXTENSIONS))})"
        )
    images.sort(key=lambda image: natural_key(f"/{image[0]}"))
    classes = class_folders([name for name, _ in images])
    class_to_idx = _load_class_map(class_map)
    if class_to_idx is None:
        class_to_idx = {name: index for index, name in enumerate(sorted(set(classes), key=natural_key))}
    unknown = sorted(set(classes) - class_to_idx.keys(), key=natural_key)
    if len(unknown) == len(set(classes)):
        raise LTMPError(
            f"{path} holds no images of the classes in the class map: its folders are {_first_few(unknown)}; give a "
            "class map with these names"
        )
    if unknown:
        log.warning("%s: left out the folders %s, which are not in the class map", path, _first_few(unknown))
    kept = [
        (name, content, class_to_idx[class_name])
        for (name, content), class_name in zip(images, classes, strict=True)
        if class_name in class_to_idx
    ]
    names, contents, labels = zip(*kept, strict=True)
    return _Reader(path, names, contents, labels, class_to_idx)


@dataclass(frozen=True)
class _Reader:
    """Encoded images and labels, with the interface of timm's readers.

    Attributes:
        root: the folder or tar of the images.
        names: paths of the images within `root`.
        contents: the location of each encoded image, or why it cannot be read.
        labels: class index of each image.
        class_to_idx: class name to label.
    """

    root: Path
    names: Sequence[str]
    contents: Sequence[Content | Broken]
    labels: Sequence[int]
    class_to_idx: dict[str, int]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        content = self.contents[index]
        if isinstance(content, Broken):
            raise ValueError(content.reason)
        return open_content(content), self.labels[index]

    def filename(self, index: int, absolute: bool = False) -> str:
        """Return the path of image `index`: within `root`, or joined to it if `absolute` and `root` is a folder."""
        name = self.names[index]
        return f"{self.root}/{name}" if absolute and self.root.is_dir() else name


def _split_folder(path: Path, split: str) -> Path:
    """Return the folder of `split` within `path`, or `path` itself if it has no split folders.

    A class may also be called "train". A folder of such a name counts as a split only if it has subfolders, or if all
    folders next to it are splits as well.
    """
    folders = {folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")}
    candidates = folders & {*TRAIN, *EVALUATION, split}
    splits_only = folders <= {*candidates, "test"}
    splits = {name for name in candidates if splits_only or any(child.is_dir() for child in (path / name).iterdir())}
    aliases = next((names for names in (TRAIN, EVALUATION) if split in names), (split,))
    for name in (split, *aliases):
        if name in splits:
            return path / name
    if splits:
        other = sorted(splits)[0]
        raise LTMPError(
            f"{path} has {other}/ but no {aliases[0]}/: add it, or give the folder to use itself, such as "
            f"{path / other}"
        )
    return path


def _images_in_folder(path: Path) -> list[tuple[str, Content | Broken]]:
    """Return (path within the folder, location) of each image; other files are left out with a warning."""
    listing = list_images(path)
    if listing.others:
        log.warning("%s: left out %s", path, describe_others(listing.others))
    return [(name, f"{path}/{name}") for name, _ in listing.images]


def _images_in_tar(path: Path) -> list[tuple[str, Content | Broken]]:
    """Return (path within the tar, location) of each image.

    Raises:
        LTMPError: the tar is truncated or damaged: a part of the data would be a different dataset.
    """
    images: list[tuple[str, Content | Broken]] = []
    try:
        for member in tar_images(str(path)):
            if not member.name and isinstance(member.content, Broken):
                raise LTMPError(f"{path}: {member.content.reason}; copy or make it again")
            images.append((member.name.removeprefix("./").lstrip("/"), member.content))
    except (tarfile.TarError, OSError) as error:
        raise LTMPError(f"{path} is not a readable, uncompressed .tar: {error}") from error
    return images


def _first_few(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def _open_timm(
    name: str,
    split: str,
    transform: Transform | None,
    mode: str,
    labelled: bool,
    class_map: ClassMap | None,
    root: str | Path | None,
) -> Images | IterableDataset:
    from timm.data import IterableImageDataset, create_dataset

    if name.partition("/")[0].lower() not in TIMM_PREFIXES:
        raise UsageError(
            f"{name} does not exist: give a folder, a .tar, or a dataset name that starts with "
            f"{', '.join(prefix + '/' for prefix in TIMM_PREFIXES)}"
        )
    options: dict[str, Any] = {"root": str(root) if root else None, "split": split}
    class_to_index = _load_class_map(class_map)
    if not name.lower().startswith("torch/"):  # torchvision's datasets accept no class map
        options["class_map"] = class_to_index
    try:
        dataset = create_dataset(name, **options)
    # Each of timm's backends raises its own errors; the user can act on the dataset's name and the reason.
    except Exception as error:
        raise LTMPError(f"cannot open the dataset {name} (split '{split}'): {error}") from error
    if isinstance(dataset, IterableImageDataset):
        dataset.transform = transform
        return dataset
    return Images(getattr(dataset, "reader", dataset), transform=transform, mode=mode, labelled=labelled)


def _load_class_map(class_map: ClassMap | None) -> dict[str, int] | None:
    """Return class name to index, or None if there is no class map.

    Raises:
        UsageError: the class map is not a .txt file with one name per line, or names a class twice.
    """
    if class_map is None:
        return None
    if isinstance(class_map, Mapping):
        return dict(class_map)
    if Path(class_map).suffix != ".txt":
        raise UsageError(
            f"class map {class_map}: expected a .txt file with one class name per line, in the model's order"
        )
    names = read_names(class_map)
    indices = {name: index for index, name in enumerate(names)}
    if len(indices) < len(names):
        duplicate = next(name for index, name in enumerate(names) if indices[name] != index)
        raise UsageError(f"class map {class_map}: {duplicate!r} is listed twice, so its index is ambiguous")
    return indices


def _class_to_index(source: Any) -> dict[str, int] | None:
    """Return the class map of a timm reader or torchvision dataset, which name this attribute differently."""
    for name in ("class_to_idx", "class_name_to_idx"):
        if getattr(source, name, None):
            return dict(getattr(source, name))
    return None
