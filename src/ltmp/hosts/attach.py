"""Attach the method to someone's model, and take it off again."""

from __future__ import annotations

import copy
import importlib
import weakref
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import LEARNED, LTMPConfig
from ..engines.body import Body
from ..engines.graph import GraphedForward
from ..errors import LTMPError, first_line
from ..method.policy import Policy
from ..method.rates import Rates
from ..method.recipe import READS_LOGITS, READS_TOKENS, Recipe
from ..method.thresholds import Thresholds
from .fewer import LANGUAGE, MarkedFeatures, Shortened, find_reader, takes_features
from .forward import BlockForward, Blocks, LoopForward
from .sizes import carry_sizes

Model = TypeVar("Model", bound=nn.Module)

_LIBRARIES = {
    "timm": ("timm", "eva", "naflex", "grids"),
    "torchvision": ("torchvision",),
    "open_clip": ("open_clip",),
    "transformers": ("transformers", "towers"),
}
"""Host library to our modules with its recipes; imported only when a model of that library is attached."""

_PASS_BY = (READS_TOKENS, READS_LOGITS)


def find_host(model: nn.Module) -> tuple[nn.Module, Recipe]:
    """The transformer inside `model` and its recipe.

    Raises:
        LTMPError: nothing inside is known, or more than one; the message names what is.
    """
    found = list(_hosts(model))
    attachable = [host for host in found if isinstance(host.recipe, Recipe)]
    if len(attachable) > 1:
        places = ", ".join(f"{host.name or 'model'} ({type(host.module).__name__})" for host in attachable)
        raise LTMPError(
            f"this {type(model).__name__} holds several vision transformers, and thresholds are for one: attach to one "
            f"of {places}"
        )
    for host in (*attachable, *found):
        if isinstance(host.recipe, Recipe):
            return host.module, host.recipe
        raise LTMPError(
            f"cannot attach to {type(host.module).__name__}: {host.recipe}; docs/hosts.md lists what can be attached"
        )
    raise LTMPError(
        f"cannot attach to {type(model).__name__}: found none of the known hosts inside "
        f"(vision transformers of {', '.join(_LIBRARIES)}; docs/hosts.md lists them)"
    )


class _Found(NamedTuple):
    """A known host in a model: its name there, and its recipe or why it has none."""

    name: str
    module: nn.Module
    recipe: Recipe | str


def _hosts(model: nn.Module) -> Iterator[_Found]:
    """The known hosts in `model`; not those inside others, unless these read grids."""
    inside: tuple[str, ...] = ()
    readers: dict[str, type[nn.Module]] = {}
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        recipe = _recipe(type(module))
        if recipe is None or recipe in _PASS_BY:
            if recipe == READS_TOKENS:
                readers[f"{name}." if name else ""] = type(module)
            continue
        if isinstance(recipe, Recipe) and any(name.startswith(reader) for reader in readers):
            recipe = replace(recipe, forms=tuple(form for form in recipe.forms if form != "reduced"))
        yield _Found(name, module, recipe)
        if not name:
            return
        inside = (*inside, f"{name}.")


def _recipe(kind: type[nn.Module]) -> Recipe | str | None:
    for cls in kind.__mro__:
        known = recipes(cls.__module__.partition(".")[0])
        for key in (cls, cls.__name__):
            if key in known and (key is cls or cls.__module__.startswith("transformers.models.")):
                return known[key]
    return None


def recipes(library: str) -> dict[type[nn.Module] | str, Recipe | str]:
    """The hosts of a library that is installed, by class or its name, each with its recipe, or why it has none."""
    found: dict[type[nn.Module] | str, Recipe | str] = {}
    for name in _LIBRARIES.get(library, ()):
        found |= importlib.import_module(f"{__package__}.{name}").HOSTS
    return found


