"""Which files of a folder are images, and which classes they are of: one rule for every verb and for Python."""

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
    """The contents of a folder; hidden files and folders (`.ipynb_checkpoints`) are skipped.

    Attributes:
        images: paths in the folder, sorted, with their sizes in bytes; a size of -1 is that of a file out of reach.
        others: paths of what is no image by its name.
    """

    images: list[tuple[str, int]]
    others: list[str]


def list_images(folder: str | os.PathLike[str]) -> Listing:
    """Everything below a folder.

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
    """Folders below `folder`, as paths in it, with their files; links are followed, but no folder is entered twice.

    Raises:
        LTMPError: a folder cannot be listed.
    """
    seen = set()
    waiting: list[str] = [""]
    linked: list[str] = []
    while waiting or linked:
        # what links to a folder comes after all folders themselves, so that it is they who are entered
        inside = waiting.pop() if waiting else linked.pop()
        try:
            with os.scandir(folder / inside) as entries:
                found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
            real = os.path.realpath(folder / inside)
        except OSError as error:
            raise LTMPError(f"cannot list {folder / inside}: {error.strerror}; its images would be missing") from error
        if real in seen:
            continue
        seen.add(real)
        prefix = f"{inside}/" if inside else ""
        yield prefix, [entry for entry in found if not _is_dir(entry)]
        for entry in reversed(found):
            if _is_dir(entry):
                (linked if entry.is_symlink() else waiting).append(prefix + entry.name)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder; a link that leads nowhere, or round in a circle, is a file that cannot be read."""
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
    """The class of each image by its path: the folder that it lies in; "" for one that lies in none.

    Where every image lies in a folder of the same name, and the folders above tell them apart, the class is the one
    above: `n01443537/images/0.jpg` of Tiny-ImageNet is of class `n01443537`.
    """
    folders = [name.split("/")[:-1] for name in names]
    while all(len(parts) > 1 for parts in folders) and len({parts[-1] for parts in folders}) == 1:
        if len({parts[-2] for parts in folders}) == 1:
            break
        folders = [parts[:-1] for parts in folders]
    return [parts[-1] if parts else "" for parts in folders]


def natural_key(text: str) -> list[str | int]:
    """Sorts names as people (and timm) do: numbers in them by their value."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", text.lower()))]


def describe_others(others: Sequence[str], most: int = 4) -> str:
    """The files that are left out, in a few words: how many, of which endings, and one of them."""
    endings = Counter(os.path.splitext(name)[1].lower() or "without ending" for name in others)
    kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(most))
    more = ", ..." if len(endings) > most else ""
    files = "1 file that is no image" if len(others) == 1 else f"{len(others)} files that are no images"
    return f"{files} by name ({kinds}{more}), such as {printable(others[0])}"
