"""Patches are followed through merging and pruning."""

from __future__ import annotations

import pytest
import torch

import ltmp
from helpers import attach_reducing, random_images, tiny_vit
from ltmp.visualize import patch_groups, see
from ltmp.visualize.groups import patch_grid


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 4},
        {"class_token": False, "global_pool": "avg"},
        {"img_size": (8, 24)},
        {"img_size": (24, 12), "patch_size": (6, 2)},
    ],
    ids=["plain", "registers", "no-class-token", "wide", "tall-patches"],
)
def test_what_is_seen_is_what_is_recorded(options):
    model = tiny_vit(**options)
    images = torch.nn.functional.interpolate(random_images(3, size=24), model.patch_embed.img_size)
    attach_reducing(model, images)
    with torch.inference_mode(), ltmp.record() as calls:
        model(images)
    for one, kept, share in zip(see(model, images), calls.kept[0], calls.share(), strict=True):
        assert one.groups.shape == (3, *model.patch_embed.grid_size)
        assert one.kept == kept.tolist()
        assert one.tokens == calls.geometry[0].tokens
        assert one.share == pytest.approx(share.item())
        alive = [len(groups[groups >= 0].unique()) + model.num_prefix_tokens for groups in one.groups]
        assert alive == one.kept


def test_dynamic_sizes_are_seen():
    model = ltmp.attach(tiny_vit(dynamic_img_size=True))
    assert see(model, torch.randn(1, 3, 12, 28))[0].groups.shape == (3, 3, 7)


def test_a_last_block_that_drops_everything_is_not_shown():
    model = ltmp.attach(tiny_vit())
    model.ltmp.set(None, [0.0, 0.0, 1.0])
    (one,) = see(model, random_images(1))
    assert (one.shown_blocks(), one.left, one.kept) == ([0, 1], 17, [17, 17, 1])


def test_grids_without_a_stated_patch_size():
    plain = torch.nn.Linear(1, 1)
    assert patch_grid(plain, (224, 224), 196) == (14, 14)
    assert patch_grid(plain, (64, 128), 32) == (4, 8)
    with pytest.raises(ltmp.LTMPError, match="form no grid"):
        patch_grid(plain, (64, 64), 7)
