"""Models of torchvision and open_clip by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ltmp
from helpers import random_images
from ltmp.data import eval_transform
from ltmp.errors import LTMPError, UsageError
from ltmp.zoo.build import build_model, includes_weights

SMALL = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}


def small_torchvision(**kwargs):
    # its architectures take no sizes: the class does
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(**{"image_size": 32, "patch_size": 16, "num_classes": 5, **SMALL, **kwargs})


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        "torchvision.models.get_model", lambda name, weights=None, **kwargs: small_torchvision(**kwargs)
    )


@pytest.mark.usefixtures("small")
def test_a_classifier_of_torchvision(tmp_path: Path) -> None:
    model = build_model("torchvision:vit_b_16", num_classes=7, image_size=32)
    assert not model.training
    assert model(random_images(2, size=32)).shape == (2, 7)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    again = build_model("torchvision:vit_b_16", weights=path, num_classes=7, image_size=32)
    assert torch.equal(again.class_token, model.class_token)
    with pytest.raises(LTMPError, match="--num-classes 7"):
        build_model("torchvision:vit_b_16", weights=path, num_classes=5, image_size=32)


@pytest.mark.usefixtures("small")
def test_images_as_torchvision_prepares_them() -> None:
    from torchvision.models import ViT_B_16_Weights

    image = Image.effect_noise((300, 260), 50).convert("RGB")
    theirs = ViT_B_16_Weights.DEFAULT.transforms()(image)
    ours = eval_transform(build_model("torchvision:vit_b_16", image_size=224))(image)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.05


def test_a_tower_of_open_clip(monkeypatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    model = build_model("open_clip:tiny")
    assert model(random_images(2, size=32)).shape == (2, 8)
    theirs = open_clip.create_model_and_transforms("tiny")[2]
    image = Image.effect_noise((50, 40), 50).convert("RGB")
    assert (eval_transform(model)(image) - theirs(image)).abs().mean() < 0.05
    ltmp.attach(model).ltmp.set(None, [0.1, 0.1])
    assert model(random_images(2, size=32)).shape == (2, 8)


@pytest.mark.parametrize(
    ("name", "kwargs", "fragment"),
    [
        ("torchvision:vit_b_17", {}, "did you mean vit_b_16"),
        ("torchvision:resnet50", {}, "has no vision transformer"),
        ("torchvision:vit_b_16", {"image_size": 30}, "cannot build vit_b_16"),
        ("torchvision:vit_b_16", {"model_kwargs": {"nonsense": 1}}, "nonsense"),
        ("open_clip:ViT-B-33", {}, "did you mean ViT-B-32"),
        ("open_clip:ViT-B-32", {"pretrained": True}, "TAG one of openai"),
        ("open_clip:ViT-B-32/nonsense", {}, "TAG one of openai"),
        ("open_clip:ViT-B-32", {"num_classes": 5}, "embeddings"),
    ],
)
def test_wrong_calls(name: str, kwargs: dict, fragment: str) -> None:
    if name.startswith("open_clip"):
        pytest.importorskip("open_clip")
    with pytest.raises(UsageError) as refusal:
        build_model(name, **kwargs)
    assert fragment in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_names_that_say_which_weights() -> None:
    assert includes_weights("open_clip:ViT-B-32/openai")
    assert includes_weights("hf:google/vit")
    assert not any(map(includes_weights, ("open_clip:ViT-B-32", "torchvision:vit_b_16", "vit_small_patch16_224")))
