"""Modules under the names that they had before: they import as ever, with a DeprecationWarning, for one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ONE: dict[str, str] = {
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
    **{old: (new,) for old, new in _ONE.items()},
    "dial": ("method.dial", "method.thresholds"),
    "sources": ("calls", "method.tokens"),
    "stack": ("hosts.sizes",),
}
"""Old module to the new ones that its names are in, below `ltmp`."""

MOVED_NAMES: dict[str, dict[str, str]] = {
    "checkpoint": {
        "plain_state": "zoo.build",
        "save_weights": "zoo.build",
        "split_seed_state": "checkpoint.contents",
    },
}
"""Of modules that are still there: names that left them, each with the module that it is in now."""


def names_moved_from(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for `ltmp.MODULE`, which finds the names that left it.

    Like the finder below it imports the new module when it is asked for a name, and never before: the new one may lie
    in a higher layer.
    """

    def get(name: str) -> Any:
        new = MOVED_NAMES[module].get(name)
        if new is None:
            raise AttributeError(f"module '{__package__}.{module}' has no attribute {name!r}")
        old, now = f"{__package__}.{module}.{name}", f"{__package__}.{new}"
        warnings.warn(f"{old} has moved: import it from {now}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(now), name)

    return get


class MovedModules(MetaPathFinder, Loader):
    """Finds a module under its old name, with all that the modules of the new names have."""

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
        found = [importlib.import_module(name) for name in new]
        # a module of its own: the import system writes to it, and the real one must keep its name
        alias = ModuleType(spec.name, found[0].__doc__)
        for module in reversed(found):
            alias.__dict__.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""


def install() -> None:
    """Ask for old names last, after everybody else."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
