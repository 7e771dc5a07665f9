"""The one class that takes the place of a host's blocks and runs them with reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..calls import is_dense, recording, tracing, unmerging
from ..engines import masked, select
from ..engines.blockwise import Blockwise
from ..engines.positions import Positions, positions_of
from ..engines.request import Active
from ..engines.state import Reduced
from ..method.flops import Geometry
from ..method.policy import Policy
from .sizes import with_sizes

if TYPE_CHECKING:
    from ..method.recipe import Recipe


class ReducedStack(nn.ModuleList):
    """The host's own blocks under their own names, run with token reduction between attention and MLP.

    Checkpoints of the host still load. Called like the container it replaces; iterating gives one callable that runs
    everything, because some hosts loop over their blocks. Inside `unmerge()` it gives one callable a block.

    Attributes:
        overridden: dotted path to value, what attributes of the host's parts held that others stand in for.
    """

    def __init__(self, blocks: nn.Module, recipe: Recipe, thresholds: Policy, protected: int, host: nn.Module) -> None:
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)
        self.recipe = recipe
        self.protected = protected
        # tuples: known here, registered elsewhere
        self._original = (blocks,)
        self._thresholds = (thresholds,)
        self._host = (host,)
        self.overridden: dict[str, Any] = {}
        self.hooks: list[RemovableHandle] = []
        self.training = blocks.training

    @property
    def original(self) -> nn.Module:
        """The container this one stands in for."""
        return self._original[0]

    @property
    def host(self) -> nn.Module:
        """The transformer whose blocks these are."""
        return self._host[0]

    @property
    def thresholds(self) -> Policy:
        return self._thresholds[0]

    @contextmanager
    def using(self, thresholds: Policy) -> Iterator[None]:
        """Decide by other thresholds inside (calibration, comparisons); not for models that other threads call."""
        mine, self._thresholds = self._thresholds, (thresholds,)
        try:
            yield
        finally:
            self._thresholds = mine

    @property
    def grad_checkpointing(self) -> bool:
        """Whether the host asked to recompute blocks in backward."""
        return self.recipe.grad_checkpointing(self.host)

    @property
    def prefix_only(self) -> bool:
        """Whether the host's head reads the prefix tokens alone: after the last attention no other token matters."""
        return self.recipe.prefix_only(self.host)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self._modules.values())

    def geometry(self, tokens: int, width: int) -> Geometry:
        """What an image of `tokens` tokens costs here."""
        return Geometry(tokens, width, tuple(self.recipe.mlp_ratio(block) for block in self.blocks))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run all blocks.

        Args:
            x: [B, N, C] embedded tokens, prefix tokens first.
            args, kwargs: what the host gives its blocks besides: positions that the recipe knows, or nothing.

        Returns:
            [B, N', C]; `sizes_of` tells the pooling how many patches each row stands for.

        Raises:
            NotImplementedError: the host asks its blocks for what a reduced model cannot do.
        """
        if unmerging():
            for block in self:
                x = block(x, *args, **kwargs)
            return x
        positions = self.positions(x, args, kwargs)
        active = self.active(x)
        if select.needed(active):
            thresholds = self.thresholds
            run = masked.run if thresholds.training else select.engine(thresholds.config.engine, x.device)
            reduced = run(self, x, active, positions)
            self.note(x, reduced)
            return with_sizes(reduced.x, reduced.size)
        given = x
        for i in range(len(active)):
            x = self.whole(i, x, positions)
        if recording() is not None or tracing() is not None:
            self.note(given, Reduced.whole(x, len(active)))
        return with_sizes(x, None)

    def active(self, x: Tensor) -> Active:
        """For each block whether merging and pruning can select anything of `x`; nothing inside `dense()`."""
        thresholds = self.thresholds
        if is_dense() or x.shape[0] == 0:
            return ((False, False),) * thresholds.depth
        active = select.active(thresholds)
        # a threshold that selects nothing today may learn to
        return ((True, True),) * thresholds.depth if thresholds.training and thresholds.learns else active

    def note(self, x: Tensor, reduced: Reduced) -> None:
        """Tell `record()` and `trace()` what became of a call with `x` [B, N, C]."""
        calls, traced = recording(), tracing()
        if calls is not None:
            calls.add(reduced.kept, self.geometry(x.shape[1], x.shape[2]))
        if traced is not None and reduced.source is not None:
            traced.add(reduced.source, reduced.trail or ())

    def positions(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Positions | None:
        """What the host says of the places of x [B, N, C] when it calls its blocks."""
        return positions_of(self.recipe, self.host, x.shape[1], args, kwargs)

    def whole(self, block: int, x: Tensor, positions: Positions | None) -> Tensor:
        """The host's own block on [B, N, C] of which nothing was reduced yet."""
        place = {} if positions is None else positions.argument(block)
        return self.blocks[block](x, **self.recipe.arguments, **place)

    def _one_by_one(self) -> list[Callable[..., Tensor]]:
        """One callable a block, each from every patch in its place to every patch in its place."""
        way = Blockwise(self)
        return [partial(_call_one, way, i) for i in range(self.thresholds.depth)]

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:  # type: ignore[override]
        return iter(self._one_by_one() if unmerging() else (self.__call__,))

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._one_by_one()[index] if unmerging() else super().__getitem__(index)


def _call_one(way: Blockwise, i: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return with_sizes(way(i, x, way.stack.positions(x, args, kwargs)), None)
