"""Where a model runs, how fast it is to be, and what is measured."""

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

Device = Annotated[str, option("cpu, cuda, cuda:1 or auto.", RUN)]
Engine = Annotated[str | None, option("auto, packed, triton or graph; default: as learned.", RUN)]
Budget = Annotated[
    float | None,
    option(
        "FLOPs share to set the thresholds' dial to, e.g. 0.55; default: as the file was saved.",
        RUN,
        metavar="SHARE",
        within=BUDGET,
    ),
]
Budgets = Annotated[
    list[float] | None,
    option(
        "FLOPs share to set the thresholds' dial to; may be repeated. Default: as the file was saved.",
        RUN,
        "--budget",
        metavar="SHARE",
        within=BUDGET,
    ),
]
Every = Annotated[
    int,
    option(
        "Of how many blocks one removes tokens: with 2 every other block does. That takes less time; see docs/dial.md.",
        within=SPACING,
    ),
]
Seed = Annotated[int, option("Seed of the image order.", within=SEED)]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where, and in which precision."""

    device: Device = "auto"
    amp: Annotated[bool, option("bfloat16 autocast.", RUN)] = False

    @property
    def place(self) -> torch.device:
        """The device."""
        return pick_device(self.device)

    @property
    def cast(self) -> torch.dtype | None:
        """The type of --amp."""
        return autocast_type(self.amp)


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Where a learned model reduces, and which parts of a run happen."""

    every: Every = 1
    resume: Annotated[bool, option("Go on with the interrupted run in the output folder.", None, "--resume")] = False
    no_eval: Annotated[bool, option("Report no accuracy.", None, "--no-eval")] = False
    dry_run: Annotated[
        bool, option("Check everything, say what would be done and how long it would take.", None, "--dry-run")
    ] = False


@dataclass(frozen=True, kw_only=True)
class CertifiedOption:
    """The budget that a certificate guarantees."""

    certified: Annotated[
        bool,
        option(
            "Set the dial to the budget that `ltmp certify` found, after checking that nothing voids it.",
            RUN,
            "--certified",
        ),
    ] = False

    def share(
        self, network: nn.Module, thresholds: Path | None, cast: torch.dtype | None, given: float | None
    ) -> float | None:
        """The budget to set: the certified one where it is asked for, or else the one given.

        Raises:
            UsageError: both were asked for, or there are no thresholds or no certificate.
            LTMPError: the certificate is void for this model, or this precision.
        """
        from ...checkpoint import read

        if not self.certified:
            return given
        if given is not None:
            raise UsageError("--certified and --budget each set the dial: give one of them")
        if thresholds is None:
            raise UsageError("--certified is for thresholds that were certified: give --thresholds FILE")
        file = read(thresholds).certified(network, str(thresholds), cast)
        return float(file.metadata["budget"])

    def shares(
        self,
        network: nn.Module,
        thresholds: Sequence[Path],
        cast: torch.dtype | None,
        given: Sequence[float] | None,
    ) -> Sequence[float]:
        """The budgets to set, of verbs that take several: the certified one of one file, or else those given.

        Raises:
            UsageError: also of several files, each of which would have its own.
        """
        if not self.certified:
            return given or ()
        if len(thresholds) != 1:
            raise UsageError("--certified is for one file of thresholds, as each has its own: give one")
        found = self.share(network, thresholds[0], cast, given[0] if given else None)
        return () if found is None else (found,)


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(CertifiedOption):
    """A budget, or the time or speed that one is to be found for."""

    budget: Budget = None
    milliseconds: Annotated[
        float | None,
        option(
            "Instead of --budget: the time that a batch may take here; the largest budget that meets it is found.",
            RUN,
            within=Range(above=0),
        ),
    ] = None
    images_per_second: Annotated[
        float | None, option("Instead of --budget: the speed wanted here.", RUN, within=Range(above=0))
    ] = None


@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """Which export."""

    form: Annotated[
        str,
        option(
            "Form of an export: single (one image), batch (any number of images) or static (no data-dependent shapes).",
            RUN,
        ),
    ] = "batch"
    int8: Annotated[bool, option("Quantise the linear layers (ONNX only).", RUN, "--int8")] = False


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(RunOptions):
    """How much is evaluated."""

    limit: Limit = None
    speed: Annotated[bool, option("Measure images per second, too.")] = True


def pick_device(name: str) -> torch.device:
    """The named device; auto is the first CUDA device, or else the CPU. Under torchrun each process has its own GPU."""
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
    """The type that --amp computes in."""
    import torch

    return torch.bfloat16 if amp else None
