"""The names in timm, and checkpoints with the keys of the paper's code."""

from __future__ import annotations

import argparse
import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.models.vision_transformer import VisionTransformer

import ltmp
from helpers import assert_close, liven, random_images, run_recorded
from ltmp.config import LEARNED, VARIANTS
from ltmp.hosts.attach import is_attached
from ltmp.zoo.build import build_model
from ltmp.zoo.timm_names import parse_name

DEPTH = 6


def create(name: str = "ltmp_test_vit", **kwargs: Any) -> Any:
    return liven(timm.create_model(name, img_size=64, num_classes=5, **kwargs))


def python(code: str, **env: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("imports", ["import ltmp, timm", "import timm, ltmp"])
def test_either_order_of_imports(imports: str) -> None:
    code = f"{imports}; print(timm.create_model('ltmp_test_vit', pretrained=False, tau=0.2).ltmp.config.tau)"
    assert python(code) == "0.2"


def test_asking_whether_timm_is_installed_does_not_use_up_the_hook() -> None:
    code = (
        "import ltmp, sys, importlib.util as u; u.find_spec('timm'); assert 'timm' not in sys.modules\n"
        "import timm; print(timm.is_model('ltmp_test_vit'), type(timm.__loader__).__name__, timm.__spec__.loader is "
        "timm.__loader__, any('Timm' in type(f).__name__ for f in sys.meta_path))"
    )
    assert python(code) == "True SourceFileLoader True False"


def test_the_rest_of_timm_is_as_it_was() -> None:
    code = (
        "import timm; f = lambda: (timm.list_models(), timm.list_models('*vit_*', pretrained=True), "
        "timm.models.list_models('deit*'), timm.list_pretrained(), timm.list_modules())\n"
        "before = f(); import ltmp; timm.create_model('ltmp_test_vit'); timm.list_models('ltmp_*')\n"
        "print(before == f(), len(before[0]) > 1000)"
    )
    assert python(code) == "True True"


def test_names_are_listed_where_they_are_asked_for() -> None:
    found = timm.list_models("ltmp_*")
    assert len(found) > 150
    assert {"ltmp_deit_small_patch16_224", "ltmp_eva02_base_patch14_224"} <= set(found)
    assert all(timm.is_model(name) and name.startswith("ltmp_") for name in found)
    assert "ltmp_resnet50" not in found
    assert "inference_ltm_test_vit" in timm.list_models(["inference_ltm_*", "resnet18"])
    assert timm.list_models("m_test_vit", exclude_filters="*vit") == []
    assert timm.list_models("ltmp_*", pretrained=True) == []


@pytest.mark.parametrize("name", ["ltmp_resnet50", "ltmp_ltmp_test_vit", "inference_m_test_vit", "ltmp_"])
def test_what_is_no_name_is_unknown(name: str) -> None:
    assert not timm.is_model(name)
    with pytest.raises(KeyError):
        timm.model_entrypoint(name)
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(name)


def test_every_vision_transformer_has_its_names() -> None:
    hosts = [
        n for n in timm.list_models() if timm.model_entrypoint(n).__annotations__.get("return") is VisionTransformer
    ]
    assert len(hosts) > 150
    assert {"deit_small_patch16_224", "vit_base_patch16_224", "vit_base_r50_s16_224"} <= set(hosts)
    for name in hosts:
        for variant in LEARNED:
            assert timm.is_model(f"{variant}_{name}")
            assert timm.is_model(f"inference_{variant}_{name}")
    assert timm.is_model("ltmp_deit_base_distilled_patch16_224")
    assert not timm.is_model("ltmp_resnet50")


@pytest.mark.parametrize("prefix", ["", "inference_"])
@pytest.mark.parametrize("variant", LEARNED)
def test_forms_start_as_in_the_paper(variant: str, prefix: str) -> None:
    model = create(f"{prefix}{variant}_test_vit", tau=0.3)
    assert (model.ltmp.config.variant, model.ltmp.config.tau) == (variant, 0.3)
    merge = 0.9 if "merge" in VARIANTS[variant].steps else 1.0
    assert model.ltmp.merge.tolist() == pytest.approx([merge] * DEPTH)
    assert model.ltmp.prune.tolist() == [0.0] * DEPTH
    assert model.ltmp.training is not bool(prefix)


@torch.no_grad()
def test_training_form_masks_and_inference_form_removes() -> None:
    images = random_images(3, size=64)
    rows = {}
    for name in ("ltmp_test_vit", "inference_ltmp_test_vit"):
        model = create(name)
        model.ltmp.set([0.0] * DEPTH, [0.02] * DEPTH)
        seen: list[int] = []
        model.blocks[-1].mlp.register_forward_hook(
            lambda _module, inputs, _output, seen=seen: seen.append(inputs[0].flatten(0, -2).shape[0])
        )
        model(images)
        rows[name] = sum(seen)
    assert rows["ltmp_test_vit"] == 3 * 17
    assert rows["inference_ltmp_test_vit"] < 3 * 17


@torch.no_grad()
def test_hybrids_attach() -> None:
    """A convolutional stem before the blocks is none of our business."""
    model = liven(timm.create_model("ltmp_vit_tiny_r_s16_p8_224", img_size=64, depth=2, num_classes=5)).eval()
    model.ltmp.set([0.5] * 2, [0.2] * 2)
    images = random_images(2, size=64)
    packed, kept = run_recorded(model, images)
    model.ltmp.train().requires_grad_()
    masked, again = run_recorded(model, images)
    assert torch.equal(kept, again)
    assert kept[:, -1].lt(model.patch_embed.num_patches + 1).all()
    assert_close(packed, masked, atol=1e-5 * max(1.0, float(masked.abs().max())))


def test_pretrained_tags_reach_the_host() -> None:
    model = timm.create_model("ltmp_vit_base_patch16_224.augreg_in21k", depth=1, embed_dim=12, num_classes=2)
    assert model.pretrained_cfg["tag"] == "augreg_in21k"
    assert model.pretrained_cfg["architecture"] == "vit_base_patch16_224"


def seed_state(model: Any, **values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"blocks.{i}.{step}_masker.threshold": value
        for step, vector in values.items()
        for i, value in enumerate(vector)
    }


def learned() -> dict[str, torch.Tensor]:
    return {"merge": torch.linspace(0.5, 0.9, DEPTH), "prune": torch.linspace(0.001, 0.01, DEPTH)}


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one-element"])
def test_thresholds_only_state_loads(shape: tuple[int, ...]) -> None:
    model, expected = create(), learned()
    state = {key: value.reshape(shape) for key, value in seed_state(model, **expected).items()}
    result = model.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert torch.equal(model.ltmp.merge, expected["merge"])
    assert torch.equal(model.ltmp.prune, expected["prune"])


@pytest.mark.parametrize("wrap", ["state_dict", "module.", "bare"])
def test_whole_checkpoints_load_through_timm(tmp_path: Path, wrap: str) -> None:
    model, expected = create(), learned()
    host = {key: value for key, value in model.state_dict().items() if not key.startswith("ltmp.")}
    state = {**host, **seed_state(model, **expected)}
    if wrap == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(state if wrap == "bare" else {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)

    other = liven(create(), seed=1)
    load_checkpoint(other, str(path))
    third = timm.create_model("inference_ltmp_test_vit", img_size=64, num_classes=5, checkpoint_path=str(path))
    for loaded in (other, third):
        assert torch.equal(loaded.ltmp.merge, expected["merge"])
        assert torch.equal(loaded.ltmp.prune, expected["prune"])
        assert torch.equal(loaded.head.weight, model.head.weight)


def test_own_state_dict_round_trip() -> None:
    model, other = create(), liven(create(), seed=1)
    model.ltmp.set(**learned())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.ltmp.merge, model.ltmp.merge)


def test_a_variant_loads_what_it_uses() -> None:
    model, expected = create("ltm_test_vit"), learned()
    host = {key: value for key, value in model.state_dict().items() if not key.startswith("ltmp.")}
    model.load_state_dict({**host, **seed_state(model, merge=expected["merge"])})
    assert torch.equal(model.ltmp.merge, expected["merge"])
    with pytest.raises(RuntimeError, match=r"ltmp\.prune"):
        create().load_state_dict({**host, **seed_state(model, merge=expected["merge"])})


def test_thresholds_of_another_depth_are_refused() -> None:
    model = create()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for ltmp\.merge"):
        model.load_state_dict(seed_state(model, merge=torch.ones(12), prune=torch.zeros(12)), strict=False)
    assert torch.equal(before["ltmp.merge"], model.ltmp.merge)


def test_loading_seed_keys_survives_copies() -> None:
    expected = learned()
    for clone in (copy.deepcopy, _saved_and_loaded):
        model = clone(create())
        model.load_state_dict(seed_state(model, **expected), strict=False)
        assert torch.equal(model.ltmp.merge, expected["merge"])


def _saved_and_loaded(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_ltmp_load_reads_the_seeds_training_checkpoint(tmp_path: Path) -> None:
    """A `.pth.tar` of timm's saver keeps the command line as an argparse.Namespace: plain data, and read as such."""
    path, expected = tmp_path / "model_best.pth.tar", learned()
    content = {"state_dict": seed_state(None, **expected), "args": argparse.Namespace(lr=[5e-6, 5e-3]), "epoch": 1}
    torch.save(content, path)
    model = create("test_vit").eval()
    ltmp.load(model, path)
    assert torch.equal(model.ltmp.merge, expected["merge"])
    _, kept = run_recorded(model, random_images(2, size=64))
    assert (kept[:, -1] < 17).all()


def test_jobs_build_the_host_of_a_name() -> None:
    """Attaching is theirs to do; a misspelt name is answered with timm's own."""
    assert not is_attached(build_model("ltm_test_vit", image_size=64))
    with pytest.raises(ltmp.LTMPError, match="did you mean test_vit, test_vit4, test_vit3"):
        build_model("ltmp_test_vitt")


def test_offline_pretrained_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "import ltmp, timm\n"
        "try: timm.create_model('ltmp_deit_tiny_patch16_224', pretrained=True)\n"
        "except ltmp.LTMPError as error: print(error)"
    )
    said = python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert said.startswith("cannot get the pretrained weights of deit_tiny_patch16_224")
    assert 'pretrained_cfg_overlay={"file": PATH}' in said
    assert "\n" not in said


def test_weights_of_the_host_load_from_a_local_file(tmp_path: Path) -> None:
    """The way that the message names."""
    host = liven(timm.create_model("test_vit"), seed=3)
    path = tmp_path / "weights.pth"
    torch.save(host.state_dict(), path)
    model = timm.create_model("ltmp_test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert torch.equal(model.head.weight, host.head.weight)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("inference_ltmp_deit_tiny_patch16_224", ("ltmp", "deit_tiny_patch16_224")),
        ("ltpm_test_vit", ("ltpm", "test_vit")),
        ("deit_tiny_patch16_224", (None, "deit_tiny_patch16_224")),
        ("ltmp", (None, "ltmp")),
    ],
)
def test_names_are_taken_apart(name: str, expected: tuple[str | None, str]) -> None:
    assert parse_name(name) == expected
