"""Progress of a learning run: a bar in a terminal or a notebook, or a callback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int, str], None]
"""Called with (done, total, description)."""


class ProgressBar:
    """A tqdm bar, which also works in notebooks; it appears at the first call."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int, text: str) -> None:
        # installed with huggingface_hub, and so with timm
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, dynamic_ncols=True)
        elif total != self._bar.total or done < self._bar.n:
            # the next stage of the job
            self._bar.reset(total)
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Close the bar, if it was opened."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def reporting(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """Give the callback to report to: `progress` itself, a bar for True, None for False.

    For None it is a bar in a terminal or a notebook, and None elsewhere.
    """
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not isinstance(progress, bool):
        yield progress
        return
    bar = ProgressBar()
    try:
        yield bar if progress else None
    finally:
        bar.close()
