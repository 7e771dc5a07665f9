"""Where a model runs, how fast it is to be, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ...errors import UsageError
from .data import Limit
from .groups import RUN, option

if TYPE_CHECKING:
    import torch

Device = Annotated[str, option("cpu, cuda, cuda:1 or auto.", RUN)]
Engine = Annotated[str | None, option("auto, packed, triton or graph; default: as learned.", RUN)]
Budget = Annotated[
    float | None,
    option(
        "FLOPs share to set the thresholds' dial to, e.g. 0.55; default: as the file was saved.", RUN, metavar="SHARE"
    ),
]
Budgets = Annotated[
    list[float] | None,
    option(
        "FLOPs share to set the thresholds' dial to; may be repeated. Default: as the file was saved.",
        RUN,
        "--budget",
        metavar="SHARE",
    ),
]
Seed = Annotated[int, option("Seed of the image order.")]


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
    """Which parts of a run happen."""

    resume: Annotated[bool, option("Go on with the interrupted run in the output folder.", None, "--resume")] = False
    no_eval: Annotated[bool, option("Report no accuracy.", None, "--no-eval")] = False
    dry_run: Annotated[
        bool, option("Check everything, say what would be done and how long it would take.", None, "--dry-run")
    ] = False


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """A budget, or the time or speed that one is to be found for."""

    budget: Budget = None
    milliseconds: Annotated[
        float | None,
        option(
            "Instead of --budget: the time that a batch may take here; the largest budget that meets it is found.", RUN
        ),
    ] = None
    images_per_second: Annotated[float | None, option("Instead of --budget: the speed wanted here.", RUN)] = None


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
