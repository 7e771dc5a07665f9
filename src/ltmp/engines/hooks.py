"""Whether someone hooked or patched a module that an engine does not call as its host would."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

_OURS = ("transformers.utils.", "ltmp.")
"""Where hooks come from that ask nothing of a reduced model: those that record outputs where asked to, and our own."""

_COMPUTE = "torch."
"""Where those come from that compute a weight before its module is called, or watch every module alike."""

_UNHOOKED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def is_hooked(module: nn.Module, called: bool = False) -> bool:
    """Whether someone hooked this very module; if it is `called`, torch's own hooks do what they are for."""
    found = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(found) and _foreign(found, called)


def all_hooked() -> bool:
    """Whether someone hooked every module there is."""
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return _foreign([getattr(nn.modules.module, f"_global_{name}") for name in names], called=True)


def is_own(forward: object, kind: type[nn.Module]) -> bool:
    """Whether a forward that was set on a module is that of its class, as where it was patched and restored."""
    return getattr(forward, "__func__", None) is kind.forward


def _foreign(found: Iterable[Mapping[int, object]], called: bool) -> bool:
    known = (*_OURS, _COMPUTE) if called else _OURS
    return any(not _origin(hook).startswith(known) for hooks in found for hook in hooks.values())


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
