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

Forward = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] to what is wanted of them, [B, K]."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def deployed(model: nn.Module, device: torch.device, *, amp: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode without gradients on `device` inside, with autocast to `amp`; modules get their own mode back."""
    model.to(device)
    with evaluating(model), torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
        yield


@dataclass(frozen=True)
class Output:
    """The result of one call of a model.

    Attributes:
        logits: float32 [B, K].
        share: float32 [B], FLOPs share of each image; 1 where nothing is attached.
        kept: [B, L], tokens after each block; None where nothing is attached.
    """

    logits: Tensor
    share: Tensor
    kept: Tensor | None


def run(model: nn.Module, images: Tensor, forward: Forward | None = None) -> Output:
    """Call a model, attached or not, on images [B, C, H, W] of its device, and note what each of them cost.

    Args:
        forward: what to call instead of the model for its logits; its result takes their place.

    Raises:
        LTMPError: the model returns no logits.
    """
    with record() as calls:
        logits = (logits_of(model(images)) if forward is None else forward(images)).float()
    if not calls.kept:
        return Output(logits, torch.ones(len(images), device=images.device), None)
    return Output(logits, calls.share().float(), torch.cat(calls.kept))


class Deployment:
    """A model ready to answer: what predict, serve, show and the app have in common.

    The model is moved to `device` and put in evaluation mode, and stays so. `prepare` may run in any thread, calls in
    one at a time.

    >>> deployment = Deployment(model)
    >>> image = deployment.prepare(deployment.read("cat.jpg"))
    >>> deployment(image[None]).logits

    Args:
        model: a classifier of any host library, attached or not.
        transform: from a Pillow image to [C, H, W] as the model takes it; None is `eval_transform` with `options`.
        options: how images are resized, cropped and normalised, as in `eval_transform`.
        device: where to run; None is where the model lies.
        amp: autocast type, e.g. `torch.bfloat16`.
        names: class names in the order of the outputs; empty or None where nobody knows them.
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
        """Whether the model is reduced."""
        return is_attached(self.model)

    @cached_property
    def blank(self) -> Tensor:
        """[C, H, W], a black image as the model takes it."""
        return self.transform(Image.new(self.mode, (64, 64)))

    @cached_property
    def classes(self) -> int:
        """The number of classes, from a call on a blank image.

        Raises:
            LTMPError: the output is not one row of class scores an image.
            UsageError: there is another number of names.
        """
        logits = self(self.blank[None]).logits
        if logits.ndim != 2:
            raise LTMPError("the model does not give one row of class scores an image: use a classifier")
        check_names(self.names, logits.shape[1])
        return logits.shape[1]

    def name(self, index: int) -> str:
        """The name of a class, or its number where nobody knows it."""
        return self.names[index] if index < len(self.names) else f"class {index}"

    def read(self, path: str | Path) -> Image.Image:
        """The image in a file; raises like `read_image`."""
        return read_image(path, self.mode)

    def prepare(self, image: Image.Image) -> Tensor:
        """[C, H, W], an image as the model takes it."""
        return self.transform(self._in_mode(image))

    def view(self, image: Image.Image, width: int) -> Tensor:
        """float32 [3, H, W] in [0, 1], what the model sees of an image, for people; see `sharp_view`."""
        return sharp_view(self.model, self._in_mode(image), width, **self.options)

    def _in_mode(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)

    @contextmanager
    def running(self) -> Iterator[None]:
        """No gradients, and autocast; a thread that stays inside casts the weights once instead of in each call."""
        with torch.inference_mode(), torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            yield

    def __call__(self, images: Tensor, forward: Forward | None = None) -> Output:
        """`run` on images [B, C, H, W] from any device; waits for the device only where the engine needs to."""
        with self.running():
            return run(self.model, images.to(self.device, non_blocking=True), forward)
