"""Recipes for timm's hosts that need each token in its place: BEiT, relative positions, towers of language models."""

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

from ..method.recipe import Bias, Recipe, Rotary, linear_ratio, no_pooling, set_nothing
from .eva import RECIPE as EVA
from .eva import scaled
from .relative import pairs
from .timm import RECIPE as VIT
from .timm import first_block_problem


def _import_model(name: str) -> Any:
    """Import a module of `timm.models`; None if the installed version does not have it yet."""
    try:
        return import_module(f"timm.models.{name}")
    except ImportError:
        return None


deepseek_vit, gemma4_vit, qwen3_vit = map(_import_model, ("deepseek_vit", "gemma4_vit", "qwen3_vit"))


def _class_first(host: Any) -> bool:
    return getattr(host, "cls_token", None) is not None


def _no_class_token(_host: nn.Module) -> bool:
    return False


def _refuses_nothing(_value: Any) -> bool:
    """Accept every argument: they are biases, or padding masks, which images of one size do not have."""
    return False


def _bias(
    shared: str, own: Callable[[Any], Tensor | None], host: Any, block: int, named: Mapping[str, Any]
) -> Bias | None:
    """The relative position bias of a block: of its own table plus the one that all blocks share.

    Args:
        shared: argument by which the host passes the shared one.
        own: attention -> the bias of its own table, if it has one.
    """
    tables = [table for table in (own(host.blocks[block].attn), named.get(shared)) if table is not None]
    return pairs(torch.stack(tables).sum(0)) if tables else None


def _beit_table(attn: Any) -> Tensor | None:
    return None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()


def _relpos_table(attn: Any) -> Tensor | None:
    return None if attn.rel_pos is None else attn.rel_pos.get_bias()


def _beit_qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn = block.attn
    qkv = attn.qkv(block.norm1(x))
    if attn.q_bias is not None:
        qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
    return q, k, v


def _beit_out(block: Any, y: Tensor) -> Tensor:
    return block.drop_path1(scaled(block.attn.proj_drop(block.attn.proj(y)), block.gamma_1))


def _no_parts(_block: nn.Module) -> None:
    """Fused engines do not support an attention bias."""


_GRID: dict[str, Any] = {
    "forms": ("grid",), "parts": _no_parts, "overrides": set_nothing, "final_norm": no_pooling,
    "refuses": _refuses_nothing, "class_first": _class_first,
}  # fmt: skip
HOSTS: dict[type[nn.Module], Recipe | str] = {
    beit.Beit: replace(
        VIT, name="timm Beit", qkv=_beit_qkv, out=_beit_out, mlp=EVA.mlp,
        problems=partial(first_block_problem, blocks=(beit.Block,), attentions=(beit.Attention,)),
        bias=partial(_bias, "shared_rel_pos_bias", _beit_table), **_GRID,
    ),
    relpos.VisionTransformerRelPos: replace(
        VIT, name="timm VisionTransformerRelPos",
        problems=partial(
            first_block_problem, blocks=(relpos.RelPosBlock, relpos.ResPostRelPosBlock),
            attentions=(relpos.RelPosAttention,),
        ),
        bias=partial(_bias, "shared_rel_pos", _relpos_table), **_GRID,
    ),
}  # fmt: skip


def _gemma_qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn, x = block.attn, block.norm1(x)
    q, k, v = (layer(x).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    # engines divide scores by sqrt(D) and Gemma does not: cancel the division
    q, k, v = attn.q_norm(q) * attn.head_dim**0.5, attn.k_norm(k), attn.v_norm(v)
    return q, k.repeat_interleave(attn.num_kv_groups, -2), v.repeat_interleave(attn.num_kv_groups, -2)


def _gemma_out(block: Any, y: Tensor) -> Tensor:
    return block.drop_path(block.norm2(block.attn.proj_drop(block.attn.o_proj(y))))


def _gemma_mlp(block: Any, x: Tensor) -> Tensor:
    return block.drop_path(block.norm4(block.mlp(block.norm3(x))))


def _gemma_ratio(block: Any) -> float:
    return linear_ratio(block.mlp, len(block.norm1.weight))


def _gemma_table(_host: nn.Module, embeddings: tuple[Tensor, Tensor], _tokens: int) -> Tensor:
    """Cosines and sines [N, 2 D] of images of one size."""
    cos, sin = embeddings
    return torch.cat([cos[0], sin[0]], -1)


def _gemma_rotate(_block: nn.Module, q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rows.chunk(2, -1)
    rotate = partial(gemma4_vit.apply_multidimensional_rope, ndim=2, unsqueeze_dim=q.ndim - 2)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _gemma_problems(host: Any) -> list[str]:
    problems = []
    others = [type(block).__name__ for block in host.blocks if type(block) is not gemma4_vit.Gemma4Block]
    if others:
        problems.append(f"it has a {others[0]}")
    if any(block.attn.attn_drop.p > 0 for block in host.blocks if hasattr(block, "attn")):
        problems.append("it has attention dropout")
    return problems


_TOWER: dict[str, Any] = {**_GRID, "class_first": _no_class_token, "prefix_only": _no_class_token}

if qwen3_vit is not None:
    HOSTS[qwen3_vit.Qwen3VitEncoder] = replace(
        EVA, name="timm Qwen3VitEncoder", loop="forward",
        problems=partial(
            first_block_problem, blocks=(eva.EvaBlock,), attentions=(eva.EvaAttention, AttentionRope)
        ), **_TOWER,
    )  # fmt: skip
if deepseek_vit is not None:
    HOSTS[deepseek_vit.DeepseekVitEncoder] = replace(
        EVA, name="timm DeepseekVitEncoder", loop="forward",
        problems=partial(
            first_block_problem, blocks=(deepseek_vit.DeepseekVitBlock,), attentions=(AttentionRope, Attention)
        ), **_TOWER,
    )  # fmt: skip
if gemma4_vit is not None:
    HOSTS[gemma4_vit.Gemma4VitEncoder] = replace(
        VIT, name="timm Gemma4VitEncoder", loop="forward", qkv=_gemma_qkv, out=_gemma_out, mlp=_gemma_mlp,
        mlp_ratio=_gemma_ratio, problems=_gemma_problems,
        rotary=Rotary(("rope_cos", "rope_sin"), _gemma_table, _gemma_rotate), **_TOWER,
    )  # fmt: skip
