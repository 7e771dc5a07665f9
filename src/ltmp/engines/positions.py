"""Places of tokens that attention itself must know (rotary embeddings), gathered with the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..method.recipe import Recipe, Rotary


@dataclass(frozen=True)
class Positions:
    """Positions that a host passes to its blocks with a batch; a merged token keeps its receiver's.

    Attributes:
        rotary: how this host turns queries and keys.
        value: what it gave its blocks.
        table: [N, E], a row for each token of the input, or [L, N, E] where each block has rows of its own.
    """

    rotary: Rotary
    value: Any
    table: Tensor

    def rotate(self, i: int, block: nn.Module, q: Tensor, k: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """q and k [..., H, D] of block `i` as the softmax sees them.

        Args:
            origin: int [...], the places where the tokens entered the first block. Spare rows of a batch at fixed size
                hold any number there, and are told the nearest place.
        """
        table = self.table if self.table.ndim == 2 else self.table[i]
        return self.rotary.rotate(block, q, k, table[origin.long().clamp(0, len(table) - 1)])

    def argument(self, i: int) -> dict[str, Any]:
        """The arguments that the host would call block `i` with."""
        names = self.rotary.names
        values = self.value if len(names) > 1 else (self.value,)
        return {name: self.rotary.own(value, i) for name, value in zip(names, values, strict=False)}


def positions_of(
    recipe: Recipe, host: nn.Module, tokens: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Positions | None:
    """The positions of `tokens` in the arguments that `host` calls its blocks with.

    Raises:
        NotImplementedError: it says more than that.
    """
    rotary = recipe.rotary
    names = () if rotary is None else rotary.names
    for name, value in [*enumerate(args), *kwargs.items()]:
        if name not in names and recipe.refuses(value):
            raise NotImplementedError(
                f"a reduced model does not take {name!r} in its blocks (attention masks are not supported): "
                "call it inside `with ltmp.dense():`, or call ltmp.detach(model) for this"
            )
    values = tuple(kwargs.get(name) for name in names)
    if rotary is None or any(value is None for value in values):
        return None
    given = values if len(values) > 1 else next(iter(values), None)
    return Positions(rotary, given, rotary.table(host, given, tokens))
