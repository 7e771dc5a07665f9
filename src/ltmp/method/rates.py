"""Fixed rates: the baselines that learned thresholds are compared with, as a policy for the same engines."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LTMPConfig, Rate
from ..errors import LTMPError
from .policy import Policy, rank


class Rates(Policy):
    """Removes the same number of tokens from every image (Bolya et al., Token Merging, ICLR 2023, sections 3 and 4.1).

    Merging removes at most the even tokens that have a partner, that is at most half of the tokens.

    Raises:
        LTMPError: the config has rates for another number of blocks.
    """

    def __init__(self, depth: int, config: LTMPConfig) -> None:
        super().__init__(depth, config)
        prune = config.r if config.r_prune is None else config.r_prune
        self.rates = {"merge": spread(config.r, depth, config.schedule), "prune": spread(prune, depth, config.schedule)}
        self.rates["fuse"] = self.rates["prune"]
        merges, prunes = "merge" in config.steps, config.steps != ("merge",)
        on = [
            (merges and m > 0, prunes and p > 0) for m, p in zip(self.rates["merge"], self.rates["prune"], strict=True)
        ]
        if config.ceiling is not None:
            on = [(merges, prunes)] * depth
        self.register_buffer("_on", torch.tensor(on), persistent=False)

    def on(self) -> Tensor:
        return self.get_buffer("_on")

    @torch.no_grad()
    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        rate = self.rates[step][block]
        if isinstance(rate, float):
            # a fraction of all tokens, of which only the even ones are candidates of merging
            tokens = free.sum(1, keepdim=True) * (2 if step == "merge" else 1)
            removed = (tokens * rate).floor()
        else:
            removed = torch.full_like(free[:, :1], rate, dtype=torch.int64)
        if step == "merge":
            return (free & (rank(score, free) < removed)).to(score.dtype)
        return (rank(-score, free) >= removed).to(score.dtype)


def spread(r: Rate | tuple[Rate, ...], depth: int, schedule: str) -> tuple[Rate, ...]:
    """Return the rate of each block.

    Raises:
        LTMPError: `r` has rates for another number of blocks.
    """
    if isinstance(r, tuple):
        if len(r) != depth:
            raise LTMPError(f"r has rates for {len(r)} blocks, but this model has {depth}: give one, or {depth}")
        return r
    if schedule == "constant" or depth == 1:
        return (r,) * depth
    falling = [2 * r * (depth - 1 - i) / (depth - 1) for i in range(depth)]
    return tuple(int(rate) if isinstance(r, int) else min(rate, 1 - 1e-6) for rate in falling)


def noise(origin: Tensor, block: int, seed: int) -> Tensor:
    """Random float32 in [0, 1) of the shape of `origin`: a hash of position, block and seed.

    A hash and not a generator, so that every engine, batch size and device removes the same tokens.
    """
    mask = 0xFFFFFFFF
    x = (origin.long() * 0x9E3779B1 + (block + 1) * 0x85EBCA6B + (seed + 1) * 0xC2B2AE35) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return (x >> 8).float() / 2**24
