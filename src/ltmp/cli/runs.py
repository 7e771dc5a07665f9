"""Runs of verbs: their folders, how they go on, and what they report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .. import distributed
from ..data import Loader
from ..errors import LTMPError, UsageError
from ..evaluate import Evaluation, evaluate
from ..files import atomic_path
from .progress import progress_bar
from .screen import tell


def evaluate_with_bar(network: nn.Module, loader: Loader, *, limit: int | None = None, **how: Any) -> Evaluation:
    """`evaluate` with a progress bar."""
    everybodys, turn = range(min(limit or loader.images, loader.images)), loader.batch_size
    mine = range(distributed.rank() * turn, len(everybodys), distributed.world() * turn)
    total = sum(len(everybodys[first : first + turn]) for first in mine)
    with progress_bar("evaluating", total) as advance:
        return evaluate(network, loader, limit=limit, progress=advance, **how)


def report_skipped(skipped: dict[str, str]) -> None:
    """Say how many images could not be read, and one of them."""
    if skipped:
        name, reason = next(iter(skipped.items()))
        tell(f"skipped {len(skipped)} images that cannot be read, the first: {name} ({reason})")


class InterruptedRunError(LTMPError):
    """Stopped by Ctrl-C, with something to say about how to go on."""

    exit_code = 130


def prepare(folder: Path, resume: bool) -> Path:
    """The run's checkpoint file; fails before the work where the folder cannot be written or the intent is unclear."""
    run_file = folder / "run.pt"
    if not distributed.is_first():
        return run_file
    if run_file.exists() and not resume and not distributed.restarted():
        raise UsageError(f"{folder} holds an interrupted run: add --resume to go on, or choose another --out")
    if resume and not run_file.exists():
        raise UsageError(f"nothing to resume in {folder}: expected {run_file}, leave --resume out to start")
    probe = folder / ".probe"
    with atomic_path(probe):
        pass
    probe.unlink()
    return run_file


@contextmanager
def resumable(run_file: Path) -> Iterator[None]:
    """Say, of what stops the run inside, how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted; {_how_to_go_on(run_file)}") from None
    except distributed.LostRankError as error:
        raise distributed.LostRankError(f"{error}; {_how_to_go_on(run_file)}") from error


def run_folder(model: str, *rest: str) -> Path:
    """Where a run goes by default: named after the last part of the model's name, as those of hubs have more."""
    return Path("runs") / "-".join((Path(model.rpartition(":")[2]).name, *rest))


def _how_to_go_on(run_file: Path) -> str:
    if run_file.exists():
        return f"the run is saved in {run_file}: give the same command with --resume to go on"
    return "it had not taken its first step and nothing was saved: start again"


def base_model(network: nn.Module, pretrained: bool) -> dict[str, str]:
    """Whose weights these are, where that is known, so that others find them by the thresholds."""
    repository = (getattr(network, "pretrained_cfg", None) or {}).get("hf_hub_id")
    return {"base_model": repository} if pretrained and repository else {}
