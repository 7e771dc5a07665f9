"""Inputs of a model: a tensor of images, or the keyword inputs that a transformers processor made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LTMPError

PROCESSED = ("input_ids", "image_grid_thw", "spatial_shapes", "pixel_attention_mask", "image_sizes")
"""Keys that mark a batch as the output of a processor. The first one present has one row per image, or per text."""


class Inputs:
    """Keyword inputs of a model, which can be sliced and moved like a tensor of images.

    Args:
        tensors: each with the same number of rows for every image: `pixel_values` of Qwen-VL has one row per patch.
        images: number of images, or of texts with images.

    Raises:
        LTMPError: images differ in size or in their number of rows, or texts are padded on the right.
    """

    def __init__(self, tensors: Mapping[str, Tensor], images: int) -> None:
        self.tensors, self.images = dict(tensors), images
        for name, tensor in self.tensors.items():
            if len(tensor) % images:
                raise LTMPError(
                    f"{name} has {len(tensor)} rows for {images} images: expected as many rows for each; resize images "
                    "to one size before the processor gets them"
                )
        grids = self.tensors.get("image_grid_thw")
        if grids is not None and (grids != grids[:1]).any():
            raise LTMPError("the images of a batch are of several sizes (image_grid_thw): resize them to one size")
        mask = self.tensors.get("attention_mask")
        if "input_ids" in self.tensors and mask is not None and not mask[:, -1].all():
            raise LTMPError(
                "texts are padded on the right, where the next token is predicted: padding_side='left' in the processor"
            )

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, part: slice) -> Inputs:
        rows = {name: self._by_image(tensor)[part].flatten(0, 1) for name, tensor in self.tensors.items()}
        return Inputs(rows, len(range(self.images)[part]))

    def _by_image(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.images, len(tensor) // self.images))

    @property
    def pixels(self) -> Tensor:
        """Pixels of each image, [images, ...]."""
        return self._by_image(self.tensors["pixel_values"])

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.tensors["pixel_values"].device

    def split(self, size: int) -> list[Inputs]:
        """Slices of `size` images; the last may be smaller."""
        return [self[start : start + size] for start in range(0, self.images, size)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Inputs:
        """A copy on another device."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors.items()}
        return Inputs(moved, self.images)

    def contiguous(self) -> Inputs:
        """Return itself: slicing copies."""
        return self

    def with_gradients(self) -> Inputs:
        """A copy whose pixels require gradients."""
        pixels = self.tensors["pixel_values"].clone().requires_grad_()
        return Inputs({**self.tensors, "pixel_values": pixels}, self.images)


Images = Tensor | Inputs
"""Inputs of a model: images [B, C, H, W], or keyword inputs."""


def processed(batch: Mapping[str, Any]) -> Inputs | None:
    """The tensors that a transformers processor returned, without labels; None if the batch is of another kind."""
    counted = next((name for name in PROCESSED if isinstance(batch.get(name), Tensor)), None)
    if counted is None or not isinstance(batch.get("pixel_values"), Tensor):
        return None
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
    return Inputs(tensors, len(tensors[counted]))


def joined(parts: Sequence[Images]) -> Images:
    """Concatenate batches of one kind.

    Raises:
        LTMPError: they differ in shape.
    """
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    batches = [part for part in parts if isinstance(part, Inputs)]
    try:
        tensors = {name: torch.cat([part.tensors[name] for part in batches]) for name in batches[0].tensors}
    except RuntimeError as error:
        raise LTMPError(
            "batches differ in shape: pad texts to one length (padding='max_length') and resize images to one size"
        ) from error
    return Inputs(tensors, sum(map(len, batches)))


def pixels_of(images: Images) -> Tensor:
    """Pixels of each image, [B, ...]."""
    return images if isinstance(images, Tensor) else images.pixels


def with_gradients(images: Images) -> Images:
    """A copy whose pixels require gradients, so that gradients reach the first block of a frozen model."""
    return images.clone().requires_grad_() if isinstance(images, Tensor) else images.with_gradients()


def call(model: nn.Module, images: Images) -> Any:
    """The model's output."""
    return model(images) if isinstance(images, Tensor) else model(**images.tensors)
