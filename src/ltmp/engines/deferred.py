"""Features that are computed when somebody reads them: most of what blocks hand out only goes to the next block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_KNOWN = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
"""What can be asked of a tensor without reading it."""


class Deferred(Tensor):
    """A tensor without memory that is replaced by the one it stands for wherever an operator takes it.

    Use `defer` to make one.
    """

    _compute: Callable[[], Tensor]
    _found: Tensor | None

    def read(self) -> Tensor:
        """The tensor it stands for, with the attributes that this one was given; computed once."""
        if self._found is None:
            self._found = self._compute()
            given = {name: value for name, value in vars(self).items() if name not in ("_compute", "_found")}
            vars(self._found).update(given)
            self._compute = _computed
        return self._found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(read, (args, kwargs or {}))
        return func(*args, **kwargs)

    # torch types it as a plain method, and calls it as a class method
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Operators that C++ calls."""
        return cls.__torch_function__(func, types, args, kwargs)


def defer(compute: Callable[[], Tensor], like: Tensor) -> Tensor:
    """A tensor of the shape, type and device of `like`, whose values `compute` gives when they are read."""
    found = Tensor._make_wrapper_subclass(Deferred, like.shape, dtype=like.dtype, device=like.device)
    found._compute, found._found = compute, None
    return found


def read(value: Any) -> Any:
    """What a deferred tensor stands for, and any other value itself."""
    return value.read() if type(value) is Deferred else value


def _computed() -> Tensor:
    raise AssertionError("computed already")
