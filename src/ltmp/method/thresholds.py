"""Learned thresholds: two numbers per block, the dial and the probe that belong to them, and their decisions."""

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
Answers = tuple[Active, tuple[bool, ...]]
"""What `Thresholds.active` and, of each block, `Thresholds.prunes_all` say."""


def over(score: Tensor, threshold: Tensor, tau: float, scale: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """1 where `score > threshold`, else 0, exactly; its gradient is that of a sigmoid of temperature `tau`.

    The forward value is the hard decision in float32 (paper, equation 8, straight-through). `soft + (hard - soft)`
    in this order is exactly 0 or 1; `hard + soft - soft` is not. `scale` transforms both numbers before the sigmoid.
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

    Importance is near 1/N, so that a sigmoid in its own units would give every token the same gradient; in log space
    one temperature fits every token count. The decision itself compares the plain numbers, as deployment does.
    """
    return over(score, threshold, tau, lambda values: values.clamp_min(torch.finfo(values.dtype).tiny).log())


def _has_values(tensor: Tensor) -> bool:
    """Not so of what tracers, offloaders and transforms of functions put in its place."""
    plain = type(tensor) in (nn.Parameter, Tensor) and not tensor.is_meta
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class Thresholds(Policy):
    """The learned thresholds of a model, `model.ltmp`, with the dial and the probe that belong to them.

    A block whose merge threshold is >= 1 and whose prune threshold is <= 0 selects nothing and is skipped; thresholds
    start at these values.

    They are frozen until someone asks for gradients (`requires_grad_(True)`; `ltmp.learn` does while it runs).
    Thresholds, dial and probe are in the state dict; all stay float32 under `model.half()`.

    Args:
        depth: number of blocks, L.
        config: variant, scores and temperature.

    Attributes:
        merge: float32 [L]; tokens merge if their score with their partner is above it.
        prune: float32 [L]; tokens are kept if their importance is above it.
        dial: thresholds for a range of budgets, or None; see `set_dial`.
        asked: the budget last set on the dial; `budget` also checks that the thresholds are still those.
        probe: float32 [L, C + 1, WIDTH + 2], see `ops.probe.reference.probe`; None until one is learned or loaded.
        seen: the images that these thresholds were learned on, or None where nobody knows.
        certificate: of the dial, as `ltmp.certify` left it or a file brought it; void where the dial is another by now.
    """

    probe: Tensor | None
    log_prune = True
    """Whether the prune decision's gradient is taken in log space; not in the paper's own training."""
    seen: Seen | None = None
    certificate: Certificate | None = None

    def __init__(self, depth: int, config: LTMPConfig) -> None:
        super().__init__(depth, config)
        self.merge = nn.Parameter(torch.ones(depth, dtype=torch.float32), requires_grad=False)
        self.prune = nn.Parameter(torch.zeros(depth, dtype=torch.float32), requires_grad=False)
        self.dial: Dial | None = None
        self.asked: float | None = None
        self.register_buffer("probe", None)
        self._known: tuple[Any, Answers, tuple[Tensor, ...]] | None = None

    # -- values

    @torch.no_grad()
    def set(self, merge: Tensor | list[float] | None = None, prune: Tensor | list[float] | None = None) -> None:
        """Copy new values [L] in; None leaves a vector as it is.

        Raises:
            ValueError: the number of values is not the model's depth, or a value is not finite.
        """
        new = {
            n: torch.as_tensor(v, device=self.merge.device).float()
            for n, v in (("merge", merge), ("prune", prune))
            if v is not None
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
        self.asked = None

    def set_dial(self, dial: Dial | None) -> None:
        """Set the dial, or remove it with None; the thresholds stay as they are until `set_budget`.

        A dial belongs to the probe that is set: set the probe first, as a new one removes the dial.

        Raises:
            ValueError: it is for another number of blocks.
        """
        if dial is not None and dial.depth != self.depth:
            raise ValueError(
                f"a dial for {dial.depth} blocks, but this model has {self.depth}: use one learned on this architecture"
            )
        self.dial, self.asked = dial, None

    @torch.no_grad()
    def set_budget(self, share: float) -> None:
        """Set the thresholds to the dial's at this FLOPs share, in microseconds and without waiting for a device.

        Calls of the model that are queued on a GPU keep the thresholds that they were queued with. A call that another
        thread is in the middle of may see both.

        >>> model.ltmp.set_budget(0.55)

        Args:
            share: between the dial's ends, or 1 for all off.

        Raises:
            UsageError: there is no dial, or the share is outside its range; the thresholds stay as they are.
        """
        if self.dial is None:
            raise UsageError(
                "these thresholds are for one budget and have no dial: make one with `ltmp dial` (docs/dial.md)"
            )
        for parameter, values in zip((self.merge, self.prune), self.dial.at(share), strict=True):
            # from pinned memory a copy waits for nothing
            parameter.copy_(values.pin_memory() if parameter.is_cuda else values, non_blocking=True)
        self.asked = float(share)

    @property
    def budget(self) -> float | None:
        """The share that the dial set these thresholds for; None if they have changed since. Reads the device."""
        if self.dial is None or self.asked is None:
            return None
        pairs = zip((self.merge, self.prune), self.dial.at(self.asked), strict=True)
        return self.asked if all(torch.equal(mine.detach().cpu(), dials) for mine, dials in pairs) else None

    def set_probe(self, probe: Tensor | None) -> None:
        """Set the probe that tokens are scored with, or remove it with None.

        Any other probe than the one that is set removes the dial, whose thresholds were calibrated on scores of the
        old one; `ltmp.learn_dial` makes a new dial.

        Raises:
            ValueError: it is for another number of blocks, or not a probe at all.
        """
        if probe is not None:
            probe = self._checked_probe(probe)
        same = self.probe is probe or (self.probe is not None and probe is not None and torch.equal(self.probe, probe))
        if not same:
            self.set_dial(None)
        self.probe = probe

    def _checked_probe(self, probe: Tensor) -> Tensor:
        """An own float32 copy of a probe, on the device of the thresholds."""
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
            LTMPError: there is none.
        """
        if self.probe is None:
            raise LTMPError(
                "these thresholds need a probe, and there is none: learn one (`ltmp dial`, `ltmp learn` or "
                "ltmp.learning.learn_probe), or load the file that has it"
            )
        return self.probe[block]

    def decide(self, step: str, block: int, score: Tensor, free: Tensor) -> Tensor:
        """1 above the block's threshold, else 0; only where tokens are masked a gradient reaches the threshold."""
        threshold = getattr(self, step)[block]
        threshold = threshold if self.masks else threshold.detach()
        if step == "merge" or not self.log_prune:
            return over(score, threshold, self.config.tau)
        return log_over(score, threshold, PRUNE_TAU)

    def pruned_whole(self) -> Tensor:
        """No mean of attention weights is above 1."""
        return self.prune.detach() >= (float("inf") if self.config.floor else 1)

    def on(self) -> Tensor:
        """A cosine is at most 1 and importance above 0; but with a ceiling any step may have to remove tokens."""
        if self.config.ceiling is not None:
            here = [torch.full_like(self.merge, step in self.config.steps) for step in ("merge", "prune")]
            return torch.stack(here, 1) > 0
        return torch.stack([self.merge.detach() < 1, self.prune.detach() > 0], 1)

    def active(self) -> Active:
        """For each block whether its merge and its prune threshold can select anything.

        Reads a device once. On a CPU only what changed since the last call is looked at, by no operator of torch, so
        that whoever traces the model (`torch.export`, `torch.fx`) sees nothing.

        Raises:
            LTMPError: a threshold is NaN, which would select nothing in one engine and everything in another.
        """
        return self._look()[0]

    def prunes_all(self, block: int) -> bool:
        """See `Policy.prunes_all`; a device is read once more."""
        return self._look()[1][block]

    def _look(self) -> Answers:
        """The values of `active` and `prunes_all`, cached while the thresholds stay the same."""
        return self._constant() if torch.compiler.is_exporting() else self._look_now()

    def _constant(self) -> Answers:
        """`_look_now`, which `torch.export(strict=True)` calls and does not trace."""
        return self._look_now()

    # what torch.compiler.assume_constant_result does, which would import the compiler
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _look_now(self) -> Answers:
        # not as attributes, which tracers replace
        both: tuple[Tensor, ...] = tuple(self._parameters[name] for name in ("merge", "prune"))  # type: ignore[misc]
        if not all(map(_has_values, both)):
            # something without values stands in for them: a tracer, an offloader
            if self._known is None:
                raise LTMPError("these thresholds are on the meta device, or are traced, and have no values there")
            both = self._known[2]
        if both[0].device.type != "cpu":
            return self._answers(*torch.stack([p.detach() for p in both]).tolist())
        if any(p.dtype != torch.float32 or not p.is_contiguous() for p in both):
            both = tuple(p.detach().float().contiguous() for p in both)
        # from memory, by no operator
        found = [ctypes.string_at(p.data_ptr(), p.nbytes) for p in both]
        if self._known is None or self._known[0] != (self.config, *found):
            answers = self._answers(*(array.array("f", values) for values in found))
            held = both if self._known is not None and both is self._known[2] else tuple(p.data for p in both)
            self._known = ((self.config, *found), answers, held)
        return self._known[1]

    def _answers(self, merge: Sequence[float], prune: Sequence[float]) -> Answers:
        if any(value != value for value in (*merge, *prune)):
            raise LTMPError("a threshold is NaN: the run or the file that it came from is broken, use another")
        steps, most = self.config.steps, 1 if not self.config.floor else math.inf
        on = [(m < 1, p > 0) for m, p in zip(merge, prune, strict=True)]
        if self.config.ceiling is not None:
            on = [("merge" in steps, "prune" in steps)] * self.depth
        return tuple(on), tuple(p >= most for p in prune)

    # -- copies

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Follow the model to another device, but keep float32: `model.half()` must not change a decision.

        From the meta device come no values: `to_empty` turns all thresholds off, and leaves no probe.
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
        """Add the dial, whose tensors are no buffers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.dial is not None:
            destination.update({f"{prefix}{name}": tensor for name, tensor in self.dial.tensors().items()})

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Take probe and dial of the thresholds that are loaded; remove both where those have none.

        A checkpoint of the model alone, without any of them, leaves them as they are.
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
            # `assign=True` would keep the type of a checkpoint in half precision
            if name in rest:
                rest[name] = rest[name].float()
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
