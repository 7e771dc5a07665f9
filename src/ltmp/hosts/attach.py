"""Attach thresholds (or fixed rates) to a model, and detach them again."""

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
"""Host library -> modules of this package with its recipes, imported only when a model of that library is attached."""


def attach(model: Model, config: LTMPConfig | None = None) -> Model:
    """Give every block of `model` its two thresholds, all off (or its fixed rates), and run the model reduced.

    `model` is changed in place: its modules, parameter names, weights and call signature stay the same, and
    `model.ltmp` holds the thresholds. They are frozen, so an optimiser over `model.parameters()` does not move them,
    and tokens are really removed, at any batch size, in eval and in train mode.

    `ltmp.learn` and `ltmp.tune` train the thresholds. For your own training loop, enable their gradients with
    `model.ltmp.requires_grad_(True)`: in train mode (`model.train()`, or `model.ltmp.train()` alone) tokens are then
    masked instead of removed, so that gradients reach the thresholds. Attaching again starts over with new thresholds.

    Args:
        model: a model with a known vision transformer inside.
        config: variant, temperatures, engine; the default is the paper's merge then prune.

    Returns:
        The same model.

    Raises:
        LTMPError: the model cannot be reduced; it is unchanged, and the message lists every reason.
    """
    config = config or LTMPConfig()
    host, recipe = find_host(model)
    reader = find_reader(model) if model is not host else None
    upgrade = ""
    if reader is not None and not takes_features(type(reader)):
        reader, upgrade = None, ", or transformers 5.18 for 'fewer'"
    if reader is not None:
        recipe = replace(recipe, forms=(*recipe.forms, "fewer"))
    try:
        problems = recipe.problems(host)
        owner, name = _locate(host, recipe.stack)
        blocks = tuple(getattr(owner, name)._modules.values())[: recipe.depth(host)]
    except AttributeError as error:
        raise LTMPError(
            f"cannot attach to this {recipe.name}: its parts have other names than in the versions that ltmp supports, "
            f"timm 1.0.28, transformers 5.21, or newer ones ({first_line(error)})"
        ) from error
    problems += _block_problems(blocks) + _config_problems(config, host, recipe, upgrade)
    if problems:
        raise LTMPError(f"cannot attach to this {recipe.name}: {'; '.join(problems)}")
    _detach_previous(model, host)
    policy = _create_policy(len(blocks), config, recipe, host)
    body = Body(blocks, recipe, policy, recipe.protected(host), host)
    attached = Attachment(body, owner, name, model=weakref.ref(model))
    _install(attached)
    if reader is not None:
        _install_reader(attached, reader)
    _register_policy(attached, model)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`: afterwards the model is what it was, bit for bit. Does nothing if nothing is attached.

    Args:
        model: the attached model, or any module around or inside it that contains its blocks.

    Returns:
        The same model.
    """
    attached = find_attachment(model)
    if attached is None:
        return model
    attached.undo()
    root = attached.model() if attached.model is not None else None
    for module in [*model.modules(), *([root] if root is not None else [])]:
        # also on copies of the norm that was hooked
        for handle in [handle for handle, hook in module._forward_hooks.items() if hook is carry_sizes]:
            del module._forward_hooks[handle]
        for attributes in (vars(module), module._modules):
            if attributes.get("ltmp") is attached.policy:
                del attributes["ltmp"]
    return model


def attachment(model: nn.Module) -> Attachment:
    """Return the attachment of `model`, of a module inside it, or of the model that `model` is a part of.

    Raises:
        LTMPError: nothing is attached.
    """
    attached = find_attachment(model)
    if attached is None:
        raise LTMPError(f"nothing is attached to this {type(model).__name__}: call ltmp.attach(model) first")
    return attached


def find_attachment(model: nn.Module) -> Attachment | None:
    """`attachment`, or None if nothing is attached."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, BlockForward) and isinstance(forward.blocks, Attachment):
            return forward.blocks
    return None


def is_attached(model: nn.Module) -> bool:
    """Whether thresholds or fixed rates are attached to `model`."""
    return find_attachment(model) is not None


def thresholds_of(model: nn.Module) -> Thresholds:
    """The learned thresholds of an attached model: `attachment(model).thresholds`."""
    return attachment(model).thresholds


@dataclass(eq=False)
class Attachment(Blocks):
    """What `attach` did to a model; look it up with `attachment`.

    Attributes:
        replaced: every replaced attribute, as (module, attribute name, value set by us, previous value in the module's
            `__dict__`).
        hooks: handles of the registered hooks.
        model: weak reference to the model passed to `attach`, whose `ltmp` is the policy; None after unpickling and in
            a copy of a part of that model.
    """

    replaced: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)
    model: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        clone = memo[id(self)] = object.__new__(type(self))
        vars(clone).update(copy.deepcopy(self.__getstate__(), memo))
        model = None if self.model is None else memo.get(id(self.model()))
        clone.model = None if model is None else weakref.ref(model)
        return clone

    @property
    def host(self) -> nn.Module:
        """The vision transformer inside the model."""
        return self.body.host

    @property
    def recipe(self) -> Recipe:
        """How the host's blocks are built."""
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
        """The properties of the model that thresholds are bound to: its architecture and shape."""
        properties = {"depth": self.body.depth, **self.recipe.describe(self.host)}
        return {name: value for name, value in properties.items() if value is not None}

    def replace(self, owner: nn.Module, attribute: str, value: Any) -> None:
        """Set an attribute of a module so that `undo` can restore the previous one."""
        self.replaced.append((owner, attribute, value, vars(owner).get(attribute, _ABSENT)))
        setattr(owner, attribute, value)

    def undo(self) -> None:
        """Restore every replaced attribute, except those that other code has set since, and remove the hooks."""
        for owner, attribute, value, before in reversed(self.replaced):
            if vars(owner).get(attribute, _ABSENT) is not value:
                continue
            delattr(owner, attribute)
            if before is not _ABSENT:
                setattr(owner, attribute, before)
        for hook in self.hooks:
            hook.remove()


class _Absent:
    """Type of `_ABSENT`, which stands for an attribute that was not set and survives copying and pickling."""

    def __reduce__(self) -> str:
        return "_ABSENT"


_ABSENT = _Absent()


class IgnoredKeys(Set[str]):
    """State-dict keys that transformers does not save: the model's own, and those that the policy currently has."""

    def __init__(self, own: Iterable[str], policy: Policy) -> None:
        self.own, self.policy = frozenset(own), policy

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from (f"ltmp.{name}" for name in self.policy.state_dict())

    def __contains__(self, key: object) -> bool:
        return any(key == name for name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _block_problems(blocks: tuple[nn.Module, ...]) -> list[str]:
    problems = []
    if not blocks:
        problems.append("none of its blocks can be reduced")
    if len(set(map(id, blocks))) < len(blocks):
        problems.append("it runs a block several times (shared weights), and thresholds are for one place each")
    return problems


def _config_problems(config: LTMPConfig, host: nn.Module, recipe: Recipe, upgrade: str) -> list[str]:
    """Return why this config does not suit the host; `upgrade` names a library version that takes more `tokens`."""
    problems = []
    if config.needs_class_attention and not recipe.class_first(host):
        power = config.scores.class_power
        setting = f"class_power {power:g}" if power else f"variant {config.variant}"
        problems.append(f"{setting} needs a class token's attention, and this model has no class token")
    if config.tokens is not None and config.tokens not in recipe.forms:
        expected = " or ".join(map(repr, recipe.forms))
        problems.append(f"tokens={config.tokens!r} does not suit it: expected {expected}{upgrade}")
    return problems


def _detach_previous(model: nn.Module, host: nn.Module) -> None:
    """Detach what an earlier `attach(model)` attached.

    Raises:
        LTMPError: another module, inside or around `model`, was attached.
    """
    previous = find_attachment(model)
    if previous is None:
        return
    if previous.policy is not getattr(model, "ltmp", None):
        raise LTMPError(
            f"already attached to the {type(host).__name__} inside: call ltmp.detach(model) first, then attach"
        )
    detach(model)


def _create_policy(depth: int, config: LTMPConfig, recipe: Recipe, host: nn.Module) -> Policy:
    device = next(host.parameters()).device
    # parameters created in inference mode could never be updated outside it
    with torch.inference_mode(False), torch.device("cpu"):
        policy: Policy = Rates(depth, config) if config.method.fixed else Thresholds(depth, config)
        policy = policy.to(device)
    policy.forms = recipe.forms
    policy.train(host.training)
    # read and cache the thresholds now, so that tracing the model before its first call does not have to
    if device.type != "meta":
        policy.active()
    return policy


def _install(attached: Attachment) -> None:
    """Replace the host's attributes and register the hooks that make it run reduced."""
    body, host, recipe = attached.body, attached.host, attached.recipe
    for i, block in enumerate(body.blocks):
        attached.replace(block, "forward", BlockForward(attached, i))
    attached.replace(attached.owner, recipe.loop, LoopForward(attached, attached.owner, recipe.loop))
    for path, value in recipe.overrides(body).items():
        attached.replace(*_locate(host, path), value)
    norm = recipe.final_norm(host)
    if norm is not None:
        attached.hooks.append(norm.register_forward_hook(carry_sizes))
    attached.hooks += recipe.hooks(body)
    if torch.cuda.is_available():
        attached.replace(host, "forward", GraphedForward(body, inner=vars(host).get("forward")))


def _install_reader(attached: Attachment, reader: nn.Module) -> None:
    """Let a vision-language model pass fewer image tokens to its language model, for `tokens="fewer"`."""
    for method in ("forward", "generate"):
        attached.replace(reader, method, Shortened(attached.body, reader, method))
    projector = reader.get_submodule(LANGUAGE[type(reader).__name__].projector)
    attached.hooks.append(projector.register_forward_hook(MarkedFeatures(attached.body, reader)))


def _register_policy(attached: Attachment, model: nn.Module) -> None:
    """Make the policy `model.ltmp`: a submodule of `model`, or of the host if `model` would call all its submodules."""
    policy, host = attached.policy, attached.host
    # timm's FeatureGetterNet is a ModuleDict, but calls one entry only
    calls_all = isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    holder = host if calls_all and type(model).__name__ != "FeatureGetterNet" else model
    holder.ltmp = policy
    if holder is not model:
        vars(model)["ltmp"] = policy
    if hasattr(holder, "_keys_to_ignore_on_save"):
        # save_pretrained of transformers writes the model without the policy, so that it loads everywhere
        own: Any = holder._keys_to_ignore_on_save
        attached.replace(holder, "_keys_to_ignore_on_save", IgnoredKeys(own or (), policy))


def _locate(host: nn.Module, path: str) -> tuple[Any, str]:
    """Split a dotted path from the host into the module that it ends in and the attribute's name there."""
    parent, _, name = path.rpartition(".")
    return host.get_submodule(parent), name


def find_host(model: nn.Module) -> tuple[nn.Module, Recipe]:
    """Return the vision transformer inside `model` and its recipe.

    Raises:
        LTMPError: there is no host that can be attached, or more than one; the message names those that were found.
    """
    hosts = list(_find_hosts(model))
    supported = [(host, host.recipe) for host in hosts if isinstance(host.recipe, Recipe)]
    if len(supported) > 1:
        places = ", ".join(f"{host.name or 'model'} ({type(host.module).__name__})" for host, _ in supported)
        raise LTMPError(
            f"this {type(model).__name__} holds several vision transformers, and thresholds are for one: attach to one "
            f"of {places}"
        )
    if supported:
        host, recipe = supported[0]
        return host.module, recipe
    if hosts:
        raise LTMPError(
            f"cannot attach to {type(hosts[0].module).__name__}: {hosts[0].recipe}; docs/hosts.md lists what can be "
            "attached"
        )
    raise LTMPError(
        f"cannot attach to {type(model).__name__}: found none of the known hosts inside "
        f"(vision transformers of {', '.join(_LIBRARIES)}; docs/hosts.md lists them)"
    )


class _Host(NamedTuple):
    """A known host inside a model: its dotted name, and its recipe or the reason why it has none."""

    name: str
    module: nn.Module
    recipe: Recipe | str


def _find_hosts(model: nn.Module) -> Iterator[_Host]:
    """Yield the outermost known hosts in `model`.

    Models that merely contain an encoder and read its tokens (`READS_TOKENS`) or its logits (`READS_LOGITS`) are not
    hosts themselves, and are searched. A model that reads tokens needs every patch in its place, so the form "reduced"
    is taken from the hosts inside it.
    """
    hosts: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(hosts):
            continue
        prefix = f"{name}." if name else ""
        recipe = _find_recipe(type(module))
        if recipe == READS_TOKENS:
            readers = (*readers, prefix)
        if recipe in (None, READS_TOKENS, READS_LOGITS):
            continue
        if isinstance(recipe, Recipe) and name.startswith(readers):
            recipe = replace(recipe, forms=tuple(form for form in recipe.forms if form != "reduced"))
        yield _Host(name, module, recipe)
        hosts = (*hosts, prefix)


def _find_recipe(cls: type[nn.Module]) -> Recipe | str | None:
    """Return the entry for a model class or its nearest known base; names match classes of transformers only."""
    for base in cls.__mro__:
        known = recipes(base.__module__.partition(".")[0])
        if base in known:
            return known[base]
        if base.__name__ in known and base.__module__.startswith("transformers.models."):
            return known[base.__name__]
    return None


def recipes(library: str) -> dict[type[nn.Module] | str, Recipe | str]:
    """Map the hosts of an installed library, by class or class name, to their recipes or to why they have none."""
    found: dict[type[nn.Module] | str, Recipe | str] = {}
    for name in _LIBRARIES.get(library, ()):
        found |= importlib.import_module(f"{__package__}.{name}").HOSTS
    return found
