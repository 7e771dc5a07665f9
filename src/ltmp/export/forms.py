"""The blocks as they are exported: three forms of one function, without a scatter and without a branch on data.

Merging is a product with a one-hot matrix and compaction a gather, because scatters with a reduction are missing or
wrong in several runtimes. A form is an engine like those in `engines/`: it also runs in eager mode, where tests hold it
to the method.
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
    """Tokens between two blocks: features [T, C] in rows; size float32 and origin int64 [B, N] as in `Tokens`.

    `weighed` says whether a size may be other than 1.
    """

    x: Tensor
    size: Tensor
    origin: Tensor
    layout: PackedLayout
    weighed: bool = False


@dataclass(frozen=True)
class _Scored:
    """Tokens of a block on their way through its steps, padded: x [B, N, C], metric [B, N, D], the others [B, N].

    `keep` is None where every place holds a token that stays.
    """

    x: Tensor
    size: Tensor
    origin: Tensor
    keep: Tensor | None
    importance: Tensor | None
    merge_penalty: Tensor | None
    metric: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> _Scored:
        """Every tensor changed alike."""
        maybe = (self.keep, self.importance, self.merge_penalty, self.metric)
        some = (None if values is None else change(values) for values in maybe)
        return _Scored(*(change(values) for values in (self.x, self.size, self.origin)), *some)

    def kept(self, where: Tensor) -> _Scored:
        """Only those `where` it is true, bool [B, N]."""
        return replace(self, keep=where if self.keep is None else self.keep & where)

    def places(self) -> Tensor:
        """bool [B, N], `keep`."""
        return torch.ones_like(self.size, dtype=torch.bool) if self.keep is None else self.keep

    def at(self, index: Tensor) -> _Scored:
        """Only the places `index`, the same of each image."""
        return self.each(lambda values: values.index_select(1, index))

    def then(self, other: _Scored) -> _Scored:
        """These places, then those of `other`; without merge penalty and metric."""
        importance = None
        if self.importance is not None and other.importance is not None:
            importance = torch.cat([self.importance, other.importance], 1)
        return _Scored(
            torch.cat([self.x, other.x], 1),
            torch.cat([self.size, other.size], 1),
            torch.cat([self.origin, other.origin], 1),
            torch.cat([self.places(), other.places()], 1),
            importance,
            None,
            None,
        )


@dataclass(frozen=True)
class Form:
    """One form with the thresholds of a model baked in, as an engine; see `engines.body.running`.

    Attributes:
        compact: one of `FORMS`.
        active: which steps can select anything.
        merge, prune: the thresholds of each block; float32 numbers.
    """

    compact: Compact
    active: Active
    merge: tuple[float, ...]
    prune: tuple[float, ...]

    def __call__(self, body: Body, x: Tensor, positions: Positions | None = None) -> Reduced:
        """Run all blocks on [B, N, C]."""
        if not any(map(any, self.active)):
            return body.all_whole(x, positions)
        images, length, _ = x.shape
        state: _State | None = None
        kept = []
        for i in range(body.depth):
            steps = body.policy.steps(self.active, i)
            if state is None and steps:
                state = _start(x)
            if state is None:
                x = body.whole(i, x, positions)
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
        bias = _bias(state, body.policy.size_power(i))
        keys, values = layout.heads(k), layout.heads(v)
        # no mean of attention weights is above 1: only the prefix is left, and only its queries matter
        if "prune" in steps and self.prune[i] >= 1 and body.protected:
            places = _prefix(state.origin, body.protected)
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
        """The steps of block `i` (paper, section 3.2), as `reduction.make_plan` and `fold` have them."""
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
                # parity is taken among those that are left
                source, layout = self.compact(scored.places(), layout.length)
                scored = scored.each(partial(_moved, source=source, layout=layout))
                scored = replace(scored, keep=layout.live)
            scored = (_merge_pairs if mutual else _merge)(scored, self.merge[i], protected)
        source, layout = self.compact(scored.places(), layout.length)
        size, origin = (_moved(values, source, layout) for values in (scored.size, scored.origin))
        return _State(_rows(scored.x, source), size, origin, layout, state.weighed or "merge" in steps)


def _start(x: Tensor) -> _State:
    """[B, N, C], nothing reduced."""
    images, length, _ = x.shape
    tokens = Tokens.start(images, length, x.device)
    return _State(x.flatten(0, 1), tokens.size, tokens.origin, PackedLayout(images, length))


def _rows(values: Tensor, source: Tensor) -> Tensor:
    """[T, ...], the places `source` of [B, M, ...]."""
    return values.flatten(0, 1).index_select(0, source)


def _moved(values: Tensor, source: Tensor, layout: PackedLayout) -> Tensor:
    """[B, N, ...], the same in the layout that the rows then have."""
    return layout.pad(_rows(values, source))


def _take(values: Tensor, places: Tensor) -> Tensor:
    """[B, P, ...], the places [B, P] of values [B, N, ...]."""
    index = places[(...,) + (None,) * (values.ndim - 2)]
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def _there(state: _State) -> Tensor:
    """bool [B, N]."""
    live = state.layout.live
    return torch.ones_like(state.size, dtype=torch.bool) if live is None else live


def _counts(state: _State) -> Tensor:
    """float32 [B], tokens of each image."""
    images, places = state.size.shape
    if state.layout.live is not None:
        return state.layout.live.sum(1).float()
    return torch.full((images,), places, device=state.size.device).float()


_NOTHING = -40.0
"""Bias of places without a token: each shows a live token of its image, and weighs 4e-18 of that, which changes no
float32 sum. The exponential of -inf is a denormal number in ONNX Runtime, whose softmax is four times slower then."""


def _bias(state: _State, power: float) -> Tensor | None:
    """Bias of `_attend`: log weight, and next to nothing for places without a token."""
    live = state.layout.live
    if live is None and not state.weighed:
        return None
    bias = state.size.log() if power == 1 else state.size.log() * power
    bias = (bias if live is None else bias.masked_fill(~live, _NOTHING))[:, None]
    return bias if state.layout.alone else bias[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention with the map at hand (paper, section 3.1).

    Args:
        q: [B, H, M, D]; k, v: [B, H, N, D]; bias: [B, 1, 1, N]; all without B for one image.

    Returns:
        y [B, H, M, D] and the map [B, H, M, N].
    """
    score = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    p = (score if bias is None else score + bias).softmax(-1)
    return p @ v, p


