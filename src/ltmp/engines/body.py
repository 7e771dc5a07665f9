"""What an engine sees of a model: its blocks, and the policy that decides which tokens to remove."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..calls import is_dense, recomputing, recording, set_in_context, tracing, unmerging
from ..errors import LTMPError
from ..method.flops import Geometry
from ..method.policy import Active, Policy
from ..method.recipe import Recipe
from .positions import Positions
from .segments import Segments
from .state import Reduced


class Memory(dict[Any, Any]):
    """A cache that lives as long as its body and may refer back to it; a copied or pickled one is empty."""

    def __reduce__(self) -> Any:
        return Memory, ()


@dataclass(frozen=True, eq=False)
class Body:
    """The blocks of an attached transformer. Frozen, so that calls share no state.

    Attributes:
        blocks: the host's own blocks, in order.
        recipe: how the blocks are built.
        policy: decides which tokens to remove.
        protected: number of prefix tokens, which are never removed.
        host: the transformer.
        memory: cached facts about the blocks, see `plain.look`.
    """

    blocks: tuple[nn.Module, ...]
    recipe: Recipe
    policy: Policy
    protected: int
    host: nn.Module
    memory: Memory = field(default_factory=Memory, repr=False)

    @property
    def depth(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)

    @property
    def grad_checkpointing(self) -> bool:
        """Whether the host uses gradient checkpointing, i.e. recomputes its blocks in the backward pass."""
        return self.recipe.grad_checkpointing(self.host)

    @property
    def prefix_only(self) -> bool:
        """Whether the head reads prefix tokens only: no other token matters after the last attention."""
        return self.recipe.prefix_only(self.host)

    @property
    def tokens(self) -> str:
        """Form of the tokens that the host receives after its blocks, see `config.FORMS`."""
        return self.policy.config.tokens or self.recipe.forms[0]

    @property
    def grid(self) -> bool:
        """Whether every patch keeps its place after each block, because the host reads patches by place."""
        return unmerging() or self.tokens != "reduced"

    @property
    def first(self) -> int:
        """Index of the first block that may remove tokens."""
        return [*(self.recipe.reduces(self.host) or (True,)), True].index(True)

    def geometry(self, tokens: int, width: int, each: tuple[int, ...] | None = None) -> Geometry:
        """Geometry of images of `tokens` tokens, or of images of different lengths, given by `each`.

        Raises:
            LTMPError: the cost of an MLP is unknown, as none of its layers has in_features and out_features.
        """
        ratios = tuple(self.recipe.mlp_ratio(block) for block in self.blocks)
        if not all(ratios):
            raise LTMPError(
                f"cannot count the FLOPs of block {ratios.index(0)}: its MLP holds no layer with in_features and "
                "out_features; count before its layers are replaced"
            )
        return Geometry(tokens, width, ratios, each)

    def active(self) -> Active:
        """For each block, whether merging and pruning can select any token now; always False inside `dense()`."""
        if is_dense():
            return ((False, False),) * self.depth
        active = self.policy.active()
        if self.policy.masks:
            # training may move a threshold that selects nothing yet
            active = ((True, True),) * self.depth
        reducible = self.recipe.reduces(self.host)
        if reducible is not None:
            active = tuple((merge and on, prune and on) for (merge, prune), on in zip(active, reducible, strict=True))
        return self.keep_last_patches(active) if active[-1][1] and self._patches_are_read else active

    def keep_last_patches(self, active: Active) -> Active:
        """Return `active` without the last block's pruning if it drops every patch.

        Such a threshold was learned for a head that reads no patches; it must not apply when they are read.
        """
        return (*active[:-1], (active[-1][0], False)) if self.policy.prunes_all(-1) else active

    @property
    def _patches_are_read(self) -> bool:
        """Whether anything reads patches after the last block."""
        return self.grid or not self.prefix_only

    def active_on_device(self) -> Tensor:
        """`active` of a deployed policy as a bool tensor [L, 2] on the device, computed without a synchronization."""
        active = self.policy.on()
        if self._patches_are_read:
            active = active.clone()
            active[-1, 1] &= ~self.policy.pruned_whole()[-1]
        return active

    def reduces(self) -> bool:
        """Whether a call may remove tokens now; if not, it computes what the host alone would."""
        return not is_dense() and (running_engine() is not None or any(map(any, self.active())))

    def dense_block(self, i: int, x: Tensor, positions: Positions | None) -> Tensor:
        """Run the host's own block `i` on [B, N, C] of which nothing was removed yet."""
        place = {} if positions is None else positions.argument(i)
        block = self.blocks[i]
        return type(block).forward(block, x, **self.recipe.arguments, **place)

    def dense_blocks(self, x: Tensor, positions: Positions | None) -> Reduced:
        """Run all of the host's own blocks on [B, N, C], without any reduction."""
        for i in range(self.depth):
            x = self.dense_block(i, x, positions)
        return Reduced.dense(x, self.depth)

    def record_call(self, x: Tensor, reduced: Reduced, segments: Segments | None = None) -> None:
        """Add the result of a call to the active `record()` and `trace()`, if any.

        Nothing is added when a backward pass recomputes the call, as the forward pass has added it already.

        Args:
            x: [B, N, C], or the host's features if `segments` locates the images in them.
        """
        calls, traced = (None, None) if recomputing() else (recording(), tracing())
        if calls is not None:
            each = None if segments is None else segments.tokens
            calls.add(reduced.kept, self.geometry(max(each or x.shape[-2:-1]), x.shape[-1], each))
        if traced is not None and reduced.source is not None:
            traced.add(reduced.source, reduced.trail or ())


Run = Callable[[Body, Tensor, Active, "Positions | None"], Reduced]
"""An engine selected by the config: runs all blocks on [B, N, C], given the active steps."""

Engine = Callable[[Body, Tensor, "Positions | None"], Reduced]
"""An engine passed to `running`: runs all blocks on [B, N, C], and decides itself which steps are active."""


@dataclass(frozen=True)
class Running:
    """Overrides of a model's own engine and body in this thread.

    Attributes:
        engine: used even if no threshold is active.
        body: replaces the body of the same host.
    """

    engine: Engine | None = None
    body: Body | None = None


_RUNNING: ContextVar[Running] = ContextVar("ltmp_running", default=Running())  # noqa: B039 - frozen


def running(engine: Engine | None = None, *, body: Body | None = None) -> AbstractContextManager[Running]:
    """Run with another engine, or another body of the same host, inside the context and in this thread only.

    >>> with running(body=replace(body, policy=other)):
    ...     model(images)
    """
    outer = _RUNNING.get()
    return set_in_context(_RUNNING, Running(engine or outer.engine, body or outer.body))


def running_engine() -> Engine | None:
    """Return the engine set by `running` in this thread, or None."""
    return _RUNNING.get().engine


def running_body(own: Body) -> Body:
    """Return the body that replaces `own` in this thread, or `own` itself."""
    other = _RUNNING.get().body
    return other if other is not None and other.host is own.host else own
