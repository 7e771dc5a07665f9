"""The two halves of a standard block on a CPU, their linear layers by oneDNN with the GELU in the product.

`torch.nn.functional.linear` goes to MKL in float32, which on processors of other makers than its own is far from what
they can do (half the speed of oneDNN on an AVX-512 AMD EPYC, at any number of rows), and both read every weight however
few tokens are left. The operator is the one that torch's own compiler emits; where it is missing, where gradients or
autocast are asked for, or where a block is not plain, the host's modules run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..method.recipe import Parts, Recipe, is_plain
from .hooks import hooked_inside

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Halves(NamedTuple):
    """A block's functions on rows, as in `Recipe`, the block filled in."""

    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    out: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


def drops_images(block: nn.Module) -> bool:
    """Whether the block leaves out branches of some images at random (stochastic depth, Huang et al., ECCV 2016)."""
    if not block.training:
        return False
    return any(type(m).__name__.endswith(("DropPath", "StochasticDepth")) and m.training for m in block.modules())


def halves(recipe: Recipe, block: nn.Module, x: Tensor) -> Halves:
    """How to run `block` on rows like `x`: by oneDNN where that computes the same, or else its own modules."""
    if _applies(x) and not block.training:
        parts = recipe.parts(block)
        if parts is not None and parts.act in _GELU and is_plain(parts, torch.float32) and not hooked_inside(block):
            return Halves(partial(_qkv, parts), partial(_out, parts), partial(_mlp, parts))
    return Halves(partial(recipe.qkv, block), partial(recipe.out, block), partial(recipe.mlp, block))


def _applies(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _AVAILABLE
        # whoever watches operators, such as torch's FLOP counter, knows the ordinary ones
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _linear(layer: nn.Linear, x: Tensor, act: str = "none", form: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), layer.weight, layer.bias, act, [], form)


def _qkv(parts: Parts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return parts.project(_normed(parts.norm1, x), _linear)


def _out(parts: Parts, y: Tensor) -> Tensor:
    return _scaled(_linear(parts.proj, y), parts.scale1)


def _mlp(parts: Parts, x: Tensor) -> Tensor:
    hidden = _linear(parts.fc1, _normed(parts.norm2, x), "gelu", _GELU[parts.act])
    return _scaled(_linear(parts.fc2, hidden), parts.scale2)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale
