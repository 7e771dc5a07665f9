"""Between the blocks of a reduced model, and after them, every patch is in its place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

import ltmp
from helpers import assert_close, attach_reducing, embed, random_images, run_blocks, run_recorded, tiny_vit
from ltmp.config import LEARNED

HOSTS: dict[str, Callable[[], Any]] = {
    "plain": tiny_vit,
    "avg": partial(tiny_vit, global_pool="avg"),
    "registers": partial(tiny_vit, reg_tokens=4),
    "distilled": partial(tiny_vit, VisionTransformerDistilled),
    "no-class-token": partial(tiny_vit, class_token=False, global_pool="avg"),
    "wide": partial(tiny_vit, img_size=(8, 24)),
    "no-pooling": partial(tiny_vit, global_pool=""),
}


def images_of(model: Any) -> Tensor:
    return torch.nn.functional.interpolate(random_images(3, size=24), model.patch_embed.img_size)


def reducing(name: str, variant: str = "ltmp", masked: bool = False) -> tuple[Any, Tensor]:
    model = HOSTS[name]()
    images = images_of(model)
    attach_reducing(model, images, variant).ltmp.train(masked).requires_grad_(masked)
    return model, images


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
@pytest.mark.parametrize("name", HOSTS)
def test_off_thresholds_are_the_identity(name: str, masked: bool) -> None:
    model = HOSTS[name]()
    images = images_of(model)
    expected, between = model.forward_intermediates(images)
    whole = model.forward_features(images)
    ltmp.attach(model).ltmp.train(masked).requires_grad_(masked)
    last, found = model.forward_intermediates(images)
    with ltmp.unmerge():
        features = model.forward_features(images)
    atol = 1e-5 if masked else 0.0
    assert_close(last, expected, atol)
    assert_close(features, whole, atol)
    for a, b in zip(found, between, strict=True):
        assert_close(a, b, atol)


@torch.no_grad()
@pytest.mark.parametrize("variant", LEARNED)
@pytest.mark.parametrize("name", HOSTS)
def test_grids_are_whole_and_packed_equals_masked(name: str, variant: str) -> None:
    model, images = reducing(name, variant)
    rows, columns = model.patch_embed.grid_size
    last, between = model.forward_intermediates(images)
    assert [tuple(grid.shape) for grid in between] == [(3, 16, rows, columns)] * 3
    assert last.shape == (3, model.num_prefix_tokens + rows * columns, 16)
    model.ltmp.train().requires_grad_()
    masked_last, masked_between = model.forward_intermediates(images)
    for a, b in zip([last, *between], [masked_last, *masked_between], strict=True):
        assert_close(a, b, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
@pytest.mark.parametrize("name", HOSTS)
def test_every_patch_has_the_features_of_its_token(name: str, masked: bool) -> None:
    """And pruned ones what they had after the attention of the block that dropped them."""
    model, images = reducing(name, masked=masked)
    x = embed(model, images)
    with ltmp.trace() as calls:
        rows = run_blocks(model, x)
    with ltmp.unmerge():
        grid = run_blocks(model, x)
    source = calls.sources[0]
    live = source >= 0
    image = torch.arange(3)[:, None].expand_as(source)
    assert (~live).any()
    assert_close(grid[live], rows[image[live], source[live].long()], 1e-6)
    assert_close(grid[~live], dropped(model, x, source)[~live], 1e-5)


def dropped(model: Any, x: Tensor, source: Tensor) -> Tensor:
    """[B, N, C], what each pruned patch was after the attention of the block that dropped it, block by block."""
    merge, prune = model.ltmp.merge.clone(), model.ltmp.prune.clone()
    found = torch.zeros_like(x)
    for block in range(model.ltmp.depth):
        # the same blocks, but this one neither merges, prunes nor has an MLP; those after it do nothing
        model.ltmp.set(merge.where(torch.arange(len(merge)) < block, 1.0), prune * (torch.arange(len(prune)) < block))
        host = model.blocks[block]
        mlp, host.mlp = host.mlp, torch.nn.Identity()
        handle = host.mlp.register_forward_hook(lambda *_: torch.zeros(()))
        y = model.blocks[: block + 1](x)
        handle.remove()
        host.mlp = mlp
        found = torch.where((source == -1 - block)[..., None], y, found)
    model.ltmp.set(merge, prune)
    return found


@torch.no_grad()
def test_tokens_are_removed_all_the_same_and_counted() -> None:
    model, images = reducing("plain")
    _, expected = run_recorded(model, images)
    with ltmp.record() as calls, ltmp.trace() as traced:
        model.forward_intermediates(images)
        with ltmp.unmerge():
            model.forward_features(images)
    assert [kept.tolist() for kept in calls.kept] == [expected.tolist()] * 2
    assert (expected[:, -1] < 17).all()
    assert len(traced.sources) == 2


@torch.no_grad()
def test_a_last_block_that_drops_all_that_nobody_reads_is_read_here() -> None:
    model, images = tiny_vit(), random_images(2)
    ltmp.attach(model).ltmp.set(None, [0.0, 0.0, 1.0])
    with ltmp.dense():
        expected = model.forward_features(images)
    with ltmp.unmerge():
        assert_close(model.forward_features(images), expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {"indices": [1], "stop_early": True}, {"indices": 2, "norm": True, "output_fmt": "NLC"},
    {"return_prefix_tokens": True, "intermediates_only": True},
])  # fmt: skip
def test_every_option_of_the_host(options: dict[str, Any]) -> None:
    model, images = reducing("plain")
    found = model.forward_intermediates(images, **options)
    with ltmp.dense():
        expected = model.forward_intermediates(images, **options)
    shapes = [[t.shape for t in tensors(result)] for result in (found, expected)]
    assert shapes[0] == shapes[1]


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in tensors(part)]


@torch.no_grad()
def test_intermediate_layers_of_dino() -> None:
    model, images = reducing("plain")
    (last,) = model.get_intermediate_layers(images, reshape=True)
    assert last.shape == (3, 16, 4, 4)


@torch.no_grad()
@pytest.mark.parametrize("prune", [False, True])
def test_timm_feature_extractors(prune: bool) -> None:
    """Built first and attached then, or around a model that is attached."""
    if prune:
        network = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, out_indices=(1, 3)).eval()
        ltmp.attach(network).ltmp.set([0.3] * 4, [0.0, 0.05, 0.05, 0.05])
    else:
        model = ltmp.attach(timm.create_model("vit_tiny_patch16_224", img_size=64).eval())
        model.ltmp.set([0.3] * 12, [0.0, *[0.05] * 11])
        network = FeatureGetterNet(model, out_indices=(1, 3), prune=False)
    images = random_images(2, size=64)
    with ltmp.record() as calls:
        found = network(images)
    assert [grid.shape for grid in found] == [(2, 192, 4, 4)] * 2
    assert (calls.kept[0][:, -1] < 17).all()
    ltmp.detach(network)
    assert [grid.shape for grid in network(images)] == [(2, 192, 4, 4)] * 2


@torch.no_grad()
def test_blocks_cut_off_an_attached_model_are_noticed() -> None:
    """Off, the model is the host; reduced, its thresholds are for other blocks."""
    model, images = reducing("plain")
    model.prune_intermediate_layers([0])
    with pytest.raises(ltmp.LTMPError, match=r"blocks .* changed after attaching.*ltmp\.detach\(model\) first"):
        model(images)
    with ltmp.dense():
        dense = model(images)
    ltmp.detach(model)
    assert len(model.blocks) == 1
    assert torch.equal(model(images), dense)


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_look_between_their_own_blocks(clone: Callable[[Any], Any]) -> None:
    model, images = reducing("plain")
    expected, _ = model.forward_intermediates(images)
    twin = clone(model)
    model.blocks[0].mlp.fc2.weight.zero_()
    assert torch.equal(twin.forward_intermediates(images)[0], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_images_and_thresholds(checkpointing: bool) -> None:
    model, images = reducing("plain", masked=True)
    images.requires_grad_()
    model.set_grad_checkpointing(checkpointing)
    _, between = model.forward_intermediates(images)
    sum(grid.square().mean() for grid in between).backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.ltmp.parameters())
    if checkpointing:
        gradient = images.grad.clone()
        images.grad = None
        model.set_grad_checkpointing(False)
        sum(grid.square().mean() for grid in model.forward_intermediates(images)[1]).backward()
        assert_close(images.grad, gradient, 1e-6)


@torch.no_grad()
def test_a_host_that_changes_its_features_between_blocks_is_refused() -> None:
    model, images = reducing("plain")
    x = embed(model, images)
    first, second, _ = model.blocks
    x = first(x) + 0
    with pytest.raises(ltmp.LTMPError, match=r"block 1 .* was given something else.*ltmp\.dense"):
        second(x)
