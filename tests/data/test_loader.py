"""The order is a function of seed and position; broken images are counted, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from ltmp.data import make_loader, open_dataset
from ltmp.errors import LTMPError, UsageError


def first_pixel(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)[0, 0]).long()


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count), torch.zeros(count, dtype=torch.long))


def seen(batches) -> list[int]:
    return [int(value) for images, _ in batches for value in images]


def test_one_pass_in_order():
    loader = make_loader(numbers(7), 3)
    assert [images.tolist() for images, _ in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(loader) == 3


def test_shuffle_depends_on_seed_and_epoch_only():
    first, again = (make_loader(numbers(10), 4, shuffle=True, seed=3) for _ in range(2))
    torch.manual_seed(1)
    order = seen(first.stream(0, 30))
    torch.manual_seed(2)
    assert order == seen(again.stream(0, 30))
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != seen(make_loader(numbers(10), 4, shuffle=True, seed=4).stream(0, 30))


@pytest.mark.parametrize("start", [1, 8, 10, 17])
def test_a_later_start_continues_exactly(start):
    loader = make_loader(numbers(10), 4, shuffle=True, seed=3)
    assert seen(loader.stream(start, 25)) == seen(loader.stream(0, 25))[start:]


def test_iterating_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    list(make_loader(numbers(5), 2, shuffle=True))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_and_counted(class_folders, workers):
    (class_folders / "bee" / "1.png").write_bytes(b"")
    (class_folders / "bee" / "2.png").write_bytes(b"")
    loader = make_loader(open_dataset(class_folders, transform=first_pixel), 2, workers=workers)
    pairs = [(int(i[0]), int(label)) for images, labels in loader for i, label in zip(images, labels, strict=True)]
    assert pairs == [(0, 0)] * 4 + [(1, 1)] * 2 + [(2, 2)] * 4
    assert sorted(name[-9:] for name in loader.skipped) == ["bee/1.png", "bee/2.png"]
    list(loader)
    assert len(loader.skipped) == 2


def test_a_batch_of_broken_images_only_is_left_out(class_folders):
    for k in range(4):
        (class_folders / "ant" / f"{k}.png").write_bytes(b"")
    loader = make_loader(open_dataset(class_folders, transform=first_pixel), 4)
    assert [labels.tolist() for _, labels in loader] == [[1] * 4, [2] * 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_refuses_a_broken_image_by_name(class_folders, workers):
    (class_folders / "bee" / "1.png").write_bytes(b"")
    loader = make_loader(open_dataset(class_folders, transform=first_pixel), 4, workers=workers, strict=True)
    with pytest.raises(LTMPError, match=r"bee/1\.png cannot be read") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


def test_nothing_readable_is_an_error(class_folders):
    for file in class_folders.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(LTMPError, match="none of the 12 images"):
        list(make_loader(open_dataset(class_folders), 4))


def test_batch_size_is_checked():
    with pytest.raises(UsageError, match="at least 1"):
        make_loader(numbers(3), 0)


class Streaming(IterableDataset):
    def __iter__(self):
        return iter((torch.tensor(k), 0) for k in range(6))


def test_streaming_source_runs_over_epochs_and_resumes():
    loader = make_loader(Streaming(), 2)
    assert seen(loader) == [0, 1, 2, 3, 4, 5]
    assert seen(loader.stream(0, 10)) == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert seen(loader.stream(4, 10)) == [4, 5, 0, 1, 2, 3]


@pytest.mark.parametrize("done", range(7))
def test_streaming_source_resumes_at_any_batch(done):
    loader = make_loader(Streaming(), 4)
    everything = [images.tolist() for images, _ in loader.stream(0, 28)]
    assert len(everything) == 7
    assert [images.tolist() for images, _ in loader.stream(4 * done, 28)] == everything[done:]


def test_streaming_source_without_images_is_an_error():
    class Empty(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(LTMPError, match="returned no images"):
        list(make_loader(Empty(), 2).stream(0, 4))
