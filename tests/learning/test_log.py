"""Logging shows the run as it was, changes nothing of it, and goes on where a resumed run does."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ltmp
from helpers import random_images, tiny_vit
from ltmp.errors import LTMPError, MissingExtraError
from ltmp.learning import LearnResult, TensorBoard, log, open_log

TARGET = 0.65
DEPTH = 4


class Memory:
    """A logger that keeps what it was told."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.drawn: dict[int, dict[str, Image.Image]] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.values[step] = dict(values)

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        self.drawn[step] = dict(pictures)


def run(**settings: Any) -> tuple[nn.Module, LearnResult]:
    model = ltmp.attach(tiny_vit(depth=DEPTH))
    images = random_images(96)
    batches = list(zip(images.split(16), torch.arange(96).remainder(5).split(16), strict=True))
    return model, ltmp.learn(model, batches, TARGET, **{"views": 96, "calibration": 48, **settings})


def test_every_step_is_told_and_the_run_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "PICTURES_EVERY", 4)
    memory = Memory()
    plain, _ = run()
    model, result = run(log=memory)
    assert torch.equal(model.ltmp.merge, plain.ltmp.merge)
    assert torch.equal(model.ltmp.prune, plain.ltmp.prune)
    assert list(memory.values) == list(range(8))
    assert list(memory.drawn) == [0, 4, 7]
    blocks = [f"{name}/{block:02}" for name in ("merge", "prune") for block in range(DEPTH)]
    tokens = [f"tokens/{block:02}" for block in range(DEPTH)]
    for step in result.history:
        values = memory.values[step.step]
        assert set(values) == {"loss", "share", *blocks, *tokens}
        assert (values["loss"], values["share"]) == (step.loss, step.share)
        assert [values[name] for name in tokens] == step.kept
        assert 17 > step.kept[0] >= step.kept[-1] >= 1
    for step in (0, 7):
        assert set(memory.values[step]) == {"deployed/share", "deployed/divergence", *blocks}
    assert memory.values[7]["deployed/share"] == result.share
    assert [memory.values[7][f"merge/{block:02}"] for block in range(DEPTH)] == model.ltmp.merge.tolist()
    assert set(memory.drawn[0]) == {"images/0", "images/1", "images/2"}
    first, last = (np.asarray(memory.drawn[step]["images/0"]) for step in (0, 4))
    assert np.ptp(first) > 100
    assert first.shape == last.shape


def test_a_model_without_a_grid_of_patches_is_logged_without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_grid(*_: object) -> None:
        raise LTMPError("no grid")

    monkeypatch.setattr(log, "see", no_grid)
    memory = Memory()
    run(log=memory)
    assert len(memory.values) == 8
    assert memory.drawn == {}


def read_back(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    return events.Reload()


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    logger = TensorBoard(tmp_path)
    model, result = run(log=logger)
    logger.close()
    events = read_back(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step.step, pytest.approx(step.loss)) for step in result.history
    ]
    assert [event.step for event in events.Scalars("prune/03")] == list(range(8))
    assert events.Scalars("merge/00")[-1].value == pytest.approx(model.ltmp.merge[0].item())
    assert [event.step for event in events.Images("images/0")] == [0, 7]
    assert events.Images("images/0")[0].encoded_image_string.startswith(b"\x89PNG")


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")

    class KilledError(BaseException):
        pass

    def stop(step: Any) -> None:
        if step.step == 5:
            raise KilledError

    for on_step in (stop, None):
        logger = TensorBoard(tmp_path / "log")
        try:
            run(log=logger, on_step=on_step, checkpoint=tmp_path / "run.pt", save_every=2)
        except KilledError:
            assert on_step is stop
        logger.close()
    assert [event.step for event in read_back(tmp_path / "log").Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_missing_tensorboard_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"'tensorboard', .* pip install 'ltmp\[tensorboard\]'"):
        open_log(str(tmp_path))


def test_wandb_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in with wandb's interface: the package itself wants an account."""
    told: list[tuple[dict[str, Any], int]] = []
    ended = []
    stand_in = SimpleNamespace(
        Image=lambda picture: ("image", picture.size),
        init=lambda project: SimpleNamespace(
            log=lambda values, step: told.append((values, step)), finish=lambda: ended.append(project)
        ),
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    logger = open_log("wandb:vits")
    run(log=logger)
    logger.close()
    assert ended == ["vits"]
    assert [step for _, step in told] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert told[1][0]["images/0"][0] == "image"
    assert "loss" in told[2][0]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LTMPError, match="pip install wandb"):
        open_log("wandb")
