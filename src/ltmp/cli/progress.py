"""Progress bars on stderr, so that results on stdout stay clean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..sanitize import printable
from .screen import console, print_note

SPEED_WINDOW = 600.0
"""Seconds over which the speed is averaged. rich's default of 30 shows no remaining time if a step takes longer."""


@contextmanager
def progress_bar(text: str, total: int | None) -> Iterator[Bar]:
    """A bar with elapsed and remaining time; with several ranks, only the first one shows it.

    >>> with progress_bar("training", 100) as advance:
    ...     advance(1, "training, loss 0.3")
    """
    from ..distributed import rank

    bar = _SilentBar(text, total) if rank() > 0 else Bar(text, total)
    try:
        yield bar
    finally:
        bar.stop()


class Bar:
    """A progress bar. Call it with the number of steps done since the last call and, optionally, a new text.

    It is drawn at the first update. If stderr is not a terminal, it prints a line for every tenth instead.
    """

    def __init__(self, text: str, total: int | None) -> None:
        self.text, self.done, self.total = text, 0.0, float(total or 0)
        self._drawn: Progress | None = None
        self._tenth = 0.0

    def __call__(self, done: int = 1, text: str | None = None) -> None:
        self._show(self.done + done, self.total, text or self.text)

    def reach(self, completed: float, total: float, text: str) -> None:
        """Move to `completed` of `total`, for jobs that track their own progress, resumed ones included."""
        self._show(completed, total, text)

    def stop(self) -> None:
        """Stop drawing, so that others can print."""
        if self._drawn is not None:
            self._drawn.stop()

    def _show(self, done: float, total: float, text: str) -> None:
        self.done, self.total, self.text = done, total, printable(text)
        if console.is_terminal:
            self._draw()
        elif total:
            self._log(10 * done // total)

    def _draw(self) -> None:
        if self._drawn is None:
            self._drawn = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                speed_estimate_period=SPEED_WINDOW,
            )
            self._drawn.add_task(self.text, total=self.total or None)
            self._drawn.start()
        task = self._drawn.task_ids[0]
        self._drawn.update(task, completed=self.done, total=self.total or None, description=self.text)

    def _log(self, tenth: float) -> None:
        if tenth < self._tenth:
            # the next stage of the job has begun
            self._tenth = 0.0
        if tenth > self._tenth:
            self._tenth = tenth
            print_note(f"{self.text} ({self.done:g} of {self.total:g})")


class _SilentBar(Bar):
    def _show(self, done: float, total: float, text: str) -> None:
        pass
