"""The reduced blocks as an exportable graph, in three forms, without scatters and data-dependent branches.

Merging is a product with a one-hot matrix and compaction a gather, because scatters with a reduction are missing or
wrong in several runtimes. A form is an engine like those in `engines/`. It also runs in eager mode, where it is tested
against the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..engines.body import Body
from ..engines.positions import Positions
from ..engines.state import Reduced
from ..method.policy import Active
from ..method.scores import BlockScores, score
from ..method.tokens import Tokens
from ..ops.match.reference import match_halves, match_mutual, penalise
from .layouts import Compact, PackedLayout


@dataclass(frozen=True)
class _State:
    """Tokens between two blocks: packed features x [T, C]; size float32 [B, N] and origin int64 [B, N] as in `Tokens`.

    `weighed` is whether a size may differ from 1.
    """

    x: Tensor
    size: Tensor
    origin: Tensor
    layout: PackedLayout
    weighed: bool = False


@dataclass(frozen=True)
class _Scored:
    """Padded tokens of a block between its steps: x [B, N, C], metric [B, N, D], all others [B, N].

    `keep` is None if every place holds a token that stays.
    """

    x: Tensor
    size: Tensor
    origin: Tensor
    keep: Tensor | None
    importance: Tensor | None
    merge_penalty: Tensor | None
    metric: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> _Scored:
        """Apply `change` to every tensor."""
        optional = (self.keep, self.importance, self.merge_penalty, self.metric)
        changed = (None if values is None else change(values) for values in optional)
        return _Scored(*(change(values) for values in (self.x, self.size, self.origin)), *changed)

    def keep_only(self, mask: Tensor) -> _Scored:
        """Drop all tokens outside `mask`, bool [B, N]."""
        return replace(self, keep=mask if self.keep is None else self.keep & mask)

    def keep_mask(self) -> Tensor:
        """`keep` as bool [B, N], never None."""
        return torch.ones_like(self.size, dtype=torch.bool) if self.keep is None else self.keep

    def at(self, index: Tensor) -> _Scored:
        """The places `index`, the same ones of each image."""
        return self.map(lambda values: values.index_select(1, index))

    def concat(self, other: _Scored) -> _Scored:
        """These places, then those of `other`; without merge penalty and metric."""
        importance = None
        if self.importance is not None and other.importance is not None:
            importance = torch.cat([self.importance, other.importance], 1)
        return _Scored(
            torch.cat([self.x, other.x], 1),
            torch.cat([self.size, other.size], 1),
            torch.cat([self.origin, other.origin], 1),
            torch.cat([self.keep_mask(), other.keep_mask()], 1),
            importance,
            None,
            None,
        )


@dataclass(frozen=True)
class Form:
    """An engine for one form, with a model's thresholds as constants; see `engines.body.running`.

    Attributes:
        compact: one of `FORMS`.
        active: for each block, whether merging and pruning can select anything.
        merge, prune: the thresholds of each block, float32 numbers.
    """

    compact: Compact
    active: Active
    merge: tuple[float, ...]
    prune: tuple[float, ...]

    def __call__(self, body: Body, x: Tensor, positions: Positions | None = None) -> Reduced:
        """Run all blocks on [B, N, C]."""
        if not any(map(any, self.active)):
            return body.dense_blocks(x, positions)
        images, length, _ = x.shape
        state: _State | None = None
        kept = []
        for i in range(body.depth):
            steps = body.policy.steps(self.active, i)
            if state is None and steps:
                state = _start(x)
            if state is None:
                x = body.dense_block(i, x, positions)
                kept.append(torch.full((images,), float(length), device=x.device, dtype=torch.float32))
            else:
                state = self._block(body, i, steps, state, positions)
                kept.append(_counts(state))
        return _finish(body, state or _start(x), torch.stack(kept, 1))

    def _block(self, body: Body, i: int, steps: tuple[str, ...], state: _State, positions: Positions | None) -> _State:
        recipe, block, layout = body.recipe, body.blocks[i], state.layout
        q, k, v = recipe.qkv(block, state.x)
        if positions is not None:
            q, k = positions.rotate(i, block, q, k, layout.unpad(state.origin))
        bias = _attention_bias(state, body.policy.size_power(i))
        keys, values = layout.heads(k), layout.heads(v)
        # a mean of attention weights is at most 1, so only the prefix is left and only its queries matter
        if "prune" in steps and self.prune[i] >= 1 and body.protected:
            places = _prefix_places(state.origin, body.protected)
            prefix = _only_prefix(state, places)
            y, _ = _attend(prefix.layout.heads(_take(layout.pad(q), places).flatten(0, 1)), keys, values, bias)
            state = prefix
            x = state.x + recipe.out(block, state.layout.from_heads(y))
        else:
            y, p = _attend(layout.heads(q), keys, values, bias)
            state = replace(state, x=state.x + recipe.out(block, layout.from_heads(y)))
            if steps:
                scores = _scores(body, i, steps, state, k, p)
                state = self._reduce(body.protected, i, steps, state, scores, body.policy.config.scores.mutual)
            x = state.x
        return replace(state, x=x + recipe.mlp(block, x))

    def _reduce(
        self, protected: int, i: int, steps: tuple[str, ...], state: _State, scores: BlockScores, mutual: bool
    ) -> _State:
        """The steps of block `i` (paper, section 3.2); the reference is `reduction.make_plan` and `reduction.fold`."""
        layout = state.layout
        scored = _Scored(
            layout.pad(state.x), state.size, state.origin, layout.live,
            scores.importance, scores.merge_penalty, scores.metric,
        )  # fmt: skip
        for step in steps:
            if step == "prune":
                scored = _prune(scored, self.prune[i], protected)
                continue
            if step is not steps[0]:
                # even and odd are positions among the remaining tokens
                source, layout = self.compact(scored.keep_mask(), layout.length)
                scored = scored.map(partial(_relayout, source=source, layout=layout))
                scored = replace(scored, keep=layout.live)
            scored = (_merge_pairs if mutual else _merge)(scored, self.merge[i], protected)
        source, layout = self.compact(scored.keep_mask(), layout.length)
        size, origin = (_relayout(values, source, layout) for values in (scored.size, scored.origin))
        return _State(_rows(scored.x, source), size, origin, layout, state.weighed or "merge" in steps)


def _start(x: Tensor) -> _State:
    """The state of tokens [B, N, C] before any reduction."""
    images, length, _ = x.shape
    tokens = Tokens.start(images, length, x.device)
    return _State(x.flatten(0, 1), tokens.size, tokens.origin, PackedLayout(images, length))


def _rows(values: Tensor, source: Tensor) -> Tensor:
    """The places `source` [T] of values [B, M, ...], as rows [T, ...]."""
    return values.flatten(0, 1).index_select(0, source)


def _relayout(values: Tensor, source: Tensor, layout: PackedLayout) -> Tensor:
    """The places `source` [T] of values [B, M, ...], padded to `layout`, [B, N, ...]."""
    return layout.pad(_rows(values, source))


def _take(values: Tensor, places: Tensor) -> Tensor:
    """The places [B, P] of values [B, N, ...], as [B, P, ...]."""
    index = places[(...,) + (None,) * (values.ndim - 2)]
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def _live_mask(state: _State) -> Tensor:
    """bool [B, N], which places hold a token."""
    live = state.layout.live
    return torch.ones_like(state.size, dtype=torch.bool) if live is None else live


def _counts(state: _State) -> Tensor:
    """float32 [B], number of tokens of each image."""
    images, places = state.size.shape
    if state.layout.live is not None:
        return state.layout.live.sum(1).float()
    return torch.full((images,), places, device=state.size.device).float()


_MASK_BIAS = -40.0
"""Attention bias of places without a token. Such a place holds a copy of a live token of its image, and gets 4e-18 of
that token's weight, which changes no float32 sum. -inf would be slower: its exponential is a denormal number in ONNX
Runtime, which makes softmax four times slower.
"""


def _attention_bias(state: _State, power: float) -> Tensor | None:
    """Bias for `_attend`: the log of token weights, `_MASK_BIAS` for places without a token; None if all are 0."""
    live = state.layout.live
    if live is None and not state.weighed:
        return None
    bias = state.size.log() if power == 1 else state.size.log() * power
    bias = (bias if live is None else bias.masked_fill(~live, _MASK_BIAS))[:, None]
    return bias if state.layout.alone else bias[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights (paper, section 3.1).

    Args:
        q: [B, H, M, D].
        k, v: [B, H, N, D].
        bias: [B, 1, 1, N]. All arguments lack the dimension B for a single image.

    Returns:
        y [B, H, M, D] and the attention weights [B, H, M, N].
    """
    score = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    p = (score if bias is None else score + bias).softmax(-1)
    return p @ v, p


