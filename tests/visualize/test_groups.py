"""Patches are followed through merging and pruning."""

from __future__ import annotations

import pytest
import torch

import ltmp
from helpers import attach_reducing, random_images, tiny_vit
from ltmp.visualize import patch_groups


@pytest.mark.parametrize("variant", ["ltmp", "ltpm", "ltm", "ltp"])
def test_groups_are_the_tokens_that_are_left(variant):
    model, images = tiny_vit(), random_images(4)
    attach_reducing(model, images, variant)
    with torch.inference_mode(), ltmp.record() as calls:
        model(images)
    groups = patch_groups(model, images)
    assert groups.shape == (4, 3, 17)
    distinct = torch.tensor([[len(row[row >= 0].unique()) for row in image] for image in groups])
    assert torch.equal(distinct.float(), calls.kept[0])
    assert (groups[:, :, 0] == 0).all()


@pytest.mark.parametrize("variant", ["ltm", "ltp"])
def test_one_step_does_only_its_kind(variant):
    model, images = tiny_vit(), random_images(4)
    attach_reducing(model, images, variant)
    last = patch_groups(model, images)[:, -1]
    if variant == "ltm":
        assert (last >= 0).all()
    else:
        assert (last < 0).any()
        assert all((image[image >= 0].bincount() <= 1).all() for image in last)


def test_off_thresholds_leave_every_token_alone():
    model, images = ltmp.attach(tiny_vit()), random_images(2)
    assert (patch_groups(model, images) == torch.arange(17)).all()
