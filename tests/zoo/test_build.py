"""Everything that can be wrong with a model's name, arguments or checkpoint raises an error of one sentence."""

from __future__ import annotations

import json
import os
import pickle
import tarfile

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ltmp
from ltmp.checkpoint.metadata import Metadata
from ltmp.cli import main
from ltmp.data import open_dataset
from ltmp.errors import LTMPError, UsageError
from ltmp.zoo.build import build_model, model_name_in

NAME = "vit_tiny_patch16_224"
SMALL = {"depth": 1, "embed_dim": 24}


def build(weights=None, num_classes=5, **kwargs):
    return build_model(NAME, weights=weights, num_classes=num_classes, image_size=32, model_kwargs={**SMALL, **kwargs})


@pytest.fixture
def state():
    return build().state_dict()


def raised(kind, call, *args, **kwargs) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_arguments_reach_the_model():
    model = build()
    assert (model.num_classes, model.patch_embed.img_size, len(model.blocks)) == (5, (32, 32), 1)
    assert not model.training


@pytest.mark.parametrize("form", ["safetensors", "pth", "pth.tar"])
def test_weights_from_file(form, state, tmp_path):
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if form == "pth.tar" else state, path)
    loaded = build(path).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_half_precision_weights_become_float32(state, tmp_path):
    path = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in state.items()}, path)
    assert build(path).head.weight.dtype == torch.float32


def test_unknown_name_suggests_near_ones():
    assert "vit_small_patch16_224" in raised(UsageError, build_model, "vit_smal_patch16_224")


def test_unknown_argument_is_named():
    assert "nonsense" in raised(UsageError, build, nonsense=1)


def test_image_smaller_than_a_patch():
    assert "8x8" in raised(UsageError, build_model, NAME, image_size=8, model_kwargs=SMALL)


def test_pretrained_offline_names_the_local_way(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    message = raised(LTMPError, build_model, NAME, pretrained=True)
    assert "no route to host" in message
    assert "--weights" in message


def test_missing_file(tmp_path):
    assert "gone.safetensors" in raised(LTMPError, build, tmp_path / "gone.safetensors")


@pytest.mark.parametrize("form", ["safetensors", "pth"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_checkpoint(form, damage, state, tmp_path):
    path = tmp_path / f"weights.{form}"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello, this is text", "empty": b""}[damage])
    assert str(path) in raised(LTMPError, build, path)


def test_wrong_class_count_names_the_option(state, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    message = raised(LTMPError, build, path, num_classes=7)
    assert "5 classes" in message
    assert "--num-classes 5" in message


def test_wrong_shape_names_the_parameter(state, tmp_path):
    path = tmp_path / "weights.safetensors"
    state["pos_embed"] = torch.zeros(1, 17, 24)
    save_file(state, path)
    assert "images of 64 pixels but the model takes 32: use --img-size 64" in raised(LTMPError, build, path)


def test_another_models_weights(state, tmp_path):
    path = tmp_path / "weights.safetensors"
    state["other"] = state.pop("norm.bias")
    save_file(state, path)
    message = raised(LTMPError, build, path)
    assert "lacks 'norm.bias'" in message
    assert "has 'other'" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, state, tmp_path):
    path = tmp_path / "weights.safetensors"
    state["norm.bias"][0] = value
    save_file(state, path)
    assert "'norm.bias'" in raised(LTMPError, build, path)


class Code:
    """An object whose unpickling runs code."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A folder that exists only after the code of a pickle was run."""
    yield tmp_path / "unpickled"
    assert not (tmp_path / "unpickled").exists()


@pytest.fixture
def hostile(tmp_path, marker):
    """A folder for `local-dir:` whose weights are a pickle."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": NAME, "pretrained_cfg": {}}))
    torch.save({"head.weight": Code(marker)}, folder / "pytorch_model.bin")
    return folder


def test_a_folder_that_the_user_names_runs_no_code(hostile):
    assert "cannot get the pretrained weights" in raised(
        LTMPError, build_model, f"local-dir:{hostile}", pretrained=True
    )


@pytest.mark.parametrize("way", ["learned", "architecture", "base"])
def test_a_file_may_not_name_a_place_to_load_weights_from(way, hostile, tmp_path, capsys):
    model, path = ltmp.attach(build()), tmp_path / "t.safetensors"
    said = {"learned": "model_name", "architecture": "architecture", "base": "base_model"}[way]
    for place in (f"local-dir:{hostile}", f"hf-hub:{hostile}", "hf-hub:someone/evil", f"file:{hostile}", str(hostile)):
        ltmp.save(model, path, **{said: place})
        if way == "base":
            message = raised(UsageError, ltmp.from_pretrained, path)
            assert "may not choose where weights are loaded from" in message
        else:
            assert main(["eval", "--data", str(tmp_path), "--thresholds", str(path), "--pretrained"]) == 2
            message = " ".join(capsys.readouterr().err.split())
            assert f"names the model {place}" in message
            assert raised(UsageError, ltmp.from_pretrained, path, weights=hostile / "pytorch_model.bin")


@pytest.mark.parametrize(
    "name",
    ["deit_small_patch16_224.fb_in1k", "torchvision:vit_b_16", "open_clip:ViT-B-32/openai", "hf:google/vit", "hf:/a"],
)
def test_names_of_models_that_run_no_code_are_taken(name):
    assert model_name_in(Metadata(model_name=name), "t.safetensors") == name


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "weights_only"])
@pytest.mark.parametrize("name", [NAME, "torchvision:vit_b_16", "open_clip:ViT-B-32", "hf:someone/model"])
def test_arguments_that_load_weights_are_refused(name, argument, marker, tmp_path):
    torch.save({"head.weight": Code(marker)}, tmp_path / "evil.pth")
    value = str(tmp_path / "evil.pth")
    given = {"file": value} if argument.startswith("pretrained_cfg") else value
    message = raised(UsageError, build_model, name, pretrained=True, model_kwargs={argument: given})
    assert f"{argument} cannot be" in message


def test_no_pickle_beside_a_large_tar_is_read(tmp_path, marker):
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
        tar.add(tmp_path / "0.png", "ant/0.png")
    # as large as those that timm keeps an index of, and no room on the disk
    os.truncate(tmp_path / "data.tar", 11 << 30)
    (tmp_path / "data_tarinfos.pickle").write_bytes(pickle.dumps(Code(marker)))
    (tmp_path / "_tarinfos.pickle").write_bytes(pickle.dumps(Code(marker)))
    assert len(open_dataset(tmp_path / "data.tar")) == 1


def test_a_checkpoint_of_another_size_names_the_options(tmp_path):
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 1}
    other = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=7, **shape)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(LTMPError, match=r"images of 48 pixels but the model takes 32 and has 7 classes") as error:
        build_model("vit_tiny_patch16_224", weights=tmp_path / "other.safetensors", image_size=32, model_kwargs=shape)
    assert str(error.value).endswith("use --img-size 48 --num-classes 7")
