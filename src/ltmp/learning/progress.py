"""Progress of a learning run: a bar in a terminal or a notebook, or a callback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and what it is."""


class LearningBar:
    """tqdm's bar, which notebooks draw, too; drawn at the first call."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int, text: str) -> None:
        # huggingface_hub, and so timm, brings it
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, dynamic_ncols=True)
        elif total != self._bar.total or done < self._bar.n:
            # the next stage of the job
            self._bar.reset(total)
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the screen to others."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def telling(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """The callback: `progress` itself, a bar for True, none for False; for None a bar in a terminal or notebook."""
    wanted = (sys.stderr.isatty() or "ipykernel" in sys.modules) if progress is None else progress
    if not isinstance(wanted, bool):
        yield wanted
        return
    bar = LearningBar()
    try:
        yield bar if wanted else None
    finally:
        bar.close()
