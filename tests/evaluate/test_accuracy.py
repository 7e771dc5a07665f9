"""The results of an evaluation against independent counts."""

from __future__ import annotations

import pytest
import timm
import torch

import ltmp
from ltmp.data import make_loader
from ltmp.errors import LTMPError
from ltmp.evaluate import evaluate, measure

DEPTH, CLASSES = 3, 7


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ltmp.attach(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=DEPTH, num_classes=CLASSES
        ).eval()
    )


@pytest.fixture
def reducing(model):
    model.ltmp.set(merge=[0.3, 0.3, 0.3], prune=[0.05, 0.05, 0.05])
    return model


def batches(count=10, size=4, labelled=True):
    torch.manual_seed(1)
    images = torch.randn(count, 3, 32, 32)
    labels = torch.randint(CLASSES, (count,)) if labelled else torch.full((count,), -1)
    return make_loader(torch.utils.data.TensorDataset(images, labels), size)


def everything(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_off_thresholds_are_the_dense_model(model):
    result = evaluate(model, batches())
    assert (result.images, result.share, result.agreement) == (10, 1.0, 100.0)
    assert (result.top1, result.top5) == (result.dense_top1, result.dense_top5)
    assert result.kept == [17.0] * DEPTH


def test_figures_equal_counts_by_hand(reducing):
    images, labels = everything(batches())
    with torch.inference_mode(), ltmp.record() as calls:
        logits = reducing(images)
    with torch.inference_mode(), ltmp.dense():
        plain = reducing(images)
    result = evaluate(reducing, batches(), speed=False)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1)
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert result.top5 == pytest.approx(100 * top5.float().mean().item())
    assert result.dense_top1 == pytest.approx(100 * (plain.argmax(1) == labels).float().mean().item())
    assert result.agreement == pytest.approx(100 * (plain.argmax(1) == logits.argmax(1)).float().mean().item())
    assert result.share == pytest.approx(calls.share().mean().item())
    assert result.share_std == pytest.approx(calls.share().std(correction=0).item(), abs=1e-6)
    assert result.kept == pytest.approx(torch.cat(calls.kept).mean(0).tolist())
    assert 0 < result.share_min <= result.share <= result.share_max < 1


def test_limit_counts_images_not_batches(reducing):
    assert evaluate(reducing, batches(), limit=6, speed=False).images == 6


def test_data_without_labels(reducing):
    result = evaluate(reducing, batches(labelled=False), speed=False)
    assert (result.top1, result.top5, result.dense_top1) == (None, None, None)
    assert 0 <= result.agreement <= 100


def test_progress_and_timing_do_not_change_the_result(reducing):
    seen = []
    timed = evaluate(reducing, batches(), progress=seen.append)
    assert seen == [4, 4, 2]
    assert timed.throughput is not None
    assert timed.share == evaluate(reducing, batches(), speed=False).share


def test_modes_are_restored(reducing):
    reducing.train()
    reducing.blocks.eval()
    before = [module.training for module in reducing.modules()]
    evaluate(reducing, batches(), speed=False)
    assert [module.training for module in reducing.modules()] == before


def test_fewer_than_five_classes():
    model = ltmp.attach(
        timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_classes=2).eval()
    )
    loader = [(torch.randn(3, 3, 32, 32), torch.zeros(3, dtype=torch.long))]
    assert evaluate(model, loader, speed=False).top5 == 100


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["images", "weights"])
def test_nan_is_traced_to_its_source(model, where, value):
    images, labels = everything(batches())
    if where == "images":
        images[3, 0, 0, 0] = value
    else:
        model.head.weight.data[0, 0] = value
    with pytest.raises(LTMPError, match=where):
        evaluate(model, [(images, labels)], speed=False)


def test_label_outside_the_head(model):
    with pytest.raises(LTMPError, match="a label is 7 but the model's head has 7"):
        evaluate(model, [(torch.randn(1, 3, 32, 32), torch.tensor([CLASSES]))])


def test_no_images(model):
    with pytest.raises(LTMPError, match="no images"):
        evaluate(model, [])


def test_nothing_attached(model):
    with pytest.raises(LTMPError, match="attach"):
        evaluate(ltmp.detach(model), batches())


def test_throughput_interleaves_both(reducing):
    calls = []

    def watched(images):
        calls.append("call")
        return reducing(images)

    result = measure(watched, torch.randn(4, 3, 32, 32), rounds=3, warmup=1)
    assert len(calls) == 8
    assert (result.batch_size, result.rounds) == (4, 3)
    assert min(result.dense, result.reduced, result.speedup) > 0


def test_throughput_of_a_slow_model_stops_early(reducing):
    assert measure(reducing, torch.randn(4, 3, 32, 32), rounds=50, seconds=0).rounds == 3


def test_rows_of_images_add_up_to_the_figures(reducing):
    parts = []
    result = evaluate(reducing, batches(), limit=7, speed=False, on_images=parts.append)
    label, dense, reduced, share, kept = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("label", "dense", "reduced", "share", "kept")
    )
    assert len(share) == result.images == 7
    assert torch.equal(label, everything(batches())[1][:7])
    assert result.top1 == pytest.approx(100 * (reduced == label).float().mean().item())
    assert result.dense_top1 == pytest.approx(100 * (dense == label).float().mean().item())
    assert result.agreement == pytest.approx(100 * (dense == reduced).float().mean().item())
    assert (result.share, result.share_min) == (pytest.approx(share.mean().item()), share.min().item())
    assert kept.mean(0).tolist() == pytest.approx(result.kept)
