"""A named engine works or reports in one sentence why not; `auto` always finds one."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

import ltmp
from helpers import assert_close, attach_reducing, random_images, run_recorded, tiny_vit
from ltmp.config import ENGINES
from ltmp.engines import graph, packed, select
from ltmp.engines.body import Body, running
from ltmp.errors import LTMPError
from ltmp.hosts.attach import attachment
from ltmp.method.thresholds import Thresholds

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton without its interpreter, and no cached facts about the machine."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    select.unavailable.cache_clear()
    yield
    select.unavailable.cache_clear()


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize("name", ["triton", "graph"])
def test_named_engine_without_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (8, 0))
    with pytest.raises(
        LTMPError, match=f"engine '{name}' needs an NVIDIA GPU, but the model is on cpu: use engine='pa"
    ):
        select.engine(name, CPU)


def test_named_engine_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LTMPError, match="needs Triton, which is not installed"):
        select.engine("triton", CUDA)


def test_too_old_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (7, 5))
    with pytest.raises(LTMPError, match=r"needs compute capability 8\.0, but a GPU has 7\.5"):
        select.engine("graph", CUDA)
    assert select.engine("auto", CUDA) is packed.run


def test_auto() -> None:
    assert select.engine("auto", CPU) is packed.run
    assert select.engine("packed", CUDA) is packed.run


def test_auto_on_a_gpu_keeps_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    run = select.engine("auto", CUDA)
    model = attach_reducing(tiny_vit(), random_images(2))
    images = random_images(2).requires_grad_()
    model.ltmp.config = ltmp.LTMPConfig(engine="auto")
    monkeypatch.setattr(select, "engine", lambda name, device: run)
    model(images).sum().backward()
    assert images.grad is not None


def test_other_policies_run_on_the_packed_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Thresholds):
        def decide(self, step: str, block: int, score: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(score)

    model = attach_reducing(tiny_vit(), random_images(2))
    body = attachment(model).body
    assert select.supports_triton(body)
    assert not select.supports_triton(replace(body, policy=Other(3, model.ltmp.config).eval()))
    biased = replace(body.recipe, bias=lambda host, block, named: None)
    assert not select.supports_triton(replace(body, recipe=biased)), "kernels know no bias for pairs of tokens"


def test_every_engine_of_the_config_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0))
    assert all(callable(select.engine(name, CUDA)) for name in ENGINES)


def test_graphs_come_and_go_with_the_attachment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images)
    assert isinstance(vars(model)["forward"], graph.GraphedForward)
    reduced, kept = run_recorded(model, images)
    assert kept.max() < 17 or kept.min() < 17
    ltmp.detach(model)
    assert "forward" not in vars(model)
    assert model(images).shape == reduced.shape


def test_an_engine_override_runs_whatever_the_thresholds() -> None:
    """In this thread, for any host; but `dense()` takes precedence."""
    images = random_images(2)
    model = ltmp.attach(tiny_vit())
    calls: list[int] = []

    def engine(body: Body, x: torch.Tensor, positions: Any) -> Any:
        calls.append(body.depth)
        return body.dense_blocks(x, positions)

    with torch.no_grad(), running(engine):
        overridden = model(images)
        with ltmp.dense():
            assert_close(model(images), overridden, 1e-6)
    model(images)
    assert calls == [3]


def test_a_body_override_applies_to_its_host_only() -> None:
    images = random_images(2)
    model, other = (attach_reducing(tiny_vit(), images) for _ in range(2))
    off = copy.deepcopy(model.ltmp)
    off.set([1.0] * 3, [0.0] * 3)
    _, kept = run_recorded(other, images)
    with running(body=replace(attachment(model).body, policy=off)):
        assert run_recorded(model, images)[1].eq(17).all()
        assert run_recorded(other, images)[1].tolist() == kept.tolist()
    assert run_recorded(model, images)[1].tolist() == kept.tolist()


@pytest.mark.parametrize("engine", ["auto", "triton"])
def test_training_weights_on_a_gpu_keeps_gradients(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In train mode, frozen thresholds run as deployed, on an engine with gradients."""
    gpu(monkeypatch, (9, 0))
    chosen = select.engine(engine, CUDA)
    model = attach_reducing(tiny_vit(), random_images(2)).train()
    model.requires_grad_(False)
    model.blocks[1].mlp.fc1.weight.requires_grad_(True)
    monkeypatch.setattr(select, "engine", lambda name, device: chosen)
    logits, kept = run_recorded(model, random_images(2))
    assert kept[:, -1].lt(17).all()
    logits.sum().backward()
    assert model.blocks[1].mlp.fc1.weight.grad.abs().sum() > 0
