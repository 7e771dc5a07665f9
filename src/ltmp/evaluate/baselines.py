"""Dense alternatives to reducing tokens, without training: the same model at lower resolution, and a smaller model."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import dense, record
from ..errors import LTMPError, UsageError, first_line
from ..hosts.attach import attach, detach, find_attachment
from ..hosts.outputs import logits_of
from ..learning.calibrate import geometry_of
from ..method.flops import Geometry, block_costs


class AtResolution(nn.Module):
    """A model that takes images of its original size but runs at a lower one, with resampled position embeddings.

    Args:
        model: a timm model with `set_input_size`, which is changed in place; or a model whose forward resamples
            position embeddings, either always or on request (`interpolate_pos_encoding` in transformers).
        size: pixels per side.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        resized: Any = model
        self.kwargs: dict[str, Any] = {}
        if hasattr(model, "set_input_size"):
            resized.set_input_size((size, size))
        elif "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self.kwargs = {"interpolate_pos_encoding": True}
        self.model, self.size = model, size

    def shrink(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] resized to [B, C, size, size]."""
        return F.interpolate(images, self.size, mode="bicubic", antialias=True)

    def at_size(self, images: Tensor) -> Any:
        """The output for images [B, C, size, size]."""
        return self.model(images, **self.kwargs)

    def forward(self, images: Tensor) -> Any:
        return self.at_size(self.shrink(images))

    def forward_features(self, images: Tensor) -> Any:
        """As timm's `forward_features`, for embeddings."""
        model: Any = self.model
        return model.forward_features(self.shrink(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's `forward_head`, for embeddings."""
        model: Any = self.model
        return model.forward_head(features, pre_logits=pre_logits)


@dataclass(frozen=True)
class Baseline:
    """A dense model that runs instead of an attached one, on the same images.

    Attributes:
        name: unique name.
        method: the method it is an instance of, for tables and plots.
        model: from images [B, C, H, W] to logits.
        share: its multiply-adds relative to the attached model's, dense.
        kept: number of tokens after each of its blocks.
    """

    name: str
    method: str
    model: nn.Module
    share: float
    kept: tuple[float, ...]

    @property
    def target(self) -> None:
        """None, as a baseline is not made for a budget; compare `Entry.target`."""

    def prepared(self, images: Tensor) -> Tensor:
        """Images as `run` takes them. Shrinking is not timed: it belongs to decoding, which is not timed either."""
        return self.model.shrink(images) if isinstance(self.model, AtResolution) else images

    def run(self, prepared: Tensor) -> Any:
        """The output for `prepared` images."""
        return self.model.at_size(prepared) if isinstance(self.model, AtResolution) else self.model(prepared)


def at_resolution(model: nn.Module, size: int, images: Tensor) -> Baseline:
    """`model` at `size` pixels per side.

    Args:
        model: attached; it is copied and left unchanged.
        images: [B, C, H, W] on the model's device; one is enough.

    Raises:
        UsageError: `size` is not below the images' size or no multiple of the patch size, or the model cannot run at
            it.
    """
    if not 0 < size < min(images.shape[-2:]):
        raise UsageError(f"resize:{size}: expected a size below the model's own {min(images.shape[-2:])} pixels")
    patch = patch_size(model)
    if size % patch:
        raise UsageError(f"resize:{size}: expected a multiple of the model's patches of {patch} pixels")
    try:
        smaller = AtResolution(detach(copy.deepcopy(model)), size)
        return _baseline(f"resize:{size}", "resize", smaller, model, images)
    # models with fixed position embeddings raise errors of various types
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"resize:{size}: this model runs at its own size only ({first_line(error)}): leave it out"
        ) from error


def patch_size(model: nn.Module) -> int:
    """Pixels per side of a patch; 1 if the model does not report it."""
    embed, config = (getattr(model, name, None) for name in ("patch_embed", "config"))
    size: Any = getattr(embed, "patch_size", None) or getattr(config, "patch_size", None) or 1
    return int(size[0] if isinstance(size, tuple | list) else size)


def as_baseline(model: nn.Module, other: nn.Module, name: str, images: Tensor) -> Baseline:
    """Another dense model, such as a smaller one, in place of the attached `model`, on the same images.

    Raises:
        UsageError: `other` is not a supported vision transformer, or has a different number of classes.
    """
    try:
        baseline = _baseline(name, name, other, model, images)
    except LTMPError as error:
        raise UsageError(f"--against {name}: {first_line(error)}") from error
    with torch.inference_mode(), record(), dense():
        classes = [logits_of(m(images[:1])).shape[-1] for m in (model, other)]
    if classes[0] != classes[1]:
        raise UsageError(f"--against {name}: it has {classes[1]} classes and the model {classes[0]}: use one for both")
    return baseline


def _baseline(name: str, method: str, model: nn.Module, attached: nn.Module, images: Tensor) -> Baseline:
    """`model` as a baseline for the model `attached`, whose dense cost its share is relative to."""
    full, own = dense_geometry(attached, images), dense_geometry(model, images)
    return Baseline(name, method, model.eval(), multiply_adds(own) / multiply_adds(full), (own.tokens,) * own.depth)


def dense_geometry(model: nn.Module, images: Tensor) -> Geometry:
    """The geometry of an image in a supported model, attached or not, from which its FLOPs follow.

    Raises:
        LTMPError: the model is not supported.
    """
    bare = find_attachment(model) is None
    if bare:
        attach(model.model if isinstance(model, AtResolution) else model)
    try:
        return geometry_of(model, images)
    finally:
        if bare:
            detach(model)


def multiply_adds(geometry: Geometry) -> float:
    """Multiply-adds of all blocks for an image that keeps all its tokens."""
    tokens = torch.full((geometry.depth,), float(geometry.tokens), dtype=torch.float64)
    return float(block_costs(tokens, tokens, geometry).sum()) * geometry.width**2
