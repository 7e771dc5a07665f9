"""Vision-language models of transformers whose language model receives only the tokens left: `tokens="fewer"`.

The vision tower returns a grid, and the vision-language model (the reader) projects and packs it with its own code. A
projected feature is kept if a remaining token is at its position (a merged token is at that of its receiver). If the
reader makes one feature from a square of patches, that feature is kept if a remaining token is at any of them. The
placeholders of all other features are removed from the text, with their columns of the attention mask, the positions
and the labels. The rest stays in reading order.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calls import recording, set_in_context
from ..engines.blockwise import PLACES
from ..engines.body import Body, running_body
from ..errors import LTMPError


@dataclass(frozen=True)
class Language:
    """How a reader passes image features to its language model.

    Attributes:
        projector: dotted path of the module that computes the language model's features.
        layer: config field with the index of the hidden states to project; "" if the last block's are projected.
        offset: position of the first token of a text.
        rope_index: name of the method that computes multi-dimensional positions of the unreduced text; "" if positions
            simply count the tokens.
    """

    projector: str
    layer: str = ""
    offset: int = 0
    rope_index: str = ""


_QWEN = Language("model.visual.merger", rope_index="get_rope_index")
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
"""Readers whose language model can take fewer tokens, by class name."""


FEATURES = "mm_encoder_outputs"
"""Argument for precomputed image features, in readers of transformers 5.18 or newer."""


def takes_features(reader: type[nn.Module]) -> bool:
    """Whether the installed transformers can pass image features to this reader, which `tokens="fewer"` needs."""
    return FEATURES in inspect.signature(reader.forward).parameters


def find_reader(model: nn.Module) -> nn.Module | None:
    """Return the reader in `model` whose language model can take fewer tokens, or None."""
    return next((module for module in model.modules() if type(module).__name__ in LANGUAGE), None)


class Shortened:
    """Replaces a method of a reader that takes images and text: `forward` or `generate`.

    Args:
        body: the body of the vision tower.
        reader: the module whose method is replaced.
        method: name of the method.
    """

    def __init__(self, body: Body, reader: nn.Module, method: str) -> None:
        self.body, self.reader, self.method = body, reader, method

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._original)

    @property
    def _original(self) -> Any:
        return getattr(type(self.reader), self.method).__get__(self.reader)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        body = running_body(self.body)
        if body.tokens != "fewer" or not body.reduces():
            return self._original(*args, **kwargs)
        bound = inspect.signature(self._original).bind(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        arguments = {**bound, **extra}
        if self.method == "generate" and arguments.get("inputs") is not None:
            arguments["input_ids"] = arguments.pop("inputs")
        if arguments.get("pixel_values") is None or arguments.get("input_ids") is None:
            return self._original(*args, **kwargs)
        shortened = _shorten(self.reader, body, arguments)
        if self.method == "generate" and not LANGUAGE[type(self.reader).__name__].rope_index:
            shortened.pop("position_ids", None)  # `generate` counts them from the attention mask
        return self._original(**shortened)


def _shorten(reader: Any, body: Body, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a reader's method with computed image features, and text with fewer placeholders.

    Texts that are shorter than the longest of the batch are padded on the left.

    Raises:
        LTMPError: there are videos, or the text has another number of placeholders than its images have features.
    """
    if arguments.get("pixel_values_videos") is not None:
        raise LTMPError("tokens='fewer' is for images: set model.ltmp.tokens = 'grid' before a call with videos")
    language = LANGUAGE[type(reader).__name__]
    names = inspect.signature(reader.get_image_features).parameters
    encoded, kept = _encode_images(reader, _select(arguments, names))
    text: Tensor = arguments["input_ids"]
    placeholders = text == reader.config.image_token_id
    if int(placeholders.sum()) != len(kept):
        raise LTMPError(
            f"this text has places for {int(placeholders.sum())} features of images, and its images have {len(kept)}: "
            "prepare both with the model's own processor"
        )
    columns, live = _columns(torch.ones_like(placeholders).masked_scatter(placeholders, kept.to(text.device)))
    fill = {"input_ids": _padding_token(reader), "labels": -100}
    mask = arguments.get("attention_mask")
    shortened = {**arguments, "attention_mask": torch.ones_like(text) if mask is None else mask}
    if language.rope_index and arguments.get("position_ids") is None:
        shortened["position_ids"] = _full_positions(getattr(reader.model, language.rope_index), shortened)
    for name, value in shortened.items():
        if isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[-2:] == text.shape:
            index = columns.expand(*value.shape[:-2], -1, -1)
            shortened[name] = value.gather(-1, index).masked_fill(~live, fill.get(name, 0))
    count = shortened["attention_mask"].long().cumsum(-1).sub(1).clamp(min=0)
    if language.rope_index:
        shortened["position_ids"] = torch.cat([count[None], shortened["position_ids"][-3:]])
        # only needed to compute the positions
        for name in ("image_grid_thw", "mm_token_type_ids"):
            shortened.pop(name, None)
    elif arguments.get("position_ids") is None:
        shortened["position_ids"] = count + language.offset
    for name in names:
        shortened.pop(name, None)
    calls = recording()
    if calls is not None:
        calls.texts.append(shortened["attention_mask"].sum(-1))
    return {**shortened, FEATURES: {"image": encoded}}


