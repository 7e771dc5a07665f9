"""The method's names in timm, as the paper's code has them: `timm.create_model("ltmp_deit_small_patch16_224", tau=0.1)`

Every timm name whose entrypoint builds a host that can be attached gets one for each variant, and an `inference_` one.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..checkpoint import SEED_KEY, split_seed_state
from ..config import LEARNED, VARIANTS, LTMPConfig, Rate
from ..errors import LTMPError, first_line
from ..hosts.attach import attach, is_attached, recipes, thresholds_of
from ..method.recipe import Recipe

INFERENCE = "inference_"
MERGE_START, PRUNE_START = 0.9, 0.0
"""Where the paper starts both thresholds."""

# timm lists what it registered in the module's __all__, of which these names are none of our own
__all__: list[str] = []


def install() -> None:
    """Register the names now if timm is imported, or else as soon as it is; `import ltmp` alone imports no timm."""
    if "timm" in sys.modules:
        register()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


def register() -> None:
    """Register `{variant}_NAME` and for learned ones `inference_{variant}_NAME` with timm, for each NAME of a host."""
    import timm
    from timm.models import register_model

    hosts = {cls.__name__ for cls, recipe in recipes("timm").items() if isinstance(recipe, Recipe)}
    for name in timm.list_models():
        built = timm.model_entrypoint(name).__annotations__.get("return")
        if getattr(built, "__name__", built) in hosts:
            for variant in VARIANTS:
                for prefix in ("", INFERENCE) if variant in LEARNED else ("",):
                    full = f"{prefix}{variant}_{name}"
                    if not timm.is_model(full):
                        register_model(_entrypoint(full, name, variant))


def parse_name(name: str) -> tuple[str | None, str]:
    """The variant and the host's name in a registered one: `inference_ltmp_X` is ("ltmp", "X"), `X` is (None, "X")."""
    variant, _, host = name.removeprefix(INFERENCE).partition("_")
    return (variant, host) if variant in VARIANTS and host else (None, name)


def _entrypoint(full: str, name: str, variant: str) -> Callable[..., nn.Module]:
    if variant not in LEARNED:
        return _fixed(full, name, variant)

    def build(pretrained: bool = False, tau: float = LTMPConfig.tau, **kwargs: Any) -> nn.Module:
        model = attach(_build_host(name, pretrained, kwargs), LTMPConfig(variant=variant, tau=tau))
        thresholds = thresholds_of(model)
        steps = thresholds.config.steps
        depth = thresholds.depth
        thresholds.set([MERGE_START] * depth if "merge" in steps else None, [PRUNE_START] * depth)
        if full.startswith(INFERENCE):
            # removes tokens for real from the start, whatever mode timm hands the model out in
            thresholds.eval()
        else:
            # asked for by this name: whoever trains the model trains them
            thresholds.requires_grad_(True)
        model.register_load_state_dict_pre_hook(_accept_seed_keys)
        return model

    build.__doc__ = f"{name} with learned thresholds ({variant}); `tau` is the temperature of the merge gradient."
    return _named(build, full)


def _fixed(full: str, name: str, variant: str) -> Callable[..., nn.Module]:
    def build(
        pretrained: bool = False,
        r: Rate | Sequence[Rate] = 0,
        r_prune: Rate | Sequence[Rate] | None = None,
        schedule: str = LTMPConfig.schedule,
        **kwargs: Any,
    ) -> nn.Module:
        # a list is as good as a tuple
        rates: dict[str, Any] = {"r": r, "r_prune": r_prune}
        config = LTMPConfig(variant=variant, schedule=schedule, **rates)
        return attach(_build_host(name, pretrained, kwargs), config)

    build.__doc__ = f"{name} reduced at a fixed rate ({variant}); `r` tokens go in each block, see LTMPConfig."
    return _named(build, full)


def _named(build: Callable[..., nn.Module], full: str) -> Callable[..., nn.Module]:
    build.__name__ = build.__qualname__ = full
    return build


def _build_host(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.model_entrypoint(name)(pretrained=pretrained, **kwargs)
    # timm, the hub's client and the network each fail with a class of their own
    except Exception as error:
        if not pretrained or isinstance(error, TypeError | AssertionError):
            raise
        raise no_weights(name, error, 'give pretrained_cfg_overlay={"file": PATH} besides pretrained=True') from error


def no_weights(name: str, error: Exception, instead: str) -> LTMPError:
    """What to say where timm could not get `name`'s weights; `instead` is how a file of them is given."""
    return LTMPError(
        f"cannot get the pretrained weights of {name} ({first_line(error)}): without a network, copy the checkpoint "
        f"here and {instead}"
    )


def _accept_seed_keys(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading: `blocks.N.merge_masker.threshold` becomes an entry of `ltmp.merge`, and so for prune.

    A variant's checkpoint has only what it uses; what it does not use stays as it is.
    """
    if not is_attached(model):
        return
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    found = split_seed_state(own)[0]
    if found is None:
        return
    thresholds = thresholds_of(model)
    for key in own:
        if SEED_KEY.fullmatch(key):
            del state[prefix + key]
    for step in ("merge", "prune"):
        learned = step in found.config.steps
        if learned or step not in thresholds.config.steps:
            value = getattr(found if learned else thresholds, step)
            state[f"{prefix}ltmp.{step}"] = value.detach()


class _TimmFinder(importlib.abc.MetaPathFinder):
    """Finds timm as everybody else does, and has its names registered right after it was imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                spec.loader = _TimmLoader(spec.loader, self)
                return spec
        return None


class _TimmLoader(importlib.abc.Loader):
    """timm's own loader, but for what happens afterwards."""

    def __init__(self, loader: importlib.abc.Loader, finder: _TimmFinder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # resources, source and pickling ask the module for its loader: leave no trace there
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        register()
