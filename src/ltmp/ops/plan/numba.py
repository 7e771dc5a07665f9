"""Decide which tokens of a block merge and which are pruned, and fold the features, on packed rows, on a CPU.

`method.reduction` defines the result. All sums are float32 in a fixed order, image by image, so that no result depends
on the batch. Tokens are addressed by their position in the image, 0 to n - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..compiled import compiled, inlined
from ..match.reference import ROUNDS

_MINUS_INF = np.float32(-np.inf)


class Cut(NamedTuple):
    """How a step selects tokens.

    Attributes:
        threshold: float32; tokens above it merge, or are kept. Ignored if there is a rate.
        tokens: fixed rate, tokens to remove per image; -1 for none.
        part: float32, fixed rate, fraction of the candidates to remove; -1 for none.
        floor: minimum number of tokens that an image keeps.
        ceiling: maximum number of tokens that it keeps, as far as this step can remove them; -1 for no limit.
    """

    threshold: np.float32
    tokens: int = -1
    part: np.float32 = np.float32(-1)
    floor: int = 0
    ceiling: int = -1


class Steps(NamedTuple):
    """The steps of a block.

    Attributes:
        merges, prunes: whether the block merges, and whether it prunes.
        prunes_first: whether pruning comes before merging.
        mutual: whether matching is mutual, rather than bipartite.
        merge, prune: how the two steps select tokens.
        protected: the first `protected` tokens of the input are never merged, never receive, and are never pruned.
        block: number of the block, for `Tokens.source`.
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
        """Whether similarities of all pairs of tokens are needed, rather than of an odd and an even token only."""
        return self.mutual or self.prunes_first


@inlined
def _bound(key, candidate, cut, live, goes):
    """Apply rate, floor and ceiling to `goes`, the tokens to remove; highest `key` first, ties in order.

    Args:
        key: float32 [n].
        candidate, live: bool [n], tokens that the step may remove, and all tokens of the image that remain.
        goes: bool [n], the decision by threshold; overwritten.
    """
    if cut.tokens < 0 and cut.part < 0 and cut.floor == 0 and cut.ceiling < 0:
        return
    n, candidates, tokens = len(key), 0, 0
    for i in range(n):
        candidates += candidate[i]
        tokens += live[i]
    rate = cut.tokens
    if cut.part >= 0:
        rate = int(np.floor(np.float32(candidates) * cut.part))
    most = max(tokens - cut.floor, 0)
    least = max(tokens - cut.ceiling, 0) if cut.ceiling >= 0 else 0
    for i in range(n):
        if not candidate[i]:
            goes[i] = False
            continue
        rank = 0
        for j in range(n):
            rank += candidate[j] and (key[j] > key[i] or (key[j] == key[i] and j < i))
        selected = rank < rate if rate >= 0 else goes[i]
        goes[i] = rank < most and (selected or rank < least)


@inlined
def _prune(importance, free, cut, protected, live):
    """Prune tokens of low importance: `reduction._prune`. Updates `live`, bool [n]."""
    n, top = len(live), -1
    for i in range(n):
        # without a prefix token an image could lose every token: keep its most important one
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
def _nearest(cosine, candidate, best, nearest):
    """For each column of `cosine` [M, n], find the highest of the candidate rows, the first if there are ties.

    The inner loop runs over columns without branches, so that it is vectorised.
    """
    rows, columns = cosine.shape
    for i in range(columns):
        best[i], nearest[i] = _MINUS_INF, 0
    for j in range(rows):
        if candidate[j]:
            for i in range(columns):
                better = cosine[j, i] > best[i]
                best[i] = cosine[j, i] if better else best[i]
                nearest[i] = np.int32(j) if better else nearest[i]


