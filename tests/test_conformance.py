"""The deployed function is that of the seed's own inference, and of the method as written down in `reference.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import ltmp
import reference
from helpers import assert_close, attach_reducing, random_images, references, run_recorded, tiny_vit
from ltmp.config import LEARNED
from ltmp.hosts.attach import thresholds_of

CASES = Path(__file__).parents[2] / "shared" / "conformance"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the conformance files are not beside this checkout")


def load_case(variant: str) -> tuple[Any, Any]:
    """The case's model with its thresholds, in eval mode, and its recorded inputs and outputs."""
    settings = json.loads((CASES / f"{variant}_tiny32.json").read_text())
    names = ("num_classes", "img_size", "patch_size", "embed_dim", "depth", "num_heads")
    model = VisionTransformer(**{name: settings[name] for name in names}).eval()
    weights = load_file(CASES / f"{variant}_tiny32.weights.safetensors")
    values = {name: weights.pop(f"{name}_thresholds", None) for name in ("merge", "prune")}
    model.load_state_dict(weights)
    ltmp.attach(model, ltmp.LTMPConfig(variant=settings["variant"]))
    thresholds_of(model).set(**values)
    return model, np.load(CASES / f"{variant}_tiny32.io.npz")


@needs_cases
@pytest.mark.parametrize("batch", [8, 1], ids=["batch", "one-by-one"])
@pytest.mark.parametrize("mode", ["packed", "masked"])
@pytest.mark.parametrize("variant", LEARNED)
@torch.no_grad()
def test_seed_files(variant: str, mode: str, batch: int) -> None:
    model, case = load_case(variant)
    model.ltmp.train(mode == "masked").requires_grad_(mode == "masked")
    images, logits, expected = (torch.from_numpy(case[k]) for k in ("images", "logits", "tokens_after_block"))
    parts = [run_recorded(model, part) for part in images.split(batch)]
    assert torch.cat([kept for _, kept in parts]).tolist() == expected.tolist()
    assert_close(torch.cat([out for out, _ in parts]), logits, atol=1e-4, what="logits")


@needs_cases
@pytest.mark.parametrize("variant", LEARNED)
@torch.no_grad()
def test_seed_files_features_in_deployed_order(variant: str) -> None:
    model, case = load_case(variant)
    features = model.forward_features(torch.from_numpy(case["images"][:1]))
    assert_close(features[0], torch.from_numpy(case["features_of_image0"]).reshape(features[0].shape), atol=1e-4)


def prefix_case(protected: int) -> Any:
    """A model with that many prefix tokens, its head fit for them."""
    if protected == 0:
        return tiny_vit(class_token=False, global_pool="avg")
    return tiny_vit(reg_tokens=protected - 1)


@pytest.mark.parametrize("batch", [4, 1], ids=["batch", "one-by-one"])
@pytest.mark.parametrize("mode", ["packed", "masked"])
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("variant", LEARNED)
@torch.no_grad()
def test_written_down_twice(variant: str, protected: int, mode: str, batch: int) -> None:
    model = prefix_case(protected)
    images = random_images(4)
    bare = references(model, images)
    attach_reducing(model, images, variant)
    model.ltmp.train(mode == "masked").requires_grad_(mode == "masked")
    expected = [reference.run(image, model.ltmp.merge, model.ltmp.prune, variant) for image in bare]
    assert min(image.margin for image, _ in expected) > 1e-5, "a decision is too close for this test: change the seed"
    counts = torch.tensor([counts for _, counts in expected])
    assert (counts[:, -1] < 16 + protected).all(), "nothing was reduced: the test would show nothing"
    assert (counts != counts[0]).any(), "all images alike: the test would not show that batches mix counts"

    parts = [run_recorded(model, part) for part in images.split(batch)]
    assert torch.cat([kept for _, kept in parts]).tolist() == counts.tolist()
    logits = torch.stack([image.logits() for image, _ in expected])
    assert_close(torch.cat([out for out, _ in parts]), logits, atol=1e-5, what="logits")


@torch.no_grad()
def test_distilled_heads_read_both_tokens() -> None:
    model = tiny_vit(VisionTransformerDistilled)
    images = random_images(3)
    bare = references(model, images)
    attach_reducing(model, images)
    expected = [reference.run(image, model.ltmp.merge, model.ltmp.prune) for image in bare]
    logits, kept = run_recorded(model, images)
    assert kept.tolist() == [counts for _, counts in expected]
    assert_close(logits, torch.stack([image.logits() for image, _ in expected]), atol=1e-5)
