"""Which blocks an engine may compute from their weights, bypassing their modules, because the result is the same."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..method.recipe import Parts, Recipe, activation_name, is_plain
from .hooks import hooked_inside, is_class_forward

_LIBRARIES = {"torch", "timm", "torchvision", "open_clip", "transformers"}
"""Libraries whose modules compute what the names of their classes suggest."""

_IDENTITY_IN_EVAL = ("Identity", "Dropout", "DropPath", "StochasticDepth")
"""Ends of the names of classes that do nothing outside of training."""

_STOCHASTIC_DEPTH = ("DropPath", "StochasticDepth")


def look(memory: MutableMapping[Any, Any], recipe: Recipe, blocks: Sequence[nn.Module]) -> BlockFacts:
    """Return the facts about `blocks`, from `memory`, the cache of their body, unless the blocks have changed."""
    if torch.compiler.is_compiling():
        return BlockFacts(recipe, blocks)
    key = (id(blocks[0]), len(blocks))
    facts = memory.get(key)
    if facts is None or not facts.is_current():
        facts = memory[key] = BlockFacts(recipe, blocks)
    return facts


class BlockFacts:
    """Facts about some blocks, valid as long as these have the same submodules and weights.

    Every call of a model checks that they do, so the checks are written for speed.
    """

    def __init__(self, recipe: Recipe, blocks: Sequence[nn.Module]) -> None:
        self._recipe = recipe
        self._single_blocks: list[BlockFacts] = []
        self._parts = [_plain_parts(recipe, block) for block in blocks]
        modules = [module for block in blocks for module in block.modules()]
        inside = [module for block in blocks for module in block.modules() if module is not block]
        dicts = [values for module in modules for values in (module._parameters, module._modules)]
        self._entries: list[tuple[dict[str, Any], str, Any]] = [(d, name, v) for d in dicts for name, v in d.items()]
        self._entries += [(vars(m), "approximate", m.approximate) for m in modules if isinstance(m, nn.GELU)]
        self._addresses = [(weight, weight.data_ptr()) for weight in _shared_weights(self._parts, blocks)]
        self._states = [(vars(module), type(module)) for module in inside]
        self._eval_only = [vars(m) for m in modules if type(m).__name__.endswith(_IDENTITY_IN_EVAL)]
        self._stochastic_depth = [vars(m) for m in modules if type(m).__name__.endswith(_STOCHASTIC_DEPTH)]
        self._unhooked_at = -1

    def is_current(self) -> bool:
        """Whether the blocks still have the submodules and weights that they had."""
        for values, name, value in self._entries:
            if values.get(name) is not value:
                return False
        return not self._addresses or all(weight.data_ptr() == at for weight, at in self._addresses)

    def parts(self, blocks: Sequence[nn.Module]) -> list[Parts | None]:
        """Return the parts of each block, or None for a block whose modules must run.

        That is one with a hook, an adapter, a patched forward, active dropout, or any module that is not standard.
        """
        if self._is_unpatched() and self._is_unhooked(blocks):
            return self._parts
        if len(blocks) == 1:
            return [None]
        self._single_blocks = self._single_blocks or [BlockFacts(self._recipe, (block,)) for block in blocks]
        return [facts.parts((block,))[0] for facts, block in zip(self._single_blocks, blocks, strict=True)]

    def drops_branches(self) -> bool:
        """Whether stochastic depth (Huang et al., ECCV 2016) drops the branches of random images now."""
        return bool(self._stochastic_depth) and any(state["training"] for state in self._stochastic_depth)

    def _is_unpatched(self) -> bool:
        """Whether every forward is that of its class, and every dropout is in eval mode."""
        for state, kind in self._states:
            if "forward" in state and not is_class_forward(state["forward"], kind):
                return False
        for state in self._eval_only:  # noqa: SIM110 - a loop is faster than `any`
            if state["training"]:
                return False
        return True

    def _is_unhooked(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether no block has a hook; searched again only after a hook was registered anywhere."""
        latest = RemovableHandle.next_id
        if self._unhooked_at != latest:
            if any(map(hooked_inside, blocks)):
                return False
            self._unhooked_at = latest
        return True


def _plain_parts(recipe: Recipe, block: nn.Module) -> Parts | None:
    """Return the parts of a block if it computes nothing else."""
    parts = recipe.parts(block)
    plain = parts is not None and is_plain(parts) and all(_is_covered(m, block, parts) for m in block.modules())
    return parts if plain else None


def _is_covered(module: nn.Module, block: nn.Module, parts: Parts) -> bool:
    """Whether using `parts` instead of the block accounts for a module of it: a container, a part, or an identity."""
    if module is not block and type(module).forward.__module__.partition(".")[0] not in _LIBRARIES:
        return False
    called = (*parts.linears, parts.norm1, parts.norm2, *parts.q_norm.modules(), *parts.k_norm.modules())
    if module._modules or any(module is layer for layer in called):
        return True
    weights = module._parameters.values()
    scales = any(weight is scale for weight in weights if weight is not None for scale in (parts.scale1, parts.scale2))
    return scales or activation_name(module) == parts.act or type(module).__name__.endswith(_IDENTITY_IN_EVAL)


def _shared_weights(parts_of_blocks: Sequence[Parts | None], blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the weights of blocks whose parts have layers that share the host's memory (`linear_of`).

    Such layers go stale if a weight moves to other memory, even if it stays the same parameter.
    """
    return [
        weight
        for parts, block in zip(parts_of_blocks, blocks, strict=True)
        if parts is not None and not set(parts.linears) <= set(block.modules())
        for weight in block.parameters()
    ]
