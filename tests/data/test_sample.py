"""A limit takes images of all classes alike, the same ones every time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ltmp.data import make_loader, open_dataset
from ltmp.data.sample import subsample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("ant", 9), ("bee", 2), ("cow", 5)):
        (tmp_path / name).mkdir()
        for k in range(count):
            Image.new("RGB", (4, 4), (10 * k, 0, 0)).save(tmp_path / name / f"{k}.png")
    return tmp_path


def test_classes_are_as_even_as_they_can_be(folder: Path) -> None:
    images = open_dataset(folder, split="x")
    for limit, counts in {3: (1, 1, 1), 6: (2, 2, 2), 8: (3, 2, 3), 14: (7, 2, 5), 16: (9, 2, 5)}.items():
        few = subsample(images, limit)
        assert Counter(few[i][1] for i in range(len(few))) == dict(enumerate(counts))
        names = [few.name(i) for i in range(len(few))]
        assert names == sorted(names) == [subsample(images, limit).name(i) for i in range(limit)]
    assert few is images
    assert len({subsample(images, 3, seed=seed).name(0) for seed in range(8)}) > 1
    assert few.class_to_index == {"ant": 0, "bee": 1, "cow": 2}


def test_pictures_and_names_are_those_of_the_images(folder: Path) -> None:
    few = subsample(open_dataset(folder, split="x"), 6)
    for index in range(6):
        assert Image.open(few.name(index)).getpixel((0, 0)) == few.picture(index).getpixel((0, 0))


def test_a_source_without_labels_is_sampled_all_over() -> None:
    class Source(list):
        pass

    class Dataset:
        source = Source(range(1000))

        def __len__(self) -> int:
            return 1000

    few = subsample(Dataset(), 10)  # type: ignore[arg-type]
    chosen = [few.source[i] for i in range(10)]
    assert chosen == sorted(set(chosen))
    assert chosen[-1] > 500


def test_images_can_be_drawn_alike(folder: Path) -> None:
    """A certificate is for images like those of the folder, so its sample has classes as often as that."""
    images = open_dataset(folder, split="x")
    counts: Counter[int] = Counter()
    for seed in range(60):
        few = subsample(images, 8, seed=seed, evenly=False)
        counts.update(few[i][1] for i in range(8))
    assert 3 * counts[1] < counts[0]


class Streaming(IterableDataset):
    classes = 20

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return ((np.full(1, k, "float32"), k) for k in range(first, self.classes, step))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_streams_gives_its_first_images_and_says_so(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ltmp"):
        few = subsample(Streaming(), 5)
    assert "the first 5 images are taken" in caplog.text
    assert few.classes == 20
    seen = [int(label) for _, labels in make_loader(few, 2, workers=workers) for label in labels]
    assert sorted(seen) == [0, 1, 2, 3, 4]
