"""Detection of hooks and patched forwards on modules that an engine does not call, or not as their host would.

`hosts/blocks.py` refuses calls of models that have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

_HARMLESS = ("transformers.utils.", "ltmp.")
"""Packages whose hooks do not affect a reduced model: transformers' recorders of outputs, and our own."""

_TORCH = "torch."
"""Package of hooks that are harmless if their module is called: they compute a weight, or observe every module."""

_UNHOOKED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Modules without hooks inside, and `RemovableHandle.next_id` when that was checked."""


def is_hooked(module: nn.Module, called: bool = False) -> bool:
    """Whether this very module has a hook that matters; torch's own hooks do not if the module is `called`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) and _any_foreign(hooks, called)


def all_hooked() -> bool:
    """Whether there are global hooks, which apply to every module."""
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return _any_foreign([getattr(nn.modules.module, f"_global_{name}") for name in names], called=True)


def is_class_forward(forward: object, kind: type[nn.Module]) -> bool:
    """Whether `forward`, set on a module, is that of its class `kind`, e.g. because a patch was undone."""
    return getattr(forward, "__func__", None) is kind.forward


def hooked_inside(module: nn.Module) -> bool:
    """Whether a module or any of its submodules has a hook; searched again only after one was registered anywhere."""
    latest = RemovableHandle.next_id
    if _UNHOOKED.get(module) == latest:
        return False
    hooked = any(is_hooked(part) for part in module.modules())
    if not hooked:
        _UNHOOKED[module] = latest
    return hooked


def _any_foreign(hook_dicts: Iterable[Mapping[int, object]], called: bool) -> bool:
    harmless = (*_HARMLESS, _TORCH) if called else _HARMLESS
    return any(not _origin(hook).startswith(harmless) for hooks in hook_dicts for hook in hooks.values())


def _origin(hook: object) -> str:
    """Return the name of the Python module that defines a hook, or the function of a partial."""
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))
