"""Images made on the fly."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import colour_image

Maker = Callable[..., Path]


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Three classes of four images; image k of class c is the colour (c, k, 0)."""
    root = tmp_path / "images"
    for index, name in enumerate(["ant", "bee", "cow"]):
        folder = root / name
        folder.mkdir(parents=True)
        for k in range(4):
            colour_image((index, k, 0)).save(folder / f"{k}.png")
    return root


@pytest.fixture
def class_tar(class_folders: Path, tmp_path: Path) -> Path:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(class_folders.rglob("*.png")):
            archive.add(file, arcname=str(file.relative_to(class_folders)))
    return path
