"""Runs of verbs: their folders, how they go on, and what they report."""

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

    exit_code = INTERRUPTED


ELSEWHERE = {"resume", "no_eval", "dry_run", "tuned_weights", "val", "budget", "workers", "device", "strict"}
"""Options that do not change what is learned."""


def settings_of(*groups: Any) -> dict[str, Any]:
    """The settings that identify a run."""
    return {name: value for group in groups for name, value in asdict(group).items() if name not in ELSEWHERE}


class Run:
    """A run's folder: the checkpoint of what is under way, and a record of what is done, which --resume leaves out.

    Args:
        folder: is only made when there is something to write.
        settings: what makes two runs the same run; one with others is refused.
        resume: whether there has to be something to go on with.

    Raises:
        UsageError: it is not clear whether to go on.
        LTMPError: the folder cannot be written, or another run is writing there.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        self.thresholds = folder / "thresholds.safetensors"
        self.checkpoint = folder / "run.pt"
        self._record = folder / "run.json"
        self._done: dict[str, Any] = {}
        self._subject: dict[str, Any] = {}
        self._replaces = False
        self._settings = json.loads(json.dumps(settings, default=str))
        if not distributed.is_first():
            return
        check_writable(folder)
        with self.alone():
            self._begin(resume)

    def _begin(self, resume: bool) -> None:
        folder = self.folder
        if self.exists and not resume and not distributed.restarted():
            raise UsageError(f"{folder} holds an interrupted run: add --resume to go on, or choose another --out")
        if resume and not self.exists:
            raise UsageError(f"nothing to resume in {folder}: expected {self.checkpoint}, leave --resume out to start")
        self._replaces = self.thresholds.exists() and not self.exists
        self._read()

    @property
    def exists(self) -> bool:
        """Whether there is something to go on with."""
        return self.checkpoint.exists() or self._record.exists()

    def _read(self) -> None:
        if not self._record.exists():
            return
        try:
            saved = read_json(self._record)
            settings, done = dict(saved["settings"]), dict(saved["done"])
            # older versions did not write it
            self._subject = dict(saved.get("subject", {}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LTMPError(f"{self._record} is damaged: delete it, and {self.checkpoint}, to start over") from error
        other = [f"{k} {settings.get(k)!r}, now {v!r}" for k, v in self._settings.items() if settings.get(k) != v]
        if other:
            raise LTMPError(f"{self._record} is of a run with other settings ({'; '.join(other)}): repeat those")
        self._done = done

    def of(self, network: nn.Module, loader: Loader, run: RunOptions) -> None:
        """Say what the run is of, before anything is learned.

        Raises:
            LTMPError: there is a record of it, which is of other weights or images.
        """
        found = _subject_of(network, loader, run)
        others = differences(self._subject, found)
        if others:
            raise LTMPError(
                f"{self._record} is of a run with {' and '.join(others)}: repeat those, or choose another --out"
            )
        self._subject = found

    def check_files(self, before: dict[str, str]) -> None:
        """Refuse files of a finished stage that are others now; `before` is what `fingerprints` gave."""
        for path, found in fingerprints(before).items():
            if found != before[path]:
                raise LTMPError(
                    f"{path} is not of the run in {self._record}: somebody replaced it; choose another --out"
                )

    def done(self, stage: str) -> Any:
        """The result of a finished stage, or None; the same on every rank."""
        return distributed.exchange(self._done.get(stage))[0]

    def finish(self, stage: str, result: Any) -> None:
        """Write down what a stage gave."""
        self._done[stage] = result
        if distributed.rank() == 0:
            tables.write_json({"settings": self._settings, "subject": self._subject, "done": self._done}, self._record)

    def close(self) -> None:
        """Everything is done: nothing is left to go on with."""
        self.checkpoint.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)
        if self._replaces:
            tell(f"replaced the {self.thresholds} of an earlier run")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder inside, which stays only if there is something in it then.

        Raises:
            LTMPError: another run is writing there.
        """
        if not distributed.is_first():
            yield
            return
        made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as after:
            for folder in reversed(made):
                after.callback(_remove_if_empty, folder)
            after.enter_context(locked(self.folder))
            after.callback((self.folder / LOCK).unlink, missing_ok=True)
            yield

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """Hold the folder, and say, of what stops the run inside, how to go on."""
        try:
            with self.alone():
                yield
        except KeyboardInterrupt:
            raise InterruptedRunError(f"interrupted; {self._how_to_go_on()}") from None
        except distributed.LostRankError as error:
            raise distributed.LostRankError(f"{error}; {self._how_to_go_on()}") from error

    def _how_to_go_on(self) -> str:
        if self.exists:
            saved = self.checkpoint if self.checkpoint.exists() else self._record
            return f"the run is saved in {saved}: give the same command with --resume to go on"
        return "it had not taken its first step and nothing was saved: start again"


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


@preserved_random_state()
def _subject_of(network: nn.Module, loader: Loader, run: RunOptions) -> dict[str, Any]:
    """Fingerprints of weights and images, and how these are read."""
    return subject(network, loader, next(iter(loader))[0], run.cast)


def fingerprints(paths: Iterable[str | Path]) -> dict[str, str]:
    """Of the tensors in some files, by path."""
    return {str(path): of_tensors(read_state_dict(path)) for path in paths}


def base_model(network: nn.Module, pretrained: bool) -> dict[str, str]:
    """Whose weights these are, where that is known, so that others find them by the thresholds."""
    repository = (getattr(network, "pretrained_cfg", None) or {}).get("hf_hub_id")
    return {"base_model": repository} if pretrained and repository else {}


def foretell_time(network: nn.Module, loader: Loader, run: RunOptions, *, passes: int, reads: int) -> str:
    """Metadata how long so many passes of an image through the dense model take here, and so many images to be read."""
    start = perf_counter()
    images = next(iter(loader))[0]
    reading = reads * (perf_counter() - start) / len(images)
    with deployed(network, run.place, amp=run.cast), record():
        running = passes / measure(network, images.to(run.place), rounds=3).dense
    return f"about {_duration(running + reading)} on {run.place}, {_duration(reading)} of it for reading images"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
