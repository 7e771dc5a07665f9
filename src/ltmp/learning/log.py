"""Logging of a learning run to TensorBoard, Weights & Biases, or a logger of your own."""

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
"""Steps between pictures of the example images."""


class Logger(Protocol):
    """The interface that `ltmp.learn(log=...)` writes to; any object with these two methods will do."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name; names start with a group and a slash, as in `merge/00`."""

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Log pictures by name."""


class TensorBoard:
    """Writes event files for `tensorboard --logdir FOLDER`.

    A run that is resumed with the same folder replaces what was logged after the step at which it resumes.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "Logging") from error
        self._writer_class, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def _writer_at(self, step: int) -> Any:
        """The writer, opened at the first step."""
        if self._writer is None:
            self._writer = self._writer_class(os.fspath(self._folder), purge_step=step)
        return self._writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer_at(step).add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        for name, picture in pictures.items():
            self._writer_at(step).add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
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
        """Finish the run."""
        self._run.finish()


def open_log(target: str) -> TensorBoard | WandB:
    """Open a log: `wandb` or `wandb:PROJECT` for Weights & Biases, any other target is a folder for TensorBoard."""
    name, _, project = target.partition(":")
    return WandB(project or "ltmp") if name == "wandb" else TensorBoard(target)


class Journal:
    """Writes a run's steps to a logger, or nowhere without one.

    Args:
        images: [B, C, H, W], of which the first are drawn; keyword inputs are not drawn.
    """

    def __init__(self, log: Logger | None, model: nn.Module, images: Images) -> None:
        self.log = log
        self.model = model
        self.images = images[:EXAMPLES] if isinstance(images, Tensor) else None

    def step(self, step: Step) -> None:
        """Log an optimisation step."""
        if self.log is None:
            return
        values = {"loss": step.loss, "share": step.share, **_by_block("tokens", step.kept)}
        self.log.scalars(step.step, {**values, **self._thresholds()})
        if step.step % PICTURES_EVERY == 0:
            self._draw(step.step)

    def deployed(self, step: int, candidate: Candidate) -> None:
        """Log thresholds that meet the budget, before the first step and after the last."""
        if self.log is None:
            return
        values = {"deployed/share": candidate.share, "deployed/divergence": candidate.loss}
        self.log.scalars(step, {**values, **self._thresholds()})
        self._draw(step)

    def _thresholds(self) -> dict[str, float]:
        thresholds = thresholds_of(self.model)
        return {**_by_block("merge", thresholds.merge.tolist()), **_by_block("prune", thresholds.prune.tolist())}

    def _draw(self, step: int) -> None:
        assert self.log is not None
        if self.images is None:
            return
        thresholds = thresholds_of(self.model)
        training = thresholds.training
        thresholds.eval()
        try:
            seen = see(self.model, self.images)
        except LTMPError:
            # the patches form no grid
            return
        finally:
            thresholds.train(training)
        rows = [strip(_visible(image), {f"step {step}": one}) for image, one in zip(self.images, seen, strict=True)]
        self.log.pictures(step, {f"images/{number}": row for number, row in enumerate(rows)})


def _by_block(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}/{block:02}": value for block, value in enumerate(values)}


def _visible(image: Tensor) -> Tensor:
    """Scale a normalised image [C, H, W] to [3, H, W] in [0, 1], from its darkest to its lightest value."""
    image = image.float().cpu()
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp_min(1e-6)).expand(3, -1, -1)
