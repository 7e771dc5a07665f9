"""One image through both models: what is left of it after each block, and what each would answer there."""

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
ROUNDS = 5

Top = list[tuple[str, float]]
"""Class names with their probability, the likeliest first."""


@dataclass(frozen=True)
class Answers:
    """The answer of one model.

    Attributes:
        blocks: after each block the five likeliest classes, as the model's own norm and head read them there.
        seconds: of one call with this image alone, median of a few.
    """

    blocks: list[Top]
    seconds: float


@dataclass(frozen=True)
class Opened:
    """An image, ready to be looked at at any budget.

    Attributes:
        view: [3, H, W] in [0, 1], what the model sees, for people.
        pixels: [1, C, h, w], what the model sees.
    """

    view: Tensor
    pixels: Tensor
    dense: Answers


@dataclass(frozen=True)
class Look:
    """An image at one budget; `timed` says whether its seconds mean anything."""

    opened: Opened
    seen: ReducedView
    reduced: Answers
    timed: bool = True

    @property
    def depth(self) -> int:
        return len(self.seen.kept)

    def picture(self, block: int, width: int = WIDTH) -> Image.Image:
        """The tokens left after `block`, counted from 1; 0 is the image."""
        return panel(self.opened.view, self.seen, block - 1 if block else None, width)

    def strip(self) -> Image.Image:
        """A few blocks side by side."""
        return strip(self.opened.view, {"this budget": self.seen}, width=WIDTH // 2)


class Explorer:
    """Looks at images with one model; calls from several threads wait for each other.

    Args:
        model: attached.
        budgets: how thresholds are set.
        classes: names in the order of the model's outputs.
        samples: images to choose from.
        data_options: how images are resized, cropped and normalised, as in `ltmp.data.eval_transform`.
        timed: whether to show times; False for a model too small to gain any.
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

    def open(self, image: str | Path | Image.Image) -> Opened:
        """Read an image and ask the dense model.

        Raises:
            LTMPError: it cannot be read as an image; the message says why.
        """
        deployment = self.deployment
        image = image if isinstance(image, Image.Image) else deployment.read(image)
        view, pixels = deployment.view(image, WIDTH), deployment.prepare(image)[None].to(deployment.device)
        with self._lock:
            return Opened(view, pixels, self._answers(pixels, plain=True))

    def look(self, opened: Opened, share: float) -> Look:
        """Look at an image with thresholds for `share`; what it costs itself may be more or less."""
        with self._lock:
            self.budgets.set(share)
            seen, reduced = see(self.model, opened.pixels)[0], self._answers(opened.pixels, plain=False)
            return Look(opened, seen, reduced, self.timed)

    @torch.inference_mode()
    def _answers(self, pixels: Tensor, *, plain: bool) -> Answers:
        made, times = attachment(self.model), []
        # recorded calls are reduced: others may first find out whether that pays, by running both ways
        with dense() if plain else record():
            for _ in range(ROUNDS if self.timed else 1):
                start = perf_counter()
                logits_of(self.model(pixels)).cpu()
                times.append(perf_counter() - start)
            blocks = []
            for count in range(1, made.body.depth + 1):
                with first_blocks(made.body, made.thresholds, count):
                    blocks.append(self._top(logits_of(self.model(pixels))[0]))
        return Answers(blocks, median(times))

    def _top(self, logits: Tensor) -> Top:
        chances = logits.float().softmax(-1)
        values, indices = chances.topk(min(5, len(chances)))
        return [(self.deployment.name(i), p) for p, i in zip(values.tolist(), indices.tolist(), strict=True)]


@contextmanager
def first_blocks(body: Body, own: Thresholds, count: int) -> Iterator[None]:
    """Leave out all but the first `count` blocks inside: the host's own norm and head then read what is there by then.

    Works with any host, for one call of the model a block, and in this thread only.
    """
    fewer = Thresholds(count, own.config).to(own.merge.device).eval()
    fewer.set(own.merge[:count], own.prune[:count])
    fewer.probe = None if own.probe is None else own.probe[:count]
    with running(body=replace(body, blocks=body.blocks[:count], policy=fewer)):
        yield