@dataclass(eq=False)
class Attachment(Blocks):
    """A record of `attach`, which `attachment` looks up.

    Attributes:
        replaced: (module, attribute, what stands there now, what its dictionary held before) of each change.
        hooks: that were registered.
        model: a weak reference to what `attach` was called with, whose `ltmp` is the policy; copies have none.
    """

    replaced: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)
    model: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        made = memo[id(self)] = object.__new__(type(self))
        vars(made).update(copy.deepcopy(self.__getstate__(), memo))
        twin = None if self.model is None else memo.get(id(self.model()))
        made.model = None if twin is None else weakref.ref(twin)
        return made

    @property
    def host(self) -> nn.Module:
        """The transformer inside the model."""
        return self.body.host

    @property
    def recipe(self) -> Recipe:
        """How its blocks are built."""
        return self.body.recipe

    @property
    def policy(self) -> Policy:
        """The policy that decides which tokens are removed."""
        return self.body.policy

    @property
    def thresholds(self) -> Thresholds:
        """The learned thresholds.

        Raises:
            LTMPError: fixed rates are attached.
        """
        if not isinstance(self.policy, Thresholds):
            raise LTMPError(
                f"variant {self.policy.config.variant} has fixed rates, not thresholds: attach with one of "
                f"{', '.join(LEARNED)}"
            )
        return self.policy

    def describe(self) -> dict[str, Any]:
        """The properties that thresholds are bound to: the model's architecture and shape."""
        known = {"depth": self.body.depth, **self.recipe.describe(self.host)}
        return {name: value for name, value in known.items() if value is not None}

    def replace(self, owner: nn.Module, attribute: str, value: Any) -> None:
        """Set an attribute of a module, so that `undo` can take it back."""
        self.replaced.append((owner, attribute, value, vars(owner).get(attribute, _ABSENT)))
        setattr(owner, attribute, value)

    def undo(self) -> None:
        """Take everything back; what others have set since then stays."""
        for owner, attribute, value, before in reversed(self.replaced):
            if vars(owner).get(attribute, _ABSENT) is not value:
                continue
            delattr(owner, attribute)
            if before is not _ABSENT:
                setattr(owner, attribute, before)
        for hook in self.hooks:
            hook.remove()


class _Absent:
    """Stands for no attribute; the same one in each copy."""

    def __reduce__(self) -> str:
        return "_ABSENT"


_ABSENT = _Absent()


def attachment(model: nn.Module) -> Attachment:
    """The attachment of `model`, of a module inside it, or of the model that it is a part of.

    Raises:
        LTMPError: nothing is.
    """
    found = find_attachment(model)
    if found is None:
        raise LTMPError(f"nothing is attached to this {type(model).__name__}: call ltmp.attach(model) first")
    return found


