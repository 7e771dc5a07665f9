"""The contents of a thresholds file as one validated value, built from its tensors or from a full checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LTMPConfig
from ..errors import LTMPError, UsageError, first_line
from ..fingerprint import Seen
from ..method.certificate import Certificate, fingerprint_of
from ..method.dial import PREFIX as DIAL
from ..method.dial import Dial
from ..ranges import MAX_BLOCKS
from .metadata import Metadata
from .schema import config_in

SEED_KEY = re.compile(r"(?:module\.)?blocks\.([0-9]{1,3})\.(merge|prune)_masker\.threshold")
"""State-dict keys of thresholds in checkpoints of the paper's code, the "seed" of this package."""


@dataclass(frozen=True)
class ThresholdFile:
    """The contents of a thresholds file.

    Attributes:
        merge, prune: float32 [L]. For fixed rates, which are in the config, these are thresholds that select nothing.
        config: the settings that the thresholds were learned with.
        metadata: architecture, input size, target, measured share, accuracies, package version, as far as known.
        dial: thresholds for a range of budgets; `merge` and `prune` are its values at `metadata["budget"]`. None if
            the file is for one budget only.
        probe: float [L, C + 1, WIDTH + 2], which tokens are scored with if the config's scores need it, or None; see
            `ops.probe.reference`.
        seen: the images that the thresholds were learned on, or None if unknown.

    Raises:
        ValueError: parts are broken or do not belong together; the message is one line.
    """

    merge: Tensor
    prune: Tensor
    config: LTMPConfig = field(default_factory=LTMPConfig)
    metadata: dict[str, Any] = field(default_factory=dict)
    dial: Dial | None = None
    probe: Tensor | None = None
    seen: Seen | None = None

    def __post_init__(self) -> None:
        """Validate everything here, so that files and state dicts are held to the same rules."""
        for name in ("merge", "prune"):
            values = getattr(self, name)
            if values.ndim != 1 or not 1 <= len(values) <= MAX_BLOCKS or not values.is_floating_point():
                raise ValueError(
                    f"{name} thresholds are {values.dtype} {list(values.shape)}, expected one number per block, for "
                    f"at most {MAX_BLOCKS} blocks"
                )
            if not values.float().isfinite().all():
                raise ValueError(f"{name} thresholds hold NaN or infinity")
            object.__setattr__(self, name, values.float())
        depth = len(self.merge)
        if len(self.prune) != depth:
            raise ValueError(f"merge thresholds for {depth} blocks, but prune thresholds for {len(self.prune)}")
        if self.about.depth not in (None, depth):
            raise ValueError(f"thresholds for {depth} blocks, of a model of {self.about.depth}")
        if self.probe is not None and not (self.probe.ndim == 3 and self.probe.is_floating_point()):
            raise ValueError(f"a probe of {self.probe.dtype} {list(self.probe.shape)}")
        if self.probe is not None and len(self.probe) != depth:
            raise ValueError(f"a probe for {len(self.probe)} blocks beside thresholds for {depth}")
        if self.probe is not None and not self.probe.isfinite().all():
            raise ValueError("its probe holds NaN or infinity")
        if self.dial is not None and self.dial.depth != depth:
            raise ValueError(f"a dial for {self.dial.depth} blocks beside thresholds for {depth}")
        budget = self.about.budget
        if self.dial is not None and budget is not None:
            try:
                self.dial.at(budget)
            except UsageError as error:
                raise ValueError(f"its budget is {budget!r}, which its dial does not reach") from error

    @property
    def certificate(self) -> Certificate | None:
        """The certificate that `ltmp.certify` made for the dial, valid or void; None if there is none.

        Raises:
            LTMPError: it is broken, or from a newer version.
        """
        values = self.about.certificate
        return None if values is None else Certificate.from_dict(values)

    def certified(self, model: nn.Module, source: str = "this file", amp: torch.dtype | None = None) -> ThresholdFile:
        """Return a copy at the certified budget, for `model` running under the autocast dtype `amp`.

        Raises:
            UsageError: there is no certificate, or it certifies nothing.
            LTMPError: the certificate is void: see `Certificate.require`.
        """
        certificate = self.certificate
        if certificate is None or self.dial is None:
            raise UsageError(f"{source} has no certificate: make one with `ltmp certify` (docs/certify.md)")
        fingerprint = fingerprint_of(self.dial, self.probe, self.config)
        return self.at(certificate.require(model, fingerprint, amp, source), source)

    @cached_property
    def about(self) -> Metadata:
        """`metadata`, validated."""
        return Metadata.from_dict(self.metadata)

    def at(self, budget: float, source: str = "this file") -> ThresholdFile:
        """Return a copy with the dial's thresholds at `budget`; without a dial, only the file's own budget is accepted.

        Raises:
            UsageError: there is no dial, or the budget is outside its range.
        """
        if self.dial is not None:
            try:
                merge, prune = self.dial.at(budget)
            except UsageError as error:
                raise UsageError(f"{source}: {error}") from error
            return replace(self, merge=merge, prune=prune, metadata={**self.metadata, "budget": budget})
        target = self.metadata.get("target")
        if target == budget:
            return self
        only = "one budget" if target is None else f"the budget {target:g} alone"
        raise UsageError(
            f"{source} holds thresholds for {only} and no dial, so it cannot be set to {budget:g}: leave the budget "
            "out, or make a dial with `ltmp dial` (docs/dial.md)"
        )