def _scores(body: Body, block: int, steps: tuple[str, ...], state: _State, k: Tensor, p: Tensor) -> BlockScores:
    """Scores of a block's tokens from keys [T, H, D] and the map of `_attend`."""
    policy, layout = body.policy, state.layout
    p = p[None] if layout.alone else p
    tokens = Tokens(state.size, _there(state).float(), state.origin)
    received = _received_mean(p, _there(state)) if "prune" in steps else None
    attended = p[:, :, 0].mean(1) if policy.config.needs_class_attention else None
    return score(policy, block, steps, tokens, body.protected, state.x, k, received, attended, layout.pad)


def _received_mean(p: Tensor, live: Tensor) -> Tensor:
    """[B, N], mean attention received over heads and live queries (paper, section 3.3), summed by a product."""
    votes = live[:, None, None, :].to(p.dtype) @ p
    return votes.sum((1, 2)) / (p.shape[1] * live.sum(1, keepdim=True))


def _prune(scored: _Scored, threshold: float, protected: int) -> _Scored:
    """Drop what is not above the threshold; see `reduction`."""
    assert scored.importance is not None
    kept = scored.importance > threshold
    if protected:
        kept = kept | _is_prefix(scored.origin, protected)
    else:
        # without a class token nothing else would keep an image from losing every token
        top = scored.importance.masked_fill(~scored.places(), float("-inf")).argmax(1, keepdim=True)
        kept = kept | (torch.arange(kept.shape[1], device=kept.device) == top)
    return scored.kept(kept)


def _is_prefix(origin: Tensor, protected: int) -> Tensor:
    """bool [B, N] or [1, N], prefix tokens.

    One prefix token needs no `origin`: it is first, and so even, and never moved.
    """
    return (origin if protected > 1 else torch.arange(origin.shape[1], device=origin.device)[None]) < protected


