"""Alternatives to reducing tokens that cost nothing to try: the same model at lower resolution, and a smaller one."""

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
    """A model that takes images of its own size and looks at them smaller, its position embeddings resampled.

    Args:
        model: of timm, with `set_input_size`, which is changed to the size; or a host whose forward resamples position
            embeddings, by itself or where it is asked to (`interpolate_pos_encoding` of transformers).
        size: pixels a side.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        resized: Any = model
        self.how: dict[str, Any] = {}
        if hasattr(model, "set_input_size"):
            resized.set_input_size((size, size))
        elif "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self.how = {"interpolate_pos_encoding": True}
        self.model, self.size = model, size

    def shrink(self, images: Tensor) -> Tensor:
        """[B, C, size, size]."""
        return F.interpolate(images, self.size, mode="bicubic", antialias=True)

    def at_size(self, images: Tensor) -> Any:
        """The output for images [B, C, size, size]."""
        return self.model(images, **self.how)

    def forward(self, images: Tensor) -> Any:
        return self.at_size(self.shrink(images))

    def forward_features(self, images: Tensor) -> Any:
        """For embeddings."""
        model: Any = self.model
        return model.forward_features(self.shrink(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """For embeddings."""
        model: Any = self.model
        return model.forward_head(features, pre_logits=pre_logits)


@dataclass(frozen=True)
class Baseline:
    """A dense model that runs instead of an attached one, on the same images.

    Attributes:
        name: of this one; method: what it is an instance of, for tables and plots.
        model: images [B, C, H, W] to logits.
        share: its multiply-adds over those of the attached model, dense.
        kept: tokens after each of its blocks.
    """

    name: str
    method: str
    model: nn.Module
    share: float
    kept: tuple[float, ...]

    @property
    def target(self) -> None:
        """The budget that it was made for: none."""

    def prepared(self, images: Tensor) -> Tensor:
        """Images as it reads them when it is timed: shrinking belongs to decoding, which is not timed either."""
        return self.model.shrink(images) if isinstance(self.model, AtResolution) else images

    def run(self, prepared: Tensor) -> Any:
        """Its output for `prepared` images."""
        return self.model.at_size(prepared) if isinstance(self.model, AtResolution) else self.model(prepared)


def at_resolution(model: nn.Module, size: int, images: Tensor) -> Baseline:
    """`model` at `size` pixels a side.

    Args:
        model: attached; it is copied, and stays as it is.
        images: [B, C, H, W] on its device, one is enough.

    Raises:
        UsageError: `size` is not below the images' own, or the model cannot be run at it.
    """
    if not 0 < size < min(images.shape[-2:]):
        raise UsageError(f"resize:{size}: expected a size below the model's own {min(images.shape[-2:])} pixels")
    patch = patch_size(model)
    if size % patch:
        raise UsageError(f"resize:{size}: expected a multiple of the model's patches of {patch} pixels")
    try:
        smaller = AtResolution(detach(copy.deepcopy(model)), size)
        return _baseline(f"resize:{size}", "resize", smaller, model, images)
    # hosts with fixed positions refuse in their own ways
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"resize:{size}: this model runs at its own size only ({first_line(error)}): leave it out"
        ) from error


def patch_size(model: nn.Module) -> int:
    """Pixels a side; 1 where the host does not say."""
    embed, config = (getattr(model, name, None) for name in ("patch_embed", "config"))
    found: Any = getattr(embed, "patch_size", None) or getattr(config, "patch_size", None) or 1
    return int(found[0] if isinstance(found, tuple | list) else found)


def instead_of(model: nn.Module, other: nn.Module, name: str, images: Tensor) -> Baseline:
    """Another dense model, such as a smaller one, in place of the attached `model`; it takes the same images.

    Raises:
        UsageError: it is not a known vision transformer, or gives other classes.
    """
    try:
        found = _baseline(name, name, other, model, images)
    except LTMPError as error:
        raise UsageError(f"--against {name}: {first_line(error)}") from error
    with torch.inference_mode(), record(), dense():
        classes = [logits_of(m(images[:1])).shape[-1] for m in (model, other)]
    if classes[0] != classes[1]:
        raise UsageError(f"--against {name}: it has {classes[1]} classes and the model {classes[0]}: use one for both")
    return found


def _baseline(name: str, method: str, model: nn.Module, instead: nn.Module, images: Tensor) -> Baseline:
    whole, own = dense_geometry(instead, images), dense_geometry(model, images)
    return Baseline(name, method, model.eval(), multiply_adds(own) / multiply_adds(whole), (own.tokens,) * own.depth)


def dense_geometry(model: nn.Module, images: Tensor) -> Geometry:
    """The cost of an image in a model of a known host, attached or not.

    Raises:
        LTMPError: its host is not known.
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
    """Of all blocks, for an image that keeps its tokens."""
    tokens = torch.full((geometry.depth,), float(geometry.tokens), dtype=torch.float64)
    return float(block_costs(tokens, tokens, geometry).sum()) * geometry.width**2
