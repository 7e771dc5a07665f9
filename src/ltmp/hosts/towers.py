"""Recipes for vision towers of transformers whose tokens are read in place: by language models, detectors, decoders.

A tower is one line in the table below: where its blocks are, how many tokens precede the patches, and how its attention
uses positions. `layouts` describes the blocks themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..engines.body import Body
from ..engines.segments import Segments
from ..method.recipe import READS_LOGITS, Bias, Recipe, Rotary, one_sequence
from .relative import pairs
from .rotary import rotated
from .transformers import Host, recipe_of, refuse_records, rotary_table, rotate_halves

_APART = -1e5
"""Added to scores of tokens that may not attend to each other: their weight is 0, and no row of scores is all -inf."""


@dataclass(frozen=True)
class Tower(Host):
    """A vision tower whose features are read as a grid; see `Host`.

    Attributes:
        suffix: config field with the number of tokens after the patches that are not patches; "" if there are none.
        unsupported: (config field, value, reason) of a setting with which it cannot be attached.
    """

    suffix: str = ""
    unsupported: tuple[str, Any, str] | None = None

    def protected(self, host: nn.Module) -> int:
        return super().protected(host) + self._suffix_tokens(host)

    def problems(self, host: nn.Module) -> list[str]:
        problems = super().problems(host)
        if self.unsupported is not None:
            name, value, reason = self.unsupported
            if getattr(self.inside(host).config, name, None) == value:
                problems.append(reason)
        return problems

    def final_norm(self, host: nn.Module) -> None:
        """No norm carries sizes: a grid has none."""

    def hooks(self, body: Body) -> list[RemovableHandle]:
        return [self.inside(body.host).register_forward_pre_hook(partial(refuse_records, body), with_kwargs=True)]

    def images(self, host: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Segments | None:
        """Return which rows of the features are which image's tokens; None if each image is [N, C], prefix first.

        Images of several lengths are separated by `cu_seqlens`, or by a mask of padding or of diagonal blocks.
        """
        if self.suffix:
            index = torch.arange(x.shape[1], device=x.device)
            end = x.shape[1] - self._suffix_tokens(host)
            return Segments.ordered(torch.cat((index[: self.prefix], index[end:], index[self.prefix : end])), len(x))
        lengths, mask = named.get("cu_seqlens"), named.get("attention_mask")
        if lengths is not None:
            return Segments.packed(lengths.diff())
        return None if mask is None else _segments_of_mask(mask, len(x))

    def _suffix_tokens(self, host: nn.Module) -> int:
        return int(getattr(self.inside(host).config, self.suffix)) if self.suffix else 0


def _segments_of_mask(mask: Tensor, images: int) -> Segments | None:
    """Return the images that an attention mask [B or 1, 1, N, N] separates, bool or added to scores.

    Raises:
        NotImplementedError: the mask is neither padding nor images one after the other.
    """
    visible = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0]
    if (visible == visible[:, :1]).all():
        return None if visible.all() else Segments.padded(visible[:, 0].expand(images, -1))
    first = visible.int().argmax(-1)
    if len(visible) == 1 and torch.equal(visible, first[:, :, None] == first[:, None]):
        return Segments.packed(first[0].unique_consecutive(return_counts=True)[1])
    raise NotImplementedError(
        "a reduced model takes an attention mask that hides padding or separates images, and this one does neither: "
        "call it inside `with ltmp.dense():`"
    )


def _window_bias(full: str, host: Any, block: int, named: Mapping[str, Any]) -> Bias | None:
    """Restrict attention to windows, except in the blocks listed by the host's attribute `full`."""
    if block in getattr(host, full):
        return None
    window = torch.repeat_interleave(named["cu_seqlens"].diff())
    return partial(_separate, window)


def _separate(window: Tensor, origin: Tensor) -> Tensor:
    windows = window[origin]
    return (windows[:, :, None] != windows[:, None])[:, None].float() * _APART


def _has_full_attention(full: str, host: Any) -> Sequence[bool]:
    return [i in getattr(host, full) for i in range(len(host.blocks))]


