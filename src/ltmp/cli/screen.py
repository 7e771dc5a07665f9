"""The screen: results on stdout, everything else on stderr; text of others is shown, never obeyed."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar

import typer
from rich.console import Console
from rich.text import Text

from ..sanitize import printable

console = Console(stderr=True)
_PART = ContextVar("part", default=False)


def say(text: object) -> None:
    """A line of results."""
    typer.echo(printable(text))


def tell(text: object) -> None:
    """A line beside the results, which no narrow screen breaks."""
    console.print(Text(printable(text)), soft_wrap=True)


def suggest(*words: object) -> None:
    """The last line of a verb: the command that comes next, as it can be pasted."""
    if not _PART.get():
        tell(f"next: {shlex.join(map(str, words))}")


@contextmanager
def part_of_another() -> Iterator[None]:
    """Inside, a verb is a part of another one: what it finds is no result yet, and it does not say what comes next."""
    token = _PART.set(True)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _PART.reset(token)


class _Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def tell_log() -> None:
    """Warnings of the package reach the screen, whatever level and handlers libraries give to the root's log."""
    logger = logging.getLogger("ltmp")
    if not logger.handlers:
        logger.addHandler(_Told())
        logger.setLevel(logging.WARNING)
