"""Models that read a vision tower's tokens in place: every one of them against what must hold of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from towers import ATTACHED, REFUSED, Read, outputs

import ltmp
from ltmp.errors import UsageError

pytest.importorskip("transformers")


def differ(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of the same tensor."""
    assert [t.shape for t in found] == [t.shape for t in expected]
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        there = b.isfinite()
        assert torch.equal(a.isfinite(), there)
        scale = float(b[there].abs().max().clamp(min=1e-3)) if there.any() else 1.0
        worst = max(worst, float((a - b)[there].abs().max()) / scale if there.any() else 0.0)
    return worst


def call(model: Any, read: Read) -> tuple[list[Tensor], Tensor, Any]:
    """Outputs, tokens after each block [B, L], and what they cost."""
    with ltmp.record() as calls:
        found = outputs(model(**read.inputs()))
    return found, torch.cat(calls.kept), calls.geometry[0]


def masking(model: Any, on: bool) -> Any:
    model.ltmp.train(on).requires_grad_(on)
    return model


def reduce(model: Any, tokens: int) -> None:
    draw = torch.rand(2, model.ltmp.depth, generator=torch.Generator().manual_seed(0))
    model.ltmp.set(0.4 + 0.4 * draw[0], (0.3 + 0.5 * draw[1]) / tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", ATTACHED)
def test_reads_what_a_dense_tower_gives(name: str) -> None:
    """Off bit for bit, masked within 1e-5; reduced masked as packed; detached as it was."""
    read = ATTACHED[name]
    model = read.build()
    dense = outputs(model(**read.inputs()))
    ltmp.attach(model)
    assert model.ltmp.tokens == read.tokens
    found, _, geometry = call(model, read)
    assert differ(found, dense) == 0
    # padding is as it entered where tokens are removed, and nobody reads it
    inside = -1 if name != "Siglip2VisionModel" else 12
    found, kept, _ = call(masking(model, True), read)
    each = torch.tensor(geometry.each or [geometry.tokens] * len(kept))
    assert kept.eq(each[:, None]).all()
    assert differ([t[:, :inside] for t in found], [t[:, :inside] for t in dense]) <= 1e-5
    reduce(masking(model, False), int(each.min()))
    packed, kept, _ = call(model, read)
    assert kept[:, -1].lt(each).all()
    assert differ(packed, dense) > 1e-3
    masked, same, _ = call(masking(model, True), read)
    assert same.tolist() == kept.tolist()
    assert differ(masked, packed) <= 1e-5
    ltmp.detach(model)
    assert differ(outputs(model(**read.inputs())), dense) == 0


GRADIENTS = ("LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "BeitForImageClassification",
             "Siglip2VisionModel", "YolosForObjectDetection", "VJEPA2ForVideoClassification")  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_thresholds_learn_through_what_reads_them(name: str) -> None:
    read = ATTACHED[name]
    model = ltmp.attach(read.build())
    _, _, geometry = torch.no_grad()(call)(model, read)
    reduce(model, min(geometry.each or [geometry.tokens]))
    model.requires_grad_(False)
    masking(model, True)
    with ltmp.record() as calls:
        found = outputs(model(**read.inputs()))
    (sum(t.nan_to_num().square().mean() for t in found) + calls.share().mean()).backward()
    spared = model.ltmp.depth == 4  # windows of Qwen2.5-VL
    for threshold in (model.ltmp.merge, model.ltmp.prune):
        assert threshold.grad.isfinite().all()
        assert (threshold.grad != 0).tolist() == ([False, True] * 2 if spared else [True] * 3)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_reason(name: str) -> None:
    read = REFUSED[name]
    model = read.build()
    before = sorted(vars(model))
    with pytest.raises(ltmp.LTMPError, match=read.refused) as refusal:
        ltmp.attach(model)
    assert "\n" not in str(refusal.value)
    assert sorted(vars(model)) == before


def test_a_reader_of_grids_gets_no_fewer() -> None:
    model = ATTACHED["DepthAnythingForDepthEstimation"].build()
    with pytest.raises(ltmp.LTMPError, match=r"tokens='reduced' does not suit it: expected 'grid'"):
        ltmp.attach(model, ltmp.LTMPConfig(tokens="reduced"))
    ltmp.attach(model)
    with pytest.raises(UsageError, match="does not suit this host"):
        model.ltmp.tokens = "fewer"


def test_fewer_needs_a_reader_that_takes_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltmp.hosts.fewer.FEATURES", "of_another_version")
    model = ATTACHED["LlavaForConditionalGeneration"].build()
    with pytest.raises(ltmp.LTMPError, match=r"tokens='fewer' does not suit it: .*, or transformers 5.18 for 'fewer'"):
        ltmp.attach(model, ltmp.LTMPConfig(tokens="fewer"))
    assert ltmp.attach(model).ltmp.tokens == "grid"


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, read in ATTACHED.items() if read.kind == "vision-language"])
def test_generates(name: str) -> None:
    """Greedily, from a cache: the first word is that of a whole call."""
    read = ATTACHED[name]
    model = ltmp.attach(read.build())
    if not hasattr(model, "generate"):
        pytest.skip("retrieval: generates nothing")
    inputs = read.inputs()
    _, _, geometry = call(model, read)
    reduce(model, min(geometry.each or [geometry.tokens]))
    expected = model(**inputs).logits[:, -1].argmax(-1)
    new = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert new.shape[1] >= 3
    if "Blip" not in name:  # whose decoder reads an image beside its text
        assert new[:, -3].tolist() == expected.tolist()