@inlined
def _match_bipartite(cosine, all_pairs, free, remaining, score, receiver):
    """Find the most similar odd token of each even token, by parity among the remaining tokens: `match`.

    Args:
        cosine: float32 [n, n] if `all_pairs`, else [n // 2, ceil(n / 2)] of odd and even tokens.
        free: bool [n], tokens that may merge and receive.
        remaining: int64, positions of the remaining tokens, in order.
        score: float32 [n], -inf; set for tokens that may merge.
        receiver: int64 [n], set for the same tokens.
    """
    rows, columns = cosine.shape
    candidate = np.zeros(rows, np.bool_)
    for t in range(1, len(remaining), 2):
        candidate[remaining[t] if all_pairs else t // 2] = free[remaining[t]]
    best, nearest = np.empty(columns, np.float32), np.empty(columns, np.int32)
    _nearest(cosine, candidate, best, nearest)
    for t in range(0, len(remaining), 2):
        i = remaining[t]
        column = i if all_pairs else t // 2
        if free[i] and best[column] > _MINUS_INF:
            score[i] = best[column]
            receiver[i] = nearest[column] if all_pairs else 2 * nearest[column] + 1


@inlined
def _match_mutual(cosine, free, remaining, score, receiver):
    """Pair each other's most similar tokens, in rounds: `match_mutual`. Overwrites the diagonal of `cosine` [n, n].

    Other arguments are as in `_match_bipartite`.
    """
    n = len(cosine)
    unpaired = np.zeros(n, np.bool_)
    for i in remaining:
        unpaired[i] = free[i]
        cosine[i, i] = _MINUS_INF
    best, nearest = np.empty(n, np.float32), np.empty(n, np.int32)
    for _ in range(ROUNDS):
        _nearest(cosine, unpaired, best, nearest)
        for i in remaining:
            j = nearest[i]
            if unpaired[i] and best[i] > _MINUS_INF and j < i and nearest[j] == i:
                score[i], receiver[i] = best[i], j
        for i in remaining:
            if receiver[i] != i:
                unpaired[i] = unpaired[receiver[i]] = False


@inlined
def _merge(cosine, all_pairs, mutual, penalty, free, cut, remaining, live, into):
    """Merge tokens into their most similar partners: `reduction._merge`. Updates `live` [n] and `into` [n]."""
    n = len(live)
    score, receiver = np.empty(n, np.float32), np.empty(n, np.int64)
    for i in range(n):
        score[i], receiver[i] = _MINUS_INF, i
    if mutual:
        _match_mutual(cosine, free, remaining, score, receiver)
    else:
        _match_bipartite(cosine, all_pairs, free, remaining, score, receiver)
    candidate, goes = np.empty(n, np.bool_), np.empty(n, np.bool_)
    for i in range(n):
        candidate[i] = score[i] > _MINUS_INF
        if candidate[i] and len(penalty) > 0:
            score[i] = np.float32(1) - (np.float32(1) - score[i]) * penalty[i] * penalty[receiver[i]]
        goes[i] = candidate[i] and score[i] > cut.threshold
    _bound(score, candidate, cut, live, goes)
    for i in range(n):
        if goes[i]:
            live[i], into[i] = False, receiver[i]


@inlined
def _select_live(positions, live, evens_first, order):
    """Copy the live ones of `positions` to `order`, optionally those at even indices first; return how many."""
    m, step = 0, 2 if evens_first else 1
    for first in range(step):
        for t in range(first, len(positions), step):
            if live[positions[t]]:
                order[m] = positions[t]
                m += 1
    return m


@inlined
def _fold(x, size, origin, order, into, out, out_size, out_origin, moved):
    """Size-weighted means: `reduction.fold` of one image. Fills `moved`: new positions by old ones, -1 if removed."""
    n, width = x.shape
    total = np.zeros(n, np.float32)
    for i in range(n):
        moved[i] = -1
        total[into[i]] += size[i]
    for row in range(len(order)):
        i = order[row]
        moved[i], out_size[row], out_origin[row] = row, total[i], origin[i]
        share = size[i] / total[i]  # 1 if nothing merged into it
        for c in range(width):
            out[row, c] = x[i, c] * share
    for i in range(n):
        row = moved[into[i]]
        # a receiver may itself have been pruned, with everything that merged into it
        if into[i] != i and row >= 0:
            share = size[i] / total[into[i]]
            for c in range(width):
                out[row, c] += x[i, c] * share


@inlined
def _follow(source, into, moved, block, x, dropped):
    """Update `source` of one image: `tokens.follow`.

    Writes the features of tokens pruned here to `dropped` [1, N, C], unless that is empty.
    """
    for s in range(len(source)):
        i = source[s]
        if i >= 0:
            row = moved[into[i]]
            source[s] = row if row >= 0 else -1 - block
            if row < 0 and len(dropped) > 0:
                # element by element: slice assignment checks shapes, which takes seconds to compile
                for c in range(x.shape[1]):
                    dropped[0, s, c] = x[i, c]


@compiled
def plan_rows(
    x, size, origin, counts, cosine, importance, penalty, steps, all_pairs, out, out_size, out_origin, out_counts,
    source, dropped,
):  # fmt: skip
    """Reduce the tokens of a block.

    Args:
        x: float32 [T, C], the live tokens of all images one after the other.
        size, origin: float32 [T] and int64 [T], see `Tokens`.
        counts: int64 [B], tokens of each image.
        cosine: float32, 1-D, the similarities of each image one after the other: [n // 2, ceil(n / 2)] of odd and even
            tokens, or [n, n] if `all_pairs`, whose diagonal is overwritten. Empty if nothing merges.
        importance: float32 [T], overwritten; empty if nothing is pruned.
        penalty: float32 [T], see `BlockScores`; empty for none.
        steps: the steps of the block, a `Steps`.
        all_pairs: `steps.whole`.
        out, out_size, out_origin, out_counts: like x, size, origin and counts, for the result; filled.
        source: int32 [B, N], see `Tokens`, updated; [B, 0] if not needed.
        dropped: float32 [B, N, C], filled with the features of the patches pruned here; [0, 0, 0] if not needed.

    Returns:
        The number of rows of the result.
    """
    start = row = offset = 0
    for b in range(len(counts)):
        n = counts[b]
        end = start + n
        live, free, score = np.empty(n, np.bool_), np.empty(n, np.bool_), importance[start:end]
        remaining, into, moved = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
        for i in range(n):
            live[i], free[i], into[i], moved[i] = True, origin[start + i] >= steps.protected, i, i
        if steps.prunes and steps.prunes_first:
            _prune(score, free, steps.prune, steps.protected, live)
        remaining = remaining[: _select_live(moved, live, False, remaining)]
        if steps.merges:
            rows, columns = (n, n) if all_pairs else (n // 2, n - n // 2)
            pairs = cosine[offset : offset + rows * columns].reshape(rows, columns)
            offset += rows * columns
            _merge(pairs, all_pairs, steps.mutual, penalty[start:end], free, steps.merge, remaining, live, into)
            if steps.prunes and not steps.prunes_first:
                for i in range(n):
                    score[into[i]] = max(score[into[i]], score[i])
        if steps.prunes and not steps.prunes_first:
            _prune(score, free, steps.prune, steps.protected, live)
        order = np.empty(n, np.int64)
        row_end = row + _select_live(remaining, live, steps.merges and not steps.mutual, order)
        _fold(
            x[start:end], size[start:end], origin[start:end], order[: row_end - row], into,
            out[row:row_end], out_size[row:row_end], out_origin[row:row_end], moved,
        )  # fmt: skip
        if source.shape[1] > 0:
            _follow(source[b], into, moved, steps.block, x[start:end], dropped[b : b + 1])
        out_counts[b] = row_end - row
        start, row = end, row_end
    return row
