"""Attach the method to someone's model, and take it off again."""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from torch import nn

from ..config import LEARNED, LTMPConfig
from ..engines import graph
from ..errors import LTMPError
from ..method.policy import Policy
from ..method.rates import Rates
from ..method.recipe import Recipe
from ..method.thresholds import Thresholds
from .sizes import carry_sizes
from .stack import ReducedStack

Model = TypeVar("Model", bound=nn.Module)

_LIBRARIES = {
    "timm": ("timm", "eva", "naflex"),
    "torchvision": ("torchvision",),
    "open_clip": ("open_clip",),
    "transformers": ("transformers",),
}
"""Host library to our modules with its recipes; imported only when a model of that library is attached."""


def find_host(model: nn.Module) -> tuple[nn.Module, Recipe]:
    """The transformer inside `model` and its recipe.

    Raises:
        LTMPError: nothing inside is known; the message names what is.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            known = recipes(cls.__module__.partition(".")[0])
            if cls in known:
                return module, _unless_refused(module, known[cls])
    raise LTMPError(
        f"cannot attach to {type(model).__name__}: found none of the known hosts inside "
        f"(vision transformers of {', '.join(_LIBRARIES)}; docs/hosts.md lists them)"
    )


def _unless_refused(module: nn.Module, recipe: Recipe | str) -> Recipe:
    if isinstance(recipe, str):
        raise LTMPError(f"cannot attach to {type(module).__name__}: {recipe}; docs/hosts.md lists what can be attached")
    return recipe


def recipes(library: str) -> dict[type[nn.Module], Recipe | str]:
    """The hosts of a library that is installed, each with its recipe, or why it is known not to have one."""
    found: dict[type[nn.Module], Recipe | str] = {}
    for name in _LIBRARIES.get(library, ()):
        found |= importlib.import_module(f"{__package__}.{name}").HOSTS
    return found


def attach(model: Model, config: LTMPConfig | None = None) -> Model:
    """Give every block of `model` its two thresholds, all off (or its fixed rates), and make it run reduced.

    In place: parameter names, weights and the way to call the model stay; `model.ltmp` holds the thresholds.
    In eval mode tokens are really removed, for any batch size; in train mode (`model.train()`, or `model.ltmp.train()`
    alone) they are masked, so that gradients reach the thresholds. Attaching again starts over with new thresholds.

    Args:
        model: a model with a known vision transformer inside.
        config: variant, temperatures, engine; the default is the paper's merge then prune.

    Returns:
        The same model.

    Raises:
        LTMPError: the model cannot be reduced; it is unchanged, and the message names every reason.
    """
    config = config or LTMPConfig()
    # timm's feature extractor is a dictionary, but runs one of its entries and no other
    runs_all = isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    if runs_all and type(model).__name__ != "FeatureGetterNet":
        raise LTMPError(
            f"cannot attach to a {type(model).__name__}, which would run its thresholds, too: attach inside"
        )
    host, recipe = find_host(model)
    problems = _find_problems(host, recipe)
    if config.needs_class_attention and not recipe.class_first(host):
        problems.append(
            f"variant {config.variant} with scores {config.scores} needs a class token's attention, and this model has "
            "no class token"
        )
    if problems:
        raise LTMPError(f"cannot attach to this {recipe.name}: {'; '.join(problems)}")
    if is_attached(model):
        detach(model)
    parent, name = _place(host, recipe.stack)
    if isinstance(getattr(parent, name), ReducedStack):
        raise LTMPError(f"already attached to the {type(host).__name__} inside: call ltmp.detach on that one first")
    blocks = getattr(parent, name)
    policy = _policy(len(blocks), config).to(next(host.parameters()).device)
    policy.train(host.training)
    stack = ReducedStack(blocks, recipe, policy, recipe.protected(host), host)
    setattr(parent, name, stack)
    model.ltmp = policy
    for path, value in recipe.overrides(host).items():
        owner, attribute = _place(host, path)
        if attribute in vars(owner):
            stack.overridden[path] = vars(owner)[attribute]
        setattr(owner, attribute, value)
    norm = recipe.final_norm(host)
    if norm is not None:
        stack.hooks.append(norm.register_forward_hook(carry_sizes))
    stack.hooks += recipe.hooks(host)
    graph.install(host, stack)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: the model is what it was, bit for bit. Without an attachment nothing happens.

    Returns:
        The same model.
    """
    if not is_attached(model):
        return model
    host, recipe = find_host(model)
    parent, name = _place(host, recipe.stack)
    stack = getattr(parent, name)
    stack.original.train(stack.training)
    setattr(parent, name, stack.original)
    graph.uninstall(host)
    for path in recipe.overrides(host):
        owner, attribute = _place(host, path)
        delattr(owner, attribute)
        if path in stack.overridden:
            setattr(owner, attribute, stack.overridden[path])
    for hook in stack.hooks:
        hook.remove()
    del model.ltmp
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether `model` carries thresholds or fixed rates."""
    return isinstance(getattr(model, "ltmp", None), Policy)


def stack_of(model: nn.Module) -> ReducedStack:
    """The reduced blocks of an attached model.

    Raises:
        LTMPError: nothing is attached.
    """
    for module in model.modules():
        if isinstance(module, ReducedStack):
            return module
    raise LTMPError(f"nothing is attached to this {type(model).__name__}: call ltmp.attach(model) first")


def thresholds_of(model: nn.Module) -> Thresholds:
    """The learned thresholds of an attached model.

    Raises:
        LTMPError: nothing is attached, or fixed rates are.
    """
    policy = stack_of(model).thresholds
    if not isinstance(policy, Thresholds):
        raise LTMPError(
            f"variant {policy.config.variant} has fixed rates, not thresholds: attach with one of {', '.join(LEARNED)}"
        )
    return policy


def _policy(depth: int, config: LTMPConfig) -> Policy:
    return Rates(depth, config) if config.method.fixed else Thresholds(depth, config)


def _place(host: nn.Module, dotted: str) -> tuple[Any, str]:
    """Whose attribute a dotted path from the host is, and its name there."""
    path, _, name = dotted.rpartition(".")
    return host.get_submodule(path), name


def _find_problems(host: nn.Module, recipe: Recipe) -> list[str]:
    """Problems of the host as it is without us, so that attaching again asks the same questions."""
    parent, name = _place(host, recipe.stack)
    stack = getattr(parent, name)
    if not isinstance(stack, ReducedStack):
        return recipe.problems(host)
    setattr(parent, name, stack.original)
    try:
        return recipe.problems(host)
    finally:
        setattr(parent, name, stack)
