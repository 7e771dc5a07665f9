"""The transform is timm's for the model, at the size the model was built with."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image

from ltmp.data import eval_transform, input_channels
from ltmp.errors import UsageError


@pytest.fixture(scope="module")
def small_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)


def test_size_is_the_models_own_not_its_configs(small_vit):
    assert eval_transform(small_vit)(Image.new("RGB", (100, 80))).shape == (3, 64, 64)
    assert eval_transform(small_vit, image_size=(32, 48))(Image.new("RGB", (100, 80))).shape == (3, 32, 48)


def test_squash_without_crop_keeps_the_whole_image(small_vit):
    image = Image.new("RGB", (100, 40), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 10, 40))
    squashed = eval_transform(small_vit, crop_pct=1.0, crop_mode="squash", mean=(0, 0, 0), std=(1, 1, 1))(image)
    cropped = eval_transform(small_vit, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert squashed[0, 32, 0] == pytest.approx(1.0, abs=0.02)
    assert cropped[0, 32, 0] == pytest.approx(0.0, abs=0.02)


def test_mean_and_std_are_used(small_vit):
    grey = Image.new("RGB", (64, 64), (255, 255, 255))
    assert torch.allclose(eval_transform(small_vit, mean=(0.5,) * 3, std=(0.25,) * 3)(grey), torch.tensor(2.0))


def test_models_of_one_channel():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, in_chans=1)
    assert input_channels(model) == 1
    transform = eval_transform(model, mean=(0.5,), std=(0.5,))
    assert transform(Image.new("L", (40, 40))).shape == (1, 32, 32)


def test_numbers_for_colours_are_made_to_fit_one_channel():
    """timm's configs, and options of three numbers, are for colours."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, in_chans=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    white = Image.new("L", (40, 40), 255)
    assert torch.allclose(eval_transform(model)(white), torch.tensor((1 - 0.5) / 0.2))
    assert torch.allclose(eval_transform(model, mean=(0.25,) * 3, std=(0.5,) * 3)(white), torch.tensor(1.5))
    with pytest.raises(UsageError, match=r"mean 0\.1 0\.2 0\.3: this model takes 1 channel, give a number for each"):
        eval_transform(model, mean=(0.1, 0.2, 0.3))


def test_crop_pct_out_of_range_is_refused(small_vit):
    with pytest.raises(UsageError, match=r"crop_pct is 1\.5"):
        eval_transform(small_vit, crop_pct=1.5)
