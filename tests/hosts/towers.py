"""Every model of transformers that reads the tokens of a vision tower in place: tiny, random, and how to call it.

For a new tower, add a `Read` to `READERS`; `python tools/host_table.py` then writes its row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import liven, random_images

IMAGE, VIDEO, START = 59, 58, 57
"""Tokens of the text that stand for patches."""

VISION: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 64, "num_channels": 3, "projection_dim": 16,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLM = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4, "partial_rotary_factor": 1.0}
SEVERAL = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
DENSE = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8}
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "num_hidden_layers": 4}
QWEN = {"depth": 3, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "in_channels": 3, "temporal_patch_size": 2}


def config(name: str, /, **settings: Any) -> Any:
    return getattr(pytest.importorskip("transformers"), name)(**settings)


def vlm(name: str, vision: Any, llm: Any, **settings: Any) -> Any:
    """A vision-language model's config, with both names that the token of images has."""
    return config(
        name, vision_config=vision, text_config=llm, image_token_index=IMAGE, image_token_id=IMAGE, **settings
    )


def llava(name: str, **settings: Any) -> Any:
    return vlm(name, config("CLIPVisionConfig", **VISION), config("LlamaConfig", **LLM), **settings)


def over_siglip(name: str, llm: str, **settings: Any) -> Any:
    vision = config("SiglipVisionConfig", **VISION, vision_use_head=False)
    return vlm(name, vision, config(llm, **LLM), **settings)


def qwen(name: str, **vision: Any) -> Any:
    settings = {"video_token_id": VIDEO, "vision_start_token_id": START, "image_start_token_id": START}
    return vlm(name, {**QWEN, **vision}, {**LLM, "rope_parameters": ROPE}, **settings)


def two_towers(name: str, **settings: Any) -> Any:
    text = {**TEXT, "project_dim": 16, "hidden_size": 16 if name.startswith("Owl") else 32}
    return config(name, vision_config=VISION, text_config=text, projection_dim=16, **settings)


def over_backbone(name: str, backbone: str, **settings: Any) -> Any:
    vision = {**VISION, **STAGES, "mlp_ratio": 2, "reshape_hidden_states": False, "use_relative_position_bias": True}
    return config(name, backbone_config=config(backbone, **vision), **DENSE, **settings)


