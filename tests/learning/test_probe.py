"""What a probe is learned from, that it finds it, and where it is kept."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ltmp
from helpers import assert_close, make_dial, make_probe, random_images, tiny_vit
from ltmp.checkpoint import read
from ltmp.config import Scores
from ltmp.engines.body import running
from ltmp.errors import LTMPError
from ltmp.hosts.attach import attachment
from ltmp.learning import calibrate, learn_probe
from ltmp.learning.probe import _confidence, _gradients, _Moments, _Recorder
from ltmp.ops.probe.reference import LIFT, WIDTH, probe

BEST = ltmp.LTMPConfig(scores="best")


def attached(**kwargs: Any) -> Any:
    return ltmp.attach(tiny_vit(**kwargs), BEST)


def test_confidence_is_the_log_odds_of_the_answer() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    assert_close(_confidence(p.log()), torch.tensor([7 / 3, 1.0]).log(), 1e-6)
    assert _confidence(torch.tensor([[3.0], [-1.0]]), "bernoulli").tolist() == [3.0, 1.0]
    assert _confidence(torch.tensor([[3.0, -1.0]]), "bernoulli").tolist() == [4.0]


def test_gradients_are_those_of_the_dense_model() -> None:
    """Against finite differences: features are moved, and patches are taken from what later blocks attend to."""
    model, images = attached().double(), random_images(1).double()
    body = attachment(model).body
    recorder = _Recorder(3)
    with running(body=replace(body, policy=recorder)):
        answer = _confidence(model(images.requires_grad_())).sum()
    looks = _gradients(answer, recorder)

    def moved(block: int, by: torch.Tensor) -> float:
        """The answer with something added to what a block's attention left."""

        def hook(_module: nn.Module, args: Any) -> Any:
            return (args[0] + by,)

        def back(_module: nn.Module, _args: Any, out: Any) -> Any:
            return out + by

        # the branch reads norm2 of it, and the residual keeps it: the MLP's sum carries both
        handles = [body.blocks[block].norm2.register_forward_pre_hook(hook)]
        handles.append(body.blocks[block].register_forward_hook(back))
        with torch.no_grad(), ltmp.dense():
            found = float(_confidence(model(images)).sum())
        for handle in handles:
            handle.remove()
        return found

    for block, token in ((0, 3), (1, 0), (1, 9)):
        x, grad, _ = looks[block]
        by = torch.zeros_like(x)
        by[0, token] = 1e-5 * torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0)).double()
        change = (moved(block, by) - moved(block, -by)) / 2
        assert change == pytest.approx(float((grad * by).sum()), rel=1e-3)
    # nothing reads patches after the last attention, and of what each block makes of them less is ahead
    assert not looks[2][1][:, 1:].any()
    assert not looks[2][2].any()
    assert (looks[0][2] >= looks[1][2])[:, 1:].all()
    assert (looks[1][2] > 0)[:, 1:].all()


