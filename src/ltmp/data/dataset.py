"""Images with labels from a folder, a tar or a dataset that timm knows, robust to images that cannot be read."""

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
# Names of a split's folder, the usual one first.
TRAIN = ("train", "training")
EVALUATION = ("val", "validation", "valid", "eval", "evaluation")
# Prefixes of the dataset names that timm.data.create_dataset understands.
TIMM_PREFIXES = ("hfds", "hfids", "tfds", "torch", "wds")
# The class name that timm gives to images that lie in no class folder.
_NO_FOLDER = {"", "."}


@dataclass(frozen=True)
class Listed:
    """Encoded images with their labels, as `Images` reads them.

    Attributes:
        root: the folder or tar that they lie in.
        names: in it; `contents` is where their bytes are, and `labels` what they are of.
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
        """The name of image `index`; that of a file with its folder, where `absolute`."""
        name = self.names[index]
        return f"{self.root}/{name}" if absolute and self.root.is_dir() else name


class Images(Dataset):
    """A map-style dataset of (transformed image, label); a `Broken` in place of an image that cannot be read.

    A broken image keeps its place, so order and labels of the others do not move; `make_loader` leaves it out
    and counts it, or refuses it by name. Labels are -1 where there are none.
    """

    def __init__(
        self, source: Any, *, transform: Transform | None = None, mode: str = "RGB", labelled: bool = True
    ) -> None:
        """`source`: a timm reader or torchvision dataset, giving (open file or Pillow image, label)."""
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
        # Decoders fail in many ways on damaged bytes; each means that this image cannot be read.
        except Exception as error:
            return Broken(self.name(index), reason(error))
        transformed = self.transform(image) if self.transform else image
        return transformed, int(label) if self.labelled else UNLABELLED

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        file, label = self.source[index]
        # timm's readers leave it to the garbage collector
        with file if isinstance(file, IOBase) else nullcontext():
            return decode(file, self.mode), label

    def picture(self, index: int) -> Image.Image:
        """Image `index` as it is, before the transform; raises what decoding raises."""
        return self._read(index)[0]

    def name(self, index: int) -> str:
        """Where image `index` comes from, for messages."""
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
    """Open images for learning or evaluation.

    Args:
        source: a folder of class folders, a .tar of class folders, a flat folder or tar of unlabelled images,
            or a dataset name that timm.data.create_dataset takes ("hfds/...", "torch/cifar10", "wds/...").
        split: "train" or "validation" for a folder, where PATH/train, PATH/val or PATH/validation is used; PATH
            itself where it is not split. For a timm dataset, the split's name there.
        transform: from the Pillow image to what the model takes; see `eval_transform`.
        mode: "RGB", or "L" for a model of one channel.
        labelled: False ignores the labels that are there.
        class_map: class name to index, as a dict or a .txt file of one class a line; without it classes are
            numbered in timm's natural order of their folder names.
        root: where a timm dataset lies on disk.

    Returns:
        `Images`, or timm's iterable dataset for sources that stream ("wds/", "hfids/", "tfds/").

    Raises:
        UsageError: the source does not exist.
        LTMPError: it holds no images, mixes labelled and unlabelled, or has other splits but not this one.
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

    Without a class map the counts must be equal: a subset's folders would otherwise be numbered from 0 and
    silently mean other classes. Datasets without labels, or whose classes are not known, pass. Raises UsageError for a
    file of names that has another number of them.
    """
    classes = getattr(dataset, "class_to_index", None)
    if not classes or not getattr(dataset, "labelled", True):
        return
    if class_map is not None and not isinstance(class_map, Mapping):
        check_names(classes, num_classes)
    highest = max(classes.values()) + 1
    if highest > num_classes or (class_map is None and len(classes) != num_classes):
        what = f"{len(classes)} classes" if class_map is None else f"class indices up to {highest - 1}"
        root = getattr(getattr(dataset, "source", None), "root", None)
        where = "the data have" if root is None else f"{root} has"
        raise LTMPError(
            f"{where} {what} but the model's head has {num_classes} (the folders are {_some(list(classes))}): use the "
            "model fine-tuned on these classes, or give a class map (a .txt file with the model's class names, one a "
            "line, in the order of its outputs)"
        )


def check_names(names: Collection[str], classes: int | None) -> None:
    """Raise UsageError where both are known, and there is not one name for each of a model's classes."""
    if names and classes and len(names) != classes:
        raise UsageError(f"{len(names)} class names for a model with {classes} classes: give one a class, in order")


def read_names(path: str | Path) -> list[str]:
    """The class names in a text file, one a line.

    Raises:
        UsageError: no such file, not text, too large, or a line without a name.
    """
    try:
        lines = read_text(path, MAX_NAMES).rstrip().split("\n")
    except FileNotFoundError as error:
        raise UsageError(f"no class map {path}: expected a .txt file with one class name a line") from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"class map {path} cannot be read ({error}): expected a .txt file with one class name a line"
        ) from error
    names = [line.strip() for line in lines]
    if not all(names):
        raise UsageError(f"class map {path}: line {1 + names.index('')} is empty; expected one class name a line")
    return names


