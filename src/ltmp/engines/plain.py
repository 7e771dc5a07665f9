"""Which blocks an engine may run by their parts, without calling their modules: where that computes the same."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..method.recipe import Parts, Recipe, activation_name, is_plain
from .hooks import hooked_inside, is_own

_LIBRARIES = {"torch", "timm", "torchvision", "open_clip", "transformers"}
"""Whose modules compute what their classes' names say."""

_IDLE = ("Identity", "Dropout", "DropPath", "StochasticDepth")
"""Ends of the names of modules that do nothing outside of training."""

_DROPS = ("DropPath", "StochasticDepth")


class Known:
    """What is known of some blocks, for as long as they have the same children and weights.

    Every call asks for it.
    """

    def __init__(self, recipe: Recipe, blocks: Sequence[nn.Module]) -> None:
        self._recipe = recipe
        self._each: list[Known] = []
        self._parts = [_whole(recipe, block) for block in blocks]
        modules = [module for block in blocks for module in block.modules()]
        inside = [module for block in blocks for module in block.modules() if module is not block]
        places = [place for module in modules for place in (module._parameters, module._modules)]
        self._names: list[tuple[dict[str, Any], str, Any]] = [(p, name, v) for p in places for name, v in p.items()]
        self._names += [(vars(m), "approximate", m.approximate) for m in modules if isinstance(m, nn.GELU)]
        self._memory = [(value, value.data_ptr()) for value in _borrowed(self._parts, blocks)]
        self._states = [(vars(module), type(module)) for module in inside]
        self._idle = [vars(m) for m in modules if type(m).__name__.endswith(_IDLE)]
        self._drops = [vars(m) for m in modules if type(m).__name__.endswith(_DROPS)]
        self._unhooked = -1

    def holds(self) -> bool:
        """Whether the blocks are as they were."""
        for place, name, value in self._names:
            if place.get(name) is not value:
                return False
        return not self._memory or all(value.data_ptr() == at for value, at in self._memory)

    def parts(self, blocks: Sequence[nn.Module]) -> list[Parts | None]:
        """Of each block its parts, or None where something else has a say now: a hook, an adapter, dropout."""
        if self._untouched() and self._is_unhooked(blocks):
            return self._parts
        if len(blocks) == 1:
            return [None]
        self._each = self._each or [Known(self._recipe, (block,)) for block in blocks]
        return [known.parts((block,))[0] for known, block in zip(self._each, blocks, strict=True)]

    def drops(self) -> bool:
        """Whether one leaves out branches of some images at random now (stochastic depth, Huang et al., ECCV 2016)."""
        return bool(self._drops) and any(state["training"] for state in self._drops)

    def _untouched(self) -> bool:
        for state, kind in self._states:
            if "forward" in state and not is_own(state["forward"], kind):
                return False
        for state in self._idle:  # noqa: SIM110 - as fast as it can be
            if state["training"]:
                return False
        return True

    def _is_unhooked(self, blocks: Sequence[nn.Module]) -> bool:
        latest = RemovableHandle.next_id
        if self._unhooked != latest:
            if any(map(hooked_inside, blocks)):
                return False
            self._unhooked = latest
        return True


def _whole(recipe: Recipe, block: nn.Module) -> Parts | None:
    """The parts of a block, if they are all that it is made of."""
    parts = recipe.parts(block)
    plain = parts is not None and is_plain(parts) and all(_accounted(m, block, parts) for m in block.modules())
    return parts if plain else None


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


def _borrowed(found: Sequence[Parts | None], blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The weights of blocks with layers made of a host's own memory (`linear_of`), which is to stay where it was."""
    return [
        weight
        for parts, block in zip(found, blocks, strict=True)
        if parts is not None and not set(parts.linears) <= set(block.modules())
        for weight in block.parameters()
    ]


def look(memory: MutableMapping[Any, Any], recipe: Recipe, blocks: Sequence[nn.Module]) -> Known:
    """What is known of blocks as they are now, kept in the `memory` of their body."""
    if torch.compiler.is_compiling():
        return Known(recipe, blocks)
    place = (id(blocks[0]), len(blocks))
    known = memory.get(place)
    if known is None or not known.holds():
        known = memory[place] = Known(recipe, blocks)
    return known
