"""Recipes for hosts of timm that read their tokens in place: BEiT, relative positions, towers of language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.models import beit, eva
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from ..method.recipe import Recipe, Rotary, linear_ratio, no_pooling, set_nothing
from .eva import RECIPE as EVA
from .eva import scaled
from .relative import pairs
from .timm import RECIPE as VIT
from .timm import block_problems


def _from_timm(name: str) -> Any:
    """A module of timm's models, None in versions before it was added."""
    try:
        return import_module(f"timm.models.{name}")
    except ImportError:
        return None


deepseek_vit, gemma4_vit, qwen3_vit = map(_from_timm, ("deepseek_vit", "gemma4_vit", "qwen3_vit"))


def _plain(blocks: tuple[type, ...], attentions: tuple[type, ...], host: Any) -> list[str]:
    """Reasons why a host of these blocks cannot be reduced."""
    found = (block_problems(block, blocks, attentions) for block in host.blocks)
    return [f"blocks.{i} {trouble}" for i, trouble in enumerate(found) if trouble][:1]


def _class_first(host: Any) -> bool:
    return getattr(host, "cls_token", None) is not None


def _no_class_token(_host: nn.Module) -> bool:
    return False


def _refuses_nothing(_value: Any) -> bool:
    """Other arguments of the blocks are biases, or masks of padding that images of one size do not have."""
    return False


def _given(name: str, own: Callable[[Any], Tensor | None], host: Any, block: int, named: Mapping[str, Any]) -> Any:
    """The bias for each pair of places, from a block's own table and the one that all share."""
    found = [bias for bias in (own(host.blocks[block].attn), named.get(name)) if bias is not None]
    return pairs(torch.stack(found).sum(0)) if found else None


def _beit_own(attn: Any) -> Tensor | None:
    return None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()


def _relpos_own(attn: Any) -> Tensor | None:
    return None if attn.rel_pos is None else attn.rel_pos.get_bias()


def _beit_qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn = block.attn
    found = attn.qkv(block.norm1(x))
    if attn.q_bias is not None:
        found = found + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, v = found.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
    return q, k, v


def _beit_out(block: Any, y: Tensor) -> Tensor:
    return block.drop_path1(scaled(block.attn.proj_drop(block.attn.proj(y)), block.gamma_1))


def _no_parts(_block: nn.Module) -> None:
    """Engines that fuse know no biases."""


_GRID: dict[str, Any] = {
    "forms": ("grid",), "parts": _no_parts, "overrides": set_nothing, "final_norm": no_pooling,
    "refuses": _refuses_nothing, "class_first": _class_first,
}  # fmt: skip
HOSTS: dict[type[nn.Module], Recipe | str] = {
    beit.Beit: replace(
        VIT, name="timm Beit", qkv=_beit_qkv, out=_beit_out, mlp=EVA.mlp,
        problems=partial(_plain, (beit.Block,), (beit.Attention,)),
        bias=partial(_given, "shared_rel_pos_bias", _beit_own), **_GRID,
    ),
    relpos.VisionTransformerRelPos: replace(
        VIT, name="timm VisionTransformerRelPos",
        problems=partial(
            _plain, (relpos.RelPosBlock, relpos.ResPostRelPosBlock), (relpos.RelPosAttention,)
        ),
        bias=partial(_given, "shared_rel_pos", _relpos_own), **_GRID,
    ),
}  # fmt: skip


def _gemma_qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn, x = block.attn, block.norm1(x)
    q, k, v = (layer(x).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    # its scores are not divided by the root of the head's width
    q, k, v = attn.q_norm(q) * attn.head_dim**0.5, attn.k_norm(k), attn.v_norm(v)
    return q, k.repeat_interleave(attn.num_kv_groups, -2), v.repeat_interleave(attn.num_kv_groups, -2)


def _gemma_out(block: Any, y: Tensor) -> Tensor:
    return block.drop_path(block.norm2(block.attn.proj_drop(block.attn.o_proj(y))))


def _gemma_mlp(block: Any, x: Tensor) -> Tensor:
    return block.drop_path(block.norm4(block.mlp(block.norm3(x))))


def _gemma_ratio(block: Any) -> float:
    return linear_ratio(block.mlp, len(block.norm1.weight))


def _gemma_table(_host: nn.Module, given: tuple[Tensor, Tensor], _tokens: int) -> Tensor:
    """[N, 2 D], cosines and sines of images of one size."""
    cos, sin = given
    return torch.cat([cos[0], sin[0]], -1)


def _gemma_rotate(_block: nn.Module, q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rows.chunk(2, -1)
    rotate = partial(gemma4_vit.apply_multidimensional_rope, ndim=2, unsqueeze_dim=q.ndim - 2)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _gemma_problems(host: Any) -> list[str]:
    other = [type(block).__name__ for block in host.blocks if type(block) is not gemma4_vit.Gemma4Block]
    dropout = any(block.attn.attn_drop.p > 0 for block in host.blocks if hasattr(block, "attn"))
    return [f"it has a {name}" for name in other[:1]] + ["it has attention dropout"] * dropout


_TOWER: dict[str, Any] = {**_GRID, "class_first": _no_class_token, "prefix_only": _no_class_token}

if qwen3_vit is not None:
    HOSTS[qwen3_vit.Qwen3VitEncoder] = replace(
        EVA, name="timm Qwen3VitEncoder", loop="forward",
        problems=partial(_plain, (eva.EvaBlock,), (eva.EvaAttention, AttentionRope)), **_TOWER,
    )  # fmt: skip
if deepseek_vit is not None:
    HOSTS[deepseek_vit.DeepseekVitEncoder] = replace(
        EVA, name="timm DeepseekVitEncoder", loop="forward",
        problems=partial(_plain, (deepseek_vit.DeepseekVitBlock,), (AttentionRope, Attention)), **_TOWER,
    )  # fmt: skip
if gemma4_vit is not None:
    HOSTS[gemma4_vit.Gemma4VitEncoder] = replace(
        VIT, name="timm Gemma4VitEncoder", loop="forward", qkv=_gemma_qkv, out=_gemma_out, mlp=_gemma_mlp,
        mlp_ratio=_gemma_ratio, problems=_gemma_problems,
        rotary=Rotary(("rope_cos", "rope_sin"), _gemma_table, _gemma_rotate), **_TOWER,
    )  # fmt: skip