def _open_path(path: Path, split: str, class_map: ClassMap | None) -> Listed:
    """The images of a folder or a tar, in timm's natural order of their paths, which are labelled by their folders."""
    if path.is_dir():
        path = _split_folder(path, split)
        listing = list_images(path)
        found: list[tuple[str, Content | Broken]] = [(name, f"{path}/{name}") for name, _ in listing.images]
        if listing.others:
            log.warning("%s: left out %s", path, describe_others(listing.others))
    elif path.is_file() and path.suffix.lower() == ".tar":
        found = _in_tar(path)
    else:
        raise UsageError(f"{path} is a file but not a .tar: give a folder of images or an uncompressed .tar of them")
    if not found:
        raise LTMPError(
            f"{path} holds no images: expected a folder or .tar with one folder of images a class, or a flat one of "
            f"unlabelled images (endings: {', '.join(sorted(EXTENSIONS))})"
        )
    found.sort(key=lambda one: natural_key(f"/{one[0]}"))
    classes = class_folders([name for name, _ in found])
    numbers = _class_map(class_map)
    if numbers is None:
        numbers = {name: number for number, name in enumerate(sorted(set(classes), key=natural_key))}
    unknown = sorted(set(classes) - numbers.keys(), key=natural_key)
    if len(unknown) == len(set(classes)):
        raise LTMPError(
            f"{path} holds no images of the classes in the class map: its folders are {_some(unknown)}; give the names "
            "of these"
        )
    if unknown:
        log.warning("%s: left out the folders %s, which are not in the class map", path, _some(unknown))
    kept = [(image, content, numbers[of]) for (image, content), of in zip(found, classes, strict=True) if of in numbers]
    names, contents, labels = zip(*kept, strict=True)
    return Listed(path, names, contents, labels, numbers)


def _in_tar(path: Path) -> list[tuple[str, Content | Broken]]:
    """The images of a tar; one that is truncated or damaged is refused, as half of the data is another data set."""
    found: list[tuple[str, Content | Broken]] = []
    try:
        for member in tar_images(str(path)):
            if not member.name and isinstance(member.content, Broken):
                raise LTMPError(f"{path}: {member.content.reason}; copy or make it again")
            found.append((member.name.removeprefix("./").lstrip("/"), member.content))
    except (tarfile.TarError, OSError) as error:
        raise LTMPError(f"{path} is not a readable, uncompressed .tar: {error}") from error
    return found


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _split_folder(path: Path, split: str) -> Path:
    """The split's folder in `path`, or `path` where it is not split.

    A class may be called "train", too: a split has folders in it, or nothing but splits beside it.
    """
    folders = {folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")}
    named = folders & {*TRAIN, *EVALUATION, split}
    only = folders <= {*named, "test"}
    splits = {name for name in named if only or any(inner.is_dir() for inner in (path / name).iterdir())}
    wanted = next((names for names in (TRAIN, EVALUATION) if split in names), (split,))
    for name in (split, *wanted):
        if name in splits:
            return path / name
    if splits:
        other = sorted(splits)[0]
        raise LTMPError(
            f"{path} has {other}/ but no {wanted[0]}/: add it, or give the folder to use itself, such as {path / other}"
        )
    return path


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
    options: dict[str, Any] = {"root": str(root) if root else None, "split": split, "class_map": _class_map(class_map)}
    if name.lower().startswith("torch/"):
        del options["class_map"]
    try:
        dataset = create_dataset(name, **options)
    # Each of timm's backends fails in its own way; what the user can act on is the name and the reason.
    except Exception as error:
        raise LTMPError(f"cannot open the dataset {name} (split '{split}'): {error}") from error
    if isinstance(dataset, IterableImageDataset):
        dataset.transform = transform
        return dataset
    return Images(getattr(dataset, "reader", dataset), transform=transform, mode=mode, labelled=labelled)


def _class_map(class_map: ClassMap | None) -> dict[str, int] | None:
    """Class name to number.

    Raises:
        UsageError: it is no text file with one name a line, or one without names.
    """
    if class_map is None or isinstance(class_map, Mapping):
        return None if class_map is None else dict(class_map)
    if Path(class_map).suffix != ".txt":
        raise UsageError(
            f"class map {class_map}: expected a .txt file with one class name a line, in the model's order"
        )
    names = read_names(class_map)
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) < len(names):
        twice = next(name for number, name in enumerate(names) if numbers[name] != number)
        raise UsageError(f"class map {class_map}: {twice!r} is there twice, so its images would be of two classes")
    return numbers


def _class_to_index(source: Any) -> dict[str, int] | None:
    """Readers and torchvision datasets each have their own name for it."""
    for name in ("class_to_idx", "class_name_to_idx"):
        if getattr(source, name, None):
            return dict(getattr(source, name))
    return None
