"""Vision towers of transformers whose tokens others read in place: of language models, detectors, depth, segmentation.

Their blocks are those that `layouts` knows. A tower is a line in the table below: where its blocks are, how many tokens
precede the patches, and what its attention knows of places.
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
from ..method.recipe import READS_LOGITS, Bias, Recipe, Rotary
from .relative import pairs
from .rotary import turned
from .transformers import Host, recipe_of, refuse_records, rotary_table, rotate_halves

_APART = -1e5
"""Added to the score of tokens that do not see each other: their weight is 0, and no row of scores is empty."""


@dataclass(frozen=True)
class Tower(Host):
    """A vision tower whose reader takes a grid; see `Host`.

    Attributes:
        last: config's name for the number of tokens behind the patches that are no patches either.
        unlike: (config's name, value, reason) of a setting that no engine follows.
    """

    last: str = ""
    unlike: tuple[str, Any, str] | None = None

    def protected(self, host: nn.Module) -> int:
        config = self.inside(host).config
        return super().protected(host) + (int(getattr(config, self.last)) if self.last else 0)

    def problems(self, host: nn.Module) -> list[str]:
        found = super().problems(host)
        if self.unlike is not None and getattr(self.inside(host).config, self.unlike[0], None) == self.unlike[1]:
            found.append(self.unlike[2])
        return found

    def final_norm(self, host: nn.Module) -> None:
        """Readers get no sizes."""

    def hooks(self, body: Body) -> list[RemovableHandle]:
        return [self.inside(body.host).register_forward_pre_hook(partial(refuse_records, body), with_kwargs=True)]

    def images(self, host: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Segments | None:
        """Images among features of several lengths: by `cu_seqlens`, or by a mask of padding or of diagonal blocks."""
        if self.last:
            prefix, after = self.prefix, int(getattr(self.inside(host).config, self.last))
            place = torch.arange(x.shape[1], device=x.device)
            ends = (place[:prefix], place[len(place) - after :], place[prefix : len(place) - after])
            return Segments.ordered(torch.cat(ends), len(x))
        lengths, mask = named.get("cu_seqlens"), named.get("attention_mask")
        if lengths is not None:
            return Segments.packed(lengths.diff())
        return None if mask is None else images_seen(mask, len(x))


def images_seen(mask: Tensor, images: int) -> Segments | None:
    """Which tokens see each other by a mask [B or 1, 1, N, N], bool or added to scores.

    Raises:
        NotImplementedError: it is neither padding nor images one after the other.
    """
    seen = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0]
    if (seen == seen[:, :1]).all():
        return None if seen.all() else Segments.padded(seen[:, 0].expand(images, -1))
    first = seen.int().argmax(-1)
    if len(seen) == 1 and torch.equal(seen, first[:, :, None] == first[:, None]):
        return Segments.packed(first[0].unique_consecutive(return_counts=True)[1])
    raise NotImplementedError(
        "a reduced model takes an attention mask that hides padding or separates images, and this one does neither: "
        "call it inside `with ltmp.dense():`"
    )


def _windows(full: str, host: Any, block: int, named: Mapping[str, Any]) -> Bias | None:
    """Attention within windows, in blocks that the attribute `full` of the host does not name."""
    if block in getattr(host, full):
        return None
    window = torch.repeat_interleave(named["cu_seqlens"].diff())
    return partial(_apart, window)


def _apart(window: Tensor, origin: Tensor) -> Tensor:
    own = window[origin]
    return (own[:, :, None] != own[:, None])[:, None].float() * _APART


def _outside_windows(full: str, host: Any) -> Sequence[bool]:
    return [i in getattr(host, full) for i in range(len(host.blocks))]


def _relative(path: str, host: Any, block: int, named: Mapping[str, Any]) -> Bias | None:
    """BEiT's number for each pair of places, of a block's own table and of one for all; a merged token keeps its
    receiver's place."""
    own, found = attrgetter(path)(host)[block], []
    for given in (named.get("attention_mask"), named.get("relative_position_bias")):
        found += [] if given is None else [given]
    for module in own.modules():
        if type(module).__name__.endswith("RelativePositionBias"):
            height, width = named["resolution"]
            patch = own.patch_size if hasattr(own, "patch_size") else host.config.patch_size
            window = height // patch, width // patch
            tokens = 1 + window[0] * window[1]
            found.append(module(window, bool(named.get("interpolate_pos_encoding")), dim_size=tokens))
    return pairs(sum(found[1:], found[0])) if found else None


def _of_places(host: Any, _given: None, tokens: int) -> Tensor:
    """V-JEPA's rotation, [N, 2 D]: what its attention makes of ones on even and on odd channels."""
    attention = host.layer[0].attention
    even = torch.zeros(1, 1, tokens, attention.attention_head_size, device=attention.query.weight.device)
    even[..., ::2] = 1
    places = attention.get_position_ids(even[0])
    first, second = (attention.apply_rotary_embeddings(x, places)[0, 0] for x in (even, 1 - even))
    sin, cos = torch.empty_like(first), torch.empty_like(first)
    cos[..., ::2], cos[..., 1::2] = first[..., ::2], second[..., 1::2]
    sin[..., ::2], sin[..., 1::2] = -second[..., ::2], first[..., 1::2]
    return torch.cat([sin, cos], -1)


def _rotate_pairs(_block: nn.Module, q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows[..., None, :]
    return turned(q, rows, half=False), turned(k, rows, half=False)


def _leading_blocks(host: Any) -> int:
    """EoMT adds its queries to the tokens before the last blocks, which stay as they are."""
    return int(host.num_hidden_layers - host.config.num_blocks)


_ROTARY = Rotary(("position_embeddings",), rotary_table, rotate_halves)
_CLIP, _LAYER, _BLOCKS = "encoder.layers", "encoder.layer", "blocks"


def _beit(path: str, **others: Any) -> dict[str, Any]:
    return {"bias": partial(_relative, path), **others}


_TABLE: dict[str, tuple[Tower, dict[str, Any]]] = {
    # CLIP's and SigLIP's kin
    "MLCDVisionModel": (Tower("", _CLIP, "", 1), {"rotary": _ROTARY}),
    "ChineseCLIPVisionModel": (Tower("", _CLIP, "", 1), {}),
    "AltCLIPVisionModel": (Tower("", _CLIP, "", 1), {}),
    "CLIPSegVisionModel": (Tower("", _CLIP, "", 1), {}),
    "OwlViTVisionTransformer": (Tower("", _CLIP, "", 1), {}),
    "Owlv2VisionTransformer": (Tower("", _CLIP, "", 1), {}),
    "BlipVisionModel": (Tower("", _CLIP, "", 1), {}),
    "Blip2VisionModel": (Tower("", _CLIP, "", 1), {}),
    "InstructBlipVisionModel": (Tower("", _CLIP, "", 1), {}),
    "InstructBlipVideoVisionModel": (Tower("", _CLIP, "", 1), {}),
    "Kosmos2VisionTransformer": (Tower("", _CLIP, "", 1), {}),
    "GitVisionTransformer": (Tower("", _CLIP, "", 1), {}),
    "MetaClip2VisionModel": (Tower("", _CLIP, "", 1), {}),
    "Siglip2VisionModel": (Tower("", _CLIP, "", 0), {}),
    "Idefics2VisionTransformer": (Tower("", _CLIP, "", 0), {}),
    "Idefics3VisionTransformer": (Tower("", _CLIP, "", 0), {}),
    "SmolVLMVisionTransformer": (Tower("", _CLIP, "", 0), {}),
    "Aimv2VisionModel": (Tower("", _CLIP, "", 0), {}),
    "Ovis2VisionModel": (Tower("", "transformer.encoder.layers", "", 0), {}),
    "InternVLVisionModel": (Tower("", _LAYER, "", 1), {}),
    # images of different sizes one after the other, rotary
    "Qwen2VisionTransformerPretrainedModel": (Tower("", _BLOCKS, "", 0), {"rotary": _ROTARY}),
    "Qwen2_5_VisionTransformerPretrainedModel": (
        Tower("", _BLOCKS, "", 0),
        {
            "rotary": _ROTARY, "bias": partial(_windows, "fullatt_block_indexes"),
            "reduces": partial(_outside_windows, "fullatt_block_indexes"),
        },
    ),
    "Qwen3VLVisionModel": (Tower("", _BLOCKS, "", 0), {"rotary": _ROTARY}),
    "Qwen3VLMoeVisionModel": (Tower("", _BLOCKS, "", 0), {"rotary": _ROTARY}),
    "Qwen3_5VisionModel": (Tower("", _BLOCKS, "", 0), {"rotary": _ROTARY}),
    "Qwen3_5MoeVisionModel": (Tower("", _BLOCKS, "", 0), {"rotary": _ROTARY}),
    "Qwen3OmniMoeVisionEncoder": (Tower("", _BLOCKS, "", 0), {"rotary": _ROTARY}),
    "Glm4vVisionModel": (Tower("", _BLOCKS, "", 0), {"rotary": _ROTARY}),
    "Glm4vMoeVisionModel": (Tower("", _BLOCKS, "", 0), {"rotary": _ROTARY}),
    "PixtralVisionModel": (Tower("", "transformer.layers", "", 0), {"rotary": _ROTARY}),
    # dense prediction, detection, video, features
    "Dinov2Backbone": (Tower("", _LAYER, "", 1), {}),
    "Dinov2WithRegistersBackbone": (Tower("", _LAYER, "", 1), {}),
    "DINOv3ViTBackbone": (Tower("", "model.layer", "", 1), {"rotary": _ROTARY}),
    "DPTModel": (Tower("", _LAYER, "", 1), {}),
    "EomtForUniversalSegmentation": (Tower("", "layers", "", 1), {"depth": _leading_blocks}),
    "VitPoseBackbone": (Tower("", _LAYER, "", 0), {}),
    "YolosModel": (
        Tower(
            "", _LAYER, "", 1, last="num_detection_tokens",
            unlike=("use_mid_position_embeddings", True, "it adds positions again between its blocks, which a merged "
                    "token has several of; checkpoints with use_mid_position_embeddings=False attach"),
        ), {},
    ),
    "ViTMSNModel": (Tower("", "layers", "", 1), {}),
    "IJepaModel": (Tower("", "layers", "", 0), {}),
    "VivitModel": (Tower("", "layers", "", 1), {}),
    "VJEPA2Encoder": (
        Tower("", "layer", "", 0), {"rotary": Rotary((), _of_places, _rotate_pairs), "wraps": True},
    ),
    "BeitModel": (Tower("", "layers", "", 1), _beit("layers")),
    "BeitBackbone": (Tower("beit", "layers", "", 1), _beit("beit.layers")),
    "Data2VecVisionModel": (Tower("", _LAYER, "", 1), _beit(_LAYER, wraps=True)),
}  # fmt: skip


def _recipe(name: str, tower: Tower, others: dict[str, Any]) -> Recipe:
    images: Callable[..., Any] = _no_images if "bias" in others and "reduces" not in others else tower.images
    return replace(recipe_of(name, tower), forms=("grid",), images=images, **others)


def _no_images(_host: nn.Module, _x: Tensor, _named: Mapping[str, Any]) -> None:
    """Nothing: an attention mask of these hosts is a bias, not padding."""


HOSTS: dict[type[nn.Module] | str, Recipe | str] = {name: _recipe(name, *row) for name, row in _TABLE.items()}
HOSTS |= {
    "TimmWrapperForImageClassification": READS_LOGITS,
    "SamVisionEncoder": "its windows of patches and its positions, which depend on queries, need every patch in each "
    "block; towers without windows attach",
    "SegGptModel": "its positions depend on queries and on rows and columns of the grid, which a merged token has "
    "several of",
    "TimesformerModel": "its blocks attend along time for each place and then within each frame, so that frames need "
    "the same patches; models with joint attention over space and time attach (ViViT, V-JEPA 2, VideoMAE)",
    "XCLIPVisionModel": "each of its blocks adds a message token that frames exchange, which no step of a reduced "
    "block can follow; CLIP frame by frame attaches",
    "MllamaVisionModel": "its tiles share one sequence with gates between two stacks of blocks, and thresholds are "
    "for one stack",
}
"""Recipes, and reasons for there being none, by the names of classes: models of transformers are imported by need."""
