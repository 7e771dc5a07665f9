"""Recipe for timm's VisionTransformer, and helpers that recipes of its relatives share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention, AttentionPoolLatent, GluMlp, Mlp, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import Block, LayerScale, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from ..engines.body import Body
from ..method.recipe import Parts, Recipe, activation_name, has_own_scale, linear_ratio, scales_of
from .pooling import log_size, sized_mean, without_prefix
from .sizes import sizes_of

# children of blocks, and of their attention, in the ViT and the EVA family
_BLOCK_PARTS = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
_ATTENTION_PARTS = {
    "qkv",
    "q_proj",
    "k_proj",
    "v_proj",
    "q_norm",
    "k_norm",
    "attn_drop",
    "norm",
    "proj",
    "proj_drop",
    "rel_pos",
}
_MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)
_POST_NORM = (ResPostBlock, EvaBlockPostNorm, ResPostRelPosBlock)
_PARALLEL = "runs attention and MLP in parallel, with no point between them at which tokens could be removed"
_UNSUPPORTED = {
    "ParallelScalingBlock": _PARALLEL,
    "DiffParallelScalingBlock": _PARALLEL,
    "ParallelThingsBlock": "runs several attentions in parallel, each with its own similarities and importance",
    "DiffAttention": "subtracts two attention maps, so that the attention that a token receives is not its importance",
}
"""Why tokens cannot be reduced in some classes of timm, by name, since not every version has them all."""


def norms_after(block: nn.Module) -> bool:
    """Whether the norms of a block follow its branches (post-norm: Liu et al., CVPR 2022) rather than precede them."""
    return isinstance(block, _POST_NORM)


def _qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attn, x = block.attn, x if norms_after(block) else block.norm1(x)
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


def _out(block: Any, y: Tensor) -> Tensor:
    attn = block.attn
    y = attn.norm(y) if hasattr(attn, "norm") else y
    y = attn.proj_drop(attn.proj(y))
    return block.drop_path1(block.norm1(y) if norms_after(block) else block.ls1(y))


def _mlp(block: Any, x: Tensor) -> Tensor:
    return block.drop_path2(block.norm2(block.mlp(x)) if norms_after(block) else block.ls2(block.mlp(block.norm2(x))))


def _attention(block: Any) -> tuple[nn.Module, ...]:
    return (block.attn, block.attn.attn_drop)


def _parts(block: Any) -> Parts | None:
    if norms_after(block):
        return None
    scales = scales_of((block.ls1, block.ls2), LayerScale)
    return None if scales is None else standard_parts(block, block.attn.qkv, scales)


def standard_parts(block: Any, qkv: nn.Linear, scales: Sequence[Tensor | None]) -> Parts | None:
    """The weights of a timm block with these layer scales, or None if one of its parts is not a standard one."""
    attn, mlp = block.attn, block.mlp
    standard = (
        isinstance(block.norm1, nn.LayerNorm)
        and isinstance(block.norm2, nn.LayerNorm)
        and isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity)
        and type(mlp) is Mlp
        and isinstance(mlp.norm, nn.Identity)
        and isinstance(mlp.fc1, nn.Linear)
    )
    act = activation_name(mlp.act) if standard else None
    if act is None:
        return None
    return Parts(
        block.norm1, (qkv,), attn.num_heads, attn.q_norm, attn.k_norm, attn.proj, scales[0],
        block.norm2, mlp.fc1, act, mlp.fc2, scales[1],
    )  # fmt: skip


def _mlp_ratio(block: Any) -> float:
    return linear_ratio(block.mlp, block.attn.proj.out_features)


def _protected(host: Any) -> int:
    return int(host.num_prefix_tokens)


def _class_first(host: Any) -> bool:
    return host.cls_token is not None


def _problems(host: Any) -> list[str]:
    return find_problems(host, VisionTransformer, (Block, ResPostBlock), (Attention,))


def find_problems(
    host: Any, base: type[nn.Module], blocks: tuple[type, ...], attentions: tuple[type, ...], method: str = "pool"
) -> list[str]:
    """Return the reasons why a host cannot be reduced, one phrase each.

    Args:
        base: timm's class of the host, whose forward the recipe describes.
        blocks, attentions: supported classes of its blocks and of their attention.
        method: name of the host's pooling method.
    """
    problems = []
    methods = ("forward", "forward_features", method)
    overridden = [name for name in methods if getattr(type(host), name) is not getattr(base, name)]
    if overridden:
        problems.append(f"{type(host).__name__} has its own {', '.join(overridden)}")
    problems += first_block_problem(host, blocks, attentions)
    pool = host.attn_pool
    if host.global_pool == "map" and not (isinstance(pool, AttentionPoolLatent) and pool.pos_embed is None):
        problems.append(f"its attention pooling is a {type(pool).__name__} that needs every patch in its place")
    return problems


def first_block_problem(host: Any, blocks: tuple[type, ...], attentions: tuple[type, ...]) -> list[str]:
    """Return why the first unsupported block of a host cannot be reduced; empty if all blocks can."""
    for i, block in enumerate(host.blocks):
        problem = _block_problem(block, blocks, attentions)
        if problem is not None:
            return [f"blocks.{i} {problem}"]
    return []


def _block_problem(block: Any, blocks: tuple[type, ...], attentions: tuple[type, ...]) -> str | None:
    """Return why the recipe does not describe this block, or None if it does."""
    if type(block) not in blocks:
        return _unsupported("is", block, blocks[0])
    extra = sorted(set(dict(block.named_children())) - _BLOCK_PARTS)
    if extra:
        return f"has parts that this version of ltmp does not support: {', '.join(extra)}"
    attn = block.attn
    if any(part._forward_hooks or part._forward_pre_hooks for part in (block, attn)):
        return "has forward hooks, which would no longer run: remove them"
    if type(attn) not in attentions:
        return _unsupported("uses", attn, attentions[0])
    extra = sorted(set(dict(attn.named_children())) - _ATTENTION_PARTS)
    if extra:
        return f"has an attention with parts that this version of ltmp does not support: {', '.join(extra)}"
    if attn.attn_drop.p > 0:
        return f"has attention dropout {attn.attn_drop.p}; build the model with attn_drop_rate=0"
    if not attn.fused_attn and has_own_scale(attn, attn.head_dim):
        return f"scales its attention by {attn.scale} instead of 1 / sqrt({attn.head_dim})"
    if not isinstance(block.mlp, _MLPS):
        return f"has a {type(block.mlp).__name__}, which is not known to treat each token by itself"
    return None


def _unsupported(verb: str, part: nn.Module, standard: type) -> str:
    name = type(part).__name__
    why = f", which {_UNSUPPORTED[name]}" if name in _UNSUPPORTED else f", not timm's standard {standard.__name__}"
    return f"{verb} {name}{why}"


def _final_norm(host: Any) -> nn.Module:
    return host.norm


def _prefix_only(host: Any) -> bool:
    return host.global_pool == "token"


_POOLS = ("token", "avg", "max", "avgmax", "map")


class SizedPool:
    """timm's pooling over the tokens that are left, merged ones weighted by size; replaces the host's `method`."""

    def __init__(self, body: Body, method: str = "pool") -> None:
        self.body, self.method = body, method

    def __call__(self, x: Tensor, pool_type: str | None = None, **kwargs: Any) -> Tensor:
        host: Any = self.body.host
        kind = host.global_pool if pool_type is None else pool_type
        size = None if kind == "token" and host.attn_pool is None else sizes_of(x, self.body)
        if size is None:
            return getattr(type(host), self.method)(host, x, pool_type, **kwargs)
        if kind not in _POOLS:
            raise NotImplementedError(
                f"global_pool={kind!r} needs every token, and a reduced image has fewer: call the model inside "
                "`with ltmp.unmerge():`, which gives every patch the features of its token"
            )
        if not getattr(host, "pool_include_prefix", host.attn_pool is not None):
            size = without_prefix(size, host.num_prefix_tokens)
        if host.attn_pool is not None:
            return host.attn_pool(x, attn_mask=log_size(size).to(x.dtype)[:, None, None, :])
        mean = sized_mean(x, size)
        maximum = x.masked_fill((size == 0)[..., None], float("-inf")).amax(1)
        return {"avg": mean, "max": maximum, "avgmax": 0.5 * (mean + maximum)}[kind]


def _overrides(body: Any) -> dict[str, Any]:
    # unconditionally, since reset_classifier may change the pooling later
    return {"pool": SizedPool(body)}


RECIPE = Recipe(
    "timm VisionTransformer", "blocks", _qkv, _out, _mlp, _attention, _parts, _problems, _mlp_ratio, _protected,
    _class_first, loop="forward_features", overrides=_overrides, final_norm=_final_norm, prefix_only=_prefix_only,
)  # fmt: skip

HOSTS: dict[type[nn.Module], Recipe] = {VisionTransformer: RECIPE, VisionTransformerDistilled: RECIPE}
