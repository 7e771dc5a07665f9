"""Selection of the engine that runs a reduced model."""

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
from ..method.scores import has_kernels
from ..method.thresholds import Thresholds
from . import compiled, masked, packed, trial
from .body import Body, Run, running_engine
from .positions import Positions
from .segments import Segments
from .state import BlockwiseRun, Reduced
from .steps import SteppableEngine, start_in_torch

_CAPABILITY = (8, 0)
"""Minimum compute capability of the kernels: Ampere, the first with bfloat16 and tf32."""


def run(body: Body, x: Tensor, positions: Positions | None) -> Reduced:
    """Run all blocks on [B, N, C] with the engine set by `running` in this thread, or else the one in the config.

    Raises:
        LTMPError: the engine named in the config cannot run on the device of `x`.
    """
    override = running_engine()
    if override is not None and not is_dense():
        return override(body, x, positions)
    active = body.active()
    if not x.shape[0] or not any(map(any, active)):
        return body.dense_blocks(x, positions)
    if body.policy.masks:
        return masked.run(body, x, active, positions)
    chosen = trial.run if trial.applies(body, x) else engine(body.policy.config.engine, x.device)
    return chosen(body, x, active, positions)


def start(
    body: Body, x: Tensor, active: Active, positions: Positions | None, first_block: int, segments: Segments | None
) -> BlockwiseRun:
    """Start a block-by-block run with the engine that `run` would choose for all blocks at once.

    Args:
        x: [B, N, C], the input of block `first_block`; the blocks before it removed nothing.
        segments: rows of each image among the host's features, None if the features are one [N, C] per image.

    Raises:
        LTMPError: the engine named in the config cannot run on the device of `x`.
    """
    override, args = running_engine(), (body, x, active, positions, first_block)
    if isinstance(override, SteppableEngine):
        return override.start(*args, segments)
    if body.policy.masks or body.recipe.bias is not no_bias or not x.shape[0]:
        return start_in_torch(*args, segments)
    chosen = engine(body.policy.config.engine, x.device)
    if chosen is not packed.run and _kernels_apply(body, x, automatic=chosen is _auto_triton):
        from . import triton

        return triton.start(*args, segments)
    halves = compiled.applicable_halves(body, x)
    if halves is not None:
        return compiled.start(*args, halves, segments=segments)
    return start_in_torch(*args, segments)


def engine(name: str, device: torch.device) -> Run:
    """Return the engine called `name`; `auto` picks the best one for `device`.

    `graph` and `auto` run the whole host in a CUDA graph if they can (`graph.GraphedForward`); calls that reach this
    function under these names run at exact sizes. On a CPU, `run` lets `auto` run dense if reduction does not pay
    (`trial`).

    Raises:
        LTMPError: a named engine cannot run on `device`; the message says why.
    """
    if name == "packed":
        return packed.run
    if name == "auto" and (device.type != "cuda" or torch.compiler.is_compiling()):
        return packed.run
    reason = unavailable(device)
    if name == "auto":
        return packed.run if reason else _auto_triton
    if reason:
        raise LTMPError(f"engine {name!r} {reason}: use engine='packed'")
    return _triton


@cache
def unavailable(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on `device`, as the end of a sentence, or None if they can."""
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


def supports_triton(body: Body) -> bool:
    """Whether the Triton engines can run `body`: kernels know its policy and scores, and attention has no pair bias."""
    policy = body.policy
    return type(policy) in (Thresholds, Rates) and body.recipe.bias is no_bias and has_kernels(policy.config.scores)


def _triton(body: Body, x: Tensor, active: Active, positions: Positions | None, automatic: bool = False) -> Reduced:
    if not _kernels_apply(body, x, automatic):
        return packed.run(body, x, active, positions)
    from . import triton

    return triton.run(body, x, active, positions)


def _auto_triton(body: Body, x: Tensor, active: Active, positions: Positions | None) -> Reduced:
    return _triton(body, x, active, positions, automatic=True)


def _kernels_apply(body: Body, x: Tensor, automatic: bool) -> bool:
    """Whether the Triton kernels can compute this call: they have no gradients and support two policies only.

    A named engine gives up gradients unless the policy is in train mode; `automatic` selection never does.
    """
    return supports_triton(body) and not ((automatic or body.policy.training) and _needs_gradients(body, x))


def _needs_gradients(body: Body, x: Tensor) -> bool:
    """Whether gradients have to reach the input or the weights of the blocks."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for block in body.blocks for p in block.parameters())
