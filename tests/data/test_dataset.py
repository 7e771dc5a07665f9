"""Folders, tars and unlabelled images; order and labels stay where a broken image is skipped."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from ltmp.data import Broken, check_classes, make_loader, open_dataset
from ltmp.errors import LTMPError, UsageError

TESTBED = Path(__file__).parents[3] / "shared" / "testbed"


def first_pixel(image) -> np.ndarray:
    return pixel(image).astype(np.int64)


def pixel(image) -> np.ndarray:
    return np.asarray(image)[0, 0]


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_labels_follow_class_folders(form, class_folders, class_tar):
    data = open_dataset(class_folders if form == "folder" else class_tar)
    assert data.class_to_index == {"ant": 0, "bee": 1, "cow": 2}
    assert [data[i][1] for i in range(len(data))] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(pixel(data[i][0])[0] == data[i][1] for i in range(len(data)))


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_files_are_closed_once_read(form, class_folders, class_tar):
    data = open_dataset(class_folders if form == "folder" else class_tar)
    read, opened = data.source, []

    class Watched:
        def __getitem__(self, index):
            opened.append(read[index])
            return opened[-1]

    data.source = Watched()
    assert data[0][1] == 0
    assert [file.closed for file, _ in opened] == [True]


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_flat_images_have_no_labels(form, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (4, 4), (k, 0, 0)).save(folder / f"{k}.png")
    source = folder
    if form == "tar":
        source = tmp_path / "flat.tar"
        with tarfile.open(source, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.add(file, arcname=f"./{file.name}")
    data = open_dataset(source)
    assert not data.labelled
    assert [(pixel(image)[0], label) for image, label in data] == [(0, -1), (1, -1), (2, -1)]


def test_labels_can_be_ignored(class_folders):
    assert {label for _, label in open_dataset(class_folders, labelled=False)} == {-1}


@pytest.mark.parametrize("name", ["val", "validation"])
def test_split_folder_rule(name, class_folders, tmp_path):
    root = tmp_path / "both"
    (root / "train" / "ant").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(root / "train" / "ant" / "0.png")
    class_folders.rename(root / name)
    assert len(open_dataset(root, split="train")) == 1
    assert len(open_dataset(root, split="validation")) == 12


@pytest.mark.parametrize(("there", "asked"), [("train", "validation"), ("val", "train")])
def test_other_split_is_never_taken_instead(there, asked, class_folders, tmp_path):
    root = tmp_path / "half"
    root.mkdir()
    class_folders.rename(root / there)
    with pytest.raises(LTMPError, match=f"has {there}/ but no {'val' if asked == 'validation' else 'train'}/"):
        open_dataset(root, split=asked)


def test_a_class_may_be_called_train(class_folders):
    (class_folders / "cow").rename(class_folders / "train")
    assert open_dataset(class_folders, split="train").class_to_index == {"ant": 0, "bee": 1, "train": 2}


def test_splits_without_labels(class_folders, tmp_path):
    root = tmp_path / "flat"
    root.mkdir()
    (class_folders / "ant").rename(root / "train")
    (class_folders / "bee").rename(root / "val")
    data = open_dataset(root, split="train")
    assert (len(data), data.labelled) == (4, False)


def test_broken_images_keep_their_place(class_folders):
    (class_folders / "bee" / "1.png").write_bytes(b"")
    (class_folders / "cow" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    data = open_dataset(class_folders)
    found = {i: data[i] for i in range(len(data))}
    broken = {i: item for i, item in found.items() if isinstance(item, Broken)}
    assert sorted(broken) == [5, 10]
    assert broken[5].name.endswith("bee/1.png")
    assert all(item[1] == i // 4 for i, item in found.items() if i not in broken)


@pytest.mark.parametrize("maker", ["missing", "empty folder", "empty tar", "file", "no tar", "compressed tar"])
def test_what_holds_no_images_is_refused_by_name(maker, tmp_path):
    path, expected = tmp_path / "data", LTMPError
    if maker == "missing":
        expected = UsageError
    elif maker == "empty folder":
        path.mkdir()
        (path / "notes.md").write_text("no images")
    elif maker == "file":
        path.write_text("hello")
        expected = UsageError
    else:
        path = tmp_path / "data.tar"
        if maker == "no tar":
            path.write_bytes(b"x" * 2000)
        else:
            tarfile.open(path, "w:gz" if maker == "compressed tar" else "w").close()
    with pytest.raises(expected) as caught:
        open_dataset(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_beside_class_folders_are_refused(class_folders):
    Image.new("RGB", (4, 4)).save(class_folders / "stray.png")
    with pytest.raises(LTMPError, match="beside its class folders"):
        open_dataset(class_folders)
    assert len(open_dataset(class_folders, labelled=False)) == 13


def test_timm_dataset_that_cannot_be_opened_is_named():
    with pytest.raises(LTMPError, match=r"torch/nonsense.*validation"):
        open_dataset("torch/nonsense")


def test_torchvision_dataset_by_name(tmp_path):
    folder = tmp_path / "validation" / "ant"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4), (7, 0, 0)).save(folder / "a.png")
    data = open_dataset("torch/image_folder", root=tmp_path)
    assert (pixel(data[0][0])[0], data[0][1]) == (7, 0)


def test_class_count_must_match_the_head(class_folders, tmp_path):
    data = open_dataset(class_folders)
    check_classes(data, 3)
    with pytest.raises(LTMPError, match=r"3 classes but the model's head has 5.*class map"):
        check_classes(data, 5)
    check_classes(open_dataset(class_folders, labelled=False), 5)


def test_class_map_numbers_the_classes(class_folders, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("cow\nfly\nbee\nant\n")
    data = open_dataset(class_folders, class_map=names)
    assert [data[i][1] for i in (0, 4, 8)] == [3, 2, 0]
    check_classes(data, 4, class_map=names)
    with pytest.raises(LTMPError, match="up to 3 but the model's head has 2"):
        check_classes(data, 2, class_map={"ant": 3})
    for classes in (2, 5):
        with pytest.raises(UsageError, match=f"4 class names for a model with {classes} classes"):
            check_classes(data, classes, class_map=names)
    names.write_text("cow\nfly\nfly\nant\n")
    with pytest.raises(UsageError, match=r"classes\.txt: 'fly' is listed twice"):
        open_dataset(class_folders, class_map=names)
    with pytest.raises(LTMPError, match="no images of the classes in the class map"):
        open_dataset(class_folders, class_map={"fly": 0})
    with pytest.raises(UsageError, match=r"\.txt"):
        open_dataset(class_folders, class_map=tmp_path / "missing.txt")


def test_tar_serves_several_workers(class_tar):
    data = open_dataset(class_tar, transform=first_pixel)
    assert data[0][1] == 0  # the parent has read from the tar before the workers start
    pairs = [
        (int(image[0]), int(label))
        for images, labels in make_loader(data, 2, workers=2)
        for image, label in zip(images, labels, strict=True)
    ]
    assert pairs == [(c, c) for c in range(3) for _ in range(4)]


def test_plain_dataloader_works_where_nothing_is_broken(class_folders):
    data = open_dataset(class_folders, transform=lambda image: np.array(image))
    images, labels = next(iter(DataLoader(data, batch_size=12)))
    assert images.shape == (12, 8, 8, 3)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.skipif(not TESTBED.exists(), reason="needs the shared testbed's val.tar")
def test_testbed_tar():
    data = open_dataset(TESTBED / "val.tar")
    assert (len(data), len(data.class_to_index)) == (2000, 200)
    assert data[0][0].size == (64, 64)