def _beit_bias(path: str, host: Any, block: int, named: Mapping[str, Any]) -> Bias | None:
    """The relative position bias of a BEiT block: the tables that the host passes to it, plus the block's own."""
    layer = attrgetter(path)(host)[block]
    shared = (named.get("attention_mask"), named.get("relative_position_bias"))
    tables = [table for table in shared if table is not None]
    for module in layer.modules():
        if type(module).__name__.endswith("RelativePositionBias"):
            height, width = named["resolution"]
            patch = layer.patch_size if hasattr(layer, "patch_size") else host.config.patch_size
            window = height // patch, width // patch
            tokens = 1 + window[0] * window[1]
            tables.append(module(window, bool(named.get("interpolate_pos_encoding")), dim_size=tokens))
    return pairs(sum(tables[1:], tables[0])) if tables else None


def _vjepa_table(host: Any, _embeddings: None, tokens: int) -> Tensor:
    """Sines and cosines [N, 2 D] of V-JEPA, read off from how its attention rotates ones on even and on odd channels.

    V-JEPA computes its rotation inside each block and passes no embeddings.
    """
    attention = host.layer[0].attention
    even = torch.zeros(1, 1, tokens, attention.attention_head_size, device=attention.query.weight.device)
    even[..., ::2] = 1
    positions = attention.get_position_ids(even[0])
    first, second = (attention.apply_rotary_embeddings(x, positions)[0, 0] for x in (even, 1 - even))
    sin, cos = torch.empty_like(first), torch.empty_like(first)
    cos[..., ::2], cos[..., 1::2] = first[..., ::2], second[..., 1::2]
    sin[..., ::2], sin[..., 1::2] = -second[..., ::2], first[..., 1::2]
    return torch.cat([sin, cos], -1)