def _scores(body: Body, block: int, steps: tuple[str, ...], state: _State, k: Tensor, p: Tensor) -> BlockScores:
    """Scores of a block's tokens from keys [T, H, D] and the attention weights of `_attend`."""
    policy, layout = body.policy, state.layout
    p = p[None] if layout.alone else p
    tokens = Tokens(state.size, _live_mask(state).float(), state.origin)
    received = _mean_received(p, _live_mask(state)) if "prune" in steps else None
    attended = p[:, :, 0].mean(1) if policy.config.needs_class_attention else None
    return score(policy, block, steps, tokens, body.protected, state.x, k, received, attended, layout.pad)


def _mean_received(p: Tensor, live: Tensor) -> Tensor:
    """[B, N], mean attention received over heads and live queries (paper, section 3.3); a product sums the queries."""
    received = live[:, None, None, :].to(p.dtype) @ p
    return received.sum((1, 2)) / (p.shape[1] * live.sum(1, keepdim=True))


def _prune(scored: _Scored, threshold: float, protected: int) -> _Scored:
    """Drop the tokens whose importance is not above the threshold; see `reduction`."""
    assert scored.importance is not None
    kept = scored.importance > threshold
    if protected:
        kept = kept | _is_prefix(scored.origin, protected)
    else:
        # without prefix tokens, an image could lose every token
        top = scored.importance.masked_fill(~scored.keep_mask(), float("-inf")).argmax(1, keepdim=True)
        kept = kept | (torch.arange(kept.shape[1], device=kept.device) == top)
    return scored.keep_only(kept)


