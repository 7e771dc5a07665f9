"""Which blocks an engine may run by their parts, without calling their modules: where that computes the same."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..method.recipe import Parts, Recipe, activation_name, is_plain
from .hooks import hooked_inside

_LIBRARIES = {"torch", "timm", "torchvision", "open_clip", "transformers"}
"""Whose modules compute what their classes' names say."""

_IDLE = ("Identity", "Dropout", "DropPath", "StochasticDepth")
"""Ends of the names of modules that do nothing outside of training."""

_DROPS = ("DropPath", "StochasticDepth")


class Known:
    """What is known of a block, for as long as it has the same children and weights."""

    def __init__(self, recipe: Recipe, block: nn.Module) -> None:
        modules = list(block.modules())
        parts = recipe.parts(block)
        whole = parts is not None and is_plain(parts) and all(_accounted(m, block, parts) for m in modules)
        self._parts = parts if whole else None
        places = [place for m in modules for place in (m._parameters, m._modules)]
        self._names: list[tuple[dict[str, Any], str, Any]] = [(p, name, v) for p in places for name, v in p.items()]
        # layers made of a host's own weights (`linear_of`) are of the memory that these had
        layers = () if parts is None else (*parts.linears, parts.norm1, parts.norm2)
        own = () if set(layers) <= set(modules) else (m._parameters for m in modules)
        self._memory = [(value, value.data_ptr()) for place in own for value in place.values() if value is not None]
        self._names += [(vars(m), "approximate", m.approximate) for m in modules if isinstance(m, nn.GELU)]
        self._states = [vars(m) for m in modules if m is not block]
        self._idle = [vars(m) for m in modules if type(m).__name__.endswith(_IDLE)]
        self._drops = [vars(m) for m in modules if type(m).__name__.endswith(_DROPS)]

    # every call asks this of every block: plain loops where there is something to be looked at

    def holds(self) -> bool:
        """Whether they are those of its block still."""
        for place, name, value in self._names:
            if place.get(name) is not value:
                return False
        return not self._memory or all(value.data_ptr() == at for value, at in self._memory)

    def parts(self, block: nn.Module) -> Parts | None:
        """Its parts, if nothing else has a say in what it computes now: no hook, no adapter, no dropout."""
        if self._parts is None:
            return None
        for state in self._states:
            if "forward" in state:
                return None
        for state in self._idle:
            if state["training"]:
                return None
        return None if hooked_inside(block) else self._parts

    def drops(self) -> bool:
        """Whether it leaves out branches of some images at random now (stochastic depth, Huang et al., ECCV 2016)."""
        return bool(self._drops) and any(state["training"] for state in self._drops)


def _accounted(module: nn.Module, block: nn.Module, parts: Parts) -> bool:
    """Whether a module inside a block is a container, is in its parts, or does nothing."""
    if module is not block and type(module).forward.__module__.partition(".")[0] not in _LIBRARIES:
        return False
    called = (*parts.linears, parts.norm1, parts.norm2, *parts.q_norm.modules(), *parts.k_norm.modules())
    if module._modules or any(module is layer for layer in called):
        return True
    own = module._parameters.values()
    scales = any(value is scale for value in own if value is not None for scale in (parts.scale1, parts.scale2))
    return scales or activation_name(module) == parts.act or type(module).__name__.endswith(_IDLE)


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def look(recipe: Recipe, block: nn.Module) -> Known:
    """What is known of a block as it is now."""
    if torch.compiler.is_compiling():
        return Known(recipe, block)
    known = _KNOWN.get(block)
    if known is None or not known.holds():
        known = _KNOWN[block] = Known(recipe, block)
    return known
