"""The kernels of a probe against `ops.probe.reference` and `method.scores`, which define it."""

from __future__ import annotations

import pytest
import torch

from helpers import make_probe
from ltmp.method.scores import Signals, importance, merge_penalty, metric
from ltmp.ops.probe.reference import LIFT, WIDTH, probe
from ltmp.ops.weigh.reference import saliency

from .helpers import DEVICE, Batch, importance_of, random_received, thresholds

pytest.importorskip("triton")
# only now, as these import Triton
from ltmp.ops.probe.triton import probe_rows
from ltmp.ops.weigh.triton import saliency_rows


@pytest.mark.parametrize("width", [16, 24, 200])
@pytest.mark.parametrize("counts", [[1], [9, 1, 64, 65, 2, 3]], ids=str)
@pytest.mark.parametrize("branch", ["none", "added", "scaled"])
def test_probe_rows(counts: list[int], width: int, branch: str) -> None:
    batch = Batch.random(counts)
    generator = torch.Generator().manual_seed(1)
    # means far from 0, as residual streams have them
    x, y = (torch.randn(batch.qkv.shape[0], width, generator=generator).to(DEVICE) * 3 + 7 for _ in range(2))
    x[batch.live :] = y[batch.live :] = float("nan")
    scale = torch.rand(width, generator=generator).to(DEVICE) if branch == "scaled" else None
    weight = make_probe(1, width)[0].to(DEVICE)
    found, log_saliency = probe_rows(x, None if branch == "none" else y, scale, weight, batch.cu)
    total = {"none": x, "added": x + y, "scaled": x + y * (0 if scale is None else scale)}[branch]
    expected = probe(total[: batch.live], weight)
    torch.testing.assert_close(found[: batch.live], expected[:, :WIDTH], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_saliency.T[: batch.live], expected[:, WIDTH:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("protected", [0, 1, 5])
@pytest.mark.parametrize("counts", [[1], [9, 64, 1], [700, 40]], ids=str)
def test_saliency_rows(counts: list[int], protected: int) -> None:
    batch = Batch.random(counts, heads=3)
    learned = thresholds("ltmp", 0.5, 0.0, similarity="probe", importance="probe", size_power=0.5)
    probed = torch.randn(batch.qkv.shape[0], WIDTH + 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    probed[batch.live :] = float("nan")
    received, tokens, weight = random_received(batch), batch.tokens(), learned.weight(0, batch.size)
    few = (batch.origin, batch.cu, batch.longest, protected)
    log_saliency = probed[:, WIDTH:].T.contiguous()
    penalty, blended = saliency_rows(log_saliency, weight, batch.size, received, *few)
    signals = Signals(tokens, protected, batch.pad(importance_of(batch, received)), None, batch.pad(probed))
    expected = merge_penalty(learned, 0, signals)
    assert expected is not None
    torch.testing.assert_close(penalty[: batch.live], batch.rows(expected), atol=0, rtol=1e-5)
    expected = importance(learned, 0, signals)
    assert expected is not None
    assert blended is not None
    torch.testing.assert_close(importance_of(batch, blended), batch.rows(expected), atol=0, rtol=1e-5)
    alone, nothing = saliency_rows(log_saliency, weight, batch.size, None, *few)
    assert nothing is None
    assert torch.equal(alone[: batch.live], penalty[: batch.live])


def test_saliency_is_a_share_of_the_patches() -> None:
    log_saliency, weight = torch.tensor([[0.0, 1.0, 2.0, 9.0]]), torch.tensor([[1.0, 4.0, 1.0, 1.0]])
    shares = saliency(log_saliency, weight, torch.tensor([[True, True, True, False]]))
    by_hand = torch.tensor([1.0, 4 * 2.718281828, 2.718281828**2])
    torch.testing.assert_close(shares[0], torch.tensor([*(by_hand / by_hand.sum()), 0.0]), atol=1e-6, rtol=0)
    assert saliency(log_saliency, weight, torch.zeros(1, 4) > 0).tolist() == [[0.0] * 4]


def test_lifted_tokens_are_compared_by_distance() -> None:
    """1 - cosine, counted as much more as the lift takes away, is the squared distance over the mean of all pairs'."""
    learned = thresholds("ltm", 0.5, 0.0, similarity="probe")
    mapped = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + 1
    square = mapped.square().sum(1).mean()
    probed = torch.zeros(50, WIDTH + 2)
    probed[:, :8] = mapped / (LIFT * square).sqrt()
    probed[:, WIDTH - 1] = 1
    unit = metric(learned.config.scores, torch.zeros(50, 2, 16), probed).double()
    found = (1 - unit @ unit.T) * (1 + LIFT)
    expected = torch.cdist(mapped, mapped).double().square() / (2 * square)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.1)