def _encode_images(reader: Any, arguments: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Return the reader's image features without those to remove, and which of all features were kept, bool [U]."""
    with set_in_context(PLACES, []):
        encoded = reader.get_image_features(**arguments)
    pooled = encoded.pooler_output
    features = [*pooled] if not isinstance(pooled, Tensor) or pooled.ndim == 3 else [pooled]
    # `MarkedFeatures` set those to remove to NaN
    kept = torch.cat([~rows.isnan().any(-1) for rows in features])
    packed = torch.cat(features)[kept]
    encoded.pooler_output = packed if isinstance(pooled, Tensor) else [packed]
    if getattr(encoded, "deepstack_features", None) is not None:
        encoded.deepstack_features = [[torch.cat(layer)[kept]] for layer in encoded.deepstack_features]
    return encoded, kept


def _select(arguments: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The arguments called `names` that are not None."""
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def _columns(live: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns to keep of bool [B, S], int64 [B, S'] with padding on the left, and which are not padding."""
    length = int(live.sum(1).max())
    order = live.int().argsort(dim=1, stable=True)[:, -length:]
    return order, live.gather(1, order)


def _padding_token(reader: Any) -> int:
    """Return a token id for padding, which the attention mask hides: any id in the vocabulary would do."""
    token = getattr(reader.config.get_text_config(), "pad_token_id", None)
    return token if token is not None and token < reader.get_input_embeddings().num_embeddings else 0


def _full_positions(rope_index: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Positions [3, B, S] of the unreduced text, from the reader's own method."""
    positions: Tensor = rope_index(**_select(arguments, inspect.signature(rope_index).parameters))[0]
    return positions


class MarkedFeatures:
    """Forward hook of a projector: set features to remove to NaN, which survives the reader's packing.

    Args:
        body: the body of the vision tower.
        reader: the module that the projector belongs to.
    """

    def __init__(self, body: Body, reader: nn.Module) -> None:
        self.body, self.reader = body, reader

    def __call__(self, _projector: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        places, language = PLACES.get(), LANGUAGE[type(self.reader).__name__]
        if not places:
            return None
        block = len(places) - 1
        if language.layer:
            layer = getattr(self.reader.config, language.layer)
            if not isinstance(layer, int):
                raise LTMPError(f"tokens='fewer' follows one layer of the tower, and {language.layer} names several")
            block = layer % (len(places) + 1) - 1
        if block < 0:
            return None
        kept = _kept_features(places[block], output.shape[-2], self.body.protected)
        return output.masked_fill(~kept[..., None], float("nan"))


def _kept_features(places: Tensor, features: int, protected: int) -> Tensor:
    """Return which projected features, bool [..., U], contain the position of a token that is left.

    Args:
        places: which positions hold such a token, bool [B, N], or [T] for images packed one after the other.
        features: U, per image or in total; each is of one token, of a square of patches, or of consecutive tokens.
        protected: number of prefix tokens.
    """
    if places.ndim == 1:
        return places.view(features, -1).any(1)
    if places.shape[1] == features:
        return places
    patches = places[:, protected:]
    area = patches.shape[1] // features
    if area == 1:
        return patches
    side, edge = round(patches.shape[1] ** 0.5), round(area**0.5)
    grid = patches.float().view(-1, 1, side, side)
    return F.max_pool2d(grid, edge).flatten(1) > 0