def _is_prefix(origin: Tensor, protected: int) -> Tensor:
    """bool [B, N] or [1, N], which tokens are prefix tokens.

    A single prefix token needs no `origin`: at place 0 it is even, and it never moves.
    """
    return (origin if protected > 1 else torch.arange(origin.shape[1], device=origin.device)[None]) < protected


def _merge(scored: _Scored, threshold: float, protected: int) -> _Scored:
    """Fold each even token above the threshold into the most similar odd token; see `reduction`.

    Returns:
        The even tokens, then the odd ones, both padded to the number of even tokens.
    """
    length = scored.size.shape[1]
    half = torch.arange((length + 1) // 2, device=scored.size.device)
    evens = 2 * half
    even, odd = scored.at(evens), scored.at((evens + 1).clamp(max=length - 1))
    odd = odd.keep_only((evens + 1 < length).expand(odd.size.shape[0], -1))
    assert even.metric is not None
    assert odd.metric is not None
    free_even = even.keep_only(~_is_prefix(even.origin, protected)).keep_mask()
    # a single prefix token is even
    free_odd = odd.keep_only(odd.origin >= protected).keep_mask() if protected > 1 else odd.keep_mask()
    best, partner = match_halves(even.metric, odd.metric, free_even, free_odd)
    if even.merge_penalty is not None and odd.merge_penalty is not None:
        best = penalise(best, even.merge_penalty, odd.merge_penalty.gather(1, partner))
    moved = best > threshold
    odd = _fold(odd, even, torch.where(moved, partner, -1)[:, None] == half[:, None])
    return even.keep_only(~moved).concat(odd)


def _merge_pairs(scored: _Scored, threshold: float, protected: int) -> _Scored:
    """Fold the later of each mutual pair above the threshold into the earlier one; see `reduction`."""
    assert scored.metric is not None
    best, partner = match_mutual(scored.metric, scored.keep_only(~_is_prefix(scored.origin, protected)).keep_mask())
    if scored.merge_penalty is not None:
        best = penalise(best, scored.merge_penalty, scored.merge_penalty.gather(1, partner))
    moved = best > threshold
    place = torch.arange(scored.size.shape[1], device=scored.size.device)
    return _fold(scored, scored, torch.where(moved, partner, -1)[:, None] == place[:, None]).keep_only(~moved)


def _fold(tokens: _Scored, others: _Scored, into: Tensor) -> _Scored:
    """Fold `others` into `tokens` where `into` is true, bool [B, tokens, others]."""
    # products instead of `where`, which is slow in runtimes; importance is never negative
    one_hot = into.float()
    weight = one_hot * others.size[:, None, :]
    size = tokens.size + weight.sum(-1)
    x = tokens.x * (tokens.size / size)[..., None] + (weight / size[..., None]) @ others.x
    importance = tokens.importance
    if importance is not None and others.importance is not None:
        importance = torch.maximum(importance, (one_hot * others.importance[:, None, :]).amax(-1))
    return replace(tokens, x=x, size=size, importance=importance)


def _prefix_places(origin: Tensor, protected: int) -> Tensor:
    """int64 [B, P], the places of the prefix tokens, in their original order."""
    if protected == 1:
        # a single one stays at place 0, see `_is_prefix`
        return origin.new_zeros(origin.shape[0], 1)
    index = torch.arange(protected, device=origin.device)[:, None]
    return (origin[:, None, :] == index).to(torch.int32).argmax(-1)


def _only_prefix(state: _State, places: Tensor) -> _State:
    """The state reduced to its prefix tokens."""
    images, protected = places.shape
    x, size, origin = (_take(values, places) for values in (state.layout.pad(state.x), state.size, state.origin))
    return _State(x.flatten(0, 1), size, origin, PackedLayout(images, protected))


def _finish(body: Body, state: _State, kept: Tensor) -> Reduced:
    """Tokens for the host's norm, pooling and head; only the prefix tokens if these read nothing else."""
    protected = body.protected
    prefix = _only_prefix(state, _prefix_places(state.origin, protected)) if protected else state
    if protected and body.prefix_only:
        state = prefix
    x, size = state.layout.pad(state.x), state.size * _live_mask(state)
    if protected > 1 and not body.prefix_only:
        # the head reads the prefix at the front; at its old places it gets size 0
        x = torch.cat([prefix.layout.pad(prefix.x), x], 1)
        size = torch.cat([prefix.size, size * (state.origin >= protected)], 1)
    return Reduced(x, size, kept.to(torch.float32))
