"""Every kind of host once: `test_hosts.py` tests all behaviours on each, and docs/hosts.md lists them.

For a new host, add a `Case` to `CASES`; `python tools/host_table.py` then writes its row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from helpers import TINY, liven, random_images


def no_checkpointing(model: Any) -> None:
    """For hosts without gradient checkpointing."""


def timm_checkpointing(model: Any) -> None:
    model.set_grad_checkpointing()


def first_images(model: Any) -> tuple[Any, ...]:
    return (random_images(3),)


def itself(output: Tensor) -> Tensor:
    return output


@dataclass(frozen=True)
class Case:
    """A tiny host and how to call it; nothing here may need a network.

    Attributes:
        library: name of its package on PyPI.
        host: name of the class whose blocks are reduced.
        what: the kind of host and names of such models, as the table shows them.
        build: () -> the model in eval mode, with 2 or 3 blocks and weights from `helpers.liven`, the same in each call.
        inputs: model -> its arguments: a tuple of positional ones, or a dictionary of keywords.
        output: the model's output -> one tensor [B, ...] to compare.
        checkpointing: turns gradient checkpointing on, if the host supports it.
        tokens: number of tokens that enter the first block.
        refused: part of the error message if it cannot be attached; "" if it can.
        reason: why it cannot be attached, as the table shows it.
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
    reason: str = ""

    def call(self, model: Any) -> Tensor:
        """The output for the case's own inputs, [B, ...]."""
        inputs = self.inputs(model)
        return self.output(model(**inputs) if isinstance(inputs, dict) else model(*inputs))


def tiny(cls: Callable[..., nn.Module], **kwargs: Any) -> Any:
    """A tiny model of a class with timm's argument names, with heads of 16 channels."""
    parameters = inspect.signature(cls).parameters
    unknown = [name for name in kwargs if name not in parameters and "kwargs" not in parameters]
    if unknown:
        pytest.skip(f"{cls.__name__} of timm {timm.__version__} takes no {unknown[0]}")
    torch.manual_seed(0)
    return liven(cls(**{**TINY, "embed_dim": 32, **kwargs})).eval()


def timm_case(
    cls: type[nn.Module], what: str, *, tokens: int = 17, refused: str = "", reason: str = "", **kwargs: Any
) -> Case:
    return Case(
        "timm", cls.__name__, what, partial(tiny, cls, **kwargs),
        checkpointing=timm_checkpointing, tokens=tokens, refused=refused, reason=reason,
    )  # fmt: skip


def naflex(**kwargs: Any) -> Any:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "pos_embed_grid_size": (4, 4)}
    if "rope_type" in kwargs and not hasattr(NaFlexVitCfg, "rope_type"):
        pytest.skip(f"NaFlexVit of timm {timm.__version__} has no rotary embeddings")
    torch.manual_seed(0)
    cfg = NaFlexVitCfg(**{**sizes, "class_token": True, "global_pool": "token", **kwargs})
    return liven(NaFlexVit(cfg, img_size=16, num_classes=5)).eval()


def torchvision_vit(**kwargs: Any) -> Any:
    from torchvision.models.vision_transformer import VisionTransformer

    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    torch.manual_seed(0)
    return liven(VisionTransformer(**{**sizes, "num_classes": 5, **kwargs})).eval()


def open_clip_tower(**kwargs: Any) -> Any:
    from open_clip.transformer import VisionTransformer

    sizes = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "output_dim": 8}
    torch.manual_seed(0)
    return liven(VisionTransformer(**{**sizes, **kwargs})).eval()


def open_clip_quick_gelu() -> nn.Module:
    from open_clip.transformer import QuickGELU

    return QuickGELU()


def open_clip_model(**vision: Any) -> Any:
    """A CLIP with both towers, built by open_clip."""
    from open_clip.model import CLIP

    sizes = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 3, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return liven(CLIP(8, vision or sizes, text)).eval()


def open_clip_timm(**_: Any) -> Any:
    """A CLIP around a timm tower, as open_clip builds SigLIP."""
    from open_clip.model import CustomTextCLIP

    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none", "image_size": 224}
    torch.manual_seed(0)
    return liven(CustomTextCLIP(192, vision, text)).eval()


def images_and_text(model: Any) -> tuple[Any, ...]:
    return random_images(3, size=model.visual.image_size[0]), torch.arange(24).view(3, 8) % 20


def similarity(output: Any) -> Tensor:
    """[images, texts], cosines."""
    return output[0] @ output[1].T