def images(count: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    return random_images(count, size=size, seed=seed)


def ids(count: int, placeholders: int) -> Tensor:
    """[count, S]: a word, what stands for an image, two words."""
    words = torch.randint(3, 50, (count, 3), generator=torch.Generator().manual_seed(1))
    return torch.cat([words[:, :1], torch.full((count, placeholders), IMAGE), words[:, 1:]], 1)


def words() -> dict[str, Any]:
    return {"pixel_values": images(), "input_ids": torch.randint(3, 48, (2, 6), generator=_seeded())}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pixels() -> dict[str, Any]:
    return {"pixel_values": images()}


def asking(placeholders: int = 16) -> dict[str, Any]:
    return {"pixel_values": images(), "input_ids": ids(2, placeholders)}


def tiles(placeholders: int) -> dict[str, Any]:
    """Two wide pictures of a whole and two tiles each."""
    found = torch.stack([images(3), images(3).flip(0)])
    return {"pixel_values": found, "image_sizes": torch.tensor([[16, 32]] * 2), "input_ids": ids(2, placeholders)}


def typed() -> dict[str, Any]:
    return {**asking(4), "token_type_ids": (ids(2, 4) == IMAGE).long()}


def one_each() -> dict[str, Any]:
    return {"pixel_values": images()[:, None], "input_ids": ids(2, 4)}


def patches(*grids: tuple[int, int]) -> dict[str, Any]:
    """Pictures of several sizes as Qwen's processor cuts them up, in one text."""
    rows, text = [], [START]
    for seed, (high, wide) in enumerate(grids):
        picture = nn.functional.interpolate(images(1, seed=seed), (high * 4, wide * 4))[0]
        cut = torch.stack([picture] * 2).view(2, 3, high // 2, 2, 4, wide // 2, 2, 4)
        rows.append(cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(high * wide, -1))
        text += [*[IMAGE] * (high * wide // 4), 7, START]
    text = torch.tensor([[*text[:-1], 8]])
    grid = torch.tensor([[1, *grid] for grid in grids])
    return {
        "pixel_values": torch.cat(rows), "image_grid_thw": grid, "input_ids": text,
        "mm_token_type_ids": (text == IMAGE).long(),
    }  # fmt: skip


def batched_patches() -> dict[str, Any]:
    """As ColQwen's processor has them: padded to the longest, a text each."""
    one, two = patches((4, 4)), patches((4, 8))
    second = two["pixel_values"].roll(1, 0)
    rows = torch.stack([nn.functional.pad(one["pixel_values"], (0, 0, 0, 16)), second])
    text = torch.stack([nn.functional.pad(one["input_ids"][0], (4, 0)), two["input_ids"][0]])
    grid = torch.cat([one["image_grid_thw"], two["image_grid_thw"]])
    mask = (text != 0).long()
    return {"pixel_values": rows, "image_grid_thw": grid, "input_ids": text, "attention_mask": mask}


def two_sizes() -> dict[str, Any]:
    text = torch.tensor([[5, *[IMAGE] * 6, 6, 7]])
    return {"pixel_values": images(), "image_sizes": torch.tensor([[16, 16], [16, 8]]), "input_ids": text}


def padded_patches() -> dict[str, Any]:
    there = torch.tensor([[1] * 16, [1] * 12 + [0] * 4])
    rows = torch.randn(2, 16, 48, generator=_seeded()) * there[..., None]
    return {"pixel_values": rows, "pixel_attention_mask": there, "spatial_shapes": torch.tensor([[4, 4], [3, 4]])}


def kosmos() -> dict[str, Any]:
    return {**words(), "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 1, 0]] * 2)}


def boxes() -> dict[str, Any]:
    return {"pixel_values": images(), "input_ids": torch.randint(3, 48, (2, 6), generator=_seeded())}


def clips(name: str = "pixel_values") -> dict[str, Any]:
    return {name: torch.stack([images(4, seed=seed) for seed in range(2)])}


def square(size: int = 64) -> dict[str, Any]:
    return {"x": images(size=size)}


def outputs(found: Any) -> list[Tensor]:
    """All tensors of numbers in what a model returned, caches left out."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    if isinstance(found, dict):
        found = [value for name, value in found.items() if name not in ("past_key_values", "cache")]
    return [t for value in found for t in outputs(value)] if isinstance(found, list | tuple) else []


def timm_model(name: str, **settings: Any) -> Any:
    import timm

    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return timm.create_model(name, **{"depth": 3, "num_heads": 2, "embed_dim": 32, **settings})


@dataclass(frozen=True)
class Read:
    """A model that reads a tower's tokens.

    Attributes:
        model: name of its class.
        config: () -> its config, or the model itself if it is one of timm.
        inputs: () -> its keyword arguments.
        kind: the table that it belongs to; "timm" for models of timm.
        note: a remark in the table.
        refused: part of the error message if it cannot be attached; "" if it can.
        tokens: the default form of the tower's tokens, see `config.FORMS`.
    """

    model: str
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]] = pixels
    kind: str = "vision-language"
    note: str = ""
    refused: str = ""
    tokens: str = "grid"

    def build(self) -> Any:
        torch.manual_seed(0)
        model = self.config()
        if self.kind != "timm":
            model = getattr(pytest.importorskip("transformers"), self.model)(model)
        liven(model)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # convolutions and language models would amplify livened weights
                if weight.ndim == 4:
                    weight.mul_((0.5 if "metric" in name else 1) * (weight.shape[-1] / weight[0].numel()) ** 0.5)
                elif weight.ndim == 2 and any(part in name for part in ("language_model", "decoder", "metric_head")):
                    weight.mul_(0.5)
                if name.startswith("head") and name.endswith("bias"):
                    weight.abs_().add_(30)  # depth is not negative, and all of it would be 0
        return model.eval()


READERS: list[Read] = [
    Read("LlavaForConditionalGeneration", partial(llava, "LlavaConfig"), asking),
    Read("VipLlavaForConditionalGeneration", partial(llava, "VipLlavaConfig", vision_feature_layers=[-2, -1]), asking),
    Read("LlavaNextForConditionalGeneration", partial(llava, "LlavaNextConfig", **SEVERAL), partial(tiles, 52)),
    Read(
        "LlavaOnevisionForConditionalGeneration",
        partial(over_siglip, "LlavaOnevisionConfig", "Qwen2Config", video_token_index=VIDEO, **SEVERAL),
        partial(tiles, 52),
    ),
    Read(
        "PaliGemmaForConditionalGeneration",
        partial(over_siglip, "PaliGemmaConfig", "GemmaConfig", projection_dim=32, hidden_size=32), asking,
    ),
    Read(
        "Gemma3ForConditionalGeneration",
        partial(over_siglip, "Gemma3Config", "Gemma3TextConfig", mm_tokens_per_image=4), typed,
    ),
    Read(
        "ColPaliForRetrieval",
        lambda: config("ColPaliConfig", vlm_config=READERS[4].config(), embedding_dim=8), asking,
    ),
    Read(
        "Idefics2ForConditionalGeneration",
        lambda: vlm(
            "Idefics2Config", config("Idefics2VisionConfig", **VISION), config("MistralConfig", **LLM),
            perceiver_config={"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                              "resampler_head_dim": 16, "num_key_value_heads": 2},
        ), one_each,
    ),
    Read(
        "Idefics3ForConditionalGeneration",
        lambda: vlm(
            "Idefics3Config", config("Idefics3VisionConfig", **VISION), config("LlamaConfig", **LLM), scale_factor=2
        ), one_each,
    ),
    Read(
        "SmolVLMForConditionalGeneration",
        lambda: vlm(
            "SmolVLMConfig", config("SmolVLMVisionConfig", **VISION), config("LlamaConfig", **LLM), scale_factor=2
        ), one_each,
    ),
    Read(
        "InternVLForConditionalGeneration",
        lambda: vlm(
            "InternVLConfig",
            config("InternVLVisionConfig", **{**VISION, "image_size": [16, 16], "patch_size": [4, 4]}),
            config("Qwen2Config", **LLM),
        ), partial(asking, 4),
    ),
    Read(
        "Qwen2VLForConditionalGeneration", partial(qwen, "Qwen2VLConfig", embed_dim=32, mlp_ratio=2),
        partial(patches, (4, 4), (4, 8)),
    ),
    Read(
        "ColQwen2ForRetrieval", lambda: config("ColQwen2Config", vlm_config=qwen("Qwen2VLConfig", embed_dim=32),
        embedding_dim=8), batched_patches,
    ),
    Read(
        "Qwen2_5_VLForConditionalGeneration",
        partial(
            qwen, "Qwen2_5_VLConfig", out_hidden_size=32, intermediate_size=48, depth=4, window_size=16,
            fullatt_block_indexes=[1, 3],
        ), partial(patches, (8, 8), (8, 4)),
        note="reduced in the blocks of full attention; the windows of the others are kept",
    ),
    Read(
        "Qwen3VLForConditionalGeneration",
        partial(
            qwen, "Qwen3VLConfig", out_hidden_size=32, intermediate_size=48, num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ), partial(patches, (4, 4), (4, 8)), note="DeepStack reads grids between the blocks",
    ),
    Read(
        "Glm4vForConditionalGeneration",
        partial(qwen, "Glm4vConfig", out_hidden_size=32, intermediate_size=48, image_size=16, spatial_merge_size=2),
        partial(patches, (4, 4), (4, 8)),
    ),
    Read(
        "Mistral3ForConditionalGeneration",
        lambda: vlm("Mistral3Config", config("PixtralVisionConfig", **VISION), config("MistralConfig", **LLM)),
        two_sizes,
    ),
    Read(
        "Ovis2ForConditionalGeneration",
        lambda: vlm(
            "Ovis2Config",
            {**VISION, "hidden_stride": 1, "vocab_size": 40, "num_visual_indicator_tokens": 5, "qkv_bias": True},
            config("Qwen2Config", **LLM), visual_indicator_token_ids=[50, 51, 52, 53, 54], hidden_size=32,
        ), asking,
    ),
    Read(
        "Kosmos2ForConditionalGeneration",
        lambda: config(
            "Kosmos2Config", vision_config=VISION, latent_query_num=4, text_config={
                "vocab_size": 60, "max_position_embeddings": 128, "embed_dim": 32, "layers": 2, "ffn_dim": 48,
                "attention_heads": 2,
            },
        ), kosmos,
    ),
    Read(
        "BlipForConditionalGeneration",
        lambda: config("BlipConfig", vision_config=VISION, text_config={
            **TEXT, "encoder_hidden_size": 32, "sep_token_id": 3}), words,
    ),
    Read(
        "Blip2ForConditionalGeneration",
        lambda: config(
            "Blip2Config", vision_config=VISION, num_query_tokens=4, image_token_index=IMAGE,
            qformer_config={**TEXT, "encoder_hidden_size": 32},
            text_config={**TEXT, "model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 48},
        ), partial(asking, 4),
    ),
    Read("Aimv2VisionModel", lambda: config("Aimv2VisionConfig", **VISION), kind="encoders"),
    Read("MLCDVisionModel", lambda: config("MLCDVisionConfig", **VISION), kind="encoders"),
    Read(
        "Siglip2VisionModel",
        lambda: config("Siglip2VisionConfig", **{**VISION, "num_patches": 16}), padded_patches, "encoders",
        "NaFlex: padded patches never live",
    ),
    Read("ChineseCLIPModel", partial(two_towers, "ChineseCLIPConfig"), words, "encoders"),
    Read("AltCLIPModel", partial(two_towers, "AltCLIPConfig"), words, "encoders"),
    Read("ViTMSNForImageClassification", lambda: config("ViTMSNConfig", **VISION), kind="encoders"),
    Read("IJepaForImageClassification", lambda: config("IJepaConfig", **VISION), kind="encoders"),
    Read(
        "BeitForImageClassification", lambda: config("BeitConfig", **VISION, use_relative_position_bias=True),
        kind="encoders", note="a merged token keeps the place of its receiver",
    ),
    Read(
        "Data2VecVisionForImageClassification",
        lambda: config("Data2VecVisionConfig", **VISION, use_relative_position_bias=True), kind="encoders",
    ),
    Read(
        "TimmWrapperForImageClassification",
        lambda: config(
            "TimmWrapperConfig", architecture="vit_tiny_patch16_224", num_labels=5,
            model_args={"img_size": 64, "depth": 3, "embed_dim": 48},
        ), lambda: {"pixel_values": images(size=64)}, "encoders", "any host of timm", tokens="reduced",
    ),
    Read("ViTForMaskedImageModeling", lambda: config("ViTConfig", **VISION, encoder_stride=4), kind="encoders"),
    Read(
        "Dinov2Backbone", lambda: config("Dinov2Config", **VISION, mlp_ratio=2, out_features=["stage1", "stage3"]),
        kind="dense",
    ),
    Read(
        "Dinov2WithRegistersBackbone",
        lambda: config("Dinov2WithRegistersConfig", **VISION, mlp_ratio=2, out_features=["stage1", "stage3"]),
        kind="dense",
    ),
    Read(
        "DINOv3ViTBackbone",
        lambda: config("DINOv3ViTConfig", **VISION, num_register_tokens=4, out_features=["stage1", "stage3"]),
        kind="dense",
    ),
    Read(
        "DPTForDepthEstimation",
        lambda: config("DPTConfig", **{**VISION, "num_hidden_layers": 4}, **DENSE, is_hybrid=False,
                       backbone_out_indices=[0, 1, 2, 3]), kind="dense",
    ),
    Read(
        "DepthAnythingForDepthEstimation",
        partial(over_backbone, "DepthAnythingConfig", "Dinov2Config", patch_size=4, reassemble_hidden_size=32,
                head_hidden_size=8), kind="dense", note="versions 1 and 2",
    ),
    Read(
        "ZoeDepthForDepthEstimation",
        partial(over_backbone, "ZoeDepthConfig", "BeitConfig", bottleneck_features=8, num_relative_features=8),
        kind="dense",
    ),
    Read(
        "EomtForUniversalSegmentation",
        lambda: config("EomtConfig", **VISION, mlp_ratio=2, num_queries=4, num_blocks=1, num_upscale_blocks=1,
                       num_register_tokens=2), kind="dense", note="up to the block where its queries enter",
    ),
    Read(
        "VitPoseForPoseEstimation",
        lambda: config("VitPoseConfig", num_labels=3, backbone_config=config(
            "VitPoseBackboneConfig", **{**VISION, "image_size": [32, 32], "patch_size": [8, 8]}, mlp_ratio=2,
            out_features=["stage3"])), lambda: {"pixel_values": images(size=32)}, "dense",
    ),
    Read(
        "CLIPSegForImageSegmentation",
        partial(two_towers, "CLIPSegConfig", extract_layers=[0, 1, 2], reduce_dim=8, decoder_num_attention_heads=2,
                decoder_intermediate_size=16), words, "dense",
    ),
    Read("OwlViTForObjectDetection", partial(two_towers, "OwlViTConfig"), boxes, "detectors"),
    Read("Owlv2ForObjectDetection", partial(two_towers, "Owlv2Config"), boxes, "detectors"),
    Read(
        "YolosForObjectDetection",
        lambda: config("YolosConfig", **{**VISION, "image_size": [16, 16]}, num_detection_tokens=5,
                       use_mid_position_embeddings=False), kind="detectors", note="detection tokens are protected",
    ),
    Read(
        "VivitForVideoClassification", lambda: config("VivitConfig", **VISION, num_frames=4, tubelet_size=[2, 4, 4]),
        clips, "video",
    ),
    Read(
        "VJEPA2ForVideoClassification",
        lambda: config(
            "VJEPA2Config", hidden_size=24, num_attention_heads=2, num_hidden_layers=3, patch_size=4, crop_size=16,
            frames_per_clip=4, mlp_ratio=2, num_pooler_layers=1, pred_hidden_size=24, pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
        ), partial(clips, "pixel_values_videos"), "video",
    ),
    Read(
        "YolosForObjectDetection", lambda: config("YolosConfig", **{**VISION, "image_size": [16, 16]}),
        kind="detectors", refused="adds position embeddings again between its blocks",
        note="with positions added again between its blocks, of which a merged token has several",
    ),
    Read(
        "MllamaForConditionalGeneration",
        lambda: vlm(
            "MllamaConfig",
            {"hidden_size": 32, "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 2,
             "intermediate_size": 64, "image_size": 16, "patch_size": 4, "vision_output_dim": 64,
             "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1},
            {**LLM, "cross_attention_layers": [1]},
        ), refused="two stacks", note="tiles in one sequence pass two stacks of blocks, and thresholds are for one",
    ),
    Read(
        "XCLIPModel",
        lambda: config(
            "XCLIPConfig", text_config=TEXT, projection_dim=32, prompt_num_attention_heads=2, vision_config={
                **VISION, "num_frames": 2, "mit_hidden_size": 32, "mit_intermediate_size": 32,
                "mit_num_attention_heads": 2, "mit_num_hidden_layers": 1},
        ), kind="video", refused="message token", note="frames exchange a message token in each block",
    ),
    Read(
        "TimesformerForVideoClassification", lambda: config("TimesformerConfig", **VISION, num_frames=2), kind="video",
        refused="along time", note="attends along time for each place, so that frames need the same patches",
    ),
    Read(
        "SamModel",
        lambda: config(
            "SamConfig", vision_config={
                "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64},
        ), kind="dense", refused="windows", note="windows, and positions that depend on queries",
    ),
    Read(
        "SegGptForImageSegmentation",
        lambda: config("SegGptConfig", **{**VISION, "image_size": [32, 16]}, mlp_dim=64, merge_index=0,
                       intermediate_hidden_state_indices=[0, 1, 2], decoder_hidden_size=8),
        kind="dense", refused="depend on queries", note="positions that depend on queries",
    ),
    Read(
        "Beit", partial(timm_model, "beit_base_patch16_224", img_size=64), square, "timm",
        "BEiT, BEiTv2: `beit_*`; a merged token keeps the place of its receiver",
    ),
    Read(
        "VisionTransformerRelPos", partial(timm_model, "vit_relpos_small_patch16_224", img_size=64), square, "timm",
        "`vit_relpos_*`, `vit_srelpos_*`",
    ),
    Read(
        "VisionTransformerRelPos", partial(timm_model, "vit_relpos_small_patch16_rpn_224", img_size=64), square, "timm",
        "`vit_relpos_*_rpn_*`, post-norm",
    ),
    Read(
        "Qwen3VitClassifier", partial(timm_model, "qwen3_vit_88m", img_size=64, embed_dim=64), square, "timm",
        "`qwen3_vit_*`, classifiers and encoders",
    ),
    Read(
        "DeepseekVitClassifier", partial(timm_model, "deepseek_vit_412m", img_size=56, embed_dim=64),
        partial(square, 56), "timm", "`deepseek_vit_*`, classifiers and encoders",
    ),
    Read(
        "Gemma4VitClassifier",
        partial(timm_model, "gemma4_vit_167m", embed_dim=64, head_dim=32, intermediate_size=64), partial(square, 96),
        "timm", "`gemma4_vit_*`, classifiers and encoders",
    ),
]  # fmt: skip
ATTACHED = {read.model: read for read in READERS if not read.refused}
REFUSED = {read.model: read for read in READERS if read.refused}
