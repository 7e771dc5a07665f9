"""The method's model names in timm, as in the paper's code: `timm.create_model("ltmp_deit_small_patch16_224", tau=0.1)`

Every timm model whose entrypoint builds a host that can be attached gets one name per variant, and an `inference_` name
for each learned one.
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


def entrypoint(name: str, registered: Mapping[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module] | None:
    """Return the entrypoint of the model `name`, or None if it is not one of our names for a host in `registered`."""
    variant, host = parse_name(name)
    if variant is None or (name.startswith(INFERENCE) and variant not in LEARNED):
        return None
    if not _builds_host(registered.get(host)):
        return None
    build = _learned(host, variant, name.startswith(INFERENCE)) if variant in LEARNED else _fixed(host, variant)
    build.__name__ = build.__qualname__ = name
    return build


def names(registered: Mapping[str, Callable[..., nn.Module]]) -> set[str]:
    """Return our names for all hosts in `registered`."""
    return {prefix + name for name, build in registered.items() if _builds_host(build) for prefix in PREFIXES}


def _builds_host(build: Callable[..., nn.Module] | None) -> bool:
    """Whether a timm entrypoint is annotated to return a class that can be attached."""
    returned = getattr(build, "__annotations__", {}).get("return")
    return getattr(returned, "__name__", returned) in _host_classes()


@cache
def _host_classes() -> set[str]:
    return {
        cls.__name__
        for cls, recipe in recipes("timm").items()
        if isinstance(recipe, Recipe) and not isinstance(cls, str)
    }


def parse_name(name: str) -> tuple[str | None, str]:
    """Split a name into variant and timm's name: `inference_ltmp_X` is ("ltmp", "X"), and `X` is (None, "X")."""
    variant, _, host = name.removeprefix(INFERENCE).partition("_")
    return (variant, host) if variant in VARIANTS and host else (None, name)


def _learned(host: str, variant: str, inference: bool) -> Callable[..., nn.Module]:
    """Return an entrypoint for timm's model `host` with learned thresholds."""

    def build(pretrained: bool = False, tau: float = LTMPConfig.tau, **kwargs: Any) -> nn.Module:
        model = attach(_build_host(host, pretrained, kwargs), LTMPConfig(variant=variant, tau=tau))
        thresholds = thresholds_of(model)
        set_paper_start(thresholds)
        if inference:
            # remove tokens from the start, whichever mode timm returns the model in
            thresholds.eval()
        else:
            # training a model of this name trains its thresholds
            thresholds.requires_grad_(True)
        model.register_load_state_dict_pre_hook(_accept_seed_keys)
        return model

    build.__doc__ = f"{host} with learned thresholds ({variant}); `tau` is the temperature of the merge gradient."
    return build


def _fixed(host: str, variant: str) -> Callable[..., nn.Module]:
    """Return an entrypoint for timm's model `host` with fixed rates."""

    def build(
        pretrained: bool = False,
        r: Rate | Sequence[Rate] = 0,
        r_prune: Rate | Sequence[Rate] | None = None,
        schedule: str = LTMPConfig.schedule,
        **kwargs: Any,
    ) -> nn.Module:
        # Any: LTMPConfig is annotated with tuples and accepts lists
        rates: dict[str, Any] = {"r": r, "r_prune": r_prune}
        config = LTMPConfig(variant=variant, schedule=schedule, **rates)
        return attach(_build_host(host, pretrained, kwargs), config)

    build.__doc__ = f"{host} reduced at a fixed rate ({variant}); each block removes `r` tokens, see LTMPConfig."
    return build


def _build_host(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.model_entrypoint(name)(pretrained=pretrained, **kwargs)
    # timm, the hub client and the network each raise their own exceptions
    except Exception as error:
        if not pretrained or isinstance(error, TypeError | AssertionError):
            raise
        raise no_weights(name, error, 'give pretrained_cfg_overlay={"file": PATH} besides pretrained=True') from error


def no_weights(name: str, error: Exception, instead: str) -> LTMPError:
    """Return the error for weights that timm could not get; `instead` is how to pass a file of them."""
    return LTMPError(
        f"cannot get the pretrained weights of {name} ({first_line(error)}): without a network, copy the checkpoint "
        f"to this machine and {instead}"
    )


def _accept_seed_keys(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Convert a state dict of the paper's code before loading: `blocks.N.merge_masker.threshold` to `ltmp.merge[N]`.

    Pruning thresholds are converted likewise. A checkpoint has only the thresholds that its variant uses; the others
    keep their values.
    """
    if not is_attached(model):
        return
    entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    loaded = split_seed_state(entries)[0]
    if loaded is None:
        return
    current = thresholds_of(model)
    for key in entries:
        if SEED_KEY.fullmatch(key):
            del state[prefix + key]
    for step in ("merge", "prune"):
        learned = step in loaded.config.steps
        if learned or step not in current.config.steps:
            value = getattr(loaded if learned else current, step)
            state[f"{prefix}ltmp.{step}"] = value.detach()
