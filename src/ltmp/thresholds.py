"""The 2 L learned numbers, and the decision they make."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import LTMPConfig
from .dial import Dialled
from .errors import LTMPError
from .policy import Policy
from .probe import Probing


def over(score: Tensor, threshold: Tensor, tau: float, scale: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """1 where `score > threshold`, else 0, exactly; its gradient is that of a sigmoid of temperature `tau`.

    The forward value is the hard decision in float32 (paper, equation 8, straight-through). `soft + (hard - soft)`
    in this order is exactly 0 or 1; `hard + soft - soft` is not. The sigmoid is taken on a `scale` of both numbers,
    where one is given.
    """
    hard = (score > threshold).to(score.dtype)
    if not (threshold.requires_grad and torch.is_grad_enabled()):
        return hard
    if scale is not None:
        score, threshold = scale(score), scale(threshold)
    soft = torch.sigmoid((score - threshold) / tau)
    return soft + (hard - soft).detach()


def log_over(score: Tensor, threshold: Tensor, tau: float) -> Tensor:
    """`over` for positive scores, with the sigmoid taken in log space.

    Importance lives near 1/N, so a sigmoid in its own units gives every token the same gradient; in log space one
    temperature fits every token count. The decision itself compares the plain numbers, like deployment.
    """
    return over(score, threshold, tau, lambda values: values.clamp_min(torch.finfo(values.dtype).tiny).log())


class Thresholds(Dialled, Probing, Policy):
    """The learned thresholds of a model, under its name `ltmp`; everything here trains and is saved, nothing else.

    A block whose merge threshold is 1 or more and whose prune threshold is 0 or less selects nothing and is skipped:
    that is where both start.

    Args:
        depth: number of blocks, L.
        config: the variant and the temperatures.

    Attributes:
        merge: float32 [L]; tokens merge above this cosine similarity.
        prune: float32 [L]; tokens are kept above this mean attention received.
    """

    learns = True

    def __init__(self, depth: int, config: LTMPConfig) -> None:
        super().__init__(depth, config)
        self.merge = nn.Parameter(torch.ones(depth))
        self.prune = nn.Parameter(torch.zeros(depth))
        self.register_buffer("probe", None)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Follow the model to another device, but keep every float32 bit: `model.half()` must not move a decision."""
        exact, probe = {name: parameter.data for name, parameter in self.named_parameters()}, self.probe
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            parameter.data = exact[name].to(parameter.device)
        if probe is not None:
            self.probe = probe.to(self.merge.device)
        return self

    @torch.no_grad()
    def set(self, merge: Tensor | list[float] | None = None, prune: Tensor | list[float] | None = None) -> None:
        """Copy new values [L] in; None leaves a vector as it is.

        Raises:
            ValueError: the number of values is not the model's depth, or a value is not finite.
        """
        new = {
            name: torch.as_tensor(values, dtype=torch.float32)
            for name, values in (("merge", merge), ("prune", prune))
            if values is not None
        }
        for name, values in new.items():
            if values.shape != (self.depth,):
                raise ValueError(
                    f"{name} thresholds are for {values.numel()} blocks, but this model has {self.depth}: "
                    "use thresholds learned on this architecture"
                )
            if not values.isfinite().all():
                raise ValueError(
                    f"{name} thresholds hold NaN or infinity: the file or the run that made them is broken"
                )
        for name, values in new.items():
            getattr(self, name).copy_(values)
        self.asked = None

    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        """1 above the block's threshold and 0 not."""
        if step == "merge":
            return over(score, self.merge[block], self.config.tau)
        return log_over(score, self.prune[block], self.config.prune_tau)

    def empties(self, block: int) -> bool:
        """Whether `block` drops all that it may, as no mean of attention weights is above the threshold."""
        return bool(self.prune[block] >= 1) and not self.config.floor

    def on(self) -> Tensor:
        """No cosine is above 1, and every importance is above 0; but a ceiling may always ask for more."""
        if self.config.ceiling is not None:
            here = [torch.full_like(self.merge, step in self.config.steps) for step in ("merge", "prune")]
            return torch.stack(here, 1) > 0
        return torch.stack([self.merge.detach() < 1, self.prune.detach() > 0], 1)

    def active(self) -> tuple[tuple[bool, bool], ...]:
        """For each block whether its merge and its prune threshold can select anything. Reads the device once.

        Raises:
            LTMPError: a threshold is NaN, which would select nothing in one engine and everything in another.
        """
        broken = torch.stack([self.merge.detach().isnan(), self.prune.detach().isnan()], 1)
        flags = torch.cat([self.on(), broken]).tolist()
        if any(merge or prune for merge, prune in flags[self.depth :]):
            raise LTMPError("a threshold is NaN: the run or the file that it came from is broken, use another")
        return tuple((merge, prune) for merge, prune in flags[: self.depth])

    def extra_repr(self) -> str:
        return f"{self.config.variant}, depth={self.depth}"
