"""A tiny model on disk and images for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ltmp.cli import main

NAME = "vit_tiny_patch16_224"
SHAPE = {"patch_size": 8, "embed_dim": 24, "depth": 3}
OWN = ("learn", "dial", "eval", "bench", "compare", "show")
MODEL = ["--model", NAME, "--img-size", "32", "--num-classes", "3"]
MODEL += ["--model-kwargs", " ".join(f"{name}={value}" for name, value in SHAPE.items())]


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=32, num_classes=3, **SHAPE)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """Two images of each of three classes in train/ and val/."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee", "cow"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for k in range(2):
                pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((80, 60)).save(folder / f"{k}.png")
    return tmp_path / "images"


@pytest.fixture
def ltmp(weights, monkeypatch, tmp_path):
    """Runs `ltmp` with the tiny model and gives the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(verb: str, *arguments: object) -> int:
        own = [*MODEL, "--weights", str(weights), "--device", "cpu"] if verb in OWN else []
        return main([verb, *own, *map(str, arguments)])

    return run
