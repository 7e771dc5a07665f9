"""Options for device, precision, engine, budget and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...errors import UsageError
from ...ranges import BUDGET, SEED, SPACING, Range
from .data import Limit
from .groups import RUN, option

if TYPE_CHECKING:
    import torch
    from torch import nn

Device = Annotated[str, option("Device: cpu, cuda, cuda:1, ... or auto (CUDA if available, else the CPU).", RUN)]
Engine = Annotated[
    str | None,
    option("Engine: auto, packed, triton or graph; default: the one recorded in the thresholds file.", RUN),
]
Budget = Annotated[
    float | None,
    option(
        "FLOPs share to set the dial to, e.g. 0.55; default: the one the file was saved at.",
        RUN,
        metavar="SHARE",
        within=BUDGET,
    ),
]
Budgets = Annotated[
    list[float] | None,
    option(
        "FLOPs share to set the dial to; may be repeated. Default: the one the file was saved at.",
        RUN,
        "--budget",
        metavar="SHARE",
        within=BUDGET,
    ),
]
Every = Annotated[
    int,
    option(
        "Remove tokens only in every Nth block: 1 is all blocks; 2, every other block, runs faster (see docs/dial.md).",
        within=SPACING,
    ),
]
Seed = Annotated[int, option("Seed of the image order.", within=SEED)]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Device and precision."""

    device: Device = "auto"
    amp: Annotated[bool, option("Run under bfloat16 autocast.", RUN)] = False

    @property
    def torch_device(self) -> torch.device:
        """The device as torch takes it."""
        return pick_device(self.device)

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The autocast type, or None without --amp."""
        return autocast_type(self.amp)


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Which blocks remove tokens, and which stages of a run are carried out."""

    every: Every = 1
    resume: Annotated[bool, option("Continue the interrupted run in the output folder.", None, "--resume")] = False
    no_eval: Annotated[bool, option("Do not evaluate accuracy on held-out images.", None, "--no-eval")] = False
    dry_run: Annotated[
        bool,
        option("Check everything, then print what would be done and how long it would take.", None, "--dry-run"),
    ] = False


@dataclass(frozen=True, kw_only=True)
class CertifiedOption:
    """Whether to run at the budget of a certificate."""

    certified: Annotated[
        bool,
        option(
            "Set the dial to the budget that `ltmp certify` found, after checking that the certificate is still valid.",
            RUN,
            "--certified",
        ),
    ] = False

    def resolve_budget(
        self, network: nn.Module, thresholds: Path | None, autocast: torch.dtype | None, budget: float | None
    ) -> float | None:
        """Return the budget to set: the certified one with --certified, `budget` otherwise.

        Raises:
            UsageError: --certified and a budget are both given, or there are no thresholds or no certificate.
            LTMPError: the certificate is void for this model or this precision.
        """
        from ...checkpoint import read

        if not self.certified:
            return budget
        if budget is not None:
            raise UsageError("--certified and --budget each set the dial: give one of them")
        if thresholds is None:
            raise UsageError("--certified is for thresholds that were certified: give --thresholds FILE")
        file = read(thresholds).certified(network, str(thresholds), autocast)
        return float(file.metadata["budget"])

    def resolve_budgets(
        self,
        network: nn.Module,
        thresholds: Sequence[Path],
        autocast: torch.dtype | None,
        budgets: Sequence[float] | None,
    ) -> Sequence[float]:
        """Like `resolve_budget`, for verbs that take several files and several budgets.

        Raises:
            UsageError: also if --certified is given with several files, as each has its own certificate.
        """
        if not self.certified:
            return budgets or ()
        if len(thresholds) != 1:
            raise UsageError("--certified is for one file of thresholds, as each has its own: give one")
        certified = self.resolve_budget(network, thresholds[0], autocast, budgets[0] if budgets else None)
        return () if certified is None else (certified,)


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(CertifiedOption):
    """A budget, or a time or speed for which to find one."""

    budget: Budget = None
    milliseconds: Annotated[
        float | None,
        option(
            "Instead of --budget: use the largest budget at which a batch takes at most this time on this machine.",
            RUN,
            within=Range(above=0),
        ),
    ] = None
    images_per_second: Annotated[
        float | None,
        option(
            "Instead of --budget: use the largest budget that reaches this speed on this machine.",
            RUN,
            within=Range(above=0),
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """The form and precision of an export."""

    form: Annotated[
        str,
        option(
            "Form of the export: single (one image), batch (any batch size) or static (no data-dependent shapes).",
            RUN,
        ),
    ] = "batch"
    int8: Annotated[bool, option("Quantise the linear layers to INT8 (ONNX only).", RUN, "--int8")] = False


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(RunOptions):
    """How many images are evaluated, and whether speed is measured."""

    limit: Limit = None
    speed: Annotated[bool, option("Also measure images per second.")] = True


def pick_device(name: str) -> torch.device:
    """Return the named device; `auto` is CUDA if available, else the CPU. Under torchrun each process gets its own GPU.

    Raises:
        UsageError: there is no such device on this machine.
    """
    import torch

    from ... import distributed

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.started():
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device {name!r}: expected cpu, cuda, cuda:N or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"no device {name!r} here: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu"
        )
    return device


def autocast_type(amp: bool) -> torch.dtype | None:
    """The autocast type of --amp, or None without it."""
    import torch

    return torch.bfloat16 if amp else None
