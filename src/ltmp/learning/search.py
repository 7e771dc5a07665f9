"""Evolution strategy for the shape of a schedule: a few numbers, judged by noisy measurements without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple

import torch
from torch import Tensor

from .schedule import Shape

SPREAD = (0.4, 0.4, 0.6, 0.7, 0.4)
"""Standard deviations of the first generation, one for each number of a shape."""

POPULATION = 8
PARENTS = 4

_INERTIA = 0.3
"""Weight of the previous mean in the new one, because a generation is scored on few images."""


def evolve(score: Callable[[Shape], float], start: Shape, generations: int, generator: torch.Generator) -> Shape:
    """Improve `start` by a small evolution strategy with covariance adaptation (after Hansen, arXiv 1604.00772).

    Args:
        score: called `POPULATION` times per generation; lower is better.
        start: mean of the first generation.
        generator: CPU generator of the random steps.

    Returns:
        The mean after the last generation, which is less noisy than the best shape seen.
    """
    mean = torch.tensor(astuple(start), dtype=torch.float64)
    spread = torch.diag(torch.tensor(SPREAD, dtype=torch.float64).square())
    weight = torch.arange(PARENTS, 0, -1, dtype=torch.float64) / (PARENTS * (PARENTS + 1) / 2)
    for _ in range(generations):
        shapes = list(_draw(mean, spread, generator))
        scores = torch.tensor([score(Shape(*shape.tolist())) for shape in shapes])
        best = torch.stack([shapes[i] for i in scores.argsort()[:PARENTS]])
        steps = best - mean
        spread = 0.6 * spread + 0.4 * (steps.T * weight) @ steps + 2e-3 * torch.eye(len(mean), dtype=torch.float64)
        mean = _INERTIA * mean + (1 - _INERTIA) * weight @ best
    return Shape(*mean.tolist())


def _draw(mean: Tensor, spread: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """A generation in pairs mirrored at the mean (antithetic sampling)."""
    root = torch.linalg.cholesky(spread)
    for _ in range(POPULATION // 2):
        step = root @ torch.randn(len(mean), dtype=torch.float64, generator=generator)
        yield mean + step
        yield mean - step