def test_saliency_is_found() -> None:
    """Gradients that grow along one direction and point in another: a probe reads the one and measures the other."""
    generator = torch.Generator().manual_seed(0)
    width, (grows, points) = 12, torch.linalg.qr(torch.randn(12, 2, generator=generator))[0].T
    moments = _Moments(width, torch.device("cpu"))
    for _ in range(8):
        x = torch.randn(4, 30, width, generator=generator)
        normed = nn.functional.layer_norm(x, (width,), eps=1e-6)
        length = (0.8 * normed @ grows).exp()
        spread = (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        # an image as a whole may matter more: tokens are against others of it
        image = torch.rand(4, 1, generator=generator) * 10 + 0.1
        moments.add(x, (image * length)[..., None] * points / spread, image * length.square())
    read = probe(x, moments.probe())
    for column, slope in ((WIDTH, 1.0), (WIDTH + 1, 2.0)):
        found = read[..., column] - read[..., column].mean(1, keepdim=True)
        assert_close(found, slope * (length.log() - length.log().mean(1, keepdim=True)), 0.15)
    # only along `points` are tokens apart
    mapped = read[..., : WIDTH - 1].flatten(0, 1)
    along = (normed @ points).flatten()
    apart, expected = torch.cdist(mapped, mapped), (along[:, None] - along).abs()
    assert_close(apart / apart.max(), expected / expected.max(), 1e-3)
    assert read[..., WIDTH - 1].eq(1).all()
    assert float(mapped.square().sum(1).mean()) == pytest.approx(1 / LIFT, rel=0.3)


def test_no_label_no_trace_and_the_same_again() -> None:
    model, images = attached(), random_images(20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[tuple[int, int, str]] = []
    assert learn_probe(model, images, progress=lambda *args: seen.append(args)) == 20
    assert seen == [(16, 20, "learning the probe"), (20, 20, "learning the probe")]
    first = model.ltmp.probe.clone()
    assert first.shape == (3, 17, WIDTH + 2)
    assert torch.equal(first, first.half().float()), "a file holds it in half precision"
    # the head reads the class token alone: what the last block's patches would be read by is the block's before
    assert torch.equal(first[2], first[1])
    assert not torch.equal(first[1], first[0])
    learn_probe(model, images)
    assert torch.equal(model.ltmp.probe, first)
    assert not model.training
    assert not model.ltmp.training
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    model.set_grad_checkpointing()
    learn_probe(model, images)
    assert_close(model.ltmp.probe, first, 1e-3)
    model.set_grad_checkpointing(False)
    with torch.inference_mode():
        learn_probe(model, images[:16])
    assert not torch.equal(model.ltmp.probe, first)
    learn_probe(model, images, amp=torch.bfloat16)
    inside = model.ltmp.probe
    with torch.autocast("cpu", torch.bfloat16):
        learn_probe(model, images)
    assert torch.equal(model.ltmp.probe, inside), "only the model's passes are cast"
    likeness = nn.functional.cosine_similarity(model.ltmp.probe[..., WIDTH], first[..., WIDTH], dim=1)
    assert likeness.min() > 0.9


def test_calibration_brings_a_probe_and_keeps_one() -> None:
    model, images = attached(depth=4, img_size=32), random_images(24, size=32)
    calibrate(model, images, 0.7)
    learned = model.ltmp.probe
    assert learned is not None
    with ltmp.record() as calls, torch.no_grad():
        model(images)
    assert float(calls.share().mean()) == pytest.approx(0.7, abs=0.03)
    calibrate(model, random_images(24, size=32, seed=5), 0.6)
    assert model.ltmp.probe is learned


@pytest.mark.parametrize("job", ["learn", "dial"])
def test_runs_learn_a_probe_of_their_own(job: str, tmp_path: Path) -> None:
    images = random_images(48, size=32)
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(16)]
    views = []
    for config in (ltmp.LTMPConfig(), BEST):
        model = ltmp.attach(tiny_vit(depth=4, img_size=32), config)
        if config.needs_probe:
            model.ltmp.set_probe(make_probe(4))
        if job == "dial":
            result: Any = ltmp.learn_dial(model, batches, 0.55, 0.9, knots=5, views=0, calibration=48, checked=0)
        else:
            result = ltmp.learn(model, batches, 0.7, views=0, calibration=48)
        views.append(result.views)
    expected = copy.deepcopy(model)
    learn_probe(expected, images)
    assert torch.equal(model.ltmp.probe, expected.ltmp.probe)
    if job == "dial":
        # what merged tokens count as is asked for these scores alone, at three shares by two shapes
        assert views[1] - views[0] == 48 + 6 * 48
    # one file holds all
    path = tmp_path / "thresholds.safetensors"
    ltmp.save(model, path)
    other = tiny_vit(depth=4, img_size=32)
    ltmp.load(other, path)
    with torch.no_grad():
        found, before = other(images), model(images)
        assert torch.equal(found, before)
        with ltmp.dense():
            assert not torch.allclose(model(images), before, atol=1e-3)


def test_a_dial_goes_on_with_the_same_probe(tmp_path: Path) -> None:
    """A killed run ends where a whole one does: its probe is of its images."""
    batches = [(part, None) for part in random_images(48, size=32).split(16)]
    settings = {"knots": 3, "views": 3 * 8 * 48, "calibration": 48, "checked": 0}
    whole = attached(depth=4, img_size=32)
    ltmp.learn_dial(whole, batches, 0.6, 0.9, **settings)
    killed, searched = attached(depth=4, img_size=32), 0

    def stop(done: int, _of: int, text: str) -> None:
        nonlocal searched
        searched += text.startswith("searching")
        if searched > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ltmp.learn_dial(killed, batches, 0.6, 0.9, **settings, checkpoint=tmp_path / "run.pt", progress=stop)
    resumed = attached(depth=4, img_size=32)
    ltmp.learn_dial(resumed, batches, 0.6, 0.9, **settings, checkpoint=tmp_path / "run.pt")
    assert torch.equal(resumed.ltmp.probe, whole.ltmp.probe)
    assert torch.equal(resumed.ltmp.dial.merge, whole.ltmp.dial.merge)


def test_thresholds_without_their_probe_are_refused(tmp_path: Path) -> None:
    model, images = attached(), random_images(2)
    with torch.no_grad():
        model(images)  # all off: nothing is read
        model.ltmp.set([0.5] * 3)
        with pytest.raises(LTMPError, match="need a probe, and there is none: learn one"):
            model(images)
    model.ltmp.set_probe(make_probe(3))
    path = tmp_path / "thresholds.safetensors"
    ltmp.save(model, path)
    tensors = load_file(path)
    assert tensors.pop("probe").dtype == torch.float16
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    save_file(tensors, path, metadata=about)
    with pytest.raises(LTMPError, match="its probe is missing"):
        ltmp.load(tiny_vit(), path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (make_probe(2), r"a probe of shape \(2, 17, 66\), but this model's is \[3, width \+ 1, 66\]"),
        (make_probe(3)[:, :, 1:], "a probe of shape"),
        (make_probe(3) * torch.inf, "holds NaN or infinity"),
    ],
)
def test_wrong_probes_are_refused(wrong: torch.Tensor, said: str) -> None:
    model = attached()
    with pytest.raises(ValueError, match=said):
        model.ltmp.set_probe(wrong)
    assert model.ltmp.probe is None


