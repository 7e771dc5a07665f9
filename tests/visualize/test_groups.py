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
    distinct = torch.tensor([[len(set(row.tolist()) - {-1}) for row in image] for image in groups])
    assert torch.equal(distinct.float(), calls.kept[0])
    assert (groups[:, :, 0] == 0).all()


@pytest.mark.parametrize("variant", ["ltm", "ltp"])
def test_one_step_does_only_its_kind(variant):
    model, images = tiny_vit(), random_images(4)
    attach_reducing(model, images, variant)
    groups, own = patch_groups(model, images), torch.arange(17)
    if variant == "ltm":
        assert (groups >= 0).all()
        assert (groups[:, -1] != own).any()
    else:
        assert ((groups == own) | (groups == -1)).all()
        assert (groups[:, -1] == -1).any()


def test_what_is_gone_stays_gone_and_groups_only_grow():
    model, images = tiny_vit(), random_images(4)
    attach_reducing(model, images)
    groups = patch_groups(model, images)
    for earlier, later in zip(groups[:, :-1].flatten(0, 1), groups[:, 1:].flatten(0, 1), strict=True):
        assert (later[earlier == -1] == -1).all()
        for group in earlier[earlier >= 0].unique():
            assert len(later[earlier == group].unique()) == 1


def test_training_form_gives_the_same_groups():
    model, images = tiny_vit(), random_images(4)
    attach_reducing(model, images)
    deployed = patch_groups(model, images)
    model.ltmp.train()
    assert torch.equal(patch_groups(model, images), deployed)


def test_off_thresholds_leave_every_token_alone():
    model, images = ltmp.attach(tiny_vit()), random_images(2)
    assert (patch_groups(model, images) == torch.arange(17)).all()
