"""Recipe for timm's EVA family: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn
from torch.nn import functional as F

from ..method.recipe import Parts, Recipe, Rotary, linear_of
from .rotary import rotary_rows, rotated
from .timm import RECIPE as VIT
from .timm import find_problems, norms_after, standard_parts


def _qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn, x = block.attn, x if norms_after(block) else block.norm1(x)
    if attn.qkv is None:
        q = attn.q_proj(x).unflatten(-1, (attn.num_heads, -1))
        k, v = (layer(x).unflatten(-1, (-1, q.shape[-1])) for layer in (attn.k_proj, attn.v_proj))
        groups = q.shape[-2] // k.shape[-2]
        if groups > 1:
            k, v = k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)
    else:
        bias = _bias(attn)
        qkv = attn.qkv(x) if bias is None else F.linear(x, attn.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


def _bias(attn: Any) -> Tensor | None:
    """The bias of q, k and v if the attention keeps it apart from their weights, as EVA does; else None."""
    if getattr(attn, "q_bias", None) is None:
        return None
    return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _out(block: Any, y: Tensor) -> Tensor:
    attn = block.attn
    y = attn.proj_drop(attn.proj(attn.norm(y)))
    return block.drop_path1(block.norm1(y) if norms_after(block) else scaled(y, getattr(block, "gamma_1", None)))


def _mlp(block: Any, x: Tensor) -> Tensor:
    if norms_after(block):
        return block.drop_path2(block.norm2(block.mlp(x)))
    return block.drop_path2(scaled(block.mlp(block.norm2(x)), getattr(block, "gamma_2", None)))


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """`x` times a layer scale, if there is one."""
    return x if gamma is None else gamma * x


def _table(host: Any, rope: Tensor, tokens: int) -> Tensor:
    """Return the sines and cosines [N, 2 D] of all tokens.

    For learned frequencies, which timm passes as [L, H, P, 2 D], [L, N, H * 2 D], or without L for a single block.
    """
    sin, cos = rope.chunk(2, -1)
    table = rotary_rows(sin, cos, tokens)
    return table.transpose(-3, -2).flatten(-2) if table.ndim > 2 else table


def _own_table(rope: Tensor | None, block: int) -> Tensor | None:
    return rope[block] if rope is not None and rope.ndim == 4 else rope


def _rotate(block: Any, q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    rows, half = rows.unflatten(-1, (-1, 2 * q.shape[-1])), getattr(block.attn, "rotate_half", False)
    return rotated(q, rows, half), rotated(k, rows, half)


def _parts(block: Any) -> Parts | None:
    attn = block.attn
    if attn.qkv is None or norms_after(block):
        return None
    bias = _bias(attn)
    qkv = attn.qkv if bias is None else linear_of(attn.qkv.weight, bias)
    return standard_parts(block, qkv, (block.gamma_1, getattr(block, "gamma_2", None)))


def _problems(host: Any) -> list[str]:
    problems = find_problems(host, Eva, (EvaBlock, EvaBlockPostNorm), (EvaAttention, AttentionRope))
    if host.patch_drop is not None:
        problems.append("it drops patches and their rotary embeddings in training: build it with patch_drop_rate=0")
    return problems


def _overrides(body: Any) -> dict[str, Any]:
    # with rope_mixed off, the host passes the embeddings of all blocks to each, which `_own_table` picks from
    mixed = {"rope_mixed": False} if getattr(body.host, "rope_mixed", False) else {}
    return {**VIT.overrides(body), **mixed}


RECIPE = replace(
    VIT, name="timm Eva", qkv=_qkv, out=_out, mlp=_mlp, parts=_parts, problems=_problems, overrides=_overrides,
    rotary=Rotary(("rope",), _table, _rotate, _own_table),
)  # fmt: skip

HOSTS: dict[type[nn.Module], Recipe | str] = {Eva: RECIPE}
