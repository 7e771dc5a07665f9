"""Recipe for timm's NaFlexVit on plain images: blocks of the ViT or of the EVA family after another embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..method.recipe import Parts, Recipe
from . import eva, timm


def _family(block: nn.Module) -> Recipe:
    return eva.RECIPE if isinstance(block, EvaBlock) else timm.RECIPE


def _qkv(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _family(block).qkv(block, x)


def _out(block: nn.Module, y: Tensor) -> Tensor:
    return _family(block).out(block, y)


def _mlp(block: nn.Module, x: Tensor) -> Tensor:
    return _family(block).mlp(block, x)


def _parts(block: nn.Module) -> Parts | None:
    return _family(block).parts(block)


def _class_first(host: Any) -> bool:
    return host.embeds.cls_token is not None


def _problems(host: Any) -> list[str]:
    block: type[nn.Module] = EvaBlock if isinstance(host.blocks[0], EvaBlock) else Block
    attentions = (EvaAttention, AttentionRope) if block is EvaBlock else (Attention,)
    problems = timm.find_problems(host, NaFlexVit, (block,), attentions, method="_pool")
    if getattr(host, "rope_is_mixed", False):
        problems.append("its rotary embeddings are learned for each block and passed to one block at a time")
    return problems


def _overrides(body: Any) -> dict[str, Any]:
    return {"_pool": timm.SizedPool(body, "_pool")}


RECIPE = replace(
    timm.RECIPE, name="timm NaFlexVit", qkv=_qkv, out=_out, mlp=_mlp, parts=_parts, problems=_problems,
    class_first=_class_first, overrides=_overrides, rotary=eva.RECIPE.rotary,
)  # fmt: skip

HOSTS: dict[type[nn.Module], Recipe] = {NaFlexVit: RECIPE}
