"""Recipe for open_clip's own visual towers; those that it takes from timm are timm's hosts."""

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
    blocks = host.transformer.resblocks.named_children()
    found = [
        p for i, block in blocks for p in mha.problems(f"resblocks.{i}", block, ResidualAttentionBlock, block.attn)
    ]
    if host.attn_pool is not None:
        found.append("it pools by attention for a captioning decoder (CoCa), which knows no sizes")
    if host.output_tokens or host.pool_type == "none":
        found.append(_HANDS_OUT)
    return found[:1] if found and found[0].startswith("resblocks") else found


def _mlp_ratio(block: Any) -> float:
    return linear_ratio(block.mlp, block.attn.embed_dim)


_HANDS_OUT = "it hands out every token, and a reduced image has fewer of them: set output_tokens=False"


class SizedGlobalPool:
    """open_clip's pooling, a merged token counting by its size. Stands in for `host._global_pool`."""

    def __init__(self, body: Body) -> None:
        self.body = body

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        host: Any = self.body.host
        body = running_body(self.body)
        if host.output_tokens and body.reduces() and not body.grid:
            raise LTMPError(f"{_HANDS_OUT}, or call it inside `with ltmp.dense():`")
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
