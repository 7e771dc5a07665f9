"""The references of the ops against their formulas: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close
from ltmp.ops.attend.reference import attend, attend_rows
from ltmp.ops.match.reference import match


def formula(q: Tensor, k: Tensor, v: Tensor, size: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of `q k^T / sqrt(D) + log size`, each token weighted by its `keep`; and the mean attention received."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    score = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + size.log()[:, None, None, :]
    weight = score.exp() * keep[:, None, None, :]
    p = weight / weight.sum(-1, keepdim=True)
    votes = (p * keep[:, None, :, None]).sum((1, 2)) / (q.shape[1] * keep.sum(1, keepdim=True))
    return (p @ v).transpose(1, 2), votes


def case(
    images: int, tokens: int, heads: int = 2, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(images, tokens, heads, width, generator=generator).to(dtype) for _ in range(3))
    size = torch.randint(1, 6, (images, tokens), generator=generator).float()
    keep = (torch.rand(images, tokens, generator=generator) > 0.3).float()
    keep[:, 0] = 1
    return [q, k, v, size, keep]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
def test_attend(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = case(3, tokens, dtype=dtype)
    out, importance = attend(*inputs)
    expected, received = formula(*(t.double() for t in inputs))
    assert out.dtype == dtype
    assert importance.dtype == torch.float32
    live = inputs[4] > 0
    assert_close(out[live], expected[live], atol=tolerance)
    assert_close(importance[live], received[live], atol=min(tolerance, 1e-5))
    # the attention of each query sums to 1
    assert_close((importance * live).sum(1), torch.ones(3), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_attend_gradients(tokens: int) -> None:
    """Of q, k, v and keep; at removed tokens, the gradient of keep is that of restoring them."""
    inputs = case(3, tokens)
    ours = [t.clone().requires_grad_(i != 3) for i, t in enumerate(inputs)]
    theirs = [t.double().requires_grad_(i != 3) for i, t in enumerate(inputs)]
    direction = torch.randn(3, tokens, 2, 8, generator=torch.Generator().manual_seed(1))
    (attend(*ours)[0] * direction).sum().backward()
    (formula(*theirs)[0] * direction.double()).sum().backward()
    for name, mine, reference in zip(("q", "k", "v", "size", "keep"), ours, theirs, strict=True):
        if reference.grad is not None:
            scale = max(1.0, float(reference.grad.abs().max()))
            assert_close(mine.grad, reference.grad, atol=1e-5 * scale, what=f"gradient of {name}")
    assert tokens == 1 or ours[4].grad[inputs[4] == 0].abs().sum() > 0


def test_attend_keeps_no_map() -> None:
    """Memory kept for backward grows with the number of tokens, not with its square."""
    saved = 0

    def count(t: Tensor) -> Tensor:
        nonlocal saved
        saved += t.numel()
        return t

    inputs = [t.requires_grad_(i < 3) for i, t in enumerate(case(1, 256, heads=4, width=4))]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        attend(*inputs)
    assert saved < 256 * 256


@settings(max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.booleans(), st.integers(0, 1000))
def test_attend_rows(counts: list[int], importance: bool, seed: int) -> None:
    q, k, v, size, _ = case(1, sum(counts), seed=seed)
    out, received = attend_rows(q[0], k[0], v[0], size[0], counts, importance)
    parts = zip(*(t[0].split(counts) for t in (q, k, v, size)), strict=True)
    expected = [formula(*(t[None].double() for t in part), torch.ones(1, len(part[0])).double()) for part in parts]
    assert_close(out, torch.cat([o[0] for o, _ in expected]), atol=1e-5)
    assert (received is None) is not importance
    if received is not None:
        assert_close(received, torch.cat([r[0] for _, r in expected]), atol=1e-6)


@settings(max_examples=60)
@given(st.integers(2, 15), st.integers(0, 1000))
def test_match(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.nn.functional.normalize(torch.randn(2, tokens, 4, generator=generator), dim=-1)
    free = torch.rand(2, tokens, generator=generator) > 0.3
    best, partner = match(metric, free)
    assert best.shape == partner.shape == (2, (tokens + 1) // 2)
    for b in range(2):
        for i in range(0, tokens, 2):
            odd = [j for j in range(1, tokens, 2) if free[b, j]]
            if not free[b, i] or not odd:
                assert best[b, i // 2] == float("-inf")
                continue
            cosines = {j: float(metric[b, i] @ metric[b, j]) for j in odd}
            assert best[b, i // 2].item() == pytest.approx(max(cosines.values()), abs=1e-6)
            assert cosines[2 * int(partner[b, i // 2]) + 1] == pytest.approx(max(cosines.values()), abs=1e-6)
