from __future__ import annotations

import pytest
import torch

from ltmp.ops.attend.reference import attend as reference

from .helpers import DEVICE, Batch, gpu

triton = pytest.importorskip("triton")
from ltmp.ops.attend.triton import attend  # noqa: E402

COUNTS = [[1], [7], [33, 1, 64, 65, 17], [130, 3, 200], [197, 128, 192, 256]]
LONG = [[257, 2], [300, 1, 129]]


def check(batch: Batch, tolerance: float, longest: int | None = None, need: bool = True) -> None:
    q, k, v = batch.heads
    out, received = attend(q, k, v, batch.size, batch.cu, longest or batch.longest, need)
    tokens = batch.tokens()
    expected, importance = reference(*(batch.pad(t.float()) for t in (q, k, v)), tokens.size, tokens.keep)
    torch.testing.assert_close(
        out[: batch.live].float(), batch.rows(expected).flatten(1), atol=tolerance, rtol=tolerance
    )
    assert out.dtype == v.dtype
    if not need:
        assert received is None
        return
    votes = torch.tensor([n for n in batch.counts for _ in range(n)], device=DEVICE) * q.shape[1]
    found = received[:, : batch.live].sum(0) / votes
    torch.testing.assert_close(found, batch.rows(importance), atol=0, rtol=max(tolerance, 1e-5))


@pytest.mark.parametrize("counts", COUNTS + LONG, ids=str)
def test_matches_reference(counts: list[int]) -> None:
    check(Batch.random(counts), 1e-5)


@pytest.mark.parametrize("width", [16, 32, 40, 48, 64, 72, 80, 96, 128])
def test_any_head_width(width: int) -> None:
    check(Batch.random([35, 1, 70], heads=3, width=width), 1e-5)


@pytest.mark.parametrize("counts", [[65, 40], [300, 20]], ids=str)
def test_bound_may_be_loose_and_importance_unwanted(counts: list[int]) -> None:
    check(Batch.random(counts), 1e-5, longest=max(counts) + 90)
    check(Batch.random(counts), 1e-5, need=False)


def test_separate_tensors_of_any_row_stride() -> None:
    batch = Batch.random([20, 33], heads=3)
    q, k, v = (t.contiguous() for t in batch.heads)
    split = attend(q, k, v, batch.size, batch.cu, 33)
    fused = attend(*batch.heads, batch.size, batch.cu, 33)
    assert all(torch.equal(a[..., :53] if a.ndim == 2 and a.shape[0] == 3 else a[:53],
                           b[..., :53] if b.ndim == 2 and b.shape[0] == 3 else b[:53])
               for a, b in zip(split, fused, strict=True))  # fmt: skip


def test_large_scores_stay_finite() -> None:
    batch = Batch.random([70, 9])
    batch.qkv[: batch.live].mul_(12)
    check(batch, 1e-4)


def test_strided_head_is_refused() -> None:
    batch = Batch.random([4])
    q = batch.qkv[:, 0].transpose(1, 2)
    with pytest.raises(ValueError, match="unit stride"):
        attend(q, q, q, batch.size, batch.cu, 4)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS + LONG + [[1400, 577]], ids=str)
@pytest.mark.parametrize("width", [64, 80])
def test_half_precision(dtype: torch.dtype, counts: list[int], width: int) -> None:
    check(Batch.random(counts, heads=6, width=width, dtype=dtype), 2e-2 if dtype == torch.bfloat16 else 3e-3)
