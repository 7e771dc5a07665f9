"""Modules under the names that they had before: they import as ever, with a DeprecationWarning, for one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "context": "calls",
    "sources": "calls",
    "stack": "hosts.stack",
    "probe": "method.thresholds",
    **{
        name: f"method.{name}"
        for name in ("dial", "flops", "policy", "rates", "reduction", "scores", "thresholds", "tokens")
    },
    "models": "hosts.attach",
    "models.recipe": "method.recipe",
    "models.build": "zoo.build",
    "models.hugging_face": "zoo.hugging_face",
    "models.libraries": "zoo.libraries",
    "models.registry": "zoo.timm_names",
    **{
        f"models.{name}": f"hosts.{name}"
        for name in (
            "eva", "intermediates", "mha", "naflex", "open_clip", "outputs", "pooling", "rotary", "timm", "torchvision",
            "transformers",
        )
    },
    "evaluate.report": "evaluate.tables",
    "evaluate.throughput": "evaluate.timing",
}  # fmt: skip
"""Old name to new, below `ltmp`."""


class MovedModules(MetaPathFinder, Loader):
    """Finds a module under its old name, as the very module of the new name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=name == "models")

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{__package__}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} has moved: import {new} instead", DeprecationWarning, stacklevel=2)
        found, alias = importlib.import_module(new), ModuleType(spec.name)
        # a module of its own: the import system writes to it, and the real one must keep its name
        alias.__dict__.update({k: v for k, v in vars(found).items() if not k.startswith("__")}, __doc__=found.__doc__)
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""


def install() -> None:
    """Ask for old names last, after everybody else."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
