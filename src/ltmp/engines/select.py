"""Which engine runs a deployed model."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calls import tracing, unmerging
from ..errors import LTMPError
from ..method.policy import Policy
from ..method.rates import Rates
from ..method.thresholds import Thresholds
from . import packed
from .request import REQUEST, Active, Run

if TYPE_CHECKING:
    from ..hosts.stack import ReducedStack
    from .positions import Positions
    from .state import Reduced

_CAPABILITY = (8, 0)
"""The least that the kernels are written for: Ampere, with bfloat16 and tf32."""


def engine(name: str, device: torch.device) -> Run:
    """The engine called `name`; `auto` picks what is best for `device`.

    `graph` and `auto` run the whole host in a CUDA graph where they can (`graph.GraphedForward`); what comes here in
    their name runs at exact sizes.

    Raises:
        LTMPError: a named engine cannot run on `device`; the message says why.
    """
    request = REQUEST.get()
    if request is not None and request.run is not None:
        return request.run
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


def active(thresholds: Policy) -> Active:
    """`thresholds.active()`, or what the caller of this pass read before: a CUDA graph cannot read the device."""
    request = REQUEST.get()
    if request is not None and request.active is not None:
        return request.active
    return thresholds.active()


def needed(active: Active) -> bool:
    """Whether a pass with these thresholds takes an engine, and not the host's own blocks."""
    request = REQUEST.get()
    return any(map(any, active)) or (request is not None and request.always)


def on_device(stack: ReducedStack) -> bool:
    """Whether the decisions need no host and nobody asks where patches went: all that the Triton engines know."""
    return type(stack.thresholds) in (Thresholds, Rates) and tracing() is None and not unmerging()


def _triton(stack: ReducedStack, x: Tensor, active: Active, positions: Positions | None) -> Reduced:
    from . import triton

    run = triton.run if on_device(stack) else packed.run
    return run(stack, x, active, positions)


def _differentiable_or_triton(stack: ReducedStack, x: Tensor, active: Active, positions: Positions | None) -> Reduced:
    run = packed.run if torch.is_grad_enabled() and x.requires_grad else _triton
    return run(stack, x, active, positions)
