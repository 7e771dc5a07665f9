"""The paper code's two command lines, as its README has them, on a tiny model and folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from helpers import liven
from ltmp.checkpoint import read

ROOT = Path(__file__).parents[2]
NAME = "ltmp_deit_tiny_patch16_224"
SHAPE = ["patch_size=8", "embed_dim=24", "depth=3"]
MODEL = ["--model", NAME, "--img-size", "32", "--num-classes", "3", "--model-kwargs", *SHAPE, "--device", "cpu"]


def tool(name: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=250,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of each of three classes in train/, four in val/."""
    root, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("ant", "bee", "cow"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = noise.integers(0, 256, (10, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((48, 40)).save(folder / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=3, patch_size=8, embed_dim=24, depth=3)
    path = tmp_path_factory.mktemp("weights") / "host.pth"
    torch.save(liven(model).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(images: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the README's training line."""
    out = tmp_path_factory.mktemp("out")
    done = tool(
        "train.py", images, *MODEL, "--weights", weights, "-b", 8, "--lr", "0.000005", "0.005",
        "--reduction-target", "0.75", "--views", 48, "--output", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "target 0.75" in done.stdout
    assert "step 6/6" in done.stderr
    return out


def test_train_writes_thresholds_and_a_whole_checkpoint(trained: Path, weights: Path) -> None:
    file = read(trained / "thresholds.safetensors")
    assert file.metadata["target"] == 0.75
    assert 0.2 < file.metadata["share"] < 1
    assert (trained / "thresholds.safetensors").stat().st_size < 10_000
    state = torch.load(trained / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    host = torch.load(weights, weights_only=True)
    assert all(torch.equal(state[key], value) for key, value in host.items())
    assert state["blocks.2.merge_masker.threshold"] == file.merge[2]
    assert state["blocks.0.prune_masker.threshold"] == file.prune[0]
    assert state.keys() - host.keys() == {
        f"blocks.{i}.{s}_masker.threshold" for i in range(3) for s in ("merge", "prune")
    }
    assert not (trained / "run.pt").exists()


def test_the_papers_own_training_reports_both_shares(images: Path, weights: Path, tmp_path: Path) -> None:
    done = tool("train.py", images, *MODEL, "--weights", weights, "-b", 8, "--recipe", "paper", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "share in training" in done.stdout
    file = read(tmp_path / "thresholds.safetensors")
    assert file.config.tau == 0.5
    # one epoch of steps of at most 0.005 from where the paper starts
    assert 0.8 < file.merge.min() <= file.merge.max() <= 1


def test_options_of_timms_script_are_refused_by_name(images: Path) -> None:
    for option, why in (("--opt=adamw", "SGD with neither"), ("--epochs", "--views is a number of images")):
        done = tool("train.py", images, *MODEL, option, "3")
        assert done.returncode == 2
        assert f"{option.partition('=')[0]} is not supported here: " in done.stderr
        assert why in done.stderr
    done = tool("train.py", images, *MODEL, "--recipe", "paper", "--lr", "0.1", "0.2")
    assert done.returncode == 2
    assert "takes multiples of 5e-06 0.005" in done.stderr


def test_trained_checkpoint_loads_by_name_in_timm(trained: Path) -> None:
    model = timm.create_model(
        f"inference_{NAME}", img_size=32, num_classes=3, patch_size=8, embed_dim=24, depth=3,
        checkpoint_path=str(trained / "checkpoint.pth.tar"),
    )  # fmt: skip
    assert torch.equal(model.ltmp.merge, read(trained / "thresholds.safetensors").merge)


def test_validate_gives_the_same_at_any_batch_size(trained: Path, images: Path, tmp_path: Path) -> None:
    found = []
    for batch in (1, 5):
        path = tmp_path / f"{batch}.json"
        done = tool(
            "validate_timm.py", images, *MODEL, "--checkpoint", trained / "checkpoint.pth.tar", "-b", batch,
            "--json", path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "top-1" in done.stdout
        found.append(json.loads(path.read_text()))
    assert [result["images"] for result in found] == [12, 12]
    for key in ("top1", "share", "kept", "agreement"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-6)
    assert found[0]["share"] == pytest.approx(read(trained / "thresholds.safetensors").metadata["share"], rel=1e-6)


def test_validate_takes_thresholds_alone_with_weights(trained: Path, images: Path, weights: Path) -> None:
    file = trained / "thresholds.safetensors"
    assert tool("validate_timm.py", images, *MODEL, "--checkpoint", file, "--weights", weights).returncode == 0
    done = tool("validate_timm.py", images, *MODEL, "--checkpoint", file)
    assert done.returncode == 2
    assert "holds thresholds only: add --pretrained, or --weights FILE" in done.stderr


@pytest.mark.parametrize(
    ("name", "extra"),
    [("train.py", ["--reduction-target", "0.75"]), ("validate_timm.py", ["--checkpoint", "THRESHOLDS"])],
)
def test_pretrained_offline_is_one_sentence(
    name: str, extra: list[str], images: Path, trained: Path, tmp_path: Path
) -> None:
    extra = [str(trained / "thresholds.safetensors") if word == "THRESHOLDS" else word for word in extra]
    done = tool(name, images, "--model", NAME, "--pretrained", *extra, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "cannot get the pretrained weights of deit_tiny_patch16_224" in said[0]
    assert "--weights FILE" in said[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["--lr", "0.1", "0.1", "0.1"], 2, "expected two positive rates"),
        (["--lr", "-1", "0.1"], 2, "expected two positive rates"),
        (["--reduction-target", "1.5"], 2, "1.5"),
    ],
)
def test_wrong_options(images: Path, weights: Path, arguments: list[str], code: int, fragment: str) -> None:
    done = tool("train.py", images, *MODEL, "--weights", weights, "--output", images.parent / "none", *arguments)
    assert done.returncode == code
    assert fragment in done.stderr
    assert "Traceback" not in done.stderr


def test_rates_scale_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from train import rate_factor

    assert rate_factor([5e-6, 5e-3]) == pytest.approx(1)
    assert rate_factor([1e-5, 1e-2]) == pytest.approx(2)
    assert rate_factor([1e-2]) == pytest.approx(2)
    assert rate_factor([2e-5, 5e-3]) == pytest.approx(2)


def test_checkpoint_of_another_depth_is_refused(trained: Path, images: Path) -> None:
    arguments = [word if word != "depth=3" else "depth=2" for word in MODEL]
    done = tool("validate_timm.py", images, *arguments, "--checkpoint", trained / "checkpoint.pth.tar")
    assert done.returncode == 1
    assert "not a checkpoint of this model" in done.stderr
