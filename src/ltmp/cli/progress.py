"""Progress bars on stderr, so that results on stdout stay clean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..distributed import rank
from ..errors import printable

console = Console(stderr=True)


class Bar:
    """One bar; call it with the steps done and, if wanted, a new text."""

    def __init__(self, progress: Progress, text: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(printable(text), total=total or None)
        self._tenth = 0.0

    def __call__(self, done: int = 1, text: str | None = None) -> None:
        self._update(advance=done, description=text)

    def reach(self, completed: int, total: int, text: str) -> None:
        """Be at `completed` of `total`, for jobs that know themselves where they are, resumed ones too."""
        self._update(completed=completed, total=total, description=text)

    def _update(self, **values: Any) -> None:
        if values.get("description"):
            values["description"] = printable(values["description"])
        self._progress.update(self._task, **values)
        task = self._progress.tasks[0]
        if console.is_terminal or not task.total or self._progress.disable:
            return
        # in a log file a bar cannot move: a line for every tenth instead
        tenth = 10 * task.completed // task.total
        if tenth < self._tenth:
            # the next stage of the job has begun
            self._tenth = 0.0
        if tenth > self._tenth:
            self._tenth = tenth
            console.print(f"{task.description} ({task.completed:g} of {task.total:g})", markup=False)


@contextmanager
def progress_bar(text: str, total: int | None) -> Iterator[Bar]:
    """A bar with elapsed and remaining time; of several ranks, the first shows it.

    >>> with progress_bar("training", 100) as advance:
    ...     advance(1, "training, loss 0.3")
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=rank() > 0) as progress:
        yield Bar(progress, text, total)
