"""Properties of the plan of a block, for arbitrary states."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import assert_close
from ltmp.config import LEARNED, MATCHINGS, LTMPConfig, Scores
from ltmp.method.rates import Rates
from ltmp.method.reduction import BlockPlan, fold, make_plan
from ltmp.method.scores import BlockScores, Signals, attended_for, importance, merge_penalty
from ltmp.method.thresholds import Thresholds
from ltmp.method.tokens import Tokens, take
from ltmp.ops.match.reference import similarity_metric


def plan_of(
    tokens: Tokens, metric: Tensor, importance: Tensor, merge: float, prune: float, variant: str, protected: int,
    matching: str = "bipartite",
) -> BlockPlan:  # fmt: skip
    thresholds = Thresholds(1, LTMPConfig(variant, Scores(matching=matching)))
    thresholds.set([merge], [prune])
    return make_plan(tokens, BlockScores(metric, importance), thresholds, 0, thresholds.config.steps, protected)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tokens, Tensor, Tensor, float, float, str, int]:
    images, protected = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 5]))
    length = draw(st.integers(max(protected, 1), 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    metric = torch.nn.functional.normalize(torch.randn(images, length, 4, generator=generator), dim=-1)
    importance = torch.rand(images, length, generator=generator)
    merge, prune = draw(st.floats(-1.1, 1.1)), draw(st.floats(-0.1, 1.1))
    variant = draw(st.sampled_from(sorted(LEARNED)))
    return Tokens.start(images, length, torch.device("cpu")), metric, importance, merge, prune, variant, protected


@settings(max_examples=150)
@given(cases(), st.sampled_from(MATCHINGS))
@torch.no_grad()
def test_every_patch_is_accounted_for(case: tuple, matching: str) -> None:
    """Patches of live and of pruned tokens add up to the input; prefix tokens stay live and never merge."""
    tokens, protected = case[0], case[-1]
    plan = plan_of(*case, matching)
    after = plan.tokens
    length = tokens.size.shape[1]
    for b in range(len(after.size)):
        live = after.live[b]
        # live tokens first
        assert live.tolist() == sorted(live.tolist(), reverse=True)
        # every old position is used exactly once
        assert sorted(plan.order[b].tolist()) == list(range(length))
        # merged tokens are counted in their receiver only
        merged_away = plan.merged[b][plan.order[b]]
        dropped = ~live & ~merged_away
        assert after.size[b][live].sum() + after.size[b][dropped].sum() == length
        # prefix tokens
        prefix = after.origin[b] < protected
        assert live[prefix].all()
        assert (after.size[b][prefix] == 1).all()
        assert not plan.merged[b][:protected].any()
        assert (plan.into[b][protected:] >= protected).all()
        # a receiver does not itself merge into another token
        receivers = plan.into[b][plan.merged[b]]
        assert not plan.merged[b][receivers].any()


@settings(max_examples=100)
@given(cases())
@torch.no_grad()
def test_features_follow_the_plan(case: tuple) -> None:
    """A live token's features are the size-weighted mean of the tokens that merged into it."""
    tokens, plan = case[0], plan_of(*case)
    images, length = tokens.size.shape
    x = torch.randn(images, length, 3, generator=torch.Generator().manual_seed(1))
    size = torch.randint(1, 5, (images, length), generator=torch.Generator().manual_seed(2)).float()
    plan = replace(plan, weight=size)
    folded = fold(x, plan)
    for b in range(images):
        for new, old in enumerate(plan.order[b].tolist()):
            if plan.tokens.live[b, new]:
                group = plan.into[b] == old
                expected = (x[b] * size[b, :, None])[group].sum(0) / size[b][group].sum()
                assert_close(folded[b, new], expected, atol=1e-5)


def one_image(*rows: list[float]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor([rows]), dim=-1)


@torch.no_grad()
def test_order_is_unmerged_evens_then_odds() -> None:
    """Only the token at position 2 has a similar partner, 3: the order is 0, 4, 1, 3, 5, then 2, which is removed."""
    metric = one_image([1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 1, 0.1], [-1, -1, -1], [0, 0, 1])
    plan = plan_of(Tokens.start(1, 6, torch.device("cpu")), metric, torch.ones(1, 6), 0.9, 0.0, "ltmp", 1)
    assert plan.tokens.counts().tolist() == [5.0]
    assert plan.order[0, :5].tolist() == [0, 4, 1, 3, 5]
    assert plan.into.tolist() == [[0, 1, 3, 3, 4, 5]]
    assert plan.tokens.size[0, :5].tolist() == [1, 1, 1, 2, 1]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "left"), [("ltmp", [0, 1, 3]), ("ltpm", [0, 2, 1])])
