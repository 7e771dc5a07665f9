"""match, plan and fold kernels against `reduction.make_plan` and `reduction.fold`, which define the method."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from ltmp.config import SCORES as NAMED
from ltmp.method.reduction import fold as fold_reference
from ltmp.method.reduction import make_plan
from ltmp.method.scores import BlockScores, Signals, attended_for, importance, merge_penalty
from ltmp.ops.match.reference import candidates as candidates_reference
from ltmp.ops.match.reference import match as match_reference
from ltmp.ops.match.reference import similarity_metric

from .helpers import DEVICE, Batch, importance_of, random_received, thresholds

triton = pytest.importorskip("triton")
# only now, as these import Triton
from ltmp.ops.fold.triton import fold  # noqa: E402
from ltmp.ops.match.triton import candidates, match  # noqa: E402
from ltmp.ops.match.triton import similarity_metric as similarity_rows  # noqa: E402
from ltmp.ops.norm.triton import Norm, add_norm  # noqa: E402
from ltmp.ops.plan.triton import plan  # noqa: E402
from ltmp.ops.weigh.triton import class_attention_rows  # noqa: E402

COUNTS = [[1], [2], [7], [9, 1, 64, 65, 2, 3], [33, 30, 31, 32], [150, 3, 197]]
LONG = [[300, 1, 270]]


def check(
    batch: Batch, variant: str, protected: int, merge: float, prune: float, longest: int | None = None,
    received: Tensor | None = None, **scores: Any,
) -> list[int]:  # fmt: skip
    """Check survivors, order, sizes and features against the definition; return the token counts left."""
    q, k, _ = batch.heads
    learned = thresholds(variant, merge, prune, **scores)
    config, steps = learned.config, learned.config.steps
    received = random_received(batch) if received is None else received
    tokens = batch.tokens()
    attended = attended_for(learned, 0, batch.pad(q), batch.pad(k), tokens)
    signals = Signals(tokens, protected, batch.pad(importance_of(batch, received)), attended)
    metric = similarity_metric(batch.pad(k), config.scores.similarity)
    given = BlockScores(metric, importance(learned, 0, signals), merge_penalty(learned, 0, signals))
    expected = make_plan(tokens, given, learned, 0, steps, protected)
    left = [int(n) for n in expected.tokens.counts().tolist()]

    stats = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    partners, bound = None, longest or batch.longest
    if scores:
        rows = None
        if config.scores.class_power:
            weight = learned.weight(0, batch.size)
            few = (batch.cu, bound, learned.class_power(0))
            rows, blended = class_attention_rows(q, k, weight, batch.size, received, *few)
            assert blended is not None
            received = blended
        keys = similarity_rows(k, batch.cu) if config.scores.averages_keys else k
        partners = candidates(keys, batch.origin, batch.cu, bound, protected, config.scores.mutual, rows)
    found = plan(
        k, received, batch.size, batch.origin, batch.cu, bound,
        learned.merge if "merge" in steps else None, learned.prune if "prune" in steps else None, protected, stats,
        partners=partners,
    )  # fmt: skip
    assert found.cu.diff().tolist() == left
    assert stats.tolist() == [sum(left), max(left), 0]

    x = torch.randn(batch.qkv.shape[0], 24, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    room = sum(left) + 3
    norm = Norm(torch.rand(24, device=DEVICE), torch.rand(24, device=DEVICE), 1e-6)
    y, scale = torch.randn_like(x), torch.rand(24, device=DEVICE)
    new, normed, size, origin = fold(
        x, y, scale, norm, found, batch.size, batch.origin, batch.cu, bound, room, not config.scores.mutual
    )
    total = sum(left)
    features = fold_reference(batch.pad(x + scale * y), expected)

    def live(values: Tensor) -> Tensor:
        return torch.cat([image[:n] for image, n in zip(values, left, strict=True)])

    assert origin[:total].tolist() == live(expected.tokens.origin).tolist()
    assert size[:total].tolist() == live(expected.tokens.size).tolist()
    torch.testing.assert_close(new[:total], live(features), atol=1e-5, rtol=1e-5)
    reference_norm = torch.nn.functional.layer_norm(new[:total], (24,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(normed[:total], reference_norm, atol=1e-5, rtol=1e-5)
    return left


@pytest.mark.parametrize("variant", ["ltmp", "ltm", "ltp"])
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_matches_definition(counts: list[int], protected: int, variant: str) -> None:
    batch = Batch.random(counts)
    prune = importance_of(batch, random_received(batch)).median().item()
    check(batch, variant, protected, 0.4, prune)


SCORES: dict[str, dict[str, Any]] = {
    "heads": {"similarity": "heads"},
    "mutual": {"matching": "mutual"},
    "penalty": {"class_power": 0.7, "size_power": 0.3},
    "attention": asdict(NAMED["attention"]),
}


@pytest.mark.parametrize("variant", ["ltmp", "ltm"])
@pytest.mark.parametrize("protected", [0, 2])
@pytest.mark.parametrize("counts", [*COUNTS[:2], COUNTS[3], *LONG], ids=str)
@pytest.mark.parametrize("scores", SCORES)
def test_other_scores_match_definition(scores: str, counts: list[int], protected: int, variant: str) -> None:
    batch = Batch.random(counts)
    prune = importance_of(batch, random_received(batch)).median().item()
    left = check(batch, variant, protected, 0.2, prune, **SCORES[scores])
    assert max(counts) < 9 or sum(left) < sum(counts)


@pytest.mark.parametrize("scores", ["mutual", "attention"])
@pytest.mark.parametrize("protected", [0, 1])
def test_pairs_that_are_all_prunable_leave_one_token(protected: int, scores: str) -> None:
    batch = Batch.random([1, 2, 40, 33])
    assert check(batch, "ltmp", protected, 0.3, 2.0, **SCORES[scores]) == [1, 1, 1, 1]
    check(batch, "ltmp", 0, 0.3, 2.0, received=torch.ones_like(random_received(batch)), **SCORES[scores])


def test_pairs_under_a_loose_bound() -> None:
    check(Batch.random([20, 31]), "ltmp", 1, 0.2, 0.01, longest=200, **SCORES["attention"])


@pytest.mark.parametrize("variant", ["ltmp", "ltp"])
@pytest.mark.parametrize("counts", LONG, ids=str)
def test_long_images(counts: list[int], variant: str) -> None:
    batch = Batch.random(counts)
    check(batch, variant, 1, 0.4, importance_of(batch, random_received(batch)).median().item())


def test_loose_bound() -> None:
    check(Batch.random([20, 31]), "ltmp", 1, 0.4, 0.01, longest=200)
    check(Batch.random([20, 31]), "ltmp", 1, 0.4, 0.01, longest=300)


@pytest.mark.parametrize("variant", ["ltmp", "ltp"])
@pytest.mark.parametrize("protected", [0, 1])
def test_everything_prunable_leaves_one_token(variant: str, protected: int) -> None:
    batch = Batch.random([1, 2, 40, 33])
    assert check(batch, variant, protected, 0.3, 2.0) == [1, 1, 1, 1]


@pytest.mark.parametrize("variant", ["ltmp", "ltp"])
def test_first_of_equals_is_spared(variant: str) -> None:
    batch = Batch.random([5, 1, 6, 70])
    check(batch, variant, 0, 1.0, 2.0, received=torch.ones_like(random_received(batch)))


def test_equal_tokens_all_merge_into_the_first_free_odd_token() -> None:
    batch = Batch.random([9, 64])
    batch.qkv[: batch.live] = batch.qkv[:1]
    batch.origin[: batch.live] = torch.cat([torch.arange(n) for n in batch.counts]).int().to(DEVICE)
    # cosines of equal vectors round to 1 or just below
    assert check(batch, "ltm", 1, 0.999, 0.0) == [5, 33]


def test_only_protected_tokens_left() -> None:
    batch = Batch.random([2, 5, 1])
    assert check(batch, "ltmp", 5, -1.0, 2.0) == [2, 5, 1]


@pytest.mark.parametrize("counts", [[9, 64, 1], [300, 40]], ids=str)
def test_match(counts: list[int]) -> None:
    batch = Batch.random(counts, heads=3)
    _, k, _ = batch.heads
    best, partner, _ = match(k, batch.origin, batch.cu, batch.longest, 2)
    tokens = batch.tokens()
    free = tokens.live & (tokens.origin >= 2)
    expected, expected_partner = match_reference(similarity_metric(batch.pad(k)), free)
    for image, n in enumerate(counts):
        first, half = int(batch.cu[image]), (n + 1) // 2
        found = best[first : first + half]
        torch.testing.assert_close(found, expected[image, :half], atol=1e-5, rtol=0)
        some = found > -2
        assert torch.equal(partner[first : first + half][some].long(), expected_partner[image, :half][some])


@pytest.mark.parametrize("mutual", [False, True], ids=["bipartite", "mutual"])
@pytest.mark.parametrize("similarity", ["mean", "heads"])
@pytest.mark.parametrize("counts", [[9, 64, 1], [300, 40]], ids=str)
def test_candidates(counts: list[int], similarity: str, mutual: bool) -> None:
    batch = Batch.random(counts, heads=3)
    _, k, _ = batch.heads
    penalty = torch.rand(batch.qkv.shape[0], generator=torch.Generator().manual_seed(3)).to(DEVICE) + 0.5
    keys = similarity_rows(k, batch.cu) if similarity == "mean" else k
    best, partner, _ = candidates(keys, batch.origin, batch.cu, batch.longest, 2, mutual, penalty)
    tokens = batch.tokens()
    free, metric = tokens.live & (tokens.origin >= 2), similarity_metric(batch.pad(k), similarity)
    step = 1 if mutual else 2
    asked, expected, receiver = candidates_reference(metric, free, mutual, batch.pad(penalty, 1))
    for image, n in enumerate(counts):
        first, number = int(batch.cu[image]), len(range(n)[asked])
        scored = expected[image, :number] > -2
        found = best[first : first + number][scored]
        torch.testing.assert_close(found, expected[image, :number][scored], atol=1e-5, rtol=0)
        places = partner[first : first + number][scored] * step + step - 1
        assert torch.equal(places.long(), receiver[image, :number][scored])


def test_class_attention_rows() -> None:
    for counts in ([9, 64, 1], [700, 40]):
        batch = Batch.random(counts, heads=3)
        q, k, _ = batch.heads
        learned = thresholds("ltmp", 0.5, 0.0, class_power=0.4, size_power=0.5)
        weight = learned.weight(0, batch.size)
        received, tokens = random_received(batch), batch.tokens()
        few = (batch.cu, batch.longest, learned.class_power(0))
        penalty, blended = class_attention_rows(q, k, weight, batch.size, received, *few)
        attended = attended_for(learned, 0, batch.pad(q), batch.pad(k), tokens)
        signals = Signals(tokens, 0, batch.pad(importance_of(batch, received)), attended)
        expected = merge_penalty(learned, 0, signals)
        assert expected is not None
        torch.testing.assert_close(penalty[: batch.live], batch.rows(expected), atol=0, rtol=1e-5)
        expected = importance(learned, 0, signals)
        assert expected is not None
        assert blended is not None
        torch.testing.assert_close(importance_of(batch, blended), batch.rows(expected), atol=0, rtol=1e-5)
        alone, nothing = class_attention_rows(q, k, weight, batch.size, None, *few)
        assert nothing is None
        assert torch.equal(alone[: batch.live], penalty[: batch.live])


def test_room_too_small_is_reported_and_harmless() -> None:
    batch = Batch.random([40, 30, 20])
    _, k, _ = batch.heads
    stats = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    merge = torch.tensor([2.0], device=DEVICE)
    found = plan(k, None, batch.size, batch.origin, batch.cu, 40, merge, None, 1, stats, room=50)
    assert stats.tolist() == [90, 40, 0]
    assert found.cu.tolist() == [0, 40, 50, 50]
    x = torch.randn(batch.qkv.shape[0], 16, device=DEVICE)
    new, normed, _, _ = fold(x, None, None, None, found, batch.size, batch.origin, batch.cu, 40, 50)
    assert new.shape == (50, 16)
    assert normed is None


@pytest.mark.parametrize("affine", [0, 1, 2])
@pytest.mark.parametrize("adds", [False, True])
def test_add_norm(affine: int, adds: bool) -> None:
    x, y = torch.randn(2, 7, 40, device=DEVICE)
    weight = torch.rand(40, device=DEVICE) if affine else None
    bias = torch.rand(40, device=DEVICE) if affine == 2 else None
    scale = torch.rand(40, device=DEVICE)
    total, normed = add_norm(x, y if adds else None, scale if adds else None, Norm(weight, bias, 1e-5))
    expected = x + scale * y if adds else x
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        normed, torch.nn.functional.layer_norm(expected, (40,), weight, bias, 1e-5), atol=1e-5, rtol=1e-5
    )
