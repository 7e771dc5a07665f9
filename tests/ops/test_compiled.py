"""The CPU kernels against `method.scores`, `make_plan` and `fold`, which define the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close, make_probe
from ltmp.config import SCORES, VARIANTS, LTMPConfig, Scores
from ltmp.engines.compiled import LiveRows, block_steps, reduce_rows
from ltmp.method.policy import Policy
from ltmp.method.rates import Rates
from ltmp.method.reduction import fold, make_plan
from ltmp.method.scores import attended_for, score
from ltmp.method.thresholds import Thresholds
from ltmp.method.tokens import Tokens
from ltmp.ops import compiled
from ltmp.ops.attend.reference import attend
from ltmp.ops.attend.rows import attend_images

from .helpers import Batch

pytest.importorskip("numba")

WIDTH, BLOCK, DEPTH = 24, 1, 3
MORE: dict[str, Scores] = {
    **SCORES,
    "heads": Scores("heads"),
    "class power, size power": Scores(class_power=0.7, size_power=0.3),
    "probe, class power": Scores("probe", "mutual", class_power=0.5),
    "importance by probe": Scores(importance="probe", size_power=0.5),
}
COMPILED = [name for name, method in VARIANTS.items() if "fuse" not in method.steps]
COUNTS = [[1], [2], [7], [9, 1, 64, 65, 2, 3], [33, 30, 31, 32], [150, 3, 197]]


def policy_of(variant: str, seed: int = 0, merge: float = 0.3, prune: float = 0.02, **settings: Any) -> Policy:
    config = LTMPConfig(variant=variant, **settings)
    if config.method.fixed:
        return Rates(DEPTH, config)
    policy = Thresholds(DEPTH, config)
    policy.set([merge] * DEPTH, [prune] * DEPTH)
    if config.needs_probe:
        policy.set_probe(make_probe(DEPTH, WIDTH, seed=seed))
    return policy


@torch.no_grad()
def check(batch: Batch, policy: Policy, protected: int, x: Tensor | None = None, alike: bool = False) -> list[int]:
    """Check survivors, order, sizes, sources and features against the definition; return the token counts left."""
    q, k, v = (t[: batch.live] for t in batch.heads)
    if alike:
        q, k, v = (t[:1].expand_as(t) for t in (q, k, v))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch.live, WIDTH, generator=generator) if x is None else x
    tokens = batch.tokens()
    source = torch.where(tokens.live, torch.arange(batch.longest), -1).int()
    tokens = Tokens(tokens.size, tokens.keep, tokens.origin, source)
    weight = policy.weight(BLOCK, tokens.size)
    _, received = attend(*(batch.pad(t) for t in (q, k, v)), weight, tokens.keep)
    attended = attended_for(policy, BLOCK, batch.pad(q), batch.pad(k), tokens)
    steps = policy.config.steps
    scores = score(policy, BLOCK, steps, tokens, protected, x, k, received, attended, batch.pad)
    expected = make_plan(tokens, scores, policy, BLOCK, steps, protected)
    features = fold(batch.pad(x), expected)
    left = [int(n) for n in expected.tokens.counts().tolist()]

    size, origin = batch.size[: batch.live].numpy(), batch.origin[: batch.live].long().numpy()
    rows = LiveRows(x, size, origin, torch.tensor(batch.counts).numpy(), source.numpy())
    before = x.clone(), size.copy(), origin.copy(), source.clone()
    plan = block_steps(policy, policy.active(), protected)[BLOCK]
    assert plan is not None
    sums = (None if t is None else batch.rows(t).numpy() for t in (received, attended))
    found = reduce_rows(policy, plan, rows, k, policy.weight(BLOCK, size), *sums)

    def live(values: Tensor) -> Tensor:
        return torch.cat([image[:n] for image, n in zip(values, left, strict=True)])

    total = sum(left)
    assert found.counts.tolist() == left
    assert found.origin.tolist() == live(expected.tokens.origin).tolist()
    assert found.size.tolist() == live(expected.tokens.size).tolist()
    assert found.source.tolist() == expected.tokens.source.tolist()
    assert_close(found.x[:total], live(features), atol=1e-6 * max(1.0, float(features.abs().max())))
    for old, now in zip(before, (x, size, origin, source), strict=True):
        assert torch.equal(torch.as_tensor(old), torch.as_tensor(now)), "the tokens before are not to change"
    return left


def median_importance(batch: Batch) -> float:
    return 1.0 / batch.longest


@pytest.mark.parametrize("variant", COMPILED)
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_variants(counts: list[int], protected: int, variant: str) -> None:
    fixed = VARIANTS[variant].fixed
    batch = Batch.random(counts)
    for settings_ in ({"r": 3}, {"r": 0.3}) if fixed else ({},):
        left = check(batch, policy_of(variant, prune=median_importance(batch), **settings_), protected)
        assert sum(left) < sum(counts) or max(counts) < 9


@pytest.mark.parametrize("variant", ["ltmp", "ltpm", "ltm", "ltp"])
@pytest.mark.parametrize("protected", [1, 5])
@pytest.mark.parametrize("counts", [COUNTS[1], COUNTS[3], COUNTS[5]], ids=str)
@pytest.mark.parametrize("scores", MORE)
def test_scores(scores: str, counts: list[int], protected: int, variant: str) -> None:
    batch = Batch.random(counts)
    merge = 0.0 if MORE[scores].probes_similarity else 0.3
    check(batch, policy_of(variant, merge=merge, prune=median_importance(batch), scores=MORE[scores]), protected)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("variant", ["ltmp", "ltpm", "mp"])
@pytest.mark.parametrize("bounds", [{"floor": 9}, {"ceiling": 12}, {"floor": 10, "ceiling": 20}], ids=str)
def test_floor_and_ceiling(bounds: dict[str, int], variant: str, scores: str) -> None:
    if VARIANTS[variant].fixed:
        settings_ = {"r": 4, "scores": Scores("heads") if scores == "attention" else "paper"}
    else:
        settings_ = {"scores": SCORES[scores]}
    batch = Batch.random([40, 7, 21, 12])
    for merge, prune in ((-0.5, 0.5), (0.9, 0.0)):
        left = check(batch, policy_of(variant, merge=merge, prune=prune, **settings_, **bounds), 1)
        assert all(n >= min(before, bounds.get("floor", 0)) for n, before in zip(left, batch.counts, strict=True))


@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize("variant", ["ltmp", "ltpm", "ltp"])
@pytest.mark.parametrize("scores", SCORES)
def test_everything_prunable_leaves_one_token(scores: str, variant: str, protected: int) -> None:
    if protected == 0:
        scores = "paper"
    batch = Batch.random([1, 2, 40, 33])
    # five prefix tokens are among those of each image, of which one is protected
    assert check(batch, policy_of(variant, merge=0.2, prune=2.0, scores=SCORES[scores]), protected) == [1, 1, 1, 1]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("variant", ["ltmp", "ltpm", "ltm"])
def test_equal_tokens(variant: str, scores: str) -> None:
    """Every score is a tie: the first token is taken, as in the definition."""
    check(
        Batch.random([9, 40, 2]),
        policy_of(variant, merge=0.5, prune=0.001, scores=SCORES[scores]),
        1,
        torch.ones(51, WIDTH),
        True,
    )


@settings(max_examples=150)
@given(
    counts=st.lists(st.integers(1, 24), min_size=1, max_size=6),
    variant=st.sampled_from(["ltmp", "ltpm", "ltm", "ltp"]),
    scores=st.sampled_from(sorted(MORE)),
    protected=st.integers(1, 5),
    merge=st.floats(-1.0, 0.99),
    prune=st.floats(0.001, 0.3),
    seed=st.integers(0, 1000),
)
def test_any_batch(
    counts: list[int], variant: str, scores: str, protected: int, merge: float, prune: float, seed: int
) -> None:
    batch = Batch.random(counts, seed=seed)
    check(batch, policy_of(variant, seed, merge, prune, scores=MORE[scores]), protected)


def test_an_image_is_reduced_alike_in_any_batch() -> None:
    """Bit for bit: every sum is over one image, in a fixed order."""
    policy, batch = policy_of("ltmp", scores=SCORES["best"]), Batch.random([31, 8, 50])
    plan = block_steps(policy, policy.active(), 1)[BLOCK]
    generator = torch.Generator().manual_seed(0)
    k, x = batch.heads[1][: batch.live], torch.randn(batch.live, WIDTH, generator=generator)
    received = torch.rand(batch.live, generator=generator).numpy() / 20

    def reduced(rows: slice, counts: list[int]) -> LiveRows:
        size, origin = batch.size[rows].numpy(), batch.origin[rows].long().numpy()
        state = LiveRows(x[rows], size, origin, torch.tensor(counts).numpy(), torch.empty(len(counts), 0).int().numpy())
        return reduce_rows(policy, plan, state, k[rows], policy.weight(BLOCK, size), received[rows], None)

    together = reduced(slice(batch.live), batch.counts)
    alone = [reduced(slice(a, a + n), [n]) for a, n in zip((0, 31, 39), batch.counts, strict=True)]
    assert together.counts.tolist() == [int(one.counts[0]) for one in alone]
    assert len(together.size) < batch.live
    assert torch.equal(together.x[: len(together.size)], torch.cat([one.x[: len(one.size)] for one in alone]))


def test_large_maps_that_are_not_needed_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch.random([40, 3, 33], heads=2, width=16)
    heads, size = [t[: batch.live] for t in batch.heads], torch.rand(batch.live) + 1
    whole = attend_images(*heads, size.log(), [40, 3, 33])
    monkeypatch.setattr("ltmp.ops.attend.rows.MANY", 1)
    monkeypatch.setattr("ltmp.ops.attend.rows._scratch", None)
    torch.testing.assert_close(attend_images(*heads, size.log(), [40, 3, 33]), whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError):
        attend_images(*heads, size.log(), [40, 3, 33], torch.zeros(batch.live))


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([2**20, 64, 700]),
    st.sampled_from([192, 20, 1]),
)
def test_attend_images(counts: list[int], sized: bool, asked: bool, most: int, many: int) -> None:
    batch = Batch.random(counts)
    q, k, v = (t[: batch.live] for t in batch.heads)
    tokens = batch.tokens()
    size = tokens.size if sized else torch.ones_like(tokens.size)
    expected, importance = attend(*(batch.pad(t) for t in (q, k, v)), size, tokens.keep)
    received, attended = (torch.zeros(batch.live) if asked else None for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltmp.ops.attend.rows.MAP", most)
        patch.setattr("ltmp.ops.attend.rows.MANY", many)
        out = attend_images(q, k, v, batch.rows(size).log() if sized else None, counts, received, attended)
    assert_close(out, batch.rows(expected).flatten(1), atol=1e-5)
    if received is not None and attended is not None:
        assert_close(received, batch.rows(importance), atol=1e-6)
        for image, one in zip(attended.split(counts), received.split(counts), strict=True):
            assert image.sum().item() == pytest.approx(1.0, abs=1e-5)
            assert len(image) == 1 or not torch.equal(image, one)


def test_without_a_cache_folder_kernels_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    njit = numba.njit

    def refuses(*args: Any, cache: bool = False, **kwargs: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **kwargs)

    monkeypatch.setattr(numba, "njit", refuses)
    assert compiled.compiled(_double)(3) == 6


def _double(x: int) -> int:
    return 2 * x


def test_the_reason_for_missing_kernels_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    compiled.unavailable.cache_clear()
    assert "ltmp[cpu]" in str(compiled.unavailable())
    monkeypatch.undo()
    compiled.unavailable.cache_clear()
    assert compiled.unavailable() is None
