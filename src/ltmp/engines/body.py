"""An engine's view of a model: its blocks, and the policy that decides in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..calls import held, is_dense, recomputing, recording, tracing, unmerging
from ..errors import LTMPError
from ..method.flops import Geometry
from ..method.policy import Active, Policy
from ..method.recipe import Recipe
from .positions import Positions
from .segments import Segments
from .state import Reduced


class Memory(dict[Any, Any]):
    """Lives as long as the body, which may be referred to from it; a copy begins anew."""

    def __reduce__(self) -> Any:
        return Memory, ()


@dataclass(frozen=True, eq=False)
class Body:
    """The blocks of an attached transformer. Frozen: a call shares nothing with another.

    Attributes:
        blocks: the host's own, in order.
        recipe: how they are built.
        policy: which of their tokens go.
        protected: number of prefix tokens.
        host: the transformer.
        memory: what engines know of the blocks, see `plain.look`.
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
        """Whether the host asked to recompute blocks in backward."""
        return self.recipe.grad_checkpointing(self.host)

    @property
    def prefix_only(self) -> bool:
        """Whether the host's head reads the prefix tokens alone: after the last attention no other token counts."""
        return self.recipe.prefix_only(self.host)

    @property
    def tokens(self) -> str:
        """The form of the tokens that the host gets behind its blocks, see `config.FORMS`."""
        return self.policy.config.tokens or self.recipe.forms[0]

    @property
    def grid(self) -> bool:
        """Whether every patch is in its place after each block, for a host that reads them there."""
        return unmerging() or self.tokens != "reduced"

    @property
    def first(self) -> int:
        """The first block that may remove tokens."""
        return [*(self.recipe.reduces(self.host) or (True,)), True].index(True)

    def geometry(self, tokens: int, width: int, each: tuple[int, ...] | None = None) -> Geometry:
        """Geometry of an image of `tokens` tokens, or of images of as many as `each` says.

        Raises:
            LTMPError: the layers of an MLP do not say what they cost.
        """
        ratios = tuple(self.recipe.mlp_ratio(block) for block in self.blocks)
        if not all(ratios):
            raise LTMPError(
                f"cannot count the FLOPs of block {ratios.index(0)}: its MLP holds no layer with in_features and "
                "out_features; count before its layers are replaced"
            )
        return Geometry(tokens, width, ratios, each)

    def active(self) -> Active:
        """For each block whether merging and pruning can select anything now; nothing inside `dense()`."""
        if is_dense():
            return ((False, False),) * self.depth
        active = self.policy.active()
        if self.policy.masks:
            # a threshold that selects nothing today may learn to
            active = ((True, True),) * self.depth
        spared = self.recipe.reduces(self.host)
        if spared is not None:
            active = tuple((merge and on, prune and on) for (merge, prune), on in zip(active, spared, strict=True))
        return self.read_whole(active) if active[-1][1] and self._read_behind else active

    @property
    def _read_behind(self) -> bool:
        """Whether patches are read behind the last block."""
        return self.grid or not self.prefix_only

    def read_whole(self, active: Active) -> Active:
        """`active` where patches are read behind the last block.

        One that drops all of them was learned for a head that reads none; here it prunes nothing.
        """
        return (*active[:-1], (active[-1][0], False)) if self.policy.prunes_all(-1) else active

    def on(self) -> Tensor:
        """`active` bool [L, 2] on the device, as a deployed policy has it."""
        found = self.policy.on()
        if self._read_behind:
            found = found.clone()
            found[-1, 1] &= ~self.policy.pruned_whole()[-1]
        return found

    def reduces(self) -> bool:
        """Whether a call now may remove tokens; if not, the model is the host's own."""
        return not is_dense() and (running_engine() is not None or any(map(any, self.active())))

    def whole(self, i: int, x: Tensor, positions: Positions | None) -> Tensor:
        """The host's own block `i` on [B, N, C] of which nothing was reduced yet."""
        place = {} if positions is None else positions.argument(i)
        block = self.blocks[i]
        return type(block).forward(block, x, **self.recipe.arguments, **place)

    def all_whole(self, x: Tensor, positions: Positions | None) -> Reduced:
        """All of the host's own blocks on [B, N, C]."""
        for i in range(self.depth):
            x = self.whole(i, x, positions)
        return Reduced.whole(x, self.depth)

    def note(self, x: Tensor, reduced: Reduced, images: Segments | None = None) -> None:
        """Tell `record()` and `trace()` what became of a call with `x` [B, N, C], or the rows of `images`.

        A call that a backward pass runs again has been told of.
        """
        calls, traced = (None, None) if recomputing() else (recording(), tracing())
        if calls is not None:
            each = None if images is None else images.tokens
            calls.add(reduced.kept, self.geometry(max(each or x.shape[-2:-1]), x.shape[-1], each))
        if traced is not None and reduced.source is not None:
            traced.add(reduced.source, reduced.trail or ())


Run = Callable[[Body, Tensor, Active, "Positions | None"], Reduced]
"""An engine of the settings: all blocks on [B, N, C], by steps that are known to be active."""

Engine = Callable[[Body, Tensor, "Positions | None"], Reduced]
"""An engine that a caller brings: all blocks on [B, N, C], whichever steps it finds active."""


@dataclass(frozen=True)
class Running:
    """This thread's override of a model's own settings.

    Attributes:
        engine: an engine, taken even where no threshold is on.
        body: what stands in for the body of the same host.
    """

    engine: Engine | None = None
    body: Body | None = None


_RUNNING: ContextVar[Running] = ContextVar("ltmp_running", default=Running())  # noqa: B039 - frozen


def running(engine: Engine | None = None, *, body: Body | None = None) -> AbstractContextManager[Running]:
    """Run by another engine, or another body of the same host, inside and in this thread only.

    >>> with running(body=replace(body, policy=other)):
    ...     model(images)
    """
    outer = _RUNNING.get()
    return held(_RUNNING, Running(engine or outer.engine, body or outer.body))


def running_engine() -> Engine | None:
    """The engine that this thread runs instead of the model's own, if any."""
    return _RUNNING.get().engine


def running_body(own: Body) -> Body:
    """`own`, or what this thread runs in its place."""
    other = _RUNNING.get().body
    return other if other is not None and other.host is own.host else own