ROTARY = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}

CASES: dict[str, Case] = {
    "vit": timm_case(VisionTransformer, "ViT, DeiT, DINO: `vit_*_patch16_224`, `deit_*`"),
    "vit-mean": timm_case(VisionTransformer, "mean pooled: `vit_*_gap_*`, MAE fine-tuned", global_pool="avg"),
    "vit-distilled": timm_case(VisionTransformerDistilled, "distilled DeiT: `deit_*_distilled_*`", tokens=18),
    "deit3": timm_case(VisionTransformer, "DeiT III, layer scale: `deit3_*`", no_embed_class=True, init_values=0.1),
    "dinov2": timm_case(
        VisionTransformer, "DINOv2 with registers: `vit_*_reg4_dinov2`", reg_tokens=4, no_embed_class=True,
        init_values=0.1, tokens=21,
    ),
    "dinov2-giant": timm_case(
        VisionTransformer, "DINOv2 giant, packed SwiGLU: `vit_giant_*_dinov2`", mlp_layer=SwiGLUPacked,
        act_layer="silu",
    ),
    "siglip": timm_case(
        VisionTransformer, "SigLIP tower, no class token, attention pooled: `vit_*_siglip_*`", class_token=False,
        global_pool="map", tokens=16,
    ),
    "clip": timm_case(
        VisionTransformer, "CLIP tower: `vit_*_clip_quickgelu_*`", pre_norm=True, norm_layer=LayerNorm,
        act_layer="quick_gelu",
    ),
    "aimv2": timm_case(
        VisionTransformer, "AIMv2, RMSNorm and SwiGLU: `aimv2_*`", class_token=False, global_pool="avg",
        norm_layer=RmsNorm, mlp_layer=SwiGLU, qkv_bias=False, tokens=16,
    ),
    "flexivit": timm_case(VisionTransformer, "FlexiViT: `flexivit_*`", no_embed_class=True),
    "dynamic": timm_case(VisionTransformer, "other sizes at each call: `dynamic_img_size=True`", dynamic_img_size=True),
    "vit-qk-norm": timm_case(VisionTransformer, "norms on queries and keys: `vit_*_rpn`, so150m", qk_norm=True),
    "naflex": Case(
        "timm", "NaFlexVit", "on plain images: `naflexvit_*`", naflex, checkpointing=timm_checkpointing,
    ),
    "naflex-rope": Case(
        "timm", "NaFlexVit", "with rotary embeddings", partial(naflex, rope_type="axial", global_pool="avg"),
        checkpointing=timm_checkpointing,
    ),
    "vitamin": timm_case(VisionTransformer, "ViTamin: `vitamin_*`", mlp_layer=GeGluMlp, class_token=False,
        global_pool="avg", act_layer="gelu", tokens=16),
    "vit-post-norm": timm_case(
        VisionTransformer, "post-norm blocks: `vit_*_rpn_*`", block_fn=ResPostBlock, init_values=0.5,
    ),
    "vit-parallel": timm_case(
        VisionTransformer, "parallel blocks: `vit_22b`-like", block_fn=ParallelScalingBlock,
        refused="ParallelScalingBlock, which runs attention and MLP in parallel",
        reason="attention and MLP run side by side, with no place between them",
    ),
    "eva": timm_case(Eva, "EVA, mean pooled: `eva_*`"),
    "eva02": timm_case(
        Eva, "EVA-02, rotary: `eva02_*`", use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False,
        ref_feat_shape=(8, 8),
    ),
    "eva-post-norm": timm_case(Eva, "post-norm blocks: `eva02_enormous_*`", use_post_norm=True),
    "dinov3": timm_case(
        Eva, "DINOv3: `vit_*_dinov3`", **ROTARY, rope_type="dinov3", num_reg_tokens=4, no_embed_class=True,
        rope_rotate_half=True, init_values=0.1, tokens=21,
    ),
    "gqa": timm_case(
        Eva, "fewer heads of keys than of queries: `vit_*_sapiens2`", **ROTARY, attn_type="rope", qkv_fused=False,
        num_kv_heads=1,
    ),
    "pe": timm_case(
        Eva, "Perception Encoder, attention pooled: `vit_pe_core_*`", use_rot_pos_emb=True, attn_type="rope",
        global_pool="map", use_pre_transformer_norm=True,
    ),
    "rope-axial": timm_case(Eva, "axial rotary attention: `vit_*_rope_*`", **ROTARY, attn_type="rope"),
    "rope-mixed": timm_case(
        Eva, "rotary of learned frequencies: `vit_*_rope_mixed_*`", **ROTARY, rope_type="mixed", global_pool="token"
    ),
    "torchvision": Case("torchvision", "VisionTransformer", "`vit_b_16`, `vit_l_32`, ...", torchvision_vit),
    "torchvision-dropout": Case(
        "torchvision", "VisionTransformer", "with dropout on attention",
        partial(torchvision_vit, attention_dropout=0.1),
        refused="attention dropout 0.1", reason="build the model without",
    ),
    "open-clip-tower": Case(
        "open_clip", "VisionTransformer", "visual tower: `ViT-B-32`, `ViT-L-14`, ...", open_clip_tower,
        checkpointing=timm_checkpointing,
    ),
    "open-clip-quick": Case(
        "open_clip", "VisionTransformer", "QuickGELU, layer scale: `ViT-B-32-quickgelu`",
        partial(open_clip_tower, act_layer=open_clip_quick_gelu, ls_init_value=0.1), checkpointing=timm_checkpointing,
    ),
    "open-clip-mean": Case(
        "open_clip", "VisionTransformer", "mean pooled: `ViT-L-14-CLIPA`",
        partial(open_clip_tower, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
        checkpointing=timm_checkpointing,
    ),
    "open-clip": Case(
        "open_clip", "CLIP", "whole, image-text similarity", open_clip_model, images_and_text, similarity,
        timm_checkpointing,
    ),
    "open-clip-timm": Case(
        "open_clip", "CustomTextCLIP", "around a timm tower: `ViT-B-16-SigLIP`",
        open_clip_timm, images_and_text, similarity, timm_checkpointing, tokens=197,
    ),
    "coca": Case(
        "open_clip", "VisionTransformer", "CoCa: `coca_ViT-B-32`",
        partial(open_clip_tower, attentional_pool=True, attn_pooler_heads=2, output_tokens=True),
        refused="CoCa", reason="its decoder reads tokens without knowing their sizes",
    ),
}  # fmt: skip


TINY_HF: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 64, "mlp_ratio": 2, "num_labels": 5, "num_frames": 4, "use_mean_pooling": True,
    "mask_ratio": 0.0, "projection_dim": 16,
}  # fmt: skip
TINY_TEXT: dict[str, Any] = {
    **TINY_HF, "projection_size": 32, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49,
    "bos_token_id": 48, "pad_token_id": 1,
}  # fmt: skip


