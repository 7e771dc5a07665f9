"""When compiled plans are used, that they compute the same as plain torch, and that they leave no trace in models."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import ltmp
from helpers import assert_close, attach_reducing, embed, make_probe, plain_torch, random_images, run_recorded, tiny_vit
from ltmp.config import SCORES, VARIANTS
from ltmp.engines import compiled, onednn
from ltmp.engines.plain import look
from ltmp.evaluate import describe_machine

pytest.importorskip("numba")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list that grows by one with each call of the compiled engine."""
    calls: list[int] = []
    run = compiled.run
    monkeypatch.setattr(compiled, "run", lambda *args: calls.append(1) or run(*args))
    return calls


@torch.inference_mode()
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_plain_torch(variant: str, scores: str, runs: list[int]) -> None:
    fixed = VARIANTS[variant].fixed
    settings = {"r": 2} if fixed else {"scores": scores}
    model, images = ltmp.attach(tiny_vit(), ltmp.LTMPConfig(variant, **settings)), random_images(5)
    if not fixed:
        model.ltmp.set_probe(make_probe(3) if model.ltmp.config.needs_probe else None)
        model.ltmp.set([0.5, 0.4, 0.3], [0.03, 0.04, 0.05])
    with ltmp.trace(every_block=True) as traced:
        fast, counts = run_recorded(model, images)
    assert len(runs) == (variant != "evit")
    with plain_torch(), ltmp.trace(every_block=True) as expected:
        plain, plain_counts = run_recorded(model, images)
    assert torch.equal(counts, plain_counts)
    assert counts.min() < 17
    assert_close(fast, plain, 1e-5, "logits")
    assert torch.equal(traced.sources[0], expected.sources[0])
    assert torch.equal(traced.blocks[0], expected.blocks[0])


def operators(model: torch.nn.Module, image: Tensor) -> int:
    """Number of operator calls, including nested ones."""
    model(image)
    with profile(activities=[ProfilerActivity.CPU]) as calls:
        model(image)
    return len(calls.events())


@torch.inference_mode()
@pytest.mark.parametrize("scores", SCORES)
def test_few_operators_are_called_for_one_image(scores: str) -> None:
    """Twelve blocks call fewer than 1,500 operators, and hardly more with a grid; plans in torch call some 7,000."""
    image = random_images(1)
    model = ltmp.attach(tiny_vit(depth=12), ltmp.LTMPConfig(scores=scores))
    model.ltmp.set_probe(make_probe(12) if model.ltmp.config.needs_probe else None)
    model.ltmp.set([0.9] * 12, [0.01] * 12)
    assert run_recorded(model, image)[1][0, -1] < 17
    reduced = operators(model, image)
    assert reduced < 1500
    with ltmp.unmerge():
        assert operators(model, image) < 1.1 * reduced


@torch.inference_mode()
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "evit"])
def test_grids_agree_with_plain_torch(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, images, started = VARIANTS[variant].fixed, random_images(5), []
    model = ltmp.attach(tiny_vit(global_pool="avg"), ltmp.LTMPConfig(variant, **({"r": 2} if fixed else {})))
    if not fixed:
        model.ltmp.set([0.5, 0.4, 0.3], [0.03, 0.04, 0.05])
    start = compiled.start
    monkeypatch.setattr(compiled, "start", lambda *args, **given: started.append(1) or start(*args, **given))
    with ltmp.trace(every_block=True) as traced:
        last, between = model.forward_intermediates(images)
    assert len(started) == 1
    with plain_torch(), ltmp.trace(every_block=True) as expected:
        plain_last, plain_between = model.forward_intermediates(images)
    assert len(started) == 1
    assert torch.equal(traced.blocks[0], expected.blocks[0])
    assert (traced.sources[0] < 0).any() or "p" not in variant
    for a, b in zip([last, *between], [plain_last, *plain_between], strict=True):
        assert_close(a, b, 1e-5)


@torch.inference_mode()
def test_continuing_twice_from_one_block_changes_no_grid() -> None:
    images = random_images(3)
    model = attach_reducing(tiny_vit(), images)
    first, second, third = model.blocks
    x = first(embed(model, images))
    once = third(second(x)).clone()
    model.ltmp.set(None, [0.0, 0.0, 0.2])
    middle = second(x)
    before = middle.clone()
    model.ltmp.set(None, [0.0, 0.5, 0.2])
    third(second(x))
    assert torch.equal(third(middle), third(middle))
    assert torch.equal(middle, before)
    assert once.isfinite().all()


def test_runs_in_plain_torch_where_kernels_do_not_apply(runs: list[int]) -> None:
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images)
    model(images)
    assert not runs, "gradients are on"
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            model(images)
        with FlopCounterMode(display=False):
            model(images)
        with ltmp.unmerge():
            model(images)
        with plain_torch():
            model(images)
        copy.deepcopy(model).bfloat16()(images.bfloat16())
        assert not runs
        model(images)
        assert len(runs) == 1


