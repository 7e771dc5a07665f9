"""The method's names in timm, as the paper's code has them: `timm.create_model("ltmp_deit_small_patch16_224", tau=0.1)`

Every timm name whose entrypoint builds a host that can be attached gets one for each variant, and an `inference_` one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..checkpoint.contents import SEED_KEY, split_seed_state
from ..config import LEARNED, VARIANTS, LTMPConfig, Rate
from ..errors import LTMPError, first_line
from ..hosts.attach import attach, is_attached, recipes, thresholds_of
from ..method.paper import set_paper_start
from ..method.recipe import Recipe
from .prefixes import INFERENCE, PREFIXES


def entrypoint(full: str, registered: Mapping[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module] | None:
    """The builder of the model `full`, if it is one of our names and `registered` has the host it ends in."""
    variant, name = parse_name(full)
    if variant is None or (full.startswith(INFERENCE) and variant not in LEARNED):
        return None
    return _entrypoint(full, name, variant) if _builds_a_host(registered.get(name)) else None


def names(registered: Mapping[str, Callable[..., nn.Module]]) -> set[str]:
    """The names of every host in `registered`."""
    return {prefix + name for name, build in registered.items() if _builds_a_host(build) for prefix in PREFIXES}


def _builds_a_host(build: Callable[..., nn.Module] | None) -> bool:
    built = getattr(build, "__annotations__", {}).get("return")
    return getattr(built, "__name__", built) in _hosts()


@cache
def _hosts() -> set[str]:
    return {
        cls.__name__
        for cls, recipe in recipes("timm").items()
        if isinstance(recipe, Recipe) and not isinstance(cls, str)
    }


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
        set_paper_start(thresholds)
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
    """Message for when timm could not get `name`'s weights; `instead` is how to give a file of them."""
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