def tiny_hf(cls: str, config: str, **kwargs: Any) -> Any:
    """A class of transformers with a config of this class; an image-text model has two towers inside."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {**TINY_HF, **kwargs}
    if config in ("CLIPConfig", "SiglipConfig"):
        settings = {"vision_config": settings, "text_config": TINY_TEXT, "projection_dim": 16, "num_labels": 5}
    return liven(getattr(transformers, cls)(getattr(transformers, config)(**settings))).eval()


def pixels(_model: Any) -> dict[str, Any]:
    return {"pixel_values": random_images(3)}


def pixels_in_order(_model: Any) -> dict[str, Any]:
    return {"pixel_values": random_images(3), "noise": torch.arange(16.0).expand(3, -1)}


def pixels_and_texts(_model: Any) -> dict[str, Any]:
    texts = torch.randint(3, 48, (4, 8), generator=torch.Generator().manual_seed(0))
    texts[:, -1] = 49
    return {"pixel_values": random_images(3), "input_ids": texts}


def class_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def clips(_model: Any) -> dict[str, Any]:
    return {"pixel_values": torch.stack([random_images(4, seed=seed) for seed in range(3)])}


def hf_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable()


def hf_case(
    cls: str, config: str, what: str, output: str | Callable[[Any], Tensor] = "logits", tokens: int = 17,
    inputs: Callable[[Any], Any] = pixels, refused: str = "", reason: str = "", **kwargs: Any,
) -> Case:  # fmt: skip
    return Case(
        "transformers", cls, what, partial(tiny_hf, cls, config, **kwargs), inputs,
        attrgetter(output) if isinstance(output, str) else output, hf_checkpointing, tokens, refused, reason,
    )  # fmt: skip


CASES |= {
    "hf-vit": hf_case("ViTForImageClassification", "ViTConfig", "ViT: `google/vit-*`"),
    "hf-vit-bare": hf_case("ViTModel", "ViTConfig", "ViT without a head: its class token", "pooler_output"),
    "hf-deit": hf_case("DeiTForImageClassification", "DeiTConfig", "DeiT: `facebook/deit-*`", tokens=18),
    "hf-deit-teacher": hf_case(
        "DeiTForImageClassificationWithTeacher", "DeiTConfig", "DeiT: `facebook/deit-*-distilled-*`", tokens=18
    ),
    "hf-deit-bare": hf_case("DeiTModel", "DeiTConfig", "DeiT without a head", "pooler_output", 18),
    "hf-dinov2": hf_case("Dinov2ForImageClassification", "Dinov2Config", "DINOv2: `facebook/dinov2-*-imagenet1k-*`"),
    "hf-dinov2-giant": hf_case(
        "Dinov2ForImageClassification", "Dinov2Config", "DINOv2 with SwiGLU: `facebook/dinov2-giant-*`",
        use_swiglu_ffn=True,
    ),
    "hf-dinov2-bare": hf_case("Dinov2Model", "Dinov2Config", "DINOv2: `facebook/dinov2-*`", "pooler_output"),
    "hf-dinov2-registers": hf_case(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
        "DINOv2 with registers: `facebook/dinov2-with-registers-*-imagenet1k-*`", tokens=21,
    ),
    "hf-dinov2-registers-bare": hf_case(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
        "DINOv2 with registers: `facebook/dinov2-with-registers-*`", "pooler_output", 21,
    ),
    "hf-dinov3": hf_case(
        "DINOv3ViTModel", "DINOv3ViTConfig", "DINOv3, rotary: `facebook/dinov3-vit*`", "pooler_output", 21,
        num_register_tokens=4,
    ),
    "hf-dinov3-gated": hf_case(
        "DINOv3ViTModel", "DINOv3ViTConfig", "DINOv3 with SwiGLU: `facebook/dinov3-vith16plus-*`", "pooler_output", 21,
        num_register_tokens=4, use_gated_mlp=True, hidden_act="silu",
    ),
    "hf-clip": hf_case(
        "CLIPModel", "CLIPConfig", "CLIP, image-text similarity: `openai/clip-vit-*`", "logits_per_image",
        inputs=pixels_and_texts,
    ),
    "hf-clip-vision": hf_case("CLIPVisionModel", "CLIPVisionConfig", "CLIP's vision tower", "pooler_output"),
    "hf-clip-projection": hf_case(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", "CLIP's vision tower, projected", "image_embeds"
    ),
    "hf-clip-classes": hf_case("CLIPForImageClassification", "CLIPConfig", "CLIP under a linear head, mean pooled"),
    "hf-siglip": hf_case(
        "SiglipModel", "SiglipConfig", "SigLIP, image-text similarity: `google/siglip-*`", "logits_per_image", 16,
        inputs=pixels_and_texts,
    ),
    "hf-siglip-vision": hf_case(
        "SiglipVisionModel", "SiglipVisionConfig", "SigLIP's vision tower, attention pooled", "pooler_output", 16
    ),
    "hf-siglip-classes": hf_case(
        "SiglipForImageClassification", "SiglipConfig", "SigLIP under a linear head, mean pooled", tokens=16
    ),
    "hf-vit-mae": hf_case(
        "ViTMAEModel", "ViTMAEConfig", "ViT-MAE's encoder with `mask_ratio=0`: `facebook/vit-mae-*`",
        class_token, inputs=pixels_in_order,
    ),
    "hf-videomae": hf_case(
        "VideoMAEForVideoClassification", "VideoMAEConfig", "VideoMAE, mean pooled: `MCG-NJU/videomae-*-finetuned-*`",
        tokens=32, inputs=clips,
    ),
    "hf-vit-mae-hiding": hf_case(
        "ViTMAEModel", "ViTMAEConfig", "ViT-MAE while it hides patches", mask_ratio=0.75,
        refused="mask_ratio = 0", reason="set `model.config.mask_ratio = 0`",
    ),
    "hf-vit-mae-training": hf_case(
        "ViTMAEForPreTraining", "ViTMAEConfig", "ViT-MAE with its decoder", mask_ratio=0.75,
        refused="mask_ratio = 0", reason="set `model.config.mask_ratio = 0`",
    ),
}  # fmt: skip
ATTACHED = {name: case for name, case in CASES.items() if not case.refused}
REFUSED = {name: case for name, case in CASES.items() if case.refused}
