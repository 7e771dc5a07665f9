"""The one class that takes the place of a host's blocks and runs them with reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .engines import masked, select
from .errors import LTMPError
from .flops import Geometry, flops_share
from .thresholds import Thresholds

if TYPE_CHECKING:
    from .models.recipe import Recipe


@dataclass
class Record:
    """Statistics of the calls made inside `record()`.

    Attributes:
        kept: one [B, L] tensor a call, tokens after each block.
        geometry: one a call; shares follow from both.
    """

    kept: list[Tensor] = field(default_factory=list)
    geometry: list[Geometry] = field(default_factory=list)

    def add(self, kept: Tensor, geometry: Geometry) -> None:
        self.kept.append(kept)
        self.geometry.append(geometry)

    def share(self) -> Tensor:
        """[images], FLOPs share of every image of every call."""
        return torch.cat([flops_share(k, g) for k, g in zip(self.kept, self.geometry, strict=True)])


_RECORD: ContextVar[Record | None] = ContextVar("ltmp_record", default=None)
_DENSE: ContextVar[bool] = ContextVar("ltmp_dense", default=False)


@contextmanager
def record() -> Iterator[Record]:
    """Collect token counts of the reduced models called inside, in this thread only.

    >>> with ltmp.record() as calls:
    ...     logits = model(images)
    >>> calls.share().mean()
    """
    calls = Record()
    token = _RECORD.set(calls)
    try:
        yield calls
    finally:
        _RECORD.reset(token)


@contextmanager
def dense() -> Iterator[None]:
    """Run attached models as if nothing were attached, inside and in this thread only: the baseline of a comparison."""
    token = _DENSE.set(True)
    try:
        yield
    finally:
        _DENSE.reset(token)


def recording() -> Record | None:
    """The record that calls of this thread go to, if any."""
    return _RECORD.get()


def is_dense() -> bool:
    """Whether this thread is inside `dense()`."""
    return _DENSE.get()


class ReducedStack(nn.ModuleList):
    """The host's own blocks under their own names, run with token reduction between attention and MLP.

    Checkpoints of the host still load. Called like the container it replaces; iterating gives one callable that runs
    everything, because some hosts loop over their blocks.
    """

    def __init__(
        self, blocks: nn.Module, recipe: Recipe, thresholds: Thresholds, protected: int, host: nn.Module
    ) -> None:
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)
        self.recipe = recipe
        self.protected = protected
        # tuples: known here, registered elsewhere
        self._original = (blocks,)
        self._thresholds = (thresholds,)
        self._host = (host,)
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
    def thresholds(self) -> Thresholds:
        return self._thresholds[0]

    @contextmanager
    def using(self, thresholds: Thresholds) -> Iterator[None]:
        """Decide by other thresholds inside (calibration, comparisons); not for models that other threads call."""
        mine, self._thresholds = self._thresholds, (thresholds,)
        try:
            yield
        finally:
            self._thresholds = mine

    @property
    def grad_checkpointing(self) -> bool:
        """Whether the host asked to recompute blocks in backward."""
        return bool(getattr(self.host, "grad_checkpointing", False))

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

        Returns:
            [B, N', C]; `sizes_of` tells the pooling how many patches each row stands for.
        """
        for name, value in [*enumerate(args), *kwargs.items()]:
            if value is not None and value is not False:
                raise NotImplementedError(
                    f"a reduced model does not take {name!r} in its blocks (attention masks are not supported): "
                    "call ltmp.detach(model) for this"
                )
        thresholds = self.thresholds
        active = select.active(thresholds)
        calls = _RECORD.get()
        if thresholds.training:
            # a threshold that selects nothing today may learn to
            active = ((True, True),) * thresholds.depth
        nothing = x.shape[0] == 0 or not any(merge or prune for merge, prune in active)
        if _DENSE.get() or nothing:
            for block in self.blocks:
                x = block(x)
            if calls is not None:
                kept = torch.full((x.shape[0], thresholds.depth), float(x.shape[1]), device=x.device)
                calls.add(kept, self.geometry(x.shape[1], x.shape[2]))
            return with_sizes(x, None)
        run = masked.run if thresholds.training else select.engine(thresholds.config.engine, x.device)
        reduced = run(self, x, active)
        if calls is not None:
            calls.add(reduced.kept, self.geometry(x.shape[1], x.shape[2]))
        return with_sizes(reduced.x, reduced.size)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:  # type: ignore[override]
        return iter((self.forward,))


def with_sizes(x: Tensor, size: Tensor | None) -> Tensor:
    """`x` with its sizes attached: pooling happens in the host's own code, and they must reach it call by call.

    None says that every row is one patch.
    """
    x.ltmp_size = size  # type: ignore[attr-defined]
    return x


def sizes_of(x: Tensor) -> Tensor | None:
    """The sizes that `with_sizes` attached.

    Raises:
        LTMPError: none were, so that nobody knows which rows are there: `x` was cut or copied on its way.
    """
    if not hasattr(x, "ltmp_size"):
        raise LTMPError(
            "the sizes of these tokens got lost between the blocks and the pooling: give forward_head what "
            "forward_features returned, unchanged, or call ltmp.detach(model)"
        )
    return x.ltmp_size


def carry_sizes(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the norm between blocks and pooling: sizes go on with the tokens."""
    if hasattr(inputs[0], "ltmp_size"):
        with_sizes(output, inputs[0].ltmp_size)
