"""Sources made on the fly, and a model small enough to be killed often."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import attach_reducing, random_images, tiny_vit
from ltmp.predict import Scoring


def encoded(number: int, size: int = 20, kind: str = "PNG") -> bytes:
    """A smooth random image of its own for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def build() -> Any:
    return attach_reducing(tiny_vit(), random_images(4))


def build_slowly() -> Any:
    """A model that can be killed in the middle."""
    model = build()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    return model


def scoring(**changes: Any) -> Scoring:
    return Scoring(**{"build": build, "top": 2, "batch_size": 4, "workers": 0, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in two folders."""
    root = tmp_path / "images"
    for number in range(10):
        path = root / f"{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return root


@pytest.fixture
def tars(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a folder of WebDataset shards."""

    def make(shards: int, images: int) -> Path:
        root = tmp_path / "tars"
        root.mkdir()
        for shard in range(shards):
            numbers = range(shard * images, (shard + 1) * images)
            members = [
                (f"{n:04d}.{kind}", encoded(n) if kind == "png" else b"7") for n in numbers for kind in ("cls", "png")
            ]
            write_tar(root / f"train-{shard:03d}.tar", members)
        return root

    return make
