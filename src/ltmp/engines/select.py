"""Which engine runs a deployed model."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from ..calls import is_dense
from ..errors import LTMPError
from ..method.policy import Active
from ..method.rates import Rates
from ..method.recipe import no_bias
from ..method.thresholds import Thresholds
from . import compiled, masked, packed, trial
from .body import Body, Run, running_engine
from .positions import Positions
from .segments import Segments
from .state import Partway, Reduced
from .steps import Stepping, start_in_torch

_CAPABILITY = (8, 0)
"""The least that the kernels are written for: Ampere, with bfloat16 and tf32."""


def run(body: Body, x: Tensor, positions: Positions | None) -> Reduced:
    """Run all blocks on [B, N, C]: by the engine that this thread was told to, or else by the policy's.

    Raises:
        LTMPError: a named engine cannot run on the device of `x`.
    """
    brought = running_engine()
    if brought is not None and not is_dense():
        return brought(body, x, positions)
    active = body.active()
    if not x.shape[0] or not any(map(any, active)):
        return body.all_whole(x, positions)
    if body.policy.masks:
        return masked.run(body, x, active, positions)
    chosen = trial.run if trial.applies(body, x) else engine(body.policy.config.engine, x.device)
    return chosen(body, x, active, positions)


def start(
    body: Body, x: Tensor, active: Active, positions: Positions | None, before: int, among: Segments | None
) -> Partway:
    """Go block by block, by the engine that would run all blocks at once.

    Args:
        x: [B, N, C], which passed `before` blocks that removed nothing.
        among: where images are among the host's features, if not of N tokens each.

    Raises:
        LTMPError: a named engine cannot run on the device of `x`.
    """
    brought, given = running_engine(), (body, x, active, positions, before)
    if isinstance(brought, Stepping):
        return brought.start(*given, among)
    if body.policy.masks or body.recipe.bias is not no_bias or not x.shape[0]:
        return start_in_torch(*given, among)
    chosen = engine(body.policy.config.engine, x.device)
    if chosen is not packed.run and _by_kernels(body, x, automatic=chosen is _differentiable_or_triton):
        from . import triton

        return triton.start(*given, among)
    found = compiled.halves_of(body, x)
    if found is not None:
        return compiled.start(*given, found, among=among)
    return start_in_torch(*given, among)


def engine(name: str, device: torch.device) -> Run:
    """The engine called `name`; `auto` picks what is best for `device`.

    `graph` and `auto` run the whole host in a CUDA graph where they can (`graph.GraphedForward`); what comes here in
    their name runs at exact sizes. On a CPU, `run` lets `auto` run dense where reduction does not pay (`trial`).

    Raises:
        LTMPError: a named engine cannot run on `device`; the message says why.
    """
    if name == "packed":
        return packed.run
    if name == "auto" and (device.type != "cuda" or torch.compiler.is_compiling()):
        return packed.run
    reason = unavailable(device)
    if name == "auto":
        return packed.run if reason else _differentiable_or_triton
    if reason:
        raise LTMPError(f"engine {name!r} {reason}: use engine='packed'")
    return _triton


@cache
def unavailable(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, as the end of a sentence, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, but the model is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (capability, _CAPABILITY))
        return f"needs compute capability {need}, but {torch.cuda.get_device_name(device)} has {have}"
    return None


def on_device(body: Body) -> bool:
    """Whether decisions need no host and attention no bias for pairs of tokens: all that the Triton engines know."""
    return type(body.policy) in (Thresholds, Rates) and body.recipe.bias is no_bias


def _trains(body: Body, x: Tensor) -> bool:
    """Whether gradients are to reach the images or the blocks' weights."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for block in body.blocks for p in block.parameters())


def _by_kernels(body: Body, x: Tensor, automatic: bool) -> bool:
    """Whether nobody asks for what the Triton kernels do not compute: gradients, and decisions by other policies."""
    return on_device(body) and not ((automatic or body.policy.training) and _trains(body, x))


def _triton(body: Body, x: Tensor, active: Active, positions: Positions | None, automatic: bool = False) -> Reduced:
    if not _by_kernels(body, x, automatic):
        return packed.run(body, x, active, positions)
    from . import triton

    return triton.run(body, x, active, positions)


def _differentiable_or_triton(body: Body, x: Tensor, active: Active, positions: Positions | None) -> Reduced:
    return _triton(body, x, active, positions, automatic=True)
