"""Batches come through a pipe where shared memory is small, and a process that cannot hand them over is noticed."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from ltmp.data import make_loader, open_dataset, workers
from ltmp.errors import LTMPError


def pixels(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def small_files_only(image) -> torch.Tensor:
    """In the process that decodes: shared memory counts as files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return pixels(image).repeat(1, 16, 16)


@pytest.mark.parametrize("room", [0, float("inf")])
def test_small_shared_memory_changes_no_batch(room, class_folders, monkeypatch):
    monkeypatch.setattr(workers, "free_shared_memory", lambda: room)
    data = open_dataset(class_folders, transform=pixels)
    for (here, labels), (there, same) in zip(make_loader(data, 5), make_loader(data, 5, workers=1), strict=True):
        assert torch.equal(here, there)
        assert torch.equal(labels, same)


def test_room_is_asked_of_the_system(monkeypatch):
    assert workers.free_shared_memory() > 0
    monkeypatch.setattr(workers, "SHARED", "/nowhere")
    assert workers.free_shared_memory() == float("inf")


def test_a_batch_that_cannot_be_handed_over_is_an_error_not_a_wait(class_folders):
    data = open_dataset(class_folders, transform=small_files_only)
    with pytest.raises(LTMPError, match=r"a process that decodes images .*limit on files"):
        list(make_loader(data, 4, workers=1))
