"""A model as it is deployed: in evaluation mode on its device, with its preprocessing, class names and logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .calls import record
from .data.dataset import Transform, check_names
from .data.images import read_image
from .data.transforms import eval_transform, image_mode, sharp_view
from .errors import LTMPError
from .hosts.attach import is_attached
from .hosts.outputs import logits_of
from .method.thresholds import Thresholds

Forward = Callable[[Tensor], Tensor]
"""From images [B, C, H, W] to an output [B, K]."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; on exit, restore the train or eval mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def deployed(model: nn.Module, device: torch.device, *, amp: torch.dtype | None = None) -> Iterator[None]:
    """Run the model on `device` in evaluation mode, without gradients and with autocast to `amp`.

    On exit, the mode of every module is restored; the model stays on `device`.
    """
    model.to(device)
    with evaluating(model), torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
        yield


@contextmanager
def restored(thresholds: Thresholds) -> Iterator[None]:
    """Restore the thresholds and their budget on exit."""
    merge, prune = thresholds.merge.detach().clone(), thresholds.prune.detach().clone()
    budget = thresholds.requested_budget
    try:
        yield
    finally:
        thresholds.set(merge, prune)
        thresholds.requested_budget = budget


@dataclass(frozen=True)
class Output:
    """The result of one call of a model.

    Attributes:
        logits: float32 [B, K].
        share: float32 [B], FLOPs share of each image; 1 if nothing is attached.
        kept: [B, L], number of tokens after each block; None if nothing is attached.
    """

    logits: Tensor
    share: Tensor
    kept: Tensor | None


def run(model: nn.Module, images: Tensor, forward: Forward | None = None) -> Output:
    """Call a model, attached or not, on images [B, C, H, W] on its device, and record the cost of each image.

    Args:
        forward: called instead of the model; its result is returned as the logits.

    Raises:
        LTMPError: the model returns no logits.
    """
    with record() as calls:
        logits = (logits_of(model(images)) if forward is None else forward(images)).float()
    if not calls.kept:
        return Output(logits, torch.ones(len(images), device=images.device), None)
    return Output(logits, calls.share().float(), torch.cat(calls.kept))


class Deployment:
    """A model with its preprocessing and class names, as predict, serve, show and the app use it.

    The model is moved to `device` and put in evaluation mode, and stays so. `prepare` is thread-safe; the model itself
    must be called from one thread at a time.

    >>> deployment = Deployment(model)
    >>> image = deployment.prepare(deployment.read("cat.jpg"))
    >>> deployment(image[None]).logits

    Args:
        model: a classifier of any host library, attached or not.
        transform: from a Pillow image to the model's input [C, H, W]; None is `eval_transform` with `options`.
        options: how images are resized, cropped and normalised, as in `eval_transform`.
        device: where to run; None is the model's device.
        amp: autocast dtype, e.g. `torch.bfloat16`.
        names: class names in the order of the outputs; empty or None if unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        transform: Transform | None = None,
        options: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        amp: torch.dtype | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.options = dict(options or {})
        self.transform = transform or eval_transform(model, **self.options)
        self.mode = image_mode(model)
        self.device = torch.device(device) if device else next(model.parameters()).device
        self.model = model.to(self.device).eval()
        self.amp = amp
        self.names = tuple(names or ())

    @property
    def attached(self) -> bool:
        """Whether thresholds are attached to the model."""
        return is_attached(self.model)

    @cached_property
    def blank(self) -> Tensor:
        """[C, H, W], a black image after preprocessing."""
        return self.transform(Image.new(self.mode, (64, 64)))

    @cached_property
    def classes(self) -> int:
        """The number of classes, from a call on a blank image.

        Raises:
            LTMPError: the output is not one row of class scores per image.
            UsageError: the number of names differs from the number of classes.
        """
        logits = self(self.blank[None]).logits
        if logits.ndim != 2:
            raise LTMPError("the model does not give one row of class scores an image: use a classifier")
        check_names(self.names, logits.shape[1])
        return logits.shape[1]

    def name(self, index: int) -> str:
        """The name of a class, or "class" and its number if it has none."""
        return self.names[index] if index < len(self.names) else f"class {index}"

    def read(self, path: str | Path) -> Image.Image:
        """Read an image file; raises like `read_image`."""
        return read_image(path, self.mode)

    def prepare(self, image: Image.Image) -> Tensor:
        """[C, H, W], an image after preprocessing."""
        return self.transform(self._in_mode(image))

    def view(self, image: Image.Image, width: int) -> Tensor:
        """float32 [3, H, W] in [0, 1], the part of an image that the model sees, for display; see `sharp_view`."""
        return sharp_view(self.model, self._in_mode(image), width, **self.options)

    def _in_mode(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inference mode with autocast. A thread that stays inside casts the weights once instead of on every call."""
        with torch.inference_mode(), torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            yield

    def __call__(self, images: Tensor, forward: Forward | None = None) -> Output:
        """`run` on images [B, C, H, W] from any device, without synchronising unless the engine has to."""
        with self.running():
            return run(self.model, images.to(self.device, non_blocking=True), forward)
