"""Light tuning: thresholds and a few weights together, folded into a plain model that deploys as it was trained."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ltmp
from helpers import assert_close, random_images, run_recorded, tiny_vit
from ltmp.errors import LTMPError, MissingExtraError, UsageError
from ltmp.hosts.attach import attachment, thresholds_of
from ltmp.learning import Tuning, loop, tune, weights
from ltmp.learning.answers import Judge, dense_answers
from ltmp.learning.heldout import HeldOut
from ltmp.learning.objective import Objective

TARGET = 0.6
SETTINGS = {"calibration": 32}
PARTS = ("norms", "lora")


def model_and_batches(count: int = 192, **kwargs: object) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = tiny_vit(depth=4, **kwargs)
    images = random_images(count)
    with torch.no_grad():
        labels = model(images).argmax(-1)
    return ltmp.attach(model), list(zip(images.split(16), labels.split(16), strict=True))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("ltmp.")}


@pytest.mark.parametrize("parts", PARTS)
def test_tuned_weights_come_closer_to_the_dense_model_at_the_same_share(parts: str) -> None:
    model, batches = model_and_batches(384, seed=1)
    settings = {"calibration": 96, "distill": True}
    others = HeldOut(model, random_images(256, seed=1), 64, teacher=copy.deepcopy(model))
    ltmp.learn(model, batches, 0.45, views=288, **settings)
    frozen = others.loss()
    result = tune(model, batches, 0.45, Tuning(parts, lr=3e-3), epochs=3, **settings)
    assert result.tuned
    assert others.loss() < 0.9 * frozen
    assert abs(result.share - 0.45) <= 0.01


@pytest.mark.parametrize("parts", PARTS)
def test_the_deployed_weights_are_a_plain_checkpoint(parts: str) -> None:
    model, batches = model_and_batches()
    before = plain_state(model)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tune(model, batches, TARGET, parts, distill=True, **SETTINGS)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert not hasattr(model, "peft_config")
    after = plain_state(model)
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    if parts == "norms":
        assert changed == {name for name in before if before[name].ndim == 1}
    else:
        assert changed == {name for name in before if name.startswith("blocks.") and before[name].ndim == 2}

    thresholds = thresholds_of(model)
    merge, prune = thresholds.merge.tolist(), thresholds.prune.tolist()
    images = random_images(24, seed=2)
    with torch.no_grad():
        deployed = model(images)
    plain = tiny_vit(depth=4)
    plain.load_state_dict(after)
    ltmp.attach(plain).ltmp.set(merge, prune)
    with torch.no_grad():
        assert torch.equal(plain(images), deployed)
        whole = ltmp.detach(model)(images)
    assert type(model.blocks) is type(tiny_vit(depth=4).blocks)
    with ltmp.dense(), torch.no_grad():
        assert_close(plain(images), whole, 1e-6)


@pytest.mark.parametrize("parts", PARTS)
def test_packed_gives_what_masked_gives_with_tuned_weights(parts: str) -> None:
    model, batches = model_and_batches()
    tune(model, batches, TARGET, parts, **SETTINGS)
    images = random_images(24, seed=2)
    with torch.no_grad():
        packed, left = run_recorded(model, images)
        model.ltmp.train().requires_grad_()
        masked, kept = run_recorded(model, images)
    assert len(set(left[:, -2].tolist())) > 1
    assert torch.equal(left, kept)
    assert_close(packed, masked, 1e-5)


def test_folded_low_rank_updates_compute_what_they_did_beside_the_weights() -> None:
    model, _ = model_and_batches()
    model.ltmp.set([0.8] * 4, [0.03] * 4)
    dense = copy.deepcopy(model)
    model.requires_grad_(False)
    found = weights.Weights(model, dense, Tuning("lora", rank=4), 1)
    with torch.no_grad():
        for parameter in found.trained.values():
            parameter.normal_(std=0.1)
    images = random_images(16)
    with torch.no_grad():
        beside = model(images)
        found.fold()
        folded = model(images)
        as_it_was = dense(images)
    assert_close(folded, beside, 1e-5)
    assert (folded - as_it_was).abs().max() > 0.01


@pytest.mark.parametrize("parts", PARTS)
def test_undoing_gives_the_weights_back_bit_for_bit(parts: str) -> None:
    model, batches = model_and_batches()
    before = plain_state(model)
    # steps so large that what they learn is worthless
    assert not tune(model, batches, TARGET, Tuning(parts, lr=0.1), **SETTINGS).tuned
    assert all(torch.equal(value, before[name]) for name, value in plain_state(model).items())
    assert not hasattr(model, "peft_config")

    def fail(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, batches, TARGET, parts, on_step=fail, **SETTINGS)
    assert plain_state(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in plain_state(model).items())


def test_the_teacher_has_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches()
    original = ltmp.detach(copy.deepcopy(model))
    answers = []

    def recorded(model: nn.Module, images: Tensor, judge: Judge) -> Tensor:
        answers.append((images, dense_answers(model, images)))
        return answers[-1][1]

    monkeypatch.setattr("ltmp.learning.objective.dense_answers", recorded)
    tune(model, batches, TARGET, Tuning("norms", lr=0.05), epochs=2, **SETTINGS)
    assert len(answers) > 15
    with torch.no_grad():
        assert all(torch.allclose(answer, original(images), atol=1e-5) for images, answer in answers)


def test_thresholds_move_with_the_weights_at_every_joint_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches()
    forms, merges = [], []
    gradients = Objective.gradients

    def watch(self: Objective, *args: object):  # type: ignore[no-untyped-def]
        forms.append(thresholds_of(self.model).masks)
        return gradients(self, *args)

    monkeypatch.setattr(Objective, "gradients", watch)
    tune(
        model, batches, TARGET, Tuning(joint_every=3), **SETTINGS,
        on_step=lambda _: merges.append(model.ltmp.merge.tolist()),
    )  # fmt: skip
    assert forms == [True, False, False] * 3 + [True]
    assert merges[0] == merges[2] != merges[3] == merges[5] != merges[6]


def test_cut_and_masked_steps_have_the_same_gradients() -> None:
    model, batches = model_and_batches()
    ltmp.learn(model, batches, TARGET, views=0, **SETTINGS)
    found = []
    for form in (weights.weights_only, loop._learning):
        model.zero_grad()
        with form(model.ltmp):
            loss = nn.functional.cross_entropy(model(batches[0][0]), batches[0][1])
            loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if not name.startswith("ltmp.")})
        model.ltmp.eval()
    for name, one in found[0].items():
        assert_close(one, found[1][name], 1e-5, name)


class Killed(BaseException):
    """What no handler in the loop may swallow."""


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("signal", [KeyboardInterrupt, Killed], ids=["ctrl-c", "killed"])
def test_a_broken_run_ends_where_an_unbroken_one_does(tmp_path: Path, signal: type[BaseException], parts: str) -> None:
    ends = []
    for stop_at in (None, 5):
        model, batches = model_and_batches()
        settings = {"checkpoint": tmp_path / f"{stop_at}.pt", "save_every": 2, "epochs": 1, **SETTINGS}

        def stop(step, at=stop_at) -> None:  # type: ignore[no-untyped-def]
            if step.step == at:
                raise signal

        if stop_at:
            with pytest.raises(signal):
                tune(model, batches, TARGET, parts, on_step=stop, **settings)
        result = tune(model, batches, TARGET, parts, **settings)
        assert [step.step for step in result.history] == list(range(1, 11))
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_seeds_reproduce() -> None:
    ends = []
    for _ in range(2):
        model, batches = model_and_batches()
        tune(model, batches, TARGET, "lora", seed=3, **SETTINGS)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_run_with_other_tuning_is_refused(tmp_path: Path) -> None:
    model, batches = model_and_batches()
    run = tmp_path / "run.pt"
    tune(model, batches, TARGET, checkpoint=run, **SETTINGS)
    with pytest.raises(LTMPError, match=r"other settings \(.*tuning .*norms.*now .*lora"):
        tune(model, batches, TARGET, "lora", checkpoint=run, **SETTINGS)


def test_images_that_are_judged_on_are_not_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches()
    learned, kept = [], []
    monkeypatch.setattr(
        "ltmp.learning.objective.dense_answers", lambda by, x, judge: learned.append(x) or dense_answers(by, x)
    )
    monkeypatch.setattr(
        "ltmp.learning.heldout.dense_answers", lambda by, x, judge: kept.append(x) or dense_answers(by, x)
    )
    tune(model, batches, TARGET, **SETTINGS)
    assert torch.equal(torch.cat(kept), torch.cat([images for images, _ in batches[:2]]))
    assert torch.equal(torch.cat(learned), torch.cat([images for images, _ in batches[2:]]))


def test_few_images_are_all_learned_from() -> None:
    model, batches = model_and_batches(48)
    result = tune(model, batches, TARGET, **SETTINGS)
    assert len(result.history) == 3


@pytest.mark.parametrize(("labels", "distill"), [(0.0, False), (0.5, True)])
def test_unlabelled_images_will_do(labels: float, distill: bool) -> None:
    model, batches = model_and_batches(96)
    unlabelled = [(images, torch.full_like(given, -1)) for images, given in batches]
    tune(model, unlabelled, TARGET, Tuning(labels=labels), distill=distill, **SETTINGS)


def test_labels_are_a_part_of_the_loss() -> None:
    model, batches = model_and_batches(32)
    ltmp.learn(model, batches, TARGET, views=0, calibration=16)

    def loss(labels: float) -> float:
        with loop._learning(model.ltmp):
            return Objective(model, TARGET, 0.0, labels, model, nullcontext()).gradients(iter(batches), 1)[0]

    taught, labelled = loss(0.0), loss(1.0)
    assert loss(0.3) == pytest.approx(0.3 * labelled + 0.7 * taught, abs=1e-6)


def test_what_was_learned_from_labels_is_judged_by_labels() -> None:
    model, batches = model_and_batches()
    away = [(images, (labels + 1) % 5) for images, labels in batches]
    judged = HeldOut(model, batches[0][0], 16, labels=away[0][1], label_weight=1.0)
    before = judged.loss()
    # far from the dense model, on purpose
    assert tune(model, away, TARGET, Tuning(lr=3e-3, labels=1.0), epochs=4, **SETTINGS).tuned
    assert judged.loss() < before


def test_decisions_are_made_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches()
    types = set()
    decide = type(model.ltmp).decide

    def watch(self, step, block, score, free):  # type: ignore[no-untyped-def]
        types.add((score.dtype, getattr(self, step).dtype))
        return decide(self, step, block, score, free)

    monkeypatch.setattr(type(model.ltmp), "decide", watch)
    result = tune(model, batches, TARGET, amp=torch.bfloat16, **SETTINGS)
    assert types == {(torch.float32, torch.float32)}
    assert abs(result.share - TARGET) <= 0.01
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"parts": "heads"}, "knows no parts 'heads': choose one of norms, lora"),
        ({"labels": 1.5}, "labels is 1.5: expected a number at least 0 and at most 1"),
        ({"lr": 0.0}, "lr is 0: expected a number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"rank": 0}, "rank is 0: expected a number at least 1"),
    ],
)
def test_bad_settings_are_said(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        Tuning(**settings)  # type: ignore[arg-type]


def test_what_cannot_be_tuned_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches()
    with pytest.raises(UsageError, match="epochs is 0"):
        tune(model, batches, TARGET, epochs=0)
    with pytest.raises(UsageError, match="does not say how many images"):
        tune(model, [], TARGET)
    half = ltmp.attach(tiny_vit().to(torch.bfloat16))
    with pytest.raises(LTMPError, match=r"is torch.bfloat16, too coarse .* call model.float\(\)"):
        tune(half, [(x.to(torch.bfloat16), y) for x, y in batches], TARGET, **SETTINGS)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ltmp\[tune\]'"):
        tune(model, batches, TARGET, "lora", **SETTINGS)
    assert attachment(model)
    thresholds = set(model.ltmp.parameters())
    assert all(parameter.requires_grad is (parameter not in thresholds) for parameter in model.parameters())
