"""Every kind of host, once: what `test_hosts.py` runs through all behaviours and what docs/hosts.md lists.

A new host is a `Case` in `CASES`; `python tools/host_table.py` then writes its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from helpers import TINY, liven, random_images


def no_checkpointing(model: Any) -> None:
    """For hosts that cannot recompute their blocks."""


def timm_checkpointing(model: Any) -> None:
    model.set_grad_checkpointing()


def first_images(model: Any) -> tuple[Any, ...]:
    return (random_images(3),)


def itself(output: Tensor) -> Tensor:
    return output


@dataclass(frozen=True)
class Case:
    """A tiny host and how to call it. No field may need a network.

    Attributes:
        library: what it comes from, as pip knows it.
        host: the class whose blocks are replaced.
        what: this kind of it, and names of models that are of this kind, as the table shows them.
        build: () -> the model in eval mode, 2 or 3 blocks, lively weights (`helpers.liven`), the same at each call.
        inputs: model -> what to call it with: positional arguments, or a dict of keywords.
        output: what the model returns -> one tensor [B, ...] to compare.
        checkpointing: switches gradient checkpointing on, where the host has it.
        tokens: that enter the first block.
        refused: part of the reason why it cannot be attached; "" where it can.
    """

    library: str
    host: str
    what: str
    build: Callable[[], Any]
    inputs: Callable[[Any], tuple[Any, ...] | dict[str, Any]] = first_images
    output: Callable[[Any], Tensor] = itself
    checkpointing: Callable[[Any], None] = no_checkpointing
    tokens: int = 17
    refused: str = ""

    def call(self, model: Any) -> Tensor:
        """The output for the case's own inputs, [B, ...]."""
        inputs = self.inputs(model)
        return self.output(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


def tiny(cls: Callable[..., nn.Module], **kwargs: Any) -> Any:
    """A class that takes timm's names for sizes, with heads of 16 channels."""
    torch.manual_seed(0)
    return liven(cls(**{**TINY, "embed_dim": 32, **kwargs})).eval()


def timm_case(cls: type[nn.Module], what: str, *, tokens: int = 17, refused: str = "", **kwargs: Any) -> Case:
    return Case(
        "timm", cls.__name__, what, partial(tiny, cls, **kwargs),
        checkpointing=timm_checkpointing, tokens=tokens, refused=refused,
    )  # fmt: skip


ROTARY = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}

CASES: dict[str, Case] = {
    "vit": timm_case(VisionTransformer, "ViT, DeiT: `vit_*_patch16_224`, `deit_*`"),
    "vit-distilled": timm_case(
        VisionTransformerDistilled, "distilled DeiT: `deit_*_distilled_*`", tokens=18
    ),
    "vit-post-norm": timm_case(
        VisionTransformer, "post-norm blocks", block_fn=ResPostBlock, init_values=1e-5, refused="ResPostBlock"
    ),
    "eva": timm_case(Eva, "EVA, mean pooled: `eva_*`"),
    "eva02": timm_case(
        Eva, "EVA-02, rotary: `eva02_*`", use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False,
        ref_feat_shape=(8, 8),
    ),
    "dinov3": timm_case(
        Eva, "DINOv3: `vit_*_dinov3`", **ROTARY, rope_type="dinov3", num_reg_tokens=4, no_embed_class=True,
        rope_rotate_half=True, init_values=0.1, tokens=21,
    ),
    "rope-axial": timm_case(Eva, "axial rotary attention: `vit_*_rope_*`", **ROTARY, attn_type="rope"),
    "rope-mixed": timm_case(
        Eva, "rotary of learned frequencies: `vit_*_rope_mixed_*`", **ROTARY, rope_type="mixed", global_pool="token"
    ),
}  # fmt: skip
ATTACHED = {name: case for name, case in CASES.items() if not case.refused}
REFUSED = {name: case for name, case in CASES.items() if case.refused}
