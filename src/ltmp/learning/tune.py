"""Light tuning: thresholds learned together with a few of the model's own weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import UsageError
from .batches import Batch, held_out_count, image_count
from .loop import LearnResult, learn
from .randomness import preserved_random_state
from .weights import Tuning


@preserved_random_state()
def tune(
    model: nn.Module,
    loader: Iterable[Batch],
    target: float = 0.6,
    parts: str | Tuning = "norms",
    *,
    epochs: float = 1.0,
    calibration: int = 512,
    **learning: Any,
) -> LearnResult:
    """Learn thresholds as `ltmp.learn` does, and train a few of the model's own weights along with them.

    The original dense model is the teacher. The tuned weights end as plain weights with their original names and
    shapes: `ltmp.detach(model)` returns a plain model, and `ltmp.checkpoint.save_weights` writes its checkpoint. They
    belong to the thresholds learned with them. If tuning did not lower the loss on held-out images, or if the run
    fails, the model gets its original weights back.

    >>> ltmp.tune(model, loader, target=0.47, parts="lora")

    Args:
        parts: `norms` (norms, biases and layer scales), `lora` (low-rank updates of the blocks' linear layers), or a
            `ltmp.learning.Tuning` with all settings.
        epochs: passes over the loader's images, not counting the held-out ones.
        learning: other keyword arguments of `ltmp.learn`; `distill=True` ignores labels even if the tuning uses them.

    Raises:
        UsageError: settings that make no sense, or a loader that does not know its number of images.
        MissingExtraError: peft, for LoRA, is not installed.
        LTMPError: as in `ltmp.learn`; also for weights in half precision.
    """
    tuning = parts if isinstance(parts, Tuning) else Tuning(parts)
    if not epochs > 0:
        raise UsageError(f"epochs is {epochs!r}: expected a number above 0, such as 1")
    return learn(
        model, loader, target, views=views_of(loader, epochs, calibration), calibration=calibration, tuning=tuning,
        **learning,
    )  # fmt: skip


def views_of(loader: Iterable[Batch], epochs: float, calibration: int) -> int:
    """Number of images in this many passes over the loader, without the held-out ones.

    Raises:
        UsageError: the loader does not know how many images it has.
    """
    images = image_count(loader)
    if images == 0:
        raise UsageError("this loader does not say how many images it has: call ltmp.learn with tuning= and views=")
    return max(1, round(epochs * (images - held_out_count(loader, calibration))))