def test_importance_is_merged_before_it_decides(variant: str, left: list[int]) -> None:
    """2 is important and merges into 3, which is not: 3 survives if merging comes first, and is pruned otherwise."""
    metric = one_image([1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 1, 0.1])
    importance = torch.tensor([[1.0, 0.6, 0.9, 0.1]])
    plan = plan_of(Tokens.start(1, 4, torch.device("cpu")), metric, importance, 0.9, 0.5, variant, 1)
    assert plan.order[0, : len(left)].tolist() == left
    assert plan.tokens.counts().item() == len(left)


@torch.no_grad()
def test_prune_alone_keeps_the_order() -> None:
    importance = torch.tensor([[0.0, 0.9, 0.1, 0.8, 0.7]])
    plan = plan_of(Tokens.start(1, 5, torch.device("cpu")), torch.zeros(1, 5, 2), importance, 1.0, 0.5, "ltp", 1)
    assert plan.order[0, :4].tolist() == [0, 1, 3, 4]


@torch.no_grad()
def test_a_score_equal_to_its_threshold_neither_merges_nor_stays() -> None:
    """Decisions are `score > threshold` in float32."""
    metric = one_image([1.0, 0], [0, 1], [0, 1], [1, 0])
    importance = torch.full((1, 4), 0.25)
    start = Tokens.start(1, 4, torch.device("cpu"))
    assert plan_of(start, metric, importance, 1.0, 0.0, "ltmp", 1).tokens.counts().item() == 4
    assert plan_of(start, metric, importance, 1.0, 0.25, "ltmp", 1).tokens.counts().item() == 1
    assert plan_of(start, metric, importance, 0.9999, 0.0, "ltmp", 1).tokens.counts().item() == 3


@torch.no_grad()
def test_removed_tokens_take_no_part() -> None:
    """A token removed in an earlier block neither receives nor counts, whatever its score."""
    start = Tokens.start(1, 5, torch.device("cpu"))
    state = Tokens(start.size, torch.tensor([[1.0, 1, 1, 0, 0]]), start.origin)
    metric = one_image([1.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 0, 1])
    plan = plan_of(state, metric, torch.ones(1, 5), 0.5, 0.5, "ltmp", 1)
    assert plan.tokens.counts().item() == 3
    assert not plan.merged.any()


def test_similarity_is_the_mean_key_over_heads() -> None:
    k = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]], dtype=torch.float16)
    assert_close(similarity_metric(k), torch.tensor([[0.6, 0.8]]), atol=1e-3)
    assert similarity_metric(k).dtype == torch.float32


@torch.no_grad()
def test_mutual_pairs_merge_at_any_parity_and_keep_the_order() -> None:
    """Of 1 and 3, both at odd positions, the later merges; 4 is nearest to 2, but 2 is nearer to 5."""
    metric = one_image([1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0.1], [0.6, 0, 0.8], [0.1, 0, 1])
    plan = plan_of(Tokens.start(1, 6, torch.device("cpu")), metric, torch.ones(1, 6), 0.5, 0.0, "ltmp", 1, "mutual")
    assert plan.into.tolist() == [[0, 1, 2, 1, 4, 2]]
    assert plan.order[0, :4].tolist() == [0, 1, 2, 4]
    assert plan.tokens.size[0, :4].tolist() == [1, 2, 2, 1]


@torch.no_grad()
def test_unpaired_tokens_are_matched_in_two_more_rounds() -> None:
    """Tokens on a line, ever closer to one another: each round pairs the last two."""
    angle = torch.tensor([0.0, 0.0, 0.5, 0.95, 1.35, 1.7, 2.0, 2.25, 2.45])
    metric = torch.stack([angle.cos(), angle.sin()], -1)[None]
    plan = plan_of(Tokens.start(1, 9, torch.device("cpu")), metric, torch.ones(1, 9), 0.5, 0.0, "ltmp", 1, "mutual")
    assert plan.into.tolist() == [[0, 1, 2, 3, 3, 5, 5, 7, 7]]


