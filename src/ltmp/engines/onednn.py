"""The two halves of a standard block on a CPU, with linear layers computed by the faster of MKL and oneDNN.

In float32, `torch.nn.functional.linear` uses MKL, which is far from optimal on processors from other makers than Intel
(half the speed of oneDNN on an AVX-512 AMD EPYC, at any number of rows); on Intel processors the two are equally fast.
oneDNN prepares a primitive for each new number of rows, which takes longer than the layer itself, and a reduced image
may have any number of them. So rows are padded to one of a few numbers (`padded_rows`), and oneDNN is used only if it
takes at most `_MARGIN` of MKL's time. The faster library is measured once per width and number of threads.

The oneDNN operator is the one that torch's own compiler emits. The host's modules run instead if that operator is
missing, with gradients or autocast, and for blocks that are not plain.
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
from .plain import BlockFacts

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_MARGIN = 0.75
"""oneDNN is used if it takes at most this share of MKL's time."""


class Halves(NamedTuple):
    """The functions of `Recipe` on rows, bound to one block and with the residual additions included.

    Attributes:
        qkv: x [..., C] -> q, k, v.
        out: x [..., C], y [..., H * D] -> x + first residual branch.
        mlp: x [..., C] -> x + second residual branch.
    """

    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    out: Callable[[Tensor, Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


def halves(recipe: Recipe, blocks: Sequence[nn.Module], x: Tensor, facts: BlockFacts) -> list[Halves]:
    """Return the two halves of each block for rows like `x`; plain layers bypass their modules if that is equivalent.

    Args:
        facts: cached facts about these blocks, see `plain.look`.
    """
    all_parts = facts.parts(blocks) if _applies(x) else [None] * len(blocks)
    return [_halves_of(recipe, block, parts) for block, parts in zip(blocks, all_parts, strict=True)]


def _halves_of(recipe: Recipe, block: nn.Module, parts: Parts | None) -> Halves:
    if parts is not None and not block.training and parts.act in _GELU and parts.fc1.weight.dtype == torch.float32:
        linear = _onednn if _onednn_is_faster(parts.fc1.in_features, torch.get_num_threads()) else _mkl
        return Halves(partial(_qkv, parts, linear), partial(_out, parts, linear), partial(_mlp, parts, linear))
    return Halves(
        partial(recipe.qkv, block),
        lambda x, y: x + recipe.out(block, y),
        lambda x: x + recipe.mlp(block, x),
    )


def padded_rows(rows: int, width: int) -> int:
    """Return the number to which `rows` rows of `width` features are padded.

    Only oneDNN needs padding, of at most a sixteenth or 7 rows.
    """
    if not (_AVAILABLE and _onednn_is_faster(width, torch.get_num_threads())):
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
        and not dispatch_mode_active()
    )


def dispatch_mode_active() -> bool:
    """Whether a dispatch mode intercepts operators, such as torch's FLOP counter, which supports ordinary ones only."""
    return torch._C._len_torch_dispatch_stack() > 0


_Linear = Callable[..., Tensor]


def _mkl(layer: nn.Linear, x: Tensor, act: str | None = None) -> Tensor:
    # faster than attribute look-ups on the module; the weight is never None (`is_plain`)
    weights = layer._parameters
    y = F.linear(x, weights["weight"], weights["bias"])  # type: ignore[arg-type]
    return y if act is None else torch.ops.aten.gelu_(y, approximate=act)


def _onednn(layer: nn.Linear, x: Tensor, act: str | None = None) -> Tensor:
    name, form = ("none", "") if act is None else ("gelu", act)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), layer.weight, layer.bias, name, [], form)


@cache
def _onednn_is_faster(width: int, threads: int) -> bool:
    """Whether oneDNN beats MKL by `_MARGIN` on a layer from `width` to 4 * `width` features.

    Compares the minimum thread CPU time of nine interleaved runs, after a warm-up run of each.
    """
    del threads  # part of the cache key only
    with torch.inference_mode():
        layer = linear_of(torch.zeros(4 * width, width, device="cpu"), torch.zeros(4 * width, device="cpu"))
        x = torch.zeros(128, width, device="cpu")
        fastest = [float("inf"), float("inf")]
        for repeat in range(10):
            for i, linear in enumerate((_mkl, _onednn)):
                begin = time.thread_time()
                linear(layer, x, "none")
                if repeat:
                    fastest[i] = min(fastest[i], time.thread_time() - begin)
    return fastest[1] <= _MARGIN * fastest[0]


def _qkv(parts: Parts, linear: _Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return parts.project(_layer_norm(parts.norm1, x), linear)


def _out(parts: Parts, linear: _Linear, x: Tensor, y: Tensor) -> Tensor:
    return _add_branch(parts.proj, linear, parts.scale1, x, y)


def _mlp(parts: Parts, linear: _Linear, x: Tensor) -> Tensor:
    hidden = linear(parts.fc1, _layer_norm(parts.norm2, x), _GELU[parts.act])
    return _add_branch(parts.fc2, linear, parts.scale2, x, hidden)


def _add_branch(layer: nn.Linear, linear: _Linear, scale: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """Return x + scale * layer(y)."""
    if scale is not None:
        return torch.addcmul(x, linear(layer, y), scale)
    weights = layer._parameters
    if linear is _mkl and weights["bias"] is not None:
        # MKL accumulates into its output: starting from x + bias saves the pass that would copy the bias there
        # the weight is never None, as in `_mkl`
        return torch.add(x, weights["bias"]).addmm_(y, weights["weight"].t())  # type: ignore[union-attr]
    return x + linear(layer, y)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    weights = norm._parameters
    return torch.native_layer_norm(x, norm.normalized_shape, weights["weight"], weights["bias"], norm.eps)[0]
