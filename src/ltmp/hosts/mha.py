"""Shared by torchvision's and open_clip's recipes: blocks around `torch.nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..method.recipe import Parts, activation_name, linear_of


def qkv(attn: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each [..., H, D], of the normed x [..., C]."""
    stacked = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = stacked.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
    return q, k, v


def parts(
    block: Any, attn: nn.MultiheadAttention, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear,
    scales: Sequence[Tensor | None] = (None, None),
) -> Parts | None:  # fmt: skip
    """The weights of a block with the norms `ln_1` and `ln_2`, or None if one of its parts is not a standard one."""
    name, identity = activation_name(act), nn.Identity()
    norms = (block.ln_1, block.ln_2)
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or type(fc1) is not nn.Linear:
        return None
    if name is None or any(norm.weight is None or norm.weight.dtype != fc1.weight.dtype for norm in norms):
        return None
    return Parts(
        norms[0], (linear_of(attn.in_proj_weight, attn.in_proj_bias),), attn.num_heads, identity, identity,
        attn.out_proj,
        scales[0], norms[1], fc1, name, fc2, scales[1],
    )  # fmt: skip


def problems(name: str, block: Any, block_class: type[Any], attn: nn.Module) -> list[str]:
    """Return why the block called `name` cannot be reduced, at most one phrase."""
    if type(block) is not block_class:
        return [f"{name} is a {type(block).__name__}, not the standard {block_class.__name__}"]
    if type(attn) is not nn.MultiheadAttention or attn.in_proj_weight is None or attn.bias_k is not None:
        return [f"{name} has an attention that is not torch's plain MultiheadAttention"]
    if any(part._forward_hooks or part._forward_pre_hooks for part in (block, attn)):
        return [f"{name} has forward hooks, which would no longer run: remove them"]
    if not attn.batch_first:
        return [f"{name} has the sequence before the batch dimension: build the model with batch_first=True"]
    if attn.dropout > 0:
        return [f"{name} has attention dropout {attn.dropout}: build the model without"]
    return []