def _merge(scored: _Scored, threshold: float, protected: int) -> _Scored:
    """Fold each even token above the threshold into the odd token most like it; see `reduction`.

    Returns:
        The evens, then the odds; there are as many odds as evens, the last one not kept where there is none.
    """
    length = scored.size.shape[1]
    half = torch.arange((length + 1) // 2, device=scored.size.device)
    evens = 2 * half
    even, odd = scored.at(evens), scored.at((evens + 1).clamp(max=length - 1))
    odd = odd.kept((evens + 1 < length).expand(odd.size.shape[0], -1))
    assert even.metric is not None
    assert odd.metric is not None
    free_even = even.kept(~_is_prefix(even.origin, protected)).places()
    # a single prefix token is even
    free_odd = odd.kept(odd.origin >= protected).places() if protected > 1 else odd.places()
    best, partner = match_halves(even.metric, odd.metric, free_even, free_odd)
    if even.merge_penalty is not None and odd.merge_penalty is not None:
        best = penalise(best, even.merge_penalty, odd.merge_penalty.gather(1, partner))
    moved = best > threshold
    odd = _received(odd, even, torch.where(moved, partner, -1)[:, None] == half[:, None])
    return even.kept(~moved).then(odd)


def _merge_pairs(scored: _Scored, threshold: float, protected: int) -> _Scored:
    """Fold the later of each mutual pair above the threshold into the earlier one; see `reduction`."""
    assert scored.metric is not None
    best, partner = match_mutual(scored.metric, scored.kept(~_is_prefix(scored.origin, protected)).places())
    if scored.merge_penalty is not None:
        best = penalise(best, scored.merge_penalty, scored.merge_penalty.gather(1, partner))
    moved = best > threshold
    place = torch.arange(scored.size.shape[1], device=scored.size.device)
    return _received(scored, scored, torch.where(moved, partner, -1)[:, None] == place[:, None]).kept(~moved)


def _received(tokens: _Scored, others: _Scored, into: Tensor) -> _Scored:
    """`tokens` after what goes `into` them, bool [B, tokens, others]."""
    # products, as runtimes are slow to choose; no importance is below 0
    one = into.float()
    weight = one * others.size[:, None, :]
    size = tokens.size + weight.sum(-1)
    x = tokens.x * (tokens.size / size)[..., None] + (weight / size[..., None]) @ others.x
    importance = tokens.importance
    if importance is not None and others.importance is not None:
        importance = torch.maximum(importance, (one * others.importance[:, None, :]).amax(-1))
    return replace(tokens, x=x, size=size, importance=importance)


def _prefix(origin: Tensor, protected: int) -> Tensor:
    """int64 [B, P], where the prefix tokens lie, in their order of entering."""
    if protected == 1:
        # at place 0, it is even, first and never moved
        return origin.new_zeros(origin.shape[0], 1)
    wanted = torch.arange(protected, device=origin.device)[:, None]
    return (origin[:, None, :] == wanted).to(torch.int32).argmax(-1)


def _only_prefix(state: _State, places: Tensor) -> _State:
    """The state with its prefix tokens alone."""
    images, protected = places.shape
    padded = (_take(values, places) for values in (state.layout.pad(state.x), state.size, state.origin))
    x, size, origin = padded
    return _State(x.flatten(0, 1), size, origin, PackedLayout(images, protected))


def _finish(body: Body, state: _State, kept: Tensor) -> Reduced:
    """Tokens for the host's norm, pooling and head; the prefix alone where they read nothing else."""
    protected = body.protected
    prefix = _only_prefix(state, _prefix(state.origin, protected)) if protected else state
    if protected and body.prefix_only:
        state = prefix
    x, size = state.layout.pad(state.x), state.size * _there(state)
    if protected > 1 and not body.prefix_only:
        # where the head looks for it; where it was, it is no more
        x = torch.cat([prefix.layout.pad(prefix.x), x], 1)
        size = torch.cat([prefix.size, size * (state.origin >= protected)], 1)
    return Reduced(x, size, kept.to(torch.float32))