@settings(max_examples=60)
@given(st.integers(4, 24), st.integers(0, 10_000))
@torch.no_grad()
def test_mutual_pairs_do_not_depend_on_ranks(length: int, seed: int) -> None:
    """Removing a token that is in no pair changes no other merge, although it shifts parity."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.nn.functional.normalize(torch.randn(1, length, 3, generator=generator), dim=-1)
    lonely = torch.tensor([0.0, 0.0, 0.0])
    at = int(torch.randint(1, length, (), generator=generator))
    longer = torch.cat([metric[:, :at], lonely.view(1, 1, 3) - 1e-3, metric[:, at:]], 1)

    def groups(metric: Tensor) -> set[tuple[float, float]]:
        n = metric.shape[1]
        state = Tokens.start(1, n, torch.device("cpu"))
        plan = plan_of(state, metric, torch.ones(1, n), 0.2, 0.0, "ltmp", 1, "mutual")
        pairs = plan.merged[0].nonzero()[:, 0].tolist()
        return {(float(metric[0, i, 0]), float(metric[0, plan.into[0, i], 0])) for i in pairs}

    assert groups(metric) == groups(longer)


@torch.no_grad()
def test_take_moves_rows_image_by_image() -> None:
    values = torch.arange(6.0).view(2, 3)
    assert take(values, torch.tensor([[2, 0], [1, 1]])).tolist() == [[2, 0], [4, 4]]


@pytest.mark.parametrize("variant", LEARNED)
def test_gradients_reach_every_threshold_in_use(variant: str) -> None:
    thresholds = Thresholds(1, LTMPConfig(variant=variant)).requires_grad_(True)
    thresholds.set([0.3], [0.3])
    generator = torch.Generator().manual_seed(0)
    metric = torch.nn.functional.normalize(torch.randn(2, 12, 3, generator=generator), dim=-1)
    importance = torch.rand(2, 12, generator=generator)
    start = Tokens.start(2, 12, torch.device("cpu"))
    plan = make_plan(start, BlockScores(metric, importance), thresholds, 0, thresholds.config.steps, 1)
    plan.tokens.counts().sum().backward()
    for name in thresholds.config.steps:
        grad = getattr(thresholds, name).grad
        # a higher merge threshold keeps more tokens, a higher prune threshold fewer
        assert (grad > 0) if name == "merge" else (grad < 0)


def test_tokens_the_class_token_attends_to_merge_less() -> None:
    """Two pairs with the same cosine: only the pair that the class token does not attend to is above the threshold."""
    angle = torch.tensor([0.0, 0.0, 0.6, math.pi, math.pi + 0.6])
    metric = torch.stack([angle.cos(), angle.sin()], -1)[None]
    tokens = Tokens.start(1, 5, torch.device("cpu"))
    thresholds = Thresholds(1, LTMPConfig("ltm", Scores(matching="mutual", class_power=1.0)))
    # the class token's key decides nothing; keys 1 and 2 point where its query does
    q = torch.zeros(1, 5, 1, 2)
    q[..., 0] = 2.0
    k = torch.zeros(1, 5, 1, 2)
    k[0, 1:3, 0, 0] = 1.0
    penalty = merge_penalty(thresholds, 0, Signals(tokens, attended=attended_for(thresholds, 0, q, k, tokens)))
    assert penalty is not None
    attended = (q[:, :1] * k).sum(-1)[..., 0].div(2**0.5).softmax(-1) * 5
    torch.testing.assert_close(penalty, attended.sqrt())
    scores = 1 - (1 - math.cos(0.6)) * attended[0, [2, 4]]
    for theta, merged in ((scores[0] - 1e-3, [2, 4]), (scores.mean(), [4]), (scores[1] + 1e-3, [])):
        thresholds.set([float(theta)], [0.0])
        plan = make_plan(tokens, BlockScores(metric, merge_penalty=penalty), thresholds, 0, ("merge",), 1)
        assert plan.merged[0].nonzero().flatten().tolist() == merged
    plain = Thresholds(1, LTMPConfig())
    assert attended_for(plain, 0, q, k, tokens) is None
    assert merge_penalty(plain, 0, Signals(tokens)) is None


def test_tokens_the_class_token_attends_to_are_pruned_less() -> None:
    """Importance is a weighted geometric mean of attention received and class-token attention."""
    thresholds = Thresholds(4, LTMPConfig(scores=Scores(class_power=0.8)))
    tokens = Tokens.start(1, 3, torch.device("cpu"))
    received, attended = torch.tensor([[0.5, 0.4, 0.1]]), torch.tensor([[0.2, 0.2, 0.6]])
    for block, power in enumerate((0.2, 0.4, 0.6, 0.8)):
        found = importance(thresholds, block, Signals(tokens, 0, received, attended))
        torch.testing.assert_close(found, received ** (1 - power) * attended**power)
    assert importance(Rates(4, LTMPConfig("topk", r=1)), 0, Signals(tokens, attended=attended)) is attended
    assert importance(Thresholds(4, LTMPConfig()), 0, Signals(tokens, received=received)) is received
