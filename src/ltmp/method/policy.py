"""What decides which tokens go: learned thresholds or fixed rates, behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..config import LTMPConfig
from ..errors import LTMPError

Active = tuple[tuple[bool, bool], ...]
"""For each block whether its merge and its prune step can select anything."""


class Policy(nn.Module, ABC):
    """Decides for each block; a model's is under its name `ltmp`.

    Args:
        depth: number of blocks, L.
        config: the variant and its settings.
    """

    @property
    def masks(self) -> bool:
        """Whether gradients are to reach the decisions, so that tokens are masked instead of removed.

        So it is in train mode where a threshold requires a gradient; attaching leaves them frozen.
        """
        return self.training and any(parameter.requires_grad for parameter in self.parameters())

    def __init__(self, depth: int, config: LTMPConfig) -> None:
        super().__init__()
        self.config = config
        self.depth = depth

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by `torch.jit.script`, which compiles the code of a host and sees nothing that stands in for it."""
        raise LTMPError(
            "torch.jit.script cannot compile a model that ltmp is attached to: call ltmp.detach(model) first, or write "
            "it reduced with ltmp.export.export(model, ...) or `ltmp export`"
        )

    @abstractmethod
    def on(self) -> Tensor:
        """bool [L, 2] on the device, whether the merge and the prune step of each block can select anything."""

    @abstractmethod
    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        """Like `select`, without regard to floor and ceiling."""

    def active(self) -> Active:
        """`on` for the host, with one read of the device."""
        return tuple((merge, prune) for merge, prune in self.on().tolist())

    def steps(self, active: Active, block: int) -> tuple[str, ...]:
        """The steps that can select something in `block`, given `active()`'s answer for all blocks."""
        merge, prune = active[block]
        return tuple(step for step in self.config.steps if (merge if step == "merge" else prune))

    def empties(self, block: int) -> bool:
        """Whether `block` prunes every token that is not protected."""
        return bool(self.emptied()[block])

    def emptied(self) -> Tensor:
        """`empties` of all blocks, bool [L] on the device."""
        return torch.zeros_like(self.on()[:, 0])

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

    def stored(self) -> tuple[str, ...]:
        """Names of all that its state dict may hold."""
        return tuple(self.state_dict())

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
