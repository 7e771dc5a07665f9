"""A deployment gives the outputs of its model, for models of any host library, and restores every mode."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn

import ltmp
from helpers import attach_reducing, random_images, tiny_vit
from ltmp.deploy import Deployment, deployed, evaluating
from ltmp.errors import LTMPError, UsageError
from ltmp.method.rates import Rates


@torch.inference_mode()
def test_output_is_the_models_with_its_cost():
    images = random_images(4)
    model = attach_reducing(tiny_vit(), images)
    found = Deployment(model)(images)
    with ltmp.record() as calls:
        logits = model(images)
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.share, calls.share())
    assert torch.equal(found.kept, calls.kept[0])


def test_a_model_without_thresholds_costs_everything():
    found = Deployment(tiny_vit())(random_images(3))
    assert found.share.tolist() == [1, 1, 1]
    assert found.kept is None


class Wrapped(nn.Module):
    """Returns an object with logits, as models of transformers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return type("Output", (), {"logits": self.model(images)})()


def test_logits_are_taken_out_of_an_object():
    images, model = random_images(2), tiny_vit()
    assert torch.equal(Deployment(Wrapped(model))(images).logits, Deployment(model)(images).logits)


def test_names_must_be_as_many_as_classes():
    assert Deployment(tiny_vit(), names=list("abcde")).classes == 5
    with pytest.raises(UsageError, match="2 class names for a model with 5 classes"):
        _ = Deployment(tiny_vit(), names=["a", "b"]).classes
    deployment = Deployment(tiny_vit(), names=["a", "b"])
    assert [deployment.name(index) for index in (1, 2)] == ["b", "class 2"]


def test_a_model_without_classes_is_refused():
    features = tiny_vit(num_classes=0, global_pool="")
    with pytest.raises(LTMPError, match="not give one row of class scores"):
        _ = Deployment(features).classes


def test_greyscale_models_get_greyscale_images():
    deployment = Deployment(tiny_vit(in_chans=1), options={"mean": (0.5,), "std": (0.5,)})
    assert deployment.prepare(Image.new("RGB", (30, 20))).shape == (1, 16, 16)
    assert deployment.view(Image.new("RGB", (30, 20)), 32).shape == (3, 32, 32)


def test_modes_are_restored():
    model = tiny_vit().train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    with deployed(model, torch.device("cpu")):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == before


def test_fixed_rates_are_a_policy():
    model = ltmp.attach(tiny_vit(), ltmp.LTMPConfig(variant="m", r=2))
    assert isinstance(model.ltmp, Rates)
    assert Deployment(model)(random_images(2)).share.max() < 1
