"""Teach timm the method's names without importing either: it is told when it is imported, and asks when one is used.

A name of ours is found where timm looks it up, and is in its lists only where a filter begins as our names do:
`timm.list_models("ltmp_*")`. Nothing is registered, so that nobody else's lists change, and no time is lost.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .prefixes import PREFIXES

_LISTED = ContextVar("_LISTED", default=False)


class Entrypoints(dict[str, Callable[..., Any]]):
    """timm's entrypoints by name, which also has ours; they are built when asked for, and listed only on request."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or self._ours(name) is not None

    def __missing__(self, name: str) -> Callable[..., Any]:
        found = self._ours(name)
        if found is None:
            raise KeyError(name)
        return found

    def keys(self) -> Any:
        """All names while ours are listed, or else timm's."""
        if not _LISTED.get():
            return super().keys()
        from .timm_names import names

        return super().keys() | names(self)

    def _ours(self, name: object) -> Callable[..., Any] | None:
        if not (isinstance(name, str) and name.startswith(PREFIXES)):
            return None
        from .timm_names import entrypoint

        return entrypoint(name, self)


def install() -> None:
    """Teach timm if it is imported, or else as soon as it is; `import ltmp` alone imports no timm."""
    if "timm" in sys.modules:
        _teach()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


def _teach() -> None:
    import timm
    from timm.models import _registry

    if isinstance(_registry._model_entrypoints, Entrypoints):
        return
    _registry._model_entrypoints = Entrypoints(_registry._model_entrypoints)
    plain = _registry.list_models

    @wraps(plain)
    def list_models(filter: Any = "", *args: Any, **kwargs: Any) -> list[str]:
        filters = [filter] if isinstance(filter, str) else list(filter or ())
        with _listed(any(one.startswith(PREFIXES) for one in filters)):
            return plain(filter, *args, **kwargs)

    modules: tuple[Any, ...] = (timm, timm.models, _registry)
    for module in modules:
        module.list_models = list_models


@contextmanager
def _listed(ours: bool) -> Iterator[None]:
    token = _LISTED.set(ours)
    try:
        yield
    finally:
        _LISTED.reset(token)


class _TimmFinder(importlib.abc.MetaPathFinder):
    """Finds timm as everybody else does, and has it taught right after it was imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                spec.loader = _TimmLoader(spec.loader, self)
                return spec
        return None


class _TimmLoader(importlib.abc.Loader):
    """timm's own loader, but for what happens afterwards."""

    def __init__(self, loader: importlib.abc.Loader, finder: _TimmFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # resources, source and pickling ask the module for its loader: leave no trace there
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _teach()
