"""One folder holds all that the next verb needs, and a thresholds file says all that it knows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from cases import tiny_hf
from PIL import Image

import ltmp
from helpers import random_images, tiny_vit
from ltmp.bundle import Bundle
from ltmp.checkpoint import read
from ltmp.checkpoint.describe import metadata_of
from ltmp.checkpoint.metadata import Preprocessing
from ltmp.cli import main
from ltmp.data import class_names, eval_transform, make_loader, open_dataset, transforms
from ltmp.data.transforms import eval_settings
from ltmp.errors import LTMPError, UsageError
from ltmp.serve import Deployment
from ltmp.zoo.build import build_model, save_weights

NAME = "vit_tiny_patch16_224"
SHAPE = {"patch_size": 8, "embed_dim": 24, "depth": 3}
OWN = {
    "mean": [0.1, 0.2, 0.3],
    "std": [0.9, 0.8, 0.7],
    "crop_pct": 0.8,
    "crop_mode": "squash",
    "interpolation": "bilinear",
}
NAMES = ["ant", "bee", "cow"]


def built() -> Any:
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=32, num_classes=3, **SHAPE).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def reduced() -> Any:
    model = ltmp.attach(built())
    model.ltmp.set([0.6] * 3, [0.01] * 3)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return ltmp.pack(
        reduced(), tmp_path / "packed", model_kwargs=SHAPE, class_names=NAMES, preprocessing=OWN, target=0.6
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two photographs of each class."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in NAMES:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for k in range(2):
                pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((80, 60)).save(tmp_path / "images" / split / name / f"{k}.png")
    return tmp_path / "images"


@torch.no_grad()
def test_a_folder_gives_the_model_as_it_was(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "bundle.json", "thresholds.safetensors", "weights.safetensors",
    ]  # fmt: skip
    model = ltmp.from_pretrained(folder)
    x = random_images(3, size=32)
    assert torch.equal(model(x), reduced()(x))
    about = read(folder).about
    assert (about.num_classes, about.input_size, about.class_names) == (3, (32, 32), tuple(NAMES))
    about = metadata_of(model)
    assert (about.library, about.target) == ("timm", 0.6)
    assert class_names(model) == NAMES
    settings = eval_settings(model)
    assert all(settings[name] == (tuple(value) if isinstance(value, list) else value) for name, value in OWN.items())
    # packed again it is the same
    again = ltmp.pack(model, folder.parent / "again")
    assert (again / "bundle.json").read_bytes() == (folder / "bundle.json").read_bytes()
    assert read(again).metadata == read(folder).metadata


def test_a_model_of_ones_own_takes_what_the_folder_says(folder: Path) -> None:
    model = built()
    before = sorted(vars(model))
    ltmp.load(model, folder)
    assert class_names(model) == NAMES
    assert eval_settings(model)["crop_mode"] == "squash"
    ltmp.detach(model)
    assert sorted(vars(model)) == before
    assert eval_settings(model)["crop_mode"] == "center"


def test_what_people_change_in_the_json_counts(folder: Path) -> None:
    path = folder / "bundle.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "class_names": ["Ameise", "Biene", "Kuh"]}))
    assert class_names(ltmp.from_pretrained(folder)) == ["Ameise", "Biene", "Kuh"]
    path.write_text(json.dumps({**said, "num_classes": -1}))
    with pytest.raises(LTMPError, match=r"bundle.json does not describe a model \(num_classes is -1"):
        ltmp.from_pretrained(folder)
    path.write_text("[" * 100_000)
    with pytest.raises(LTMPError, match=r"bundle.json does not describe a model"):
        read(folder)


def test_a_file_in_a_folder_may_not_name_a_place_for_weights(folder: Path) -> None:
    said = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**said, "model_name": "local-dir:/tmp/evil"}))
    with pytest.raises(UsageError, match="may not choose where weights are loaded from"):
        ltmp.from_pretrained(folder)
    for argument in ("checkpoint_path", "pretrained_cfg_overlay"):
        evil = {**said, "model_kwargs": {argument: "evil.pth"}}
        (folder / "bundle.json").write_text(json.dumps(evil))
        with pytest.raises(UsageError, match=f"{argument} cannot be an argument"):
            ltmp.from_pretrained(folder)


def test_models_that_nobody_could_build_are_not_packed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="by which name is this model built"):
        ltmp.pack(ltmp.attach(tiny_vit()), tmp_path / "packed")
    with pytest.raises(LTMPError, match="nothing is attached"):
        ltmp.pack(built(), tmp_path / "packed")
    with pytest.raises(UsageError, match="class_names is 'ant', expected a list"):
        ltmp.pack(reduced(), tmp_path / "packed", class_names="ant")
    for names in (["ant", "bee"], [*"abcde"]):
        with pytest.raises(UsageError, match=f"{len(names)} class names for a model with 3 classes"):
            ltmp.pack(reduced(), tmp_path / "packed", model_name=NAME, class_names=names)
    assert not (tmp_path / "packed").exists()


def test_another_bundles_weights_are_not_left_beside(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "model").mkdir()
    with pytest.raises(UsageError, match=r"packed/model is of another bundle, or of none: remove it"):
        ltmp.pack(reduced(), folder, model_kwargs=SHAPE)
    (folder / "model").rmdir()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_bundle_is_replaced_whole_or_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise LTMPError("the disk is full")

    other = reduced()
    other.ltmp.set([0.7] * 3, [0.01] * 3)
    torch.nn.init.zeros_(other.head.weight)
    with monkeypatch.context() as patch:
        patch.setattr("ltmp.bundle.save", fail)
        with pytest.raises(LTMPError, match="the disk is full"):
            ltmp.pack(other, folder, model_kwargs=SHAPE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    ltmp.pack(other, folder, model_kwargs=SHAPE)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)


@torch.no_grad()
def test_a_classifier_of_transformers_is_packed_whole(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "hf"
    labels = dict(enumerate(NAMES))
    tiny_hf("ViTForImageClassification", "ViTConfig", num_labels=3, id2label=labels).save_pretrained(source)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(source)
    model = ltmp.attach(build_model(f"hf:{source}"))
    model.ltmp.set([0.6] * model.ltmp.depth)
    folder = ltmp.pack(model, tmp_path / "packed")
    about = read(folder).about
    assert (about.library, about.class_names, about.num_classes) == ("transformers", tuple(NAMES), 3)
    # where it lay is nobody else's business
    assert str(source) not in (folder / "bundle.json").read_text()
    source.rename(tmp_path / "elsewhere")
    again: Any = ltmp.from_pretrained(folder)
    x = random_images(2)
    assert torch.equal(again(x).logits, model(x).logits)
    assert class_names(again) == NAMES


def test_saving_says_what_learning_found_out(images: Path, tmp_path: Path) -> None:
    model = ltmp.attach(built())
    transform = eval_transform(model, mean=OWN["mean"], crop_pct=0.8)
    loader = make_loader(open_dataset(images, split="train", transform=transform), 2, shuffle=True)
    result = ltmp.learn(model, loader, 0.8, views=4, calibration=4)
    ltmp.save(model, tmp_path / "t.safetensors")
    about = read(tmp_path / "t.safetensors").about
    assert (about.target, about.share, about.class_names) == (0.8, result.share, tuple(NAMES))
    assert (about.preprocessing.mean, about.preprocessing.crop_pct) == (tuple(OWN["mean"]), 0.8)
    # and loading and saving keeps it
    other = built()
    ltmp.load(other, tmp_path / "t.safetensors")
    ltmp.save(other, tmp_path / "again.safetensors", share=0.79)
    again = read(tmp_path / "again.safetensors")
    assert again.metadata == {**read(tmp_path / "t.safetensors").metadata, "share": 0.79}
    # of other thresholds only what is said of the model holds
    other.ltmp.set([0.9] * 3)
    ltmp.save(other, tmp_path / "other.safetensors")
    about = read(tmp_path / "other.safetensors").about
    assert (about.target, about.share, about.class_names) == (None, None, tuple(NAMES))


def test_a_dial_says_it_too(images: Path, tmp_path: Path) -> None:
    model = ltmp.attach(built())
    loader = make_loader(open_dataset(images, split="train", transform=eval_transform(model)), 2)
    ltmp.learn_dial(model, loader, 0.6, 0.9, knots=3, views=0, calibration=4, checked=0)
    ltmp.save(model, tmp_path / "t.safetensors")
    about = read(tmp_path / "t.safetensors").about
    assert about.class_names == tuple(NAMES)
    assert about.preprocessing.crop_mode == "center"
    assert about.dial is not None


def test_what_is_given_goes_before_what_the_folder_says(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ltmp"):
        with pytest.raises(LTMPError, match="use --img-size 32"):
            Bundle.open(folder).build(image_size=48)
        model = Bundle.open(folder).build(image_size=32)
        eval_transform(model, crop_pct=0.95)
        eval_transform(model, crop_pct=0.95)
        eval_transform(model, crop_mode="squash", mean=(0.1, 0.2, 0.3))
    assert [record.getMessage() for record in caplog.records] == [
        f"image_size 48 overrides 32 from {folder}",
        "crop_pct 0.95 overrides 0.8, with which the thresholds were made",
    ]


def test_unknown_preprocessing_is_left_to_the_model(tmp_path: Path) -> None:
    model = reduced()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": "grey", "label_names": ["a\x1b", "b", "c"]}
    ltmp.save(model, tmp_path / "t.safetensors")
    about = read(tmp_path / "t.safetensors").about
    assert about.preprocessing == Preprocessing()
    assert about.class_names == ()


# -- the command line


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def packed(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `ltmp pack` writes of a run of `ltmp dial` and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    save_weights(built(), tmp_path / "own.safetensors")
    kwargs = " ".join(f"{name}={value}" for name, value in SHAPE.items())
    model = ["--model", NAME, "--img-size", 32, "--num-classes", 3, "--model-kwargs", kwargs]
    weights = ["--weights", tmp_path / "own.safetensors"]
    dial = ["dial", "--data", images, *model, *weights, "--low", 0.6, "--high", 0.9, "--target", 0.7, "--crop-pct", 0.8]
    assert run(*dial, "--views", 0, "--out", "run", "--device", "cpu") == 0
    # the shape of the model, its classes and its crop are in the file by now
    assert run("pack", "packed", "--thresholds", "run", *weights) == 0
    return tmp_path / "packed"


def test_verbs_open_a_folder_with_one_argument(
    packed: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pack", "again", "--thresholds", packed) == 0
    assert "next: ltmp serve --thresholds again" in capsys.readouterr().err
    assert read(packed).about.class_names == tuple(NAMES)
    assert read(packed).about.preprocessing.crop_pct == 0.8
    picture = next(images.rglob("*.png"))
    assert run("eval", "--data", images, "--thresholds", packed, "--device", "cpu", "--no-speed") == 0
    assert run("show", picture, "--thresholds", packed, "--out", "shown", "--device", "cpu") == 0
    assert run("export", "--thresholds", packed, "--format", "program", "--out", tmp_path / "m.pt2") == 0
    assert run("predict", images, "--thresholds", packed, "--out", "scores", "--device", "cpu", "--workers", 0) == 0
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "scores")
    assert set(table["names"][0].as_py()) == set(NAMES)
    capsys.readouterr()
    assert run("info", packed) == 0
    assert "class_names: ['ant', 'bee', 'cow']" in capsys.readouterr().out


def test_options_go_before_the_folder_and_say_so(packed: Path, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    # it is said once in a process
    transforms._warn_once.cache_clear()
    evaluate = ["eval", "--data", images, "--thresholds", packed, "--device", "cpu", "--no-speed"]
    assert run(*evaluate, "--crop-pct", 0.9, "--weights", "own.safetensors") == 0
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "crop_pct 0.9 overrides 0.8" in said
    assert "the weights in own.safetensors override those in" in said


def test_a_service_answers_with_names(packed: Path) -> None:
    model = ltmp.from_pretrained(packed)
    deployment = Deployment(model, names=class_names(model, pretrained=False))
    assert deployment.names == tuple(NAMES)
    assert deployment.classes == 3
    # the dial is in the file, too
    model.ltmp.set_budget(0.8)