def from_parts(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> ThresholdFile:
    """Build the contents of a thresholds file from its tensors and metadata; removes the config from `metadata`.

    Raises:
        ValueError: something is missing or broken.
    """
    config = config_in(metadata.pop("config", None))
    if config.method.fixed:
        depth = Metadata.from_dict(metadata).depth
        if depth is None:
            raise ValueError("it does not say how many blocks its rates are for")
        return ThresholdFile(torch.ones(depth), torch.zeros(depth), config, metadata)
    missing = [name for name in ("merge", "prune") if name not in tensors]
    if missing:
        raise ValueError(f"its {missing[0]} thresholds are missing")
    if config.needs_probe and "probe" not in tensors:
        raise ValueError("its probe is missing")
    seen = Seen(tensors["seen"]) if "seen" in tensors else None
    return ThresholdFile(
        tensors["merge"], tensors["prune"], config, metadata, Dial.find(tensors), tensors.get("probe"), seen
    )


def is_threshold(name: str) -> bool:
    """Whether a tensor of a full checkpoint holds thresholds rather than the model's own weights."""
    return name.startswith("ltmp.") or SEED_KEY.fullmatch(name) is not None


def split_thresholds(
    state: dict[str, Tensor], source: str = "this checkpoint"
) -> tuple[ThresholdFile | None, dict[str, Tensor]]:
    """Split a full checkpoint into thresholds (`ltmp.merge` and `ltmp.prune`, or the seed's keys) and host weights.

    A state dict does not record its variant: the steps are those for which its thresholds select something.

    Returns:
        The thresholds, or None if there are none, and everything else.

    Raises:
        LTMPError: the thresholds or their dial are broken.
    """
    seed_thresholds, weights = split_seed_state(state, source)
    merge, prune, probe = (weights.pop(f"ltmp.{name}", None) for name in ("merge", "prune", "probe"))
    dial_parts = {name: weights.pop(name) for name in list(weights) if name.startswith(f"ltmp.{DIAL}")}
    if merge is None or prune is None:
        return seed_thresholds, weights
    try:
        if not all(value.is_floating_point() for value in (merge, prune, *dial_parts.values())):
            raise ValueError("thresholds are not floating-point numbers")
        merges, prunes = bool((merge < 1).any()), bool((prune > 0).any())
        variant = "ltmp" if merges == prunes else "ltm" if merges else "ltp"
        dial = Dial.find(dial_parts, "ltmp.")
        return ThresholdFile(merge, prune, LTMPConfig(variant=variant), {}, dial, probe), weights
    except ValueError as error:
        raise LTMPError(
            f"the thresholds in {source} are broken ({first_line(error)}): copy or learn them again"
        ) from error


def split_seed_state(
    state: dict[str, Tensor], source: str = "this checkpoint"
) -> tuple[ThresholdFile | None, dict[str, Tensor]]:
    """Split a checkpoint of the paper's code (`blocks.N.merge_masker.threshold`) into thresholds and host weights.

    Returns:
        The thresholds, or None if there are none, and everything else.

    Raises:
        LTMPError: a threshold is not a finite number.
    """
    values: dict[str, dict[int, float]] = {"merge": {}, "prune": {}}
    weights = {}
    for key, value in state.items():
        match = SEED_KEY.fullmatch(key)
        if match and (value.numel() != 1 or not value.is_floating_point() or not value.isfinite()):
            raise LTMPError(f"{source}: {key} must be one finite number: copy or learn it again")
        if match:
            values[match[2]][int(match[1])] = float(value)
        else:
            weights[key] = value
    depth = 1 + max([*values["merge"], *values["prune"]], default=-1)
    if depth == 0:
        return None, weights
    merge = torch.tensor([values["merge"].get(i, 1.0) for i in range(depth)])
    prune = torch.tensor([values["prune"].get(i, 0.0) for i in range(depth)])
    variant = "ltmp" if values["merge"] and values["prune"] else "ltm" if values["merge"] else "ltp"
    return ThresholdFile(merge, prune, LTMPConfig(variant=variant)), weights