def test_of_another_width_is_refused(tmp_path: Path) -> None:
    model = attached()
    model.ltmp.set_probe(make_probe(3))
    ltmp.save(model, tmp_path / "narrow.safetensors")
    with pytest.raises(LTMPError, match="width 16, but this model's is 32"):
        ltmp.load(tiny_vit(embed_dim=32), tmp_path / "narrow.safetensors")


def test_models_that_answer_nothing_and_images_that_are_broken() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny_vit()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": self.vit(x)}

    with pytest.raises(LTMPError, match="returned a dict without an answer"):
        learn_probe(ltmp.attach(Features(), BEST), random_images(2))
    with pytest.raises(LTMPError, match="not finite"):
        learn_probe(attached(), random_images(2) * torch.nan)
    with pytest.raises(ValueError, match="similarity by a probe is for ltmp, ltpm, ltm, ltp; m has nothing learned"):
        ltmp.LTMPConfig(variant="m", r=4, scores=Scores("probe"))


def test_copies_checkpoints_and_casts_keep_it(tmp_path: Path) -> None:
    model, images = attached(), random_images(3)
    learn_probe(model, images)
    model.ltmp.set([0.4] * 3, [0.03] * 3)
    learned = model.ltmp.probe.clone()
    with torch.no_grad():
        expected = model(images)
        for other in (copy.deepcopy(model), attached()):
            other.load_state_dict(model.state_dict())
            assert torch.equal(other(images), expected)
        # one without takes it away again
        fresh = attached()
        other.load_state_dict(fresh.state_dict())
        assert other.ltmp.probe is None
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False).ltmp.probe, learned)
    assert torch.equal(model.half().ltmp.probe, learned)
    assert model.ltmp.probe.dtype == torch.float32
    whole = tmp_path / "whole.safetensors"
    save_file(model.state_dict(), whole)
    assert torch.equal(read(whole).probe, learned)
    assert "ltmp.probe" in model.state_dict()
    assert not [name for name in ltmp.detach(model).state_dict() if "ltmp" in name]


def test_a_new_probe_removes_the_dial_of_the_old_one() -> None:
    thresholds = ltmp.attach(tiny_vit(), BEST).ltmp
    probe = make_probe(3)
    thresholds.set_probe(probe)
    for change, stays in ((probe.clone(), True), (make_probe(3, seed=1), False), (None, False)):
        thresholds.set_probe(probe)
        thresholds.set_dial(make_dial(3))
        thresholds.set_budget(0.5)
        thresholds.set_probe(change)
        assert (thresholds.dial is not None) == stays
        assert (thresholds.budget == 0.5) == stays


@pytest.mark.parametrize("scores", ["best", "paper"])
def test_what_is_saved_belongs_together(scores: str, tmp_path: Path) -> None:
    """Learning on other images makes another probe: the dial of before is not saved beside it, nor kept."""
    model = ltmp.attach(tiny_vit(depth=4, img_size=32), ltmp.LTMPConfig(scores=scores))
    few, others = ([(random_images(16, size=32, seed=seed), torch.zeros(16).long())] for seed in (0, 1))
    making = {"knots": 3, "views": 0, "calibration": 16, "checked": 0}
    ltmp.learn_dial(model, few, 0.55, 0.9, **making)
    dial = model.ltmp.dial
    ltmp.learn(model, others, 0.7, views=0, calibration=16)
    ltmp.save(model, tmp_path / "learned.safetensors")
    learned = read(tmp_path / "learned.safetensors")
    if scores == "paper":
        assert torch.equal(learned.dial.merge, dial.merge)
    else:
        assert learned.dial is None
        assert torch.equal(learned.probe.float(), model.ltmp.probe)
    # the same images make the same probe, to which a dial still belongs
    ltmp.learn_dial(model, others, 0.55, 0.9, **making)
    dial = model.ltmp.dial
    ltmp.learn(model, others, 0.7, views=0, calibration=16)
    ltmp.save(model, tmp_path / "again.safetensors")
    again = read(tmp_path / "again.safetensors")
    assert torch.equal(again.dial.merge, dial.merge)
    assert scores == "paper" or torch.equal(again.probe.float(), model.ltmp.probe)
