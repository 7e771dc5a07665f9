"""Images and class folders below a folder: one rule for every command and for Python."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import LTMPError
from ..sanitize import printable
from .images import is_image_name


@dataclass(frozen=True)
class Listing:
    """The files below a folder, except hidden ones and those in hidden folders (`.ipynb_checkpoints`).

    Attributes:
        images: (path within the folder, size in bytes) of each image, sorted; the size is -1 if it cannot be read.
        others: paths of files that are not images by name, sorted.
    """

    images: list[tuple[str, int]]
    others: list[str]


def list_images(folder: str | os.PathLike[str]) -> Listing:
    """List all files below a folder.

    Raises:
        LTMPError: a folder in it cannot be listed.
    """
    images, others = [], []
    for prefix, entries in walk(Path(folder)):
        for entry in entries:
            if is_image_name(entry.name):
                images.append((prefix + entry.name, _size(entry)))
            else:
                others.append(prefix + entry.name)
    return Listing(sorted(images), sorted(others))


def walk(folder: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield (path prefix within `folder`, files) of the folder and of each folder below it.

    Links are followed, but no folder is entered twice.

    Raises:
        LTMPError: a folder cannot be listed.
    """
    seen = set()
    pending: list[str] = [""]
    linked: list[str] = []
    while pending or linked:
        # Links come after all real folders, so that a folder is listed under its own path rather than that of a link.
        path = pending.pop() if pending else linked.pop()
        try:
            with os.scandir(folder / path) as scan:
                entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda e: e.name)
            real = os.path.realpath(folder / path)
        except OSError as error:
            raise LTMPError(f"cannot list {folder / path}: {error.strerror}; its images would be missing") from error
        if real in seen:
            continue
        seen.add(real)
        prefix = f"{path}/" if path else ""
        yield prefix, [entry for entry in entries if not _is_dir(entry)]
        for entry in reversed(entries):
            if _is_dir(entry):
                (linked if entry.is_symlink() else pending).append(prefix + entry.name)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder. A dangling or circular link counts as a file, one that cannot be read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def class_folders(names: Sequence[str]) -> list[str]:
    """Return the class of each image path: the folder that the image is in, or "" if it is in none.

    If all images are in folders of the same name and the folders above differ, the folder above is the class:
    `n01443537/images/0.jpg` of Tiny-ImageNet is of class `n01443537`.
    """
    folders = [name.split("/")[:-1] for name in names]
    while all(len(parts) > 1 for parts in folders) and len({parts[-1] for parts in folders}) == 1:
        if len({parts[-2] for parts in folders}) == 1:
            break
        folders = [parts[:-1] for parts in folders]
    return [parts[-1] if parts else "" for parts in folders]


def natural_key(text: str) -> list[str | int]:
    """Return a sort key that orders numbers in names by value, as timm does."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", text.lower()))]


def describe_others(others: Sequence[str], most: int = 4) -> str:
    """Summarise the files that are left out: their number, the `most` common extensions, and one example."""
    extensions = Counter(os.path.splitext(name)[1].lower() or "without extension" for name in others)
    kinds = ", ".join(f"{count} {extension}" for extension, count in extensions.most_common(most))
    more = ", ..." if len(extensions) > most else ""
    files = "1 file that is no image" if len(others) == 1 else f"{len(others)} files that are no images"
    return f"{files} by name ({kinds}{more}), such as {printable(others[0])}"
