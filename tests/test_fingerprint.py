"""Fingerprints tell what changed, and images that were seen from those that were not."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ltmp
from helpers import random_images, tiny_vit
from ltmp.fingerprint import MAX_KEYS, Seen, image_keys, of_tensors
from ltmp.learning.batches import watched


def test_every_bit_name_type_and_shape_counts():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    same = {"b": torch.ones(2, 3), "a": torch.arange(6.0)}
    others = [
        {**tensors, "a": torch.arange(6.0).nextafter(torch.tensor(9.0))},
        {**tensors, "a": torch.arange(6.0).half()},
        {**tensors, "b": torch.ones(3, 2)},
        {"a": torch.arange(6.0), "c": torch.ones(2, 3)},
    ]
    assert of_tensors(tensors) == of_tensors(same)
    assert len({of_tensors(tensors), *map(of_tensors, others)}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_any_type_have_a_fingerprint(dtype):
    assert len(of_tensors({"a": torch.ones(3).to(dtype), "scalar": torch.tensor(1).to(dtype)})) == 32


def test_the_last_bits_of_an_image_do_not_count_and_a_patch_does():
    images = random_images(64)
    keys = image_keys(images)
    changed = images.clone()
    changed[:, :, :4, :4] += 1
    assert len(keys.unique()) == 64
    assert (image_keys(images * (1 + 1e-7)) == keys).float().mean() > 0.9
    assert not torch.isin(image_keys(changed), keys).any()


def test_few_images_are_told_apart_exactly():
    images = random_images(40)
    seen = Seen()
    for batch in images[:30].split(7):
        seen.add(batch)
    seen.add(images[:5])
    assert seen.images == 30
    assert seen.count(image_keys(images[20:])) == 10
    assert seen.count(image_keys(images[30:])) == 0


def test_many_images_are_sampled_and_small():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(2**63 - 1, (60_000,), generator=generator)
    seen = Seen()
    for part in keys[:50_000].split(1000):
        seen.add_keys(part)
    assert len(seen.keys) == MAX_KEYS
    assert seen.keys.numel() * 8 <= 32 * 1024
    assert seen.images == pytest.approx(50_000, rel=0.05)
    assert seen.count(keys[45_000:]) == pytest.approx(5_000, rel=0.15)
    assert seen.count(keys[50_000:]) == 0


def test_watching_hands_batches_on():
    seen = Seen()
    batches = [(random_images(2, seed=i), torch.tensor([0, 1])) for i in range(3)]
    assert [images.shape for images, _ in watched(seen, batches)] == [(2, 3, 16, 16)] * 3
    assert seen.images == 6


@pytest.mark.parametrize("seen", [torch.ones(3), torch.zeros(2, 2, dtype=torch.int64), torch.arange(MAX_KEYS + 1)])
def test_a_sketch_that_cannot_be_one_is_refused(seen, tmp_path):
    model = ltmp.attach(tiny_vit())
    ltmp.save(model, tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in ("merge", "prune")}, file.metadata()
    save_file({**tensors, "seen": seen}, tmp_path / "t.safetensors", metadata=metadata)
    with pytest.raises(ltmp.LTMPError, match="'seen' is "):
        ltmp.load(model, tmp_path / "t.safetensors")
