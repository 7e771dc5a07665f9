"""The contents of a thresholds file as one checked value, from the tensors of a file or of a whole checkpoint."""

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


@dataclass(frozen=True)
class ThresholdFile:
    """The contents of a thresholds file.

    Attributes:
        merge, prune: float32 [L]; of fixed rates, which the config holds, thresholds that select nothing.
        config: how they were learned.
        metadata: architecture, input size, target, measured share, accuracies, package version; as far as known.
        dial: thresholds for a range of budgets, of which `merge` and `prune` are those at `metadata["budget"]`; None
            where there are these alone.
        probe: what tokens are read through where the config's scores ask for it, or None; see `ops.probe.reference`.
        seen: the images that they were learned on, or None where that is not known.

    Raises:
        ValueError: parts that are broken or do not belong together; the message is one line.
    """

    merge: Tensor
    prune: Tensor
    config: LTMPConfig = field(default_factory=LTMPConfig)
    metadata: dict[str, Any] = field(default_factory=dict)
    dial: Dial | None = None
    probe: Tensor | None = None
    seen: Seen | None = None

    def __post_init__(self) -> None:
        """One place for all that must hold, of files and of state dicts alike."""
        for name in ("merge", "prune"):
            values = getattr(self, name)
            if values.ndim != 1 or not 1 <= len(values) <= MAX_BLOCKS or not values.is_floating_point():
                raise ValueError(
                    f"{name} thresholds are {values.dtype} {list(values.shape)}, expected one number a block, of "
                    f"{MAX_BLOCKS} blocks at most"
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
        """The certificate that `ltmp.certify` made for its dial, valid or void; None where there is none.

        Raises:
            LTMPError: it is broken, or of a newer version.
        """
        values = self.about.certificate
        return None if values is None else Certificate.from_dict(values)

    def certified(self, model: nn.Module, source: str = "this file", amp: torch.dtype | None = None) -> ThresholdFile:
        """The same at its certified budget, for a model that runs under this autocast type.

        Raises:
            UsageError: there is no certificate, or it certifies nothing.
            LTMPError: it is void: see `Certificate.require`.
        """
        certificate = self.certificate
        if certificate is None or self.dial is None:
            raise UsageError(f"{source} has no certificate: make one with `ltmp certify` (docs/certify.md)")
        mine = fingerprint_of(self.dial, self.probe, self.config)
        return self.at(certificate.require(model, mine, amp, source), source)

    @cached_property
    def about(self) -> Metadata:
        """The metadata, checked."""
        return Metadata.from_dict(self.metadata)

    def at(self, budget: float, source: str = "this file") -> ThresholdFile:
        """The same with the dial's thresholds at `budget`; a file without a dial has its own budget alone.

        Raises:
            UsageError: there is no dial, or it does not go so far.
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


def from_parts(tensors: dict[str, Tensor], said: dict[str, Any]) -> ThresholdFile:
    """The contents of a thresholds file, from its tensors and metadata; removes the config from the latter.

    Raises:
        ValueError: something is missing or broken.
    """
    config = config_in(said.pop("config", None))
    if config.method.fixed:
        depth = Metadata.from_dict(said).depth
        if depth is None:
            raise ValueError("it does not say how many blocks its rates are for")
        return ThresholdFile(torch.ones(depth), torch.zeros(depth), config, said)
    missing = [name for name in ("merge", "prune") if name not in tensors]
    if missing:
        raise ValueError(f"its {missing[0]} thresholds are missing")
    if config.needs_probe and "probe" not in tensors:
        raise ValueError("its probe is missing")
    seen = Seen(tensors["seen"]) if "seen" in tensors else None
    return ThresholdFile(
        tensors["merge"], tensors["prune"], config, said, Dial.find(tensors), tensors.get("probe"), seen
    )


def is_threshold(name: str) -> bool:
    """Whether a tensor of a whole checkpoint is one of thresholds, and not one of the model's own weights."""
    return name.startswith("ltmp.") or SEED_KEY.fullmatch(name) is not None


def split_seed_state(
    state: dict[str, Tensor], source: str = "this checkpoint"
) -> tuple[ThresholdFile | None, dict[str, Tensor]]:
    """Part a seed checkpoint (`blocks.N.merge_masker.threshold`) into thresholds and the host's own weights.

    Returns:
        The thresholds, or None where there are none, and everything else.

    Raises:
        LTMPError: a threshold is no number.
    """
    found: dict[str, dict[int, float]] = {"merge": {}, "prune": {}}
    weights = {}
    for key, value in state.items():
        match = SEED_KEY.fullmatch(key)
        if match and (value.numel() != 1 or not value.is_floating_point() or not value.isfinite()):
            raise LTMPError(f"{source}: {key} is no finite number, as a block's threshold is: copy or learn it again")
        if match:
            found[match[2]][int(match[1])] = float(value)
        else:
            weights[key] = value
    depth = 1 + max((block for values in found.values() for block in values), default=-1)
    if depth == 0:
        return None, weights
    merge = torch.tensor([found["merge"].get(i, 1.0) for i in range(depth)])
    prune = torch.tensor([found["prune"].get(i, 0.0) for i in range(depth)])
    variant = "ltmp" if found["merge"] and found["prune"] else "ltm" if found["merge"] else "ltp"
    return ThresholdFile(merge, prune, LTMPConfig(variant=variant)), weights


def split_thresholds(
    state: dict[str, Tensor], source: str = "this checkpoint"
) -> tuple[ThresholdFile | None, dict[str, Tensor]]:
    """Part a whole checkpoint into thresholds, `ltmp.merge` and `ltmp.prune` or the seed's, and the host's own weights.

    A state dict does not say its variant: it is taken to have the steps that its thresholds select something for.

    Returns:
        The thresholds, or None where there are none, and everything else.

    Raises:
        LTMPError: its dial is broken.
    """
    found, weights = split_seed_state(state, source)
    merge, prune, probe = (weights.pop(f"ltmp.{name}", None) for name in ("merge", "prune", "probe"))
    parts = {name: weights.pop(name) for name in list(weights) if name.startswith(f"ltmp.{DIAL}")}
    if merge is None or prune is None:
        return found, weights
    try:
        if not all(value.is_floating_point() for value in (merge, prune, *parts.values())):
            raise ValueError("thresholds are no fractions")
        merges, prunes = bool((merge < 1).any()), bool((prune > 0).any())
        variant = "ltmp" if merges == prunes else "ltm" if merges else "ltp"
        dial = Dial.find(parts, "ltmp.")
        return ThresholdFile(merge, prune, LTMPConfig(variant=variant), {}, dial, probe), weights
    except ValueError as error:
        raise LTMPError(
            f"the thresholds in {source} are broken ({first_line(error)}): copy or learn them again"
        ) from error
