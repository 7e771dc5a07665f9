"""Merge penalties and importance of `reference` on packed rows, on a CPU, in one call."""

from __future__ import annotations

import numpy as np

from ..compiled import compiled, inlined
from ..probe.reference import LIFT
from .reference import MERGE_POWER, PRUNE_POWER

_TINY = np.finfo(np.float32).tiny
_MINUS_INF = np.float32(-np.inf)
_LIFT = np.float32((1 + LIFT) ** 0.5)
_HALF_MERGE_POWER, _PRUNE_POWER = np.float32(MERGE_POWER / 2), np.float32(PRUNE_POWER)


@inlined
def _saliency(probed, column, weight, patch, out):
    """`reference.saliency` of one image, from a column of `probed`; fills `out`."""
    top, total = _MINUS_INF, np.float32(0)
    for i in range(len(out)):
        out[i] = probed[i, column] + np.log(weight[i]) if patch[i] else _MINUS_INF
        top = max(top, out[i])
    for i in range(len(out)):
        out[i] = np.exp(out[i] - top) if patch[i] else np.float32(0)
        total += out[i]
    for i in range(len(out)):
        out[i] = out[i] / total if total > 0 else np.float32(0)


@inlined
def _blend(received, other, power, out):
    """`reference.blend` of one image; fills `out`."""
    complement = np.float32(1) - power
    for i in range(len(out)):
        out[i] = max(received[i], _TINY) ** complement * max(other[i], _TINY) ** power


@inlined
def _penalise(share, size, half_power, factor, out):
    """Multiply the penalties `out` of one image by `reference.merge_penalty` of `share`, times `factor`."""
    patches = np.float32(0)
    for i in range(len(out)):
        patches += size[i]
    for i in range(len(out)):
        out[i] *= max(share[i] * patches, _TINY) ** half_power * factor


@compiled
def weigh_rows(received, attended, probed, size, weight, origin, counts, protected, power, probes, importance, penalty):
    """Compute importance and merge penalty of all tokens of a batch.

    Args:
        received, attended: float32 [T], mean attention received, and attention from the class token; empty if not
            needed.
        probed: float32 [T, WIDTH + 2], see `probe`; [0, WIDTH + 2] if not needed.
        size, weight: float32 [T], number of patches of each token, and its weight in attention.
        origin: int64 [T], see `Tokens`.
        counts: int64 [B], tokens of each image.
        protected: number of prefix tokens.
        power: float32, see `Policy.class_power`; 0 leaves class-token attention out.
        probes: whether penalties are computed from the probe, and whether importance is.
        importance, penalty: float32 [T]; filled, unless they are empty.
    """
    start, column, half_power = 0, probed.shape[1] - 2, power / np.float32(2)
    for n in counts:
        end = start + n
        patch, share = np.empty(n, np.bool_), np.empty(n, np.float32)
        for i in range(n):
            patch[i] = origin[start + i] >= protected
        if len(importance) > 0:
            if probes[1]:
                _saliency(probed[start:end], column + 1, weight[start:end], patch, share)
                _blend(received[start:end], share, _PRUNE_POWER, importance[start:end])
            else:
                _blend(received[start:end], attended[start:end], power, importance[start:end])
        if len(penalty) > 0:
            for i in range(start, end):
                penalty[i] = 1
            if power > 0:
                _penalise(attended[start:end], size[start:end], half_power, np.float32(1), penalty[start:end])
            if probes[0]:
                _saliency(probed[start:end], column, weight[start:end], patch, share)
                _penalise(share, size[start:end], _HALF_MERGE_POWER, _LIFT, penalty[start:end])
        start = end
