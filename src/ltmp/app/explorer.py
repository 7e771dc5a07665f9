"""Compare the dense and the reduced model on one image: tokens and predictions after each block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from threading import Lock
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..calls import dense, record
from ..deploy import Deployment
from ..engines.body import Body, running
from ..hosts.attach import attachment
from ..hosts.outputs import logits_of
from ..method.thresholds import Thresholds
from ..visualize import ReducedView, panel, see, strip
from .budgets import Budgets

WIDTH = 448
"""Width of the picture in pixels."""

ROUNDS = 5
"""Number of timed calls."""

TopClasses = list[tuple[str, float]]
"""Class names with their probabilities, the most likely first."""


@dataclass(frozen=True)
class ModelPredictions:
    """The predictions of one model for an image.

    Attributes:
        blocks: the five most likely classes after each block, as read by the model's own norm and head.
        seconds: of one call with this image alone, median of a few.
    """

    blocks: list[TopClasses]
    seconds: float


@dataclass(frozen=True)
class OpenedImage:
    """An image, ready to be compared at any budget.

    Attributes:
        view: [3, H, W] in [0, 1], what the model sees, at a resolution for display.
        pixels: [1, C, h, w], what the model sees.
        dense: the predictions of the dense model.
    """

    view: Tensor
    pixels: Tensor
    dense: ModelPredictions


@dataclass(frozen=True)
class Comparison:
    """The dense and the reduced model on an image, at one budget.

    Attributes:
        opened: the image, with the predictions of the dense model.
        reduction: the tokens of the reduced model after each block.
        reduced: the predictions of the reduced model.
        timed: whether the times are meaningful.
    """

    opened: OpenedImage
    reduction: ReducedView
    reduced: ModelPredictions
    timed: bool = True

    @property
    def depth(self) -> int:
        return len(self.reduction.kept)

    def picture(self, block: int, width: int = WIDTH) -> Image.Image:
        """Draw the tokens left after `block`, counted from 1; 0 is the image itself."""
        return panel(self.opened.view, self.reduction, block - 1 if block else None, width)

    def strip(self) -> Image.Image:
        """Draw the tokens left after a few blocks, side by side."""
        return strip(self.opened.view, {"this budget": self.reduction}, width=WIDTH // 2)


class Explorer:
    """Compares a model with its reduced self, image by image; calls from several threads wait for each other.

    Args:
        model: attached.
        budgets: sets the model's thresholds.
        classes: names in the order of the model's outputs.
        samples: images to choose from.
        data_options: how images are resized, cropped and normalised, as in `ltmp.data.eval_transform`.
        timed: whether to show times; False for a model that is too small to become faster.
    """

    def __init__(
        self,
        model: nn.Module,
        budgets: Budgets,
        *,
        classes: Sequence[str] = (),
        samples: Sequence[Image.Image] = (),
        data_options: dict[str, Any] | None = None,
        timed: bool = True,
    ) -> None:
        self.timed = timed
        self.model, self.budgets, self.samples = model, budgets, samples
        self.deployment = Deployment(model, options=data_options, names=classes)
        self._lock = Lock()

    def open(self, image: str | Path | Image.Image) -> OpenedImage:
        """Read an image and run the dense model on it.

        Raises:
            LTMPError: it cannot be read as an image; the message gives the reason.
        """
        deployment = self.deployment
        image = image if isinstance(image, Image.Image) else deployment.read(image)
        view, pixels = deployment.view(image, WIDTH), deployment.prepare(image)[None].to(deployment.device)
        with self._lock:
            return OpenedImage(view, pixels, self._predictions(pixels, run_dense=True))

    def compare(self, opened: OpenedImage, share: float) -> Comparison:
        """Run the reduced model on an image with thresholds for `share`; this image may cost more or less than that."""
        with self._lock:
            self.budgets.set(share)
            reduction = see(self.model, opened.pixels)[0]
            reduced = self._predictions(opened.pixels, run_dense=False)
            return Comparison(opened, reduction, reduced, self.timed)

    @torch.inference_mode()
    def _predictions(self, pixels: Tensor, *, run_dense: bool) -> ModelPredictions:
        attached, times = attachment(self.model), []
        # recorded calls always run reduced; otherwise the engine `auto` may try both ways first and choose dense
        with dense() if run_dense else record():
            for _ in range(ROUNDS if self.timed else 1):
                start = perf_counter()
                logits_of(self.model(pixels)).cpu()
                times.append(perf_counter() - start)
            blocks = []
            for count in range(1, attached.body.depth + 1):
                with first_blocks(attached.body, attached.thresholds, count):
                    blocks.append(self._top_classes(logits_of(self.model(pixels))[0]))
        return ModelPredictions(blocks, median(times))

    def _top_classes(self, logits: Tensor) -> TopClasses:
        values, indices = logits.float().softmax(-1).topk(min(5, len(logits)))
        return [(self.deployment.name(i), p) for p, i in zip(values.tolist(), indices.tolist(), strict=True)]


@contextmanager
def first_blocks(body: Body, thresholds: Thresholds, count: int) -> Iterator[None]:
    """Run only the first `count` blocks inside the `with`, so that the host's own norm and head read their output.

    Works with any host, at the price of one call of the model per block, and in this thread only.
    """
    fewer = Thresholds(count, thresholds.config).to(thresholds.merge.device).eval()
    fewer.set(thresholds.merge[:count], thresholds.prune[:count])
    fewer.probe = None if thresholds.probe is None else thresholds.probe[:count]
    with running(body=replace(body, blocks=body.blocks[:count], policy=fewer)):
        yield
