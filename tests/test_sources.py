"""Every patch is part of exactly one live token or was pruned, for any host and batch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltmp
from helpers import attach_reducing, random_images, run_blocks, tiny_vit
from ltmp.config import FIXED, LEARNED
from ltmp.hosts.sizes import sizes_of

DEPTH, WIDTH = 3, 16


def traced(model: Any, x: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows, their sizes [B, N'], the source of each token [B, N], and sources after each block [B, L, N]."""
    model.ltmp.train(masked).requires_grad_(masked)
    with torch.no_grad(), ltmp.trace(every_block=True) as calls:
        out = run_blocks(model, x)
    size = sizes_of(out)
    size = torch.ones(out.shape[:2]) if size is None else size
    return out, size, calls.sources[0], calls.blocks[0]


@settings(max_examples=60)
@given(
    images=st.integers(1, 4),
    patches=st.integers(1, 20),
    protected=st.sampled_from([0, 1, 2, 5]),
    variant=st.sampled_from(sorted(LEARNED)),
    merge=st.lists(st.floats(-0.6, 1.1), min_size=DEPTH, max_size=DEPTH),
    prune=st.lists(st.floats(-0.2, 2.0), min_size=DEPTH, max_size=DEPTH),
    masked=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_sources_partition_the_patches(
    images: int,
    patches: int,
    protected: int,
    variant: str,
    merge: list[float],
    prune: list[float],
    masked: bool,
    seed: int,
) -> None:
    prefix = {"reg_tokens": protected - 1} if protected else {"class_token": False, "global_pool": "avg"}
    model = ltmp.attach(tiny_vit(**prefix), ltmp.LTMPConfig(variant=variant))
    tokens = patches + protected
    model.ltmp.set(merge, (torch.tensor(prune) / tokens).tolist())
    x = torch.randn(images, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    check_partition(model, x, masked)


@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
@pytest.mark.parametrize("protected", [1, 2])
@pytest.mark.parametrize("variant", FIXED)
def test_sources_of_fixed_rates(variant: str, protected: int, masked: bool) -> None:
    model = ltmp.attach(tiny_vit(reg_tokens=protected - 1), ltmp.LTMPConfig(variant=variant, r=3))
    check_partition(model, torch.randn(3, 20, WIDTH, generator=torch.Generator().manual_seed(0)), masked)


def check_partition(model: Any, x: Tensor, masked: bool) -> None:
    """Assert that each patch is in one live token or pruned for good, and that sizes are those of the groups."""
    images, tokens, _ = x.shape
    protected = model.num_prefix_tokens
    with ltmp.record() as calls:
        _, size, source, blocks = traced(model, x, masked)
    assert source.dtype == torch.int32
    assert source.shape == (images, tokens)
    for i in range(images):
        # each live row holds as many patches as its size, and no patch is in padding
        held = torch.bincount(source[i][source[i] >= 0], minlength=size.shape[1])
        assert held.tolist() == size[i].tolist()
        assert int(held.sum() + (source[i] < 0).sum()) == tokens
        assert source[i, :protected].tolist() == list(range(protected))
        for block in range(DEPTH):
            live = blocks[i, block][blocks[i, block] >= 0]
            assert len(live.unique()) == calls.kept[0][i, block]
    # pruned patches stay pruned, by the block that is recorded; merged patches stay together
    assert ((blocks < 0) == (blocks >= -1 - torch.arange(DEPTH)[:, None]) & (blocks < 0)).all()
    for before, after in zip(blocks[:, :-1].flatten(0, 1), blocks[:, 1:].flatten(0, 1), strict=True):
        assert torch.equal(after[before < 0], before[before < 0])
        assert all(len(after[before == token].unique()) == 1 for token in before[before >= 0].unique())
    assert torch.equal(blocks[:, -1] < 0, source < 0)


@pytest.mark.parametrize("variant", LEARNED)
def test_packed_masked_and_single_images_agree(variant: str) -> None:
    images = random_images(4)
    model = attach_reducing(tiny_vit(reg_tokens=3), images, variant)
    with torch.no_grad(), ltmp.trace(every_block=True) as batch:
        model(images)
    model.ltmp.train().requires_grad_()
    with torch.no_grad(), ltmp.trace(every_block=True) as masked:
        model(images)
    model.ltmp.eval()
    with torch.no_grad(), ltmp.trace(every_block=True) as single:
        for image in images.split(1):
            model(image)
    assert torch.equal(batch.sources[0], masked.sources[0])
    assert torch.equal(batch.blocks[0], masked.blocks[0])
    assert torch.equal(batch.blocks[0], torch.cat(single.blocks))
    assert (batch.sources[0] != torch.arange(20)).any()


def test_nothing_removed_is_traced_as_such() -> None:
    model, images = ltmp.attach(tiny_vit()), random_images(2)
    reducing = attach_reducing(tiny_vit(), images)
    with torch.no_grad(), ltmp.trace(every_block=True) as calls:
        model(images)
        model.ltmp.train().requires_grad_()
        model(images)
        model(images[:0])
        with ltmp.dense():
            reducing(images)
    assert [len(source) for source in calls.sources] == [2, 2, 0, 2]
    assert all((source == torch.arange(17)).all() for source in calls.sources)
    assert all((block == torch.arange(17)).all() for block in calls.blocks)


def test_outputs_do_not_change_and_memory_is_four_bytes_per_patch() -> None:
    images = random_images(3)
    model = attach_reducing(tiny_vit(), images)
    with torch.no_grad():
        expected = model(images)
        with ltmp.trace() as calls:
            assert torch.equal(model(images), expected)
    assert calls.blocks == []
    assert calls.sources[0].untyped_storage().nbytes() == 4 * 3 * 17


def test_traces_belong_to_their_thread() -> None:
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images)
    with ltmp.trace() as calls:
        thread = threading.Thread(target=torch.no_grad()(model), args=(images,))
        thread.start()
        thread.join()
    assert calls.sources == []


def test_gradient_checkpointing_traces_once() -> None:
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images)
    model.ltmp.train().requires_grad_()
    with ltmp.trace() as plain:
        model(images)
    model.set_grad_checkpointing()
    with ltmp.trace() as recomputed:
        model(images).sum().backward()
    assert len(recomputed.sources) == 1
    assert torch.equal(plain.sources[0], recomputed.sources[0])
