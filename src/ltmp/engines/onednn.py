"""The two halves of a standard block on a CPU, their linear layers by the faster of two libraries.

`torch.nn.functional.linear` goes to MKL in float32, which on processors of other makers than its own is far from what
they can do (half the speed of oneDNN on an AVX-512 AMD EPYC, at any number of rows); on Intel's they are equal. oneDNN
prepares itself anew for each number of rows that it has not seen, which takes longer than a layer does, and a reduced
image has any number: so rows are filled up to a few numbers (`room`), and it has to win by `_MARGIN`. Which one it is
was measured once for each width and number of threads.

The operator is the one that torch's own compiler emits; where it is missing, where gradients or autocast are asked for,
or where a block is not plain, the host's modules run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module

from ..method.recipe import Parts, Recipe, linear_of
from .plain import Known

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_MARGIN = 0.75
"""oneDNN runs where it takes at most this share of MKL's time."""


class Halves(NamedTuple):
    """A block's functions on rows, as in `Recipe`, the block filled in and what enters a branch added to it.

    Attributes:
        qkv: x [..., C] -> q, k, v.
        out: x [..., C], y [..., H * D] -> x + first residual branch.
        mlp: x [..., C] -> x + second residual branch.
    """

    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    out: Callable[[Tensor, Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


def halves(recipe: Recipe, blocks: Sequence[nn.Module], x: Tensor, known: Known) -> list[Halves]:
    """How to run blocks on rows like `x`: their plain layers without their modules where that computes the same.

    Args:
        known: of the blocks, see `plain.look`.
    """
    found = known.parts(blocks) if _applies(x) else [None] * len(blocks)
    return [_halves_of(recipe, block, parts) for block, parts in zip(blocks, found, strict=True)]


def _halves_of(recipe: Recipe, block: nn.Module, parts: Parts | None) -> Halves:
    if parts is not None and not block.training and parts.act in _GELU and parts.fc1.weight.dtype == torch.float32:
        linear = _onednn if _faster(parts.fc1.in_features, torch.get_num_threads()) else _mkl
        return Halves(partial(_qkv, parts, linear), partial(_out, parts, linear), partial(_mlp, parts, linear))
    return Halves(
        partial(recipe.qkv, block),
        lambda x, y: x + recipe.out(block, y),
        lambda x: x + recipe.mlp(block, x),
    )


def room(rows: int, width: int) -> int:
    """How many rows of `width` features to keep for `rows`: a sixteenth more at most, where oneDNN takes them."""
    if not (_AVAILABLE and _faster(width, torch.get_num_threads())):
        return rows
    step = max(8, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step


def _applies(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _AVAILABLE
        and not (module._global_forward_hooks or module._global_forward_pre_hooks)
        and not watched()
    )


def watched() -> bool:
    """Whether somebody watches operators, such as torch's FLOP counter, which knows only the ordinary ones."""
    return torch._C._len_torch_dispatch_stack() > 0


_Linear = Callable[..., Tensor]


def _mkl(layer: nn.Linear, x: Tensor, act: str | None = None) -> Tensor:
    # as an attribute of a module, a weight takes longer to find; it is never None (`is_plain`)
    own = layer._parameters
    y = F.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
    return y if act is None else torch.ops.aten.gelu_(y, approximate=act)


def _onednn(layer: nn.Linear, x: Tensor, act: str | None = None) -> Tensor:
    name, form = ("none", "") if act is None else ("gelu", act)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), layer.weight, layer.bias, name, [], form)


@cache
def _faster(width: int, threads: int) -> bool:
    """Whether oneDNN is, at layers from `width` to four times that: the least of nine turns each, in processor time."""
    del threads  # there is an answer for each number of them
    with torch.inference_mode():
        layer = linear_of(torch.zeros(4 * width, width, device="cpu"), torch.zeros(4 * width, device="cpu"))
        x = torch.zeros(128, width, device="cpu")
        least = [float("inf"), float("inf")]
        for turn in range(10):
            for i, linear in enumerate((_mkl, _onednn)):
                begin = time.thread_time()
                linear(layer, x, "none")
                if turn:
                    least[i] = min(least[i], time.thread_time() - begin)
    return least[1] <= _MARGIN * least[0]


def _qkv(parts: Parts, linear: _Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return parts.project(_normed(parts.norm1, x), linear)


def _out(parts: Parts, linear: _Linear, x: Tensor, y: Tensor) -> Tensor:
    return _added(parts.proj, linear, parts.scale1, x, y)


def _mlp(parts: Parts, linear: _Linear, x: Tensor) -> Tensor:
    hidden = linear(parts.fc1, _normed(parts.norm2, x), _GELU[parts.act])
    return _added(parts.fc2, linear, parts.scale2, x, hidden)


def _added(layer: nn.Linear, linear: _Linear, scale: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """x + scale * layer(y)."""
    if scale is not None:
        return torch.addcmul(x, linear(layer, y), scale)
    own = layer._parameters
    if linear is _mkl and own["bias"] is not None:
        # MKL adds its product to what is there: the sum of x and the bias saves the pass that would copy the bias
        # the weight is never None, as in `_mkl`
        return torch.add(x, own["bias"]).addmm_(y, own["weight"].t())  # type: ignore[union-attr]
    return x + linear(layer, y)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    own = norm._parameters
    return torch.native_layer_norm(x, norm.normalized_shape, own["weight"], own["bias"], norm.eps)[0]
