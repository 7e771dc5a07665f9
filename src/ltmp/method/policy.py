"""What decides which tokens go: learned thresholds or fixed rates, behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..config import LTMPConfig


class Policy(nn.Module, ABC):
    """Decides for each block; a model's is under its name `ltmp`.

    Args:
        depth: number of blocks, L.
        config: the variant and its settings.
    """

    learns = False
    """Whether a step that selects nothing now may learn to, so that training must run it."""

    def __init__(self, depth: int, config: LTMPConfig) -> None:
        super().__init__()
        self.config = config
        self.depth = depth

    @abstractmethod
    def on(self) -> Tensor:
        """bool [L, 2] on the device, whether the merge and the prune step of each block can select anything."""

    @abstractmethod
    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        """Like `select`, without regard to floor and ceiling."""

    def active(self) -> tuple[tuple[bool, bool], ...]:
        """`on` for the host, with one read of the device."""
        return tuple((merge, prune) for merge, prune in self.on().tolist())

    def steps(self, active: tuple[tuple[bool, bool], ...], block: int) -> tuple[str, ...]:
        """The steps that can select something in `block`, given `active()`'s answer for all blocks."""
        merge, prune = active[block]
        return tuple(step for step in self.config.steps if (merge if step == "merge" else prune))

    def empties(self, block: int) -> bool:
        """Whether `block` drops all that it may, as no mean of attention weights is above the threshold."""
        return False

    def size_power(self, block: int) -> float:
        """The power of a token's size that it counts as in `block`'s attention."""
        first = self.config.size_power
        return first + (1 - first) * block / max(1, self.depth - 1)

    def weight(self, block: int, size: Tensor) -> Tensor:
        """How much tokens of these sizes, of any shape, count in `block`'s attention."""
        return size if self.config.size_power == 1 else size ** self.size_power(block)

    def class_power(self, block: int) -> float:
        """The power of the class token's attention that `block`'s merging goes by: early ones look at nothing yet."""
        return self.config.class_power * (block + 1) / self.depth

    def probed(self, block: int, x: Tensor) -> Tensor | None:
        """What a learned probe reads of the tokens x [..., C] that `block`'s attention left; None where none is asked.

        See `ops.probe.reference.probe`.
        """
        return None

    @property
    def bounded(self) -> bool:
        """Whether a floor or a ceiling may overrule a decision."""
        return self.config.floor > 0 or self.config.ceiling is not None

    def select(self, step: str, block: int, score: Tensor, free: Tensor, tokens: Tensor) -> Tensor:
        """Which tokens are selected: those that merge, or those that pruning keeps.

        Args:
            step: "merge", "prune" or "fuse".
            score: float32 [B, M], cosine to the best partner, or importance.
            free: bool [B, M], the tokens that the step may choose from; no other may merge, and pruning does not ask.
            tokens: [B], what each image has left.

        Returns:
            float32 [B, M], 1 selected and 0 not, with the gradient of a threshold.
        """
        decision = self.decide(step, block, score, free)
        if not self.bounded:
            return decision
        merges = step == "merge"
        most = (tokens - self.config.floor).clamp(min=0)
        least = torch.zeros_like(most)
        if self.config.ceiling is not None and step == self.config.steps[-1]:
            least = (tokens - self.config.ceiling).clamp(min=0)
        place = rank(score if merges else -score, free)
        goes = (decision.detach() > 0) == merges
        bound = (free & (place < most[:, None]) & (goes | (place < least[:, None]))) == merges
        return decision + (bound.to(decision.dtype) - decision).detach()


def rank(score: Tensor, free: Tensor) -> Tensor:
    """int64 [B, M], each free token's place by falling score, the first of equals first; the others come after them."""
    order = score.masked_fill(~free, float("-inf")).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place).masked_fill_(~free, score.shape[1])
