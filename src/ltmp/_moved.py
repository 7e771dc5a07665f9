"""Old names of modules, which still import for one release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_RENAMED: dict[str, str] = {
    "context": "calls",
    "probe": "method.thresholds",
    **{name: f"method.{name}" for name in ("flops", "policy", "rates", "reduction", "scores", "thresholds", "tokens")},
    "models": "hosts.attach",
    "models.recipe": "method.recipe",
    "models.build": "zoo.build",
    "models.hugging_face": "zoo.hugging_face",
    "models.libraries": "zoo.libraries",
    "models.registry": "zoo.timm_names",
    **{
        f"models.{name}": f"hosts.{name}"
        for name in (
            "eva", "mha", "naflex", "open_clip", "outputs", "pooling", "rotary", "timm", "torchvision",
            "transformers",
        )
    },
    "evaluate.report": "evaluate.tables",
    "evaluate.throughput": "evaluate.timing",
    "learning.run": "learning.optimiser",
    "learning.views": "learning.batches",
    "serve.app": "serve.endpoints",
    "serve.reading": "serve.bodies",
}  # fmt: skip

MOVED: dict[str, tuple[str, ...]] = {
    **{old: (new,) for old, new in _RENAMED.items()},
    "dial": ("method.dial", "method.thresholds"),
    "sources": ("calls", "method.tokens"),
    "stack": ("hosts.sizes",),
}
"""Old module names, and the modules in which their contents are now, relative to `ltmp`."""

MOVED_NAMES: dict[str, dict[str, str]] = {
    "checkpoint": {
        "plain_state": "zoo.build",
        "save_weights": "zoo.build",
        "split_seed_state": "checkpoint.contents",
    },
}
"""For modules that still exist: names that moved out of them, and the modules in which they are now."""


def names_moved_from(module: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for `ltmp.MODULE` that finds the names that moved out of it.

    Like `MovedModules`, it imports the new module only when a name is looked up: it may be in a higher layer.
    """

    def get(name: str) -> Any:
        new = MOVED_NAMES[module].get(name)
        if new is None:
            raise AttributeError(f"module '{__package__}.{module}' has no attribute {name!r}")
        old_name, new_module = f"{__package__}.{module}.{name}", f"{__package__}.{new}"
        warnings.warn(f"{old_name} has moved: import it from {new_module}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(new_module), name)

    return get


class MovedModules(MetaPathFinder, Loader):
    """Imports a module by its old name, with the contents of all modules that it became."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=name == "models")

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = [f"{__package__}.{name}" for name in MOVED[spec.name.partition(".")[2]]]
        warnings.warn(f"{spec.name} has moved: import {' or '.join(new)} instead", DeprecationWarning, stacklevel=2)
        modules = [importlib.import_module(name) for name in new]
        # a separate module object: the import system sets its attributes, and the real module must keep its name
        alias = ModuleType(spec.name, modules[0].__doc__)
        for module in reversed(modules):
            alias.__dict__.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: `create_module` has filled the module."""


def install() -> None:
    """Register the finder after all others, so that existing modules take precedence."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