@torch.inference_mode()
def test_unequal_images_of_a_batch_are_computed_as_if_alone() -> None:
    images = random_images(6)
    model = attach_reducing(tiny_vit(reg_tokens=2), images)
    together, counts = run_recorded(model, images)
    alone = [run_recorded(model, image[None]) for image in images]
    assert len(counts.unique(dim=0)) > 1
    assert torch.equal(counts, torch.cat([kept for _, kept in alone]))
    assert_close(together, torch.cat([logits for logits, _ in alone]), 1e-5)


@torch.inference_mode()
def test_results_are_not_overwritten_by_later_calls() -> None:
    """No output shares memory that a later call in the same thread overwrites."""
    images = random_images(4)
    model = attach_reducing(tiny_vit(), images)
    with ltmp.trace(every_block=True) as calls, ltmp.record() as record:
        first = model.forward_features(images)
        kept = [t.clone() for t in (first, calls.sources[0], calls.blocks[0], record.kept[0])]
        for _ in range(3):
            model.forward_features(images.flip(0) * 2)
    for before, now in zip(kept, (first, calls.sources[0], calls.blocks[0], record.kept[0]), strict=True):
        assert torch.equal(before, now)


def test_threads_do_not_interfere() -> None:
    batches = [random_images(3, seed=seed) for seed in range(4)]
    model = attach_reducing(tiny_vit(), batches[0])
    with torch.inference_mode():
        expected = [model(images) for images in batches]
    wrong: list[int] = []

    def call(i: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                if (model(batches[i]) - expected[i]).abs().max() > 1e-5:
                    wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.inference_mode()
def test_changed_weights_are_noticed() -> None:
    """However they change: only references to a model's parts are cached, no values."""
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images)
    changes: list[Any] = [
        lambda block: block.mlp.fc1.weight.data.mul_(1.1),
        lambda block: setattr(block.mlp.fc1.weight, "data", block.mlp.fc1.weight.data * 1.1),
        lambda block: setattr(block.attn, "proj", copy.deepcopy(block.attn.proj).apply(lambda m: m.weight.mul_(1.5))),
        lambda block: setattr(block.mlp.fc2, "weight", torch.nn.Parameter(block.mlp.fc2.weight * 1.1)),
        lambda block: setattr(block.norm1, "eps", 0.1),
    ]
    block = model.blocks[0]
    before = model(images)
    for change in changes:
        change(block)
        now = model(images)
        assert (now - before).abs().max() > 1e-4
        with plain_torch(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(onednn, "_applies", lambda x: False)
            assert_close(now, model(images), 1e-5)
        before = now


@torch.inference_mode()
def test_copies_and_pickles_start_with_an_empty_cache() -> None:
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images)
    with plain_torch():
        model(images)
    before = len(pickle.dumps(model))
    expected = model(images)
    assert len(pickle.dumps(model)) == before
    assert_close(copy.deepcopy(model)(images), expected, 0.0)


class Watched(torch.Tensor):
    """A tensor with operators of its own, as other libraries have them."""


@torch.inference_mode()
def test_tensor_subclasses_are_left_to_the_host() -> None:
    block = tiny_vit().blocks[0]
    x = torch.randn(7, 16)
    from ltmp.hosts.timm import RECIPE

    assert onednn.halves(RECIPE, (block,), x, look({}, RECIPE, (block,)))[0].qkv.func is onednn._qkv
    block.mlp.fc1.weight = torch.nn.Parameter(block.mlp.fc1.weight.as_subclass(Watched), requires_grad=False)
    assert onednn.halves(RECIPE, (block,), x, look({}, RECIPE, (block,)))[0].qkv.func is not onednn._qkv


@torch.inference_mode()
def test_rows_padded_for_onednn_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn._AVAILABLE:
        pytest.skip("this torch has no oneDNN linear operator")
    images = random_images(5)
    model = attach_reducing(tiny_vit(), images)
    own, counts = run_recorded(model, images)
    monkeypatch.setattr(onednn, "_onednn_is_faster", lambda width, threads: True)
    assert onednn.padded_rows(70, 16) == 72
    filled, filled_counts = run_recorded(model, images)
    assert torch.equal(counts, filled_counts)
    assert_close(filled, own, 1e-5)


def test_info_reports_whether_plans_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_machine()["plans on a CPU"] == "compiled"
    monkeypatch.setattr("ltmp.evaluate.machine.unavailable", lambda: "needs numba")
    assert "needs numba" in describe_machine()["plans on a CPU"]
