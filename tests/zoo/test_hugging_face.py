"""Classifiers of Hugging Face by folder or name: weights and preprocessing as in transformers, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import tiny_hf
from PIL import Image
from towers import ATTACHED

import ltmp
from ltmp.cli import main
from ltmp.data import eval_transform
from ltmp.errors import LTMPError, MissingExtraError, UsageError
from ltmp.zoo.build import build_model, plain_state, save_weights
from ltmp.zoo.hugging_face import translate

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved classifier of three classes."""
    model = tiny_hf("ViTForImageClassification", "ViTConfig", num_labels=3)
    path = tmp_path / "tiny"
    model.save_pretrained(path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(path)
    return path


def raised(kind: type[LTMPError], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        build_model(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@torch.no_grad()
def test_a_folder_gives_its_model_and_its_transform(folder: Path) -> None:
    model: Any = build_model(f"hf:{folder}")
    own = transformers.ViTForImageClassification.from_pretrained(folder)
    assert not model.training
    assert model.num_classes == 3
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x).logits, own.eval()(x).logits)
    for either in (model, own):
        text = str(eval_transform(either))
        assert "size=(16, 16)" in text
        assert "bicubic" in text
        assert "0.5000, 0.5000, 0.5000" in text


@torch.no_grad()
def test_other_weights_are_saved_as_such_a_folder(folder: Path, tmp_path: Path) -> None:
    model: Any = ltmp.attach(build_model(f"hf:{folder}"))
    model.vit.layernorm.weight.add_(1)
    save_weights(model, tmp_path / "tuned")
    again: Any = build_model(f"hf:{tmp_path / 'tuned'}")
    assert again.pretrained_cfg == model.pretrained_cfg
    ours = plain_state(model)
    assert ours.keys() == again.state_dict().keys()
    assert all(torch.equal(value, ours[name]) for name, value in again.state_dict().items())


def test_half_precision_weights_become_float32(folder: Path) -> None:
    transformers.ViTForImageClassification.from_pretrained(folder).half().save_pretrained(folder)
    assert next(build_model(f"hf:{folder}").parameters()).dtype == torch.float32


def test_a_model_without_a_trained_head_is_refused(folder: Path) -> None:
    model = tiny_hf("ViTModel", "ViTConfig")
    model.save_pretrained(folder)
    assert "'classifier.bias'" in raised(LTMPError, f"hf:{folder}")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_hf("ViTForImageClassification", "ViTConfig").state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in raised(LTMPError, f"hf:{folder}")


def test_code_that_comes_with_a_model_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "strange"
    config["auto_map"] = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForImageClassification")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    raised(LTMPError, f"hf:{folder}")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["trust_remote_code", "use_safetensors"])
def test_safety_cannot_be_switched_off(folder: Path, name: str) -> None:
    assert name in raised(UsageError, f"hf:{folder}", model_kwargs={name: True})


def test_what_the_model_brings_is_not_taken(folder: Path) -> None:
    assert "image_size, num_classes" in raised(UsageError, f"hf:{folder}", num_classes=3, image_size=32)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to the hub.\nMore lines.")

    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", unreachable)
    message = raised(LTMPError, "hf:google/vit-base-patch16-224")
    assert "couldn't connect" in message
    assert "hf:FOLDER" in message


def test_without_an_image_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    assert "image processor" in raised(LTMPError, f"hf:{folder}")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "ltmp[transformers]" in raised(MissingExtraError, "hf:any")


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "squashed": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    "wide": ("ViTImageProcessor", {"size": {"height": 32, "width": 48}}),
    "cropped": ("BitImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    "deit": ("DeiTImageProcessor", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}),
    "not-normalised": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_the_processor_would(name: str) -> None:
    cls, settings = PROCESSORS[name]
    processor = getattr(transformers, cls)(**settings)
    model: Any = torch.nn.Linear(1, 1)
    model.pretrained_cfg = translate(processor.to_dict())
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    found = eval_transform(model)(image)
    assert found.shape == expected.shape
    # both resize with antialiasing, in their own rounding: a grey level is 0.004 before and 0.008 to 0.016 after
    assert (found - expected).abs().mean() < 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False}, {"size": {"longest_edge": 32}}, {"rescale_factor": 1 / 127.5},
        {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}},
    ],
)  # fmt: skip
def test_what_timm_cannot_do_is_refused(settings: dict[str, Any]) -> None:
    plain = {"do_resize": True, "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    translate(plain)
    with pytest.raises(UsageError, match="no transform of timm"):
        translate({**plain, **settings})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images of each of three classes in train/ and val/."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee", "cow"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for k in range(2):
                pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{k}.png")
    return tmp_path / "images"


def test_command_line(folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["--data", str(images), "--device", "cpu"]
    learn = ["--views", "12", "--batch-size", "3", "--target", "0.7"]
    assert main(["learn", "--model", f"hf:{folder}", *own, *learn]) == 0
    file = tmp_path / "runs" / "tiny-ltmp-0.7" / "thresholds.safetensors"
    # the file says which model it is for
    assert main(["eval", *own, "--thresholds", str(file), "--json", str(tmp_path / "eval.json")]) == 0
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert (measured["images"], measured["tokens"]) == (6, 17)
    assert measured["share"] < 0.9


@pytest.mark.slow
def test_bench(folder: Path, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "thresholds.safetensors"
    model = ltmp.attach(build_model(f"hf:{folder}"))
    model.ltmp.set([0.5] * 3, [0.03] * 3)
    ltmp.save(model, file, model_name=f"hf:{folder}")
    own = ["--data", str(images), "--device", "cpu", "--thresholds", str(file), "--batch-size", "2"]
    quick = ["--seconds", "0.02", "--no-compile", "--no-baseline", "--json", str(tmp_path / "bench.json")]
    assert main(["bench", *own, *quick]) == 0
    assert json.loads((tmp_path / "bench.json").read_text())["rows"]


def saved(name: str, path: Path) -> str:
    """A saved model of any kind with its processor, by its name on the command line."""
    model = tiny_hf(name, "Dinov2Config", patch_size=4) if name == "Dinov2Model" else ATTACHED[name].build()
    model.save_pretrained(path / name)
    kind = transformers.CLIPImageProcessor if name.startswith(("Llava", "Qwen")) else transformers.ViTImageProcessor
    sizes = {"size": {"height": 16, "width": 16}}
    kind(**sizes, **({"crop_size": sizes["size"]} if kind is transformers.CLIPImageProcessor else {})).save_pretrained(
        path / name
    )
    return f"hf:{path / name}"


@pytest.mark.parametrize("name", ["DepthAnythingForDepthEstimation", "LlavaForConditionalGeneration", "Dinov2Model"])
def test_bench_and_show_take_models_of_every_kind(name: str, images: Path, tmp_path: Path) -> None:
    model = saved(name, tmp_path)
    quick = ["--device", "cpu", "--batch-size", "2", "--seconds", "0.02", "--no-compile", "--no-baseline"]
    assert main(["bench", "--model", model, "--share", "0.7", *quick, "--json", str(tmp_path / "bench.json")]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {"dense", "packed"} <= {row["way"] for row in rows}
    assert not any(row["note"] for row in rows)
    network = ltmp.attach(build_model(model, classifier=False))
    assert type(network).__name__ == {"LlavaForConditionalGeneration": "CLIPVisionModel"}.get(name, name)
    network.ltmp.set([0.5] * network.ltmp.depth, [0.01] * network.ltmp.depth)
    ltmp.save(network, tmp_path / "thresholds.safetensors")
    shown = [
        "show",
        str(next(images.rglob("*.png"))),
        "--model",
        model,
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "s"),
    ]
    assert main([*shown, "--thresholds", str(tmp_path / "thresholds.safetensors"), "--out", str(tmp_path / "o")]) == 0
    (seen,) = json.loads((tmp_path / "s").read_text())
    (budget,) = seen["budgets"].values()
    assert budget["share"] < 1
    assert budget["answers"] == ""


def test_other_verbs_need_a_classifier_and_towers_that_read_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["learn", "--data", str(images), "--model", saved("Dinov2Model", tmp_path), "--device", "cpu"]) == 1
    assert "give a model that was fine-tuned to classify" in capsys.readouterr().err
    assert main(["bench", "--model", saved("Qwen3VLForConditionalGeneration", tmp_path), "--device", "cpu"]) == 2
    assert "whose Qwen3VLVisionModel reads what a processor made of images: use it from P" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["config", "argument", "inside"])
def test_attention_by_code_of_the_hub_is_refused(folder: Path, place: str) -> None:
    code = "kernels-community/evil"
    config = json.loads((folder / "config.json").read_text())
    if place == "config":
        config["attn_implementation"] = code
    elif place == "inside":
        config["vision_config"] = {"_attn_implementation": code}
    (folder / "config.json").write_text(json.dumps(config))
    kwargs = {"attn_implementation": code} if place == "argument" else {}
    assert "by code from 'kernels-community/evil'" in raised(UsageError, f"hf:{folder}", model_kwargs=kwargs)


@pytest.mark.parametrize("argument", ["allow_all_kernels", "use_kernels", "trust_remote_code", "use_safetensors"])
def test_arguments_that_let_code_in_are_refused(folder: Path, argument: str) -> None:
    message = raised(UsageError, f"hf:{folder}", model_kwargs={argument: argument != "use_safetensors"})
    assert f"{argument} cannot be set" in message
