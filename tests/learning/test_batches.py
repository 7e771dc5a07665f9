"""Batches of loaders: pairs, images alone, dictionaries, and what is refused with one sentence."""

from __future__ import annotations

import random
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ltmp
from helpers import random_images, tiny_vit
from ltmp.errors import LTMPError
from ltmp.hosts.attach import thresholds_of
from ltmp.learning import calibrate, learn_probe
from ltmp.learning.batches import batch_size, first_images, image_count, unpack

IMAGES, LABELS = random_images(8), torch.arange(8) % 5
FORMS: dict[str, tuple[Any, bool]] = {
    "a pair": ((IMAGES, LABELS), True),
    "a list, as default_collate gives": ([IMAGES, LABELS], True),
    "with more beside": ((IMAGES, LABELS, torch.arange(8), ["name"] * 8), True),
    "a dict of transformers": ({"pixel_values": IMAGES, "labels": LABELS}, True),
    "a dict of a dataset": ({"image": IMAGES, "label": LABELS, "path": ["x"] * 8}, True),
    "a BatchFeature": (UserDict({"pixel_values": IMAGES, "labels": LABELS}), True),
    "images alone": (IMAGES, False),
    "images in a tuple": ((IMAGES,), False),
    "images in a dict": ({"pixel_values": IMAGES}, False),
    "images with names": ((IMAGES, ["name"] * 8), False),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_and_labels_are_found(form: str) -> None:
    batch, labelled = FORMS[form]
    images, labels = unpack(batch)
    assert images is IMAGES
    assert labels is (LABELS if labelled else None)
    assert batch_size([batch]) == image_count([batch]) == 8
    found, known = first_images([batch, batch], 12)
    assert torch.equal(found, torch.cat([IMAGES, IMAGES])[:12])
    assert known is None if not labelled else torch.equal(known, torch.cat([LABELS, LABELS])[:12])


REFUSED: dict[str, tuple[Any, str]] = {
    "a dict of others": ({"x": IMAGES, "y": LABELS}, "is a dict of x, y without a tensor of images"),
    "names": (["a.jpg", "b.jpg"], "is a list without a tensor of images"),
    "nothing": (None, "is a NoneType without a tensor"),
    "an empty pair": ((), "is a tuple without a tensor"),
    "a number": ((3, LABELS), r"expected \(images, labels\), images \[B, 3, H, W\] alone, or a dict with pixel_values"),
    "one image": (IMAGES[0], r"torch.float32 \[3, 16, 16\]: expected floating-point numbers \[B, 3, H, W\]"),
    "bytes": ((IMAGES.byte(), LABELS), r"torch.uint8 .* resized and normalised"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_anything_else_is_refused_in_a_sentence(form: str) -> None:
    batch, sentence = REFUSED[form]
    for use in (lambda: first_images([batch], 8), lambda: ltmp.learn_dial(ltmp.attach(tiny_vit()), [batch])):
        with pytest.raises(LTMPError, match=sentence) as refusal:
            use()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_learned_from(form: str) -> None:
    batch, labelled = FORMS[form]
    model = ltmp.attach(tiny_vit())
    if not labelled:
        with pytest.raises(LTMPError, match="the batches have no labels to learn from"):
            ltmp.learn(model, [batch], 0.8, views=8, calibration=8)
    result = ltmp.learn(model, [batch], 0.8, views=8, calibration=8, distill=not labelled)
    assert abs(result.share - 0.8) < 0.1
    assert len(ltmp.learn_dial(model, [batch], 0.6, 0.9, knots=2, views=0, calibration=8, checked=16).divergence) == 2


# -- heads


class Head(nn.Module):
    """A tiny model with `outputs` logits ; `shape` changes how they are returned."""

    def __init__(self, outputs: int, shape: Any = lambda logits: logits) -> None:
        super().__init__()
        self.vit = tiny_vit(num_classes=outputs)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.vit(x))


MULTI_HOT = (torch.rand(8, 5, generator=torch.Generator().manual_seed(0)) < 0.4).float()
HEADS: dict[str, tuple[nn.Module, Tensor, str]] = {
    "classes": (Head(5), LABELS, "categorical"),
    "one-hot": (Head(5), torch.eye(5)[LABELS], "categorical"),
    "soft labels": (Head(5), torch.full((8, 5), 0.2), "categorical"),
    "int32 labels": (Head(5), LABELS.int(), "categorical"),
    "one logit": (Head(1), LABELS % 2, "bernoulli"),
    "one logit, labels in a column": (Head(1), (LABELS % 2).float()[:, None], "bernoulli"),
    "one logit without its dimension": (Head(1, lambda logits: logits[:, 0]), LABELS % 2, "bernoulli"),
    "several labels": (Head(5), MULTI_HOT, "bernoulli"),
}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_judged_by_what_it_answers(head: str) -> None:
    """With one logit a softmax is 1 whatever is removed, and several labels exclude each other in it."""
    model, labels, distribution = HEADS[head]
    ltmp.attach(model)
    batches = [(IMAGES, labels)]
    result = ltmp.learn(model, batches, 0.7, views=16, calibration=8)
    assert result.distribution == distribution
    assert all(step.loss > 1e-4 for step in result.history)
    distilled = ltmp.learn(model, batches, 0.7, views=16, calibration=8, distill=True)
    assert all(step.loss > 1e-6 for step in distilled.history)
    dial = ltmp.learn_dial(model, batches, 0.6, 0.9, knots=2, views=0, calibration=8, checked=0)
    # little is lost at 0.9
    assert dial.divergence[0] > 1e-3
    # a dial needs no labels, and reads none: only the model tells whether several outputs are independent
    assert dial.distribution == ("bernoulli" if head.startswith("one logit") else "categorical")
    model.ltmp.config = ltmp.LTMPConfig(scores="best")
    assert learn_probe(model, IMAGES) == 8


def test_multi_label_models_of_transformers_are_known() -> None:
    model = Head(5)
    model.config = type("Config", (), {"problem_type": "multi_label_classification"})()
    ltmp.attach(model)
    assert ltmp.learn_dial(model, [IMAGES], 0.6, 0.9, knots=2, views=0, calibration=8).distribution == "bernoulli"


@pytest.mark.parametrize(
    ("outputs", "labels", "sentence"),
    [
        (1, LABELS, "expected a number from 0 to 1 for each output"),
        (5, torch.zeros(8, 3), r"labels \[8, 3\] for 5 classes: expected the number of a class"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_refused(outputs: int, labels: Tensor, sentence: str) -> None:
    with pytest.raises(LTMPError, match=sentence):
        ltmp.learn(ltmp.attach(Head(outputs)), [(IMAGES, labels)], 0.7, views=8, calibration=8)


def test_a_frozen_model_learns_thresholds_and_stays_frozen() -> None:
    model = ltmp.attach(tiny_vit())
    model.requires_grad_(False)
    before = thresholds_of(model).merge.clone()
    result = ltmp.learn(model, [(IMAGES, LABELS)], 0.7, views=16, calibration=8)
    assert len(result.history) == 2
    assert not torch.equal(thresholds_of(model).merge, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# -- the caller's random numbers


JOBS: dict[str, Any] = {
    "learn": lambda model, loader: ltmp.learn(model, loader, 0.7, views=16, calibration=8, seed=3),
    "learn_dial": lambda model, loader: ltmp.learn_dial(model, loader, 0.6, 0.9, knots=2, views=64, calibration=8),
    "tune": lambda model, loader: ltmp.tune(model, loader, 0.7, calibration=4),
    "tune lora": lambda model, loader: ltmp.tune(model, loader, 0.7, "lora", calibration=4),
    "learn_probe": lambda model, loader: learn_probe(model, next(iter(loader))[0]),
    "calibrate": lambda model, loader: calibrate(model, next(iter(loader))[0], 0.7),
}


class Noisy(TensorDataset):
    """A data set whose transforms draw from every global generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        return image + 0.01 * (torch.randn(()) + random.random() + np.random.rand()), label


def draw(*_: Any) -> None:
    torch.rand(1)
    random.random()
    np.random.rand()


@pytest.mark.parametrize("job", JOBS)
def test_the_callers_random_state_stays(job: str) -> None:
    if job == "tune lora":
        pytest.importorskip("peft")
    model = ltmp.attach(tiny_vit(), ltmp.LTMPConfig(scores="best"))
    loader = DataLoader(Noisy(IMAGES, LABELS), batch_size=4, shuffle=True)
    if job in ("learn_probe", "calibrate"):
        loader = list(loader)
        model.register_forward_hook(draw)

    def state() -> tuple[Any, ...]:
        name, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), (name, keys.tolist(), *rest)

    before = state()
    JOBS[job](model, loader)
    assert state() == before
