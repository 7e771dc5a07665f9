"""Recipe for open_clip's own visual towers; towers that it takes from timm attach as timm's hosts."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import LayerScale, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from ..engines.body import Body, running_body
from ..errors import LTMPError
from ..method.recipe import Parts, Recipe, describe_timm, linear_ratio, scales_of
from . import mha
from .pooling import sized_mean, without_prefix
from .sizes import sizes_of


def _qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return mha.qkv(block.attn, block.ln_1(x))


def _out(block: Any, y: Tensor) -> Tensor:
    return block.ls_1(block.attn.out_proj(y))


def _mlp(block: Any, x: Tensor) -> Tensor:
    return block.ls_2(block.mlp(block.ln_2(x)))


def _attention(block: Any) -> tuple[nn.Module, ...]:
    return (block.attn,)


def _parts(block: Any) -> Parts | None:
    scales = scales_of((block.ls_1, block.ls_2), LayerScale)
    if scales is None or list(block.mlp._modules) != ["c_fc", "gelu", "c_proj"]:
        return None
    return mha.parts(block, block.attn, block.mlp.c_fc, block.mlp.gelu, block.mlp.c_proj, scales)


def _problems(host: Any) -> list[str]:
    for i, block in host.transformer.resblocks.named_children():
        problems = mha.problems(f"resblocks.{i}", block, ResidualAttentionBlock, block.attn)
        if problems:
            return problems
    problems = []
    if host.attn_pool is not None:
        problems.append("it pools by attention for a captioning decoder (CoCa), which does not support token sizes")
    if host.output_tokens or host.pool_type == "none":
        problems.append(_RETURNS_TOKENS)
    return problems


def _mlp_ratio(block: Any) -> float:
    return linear_ratio(block.mlp, block.attn.embed_dim)


_RETURNS_TOKENS = "it returns every token, and a reduced image has fewer of them: set output_tokens=False"


class SizedGlobalPool:
    """open_clip's pooling, with merged tokens weighted by size; replaces `host._global_pool`."""

    def __init__(self, body: Body) -> None:
        self.body = body

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        host: Any = self.body.host
        body = running_body(self.body)
        if host.output_tokens and body.reduces() and not body.grid:
            raise LTMPError(f"{_RETURNS_TOKENS}, or call it inside `with ltmp.dense():`")
        size = sizes_of(x, self.body) if host.pool_type == "avg" else None
        if size is None:
            return type(host)._global_pool(host, x)
        return sized_mean(x, without_prefix(size, 1)), x[:, 1:]


def _overrides(body: Any) -> dict[str, Any]:
    return {"_global_pool": SizedGlobalPool(body)}


def _final_norm(host: Any) -> nn.Module | None:
    return None if host.final_ln_after_pool else host.ln_post


def _prefix_only(host: Any) -> bool:
    return host.pool_type == "tok"


def _grad_checkpointing(host: Any) -> bool:
    return bool(host.transformer.grad_checkpointing)


def _describe(host: Any) -> dict[str, Any]:
    return {**describe_timm(host), "width": host.transformer.width, "input_size": list(host.image_size)}


RECIPE = Recipe(
    "open_clip VisionTransformer", "transformer.resblocks", _qkv, _out, _mlp, _attention, _parts, _problems, _mlp_ratio,
    overrides=_overrides, final_norm=_final_norm, prefix_only=_prefix_only, grad_checkpointing=_grad_checkpointing,
    describe=_describe,
)  # fmt: skip

HOSTS: dict[type[nn.Module], Recipe] = {VisionTransformer: RECIPE}