def find_attachment(model: nn.Module) -> Attachment | None:
    """`attachment`, or None."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, BlockForward) and isinstance(forward.blocks, Attachment):
            return forward.blocks
    return None


def is_attached(model: nn.Module) -> bool:
    """Whether `model` runs by thresholds or fixed rates."""
    return find_attachment(model) is not None


def thresholds_of(model: nn.Module) -> Thresholds:
    """The learned thresholds of an attached model: `attachment(model).thresholds`."""
    return attachment(model).thresholds


def attach(model: Model, config: LTMPConfig | None = None) -> Model:
    """Give every block of `model` its two thresholds, all off (or its fixed rates), and make it run reduced.

    In place: modules, parameter names, weights and the way to call the model stay; `model.ltmp` holds the thresholds.
    They are frozen, so that no optimiser of the model's parameters moves them, and tokens are really removed, for any
    batch size, in eval and in train mode. `ltmp.learn` and `ltmp.tune` train them; whoever wants to do it otherwise
    asks for gradients by `model.ltmp.requires_grad_(True)`: in train mode (`model.train()`, or `model.ltmp.train()`
    alone) tokens are then masked instead, so that gradients reach the thresholds. Attaching again starts over with new
    thresholds.

    Args:
        model: a model with a known vision transformer inside.
        config: variant, temperatures, engine; the default is the paper's merge then prune.

    Returns:
        The same model.

    Raises:
        LTMPError: the model cannot be reduced; it is unchanged, and the message names every reason.
    """
    config = config or LTMPConfig()
    host, recipe = find_host(model)
    reader = find_reader(model) if model is not host else None
    newer = ""
    if reader is not None and not takes_features(type(reader)):
        reader, newer = None, ", or transformers 5.18 for 'fewer'"
    if reader is not None:
        recipe = replace(recipe, forms=(*recipe.forms, "fewer"))
    try:
        problems = recipe.problems(host)
        owner, name = _place(host, recipe.stack)
        blocks = tuple(getattr(owner, name)._modules.values())[: recipe.depth(host)]
    except AttributeError as error:
        raise LTMPError(
            f"cannot attach to this {recipe.name}: its parts have other names than in the versions that ltmp knows, "
            f"timm 1.0.28, transformers 5.21, or newer ones ({first_line(error)})"
        ) from error
    if not blocks:
        problems.append("none of its blocks can be reduced")
    if len(set(map(id, blocks))) < len(blocks):
        problems.append("it runs a block several times (shared weights), and thresholds are for one place each")
    if config.needs_class_attention and not recipe.class_first(host):
        power = config.scores.class_power
        which = f"class_power {power:g}" if power else f"variant {config.variant}"
        problems.append(f"{which} needs a class token's attention, and this model has no class token")
    if config.tokens is not None and config.tokens not in recipe.forms:
        expected = " or ".join(map(repr, recipe.forms))
        problems.append(f"tokens={config.tokens!r} does not suit it: expected {expected}{newer}")
    if problems:
        raise LTMPError(f"cannot attach to this {recipe.name}: {'; '.join(problems)}")
    present = find_attachment(model)
    if present is not None and present.policy is not getattr(model, "ltmp", None):
        raise LTMPError(
            f"already attached to the {type(host).__name__} inside: call ltmp.detach(model) first, then attach"
        )
    if present is not None:
        detach(model)
    # thresholds that are born in inference mode could never be set outside of it
    with torch.inference_mode(False), torch.device("cpu"):
        policy = _policy(len(blocks), config).to(next(host.parameters()).device)
    policy.forms = recipe.forms
    policy.train(host.training)
    # so that who traces the model before its first call need not read it
    if not next(host.parameters()).is_meta:
        policy.active()
    body = Body(blocks, recipe, policy, recipe.protected(host), host)
    made = Attachment(body, owner, name, model=weakref.ref(model))
    _take_over(made)
    if reader is not None:
        _shorten_texts(made, reader)
    # what runs all of its modules would run the policy, too; timm's feature extractor is a dictionary, but runs one
    runs_all = isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    holder: nn.Module = host if runs_all and type(model).__name__ != "FeatureGetterNet" else model
    holder.ltmp = policy
    vars(model).update({"ltmp": policy} if holder is not model else {})
    if hasattr(holder, "_keys_to_ignore_on_save"):
        # transformers' save_pretrained writes the model alone, which loads everywhere
        own: Any = holder._keys_to_ignore_on_save
        made.replace(holder, "_keys_to_ignore_on_save", IgnoredKeys(own or (), policy))
    return model


class IgnoredKeys(Set[str]):
    """The keys that a host of transformers does not save, and those that the policy has at the time."""

    def __init__(self, own: Iterable[str], policy: Policy) -> None:
        self.own, self.policy = frozenset(own), policy

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from (f"ltmp.{name}" for name in self.policy.state_dict())

    def __contains__(self, key: object) -> bool:
        return any(key == name for name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _take_over(made: Attachment) -> None:
    """Set everything that stands in for something of the host."""
    body, host, recipe = made.body, made.host, made.recipe
    for i, block in enumerate(body.blocks):
        made.replace(block, "forward", BlockForward(made, i))
    made.replace(made.owner, recipe.loop, LoopForward(made, made.owner, recipe.loop))
    for path, value in recipe.overrides(body).items():
        made.replace(*_place(host, path), value)
    norm = recipe.final_norm(host)
    if norm is not None:
        made.hooks.append(norm.register_forward_hook(carry_sizes))
    made.hooks += recipe.hooks(body)
    if torch.cuda.is_available():
        made.replace(host, "forward", GraphedForward(body, inner=vars(host).get("forward")))


def _shorten_texts(made: Attachment, reader: nn.Module) -> None:
    """Let a reader take fewer tokens where it is told to."""
    for method in ("forward", "generate"):
        made.replace(reader, method, Shortened(made.body, reader, method))
    projector = reader.get_submodule(LANGUAGE[type(reader).__name__].projector)
    made.hooks.append(projector.register_forward_hook(MarkedFeatures(made.body, reader)))


def detach(model: Model) -> Model:
    """Undo `attach`: the model is what it was, bit for bit. Without an attachment nothing happens.

    Args:
        model: what was attached, or anything around or inside it that has its blocks.

    Returns:
        The same model.
    """
    made = find_attachment(model)
    if made is None:
        return model
    made.undo()
    attached = made.model() if made.model is not None else None
    for module in [*model.modules(), *([attached] if attached is not None else [])]:
        # on copies of the norm that was hooked, too
        for handle in [handle for handle, hook in module._forward_hooks.items() if hook is carry_sizes]:
            del module._forward_hooks[handle]
        for place in (vars(module), module._modules):
            if place.get("ltmp") is made.policy:
                del place["ltmp"]
    return model


def _policy(depth: int, config: LTMPConfig) -> Policy:
    return Rates(depth, config) if config.method.fixed else Thresholds(depth, config)


def _place(host: nn.Module, dotted: str) -> tuple[Any, str]:
    """Whose attribute a dotted path from the host is, and its name there."""
    path, _, name = dotted.rpartition(".")
    return host.get_submodule(path), name