def _rotate_pairs(_block: nn.Module, q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows[..., None, :]
    return rotated(q, rows, half=False), rotated(k, rows, half=False)


def _leading_blocks(host: Any) -> int:
    """Number of blocks before EoMT adds its queries to the tokens; the blocks after that stay dense."""
    return int(host.num_hidden_layers - host.config.num_blocks)


_ROTARY = Rotary(("position_embeddings",), rotary_table, rotate_halves)
_CLIP, _LAYER, _BLOCKS = "encoder.layers", "encoder.layer", "blocks"


def _tower(
    blocks: str, prefix: int, *, encoder: str = "", suffix: str = "", unsupported: tuple[str, Any, str] | None = None,
    **fields: Any,
) -> tuple[Tower, dict[str, Any]]:  # fmt: skip
    """Return a row of the table: a tower, and those fields of its recipe that are not the defaults."""
    return Tower(encoder, blocks, "", prefix, suffix=suffix, unsupported=unsupported), fields


_TABLE: dict[str, tuple[Tower, dict[str, Any]]] = {
    # CLIP, SigLIP and relatives
    "MLCDVisionModel": _tower(_CLIP, 1, rotary=_ROTARY),
    "ChineseCLIPVisionModel": _tower(_CLIP, 1),
    "AltCLIPVisionModel": _tower(_CLIP, 1),
    "CLIPSegVisionModel": _tower(_CLIP, 1),
    "OwlViTVisionTransformer": _tower(_CLIP, 1),
    "Owlv2VisionTransformer": _tower(_CLIP, 1),
    "BlipVisionModel": _tower(_CLIP, 1),
    "Blip2VisionModel": _tower(_CLIP, 1),
    "InstructBlipVisionModel": _tower(_CLIP, 1),
    "InstructBlipVideoVisionModel": _tower(_CLIP, 1),
    "Kosmos2VisionTransformer": _tower(_CLIP, 1),
    "GitVisionTransformer": _tower(_CLIP, 1),
    "MetaClip2VisionModel": _tower(_CLIP, 1),
    "Siglip2VisionModel": _tower(_CLIP, 0),
    "Idefics2VisionTransformer": _tower(_CLIP, 0),
    "Idefics3VisionTransformer": _tower(_CLIP, 0),
    "SmolVLMVisionTransformer": _tower(_CLIP, 0),
    "Aimv2VisionModel": _tower(_CLIP, 0),
    "Ovis2VisionModel": _tower("transformer.encoder.layers", 0),
    "InternVLVisionModel": _tower(_LAYER, 1),
    # rotary, images of different sizes packed into one sequence
    "Qwen2VisionTransformerPretrainedModel": _tower(_BLOCKS, 0, rotary=_ROTARY),
    "Qwen2_5_VisionTransformerPretrainedModel": _tower(
        _BLOCKS, 0, rotary=_ROTARY, bias=partial(_window_bias, "fullatt_block_indexes"),
        reduces=partial(_has_full_attention, "fullatt_block_indexes"),
    ),
    "Qwen3VLVisionModel": _tower(_BLOCKS, 0, rotary=_ROTARY),
    "Qwen3VLMoeVisionModel": _tower(_BLOCKS, 0, rotary=_ROTARY),
    "Qwen3_5VisionModel": _tower(_BLOCKS, 0, rotary=_ROTARY),
    "Qwen3_5MoeVisionModel": _tower(_BLOCKS, 0, rotary=_ROTARY),
    "Qwen3OmniMoeVisionEncoder": _tower(_BLOCKS, 0, rotary=_ROTARY),
    "Glm4vVisionModel": _tower(_BLOCKS, 0, rotary=_ROTARY),
    "Glm4vMoeVisionModel": _tower(_BLOCKS, 0, rotary=_ROTARY),
    "PixtralVisionModel": _tower("transformer.layers", 0, rotary=_ROTARY),
    # dense prediction, detection, video, features
    "Dinov2Backbone": _tower(_LAYER, 1),
    "Dinov2WithRegistersBackbone": _tower(_LAYER, 1),
    "DINOv3ViTBackbone": _tower("model.layer", 1, rotary=_ROTARY),
    "DPTModel": _tower(_LAYER, 1),
    "EomtForUniversalSegmentation": _tower("layers", 1, depth=_leading_blocks),
    "VitPoseBackbone": _tower(_LAYER, 0),
    "YolosModel": _tower(
        _LAYER, 1, suffix="num_detection_tokens",
        unsupported=("use_mid_position_embeddings", True, "it adds position embeddings again between its blocks, and a "
                     "merged token has several positions; checkpoints with use_mid_position_embeddings=False attach"),
    ),
    "ViTMSNModel": _tower("layers", 1),
    "IJepaModel": _tower("layers", 0),
    "VivitModel": _tower("layers", 1),
    "VJEPA2Encoder": _tower("layer", 0, rotary=Rotary((), _vjepa_table, _rotate_pairs), wraps=True),
    "BeitModel": _tower("layers", 1, bias=partial(_beit_bias, "layers")),
    "BeitBackbone": _tower("layers", 1, encoder="beit", bias=partial(_beit_bias, "beit.layers")),
    "Data2VecVisionModel": _tower(_LAYER, 1, bias=partial(_beit_bias, _LAYER), wraps=True),
}  # fmt: skip


def _recipe(name: str, tower: Tower, fields: dict[str, Any]) -> Recipe:
    # the attention mask of BEiT and Data2Vec is a bias, not padding
    mask_is_bias = "bias" in fields and "reduces" not in fields
    images: Callable[..., Any] = one_sequence if mask_is_bias else tower.images
    return replace(recipe_of(name, tower), forms=("grid",), images=images, **fields)


HOSTS: dict[type[nn.Module] | str, Recipe | str] = {name: _recipe(name, *row) for name, row in _TABLE.items()}
HOSTS |= {
    "TimmWrapperForImageClassification": READS_LOGITS,
    "SamVisionEncoder": "its windows of patches and its query-dependent positions need every patch in each block; "
    "towers without windows attach",
    "SegGptModel": "its positions depend on queries and on rows and columns of the grid, and a merged token has "
    "several of those",
    "TimesformerModel": "its blocks attend along time at each position and then within each frame, so that all frames "
    "need the same patches; models with joint attention over space and time attach (ViViT, V-JEPA 2, VideoMAE)",
    "XCLIPVisionModel": "each of its blocks adds a message token that frames exchange, which a reduced block does not "
    "support; CLIP frame by frame attaches",
    "MllamaVisionModel": "its tiles share one sequence with gates between two stacks of blocks, and thresholds are "
    "for one stack",
}
"""Recipes, or reasons for having none, by class name, so that the models of transformers need not be imported."""
