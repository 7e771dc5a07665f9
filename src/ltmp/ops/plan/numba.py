"""Decide which tokens of a block merge and go, and fold their features, on packed rows of a CPU in one call.

`method.reduction` defines the result. All sums are float32 in a fixed order, image by image, so that nothing depends on
the batch. An image's tokens are addressed by their place in it, 0 to n - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..compiled import compiled, inlined
from ..match.reference import ROUNDS

_NONE = np.float32(-np.inf)


class Cut(NamedTuple):
    """How a step selects tokens.

    Attributes:
        threshold: float32; merges above it, keeps above it. Where there is a rate, nobody asks.
        tokens: how many go of each image, -1 for none.
        part: float32, which part of the candidates goes, -1 for none.
        floor: tokens that an image keeps at least.
        ceiling: tokens that it keeps at most, as far as this step can remove them; -1 for any number.
    """

    threshold: np.float32
    tokens: int = -1
    part: np.float32 = np.float32(-1)
    floor: int = 0
    ceiling: int = -1


class Steps(NamedTuple):
    """The steps of a block.

    Attributes:
        merges, prunes: whether it does; prunes_first: the order. mutual: how tokens are matched, or else bipartite.
        merge, prune: how these steps select.
        protected: the first `protected` tokens of the input are never merged away, never receive, are never pruned.
        block: its number, for sources.
    """

    merges: bool
    prunes: bool
    prunes_first: bool
    mutual: bool
    merge: Cut
    prune: Cut
    protected: int
    block: int

    @property
    def whole(self) -> bool:
        """Whether similarities of all pairs are needed, or only those of an odd and an even token."""
        return self.mutual or self.prunes_first


@inlined
def _bound(key, candidate, cut, live, goes):
    """Let rates, floor and ceiling say which candidates go, those of highest `key` first and the first of equals.

    Args:
        key: float32 [n]. candidate, live: bool [n].
        goes: bool [n], what a threshold says; overruled.
    """
    if cut.tokens < 0 and cut.part < 0 and cut.floor == 0 and cut.ceiling < 0:
        return
    n, there, tokens = len(key), 0, 0
    for i in range(n):
        there += candidate[i]
        tokens += live[i]
    wanted = cut.tokens
    if cut.part >= 0:
        wanted = int(np.floor(np.float32(there) * cut.part))
    most = max(tokens - cut.floor, 0)
    least = max(tokens - cut.ceiling, 0) if cut.ceiling >= 0 else 0
    for i in range(n):
        if not candidate[i]:
            goes[i] = False
            continue
        rank = 0
        for j in range(n):
            rank += candidate[j] and (key[j] > key[i] or (key[j] == key[i] and j < i))
        chosen = rank < wanted if wanted >= 0 else goes[i]
        goes[i] = rank < most and (chosen or rank < least)


@inlined
def _prune(importance, free, cut, protected, live):
    """Drop tokens that are not important enough: `reduction._prune`. Changes `live`, bool [n]."""
    n, top = len(live), -1
    for i in range(n):
        # without a class token nothing else would keep an image from losing every token
        if protected == 0 and live[i] and (top < 0 or importance[i] > importance[top]):
            top = i
    key, candidate, goes = np.empty(n, np.float32), np.empty(n, np.bool_), np.empty(n, np.bool_)
    for i in range(n):
        key[i] = -importance[i]
        candidate[i] = live[i] and free[i] and i != top
        goes[i] = candidate[i] and not importance[i] > cut.threshold
    _bound(key, candidate, cut, live, goes)
    for i in range(n):
        live[i] = live[i] and not goes[i]


@inlined
def _nearest(cosine, asked, best, found):
    """Of each column of `cosine` [M, n] the highest of the asked rows, the first of equals: vectors all along."""
    rows, columns = cosine.shape
    for i in range(columns):
        best[i], found[i] = _NONE, 0
    for j in range(rows):
        if asked[j]:
            for i in range(columns):
                better = cosine[j, i] > best[i]
                best[i] = cosine[j, i] if better else best[i]
                found[i] = np.int32(j) if better else found[i]


@inlined
def _match_bipartite(cosine, whole, free, turn, score, receiver):
    """Of each even token, by its place among those in `turn`, the most similar odd one.

    Args:
        cosine: float32 [n, n], or [n // 2, ceil(n / 2)] of odd and even tokens.
        whole: which of them.
        free: bool [n]. turn: int64, the places of the tokens that are left.
        score: float32 [n], -inf for those that may not merge. receiver: int64 [n]. Both are filled.
    """
    rows, columns = cosine.shape
    asked = np.zeros(rows, np.bool_)
    for t in range(1, len(turn), 2):
        asked[turn[t] if whole else t // 2] = free[turn[t]]
    best, found = np.empty(columns, np.float32), np.empty(columns, np.int32)
    _nearest(cosine, asked, best, found)
    for t in range(0, len(turn), 2):
        i = turn[t]
        column = i if whole else t // 2
        if free[i] and best[column] > _NONE:
            score[i] = best[column]
            receiver[i] = found[column] if whole else 2 * found[column] + 1


@inlined
def _match_mutual(cosine, free, turn, score, receiver):
    """Pairs that are each other's most similar, in rounds: `match_mutual`. Changes the diagonal of `cosine` [n, n]."""
    n = len(cosine)
    asked = np.zeros(n, np.bool_)
    for i in turn:
        asked[i] = free[i]
        cosine[i, i] = _NONE
    best, found = np.empty(n, np.float32), np.empty(n, np.int32)
    for _ in range(ROUNDS):
        _nearest(cosine, asked, best, found)
        for i in turn:
            j = found[i]
            if asked[i] and best[i] > _NONE and j < i and found[j] == i:
                score[i], receiver[i] = best[i], j
        for i in turn:
            if receiver[i] != i:
                asked[i] = asked[receiver[i]] = False


@inlined
def _merge(cosine, whole, mutual, penalty, free, cut, turn, live, into):
    """Fold tokens into those they resemble most: `reduction._merge`. Changes `live` [n] and `into` [n]."""
    n = len(live)
    score, receiver = np.empty(n, np.float32), np.empty(n, np.int64)
    for i in range(n):
        score[i], receiver[i] = _NONE, i
    if mutual:
        _match_mutual(cosine, free, turn, score, receiver)
    else:
        _match_bipartite(cosine, whole, free, turn, score, receiver)
    candidate, goes = np.empty(n, np.bool_), np.empty(n, np.bool_)
    for i in range(n):
        candidate[i] = score[i] > _NONE
        if candidate[i] and len(penalty) > 0:
            score[i] = np.float32(1) - (np.float32(1) - score[i]) * penalty[i] * penalty[receiver[i]]
        goes[i] = candidate[i] and score[i] > cut.threshold
    _bound(score, candidate, cut, live, goes)
    for i in range(n):
        if goes[i]:
            live[i], into[i] = False, receiver[i]


@inlined
def _left(turn, live, evens_first, order):
    """How many tokens of `turn` are live; they are put into `order`, those at even places in `turn` first if asked."""
    m, step = 0, 2 if evens_first else 1
    for first in range(step):
        for t in range(first, len(turn), step):
            if live[turn[t]]:
                order[m] = turn[t]
                m += 1
    return m


@inlined
def _fold(x, size, origin, order, into, out, out_size, out_origin, moved):
    """Weighted means of what merged: `reduction.fold` of one image. `moved` is filled with new places by old ones."""
    n, width = x.shape
    total = np.zeros(n, np.float32)
    for i in range(n):
        moved[i] = -1
        total[into[i]] += size[i]
    for row in range(len(order)):
        i = order[row]
        moved[i], out_size[row], out_origin[row] = row, total[i], origin[i]
        part = size[i] / total[i]  # 1 where nothing merged into it
        for c in range(width):
            out[row, c] = x[i, c] * part
    for i in range(n):
        row = moved[into[i]]
        # a receiver may itself have been dropped: what merged into it goes too
        if into[i] != i and row >= 0:
            part = size[i] / total[into[i]]
            for c in range(width):
                out[row, c] += x[i, c] * part


@inlined
def _follow(source, into, moved, block, x, dropped):
    """`tokens.follow` of one image: where each token of the input is after this block. Changes `source`.

    What those were that are gone now is put into `dropped` [1, N, C], which is empty where nobody asks.
    """
    for s in range(len(source)):
        i = source[s]
        if i >= 0:
            row = moved[into[i]]
            source[s] = row if row >= 0 else -1 - block
            if row < 0 and len(dropped) > 0:
                # not as slices, whose check of shapes takes seconds to compile
                for c in range(x.shape[1]):
                    dropped[0, s, c] = x[i, c]


@compiled
def plan_rows(
    x, size, origin, counts, cosine, importance, penalty, steps, whole, out, out_size, out_origin, out_counts, source,
    dropped,
):  # fmt: skip
    """Reduce the tokens of a block.

    Args:
        x: float32 [T, C], the live tokens of all images one after the other.
        size: float32 [T]; origin: int64 [T], see `Tokens`.
        counts: int64 [B], tokens of each image.
        cosine: float32, of one image after the other [n // 2, ceil(n / 2)] similarities of odd and even tokens, or
            [n, n] where `whole`; the diagonal of these is overwritten. Empty where nothing merges.
        importance: float32 [T]; empty where nothing is pruned; overwritten.
        penalty: float32 [T], see `BlockScores`; empty where there are none.
        steps: what to do, a `Steps`; whole: its `whole`.
        out, out_size, out_origin, out_counts: as x, size, origin and counts; filled.
        source: int32 [B, N], see `Tokens`, brought up to date; [B, 0] where nobody asks.
        dropped: float32 [B, N, C], of patches pruned here, their features before; [0, 0, 0] where nobody asks.

    Returns:
        Rows of `out`, `out_size` and `out_origin` that were filled.
    """
    start = row = at = 0
    for b in range(len(counts)):
        n = counts[b]
        end = start + n
        live, free, score = np.empty(n, np.bool_), np.empty(n, np.bool_), importance[start:end]
        turn, into, moved = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
        for i in range(n):
            live[i], free[i], into[i], moved[i] = True, origin[start + i] >= steps.protected, i, i
        if steps.prunes and steps.prunes_first:
            _prune(score, free, steps.prune, steps.protected, live)
        turn = turn[: _left(moved, live, False, turn)]
        if steps.merges:
            rows, columns = (n, n) if whole else (n // 2, n - n // 2)
            pairs = cosine[at : at + rows * columns].reshape(rows, columns)
            at += rows * columns
            _merge(pairs, whole, steps.mutual, penalty[start:end], free, steps.merge, turn, live, into)
            if steps.prunes and not steps.prunes_first:
                for i in range(n):
                    score[into[i]] = max(score[into[i]], score[i])
        if steps.prunes and not steps.prunes_first:
            _prune(score, free, steps.prune, steps.protected, live)
        order = np.empty(n, np.int64)
        last = row + _left(turn, live, steps.merges and not steps.mutual, order)
        _fold(
            x[start:end], size[start:end], origin[start:end], order[: last - row], into,
            out[row:last], out_size[row:last], out_origin[row:last], moved,
        )  # fmt: skip
        if source.shape[1] > 0:
            _follow(source[b], into, moved, steps.block, x[start:end], dropped[b : b + 1])
        out_counts[b] = last - row
        start, row = end, last
    return row
