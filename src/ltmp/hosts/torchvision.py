"""Recipe for torchvision's `vit_*`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock, VisionTransformer

from ..method.recipe import Parts, Recipe, describe_timm, linear_ratio
from . import mha


def _qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return mha.qkv(block.self_attention, block.ln_1(x))


def _out(block: Any, y: Tensor) -> Tensor:
    return block.dropout(block.self_attention.out_proj(y))


def _mlp(block: Any, x: Tensor) -> Tensor:
    return block.mlp(block.ln_2(x))


def _attention(block: Any) -> tuple[nn.Module, ...]:
    return (block.self_attention,)


def _parts(block: Any) -> Parts | None:
    if type(block.mlp) is not MLPBlock:
        return None
    return mha.parts(block, block.self_attention, block.mlp[0], block.mlp[1], block.mlp[3])


def _problems(host: Any) -> list[str]:
    for name, block in host.encoder.layers.named_children():
        problems = mha.problems(name, block, EncoderBlock, block.self_attention)
        if problems:
            return problems
    return []


def _mlp_ratio(block: Any) -> float:
    return linear_ratio(block.mlp, block.self_attention.embed_dim)


def _describe(host: Any) -> dict[str, Any]:
    return {**describe_timm(host), "width": host.hidden_dim, "input_size": [host.image_size] * 2}


RECIPE = Recipe(
    "torchvision VisionTransformer", "encoder.layers", _qkv, _out, _mlp, _attention, _parts, _problems, _mlp_ratio,
    describe=_describe,
)  # fmt: skip

HOSTS: dict[type[nn.Module], Recipe] = {VisionTransformer: RECIPE}
