"""From the bytes of an image to a tensor, and from tensors to answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..calls import record
from ..data import eval_transform, input_channels
from ..data.dataset import Transform
from ..errors import LTMPError, UsageError
from ..evaluate import deployed
from ..hosts.attach import is_attached
from .limits import read_image


@dataclass(frozen=True)
class Answer:
    """What the model says of one image.

    Attributes:
        scores: float32 [K] on the CPU, probabilities of the classes.
        share: FLOPs spent on it, as a share of the dense model's.
        tokens: tokens left after a block, as a mean over the blocks.
    """

    scores: Tensor
    share: float
    tokens: float


class Predictor:
    """A reduced model and how its images are prepared. `prepare` may run in any thread, `answer` in one at a time.

    Args:
        model: an attached model with a classifier; moved to `device`.
        transform: from a Pillow image to what the model takes; None is timm's for this model.
        device: where to run; None is where the model lies.
        amp: autocast type, e.g. `torch.bfloat16`.
        names: the names of the classes, in the order of the outputs.

    Raises:
        LTMPError: nothing is attached, the output is not one row of class scores an image, or it is not finite.
        UsageError: another number of names than classes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        transform: Transform | None = None,
        device: torch.device | str | None = None,
        amp: torch.dtype | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if not is_attached(model):
            raise LTMPError("nothing to serve: attach thresholds first, e.g. ltmp.load(model, file)")
        self.model = model
        self.transform = transform or eval_transform(model)
        self.device = torch.device(device) if device else next(model.parameters()).device
        self.amp = amp
        self.mode = "L" if input_channels(model) == 1 else "RGB"
        self.blank: Tensor = self.transform(Image.new(self.mode, (64, 64)))
        self.classes = self._probe()
        if names is not None and len(names) != self.classes:
            raise UsageError(f"there are {len(names)} class names but the model has {self.classes} classes")
        self.names = names

    def _probe(self) -> int:
        """The number of classes, from a call on a blank image."""
        with self.running():
            output: Any = self.model(self.blank[None].to(self.device))
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise LTMPError("the model does not give one row of class scores an image: serve a classifier")
        return output.shape[1]

    def running(self) -> AbstractContextManager[None]:
        """What `answer` must be called inside; gradients and autocast are a thread's own."""
        return deployed(self.model, self.device, amp=self.amp)

    def prepare(self, body: bytes, max_pixels: int) -> Tensor:
        """[C, H, W] of the image in `body`; raises like `read_image`."""
        return self.transform(read_image(body, self.mode, max_pixels))

    def answer(self, images: list[Tensor]) -> list[Answer]:
        """Answers to prepared images, in order.

        Raises:
            LTMPError: the output is NaN or infinite.
        """
        with record() as calls:
            logits = self.model(torch.stack(images).to(self.device))
        scores = logits.float().softmax(-1).cpu()
        if not scores.isfinite().all():
            raise LTMPError("the model's output is NaN or infinite: its weights or its thresholds are damaged")
        kept = torch.cat(calls.kept).mean(1)
        return [Answer(*values) for values in zip(scores, calls.share().tolist(), kept.tolist(), strict=True)]
