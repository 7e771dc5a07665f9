"""Tensors that are computed when they are read: most features between blocks never are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_METADATA = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
"""Attributes and methods of tensors that need no values."""


class Deferred(Tensor):
    """A tensor without memory; operators receive the tensor that it stands for instead. Made by `defer`."""

    _compute: Callable[[], Tensor]
    _result: Tensor | None

    def read(self) -> Tensor:
        """Return the tensor that this one stands for, with the attributes set on this one; computed once."""
        if self._result is None:
            self._result = self._compute()
            attributes = {name: value for name, value in vars(self).items() if name not in ("_compute", "_result")}
            vars(self._result).update(attributes)
            # frees what the function refers to
            self._compute = _computed
        return self._result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(read, (args, kwargs or {}))
        return func(*args, **kwargs)

    # torch declares it as an instance method but calls it as a class method
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Handle operators called from C++."""
        return cls.__torch_function__(func, types, args, kwargs)


def defer(compute: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Return a tensor with shape, dtype and device of `like`, whose values `compute` returns when they are read."""
    deferred = Tensor._make_wrapper_subclass(Deferred, like.shape, dtype=like.dtype, device=like.device)
    deferred._compute, deferred._result = compute, None
    return deferred


def read(value: Any) -> Any:
    """Return the tensor that a deferred one stands for; any other value is returned as it is."""
    return value.read() if type(value) is Deferred else value


def _computed() -> Tensor:
    raise AssertionError("computed already")
