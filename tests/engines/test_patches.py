from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from helpers import assert_close, random_images, tiny_vit
from ltmp.engines.patches import is_patch_embedding, patches_as_product, project_patches


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (12, 16), (9, 14)], ids=str)
def test_same_as_convolution(size: tuple[int, int], bias: bool) -> None:
    conv = nn.Conv2d(3, 5, 4, 4, bias=bias)
    x = torch.randn(2, 3, *size)
    assert_close(project_patches(conv, x), conv(x), 1e-5)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(3, 5, 4, 2), nn.Conv2d(3, 5, 4, 4, padding=1), nn.Conv2d(3, 6, 4, 4, groups=3), nn.Conv2d(3, 5, 1),
     nn.Conv2d(3, 5, 4, 4, dilation=2), nn.Linear(3, 5)],
    ids=str,
)  # fmt: skip
def test_other_modules_are_left_alone(conv: nn.Module) -> None:
    assert not is_patch_embedding(conv)


def test_only_inside() -> None:
    model: VisionTransformer = tiny_vit()
    images = random_images(2)
    expected = model(images)
    with patches_as_product(model):
        assert "forward" in vars(model.patch_embed.proj)
        with patches_as_product(model):
            assert_close(model(images), expected, 1e-5)
        assert_close(model(images), expected, 1e-5)
    assert "forward" not in vars(model.patch_embed.proj)
