"""The paper's own training: its steps, its start, its end, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import ltmp
from helpers import random_images, tiny_vit
from ltmp.cli import main
from ltmp.data import train_transform
from ltmp.errors import UsageError
from ltmp.hosts.attach import thresholds_of
from ltmp.learning.objective import task_loss
from ltmp.learning.optimiser import Step
from ltmp.learning.paper import linear_gradients

TARGET = 0.7
PAPER: dict[str, Any] = {"recipe": "paper", "views": 96, "calibration": 16}


def model_and_batches() -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    model = tiny_vit(depth=4)
    images = random_images(96)
    return ltmp.attach(model, ltmp.LTMPConfig(tau=0.5)), list(
        zip(images.split(16), (torch.arange(96) % 5).split(16), strict=True)
    )


def test_the_prune_gradient_is_that_of_a_sigmoid_of_plain_importance() -> None:
    model, _ = model_and_batches()
    thresholds = thresholds_of(model)
    thresholds.set(prune=[0.1, 0.2, 0.3, 0.4])
    thresholds.requires_grad_(True).train()
    score = torch.tensor([0.05, 0.11, 0.5])
    for wanted in (True, False):
        with linear_gradients(thresholds, wanted):
            decided = thresholds.decide("prune", 0, score, torch.ones(3))
        assert decided.tolist() == [0, 1, 1]
        (gradient,) = torch.autograd.grad(decided.sum(), thresholds.prune)
        soft = torch.sigmoid((score - 0.1) / 0.5)
        expected = -(soft * (1 - soft)).sum() / 0.5
        assert torch.isclose(gradient[0], expected, rtol=1e-5) == wanted
    assert thresholds.log_prune


def test_steps_are_plain_sgd_from_the_papers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step moves a threshold by its rate times its gradient, and clamps it to [0, 1]."""
    from ltmp.learning.paper import PaperOptimiser

    moves: list[tuple[str, Tensor, Tensor, Tensor]] = []
    real = PaperOptimiser.update

    def update(self: PaperOptimiser) -> None:
        before = {n: (getattr(self.thresholds, n).detach().clone(), self.thresholds.get_parameter(n).grad.clone())
                  for n in self.names}  # fmt: skip
        real(self)
        moves.extend((n, *before[n], getattr(self.thresholds, n).detach().clone()) for n in self.names)

    monkeypatch.setattr(PaperOptimiser, "update", update)
    model, batches = model_and_batches()
    result = ltmp.learn(model, batches, TARGET, **PAPER)
    assert len(result.history) == 6
    start = {name: value.tolist() for name, value, *_ in moves[:2]}
    assert start == {"merge": pytest.approx([0.9] * 4), "prune": [0] * 4}
    for name, value, gradient, after in moves:
        assert gradient.abs().sum() > 0
        rate = {"merge": 5e-3, "prune": 5e-6}[name]
        assert torch.allclose(after, (value - rate * gradient).clamp(0, 1), rtol=0, atol=1e-7)
    # the thresholds of the last step, on budget or not
    assert torch.equal(model.ltmp.prune, moves[-1][3]) or torch.equal(model.ltmp.prune, moves[-2][3])
    assert result.trained_share == result.history[-1].share
    assert result.share == pytest.approx(float(share_of(model, batches[0][0])), abs=1e-6)


def share_of(model: Any, images: Tensor) -> Tensor:
    with ltmp.record() as calls, torch.no_grad():
        model(images)
    return calls.share().mean()


def test_labels_are_smoothed() -> None:
    logits, labels = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([1])
    plain, smooth = (task_loss(logits, labels, None, 1.0, smoothing=s) for s in (0.0, 0.1))
    assert torch.allclose(smooth, 0.9 * plain + 0.1 * -logits.log_softmax(-1).mean())


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, batches = model_and_batches()
    ltmp.learn(whole, batches, TARGET, **PAPER)

    def stop(step: Step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    broken, batches = model_and_batches()
    with pytest.raises(KeyboardInterrupt):
        ltmp.learn(broken, batches, TARGET, checkpoint=tmp_path / "run.pt", on_step=stop, **PAPER)
    broken, batches = model_and_batches()
    result = ltmp.learn(broken, batches, TARGET, checkpoint=tmp_path / "run.pt", **PAPER)
    assert len(result.history) == 6
    assert torch.equal(broken.ltmp.merge, whole.ltmp.merge)
    assert torch.equal(broken.ltmp.prune, whole.ltmp.prune)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"recipe": "papers"}, "unknown recipe 'papers': expected one of ltmp, paper"),
        ({"distill": True}, "leave out distill and tuning"),
        ({"views": 0}, "no calibrated start: give it views"),
    ],
)
def test_what_the_paper_does_not_do_is_refused(settings: dict[str, Any], sentence: str) -> None:
    model, batches = model_and_batches()
    with pytest.raises(UsageError, match=sentence):
        ltmp.learn(model, batches, TARGET, **{**PAPER, **settings})


def test_augmentation_is_random_and_repeats_with_its_seed() -> None:
    transform = train_transform(timm.create_model("test_vit", pretrained=False))
    image = Image.effect_noise((80, 60), 60).convert("RGB")

    def views(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [transform(image) for _ in range(3)]

    first, again, other = views(0), views(0), views(1)
    assert first[0].shape == (3, 160, 160)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_the_command_line_reports_both_shares(tmp_path: Path) -> None:
    for split, count in (("train", 30), ("val", 4)):
        for label in ("a", "b"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((40, 40), 20 + i).convert("RGB").save(tmp_path / "data" / split / label / f"{i}.png")
    save_file(timm.create_model("test_vit", img_size=64, num_classes=2).state_dict(), tmp_path / "w.safetensors")
    arguments = ["learn", "--data", tmp_path / "data", "--model", "test_vit", "--img-size", "64", "--num-classes", "2",
                 "--weights", tmp_path / "w.safetensors",
                 "--recipe", "paper", "--batch-size", "16", "--device", "cpu", "--target", "0.7",
                 "--out", tmp_path / "out", "--json", tmp_path / "out.json"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["recipe"] == "paper"
    # 2 % of 60 images, of which there have to be two, are kept apart
    assert found["views"] >= 58
    assert len(found["history"]) == 4
    assert 0 < found["trained_share"] <= 1
    assert ltmp.checkpoint.read(tmp_path / "out" / "thresholds.safetensors").config.tau == 0.5
