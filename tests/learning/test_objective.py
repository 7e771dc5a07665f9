"""What is descended, and what batches may look like."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ltmp
from helpers import assert_close, random_images, tiny_vit
from ltmp.errors import LTMPError
from ltmp.learning.batches import first, split
from ltmp.learning.objective import answers_alone, task_loss

IMAGES, LABELS = random_images(4), torch.arange(4)

BATCHES: dict[str, Any] = {
    "pair": (IMAGES, LABELS),
    "list": [IMAGES, LABELS],
    "triple": (IMAGES, LABELS, ["a", "b", "c", "d"]),
    "dictionary": {"pixel_values": IMAGES, "labels": LABELS},
    "collated": UserDict(pixel_values=IMAGES, labels=LABELS),
    "named": {"image": IMAGES, "label": LABELS},
    "images": IMAGES,
    "images-in-a-tuple": (IMAGES,),
    "images-in-a-dictionary": {"pixel_values": IMAGES},
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_as_the_ecosystem_has_them(name: str) -> None:
    images, labels = split(BATCHES[name])
    assert images is IMAGES
    assert labels is (None if name.startswith("images") else LABELS)
    found, known = first([BATCHES[name]] * 2, 6)
    assert torch.equal(found, torch.cat([IMAGES, IMAGES])[:6])
    assert (known is None) == name.startswith("images")


@pytest.mark.parametrize("batch", ["text", {"input_ids": LABELS}, (None, LABELS), []])
def test_a_batch_without_images_is_refused(batch: Any) -> None:
    with pytest.raises(LTMPError, match=r"without images: expected images .* pixel_values and labels"):
        split(batch)


@pytest.mark.parametrize("name", ["triple", "dictionary", "images"])
def test_learns_from_them(name: str) -> None:
    model = ltmp.attach(tiny_vit(depth=2).requires_grad_(False))
    batches = [{**BATCHES, "images": random_images(4, seed=seed)}[name] for seed in range(4)]
    result = ltmp.learn(model, batches, 0.8, views=8, calibration=8, distill=name == "images")
    assert len(result.history) == 2
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_labels_that_are_not_there_are_asked_for() -> None:
    with pytest.raises(LTMPError, match=r"give labels, or learn from the dense model \(distill\)"):
        ltmp.learn(ltmp.attach(tiny_vit(depth=2)), [IMAGES] * 4, 0.8, views=8, calibration=8)


def test_one_logit_is_a_question_of_its_own() -> None:
    """By a softmax over one class nothing would ever differ."""
    ours, theirs = torch.tensor([[0.3], [-1.0]]), torch.tensor([[0.5], [2.0]])
    p, q = theirs.double().sigmoid()[:, 0], ours.double().sigmoid()[:, 0]
    wanted = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert_close(task_loss(ours, None, theirs), wanted, 1e-6)
    assert_close(task_loss(theirs, None, theirs), torch.zeros(2), 1e-7)
    labels = torch.tensor([1, 0])
    wanted = torch.stack([-q[0].log(), -(1 - q[1]).log()])
    assert_close(task_loss(ours, labels, None, part=1.0), wanted, 1e-6)


def test_labels_of_several_kinds_are_questions_of_their_own() -> None:
    ours, theirs = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    found = task_loss(ours, labels, theirs, part=0.5)
    by_column = [task_loss(ours[:, i : i + 1], labels[:, i : i + 1], theirs[:, i : i + 1], part=0.5) for i in range(3)]
    assert_close(found, sum(by_column), 1e-6)
    assert_close(task_loss(ours, None, theirs, alone=True), task_loss(ours, labels, theirs), 1e-6)
    assert (task_loss(ours, None, theirs) - task_loss(ours, None, theirs, alone=True)).abs().min() > 0.01


def test_a_config_says_that_logits_stand_alone() -> None:
    class Model(nn.Module):
        def __init__(self, kind: str | None) -> None:
            super().__init__()
            self.config = type("Config", (), {"problem_type": kind})

    assert answers_alone(nn.Sequential(Model("multi_label_classification")))
    assert not answers_alone(Model("single_label_classification"))
    assert not answers_alone(tiny_vit())


def test_a_binary_head_is_judged() -> None:
    """Its dial says how far answers go, and a smaller budget is farther."""
    model = ltmp.attach(tiny_vit(depth=3, num_classes=1))
    batches: list[tuple[Tensor, Tensor]] = [(random_images(16, seed=seed), torch.zeros(16)) for seed in range(2)]
    result = ltmp.learn_dial(model, batches, 0.6, 0.9, knots=2, views=0, calibration=32, checked=0)
    assert result.divergence[0] > 1e-3
