"""Terminal output: results on stdout, everything else on stderr, both without control characters from other sources."""

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
_NESTED = ContextVar("nested", default=False)


def print_result(text: object) -> None:
    """Print a line of results to stdout."""
    typer.echo(printable(text))


def print_note(text: object) -> None:
    """Print a line to stderr, unwrapped even on a narrow terminal."""
    console.print(Text(printable(text)), soft_wrap=True)


def suggest(*words: object) -> None:
    """Print the command to run next, quoted for a shell; a verb calls this last."""
    if not _NESTED.get():
        print_note(f"next: {shlex.join(map(str, words))}")


@contextmanager
def nested_verb() -> Iterator[None]:
    """Run a verb as part of another one: its results go to stderr, and it suggests no next command."""
    token = _NESTED.set(True)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _NESTED.reset(token)


def show_warnings() -> None:
    """Print the package's log from WARNING on, whatever level and handlers other libraries set on the root logger."""
    logger = logging.getLogger("ltmp")
    if not logger.handlers:
        logger.addHandler(_NoteHandler())
        logger.setLevel(logging.WARNING)


class _NoteHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_note(self.format(record))
