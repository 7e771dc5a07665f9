"""Vision-language models of transformers whose language model receives the tokens that are left: `tokens="fewer"`.

The tower gives its reader a grid, and the reader's own code projects it and packs it. Of the result, a feature goes on
if a token that is left has its place there (the place of the receiver, for what merged); where the reader makes one
feature of a square of patches, if one of them is such a place. Placeholders of the others leave the text, with their
columns of the attention mask, the positions and the labels. What is left stays in reading order.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import held, recording
from ..engines.blockwise import PLACES
from ..engines.body import Body, running_body
from ..errors import LTMPError


@dataclass(frozen=True)
class Language:
    """How a reader makes text of an image.

    Attributes:
        projector: dotted path of the module that makes the language model's features.
        layer: config's name for the number of the hidden states that it projects; "" for the last block's.
        offset: place of the first token of a text.
        whole_positions: name of the method that computes positions of the whole text in several dimensions; "" where
            they count the tokens that are there.
    """

    projector: str
    layer: str = ""
    offset: int = 0
    whole_positions: str = ""


_QWEN = Language("model.visual.merger", whole_positions="get_rope_index")
LANGUAGE: dict[str, Language] = {
    "LlavaForConditionalGeneration": Language("model.multi_modal_projector", "vision_feature_layer"),
    "LlavaNextForConditionalGeneration": Language("model.multi_modal_projector", "vision_feature_layer"),
    "PaliGemmaForConditionalGeneration": Language("model.multi_modal_projector", offset=1),
    "Idefics3ForConditionalGeneration": Language("model.connector"),
    "SmolVLMForConditionalGeneration": Language("model.connector"),
    "Qwen2VLForConditionalGeneration": _QWEN,
    "Qwen2_5_VLForConditionalGeneration": _QWEN,
    "Qwen3VLForConditionalGeneration": _QWEN,
    "Glm4vForConditionalGeneration": _QWEN,
    "InternVLForConditionalGeneration": Language("model.multi_modal_projector", "vision_feature_layer"),
    "Gemma3ForConditionalGeneration": Language("model.multi_modal_projector"),
}
"""Readers that can take fewer, by the names of their classes."""


FEATURES = "mm_encoder_outputs"
"""The argument by which transformers gives a reader the features of its images, from 5.18 on."""


def takes_features(reader: type[nn.Module]) -> bool:
    """Whether the installed transformers lets a reader be given features, which `tokens="fewer"` needs."""
    return FEATURES in inspect.signature(reader.forward).parameters


def find_reader(model: nn.Module) -> nn.Module | None:
    """The reader in `model` whose language model can take fewer tokens, if there is one."""
    return next((module for module in model.modules() if type(module).__name__ in LANGUAGE), None)


class Shortened:
    """Stands in for a method of a reader that takes images and text: `forward` or `generate`.

    Args:
        body: the tower's.
        reader: whose method.
        method: its name.
    """

    def __init__(self, body: Body, reader: nn.Module, method: str) -> None:
        self.body, self.reader, self.method = body, reader, method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)

    @property
    def _own(self) -> Any:
        return getattr(type(self.reader), self.method).__get__(self.reader)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        body = running_body(self.body)
        if body.tokens != "fewer" or not body.reduces():
            return self._own(*args, **kwargs)
        bound = inspect.signature(self._own).bind(*args, **kwargs).arguments
        given = {**{name: value for name, value in bound.items() if name != "kwargs"}, **bound.get("kwargs", {})}
        if self.method == "generate" and given.get("inputs") is not None:
            given["input_ids"] = given.pop("inputs")
        if given.get("pixel_values") is None or given.get("input_ids") is None:
            return self._own(*args, **kwargs)
        shorter = shorten(self.reader, body, given)
        if self.method == "generate" and not LANGUAGE[type(self.reader).__name__].whole_positions:
            shorter.pop("position_ids", None)  # it counts those that the mask shows
        return self._own(**shorter)


def shorten(reader: Any, body: Body, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a reader in place of `given`: features of its images, and text with fewer placeholders.

    Texts that are shorter than the longest of the batch are padded on the left.

    Raises:
        LTMPError: videos, or a text whose placeholders are not as many as its images' features.
    """
    if given.get("pixel_values_videos") is not None:
        raise LTMPError("tokens='fewer' is for images: call model.ltmp.tokens = 'grid' before a call with videos")
    how = LANGUAGE[type(reader).__name__]
    names = inspect.signature(reader.get_image_features).parameters
    with held(PLACES, []):
        encoded = reader.get_image_features(**{n: given[n] for n in names if given.get(n) is not None})
    pooled = encoded.pooler_output
    features = [*pooled] if not isinstance(pooled, Tensor) or pooled.ndim == 3 else [pooled]
    stays = torch.cat([~row.isnan().any(-1) for row in features])
    kept = torch.cat(features)[stays]
    encoded.pooler_output = kept if isinstance(pooled, Tensor) else [kept]
    if getattr(encoded, "deepstack_features", None) is not None:
        encoded.deepstack_features = [[torch.cat(taps)[stays]] for taps in encoded.deepstack_features]
    text: Tensor = given["input_ids"]
    images = text == reader.config.image_token_id
    if int(images.sum()) != len(stays):
        raise LTMPError(
            f"this text has places for {int(images.sum())} features of images, and its images have {len(stays)}: "
            "prepare both by the model's own processor"
        )
    live = torch.ones_like(images).masked_scatter(images, stays.to(text.device))
    columns, live = _columns(live)
    fill = {"input_ids": _padding(reader), "labels": -100}
    mask = given.get("attention_mask")
    shorter = {**given, "attention_mask": torch.ones_like(text) if mask is None else mask}
    if how.whole_positions and given.get("position_ids") is None:
        shorter["position_ids"] = _positions(getattr(reader.model, how.whole_positions), shorter)
    for name, value in shorter.items():
        if isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[-2:] == text.shape:
            at = columns.expand(*value.shape[:-2], -1, -1)
            shorter[name] = value.gather(-1, at).masked_fill(~live, fill.get(name, 0))
    count = shorter["attention_mask"].long().cumsum(-1).sub(1).clamp(min=0)
    if how.whole_positions:
        shorter["position_ids"] = torch.cat([count[None], shorter["position_ids"][-3:]])
        # said by the positions from here on
        for name in ("image_grid_thw", "mm_token_type_ids"):
            shorter.pop(name, None)
    elif given.get("position_ids") is None:
        shorter["position_ids"] = count + how.offset
    for name in names:
        shorter.pop(name, None)
    calls = recording()
    if calls is not None:
        calls.texts.append(shorter["attention_mask"].sum(-1))
    return {**shorter, FEATURES: {"image": encoded}}


