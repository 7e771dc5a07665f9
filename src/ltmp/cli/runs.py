"""Resumable runs of verbs, and helpers that several verbs share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from .. import distributed
from ..calls import record
from ..checkpoint import read_state_dict
from ..data import Loader
from ..errors import INTERRUPTED, LTMPError, UsageError
from ..evaluate import Evaluation, deployed, evaluate, measure, tables
from ..files import LOCK, check_writable, locked
from ..files.text import read_json
from ..fingerprint import of_tensors
from ..learning.randomness import preserved_random_state
from ..learning.resume import differences, subject
from .options import RunOptions
from .progress import progress_bar
from .screen import print_note

NOT_IDENTIFYING = {"resume", "no_eval", "dry_run", "tuned_weights", "val", "budget", "workers", "device", "strict"}
"""Options that do not change what is learned, so that a resumed run may have other values."""


class InterruptedRunError(LTMPError):
    """Ctrl-C, with a message on how to continue."""

    exit_code = INTERRUPTED


class Run:
    """The folder of a run: a checkpoint of the current stage, and a record of finished stages, which --resume skips.

    Args:
        folder: created only when there is something to write.
        settings: identify the run; resuming with other settings is refused.
        resume: whether to continue an interrupted run, which must then exist.

    Raises:
        UsageError: the folder holds an interrupted run and `resume` is false, or it holds none and `resume` is true.
        LTMPError: the folder cannot be written, or another run is writing there.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        self.thresholds = folder / "thresholds.safetensors"
        self.checkpoint = folder / "run.pt"
        self._record = folder / "run.json"
        self._results: dict[str, Any] = {}
        self._subject: dict[str, Any] = {}
        self._replaces = False
        self._settings = json.loads(json.dumps(settings, default=str))
        if not distributed.is_first():
            return
        check_writable(folder)
        with self.exclusive():
            self._begin(resume)

    @property
    def exists(self) -> bool:
        """Whether the folder holds an interrupted run."""
        return self.checkpoint.exists() or self._record.exists()

    def check_subject(self, network: nn.Module, loader: Loader, run: RunOptions) -> None:
        """Record fingerprints of the weights and images before anything is learned.

        Raises:
            LTMPError: the record of an interrupted run has other fingerprints.
        """
        current = _subject_of(network, loader, run)
        changes = differences(self._subject, current)
        if changes:
            raise LTMPError(
                f"{self._record} is of a run with {' and '.join(changes)}: repeat those, or choose another --out"
            )
        self._subject = current

    def check_files(self, before: dict[str, str]) -> None:
        """Refuse files of a finished stage that have changed since; `before` is what `fingerprints` returned then."""
        for path, fingerprint in fingerprints(before).items():
            if fingerprint != before[path]:
                raise LTMPError(f"{path} is not of the run in {self._record}: it was replaced; choose another --out")

    def result(self, stage: str) -> Any:
        """Return the result of a finished stage, or None; the same on every rank."""
        return distributed.exchange(self._results.get(stage))[0]

    def finish(self, stage: str, result: Any) -> None:
        """Record the result of a stage."""
        self._results[stage] = result
        if distributed.rank() == 0:
            values = {"settings": self._settings, "subject": self._subject, "done": self._results}
            tables.write_json(values, self._record)

    def close(self) -> None:
        """Remove the checkpoint and the record of a run that is complete."""
        self.checkpoint.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)
        if self._replaces:
            print_note(f"replaced {self.thresholds} of an earlier run")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Create and lock the folder inside the context; it is removed again if it is empty at the end.

        Raises:
            LTMPError: another run is writing there.
        """
        if not distributed.is_first():
            yield
            return
        created = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for folder in reversed(created):
                stack.callback(_remove_if_empty, folder)
            stack.enter_context(locked(self.folder))
            stack.callback((self.folder / LOCK).unlink, missing_ok=True)
            yield

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Lock the folder; if the run inside is interrupted or loses a rank, the error explains how to continue."""
        try:
            with self.exclusive():
                yield
        except KeyboardInterrupt:
            raise InterruptedRunError(f"interrupted; {self._how_to_continue()}") from None
        except distributed.LostRankError as error:
            raise distributed.LostRankError(f"{error}; {self._how_to_continue()}") from error

    def _begin(self, resume: bool) -> None:
        folder = self.folder
        if self.exists and not resume and not distributed.restarted():
            raise UsageError(f"{folder} holds an interrupted run: add --resume to go on, or choose another --out")
        if resume and not self.exists:
            raise UsageError(f"nothing to resume in {folder}: expected {self.checkpoint}, leave --resume out to start")
        self._replaces = self.thresholds.exists() and not self.exists
        self._read()

    def _read(self) -> None:
        if not self._record.exists():
            return
        try:
            saved = read_json(self._record)
            settings, results = dict(saved["settings"]), dict(saved["done"])
            # records of older versions have no subject
            self._subject = dict(saved.get("subject", {}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LTMPError(f"{self._record} is damaged: delete it, and {self.checkpoint}, to start over") from error
        changed = [f"{k} {settings.get(k)!r}, now {v!r}" for k, v in self._settings.items() if settings.get(k) != v]
        if changed:
            raise LTMPError(f"{self._record} is of a run with other settings ({'; '.join(changed)}): repeat those")
        self._results = results

    def _how_to_continue(self) -> str:
        if self.exists:
            saved = self.checkpoint if self.checkpoint.exists() else self._record
            return f"the run is saved in {saved}: give the same command with --resume to go on"
        return "it had not taken its first step and nothing was saved: start again"


def identifying_settings(*groups: Any) -> dict[str, Any]:
    """The options, from groups of them, that identify a run."""
    return {name: value for group in groups for name, value in asdict(group).items() if name not in NOT_IDENTIFYING}


def fingerprints(paths: Iterable[str | Path]) -> dict[str, str]:
    """Fingerprints of the tensors in some files, by path."""
    return {str(path): of_tensors(read_state_dict(path)) for path in paths}


def base_model(network: nn.Module, pretrained: bool) -> dict[str, str]:
    """Metadata that names the Hub repository of pretrained weights, so that the thresholds can be found from there."""
    repository = (getattr(network, "pretrained_cfg", None) or {}).get("hf_hub_id")
    return {"base_model": repository} if pretrained and repository else {}


def evaluate_with_bar(network: nn.Module, loader: Loader, *, limit: int | None = None, **settings: Any) -> Evaluation:
    """`evaluate` with a progress bar, which counts the images of this rank."""
    images, batch = min(limit or loader.images, loader.images), loader.batch_size
    batch_starts = range(distributed.rank() * batch, images, distributed.world() * batch)
    total = sum(min(batch, images - start) for start in batch_starts)
    with progress_bar("evaluating", total) as advance:
        return evaluate(network, loader, limit=limit, progress=advance, **settings)


def report_skipped(skipped: dict[str, str]) -> None:
    """Print how many images could not be read, and the first one with the reason."""
    if skipped:
        name, reason = next(iter(skipped.items()))
        print_note(f"unreadable images skipped: {len(skipped)}, the first is {name} ({reason})")


def estimate_time(network: nn.Module, loader: Loader, run: RunOptions, *, passes: int, reads: int) -> str:
    """Estimate how long a job takes on this machine, by timing one batch.

    Args:
        passes: images that pass through the dense model, each time counted.
        reads: images that are read, each time counted.
    """
    start = perf_counter()
    images = next(iter(loader))[0]
    reading = reads * (perf_counter() - start) / len(images)
    with deployed(network, run.torch_device, amp=run.amp_dtype), record():
        running = passes / measure(network, images.to(run.torch_device), rounds=3).dense
    total, part = _duration(running + reading), _duration(reading)
    return f"about {total} on {run.torch_device}, of which {part} for reading images"


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@preserved_random_state()
def _subject_of(network: nn.Module, loader: Loader, run: RunOptions) -> dict[str, Any]:
    """Fingerprints of the weights, the images and their preprocessing."""
    return subject(network, loader, next(iter(loader))[0], run.amp_dtype)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
