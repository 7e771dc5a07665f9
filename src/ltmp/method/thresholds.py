"""Learned thresholds: two numbers per block, the decisions they make, and the dial and probe stored with them."""

from __future__ import annotations

import array
import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LTMPConfig
from ..errors import LTMPError, UsageError
from ..fingerprint import Seen
from ..ops.probe.reference import WIDTH, probe
from .certificate import Certificate
from .dial import PREFIX, Dial
from .policy import Active, Policy

PRUNE_TAU = 0.5
"""Temperature of the prune decision's gradient, in units of log importance."""
_Summary = tuple[Active, tuple[bool, ...]]
"""`Thresholds.active()`, and `Thresholds.prunes_all(block)` of each block."""


def over(score: Tensor, threshold: Tensor, tau: float, scale: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return 1 where `score > threshold`, else 0, with the gradient of a sigmoid of temperature `tau`.

    Straight-through (paper, equation 8): the forward value is the hard decision. `soft + (hard - soft)` in this order
    is exactly 0 or 1 in float32; `hard + soft - soft` is not. `scale` transforms both numbers before the sigmoid.
    """
    hard = (score > threshold).to(score.dtype)
    if not (threshold.requires_grad and torch.is_grad_enabled()):
        return hard
    if scale is not None:
        score, threshold = scale(score), scale(threshold)
    soft = torch.sigmoid((score - threshold) / tau)
    return soft + (hard - soft).detach()


def log_over(score: Tensor, threshold: Tensor, tau: float) -> Tensor:
    """`over` for positive scores, with the sigmoid taken in log space.

    Importance is near 1/N, so a sigmoid of the plain values would give every token the same gradient; in log space one
    temperature fits every token count. The decision itself compares the plain values, as deployment does.
    """
    return over(score, threshold, tau, lambda values: values.clamp_min(torch.finfo(values.dtype).tiny).log())


class Thresholds(Policy):
    """The learned thresholds of a model, `model.ltmp`, with their dial and probe.

    Thresholds start off: a block with a merge threshold >= 1 and a prune threshold <= 0 selects nothing and is skipped.

    They are frozen until `requires_grad_(True)`, which `ltmp.learn` calls while it runs. Thresholds, dial and probe are
    part of the state dict, and all stay float32 under `model.half()`.

    Args:
        depth: number of blocks, L.
        config: variant, scores and temperature.

    Attributes:
        merge: float32 [L]; a token merges if its score with its partner is above it.
        prune: float32 [L]; a token is kept if its importance is above it.
        dial: thresholds for a range of budgets, or None; see `set_dial`.
        requested_budget: the budget last set on the dial; `budget` also checks that thresholds have not changed since.
        probe: float32 [L, C + 1, WIDTH + 2], see `ops.probe.reference.probe`; None until one is learned or loaded.
        seen: the images that these thresholds were learned on; None if unknown.
        certificate: certificate of the dial, from `ltmp.certify` or from a file; void if the dial was replaced since.
    """

    probe: Tensor | None
    log_prune = True
    """Whether the prune decision's gradient is taken in log space, which the paper's own training does not do."""
    seen: Seen | None = None
    certificate: Certificate | None = None
    # the summary that `_read_summary` last made, with the values it was made from
    _cached: tuple[Any, _Summary, tuple[Tensor, ...]] | None = None

    def __init__(self, depth: int, config: LTMPConfig) -> None:
        super().__init__(depth, config)
        self.merge = nn.Parameter(torch.ones(depth, dtype=torch.float32), requires_grad=False)
        self.prune = nn.Parameter(torch.zeros(depth, dtype=torch.float32), requires_grad=False)
        self.dial: Dial | None = None
        self.requested_budget: float | None = None
        self.register_buffer("probe", None)

    # -- values

    @torch.no_grad()
    def set(self, merge: Tensor | list[float] | None = None, prune: Tensor | list[float] | None = None) -> None:
        """Copy in new values [L]; None leaves the current ones.

        Raises:
            ValueError: the number of values is not the model's depth, or a value is not finite. Nothing is changed.
        """
        new = {
            name: torch.as_tensor(values, device=self.merge.device).float()
            for name, values in (("merge", merge), ("prune", prune))
            if values is not None
        }
        for name, values in new.items():
            if values.shape != (self.depth,):
                raise ValueError(
                    f"{name} thresholds are for {values.numel()} blocks, but this model has {self.depth}: "
                    "use thresholds learned on this architecture"
                )
            if not values.isfinite().all():
                raise ValueError(
                    f"{name} thresholds hold NaN or infinity: the file or the run that made them is broken"
                )
        for name, values in new.items():
            getattr(self, name).copy_(values)
        self.requested_budget = None

    def set_dial(self, dial: Dial | None) -> None:
        """Set the dial, or remove it with None. Thresholds do not change until `set_budget`.

        Set the probe first: a dial is calibrated on its scores, so a new probe removes the dial.

        Raises:
            ValueError: the dial is for another number of blocks.
        """
        if dial is not None and dial.depth != self.depth:
            raise ValueError(
                f"a dial for {dial.depth} blocks, but this model has {self.depth}: use one learned on this architecture"
            )
        self.dial, self.requested_budget = dial, None

    @torch.no_grad()
    def set_budget(self, share: float) -> None:
        """Set the thresholds to those of the dial at this FLOPs share. Takes microseconds and never waits for a device.

        Calls of the model already queued on a GPU keep the thresholds that they were queued with. A call running in
        another thread may see some old and some new ones.

        >>> model.ltmp.set_budget(0.55)

        Args:
            share: a share within the range of the dial, or 1 to turn reduction off.

        Raises:
            UsageError: there is no dial, or the share is outside its range. Nothing is changed.
        """
        if self.dial is None:
            raise UsageError(
                "these thresholds are for one budget and have no dial: make one with `ltmp dial` (docs/dial.md)"
            )
        for parameter, values in zip((self.merge, self.prune), self.dial.at(share), strict=True):
            # a copy from pinned memory is asynchronous
            parameter.copy_(values.pin_memory() if parameter.is_cuda else values, non_blocking=True)
        self.requested_budget = float(share)

    @property
    def budget(self) -> float | None:
        """The FLOPs share last set on the dial; None if the thresholds have changed since. Reads the device."""
        if self.dial is None or self.requested_budget is None:
            return None
        pairs = zip((self.merge, self.prune), self.dial.at(self.requested_budget), strict=True)
        unchanged = all(torch.equal(current.detach().cpu(), from_dial) for current, from_dial in pairs)
        return self.requested_budget if unchanged else None

    def set_probe(self, probe: Tensor | None) -> None:
        """Set the probe that tokens are scored with, or remove it with None.

        A different probe removes the dial, whose thresholds were calibrated on scores of the old one; `ltmp.learn_dial`
        makes a new dial.

        Raises:
            ValueError: the tensor is for another number of blocks, has another shape than a probe, or is not finite.
        """
        if probe is not None:
            probe = self._checked_probe(probe)
        same = self.probe is probe or (self.probe is not None and probe is not None and torch.equal(self.probe, probe))
        if not same:
            self.set_dial(None)
        self.probe = probe

    def _checked_probe(self, probe: Tensor) -> Tensor:
        """Return a float32 copy of a valid probe, on the device of the thresholds."""
        if probe.ndim != 3 or probe.shape[0] != self.depth or probe.shape[2] != WIDTH + 2:
            raise ValueError(
                f"a probe of shape {tuple(probe.shape)}, but this model's is [{self.depth}, width + 1, {WIDTH + 2}]: "
                "use one learned on this architecture"
            )
        if not probe.isfinite().all():
            raise ValueError("a probe holds NaN or infinity: the file or the run that made it is broken")
        return probe.detach().to(self.merge.device, torch.float32, copy=True).contiguous()

    # -- decisions

    def probed(self, block: int, x: Tensor) -> Tensor | None:
        """See `Policy.probed`."""
        return probe(x, self.probe_of(block)) if self.config.needs_probe else None

    def probe_of(self, block: int) -> Tensor:
        """float32 [C + 1, WIDTH + 2], the probe of a block.

        Raises:
            LTMPError: no probe is set.
        """
        if self.probe is None:
            raise LTMPError(
                "these thresholds need a probe, and there is none: learn one (`ltmp dial`, `ltmp learn` or "
                "ltmp.learning.learn_probe), or load the file that has it"
            )
        return self.probe[block]

    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        """See `Policy.decide`; a gradient reaches the threshold only if tokens are masked."""
        threshold = getattr(self, step)[block]
        threshold = threshold if self.masks else threshold.detach()
        if step == "merge" or not self.log_prune:
            return over(score, threshold, self.config.tau)
        return log_over(score, threshold, PRUNE_TAU)

    def pruned_whole(self) -> Tensor:
        """See `Policy.pruned_whole`; importance is a mean of attention weights, so never above 1."""
        return self.prune.detach() >= (float("inf") if self.config.floor else 1)

    def on(self) -> Tensor:
        """See `Policy.on`. A cosine is at most 1 and importance is above 0.

        With a ceiling, any step of the variant may have to remove tokens, whatever the thresholds.
        """
        if self.config.ceiling is not None:
            steps = [torch.full_like(self.merge, step in self.config.steps) for step in ("merge", "prune")]
            return torch.stack(steps, 1) > 0
        return torch.stack([self.merge.detach() < 1, self.prune.detach() > 0], 1)

    def active(self) -> Active:
        """For each block, whether its merge and its prune step can select anything.

        Reads the device once. On a CPU the result is cached, and values are compared without any torch operator, so
        that tracers of the model (`torch.export`, `torch.fx`) record nothing.

        Raises:
            LTMPError: a threshold is NaN, which would select nothing in one engine and everything in another.
        """
        return self._summary()[0]

    def prunes_all(self, block: int) -> bool:
        """See `Policy.prunes_all`; reads the device once more."""
        return self._summary()[1][block]

    def _summary(self) -> _Summary:
        return self._constant_summary() if torch.compiler.is_exporting() else self._read_summary()

    def _constant_summary(self) -> _Summary:
        """`_read_summary` as a constant: `torch.export(strict=True)` calls it and does not trace into it."""
        return self._read_summary()

    # what torch.compiler.assume_constant_result does, which would import the compiler
    _constant_summary._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _read_summary(self) -> _Summary:
        """Summarise the current values. On a CPU the last summary is returned again while they are the same."""
        cached = self._cached
        # not as attributes, which tracers replace
        both: tuple[Tensor, ...] = tuple(self._parameters[name] for name in ("merge", "prune"))  # type: ignore[misc]
        if not all(map(_has_values, both)):
            # a tracer or an offloader put tensors without values in their place
            if cached is None:
                raise LTMPError("these thresholds are on the meta device, or are traced, and have no values there")
            both = cached[2]
        if both[0].device.type != "cpu":
            return self._summarise(*torch.stack([p.detach() for p in both]).tolist())
        if any(p.dtype != torch.float32 or not p.is_contiguous() for p in both):
            both = tuple(p.detach().float().contiguous() for p in both)
        # read the memory directly, not with an operator
        raw = [ctypes.string_at(p.data_ptr(), p.nbytes) for p in both]
        if cached is None or cached[0] != (self.config, *raw):
            summary = self._summarise(*(array.array("f", values) for values in raw))
            tensors = both if cached is not None and both is cached[2] else tuple(p.data for p in both)
            cached = self._cached = ((self.config, *raw), summary, tensors)
        return cached[1]

    def _summarise(self, merge: Sequence[float], prune: Sequence[float]) -> _Summary:
        if any(value != value for value in (*merge, *prune)):
            raise LTMPError("a threshold is NaN: the run or the file that it came from is broken, use another")
        steps = self.config.steps
        active = [(m < 1, p > 0) for m, p in zip(merge, prune, strict=True)]
        if self.config.ceiling is not None:
            active = [("merge" in steps, "prune" in steps)] * self.depth
        # importance is at most 1; with a floor no threshold prunes every token
        prunes_all_from = math.inf if self.config.floor else 1
        return tuple(active), tuple(p >= prunes_all_from for p in prune)

    # -- devices and state dicts

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move to the model's device, but stay float32: `model.half()` must not change a decision.

        The meta device has no values to move, so that `to_empty` turns all thresholds off and removes the probe.
        """
        exact, probe = {name: parameter.data for name, parameter in self.named_parameters()}, self.probe
        super()._apply(fn, recurse)
        if exact["merge"].is_meta and not self.merge.is_meta:
            self.set([1.0] * self.depth, [0.0] * self.depth)
            self.set_probe(None)
            return self
        for name, parameter in self.named_parameters():
            parameter.data = exact[name].to(parameter.device)
        if probe is not None:
            self.probe = probe.to(self.merge.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        """Add the dial, whose tensors are not buffers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.dial is not None:
            destination.update({f"{prefix}{name}": tensor for name, tensor in self.dial.tensors().items()})

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Load probe and dial with the thresholds, and remove those that the checkpoint does not have.

        A checkpoint of the host alone, without thresholds, changes nothing.
        """
        if prefix and not any(name.startswith(prefix) for name in state_dict):
            return
        if f"{prefix}merge" in state_dict:
            try:
                self.set_probe(state_dict.get(f"{prefix}probe"))
                self.set_dial(Dial.find(state_dict, prefix))
            except ValueError as error:
                error_msgs.append(str(error))
        rest = {name: value for name, value in state_dict.items() if not name.startswith(f"{prefix}{PREFIX}")}
        for name in (f"{prefix}merge", f"{prefix}prune"):
            # `assign=True` would keep the dtype of a half-precision checkpoint
            if name in rest:
                rest[name] = rest[name].float()
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _has_values(tensor: Tensor) -> bool:
    """Whether a tensor can be read: tracers, offloaders and function transforms put others in its place."""
    plain = type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
