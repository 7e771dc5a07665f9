"""Progress bars on stderr, so that results on stdout stay clean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextmanager
def progress_bar(text: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar with elapsed and remaining time; call what it gives with the steps done, and with a new text if wanted.

    >>> with progress_bar("learning", 100) as advance:
    ...     advance(1, text="learning, loss 0.3")
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(text, total=total or None)
        tenth = 0

        def advance(done: int = 1, text: str | None = None) -> None:
            nonlocal tenth
            progress.update(task, advance=done, description=text)
            now = progress.tasks[0]
            # in a log file a bar cannot move: a line for every tenth instead
            if not console.is_terminal and now.total and 10 * now.completed // now.total > tenth:
                tenth = int(10 * now.completed // now.total)
                console.print(f"{now.description} ({now.completed:g} of {now.total:g})", markup=False)

        yield advance
