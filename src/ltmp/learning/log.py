"""Logs of a learning run: to TensorBoard, Weights & Biases, or a logger of your own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ..errors import LTMPError, MissingExtraError
from ..hosts.attach import thresholds_of
from ..visualize import see, strip
from .heldout import Candidate
from .inputs import Images
from .optimiser import Step

EXAMPLES = 3
PICTURES_EVERY = 50
"""Steps from one drawing of the example images to the next."""


class Logger(Protocol):
    """The interface that `ltmp.learn(log=...)` writes to; any object with these two methods will do."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers by name; names have their group before a slash, as in `merge/00`."""

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Take pictures by name."""


class TensorBoard:
    """Writes event files for `tensorboard --logdir FOLDER`.

    A run that goes on in the same folder replaces what was logged after the step that it goes on from.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "Logging") from error
        self._make, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def _at(self, step: int) -> Any:
        if self._writer is None:
            self._writer = self._make(os.fspath(self._folder), purge_step=step)
        return self._writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._at(step).add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        for name, picture in pictures.items():
            self._at(step).add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Logs to a new run of a Weights & Biases project.

    Raises:
        LTMPError: wandb is not installed.
    """

    def __init__(self, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise LTMPError(
                "logging to wandb needs the package 'wandb', which is not installed: pip install wandb"
            ) from error
        self._image, self._run = wandb.Image, wandb.init(project=project)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        self._run.log({name: self._image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        """Say that the run is over."""
        self._run.finish()


def open_log(target: str) -> TensorBoard | WandB:
    """`wandb` or `wandb:PROJECT`, or else a folder for TensorBoard."""
    name, _, project = target.partition(":")
    return WandB(project or "ltmp") if name == "wandb" else TensorBoard(target)


class Journal:
    """Tells a logger of one run of `model`; `images` [B, C, H, W] are some that it draws. Without a logger, nothing."""

    def __init__(self, log: Logger | None, model: nn.Module, images: Images) -> None:
        self.log = log
        self.model = model
        # of a processor's batches it draws none
        self.images = images[:EXAMPLES] if isinstance(images, Tensor) else None

    def step(self, step: Step) -> None:
        """After an optimisation step."""
        if self.log is None:
            return
        values = {"loss": step.loss, "share": step.share, **_by_block("tokens", step.kept)}
        self.log.scalars(step.step, {**values, **self._thresholds()})
        if step.step % PICTURES_EVERY == 0:
            self._draw(step.step)

    def deployed(self, step: int, candidate: Candidate) -> None:
        """Before the first step and after the last: thresholds that meet the budget."""
        if self.log is None:
            return
        values = {"deployed/share": candidate.share, "deployed/divergence": candidate.loss}
        self.log.scalars(step, {**values, **self._thresholds()})
        self._draw(step)

    def _thresholds(self) -> dict[str, float]:
        values = dict(thresholds_of(self.model).named_parameters())
        return {name: at for step, by in values.items() for name, at in _by_block(step, by.tolist()).items()}

    def _draw(self, step: int) -> None:
        assert self.log is not None
        if self.images is None:
            return
        thresholds = thresholds_of(self.model)
        training = thresholds.training
        thresholds.eval()
        try:
            found = see(self.model, self.images)
        except LTMPError:
            # these patches form no grid
            return
        finally:
            thresholds.train(training)
        rows = [strip(_visible(image), {f"step {step}": seen}) for image, seen in zip(self.images, found, strict=True)]
        self.log.pictures(step, {f"images/{number}": row for number, row in enumerate(rows)})


def _by_block(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}/{block:02}": value for block, value in enumerate(values)}


def _visible(image: Tensor) -> Tensor:
    """[3, H, W] in [0, 1]: a normalised image [C, H, W] from its darkest to its lightest value."""
    image = image.float().cpu()
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp_min(1e-6)).expand(3, -1, -1)
