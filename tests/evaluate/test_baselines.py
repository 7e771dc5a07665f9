"""Lower resolution and smaller models as baselines: their cost, and that they are evaluated like other methods."""

from __future__ import annotations

import pytest
import torch

import ltmp
from helpers import TINY, assert_close, random_images, tiny_vit
from ltmp.engines import trial
from ltmp.errors import UsageError
from ltmp.evaluate.baselines import as_baseline, at_resolution, dense_geometry
from ltmp.evaluate.bench import Bench, Other
from ltmp.evaluate.compare import RequestedMethod, compare, fixed_entry, rows
from ltmp.hosts.attach import is_attached


@torch.inference_mode()
def test_lower_resolution_is_the_same_model_on_fewer_patches() -> None:
    model, images = ltmp.attach(tiny_vit()), random_images(2)
    found = at_resolution(model, 8, images)
    assert (found.name, found.method, found.kept) == ("resize:8", "resize", (5, 5, 5))
    width, many, few = TINY["embed_dim"], 17, 5
    costs = [(4 + 8) * n + 2 * n * n / width for n in (few, many)]
    assert found.share == pytest.approx(costs[0] / costs[1])
    expected = tiny_vit()
    expected.set_input_size((8, 8))
    small = found.prepared(images)
    assert small.shape == (2, 3, 8, 8)
    assert_close(found.run(small), expected(small), 1e-5)
    assert_close(found.model(images), found.run(small), 0.0)
    assert not is_attached(found.model)
    assert dense_geometry(model, images).tokens == many


@pytest.mark.parametrize(
    ("size", "why"),
    [(16, "expected a size below the model's own 16"), (7, "expected a multiple of the model's patches of 4")],
)
def test_a_size_that_does_not_fit_is_refused(size: int, why: str) -> None:
    with pytest.raises(UsageError, match=f"resize:{size}: .*{why}"):
        at_resolution(ltmp.attach(tiny_vit()), size, random_images(1))


def test_a_host_of_one_size_is_refused() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5).eval()
    with pytest.raises(UsageError, match="resize:12: this model runs at its own size only"):
        at_resolution(ltmp.attach(model), 12, random_images(1))


@torch.inference_mode()
def test_hosts_of_transformers_resample_when_asked() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    model, images = ltmp.attach(transformers.ViTForImageClassification(config).eval()), random_images(1)
    found = at_resolution(model, 12, images)
    assert found.kept == (10, 10)
    assert found.run(found.prepared(images)).logits.shape == (1, 2)


def test_a_smaller_model_must_have_the_same_classes() -> None:
    model, images = ltmp.attach(tiny_vit()), random_images(1)
    found = as_baseline(model, tiny_vit(depth=1), "small", images)
    assert found.share == pytest.approx(1 / 3)
    with pytest.raises(UsageError, match="--against small: it has 3 classes and the model 5"):
        as_baseline(model, tiny_vit(num_classes=3), "small", images)
    with pytest.raises(UsageError, match="--against net"):
        as_baseline(model, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 5)), "net", images)


def test_baselines_are_evaluated_in_the_same_pass() -> None:
    model, images = ltmp.attach(tiny_vit()), random_images(12)
    batches = list(zip(images.split(5), (torch.arange(12) % 5).split(5), strict=True))
    entries = [
        fixed_entry(model, RequestedMethod("m", 3), images, None),
        at_resolution(model, 12, images),
        as_baseline(model, tiny_vit(), "itself", images),
    ]
    results = compare(model, batches, entries)
    table = {row["name"]: row for row in rows(entries, results)}
    assert table["itself"]["share"] == pytest.approx(1)
    assert (table["itself"]["top1"], table["itself"]["agreement"]) == (table["dense"]["top1"], 100)
    assert table["resize:12"]["share"] == pytest.approx(entries[1].share)
    assert all(row["images_per_second"] > 0 for row in table.values())
    assert results["resize:12"].tokens == 10


def test_bench_times_the_callers_ways() -> None:
    model, images = ltmp.attach(tiny_vit()), random_images(2)
    model.ltmp.set([0.5] * 3, [0.04] * 3)
    found = at_resolution(model, 12, images)
    others = [
        Other(found.name, found.run, found.share, found.prepared),
        Other("broken", lambda x: torch.full((2, 5), torch.nan), None),
    ]
    done = Bench(model, images, compiled=False, baseline=False, others=others).run(0.01)
    named = {row.way: row for row in done}
    assert named["resize:12"].images_per_second
    assert named["resize:12"].share == pytest.approx(found.share)
    assert named["broken"].images_per_second is None
    assert named["broken"].note == "logits are not finite"
    assert named["auto"].images_per_second
    assert named["auto"].share == named["packed"].share


def test_bench_shows_that_auto_chose_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MARGIN", 0.0)
    model = ltmp.attach(tiny_vit())
    model.ltmp.set([0.5] * 3, [0.04] * 3)
    done = Bench(model, random_images(2), compiled=False, baseline=False).run(0.01)
    named = {row.way: row for row in done}
    assert (named["auto"].share, named["auto"].ideal) == (1, 1)
    assert named["packed"].share < 1