def _columns(live: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool [B, S], which columns to take, int64 [B, S'], padded on the left, and which of those are there."""
    length = int(live.sum(1).max())
    order = live.int().argsort(dim=1, stable=True)[:, -length:]
    return order, live.gather(1, order)


def _padding(reader: Any) -> int:
    """A word for places that the mask hides, so that any would do."""
    found = getattr(reader.config.get_text_config(), "pad_token_id", None)
    return found if found is not None and found < reader.get_input_embeddings().num_embeddings else 0


def _positions(method: Any, given: Mapping[str, Any]) -> Tensor:
    """Positions [3, B, S] of the whole text, by the reader's own method."""
    names = inspect.signature(method).parameters
    found: Tensor = method(**{name: given[name] for name in names if given.get(name) is not None})[0]
    return found


class MarkedFeatures:
    """Forward hook of a projector: features that are not to go on become NaN, which whoever packs them carries along.

    Args:
        body: the tower's.
        reader: whose projector.
    """

    def __init__(self, body: Body, reader: nn.Module) -> None:
        self.body, self.reader = body, reader

    def __call__(self, _projector: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        places, how = PLACES.get(), LANGUAGE[type(self.reader).__name__]
        if not places:
            return None
        block = len(places) - 1
        if how.layer:
            layer = getattr(self.reader.config, how.layer)
            if not isinstance(layer, int):
                raise LTMPError(f"tokens='fewer' follows one layer of the tower, and {how.layer} names several")
            block = layer % (len(places) + 1) - 1
        if block < 0:
            return None
        return output.masked_fill(~units(places[block], output, self.body.protected)[..., None], float("nan"))


def units(places: Tensor, output: Tensor, protected: int) -> Tensor:
    """Which features, bool [..., U], hold the place of a token that is left.

    Args:
        places: bool [B, N], or [T] of images one after the other.
        output: [..., U, C], of one patch each, of squares of patches, or of as many neighbours as one has.
        protected: prefix tokens.
    """
    rows = output.shape[-2]
    if places.ndim == 1:
        return places.view(rows, -1).any(1)
    if places.shape[1] == rows:
        return places
    patches = places[:, protected:]
    each = patches.shape[1] // rows
    if each == 1:
        return patches
    side, edge = round(patches.shape[1] ** 0.5), round(each**0.5)
    grid = patches.float().view(-1, 1, side, side)
    return F.max_pool2d(grid, edge).flatten(1) > 0
