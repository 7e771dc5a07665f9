"""`tokens="fewer"`: language models receive the tokens that are left, as if `inputs_embeds` were edited by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from towers import ATTACHED, IMAGE, START, VIDEO

import ltmp
from helpers import assert_close
from ltmp.engines.blockwise import PLACES
from ltmp.hosts.fewer import LANGUAGE, takes_features

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not takes_features(transformers.LlavaForConditionalGeneration),
    reason="this transformers gives readers no features: 5.18 does",
)

SQUARES = (
    "Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration", "InternVLForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
)  # fmt: skip
READERS = [name for name in LANGUAGE if name in ATTACHED]


def fewer(name: str) -> tuple[Any, dict[str, Any]]:
    read = ATTACHED[name]
    model, inputs = ltmp.attach(read.build(), ltmp.LTMPConfig(tokens="fewer")), read.inputs()
    reduce(model)
    return model, inputs


def reduce(model: Any) -> None:
    depth = model.ltmp.depth
    # a square of patches goes when each of them does
    prune = 0.09 if type(model).__name__ in SQUARES else 0.02
    model.ltmp.set([0.7] * depth, [prune] * depth)


def survivors(model: Any, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """What the reader makes of its images, and which patches are in the place of a token that is left.

    Written again: the reader's projector on the tower's grid, and each patch asked for itself.
    """
    model.ltmp.tokens = "grid"
    found: list[Tensor] = []
    token = PLACES.set(found)
    names = ("pixel_values", "image_sizes", "pixel_attention_mask", "image_grid_thw")
    given = {name: inputs[name] for name in names if name in inputs}
    encoded = model.get_image_features(**given)
    PLACES.reset(token)
    model.ltmp.tokens = "fewer"
    tap = found[-2] if "Llava" in type(model).__name__ else found[-1]
    return encoded, tap


def padded(rows: list[Tensor], fill: float = 0) -> Tensor:
    longest = max(map(len, rows))
    return torch.stack([torch.cat([row.new_full((longest - len(row), *row.shape[1:]), fill), row]) for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration",
                                  "SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"])  # fmt: skip
def test_equals_embeddings_edited_by_hand(name: str) -> None:
    model, inputs = fewer(name)
    encoded, places = survivors(model, inputs)
    features, places = encoded.pooler_output, places[:, -16:]
    if name in SQUARES:
        places = places.view(-1, 2, 2, 2, 2).any(4).any(2).flatten(1)
    embed, rows, masks = model.get_input_embeddings(), [], []
    for text, found, stays in zip(inputs["input_ids"], features, places, strict=True):
        row = embed(text)
        row[text == IMAGE] = found.to(row.dtype)
        keep = torch.ones_like(text, dtype=torch.bool)
        keep[text == IMAGE] = stays
        rows.append(row[keep])
        masks.append(torch.ones(int(keep.sum())))
    assert len({len(row) for row in rows}) > 1, "texts of one length: padding is not tested"
    mask = padded(masks).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + ("Pali" in name)
    model.ltmp.tokens = "grid"
    expected = model(inputs_embeds=padded(rows), attention_mask=mask, position_ids=positions).logits
    model.ltmp.tokens = "fewer"
    with ltmp.record() as calls:
        found = model(**inputs).logits
    assert calls.texts[0].tolist() == [len(row) for row in rows]
    assert found.shape[1] < inputs["input_ids"].shape[1]
    assert_close(found[mask.bool()], expected[mask.bool()], 1e-5 * float(expected.abs().max().clamp(min=1)))


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name for name in READERS if "VL" in name and "image_grid_thw" in ATTACHED[name].inputs()]
)
def test_tokens_keep_their_places_in_the_picture(name: str) -> None:
    """By hand: compute the positions of the full text, and remove columns from them and from the embeddings."""
    model, inputs = fewer(name)
    encoded, places = survivors(model, inputs)
    stays = places.view(-1, 4).any(1)
    if "2_5" in name:
        # windows come one after the other in the tower, rows of the picture in the text: each window is whole here
        order, _ = windows(model, inputs["image_grid_thw"])
        stays = stays[order.argsort()]
    text = inputs["input_ids"]
    row = model.get_input_embeddings()(text[0])
    row[text[0] == IMAGE] = torch.cat(encoded.pooler_output)
    keep = torch.ones_like(text[0], dtype=torch.bool)
    keep[text[0] == IMAGE] = stays
    assert 0 < stays.sum() < len(stays)
    positions, _ = model.model.get_rope_index(
        text, image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=inputs["mm_token_type_ids"]
    )
    more = {}
    if hasattr(encoded, "deepstack_features"):
        more["deepstack_visual_embeds"] = [torch.cat(taps)[stays] for taps in encoded.deepstack_features]
        more["visual_pos_masks"] = (text == IMAGE)[:, keep]
    hidden = model.model.language_model(inputs_embeds=row[None, keep], position_ids=positions[:, :, keep], **more)
    expected = model.lm_head(hidden.last_hidden_state)
    assert_close(model(**inputs).logits, expected, 1e-5 * float(expected.abs().max()))


def windows(model: Any, grid: Tensor) -> tuple[Tensor, Tensor]:
    from transformers.vision_utils import get_vision_window_index

    tower = model.model.visual
    return get_vision_window_index(
        grid, spatial_merge_size=2, window_size=tower.window_size, patch_size=tower.patch_size, kwargs={}
    )


@torch.no_grad()
@pytest.mark.parametrize("name", READERS)
def test_generates_from_a_cache_what_whole_calls_say(name: str) -> None:
    model, inputs = fewer(name)
    with ltmp.record() as calls:
        new = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE, VIDEO, START]
        )[:, -3:]
    assert calls.texts[0].lt((inputs["input_ids"] != 0).sum(1)).all()
    text = inputs["input_ids"]
    for i in range(3):
        logits = model(**longer(inputs, new[:, :i])).logits[:, -1]
        if i == 0 or "Pali" not in name:
            logits[:, [2, IMAGE, VIDEO, START]] = float("-inf")
            assert logits.argmax(-1).tolist() == new[:, i].tolist(), f"word {i} of {text.shape}"


def longer(inputs: dict[str, Any], words: Tensor) -> dict[str, Any]:
    found = {**inputs, "input_ids": torch.cat([inputs["input_ids"], words], 1)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in found:
            found[name] = torch.cat([found[name], torch.zeros_like(words)], 1)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", READERS)
def test_off_is_dense_and_masked_is_packed(name: str) -> None:
    model, inputs = fewer(name)
    packed = model(**inputs).logits
    model.ltmp.train().requires_grad_()
    masked = model(**inputs).logits
    assert_close(masked, packed, 2e-5 * float(packed.abs().max().clamp(min=1)))
    model.ltmp.eval().requires_grad_(False)
    with ltmp.dense():
        dense = model(**inputs).logits
    assert dense.shape[1] == inputs["input_ids"].shape[1] > packed.shape[1]
    model.ltmp.set([1.0] * model.ltmp.depth, [0.0] * model.ltmp.depth)
    assert torch.equal(model(**inputs).logits, dense)
    twin = copy.deepcopy(model)
    assert torch.equal(ltmp.detach(model)(**inputs).logits, dense)
    reduce(twin)
    assert torch.equal(twin(**inputs).logits, packed)


def test_losses_count_words_alone_and_reach_the_projector() -> None:
    model, inputs = fewer("LlavaForConditionalGeneration")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model(**inputs, labels=labels).loss.backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_texts_that_do_not_fit_their_images_are_told() -> None:
    model, inputs = fewer("LlavaForConditionalGeneration")
    inputs["input_ids"] = inputs["input_ids"][:, 1:-3]
    inputs["input_ids"][:, 0] = 5
    with pytest.raises(ltmp.LTMPError, match=r"places for 28 features of images, and its images have 32"):
        model(**inputs)


@torch.no_grad()
def test_the_setting_is_saved(tmp_path: Any) -> None:
    model, inputs = fewer("LlavaForConditionalGeneration")
    ltmp.save(model, tmp_path / "thresholds.safetensors")
    fresh = ltmp.load(ATTACHED["LlavaForConditionalGeneration"].build(), tmp_path / "thresholds.safetensors")
    fresh = fresh if hasattr(fresh, "ltmp") else model
    assert fresh.ltmp.tokens == "fewer"
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)
