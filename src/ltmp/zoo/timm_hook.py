"""Make timm find the method's model names, without importing timm or building anything before they are used.

timm is patched when it is imported. Our names are then found in its look-ups, and listed only if a filter starts with
one of our prefixes, as in `timm.list_models("ltmp_*")`. They are not registered, so other listings stay the same, and
importing costs no time.
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
    """timm's entrypoints by name, and ours, which are created on look-up and listed only on request."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or self._find(name) is not None

    def __missing__(self, name: str) -> Callable[..., Any]:
        entrypoint = self._find(name)
        if entrypoint is None:
            raise KeyError(name)
        return entrypoint

    def keys(self) -> Any:
        """timm's names, and ours inside `_listed(True)`."""
        if not _LISTED.get():
            return super().keys()
        from .timm_names import names

        return super().keys() | names(self)

    def _find(self, name: object) -> Callable[..., Any] | None:
        if not (isinstance(name, str) and name.startswith(PREFIXES)):
            return None
        from .timm_names import entrypoint

        return entrypoint(name, self)


def install() -> None:
    """Patch timm now if it is imported, else when it will be; `import ltmp` alone does not import timm."""
    if "timm" in sys.modules:
        _patch()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


def _patch() -> None:
    import timm
    from timm.models import _registry

    if isinstance(_registry._model_entrypoints, Entrypoints):
        return
    _registry._model_entrypoints = Entrypoints(_registry._model_entrypoints)
    original = _registry.list_models

    @wraps(original)
    def list_models(filter: Any = "", *args: Any, **kwargs: Any) -> list[str]:
        filters = [filter] if isinstance(filter, str) else list(filter or ())
        with _listed(any(pattern.startswith(PREFIXES) for pattern in filters)):
            return original(filter, *args, **kwargs)

    modules: tuple[Any, ...] = (timm, timm.models, _registry)
    for module in modules:
        module.list_models = list_models


@contextmanager
def _listed(ours: bool) -> Iterator[None]:
    """Inside, and in this thread only, list our names too if `ours`."""
    token = _LISTED.set(ours)
    try:
        yield
    finally:
        _LISTED.reset(token)


class _TimmFinder(importlib.abc.MetaPathFinder):
    """Finds timm through the other finders, and patches it after it was imported."""

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
    """timm's own loader, followed by `_patch`."""

    def __init__(self, loader: importlib.abc.Loader, finder: _TimmFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # resources, inspect.getsource and pickling use the module's loader: restore the original one
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _patch()
