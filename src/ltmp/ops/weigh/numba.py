"""Penalties of merging and importance on packed rows of a CPU, in one call; see the functions of `reference`."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled, inlined
from ..probe.reference import LIFT
from .reference import MERGE_POWER, PRUNE_POWER

_TINY = np.finfo(np.float32).tiny
_NONE = np.float32(-np.inf)
_LIFT, _MERGES, _PRUNES = np.float32((1 + LIFT) ** 0.5), np.float32(MERGE_POWER / 2), np.float32(PRUNE_POWER)


@inlined
def _share(read, column, weight, free, out):
    """`saliency` of one image: the softmax over its patches of a column of `read` and the logarithm of their weight."""
    top, total = _NONE, np.float32(0)
    for i in range(len(out)):
        out[i] = read[i, column] + np.log(weight[i]) if free[i] else _NONE
        top = max(top, out[i])
    for i in range(len(out)):
        out[i] = np.exp(out[i] - top) if free[i] else np.float32(0)
        total += out[i]
    for i in range(len(out)):
        out[i] = out[i] / total if total > 0 else np.float32(0)


@inlined
def _blend(received, other, power, out):
    """`blend` of one image."""
    rest = np.float32(1) - power
    for i in range(len(out)):
        out[i] = max(received[i], _TINY) ** rest * max(other[i], _TINY) ** power


@inlined
def _penalise(share, size, power, factor, out):
    """Multiply one image's penalties by `merge_penalty` of `share`, to `power`, times `factor`."""
    patches = np.float32(0)
    for i in range(len(out)):
        patches += size[i]
    for i in range(len(out)):
        out[i] *= max(share[i] * patches, _TINY) ** power * factor


@compiled
def weigh_rows(received, attended, read, size, weight, origin, counts, protected, power, probes, importance, penalty):
    """Importance and penalties of all tokens of a batch.

    Args:
        received, attended: float32 [T], mean attention received and the class token's; empty where nothing asks.
        read: float32 [T, WIDTH + 2], see `probe`; [0, WIDTH + 2] where nothing asks.
        size, weight: float32 [T], patches of each token and what it counts as. origin: int64 [T], see `Tokens`.
        counts: int64 [B], tokens of each image.
        protected: tokens from the start on that are no patches.
        power: float32, that the class token's attention counts to; 0 is not at all.
        probes: whether the probe is asked for penalties, and whether for importance.
        importance, penalty: float32 [T]; filled, unless they are empty.
    """
    start, column, half = 0, read.shape[1] - 2, power / np.float32(2)
    for n in counts:
        end = start + n
        free, share = np.empty(n, np.bool_), np.empty(n, np.float32)
        for i in range(n):
            free[i] = origin[start + i] >= protected
        if len(importance) > 0:
            if probes[1]:
                _share(read[start:end], column + 1, weight[start:end], free, share)
                _blend(received[start:end], share, _PRUNES, importance[start:end])
            else:
                _blend(received[start:end], attended[start:end], power, importance[start:end])
        if len(penalty) > 0:
            for i in range(start, end):
                penalty[i] = 1
            if power > 0:
                _penalise(attended[start:end], size[start:end], half, np.float32(1), penalty[start:end])
            if probes[0]:
                _share(read[start:end], column, weight[start:end], free, share)
                _penalise(share, size[start:end], _MERGES, _LIFT, penalty[start:end])
        start = end
