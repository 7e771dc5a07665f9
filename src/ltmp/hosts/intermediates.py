"""Looking between the blocks of a reduced host."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..calls import unmerge


class Unmerged:
    """Stands in for a method of the host that loops over its blocks: each hands out every patch, in its place.

    Args:
        host: an attached transformer.
        method: the name of the method, run as the host's class has it.
    """

    def __init__(self, host: nn.Module, method: str) -> None:
        self.host, self.method = host, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with unmerge():
            return getattr(type(self.host), self.method)(self.host, *args, **kwargs)
