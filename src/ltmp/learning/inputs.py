"""What a model is called with while it learns: images, or all that a processor of transformers made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LTMPError

PROCESSED = ("input_ids", "image_grid_thw", "spatial_shapes", "pixel_attention_mask", "image_sizes")
"""Names by which a batch shows that a processor made it. The first that is there has one row an image, or a text."""


class Inputs:
    """Keywords of a call, which can be cut and moved like a tensor of images.

    Args:
        tensors: each with the same number of rows for every image: `pixel_values` of Qwen-VL has one a patch.
        images: how many images, or texts with images, they belong to.

    Raises:
        LTMPError: images differ in their numbers of rows, or texts are padded on the right.
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
        """[images, ...], what is seen of each image."""
        return self._by_image(self.tensors["pixel_values"])

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.tensors["pixel_values"].device

    def split(self, size: int) -> list[Inputs]:
        """Parts of `size` images, the last may be smaller."""
        return [self[start : start + size] for start in range(0, self.images, size)]

    def to(self, place: torch.device | str, non_blocking: bool = False) -> Inputs:
        """The same on another device."""
        moved = {name: tensor.to(place, non_blocking=non_blocking) for name, tensor in self.tensors.items()}
        return Inputs(moved, self.images)

    def contiguous(self) -> Inputs:
        """Itself: cutting copies."""
        return self

    def with_gradients(self) -> Inputs:
        """A copy whose pixels take gradients."""
        pixels = self.tensors["pixel_values"].clone().requires_grad_()
        return Inputs({**self.tensors, "pixel_values": pixels}, self.images)


Images = Tensor | Inputs
"""What a model is called with: images [B, C, H, W], or keywords."""


def processed(batch: Mapping[str, Any]) -> Inputs | None:
    """What a processor of transformers returned, without labels; None where the batch is of another kind."""
    told = next((name for name in PROCESSED if isinstance(batch.get(name), Tensor)), None)
    if told is None or not isinstance(batch.get("pixel_values"), Tensor):
        return None
    given = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
    return Inputs(given, len(given[told]))


def joined(parts: Sequence[Images]) -> Images:
    """Batches as one.

    Raises:
        LTMPError: they differ in shape.
    """
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    each = [part for part in parts if isinstance(part, Inputs)]
    try:
        tensors = {name: torch.cat([part.tensors[name] for part in each]) for name in each[0].tensors}
    except RuntimeError as error:
        raise LTMPError(
            "batches differ in shape: pad texts to one length (padding='max_length') and resize images to one size"
        ) from error
    return Inputs(tensors, sum(map(len, each)))


def pixels_of(images: Images) -> Tensor:
    """[B, ...], the pixels of each image."""
    return images if isinstance(images, Tensor) else images.pixels


def with_gradients(images: Images) -> Images:
    """A copy whose pixels take gradients, so that these reach the first block of a frozen model."""
    return images.clone().requires_grad_() if isinstance(images, Tensor) else images.with_gradients()


def call(model: nn.Module, images: Images) -> Any:
    """What the model returns for them."""
    return model(images) if isinstance(images, Tensor) else model(**images.tensors)
