"""Whether someone hooked a module that an engine does not call as its host would."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

_OURS = ("transformers.utils.", "torch.", "ltmp.")
"""Where hooks come from that ask nothing of a reduced model: those that record outputs where asked to, that compute a
weight before it is used, and our own."""

_UNHOOKED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def is_hooked(module: nn.Module) -> bool:
    """Whether someone hooked this very module."""
    found = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(found) and any(not _origin(hook).startswith(_OURS) for hooks in found for hook in hooks.values())


def _origin(hook: object) -> str:
    """The module that a hook is from; of a partial that of its function."""
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))


def hooked_inside(module: nn.Module) -> bool:
    """Whether someone hooked a module or something inside it. Looks again after a hook was registered anywhere."""
    latest = RemovableHandle.next_id
    if _UNHOOKED.get(module) == latest:
        return False
    found = any(is_hooked(part) for part in module.modules())
    if not found:
        _UNHOOKED[module] = latest
    return found
