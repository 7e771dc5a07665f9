"""Positions that attention itself needs (rotary embeddings), gathered along with the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..method.recipe import Recipe, Rotary


@dataclass(frozen=True)
class Positions:
    """Positions that a host passes to its blocks with a batch; a merged token has the position of its receiver.

    Attributes:
        rotary: how the host rotates queries and keys.
        value: the position argument that the host passes, or a tuple of several.
        table: [N, E], one row per input token, or [L, N, E] if each block has rows of its own.
    """

    rotary: Rotary
    value: Any
    table: Tensor

    def rotate(self, i: int, block: nn.Module, q: Tensor, k: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k [..., H, D] of block `i`.

        Args:
            origin: int [...], place of each token in the input of the first block. Spare rows of a batch at fixed
                capacity have arbitrary values, which are clamped to valid places.
        """
        table = self.table if self.table.ndim == 2 else self.table[i]
        return self.rotary.rotate(block, q, k, table[origin.long().clamp(0, len(table) - 1)])

    def argument(self, i: int) -> dict[str, Any]:
        """Return the position arguments that the host would pass to block `i`."""
        names = self.rotary.names
        values = self.value if len(names) > 1 else (self.value,)
        return {name: self.rotary.own(value, i) for name, value in zip(names, values, strict=False)}


def positions_of(
    recipe: Recipe, host: nn.Module, tokens: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Positions | None:
    """Extract the positions of `tokens` tokens from the arguments that `host` passes to its blocks, None without any.

    Raises:
        NotImplementedError: there are other arguments that a reduced model does not support.
    """
    rotary = recipe.rotary
    names = () if rotary is None else rotary.names
    for name, argument in [*enumerate(args), *kwargs.items()]:
        if name not in names and recipe.refuses(argument):
            raise NotImplementedError(
                f"a reduced model does not take {name!r} in its blocks (attention masks are not supported): "
                "call it inside `with ltmp.dense():`, or call ltmp.detach(model) for this"
            )
    values = tuple(kwargs.get(name) for name in names)
    if rotary is None or any(value is None for value in values):
        return None
    value = values if len(values) > 1 else next(iter(values), None)
    return Positions(rotary, value, rotary.table(host, value, tokens))
