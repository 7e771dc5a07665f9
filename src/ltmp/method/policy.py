"""The interface of learned thresholds and fixed rates: which tokens a block merges and prunes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..config import LTMPConfig
from ..errors import LTMPError, UsageError
from .facts import policy_repr

Active = tuple[tuple[bool, bool], ...]
"""For each block, whether its merge and its prune step can select anything."""

P = TypeVar("P", bound="Policy")


class Policy(nn.Module, ABC):
    """Selects the tokens that each block removes; `model.ltmp` of an attached model.

    Args:
        depth: number of blocks, L.
        config: the variant and its settings.

    Attributes:
        trains: whether `requires_grad_(True)` of the policy itself was called, see `masks`.
        recorded_metadata: metadata for `ltmp.save`, see `ltmp.checkpoint.describe`.
        forms: the values of `tokens` that the host supports, its default first; set by `attach`.
    """

    def __init__(self, depth: int, config: LTMPConfig) -> None:
        super().__init__()
        self.config = config
        self.depth = depth
        self.trains = False
        self.recorded_metadata: Any = None
        self.forms: tuple[str, ...] = ("reduced",)

    @property
    def tokens(self) -> str:
        """What the host receives after its last block, one of `config.FORMS`. Can be set, and is saved with the config.

        Raises:
            UsageError: when set to a form that the host does not support.
        """
        return self.config.tokens or self.forms[0]

    @tokens.setter
    def tokens(self, form: str) -> None:
        if form not in self.forms:
            raise UsageError(f"tokens={form!r} does not suit this host: expected {' or '.join(map(repr, self.forms))}")
        self.config = replace(self.config, tokens=form)

    def requires_grad_(self: P, requires_grad: bool = True) -> P:
        """Train the thresholds, or freeze them again."""
        self.trains = requires_grad
        return super().requires_grad_(requires_grad)

    @property
    def masks(self) -> bool:
        """Whether gradients are to reach the decisions, so that tokens are masked instead of removed.

        True in train mode after `requires_grad_(True)` of the policy itself. Unfreezing the whole model with
        `model.requires_grad_(True)` has no effect: thresholds get no gradient, and optimisers leave them unchanged.
        """
        return self.training and self.trains and any(parameter.requires_grad for parameter in self.parameters())

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse `torch.jit.script`, which calls this: it would compile the host's own code, without reduction."""
        raise LTMPError(
            "torch.jit.script cannot compile a model that ltmp is attached to: call ltmp.detach(model) first, or write "
            "it reduced with ltmp.export.export(model, ...) or `ltmp export`"
        )

    @abstractmethod
    def on(self) -> Tensor:
        """Whether the merge and the prune step of each block can select anything: bool [L, 2] on the device."""

    @abstractmethod
    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        """Select tokens as `select` does, before floor and ceiling are applied."""

    def active(self) -> Active:
        """`on` as Python values, in one read of the device."""
        return tuple((merge, prune) for merge, prune in self.on().tolist())

    def steps(self, active: Active, block: int) -> tuple[str, ...]:
        """The steps that can select something in `block`, in order; `active` is the result of `active()`."""
        merge, prune = active[block]
        return tuple(step for step in self.config.steps if (merge if step == "merge" else prune))

    def prunes_all(self, block: int) -> bool:
        """Whether `block` prunes every unprotected token."""
        return bool(self.pruned_whole()[block])

    def pruned_whole(self) -> Tensor:
        """`prunes_all` of every block, bool [L] on the device."""
        return torch.zeros_like(self.on()[:, 0])

    def size_power(self, block: int) -> float:
        """Power of a token's size in `block`'s attention, see `config.Scores.size_power`."""
        first = self.config.scores.size_power
        return first + (1 - first) * block / max(1, self.depth - 1)

    def weight(self, block: int, size: Any) -> Any:
        """Weight in `block`'s attention of tokens of these sizes, a tensor or a NumPy array of any shape."""
        return size if self.config.scores.size_power == 1 else size ** self.size_power(block)

    def class_power(self, block: int) -> float:
        """Power of class-token attention in `block`, see `config.Scores.class_power`."""
        return self.config.scores.class_power * (block + 1) / self.depth

    def probed(self, block: int, x: Tensor) -> Tensor | None:
        """float32 [..., WIDTH + 2], the probe of `block` applied to its features x [..., C] after attention.

        None if the scores need no probe. See `ops.probe.reference.probe`.
        """
        return None

    def extra_repr(self) -> str:
        return policy_repr(self)

    @property
    def bounded(self) -> bool:
        """Whether a floor or a ceiling may overrule a decision."""
        return self.config.floor > 0 or self.config.ceiling is not None

    def select(self, step: str, block: int, score: Tensor, free: Tensor, tokens: Tensor) -> Tensor:
        """Select the tokens that merge, or those that pruning keeps.

        Args:
            step: "merge", "prune" or "fuse".
            score: float32 [B, M], the score of each token with its best partner, or its importance.
            free: bool [B, M], tokens that the step may remove.
            tokens: [B], the current number of tokens of each image.

        Returns:
            float32 [B, M], 1 if selected and 0 if not; carries the threshold's gradient.
        """
        decision = self.decide(step, block, score, free)
        if not self.bounded:
            return decision
        merges = step == "merge"
        # how many tokens the step may remove at most, and must remove at least
        most = (tokens - self.config.floor).clamp(min=0)
        least = torch.zeros_like(most)
        if self.config.ceiling is not None and step == self.config.steps[-1]:
            least = (tokens - self.config.ceiling).clamp(min=0)
        # merging selects the tokens that go, pruning those that stay
        turn = rank(score if merges else -score, free)
        goes = (decision.detach() > 0) == merges
        goes = free & (turn < most[:, None]) & (goes | (turn < least[:, None]))
        bounded = (goes == merges).to(decision.dtype)
        return decision + (bounded - decision).detach()


def rank(score: Tensor, free: Tensor) -> Tensor:
    """int64 [B, M], rank of each free token by descending score, ties in order; M for tokens that are not free."""
    order = score.masked_fill(~free, float("-inf")).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks).masked_fill_(~free, score.shape[1])
