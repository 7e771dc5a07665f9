"""A tiny attached model with two learned budgets, and pictures for it."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import ltmp
from helpers import random_images, tiny_vit
from ltmp.app import Budgets, Explorer
from ltmp.learning.calibrate import calibrate


@pytest.fixture
def model():
    return ltmp.attach(tiny_vit())


@pytest.fixture
def files(model, tmp_path):
    images = random_images(32)
    paths = []
    for share in (0.8, 0.6):
        calibrate(model, images, share)
        paths.append(tmp_path / f"{share}.safetensors")
        ltmp.save(model, paths[-1], share=share)
    return paths


@pytest.fixture
def pictures():
    images = random_images(3, size=32)
    return [to_pil_image(((image + 3) / 6).clamp(0, 1)) for image in images]


@pytest.fixture
def explorer(model, files, pictures):
    torch.manual_seed(0)
    budgets = Budgets.from_files(model, files, random_images(32))
    return Explorer(model, budgets, classes=["ant", "bee", "<b>cow</b>"], samples=pictures)
