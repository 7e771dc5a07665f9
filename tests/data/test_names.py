"""Names of classes."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import timm

from ltmp.data import class_names
from ltmp.errors import UsageError


@pytest.fixture(scope="module")
def imagenet():
    return timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=1)


def test_folders_go_before_the_model_and_a_file_before_both(imagenet, tmp_path):
    folders = SimpleNamespace(class_to_index={"ant": 0, "cow": 2})
    assert class_names(imagenet, folders) == ["ant", "class 1", "cow"]
    (tmp_path / "names.txt").write_text("crane\n" * 1000)
    assert class_names(imagenet, folders, tmp_path / "names.txt") == ["crane"] * 1000
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="2 class names for a model with 1000 classes"):
        class_names(imagenet, folders, tmp_path / "names.txt")


def test_imagenet_is_put_into_words(imagenet):
    assert class_names(imagenet)[1] == "goldfish"
    assert class_names(imagenet, SimpleNamespace(class_to_index={"n01443537": 0, "other": 1})) == ["goldfish", "other"]


def test_hugging_face_brings_its_own(imagenet):
    model = SimpleNamespace(config=SimpleNamespace(id2label={1: "dog", 0: "cat"}))
    assert class_names(model) == ["cat", "dog"]


def test_nobody_knows():
    assert class_names(SimpleNamespace(config=SimpleNamespace(id2label={0: "LABEL_0"}))) == []


def test_a_bad_file_is_named(imagenet, tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(1 << 30)
    for name, why in (
        ("no", r"no class map .*no\.txt"),
        ("pipe", r"pipe\.txt cannot be read \(not a regular file"),
        ("huge", r"huge\.txt cannot be read \(over 17 MB"),
    ):
        with pytest.raises(UsageError, match=why):
            class_names(imagenet, None, tmp_path / f"{name}.txt")
